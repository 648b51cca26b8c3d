"""What a killed run does not repeat: the samples and the judgments of the iteration it was in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dno
from experiments.folder import Run

Recall = Callable[..., Any]  # (phase, function, *arguments) -> function(*arguments), then or now
Remember = Callable[..., Any]  # the same with the iteration t before the phase


class RecallingPolicy:
    """A policy whose samples are kept."""

    def __init__(self, policy: Any, recall: Recall):
        self.policy, self.recall = policy, recall

    def sample(
        self,
        prompts: list[Any],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[Any, Tensor]:
        """The policy's samples, or those of this iteration before the run was killed."""
        sample = self.policy.sample
        return self.recall("sampled", sample, prompts, k, temperature, top_p, seed)

    def log_prob(self, prompts: list[Any], responses: list[Any]) -> Tensor:
        """The policy's own."""
        return self.policy.log_prob(prompts, responses)

    def parameters(self) -> Iterable[Tensor]:
        """The policy's own."""
        return self.policy.parameters()

    def frozen_copy(self) -> Any:
        """The policy's own."""
        return self.policy.frozen_copy()

    def mixed_with(self, reference: Any, weight: float) -> RecallingPolicy:
        """The mixture of the policy and a reference; its samples are kept as well."""
        return RecallingPolicy(self.policy.mixed_with(reference, weight), self.recall)


class RecallingOracle:
    """An oracle whose answers are kept."""

    def __init__(self, oracle: Any, recall: Recall):
        self.oracle, self.recall = oracle, recall

    def prefer(self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> Tensor:
        """The oracle's answers, or those of this iteration before the run was killed."""
        return self.recall("judged", self.oracle.prefer, prompts, a, b)

    def scores(self, prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> Tensor:
        """The oracle's own."""
        return self.oracle.scores(prompts, responses)


def recalling(
    policy: Any, oracle: Any, data: dno.Data, remember: Remember
) -> tuple[RecallingPolicy, RecallingOracle, dno.Data]:
    """What a loop is given, wrapped so that samples and answers of an iteration are remembered."""
    now = 0

    def recall(phase: str, *call: Any) -> Any:
        return remember(now, phase, *call)

    def data_of(t: int) -> tuple[list[Any], list[Any] | None]:
        nonlocal now
        now = t
        return data(t)

    return RecallingPolicy(policy, recall), RecallingOracle(oracle, recall), data_of


def followed(run: Run, stage: int, progress: tqdm, optimizer: torch.optim.Optimizer) -> Remember:
    """`run.remember` for the phases of a stage's iterations. The progress bar names the phase, and
    counts the steps of training."""
    steps = 0

    def remember(t: int, phase: str, *call: Any) -> Any:
        nonlocal steps
        progress.set_description({"sampled": "sampling", "judged": "judging"}[phase])
        found = run.remember([stage, t], phase, *call)
        steps = 0
        progress.set_description("scoring pi_t")
        return found

    def stepped(*_: Any) -> None:
        nonlocal steps
        steps += 1
        progress.set_description(f"training, step {steps}")

    optimizer.register_step_post_hook(stepped)
    return remember

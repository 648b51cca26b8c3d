"""What the presets with sampled responses share: rules, columns, files of an iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dno
from experiments.folder import Run
from experiments.judging import Judging
from oracle import OpenAIJudge
from pairs import (
    Groups,
    Pairs,
    best_against_worst,
    gold_against_students,
    large_margin_pairs,
    pair_kinds,
    scored_pairs,
    teacher_pairs,
)
from text import Response
from world import CLASSES, classify

# of line 6, given the margin
RULES: dict[str, Callable[[float], dno.Rule]] = {
    "large-margin": lambda margin: partial(large_margin_pairs, margin=margin),
    "best-worst": lambda margin: best_against_worst,
    "teacher": lambda margin: partial(teacher_pairs, margin=margin),
    "spin": lambda margin: gold_against_students,
    "scored": lambda margin: scored_pairs,
}
# what checkpoints of runs with sampled responses hold besides tensors and plain values
CLASSES_KEPT = (dno.SampledIteration, Groups, Pairs, dno.Best, Response)


def check_scored(config: Any) -> None:
    """ValueError unless rule scored, judgments scores and a judge that scores come together."""
    scored = config.rule == "scored"
    if scored != (config.judgments == "scores") or (scored and config.oracle == "synthetic"):
        needed = "rule scored, judgments scores and a language model that scores"
        raise ValueError(f"{needed} belong together; give all three")


# --- Columns of an iteration ----------------------------------------------------------------------


def round_numbers(it: dno.SampledIteration, hard: bool) -> dict[str, float]:
    """What Table 2 reports of an iteration.

    The samples' mean length in words. With hard targets also the new pairs by kind, how many of the
    K samples beat the gold response on average, and the share of prompts at which the best of them
    does. Comparisons without an answer are left out."""
    row = {"loss": it.loss, "steps": it.steps}
    n = len(it.groups.responses[0])
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if hard else ys)]
    row["mean_length"] = sum(len(y.split()) for y in samples) / len(samples)
    if hard:
        row |= {f"pairs_{kind}": count for kind, count in pair_kinds(it.pairs, n - 1).items()}
        against_gold = it.preferences[:, :-1, -1]
        beaten = (against_gold > 0.5).double().masked_fill(against_gold.isnan(), math.nan)
        best = beaten.nan_to_num(-1).amax(1)
        row |= {
            "student_wins": (n - 1) * beaten.nanmean(1).nanmean().item(),
            "best_of_n": best[best >= 0].mean().item(),
        }
    return row


def judgments_failed(it: dno.SampledIteration) -> float:
    """The share of the iteration's judgments that are not available."""
    n = it.preferences.shape[1]
    i, j = torch.triu_indices(n, n, 1)
    return it.preferences[:, i, j].isnan().double().mean().item()


def judged_numbers(
    it: dno.SampledIteration, config: Any, judging: Judging, hard: bool
) -> dict[str, float | None]:
    """What a judge that must be asked adds.

    The share of judgments that are not available; how often a verdict changes with the order; Table
    2's scores; how many prompts were left out because they have no gold response; requests and
    dollars of the run."""
    row: dict[str, float | None] = {}
    if isinstance(judging.judge, OpenAIJudge):
        row = {
            "judgments_failed": judgments_failed(it),
            "flip_rate": judging.judge.flip_rate(it.groups.prompts, it.groups.responses),
        }
    if hard and config.judgments == "scores":
        row |= {
            "student_score": it.r_t[:, :-1].nanmean().item(),
            "teacher_score": it.r_t[:, -1].nanmean().item(),
        }
    if row or judging.teacher:
        row |= {"prompts_dropped": config.prompts - len(it.groups.prompts), **judging.spending()}
    return row


def without_nan(row: dict[str, Any]) -> dict[str, Any]:
    """The row with None in place of every NaN, which JSON does not have."""
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}


# --- Files of an iteration ------------------------------------------------------------------------


def write_round(run: Run, iteration: int, it: dno.SampledIteration, hard: bool, rated: str) -> None:
    """responses-TTT.jsonl and pairs-TTT.jsonl of an iteration; rated: what r_t is, win_rate or
    score, null if not judged."""
    groups, n = it.groups, len(it.groups.responses[0])
    responses = [
        {
            "prompt": x,
            "response": y,
            "by": "teacher" if hard and i == n - 1 else "student",
            rated: None if math.isnan(r) else r,
            "class": CLASSES[classify(y)],
        }
        for x, ys, rs in zip(groups.prompts, groups.responses, it.r_t.tolist(), strict=True)
        for i, (y, r) in enumerate(zip(ys, rs, strict=True))
    ]
    pairs = []
    for x, i, j in it.pairs.tolist():
        first, second = groups.responses[x][i], groups.responses[x][j]
        label = 1.0 if hard else torch.sigmoid(it.r_t[x, i] - it.r_t[x, j]).item()
        pair = {"prompt": groups.prompts[x], "first": first, "second": second, "label": label}
        pairs.append(pair)
    run.write_lines(f"responses-{iteration:03d}.jsonl", responses)
    run.write_lines(f"pairs-{iteration:03d}.jsonl", pairs)


def written(prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, str]]:
    """A line of a file for each response, with its prompt."""
    return [{"prompt": x, "response": y} for x, y in zip(prompts, responses, strict=True)]


# --- What a killed run does not repeat ------------------------------------------------------------

Recall = Callable[..., Any]  # (phase, function, *arguments) -> function(*arguments), then or now
Remember = Callable[..., Any]  # the same with the iteration t before the phase


class RecallingPolicy:
    """A policy whose samples are kept: a run that is killed and resumed does not repeat them."""

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
        return RecallingPolicy(self.policy.mixed_with(bare(reference), weight), self.recall)


class RecallingOracle:
    """An oracle whose answers are kept: a run that is killed and resumed does not ask twice."""

    def __init__(self, oracle: Any, recall: Recall):
        self.oracle, self.recall = oracle, recall

    def prefer(self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> Tensor:
        """The oracle's answers, or those of this iteration before the run was killed."""
        return self.recall("judged", self.oracle.prefer, prompts, a, b)

    def scores(self, prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> Tensor:
        """The oracle's own."""
        return self.oracle.scores(prompts, responses)


def bare(policy: Any) -> Any:
    """The policy itself, whether it is wrapped or not."""
    return policy.policy if isinstance(policy, RecallingPolicy) else policy


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


def followed(run: Run, progress: tqdm, optimizer: torch.optim.Optimizer) -> Remember:
    """`run.remember` for the phases of iterations. The progress bar names the phase, and counts the
    steps of training."""
    steps = 0

    def remember(t: int, phase: str, *call: Any) -> Any:
        nonlocal steps
        progress.set_description({"sampled": "sampling", "judged": "judging"}[phase])
        found = run.remember([t], phase, *call)
        steps = 0
        progress.set_description("scoring pi_t")
        return found

    def stepped(*_: Any) -> None:
        nonlocal steps
        steps += 1
        progress.set_description(f"training, step {steps}")

    optimizer.register_step_post_hook(stepped)
    return remember

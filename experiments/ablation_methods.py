"""The methods that the preset "ablations" compares, on the world of text."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

import dno
from experiments.rounds import Stage
from oracle import RegisterJudge
from pairs import (
    demote_repetitions,
    form_pairs,
    gold_against_students,
    join,
    large_margin_pairs,
    replay,
    teacher_pairs,
)
from text import TextPolicy


@dataclass(frozen=True)
class Start:
    """What a method is given: the fine-tuned policy to train, the judge, data and validation, and
    Algorithm 2 with its tuned numbers, which a method changes."""

    policy: TextPolicy
    data: dno.Data
    validation: Callable[[], float]
    stage: Stage
    margin: float
    tau: float | None
    judge: RegisterJudge

    def run(self, **changes: Any) -> Iterator[dno.SampledIteration]:
        """The algorithm with these changes of its stage."""
        stage = replace(self.stage, **changes)
        return stage.loop(self.policy, self.judge, self.data, self.validation)

    def offline(self, loss: dno.PairLoss) -> Iterator[dno.SampledIteration]:
        """As Algorithm 2, but samples and reference are pi_1's in all iterations: preference data
        collected beforehand."""
        policy, settings, T = self.policy, self.stage.settings, self.stage.iterations
        pi_1, optimizer = policy.frozen_copy(), dno.adam(policy, self.stage.momentum)
        best = dno.validated(policy, 1, self.validation)
        for t in range(1, T + 1):
            seed, generator = dno.random_numbers(settings.seed, t)
            groups = dno.sample_groups(pi_1, *self.data(t), settings, seed)
            preferences = dno.judge_groups(self.judge, groups)
            r = dno.group_win_rates(dno.draw_outcomes(preferences, generator))
            r, may_be_positive = demote_repetitions(r, groups, settings)
            pairs = large_margin_pairs(r, may_be_positive, self.margin)
            D = dno.with_reference(form_pairs(groups, r, pairs), pi_1)
            rate = settings.rate(t, T)
            fit = dno.fit_pairs(policy, D, loss, optimizer, settings, rate, generator)
            best = dno.validated(policy, t + 1, self.validation, best)
            yield dno.SampledIteration(t, groups, preferences, r, pairs, [], best, **fit)


def sft_on_positives(start: Start) -> Iterator[dno.SampledIteration]:
    """Likelihood of the better response of each offline pair. The worse one plays no part, nor does
    eta."""
    return start.offline(lambda log_ratio1, log_ratio2, r1, r2: -log_ratio1)


def offline_dpo(start: Start) -> Iterator[dno.SampledIteration]:
    """DPO on pairs of pi_1's samples and the teacher's, with reference pi_1."""
    return start.offline(dno.hard_targets(start.stage.eta))


def spin(start: Start) -> Iterator[dno.SampledIteration]:
    """The teacher's response against each of the student's, on policy, without a judge."""
    return start.run(rule=gold_against_students)


def dno_restrictive(start: Start) -> Iterator[dno.SampledIteration]:
    """Only pairs in which the teacher beats the student."""
    return start.run(rule=partial(teacher_pairs, margin=start.margin))


def dno_without_margin(start: Start) -> Iterator[dno.SampledIteration]:
    """Every pair that is no tie."""
    return start.run(rule=partial(large_margin_pairs, margin=0.0))


def dno_practical(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 2 as it is."""
    return start.run()


def dno_lookahead(start: Start) -> Iterator[dno.SampledIteration]:
    """DPO that knows the pairs of the future, but not their order.

    DNO runs first. Then pi_1, which is also the reference, is trained anew on all the pairs that
    DNO has seen, shuffled."""
    policy, settings, T = start.policy, start.stage.settings, start.stage.iterations
    pi_1 = policy.frozen_copy()
    explorer = replace(start, policy=copy.deepcopy(policy), validation=lambda: 0.0)
    rounds = list(dno_practical(explorer))
    seen = replay([it.earlier[0] for it in rounds], 1.0, torch.Generator(), decay=1.0)
    D = dno.with_reference(join(seen), pi_1)
    generator = dno.random_numbers(settings.seed, 0)[1]
    optimizer = dno.adam(policy, start.stage.momentum)
    best = dno.validated(policy, 1, start.validation)
    prompts = -(-len(D.group.unique()) // T)  # of each part
    parts = D.batches(prompts, generator)
    parts += [D.take(torch.arange(0))] * (T - len(parts))
    loss = dno.hard_targets(start.stage.eta)
    for t, (part, it) in enumerate(zip(parts, rounds, strict=True), 1):
        rate = settings.rate(t, T)
        fit = dno.fit_pairs(policy, part, loss, optimizer, settings, rate, generator)
        best = dno.validated(policy, t + 1, start.validation, best)
        yield replace(it, best=best, **fit)


def regularized_dno(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 4, option I, reference pi_1."""
    tau = start.stage.eta / 20 if start.tau is None else start.tau
    return start.run(algorithm=4, tau=tau)


def soft_targets_moving_reference(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 3's regression, with a reference that moves every 5 iterations.

    r_t is estimated from K + 1 samples, so from as many judgments as the others ask for."""
    tau = start.stage.eta / 2 if start.tau is None else start.tau
    settings = replace(start.stage.settings, samples=start.stage.settings.samples + 1)
    return start.run(algorithm=3, tau=tau, move_reference_every=5, settings=settings)


Setting = tuple[float, float]  # (lr, eta)


class Method(NamedTuple):
    """A method and how it is tuned."""

    algorithm: int  # of which it is a variant
    run: Callable[[Start], Iterator[dno.SampledIteration]]
    settings: tuple[Setting, ...]  # to tune over, four each
    panel: str  # of the figure, which methods of the same name share


GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (2.0, 8.0))
SOFT_GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (0.25, 0.5))
SFT_GRID = tuple((lr, 8.0) for lr in (2e-4, 5e-4, 1e-3, 2e-3))
METHODS = {
    "SFT on positives": Method(2, sft_on_positives, SFT_GRID, "offline"),
    "offline DPO": Method(2, offline_dpo, GRID, "offline"),
    "SPIN": Method(2, spin, GRID, "teacher first"),
    "DNO-Restrictive": Method(2, dno_restrictive, GRID, "teacher first"),
    "DNO without margin": Method(2, dno_without_margin, GRID, "DNO"),
    "DNO-Lookahead": Method(2, dno_lookahead, GRID, "offline"),
    "DNO": Method(2, dno_practical, GRID, "DNO"),
    "regularised DNO": Method(4, regularized_dno, GRID, "DNO"),
    "soft targets, moving reference": Method(3, soft_targets_moving_reference, SOFT_GRID, "DNO"),
}
ORDERINGS = (  # the paper's, by win rate: (better, worse)
    ("DNO", "DNO-Restrictive"),
    ("DNO-Restrictive", "SPIN"),
    ("DNO", "offline DPO"),
    ("offline DPO", "SFT on positives"),
    ("DNO", "DNO without margin"),
)

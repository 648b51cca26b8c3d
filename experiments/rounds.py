"""What all presets with sampled responses share: an algorithm with its numbers, the columns and the
files of an iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import dno
from experiments.folder import Run
from experiments.judging import Judging
from oracle import OpenAIJudge
from pairs import (
    SamplingSettings,
    best_against_worst,
    gold_against_students,
    large_margin_pairs,
    pair_kinds,
    scored_pairs,
    teacher_pairs,
)
from regularized import algorithm3_sampled, algorithm4

# of line 6, given the margin
RULES: dict[str, Callable[[float], dno.Rule]] = {
    "large-margin": lambda margin: partial(large_margin_pairs, margin=margin),
    "best-worst": lambda margin: best_against_worst,
    "teacher": lambda margin: partial(teacher_pairs, margin=margin),
    "spin": lambda margin: gold_against_students,
    "scored": lambda margin: scored_pairs,
}


@dataclass(frozen=True)
class Stage:
    """An algorithm of a run with its numbers; 1 and 3 with r_t estimated from samples."""

    algorithm: int
    iterations: int
    eta: float
    tau: float
    option: str
    move_reference_every: int
    rule: dno.Rule
    momentum: float  # Adam's
    settings: SamplingSettings

    @property
    def hard(self) -> bool:
        """Does it contrast pairs (Algorithms 2 and 4), rather than regress on soft targets?"""
        return self.algorithm in (2, 4)

    def loop(
        self,
        policy: Any,
        oracle: dno.Preferences,
        data: dno.Data,
        validate: Callable[[], float],
        start: dno.SampledStart | None = None,
    ) -> Iterator[dno.SampledIteration]:
        """The generator of the algorithm."""
        start = start or dno.SampledStart(dno.adam(policy, self.momentum))
        given = (policy, oracle, data, self.eta, self.iterations)
        common: dict[str, Any] = {"settings": self.settings, "start": start}
        if self.algorithm == 2:
            return dno.algorithm2(*given, self.rule, validate, **common)
        common["move_reference_every"] = self.move_reference_every
        if self.algorithm == 4:
            option = self.option
            return algorithm4(*given, self.rule, validate, self.tau, option=option, **common)
        return algorithm3_sampled(*given, validate, self.tau, **common)


# --- Columns of an iteration ----------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """An iteration, and what it was a part of."""

    it: dno.SampledIteration
    stage: Stage
    judging: Judging

    @property
    def gold(self) -> bool:
        """Is the last response of each group a gold one?"""
        return self.stage.hard and len(self.it.groups.responses[0]) > self.stage.settings.samples


Row = dict[str, Any]
Metric = Callable[[Round], Row]  # columns of a round, none where they are not defined


def training(round: Round) -> Row:
    """Of the training: mean loss in nats and Adam steps; the mean length in words of the samples of
    pi_t; with hard targets the mean of log pi(y+)/pi_t(y+) over the last batch."""
    it = round.it
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if round.gold else ys)]
    words = sum(len(y.split()) for y in samples) / len(samples)
    row = {"loss": it.loss, "steps": it.steps, "sampled_words": words}
    return {**row, "chosen_log_ratio": it.chosen_log_ratio} if round.stage.hard else row


def new_pairs(round: Round) -> Row:
    """How many of the new pairs are of which kind, as in Table 2."""
    gold = len(round.it.groups.responses[0]) - 1 if round.gold else -1
    return {f"pairs_{kind}": count for kind, count in pair_kinds(round.it.pairs, gold).items()}


def against_gold(round: Round) -> Row:
    """Of the samples of pi_t against the gold response, as in Table 2: their win rate, how many of
    a prompt's K beat it, the share of prompts at which the best of them does."""
    if not round.gold:
        return {}
    preferences = round.it.preferences[:, :-1, -1]
    beaten = (preferences > 0.5).double().masked_fill(preferences.isnan(), math.nan)
    best = beaten.nan_to_num(-1).amax(1)
    return {
        "sampled_vs_teacher": preferences.nanmean().item(),
        "student_wins": beaten.shape[1] * beaten.nanmean(1).nanmean().item(),
        "best_of_n": best[best >= 0].mean().item(),
    }


def judgments(round: Round) -> Row:
    """Of the judgments: the share without an answer, and, of a judge that is asked in both orders,
    how often a verdict changes with the order."""
    n, judge = round.it.preferences.shape[1], round.judging.judge
    i, j = torch.triu_indices(n, n, 1)
    row: Row = {"judgments_failed": round.it.preferences[:, i, j].isnan().double().mean().item()}
    if isinstance(judge, OpenAIJudge):
        groups = round.it.groups
        row["flip_rate"] = judge.flip_rate(groups.prompts, groups.responses)
    return row


def points(round: Round) -> Row:
    """The mean points of the samples of pi_t, and of gold responses, where the judge gives some."""
    if round.stage.settings.judgments != "scores":
        return {}
    r_t = round.it.r_t
    if not round.gold:
        return {"student_score": r_t.nanmean().item()}
    students, teachers = r_t[:, :-1].nanmean().item(), r_t[:, -1].nanmean().item()
    return {"student_score": students, "teacher_score": teachers}


def spending(round: Round) -> Row:
    """Requests and dollars of the run so far, if anybody is asked."""
    return round.judging.spending() if round.judging.asked else {}


METRICS: tuple[Metric, ...] = (training, new_pairs, against_gold, judgments, points, spending)


def columns(round: Round, metrics: Sequence[Metric]) -> Row:
    """What the metrics say of a round."""
    return {name: value for metric in metrics for name, value in metric(round).items()}


def without_nan(row: Row) -> Row:
    """The row with None in place of every NaN, which JSON does not have."""
    return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in row.items()}


# --- Files of an iteration ------------------------------------------------------------------------


def write_round(run: Run, number: int, round: Round, label: Callable[[str], Row]) -> None:
    """responses-TTT.jsonl and pairs-TTT.jsonl of the iteration of that number in the run.

    A response has its win_rate or score (r_t), null if it was not judged, and what `label` says of
    it. A pair has the label of its loss: 1, or sigma(r1 - r2) with soft targets."""
    it, hard, n = round.it, round.stage.hard, len(round.it.groups.responses[0])
    rated = "score" if round.stage.settings.judgments == "scores" else "win_rate"
    responses = [
        {
            "prompt": x,
            "response": y,
            "by": "teacher" if round.gold and i == n - 1 else "student",
            rated: None if math.isnan(r) else r,
            **label(y),
        }
        for x, ys, rs in zip(it.groups.prompts, it.groups.responses, it.r_t.tolist(), strict=True)
        for i, (y, r) in enumerate(zip(ys, rs, strict=True))
    ]
    pairs = []
    for x, i, j in it.pairs.tolist():
        prompt, ys = it.groups.prompts[x], it.groups.responses[x]
        z = 1.0 if hard else torch.sigmoid(it.r_t[x, i] - it.r_t[x, j]).item()
        pairs.append({"prompt": prompt, "first": ys[i], "second": ys[j], "label": z})
    run.write_lines(f"responses-{number:03d}.jsonl", responses)
    run.write_lines(f"pairs-{number:03d}.jsonl", pairs)


def written(prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, str]]:
    """A line of a file for each response, with its prompt."""
    return [{"prompt": x, "response": y} for x, y in zip(prompts, responses, strict=True)]

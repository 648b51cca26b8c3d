"""How a policy is measured on held-out prompts."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dno
from judge.ledger import Stopped
from judge.statistics import mean_interval, win_rate_report
from model import choose
from oracle import RegisterJudge
from pairs import repeats_ngrams
from text import Response, TextPolicy
from world import CLASSES, classify, prompt_class

KINDS = ("teacher_student", "student_teacher", "student_student")
SCORED = 192  # samples of a policy that it and pi_1 score: more would double the text runs' time
SURVEYS = 200  # of the Nash policy, of which the noise floor is the mean
Row = dict[str, Any]


class Validation:
    """Remembers every call: the first measures pi_1, the next pi_2. `numbers` has a row of each.

    It draws k samples of each held-out prompt, for all policies with the same random numbers. A
    subclass says how they are judged (`compared`)."""

    score = "win_rate_vs_teacher"  # the column by which the best policy is chosen

    def __init__(self, policy: TextPolicy, prompts: list[str], k: int, seed: int):
        self.policy, self.distinct, self.k, self.seed = policy, prompts, k, seed
        self.prompts = [x for x in prompts for _ in range(k)]
        self.pi_1 = dno.parameters_of(policy)
        self.first: list[Response] = []  # samples of pi_1
        self.last: list[Response] = []  # of the policy that was measured last
        self.numbers: list[Row] = []

    def __call__(self) -> float:
        """Measure the policy as it is; returns its score, for Alg. 2, line 9."""
        survey = self.policy.survey(self.distinct, self.k, self.seed)
        new = [y for ys in survey for y in ys]
        self.first = self.first or new
        row = {**self.compared(new), **self.watched(new)}
        self.last = new
        self.numbers.append(row)
        return row[self.score]

    def compared(self, new: list[Response]) -> Row:
        """The columns that say how good the new samples are, among them `score`."""
        raise NotImplementedError

    @torch.no_grad()
    def watched(self, new: list[Response]) -> Row:
        """What users watch, of samples of the policy as it is.

        Their mean length in words; which shares of them are cut off, repeat a run of three words,
        or are empty. Of at most `SCORED` of them the KL divergence from pi_1, nats a response, and
        the perplexity under pi_1, a token."""
        n = len(new)
        which = sorted(random.Random(self.seed).sample(range(n), min(n, SCORED)))
        prompts, samples = [self.prompts[i] for i in which], [new[i] for i in which]
        own, weights = self.policy.log_prob(prompts, samples), dno.parameters_of(self.policy)
        self.policy.load(self.pi_1)
        first = self.policy.log_prob(prompts, samples)
        self.policy.load(weights)
        tokens = sum(len(y.tokens) for y in samples)
        return {
            "mean_length": sum(len(y.split()) for y in new) / n,
            "truncated": sum(not self.policy.finished(y) for y in new) / n,
            "repeated": sum(repeats_ngrams(y.split(), 3) for y in new) / n,
            "empty": sum(not y.strip() for y in new) / n,
            "kl_to_first": (own - first).mean().item(),
            "perplexity_under_first": math.exp(-first.double().sum().item() / tokens),
        }

    def state(self) -> dict[str, Any]:
        """All that was found, for `restore`."""
        return {"first": self.first, "last": self.last, "numbers": self.numbers}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`; from None, forget everything."""
        known = state or {"first": [], "last": [], "numbers": []}
        self.first, self.last, self.numbers = known["first"], known["last"], [*known["numbers"]]


class TableValidation(Validation):
    """Measures by the table of the synthetic judge, which looks at a response's class only: win
    rates and gaps follow from how often each class occurs, without a further judgment.

    `shares` [T+1, X, 4] are those frequencies, pi_1's first."""

    def __init__(
        self, policy: TextPolicy, prompts: list[str], k: int, seed: int, gold: Sequence[str]
    ):
        super().__init__(policy, prompts, k, seed)
        self.P = RegisterJudge().P[[prompt_class(x) for x in prompts]]
        self.teacher = class_shares(gold, len(prompts))
        self.shares = torch.empty(0, len(prompts), len(CLASSES), dtype=torch.float64)

    def compared(self, new: list[Response]) -> Row:
        """Gaps of pi_{t+1} and of unif(pi_1..pi_t), and the win rates of pi_{t+1}."""
        last, before = class_shares(new, len(self.distinct)), self.shares
        self.shares = torch.cat([before, last[None]])
        gap, interval = self.gap(last)
        row = {
            "gap_last": gap,
            "gap_last_interval": interval,
            "gap_nash": dno.duality_gap(self.P, self.nash),
            "win_rate_vs_teacher": dno.win_rate(self.P, last, self.teacher),
        }
        if len(before):
            row["gap_average"], row["gap_average_interval"] = self.gap(before.mean(0))
            row["win_rate_vs_previous"] = dno.win_rate(self.P, last, before[-1])
        return row

    def watched(self, new: list[Response]) -> Row:
        """How often each class occurs besides."""
        return {**share_columns(new), **super().watched(new)}

    def gap(self, shares: Tensor) -> tuple[float, float]:
        """Duality gap, and half of its 95% interval, over prompts."""
        return mean_interval(2 * dno.expected_win_rate(self.P, shares).amax(-1) - 1)

    @cached_property
    def nash(self) -> Tensor:
        """The exact Nash policy over classes, [X, 4]."""
        return dno.nash(self.P)

    @cached_property
    def floor(self) -> float:
        """The gap that would be measured of the Nash policy itself, by chance."""
        generator = torch.Generator().manual_seed(self.seed)
        X, k = len(self.distinct), self.k
        rows, gaps = self.nash.log().repeat_interleave(k, dim=0), []
        for _ in range(SURVEYS):
            u = torch.rand(X, k, generator=generator, dtype=torch.float64)
            u = (torch.arange(k) + u) / k  # stratified, as in `TextPolicy.survey`
            drawn = choose(rows, u.flatten(), 1.0, 1.0).view(X, k)
            gaps.append(self.gap(F.one_hot(drawn, len(CLASSES)).double().mean(1))[0])
        return sum(gaps) / len(gaps)

    def state(self) -> dict[str, Any]:
        """All that was found, for `restore`."""
        return {**super().state(), "shares": self.shares}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`; from None, forget everything."""
        super().restore(state)
        self.shares = state["shares"] if state else self.shares[:0]


class JudgedValidation(Validation):
    """Measures by a judge that must be asked: samples compete with gold responses, if there are
    any, with those of the policy before and, unless it is the small world of text, with pi_1's.

    registers: is it the small world of text, where classes are counted?"""

    def __init__(
        self,
        policy: TextPolicy,
        prompts: list[str],
        k: int,
        seed: int,
        judge: dno.Preferences,
        gold: list[str] | None = None,
        registers: bool = False,
    ):
        super().__init__(policy, prompts, k, seed)
        self.judge, self.registers = judge, registers
        self.gold = None if gold is None else [y for y in gold for _ in range(k)]
        self.score = f"win_rate_vs_{'teacher' if registers else 'first'}"

    def opponents(self) -> dict[str, list[Any]]:
        """Responses that the next policy's samples compete with, by name."""
        found: dict[str, list[Any]] = {} if self.gold is None else {"teacher": self.gold}
        if self.numbers and not self.registers:
            found["first"] = self.first
        if len(self.numbers) > (not self.registers):  # pi_2's policy before is pi_1
            found["previous"] = self.last
        return found

    def compared(self, new: list[Response]) -> Row:
        """The win rates over all opponents, that over gold responses or pi_1 with its interval and
        at equal length. All are asked for together. Stopped if there is no answer."""
        row: Row = {} if self.numbers or self.registers else {self.score: 0.5}  # pi_1 itself
        opponents = self.opponents()
        if not opponents:
            return row
        n, others = len(opponents), [y for ys in opponents.values() for y in ys]
        preferences = self.judge.prefer(self.prompts * n, new * n, others).split(len(new))
        for (name, ys), P in zip(opponents.items(), preferences, strict=True):
            lead = [len(y) - len(z) for y, z in zip(new, ys, strict=True)]
            row |= against(name, win_rate_report(P, self.prompts, lead))
        if self.numbers and "previous" not in opponents:
            row["win_rate_vs_previous"] = row["win_rate_vs_first"]
        return row

    def watched(self, new: list[Response]) -> Row:
        """How often each class occurs besides, in the small world of text."""
        return {**(share_columns(new) if self.registers else {}), **super().watched(new)}


def against(name: str, report: Row) -> Row:
    """The columns of a report on comparisons with an opponent. Stopped if there is no answer."""
    column = f"win_rate_vs_{name}"
    if name == "previous":
        return {column: report["win_rate"]}
    if report["n_parsed"] == 0:
        raise Stopped("the judge has no answer to any question of the validation")
    return {
        column: report["win_rate"],
        f"{column}_interval": report["interval"],
        f"{column}_length_controlled": report["length_controlled"],
        "n": report["n"],
        "n_parsed": report["n_parsed"],
    }


def class_shares(responses: Sequence[str], X: int) -> Tensor:
    """How often each class occurs among equally many responses to each of X prompts, [X, 4]."""
    classes = torch.tensor([classify(y) for y in responses]).view(X, -1)
    return F.one_hot(classes, len(CLASSES)).double().mean(1)


def share_columns(responses: Sequence[str]) -> Row:
    """How often each class occurs, as columns."""
    shares = class_shares(responses, 1)[0].tolist()
    return {f"share_{name}": share for name, share in zip(CLASSES, shares, strict=True)}


def alarms(row: Row, first: Row) -> list[str]:
    """Warnings about an iteration's row, given the numbers of pi_1.

    Responses are longer by half than pi_1's; more of them are cut off, repetitive or empty; the
    policy is far from pi_1; chosen responses have become less probable; or there is no pair. A NaN
    counts as a warning."""
    found = []
    words, first_words = row["mean_length"], first["mean_length"]
    if not words <= 1.5 * first_words:
        found.append(f"responses have {words:.1f} words on average, pi_1's {first_words:.1f}")
    for name, what in (("truncated", "cut off"), ("repeated", "repetitive"), ("empty", "empty")):
        if not row[name] <= first[name] + 0.15:
            share = f"{row[name]:.0%} of the responses are {what}"
            found.append(f"{share}, {first[name]:.0%} of pi_1's")
    if not row["kl_to_first"] <= 30:
        found.append(f"the policy is {row['kl_to_first']:.0f} nats from pi_1")
    if not any(row[f"pairs_{kind}"] for kind in KINDS):
        reason = "the samples are too alike for the margin, or the judge gave no answer"
        found.append(f"no pair: {reason}")
    elif not row.get("chosen_log_ratio", 0.0) >= -1:
        fall = f"{-row['chosen_log_ratio']:.1f} nats in the iteration"
        found.append(f"log pi of the chosen responses has fallen by {fall}")
    return found

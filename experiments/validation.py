"""How a policy is measured on held-out prompts."""

from __future__ import annotations

import math
import random
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dno
from chat.policy import ChatPolicy
from experiments.judging import Judging, answered
from judge.ledger import Stopped
from judge.statistics import win_rate_report
from model import choose
from oracle import OpenAITeacher, RegisterJudge
from pairs import repeats_ngrams
from text import Response, TextPolicy
from world import CLASSES, HELD_OUT, classify, prompt_class, teacher_answer

KINDS = ("teacher_student", "student_teacher", "student_student")


class Validation:
    """Measures a policy on held-out prompts, by a survey of its samples.

    `shares` [T+1, X, 4]: how often each class occurs among them, pi_1's first. The synthetic judge
    looks at the class only, so that win rates and gaps follow without a further judgment."""

    HEADER = "P(> teacher) | gap: last        average    | P(new > old)"

    def __init__(
        self,
        policy: TextPolicy,
        judge: RegisterJudge,
        k: int,
        seed: int,
        teacher: OpenAITeacher | None = None,
    ):
        self.policy, self.k, self.seed = policy, k, seed
        draw = random.Random(seed)
        self.prompts, self.gold = list(HELD_OUT), [teacher_answer(x, draw) for x in HELD_OUT]
        if teacher:
            self.prompts, self.gold = answered(teacher, self.prompts)
            if not self.prompts:
                raise Stopped("the teacher has no answer to any held-out prompt")
        self.P = judge.P[[prompt_class(x) for x in self.prompts]]
        classes = torch.tensor([classify(y) for y in self.gold])
        self.teacher = F.one_hot(classes, len(CLASSES)).double()
        self.shares = torch.empty(0, len(self.prompts), len(CLASSES), dtype=torch.float64)
        self.responses: list[list[Response]] = []

    def __call__(self) -> float:
        """Survey the policy as it is. Returns its win rate over the teacher, the score of Alg. 2,
        line 9."""
        return dno.win_rate(self.P, self.survey(), self.teacher)

    def survey(self) -> Tensor:
        """How often each class occurs among the policy's samples, [X, 4]; joins `shares`."""
        self.responses = self.policy.survey(self.prompts, self.k, self.seed)
        classes = torch.tensor([[classify(y) for y in ys] for ys in self.responses])
        shares = F.one_hot(classes, len(CLASSES)).double().mean(1)
        self.shares = torch.cat([self.shares, shares[None]])
        return shares

    @cached_property
    def nash(self) -> Tensor:
        """The exact Nash policy over classes, [X, 4]."""
        return dno.nash(self.P)

    def state(self) -> dict[str, Any]:
        """All that was found."""
        return {"shares": self.shares}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`, or forget everything."""
        self.shares = state["shares"] if state else self.shares[:0]

    def first(self) -> dict[str, Any]:
        """The numbers of pi_1; prints them, with the exact Nash policy's and the noise floor."""
        gap, interval = self.gap(self.shares[0])
        won = dno.win_rate(self.P, self.shares[0], self.teacher)
        well_formed = 1 - self.shares[0].mean(0)[-1].item()
        print(
            f"pi_1: gap {gap:.3f} +- {interval:.3f}, "
            f"P(> teacher) {won:.3f}, well-formed {well_formed:.3f}"
        )
        floor, exact = self.floor(self.nash), dno.duality_gap(self.P, self.nash)
        nash_won = dno.win_rate(self.P, self.nash, self.teacher)
        teacher_gap = dno.duality_gap(self.P, self.teacher)
        print(
            f"Exact Nash: gap {exact:.0e}, measured as here {floor:.3f} (the noise floor); "
            f"P(Nash > teacher) {nash_won:.3f}, gap of the teacher {teacher_gap:.3f}"
        )
        return {
            "gap_first": gap,
            "gap_first_interval": interval,
            "win_rate_vs_teacher_first": won,
            "well_formed_first": well_formed,
            "gap_floor": floor,
        }

    def gap(self, shares: Tensor) -> tuple[float, float]:
        """Duality gap, and half of its 95% interval, over prompts (normal approximation)."""
        by_prompt = 2 * dno.expected_win_rate(self.P, shares).amax(-1) - 1
        return by_prompt.mean().item(), 1.96 * by_prompt.std().item() / len(by_prompt) ** 0.5

    def floor(self, nash: Tensor) -> float:
        """The gap that would be measured of the Nash policy itself, by chance: the mean of 200
        surveys of it."""
        X, k = len(nash), self.k
        generator = torch.Generator().manual_seed(self.seed)
        rows, gaps = nash.log().repeat_interleave(k, dim=0), []
        for _ in range(200):
            u = torch.rand(X, k, generator=generator, dtype=torch.float64)
            u = (torch.arange(k) + u) / k  # stratified, as in `TextPolicy.survey`
            drawn = choose(rows, u.flatten(), 1.0, 1.0).view(X, k)
            gaps.append(self.gap(F.one_hot(drawn, len(CLASSES)).double().mean(1))[0])
        return sum(gaps) / len(gaps)

    def row(self) -> dict[str, float]:
        """The numbers of pi_{t+1}, the last policy surveyed, with those of unif(pi_1..pi_t)."""
        before, last = self.shares[-2], self.shares[-1]
        gap_last, interval = self.gap(last)
        gap_average, interval_average = self.gap(self.shares[:-1].mean(0))
        return {
            "gap_last": gap_last,
            "gap_last_interval": interval,
            "gap_average": gap_average,
            "gap_average_interval": interval_average,
            "win_rate_vs_previous": dno.win_rate(self.P, last, before),
            "win_rate_vs_teacher": dno.win_rate(self.P, last, self.teacher),
            **self.share_columns(),
            "gap_nash": dno.duality_gap(self.P, self.nash),
        }

    def share_columns(self) -> dict[str, float]:
        """How often the last policy writes in each class."""
        return {
            f"share_{name}": self.shares[-1][:, i].mean().item() for i, name in enumerate(CLASSES)
        }

    @staticmethod
    def line(row: dict[str, float]) -> str:
        """The columns under `HEADER`."""
        gaps = "  ".join(
            f"{row[name]:.3f} +- {row[name + '_interval']:.3f}"
            for name in ("gap_last", "gap_average")
        )
        return f"{row['win_rate_vs_teacher']:12.3f} | {gaps} | {row['win_rate_vs_previous']:12.3f}"


class JudgedValidation(Validation):
    """Measures a policy by a judge that must be asked.

    Some samples of each held-out prompt compete with the teacher's answer, and with as many samples
    of the policy before. There are no gaps: they need P itself."""

    HEADER = "P(> teacher)  at equal length | answers | P(new > old)"

    def __init__(self, policy: TextPolicy, judging: Judging, config: Any):
        super().__init__(policy, RegisterJudge(), config.survey, config.seed, judging.teacher)
        self.judge, self.count = judging.judge, config.judged
        self.samples: list[str] = []
        self.numbers: dict[str, float] = {}

    def __call__(self) -> float:
        """Have the policy as it is judged, all in one go. Returns its win rate over the teacher.
        Stopped if there is no answer."""
        self.survey()
        before, k = self.samples, self.count
        survey = self.policy.survey(self.prompts, k, self.seed + 1)
        self.samples = [str(y) for ys in survey for y in ys]
        prompts = [x for x in self.prompts for _ in range(k)]
        gold = [y for y in self.gold for _ in range(k)]
        both = 2 if before else 1
        preferences = self.judge.prefer(prompts * both, self.samples * both, gold + before)
        lead = [len(y) - len(z) for y, z in zip(self.samples, gold, strict=True)]
        report = win_rate_report(preferences[: len(gold)], prompts, lead)
        if report["n_parsed"] == 0:
            raise Stopped("the judge has no answer to any question of the validation")
        self.numbers = {
            "win_rate_vs_teacher": report["win_rate"],
            "win_rate_vs_teacher_interval": report["interval"],
            "win_rate_vs_teacher_length_controlled": report["length_controlled"],
            "n": report["n"],
            "n_parsed": report["n_parsed"],
        }
        if before:
            self.numbers["win_rate_vs_previous"] = preferences[len(gold) :].nanmean().item()
        return report["win_rate"]

    def state(self) -> dict[str, Any]:
        """All that was found, and the samples that the next policy is compared with."""
        return {"shares": self.shares, "samples": self.samples, "numbers": self.numbers}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`, or forget everything."""
        super().restore(state)
        self.samples, self.numbers = (state["samples"], state["numbers"]) if state else ([], {})

    def first(self) -> dict[str, Any]:
        """The numbers of pi_1; prints them."""
        found, well_formed = self.numbers, 1 - self.shares[0].mean(0)[-1].item()
        won, interval = found["win_rate_vs_teacher"], found["win_rate_vs_teacher_interval"]
        controlled = found["win_rate_vs_teacher_length_controlled"]
        print(
            f"pi_1: P(> teacher) {won:.3f} +- {interval:.3f}, at equal length {controlled:.3f}, "
            f"{found['n_parsed']} of {found['n']} judged; well-formed {well_formed:.3f}"
        )
        first = {f"{name}_first": value for name, value in found.items()}
        return {**first, "well_formed_first": well_formed}

    def row(self) -> dict[str, float]:
        """The numbers of pi_{t+1}, the last policy judged."""
        return {**self.numbers, **self.share_columns()}

    @staticmethod
    def line(row: dict[str, float]) -> str:
        """The columns under `HEADER`."""
        won, interval = row["win_rate_vs_teacher"], row["win_rate_vs_teacher_interval"]
        controlled = row["win_rate_vs_teacher_length_controlled"]
        answers = f"{row['n_parsed']:3d}/{row['n']:3d}"
        previous = f"{row['win_rate_vs_previous']:12.3f}"
        return f"{won:.3f} +- {interval:.3f}  {controlled:11.3f}    | {answers} | {previous}"


class ChatValidation:
    """Measures a policy on held-out prompts: its samples against as many of pi_1 and of the policy
    before, drawn with the same random numbers; and what users of such methods watch."""

    def __init__(
        self,
        policy: ChatPolicy,
        judge: dno.Preferences,
        prompts: list[str],
        config: Any,
        first: list[Tensor],
    ):
        self.policy, self.judge, self.config = policy, judge, config
        self.prompts = [x for x in prompts for _ in range(config.judged)]
        self.distinct, self.first_weights = prompts, first
        self.samples: list[list[Response]] = []  # of pi_1, pi_2, ...
        self.numbers: list[dict[str, float]] = []

    def __call__(self) -> float:
        """Sample from the policy as it is and have it judged. Returns its win rate over pi_1.
        Stopped if there is no answer."""
        survey = self.policy.survey(self.distinct, self.config.judged, self.config.seed)
        new = [y for ys in survey for y in ys]
        self.samples.append(new)
        if len(self.samples) == 1:
            self.numbers.append(self.watched(new))
            return 0.5
        first, old = self.samples[0], self.samples[-2]
        both = 2 if len(self.samples) > 2 else 1  # at first the old samples are pi_1's
        others = (first + old)[: both * len(new)]
        preferences = self.judge.prefer(self.prompts * both, new * both, others)
        lead = [len(y) - len(z) for y, z in zip(new, first, strict=True)]
        report = win_rate_report(preferences[: len(new)], self.prompts, lead)
        if report["n_parsed"] == 0:
            raise Stopped("the judge has no answer to any question of the validation")
        self.numbers.append(
            {
                "win_rate_vs_first": report["win_rate"],
                "win_rate_vs_first_interval": report["interval"],
                "win_rate_vs_first_length_controlled": report["length_controlled"],
                "win_rate_vs_previous": preferences[-len(new) :].nanmean().item(),
                **self.watched(new),
            }
        )
        return report["win_rate"]

    @torch.no_grad()
    def watched(self, samples: list[Response]) -> dict[str, float]:
        """What users watch, of samples of the policy as it is.

        Their mean length in words; which shares of them are cut off, repeat a run of three words,
        or are empty; the KL divergence from pi_1 estimated on them, nats a response; and their
        perplexity under pi_1, a token."""
        own = self.policy.log_prob(self.prompts, samples)
        weights = self.policy.weights()
        self.policy.load(self.first_weights)
        first = self.policy.log_prob(self.prompts, samples)
        self.policy.load(weights)
        tokens, n = sum(len(y.tokens) for y in samples), len(samples)
        return {
            "mean_length": sum(len(y.split()) for y in samples) / n,
            "truncated": sum(not self.policy.finished(y) for y in samples) / n,
            "repeated": sum(repeats_ngrams(y.split(), 3) for y in samples) / n,
            "empty": sum(not y.strip() for y in samples) / n,
            "kl_to_first": (own - first).mean().item(),
            "perplexity_under_first": math.exp(-first.double().sum().item() / tokens),
        }


def alarms(row: dict[str, float], first: dict[str, float]) -> list[str]:
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
    elif not row["chosen_log_ratio"] >= -1:
        fall = f"{-row['chosen_log_ratio']:.1f} nats in the iteration"
        found.append(f"log pi of the chosen responses has fallen by {fall}")
    return found

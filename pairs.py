"""Line 6 of Algorithm 2: which of a prompt's responses are trained on as (better, worse).

Groups of responses, the settings by which they are sampled, the rules that form pairs of them, and
the pairs as training data, with replay of earlier ones. dno.py says how responses are sampled,
judged and fitted.

Axes: X prompts, n responses to each (K samples, then the gold one if there is any), B pairs, M
different responses in the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from checks import check_positive, check_whole

ROUNDING = 1e-9  # of differences of win rates: .6 - .2 is below .4 in floating point


# --- Groups of responses --------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """X prompts with n responses each: K samples, then the gold one if there is any."""

    prompts: list[Any]
    responses: list[list[Any]]
    log_pi_t: Tensor  # [X, n], under pi_t; NaN where it is not known


@dataclass(frozen=True)
class SamplingSettings:
    """What Algorithms 2 and 4 leave to practice.

    The defaults are those of sections 4 and 5, except where a comment names small models and the
    paper's value."""

    samples: int = 5  # K
    temperature: float = 0.7
    top_p: float = 0.95
    # r_t by {0, 1} samples of P, as line 5 says; by P itself, "probabilities"; by points, "scores"
    judgments: str = "outcomes"
    # a response that repeats a run of so many words is a negative (the paper: many runs); 0: none
    ngram: int = 3
    words: Callable[[Any], Sequence[Any]] = str.split  # what those runs are made of
    replay: float = (
        0.3  # at most this share of the pairs of t - 1 again; half of it of t - 2's; ...
    )
    replay_iterations: int = 4  # how far back
    prompts_per_step: int = 12  # whose pairs are a batch (small models; the paper's has 64 pairs)
    # of an iteration's first step; it falls to 0 within the iteration (small models; 5e-5)
    learning_rate: float = 1e-3
    learning_rate_decay: float = 0.8  # share by which the last iteration's is smaller
    max_grad_norm: float = 0.05  # a malformed sample has up to 20 times the usual (small models)
    use_recorded: bool = True  # log pi_t as recorded while sampling; False: scored anew
    prompts_at_once: int | None = None  # whose pairs are scored together; None: the whole batch's
    trained_samples: int | None = None  # with soft targets; all K samples remain opponents
    seed: int = 0  # of samples, outcomes, replay and batches

    def __post_init__(self) -> None:
        check_whole(1, samples=self.samples, prompts_per_step=self.prompts_per_step)
        check_whole(0, ngram=self.ngram, replay_iterations=self.replay_iterations)
        if self.prompts_at_once is not None:
            check_whole(1, prompts_at_once=self.prompts_at_once)
        if self.trained_samples is not None:
            check_whole(2, trained_samples=self.trained_samples)
        check_positive(temperature=self.temperature, top_p=self.top_p)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        if self.judgments not in ("outcomes", "probabilities", "scores"):
            expected = "expected outcomes, probabilities or scores"
            raise ValueError(f"judgments is {self.judgments!r}; {expected}")
        for name in ("top_p", "replay", "learning_rate_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share of at most 1")

    def rate(self, t: int, iterations: int) -> float:
        """The learning rate at the start of iteration t of 1..T."""
        decay = self.learning_rate_decay * (t - 1) / max(1, iterations - 1)
        return self.learning_rate * (1 - decay)


def repeats_ngrams(words: Sequence[Any], n: int) -> bool:
    """Does some run of n words occur twice?"""
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) < len(runs)


def demote_repetitions(
    r: Tensor, groups: Groups, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Repetitive responses are automatic negatives (section 5).

    Returns r [X, n] with theirs set to 0, and which responses may be a positive, [X, n]."""
    n, words = settings.ngram, settings.words
    repeats = torch.tensor(
        [[n > 0 and repeats_ngrams(words(y), n) for y in ys] for ys in groups.responses]
    )
    return r.masked_fill(repeats, 0.0), ~repeats


# --- Rules of line 6 ------------------------------------------------------------------------------
# A rule says which pairs (x, y+, y-) to train on, int64 [B, 3]: from the win rates (or scores) r
# [X, n], the gold response's last, and from which responses may be a positive, [X, n]. A response
# that was not judged has NaN and is in no pair, except in SPIN's, which does not ask the judge; a
# repetition needs no judge to be a negative.


def large_margin_pairs(r: Tensor, may_be_positive: Tensor, margin: float) -> Tensor:
    """All pairs with r(y+) - r(y-) >= margin and r(y+) > r(y-): Alg. 2, line 6."""
    lead = r.unsqueeze(-1) - r.unsqueeze(-2)
    enough = (lead >= margin - ROUNDING) & (lead > ROUNDING)
    return (enough & may_be_positive.unsqueeze(-1)).nonzero()


def scored_pairs(scores: Tensor, may_be_positive: Tensor) -> Tensor:
    """Section 5's rule for scores of 0 to 6: a positive has at least 5 points.

    Its negative has at least 2 points less, or 1 point less if the positive is the student's."""
    lead = torch.full_like(scores, 1.0)
    lead[:, -1] = 2.0
    enough = scores.unsqueeze(-1) - scores.unsqueeze(-2) >= lead.unsqueeze(-1)
    return (enough & ((scores >= 5) & may_be_positive).unsqueeze(-1)).nonzero()


def best_against_worst(r: Tensor, may_be_positive: Tensor) -> Tensor:
    """One pair a prompt: the best response that may be a positive against the worst of all.

    Of several equally good or bad ones the first counts. A prompt has no pair if the best is not
    better than the worst."""
    best = r.nan_to_num(float("-inf")).masked_fill(~may_be_positive, float("-inf")).argmax(-1)
    x, worst = torch.arange(len(r)), r.nan_to_num(float("inf")).argmin(-1)
    better = may_be_positive[x, best] & (r[x, best] > r[x, worst] + ROUNDING)
    return torch.stack([x, best, worst], dim=-1)[better]


def teacher_pairs(r: Tensor, may_be_positive: Tensor, margin: float) -> Tensor:
    """DNO-Restrictive: the large-margin pairs in which the gold response beats a student's."""
    pairs = large_margin_pairs(r, may_be_positive, margin)
    return pairs[pairs[:, 1] == r.shape[1] - 1]


def gold_against_students(r: Tensor, may_be_positive: Tensor) -> Tensor:
    """SPIN (Chen et al. 2024): the gold response against each of the student's, better or not."""
    wanted = torch.zeros(*r.shape, r.shape[1], dtype=torch.bool)
    wanted[:, -1, :-1] = may_be_positive[:, -1:]
    return wanted.nonzero()


def all_pairs(r: Tensor) -> Tensor:
    """Every unordered pair of every group once, [B, 3]: for soft targets, which need no ranking."""
    known = ~r.isnan()
    return (known.unsqueeze(-1) & known.unsqueeze(-2)).triu(1).nonzero()


def pair_kinds(pairs: Tensor, gold: int) -> dict[str, int]:
    """How many pairs set the teacher over a student, a student over it, students apart (Table 2).

    gold: the gold response's place in its group, -1 if there is none."""
    pos, neg = pairs[:, 1] == gold, pairs[:, 2] == gold
    return {
        "teacher_student": int(pos.sum()),
        "student_teacher": int(neg.sum()),
        "student_student": int((~pos & ~neg).sum()),
    }


# --- Pairs as training data -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Training data of line 7: M responses, each there once, and B pairs of them."""

    prompts: list[Any]  # [M]
    responses: list[Any]  # [M]
    group: Tensor  # [M], the number of the prompt
    r: Tensor  # [M], estimated win rates
    log_reference: Tensor  # [M], the reference of the loss; NaN where it is still to be scored
    first: Tensor  # [B], index into the M responses: y+, or y1
    second: Tensor  # [B]: y-, or y2

    def take(self, which: Tensor) -> Pairs:
        """Only the pairs of these numbers, and only the responses that they need."""
        both = torch.cat([self.first[which], self.second[which]])
        members, place = both.unique(return_inverse=True)
        prompts, responses = (
            [part[m] for m in members.tolist()] for part in (self.prompts, self.responses)
        )
        group, r, log_reference = (
            part[members] for part in (self.group, self.r, self.log_reference)
        )
        return Pairs(prompts, responses, group, r, log_reference, *place.view(2, -1))

    def batches(self, prompts: int, generator: torch.Generator) -> list[Pairs]:
        """All pairs, their prompts in random order, those of so many prompts a batch."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        place = torch.randperm(len(groups), generator=generator)[of_pair]
        return self._parts(place // prompts, -(-len(groups) // prompts))

    def pieces(self, prompts: int | None) -> list[Pairs]:
        """All pairs, those of so many prompts a piece, in order; one piece when None."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        prompts = prompts or len(groups)
        return self._parts(of_pair // prompts, -(-len(groups) // prompts))

    def _parts(self, part: Tensor, count: int) -> list[Pairs]:
        return [self.take((part == number).nonzero()[:, 0]) for number in range(count)]


def form_pairs(groups: Groups, r: Tensor, pairs: Tensor) -> Pairs:
    """The given pairs (x, y+, y-) [B, 3] of the groups, whose win rates are r [X, n]."""
    n, (x, pos, neg) = r.shape[1], pairs.unbind(-1)
    prompts = [prompt for prompt in groups.prompts for _ in range(n)]
    responses = [y for ys in groups.responses for y in ys]
    group = torch.arange(len(prompts)) // n
    log_pi_t = groups.log_pi_t.cpu().flatten()
    every = Pairs(prompts, responses, group, r.flatten(), log_pi_t, x * n + pos, x * n + neg)
    return every.take(torch.arange(len(pairs)))


def join(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of the parts together, their prompts kept apart."""
    starts = np.cumsum([0] + [len(part.responses) for part in parts]).tolist()[:-1]
    number = torch.cat([torch.full_like(part.group, i) for i, part in enumerate(parts)])
    group = torch.cat([part.group for part in parts])
    group = number * (1 + int(group.max()) if len(group) else 1) + group
    first, second = (
        torch.cat([getattr(part, name) + at for part, at in zip(parts, starts, strict=True)])
        for name in ("first", "second")
    )
    return Pairs(
        [x for part in parts for x in part.prompts],
        [y for part in parts for y in part.responses],
        group.unique(return_inverse=True)[1],
        torch.cat([part.r for part in parts]),
        torch.cat([part.log_reference for part in parts]),
        first,
        second,
    )


def replay(
    earlier: Sequence[Pairs], share: float, generator: torch.Generator, decay: float = 0.5
) -> list[Pairs]:
    """A share of the pairs of iteration t - 1, decay times that of those of t - 2, ..., at random.

    At most 30%, 15%, ... in section 5. Their log_reference is NaN: pi_t has not scored them yet."""
    parts = []
    for age, pairs in enumerate(earlier):
        count = int(share * decay**age * len(pairs.first))
        part = pairs.take(torch.randperm(len(pairs.first), generator=generator)[:count])
        unknown = torch.full_like(part.log_reference, float("nan"))
        parts.append(replace(part, log_reference=unknown))
    return parts

"""Line 6 of Algorithm 2: which of a prompt's responses are trained on as (better, worse).

Groups of responses, the settings by which they are sampled, the rules that form pairs of them, and
the pairs as training data, with replay of earlier ones. dno.py says how responses are sampled,
judged and fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)


def real_tensor(value: Any, name: str) -> Tensor:
    """value as a tensor of real numbers. A tensor stays as it is. What else torch.as_tensor takes
    is converted, Python numbers to float64. ValueError naming what is neither, or is complex."""
    kind, expected = type(value).__name__, "expected a tensor of real numbers"
    try:
        table = torch.as_tensor(value, dtype=None if hasattr(value, "dtype") else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "pass its .P" if hasattr(value, "P") else "pass a tensor, or rows of equal length"
        raise ValueError(f"{name} is of type {kind}; {expected}: {hint}") from error
    if table.is_complex():
        raise ValueError(f"{name} is {table.dtype}; {expected}: pass its real part, {name}.real")
    return table


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first value that is not a finite number above 0. Nor may its
    inverse overflow or vanish in float32: from an infinite r / eta come policies of NaN."""
    for name, value in values.items():
        if not (isinstance(value, Real) and FLOAT32.tiny <= value <= 1 / FLOAT32.tiny):
            bounds = f"{FLOAT32.tiny:.1e} to {1 / FLOAT32.tiny:.1e}"
            expected = f"expected a finite number above 0, from {bounds}"
            raise ValueError(f"{name} is {value!r}; {expected}")


def check_whole(least: int, **values: int) -> None:
    """Raise ValueError naming the first value that is not a whole number of at least `least`."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and value >= least):
            expected = f"expected a whole number of at least {least}"
            raise ValueError(f"{name} is {value!r}; {expected}")


# --- Groups of responses
# ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """X prompts with n responses each: K samples, then the gold one if there is any. log_pi_t [X,
    n], NaN where not known."""

    prompts: list[Any]
    responses: list[list[Any]]
    log_pi_t: Tensor


@dataclass(frozen=True)
class Practice:
    """What Algorithms 2 and 4 leave to practice; defaults are section 5's, or made for small models
    where it says so."""

    samples: int = 5  # K
    temperature: float = 0.7
    top_p: float = 0.95
    # r_t by {0, 1} samples of P, as line 5 says; by "probabilities" P; by "scores" (section 5)
    judgments: str = "outcomes"
    # a response in which a run of this many words occurs twice is a repetition: it loses all, 0 for
    # never
    ngram: int = 3
    # share of iteration t - 1's pairs to train on again, at most; half of it of t - 2's, and so on
    replay: float = 0.3
    replay_iterations: int = 4  # how far back
    prompts_per_step: int = 12  # whose pairs make up a batch (small models; the paper has 64 pairs)
    # of the first step; falls to 0 within an iteration (small models; the paper's is 5e-5)
    learning_rate: float = 1e-3
    fall: float = 0.8  # by which share the learning rate has fallen in the last iteration
    max_grad_norm: float = (
        0.05  # a malformed sample can have a gradient 20 times the usual (small models)
    )
    # the loss takes log pi_t as recorded when sampling; else it is scored anew, where bfloat16
    # sampled
    recorded: bool = True
    at_once: int | None = (
        None  # prompts of a batch whose pairs are scored together; gradients add up. All when None
    )
    trained: int | None = (
        # of the soft-target regression: at most so many samples are trained on, all K are opponents
        None
    )

    def __post_init__(self) -> None:
        check_whole(1, samples=self.samples, prompts_per_step=self.prompts_per_step)
        check_whole(0, ngram=self.ngram, replay_iterations=self.replay_iterations)
        if self.at_once is not None:
            check_whole(1, at_once=self.at_once)
        if self.trained is not None:
            check_whole(2, trained=self.trained)
        check_positive(temperature=self.temperature, top_p=self.top_p)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        if self.judgments not in ("outcomes", "probabilities", "scores"):
            raise ValueError(
                f"judgments is {self.judgments!r}; expected outcomes, probabilities or scores"
            )
        if self.top_p > 1 or not 0 <= self.replay <= 1 or not 0 <= self.fall <= 1:
            raise ValueError(
                f"top_p {self.top_p}, replay {self.replay}, fall {self.fall}: expected shares of at most 1"
            )

    def rate(self, t: int, iterations: int) -> float:
        """The learning rate at the start of iteration t of 1..T."""
        return self.learning_rate * (1 - self.fall * (t - 1) / max(1, iterations - 1))


def repeats_ngrams(words: Sequence[Any], n: int) -> bool:
    """Does some run of n words occur twice?"""
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) < len(runs)


def demote_repetitions(
    r: Tensor, groups: Groups, words: Callable[[Any], Sequence[Any]], n: int
) -> tuple[Tensor, Tensor]:
    """Repetitions are automatic negatives (section 5): r [X, n] with theirs set to 0, and who may
    be a positive, [X, n]."""
    repeats = torch.tensor(
        [[n > 0 and repeats_ngrams(words(y), n) for y in ys] for ys in groups.responses]
    )
    return r.masked_fill(repeats, 0.0), ~repeats


# --- Rules of line 6
# -------------------------------------------------------------------------------


# Rules of line 6: which pairs (x, y+, y-) of the groups to train on, int64 [B, 3], from the win
# rates (or scores) r [X, n], the
# gold response's last, and from who may be a positive, usable [X, n]. NaN, a response that was not
# judged, is in no pair (SPIN,
# which does not ask the judge, aside).
ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point


def large_margin_pairs(r: Tensor, usable: Tensor, margin: float) -> Tensor:
    """All pairs with r(y+) - r(y-) >= margin and r(y+) > r(y-): Alg. 2, line 6."""
    lead = r.unsqueeze(-1) - r.unsqueeze(-2)
    return ((lead >= margin - ROUNDING) & (lead > ROUNDING) & usable.unsqueeze(-1)).nonzero()


def scored_pairs(scores: Tensor, usable: Tensor) -> Tensor:
    """Section 5's rule for scores of 0 to 6: a positive has at least 5, its negative at least 2
    less, or at least 1 less if the positive is the student's."""
    lead = torch.full_like(scores, 1.0)
    lead[:, -1] = 2.0
    enough = scores.unsqueeze(-1) - scores.unsqueeze(-2) >= lead.unsqueeze(-1)
    return (enough & ((scores >= 5) & usable).unsqueeze(-1)).nonzero()


def best_against_worst(r: Tensor, usable: Tensor) -> Tensor:
    """One pair a prompt: the best response that may be a positive against the worst (the first of
    equals), if it is better."""
    best = r.nan_to_num(float("-inf")).masked_fill(~usable, float("-inf")).argmax(-1)
    x, worst = torch.arange(len(r)), r.nan_to_num(float("inf")).argmin(-1)
    return torch.stack([x, best, worst], dim=-1)[
        usable[x, best] & (r[x, best] > r[x, worst] + ROUNDING)
    ]


def teacher_pairs(r: Tensor, usable: Tensor, margin: float) -> Tensor:
    """DNO-Restrictive: of the large-margin pairs those in which the gold response beats a
    student's."""
    pairs = large_margin_pairs(r, usable, margin)
    return pairs[pairs[:, 1] == r.shape[1] - 1]


def gold_against_students(r: Tensor, usable: Tensor) -> Tensor:
    """SPIN (Chen et al. 2024): the gold response against each of the student's, whoever is better."""
    wanted = torch.zeros(*r.shape, r.shape[1], dtype=torch.bool)
    wanted[:, -1, :-1] = usable[:, -1:]
    return wanted.nonzero()


def all_pairs(r: Tensor) -> Tensor:
    """Every unordered pair of every group once, for soft targets, which need no ranking: [B, 3]."""
    known = ~r.isnan()
    return (known.unsqueeze(-1) & known.unsqueeze(-2)).triu(1).nonzero()


def pair_kinds(pairs: Tensor, gold: int) -> dict[str, int]:
    """How many pairs (x, y+, y-) set teacher over student, student over teacher, student over
    student (Table 2); gold is the gold response's place in its group."""
    pos, neg = pairs[:, 1] == gold, pairs[:, 2] == gold
    return {
        "teacher_student": int(pos.sum()),
        "student_teacher": int(neg.sum()),
        "student_student": int((~pos & ~neg).sum()),
    }


# --- Training pairs
# --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Training data of line 7: M responses, each there once, and B pairs of them. Of prompt number
    group [M], with estimated win rates r [M]; log_reference [M] is the reference of the loss, NaN
    where it is still to be found."""

    prompts: list[Any]
    responses: list[Any]
    group: Tensor
    r: Tensor
    log_reference: Tensor
    first: Tensor  # [B], index into the M responses: y+, or y1
    second: Tensor  # [B]: y-, or y2

    def take(self, which: Tensor) -> Pairs:
        """Only the pairs of these numbers, and only the responses that they need."""
        members, place = torch.cat([self.first[which], self.second[which]]).unique(
            return_inverse=True
        )
        prompts, responses = (
            [part[m] for m in members.tolist()] for part in (self.prompts, self.responses)
        )
        return Pairs(
            prompts,
            responses,
            self.group[members],
            self.r[members],
            self.log_reference[members],
            *place.view(2, -1),
        )

    def batches(self, prompts: int, generator: torch.Generator) -> list[Pairs]:
        """All pairs, their prompts in random order, those of so many prompts a batch."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        place = torch.randperm(len(groups), generator=generator)[of_pair]
        return [
            self.take((place // prompts == batch).nonzero()[:, 0])
            for batch in range(-(-len(groups) // prompts))
        ]

    def pieces(self, prompts: int | None) -> list[Pairs]:
        """All pairs, those of so many prompts a piece, in order; one piece when None."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        prompts = prompts or len(groups)
        return [
            self.take((of_pair // prompts == piece).nonzero()[:, 0])
            for piece in range(-(-len(groups) // prompts))
        ]


def form_pairs(groups: Groups, r: Tensor, pairs: Tensor) -> Pairs:
    """The given pairs (x, y+, y-) [B, 3] of the groups, whose win rates are r [X, n]."""
    n, (x, pos, neg) = r.shape[1], pairs.unbind(-1)
    prompts = [prompt for prompt in groups.prompts for _ in range(n)]
    responses, group = [y for ys in groups.responses for y in ys], torch.arange(len(prompts)) // n
    log_pi_t, first, second = groups.log_pi_t.cpu().flatten(), x * n + pos, x * n + neg
    return Pairs(prompts, responses, group, r.flatten(), log_pi_t, first, second).take(
        torch.arange(len(pairs))
    )


def join(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of the parts together, their prompts kept apart."""
    starts = np.cumsum([0] + [len(part.responses) for part in parts]).tolist()
    prompts, responses = (
        [item for part in parts for item in getattr(part, name)]
        for name in ("prompts", "responses")
    )
    group, r, log_reference = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("group", "r", "log_reference")
    )
    number = torch.cat([torch.full_like(part.group, i) for i, part in enumerate(parts)])
    group = (number * (1 + int(group.max()) if len(group) else 1) + group).unique(
        return_inverse=True
    )[1]
    first, second = (
        torch.cat([getattr(part, name) + start for part, start in zip(parts, starts, strict=False)])
        for name in ("first", "second")
    )
    return Pairs(prompts, responses, group, r, log_reference, first, second)


def replay(
    earlier: Sequence[Pairs], share: float, generator: torch.Generator, decay: float = 0.5
) -> list[Pairs]:
    """Of the pairs of iterations t-1, t-2, ... a share, decay times that, ..., drawn at random: at
    most 30%, 15%, ... in section 5. What pi_t makes of them is not known yet."""
    chosen = []
    for age, pairs in enumerate(earlier):
        kept = torch.randperm(len(pairs.first), generator=generator)[
            : int(share * decay**age * len(pairs.first))
        ]
        part = pairs.take(kept)
        chosen.append(
            replace(part, log_reference=torch.full_like(part.log_reference, float("nan")))
        )
    return chosen

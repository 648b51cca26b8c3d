"""Preference oracles: with which probability does one response beat another?

An oracle is any object with `prefer` and `win_rates` (the `Oracle` protocol); `check_oracle` tries
one. Tables (`PreferenceTable`) know every probability; prompts and responses are then indices.
`RegisterJudge` reads the texts of world.py, among which preferences go round in a circle.
`OpenAIJudge` asks a language model, and `OpenAITeacher` has one write gold responses; how a server
is asked is judge/'s.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, Protocol

import torch
from torch import Tensor

from dno import check_preferences
from judge.endpoint import Endpoint
from judge.questions import Question, pairwise_question, scored_question, teacher_question
from pairs import real_tensor
from world import VERBS, classify, prompt_class

# how far two answers to the same question may lie apart: float32 rounding, not a matter of opinion
AGREEMENT = 1e-5


class Oracle(Protocol):
    """P(a > b | x) for prompts and responses of any kind: texts for a judge, indices for a table."""

    complementary: (
        bool  # promises P(a > b) + P(b > a) = 1 exactly; a judge that looks at the order may not
    )
    deterministic: bool  # promises the same answer to the same question

    def prefer(
        self, prompts: Sequence[Any] | Tensor, a: Sequence[Any] | Tensor, b: Sequence[Any] | Tensor
    ) -> Tensor:
        """Probability [B] that response a[i] beats response b[i] to prompts[i], in [0, 1]; NaN if
        it is not to be had."""

    def win_rates(self, prompt: Any, responses: Sequence[Any] | Tensor) -> Tensor:
        """For each of n >= 2 responses to one prompt its mean probability of beating one of the n -
        1 others, [n]."""


def check_oracle(
    oracle: Oracle, prompts: Sequence[Any] | Tensor, responses: Sequence[Any] | Tensor
) -> None:
    """Ask about every pair of the responses, for every prompt, and raise ValueError naming the
    first broken promise: values outside [0, 1]; P(a > b) + P(b > a) != 1 or P(a > a) != 1/2 where
    `complementary`; a second answer that differs from the first where `deterministic`, also when
    asked one pair at a time; `win_rates` other than the mean over the others."""
    n = len(responses)
    for x in range(len(prompts)):
        i, j = (
            index.flatten()
            for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
        )

        def ask(i: Tensor, j: Tensor, x: int = x) -> Tensor:
            return oracle.prefer(
                *(
                    _pick(*pick)
                    for pick in ((prompts, [x] * len(i)), (responses, i), (responses, j))
                )
            )

        P = ask(i, j).view(n, n)
        where = f"prompt {x}: "
        if not ((P >= 0) & (P <= 1)).all():
            raise ValueError(
                where
                + f"prefer gave {P.min():.6g} to {P.max():.6g}; expected probabilities in [0, 1]"
            )
        if oracle.complementary and (worst := (P + P.T - 1).abs().max()) > AGREEMENT:
            raise ValueError(
                where
                + f"P(a > b) + P(b > a) is off 1 by {worst:.6g}; expected 1, as it is complementary"
            )
        if oracle.deterministic:
            singly = torch.stack(
                [ask(i[pair : pair + 1], j[pair : pair + 1])[0] for pair in range(n * n)]
            ).view(n, n)
            for name, again in {
                "asked again": ask(i, j).view(n, n),
                "asked one by one": singly,
            }.items():
                if (worst := (P - again).abs().max()) > AGREEMENT:
                    raise ValueError(
                        where
                        + f"{name}, an answer changed by {worst:.6g}; expected none, as it is deterministic"
                    )
            others = (P.sum(1) - P.diagonal()) / (n - 1)
            rates = oracle.win_rates(_pick(prompts, [x])[0], responses)
            if rates.shape != (n,) or (worst := (rates - others).abs().max()) > AGREEMENT:
                raise ValueError(
                    where + f"win_rates is {rates.tolist()}; expected the means {others.tolist()}"
                )


def _pick(items: Sequence[Any] | Tensor, index: Sequence[int] | Tensor) -> Sequence[Any] | Tensor:
    return (
        items[torch.as_tensor(index)]
        if isinstance(items, Tensor)
        else [items[int(i)] for i in index]
    )


# --- Tables and games -----------------------------------------------------------------------------


class PreferenceTable:
    """The oracle that knows P [X, Y, Y] by heart. Prompts and responses are indices, as int64
    tensors [B]. Raises ValueError naming the first bad entry if P is not a preference function."""

    complementary = deterministic = True

    def __init__(self, P: Tensor):
        self.P = check_preferences(P)

    def prefer(self, prompts: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """P(a > b | x), [B]."""
        return self.P[prompts, a, b]

    def win_rates(self, prompt: Tensor | int, responses: Tensor) -> Tensor:
        """Mean probability of each of responses [n] of beating one of the n - 1 others, [n]."""
        P = self.P[prompt][responses][:, responses]
        return (P.sum(1) - P.diagonal()) / (len(responses) - 1)


def rock_paper_scissors(a: float = 0.4, b: float = 0.4, c: float = 0.4) -> PreferenceTable:
    """One prompt, three responses in a cycle: P(1 > 2) = 1/2 + a, P(2 > 3) = 1/2 + b, P(3 > 1) =
    1/2 + c, each in [0, 1/2]. The Nash policy is (b, c, a) / (a + b + c), by the three indifference
    conditions, if all are positive."""
    edge = torch.tensor([[0.0, a, -c], [-a, 0.0, b], [c, -b, 0.0]], dtype=torch.float64)
    return PreferenceTable((0.5 + edge).unsqueeze(0))


def bradley_terry(rewards: Tensor) -> PreferenceTable:
    """P(y > y') = sigma(r(y) - r(y')) of rewards [X, Y]: transitive, so its Nash policy is the
    argmax of the reward."""
    rewards = real_tensor(rewards, "rewards").double()
    return PreferenceTable(torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2)))


def _skew(X: int, n: int, generator: torch.Generator) -> Tensor:
    """Skew-symmetric [X, n, n] with standard normal entries above the diagonal."""
    upper = torch.randn(X, n, n, generator=generator, dtype=torch.float64).triu(1)
    return upper - upper.mT


def random_game(prompts: int, responses: int, seed: int) -> PreferenceTable:
    """P(y > y') drawn uniformly from [0, 1] for each prompt and pair."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(
        prompts, responses, responses, generator=generator, dtype=torch.float64
    ).triu(1)
    return PreferenceTable(
        upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(responses, dtype=torch.float64)
    )


def random_feature_game(
    prompts: int, responses: int, seed: int, features: int = 8
) -> PreferenceTable:
    """P = sigma(f A f^T): normal features f [Y, F] shared by the prompts, and for each a
    skew-symmetric A of entries of order 1/sqrt(F). Intransitive wherever A has rank above 2;
    responses differ as little as their features do."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(responses, features, generator=generator, dtype=torch.float64)
    return PreferenceTable(
        torch.sigmoid(f @ (_skew(prompts, features, generator) / features**0.5) @ f.T)
    )


def response_styles(vocabulary: int, length: int) -> Tensor:
    """How far each of the V^L responses leans to each of three styles, [V^L, 3] in [0, 1], rows
    summing to at most 1: the mean over its words, of which word v leans to style v mod 3 with
    strength 1 / (1 + v // 3). In lexicographic order."""
    v = torch.arange(vocabulary)
    word = torch.zeros(vocabulary, 3, dtype=torch.float64)
    word[v, v % 3] = 1 / (1 + v // 3).double()
    total = torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(length):
        total = (total.unsqueeze(1) + word).flatten(0, 1)
    return total / length


def style_game(prompts: int, vocabulary: int, length: int, seed: int) -> PreferenceTable:
    """The default game of `train.py`: P = sigma(s C_x s'^T + 4 (|s| - |s'|) + 0.3 n_x(y, y')), with
    s = `response_styles`.

    C_x makes style 1 beat 2, 2 beat 3 and 3 beat 1 with three strengths of the prompt's own
    (log-normal, of mean 4); |s|, the sum of the leanings, favours the stronger of two words of a
    style; n_x, of order 1, is skew-symmetric and random as in `random_feature_game`. So uniform is
    far from Nash, and the Nash policies are mixed, of several responses, and differ by prompt."""
    generator = torch.Generator().manual_seed(seed)
    s = response_styles(vocabulary, length)
    strengths = torch.exp(0.8 * torch.randn(3, prompts, generator=generator, dtype=torch.float64))
    a, b, c = 4 * strengths / strengths.mean(0)
    zero = torch.zeros_like(a)
    cycle = torch.stack([zero, a, -c, -a, zero, b, c, -b, zero], dim=-1).view(prompts, 3, 3)
    f = torch.randn(len(s), 8, generator=generator, dtype=torch.float64)
    noise = f @ (_skew(prompts, 8, generator) / 8) @ f.T
    weight = s.sum(-1)
    return PreferenceTable(
        torch.sigmoid(s @ cycle @ s.T + 4 * (weight[:, None] - weight) + 0.3 * noise)
    )


# --- A judge of the small world of text -----------------------------------------------------------


class RegisterJudge:
    """The oracle of the world of text: P(a > b | x) = `P`[class of x, class of a, class of b], [3,
    4, 4]. It looks at the prompt's verb and at the two texts, nothing else (an answer about another
    topic is none the worse for it).

    To be asked to describe or to explain, vivid beats concise, concise beats precise and precise
    beats vivid; to praise, each the other way round. Malformed text loses to all. So each class of
    prompt has a Nash policy of its own, with all registers in its support: for a cycle of edges 1/2
    + a, 1/2 + b, 1/2 + c it is (b, c, a) / (a + b + c)."""

    complementary = deterministic = True
    EDGES = (
        (-0.40, 0.25, -0.30),
        (-0.35, 0.30, -0.25),
        (0.25, -0.30, 0.35),
    )  # concise-vivid, -precise, vivid-precise

    def __init__(self) -> None:
        A = torch.full((len(VERBS), 4, 4), 0.0, dtype=torch.float64)
        A[:, :3, 3] = 0.45
        for upper, edges in zip(A, self.EDGES, strict=True):
            upper[0, 1], upper[0, 2], upper[1, 2] = edges
        self.P = check_preferences(0.5 + A - A.mT)

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B]. ValueError on a prompt that is not of this world."""
        classes = (
            [prompt_class(x) for x in prompts],
            [classify(y) for y in a],
            [classify(y) for y in b],
        )
        return self.P[tuple(torch.tensor(index, dtype=torch.long) for index in classes)]

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of responses [n] of beating one of the n - 1 others, [n]."""
        y = torch.tensor([classify(response) for response in responses])
        P = self.P[prompt_class(prompt)][y][:, y]
        return (P.sum(1) - P.diagonal()) / (len(y) - 1)


# --- Language models ------------------------------------------------------------------------------


class OpenAIJudge:
    """An oracle that asks a language model. A judgment that cannot be had is NaN.

    form "scored" (section 5): the distinct responses of a prompt, at most `candidates` of them,
    side by side in one request, each given 0 to 6 points; P(a > b) = 1 if a has more points than b,
    1/2 if as many, 0 if fewer. What a response gets may depend on the others beside it. Their order
    is shuffled, by the seed and by what they are, never by who asked. form "pairwise": two
    requests, in both orders; P(a > b) is the mean of what they say, each P(first is better) by the
    log-probabilities of the verdict where the endpoint gives them, else 0 or 1. Equal texts are
    equal, without a request (but NaN if the text could not be judged). most: characters of a text
    that the judge gets to see."""

    complementary = True

    def __init__(
        self,
        endpoint: Endpoint,
        form: str = "scored",
        *,
        seed: int = 0,
        candidates: int = 6,
        most: int = 8000,
    ):
        if form not in ("scored", "pairwise"):
            raise ValueError(f"form is {form!r}; expected scored or pairwise")
        if candidates < 2 or most < 1:
            raise ValueError(
                f"candidates is {candidates} and most {most}; expected at least 2 and 1"
            )
        self.endpoint, self.form, self.seed, self.candidates, self.most = (
            endpoint,
            form,
            seed,
            candidates,
            most,
        )
        self.deterministic = form == "pairwise"
        self.counts: Counter[str] = Counter()

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B] float64, NaN where it is not to be had. Raises Stopped."""
        triples = _different(prompts, a, b)
        P = self._by_scores(triples) if self.form == "scored" else self._by_verdicts(triples)
        known: dict[tuple[str, str], bool] = {}
        for (x, *ys), p in P.items():
            for y in ys:
                known[x, y] = known.get((x, y), False) or not math.isnan(p)
        for x, y, z in zip(
            prompts, a, b, strict=True
        ):  # a text equals itself, but if it could not be judged it has no label
            P.setdefault(
                (str(x), str(y), str(z)), 0.5 if known.get((str(x), str(y)), True) else math.nan
            )
        return torch.tensor(
            [P[str(x), str(y), str(z)] for x, y, z in zip(prompts, a, b, strict=True)],
            dtype=torch.float64,
        )

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of responses [n] of beating one of those others for which it is
        known, [n]."""
        n = len(responses)
        i, j = torch.tensor([(i, j) for i in range(n) for j in range(n) if i != j]).T.tolist()
        P = self.prefer([prompt] * len(i), [responses[m] for m in i], [responses[m] for m in j])
        return P.view(n, n - 1).nanmean(1)

    def scores(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Tensor:
        """Points of responses [X][n] to each prompt, [X, n] float64 from 0 to 6, NaN where not to
        be had; for form "scored"."""
        points = self._scores(
            [(str(x), str(y)) for x, ys in zip(prompts, responses, strict=True) for y in ys]
        )
        rows = [
            [points[str(x), str(y)] for y in ys] for x, ys in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def questions(
        self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
    ) -> list[Question]:
        """What `prefer` asks, for a plan of its cost."""
        triples = _different(prompts, a, b)
        if self.form == "scored":
            return [
                question
                for question, _, _ in self._sheets([(x, y) for x, *ys in triples for y in ys])
            ]
        return [self._compare(x, *two) for x, y, z in _pairs(triples) for two in ((y, z), (z, y))]

    def report(self) -> dict[str, float | None]:
        """Of this process: pairs judged by both orders; share of them in which the verdict flipped
        with the order; share of verdicts for the first response; share of judgments that could not
        be had."""
        pairs, asked = self.counts["pairs"], self.counts["asked"]
        return {
            "pairs_in_both_orders": pairs,
            "flip_rate": self.counts["flips"] / pairs if pairs else None,
            "first_rate": self.counts["first"] / (2 * pairs) if pairs else None,
            "failed_rate": self.counts["failed"] / asked if asked else None,
        }

    def flip_rate(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> float | None:
        """The share of the pairs of responses [X][n] in which the verdict changes with the order,
        for form "pairwise"; None if there are none. What was asked before is not asked again."""
        counts, self.counts = self.counts, Counter()
        if self.form == "pairwise":
            pairs = [
                (x, *two)
                for x, ys in zip(prompts, responses, strict=True)
                for two in combinations(ys, 2)
            ]
            self._by_verdicts(_different(*zip(*pairs, strict=True)) if pairs else [])
        rate, self.counts = self.report()["flip_rate"], counts
        return rate

    def _by_scores(self, triples: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], float]:
        points = self._scores([(x, y) for x, *ys in triples for y in ys])
        P = {}
        for x, y, z in triples:
            first, second = points[x, y], points[x, z]
            P[x, y, z] = (
                math.nan
                if math.isnan(first + second)
                else 0.5 * (1 + (first > second) - (first < second))
            )
        return P

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], float]:
        sheets = self._sheets(pairs)
        points = {}
        for (_, x, shown), result in zip(
            sheets, self.endpoint.ask([question for question, _, _ in sheets]), strict=True
        ):
            for y, score in zip(
                shown, result["scores"] if result else [None] * len(shown), strict=True
            ):
                points[x, y] = math.nan if score is None else float(score)
        self.counts["asked"] += len(points)
        self.counts["failed"] += sum(math.isnan(score) for score in points.values())
        return points

    def _sheets(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Question, str, list[str]]]:
        """One question for at most `candidates` distinct responses of a prompt, with the prompt and
        the responses in the order shown."""
        groups: dict[str, set[str]] = {}
        for x, y in pairs:
            groups.setdefault(x, set()).add(y)
        sheets = []
        for x, ys in groups.items():
            order = sorted(ys)
            random.Random(f"{self.seed} {x} {order}").shuffle(order)
            count = -(-len(order) // self.candidates)
            for shown in (order[part::count] for part in range(count)):
                sheets.append((scored_question(x, shown, self.most), x, shown))
        return sheets

    def _compare(self, x: str, y: str, z: str) -> Question:
        return pairwise_question(x, y, z, self.most)

    def _by_verdicts(
        self, triples: list[tuple[str, str, str]]
    ) -> dict[tuple[str, str, str], float]:
        pairs = _pairs(triples)
        answers = self.endpoint.ask(
            [self._compare(x, *two) for x, y, z in pairs for two in ((y, z), (z, y))]
        )
        P = {}
        for (x, y, z), there, back in zip(pairs, answers[::2], answers[1::2], strict=True):
            self.counts["asked"] += 1
            if there is None or back is None:
                self.counts["failed"] += 1
                there = back = math.nan
            else:
                self.counts["pairs"] += 1
                self.counts["flips"] += (there - 0.5) * (
                    back - 0.5
                ) > 0  # the place won, not the response
                self.counts["first"] += (there > 0.5) + (back > 0.5)
            P[x, y, z], P[x, z, y] = (there + 1 - back) / 2, (back + 1 - there) / 2
        return P


def _different(
    prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
) -> list[tuple[str, str, str]]:
    """The comparisons of texts that differ, as plain strings."""
    triples = ((str(x), str(y), str(z)) for x, y, z in zip(prompts, a, b, strict=True))
    return [triple for triple in triples if triple[1] != triple[2]]


def _pairs(triples: Iterable[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Every unordered pair once, its responses sorted."""
    return list(dict.fromkeys((x, min(y, z), max(y, z)) for x, y, z in triples))


class OpenAITeacher:
    """A language model that writes gold responses. max_tokens: after which an answer is cut off,
    and then is none."""

    def __init__(self, endpoint: Endpoint, max_tokens: int = 256):
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def answers(self, prompts: Sequence[str], number: int = 0) -> list[str | None]:
        """The answer to each prompt, None where there is none; another number asks for other
        answers."""
        return self.endpoint.ask(self.questions(prompts, number))

    def questions(self, prompts: Sequence[str], number: int = 0) -> list[Question]:
        """What `answers` asks."""
        return [teacher_question(str(x), self.max_tokens, number) for x in prompts]

"""Preference oracles: with which probability does one response beat another?

An oracle is any object with `prefer` and `win_rates` (the `Oracle` protocol); `check_oracle` tries
one. Tables (`PreferenceTable`) know every probability; prompts and responses are then indices.
`RegisterJudge` reads the texts of world.py, among which preferences go round in a circle.
`OpenAIJudge` asks a language model, and `OpenAITeacher` has one write gold responses; how a server
is asked is judge/'s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, permutations
from typing import Any, Protocol

import torch
from torch import Tensor

from checks import check_preferences, check_whole, real_tensor
from dno import Preferences
from judge.endpoint import Endpoint
from judge.questions import FORMS, Comparison, Question, Scored, teacher_question
from world import VERBS, classify, prompt_class

# Two answers to the same question may differ by float32's rounding, not by opinion.
AGREEMENT = 1e-5


class Oracle(Preferences, Protocol):
    """P(a > b | x), of texts for a judge, of indices for a table."""

    complementary: bool  # promises P(a > b) + P(b > a) = 1; a judge that looks at the order may not
    deterministic: bool  # promises the same answer to the same question

    def win_rates(self, prompt: Any, responses: Any) -> Tensor:
        """For each of n >= 2 responses to one prompt its mean win rate against the others, [n]."""


def check_oracle(oracle: Oracle, prompts: Any, responses: Any) -> None:
    """Ask about every pair of the responses, for every prompt.

    ValueError naming the first broken promise: a value outside [0, 1]; P(a > b) + P(b > a) != 1 or
    P(a > a) != 1/2 where `complementary`; a second answer that differs from the first where
    `deterministic`, also when pairs are asked one by one; `win_rates` other than the mean over the
    others."""
    for x in range(len(prompts)):
        broken = broken_promise(oracle, prompts, responses, x)
        if broken is not None:
            raise ValueError(f"prompt {x}: {broken}")


def broken_promise(oracle: Oracle, prompts: Any, responses: Any, x: int) -> str | None:
    """What `check_oracle` finds wrong at prompt number x; None if nothing is."""
    n = len(responses)
    pairs = torch.cartesian_prod(torch.arange(n), torch.arange(n))

    def ask(pairs: Tensor) -> Tensor:
        numbers = ((prompts, torch.full((len(pairs),), x)), *((responses, y) for y in pairs.T))
        return oracle.prefer(*(take(items, index) for items, index in numbers))

    P = ask(pairs).view(n, n)
    if not ((P >= 0) & (P <= 1)).all():
        found = f"{P.min():.6g} to {P.max():.6g}"
        return f"prefer gave {found}; expected probabilities in [0, 1]"
    off = (P + P.T - 1).abs().max()
    if oracle.complementary and off > AGREEMENT:
        return f"P(a > b) + P(b > a) is off 1 by {off:.6g}; expected 1, as it is complementary"
    if not oracle.deterministic:
        return None
    singly = torch.cat([ask(pair[None]) for pair in pairs])
    for name, answers in {"asked again": ask(pairs), "asked one by one": singly}.items():
        change = (P.flatten() - answers).abs().max()
        if change > AGREEMENT:
            expected = "expected none, as it is deterministic"
            return f"{name}, an answer changed by {change:.6g}; {expected}"
    others = (P.sum(1) - P.diagonal()) / (n - 1)
    rates = oracle.win_rates(take(prompts, torch.tensor([x]))[0], responses)
    if rates.shape != (n,) or (rates - others).abs().max() > AGREEMENT:
        return f"win_rates is {rates.tolist()}; expected the means {others.tolist()}"
    return None


def take(items: Any, index: Tensor) -> Any:
    """The items of these numbers, of a tensor or a list."""
    return items[index] if isinstance(items, Tensor) else [items[i] for i in index.tolist()]


# --- Tables and games -----------------------------------------------------------------------------


class PreferenceTable:
    """The oracle that looks P [X, Y, Y] up. Prompts and responses are indices, int64 [B].

    ValueError naming the first bad entry if P is not a preference function."""

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
    """One prompt, three responses in a cycle.

    P(1 > 2) = 1/2 + a, P(2 > 3) = 1/2 + b, P(3 > 1) = 1/2 + c, with a, b, c in [0, 1/2]. If all are
    positive, the Nash policy is (b, c, a) / (a + b + c), by the three indifference conditions."""
    edge = torch.tensor([[0.0, a, -c], [-a, 0.0, b], [c, -b, 0.0]], dtype=torch.float64)
    return PreferenceTable((0.5 + edge).unsqueeze(0))


def bradley_terry(rewards: Tensor) -> PreferenceTable:
    """P(y > y') = sigma(r(y) - r(y')) of rewards [X, Y].

    It is transitive, so that the Nash policy is the argmax of the reward."""
    rewards = real_tensor(rewards, "rewards").double()
    return PreferenceTable(torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2)))


def _skew(X: int, n: int, generator: torch.Generator) -> Tensor:
    """Skew-symmetric [X, n, n] with standard normal entries above the diagonal."""
    upper = torch.randn(X, n, n, generator=generator, dtype=torch.float64).triu(1)
    return upper - upper.mT


def random_game(prompts: int, responses: int, seed: int) -> PreferenceTable:
    """P(y > y') drawn uniformly from [0, 1] for each prompt and pair."""
    generator, shape = torch.Generator().manual_seed(seed), (prompts, responses, responses)
    upper = torch.rand(shape, generator=generator, dtype=torch.float64).triu(1)
    diagonal = 0.5 * torch.eye(responses, dtype=torch.float64)
    return PreferenceTable(upper + (1 - upper.mT).tril(-1) + diagonal)


def random_feature_game(
    prompts: int, responses: int, seed: int, features: int = 8
) -> PreferenceTable:
    """P = sigma(f A f^T), with features f [Y, F] that all prompts share.

    The features are standard normal; each prompt has a skew-symmetric A of its own, with entries of
    order 1/sqrt(F). Preferences are intransitive wherever A has rank above 2. Responses differ as
    little as their features do."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(responses, features, generator=generator, dtype=torch.float64)
    A = _skew(prompts, features, generator) / features**0.5
    return PreferenceTable(torch.sigmoid(f @ A @ f.T))


def response_styles(vocabulary: int, length: int) -> Tensor:
    """How far each of the V^L responses leans to each of three styles, [V^L, 3] in [0, 1].

    Word v leans to style v mod 3 with strength 1 / (1 + v // 3). A response leans as its words do
    on average, so that rows sum to at most 1. Responses are in lexicographic order."""
    v = torch.arange(vocabulary)
    word = torch.zeros(vocabulary, 3, dtype=torch.float64)
    word[v, v % 3] = 1 / (1 + v // 3).double()
    total = torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(length):
        total = (total.unsqueeze(1) + word).flatten(0, 1)
    return total / length


def style_game(prompts: int, vocabulary: int, length: int, seed: int) -> PreferenceTable:
    """The default game of train.py: P = sigma(s C_x s'^T + 4 (|s| - |s'|) + 0.3 n_x(y, y')).

    s is `response_styles`. C_x makes style 1 beat 2, 2 beat 3 and 3 beat 1, with three strengths of
    each prompt's own (log-normal, of mean 4). |s|, the sum of the leanings, favours the stronger of
    two words of a style. n_x, of order 1, is skew-symmetric and random as in `random_feature_game`.
    So the uniform policy is far from Nash, and the Nash policies mix several responses and differ
    by prompt."""
    generator = torch.Generator().manual_seed(seed)
    s = response_styles(vocabulary, length)
    strengths = torch.exp(0.8 * torch.randn(3, prompts, generator=generator, dtype=torch.float64))
    a, b, c = 4 * strengths / strengths.mean(0)
    zero = torch.zeros_like(a)
    cycle = torch.stack([zero, a, -c, -a, zero, b, c, -b, zero], dim=-1).view(prompts, 3, 3)
    f = torch.randn(len(s), 8, generator=generator, dtype=torch.float64)
    noise = f @ (_skew(prompts, 8, generator) / 8) @ f.T
    weight = s.sum(-1)
    favour = 4 * (weight[:, None] - weight)
    return PreferenceTable(torch.sigmoid(s @ cycle @ s.T + favour + 0.3 * noise))


# --- A judge of the small world of text -----------------------------------------------------------


class RegisterJudge:
    """The oracle of the world of text: P(a > b | x) = `P`[class of x, class of a, class of b].

    P is [3, 4, 4]. The judge looks at the prompt's verb and at the two texts, and at nothing else:
    an answer about another topic is as good as any. Where the prompt asks to describe or to
    explain, vivid beats concise, concise beats precise and precise beats vivid; where it asks to
    praise, each the other way round. Malformed text loses to all. So each class of prompt has a
    Nash policy of its own, with all registers in its support: for a cycle of edges 1/2 + a,
    1/2 + b, 1/2 + c it is (b, c, a) / (a + b + c)."""

    complementary = deterministic = True
    # P - 1/2 by verb: concise over vivid, concise over precise, vivid over precise
    EDGES = ((-0.40, 0.25, -0.30), (-0.35, 0.30, -0.25), (0.25, -0.30, 0.35))

    def __init__(self) -> None:
        A = torch.full((len(VERBS), 4, 4), 0.0, dtype=torch.float64)
        A[:, :3, 3] = 0.45
        for upper, edges in zip(A, self.EDGES, strict=True):
            upper[0, 1], upper[0, 2], upper[1, 2] = edges
        self.P = check_preferences(0.5 + A - A.mT)

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B]. ValueError on a prompt that is not of this world."""
        x, y, z = map(prompt_class, prompts), map(classify, a), map(classify, b)
        return self.P[tuple(torch.tensor([*classes], dtype=torch.long) for classes in (x, y, z))]

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of responses [n] of beating one of the n - 1 others, [n]."""
        y = torch.tensor([classify(response) for response in responses])
        P = self.P[prompt_class(prompt)][y][:, y]
        return (P.sum(1) - P.diagonal()) / (len(y) - 1)


# --- Language models ------------------------------------------------------------------------------


class OpenAIJudge:
    """An oracle that asks a language model. A judgment that failed is NaN.

    form "scored", as in section 5: the distinct responses of a prompt, at most `candidates` of
    them, stand side by side in one request, and each is given 0 to 6 points. P(a > b) is 1 if a has
    more points than b, 1/2 if as many, 0 if fewer. The points of a response may depend on the
    others beside it. Their order is shuffled, by the seed and by their texts.

    form "pairwise": two requests, in both orders. P(a > b) is the mean of what they say; each says
    P(first is better) by the log-probabilities of the verdict where the endpoint gives them, else 0
    or 1.

    Equal texts have P = 1/2 without a request, or NaN if the text could not be judged. most: how
    many characters of a text the judge is shown. Another form is a class in judge/questions.py."""

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
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; expected {' or '.join(FORMS)}")
        check_whole(2, candidates=candidates)
        check_whole(1, most=most)
        self.endpoint, self.form = endpoint, FORMS[form](seed, candidates, most)
        self.deterministic = self.form.deterministic
        self.counts: Counter[str] = Counter()

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B] float64, NaN where there is no answer. Raises Stopped."""
        asked = as_texts(prompts, a, b)
        comparisons = different(asked)
        results = self.endpoint.ask(self.form.questions(comparisons))
        P, counts = self.form.preferences(comparisons, results)
        self.counts += counts
        judged = {(x, y) for (x, *ys), p in P.items() if not math.isnan(p) for y in ys}
        failed = {(x, y) for x, *ys in P for y in ys} - judged
        P |= {(x, y, z): math.nan if (x, y) in failed else 0.5 for x, y, z in asked if y == z}
        return torch.tensor([P[triple] for triple in asked], dtype=torch.float64)

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean win rate of each of responses [n] against the others, where it is known, [n]."""
        n = len(responses)
        pairs = list(permutations(responses, 2))
        P = self.prefer([prompt] * len(pairs), *zip(*pairs, strict=True))
        return P.view(n, n - 1).nanmean(1)

    def scores(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Tensor:
        """Points of responses [X][n], [X, n] float64 from 0 to 6; NaN where there is no answer.

        For form "scored"."""
        assert isinstance(self.form, Scored), "the other forms give no points"
        rows = [[(str(x), str(y)) for y in ys] for x, ys in zip(prompts, responses, strict=True)]
        alone = [(x, y, y) for row in rows for x, y in row]
        points = self.form.points(alone, self.endpoint.ask(self.form.questions(alone)))
        self.counts["asked"] += len(points)
        self.counts["failed"] += sum(map(math.isnan, points.values()))
        return torch.tensor([[points[text] for text in row] for row in rows], dtype=torch.float64)

    def questions(
        self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]
    ) -> list[Question]:
        """What `prefer` asks, for a plan of its cost."""
        return self.form.questions(different(as_texts(prompts, a, b)))

    def report(self) -> dict[str, float | None]:
        """What this process has judged.

        Pairs judged in both orders; the share of them whose verdict flipped with the order; the
        share of verdicts for the first response; the share of judgments that failed."""
        counts = self.counts
        return {
            "pairs_in_both_orders": counts["pairs"],
            "flip_rate": share(counts["flips"], counts["pairs"]),
            "first_rate": share(counts["first"], 2 * counts["pairs"]),
            "failed_rate": share(counts["failed"], counts["asked"]),
        }

    def flip_rate(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> float | None:
        """The share of the pairs of responses [X][n] whose verdict changes with the order.

        None if there are no pairs, or if the form does not ask in both orders. What was asked
        before is not asked again."""
        if not self.form.both_orders:
            return None
        comparisons = different(
            (str(x), str(y), str(z))
            for x, ys in zip(prompts, responses, strict=True)
            for y, z in combinations(ys, 2)
        )
        results = self.endpoint.ask(self.form.questions(comparisons))
        _, counts = self.form.preferences(comparisons, results)
        return share(counts["flips"], counts["pairs"])


def as_texts(prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> list[Comparison]:
    """The comparisons as plain strings."""
    return [(str(x), str(y), str(z)) for x, y, z in zip(prompts, a, b, strict=True)]


def different(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those of texts that differ."""
    return [(x, y, z) for x, y, z in comparisons if y != z]


def share(part: int, whole: int) -> float | None:
    """part / whole; None if there is no whole."""
    return part / whole if whole else None


class OpenAITeacher:
    """A language model that writes gold responses.

    max_tokens: an answer that is cut off after so many does not count."""

    def __init__(self, endpoint: Endpoint, max_tokens: int = 256):
        self.endpoint, self.max_tokens = endpoint, max_tokens

    def answers(self, prompts: Sequence[str], number: int = 0) -> list[str | None]:
        """The answer to each prompt, None where there is none. Another number: other answers."""
        return self.endpoint.ask(self.questions(prompts, number))

    def questions(self, prompts: Sequence[str], number: int = 0) -> list[Question]:
        """What `answers` asks."""
        return [teacher_question(str(x), self.max_tokens, number) for x in prompts]

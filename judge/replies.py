"""How replies are read.

Replies are data. Whatever is not exactly what was asked for is no result; nothing is guessed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any


def dig(body: Any, *path: str | int) -> Any:
    """body[path[0]][path[1]]..., or None where there is nothing of that kind."""
    for step in path:
        if not isinstance(body, dict if isinstance(step, str) else list):
            return None
        body = (
            body.get(step) if isinstance(body, dict) else body[step] if step < len(body) else None
        )
    return body


# Replies are data. Whatever is not exactly what was asked for is no result; nothing is guessed.
LONGEST = 50_000  # characters of a reply that are looked at


def said(choice: dict[str, Any]) -> str | None:
    """The text of a choice; None if it is a refusal, empty, filtered, or too long to be an answer
    to our questions."""
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
    """A JSON object, or a dictionary as Python writes it, which is made into JSON first; None if it
    is neither."""

    def as_json(found: re.Match[str]) -> str:
        return (
            json.dumps(re.sub(r"\\([\\'\"])", r"\1", found[0][1:-1]))
            if found[0] != "None"
            else "null"
        )

    for candidate in (text, LITERAL.sub(as_json, text)):
        try:
            return json.loads(candidate, object_pairs_hook=_unique)
        except (ValueError, RecursionError):
            continue
    return None


def objects(text: str) -> list[dict[str, Any]]:
    """The outermost dictionaries in a text, prose around them or not, braces in the prose or not.
    None at all if one is cut off, or if something looks like one and is none: then we do not know
    what the text says."""
    found, start = [], text.find("{")
    while start >= 0:
        depth, end = 0, None
        for mark in BRACE.finditer(text, start):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                end = mark.end()
                break
        inside = _dictionary(text[start:end]) if end else None
        if inside is not None:
            found.append(inside)
        elif end is None or set("\"':") & set(text[start:end]):
            return []
        start = text.find("{", end)
    return found


def _score(value: Any) -> int | None:
    """A whole number from 0 to 6, also as 5.0 or "5"; None if it is anything else."""
    if isinstance(value, str) and re.fullmatch(r"\s*[0-6]\s*", value):
        return int(value)
    return int(value) if type(value) in (int, float) and value in range(7) else None


def read_scores(choice: dict[str, Any], n: int) -> tuple[dict[str, list[Any]] | None, bool]:
    """{"scores": [n], "reasons": [n]} from a dictionary of id1_score .. idn_score and
    justifications, a score that is missing or out of range being None; complete if none is. No
    result unless exactly one dictionary in the reply has scores, or if it has some of ids that
    there are not: then no id can be trusted."""
    text = said(choice)
    graded = [
        found
        for found in objects(text or "")
        if any(re.fullmatch(r"id\d+_score", str(key)) for key in found)
    ]
    if len(graded) != 1 or {str(key).rpartition("_")[0] for key in graded[0]} - {
        f"id{i}" for i in range(1, n + 1)
    }:
        return None, False
    scores = [_score(graded[0].get(f"id{i}_score")) for i in range(1, n + 1)]
    reasons = [graded[0].get(f"id{i}_justification") for i in range(1, n + 1)]
    reasons = [reason if isinstance(reason, str) else "" for reason in reasons]
    return {"scores": scores, "reasons": reasons}, None not in scores


# with a word or two before it, but not as part of a sentence or of a choice between the two
LETTER = re.compile(
    r"\W*(?i:(?:the |final |better |my )*(?:response|answer|verdict|choice)\W+(?:is\W+)?)?"
    r"([AB])\b(?!'|\u2019|\s*[/&,|-]|\s+[a-z]|\s+[AB]\b)"
)


def _letter(text: str) -> str | None:
    """A or B: the verdict of a dictionary that is the only one to have one; or, without any
    dictionary, the letter that the text begins with, unless it is part of a sentence ("A good deal
    speaks for B") or the other one occurs too."""
    if "{" in text:
        verdicts = [value["verdict"] for value in objects(text) if "verdict" in value]
        return verdicts[0] if len(verdicts) == 1 and verdicts[0] in ("A", "B") else None
    letter = LETTER.match(text)
    return letter[1] if letter and set(re.findall(r"\b[AB]\b", text)) == {letter[1]} else None


def read_verdict(choice: dict[str, Any]) -> tuple[float | None, bool]:
    """P(A is better) of a reply that gives a verdict: the probability of A over that of A and B,
    where the endpoint tells them of the verdict's token (the first that is that letter); else 1 or
    0."""
    text = said(choice)
    verdict = _letter(text) if text else None
    if verdict is None:
        return None, False
    tokens = dig(choice, "logprobs", "content")
    chosen = (
        [token for token in tokens if _bare(dig(token, "token")) == verdict]
        if isinstance(tokens, list)
        else []
    )
    others, chance = dig(chosen, 0, "top_logprobs"), {"A": 0.0, "B": 0.0}
    for other in others if isinstance(others, list) else []:
        name, logprob = _bare(dig(other, "token")), dig(other, "logprob")
        if name in chance and type(logprob) in (int, float) and -1000 <= logprob <= 0:
            chance[name] += math.exp(logprob)
    total = sum(chance.values())
    return (
        chance["A"] / total if chance[verdict] > 0 and total <= 1.01 else float(verdict == "A")
    ), True


def _bare(token: Any) -> str:
    """A token without the blanks, quotes and colons that tokenizers join to it."""
    return token.strip(' \n":*') if isinstance(token, str) else ""


def read_answer(choice: dict[str, Any]) -> tuple[str | None, bool]:
    """A teacher's answer; none if it was cut off."""
    text = said(choice) if dig(choice, "finish_reason") != "length" else None
    return (text.strip().encode("utf-8", "replace").decode(), True) if text else (None, False)

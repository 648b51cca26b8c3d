"""What a run will ask language models, and what that costs at most: the dry run of all presets.

Responses are not known yet. They are taken to differ, and to be as long as they can be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from experiments.judging import Judging
from judge.prices import Plan
from oracle import OpenAIJudge

Triple = tuple[str, str, str]  # prompt and two responses: a comparison


def stand_in(name: str, words: int) -> str:
    """In place of a response of so many words."""
    return f"response {name} " + "word " * words


def training_comparisons(prompts: Iterable[str], n: int, words: int) -> list[Triple]:
    """Every two of n responses to each prompt."""
    texts = [stand_in(f"{number}", words) for number in range(n)]
    return [(x, y, z) for x in prompts for y, z in combinations(texts, 2)]


def validation_comparisons(
    prompts: Iterable[str], k: int, words: int, opponents: Sequence[str]
) -> list[Triple]:
    """k samples of a policy for each prompt, each against a response of each opponent: always the
    same one of the teacher, different ones of others."""
    new = [stand_in(f"new {i}", words) for i in range(k)]
    others = [
        stand_in(name if name == "teacher" else f"{name} {i}", words)
        for name in opponents
        for i in range(k)
    ]
    return [(x, y, z) for x in prompts for y, z in zip(new * len(opponents), others, strict=True)]


def announce_costs(
    config: Any,
    judging: Judging,
    comparisons: Sequence[tuple[list[Triple], int]],
    taught: Sequence[str] = (),
) -> None:
    """Say whom the run will ask how much, and what it will cost at most.

    comparisons: what is judged at a time, and how many times. taught: prompts for the teacher."""
    plans: list[tuple[str, Any, Plan]] = []
    if judging.teacher:
        teacher = judging.teacher.endpoint
        plans.append(("teacher", teacher, teacher.plan(judging.teacher.questions(taught))))
    if isinstance(judging.judge, OpenAIJudge):
        judge, total = judging.judge, Plan(0, 0, 0, 0)
        for triples, times in comparisons:
            if not triples:
                continue
            total += judge.endpoint.plan(judge.questions(*zip(*triples, strict=True))) * times
        plans.append(("judge", judge.endpoint, total))
    else:
        print(f"judge: {config.oracle}; no requests, and nothing is paid for judgments")
    for name, endpoint, plan in plans:
        print(f"{name}: {endpoint}")
        if endpoint.live:
            print(f"    the whole run: {plan}; spent so far: {endpoint.spent()}")
    if plans and config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")

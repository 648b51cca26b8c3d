"""What a run of the preset "text" will ask language models, and what that costs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from experiments.judging import Judging
from experiments.text_settings import Stage, TextConfig
from judge.prices import Plan
from oracle import OpenAIJudge, OpenAITeacher
from world import HELD_OUT, PROMPTS, TRAINING, student_answer, teacher_answer


def announce_judging(config: TextConfig, judging: Judging) -> None:
    """Say whom the run will ask how much, and what it will cost."""
    judge, teacher = judging.judge, judging.teacher
    plans: dict[str, tuple[OpenAIJudge | OpenAITeacher, Plan]] = {}
    if teacher:
        plans["teacher"] = teacher, teacher.endpoint.plan(teacher.questions(PROMPTS))
    if isinstance(judge, OpenAIJudge):
        plans["judge"] = judge, JudgePlan(config, judge, teacher).whole_run()
    elif config.dry_run:
        print("the judge is synthetic: nobody is asked, nothing is paid")
    for name, (asked, plan) in plans.items():
        print(f"{name}: {asked.endpoint}")
        if asked.endpoint.live:
            print(f"    the whole run: {plan}; spent so far: {asked.endpoint.spent()}")
    if plans and config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


class JudgePlan:
    """The judge's questions in a run whose responses are not known yet.

    In place of samples and gold responses stand answers of the student and of the synthetic
    teacher, or answers as long as a language model may write them."""

    def __init__(self, config: TextConfig, judge: OpenAIJudge, teacher: OpenAITeacher | None):
        self.config, self.judge, self.teacher = config, judge, teacher
        self.draw = random.Random(0)

    def whole_run(self) -> Plan:
        """Training and validation of all algorithms."""
        total = self.validation(with_previous=False)
        for stage in self.config.stages():
            iteration = self.training(stage) + self.validation(with_previous=True)
            total += iteration * stage.iterations
        return total

    def training(self, stage: Stage) -> Plan:
        """Every two responses of each prompt of an iteration."""
        triples = []
        for x in TRAINING[: self.config.prompts]:
            ys, gold = different(x, stage.samples, self.draw), self.gold(x)
            group = [*ys, gold] if stage.hard else ys
            triples += [(x, y, z) for y, z in combinations(group, 2)]
        return self.plan(triples)

    def validation(self, with_previous: bool) -> Plan:
        """A policy's samples against the gold response, and against the previous policy's."""
        k = self.config.judged
        against_gold, against_previous = [], []
        for x in HELD_OUT:
            gold, ys = self.gold(x), different(x, 2 * k, self.draw)
            against_gold += [(x, y, gold) for y in ys[:k]]
            against_previous += [(x, y, z) for y, z in zip(ys[:k], ys[k:], strict=True)]
        return self.plan(against_gold + against_previous if with_previous else against_gold)

    def plan(self, triples: Sequence[tuple[str, str, str]]) -> Plan:
        """The cost of comparisons (prompt, response, response)."""
        return self.judge.endpoint.plan(self.judge.questions(*zip(*triples, strict=True)))

    def gold(self, x: str) -> str:
        """A stand-in for the gold response."""
        if self.teacher:
            return "word " * self.teacher.max_tokens
        return teacher_answer(x, self.draw)


def different(prompt: str, count: int, draw: random.Random) -> list[str]:
    """`count` different answers of the student."""
    answers: dict[str, None] = {}  # a set in the order in which it was made
    while len(answers) < count:
        answers[student_answer(prompt, draw)] = None
    return list(answers)

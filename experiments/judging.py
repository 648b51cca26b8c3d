"""Who judges and who teaches, by the options of a run."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dno
from experiments.settings import BadInput, prices
from judge.client import make_client
from judge.endpoint import Endpoint
from judge.ledger import Ledger, Stopped
from judge.models import only, only_model, recorded_models
from oracle import OpenAIJudge, OpenAITeacher, Oracle, RegisterJudge
from world import TRAINING, teacher_answer


def open_judge(options: Any) -> Endpoint:
    """The endpoint of `JudgeOptions`. Refused if there can be none."""
    return open_endpoint(
        options,
        options.oracle,
        options.judge_model,
        options.judge_url,
        options.judge_prices,
        "judge",
    )


def open_endpoint(
    options: Any, source: str, model: str | None, url: str | None, price: str | None, kind: str
) -> Endpoint:
    """The endpoint that a source such as openai:MODEL names; kind: judge or teacher, whose price is
    the judge's if it is the same model and has none of its own. Refused if there can be none."""
    how, _, rest = source.partition(":")
    common = {"max_failed": options.max_failed, "run": str(Path(options.out).resolve())}
    if how == "replay":
        how = "name one: --judge-model NAME" if kind == "judge" else "give a cache of one teacher"
        name = model or only(recorded_models(rest, kind), rest, how)
        return Endpoint(name, cache=rest, live=False, **common)
    cache: Any = options.judge_cache or f"{options.out}/judgments.sqlite"
    if options.dry_run:
        cache = Ledger(cache, common["run"], read_only=True) if os.path.exists(cache) else None
    try:
        name = rest or model or only_model(url)
        price = price or (options.judge_prices if name == options.judge_model else None)
        return Endpoint(
            name,
            url,
            cache,
            client=make_client(url, options.dry_run),
            concurrency=options.judge_concurrency,
            timeout=options.judge_timeout,
            price=prices(price) if price else None,
            max_usd=options.max_usd,
            **common,
        )
    except ValueError as error:
        raise BadInput(
            f"{kind}: {error} (--{kind}-prices 2.5,10, in dollars per million tokens)"
        ) from error


def demonstrations(seed: int, count: int, teacher: OpenAITeacher | None = None) -> dno.Data:
    """Alg. 2, line 3: for iteration t some training prompts, drawn anew, with the teacher's
    answers: those of a language model, always the same to a prompt (prompts that it has none to are
    left out), or of `teacher_answer`."""

    def data(t: int) -> tuple[list[str], list[str]]:
        draw = random.Random(seed * 1_000_003 + t)
        prompts = draw.sample(TRAINING, count)
        if teacher is None:
            return prompts, [teacher_answer(x, draw) for x in prompts]
        prompts, gold = answered(teacher, prompts)
        if not prompts:
            raise Stopped(f"the teacher has no answer to any prompt of iteration {t}")
        return prompts, gold

    return data


def answered(teacher: OpenAITeacher, prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts that the teacher has an answer to, and the answers."""
    answers = [
        (x, y) for x, y in zip(prompts, teacher.answers(prompts), strict=True) if y is not None
    ]
    return [x for x, _ in answers], [y for _, y in answers]


@dataclass(frozen=True)
class Judging:
    """Who judges a run and writes its gold responses; None for the synthetic teacher."""

    judge: Oracle
    teacher: OpenAITeacher | None

    def data(self, config: Any, hard: bool) -> dno.Data:
        """What the algorithms are given; those with soft targets do not look at gold responses, so
        that none are paid for."""
        return demonstrations(config.seed, config.prompts, self.teacher if hard else None)

    def spending(self) -> dict[str, float | None]:
        """Requests of judge and teacher so far and dollars that they can have cost (None: a price
        is not known)."""
        endpoints = [
            part.endpoint
            for part in (self.judge, self.teacher)
            if hasattr(part, "endpoint") and part.endpoint.live
        ]
        ledgers = {str(endpoint.ledger.path): endpoint.ledger for endpoint in endpoints}.values()
        dollars = (
            None
            if any(endpoint.price is None for endpoint in endpoints)
            else sum(ledger.spent() for ledger in ledgers)
        )
        return {
            "requests": sum(ledger.totals()["requests"] for ledger in ledgers),
            "dollars": dollars,
        }


def judging(config: Any) -> Judging:
    """Judge and teacher as the config has them. Refused if an endpoint cannot be asked."""
    judge, teacher = RegisterJudge(), None
    if config.oracle != "synthetic":
        judge = OpenAIJudge(open_judge(config), config.judge_form, seed=config.seed)
        config.judge_model = judge.endpoint.model
    if config.teacher != "synthetic":
        url = config.teacher_url or config.judge_url
        teacher = OpenAITeacher(
            open_endpoint(config, config.teacher, None, url, config.teacher_prices, "teacher")
        )
    return Judging(judge, teacher)

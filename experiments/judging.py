"""Who judges and who teaches, by the options of a run."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dno
from experiments.settings import BadInput, prices
from judge.client import make_client
from judge.endpoint import Endpoint
from judge.ledger import Ledger, Stopped
from judge.models import only, only_model, recorded_models
from oracle import OpenAIJudge, OpenAITeacher
from world import TRAINING, teacher_answer


def open_judge(options: Any) -> Endpoint:
    """The endpoint of `JudgeOptions`. Refused if there can be none."""
    model, url, price = options.judge_model, options.judge_url, options.judge_prices
    return open_endpoint(options, options.oracle, model, url, price, "judge")


def open_endpoint(
    options: Any, source: str, model: str | None, url: str | None, price: str | None, kind: str
) -> Endpoint:
    """The endpoint that a source such as openai:MODEL names.

    kind: judge or teacher. A teacher without a price has the judge's if it is the same model.
    Refused if there can be none."""
    how, _, rest = source.partition(":")
    run = str(Path(options.out).resolve())
    common: dict[str, Any] = {"max_failed": options.max_failed, "run": run}
    if how == "replay":
        how = "name one: --judge-model NAME" if kind == "judge" else "give a cache of one teacher"
        name = model or only(recorded_models(rest, kind), rest, how)
        return Endpoint(name, cache=rest, live=False, **common)
    path = options.judge_cache or f"{options.out}/judgments.sqlite"
    cache: str | Ledger | None = path
    if options.dry_run:
        cache = Ledger(path, run, read_only=True) if os.path.exists(path) else None
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
        remedy = f"(--{kind}-prices 2.5,10, in dollars per million tokens)"
        raise BadInput(f"{kind}: {error} {remedy}") from error


def demonstrations(seed: int, count: int, teacher: OpenAITeacher | None = None) -> dno.Data:
    """Alg. 2, line 3: for each iteration t some training prompts, drawn anew, with gold responses.

    A language model's are always the same to a prompt, and prompts without one are left out. If
    `teacher` is None, they are those of `teacher_answer`."""

    def data(t: int) -> tuple[list[str], list[str]]:
        draw = random.Random(seed * 1_000_003 + t)
        prompts = draw.sample(TRAINING, count)
        if teacher is None:
            return prompts, [teacher_answer(x, draw) for x in prompts]
        return answered(teacher, prompts)

    return data


def answered(teacher: OpenAITeacher, prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts that the teacher has an answer to, and the answers. Stopped if there are none."""
    both = zip(prompts, teacher.answers(prompts), strict=True)
    answers = [(x, y) for x, y in both if y is not None]
    if not answers:
        raise Stopped(f"the teacher has no answer to any of {len(prompts)} prompts")
    return [x for x, _ in answers], [y for _, y in answers]


# --- Who judges and who teaches -------------------------------------------------------------------


@dataclass(frozen=True)
class Judging:
    """Who judges a run and writes its gold responses; None for the synthetic teacher."""

    judge: dno.Preferences
    teacher: OpenAITeacher | None = None

    @property
    def asked(self) -> list[OpenAIJudge | OpenAITeacher]:
        """Those of the two that are language models."""
        both = (self.judge, self.teacher)
        return [part for part in both if isinstance(part, OpenAIJudge | OpenAITeacher)]

    def spending(self) -> dict[str, float | None]:
        """Requests of judge and teacher so far, and dollars that they can have cost (None: a price
        is not known)."""
        endpoints = [part.endpoint for part in self.asked if part.endpoint.live]
        ledgers = {str(endpoint.ledger.path): endpoint.ledger for endpoint in endpoints}.values()
        known = all(endpoint.price is not None for endpoint in endpoints)
        return {
            "requests": sum(ledger.totals()["requests"] for ledger in ledgers),
            "dollars": sum(ledger.spent() for ledger in ledgers) if known else None,
        }


def judging(config: Any, synthetic: dno.Preferences, processes: int = 1) -> tuple[Any, Judging]:
    """(config, judge and teacher) as the config has them; the config then names the judge's model.

    synthetic: the judge where no language model is asked. The processes share the number of
    requests at a time. Refused if an endpoint cannot be asked."""
    judge, teacher = synthetic, None
    if config.oracle != "synthetic":
        share = max(1, config.judge_concurrency // processes)
        endpoint = open_judge(replace(config, judge_concurrency=share))
        judge = OpenAIJudge(endpoint, config.judge_form, seed=config.seed)
        config = replace(config, judge_model=endpoint.model)
    if getattr(config, "teacher", "synthetic") != "synthetic":
        url, price = config.teacher_url or config.judge_url, config.teacher_prices
        teacher = OpenAITeacher(open_endpoint(config, config.teacher, None, url, price, "teacher"))
    return config, Judging(judge, teacher)

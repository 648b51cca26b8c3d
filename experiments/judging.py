"""Who judges and who teaches, by the options of a run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dno
from experiments.settings import MOST, SHARE, BadInput, Options, setting, spelt
from judge.client import make_client
from judge.endpoint import Endpoint
from judge.ledger import Ledger, Stopped
from judge.models import only, only_model, recorded_models
from judge.prices import Price
from judge.questions import FORMS
from oracle import OpenAIJudge, OpenAITeacher
from world import HELD_OUT, TRAINING, teacher_answer

LANGUAGE_MODELS = ("openai", "replay")  # kinds of --oracle that are asked questions
# other judges: the name of --oracle, and what makes one of a config
ORACLES: dict[str, Callable[[Any], dno.Preferences]] = {
    "synthetic": lambda config: config.synthetic()  # the preset's own
}


# --- Options --------------------------------------------------------------------------------------


@dataclass
class JudgeOptions(Options):
    """Who judges, and what it may cost."""

    oracle: str = setting(
        None,
        f"{', '.join(ORACLES)}, openai:MODEL, or replay:CACHE of recorded replies",
        "judge",
        common=True,
        otherwise="openai with a --judge-url or --judge-model, else synthetic",
    )
    judge_url: str | None = setting(
        None,
        "of an OpenAI-compatible endpoint, ending in /v1",
        "judge",
        common=True,
        may_differ=True,
        otherwise="OpenAI's",
    )
    judge_model: str | None = setting(
        None, "its name at the endpoint", "judge", otherwise="the only one there"
    )
    judge_form: str = setting(
        "scored", "all at once by points, or two at a time", "judge", choices=tuple(FORMS)
    )
    judge_prices: str | None = setting(
        None,
        "dollars per million tokens in and out, as in 2.5,10",
        "judge",
        may_differ=True,
        otherwise="not known",
    )
    judge_cache: str | None = setting(
        None,
        "file of all requests and replies",
        "judge",
        may_differ=True,
        otherwise="judgments.sqlite in --out",
    )
    judge_concurrency: int = setting(
        16, "requests under way at a time", "judge", may_differ=True, within=(1, 1000)
    )
    judge_timeout: float = setting(
        120.0, "seconds that a request may take", "judge", may_differ=True, within=(1e-3, 1e5)
    )
    max_failed: float = setting(
        0.05, "share of a round's questions that may fail", "judge", may_differ=True, within=SHARE
    )
    max_usd: float | None = setting(
        None,
        "dollars that the run may spend; it stops below, resumable",
        "judge",
        common=True,
        may_differ=True,
        within=(0, MOST),
    )
    dry_run: bool = setting(
        False,
        "say what would be asked, and at what price; send and write nothing",
        "judge",
        common=True,
        may_differ=True,
    )

    def __post_init__(self) -> None:
        """Settle who judges, and check the judge's options. ValueError naming the field."""
        super().__post_init__()
        named = self.judge_url or self.judge_model
        self.oracle = self.oracle or ("openai" if named else "synthetic")
        for name, source in self.sources().items():
            check_source(name, source)
        prices(self.judge_prices or "0,0")
        asked, _, model = self.oracle.partition(":")
        if asked == "openai" and model and self.judge_model not in (None, model):
            fault = f"judge_model is {self.judge_model} and oracle {self.oracle}"
            raise ValueError(f"{fault}; leave one of them out")
        misled = [] if asked in LANGUAGE_MODELS else self.given("judge_model")
        misled += [] if self.live() else self.given("judge_url", "max_usd")
        if misled:  # someone may believe that a language model is asked
            fault = f"{spelt(misled[0])} belongs to a language model, and oracle is {self.oracle}"
            raise ValueError(f"{fault}; add --oracle openai:MODEL")

    def sources(self) -> dict[str, str]:
        """Who answers what, by the name of the field."""
        return {"oracle": self.oracle}

    def live(self) -> bool:
        """Is anybody asked who may have to be paid?"""
        return any(source.startswith("openai") for source in self.sources().values())

    def idle(self) -> dict[str, str]:
        """The judge's options that have no effect where no language model is asked."""
        idle, sources = super().idle(), self.sources()
        reason = " and ".join(f"{name} is {source}" for name, source in sources.items())
        names = "judge_prices judge_cache judge_concurrency judge_timeout".split()
        names = [] if self.live() else names
        if not any(map(by_language_model, sources.values())):
            names.append("max_failed")
        if not by_language_model(self.oracle):
            names.append("judge_form")
        return idle | dict.fromkeys(names, reason)


def by_language_model(source: str) -> bool:
    """Is it openai[:MODEL] or replay:CACHE?"""
    return source.partition(":")[0] in LANGUAGE_MODELS


def check_source(name: str, source: str) -> None:
    """ValueError unless it is one of `ORACLES`, openai[:MODEL] or replay:CACHE."""
    kind, colon, rest = source.partition(":")
    if kind == "openai" and colon and not rest.strip():
        fault = f"{name} is {source!r}; the model's name is missing"
        raise ValueError(f"{fault}: expected openai:MODEL")
    if not (source in ORACLES or kind == "openai" or (kind == "replay" and rest)):
        known = ", ".join(ORACLES)
        raise ValueError(f"{name} is {source!r}; expected {known}, openai:MODEL or replay:CACHE")


def prices(text: str) -> Price:
    """The Price written as "2.5,10". ValueError if it is none."""
    try:
        prompt, completion = map(float, text.split(","))
    except ValueError:
        expected = "expected dollars per million tokens of prompt and completion: 2.5,10"
        raise ValueError(f"prices are {text!r}; {expected}") from None
    return Price(prompt, completion)


# --- Endpoints ------------------------------------------------------------------------------------


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


def held_out_gold(seed: int) -> list[str]:
    """The synthetic teacher's answers to the held-out prompts."""
    draw = random.Random(seed)
    return [teacher_answer(x, draw) for x in HELD_OUT]


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


def judging(config: Any, processes: int = 1) -> tuple[Any, Judging]:
    """(config, judge and teacher) as the config has them; the config then names the judge's model.

    The processes share the number of requests at a time. Refused if an endpoint cannot be asked."""
    teacher = None
    if config.oracle in ORACLES:
        judge = ORACLES[config.oracle](config)
    else:
        share = max(1, config.judge_concurrency // processes)
        endpoint = open_judge(replace(config, judge_concurrency=share))
        judge = OpenAIJudge(endpoint, config.judge_form, seed=config.seed)
        config = replace(config, judge_model=endpoint.model)
    if getattr(config, "teacher", "synthetic") != "synthetic":
        url, price = config.teacher_url or config.judge_url, config.teacher_prices
        teacher = OpenAITeacher(open_endpoint(config, config.teacher, None, url, price, "teacher"))
    return config, Judging(judge, teacher)

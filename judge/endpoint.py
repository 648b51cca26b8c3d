"""A model behind an OpenAI-compatible endpoint, and the ledger of what it was asked.

Every request is in the ledger before it is sent, and every reply before it is used. So what was
paid for is not asked again, and a limit on dollars holds whatever happens. A reply that does not
come or cannot be read gives no result.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from judge.client import Connection, Reply
from judge.ledger import Kept, Ledger, Refused, Stopped, TooDear, for_terminal
from judge.prices import Plan, Price, count_tokens
from judge.questions import Question
from judge.replies import NO_ANSWER, Answer, from_json

if TYPE_CHECKING:
    import openai

LONGEST_BACKOFF = 60.0  # seconds between two attempts if the server does not say how long


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, and the ledger of what it was asked.

    model, url: as the endpoint knows them. url None is the openai client's own choice
        (OPENAI_BASE_URL, or OpenAI). The client takes the key from OPENAI_API_KEY.
    cache: the ledger or its file; None for memory.
    client: another client of the openai library, such as AzureOpenAI(), or None.
    live: False to answer from the ledger alone, without a client.
    temperature: of sampling, at least 0. concurrency: questions that are asked at a time.
    timeout: seconds that a request may take. Until the headers have come, it limits each wait for
        the server; from then on, the whole request.
    attempts: most requests for one answer.
    backoff: seconds before the second attempt, doubled for each further one to at most 60, less a
        random part of up to half. If the server says how long (Retry-After), we wait that long, or
        up to a tenth longer; if it says more than 120 s, `ask` raises Refused.
    price: None if it is not known; dollars are then not known either.
    max_usd: most dollars that the run may spend; None for no limit. Needs a price.
    max_failed: the share of the questions of one `ask` that may stay without a full answer. If more
        do, `ask` raises Stopped.
    run: the name under which the ledger counts what is spent.

    Raises ValueError if a number is out of range or `max_usd` has no price; Refused if the model's
    name, the URL, the key or the ledger cannot be used."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        cache: str | Path | Ledger | None = "judgments.sqlite",
        *,
        client: openai.OpenAI | None = None,
        live: bool = True,
        temperature: float = 0.0,
        concurrency: int = 16,
        timeout: float = 120.0,
        attempts: int = 6,
        backoff: float = 0.5,
        price: Price | None = None,
        max_usd: float | None = None,
        max_failed: float = 0.05,
        run: str = "",
    ):
        least = {"concurrency": 1, "attempts": 1, "timeout": 1e-3}
        numbers = {
            "temperature": temperature,
            "concurrency": concurrency,
            "timeout": timeout,
            "attempts": attempts,
            "backoff": backoff,
            "max_usd": max_usd or 0,
            "max_failed": max_failed,
        }
        for name, value in numbers.items():
            if not least.get(name, 0) <= value < math.inf:
                expected = f"expected a number of at least {least.get(name, 0)}"
                raise ValueError(f"{name} is {value}; {expected}")
        if max_usd is not None and live and price is None:
            raise ValueError(
                f"max_usd is {max_usd} and needs price=Price(prompt, completion): the price of "
                f"{model!r} is not known; give prices too"
            )
        self.model, self.temperature, self.live = model, temperature, live
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.backoff, self.max_failed = backoff, max_failed
        self.price, self.max_usd = price, max_usd
        self.connection = Connection(model, url, client, temperature, timeout) if live else None
        self.url = self.connection.url if self.connection else "no network"
        self._check_name()
        self.ledger = cache if isinstance(cache, Ledger) else Ledger(cache, run, read_only=not live)
        self.jitter = random.Random()
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # for which requests failed
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._flying = 0  # requests that are sent and not answered yet

    def _check_name(self) -> None:
        if not self.model.isprintable():
            shown = for_terminal(self.model)[:100]
            raise Refused(f"the model's name is {shown!r}; expected one that can be shown")
        if self.connection and self.connection.hidden(self.model) != self.model:
            raise Refused(
                f"the model's name is {self.connection.hidden(self.model)!r}, and holds "
                "OPENAI_API_KEY; expected one without"
            )

    def __str__(self) -> str:
        if not self.live:
            return f"recorded replies of {self.model}, kept in {self.ledger.path}"
        price = "price not known"
        if self.price:
            prompt, completion = self.price.prompt, self.price.completion
            price = f"${prompt:g} and ${completion:g} a million tokens"
        return f"{self.model} at {self.url} ({price}), kept in {self.ledger.path}"

    # --- Questions, and what the ledger knows of them ---

    def _settings(self, question: Question) -> dict[str, Any]:
        """All that a reply depends on, as far as we know."""
        return {
            "model": self.model,
            "version": question.version,
            "messages": question.messages,
            "temperature": self.temperature,
            "max_tokens": question.max_tokens,
            "number": question.number,
        }

    def key(self, question: Question) -> str:
        """The hash under which the ledger keeps the answer: of the model, the question's version,
        texts and number, and the settings of sampling."""
        return hashlib.sha256(json.dumps(self._settings(question)).encode()).hexdigest()

    def _bound(self, question: Question) -> float:
        """The most dollars that a request can cost. A token has at least one byte, a message adds
        fewer than 16 tokens, and the form that is asked for counts too."""
        size = sum(len(message["content"].encode()) + 16 for message in question.messages)
        size += len(json.dumps(question.wishes))
        return self.price.dollars(size, question.max_tokens) if self.price else 0.0

    def _kept(self, distinct: dict[str, Question]) -> dict[str, list[Answer]]:
        """The answers in the ledger by key, the oldest first."""
        kept = self.ledger.replies(distinct)
        return {
            key: [read_again(question, reply) for reply in kept[key]]
            for key, question in distinct.items()
        }

    def _known(self, kept: dict[str, list[Answer]]) -> dict[str, Answer]:
        """The answers that need no request: complete ones, and the fullest of as many as may be
        asked for. But if more of them failed than may fail, incomplete ones are asked for again:
        perhaps the endpoint can answer now."""
        enough = self.attempts if self.live else 1
        known = {}
        for key, answers in kept.items():
            best = fullest(answers)
            if best.complete or len(answers) >= enough:
                known[key] = best
        if self.live and count_failed(known.values()) > self.max_failed * len(kept):
            return {key: answer for key, answer in known.items() if answer.complete}
        return known

    def plan(self, questions: Sequence[Question]) -> Plan:
        """What `ask` would send now, if one request were enough for each answer. Sends nothing."""
        distinct = {self.key(question): question for question in questions}
        known = self._known(self._kept(distinct))
        new = [question for key, question in distinct.items() if key not in known]
        texts = [message["content"] for question in new for message in question.messages]
        prompt = sum(map(count_tokens, texts)) + 4 * len(texts)
        completion = sum(question.max_tokens for question in new)
        dollars = self.price.dollars(prompt, completion) if self.price else None
        return Plan(len(new), prompt, completion, dollars)

    # --- Asking ---

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """The result of each question, None if there is none. Asks what the ledger does not know,
        `concurrency` questions at a time. Raises Stopped (Refused, TooDear) if asking ends early;
        the replies to what was sent by then are waited for, and kept."""
        keys = [self.key(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        kept = self._kept(distinct)
        answers = self._known(kept)
        missing = {key: question for key, question in distinct.items() if key not in answers}
        self.counts["asked"] += len(distinct)
        self.counts["cached"] += len(distinct) - len(missing)
        if missing:
            self._ask_missing(missing, kept, answers)
        failed = count_failed(answers.values())
        self._check_failures(failed, len(distinct))
        self.counts["failed"] += failed
        return [answers[key].result for key in keys]

    def _check_failures(self, failed: int, total: int) -> None:
        if failed > self.max_failed * total:
            told = [f"{reason} ({count} times)" for reason, count in self.reasons.most_common(3)]
            raise Stopped(
                f"{failed} of {total} questions to {self.model} have no full answer, more than the "
                f"share {self.max_failed:g} that may fail: {', '.join(told) or 'in the cache'}"
            )

    def _ask_missing(
        self,
        missing: dict[str, Question],
        kept: dict[str, list[Answer]],
        answers: dict[str, Answer],
    ) -> None:
        """Add the answers of the missing questions to those that are known."""
        failed, total = count_failed(answers.values()), len(kept)
        if not self.live:
            wanted = next(iter(missing.values())).messages[-1]["content"][:120]
            raise Refused(
                f"{self.ledger.path} has no reply of {self.model} to {len(missing)} of {total} "
                f"questions, of which one is {wanted!r}; give the cache that was recorded with "
                "these settings"
            )
        self._stop.clear()
        bar = tqdm(
            total=len(missing),
            desc=f"asking {self.model}",
            unit="reply",
            disable=None,  # shown on a terminal only
            leave=False,
        )
        with bar, ThreadPoolExecutor(min(self.concurrency, len(missing))) as pool:
            futures = {
                pool.submit(self._answer_or_stop, key, question, kept[key]): key
                for key, question in missing.items()
            }
            try:
                for future in as_completed(futures):
                    if isinstance(future.exception(), CancelledError):
                        continue  # another question's error stopped it, which comes too
                    answer = future.result()
                    answers[futures[future]] = answer
                    failed += answer.failed
                    bar.update()
                    self._check_failures(failed, total)
                    bar.set_postfix_str(f"{self.spent()}, {failed} failed", refresh=False)
            except KeyboardInterrupt:
                tqdm.write("interrupted: waiting for the replies under way, which may be paid for")
                raise
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    # --- One question, in a thread of its own ---

    def _answer_or_stop(self, key: str, question: Question, answers: list[Answer]) -> Answer:
        """`_answer`. An error stops all threads that have not sent their request yet."""
        try:
            return self._answer(key, question, answers)
        except BaseException:
            self._stop.set()
            raise

    def _answer(self, key: str, question: Question, answers: list[Answer]) -> Answer:
        """Ask until the ledger has a complete answer, at most `attempts` times; if there is none,
        the fullest. The answers that were there count, but if they used up all attempts, counting
        starts anew."""
        used, lost, pause = len(answers) // self.attempts * self.attempts, 0, 0.0
        while not fullest(answers).complete and len(answers) + lost < used + self.attempts:
            self._wait(pause)
            reply = self._exchange(key, question, len(answers))
            pause = 0.0
            if reply and reply.outcome in ("lost", "refused"):
                lost += 1
                pause = self._pause(len(answers) - used + lost, reply.wait)
            answers = self._kept({key: question})[key]
        return fullest(answers)

    def _pause(self, attempt: int, asked: float | None) -> float:
        """The seconds before the next attempt, after so many; asked: what the server asks for."""
        if asked is not None:
            return asked * self.jitter.uniform(1, 1.1)
        backoff = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1))
        return backoff * self.jitter.uniform(0.5, 1)

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise CancelledError

    # --- One request ---

    def _exchange(self, key: str, question: Question, known: int) -> Reply | None:
        """Send a request, with a row in the ledger from before it is sent, which is completed with
        what became of it. None if there are more replies than the `known` ones: another process was
        faster. Raises Refused on a permanent error."""
        assert self.connection, "only a live endpoint sends requests"
        bound = self._bound(question)
        number = self._reserved(key, question, known, bound)
        if number is None:
            return None
        try:
            start = time.perf_counter()
            reply = self.connection.send(question, f"{key}-{known}")
            columns = self._columns(reply) | {"seconds": time.perf_counter() - start}
            self.ledger.complete(number, bound, **columns)
        finally:
            with self._lock:
                self._flying -= 1
        if reply.outcome == "permanent":
            raise Refused(reply.reason)
        if reply.outcome not in ("complete", "negotiated"):
            with self._lock:
                self.reasons[reply.reason] += 1
        return reply

    def _reserved(self, key: str, question: Question, known: int, bound: float) -> int | None:
        """The ledger's row for a request that may be sent now, which counts as flying from then on.
        None if there are more replies than the `known` ones."""
        row = {
            "key": key,
            "model": self.model,
            "url": self.url,
            "question": json.dumps(self._settings(question)),
            "bound": bound,
        }
        limit = math.inf if self.max_usd is None else self.max_usd
        while True:
            self._wait(0)
            with self._lock:
                number = self.ledger.reserve(
                    {**row, "sent": time.time()}, known, limit, 2 * self.timeout
                )
                if isinstance(number, int):
                    self._flying += 1
                    return number
                waiting = self._flying > 0  # for a request that may turn out cheaper than its bound
            if number == "answered":
                return None
            if number == "too dear" and not waiting:
                raise TooDear(
                    f"stopped below the limit of ${limit:g}: ${self.ledger.spent():.4f} are spent, "
                    f"and the next request can cost ${bound:.4f}"
                )
            self._wait(0.05)

    def _columns(self, reply: Reply) -> dict[str, Any]:
        """What the ledger keeps of a reply."""
        if reply.outcome == "lost":  # it may have been charged: its bound stays spent
            return {"outcome": "lost", "reply": reply.reason}
        if reply.text is None:
            outcome = "filtered" if reply.outcome == "filtered" else "refused"
            return {"outcome": outcome, "reply": reply.reason, "dollars": 0.0}
        prompt, completion = reply.tokens or (None, None)
        return {
            "outcome": reply.outcome,
            "reply": reply.text,
            "parsed": reply.parsed,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "dollars": self.price.dollars(*reply.tokens) if reply.tokens and self.price else None,
        }

    # --- What was spent ---

    def report(self) -> dict[str, float | None]:
        """What this run has sent and spent so far (`Ledger.totals`; dollars are None if the price
        is not known), and how many questions this process asked, had in the cache, and failed."""
        report: dict[str, float | None] = {**self.ledger.totals()}
        if self.live and self.price is None:
            report |= {"dollars": None, "dollars_unknown_at_most": None}
        return report | {name: self.counts[name] for name in ("asked", "cached", "failed")}

    def spent(self) -> str:
        """The dollars of this run so far, as text."""
        return f"${self.ledger.spent():.4f}" if self.price or not self.live else "price not known"


def fullest(answers: Iterable[Answer]) -> Answer:
    """The first complete answer, or the one with most scores; no answer of none."""
    return max(answers, key=lambda answer: answer.fullness, default=NO_ANSWER)


def count_failed(answers: Iterable[Answer]) -> int:
    """How many of the answers failed."""
    return sum(answer.failed for answer in answers)


def read_again(question: Question, kept: Kept) -> Answer:
    """The answer in a reply that the ledger kept."""
    outcome, parsed, reply = kept
    if outcome == "filtered" or parsed is not None:
        return Answer(parsed, True)
    return question.answer(from_json(reply))

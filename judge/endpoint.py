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
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from judge.client import Connection, Reply
from judge.ledger import Ledger, Refused, Stopped, TooDear, for_terminal
from judge.prices import Plan, Price, count_tokens, price_of
from judge.questions import Question
from judge.replies import decoded, dig, from_json, usage

if TYPE_CHECKING:
    import openai

LONGEST_BACKOFF = 60.0  # seconds between two attempts if the server does not say how long
LEAST = {"concurrency": 1, "timeout": 1e-3, "attempts": 1}  # of an endpoint's numbers; others 0


class Answer(NamedTuple):
    """The result that was read of a reply, None if there is none, and whether it is complete. A
    question that a content filter refused is complete: asking again does not help."""

    result: Any
    complete: bool

    @property
    def failed(self) -> bool:
        return self.result is None or not self.complete


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
    price: None to look it up in `PRICES`.
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
        _check_numbers(
            concurrency=concurrency,
            timeout=timeout,
            attempts=attempts,
            backoff=backoff,
            max_failed=max_failed,
            max_usd=max_usd or 0,
            temperature=temperature,
        )
        self.model, self.temperature, self.live = model, temperature, live
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.backoff, self.max_usd, self.max_failed = backoff, max_usd, max_failed
        self.price = price or price_of(model)
        if max_usd is not None and live and self.price is None:
            raise ValueError(
                f"max_usd is {max_usd}, but the price of {model!r} is not known; give prices too"
            )
        self.connection = Connection(model, url, client, temperature, timeout) if live else None
        self.url = self.connection.url if self.connection else "no network"
        self._check_name()
        self.ledger = cache if isinstance(cache, Ledger) else Ledger(cache, run, read_only=not live)
        self.jitter = random.Random()
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # for which requests failed
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._flying = 0  # requests that are sent and not answered yet
        self._first_error: BaseException | None = None

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

    def _earlier(self, distinct: dict[str, Question]) -> dict[str, list[Answer]]:
        """The answers in the ledger by key, the oldest first. Replies that could not be read, or
        whose parsed form is NULL, are read again."""
        replies = self.ledger.replies(distinct)
        with self.ledger.refusing():
            return {
                key: [_reread(distinct[key], *reply) for reply in replies[key]] for key in replies
            }

    def _settled(self, answers: list[Answer]) -> Answer | None:
        """The answer if there is no need to ask again: the first complete one, or the fullest if we
        may not ask again. Else None."""
        for answer in answers:
            if answer.complete:
                return answer
        final = answers and (len(answers) >= self.attempts or not self.live)
        return max(answers, key=_fullness) if final else None

    def _known(
        self, distinct: dict[str, Question], earlier: dict[str, list[Answer]]
    ) -> dict[str, Answer]:
        """The answers that need no request. If more of them failed than may fail, questions without
        a complete answer are asked again: perhaps the endpoint can answer now."""
        settled = {key: self._settled(earlier.get(key, [])) for key in distinct}
        known = {key: answer for key, answer in settled.items() if answer is not None}
        if self.live and _count_failed(known) > self.max_failed * len(distinct):
            return {key: answer for key, answer in known.items() if answer.complete}
        return known

    def plan(self, questions: Sequence[Question]) -> Plan:
        """What `ask` would send now, if one request were enough for each answer. Sends nothing."""
        distinct = {self.key(question): question for question in questions}
        earlier = self._earlier(distinct)
        new = [
            question
            for key, question in distinct.items()
            if self._settled(earlier.get(key, [])) is None
        ]
        texts = [message["content"] for question in new for message in question.messages]
        prompt = sum(count_tokens(text, self.model) for text in texts) + 4 * len(texts)
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
        earlier = self._earlier(distinct)
        answers = self._known(distinct, earlier)
        missing = {key: question for key, question in distinct.items() if key not in answers}
        self.counts["asked"] += len(distinct)
        self.counts["cached"] += len(distinct) - len(missing)
        if missing:
            if not self.live:
                raise self._not_recorded(missing, len(distinct))
            self._ask_missing(missing, earlier, answers)
        failed = _count_failed(answers)
        self._check_failures(failed, len(distinct))
        self.counts["failed"] += failed
        return [answers[key].result for key in keys]

    def _not_recorded(self, missing: dict[str, Question], total: int) -> Refused:
        wanted = next(iter(missing.values())).messages[-1]["content"][:120]
        return Refused(
            f"{self.ledger.path} has no reply of {self.model} to {len(missing)} of {total} "
            f"questions, of which one is {wanted!r}; give the cache that was recorded with these "
            "settings"
        )

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
        earlier: dict[str, list[Answer]],
        answers: dict[str, Answer],
    ) -> None:
        """Add the answers of the missing questions to those that are known."""
        self._stop.clear()
        self._first_error = None
        failed, total = _count_failed(answers), len(answers) + len(missing)
        bar = tqdm(
            total=len(missing),
            desc=f"asking {self.model}",
            unit="reply",
            disable=None,  # shown on a terminal only
            leave=False,
        )
        with bar, ThreadPoolExecutor(min(self.concurrency, len(missing))) as pool:
            futures = {
                pool.submit(self._answer_or_stop, key, question, earlier.get(key, [])): key
                for key, question in missing.items()
            }
            try:
                for future in as_completed(futures):
                    answer = future.result()
                    answers[futures[future]] = answer
                    failed += answer.failed
                    bar.update()
                    self._check_failures(failed, total)
                    bar.set_postfix_str(f"{self.spent()}, {failed} failed", refresh=False)
            except Stopped as error:
                raise self._first_error or error from None
            except KeyboardInterrupt:
                tqdm.write("interrupted: waiting for the replies under way, which may be paid for")
                raise
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)

    def _answer_or_stop(self, key: str, question: Question, earlier: list[Answer]) -> Answer:
        """`_answer`. An error stops all threads that have not sent their request yet; the first one
        is what `ask` raises."""
        try:
            return self._answer(key, question, earlier)
        except BaseException as error:
            with self._lock:
                self._first_error = self._first_error or error
            self._stop.set()
            raise

    def _answer(self, key: str, question: Question, earlier: list[Answer]) -> Answer:
        """Ask until there is a complete answer, at most `attempts` times; if there is none, the
        fullest. Earlier attempts count, but if they were all used up, counting starts anew."""
        answers, attempt = list(earlier), len(earlier) % self.attempts
        while attempt < self.attempts:
            number = self._reserved(key, question, len(answers))
            if number is None:  # another process was faster
                found = self._earlier({key: question})[key]
                attempt, answers = attempt + len(found) - len(answers), found
                complete = [answer for answer in answers if answer.complete]
                if complete:
                    return complete[0]
                continue
            result, reply = self._exchange(number, f"{key}-{len(answers)}", question)
            if reply.outcome == "complete":
                return Answer(result, True)
            if reply.outcome == "negotiated":
                continue
            with self._lock:
                self.reasons[reply.reason] += 1
            if reply.outcome == "filtered":
                return Answer(None, True)
            attempt += 1
            if reply.outcome == "unreadable":
                answers.append(Answer(result, False))
            elif attempt < self.attempts:
                self._wait(self._pause(attempt, reply.wait))
        return max(answers, key=_fullness, default=Answer(None, False))

    def _pause(self, attempt: int, asked: float | None) -> float:
        """The seconds before the next attempt, after so many; asked: what the server asks for."""
        if asked is not None:
            return asked * self.jitter.uniform(1, 1.1)
        backoff = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1))
        return backoff * self.jitter.uniform(0.5, 1)

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped("asking was stopped")

    # --- One request ---

    def _reserved(self, key: str, question: Question, known: int) -> int | None:
        """The ledger's row for a request that may be sent now, which counts as flying from then on.
        None if there are more replies than the `known` ones."""
        row = {
            "key": key,
            "model": self.model,
            "url": self.url,
            "question": json.dumps(self._settings(question)),
            "bound": self._bound(question),
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
                    f"and the next request can cost ${row['bound']:.4f}"
                )
            self._wait(0.05)

    def _exchange(self, number: int, idempotency_key: str, question: Question) -> tuple[Any, Reply]:
        """Send the request of a row, and complete the row with what became of it. Returns (result,
        reply). Raises Refused on a permanent error."""
        assert self.connection, "only a live endpoint sends requests"
        try:
            start = time.perf_counter()
            reply = self.connection.send(question, idempotency_key)
            result, reply, columns = self._understood(question, reply)
            columns["seconds"] = time.perf_counter() - start
            self.ledger.complete(number, self._bound(question), **columns)
        finally:
            with self._lock:
                self._flying -= 1
        if reply.outcome == "permanent":
            raise Refused(reply.reason)
        return result, reply

    def _understood(self, question: Question, reply: Reply) -> tuple[Any, Reply, dict[str, Any]]:
        """(result, reply, columns of the ledger); the reply's outcome is "complete" if its body
        could be read and was a full answer, "unreadable" if not."""
        if reply.outcome == "lost":  # it may have been charged: its bound stays spent
            return None, reply, {"outcome": "lost", "reply": reply.reason}
        if reply.outcome in ("refused", "negotiated", "filtered", "permanent"):
            outcome = "filtered" if reply.outcome == "filtered" else "refused"
            return None, reply, {"outcome": outcome, "reply": reply.reason, "dollars": 0.0}
        assert self.connection
        answer = _read(question, reply.body)
        whole = answer.complete and reply.outcome == "replied"
        reply = replace(reply, outcome="complete" if whole else "unreadable")
        result = self.connection.hidden(answer.result)
        columns: dict[str, Any] = {
            "outcome": reply.outcome,
            "reply": self.connection.hidden(decoded(reply.body)),
            "parsed": json.dumps(result),
        }
        tokens = usage(reply.body)
        if tokens:
            columns["prompt_tokens"], columns["completion_tokens"] = tokens
            columns["dollars"] = self.price.dollars(*tokens) if self.price else None
        return result, reply, columns

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


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        least = LEAST.get(name, 0)
        if not least <= value < math.inf:
            raise ValueError(f"{name} is {value}; expected a number of at least {least}")


def _fullness(answer: Answer) -> int:
    """How many scores an answer has."""
    return sum(score is not None for score in dig(answer.result, "scores") or [])


def _count_failed(answers: dict[str, Answer]) -> int:
    return sum(answer.failed for answer in answers.values())


def _read(question: Question, body: bytes) -> Answer:
    """The answer in a reply's body; Answer(None, False) if the body is not even JSON."""
    choice = dig(from_json(body), "choices", 0)
    return Answer(*question.read(choice)) if isinstance(choice, dict) else Answer(None, False)


def _reread(
    question: Question, outcome: str, parsed: str | None, reply: str | bytes | None
) -> Answer:
    """The answer in a reply that the ledger kept."""
    if outcome == "filtered":
        return Answer(None, True)
    if outcome == "complete" and parsed is not None:
        try:
            return Answer(json.loads(parsed), True)
        except (ValueError, TypeError, RecursionError):
            raise sqlite3.DatabaseError("damaged: what was read of a reply is no JSON") from None
    return _read(question, reply.encode() if isinstance(reply, str) else reply or b"")

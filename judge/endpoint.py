"""A model behind an OpenAI-compatible endpoint.

Every request is in the ledger before it is sent, and every reply before it is used: what was paid
for is not asked again, and a limit on dollars holds whatever happens. A reply that cannot be had or
read is no result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from judge.ledger import Ledger, Refused, Stopped, TooDear, for_terminal
from judge.prices import Plan, Price, count_tokens, price_of
from judge.questions import Question
from judge.replies import dig

SECRET = 8  # least characters of a key
PATIENCE = 10.0  # seconds in which a server must say which models it has


@lru_cache
def _spellings(key: str) -> re.Pattern[str]:
    """Matches a key as it is, and as JSON (in JSON in JSON) or a URL may have escaped it."""
    letters = [
        f"(?:{re.escape(letter)}|u00(?i:{ord(letter):02x})|%(?i:{ord(letter):02x}))"
        for letter in key
    ]
    return re.compile(r"\\{0,15}" + r"\\{0,15}".join(letters))


def hidden(value: Any, key: str | None) -> Any:
    """A text, or the texts in a result, without our key, should a server send it back. What is
    shorter than `SECRET` characters is no key: such words stand for one where none is needed."""
    if not key or len(key) < SECRET:
        return value
    if isinstance(value, str):
        return _spellings(key).sub("[key]", value)
    if isinstance(value, bytes):
        return _spellings(key).sub("[key]", value.decode("latin-1")).encode("latin-1")
    if isinstance(value, dict):
        return {name: hidden(part, key) for name, part in value.items()}
    return [hidden(part, key) for part in value] if isinstance(value, list) else value


def _received(
    send: Callable[..., Any], path: str, timeout: float, headers: Any = None, **body: Any
) -> bytes:
    """The body of the reply to one request, with at most a part more than `LARGEST` bytes. No
    redirect is followed, whatever the client does else. Raises openai's errors; httpx2's while the
    body comes; TimeoutError if it comes too slowly."""
    import httpx2
    import openai

    options = {"headers": headers or {}, "timeout": timeout, "max_retries": 0}
    options |= {"follow_redirects": False, "security": {"bearer_auth": True}}
    received, deadline = bytearray(), time.monotonic() + timeout
    response = send(
        path,
        cast_to=httpx2.Response,
        options=options,
        stream=True,
        stream_cls=openai.Stream,
        **body,
    )
    with closing(response):
        for part in response.iter_bytes():
            received += part
            if len(received) > LARGEST:
                break
            if time.monotonic() > deadline:
                raise TimeoutError
    return bytes(received)


def _redirect(error: Any, key: str) -> str:
    """What is told of a reply that is a redirect. Of its target only what can be no secret."""
    try:
        target = urlsplit(
            urljoin(str(error.response.url), error.response.headers.get("location", ""))
        )
        target = target._replace(
            netloc=target.netloc.rpartition("@")[2], query="", fragment=""
        ).geturl()
    except ValueError:
        target = "an address that is none"
    shown = for_terminal(hidden(target, key))[:200]
    how = "no redirect is followed; if it is to be asked, give its URL"
    return f"redirects to {shown} (HTTP {error.status_code}), and {how}"


LARGEST = 1 << 20  # bytes of a reply that are read
LONGEST_WAIT = 120.0  # seconds that a server may ask us to wait; what wants more is not waited for
LONGEST_BACKOFF = 60.0  # seconds between two attempts where the server does not say
NO_KEY = "none"  # sent where there is no key, to servers of one's own
NEGOTIABLE = {
    "response_format": ("response_format", "json_schema"),
    "logprobs": ("logprobs",),
    "temperature": ("temperature",),
}


@dataclass(frozen=True)
class Reply:
    """What became of a request: replied; unreadable; lost, no reply; refused, for now; negotiated,
    to be asked in another way; filtered, this question for ever; permanent, any question for ever.
    With a reason, and the seconds to wait before the next attempt where the server says."""

    outcome: str
    reason: str
    body: bytes = b""
    wait: float | None = None


class Endpoint:
    """A model behind an OpenAI-compatible endpoint, and the ledger of what it was asked.

    model, url: as the endpoint knows them; url None is the openai client's own choice
    (OPENAI_BASE_URL, or OpenAI). The key is the client's too: OPENAI_API_KEY in the environment.
    client: another client of that library, such as AzureOpenAI(), or None. Without `live` there is
    none: it answers from the ledger alone. cache: the ledger or its file; None for memory. run:
    whose spending `max_usd` limits. price: None to look it up in `PRICES`. timeout: seconds a
    request may take, from its headers on. attempts: most requests for one answer. backoff: seconds
    before the second, doubled for every further one to at most 60, less a random part of up to
    half; where the server says how long (Retry-After), that, to at most 120. max_failed: the share
    of the questions of an `ask` that may stay without a full answer; with more it is Stopped."""

    def __init__(
        self,
        model: str,
        url: str | None = None,
        cache: str | Path | Ledger | None = "judgments.sqlite",
        *,
        client: Any = None,
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
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout", timeout, 1e-3),
            ("attempts", attempts, 1),
            ("backoff", backoff, 0),
            ("max_failed", max_failed, 0),
            ("max_usd", max_usd or 0, 0),
            ("temperature", temperature, 0),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name} is {value}; expected a number of at least {least}")
        self.model, self.temperature, self.concurrency, self.timeout = (
            model,
            temperature,
            concurrency,
            timeout,
        )
        self.attempts, self.backoff, self.max_usd, self.max_failed = (
            attempts,
            backoff,
            max_usd,
            max_failed,
        )
        self.price, self.live, self.jitter = price or price_of(model), live, random.Random()
        if max_usd is not None and live and self.price is None:
            raise ValueError(
                f"max_usd is {max_usd}, but the price of {model!r} is not known; give prices too"
            )
        self.client = (
            (client or make_client(url)).with_options(timeout=timeout, max_retries=0)
            if live
            else None
        )  # we count
        self.url = str(self.client.base_url).rstrip("/") if live else "no network"
        if not model.isprintable():
            raise Refused(
                f"the model's name is {for_terminal(model)[:100]!r}; expected one that can be shown"
            )
        if live and self._hidden(model) != model:
            raise Refused(
                f"the model's name is {self._hidden(model)!r}, and holds OPENAI_API_KEY; "
                "expected one without"
            )
        self.ledger = cache if isinstance(cache, Ledger) else Ledger(cache, run, read_only=not live)
        self.instead: dict[
            str, str | None
        ] = {}  # settings the endpoint does not know: their other name, or None to leave out
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._stop, self._lock, self._flying = threading.Event(), threading.Lock(), 0
        self._first_error: BaseException | None = None

    def __str__(self) -> str:
        price = (
            f"${self.price.prompt:g} and ${self.price.completion:g} a million tokens"
            if self.price
            else "price not known"
        )
        where = (
            f"{self.model} at {self.url} ({price})"
            if self.live
            else f"recorded replies of {self.model}"
        )
        return f"{where}, kept in {self.ledger.path}"

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
        """The hash under which the ledger keeps the answer: of model, version, all texts in their
        order, and settings."""
        return hashlib.sha256(json.dumps(self._settings(question)).encode()).hexdigest()

    def _bound(self, question: Question) -> float:
        """The most dollars that a request can cost: a token has at least a byte, a message less
        than 16 tokens around it, and the form that is asked for counts too."""
        size = sum(len(message["content"].encode()) + 16 for message in question.messages) + len(
            json.dumps(question.wishes)
        )
        return self.price.dollars(size, question.max_tokens) if self.price else 0.0

    def plan(self, questions: Sequence[Question]) -> Plan:
        """What `ask` would send now, at most, if every request were answered at once. Sends
        nothing."""
        distinct = {self.key(question): question for question in questions}
        earlier = self._earlier(distinct)
        new = [
            question
            for key, question in distinct.items()
            if not self._settled(earlier.get(key, []))
        ]
        texts = [message["content"] for question in new for message in question.messages]
        prompt = sum(count_tokens(text, self.model) for text in texts) + 4 * len(texts)
        completion = sum(question.max_tokens for question in new)
        return Plan(
            len(new),
            prompt,
            completion,
            self.price.dollars(prompt, completion) if self.price else None,
        )

    def ask(self, questions: Sequence[Question]) -> list[Any]:
        """The result of each question, None where there is none. Asks what the ledger does not
        know, `concurrency` questions at a time. Raises Stopped; what had been sent by then is
        waited for, and kept."""
        keys = [self.key(question) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        earlier = self._earlier(distinct)
        results = {key: self._settled(earlier.get(key, [])) for key in distinct}
        failed = sum(result is not None and _failed(result) for result in results.values())
        if self.live and failed > self.max_failed * len(distinct):  # perhaps it can answer now
            results |= {
                key: None for key, result in results.items() if result is not None and not result[1]
            }
            failed = sum(result is not None and _failed(result) for result in results.values())
        missing = [key for key, result in results.items() if result is None]
        self.counts["asked"] += len(distinct)
        self.counts["cached"] += len(distinct) - len(missing)
        if missing and not self.live:
            wanted = distinct[missing[0]].messages[-1]["content"][:120]
            raise Refused(
                f"{self.ledger.path} has no reply of {self.model} to {len(missing)} of {len(distinct)} questions, of "
                f"which one is {wanted!r}; give the cache that was recorded with these settings"
            )
        self._stop.clear()
        self._first_error = None
        quiet = None if missing else True
        bar = tqdm(
            total=len(missing),
            desc=f"asking {self.model}",
            unit="reply",
            disable=quiet,
            leave=False,
        )
        with bar, ThreadPoolExecutor(min(self.concurrency, max(1, len(missing)))) as pool:
            futures = {
                pool.submit(self._answer_or_stop, key, distinct[key], earlier.get(key, [])): key
                for key in missing
            }
            try:
                for future in as_completed(futures):
                    results[futures[future]] = result = future.result()
                    failed += _failed(result)
                    bar.update()
                    self._check_failures(failed, len(distinct))
                    bar.set_postfix_str(f"{self.spent()}, {failed} failed", refresh=False)
            except Stopped as error:
                raise self._first_error or error from None
            except KeyboardInterrupt:
                tqdm.write("interrupted: waiting for the replies under way, which may be paid for")
                raise
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
        self._check_failures(failed, len(distinct))
        self.counts["failed"] += failed
        return [results[key][0] for key in keys]

    def _check_failures(self, failed: int, total: int) -> None:
        if failed > self.max_failed * total:
            reasons = (
                ", ".join(
                    f"{reason} ({count} times)" for reason, count in self.reasons.most_common(3)
                )
                or "in the cache"
            )
            raise Stopped(
                f"{failed} of {total} questions to {self.model} have no full answer, more than the share "
                f"{self.max_failed:g} that may fail: {reasons}"
            )

    def _earlier(self, distinct: dict[str, Question]) -> dict[str, list[tuple[Any, bool]]]:
        """What the replies in the ledger say, oldest first, as (result, whether it is complete).
        Those that could not be read, or whose parsed form is NULL, are read anew."""
        replies = self.ledger.replies(distinct)
        with self.ledger.refusing():
            return {
                key: [_reread(distinct[key], *reply) for reply in replies[key]] for key in replies
            }

    def _settled(self, results: list[tuple[Any, bool]]) -> tuple[Any, bool] | None:
        """The answer if there is no need to ask again: the first complete one; the fullest of those
        that we have if we may not ask again. Else None."""
        whole = [result for result in results if result[1]]
        if whole or not results:
            return whole[0] if whole else None
        return (
            max(results, key=_fullness) if len(results) >= self.attempts or not self.live else None
        )

    def _answer_or_stop(self, *asked: Any) -> tuple[Any, bool]:
        """An answer; an error stops all who have not sent their request yet, and the first one is
        what is told."""
        try:
            return self._answer(*asked)
        except BaseException as error:
            with self._lock:
                self._first_error = self._first_error or error
            self._stop.set()
            raise

    def _answer(
        self, key: str, question: Question, earlier: list[tuple[Any, bool]]
    ) -> tuple[Any, bool]:
        """Ask until there is a complete answer, at most `attempts` times, earlier ones counted (but
        anew if they were as many); else the fullest there was."""
        results, attempt = list(earlier), len(earlier) % self.attempts
        while attempt < self.attempts:
            number = self._reserved(key, question, len(results))
            if number is None:  # another process was faster
                found = self._earlier({key: question})[key]
                attempt, results = attempt + len(found) - len(results), found
                if whole := [result for result in results if result[1]]:
                    return whole[0]
                continue
            try:
                result, reply = self._exchange(
                    number, f"{key}-{len(results)}-{len(self.instead)}", question
                )
            finally:
                with self._lock:
                    self._flying -= 1
            if reply.outcome == "complete":
                return result, True
            if reply.outcome == "negotiated":
                continue
            with self._lock:
                self.reasons[reply.reason] += 1
            if reply.outcome == "filtered":
                return None, True  # the last word on it
            attempt += 1
            if reply.outcome == "unreadable":
                results.append((result, False))
            elif attempt < self.attempts:
                backoff = min(
                    LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)
                ) * self.jitter.uniform(0.5, 1)
                self._wait(
                    backoff if reply.wait is None else reply.wait * self.jitter.uniform(1, 1.1)
                )
        return max(results, key=_fullness, default=(None, False))

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise Stopped("asking was stopped")

    def _reserved(self, key: str, question: Question, known: int) -> int | None:
        """The ledger's row for a request that may be sent now; None if there are more replies than
        those known already."""
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
                self._flying += isinstance(number, int)
                waiting = self._flying > 0  # for a request that may turn out cheaper than its bound
            if isinstance(number, int):
                return number
            if number == "answered":
                return None
            if number == "too dear" and not waiting:
                raise TooDear(
                    f"stopped below the limit of ${limit:g}: ${self.ledger.spent():.4f} are spent, and the next "
                    f"request can cost ${row['bound']:.4f}"
                )
            self._wait(0.05)

    def _exchange(self, number: int, idempotency_key: str, question: Question) -> tuple[Any, Reply]:
        """Send one request, and complete its row with what became of it. Raises Refused on a
        permanent error."""
        start = time.perf_counter()
        reply, result = self._send(idempotency_key, question), None
        if reply.outcome == "lost":  # it may have been charged: its bound stays spent
            columns = {"outcome": "lost", "reply": reply.reason}
        elif reply.outcome in ("refused", "negotiated", "filtered", "permanent"):
            outcome = "filtered" if reply.outcome == "filtered" else "refused"
            columns = {"outcome": outcome, "reply": reply.reason, "dollars": 0.0}
        else:
            (result, whole), usage = _read(question, reply.body), _usage(reply.body)
            result = self._hidden(result)
            reply = replace(
                reply, outcome="complete" if whole and reply.outcome == "replied" else "unreadable"
            )
            columns = {
                "outcome": reply.outcome,
                "reply": self._hidden(_text(reply.body)),
                "parsed": json.dumps(result),
            }
            if usage:
                dollars = self.price.dollars(*usage) if self.price else None
                columns |= {
                    "prompt_tokens": usage[0],
                    "completion_tokens": usage[1],
                    "dollars": dollars,
                }
        self.ledger.complete(
            number, self._bound(question), **columns, seconds=time.perf_counter() - start
        )
        if reply.outcome == "permanent":
            raise Refused(reply.reason)
        return result, reply

    def _hidden(self, value: Any) -> Any:
        return hidden(value, self.client.api_key)

    def _send(self, idempotency_key: str, question: Question) -> Reply:
        """One HTTP request. A server that honours the idempotency key does not charge again for
        what was lost on the way."""
        import httpx2
        import openai

        body = {"model": self.model, **self._body(question), "messages": question.messages}
        headers = {"Idempotency-Key": idempotency_key}
        try:
            received = _received(
                self.client.post, "/chat/completions", self.timeout, headers, body=body
            )
        except openai.APIStatusError as error:
            return self._refusal(error, body)
        except (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError):
            return Reply("lost", "no reply in time")
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            return Reply(
                "lost",
                f"no connection, or a broken one ({type(error.__cause__ or error).__name__})",
            )
        if len(received) > LARGEST:
            return Reply("unreadable", "a reply that is too long", received[:LARGEST])
        return Reply("replied", "a reply that cannot be read", received)

    def _refusal(self, error: Any, body: dict[str, Any]) -> Reply:
        """What an HTTP error status asks of us."""
        status, headers = error.status_code, error.response.headers
        message = for_terminal(self._hidden(str(error.message)))[:300]
        told = f"{getattr(error, 'param', '')} {getattr(error, 'code', '')} {message}"
        if 300 <= status < 400:
            return Reply(
                "permanent", f"{self.model} at {self.url} {_redirect(error, self.client.api_key)}"
            )
        if status in (400, 422, 500, 501) and self._negotiated(told, body):
            return Reply("negotiated", "a setting that the endpoint does not know")
        if status == 400 and re.search("content_(filter|policy)", told):
            return Reply("filtered", "refused by a content filter")
        again, wait = status in (408, 409, 425, 429) or status >= 500, _retry_after(headers)
        again = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), again)
        if "insufficient_quota" in told or (wait or 0) > LONGEST_WAIT:
            again = False
        # 502, 504 and 524 are a gateway's words: what is behind it may have answered, and charged
        if again:
            return Reply(
                "lost" if status in (502, 504, 524) else "refused", f"HTTP {status}", wait=wait
            )
        hint = {
            401: "; check OPENAI_API_KEY",
            403: "; check OPENAI_API_KEY",
            404: "; check the model's name and the URL",
        }
        later = f"; it asks to be left alone for {wait:.0f} s" if wait else ""
        return Reply(
            "permanent",
            f"{self.model} at {self.url} answers HTTP {status}: {message}{later}{hint.get(status, '')}",
        )

    def _body(self, question: Question) -> dict[str, Any]:
        """The settings of a request, without those that the endpoint has refused."""
        body = {
            "max_tokens": question.max_tokens,
            "temperature": self.temperature,
            **question.wishes,
        }
        if self.instead.get("response_format") == "json_object" and "response_format" in body:
            schema = body["response_format"]["json_schema"]["schema"]
            body["response_format"] = {
                "type": "json_object",
                "schema": schema,
            }  # as llama-cpp-python has it
        if self.instead.get("max_tokens"):
            body["max_completion_tokens"] = body.pop("max_tokens")
        return {name: value for name, value in body.items() if self.instead.get(name, name)}

    def _negotiated(self, told: str, body: dict[str, Any]) -> bool:
        """Was a setting refused that there is another form of, or that one can do without? So from
        now on, and we say so."""
        refused = {
            name: None
            for name, words in NEGOTIABLE.items()
            if name in body and any(word in told for word in words)
        }
        if "max_tokens" in body and "max_completion_tokens" in told:
            refused = {"max_tokens": "max_completion_tokens"}
        elif "response_format" in refused and body["response_format"]["type"] == "json_schema":
            refused = {"response_format": "json_object"}
        for name, other in refused.items():
            with self._lock:
                if self.instead.get(name, name) not in (other, None):
                    remedy = f"sending {other} in its place" if other else "going on without it"
                    tqdm.write(f"{self.model} does not take {name} as it was sent: {remedy}")
                    self.instead[name] = other
        if "logprobs" in refused:
            self.instead["top_logprobs"] = None
        return bool(refused)

    def report(self) -> dict[str, float | None]:
        """What this run has sent and spent so far (`Ledger.totals`; dollars are None where the
        price is not known); what this process asked, had in the cache, and failed."""
        totals = self.ledger.totals()
        if self.live and self.price is None:
            totals |= {"dollars": None, "dollars_unknown_at_most": None}
        return {**totals, **{name: self.counts[name] for name in ("asked", "cached", "failed")}}

    def spent(self) -> str:
        """The dollars of this run so far, to be shown."""
        return f"${self.ledger.spent():.4f}" if self.price or not self.live else "price not known"


def make_client(url: str | None, keyless: bool = False) -> Any:
    """The openai library's client for a URL, with the key from the environment, or without one:
    such a client can only be asked where no key is needed. Refused on a URL or key that cannot be
    one, or if the key is missing."""
    import openai

    key, where = (
        os.environ.get("OPENAI_API_KEY"),
        url if url is not None else os.environ.get("OPENAI_BASE_URL") or None,
    )
    if where is not None and not _is_url(where):
        raise Refused(
            "the judge's URL must be like http://localhost:8000/v1, with no key in it, whose place is OPENAI_API_KEY"
        )
    if not (key or keyless or where):
        raise Refused(
            "OPENAI_API_KEY is not set; set it, or give the URL of a server that needs none"
        )
    if key and not re.fullmatch(r"[!-~]+", key):
        raise Refused(
            "OPENAI_API_KEY holds a space, a line break or another character that no key has"
        )
    return openai.OpenAI(api_key=NO_KEY if keyless or not key else key, base_url=url)


def _is_url(text: str) -> bool:
    """Is it the address of a server, and nothing more that might be a secret?"""
    try:
        parts = urlsplit(text)
        plain = not (parts.username or parts.password or parts.query or parts.fragment)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and plain and parts.port != 0
        )
    except ValueError:  # of the port, or the host
        return False


def only_model(url: str | None) -> str:
    """The name of the model that a server offers. Refused if it does not say so in `PATIENCE`
    seconds, or offers several."""
    import httpx2
    import openai

    if url is None and not os.environ.get("OPENAI_BASE_URL"):
        raise Refused("the model's name is missing, and OpenAI has many; name one, openai:MODEL")
    client = make_client(url)
    where = str(client.base_url).rstrip("/")
    try:
        listed = _received(client.get, "/models", PATIENCE)
    except openai.APIStatusError as error:
        moved = 300 <= error.status_code < 400
        reason = _redirect(error, client.api_key) if moved else f"answers HTTP {error.status_code}"
        raise Refused(
            f"{where} {reason}{'' if moved else '; name the model: openai:MODEL'}"
        ) from None
    except (openai.OpenAIError, httpx2.HTTPError, TimeoutError) as error:
        late = isinstance(error, (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError))
        reason = f"within {PATIENCE:g} s" if late else f"({type(error).__name__})"
        raise Refused(
            f"{where} does not say {reason} which models it has; check the URL, or name the model: "
            "openai:MODEL"
        ) from None
    models = dig(_json(listed), "data")
    names = (
        [str(dig(model, "id")) for model in models if dig(model, "id")]
        if isinstance(models, list)
        else []
    )
    name = only(hidden(names, client.api_key), where)
    if name not in names:
        raise Refused(
            f"{where} calls its model {name!r}, after the key; name the model: openai:MODEL"
        )
    return name


def recorded_models(cache: str | Path, kind: str) -> list[str]:
    """The models whose replies to a judge's or a teacher's questions are in a ledger. Refused if it
    cannot be read."""
    return Ledger(cache, read_only=True).models(kind == "teacher")


def only(names: list[str], where: str, how: str = "name one: openai:MODEL") -> str:
    """The only one of the names; Refused, with how to mend it, if there are none or several."""
    if len(names) != 1:
        told = ", ".join(for_terminal(name)[:100] for name in names[:5])
        raise Refused(f"{where} has {len(names)} models{': ' * bool(names)}{told}; {how}")
    return names[0]


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks us to wait, by Retry-After-Ms, or by Retry-After in seconds or as
    a date; else None."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d+(\.\d*)?", value.strip()):
            return float(value) / unit
    try:
        return max(
            0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
        )
    except (ValueError, TypeError, IndexError, OverflowError):
        return None  # not a date either


def _text(body: bytes) -> str | bytes:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        return body


def _json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _read(question: Question, body: bytes) -> tuple[Any, bool]:
    """(result, whether it is complete) of a reply's body; (None, False) if it is not even JSON."""
    choice = dig(_json(body), "choices", 0)
    return question.read(choice) if isinstance(choice, dict) else (None, False)


def _reread(
    question: Question, outcome: str, parsed: str | None, reply: str | bytes | None
) -> tuple[Any, bool]:
    if outcome == "filtered":
        return None, True
    if outcome == "complete" and parsed is not None:
        try:
            return json.loads(parsed), True
        except (ValueError, TypeError, RecursionError):
            raise sqlite3.DatabaseError("damaged: what was read of a reply is no JSON") from None
    return _read(question, reply.encode() if isinstance(reply, str) else reply or b"")


def _usage(body: bytes) -> tuple[int, int] | None:
    """(prompt, completion) tokens that the endpoint says it charges for, or None."""
    usage = dig(_json(body), "usage")
    tokens = dig(usage, "prompt_tokens"), dig(usage, "completion_tokens")
    return tokens if all(type(count) is int and 0 <= count < 1 << 40 for count in tokens) else None


def _failed(result: tuple[Any, bool]) -> bool:
    return result[0] is None or not result[1]


def _fullness(result: tuple[Any, bool]) -> int:
    scores = dig(result[0], "scores") or []
    return sum(score is not None for score in scores)

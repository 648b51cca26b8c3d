"""One request to an OpenAI-compatible server, and how our key stays out of what comes back."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urljoin, urlsplit

from tqdm import tqdm

from judge.ledger import Refused, for_terminal
from judge.questions import Question
from judge.replies import from_json, usage

if TYPE_CHECKING:  # openai takes long to import, and most runs ask no server
    import httpx2
    import openai

SHORTEST_KEY = 8  # characters; a shorter one is a word that stands for a key where none is needed
LARGEST = 1 << 20  # bytes of a reply that are read
LONGEST_WAIT = 120.0  # seconds; a server that asks us to wait longer is not asked again
NO_KEY = "none"  # sent to a server of one's own, which needs no key
NEGOTIABLE = {  # settings that can be left out, and the words by which a refusal names them
    "response_format": ("response_format", "json_schema"),
    "logprobs": ("logprobs",),
    "temperature": ("temperature",),
}


# --- The key ---


@lru_cache
def _spellings(key: str) -> re.Pattern[str]:
    """Matches a key as it is, and as JSON (in JSON in JSON) or a URL may have escaped it."""
    letters = [
        f"(?:{re.escape(letter)}|u00(?i:{ord(letter):02x})|%(?i:{ord(letter):02x}))"
        for letter in key
    ]
    return re.compile(r"\\{0,15}" + r"\\{0,15}".join(letters))


def hidden(text: Any, key: str) -> Any:
    """A text, or bytes, with "[key]" in place of our key, in case a server sends it back. Keys
    below `SHORTEST_KEY` are not hidden."""
    if len(key) < SHORTEST_KEY:
        return text
    if isinstance(text, bytes):
        return hidden(text.decode("latin-1"), key).encode("latin-1")
    return _spellings(key).sub("[key]", text)


# --- HTTP ---


def make_client(url: str | None, keyless: bool = False) -> openai.OpenAI:
    """The openai library's client for a URL, with the key from OPENAI_API_KEY. None stands for the
    library's own choice: OPENAI_BASE_URL, or OpenAI. A keyless client never sends our key. Raises
    Refused if the URL or the key cannot be one, or if the key is missing."""
    import openai

    key = os.environ.get("OPENAI_API_KEY")
    where = url if url is not None else os.environ.get("OPENAI_BASE_URL") or None
    if where is not None and not _is_url(where):
        raise Refused(
            "the judge's URL must be like http://localhost:8000/v1, with no key in it; "
            "the key belongs in OPENAI_API_KEY"
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
    """Whether it is the address of a server, without a part that may be a secret."""
    try:
        parts = urlsplit(text)
        plain = not (parts.username or parts.password or parts.query or parts.fragment)
        web = parts.scheme in ("http", "https") and bool(parts.hostname)
        return web and plain and parts.port != 0
    except ValueError:  # of the port, or the host
        return False


def received(
    send: Callable[..., Any],
    path: str,
    timeout: float,
    headers: dict[str, str] | None = None,
    **body: Any,
) -> str | bytes:
    """The text of the reply to one request by a client's `get` or `post`, as bytes if it is not
    UTF-8; of a longer one the first `LARGEST` bytes. Redirects are not followed, whatever the
    client is set to do. Raises openai.APIStatusError; OSError, which says why, if no whole reply
    came in time."""
    import httpx2
    import openai

    options = {"headers": headers or {}, "timeout": timeout, "max_retries": 0}
    options |= {"follow_redirects": False, "security": {"bearer_auth": True}}
    kinds = {"cast_to": httpx2.Response, "stream": True, "stream_cls": openai.Stream}
    content, deadline = bytearray(), time.monotonic() + timeout
    try:
        response: httpx2.Response = send(path, options=options, **kinds, **body)
        with closing(response):
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST:
                    break
                if time.monotonic() > deadline:
                    raise TimeoutError
    except (openai.APITimeoutError, httpx2.TimeoutException, TimeoutError):
        raise TimeoutError("no reply in time") from None
    except (openai.APIConnectionError, httpx2.HTTPError) as error:
        kind = type(error.__cause__ or error).__name__
        raise ConnectionError(f"no connection, or a broken one ({kind})") from None
    try:
        return content[:LARGEST].decode("utf-8")
    except UnicodeDecodeError:
        return bytes(content[:LARGEST])


def redirection(error: openai.APIStatusError, key: str) -> str:
    """What to say of a reply that is a redirect. Of its target only parts that are no secret."""
    try:
        location = error.response.headers.get("location", "")
        target = urlsplit(urljoin(str(error.response.url), location))
        place = target.netloc.rpartition("@")[2]
        address = target._replace(netloc=place, query="", fragment="").geturl()
    except ValueError:
        address = "an invalid address"
    shown = for_terminal(hidden(address, key))[:200]
    how = "no redirect is followed; if it is to be asked, give its URL"
    return f"redirects to {shown} (HTTP {error.status_code}), and {how}"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks us to wait, by Retry-After-Ms, or by Retry-After in seconds or
    as a date. None if it does not."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d+(\.\d*)?", value.strip()):
            return float(value) / unit
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None  # not a date either


# --- One request to a model ---

Outcome = Literal[
    "complete",  # a full answer
    "unreadable",  # a reply that is none
    "lost",  # no reply came, though the request may have been charged
    "refused",  # for now
    "negotiated",  # a setting was refused, and is sent in another way from now on
    "filtered",  # this question will never be answered
    "permanent",  # no question will be answered
]


@dataclass(frozen=True)
class Reply:
    """What became of a request, and why. All texts are without our key.

    wait: seconds before the next attempt, if the server says so. If there is a body: its text; what
    was read of it, as JSON; and the (prompt, completion) tokens that the server says it charges."""

    outcome: Outcome
    reason: str
    wait: float | None = None
    text: str | bytes | None = None
    parsed: str | None = None
    tokens: tuple[int, int] | None = None


class Connection:
    """Sends requests to one model, and finds out which settings its server does not know.

    client: the openai library's, or None for `make_client(url)`. temperature: of every request.
    timeout: the seconds that a request may take (see `Endpoint`)."""

    def __init__(
        self,
        model: str,
        url: str | None,
        client: openai.OpenAI | None,
        temperature: float,
        timeout: float,
    ):
        # whoever uses a connection counts the attempts, so the client makes no more than one
        self.client = (client or make_client(url)).with_options(timeout=timeout, max_retries=0)
        self.url = str(self.client.base_url).rstrip("/")
        self.model, self.temperature, self.timeout = model, temperature, timeout
        self.instead: dict[str, str | None] = {}  # refused settings: what to send, None for nothing
        self._lock = threading.Lock()

    def hidden(self, text: Any) -> Any:
        """The text without our key (`hidden`)."""
        return hidden(text, self.client.api_key)

    def send(self, question: Question, idempotency_key: str) -> Reply:
        """Send one request. A server that honours the idempotency key charges once for all requests
        of that key and of the same settings."""
        import openai

        body = {"model": self.model, **self._settings(question), "messages": question.messages}
        headers = {"Idempotency-Key": f"{idempotency_key}-{len(self.instead)}"}
        try:
            text = received(self.client.post, "/chat/completions", self.timeout, headers, body=body)
        except openai.APIStatusError as error:
            return self._refusal(error, body)
        except OSError as error:
            return Reply("lost", str(error))
        told = from_json(text)
        answer = question.answer(told)
        return Reply(
            "complete" if answer.complete else "unreadable",
            "a reply that cannot be read",
            text=self.hidden(text),
            parsed=self.hidden(json.dumps(answer.result)),
            tokens=usage(told),
        )

    def _settings(self, question: Question) -> dict[str, Any]:
        """The settings of a request, as far as the server knows them."""
        body = {
            "max_tokens": question.max_tokens,
            "temperature": self.temperature,
            **question.wishes,
        }
        if self.instead.get("response_format") == "json_object" and "response_format" in body:
            schema = body["response_format"]["json_schema"]["schema"]
            # as llama-cpp-python takes it
            body["response_format"] = {"type": "json_object", "schema": schema}
        if self.instead.get("max_tokens"):
            body["max_completion_tokens"] = body.pop("max_tokens")
        return {name: value for name, value in body.items() if self.instead.get(name, name)}

    def _refusal(self, error: openai.APIStatusError, body: dict[str, Any]) -> Reply:
        """What an HTTP error status means for this request and the next ones."""
        status, headers = error.status_code, error.response.headers
        message = for_terminal(self.hidden(str(error.message)))[:300]
        told = f"{getattr(error, 'param', '')} {getattr(error, 'code', '')} {message}"
        if 300 <= status < 400:
            moved = redirection(error, self.client.api_key)
            return Reply("permanent", f"{self.model} at {self.url} {moved}")
        if status in (400, 422, 500, 501) and self._negotiated(told, body):
            return Reply("negotiated", "a setting that the endpoint does not know")
        if status == 400 and re.search("content_(filter|policy)", told):
            return Reply("filtered", "refused by a content filter")
        wait = retry_after(headers)
        again = status in (408, 409, 425, 429) or status >= 500
        again = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), again)
        if "insufficient_quota" in told or (wait or 0) > LONGEST_WAIT:
            again = False
        if again:
            # a gateway sends 502, 504 and 524; the server behind it may have answered, and charged
            outcome: Outcome = "lost" if status in (502, 504, 524) else "refused"
            return Reply(outcome, f"HTTP {status}", wait=wait)
        hint = {
            401: "; check OPENAI_API_KEY",
            403: "; check OPENAI_API_KEY",
            404: "; check the model's name and the URL",
        }.get(status, "")
        later = f"; it asks us to wait for {wait:.0f} s" if wait else ""
        answer = f"answers HTTP {status}: {message}{later}{hint}"
        return Reply("permanent", f"{self.model} at {self.url} {answer}")

    def _negotiated(self, told: str, body: dict[str, Any]) -> bool:
        """Whether a setting was refused that has another form, or that we can do without. If so, it
        is replaced or left out from now on, and a line on the console says so."""
        refused: dict[str, str | None] = {
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

"""A language model's HTTP endpoint on loopback, for tests: a judge whose mind is known, with every
fault that real ones have.

It runs as a process of its own (`serving`), so that it outlives its clients when they are killed.
/stats tells what it was asked and what it charged; /control changes how it behaves. It finds the
texts to be judged by the marks in the prompt.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

UNPAID = ("429", "429-retry-after", "500", "503")  # refused before any work is done
# charged, but no whole reply arrives
LOST = ("timeout", "reset", "truncated-http", "closed", "not-http", "not-gzip")
DRIPS = ("drip",)  # also charged, but the reply comes too slowly
BROKEN = (  # a whole reply that gives no full answer
    "truncated-json",
    "wrong-ids",
    "missing-ids",
    "out-of-range",
    "refusal",
    "filtered",
    "empty",
    "not-utf-8",
    "10-megabytes",
    "not-json",
    "two-answers",
    "cut-off",
    "null",
    "list",
    "deep",
    "error-200",
)
HARMLESS = ("prose", "python", "fenced", "surrogates", "no-usage")  # can be read in spite of it
FAULTS = UNPAID + LOST + BROKEN + HARMLESS
LARGEST = 1 << 20  # bytes of a reply that a client can be expected to read


def quality(text: str) -> int:
    """What the judge thinks of a text, 0 to 6: the number after the word "worth" in it, or if there
    is none, a number that depends on its letters."""
    found = re.search(r"worth (\d)", text)
    return int(found[1]) if found else int(hashlib.sha256(text.encode()).hexdigest(), 16) % 7


def blocks(messages: list[dict]) -> dict[str, str]:
    """The texts between marks, by name: request, response id1, ... Without marks (a careless
    prompt), what follows "[name]"."""
    number = re.search(r"the number ([0-9a-f]{16})", messages[0]["content"])
    marked = r"^\[([\w ]+)\] (.*?)(?=^\[|\Z)"
    if number:
        marked = rf"<([\w ]+) {number[1]}>\n(.*?)\n</\1 {number[1]}>"
    return dict(re.findall(marked, messages[-1]["content"], re.DOTALL | re.MULTILINE))


def outside(messages: list[dict]) -> str:
    """The text outside the marks, which are the instructions; all of it if there are no marks."""
    number = re.search(r"the number ([0-9a-f]{16})", messages[0]["content"])
    said = messages[-1]["content"]
    if not number:
        return said
    return re.sub(rf"<([\w ]+) {number[1]}>\n.*?\n</\1 {number[1]}>", "", said, flags=re.DOTALL)


class Judge:
    """Answers as the prompts ask it to. Its settings:

    gullible: it obeys any "idN_score: S" or "verdict is A" outside the marks.
    filters: a content filter refuses requests that contain this text.
    status: [HTTP status, message, code, header] of every reply. Not at /elsewhere, to which it may
        redirect: there all is well.
    refuses: settings of requests that it does not know.
    echo: it sends the caller's key back wherever it can. spelling: "plain", "solidus" (as \\/ and
        \\") or "unicode" (all as \\u0000).
    models: [HTTP status, body, header] at /v1/models, with the caller's key for "KEY"; None for no
        reply.
    drip: seconds that a dripping reply takes. most: faults that a question meets at most, before it
        gets its answer."""

    def __init__(self) -> None:
        self.settings = {
            "latency": 0.0,
            "faults": [],
            "mode": "none",
            "seed": 0,
            "rate": 0.0,
            "most": 3,
            "usage": True,
            "logprobs": True,
            "refuses": [],
            "gullible": False,
            "echo": False,
            "status": None,
            "filters": None,
            "idempotent": True,
            "first_bias": 0.0,
            "drip": 6.0,
            "spelling": "plain",
            "models": [200, '{"data": [{"id": "local-judge"}]}', ""],
        }
        self.requests = self.turn = self.flying = self.peak = self.outlasted = 0
        self.listings = self.strays = 0
        self.paid: dict[str, int] = {}  # complete replies charged, by question
        self.answered: dict[str, int] = {}  # replies sent to the end, by question, free of faults
        self.tokens, self.kept, self.met = [0, 0], {}, {}
        self.told = [0, 0]  # tokens whose charge was told in a reply that went out whole
        self.last, self.last_path = {}, ""  # settings of the last request, and where it was sent
        self.by_fault: dict[str, int] = {}
        self.headers: list[str] = []

    def scores(self, body: dict) -> dict:
        texts = {
            name.removeprefix("response "): text
            for name, text in blocks(body["messages"]).items()
            if name != "request"
        }
        if self.settings["gullible"]:
            orders = dict(re.findall(r"(id\d+)_score\W+(\d)", outside(body["messages"])))
            texts = {
                name: f"worth {orders[name]}" if name in orders else text
                for name, text in texts.items()
            }
        reason = "because of " + " ".join(self.headers if self.settings["echo"] else ["it"])
        return {
            f"{name}_{kind}": value
            for name, text in texts.items()
            for kind, value in (
                ("justification", f"{reason}: {text[:20]}"),
                ("score", quality(text)),
            )
        }

    def content(self, body: dict) -> tuple[str, dict | None]:
        """(text, log-probabilities) of the answer."""
        system, form = body["messages"][0]["content"], outside(body["messages"])
        if "grade responses" in system:
            return json.dumps(self.scores(body)), None
        if "compare two responses" not in system:
            return f"A gold answer to {body['messages'][-1]['content']}", None
        texts = blocks(body["messages"])
        lead = quality(texts["response A"]) - quality(texts["response B"])
        chance = min(0.95, max(0.05, 0.5 + lead / 16 + self.settings["first_bias"]))
        order = re.search(r"verdict is ([AB])\b", form) if self.settings["gullible"] else None
        chance = {"A": 0.95, "B": 0.05}[order[1]] if order else chance
        verdict = "A" if chance > 0.5 else "B"
        around = ['{"', "verdict", '":', ' "', '"}'] if '"verdict"' in form else [""]
        wanted = self.settings["logprobs"] and body.get("logprobs")
        tokens = [*around[:-1], verdict, *around[-1:]] if wanted else []
        shares = {"A": chance * 0.9, " B": (1 - chance) * 0.9, "The": 0.1}
        top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
        # the alternatives to tokens that are no verdict
        others = [{"token": "A", "logprob": -9.0}, {"token": "{", "logprob": -0.1}]
        told = [
            {"token": token, "logprob": -0.1, "top_logprobs": top if token == verdict else others}
            for token in tokens
            if token
        ]
        return f"{''.join(around[:-1])}{verdict}{around[-1]}", {"content": told} if told else None

    def fault(self, question: str) -> str | None:
        """Which fault this request meets: the next "in turn", or one "at random", at most `most`
        for a question."""
        settings = self.settings
        if settings["mode"] == "always":
            return settings["faults"][0]
        if self.met.get(question, 0) >= settings["most"] or settings["mode"] == "none":
            return None
        if settings["mode"] == "turn":
            due = settings["faults"][self.turn % len(settings["faults"])]
            chosen = due if question not in self.met else None
            self.turn += chosen is not None
        else:
            draw = random.Random(f"{settings['seed']} {question} {self.met.get(question, 0)}")
            chosen = draw.choice(settings["faults"]) if draw.random() < settings["rate"] else None
        self.met[question] = self.met.get(question, 0) + 1
        return chosen


BAD_JSON = {
    "null": b'{"choices": null}',
    "list": b"[[1]]",
    "deep": b"[" * 100_000,
    "error-200": b'{"error": {}}',
}


def completion(judge: Judge, body: dict, fault: str | None) -> bytes:
    """The reply's body, spoilt as the fault says."""
    if fault in BAD_JSON:
        return BAD_JSON[fault]
    content, logprobs = judge.content(body)
    choice = {
        "index": 0,
        "finish_reason": "stop",
        "message": {"role": "assistant", "content": content},
        "logprobs": logprobs,
    }
    spoil_format(choice, fault)
    spoil_answer(choice, fault)
    message = choice["message"]
    if judge.settings["echo"]:
        message["content"] = (message["content"] or "") + " ".join(judge.headers)
    prompt, long = charged(judge, body)
    usage = {"prompt_tokens": prompt, "completion_tokens": long, "total_tokens": prompt + long}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
    }
    if fault == "huge-usage":
        usage["prompt_tokens"] = 10**30
    if judge.settings["usage"] and fault != "no-usage":
        reply["usage"] = usage
    whole = json.dumps(reply).encode()
    if fault == "not-utf-8":
        whole = whole.replace(b'"assistant"', b'"\xff\xfe"', 1).replace(b"because", b"\xe9\xe8", 1)
    whole = spelt(judge, whole)
    return whole[: len(whole) // 2] if fault == "truncated-json" else whole


def parsed(content: str) -> dict | None:
    """The answer's JSON object, or None if it is plain text."""
    return json.loads(content) if content.startswith("{") else None


def spoil_format(choice: dict, fault: str | None) -> None:
    """Change how the answer is given: dressed up, cut off, refused or left out."""
    message = choice["message"]
    content, answer = message["content"], parsed(message["content"])
    if fault == "prose" and answer:
        message["content"] = f"Let me see {{carefully}}. {content}\nI hope that helps."
    elif fault == "python":
        message["content"] = repr(answer) if answer else f'"{content}"'
    elif fault == "surrogates" and answer:
        strange = {**answer, "id1_justification": "\ud800"}
        message["content"] = json.dumps(strange, ensure_ascii=False)
    elif fault == "fenced":
        fenced = f"```json\n{json.dumps(answer, indent=2)}\n```"
        message["content"] = fenced if answer else f"**{content}**"
    elif fault == "cut-off":
        message["content"] = content[: len(content) // 2] if answer else "Well, A"
        choice |= {"finish_reason": "length", "logprobs": None}
    elif fault == "refusal":
        message |= {"content": None, "refusal": "I cannot help with that."}
        choice["logprobs"] = None
    elif fault == "empty":
        message["content"], choice["logprobs"] = "", None
    elif fault == "10-megabytes":
        message["content"] = content + " and on" * 1_500_000
    elif fault == "filtered":
        message["content"] = ""
        choice |= {"finish_reason": "content_filter", "logprobs": None}


def spoil_answer(choice: dict, fault: str | None) -> None:
    """Change what the answer says, so that it is no answer to the question."""
    if fault not in ("wrong-ids", "missing-ids", "out-of-range", "two-answers", "not-json"):
        return
    message = choice["message"]
    content, answer = message["content"], parsed(message["content"])
    if fault == "not-json" or not answer:
        message["content"], choice["logprobs"] = "A good deal speaks for either.", None
        return
    ids = sorted({key.partition("_")[0] for key in answer})
    last = f"{ids[0]}_score" if "id1" in ids else "verdict"
    if fault == "wrong-ids":
        renamed = {re.sub("^(id|verdict)", r"\g<1>9", key): value for key, value in answer.items()}
        message["content"] = json.dumps(renamed)
    elif fault == "missing-ids":
        left = {key: value for key, value in answer.items() if not key.startswith(ids[-1])}
        message["content"] = json.dumps(left)
    elif fault == "out-of-range":
        message["content"] = json.dumps({**answer, last: 7})
    else:
        second = json.dumps({**answer, last: 6 if "id1" in ids else "A"})
        message["content"] = f"{content}\nor rather\n{second}"


def spelt(judge: Judge, body: bytes) -> bytes:
    """JSON in which the caller's key is spelt in the way of the settings."""
    for key in (header.removeprefix("Bearer ") for header in judge.headers):
        other = {
            "plain": key.replace('"', '\\"'),
            "solidus": key.replace("/", "\\/").replace('"', '\\"'),
            "unicode": "".join(f"\\u{ord(letter):04x}" for letter in key),
        }[judge.settings["spelling"]]
        body = body.replace(json.dumps(key)[1:-1].encode(), other.encode())
    return body


async def respond(judge: Judge, head: bytes, body: dict, writer: asyncio.StreamWriter) -> None:
    """Answer one request for a completion."""
    settings = judge.settings
    question = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
    judge.requests += 1
    judge.last_path = head.split()[1].decode()
    judge.last = {name: value for name, value in body.items() if name != "messages"}
    idempotency = re.search(rb"idempotency-key: (\S+)", head, re.IGNORECASE)
    key = idempotency[1].decode() if idempotency and settings["idempotent"] else None
    judge.headers = re.findall(r"authorization: ([^\r]*)", head.decode("latin-1"), re.IGNORECASE)
    echo = " ".join(judge.headers) if settings["echo"] else ""
    if refuse(judge, body, echo, writer):
        return
    fault = judge.fault(question)
    judge.by_fault[str(fault)] = judge.by_fault.get(str(fault), 0) + 1
    if fault in UNPAID:
        headers = {"429-retry-after": b"retry-after-ms: 30\r\n"}.get(fault, b"")
        send(writer, int(fault[:3]), spelt(judge, error(f"busy {echo}")), headers)
        return
    reply = judge.kept.get(key) or completion(judge, body, fault)
    if key not in judge.kept:
        judge.paid[question] = judge.paid.get(question, 0) + 1
        judge.tokens = [sum(pair) for pair in zip(judge.tokens, charged(judge, body), strict=True)]
        if key:
            judge.kept[key] = completion(judge, body, None) if fault in LOST + DRIPS else reply
    await asyncio.sleep(settings["latency"] + (30 if fault == "timeout" else 0))
    if fault in DRIPS:
        await drip(writer, settings["drip"])
        judge.outlasted += 1
    elif fault in LOST:
        await lose(writer, fault, reply)
    else:
        send(writer, 200, reply)
        await writer.drain()
        judge.told = [sum(pair) for pair in zip(judge.told, told(reply), strict=True)]
        if fault is None or fault in HARMLESS:
            judge.answered[question] = judge.answered.get(question, 0) + 1


def refuse(judge: Judge, body: dict, echo: str, writer: asyncio.StreamWriter) -> bool:
    """Send an HTTP error if the server's settings say so, and tell whether they do."""
    settings = judge.settings
    if settings["status"]:
        status, message, code, header = settings["status"]
        told = spelt(judge, error(f"{message} {echo}", code=code))
        send(writer, status, told, header.encode())
        return True
    if settings["filters"] and settings["filters"] in body["messages"][-1]["content"]:
        send(writer, 400, error("The response was filtered", code="content_filter"))
        return True
    known = {*body, body.get("response_format", {}).get("type")}
    refused = [name for name in settings["refuses"] if name in known]
    if refused:
        instead = ", use max_completion_tokens in its place" if refused[0] == "max_tokens" else ""
        message = f"Unsupported parameter: {refused[0]}{instead}"
        send(writer, 400, error(message, param=refused[0], code="unsupported"))
    return bool(refused)


START = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"


async def drip(writer: asyncio.StreamWriter, seconds: float) -> None:
    """Send a reply of 40 blanks, one after the other."""
    writer.write(START % (b"", 40))
    for _ in range(40):
        await asyncio.sleep(seconds / 40)
        writer.write(b" ")
        await writer.drain()


async def lose(writer: asyncio.StreamWriter, fault: str, reply: bytes) -> None:
    """Send what no client can take for the reply, and close the connection."""
    if fault in ("reset", "truncated-http"):
        writer.write(START % (b"", len(reply)) + reply[: len(reply) // 2])
    elif fault == "not-http":
        writer.write(b"Who goes there?\r\n\r\n")
    elif fault == "not-gzip":
        writer.write(START % (b"content-encoding: gzip\r\n", len(reply)) + reply)
    if fault != "timeout":
        await writer.drain()
    if fault == "reset":
        writer.transport.abort()
    else:
        writer.close()


async def list_models(judge: Judge, head: bytes, writer: asyncio.StreamWriter) -> None:
    """Say which models there are, or nothing for as long as anybody would wait."""
    if judge.settings["models"] is None:
        await asyncio.sleep(3600)
    status, body, header = judge.settings["models"]
    key = re.search(r"authorization: Bearer ([^\r]*)", head.decode("latin-1"), re.IGNORECASE)
    body = body.replace("KEY", json.dumps(key[1])[1:-1] if key else "")
    send(writer, status, body.encode(), header.encode())


def charged(judge: Judge, body: dict) -> tuple[int, int]:
    """Tokens of prompt and completion: a quarter of their characters."""
    prompt = sum(len(part["content"]) for part in body["messages"]) // 4
    return prompt, len(judge.content(body)[0]) // 4 + 1


def told(reply: bytes) -> tuple[int, int]:
    """The tokens that a reply says are charged; (0, 0) if it does not, or cannot be read."""
    try:
        body = json.loads(reply.decode()) if len(reply) <= LARGEST else None
    except (ValueError, RecursionError):
        body = None
    usage = body.get("usage") if isinstance(body, dict) else None
    return (usage["prompt_tokens"], usage["completion_tokens"]) if usage else (0, 0)


def error(message: str, **more: object) -> bytes:
    return json.dumps({"error": {"message": message, **more}}).encode()


def send(writer: asyncio.StreamWriter, status: int, body: bytes, headers: bytes = b"") -> None:
    start = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
    writer.write(start % (status, headers, len(body)) + body)


async def dispatch(judge: Judge, head: bytes, body: dict, writer: asyncio.StreamWriter) -> None:
    """Answer one request of any kind."""
    if head.startswith(b"GET /stats"):
        hidden = ("settings", "kept", "met", "headers", "turn")
        stats = {name: value for name, value in vars(judge).items() if name not in hidden}
        send(writer, 200, json.dumps(stats).encode())
    elif head.startswith(b"GET /v1/models"):
        judge.listings += 1
        await list_models(judge, head, writer)
    elif b" /elsewhere" in head.partition(b"\r\n")[0]:
        judge.strays += 1
        message = {"role": "assistant", "content": '{"verdict": "A"}'}
        choices = [{"finish_reason": "stop", "message": message}]
        stray = {"choices": choices, "data": [{"id": "stray"}]}
        send(writer, 200, json.dumps(stray).encode())
    elif head.startswith(b"POST /control"):
        if body.pop("reset", False):
            judge.__init__()
        judge.settings |= body
        send(writer, 200, b"{}")
    else:
        judge.flying += 1
        judge.peak = max(judge.peak, judge.flying)
        try:
            await respond(judge, head, body, writer)
        finally:
            judge.flying -= 1


async def main() -> None:
    judge = Judge()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                await dispatch(judge, head, json.loads(body or b"{}"), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


class Served:
    """A running server, as its tests see it."""

    def __init__(self, port: int):
        self.root, self.url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/v1"

    def control(self, **settings: object) -> None:
        """Forget everything, then take these settings."""
        body = json.dumps({"reset": True, **settings}).encode()
        urllib.request.urlopen(urllib.request.Request(self.root + "/control", body)).read()

    def change(self, **settings: object) -> None:
        """Take these settings from now on."""
        body = json.dumps(settings).encode()
        urllib.request.urlopen(urllib.request.Request(self.root + "/control", body)).read()

    def stats(self) -> dict:
        """requests: all for completions; listings: those for the models; strays: those elsewhere.
        paid, answered: replies that were charged, and that were sent whole and without fault, by
        question. tokens: charged; told: those of them that a whole reply told. by_fault: requests.
        peak: most requests at a time. last, last_path: settings and path of the last request.
        outlasted: dripping replies whose reader stayed to the end."""
        return json.loads(urllib.request.urlopen(self.root + "/stats").read())


@contextmanager
def serving() -> Iterator[Served]:
    """A server in a process of its own."""
    process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
    try:
        yield Served(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    asyncio.run(main())

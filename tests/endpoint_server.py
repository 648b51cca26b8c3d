"""A language model's HTTP endpoint on loopback, for tests: a judge whose mind is known, with every
fault that real ones have.

Run as a process of its own (`serving` does), it lives on when its clients are killed. What it was
asked and what it charged it tells at /stats; /control changes how it behaves. It finds the texts to
be judged by the marks in the prompt.
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
LOST = (
    "timeout",
    "reset",
    "truncated-http",
    "closed",
    "not-http",
    "not-gzip",
)  # charged, but no whole reply arrives
DRIPS = ("drip",)  # likewise: it comes so slowly that it never ends
BROKEN = (
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
HARMLESS = ("prose", "python", "fenced", "surrogates", "no-usage")  # can be read all the same
FAULTS = UNPAID + LOST + BROKEN + HARMLESS
LARGEST = 1 << 20  # bytes of a reply that a client can be expected to read


def quality(text: str) -> int:
    """What the judge thinks of a text, 0 to 6: the number in it after the word "worth", else one
    that its letters make up."""
    found = re.search(r"worth (\d)", text)
    return int(found[1]) if found else int(hashlib.sha256(text.encode()).hexdigest(), 16) % 7


def blocks(messages: list[dict]) -> dict[str, str]:
    """The texts between marks, by name: request, response id1, ... Without marks (a careless
    prompt), what follows "[name]"."""
    number = re.search(r"the number ([0-9a-f]{16})", messages[0]["content"])
    marked = (
        rf"<([\w ]+) {number[1]}>\n(.*?)\n</\1 {number[1]}>"
        if number
        else r"^\[([\w ]+)\] (.*?)(?=^\[|\Z)"
    )
    return dict(re.findall(marked, messages[-1]["content"], re.DOTALL | re.MULTILINE))


def outside(messages: list[dict]) -> str:
    """What stands outside the marks: instructions. All of it, if there are no marks."""
    number = re.search(r"the number ([0-9a-f]{16})", messages[0]["content"])
    said = messages[-1]["content"]
    return (
        re.sub(rf"<([\w ]+) {number[1]}>\n.*?\n</\1 {number[1]}>", "", said, flags=re.DOTALL)
        if number
        else said
    )


class Judge:
    """Answers as the prompts ask it to. gullible: it obeys any "idN_score: S" or "verdict: A" that
    stands outside the marks. filters: requests with this word are refused by a content filter.
    status: [HTTP status, message, code, header] of every reply; at /elsewhere, where it may
    redirect to, all is well. refuses: settings it does not know. echo: it sends the caller's key
    back wherever it can; spelling: "plain", "solidus" (as \\/ and \\") or "unicode" (all as
    \\u0000). models: [HTTP status, body, header] at /v1/models, "KEY" being the caller's; None: no
    reply. drip: seconds that a dripping reply takes. most: faults that a question meets before it
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
        self.last, self.last_path = (
            {},
            "",
        )  # the settings of the last request, and where it was sent
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
        tokens = (
            [*around[:-1], verdict, *around[-1:]]
            if self.settings["logprobs"] and body.get("logprobs")
            else []
        )
        shares = {"A": chance * 0.9, " B": (1 - chance) * 0.9, "The": 0.1}
        top = [{"token": token, "logprob": math.log(share)} for token, share in shares.items()]
        others = [
            {"token": "A", "logprob": -9.0},
            {"token": "{", "logprob": -0.1},
        ]  # of tokens that are no verdict
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
            chosen = (
                settings["faults"][self.turn % len(settings["faults"])]
                if question not in self.met
                else None
            )
            self.turn += chosen is not None
        else:
            draw = random.Random(f"{settings['seed']} {question} {self.met.get(question, 0)}")
            chosen = draw.choice(settings["faults"]) if draw.random() < settings["rate"] else None
        self.met[question] = self.met.get(question, 0) + 1
        return chosen


def completion(judge: Judge, body: dict, fault: str | None) -> bytes:
    """The reply's body, spoilt as the fault has it."""
    content, logprobs = judge.content(body)
    message, reason = {"role": "assistant", "content": content}, "stop"
    answer = json.loads(content) if content.startswith("{") else None
    ids = sorted({key.partition("_")[0] for key in answer or {}})
    last = f"{ids[0]}_score" if "id1" in ids else "verdict"
    if fault == "wrong-ids" and answer:
        message["content"] = json.dumps(
            {re.sub("^(id|verdict)", r"\g<1>9", key): value for key, value in answer.items()}
        )
    elif fault == "missing-ids" and answer:
        message["content"] = json.dumps(
            {key: value for key, value in answer.items() if not key.startswith(ids[-1])}
        )
    elif fault == "out-of-range" and answer:
        message["content"] = json.dumps({**answer, last: 7})
    elif fault == "two-answers" and answer:
        message["content"] = (
            content + "\nor rather\n" + json.dumps({**answer, last: 6 if "id1" in ids else "A"})
        )
    elif fault == "prose":
        message["content"] = (
            f"Let me see {{carefully}}. {content}\nI hope that helps." if answer else content
        )
    elif fault == "python":
        message["content"] = repr(answer) if answer else f'"{content}"'
    elif fault == "surrogates" and answer:
        message["content"] = json.dumps(
            {**answer, "id1_justification": "\ud800"}, ensure_ascii=False
        )
    elif fault == "fenced":
        message["content"] = (
            f"```json\n{json.dumps(answer, indent=2)}\n```" if answer else f"**{content}**"
        )
    elif fault in ("wrong-ids", "missing-ids", "out-of-range", "two-answers", "not-json"):
        message["content"], logprobs = "A good deal speaks for either.", None
    elif fault == "cut-off":
        message["content"], reason, logprobs = (
            content[: len(content) // 2] if answer else "Well, A",
            "length",
            None,
        )
    elif fault == "refusal":
        message, logprobs = (
            {"role": "assistant", "content": None, "refusal": "I cannot help with that."},
            None,
        )
    elif fault == "empty":
        message["content"], logprobs = "", None
    elif fault == "10-megabytes":
        message["content"] = content + " and on" * 1_500_000
    elif fault == "filtered":
        message["content"], reason, logprobs = "", "content_filter", None
    elif fault in ("null", "list", "deep", "error-200"):
        return {
            "null": b'{"choices": null}',
            "list": b"[[1]]",
            "deep": b"[" * 100_000,
            "error-200": b'{"error": {}}',
        }[fault]
    if judge.settings["echo"]:
        message["content"] = (message["content"] or "") + " ".join(judge.headers)
    prompt, long = charged(judge, body)
    usage = {"prompt_tokens": prompt, "completion_tokens": long, "total_tokens": prompt + long}
    reply = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [
            {"index": 0, "finish_reason": reason, "message": message, "logprobs": logprobs}
        ],
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


def spelt(judge: Judge, body: bytes) -> bytes:
    """JSON in which the caller's key is written in another way that means the same."""
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
    settings, question = (
        judge.settings,
        hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(),
    )
    judge.requests += 1
    judge.last_path = head.split()[1].decode()
    judge.last = {name: value for name, value in body.items() if name != "messages"}
    idempotency = re.search(rb"idempotency-key: (\S+)", head, re.IGNORECASE)
    key = idempotency[1].decode() if idempotency and settings["idempotent"] else None
    judge.headers = re.findall(r"authorization: ([^\r]*)", head.decode("latin-1"), re.IGNORECASE)
    echo = " ".join(judge.headers) if settings["echo"] else ""
    if settings["status"]:
        status, message, code, header = settings["status"]
        return send(
            writer, status, spelt(judge, error(f"{message} {echo}", code=code)), header.encode()
        )
    if settings["filters"] and settings["filters"] in body["messages"][-1]["content"]:
        return send(writer, 400, error("The response was filtered", code="content_filter"))
    known = {*body, body.get("response_format", {}).get("type")}
    if refused := [name for name in settings["refuses"] if name in known]:
        instead = ", use max_completion_tokens in its place" if refused[0] == "max_tokens" else ""
        return send(
            writer,
            400,
            error(
                f"Unsupported parameter: {refused[0]}{instead}",
                param=refused[0],
                code="unsupported",
            ),
        )
    fault = judge.fault(question)
    judge.by_fault[str(fault)] = judge.by_fault.get(str(fault), 0) + 1
    if fault in UNPAID:
        headers = {"429-retry-after": b"retry-after-ms: 30\r\n"}.get(fault, b"")
        return send(writer, int(fault[:3]), spelt(judge, error(f"busy {echo}")), headers)
    reply = judge.kept.get(key) or completion(judge, body, fault)
    if key not in judge.kept:
        judge.paid[question] = judge.paid.get(question, 0) + 1
        judge.tokens = [sum(pair) for pair in zip(judge.tokens, charged(judge, body), strict=True)]
        if key:
            judge.kept[key] = completion(judge, body, None) if fault in LOST + DRIPS else reply
    await asyncio.sleep(settings["latency"] + (30 if fault == "timeout" else 0))
    start = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n"
    if fault in DRIPS:
        writer.write(start % (b"", 40))
        for _ in range(40):
            await asyncio.sleep(settings["drip"] / 40)
            writer.write(b" ")
            await writer.drain()
        judge.outlasted += 1
    elif fault in LOST:
        if fault in ("reset", "truncated-http"):
            writer.write(start % (b"", len(reply)) + reply[: len(reply) // 2])
        elif fault == "not-http":
            writer.write(b"Who goes there?\r\n\r\n")
        elif fault == "not-gzip":
            writer.write(start % (b"content-encoding: gzip\r\n", len(reply)) + reply)
        if fault != "timeout":
            await writer.drain()
        writer.transport.abort() if fault == "reset" else writer.close()
    else:
        send(writer, 200, reply)
        await writer.drain()
        judge.told = [sum(pair) for pair in zip(judge.told, told(reply), strict=True)]
        if fault is None or fault in HARMLESS:
            judge.answered[question] = judge.answered.get(question, 0) + 1
    return None


async def list_models(judge: Judge, head: bytes, writer: asyncio.StreamWriter) -> None:
    """Say which models there are, or nothing for as long as anybody would wait."""
    if judge.settings["models"] is None:
        await asyncio.sleep(3600)
    status, body, header = judge.settings["models"]
    key = re.search(r"authorization: Bearer ([^\r]*)", head.decode("latin-1"), re.IGNORECASE)
    send(
        writer,
        status,
        body.replace("KEY", json.dumps(key[1])[1:-1] if key else "").encode(),
        header.encode(),
    )


def charged(judge: Judge, body: dict) -> tuple[int, int]:
    """Tokens of prompt and completion: a quarter of their characters."""
    return sum(len(part["content"]) for part in body["messages"]) // 4, len(
        judge.content(body)[0]
    ) // 4 + 1


def told(reply: bytes) -> tuple[int, int]:
    """The tokens that a reply says are charged; none if it does not or cannot be read."""
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


async def main() -> None:
    judge = Judge()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                body = json.loads(
                    await reader.readexactly(int(length[1]) if length else 0) or b"{}"
                )
                if head.startswith(b"GET /stats"):
                    hidden = ("settings", "kept", "met", "headers", "turn")
                    stats = {
                        name: value for name, value in vars(judge).items() if name not in hidden
                    }
                    send(writer, 200, json.dumps(stats).encode())
                elif head.startswith(b"GET /v1/models"):
                    judge.listings += 1
                    await list_models(judge, head, writer)
                elif b" /elsewhere" in head.partition(b"\r\n")[0]:
                    judge.strays += 1
                    verdict = {
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": '{"verdict": "A"}'},
                    }
                    send(
                        writer,
                        200,
                        json.dumps({"choices": [verdict], "data": [{"id": "stray"}]}).encode(),
                    )
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
        """Forget everything, then behave so."""
        body = json.dumps({"reset": True, **settings}).encode()
        urllib.request.urlopen(urllib.request.Request(self.root + "/control", body)).read()

    def change(self, **settings: object) -> None:
        """Behave so from now on."""
        urllib.request.urlopen(
            urllib.request.Request(self.root + "/control", json.dumps(settings).encode())
        ).read()

    def stats(self) -> dict:
        """requests: all that came, but for models (listings) and elsewhere (strays); paid: replies
        charged, by question; answered: sent whole and free of faults, by question; tokens: charged;
        told: of them, those told in a whole reply; by_fault; peak: most requests at once; last:
        settings of the last request; outlasted: dripping replies whose reader stayed to the end."""
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

"""Asking a language model over HTTP: faults, kills, money, caches and secrets, against a server
whose mind is known."""

import email.utils
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path

import openai
import pytest
import torch
from endpoint_server import BROKEN, DRIPS, FAULTS, HARMLESS, LOST, quality, serving
from tqdm import tqdm

import judge.models
from judge.client import retry_after
from judge.endpoint import Endpoint
from judge.ledger import Ledger, Refused, Stopped, TooDear
from judge.models import only_model
from judge.prices import Plan, Price, count_tokens
from judge.questions import Question, pairwise_question, teacher_question
from judge.replies import NO_ANSWER
from oracle import OpenAIJudge

HERE = Path(__file__).parent
PRICE = Price(10, 30)
ROUNDING = 1e-12  # of sums of dollars and of probabilities by way of their logarithms
BOTH = pytest.mark.parametrize("form", ["scored", "pairwise"])
FORK = multiprocessing.get_context("fork")  # children that have imported everything already
PATIENCE = 60  # seconds after which something hangs


@pytest.fixture(scope="module")
def running():
    with serving() as server:
        yield server


@pytest.fixture
def server(running):
    running.control()
    return running


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def client(running):
    """A client of the openai library, shared because it takes long to make."""
    return openai.OpenAI(api_key="none", base_url=running.url)


@pytest.fixture
def asking(server, client, tmp_path):
    """An endpoint on the server, patient with it but not slow."""

    def begin(**settings):
        return Endpoint(
            **{
                "model": "judge",
                "client": client,
                "cache": tmp_path / "cache.sqlite",
                "price": PRICE,
                "timeout": 20.0,
                "backoff": 0.02,
                "attempts": 12,
                **settings,
            }
        )

    return begin


def golds(n, start=0):
    """n questions, and what the server answers."""
    return [teacher_question(f"Question {i}", 16, 0) for i in range(start, start + n)], [
        f"A gold answer to Question {i}" for i in range(start, start + n)
    ]


def pairs(n, seed=0):
    """n prompts with two responses each: what `prefer` takes."""
    draw = random.Random(seed)
    first, second = (
        [f"Text {i} is worth {draw.randrange(7)}." for i in range(n)] for _ in range(2)
    )
    return [f"Prompt {seed}.{i}" for i in range(n)], first, [text + " So it is." for text in second]


def truth(form, prompts, a, b):
    """P(a > b) as the server's mind has it: all or nothing by points; or 1/2 plus a sixteenth of
    the lead."""
    lead = torch.tensor(
        [quality(y) - quality(z) for y, z in zip(a, b, strict=True)], dtype=torch.float64
    )
    return (1 + lead.sign()) / 2 if form == "scored" else 0.5 + lead / 16


def off(P, expected):
    return (P - expected).abs().max().item()


def dollars(tokens):
    return (10 * tokens[0] + 30 * tokens[1]) / 1e6


def bound(question):
    """The most that a request can cost: a token for each byte, 16 around each message, the form
    that is asked for, and the longest answer allowed."""
    size = sum(len(message["content"].encode()) + 16 for message in question.messages) + len(
        json.dumps(question.wishes)
    )
    return (10 * size + 30 * question.max_tokens) / 1e6


def rows(cache, columns="key, outcome", where="1"):
    with closing(sqlite3.connect(cache)) as db:
        return db.execute(f"SELECT {columns} FROM requests WHERE {where} ORDER BY id").fetchall()


def change(cache, sql):
    with closing(sqlite3.connect(cache)) as db, db:
        db.execute(sql)


@contextmanager
def refused(kind=Refused):
    """An error whose text is one line, without a character that a terminal might obey."""
    with pytest.raises(kind, match=r"\A[^\n]+\Z") as error:
        yield error
    assert str(error.value).isprintable()


# --- Faults ---


def assert_counted_right(endpoint, server):
    """What the ledger says was sent and paid is what the server saw and charged."""
    report, stats = endpoint.report(), server.stats()
    assert report["requests"] == stats["requests"]
    assert [report["prompt_tokens"], report["completion_tokens"]] == stats["told"]
    assert report["dollars"] == pytest.approx(dollars(stats["told"]), abs=ROUNDING)
    charge, unknown = dollars(stats["tokens"]), report["dollars_unknown_at_most"]
    assert report["dollars"] - ROUNDING <= charge <= report["dollars"] + unknown + ROUNDING
    assert endpoint.ledger.spent() == pytest.approx(report["dollars"] + unknown, abs=ROUNDING)


@BOTH
@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"mode": "turn"}, id="each in turn"),
        pytest.param({"mode": "random", "rate": 0.5, "idempotent": False}, id="at random"),
    ],
)
def test_whatever_faults_the_server_has_the_labels_are_those_of_a_run_without_any(
    form, behaviour, server, asking, tmp_path
):
    asked = pairs(2 * len(FAULTS) if form == "scored" else len(FAULTS))
    clean = OpenAIJudge(asking(cache=tmp_path / "clean.sqlite"), form).prefer(*asked)
    assert off(clean, truth(form, *asked)) < ROUNDING
    server.control(faults=FAULTS, **behaviour)
    endpoint = asking(timeout=1.5)
    P = OpenAIJudge(endpoint, form).prefer(*asked)
    assert torch.equal(P, clean)
    met = server.stats()["by_fault"]
    assert (
        behaviour["mode"] == "random"
        or {fault for fault in FAULTS if met.get(fault, 0) < 2} == set()
    )
    assert sum(met.get(fault, 0) for fault in FAULTS) > len(FAULTS)
    assert_counted_right(endpoint, server)


@BOTH
@pytest.mark.parametrize("fault", [*BROKEN, *LOST])
def test_a_fault_that_never_ends_gives_no_label_after_as_many_requests_as_there_are_attempts(
    form, fault, server, asking
):
    server.control(faults=[fault], mode="always")
    endpoint = asking(attempts=2, max_failed=1, timeout=0.3 if fault == "timeout" else 20.0)
    P = OpenAIJudge(endpoint, form).prefer(*pairs(2))
    assert P.isnan().all()
    assert server.stats()["requests"] == 2 * {"scored": 2, "pairwise": 4}[form]
    assert_counted_right(endpoint, server)


@BOTH
@pytest.mark.parametrize("fault", HARMLESS)
def test_a_reply_that_is_only_dressed_up_is_read_at_once(form, fault, server, asking):
    asked = pairs(4)
    server.control(faults=[fault], mode="always")
    assert off(OpenAIJudge(asking(attempts=1), form).prefer(*asked), truth(form, *asked)) < ROUNDING


@pytest.mark.parametrize("fault", DRIPS)
def test_a_reply_that_comes_in_drips_cannot_outlast_the_timeout(fault, server, asking):
    """It comes byte by byte for three seconds, each within the timeout of half a second."""
    server.control(faults=[fault], mode="always", drip=3.0)
    assert asking(attempts=1, max_failed=1, timeout=0.5).ask(golds(1)[0]) == [None]
    assert server.stats()["outlasted"] == 0


def test_a_charge_beyond_all_numbers_is_not_known_and_nothing_breaks(server, asking):
    """A reply says that 10^30 tokens were used, the next ones are sound."""
    questions, answers = golds(3)
    server.control(faults=["huge-usage"], mode="turn", most=1)
    endpoint = asking(concurrency=1)
    assert endpoint.ask(questions[:1]) == answers[:1]
    server.change(mode="none")
    assert endpoint.ask(questions) == answers
    assert endpoint.report()["dollars"] == pytest.approx(2 * dollars(server.stats()["tokens"]) / 3)


def test_a_refusal_by_a_content_filter_fails_its_own_question_alone(server, asking):
    questions, answers = golds(20)
    server.control(filters="Question 7")
    endpoint = asking(attempts=5)
    assert endpoint.ask(questions) == [
        None if i == 7 else answer for i, answer in enumerate(answers)
    ]
    assert server.stats()["requests"] == 20
    assert endpoint.report()["dollars_unknown_at_most"] == 0


PERMANENT = {
    "wrong key": (401, "Incorrect API key", "invalid_api_key", ""),
    "not allowed": (403, "Country not supported", None, ""),
    "no such model": (404, "The model does not exist", "model_not_found", ""),
    "too long": (
        400,
        "This model's maximum context length is 4096 tokens",
        "context_length_exceeded",
        "",
    ),
    "no money left": (429, "You exceeded your current quota", "insufficient_quota", ""),
    "busy for long": (429, "Rate limit reached", "rate_limit_exceeded", "retry-after: 121\r\n"),
    "busy forever": (503, "Overloaded", None, f"retry-after: {'9' * 400}\r\n"),
    "told not to retry": (500, "Boom", None, "x-should-retry: false\r\n"),
}


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("status", PERMANENT.values(), ids=PERMANENT)
def test_a_permanent_error_stops_at_once_and_says_in_a_line_what_where_and_why(
    status, concurrency, server, asking
):
    server.control(status=status, latency=0.01)
    endpoint = asking(concurrency=concurrency)
    with refused() as error:
        endpoint.ask(golds(30)[0])
    assert all(
        part in str(error.value) for part in (f"HTTP {status[0]}", "judge", server.url, status[1])
    )
    assert 1 <= server.stats()["requests"] <= concurrency
    assert endpoint.report()["dollars"] == endpoint.ledger.spent() == 0


def test_a_servers_message_is_shown_without_what_a_terminal_would_obey(server, asking):
    """An escape code, a line of its own, and half a character that cannot be printed."""
    server.control(status=(400, "no \x1b[2J\n\ud800 room", None, ""))
    with refused() as error:
        asking().ask(golds(1)[0])
    assert "room" in str(error.value)


REDIRECTS = [301, 302, 303, 307, 308]


@pytest.mark.parametrize("ones_own", [True, False], ids=["a client of ones own", "no client"])
@pytest.mark.parametrize("status", REDIRECTS)
def test_no_redirect_is_followed_and_one_line_names_its_target(status, ones_own, server, asking):
    """The reply there would be a label, to a request without the question (302) or to all that we
    send (307)."""
    place = server.root.replace("//", "//me:hunter2@") + "/elsewhere/v1"
    server.control(
        status=(status, "moved", None, f"location: {place}/chat?key=hunter2#hunter2\r\n")
    )
    endpoint = asking() if ones_own else asking(client=None, url=server.url)
    with refused() as error:
        OpenAIJudge(endpoint, "pairwise").prefer(*pairs(3))
    assert f"redirects to {server.root}/elsewhere/v1/chat (HTTP {status})" in str(error.value)
    assert server.stats()["strays"] == 0
    assert set(rows(endpoint.ledger.path, "outcome, parsed")) == {("refused", None)}


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/elsewhere/x", "ROOT/elsewhere/x"),
        ("//other/x", "http://other/x"),
        ("", "ROOT/v1/chat/completions"),
        ("http://[::1/x", "an invalid address"),
        ("http://h/\x1b[2J", "http://h/"),
    ],
)
def test_the_target_of_a_redirect_may_be_relative_or_none_or_ugly(location, target, server, asking):
    server.control(status=(302, "moved", None, f"location: {location}\r\n" * bool(location)))
    with refused() as error:
        asking().ask(golds(1)[0])
    assert f"redirects to {target.replace('ROOT', server.root)}" in str(error.value)
    assert server.stats()["strays"] == 0


@pytest.mark.parametrize("status", REDIRECTS)
def test_the_list_of_models_is_not_looked_for_elsewhere(status, server):
    server.control(models=[status, "", f"location: {server.root}/elsewhere/models?key=hunter2\r\n"])
    with refused() as error:
        only_model(server.url)
    assert f"redirects to {server.root}/elsewhere/models (HTTP {status})" in str(error.value)
    assert server.stats()["strays"] == 0


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_a_passing_error_is_met_with_as_many_requests_as_there_are_attempts(status, server, asking):
    server.control(status=(status, "not now", None, ""))
    endpoint = asking(attempts=3, backoff=0.001, max_failed=1)
    assert endpoint.ask(golds(2)[0]) == [None, None]
    assert server.stats()["requests"] == 6
    server.change(status=None)
    assert endpoint.ask(golds(2)[0]) == golds(2)[1], "it is asked again, as there was no reply"


def test_no_more_requests_are_under_way_at_once_than_allowed(server, asking):
    server.control(latency=0.05)
    asking(concurrency=5).ask(golds(20)[0])
    assert server.stats()["peak"] == 5


def test_replies_that_could_not_be_read_to_the_last_attempt_are_not_paid_for_again(server, asking):
    server.control(faults=["not-json"], mode="always")
    questions, answers = (
        [pairwise_question(f"Prompt {i}", "a", "b", 100) for i in range(3)],
        [None] * 3,
    )
    assert asking(attempts=2, max_failed=1).ask(questions) == answers
    server.change(mode="none")
    assert asking(attempts=2, max_failed=1).ask(questions) == answers
    assert server.stats()["requests"] == 6
    assert None not in asking(attempts=2, max_failed=0.5).ask(questions), (
        "more than may fail: the run could not go on else"
    )
    assert server.stats()["requests"] == 9


def test_when_too_many_questions_fail_it_stops_early_and_says_why(server, asking):
    """Six of a hundred are more than 5%."""
    server.control(faults=["not-json"], mode="always", latency=0.02)
    asked = pairs(50)
    with refused(Stopped) as error:
        OpenAIJudge(asking(attempts=2, max_failed=0.05, concurrency=4), "pairwise").prefer(*asked)
    assert "6 of 100" in str(error.value)
    assert "a reply that cannot be read" in str(error.value)
    assert server.stats()["requests"] < 200
    P = OpenAIJudge(asking(attempts=2, max_failed=1), "pairwise").prefer(*asked)
    assert P.isnan().all()


def test_few_failures_are_no_reason_to_stop(server, asking):
    """Five of a hundred are not."""
    server.control(filters="Question 1")  # and 10 to 14
    questions, answers = golds(15)[0] + golds(94, 20)[0], golds(15)[1] + golds(94, 20)[1]
    failing = [text.removeprefix("A gold answer to ").startswith("Question 1") for text in answers]
    with refused(Stopped):
        asking(max_failed=(sum(failing) - 0.5) / len(failing)).ask(questions)
    results = asking(max_failed=(sum(failing) + 0.5) / len(failing)).ask(questions)
    assert results == [
        None if fails else text for fails, text in zip(failing, answers, strict=True)
    ]


def http_date(seconds):
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "5"}, 5),
        ({"retry-after": " 1.5 "}, 1.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e3"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, pytest.approx(2.5e11, rel=0.1)),
        ({"retry-after": "Fri, 31 Dec 99999999999 23:59:59 GMT"}, None),
        ({"retry-after": "9" * 400}, math.inf),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_date_to_come_back_at_is_understood():
    """To the second, as dates are."""
    assert retry_after({"retry-after": http_date(60)}) == pytest.approx(60, abs=5)


@pytest.mark.parametrize(
    ("header", "least"), [("retry-after-ms: 400", 0.4), ("retry-after: 1", 1.0)]
)
def test_it_waits_as_long_as_the_server_asks(header, least, server, asking):
    server.control(status=(429, "slow down", None, header + "\r\n"))
    start = time.monotonic()
    asking(attempts=2, max_failed=1, backoff=0).ask(golds(1)[0])
    assert time.monotonic() - start >= least
    assert server.stats()["requests"] == 2


def waits(endpoint, monkeypatch):
    """Seconds waited between the attempts for one answer that never comes; nobody waits."""
    seconds = []
    monkeypatch.setattr(endpoint, "_wait", seconds.append)
    assert endpoint.ask(golds(1)[0]) == [None]
    return [wait for wait in seconds if wait]


def test_without_being_told_it_waits_twice_as_long_each_time_to_at_most_a_minute_less_up_to_half(
    server, asking, monkeypatch
):
    server.control(faults=["500"], mode="always")
    several = [waits(asking(attempts=10, backoff=0.5, max_failed=1), monkeypatch) for _ in range(8)]
    for most, *waited in zip((0.5, 1, 2, 4, 8, 16, 32, 60, 60), *several, strict=True):
        assert all(most / 2 <= wait <= most for wait in waited)
        assert len(set(waited)) > 1, "several clients do not come back all at once"


def test_a_server_is_never_asked_again_sooner_than_it_said(server, asking, monkeypatch):
    server.control(status=(503, "restarting", None, f"retry-after: {http_date(100)}\r\n"))
    (wait,) = waits(asking(attempts=2, max_failed=1), monkeypatch)
    assert 95 < wait < 115


# --- Settings ---


@pytest.mark.parametrize(
    ("form", "refuses", "lines"),
    [
        ("scored", ["json_schema"], 1),
        ("scored", ["response_format"], 2),
        ("scored", ["temperature"], 1),
        ("scored", ["max_tokens"], 1),
        ("pairwise", ["logprobs"], 1),
        ("pairwise", ["max_tokens", "temperature"], 2),
        ("scored", ["temperature", "response_format"], 3),
    ],
)
def test_a_setting_that_the_endpoint_refuses_is_left_out_and_we_say_so_once(
    form, refuses, lines, server, asking, capsys
):
    """If it has another form, that is sent; if that is refused too, there is a second line."""
    server.control(refuses=refuses)
    asked = pairs(10)
    P = OpenAIJudge(asking(), form).prefer(*asked)
    expected = truth(form, *asked)
    if refuses == ["logprobs"]:
        # verdicts without probabilities; if the two are equal, the second wins in either order
        expected = (1 + (expected - 0.5).sign()) / 2
    assert off(P, expected) < ROUNDING
    last = server.stats()["last"]
    assert not set(refuses) & {*last, last.get("response_format", {}).get("type")}
    assert ("max_completion_tokens" in last) == ("max_tokens" in refuses)
    assert last.keys() >= {"max_tokens", "temperature"} - set(refuses)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all(
        "judge" in line and any(name in line for name in (*refuses, "response_format"))
        for line in said
    )


@BOTH
def test_an_endpoint_that_refuses_everything_one_could_leave_out_is_given_up(form, server, asking):
    """Each of its refusals names all settings; five have another form or can be left out."""
    words = "temperature max_tokens max_completion_tokens response_format json_schema logprobs"
    server.control(status=(400, words, None, ""))
    with refused():
        OpenAIJudge(asking(concurrency=1), form).prefer(*pairs(1))
    assert 1 < server.stats()["requests"] <= 6


def test_what_is_asked_for_is_sent_where_nothing_is_refused(server, asking, capsys):
    for form in ("pairwise", "scored"):
        judge = OpenAIJudge(asking(temperature=0.5), form)
        judge.prefer(*pairs(1))
        question = judge.questions(["Prompt 0.0"], ["a"], ["b"])[0]
        expected = {
            "model": "judge",
            "temperature": 0.5,
            "max_tokens": question.max_tokens,
            **question.wishes,
        }
        assert server.stats()["last"] == expected
        schema = expected["response_format"]["json_schema"]["schema"]
        assert (schema["type"], schema["required"]) == ("object", list(schema["properties"]))
    assert schema["required"] == [
        "id1_justification",
        "id1_score",
        "id2_justification",
        "id2_score",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_setting_may_be_refused_even_if_there_is_but_one_attempt(server, asking):
    """A refusal of a setting says nothing of the question, and costs nothing."""
    server.control(refuses=["temperature"])
    assert asking(attempts=1).ask(golds(3)[0]) == golds(3)[1]


# --- Who is asked ---


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@localhost/v1",
        "http://hunter2@localhost/v1",
        "http://localhost/v1?key=hunter2",
        "http://localhost/v1#hunter2",
        "ftp://localhost/hunter2",
        "localhost:8000/hunter2",
        "file:///hunter2",
        "http://[::1/hunter2",
        "http://localhost:abc/hunter2",
        "http://localhost:99999/hunter2",
        "http:///hunter2",
    ],
)
@pytest.mark.parametrize("given", ["url", "OPENAI_BASE_URL"])
def test_a_url_that_is_none_or_holds_a_key_is_refused_and_not_repeated(
    url, given, tmp_path, monkeypatch
):
    if given == "OPENAI_BASE_URL":
        monkeypatch.setenv(given, url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with refused() as error:
        Endpoint("judge", url if given == "url" else None, tmp_path / "cache.sqlite")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["sk-hunter2\n", "sk-hunter2\r\nX: y", "sk hunter2", "sk-hunter2\u200b", "“hunter2”"]
)
def test_a_key_that_cannot_be_one_is_refused_and_not_repeated(key, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with refused(Refused) as error:
        Endpoint("judge", "http://localhost/v1", tmp_path / "cache.sqlite")
    assert "OPENAI_API_KEY" in str(error.value)
    assert "hunter2" not in str(error.value)


def test_openai_is_not_asked_without_a_key_and_ones_own_server_is(server, asking, tmp_path):
    with refused() as error:
        Endpoint("gpt-4o", cache=tmp_path / "cache.sqlite")
    assert "OPENAI_API_KEY" in str(error.value)
    with refused():
        Endpoint("judge", "", tmp_path / "cache.sqlite")
    assert asking(client=None, url=server.url).ask(golds(1)[0]) == golds(1)[1]


def test_a_client_for_azure_may_be_handed_over(server, asking):
    """It puts the model into the path, and the key into a header of its own."""
    client = openai.AzureOpenAI(
        api_key=SECRET, azure_endpoint=server.root, api_version="2024-10-21"
    )
    assert asking(client=client).ask(golds(3)[0]) == golds(3)[1]
    assert (
        server.stats()["last_path"]
        == "/openai/deployments/judge/chat/completions?api-version=2024-10-21"
    )


def test_the_only_model_of_a_server_need_not_be_named(server):
    assert only_model(server.url) == "local-judge"


class Scripted:
    """A server that gives the same reply to every request."""

    def __init__(self, body):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        head = (
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        threading.Thread(target=self.serve, args=(head.encode() + body,), daemon=True).start()

    def serve(self, reply):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


@pytest.mark.parametrize(
    "body",
    [
        '{"data": []}',
        '{"data": [{"id": "a"}, {"id": "b"}]}',
        "{}",
        "[]",
        "<html>",
        '{"data": 1}',
        '{"data": [{}]}',
        '{"data": [null]}',
        "",
    ],
)
def test_a_server_with_no_model_or_several_or_that_does_not_say_is_refused(body):
    with Scripted(body.encode()) as other, refused():
        only_model(other.url)


def test_a_server_that_is_not_there_is_named_at_once():
    with refused() as error:
        only_model("http://127.0.0.1:1/v1")
    assert "http://127.0.0.1:1/v1" in str(error.value)


def test_a_server_that_does_not_say_which_models_it_has_is_asked_once(server, monkeypatch):
    monkeypatch.setattr(judge.models, "PATIENCE", 0.5, raising=False)
    server.control(models=None)
    with refused() as error:
        only_model(server.url)
    assert "name the model" in str(error.value)
    assert server.stats()["listings"] == 1


def test_a_server_that_fails_to_list_its_models_is_asked_once(server):
    server.control(models=[503, "", ""])
    with refused() as error:
        only_model(server.url)
    assert "HTTP 503; name the model" in str(error.value)
    assert server.stats()["listings"] == 1


def test_openai_is_not_asked_for_its_only_model(no_network):
    """It has many, and no key is needed to say so."""
    with refused() as error:
        only_model(None)
    assert "model's name is missing" in str(error.value)


UGLY = ["\x1b[2Jx", "two\nlines", "\ud800", "x\u202ey"]


@pytest.mark.parametrize("name", UGLY, ids=ascii)
def test_a_models_name_that_cannot_be_shown_is_refused_and_shown_without_it(name, server, tmp_path):
    server.control(models=[200, json.dumps({"data": [{"id": name}]}), ""])
    with refused():
        Endpoint(only_model(server.url), server.url, tmp_path / "cache.sqlite")
    server.control(models=[200, json.dumps({"data": [{"id": name}, {"id": "other"}]}), ""])
    with refused() as error:
        only_model(server.url)
    assert "2 models" in str(error.value)
    with refused():
        Endpoint(name, live=False, cache=tmp_path / "cache.sqlite")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("others", ["", ', {"id": "other"}'], ids=["alone", "beside another"])
@pytest.mark.parametrize("name", ["KEY", "models/KEY-1"])
def test_a_model_that_is_named_after_the_key_is_refused_without_it(
    name, others, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.control(models=[200, f'{{"data": [{{"id": "{name}"}}{others}]}}', ""])
    with refused() as error:
        only_model(server.url)
    assert SECRET not in str(error.value)
    assert "[key]" in str(error.value)
    with refused() as error:
        Endpoint(name.replace("KEY", SECRET), server.url, tmp_path / "cache.sqlite")
    assert SECRET not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_word_that_stands_for_a_key_where_none_is_needed_is_not_hidden(
    server, asking, monkeypatch
):
    """A server of one's own is often given the key "none", "EMPTY" or "x"."""
    monkeypatch.setenv("OPENAI_API_KEY", "Gold")
    server.control(models=[200, '{"data": [{"id": "Gold-7b"}]}', ""])
    questions = [teacher_question("Gold?", 16, 0)]
    assert asking(model=only_model(server.url), client=None, url=server.url).ask(questions) == [
        "A gold answer to Gold?"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"concurrency": 0},
        {"timeout": 0},
        {"timeout": math.inf},
        {"backoff": -1},
        {"max_failed": -0.1},
        {"max_failed": math.nan},
        {"max_usd": -1},
        {"max_usd": math.nan},
        {"temperature": -1},
        {"temperature": math.nan},
    ],
)
def test_numbers_that_make_no_sense_are_named(settings, asking):
    with pytest.raises(ValueError, match=next(iter(settings))):
        asking(**settings)


# --- Questions and their keys ---


def test_a_question_is_asked_once_however_often_it_is_put_and_answers_keep_their_places(
    server, asking
):
    questions, answers = golds(10)
    order = random.Random(0).choices(range(10), k=100)
    assert asking().ask([questions[i] for i in order]) == [answers[i] for i in order]
    assert server.stats()["requests"] == len(set(order))
    assert asking().ask([]) == []


def test_whatever_changes_the_answer_changes_the_key_and_nothing_else_does(asking):
    here, question = asking(), teacher_question("Why?", 16, 0)
    others = [
        teacher_question("Why? ", 16, 0),
        teacher_question("Why?", 17, 0),
        teacher_question("Why?", 16, 1),
        pairwise_question("Why?", "a", "b", 9),
        pairwise_question("Why?", "b", "a", 9),
    ]
    keys = [
        asking(model="other").key(question),
        asking(temperature=0.1).key(question),
        *map(here.key, others),
    ]
    assert len({here.key(question), *keys}) == 8
    same = Question(
        question.version, question.messages, 16, lambda choice: NO_ANSWER, {"logprobs": True}
    )
    assert (
        here.key(question)
        == here.key(same)
        == asking(client=None, url="http://elsewhere/v1").key(question)
    )


# --- Money ---


@pytest.mark.parametrize(
    "price", [(-1, 1), (1, -1), (math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)]
)
def test_a_price_below_nothing_or_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match="dollars per million tokens"):
        Price(*price)


def test_a_limit_on_dollars_needs_a_price(asking):
    with pytest.raises(ValueError, match=r"price=Price\(.*price of 'judge' is not known"):
        asking(price=None, max_usd=1.0)
    asking(price=None)


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({}, id="no faults"),
        pytest.param(
            {"faults": FAULTS, "mode": "random", "rate": 0.4, "idempotent": False}, id="faults"
        ),
        pytest.param({"usage": False}, id="charges not told"),
        pytest.param(
            {"faults": ["timeout"], "mode": "random", "rate": 0.2, "most": 1, "idempotent": False},
            id="timeouts",
        ),
    ],
)
def test_never_is_more_charged_than_the_limit_and_a_higher_limit_goes_on_from_there(
    behaviour, server, asking
):
    """At $10 and $30 a million tokens the 300 questions would cost about a dollar."""
    asked, limit = pairs(150), 0.5
    server.control(latency=0.002, **behaviour)
    endpoint = asking(max_usd=limit, timeout=1.0)
    judge = OpenAIJudge(endpoint, "pairwise")
    with refused(TooDear) as error:
        judge.prefer(*asked)
    assert "$0.5" in str(error.value)
    charged, paid = dollars(server.stats()["tokens"]), server.stats()["paid"]
    assert charged <= limit
    most = max(map(bound, judge.questions(*asked)))
    assert limit - most < endpoint.ledger.spent() <= limit + ROUNDING, "it stops only when it must"
    server.change(mode="none", usage=True)
    with refused(TooDear):
        OpenAIJudge(asking(max_usd=limit), "pairwise").prefer(*asked)
    assert server.stats()["paid"] == paid
    P = OpenAIJudge(asking(max_usd=20.0), "pairwise").prefer(*asked)
    assert off(P, truth("pairwise", *asked)) < ROUNDING
    if behaviour == {}:
        assert set(server.stats()["paid"].values()) == {1}


def test_a_limit_below_the_first_request_sends_nothing(server, asking):
    (question,) = golds(1)[0]
    with refused(TooDear):
        asking(max_usd=0.99 * bound(question)).ask([question])
    assert server.stats()["requests"] == 0
    with refused(TooDear):
        asking(max_usd=0).ask([question])
    assert asking(max_usd=1.01 * bound(question)).ask([question]) == golds(1)[1]


def test_a_request_waits_for_those_under_way_before_it_is_found_too_dear(server, asking):
    """Five bounds' worth, at a charge of a tenth of the bound: one at a time, all 10 questions are
    answered."""
    questions, answers = golds(10)
    server.control(latency=0.02)
    endpoint = asking(max_usd=5 * bound(questions[0]), concurrency=10)
    assert endpoint.ask(questions) == answers
    assert server.stats()["peak"] <= 5


def test_the_spending_of_another_run_does_not_count(server, asking):
    questions, answers = golds(20)
    assert asking(run="first").ask(questions[:10]) == answers[:10]
    first = asking(run="first").ledger.spent()
    assert first == pytest.approx(dollars(server.stats()["tokens"]), abs=ROUNDING)
    second = asking(run="second", max_usd=first)
    assert second.ledger.spent() == 0
    assert second.ask(questions[:14]) == answers[:14], "what the first run paid for is free"
    assert second.report()["requests"] == 4
    assert asking(run="first").ledger.spent() == first
    with refused(TooDear):
        asking(run="first", max_usd=first).ask(questions)


# --- Plans ---


def test_a_plan_counts_what_is_not_in_the_ledger_and_sends_nothing(server, asking):
    questions, answers = golds(12)
    endpoint = asking()
    assert endpoint.ask(questions[:5]) == answers[:5]
    plan = endpoint.plan([*questions, *questions])
    assert server.stats()["requests"] == 5
    texts = [message["content"] for question in questions[5:] for message in question.messages]
    tokens = sum(len(text.encode()) / 4 + 4 for text in texts)
    assert (plan.requests, plan.completion_tokens) == (7, 7 * 16)
    assert plan.prompt_tokens == pytest.approx(tokens)
    assert plan.dollars == pytest.approx((10 * tokens + 30 * 7 * 16) / 1e6)
    assert asking(price=None).plan(questions).dollars is None
    endpoint.ask(questions)
    assert endpoint.plan(questions).requests == 0
    assert endpoint.plan(questions).dollars == 0


@BOTH
def test_a_plan_is_not_below_what_a_clean_run_costs_and_neither_is_any_bound(form, server, asking):
    """The server counts a token for four characters, a plan one for four bytes and four more a
    message."""
    asked = pairs(20)
    endpoint = asking()
    judge = OpenAIJudge(endpoint, form)
    questions = judge.questions(*asked)
    plan = endpoint.plan(questions)
    judge.prefer(*asked)
    assert plan.requests == server.stats()["requests"] == len(questions)
    charged = dollars(server.stats()["tokens"])
    assert charged <= plan.dollars <= sum(map(bound, questions))
    for known, most in rows(endpoint.ledger.path, "dollars, bound"):
        assert known <= most


def test_plans_add_up():
    known, unknown = Plan(3, 10.0, 20.0, 0.5), Plan(1, 1.0, 1.0, None)
    assert known + known == known * 2 == Plan(6, 20.0, 40.0, 1.0)
    assert known + unknown == Plan(4, 11.0, 21.0, None)
    assert (unknown * 2).dollars is None
    assert "$0.50" in str(known)
    assert "not known" in str(unknown)


def test_a_plan_leaves_out_what_failed_to_the_last_attempt(server, asking):
    server.control(faults=["not-json"], mode="always")
    questions = [pairwise_question(f"Prompt {i}", "a", "b", 100) for i in range(3)]
    asking(attempts=2, max_failed=1).ask(questions[:1])
    assert asking(attempts=2, max_failed=0.4).plan(questions).requests == 2
    assert asking(attempts=3, max_failed=0.4).plan(questions).requests == 3
    assert asking(attempts=2, max_failed=0.3).plan(questions).requests == 3, "`ask` would try again"


@pytest.fixture
def no_network(monkeypatch):
    """The test fails at any attempt to connect or to look up a name."""

    class NoNetwork(BaseException):
        pass

    def refuse(*_, **__):
        raise NoNetwork

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_token_is_taken_for_four_bytes():
    assert count_tokens("four by four bytes!!") == 5
    assert count_tokens("éé") == 1


# --- The ledger as a cache ---


@pytest.mark.parametrize("n", [5, 1203])
def test_a_reply_is_asked_for_once_for_all_processes_to_come(n, server, asking):
    """1203: the ledger looks for 500 at a time."""
    questions, answers = golds(n)
    for _ in range(3):
        endpoint = asking()
        assert endpoint.ask(questions) == answers
        assert endpoint.plan(questions).requests == 0
    assert server.stats()["requests"] == n
    report = endpoint.report()
    assert {name: report[name] for name in ("asked", "cached", "failed", "requests")} == {
        "asked": n,
        "cached": n,
        "failed": 0,
        "requests": n,
    }


def test_replies_are_read_anew_without_a_request_where_their_parsed_form_is_gone(server, asking):
    asked = pairs(10)
    P = OpenAIJudge(asking(), "scored").prefer(*asked)
    change(asking().ledger.path, "UPDATE requests SET parsed = NULL")
    assert torch.equal(OpenAIJudge(asking(), "scored").prefer(*asked), P)
    assert server.stats()["requests"] == 10


def test_a_better_parser_reads_what_the_old_one_could_not_without_a_request(server, asking):
    good, answers = golds(4)
    poor = [Question(q.version, q.messages, q.max_tokens, lambda choice: NO_ANSWER) for q in good]
    assert asking(attempts=2, max_failed=1).ask(poor) == [None] * 4
    assert asking().ask(good) == answers
    assert server.stats()["requests"] == 8


@pytest.mark.parametrize("reply", ["'{}'", "NULL", "x'ff00'"])
def test_a_reply_that_can_no_longer_be_read_is_asked_for_again(reply, server, asking):
    questions, answers = golds(2)
    asking().ask(questions)
    change(asking().ledger.path, f"UPDATE requests SET parsed = NULL, reply = {reply} WHERE id = 1")
    assert asking().ask(questions) == answers
    assert server.stats()["requests"] == 3


JUNK = {
    "text": b"Dear diary,\n" * 100,
    "binary": bytes(range(256)) * 40,
    "another table": "CREATE TABLE requests (made, otherwise)",
    "another database": "CREATE TABLE notes (text); "
    "CREATE TABLE spending (run TEXT PRIMARY KEY, dollars REAL)",
}


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_a_file_that_is_no_ledger_is_refused_in_a_line_and_left_alone(junk, live, asking, tmp_path):
    file = tmp_path / "cache.sqlite"
    if isinstance(junk, bytes):
        file.write_bytes(junk)
    else:
        with closing(sqlite3.connect(file)) as db, db:
            db.executescript(junk)
    before = file.read_bytes()
    with refused() as error:
        asking(live=live)
    assert str(file) in str(error.value)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


N = 700  # requests in a ledger of some 200 pages


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A ledger's file, in which every question has an answer, and its pages."""
    file = tmp_path_factory.mktemp("sound") / "cache.sqlite"
    endpoint = Endpoint("judge", "http://127.0.0.1:1/v1", file, price=PRICE)
    for question, answer in zip(*golds(N), strict=True):
        told = json.dumps({"version": question.version, "padding": "x" * 700})
        row = {"key": endpoint.key(question), "model": "judge", "url": "", "question": told}
        row |= {"bound": 1.0, "sent": 0.0}
        number = endpoint.ledger.reserve(row, 0, math.inf, 1.0)
        endpoint.ledger.complete(
            number, 1.0, outcome="complete", parsed=json.dumps(answer), dollars=0.01
        )
    endpoint.ledger.db.close()
    content = file.read_bytes()
    size = int.from_bytes(content[16:18], "big")  # as the format has it
    return [content[at : at + size] for at in range(0, len(content), size)]


DAMAGE = {
    "zeros": lambda page: bytes(len(page)),
    "ones": lambda page: b"\xff" * len(page),
    "noise": lambda page: random.Random(0).randbytes(len(page)),
    "half a page": lambda page: page[: len(page) // 2].ljust(len(page), b"\0"),
    "text": lambda page: (b"Dear diary,\n" * len(page))[: len(page)],
}
USES = {
    "replies": lambda ledger, keys: ledger.replies(keys),
    "spent": lambda ledger, keys: ledger.spent(),
    "totals": lambda ledger, keys: ledger.totals(),
    "models": lambda ledger, keys: ledger.models(True),
    "reserve": lambda ledger, keys: ledger.reserve(
        {"key": keys[0], "sent": 0.0, "bound": 1.0}, 0, 1.0, 1.0
    ),
    "complete": lambda ledger, keys: ledger.complete(N // 2, 1.0, dollars=1.0),
}


def damaged(file, pages, numbers, kind):
    """Write the ledger with these of its pages damaged; its content."""
    content = b"".join(DAMAGE[kind](page) if i in numbers else page for i, page in enumerate(pages))
    with file.open("r+b" if file.exists() else "wb") as open_file:
        open_file.write(content)
    return content


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_ledger_with_a_damaged_page_is_refused_when_it_is_opened_and_left_alone(
    kind, live, sound, asking, tmp_path
):
    """Each tenth page and the first ones, which hold the schema, the roots of tables and index, and
    the spending."""
    file = tmp_path / "cache.sqlite"
    for number in {*range(6), *range(0, len(sound), 10), len(sound) - 1}:
        before = damaged(file, sound, {number}, kind)
        with refused() as error:
            asking(live=live)
        assert str(file) in str(error.value)
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if kind != "half a page"])
@pytest.mark.parametrize("use", USES)
def test_a_ledger_that_is_damaged_while_it_is_used_is_refused_and_left_alone(
    use, kind, sound, asking, tmp_path
):
    """Of its pages only the first one is as it was. Of half a page what is asked for may be the
    sound half."""
    file = tmp_path / "cache.sqlite"
    damaged(file, sound, set(), kind)
    endpoint = asking()
    before = damaged(file, sound, range(1, len(sound)), kind)
    with refused() as error:
        USES[use](endpoint.ledger, [endpoint.key(question) for question in golds(N)[0]])
    assert str(file) in str(error.value)
    endpoint.ledger.db.close()
    assert file.read_bytes() == before


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("use", ["ask", "plan"])
@pytest.mark.parametrize("parsed", ["'{'", "''", "x'22ff22'", "CAST(x'22ff22' AS TEXT)"])
def test_a_ledger_of_which_a_text_is_damaged_is_refused(
    parsed, use, live, sound, server, asking, tmp_path
):
    file = tmp_path / "cache.sqlite"
    damaged(file, sound, set(), "zeros")
    change(file, f"UPDATE requests SET parsed = {parsed} WHERE id = {N - 1}")
    with refused() as error:
        getattr(asking(live=live), use)(golds(N)[0])
    assert str(file) in str(error.value)
    assert server.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("pragma", "reason", "remedy"),
    [
        ("query_only = 1", "attempt to write a readonly database", "make it writable"),
        ("busy_timeout = 20", "database is locked", "another program holds it"),
        ("max_page_count = 1", "database or disk is full", "make room for it"),
    ],
)
def test_a_ledger_that_cannot_be_written_is_refused_with_the_reason_and_a_remedy(
    pragma, reason, remedy, asking, tmp_path
):
    """Nothing has been sent by then. Another program holds it all the time."""
    questions, endpoint = golds(300)[0], asking()
    endpoint.ledger.db.execute(f"PRAGMA {pragma}")
    with closing(sqlite3.connect(endpoint.ledger.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE" if "busy" in pragma else "SELECT 1")
        with refused() as error:
            endpoint.ask(questions)
    assert (
        f"{endpoint.ledger.path} cannot be used as a cache of judgments ({reason}); {remedy}"
        in str(error.value)
    )


@pytest.mark.parametrize(
    "place", ["", "file/cache.sqlite", "x" * 300], ids=["a folder", "below a file", "a long name"]
)
@pytest.mark.parametrize("live", [True, False])
def test_a_place_where_no_file_can_be_is_refused_in_a_line(place, live, asking, tmp_path):
    (tmp_path / "file").touch()
    with refused():
        asking(live=live, cache=tmp_path / place)


def test_a_new_ledger_that_another_process_is_just_making_is_waited_for(asking, tmp_path):
    file = tmp_path / "cache.sqlite"
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(0.3, other.execute, ["COMMIT"])
        timer.start()
        try:
            asking()
        finally:
            timer.join()


def test_a_full_disk_stops_it_in_a_line_and_what_was_paid_for_is_paid_once(server, asking):
    """A limit on the file's size stands in for the disk."""
    questions, answers = golds(60)
    endpoint = asking(concurrency=16)
    (pages,) = endpoint.ledger.db.execute("PRAGMA page_count").fetchone()
    endpoint.ledger.db.execute(f"PRAGMA max_page_count = {pages + 4}")
    with refused() as error:
        endpoint.ask(questions)
    assert str(endpoint.ledger.path) in str(error.value)
    assert "disk is full); make room for it, and go on" in str(error.value)
    assert 0 < server.stats()["requests"] < 60
    assert asking().ask(questions) == answers
    assert list(server.stats()["paid"].values()) == [1] * 60


def test_a_ledger_may_have_any_name(server, asking, tmp_path):
    for name in ("a b", "100%", "what?mode=ro", "é#1", "sub/folder/x"):
        assert asking(cache=tmp_path / name).ask(golds(1)[0]) == golds(1)[1]
        assert rows(tmp_path / name, "outcome") == [("complete",)]


@BOTH
def test_a_replay_gives_the_same_answers_without_a_key_or_a_connection_and_writes_nothing(
    form, asking, tmp_path, monkeypatch
):
    asked = pairs(10)
    P = OpenAIJudge(asking(), form).prefer(*asked)
    monkeypatch.setattr(socket.socket, "connect", None)
    before = contents(tmp_path)
    replay = Endpoint("judge", cache=tmp_path / "cache.sqlite", live=False)
    judge = OpenAIJudge(replay, form)
    assert torch.equal(judge.prefer(*asked), P)
    assert replay.plan(judge.questions(*asked)).requests == 0
    with refused() as error:
        judge.prefer([*asked[0], "Prompt unheard of"], [*asked[1], "y"], [*asked[2], "z"])
    assert "Prompt unheard of" in str(error.value)
    with refused():
        OpenAIJudge(Endpoint("other", cache=tmp_path / "cache.sqlite", live=False), form).prefer(
            *asked
        )
    assert contents(tmp_path) == before


def test_a_recording_can_be_read_where_nothing_can_be_written(asking, tmp_path):
    """No file appears beside it."""
    questions, answers = golds(3)
    endpoint, recording = asking(), tmp_path / "recording.sqlite"
    assert endpoint.ask(questions) == answers
    endpoint.ledger.db.close()
    shutil.copy(tmp_path / "cache.sqlite", recording)
    before = {path.name for path in tmp_path.iterdir()}
    replay = Endpoint("judge", cache=recording, live=False)
    assert replay.ask(questions) == answers
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_replay_repeats_failures_too(server, asking):
    """One question of four was answered, one filtered, one could not be read in two attempts, one
    in none of one so far."""
    questions, answers = golds(4)
    unreadable = [
        Question(q.version, q.messages, q.max_tokens, lambda choice: NO_ANSWER) for q in questions
    ]
    asking(attempts=2, max_failed=1).ask(unreadable[1:3])
    asking().ask(questions[:1])
    replay = asking(live=False, max_failed=1)
    assert replay.ask([questions[0], *unreadable[1:3]]) == [answers[0], None, None]
    with refused():
        replay.ask(questions[3:])
    assert server.stats()["requests"] == 5


def contents(folder):
    """All files, except for what SQLite shares between processes."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.endswith("-shm")
    }


# --- Several processes, and their deaths ---


def alone(work, *arguments):
    """Do the work without the lock that progress bars share with forked processes: a process that
    is killed never releases it."""
    tqdm.set_lock(threading.RLock())
    work(*arguments)


def child(work, *arguments):
    """Another process, which has begun its work."""
    process = FORK.Process(target=alone, args=(work, *arguments), daemon=True)
    process.start()
    return process


def ended(*processes):
    """The exit codes of processes, once all have ended."""
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def open_and_close(begun, cache):
    begun.wait(PATIENCE)
    for _ in range(20):
        ledger = Ledger(cache)
        ledger.spent()
        ledger.db.close()


@pytest.mark.parametrize("n", [0, 1], ids=["new", "with a row"])
def test_processes_may_open_a_ledger_and_leave_it_all_at_once(n, asking, tmp_path):
    """The last to leave takes the log with it, under the eyes of the next one."""
    assert asking().ask(golds(n)[0]) == golds(n)[1]
    begun, cache = FORK.Barrier(4), tmp_path / ("cache.sqlite" if n else "new.sqlite")
    assert ended(*[child(open_and_close, begun, cache) for _ in range(4)]) == [0] * 4
    assert rows(cache, "outcome") == [("complete",)] * n


def prefer_and_keep(begun, url, cache, form, asked, result, settings):
    endpoint = Endpoint("judge", url, cache, price=PRICE, backoff=0.02, **settings)
    begun.wait(PATIENCE)
    try:
        torch.save(OpenAIJudge(endpoint, form).prefer(*asked), result)
    except TooDear:
        result.write_text("too dear")


@BOTH
def test_two_processes_that_ask_the_same_at_once_pay_once_and_agree(form, server, asking, tmp_path):
    """No help from the server: it does not honour the idempotency key."""
    server.control(latency=0.02, idempotent=False)
    asked, begun = pairs(60), FORK.Barrier(2)
    results = [tmp_path / name for name in "ab"]
    settings = {"timeout": 30.0, "concurrency": 8}
    cache = asking().ledger.path
    children = [
        child(prefer_and_keep, begun, server.url, cache, form, asked, result, settings)
        for result in results
    ]
    assert ended(*children) == [0, 0]
    expected = truth(form, *asked)
    assert [off(torch.load(result), expected) < ROUNDING for result in results] == [True, True]
    assert list(server.stats()["paid"].values()) == [1] * {"scored": 60, "pairwise": 120}[form]
    assert len(rows(tmp_path / "cache.sqlite")) == server.stats()["requests"]


def test_two_processes_that_ask_the_same_in_vain_pay_for_no_more_attempts_than_one(
    server, asking, tmp_path
):
    server.control(latency=0.01, idempotent=False, faults=["not-json"], mode="always")
    asked, begun, cache = pairs(10), FORK.Barrier(2), asking().ledger.path
    settings = {"timeout": 30.0, "attempts": 3, "max_failed": 1}
    results = [tmp_path / name for name in "ab"]
    children = [
        child(prefer_and_keep, begun, server.url, cache, "pairwise", asked, result, settings)
        for result in results
    ]
    assert ended(*children) == [0, 0]
    assert [torch.load(result).isnan().all().item() for result in results] == [True, True]
    assert list(server.stats()["paid"].values()) == [3] * 20


def test_two_processes_of_one_run_keep_to_one_limit(server, asking, tmp_path):
    server.control(latency=0.02, idempotent=False)
    limit, begun, results = 0.3, FORK.Barrier(2), [tmp_path / name for name in "ab"]
    settings = {"timeout": 30.0, "concurrency": 4, "max_usd": limit, "run": "both"}
    cache = asking().ledger.path
    children = [
        child(
            prefer_and_keep,
            begun,
            server.url,
            cache,
            "pairwise",
            pairs(100, seed),
            result,
            settings,
        )
        for seed, result in enumerate(results)
    ]
    assert ended(*children) == [0, 0]
    assert [result.read_text() for result in results] == ["too dear"] * 2
    assert limit / 4 < dollars(server.stats()["tokens"]) <= limit
    assert asking(run="both").ledger.spent() <= limit + ROUNDING
    assert len({pid for (pid,) in rows(tmp_path / "cache.sqlite", "pid")}) == 2


def prefer_and_tell(asking_now, url, cache, form, asked, timeout=30.0):
    # a shell that runs the tests in the background makes them ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    judge = OpenAIJudge(
        Endpoint("judge", url, cache, price=PRICE, concurrency=4, timeout=timeout), form
    )
    asking_now.set()
    judge.prefer(*asked)


def until_requests(server, n):
    deadline = time.monotonic() + PATIENCE
    while server.stats()["requests"] < n:
        assert time.monotonic() < deadline
        time.sleep(0.002)


KILLS = 20


@pytest.mark.parametrize(("form", "idempotent"), [("pairwise", True), ("scored", False)])
def test_a_run_killed_twenty_times_pays_for_no_judgment_twice_and_loses_none(
    form, idempotent, server, asking, tmp_path
):
    """With a server that does not honour the idempotency key, only what was in flight when the
    process died can be paid twice, and is counted as spent. A sixth of the kills come before the
    first request, the others up to 30 ms after it."""
    n, draw = 300, random.Random(0)
    asked = pairs({"pairwise": n // 2, "scored": n}[form])
    undisturbed = OpenAIJudge(asking(cache=tmp_path / "undisturbed.sqlite"), form).prefer(*asked)
    server.control(latency=0.02, idempotent=idempotent)
    cache = asking().ledger.path
    for kill in range(KILLS):
        asking_now, before = FORK.Event(), server.stats()["requests"]
        process = child(prefer_and_tell, asking_now, server.url, cache, form, asked)
        assert asking_now.wait(PATIENCE)
        if kill % 6:
            until_requests(server, before + 1)
        time.sleep(draw.uniform(0, 0.03))
        process.kill()
        assert ended(process) == [-signal.SIGKILL], "the run ended before it could be killed"
    interrupted = server.stats()["requests"]
    assert KILLS / 2 < interrupted < n
    server.change(latency=0)
    endpoint = asking()
    assert torch.equal(OpenAIJudge(endpoint, form).prefer(*asked), undisturbed)

    stats, kept = server.stats(), rows(cache)
    complete = [key for key, outcome in kept if outcome == "complete"]
    in_flight = [key for key, outcome in kept if outcome is None]
    assert len(complete) + len(in_flight) == len(kept)
    assert len(complete) == len(set(complete)) == len(stats["paid"]) == n
    assert len(in_flight) > 0
    twice = sum(times - 1 for times in stats["paid"].values())
    assert twice == 0 if idempotent else 0 < twice <= len(in_flight)
    assert n <= stats["requests"] <= len(kept)
    (bounds,) = rows(cache, "SUM(bound)", "outcome IS NULL")[0]
    (known,) = rows(cache, "SUM(dollars)", "outcome = 'complete'")[0]
    assert endpoint.ledger.spent() == pytest.approx(known + bounds, abs=ROUNDING)
    assert known - ROUNDING <= dollars(stats["tokens"]) <= known + bounds


@pytest.mark.parametrize("buried", [True, False], ids=["and was buried", "and is a zombie"])
def test_a_process_that_died_in_flight_keeps_nobody_waiting(buried, server, asking, tmp_path):
    """Without that it would wait two timeouts, two minutes."""
    server.control(latency=5.0)
    asked, asking_now = pairs(2), FORK.Event()
    process = child(
        prefer_and_tell, asking_now, server.url, tmp_path / "cache.sqlite", "pairwise", asked, 60.0
    )
    until_requests(server, 4)
    os.kill(process.pid, signal.SIGKILL)
    if buried:
        ended(process)
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    server.change(latency=0, idempotent=False)
    done, judge = [], OpenAIJudge(asking(timeout=60.0), "pairwise")
    thread = threading.Thread(target=lambda: done.append(judge.prefer(*asked)), daemon=True)
    thread.start()
    thread.join(5)
    in_time = not thread.is_alive()
    ended(process)
    thread.join(PATIENCE)
    assert in_time
    assert off(done[0], truth("pairwise", *asked)) < ROUNDING


def test_control_c_keeps_all_that_was_received(server, asking, tmp_path):
    """What was in flight is waited for, nothing more is sent, and the rest is asked later."""
    server.control(latency=0.2, idempotent=False)
    asked, asking_now = pairs(100), FORK.Event()
    process = child(
        prefer_and_tell, asking_now, server.url, tmp_path / "cache.sqlite", "pairwise", asked
    )
    until_requests(server, 30)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == [1]
    answered, kept = server.stats()["answered"], rows(tmp_path / "cache.sqlite")
    assert 30 <= len(answered) < 200
    assert len(kept) == len(answered) == server.stats()["requests"]
    assert {outcome for _, outcome in kept} == {"complete"}
    server.change(latency=0)
    assert (
        off(OpenAIJudge(asking(), "pairwise").prefer(*asked), truth("pairwise", *asked)) < ROUNDING
    )
    assert list(server.stats()["paid"].values()) == [1] * 200


def interrupted(work, moment):
    """Do the work, with Control-C after so many of its lines. Gives the error, or None if the work
    ended before."""
    left = [moment]

    def trace(frame, event, argument):
        left[0] -= 1
        if left[0] < 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt as error:
        return error  # and all that its traceback keeps alive
    finally:
        sys.settrace(None)
    return None


def test_control_c_at_any_moment_leaves_the_ledger_to_the_other_threads(asking):
    """The main thread asks what is spent while others write; a lock that it left closed would make
    them wait forever."""
    ledger, free = asking().ledger, []
    for moment in range(1000):
        error = interrupted(ledger.spent, moment)
        if error is None:
            break
        thread = threading.Thread(target=lambda: free.append(ledger.lock.acquire(blocking=False)))
        thread.start()
        thread.join()
        assert free[-1], error.__traceback__
        ledger.lock = threading.RLock()  # the thread that tried it has ended, and keeps it
    assert len(free) > 5


# --- What is shown ---


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_on_a_terminal_and_nowhere_else(server, asking, capsys, monkeypatch):
    asking().ask(golds(3)[0])
    assert capsys.readouterr() == ("", "")
    server.control(latency=0.15)
    monkeypatch.setattr(sys, "stderr", Terminal())
    asking(cache=None, concurrency=1).ask(golds(3)[0])
    assert "asking judge" in sys.stderr.getvalue()
    assert "/3" in sys.stderr.getvalue()


SECRET = 'sk-distinctive/47"11-Zx'
# kind -> what the server does, one after the other; it sends the key back wherever it can
SCENES = {
    "errors": [
        *(
            {"status": (status, f"Error {status}: incorrect key", None, "")}
            for status in (401, 404, 500, 403, 400)
        ),
        *({"faults": [fault], "mode": "always"} for fault in ("429", "503")),
    ],
    "pairwise": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in (*LOST[1:], "truncated-json", "refusal")
        ),
    ],
    "scored": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in ("missing-ids", "not-utf-8", "two-answers", "python")
        ),
    ],
    "teacher": [
        {},
        *(
            {"faults": [fault], "mode": "always"}
            for fault in ("refusal", "truncated-json", "not-utf-8")
        ),
    ],
}
for scenes in SCENES.values():
    scenes += [{**scenes[0], "spelling": spelling} for spelling in ("solidus", "unicode")]
CHATTY = """
import json, logging, os, sys, traceback
from pathlib import Path
from judge.endpoint import Endpoint
from judge.ledger import Stopped
from judge.models import only_model
from judge.prices import Price
from endpoint_server import Served
from oracle import OpenAIJudge, OpenAITeacher

logging.basicConfig(level=logging.DEBUG)
server, endpoints = Served(int(sys.argv[1])), []
for kind, scenes in json.loads(sys.argv[2]).items():
    for stream in (sys.stdout, sys.stderr):
        print(f"<<{kind}>>", file=stream, flush=True)
    for i, scene in enumerate(scenes):
        server.control(echo=True, **scene)
        cache = Path(kind, f"{i}.sqlite")
        settings = {"attempts": 2, "backoff": 0.01, "max_failed": i % 2, "price": Price(1, 1)}
        endpoints.append(Endpoint("judge", server.url, cache, **settings))
        try:
            if kind == "teacher":
                print(OpenAITeacher(endpoints[-1]).answers(["Why?"]))
            else:
                judge = OpenAIJudge(endpoints[-1], "scored" if kind == "scored" else "pairwise")
                print(judge.prefer(["Why?"], ["Text worth 3"], ["Text worth 4"]))
        except Exception:
            traceback.print_exc()
        print(endpoints[-1], endpoints[-1].report(), endpoints[-1].reasons)
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def chatter(running, tmp_path_factory):
    """The folder, and by kind what was printed to stdout and stderr, of a process whose key every
    reply repeats; it ends without closing its files."""
    folder = tmp_path_factory.mktemp("secret")
    path = os.pathsep.join((str(HERE.parent), str(HERE)))
    secret = {
        "OPENAI_API_KEY": SECRET,
        "PYTHONPATH": path,
        "OPENAI_LOG": "debug",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", CHATTY, running.root.rpartition(":")[2], json.dumps(SCENES)]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **secret}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    printed = {}
    for stream in (done.stdout, done.stderr):
        parts = re.split(r"<<(\w+)>>\n", stream.decode())
        for kind, text in zip(parts[1::2], parts[2::2], strict=True):
            printed[kind] = printed.get(kind, "") + text
    return folder, printed


def unescaped(text):
    """A text without the escapes of JSON within JSON, however deep."""
    return re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text).replace(
        "\\", ""
    )


@pytest.mark.parametrize("kind", SCENES)
def test_the_key_is_in_no_file_log_or_traceback_though_the_server_repeats_it(kind, chatter):
    folder, printed = chatter
    assert SECRET not in unescaped(printed[kind])
    files = list((folder / kind).iterdir())
    assert len([file for file in files if file.suffix == ".sqlite"]) == len(SCENES[kind])
    assert any(file.name.endswith("-wal") for file in files)
    assert (
        sorted(
            file.name for file in files if SECRET in unescaped(file.read_bytes().decode("latin-1"))
        )
        == []
    )
    assert any(b"[key]" in file.read_bytes() for file in files), "the server did repeat it"


def test_errors_that_repeat_the_key_are_reported_without_it(chatter):
    _, printed = chatter
    assert "Error 401: incorrect key Bearer [key]" in printed["errors"]
    assert "Traceback" in printed["errors"]

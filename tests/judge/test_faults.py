"""A server's faults: what is asked again, what is waited for, what stops the work."""

import email.utils
import math
import time

import pytest
import torch

from helpers.endpoints import ROUNDING, dollars, golds, pairs, refused, rows
from helpers.judges import BOTH, off, truth
from helpers.server import BROKEN, DRIPS, FAULTS, HARMLESS, LOST
from judge.client import retry_after
from judge.ledger import Stopped
from judge.models import only_model
from judge.questions import pairwise_question
from oracle import OpenAIJudge


def assert_counted_right(endpoint, server):
    """What the ledger says was sent and paid is what the server saw and charged."""
    report, stats = endpoint.report(), server.stats()
    assert report["requests"] == stats["requests"]
    assert [report["prompt_tokens"], report["completion_tokens"]] == stats["told"]
    assert report["dollars"] == pytest.approx(dollars(stats["told"]), abs=ROUNDING)
    charge, unknown = dollars(stats["tokens"]), report["dollars_unknown_at_most"]
    assert report["dollars"] - ROUNDING <= charge <= report["dollars"] + unknown + ROUNDING
    assert endpoint.ledger.spent() == pytest.approx(report["dollars"] + unknown, abs=ROUNDING)


@pytest.mark.slow
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
    assert off(clean, truth(form, *asked[1:])) < ROUNDING
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


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("fault", [*BROKEN, *LOST])
def test_a_fault_that_never_ends_gives_no_label_after_the_last_attempt(form, fault, server, asking):
    """A fault that never ends gives no label after as many requests as there are attempts."""
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
    assert (
        off(OpenAIJudge(asking(attempts=1), form).prefer(*asked), truth(form, *asked[1:]))
        < ROUNDING
    )


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


def test_without_being_told_it_waits_twice_as_long_each_time(server, asking, monkeypatch):
    """Without being told it waits twice as long each time to at most a minute less up to half."""
    server.control(faults=["500"], mode="always")
    several = [waits(asking(attempts=10, backoff=0.5, max_failed=1), monkeypatch) for _ in range(8)]
    for most, *waited in zip((0.5, 1, 2, 4, 8, 16, 32, 60, 60), *several, strict=True):
        assert all(most / 2 <= wait <= most for wait in waited)
        assert len(set(waited)) > 1, "several clients do not come back all at once"


def test_a_server_is_never_asked_again_sooner_than_it_said(server, asking, monkeypatch):
    server.control(status=(503, "restarting", None, f"retry-after: {http_date(100)}\r\n"))
    (wait,) = waits(asking(attempts=2, max_failed=1), monkeypatch)
    assert 95 < wait < 115

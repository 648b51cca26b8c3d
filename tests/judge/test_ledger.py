"""The ledger: each reply is paid for once, damage is named, a replay needs nobody."""

import json
import math
import random
import shutil
import socket
import sqlite3
import threading
from contextlib import closing

import pytest
import torch

from helpers.endpoints import PRICE, golds, pairs, refused, rows
from helpers.judges import BOTH
from judge.endpoint import Endpoint
from judge.questions import Question
from judge.replies import NO_ANSWER
from oracle import OpenAIJudge


def change(cache, sql):
    with closing(sqlite3.connect(cache)) as db, db:
        db.execute(sql)


@pytest.mark.slow
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
def test_a_replay_gives_the_same_answers_without_key_or_connection(
    form, asking, tmp_path, monkeypatch
):
    """A replay gives the same answers without a key or a connection and writes nothing."""
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

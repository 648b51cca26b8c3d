"""One ledger for several processes, and for processes that die."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time

import pytest
import torch
from tqdm import tqdm

from helpers.endpoints import PRICE, ROUNDING, dollars, golds, pairs, rows
from helpers.judges import BOTH, off, truth
from judge.endpoint import Endpoint
from judge.ledger import Ledger, TooDear
from oracle import OpenAIJudge

FORK = multiprocessing.get_context("fork")  # children that have imported everything already
PATIENCE = 60  # seconds after which something hangs


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
    expected = truth(form, *asked[1:])
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


@pytest.mark.slow
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
    assert off(done[0], truth("pairwise", *asked[1:])) < ROUNDING


@pytest.mark.slow
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
        off(OpenAIJudge(asking(), "pairwise").prefer(*asked), truth("pairwise", *asked[1:]))
        < ROUNDING
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

"""A judged run killed and resumed pays nothing twice; a replay needs no server."""

import shutil
import signal
import sqlite3
from collections import Counter
from contextlib import closing

import pytest

import train
from helpers.judged_runs import KEY, RUNS, TINY, asked, assert_same_result, judged
from helpers.runs import refused

# --- Killed and resumed ---

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("judges_key")]


DEATHS = {  # the call of the ledger at which it dies, which one, before or after
    "before a reply that was paid for is written": ("complete", 7, True),
    "when a request is written and not sent": ("reserve", 20, False),
    "in the midst of judging an iteration": ("complete", 30, True),
}


KEYED = {"OPENAI_API_KEY": KEY}


def test_killed_while_it_asks_and_resumed_it_pays_nothing_twice(
    judged_run, server, nursery, tmp_path
):
    """Killed while it asks and resumed it is the uninterrupted run and pays nothing twice."""
    whole, stats = judged_run("scored")
    (tmp_path / "cut" / "policies").mkdir(parents=True)
    for name in ("config.json", "policies/base.pt"):  # fine-tuned already
        shutil.copy(whole / name, tmp_path / "cut" / name)
    server.control()
    arguments = judged(
        server, "--judgments", "probabilities", "--out", tmp_path / "cut", "--resume"
    )
    for death in DEATHS.values():
        child = nursery.start("helpers.processes:train_until_asked", arguments, *death, **KEYED)
        assert child.wait() == -signal.SIGKILL, child.said()
    child = nursery.start("helpers.processes:train_with", arguments, **KEYED)
    assert child.wait() == 0, child.said()
    assert_same_result(whole, tmp_path / "cut")
    after = server.stats()
    assert set(after["paid"].values()) == {1}
    assert after["paid"].keys() == stats["paid"].keys()
    outcomes = Counter(outcome for _, _, outcome in asked(tmp_path / "cut"))
    assert outcomes["complete"] == len(stats["paid"])
    assert outcomes[None] >= len(DEATHS), "every kill leaves a request in flight"
    assert outcomes.total() == outcomes["complete"] + outcomes[None]


# --- Replay ---


@pytest.fixture(scope="module")
def recorded(judged_run, tmp_path_factory):
    """A cache to be replayed, in a folder of its own: the ledger of the run with a teacher or of
    another."""

    def cache(name):
        path = tmp_path_factory.mktemp("recorded") / "cache.sqlite"
        ledger = judged_run(name)[0] / "judgments.sqlite"
        with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        return path

    return cache


@pytest.mark.parametrize("name", ["scored", "pairwise", "failing", "taught"])
def test_replayed_without_server_and_key_a_run_is_bit_for_bit_the_same(
    judged_run, recorded, server, name, tmp_path, monkeypatch
):
    whole, _ = judged_run(name)
    cache = recorded(name)
    before = cache.read_bytes()
    server.control()
    monkeypatch.delenv("OPENAI_API_KEY")
    options = RUNS[name][1].replace("openai:local-judge", f"replay:{cache}").split()
    assert (
        train.main([*TINY, "--oracle", f"replay:{cache}", *options, "--out", str(tmp_path / "run")])
        == 0
    )
    assert_same_result(whole, tmp_path / "run")
    assert server.stats()["requests"] == 0
    assert cache.read_bytes() == before
    assert not list((tmp_path / "run").glob("*.sqlite*"))


def test_a_replay_with_another_seed_stops_with_one_line_that_names_the_cache(
    recorded, capsys, tmp_path
):
    cache = recorded("scored")
    before = cache.read_bytes()
    line = refused(
        capsys, *TINY, "--oracle", f"replay:{cache}", "--seed", 1, "--out", tmp_path / "run"
    )
    assert f"{cache} has no reply of local-judge to 24 of 24 questions" in line
    assert cache.read_bytes() == before


@pytest.mark.parametrize("page", [0, 1, 3, -1])
@pytest.mark.parametrize("how", ["live", "live --dry-run", "replay"])
def test_a_run_with_a_damaged_cache_ends_in_one_line_and_leaves_it_alone(
    recorded, server, how, page, capsys, tmp_path
):
    cache = recorded("scored")
    content = bytearray(cache.read_bytes())
    at = page % (len(content) // 4096) * 4096
    content[at : at + 4096] = b"\xa5" * 4096
    cache.write_bytes(content)
    server.control()
    arguments = (
        [*TINY, "--oracle", f"replay:{cache}"]
        if how == "replay"
        else judged(server, "--judge-cache", cache)
    )
    line = refused(capsys, *arguments, *how.split()[1:], "--out", tmp_path / "run")
    assert f"{cache} cannot be used as a cache of judgments" in line
    assert cache.read_bytes() == content
    assert list(cache.parent.iterdir()) == [cache]
    assert server.stats()["requests"] == 0
    assert not (tmp_path / "run").exists()

"""Finished runs that several modules read, each made once."""

import pytest

import train
from helpers.judged_runs import KEY, RUNS, judged, tuned_once
from helpers.server import serving
from helpers.text_runs import TINY


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """An uninterrupted small run, of Algorithm 2 and then of 3."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main([*TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def server():
    with serving() as served:
        yield served


@pytest.fixture
def judges_key(monkeypatch):
    """A key, no other endpoint, and fine-tuning, which no test here is about, done once for all
    runs of these settings."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("experiments.fine_tuning.fine_tune", tuned_once)


@pytest.fixture(scope="session")
def judged_run(server, tmp_path_factory):
    """judged_run(name): the folder of a finished run of `RUNS`, and what the server told of it;
    each is run once."""
    done = {}

    def run(name):
        if name not in done:
            behaviour, arguments = RUNS[name]
            out = tmp_path_factory.mktemp("judged") / name
            server.control(**behaviour)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("OPENAI_API_KEY", KEY)
                patch.setattr("experiments.fine_tuning.fine_tune", tuned_once)
                assert train.main([*judged(server), *arguments.split(), "--out", str(out)]) == 0
            done[name] = out, server.stats()
        return done[name]

    return run

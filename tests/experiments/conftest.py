"""Finished runs that several modules read, each made once; processes; figures."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import train
from helpers.judged_runs import KEY, RUNS, judged
from helpers.processes import Nursery
from helpers.runs import SMALL, made_once
from helpers.server import serving
from helpers.text_runs import TINY, learn_once

RENDER = Figure.savefig


@pytest.fixture
def rendered():
    """To be asked for by tests whose figures are to be rendered."""


@pytest.fixture(autouse=True)
def sketched(request, monkeypatch):
    """Figures are drawn, but not rendered, which takes half a second, except in finished runs and
    for tests that ask for `rendered`."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda _, path: Path(path).write_bytes(b"sketch"))


@pytest.fixture(scope="session", autouse=True)
def learnt():
    with pytest.MonkeyPatch.context() as patch:
        learn_once(patch.setattr)
        yield


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Starts processes that need not import anything."""
    nursery = Nursery(tmp_path_factory.mktemp("said"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def game_run(tmp_path_factory):
    """An uninterrupted small run of the main job."""

    def make(out):
        assert train.main([*SMALL, "--out", str(out)]) == 0

    return made_once(tmp_path_factory, "game", make)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """An uninterrupted small run, of Algorithm 2 and then of 3."""

    def make(out):
        assert train.main([*TINY, "--out", str(out)]) == 0

    return made_once(tmp_path_factory, "text", make)


@pytest.fixture(scope="session")
def server():
    with serving() as served:
        yield served


@pytest.fixture(scope="session")
def tuned(text_run):
    """In place of fine-tuning, which no test of judges is about: with seed 0 the weights of the
    small run, with another those drawn at the start."""
    weights = torch.load(text_run / "policies" / "base.pt", weights_only=True)

    def tune(config, policy, pairs, run):
        if config.seed == 0:
            policy.load_state_dict(weights)

    return tune


@pytest.fixture
def judges_key(monkeypatch, tuned):
    """A key, no other endpoint, and a policy that is fine-tuned already."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("experiments.fine_tuning.fine_tune", tuned)


@pytest.fixture(scope="session")
def judged_run(server, tuned, tmp_path_factory):
    """judged_run(name): the folder of a finished run of `RUNS`, and what the server told of it;
    each is run once."""
    done = {}

    def make(folder, name):
        behaviour, arguments = RUNS[name]
        server.control(**behaviour)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", KEY)
            patch.setattr("experiments.fine_tuning.fine_tune", tuned)
            patch.setattr(Figure, "savefig", RENDER)
            out = ["--out", str(folder / "run")]
            assert train.main([*judged(server), *arguments.split(), *out]) == 0
        (folder / "stats.json").write_text(json.dumps(server.stats()))

    def run(name):
        if name not in done:
            made = f"judged by {name}"
            folder = made_once(tmp_path_factory, made, lambda folder: make(folder, name))
            done[name] = folder / "run", json.loads((folder / "stats.json").read_text())
        return done[name]

    return run

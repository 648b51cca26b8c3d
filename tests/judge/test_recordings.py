"""What a real model replied, once: its judgments and answers run through everything without it."""

import json
import sqlite3

import pytest
import torch

import dno
from helpers import ROOT
from judge.endpoint import Endpoint
from judge.ledger import Refused
from model import TabularPolicy
from oracle import OpenAIJudge, OpenAITeacher
from pairs import Groups, SamplingSettings, large_margin_pairs
from recordings.record import ASKED, comparisons

FOLDER = ROOT / "recordings"

CACHE, MODEL = FOLDER / "smollm2-135m-instruct.sqlite", "smollm2-135m-instruct"

ITEMS = comparisons()

TEXTS = {
    x: sorted({y for item in ITEMS if item["prompt"] == x for y in (item["a"], item["b"])})
    for x in ASKED
}


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return Endpoint(MODEL, cache=CACHE, live=False, max_failed=1.0)


class OverTexts:
    """A judge of texts as an oracle of prompts and responses by number."""

    def __init__(self, judge):
        self.judge = judge

    def prefer(self, prompts, a, b):
        texts = ([TEXTS[ASKED[x]][y] for x, y in zip(prompts, ys, strict=True)] for ys in (a, b))
        return self.judge.prefer([ASKED[x] for x in prompts], *texts)


def test_the_comparisons_are_those_that_the_command_makes():
    lines = (FOLDER / "comparisons.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == ITEMS


@pytest.mark.slow
def test_algorithm_2_runs_on_recorded_judgments_and_learns_what_the_judge_prefers(recorded):
    """Where the judge's mean P of a response is highest the policy has gone up, and down where it
    is lowest."""
    oracle = OverTexts(OpenAIJudge(recorded, "pairwise"))
    policy, prompts = TabularPolicy(len(ASKED), 4), list(range(len(ASKED))) * 8
    settings = SamplingSettings(
        samples=5,
        temperature=1.0,
        top_p=1.0,
        ngram=0,
        learning_rate=0.05,
        judgments="probabilities",
    )
    rounds = list(
        dno.algorithm2(
            policy,
            oracle,
            lambda t: (prompts, [0] * len(prompts)),
            1.0,
            5,
            lambda r, usable: large_margin_pairs(r, usable, 0.005),
            lambda: 0.0,
            settings=settings,
        )
    )
    assert all(len(it.pairs) > 50 for it in rounds)
    groups = Groups(
        list(range(len(ASKED))), [list(range(4))] * len(ASKED), torch.zeros(len(ASKED), 4)
    )
    r, pi = dno.group_win_rates(dno.judge_groups(oracle, groups)), policy.log_probs().detach().exp()
    x = torch.arange(len(ASKED))
    assert (pi[x, r.argmax(-1)] > pi[x, r.argmin(-1)]).all()


def test_every_recorded_reply_can_be_read_back_in_either_form(recorded):
    columns = [[item[name] for item in ITEMS] for name in ("prompt", "a", "b")]
    pairwise, scored = OpenAIJudge(recorded, "pairwise"), OpenAIJudge(recorded, "scored")
    P = pairwise.prefer(*columns)
    assert not P.isnan().any()
    assert set(P.tolist()) - {0.0, 0.5, 1.0}, "read from log-probabilities"
    assert pairwise.report()["flip_rate"] == 1, "it says A in either order"
    assert 0 < scored.prefer(*columns).isnan().double().mean() < 0.5, (
        "some sheets could not be read: no labels"
    )
    answers = OpenAITeacher(recorded, max_tokens=128).answers(ASKED)
    assert all(answers)


def test_what_was_not_recorded_is_refused_and_the_file_stays_as_it_is(recorded):
    before = CACHE.read_bytes()
    with pytest.raises(Refused, match=f"no reply of {MODEL} to 2 of 2 questions"):
        OpenAIJudge(recorded, "pairwise").prefer(["Describe the moon."], ["a"], ["b"])
    assert CACHE.read_bytes() == before
    assert sorted(path.name for path in FOLDER.glob("*sqlite*")) == [CACHE.name]


def test_no_key_is_in_the_recording():
    with sqlite3.connect(f"{CACHE.as_uri()}?mode=ro&immutable=1", uri=True) as db:
        text = json.dumps(
            db.execute("SELECT question, reply, parsed, url FROM requests").fetchall()
        )
    assert "Bearer" not in text
    assert "sk-" not in text

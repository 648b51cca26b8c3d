"""Judgments that cannot be had: what is not known is no label."""

import itertools
import json
import re
from collections import Counter

import pytest
import torch

import dno
import train
from experiments.judging import demonstrations
from helpers.games import EXACT
from helpers.judged_runs import MARGIN, PROMPTS, SHORT, asked, groups_of, judged, shown, strictly
from helpers.runs import rows
from helpers.server import blocks
from helpers.text_runs import jsonl, repeats
from judge.endpoint import Endpoint
from oracle import OpenAIJudge
from pairs import Groups, large_margin_pairs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("judges_key")]


def scores_had(out):
    """By prompt and distinct responses, as a set: the points of each, None where no reply has them,
    and of several replies those of the one with most; from the raw replies."""
    found = {}
    for messages, reply, _ in asked(out):
        texts = {name.removeprefix("response "): text for name, text in blocks(messages).items()}
        sheet = texts.pop("request"), frozenset(texts.values())
        content = json.loads(reply)["choices"][0]["message"]["content"]
        scores = json.loads(content) if content else {}
        had = {text: scores.get(f"{name}_score") for name, text in texts.items()}
        known = lambda had: sum(score is not None for score in had.values())  # noqa: E731
        found[sheet] = max(found.get(sheet, had), had, key=known)
    return found


def test_a_response_whose_judgment_failed_has_no_win_rate_and_is_in_no_pair(judged_run):
    """Half the faults are refusals, the others leave out the last response of the sheet; every
    fourth question meets six."""
    out, _ = judged_run("failing")
    had, kinds = scores_had(out), Counter()
    for t, row in enumerate(rows(out), 1):
        failed, missing, pairs = set(), 0, jsonl(out / f"pairs-{t:03}.jsonl")
        for group in groups_of(out, t):
            x, texts = group[0]["prompt"], [line["response"] for line in group]
            scores = had[x, frozenset(map(shown, texts))]
            lost = {y for y in texts if scores[shown(y)] is None}
            failed |= {(x, y) for y in lost}
            missing += sum(
                y != z and bool({y, z} & lost) for y, z in itertools.combinations(texts, 2)
            )
            for line, y in zip(group, texts, strict=True):
                alone = texts.count(y) == 1 and not repeats(y)
                assert (line["win_rate"] is None) == (y in lost) or not alone
            kinds[len(lost)] += 1
        assert row["judgments_failed"] == pytest.approx(missing / (PROMPTS * 15), abs=EXACT)
        assert row["judgments_failed"] > 0
        assert (
            not {(pair["prompt"], pair[side]) for pair in pairs for side in ("first", "second")}
            & failed
        )
        assert row["n_parsed"] < row["n"] == 48
    assert kinds[0] > 0, "some prompts were judged in full"
    assert kinds[1] > 0, "and some but for one response"


def test_a_response_without_a_judgment_is_in_no_pair_even_if_sampled_twice(server):
    """It is equal to itself, and no more is known of it: questions with the word "unspeakable" in
    them are filtered."""
    server.control(filters="unspeakable")
    with_failures = OpenAIJudge(Endpoint("local-judge", server.url, None, max_failed=1), "pairwise")
    texts = ["worth 6", "worth 3", "worth 1", "unspeakable", "unspeakable", "worth 0"]
    groups = Groups(["Describe the sea."], [texts], torch.zeros(1, 6))
    wins = dno.judge_groups(with_failures, groups)
    assert wins[0, 3, :3].isnan().all()
    for rated in (wins, dno.draw_outcomes(wins, torch.Generator().manual_seed(0))):
        chosen = large_margin_pairs(
            dno.group_win_rates(rated), torch.ones(1, 6, dtype=torch.bool), MARGIN
        )
        assert [[x, i, j] for x, i, j in chosen.tolist() if {i, j} & {3, 4}] == []
        assert [0, 0, 5] in chosen.tolist()


def test_with_too_many_failures_it_exits_with_1_and_goes_on_once_the_server_is_well(
    server, capsys, tmp_path
):
    server.control(faults=["refusal"], mode="always")
    arguments = judged(server, "--out", tmp_path / "run", preset=SHORT)
    assert train.main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "questions to local-judge have no full answer, more than the share 0.05 that may fail"
        in line
    )
    assert re.search(r": a reply that cannot be read \(\d+ times\)", line)
    server.control()
    assert train.main([*arguments, "--resume"]) == 0
    assert rows(tmp_path / "run")[0]["judgments_failed"] == 0


def test_an_iteration_of_which_nothing_was_judged_is_written_as_valid_json(server, tmp_path):
    """Its only prompt's questions are filtered; validation goes on with prompts of other verbs."""
    (prompt,), _ = demonstrations(0, 1)(1)
    server.control(filters=prompt.split()[0])
    options = ["--prompts", 1, "--max-failed", 1, "--out", tmp_path / "run"]
    assert train.main(judged(server, *options, preset=SHORT)) == 0
    for name in ("metrics.jsonl", "summary.json", "responses-001.jsonl"):
        strictly(tmp_path / "run" / name)
    row = rows(tmp_path / "run")[0]
    assert (row["judgments_failed"], row["n_parsed"], row["student_wins"], row["best_of_n"]) == (
        1,
        32,
        None,
        None,
    )


def test_a_run_in_which_a_content_filter_refused_questions_can_be_replayed(server, tmp_path):
    server.control(filters="Praise")
    runs = tmp_path / "run", tmp_path / "again"
    assert train.main(judged(server, "--max-failed", 1, "--out", runs[0], preset=SHORT)) == 0
    cache = runs[0] / "judgments.sqlite"
    assert (
        train.main(
            [*SHORT, "--max-failed", "1", "--oracle", f"replay:{cache}", "--out", str(runs[1])]
        )
        == 0
    )
    assert (runs[0] / "pairs-001.jsonl").read_bytes() == (runs[1] / "pairs-001.jsonl").read_bytes()


def test_what_a_content_filter_refused_is_not_asked_again(server, tmp_path):
    server.control(filters="Praise")
    options = ["--judge-form", "pairwise", "--max-failed", 1, "--prompts", 4, "--judged", 1]
    options += ["--out", tmp_path / "run"]
    assert train.main(judged(server, *options, preset=SHORT)) == 0
    times = Counter(
        json.dumps(messages)
        for messages, _, outcome in asked(tmp_path / "run")
        if outcome == "filtered"
    )
    assert times
    assert set(times.values()) == {1}

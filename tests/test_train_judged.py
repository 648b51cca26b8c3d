"""The preset "text" with a language model as judge, or as teacher: that its numbers are those of
what the model said, what it costs, that a limit holds, that nothing is paid twice, how it is
replayed, what it refuses. The model is `endpoint_server`, of known mind: it values a text at
`quality`."""

import copy
import itertools
import json
import math
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing

import numpy as np
import pytest
import torch
from endpoint_server import blocks, quality, serving
from games import EXACT
from scipy.optimize import minimize
from test_train import ROOT, everything_in, refused, rows
from test_train_text import jsonl, policy_of, repeats

import dno
import train
from experiments.fine_tuning import fine_tune
from experiments.judging import demonstrations
from judge.endpoint import Endpoint
from oracle import OpenAIJudge
from pairs import Groups, large_margin_pairs
from world import CLASSES, HELD_OUT, classify, teacher_answer

KEY = 'sk-seldom/2718"281828'  # to be found nowhere, with two letters that JSON may escape
PRICES = (10, 30)  # dollars per million tokens of prompt and completion
K, PROMPTS, JUDGED, MARGIN = 5, 8, 2, 0.4
TINY = (
    "text --sft-steps 100 --sft-lr 0.01 --iterations 3 --prompts 8 --survey 4 --width 32 "
    "--layers 1 --threads 1"
).split()
SHORT = [*TINY, "--iterations", "1"]
ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point, by far less than this
CENT = 1e-9  # dollars: sums of the same charges in another order
SOLVER = 1e-6  # scipy's optimum
FIRST_BIAS = 0.1  # by which the judge prefers the first response, a change of 1.6 in quality


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """A key, no other endpoint, and fine-tuning, which no test here is about, done once for all
    runs of these settings."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("experiments.fine_tuning.fine_tune", tuned_once)


TUNED, FINE_TUNE = {}, fine_tune


def tuned_once(config, policy, pairs, run):
    if config.seed not in TUNED:
        FINE_TUNE(config, policy, pairs, run)
        TUNED[config.seed] = copy.deepcopy(policy.state_dict())
    policy.load_state_dict(TUNED[config.seed])


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory):
    """finished(name): the folder of a finished run of `RUNS`, and what the server told of it; each
    is run once."""
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


RUNS = {  # how the server behaves, and the arguments
    "scored": ({}, "--judgments probabilities"),
    "pairwise": (
        {"first_bias": FIRST_BIAS},
        "--judge-form pairwise --judgments probabilities --prompts 4",
    ),
    "points": ({}, "--rule scored --judgments scores"),
    "algorithm 3": ({}, "--algorithm 3 --samples 4"),
    "taught": (
        {"faults": ["refusal"], "mode": "random", "rate": 0.8, "most": 6, "seed": 2},
        "--teacher openai:local-judge --max-failed 1",
    ),
    "failing": (
        {"faults": ["refusal", "missing-ids"], "mode": "random", "rate": 0.8, "most": 6, "seed": 1},
        "--judgments probabilities --max-failed 1",
    ),
}


def judged(server, *arguments, preset=TINY):
    """The arguments of a small run with the server as judge."""
    return [
        *preset,
        "--judge-url",
        server.url,
        "--judge-prices",
        ",".join(map(str, PRICES)),
        *map(str, arguments),
    ]


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def strictly(path):
    """The values of a .json or .jsonl file; ValueError on NaN and Infinity, which JSON has not."""
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def cost(stats):
    """What the server charged, in dollars."""
    return sum(tokens * price for tokens, price in zip(stats["tokens"], PRICES, strict=True)) / 1e6


def asked(out):
    """All that is in the run's ledger: (messages, raw reply or None, outcome) by time."""
    with closing(sqlite3.connect(out / "judgments.sqlite")) as db:
        found = db.execute("SELECT question, reply, outcome FROM requests ORDER BY id").fetchall()
    return [
        (json.loads(question)["messages"], reply, outcome) for question, reply, outcome in found
    ]


def shown(text):
    """A response as the judge gets to see it: without control characters."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def points(text):
    return quality(shown(text))


def preference(y, z, form="scored"):
    """P(y > z) by the server's mind."""
    lead = points(y) - points(z)
    if form == "scored" or y == z:
        return 0.5 * (1 + (lead > 0) - (lead < 0)) * (y != z) + 0.5 * (y == z)
    there, back = (min(0.95, max(0.05, 0.5 + d / 16 + FIRST_BIAS)) for d in (lead, -lead))
    return (there + 1 - back) / 2


def groups_of(out, iteration):
    """The responses of an iteration by prompt."""
    lines = jsonl(out / f"responses-{iteration:03}.jsonl")
    return [list(group) for _, group in itertools.groupby(lines, lambda line: line["prompt"])]


def assert_same_result(whole, other):
    """Metrics, but for seconds and spending, policies, responses and pairs are the same, bit for
    bit."""

    def numbers(out):
        return [
            {name: row[name] for name in row.keys() - {"seconds", "requests", "dollars"}}
            for row in rows(out)
        ]

    assert numbers(other) == numbers(whole)
    names = [
        str(path.relative_to(whole))
        for pattern in ("*-0*.jsonl", "policies/*.pt")
        for path in whole.glob(pattern)
    ]
    assert len(names) == (2 * 3 + 4) + 4  # of three iterations, and of four policies
    for name in names:
        if name.endswith(".pt"):
            mine, its = (torch.load(out / name, weights_only=True) for out in (whole, other))
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in mine), name
        else:
            assert (other / name).read_bytes() == (whole / name).read_bytes(), name


# --- What a run writes ---

OF_ALL = {
    "iteration",
    "algorithm",
    "t",
    "seconds",
    "loss",
    "steps",
    "sampled_words",
    "best_iteration",
    "alarms",
    "mean_length",
    "truncated",
    "repeated",
    "empty",
    "kl_to_first",
    "perplexity_under_first",
    "pairs_teacher_student",
    "pairs_student_teacher",
    "pairs_student_student",
    "win_rate_vs_teacher",
    "win_rate_vs_teacher_interval",
    "win_rate_vs_teacher_length_controlled",
    "n",
    "n_parsed",
    "win_rate_vs_previous",
    "judgments_failed",
    "flip_rate",
    "prompts_dropped",
    "requests",
    "dollars",
    *(f"share_{name}" for name in CLASSES),
}
OF_PAIRS = {"chosen_log_ratio", "sampled_vs_teacher", "student_wins", "best_of_n"}
MORE = {"algorithm 3": set(), "points": OF_PAIRS | {"student_score", "teacher_score"}}


@pytest.mark.parametrize("name", RUNS)
def test_a_judged_run_writes_the_files_of_a_text_run_with_its_own_columns_and_valid_json(
    finished, name
):
    out, _ = finished(name)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    always = {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "text.png",
        "tokenizer.json",
        "policies/base.pt",
    }
    each = {
        name.format(t)
        for t in (1, 2, 3)
        for name in ("responses-{:03}.jsonl", "pairs-{:03}.jsonl", "policies/{:03}.pt")
    } | {f"validation-{t:03}.jsonl" for t in (1, 2, 3, 4)}
    ledger = {"judgments.sqlite"}
    checkpoint = {"checkpoint/state.pt", "checkpoint/phases.pt"}
    assert (
        names - {f"judgments.sqlite-{end}" for end in ("wal", "shm")}
        == always | each | ledger | checkpoint
    )
    config = json.loads((out / "config.json").read_text())
    assert (config["oracle"], config["judge_model"]) == ("openai", "local-judge")
    for file in (path for path in out.iterdir() if path.suffix in (".json", ".jsonl")):
        assert strictly(file)
    assert [set(row) for row in rows(out)] == [OF_ALL | MORE.get(name, OF_PAIRS)] * 3
    assert name == "taught" or all(row["n"] == JUDGED * len(HELD_OUT) for row in rows(out))


def compared(out, t, form):
    """By hand, of the saved policy pi_{t+1}: (P of winning, lead in characters, prompt) for each of
    its samples against the teacher, and P of winning against the samples of pi_t."""
    draw = random.Random(0)
    gold = [teacher_answer(x, draw) for x in HELD_OUT]
    names = f"{t:03}", f"{t - 1:03}" if t > 1 else "base"
    new, old = (policy_of(out, name).survey(HELD_OUT, JUDGED, 1) for name in names)
    against_gold = [
        (preference(y, z, form), len(y) - len(z), x)
        for x, ys, z in zip(HELD_OUT, new, gold, strict=True)
        for y in ys
    ]
    against_old = [
        preference(y, z, form)
        for ys, zs in zip(new, old, strict=True)
        for y, z in zip(ys, zs, strict=True)
    ]
    return against_gold, against_old


@pytest.mark.parametrize("name", ["scored", "pairwise"])
def test_win_rates_are_those_of_the_saved_policies_by_the_judges_mind(finished, name):
    """The interval by its formula, with prompts as clusters; the rate at equal length by scipy's
    optimum."""
    out, _ = finished(name)
    rates = []
    for t, row in enumerate(rows(out), 1):
        against_gold, against_old = compared(out, t, name)
        wins, lead, prompts = map(list, zip(*against_gold, strict=True))
        mean = sum(wins) / len(wins)
        sums = [
            sum(win - mean for win, x in zip(wins, prompts, strict=True) if x == prompt)
            for prompt in HELD_OUT
        ]
        half_width = 2.0686576 * math.sqrt(24 / 23 * sum(part**2 for part in sums)) / len(wins)
        assert row["win_rate_vs_teacher"] == pytest.approx(mean, abs=EXACT)
        assert row["win_rate_vs_teacher_interval"] == pytest.approx(half_width, rel=1e-7)  # t_23
        assert row["win_rate_vs_teacher_length_controlled"] == pytest.approx(
            at_equal_length(wins, lead), abs=SOLVER
        )
        assert row["win_rate_vs_previous"] == pytest.approx(
            sum(against_old) / len(against_old), abs=EXACT
        )
        assert (row["n"], row["n_parsed"]) == (48, 48)
        rates.append(mean)
    assert len(set(rates)) == 3, "the policies differ, and so can their numbers"


def at_equal_length(wins, lead):
    """sigma(theta) of the penalised likelihood as it is written in `length_controlled`."""
    wins, steps = np.array(wins), np.tanh(np.array(lead) / np.std(lead))

    def minus_log_likelihood(w):
        score = w[0] + w[1] * steps
        return np.sum(np.logaddexp(0, score) - wins * score) + np.sum(w**2) / 200

    return 1 / (1 + math.exp(-minimize(minus_log_likelihood, [0.0, 0.0], tol=1e-10).x[0]))


@pytest.mark.parametrize("name", ["scored", "pairwise"])
def test_pairs_and_counts_follow_from_what_the_judge_thinks_of_the_responses(finished, name):
    """Win rates are means of P over the others of the group; a pair's lead by the margin or more;
    all by hand."""
    out, _ = finished(name)
    found = Counter()
    for t, row in enumerate(rows(out), 1):
        pairs, kinds, groups = [], Counter(), groups_of(out, t)
        assert [len(group) for group in groups] == [K + 1] * (PROMPTS if name == "scored" else 4)
        for group in groups:
            texts = [line["response"] for line in group]
            rates = [
                sum(preference(y, z, name) for j, z in enumerate(texts) if j != i) / K
                for i, y in enumerate(texts)
            ]
            rates = [0.0 if repeats(y) else rate for y, rate in zip(texts, rates, strict=True)]
            assert [line["win_rate"] for line in group] == pytest.approx(rates, abs=EXACT)
            for i, j in itertools.permutations(range(K + 1), 2):
                if rates[i] - rates[j] >= MARGIN - ROUNDING and not repeats(texts[i]):
                    pairs.append([group[0]["prompt"], texts[i], texts[j], 1.0])
                    kinds[f"pairs_{group[i]['by']}_{group[j]['by']}"] += 1
        assert [list(pair.values()) for pair in jsonl(out / f"pairs-{t:03}.jsonl")] == pairs
        for kind in ("pairs_teacher_student", "pairs_student_teacher", "pairs_student_student"):
            assert row[kind] == kinds[kind]
        over_gold = [
            [preference(line["response"], group[-1]["response"], name) for line in group[:K]]
            for group in groups
        ]
        won = [[p > 0.5 for p in ps] for ps in over_gold]
        mean = sum(map(sum, over_gold)) / len(over_gold) / K
        assert row["sampled_vs_teacher"] == pytest.approx(mean, abs=EXACT)
        assert row["student_wins"] == pytest.approx(sum(map(sum, won)) / len(won), abs=EXACT)
        assert row["best_of_n"] == pytest.approx(sum(map(any, won)) / len(won), abs=EXACT)
        assert row["judgments_failed"] == row["prompts_dropped"] == 0
        found += kinds
    assert min(found.values()) > 0


def test_the_flip_rate_is_the_share_of_pairs_that_differ_less_than_the_first_place_is_worth(
    finished,
):
    """In quality, first place is worth 16 * 0.1 = 1.6: verdicts flip with the order for a
    difference of 0 or 1."""
    out, _ = finished("pairwise")
    for t, row in enumerate(rows(out), 1):
        pairs = [
            two
            for group in groups_of(out, t)
            for two in itertools.combinations({line["response"] for line in group}, 2)
        ]
        assert row["flip_rate"] == pytest.approx(
            sum(abs(points(y) - points(z)) <= 1 for y, z in pairs) / len(pairs), abs=EXACT
        )
        assert 0 < row["flip_rate"] < 1
    assert {row["flip_rate"] for row in rows(finished("scored")[0])} == {None}


def test_the_rule_of_scores_takes_positives_of_at_least_5_with_a_lead_of_2_or_of_1_if_the_students(
    finished,
):
    out, _ = finished("points")
    by = Counter()
    for t, row in enumerate(rows(out), 1):
        pairs, of_students, of_teachers = [], [], []
        for group in groups_of(out, t):
            scores = [
                0 if repeats(line["response"]) else points(line["response"]) for line in group
            ]
            assert [line["score"] for line in group] == scores
            of_students += scores[:K]
            of_teachers.append(scores[K])
            for i, j in itertools.permutations(range(K + 1), 2):
                if (
                    scores[i] >= 5
                    and scores[i] - scores[j] >= (2 if i == K else 1)
                    and not repeats(group[i]["response"])
                ):
                    pairs.append(
                        [group[0]["prompt"], group[i]["response"], group[j]["response"], 1.0]
                    )
                    by[group[i]["by"], scores[i] - scores[j] == 1] += 1
        assert [list(pair.values()) for pair in jsonl(out / f"pairs-{t:03}.jsonl")] == pairs
        assert row["student_score"] == pytest.approx(sum(of_students) / len(of_students), abs=EXACT)
        assert row["teacher_score"] == pytest.approx(sum(of_teachers) / len(of_teachers), abs=EXACT)
    assert min(by["student", True], by["student", False], by["teacher", False]) > 0


def test_algorithm_3_regresses_on_win_rates_by_the_judges_mind(finished):
    out, _ = finished("algorithm 3")
    for t in (1, 2, 3):
        pairs = iter(jsonl(out / f"pairs-{t:03}.jsonl"))
        for group in groups_of(out, t):
            texts = [line["response"] for line in group]
            rates = [
                sum(preference(y, z) for j, z in enumerate(texts) if j != i) / 3
                for i, y in enumerate(texts)
            ]
            assert [line["win_rate"] for line in group] == pytest.approx(rates, abs=EXACT)
            assert all(0 <= line["win_rate"] <= 1 and line["by"] == "student" for line in group)
            for one, two in itertools.combinations(range(4), 2):
                label = 1 / (1 + math.exp(rates[two] - rates[one]))
                assert next(pairs)["label"] == pytest.approx(label, abs=EXACT)
        assert next(pairs, None) is None


@pytest.mark.parametrize("name", ["scored", "pairwise", "points", "algorithm 3"])
def test_requests_and_dollars_are_those_of_the_server_and_nothing_was_paid_twice(finished, name):
    out, stats = finished(name)
    last, summary = rows(out)[-1], json.loads((out / "summary.json").read_text())
    assert set(stats["paid"].values()) == {1}
    assert last["requests"] == summary["requests"] == stats["requests"] == len(stats["paid"])
    assert last["dollars"] == summary["dollars"] == pytest.approx(cost(stats), abs=CENT)


def test_a_run_that_is_done_asks_nothing_when_resumed(finished, server, capsys):
    out, _ = finished("scored")
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    server.control()
    assert train.main(judged(server, "--judgments", "probabilities", "--out", out, "--resume")) == 0
    assert server.stats()["requests"] == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before


def test_what_is_in_a_cache_that_runs_share_is_asked_once_and_not_charged_to_the_second(
    server, tmp_path
):
    server.control()
    for out in ("first", "second"):
        options = ["--judge-cache", tmp_path / "shared" / "cache.sqlite", "--out", tmp_path / out]
        assert train.main(judged(server, *options, preset=SHORT)) == 0
    first, second = (rows(tmp_path / out)[0] for out in ("first", "second"))
    assert first["requests"] == server.stats()["requests"] > 0
    assert (second["requests"], second["dollars"]) == (0, 0)
    assert (tmp_path / "first" / "pairs-001.jsonl").read_bytes() == (
        tmp_path / "second" / "pairs-001.jsonl"
    ).read_bytes()


def test_a_run_with_the_synthetic_judge_asks_nobody_and_has_its_columns(
    server, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.control()
    assert train.main([*SHORT, "--algorithm", "2", "--out", str(tmp_path / "run")]) == 0
    assert server.stats()["requests"] == 0
    gaps = {"gap_last", "gap_last_interval", "gap_average", "gap_average_interval", "gap_nash"}
    of_judges = {
        "win_rate_vs_teacher_interval",
        "win_rate_vs_teacher_length_controlled",
        "n",
        "n_parsed",
        "flip_rate",
        "prompts_dropped",
        "requests",
        "dollars",
    }
    assert set(rows(tmp_path / "run")[0]) == OF_ALL - of_judges | OF_PAIRS | gaps
    assert not list(tmp_path.rglob("*.sqlite*"))


# --- A teacher ---


def test_gold_responses_are_the_teachers_and_prompts_without_one_are_dropped_and_counted(finished):
    """Every fourth question is refused six times, and then is not asked again."""
    out, _ = finished("taught")
    lessons = [
        (messages[-1]["content"], outcome)
        for messages, _, outcome in asked(out)
        if len(blocks(messages)) == 0
    ]
    answered = {x for x, outcome in lessons if outcome == "complete"}
    assert all(
        times == 6 for x, times in Counter(x for x, _ in lessons).items() if x not in answered
    )
    for t, row in enumerate(rows(out), 1):
        drawn, _ = demonstrations(0, PROMPTS)(t)
        kept = [x for x in drawn if x in answered]
        assert [group[0]["prompt"] for group in groups_of(out, t)] == kept
        assert [group[-1]["response"] for group in groups_of(out, t)] == [
            f"A gold answer to {x}" for x in kept
        ]
        assert row["prompts_dropped"] == PROMPTS - len(kept)
        assert {line["by"] for group in groups_of(out, t) for line in group[:-1]} == {"student"}
        assert row["n"] == JUDGED * len(answered & set(HELD_OUT))
    assert 0 < sum(row["prompts_dropped"] for row in rows(out)) < 3 * PROMPTS


def test_prompts_without_a_gold_response_end_the_run_in_one_line_or_are_passed_over(
    server, capsys, tmp_path
):
    """The only prompt of iteration 1 is one that the teacher has no answer to."""
    (prompt,), _ = demonstrations(0, 1)(1)
    server.control(filters=prompt.split()[0])
    options = [
        "--prompts",
        1,
        "--max-failed",
        1,
        "--teacher",
        "openai:local-judge",
        "--out",
        tmp_path / "run",
    ]
    code = train.main(judged(server, *options, preset=SHORT))
    assert code == 0 or (code in (1, 2) and capsys.readouterr().err.count("\n") == 1)


def test_with_the_synthetic_judge_the_win_rate_over_the_teacher_is_that_over_the_one_who_teaches(
    server, tmp_path
):
    """The judge finds the gold answers malformed: what is well-formed beats them with 0.95, what is
    not with 0.5."""
    server.control()
    options = [
        "--oracle",
        "synthetic",
        "--teacher",
        "openai:local-judge",
        "--teacher-url",
        server.url,
        "--algorithm",
        "2",
    ]
    assert train.main([*SHORT, *options, "--out", str(tmp_path / "run")]) == 0
    assert classify("A gold answer to Describe the sea.") == CLASSES.index("malformed")
    row = rows(tmp_path / "run")[0]
    assert row["win_rate_vs_teacher"] == pytest.approx(
        0.95 - 0.45 * row["share_malformed"], abs=EXACT
    )


# --- What it will cost ---


def dry(capsys, *arguments):
    """What a dry run prints."""
    capsys.readouterr()
    assert train.main([*map(str, arguments), "--dry-run"]) == 0
    return capsys.readouterr().out


def planned(text):
    """(requests, dollars) of a plan."""
    requests, dollars = re.search(
        r"the whole run: ([\d,]+) requests.*\$([\d.]+) at most", text
    ).groups()
    return int(requests.replace(",", "")), float(dollars)


def test_a_dry_run_says_whom_it_would_ask_at_what_price_and_sends_and_writes_nothing(
    server, capsys, tmp_path
):
    server.control()
    said = dry(
        capsys,
        *judged(
            server,
            "--teacher",
            "openai:other",
            "--max-usd",
            7,
            "--teacher-prices",
            "1,2",
            "--out",
            tmp_path / "run",
        ),
    )
    for part in (
        f"judge: local-judge at {server.url} ($10 and $30 a million tokens)",
        f"teacher: other at {server.url} ($1 and $2 a million tokens)",
        "stops below $7",
    ):
        assert part in said
    assert re.findall(
        r"the whole run: [\d,]+ requests, about [\d,]+ tokens of prompts "
        r"and at most [\d,]+ of completions",
        said,
    )
    assert server.stats()["requests"] == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_for_openai_needs_neither_network_nor_key(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    named = ("--oracle", "openai:gpt-4-turbo", "--judge-prices", "10,30")
    said = dry(capsys, *TINY, *named, "--out", tmp_path / "run")
    assert "gpt-4-turbo at https://api.openai.com/v1 ($10 and $30 a million tokens)" in said
    requests, dollars = planned(said)
    assert requests == 24 + 3 * (
        PROMPTS + 24
    )  # a sheet a prompt: pi_1's validation, then three iterations
    assert 3 * (PROMPTS * 6 + 24 * 5) * 200 * 30e-6 < dollars < 10  # at least the completions
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["scored", "pairwise", "points", "algorithm 3"])
def test_the_plan_is_an_upper_bound_of_what_a_clean_run_sends_and_pays(
    finished, server, name, capsys, tmp_path
):
    _, stats = finished(name)
    requests, dollars = planned(
        dry(capsys, *judged(server, *RUNS[name][1].split(), "--out", tmp_path / "run"))
    )
    assert stats["requests"] <= requests
    assert cost(stats) <= dollars


def test_the_plan_is_an_upper_bound_also_where_the_policy_repeats_itself_less_than_the_student(
    server, capsys, tmp_path
):
    """24 answers of the student to a prompt are not 24 different ones; of a badly trained policy
    they are."""
    options = [
        "--algorithm",
        3,
        "--judge-form",
        "pairwise",
        "--samples",
        24,
        "--prompts",
        2,
        "--judged",
        1,
        "--temperature",
        5,
    ]
    server.control()
    arguments = judged(server, *options, "--out", tmp_path / "run", preset=SHORT)
    requests, _ = planned(dry(capsys, *arguments))
    assert train.main(arguments) == 0
    assert server.stats()["requests"] <= requests


def test_a_dry_run_of_a_run_that_has_begun_says_what_is_spent(finished, server, capsys):
    out, stats = finished("scored")
    said = dry(capsys, *judged(server, "--judgments", "probabilities", "--out", out, "--resume"))
    assert f"spent so far: ${cost(stats):.4f}" in said


def test_where_the_price_is_not_known_no_dollars_are_told(server, tmp_path, capsys):
    server.control()
    assert train.main([*SHORT, "--judge-url", server.url, "--out", str(tmp_path / "run")]) == 0
    assert "dollars not known" in (said := capsys.readouterr().out)
    assert "$0.0000" not in said
    assert rows(tmp_path / "run")[0]["dollars"] is None


# --- A limit on dollars ---


def test_below_the_limit_it_stops_with_130_and_goes_on_under_a_higher_one_to_the_same_result(
    finished, server, capsys, tmp_path
):
    """Three limits; the limit holds for what the server charges, which charges nothing twice."""
    whole, stats = finished("scored")
    server.control()
    arguments = judged(
        server, "--judgments", "probabilities", "--out", tmp_path / "cut", "--max-usd"
    )
    for limit, resume in ((0.25, ()), (0.5, ("--resume",))):
        assert train.main([*arguments, str(limit), *resume]) == 130
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"stopped below the limit of ${limit:g}" in line
        assert "--resume" in line
        assert limit / 2 < cost(server.stats()) <= limit
    assert train.main([*arguments, "5", "--resume"]) == 0
    assert_same_result(whole, tmp_path / "cut")
    assert set(server.stats()["paid"].values()) == {1}
    assert server.stats()["requests"] == stats["requests"]
    assert rows(tmp_path / "cut")[-1]["dollars"] == pytest.approx(cost(stats), abs=CENT)


def test_the_limit_holds_for_the_folder_however_its_path_is_written(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.control()
    (tmp_path / "run").mkdir()  # there has to be a folder to resume in
    for out in ("run", "./run", str(tmp_path / "run")):
        assert train.main(judged(server, "--max-usd", 0.25, "--out", out, "--resume")) == 130
        assert cost(server.stats()) <= 0.25


def test_the_limit_is_on_judge_and_teacher_together(server, capsys, tmp_path):
    server.control()
    options = ["--teacher", "openai:local-judge", "--max-usd", 0.25, "--out", tmp_path / "run"]
    assert train.main(judged(server, *options)) == 130
    assert 0.1 < cost(server.stats()) <= 0.25


# --- Killed and resumed ---

DRIVER = """
import json, os, signal, sys
root, arguments, deaths = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, root)
import judge.ledger, openai, train
import torch._dynamo  # making an optimizer does that

def run(death):
    name, number, before = death or ("complete", 0, False)
    original, calls = getattr(judge.ledger.Ledger, name), []

    def deadly(*given, **named):
        calls.append(name)
        due = len(calls) == number
        if due and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*given, **named)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(judge.ledger.Ledger, name, deadly)
    sys.exit(train.main(arguments))

codes = []
for death in deaths:  # each run in a process of its own, all imported and nothing done
    child = os.fork()
    if child == 0:
        run(death)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes), file=sys.stderr)
"""
DEATHS = {  # the call of the ledger at which it dies, which one, before or after
    "before a reply that was paid for is written": ("complete", 7, True),
    "when a request is written and not sent": ("reserve", 20, False),
    "in the midst of judging an iteration": ("complete", 30, True),
}


def test_killed_while_it_asks_and_resumed_it_is_the_uninterrupted_run_and_pays_nothing_twice(
    finished, server, tmp_path
):
    whole, stats = finished("scored")
    (tmp_path / "cut" / "policies").mkdir(parents=True)
    for name in ("config.json", "policies/base.pt"):  # fine-tuned already
        shutil.copy(whole / name, tmp_path / "cut" / name)
    server.control()
    arguments = judged(
        server, "--judgments", "probabilities", "--out", tmp_path / "cut", "--resume"
    )
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(ROOT),
        json.dumps(arguments),
        json.dumps([*DEATHS.values(), None]),
    ]
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=400
    )
    assert json.loads(done.stderr.splitlines()[-1]) == [-signal.SIGKILL] * len(DEATHS) + [0], (
        done.stderr
    )
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
def recorded(finished, tmp_path_factory):
    """A cache to be replayed, in a folder of its own: the ledger of the run with a teacher or of
    another."""

    def cache(name):
        path = tmp_path_factory.mktemp("recorded") / "cache.sqlite"
        ledger = finished(name)[0] / "judgments.sqlite"
        with closing(sqlite3.connect(ledger)) as source, closing(sqlite3.connect(path)) as target:
            source.backup(target)
        return path

    return cache


@pytest.mark.parametrize("name", ["scored", "pairwise", "failing", "taught"])
def test_replayed_without_server_and_key_a_run_is_bit_for_bit_the_same(
    finished, recorded, server, name, tmp_path, monkeypatch
):
    whole, _ = finished(name)
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


# --- Judgments that cannot be had ---


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


def test_a_response_whose_judgment_failed_has_no_win_rate_and_is_in_no_pair(finished):
    """Half the faults are refusals, the others leave out the last response of the sheet; every
    fourth question meets six."""
    out, _ = finished("failing")
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


def test_a_response_of_which_no_judgment_can_be_had_is_in_no_pair_even_if_it_was_sampled_twice(
    server,
):
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
    options = ["--judge-form", "pairwise", "--max-failed", 1, "--out", tmp_path / "run"]
    assert train.main(judged(server, *options, preset=SHORT)) == 0
    times = Counter(
        json.dumps(messages)
        for messages, _, outcome in asked(tmp_path / "run")
        if outcome == "filtered"
    )
    assert times
    assert set(times.values()) == {1}


# --- What is refused ---

SCORED = "rule scored, judgments scores, Algorithm 2 or 4 and a language model of judge-form scored"
CASES = [
    ("--oracle gpt-4", "oracle is 'gpt-4'; expected synthetic, openai:MODEL or replay:CACHE"),
    ("--oracle replay:", "oracle is 'replay:'"),
    ("--oracle openai:", "oracle is 'openai:'; the model's name is missing: expected openai:MODEL"),
    ("--oracle openai", "the model's name is missing, and OpenAI has many; name one, openai:MODEL"),
    ("--teacher openai:", "teacher is 'openai:'; the model's name is missing"),
    ("--oracle replay:nothing.sqlite", "nothing.sqlite cannot be used as a cache"),
    ("--teacher human", "teacher is 'human'"),
    ("--judge-url URL --judge-prices 10", "prices are '10'; expected dollars per million tokens"),
    ("--judge-url URL --judge-prices=-1,2", "prices are -1.0 and 2.0"),
    ("--judge-url URL --judge-prices nan,2", "prices are nan and 2.0"),
    ("--judge-url URL --max-failed 2", "max_failed is 2.0; expected 0 to 1"),
    ("--judge-url URL --max-failed nan", "max_failed is nan"),
    ("--judge-url URL --judge-concurrency 0", "judge_concurrency is 0"),
    ("--judge-url URL --judge-timeout 0", "judge_timeout is 0"),
    ("--judge-url URL --judge-form verbose", "invalid choice: 'verbose'"),
    ("--judge-url URL --judged 0", "judged is 0"),
    ("--judge-url URL --max-usd=-1", "max_usd is -1.0"),
    ("--judge-url URL --max-usd nan", "max_usd is nan"),
    (
        "--judge-url URL --max-usd 5",
        "the price of 'local-judge' is not known; give prices too (--judge-prices 2.5,10",
    ),
    (
        "--judge-url URL --judge-prices 1,1 --max-usd 5 --teacher openai:other",
        "give prices too (--teacher-prices 2.5,10",
    ),
    ("--judge-url ftp://localhost/v1", "must be like http://localhost:8000/v1"),
    ("--judge-url http://me:secret@localhost/v1", "with no key in it"),
    ("--judge-url http://localhost/v1?key=secret", "with no key in it"),
    ("--oracle synthetic --judge-model m", "judge-model belongs to a language model"),
    ("--oracle synthetic --judge-url URL", "judge-url belongs to a language model"),
    ("--oracle replay:CACHE --judge-url URL", "judge-url belongs to a language model"),
    ("--oracle replay:CACHE --max-usd 1", "max-usd belongs to a language model"),
    ("--oracle openai:gpt-4o --judge-model gpt-4", "leave one of them out"),
    ("--max-usd 5", "max-usd belongs to a language model"),
    ("--judge-url URL --rule scored", SCORED),
    ("--judge-url URL --judgments scores", SCORED),
    ("--rule scored --judgments scores", SCORED),
    ("--judge-url URL --rule scored --judgments scores --judge-form pairwise", SCORED),
    ("--judge-url URL --rule scored --judgments scores --algorithm 3", SCORED),
]


@pytest.mark.parametrize(("arguments", "message"), CASES)
def test_bad_options_of_a_judge_are_one_line_exit_code_2_and_nothing_written(
    server, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    server.control()
    line = refused(capsys, *TINY, *arguments.replace("URL", server.url).split(), "--out", "run")
    assert message in line
    assert "secret" not in line
    assert list(tmp_path.iterdir()) == []
    assert server.stats()["requests"] == 0


def test_a_limit_can_be_set_on_a_teacher_alone(capsys, tmp_path):
    assert "stops below $3" in dry(
        capsys,
        *TINY,
        *("--teacher", "openai:gpt-4o", "--teacher-prices", "2.5,10", "--max-usd", 3),
        *("--out", tmp_path / "run"),
    )


def test_the_judges_price_is_the_teachers_if_they_are_the_same_model_named_or_not(
    server, capsys, tmp_path
):
    for teacher in ("openai:local-judge", "openai"):
        said = dry(
            capsys, *judged(server, "--teacher", teacher, "--max-usd", 5, "--out", tmp_path / "run")
        )
        assert said.count("($10 and $30 a million tokens)") == 2


@pytest.mark.parametrize(
    ("key", "message"),
    [(None, "OPENAI_API_KEY is not set"), ("sk two", "OPENAI_API_KEY holds a space")],
)
def test_without_a_key_or_with_one_that_cannot_be_one_nothing_is_written(
    key, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", key) if key else monkeypatch.delenv("OPENAI_API_KEY")
    line = refused(capsys, *TINY, "--oracle", "openai:gpt-4-turbo", "--out", tmp_path / "run")
    assert message in line
    assert "two" not in line
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(server, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "choose another --out" in refused(capsys, *judged(server, "--out", tmp_path))
    assert everything_in(tmp_path) == {str(tmp_path / "notes.txt"): b"mine"}


@pytest.mark.parametrize(
    ("status", "parts"),
    [
        ([401, "Incorrect key", "invalid_api_key", ""], ("Incorrect key", "check OPENAI_API_KEY")),
        (
            [404, "No such model", "model_not_found", ""],
            ("No such model", "check the model's name and the URL"),
        ),
        (
            [302, "Moved", None, "location: ROOT/elsewhere\r\n"],
            ("redirects to ROOT/elsewhere (", "give its URL"),
        ),
        (
            [307, "Moved", None, "location: ROOT/elsewhere\r\n"],
            ("redirects to ROOT/elsewhere (", "give its URL"),
        ),
    ],
)
def test_a_refusal_of_the_server_is_one_line_and_exit_code_2_and_the_run_goes_on_when_it_is_mended(
    server, status, parts, capsys, tmp_path
):
    server.control(status=[*status[:3], status[3].replace("ROOT", server.root)])
    arguments = judged(server, "--out", tmp_path / "run", preset=SHORT)
    line = refused(capsys, *arguments)
    assert f"local-judge at {server.url}" in line
    assert f"HTTP {status[0]}" in line
    assert all(part.replace("ROOT", server.root) in line for part in parts)
    assert server.stats()["strays"] == 0
    server.control()
    assert train.main([*arguments, "--resume"]) == 0


# --- The key ---

KEYED = {  # how the server behaves, further arguments, the exit code
    "a good run": ({}, "", 0),
    "a teacher": ({}, "--teacher openai:local-judge", 0),
    "a wrong key": ({"status": [401, "Incorrect key", "invalid_api_key", ""]}, "", 2),
    "too many faults": ({"faults": ["not-json"], "mode": "always"}, "", 1),
    "as JSON may escape it": ({"spelling": "solidus"}, "--teacher openai:local-judge", 0),
    "a wrong key, escaped": (
        {"spelling": "unicode", "status": [401, "Incorrect key", "invalid_api_key", ""]},
        "",
        2,
    ),
    "faults, escaped": (
        {"spelling": "unicode", "faults": ["two-answers"], "mode": "always"},
        "",
        1,
    ),
    "its model": ({"models": [200, '{"data": [{"id": "KEY"}]}', ""]}, "", 2),
    "its models": ({"models": [200, '{"data": [{"id": "a"}, {"id": "of KEY"}]}', ""]}, "", 2),
}


@pytest.mark.parametrize("name", KEYED)
def test_the_key_is_in_no_file_and_in_nothing_said_even_if_the_server_repeats_it(
    server, name, capsys, tmp_path
):
    behaviour, more, code = KEYED[name]
    server.control(echo=True, **behaviour)
    assert (
        train.main(judged(server, *more.split(), "--out", tmp_path / "run", preset=SHORT)) == code
    )
    said = capsys.readouterr()
    assert KEY not in unescaped(said.out + said.err)
    files = everything_in(tmp_path)
    assert bool(files) == ("models" not in behaviour)
    assert [
        path for path, content in files.items() if KEY in unescaped(content.decode("latin-1"))
    ] == []


def unescaped(text):
    """A text without the escapes of JSON within JSON, however deep."""
    return re.sub(r"\\+u00([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text).replace(
        "\\", ""
    )

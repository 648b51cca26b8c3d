"""The preset `text` with a language model as judge or teacher: its numbers are those of what the
model said."""

import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
from scipy.optimize import minimize

import train
from experiments.judging import demonstrations
from helpers.games import EXACT
from helpers.judged_runs import (
    CENT,
    FIRST_BIAS,
    JUDGED,
    MARGIN,
    PROMPTS,
    RUNS,
    SHORT,
    K,
    asked,
    cost,
    groups_of,
    judged,
    shown,
    strictly,
)
from helpers.runs import rows
from helpers.server import blocks, quality
from helpers.text_runs import files_of, jsonl, policy_of, repeats
from world import CLASSES, HELD_OUT, classify, teacher_answer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("judges_key")]


ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point, by far less than this
SOLVER = 1e-6  # scipy's optimum


def points(text):
    return quality(shown(text))


def preference(y, z, form="scored"):
    """P(y > z) by the server's mind."""
    lead = points(y) - points(z)
    if form == "scored" or y == z:
        return 0.5 * (1 + (lead > 0) - (lead < 0)) * (y != z) + 0.5 * (y == z)
    there, back = (min(0.95, max(0.05, 0.5 + d / 16 + FIRST_BIAS)) for d in (lead, -lead))
    return (there + 1 - back) / 2


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
def test_a_judged_run_writes_the_files_of_a_text_run_with_its_own_columns(judged_run, name):
    """A judged run writes the files of a text run with its own columns and valid json."""
    out, _ = judged_run(name)
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    names -= {f"judgments.sqlite-{end}" for end in ("wal", "shm")}
    assert names == files_of(3) | {"judgments.sqlite"}
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
def test_win_rates_are_those_of_the_saved_policies_by_the_judges_mind(judged_run, name):
    """The interval by its formula, with prompts as clusters; the rate at equal length by scipy's
    optimum."""
    out, _ = judged_run(name)
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
def test_pairs_and_counts_follow_from_what_the_judge_thinks_of_the_responses(judged_run, name):
    """Win rates are means of P over the others of the group; a pair's lead by the margin or more;
    all by hand."""
    out, _ = judged_run(name)
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


def test_the_flip_rate_is_the_share_of_pairs_nearer_than_the_bias(judged_run):
    """In quality, first place is worth 16 * 0.1 = 1.6: verdicts flip with the order for a
    difference of 0 or 1."""
    out, _ = judged_run("pairwise")
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
    assert {row["flip_rate"] for row in rows(judged_run("scored")[0])} == {None}


def test_the_rule_of_scores_takes_positives_of_at_least_5_with_a_lead(judged_run):
    """The rule of scores takes positives of at least 5 with a lead of 2 or of 1 if the students."""
    out, _ = judged_run("points")
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


def test_algorithm_3_regresses_on_win_rates_by_the_judges_mind(judged_run):
    out, _ = judged_run("algorithm 3")
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
def test_requests_and_dollars_are_those_of_the_server_and_nothing_was_paid_twice(judged_run, name):
    out, stats = judged_run(name)
    last, summary = rows(out)[-1], json.loads((out / "summary.json").read_text())
    assert set(stats["paid"].values()) == {1}
    assert last["requests"] == summary["requests"] == stats["requests"] == len(stats["paid"])
    assert last["dollars"] == summary["dollars"] == pytest.approx(cost(stats), abs=CENT)


def test_a_run_that_is_done_asks_nothing_when_resumed(judged_run, server, capsys):
    out, _ = judged_run("scored")
    before = {path.name: path.read_bytes() for path in out.glob("*.jsonl")}
    server.control()
    assert train.main(judged(server, "--judgments", "probabilities", "--out", out, "--resume")) == 0
    assert server.stats()["requests"] == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.jsonl")} == before


def test_what_is_in_a_shared_cache_is_asked_once_and_not_charged_again(server, tmp_path):
    """What is in a cache that runs share is asked once and not charged to the second."""
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


def test_gold_responses_are_the_teachers_and_prompts_without_one_are_dropped(judged_run):
    """Every fourth question is refused six times, and then is not asked again."""
    out, _ = judged_run("taught")
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


def test_with_the_synthetic_judge_the_teacher_to_beat_is_the_one_who_teaches(server, tmp_path):
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

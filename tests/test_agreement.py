"""How far a judge can be trusted: intervals clustered by prompt, the win rate at equal length,
agreement with people beyond chance, cyclic triples, and `python -m experiments.agreement`. Expected
values are by hand, by brute force, or scipy's."""

import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from endpoint_server import quality, serving
from games import EXACT
from pages import PAGES, section
from pages import table as rows_of
from scipy.optimize import minimize
from scipy.stats import binomtest
from scipy.stats import t as student_t
from test_train import ROOT

from experiments.agreement import AgreementOptions, main, read_labels
from judge.statistics import (
    agreement,
    cohens_kappa,
    cyclic_triples,
    length_controlled,
    mean_interval,
    verdicts,
    win_rate_report,
)
from oracle import RegisterJudge
from world import PROMPTS, REGISTERS, topic

NAN = math.nan
TWO_CLUSTERS = math.tan(0.475 * math.pi)  # t with one degree of freedom
SOLVER = 1e-6  # scipy's optimum
SPREAD = 5  # standard deviations a mean of many draws may lie off; the seeds are fixed
PRINTED = 5e-4  # three digits after the point
FIRST_BIAS = 0.1  # by which the server prefers the first response, a change of 1.6 in quality


# --- Intervals ---


def test_the_clustered_interval_by_hand():
    """Mean 3/4; the clusters' sums of deviations are -1/2 and 1/2, so t sqrt(2 (1/4 + 1/4)) / 4.
    One degree of freedom is Cauchy's distribution, so t = tan(0.475 pi) = 12.7."""
    assert mean_interval(np.array([1.0, 0.0, 1.0, 1.0]), list("aabb")) == pytest.approx(
        (0.75, TWO_CLUSTERS / 4), abs=EXACT
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_clustered_interval_is_the_sandwich_of_a_regression_on_a_constant(seed):
    """(X'X)^-1 (sum_g X_g' u_g u_g' X_g) (X'X)^-1 G / (G - 1), as regression packages have it, with
    X a column of ones."""
    generator = np.random.default_rng(seed)
    values, clusters = generator.random(40), generator.integers(0, 9, 40)
    X, residuals = np.ones((40, 1)), values - values.mean()
    meat, bread = np.zeros((1, 1)), np.linalg.inv(X.T @ X)
    for g in set(clusters.tolist()):
        score = X[clusters == g].T @ residuals[clusters == g]
        meat += np.outer(score, score)
    G = len(set(clusters.tolist()))
    t = student_t.ppf(0.975, G - 1)
    half_width = t * math.sqrt((bread @ meat @ bread).item() * G / (G - 1))
    assert mean_interval(values, clusters) == pytest.approx((values.mean(), half_width), abs=EXACT)


def test_with_a_value_a_cluster_the_interval_is_the_classic_one():
    values = np.array([0.0, 1.0, 1.0, 0.5, 0.25])
    low, high = student_t.interval(0.95, 4, 0.55, values.std(ddof=1) / math.sqrt(5))
    for clusters in (list("abcde"), None):
        found = mean_interval(values, clusters)
        assert found == pytest.approx((0.55, (high - low) / 2), abs=EXACT)
    assert mean_interval(torch.tensor([*values, NAN])) == found


def test_saying_the_same_again_for_the_same_prompt_makes_no_interval_narrower():
    values, prompts = np.array([0.0, 1.0, 1.0, 0.5, 0.25]), np.arange(5)
    once, often = (
        mean_interval(values, prompts),
        mean_interval(values.repeat(7), prompts.repeat(7)),
    )
    assert often == pytest.approx(once, abs=EXACT)
    assert mean_interval(values.repeat(7), range(35))[1] < 0.5 * once[1], (
        "if they were independent it would be narrower"
    )


def test_the_clustered_interval_is_that_of_drawing_prompts_anew():
    """Two standard deviations of the mean of 60 clusters drawn with replacement, of 1 to 6
    dependent values each."""
    generator = np.random.default_rng(0)
    groups = [
        generator.normal() + 0.5 * generator.normal(size=generator.integers(1, 7))
        for _ in range(60)
    ]
    means = [
        np.concatenate([groups[g] for g in generator.integers(0, 60, 60)]).mean()
        for _ in range(4000)
    ]
    _, half_width = mean_interval(
        np.concatenate(groups), np.repeat(np.arange(60), [len(group) for group in groups])
    )
    assert half_width == pytest.approx(2.001 * np.std(means), rel=0.1)  # t_59


def test_what_was_not_judged_is_left_out_of_mean_and_interval():
    values, clusters = np.array([NAN, 1.0, 0.0, NAN, 1.0, 1.0]), ["c", "a", "a", "b", "b", "b"]
    assert mean_interval(values, clusters) == pytest.approx((0.75, TWO_CLUSTERS / 4), abs=EXACT)


def test_there_is_no_mean_of_nothing_and_no_interval_of_one_cluster():
    assert all(map(math.isnan, mean_interval(np.array([NAN, NAN]), list("ab"))))
    mean, half_width = mean_interval(np.array([1.0, 0.0, 1.0, NAN]), list("aaab"))
    assert mean == pytest.approx(2 / 3)
    assert math.isnan(half_width)


# --- The win rate at equal length ---


def at_equal_length(wins, lead):
    """sigma(theta) at scipy's maximum of log-likelihood - (theta^2 + phi^2)/200, P(win) =
    sigma(theta + phi tanh(d/std d))."""
    steps = np.tanh(lead / np.std(lead)) if np.std(lead) else 0 * lead

    def minus_log_posterior(w):
        score = w[0] + w[1] * steps
        return np.sum(np.logaddexp(0, score) - wins * score) + np.sum(w**2) / 200

    return 1 / (1 + math.exp(-minimize(minus_log_posterior, [0.0, 0.0], tol=1e-10).x[0]))


@pytest.mark.parametrize("n", [1, 2, 7, 50, 400])
@pytest.mark.parametrize("kind", ["outcomes", "probabilities", "all won", "by length", "no lead"])
def test_the_length_controlled_rate_is_the_maximum_of_the_penalised_likelihood(kind, n):
    generator = np.random.default_rng(n)
    lead = generator.integers(-30, 60, n).astype(float) * (kind != "no lead")
    wins = {
        "outcomes": generator.choice([0.0, 0.5, 1.0], n),
        "probabilities": generator.random(n),
        "all won": np.ones(n),
        "by length": (lead > 0) * 1.0,
        "no lead": generator.random(n),
    }[kind]
    assert length_controlled(wins, lead) == pytest.approx(at_equal_length(wins, lead), abs=SOLVER)


def test_a_length_controlled_win_rate_that_was_not_found_is_an_error(monkeypatch):
    monkeypatch.setattr(np.linalg, "solve", lambda A, b: 0 * b)  # so that it stays where it starts
    with pytest.raises(RuntimeError, match=r"Newton's method left a gradient of 1\.5e\+00"):
        length_controlled(np.ones(3), np.array([1.0, 0.0, -1.0]))  # 3 (1 - 1/2)


def test_where_length_plays_no_part_it_is_about_the_win_rate():
    generator = np.random.default_rng(0)
    lead, wins = generator.normal(size=4000), generator.choice([0.0, 1.0], 4000, p=[0.3, 0.7])
    assert length_controlled(wins, lead) == pytest.approx(wins.mean(), abs=0.005)
    assert length_controlled(wins, 0 * lead) == pytest.approx(wins.mean(), abs=1e-4)


def test_of_a_judge_that_rewards_nothing_but_length_it_is_a_half():
    """The longer wins four times in five: P = sigma(3 tanh(d / std d)), leads mostly positive."""
    lead = np.random.default_rng(0).normal(15.0, 10.0, 4000)
    wins = 1 / (1 + np.exp(-3 * np.tanh(lead / lead.std())))
    assert wins.mean() > 0.8
    assert length_controlled(wins, lead) == pytest.approx(0.5, abs=0.01)


def test_a_shorter_response_that_wins_in_spite_of_it_is_worth_more_at_equal_length():
    """P = sigma(1 + 2 tanh(d / std d)): at equal length sigma(1)."""
    lead = np.random.default_rng(0).normal(-15.0, 10.0, 4000)
    wins = 1 / (1 + np.exp(-1 - 2 * np.tanh(lead / lead.std())))
    assert wins.mean() < 0.5
    assert length_controlled(wins, lead) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)


def test_it_is_finite_if_all_win_and_grows_with_every_win_and_the_other_side_has_the_rest():
    lead, wins, rates = np.array([3.0, -2.0, 5.0, 1.0, -4.0, 0.0]), np.zeros(6), []
    for i in range(7):
        rates.append(length_controlled(wins, lead))
        assert length_controlled(1 - wins, -lead) == pytest.approx(1 - rates[-1], abs=EXACT)
        if i < 6:
            wins[i] = 1
    assert 0 < rates[0] < 0.1
    assert 0.9 < rates[-1] < 1
    assert all(later > earlier for earlier, later in itertools.pairwise(rates))


def test_at_equal_length_neither_the_unit_of_length_nor_what_was_not_judged_counts():
    generator = np.random.default_rng(1)
    lead, wins = generator.normal(size=30), generator.random(30)
    rate = length_controlled(wins, lead)
    assert length_controlled(wins, 100 * lead) == pytest.approx(rate, abs=EXACT)
    assert length_controlled(
        np.append(wins, [NAN, NAN]), np.append(lead, [50.0, -7.0])
    ) == pytest.approx(rate, abs=EXACT)
    assert math.isnan(length_controlled(np.array([NAN]), np.array([1.0])))


def test_the_report_of_a_win_rate_by_hand():
    wins, prompts, lead = (
        torch.tensor([1.0, 0.0, NAN, 1.0, 1.0]),
        ["a", "a", "b", "b", "b"],
        [3, -1, 100, 2, 2],
    )
    found = win_rate_report(wins.double(), prompts, lead)
    judged = np.array([1.0, 0.0, 1.0, 1.0]), np.array([3.0, -1.0, 2.0, 2.0])
    expected = {"win_rate": 0.75, "interval": TWO_CLUSTERS / 4, "n": 5, "n_parsed": 4}
    assert found == pytest.approx(
        {**expected, "length_controlled": at_equal_length(*judged)}, abs=SOLVER
    )


# --- Kappa ---


def test_kappa_by_hand_is_two_fifths():
    """Of 50 cases both say yes to 20 and no to 15, one alone says yes to 5, the other alone to 10:
    p_o is 0.7, p_e 0.5 * 0.6 + 0.5 * 0.4."""
    first, second = (
        ["yes"] * 25 + ["no"] * 25,
        ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15,
    )
    assert cohens_kappa(first, second) == pytest.approx(0.4, abs=EXACT)
    assert cohens_kappa(second, first) == pytest.approx(0.4, abs=EXACT)


def test_kappa_is_1_for_the_same_labels_0_for_independent_and_minus_1_for_opposite_ones():
    assert cohens_kappa("aabbt", "aabbt") == pytest.approx(1, abs=EXACT)
    # the first says a with 2/3, the second with 1/2, and both with 1/3
    assert cohens_kappa("aaaabb", "aabbab") == pytest.approx(0, abs=EXACT)
    assert cohens_kappa("ab", "ba") == pytest.approx(-1, abs=EXACT)
    assert math.isnan(cohens_kappa("aaa", "aaa"))
    assert cohens_kappa("aaa", "aab") == pytest.approx(0, abs=EXACT)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_of_three_labels_is_that_of_the_confusion_matrix(seed):
    generator = np.random.default_rng(seed)
    first, second = generator.integers(0, 3, 40), generator.integers(0, 3, 40)
    table = np.zeros((3, 3))
    np.add.at(table, (first, second), 1 / 40)
    chance = table.sum(0) @ table.sum(1)
    found = cohens_kappa(["abt"[i] for i in first], ["abt"[i] for i in second])
    assert found == pytest.approx((np.trace(table) - chance) / (1 - chance), abs=EXACT)


# --- Cyclic triples ---


def comparisons(P, prompt="x"):
    """(prompts, a, b, P) of {(y, z): P(y > z)}."""
    return [prompt] * len(P), [y for y, _ in P], [z for _, z in P], list(P.values())


def joined(parts):
    return [
        [value for column in columns for value in column] for columns in zip(*parts, strict=True)
    ]


def test_rock_paper_scissors_is_cyclic_and_an_order_is_not():
    assert cyclic_triples(*comparisons({"rs": 1.0, "sp": 0.6, "pr": 0.9})) == (1, 1)
    turned = comparisons({"rs": 1.0, "sp": 0.6, "rp": 0.1})  # one pair in the other order
    assert cyclic_triples(*turned) == (1, 1)
    assert cyclic_triples(*comparisons({"rs": 1.0, "sp": 0.6, "rp": 0.9})) == (0, 1)


def test_of_the_8_tournaments_of_three_2_are_cyclic():
    found = [
        cyclic_triples(*comparisons(dict(zip(("ab", "bc", "ca"), P, strict=True))))
        for P in itertools.product((0.0, 1.0), repeat=3)
    ]
    assert sorted(found) == [(0, 1)] * 6 + [(1, 1)] * 2


@pytest.mark.parametrize("undecided", [0.5, NAN])
def test_a_triple_with_a_tie_or_without_an_answer_does_not_count(undecided):
    assert cyclic_triples(*comparisons({"rs": 1.0, "sp": 1.0, "pr": undecided})) == (0, 0)
    assert cyclic_triples(*comparisons({"rs": 1.0, "sp": 1.0})) == (0, 0)


def test_responses_to_different_prompts_make_no_triple():
    parts = [
        comparisons({pair: 1.0}, prompt) for pair, prompt in (("rs", "x"), ("sp", "x"), ("pr", "z"))
    ]
    assert cyclic_triples(*joined(parts)) == (0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_cyclic_triples_of_a_partly_decided_tournament_are_those_that_powers_of_its_matrix_count(
    seed,
):
    """A directed triangle is 3 closed walks of length 3, an undirected one 6."""
    generator = np.random.default_rng(seed)
    names, won = [f"y{i}" for i in range(9)], np.zeros((9, 9), dtype=int)
    P = {}
    for i, j in itertools.combinations(range(9), 2):
        p = generator.choice([0.0, 0.3, 0.5, 0.9, NAN])
        P[names[i], names[j]] = p
        won[i, j], won[j, i] = p > 0.5, p < 0.5
    decided = won + won.T
    expected = np.trace(won @ won @ won) // 3, np.trace(decided @ decided @ decided) // 6
    assert cyclic_triples(*comparisons(P)) == expected
    assert expected[0] > 0


def test_of_a_judge_that_tosses_a_coin_a_quarter_of_the_triples_is_cyclic():
    """Of a random tournament: triples are pairwise uncorrelated, so their number has variance n *
    3/16."""
    draw, parts = random.Random(0), []
    for prompt in range(20):
        P = {
            (f"{i}", f"{j}"): float(draw.random() < 0.5)
            for i, j in itertools.combinations(range(10), 2)
        }
        parts.append(comparisons(P, f"{prompt}"))
    cyclic, total = cyclic_triples(*joined(parts))
    assert total == 20 * 120
    assert abs(cyclic / total - 1 / 4) < SPREAD * math.sqrt(3 / 16 / total)


def test_every_triple_of_the_three_registers_is_cyclic_to_every_prompt():
    """By hand P(concise > vivid), P(vivid > precise), P(precise > concise) are below 1/2, or all
    above, by the verb."""
    columns = [[], [], []]
    for prompt in PROMPTS:
        answers = [
            register.write(topic(prompt), random.Random(0)) for register in REGISTERS.values()
        ]
        for a, b in itertools.combinations(answers, 2):
            for column, value in zip(columns, (prompt, a, b), strict=True):
                column.append(value)
    assert cyclic_triples(*columns, RegisterJudge().prefer(*columns).tolist()) == (
        len(PROMPTS),
        len(PROMPTS),
    )


# --- Agreement with people ---


def test_verdicts_by_hand():
    assert verdicts([1.0, 0.51, 0.5, 0.49, 0.0, NAN]) == ["a", "a", "tie", "b", "b", "none"]


def item(prompt, a, b, label, **more):
    return {"prompt": prompt, "a": a, "b": b, "label": label, **more}


ITEMS = [  # and P(a > b) of a judge
    (item("x", "rock", "scissors", "a"), 1.0),
    (item("x", "scissors", "paper", "b"), 0.75),
    (item("x", "paper", "rock", "a"), 0.6),
    (item("z", "one", "fourteen", "tie"), 0.5),
    (item("z", "one", "two", "a"), 0.25),
    (item("z", "one", "eleven", "b"), NAN),
    (item("z", "seven", "six", "a"), 1.0),
]
BY_HAND = {
    "n": 7,
    "n_parsed": 6,
    "agreement": 2 / 3,
    "interval": 0,
    "kappa": (2 / 3 - 1 / 2) / (1 - 1 / 2),
    "flip_rate": None,
    "longer_wins": 3 / 4,
    "longer_wins_people": 2 / 4,
    "triples": 1,
    "cyclic": 1.0,
    "cyclic_p_value": 0.25,
}


def test_agreement_of_a_small_file_by_hand():
    """Same verdict in items 1, 3, 4 and 7 of the six judged. Deviations from 2/3 sum to 0 over each
    prompt's three, so the interval is 0. Judge: a 4, b 1, tie 1; people: a 4, b 1, tie 1: p_e = (16
    + 1 + 1)/36 = 1/2. Of different length and decided by the judge: items 1 (longer lost), 2 (won),
    3 (won), 7 (won); by people: 1 (lost), 2 (lost), 3 (won), 7 (won)."""
    items, P = map(list, zip(*ITEMS, strict=True))
    found = agreement(items, P, 0.125)
    assert found == pytest.approx({**BY_HAND, "flip_rate": 0.125}, abs=EXACT)


def test_a_failed_judgment_is_no_label_and_changes_nothing_but_n():
    items, P = map(list, zip(*ITEMS, strict=True))
    with_it, without = agreement(items, P), agreement(items[:5] + items[6:], P[:5] + P[6:])
    assert (with_it.pop("n"), without.pop("n")) == (7, 6)
    assert with_it == pytest.approx(without, abs=EXACT)


def test_of_no_judgment_at_all_nothing_is_claimed():
    found = agreement([items for items, _ in ITEMS], [NAN] * 7)
    assert (found["n"], found["n_parsed"], found["triples"]) == (7, 0, 0)
    assert all(math.isnan(found[name]) for name in ("agreement", "interval", "kappa"))
    assert (
        found["longer_wins"]
        is found["longer_wins_people"]
        is found["cyclic"]
        is found["cyclic_p_value"]
        is None
    )


@pytest.mark.parametrize(("cyclic", "total"), [(0, 3), (1, 4), (5, 8), (6, 6)])
def test_the_p_value_is_the_chance_of_what_is_as_unlikely_for_a_coin(cyclic, total):
    """By adding up the binomial terms that are not larger than the one found, and by scipy."""
    parts = [
        comparisons({"rs": 1.0, "sp": 1.0, "pr": float(i < cyclic)}, f"{i}") for i in range(total)
    ]
    prompts, a, b, P = joined(parts)
    found = agreement([item(x, y, z, "a") for x, y, z in zip(prompts, a, b, strict=True)], P)
    chances = [math.comb(total, k) * 0.25**k * 0.75 ** (total - k) for k in range(total + 1)]
    by_hand = sum(chance for chance in chances if chance <= chances[cyclic] * (1 + 1e-7))
    assert (found["cyclic"], found["triples"]) == (cyclic / total, total)
    assert found["cyclic_p_value"] == pytest.approx(by_hand, abs=EXACT)
    assert found["cyclic_p_value"] == pytest.approx(
        binomtest(cyclic, total, 0.25).pvalue, abs=EXACT
    )


# --- Files of labels ---

GOOD = item("x", "yes", "no", "a")


def written(path, *lines):
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def test_labels_are_read_with_what_the_judge_said_if_it_is_there(tmp_path):
    lines = [
        GOOD,
        {**GOOD, "label": "tie", "judge": 0.25},
        {**GOOD, "label": "b", "judge": 1, "by": "someone"},
    ]
    lines.append({**GOOD, "judge": 0})
    assert read_labels(written(tmp_path / "labels.jsonl", *lines)) == lines


def test_blank_lines_and_a_mark_of_the_byte_order_do_not_count(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps(GOOD).encode() + b"\r\n \n\n" + json.dumps(GOOD).encode()
    )
    assert read_labels(path) == [GOOD, GOOD]
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode() + b"\n\n{")
    with pytest.raises(ValueError, match="line 4 is"):
        read_labels(path)


def test_a_text_may_hold_any_character_that_json_allows_in_a_line(tmp_path):
    """Among them U+2028, which is a line break to Unicode and none to JSON."""
    line = {**GOOD, "a": "one\u2028two\x85three"}
    assert read_labels(
        written(tmp_path / "labels.jsonl", GOOD, json.dumps(line, ensure_ascii=False))
    ) == [GOOD, line]


BAD_LINES = {
    "no JSON": "{",
    "deep lists": "[" * 100_000,
    "a list": "[]",
    "a number": "1",
    "another label": {**GOOD, "label": "A"},
    "labels in a list": {**GOOD, "label": ["a"]},
    "a number as text": {**GOOD, "a": 3},
    "a judge of 2": {**GOOD, "judge": 2},
    "a judge that is a text": {**GOOD, "judge": "a"},
    "a judge that is NaN": {**GOOD, "judge": NAN},
    **{f"no {name}": {key: value for key, value in GOOD.items() if key != name} for name in GOOD},
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_the_first_bad_line_of_a_file_is_named(line, tmp_path):
    path = written(tmp_path / "labels.jsonl", GOOD, GOOD, line, "{{")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3 is")):
        read_labels(path)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        read_labels(written(tmp_path / "labels.jsonl"))


# --- The command line ---


@pytest.fixture(scope="module")
def server():
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """A folder of one's own to run in, and a key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-these-tests")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def command(*arguments):
    return main([*map(str, arguments)])


def table(capsys):
    """The printed numbers by name, with None for a dash."""
    found = re.findall(r"^(\w+) +(-|nan|[\d.-]+)$", capsys.readouterr().out, re.M)
    return {name: None if value == "-" else float(value) for name, value in found}


def is_figure(path):
    content = path.read_bytes()
    return content.startswith(b"\x89PNG") and len(content) > 5000


def test_recorded_answers_are_compared_without_asking_anybody(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    lines = [line if math.isnan(p) else {**line, "judge": p} for line, p in ITEMS]
    assert command(written(tmp_path / "labels.jsonl", *lines)) == 0
    assert table(capsys) == pytest.approx(BY_HAND, abs=PRINTED)
    assert is_figure(tmp_path / "runs" / "agreement" / "agreement.png")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.jsonl", "runs"}


def two(number):
    return f"{number:.2f}".replace("-", "\N{MINUS SIGN}")


def test_the_table_in_docs_is_what_its_commands_print(capsys, monkeypatch, tmp_path):
    """They stand above it, in the order of its rows."""
    (tmp_path / "recordings").symlink_to(ROOT / "recordings")
    page = "docs/judges.md"
    block = section(page, "## Is the judge any good?").split("```\n")[1]
    rows = rows_of(PAGES[page], "| | agreement |")
    assert len(rows) == 3
    for (name, *cells), line in zip(rows, block.splitlines(), strict=True):
        assert name.strip("`") in line
        assert command(*line.split()[3:]) == 0
        found = table(capsys)
        share, p = found["cyclic"], found["cyclic_p_value"]
        cyclic = f"{two(share) if share else 0} of {found['triples']:.0f}"
        assert cells == [
            f"{found['agreement']:.3f} ± {found['interval']:.3f}",
            two(found["kappa"]),
            "" if found["flip_rate"] is None else two(found["flip_rate"]),
            f"{two(found['longer_wins'])}; {two(found['longer_wins_people'])}",
            cyclic if p > 0.5 else f"{cyclic} (p = {two(p)})",
            f"{found['n_parsed']:.0f} of {found['n']:.0f}",
        ]


def test_the_figure_is_drawn_in_the_folder_or_file_that_was_named(tmp_path):
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    assert command(labels, "--out", "there") == command(labels, "--figure", "here.PNG") == 0
    assert is_figure(tmp_path / "there" / "agreement.png")
    assert is_figure(tmp_path / "here.PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"labels.jsonl", "there", "here.PNG"}


@pytest.mark.parametrize(
    "options", [("--figure", "folder.png"), ("--out", "labels.jsonl"), ("--out", "/proc/none")]
)
def test_where_no_figure_can_be_nobody_is_asked(options, server, capsys, tmp_path):
    server.control()
    (tmp_path / "folder.png").mkdir()
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    assert "cannot be written" in refused(capsys, labels, *options)
    said = refused(capsys, labels, *options, *asking(server))
    assert re.search("cannot be written|is no folder that can be written to", said)
    assert server.stats()["requests"] == 0


def test_where_the_price_is_not_known_no_dollars_are_told(server, capsys, tmp_path):
    server.control()
    assert command(written(tmp_path / "labels.jsonl", *LABELS), "--judge-url", server.url) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("asked: "))
    assert line.endswith("failed 0, price not known")
    assert "dollars" not in line
    assert "None" not in line


def test_the_agreement_with_labels_drawn_from_the_judge_is_the_mean_larger_probability(
    capsys, tmp_path
):
    """E max(p, 1 - p); it is 1 for people who always take the likelier response."""
    draw, judge = random.Random(0), RegisterJudge()
    prompts = draw.choices(PROMPTS, k=1500)
    texts = [
        [register.write(topic(x), draw) for register in draw.sample(list(REGISTERS.values()), 2)]
        for x in prompts
    ]
    P = judge.prefer(prompts, *zip(*texts, strict=True)).tolist()
    drawn = [
        item(x, a, b, "a" if draw.random() < p else "b")
        for x, (a, b), p in zip(prompts, texts, P, strict=True)
    ]
    likelier = [
        {**line, "label": "a" if p > 0.5 else "b"} for line, p in zip(drawn, P, strict=True)
    ]
    for lines, expected in ((drawn, sum(max(p, 1 - p) for p in P) / 1500), (likelier, 1)):
        assert command(written(tmp_path / "labels.jsonl", *lines), "--oracle", "synthetic") == 0
        found = table(capsys)
        assert found["agreement"] == pytest.approx(
            expected, abs=SPREAD * math.sqrt(expected * (1 - expected) / 1500) + PRINTED
        )
        assert found["n"] == found["n_parsed"] == 1500


TEXTS = ["worth 6", "worth 5", "worth 2", "worth 2, as it is", "worth 0"]
LABELS = [
    item("Describe the sea.", a, b, "a" if quality(a) > quality(b) else "b")
    for a, b in itertools.permutations(TEXTS, 2)
]


def asking(server, *arguments):
    return "--judge-url", server.url, "--judge-prices", "10,30", *arguments


def test_a_judge_that_gives_scores_is_asked_once_for_all_responses_to_a_prompt(
    server, capsys, tmp_path
):
    """Two of the 20 comparisons are ties to it; to people, who had no such label, b was better."""
    server.control()
    assert command(written(tmp_path / "labels.jsonl", *LABELS), *asking(server)) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"], said["flip_rate"]) == (20, 20, None)
    assert said["agreement"] == pytest.approx(18 / 20, abs=PRINTED)
    assert (said["triples"], said["cyclic"]) == (math.comb(5, 3) - 3, 0)  # three contain the tie
    assert server.stats()["requests"] == 1


def test_a_judge_of_pairs_is_asked_in_both_orders_and_the_flip_rate_told(server, capsys, tmp_path):
    """First place is worth 1.6 in quality: of the ten pairs the tie and the one that differs by 1
    flip. The mean of both orders has no such bias, and decides the others by quality."""
    server.control(first_bias=FIRST_BIAS)
    assert (
        command(
            written(tmp_path / "labels.jsonl", *LABELS), *asking(server, "--judge-form", "pairwise")
        )
        == 0
    )
    said = table(capsys)
    assert said["flip_rate"] == pytest.approx(2 / 10, abs=PRINTED)
    assert said["agreement"] == pytest.approx(18 / 20, abs=PRINTED)
    assert server.stats()["requests"] == 20
    assert set(server.stats()["paid"].values()) == {1}
    assert is_figure(tmp_path / "runs" / "agreement" / "agreement.png")


def test_asked_again_it_answers_from_its_cache_and_also_without_server_and_key(
    server, capsys, tmp_path, monkeypatch
):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    found, live = [], asking(server, "--out", "judged")
    for more in (live, live, ("--oracle", "replay:judged/judgments.sqlite")):
        assert command(labels, *more) == 0
        assert server.stats()["requests"] == 1
        found.append(table(capsys))
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert found[1:] == [pytest.approx(found[0], abs=0, nan_ok=True)] * 2


APART = [
    item("Describe the sea.", f"worth {i}", f"worth {j}", "a") for i, j in ((6, 1), (5, 2), (4, 3))
]  # no text twice
MODES = [("scored", LABELS), ("pairwise", LABELS), ("scored", APART), ("pairwise", APART)]


@pytest.mark.parametrize(
    ("form", "lines"), MODES, ids=["scored", "pairwise", "scored, apart", "pairwise, apart"]
)
def test_a_dry_run_says_how_many_requests_will_be_sent_and_sends_and_writes_nothing(
    server, form, lines, capsys, tmp_path
):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *lines)
    assert command(labels, *asking(server, "--judge-form", form, "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"judge: local-judge at {server.url} ($10 and $30 a million tokens)" in said
    requests, dollars = re.search(r"to be asked: (\d+) requests.*\$([\d.]+) at most", said).groups()
    assert server.stats()["requests"] == 0
    assert list(tmp_path.iterdir()) == [labels]
    assert command(labels, *asking(server, "--judge-form", form)) == 0
    sent = server.stats()
    assert sent["requests"] == int(requests)
    cost = sent["tokens"][0] * 10e-6 + sent["tokens"][1] * 30e-6
    assert cost <= float(dollars) + 0.005  # the plan tells dollars in cents


def test_a_dry_run_says_what_is_left_to_ask(server, capsys, tmp_path):
    server.control()
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    assert command(labels, *asking(server, "--out", "judged")) == 0
    assert command(labels, *asking(server, "--out", "judged", "--dry-run")) == 0
    assert "to be asked: 0 requests" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--oracle", "synthetic")], ids=["recorded", "synthetic"])
def test_a_dry_run_writes_nothing_also_where_nobody_is_to_be_asked(options, tmp_path):
    line = item("Describe the sea.", "In short, the sea is old yet calm.", "no", "a", judge=1.0)
    labels = written(tmp_path / "labels.jsonl", line)
    assert command(labels, *options, "--dry-run") == 0
    assert list(tmp_path.iterdir()) == [labels]


def test_judgments_that_failed_are_told_and_are_no_labels(server, capsys, tmp_path):
    """The questions on the text "worth 0" are filtered: 12 of 20 comparisons are left, of which two
    are ties."""
    server.control(filters="worth 0")
    options = asking(server, "--judge-form", "pairwise", "--max-failed", "1")
    assert command(written(tmp_path / "labels.jsonl", *LABELS), *options) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"], said["triples"]) == (20, 12, math.comb(4, 3) - 2)
    assert said["agreement"] == pytest.approx(10 / 12, abs=PRINTED)


def test_too_many_failures_are_exit_code_1_and_the_limit_of_dollars_130_with_one_line_and_no_figure(
    server, capsys, tmp_path
):
    labels = written(tmp_path / "labels.jsonl", *LABELS)
    for behaviour, more, code, message in (
        ({"filters": "worth 0"}, (), 1, "have no full answer"),
        ({}, ("--max-usd", 0.03), 130, "stopped below the limit of $0.03"),
    ):
        server.control(**behaviour)
        assert (
            command(
                labels, *asking(server, "--judge-form", "pairwise", "--out", f"exits-{code}", *more)
            )
            == code
        )
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert message in line
        assert not list(tmp_path.rglob("*.png"))
    tokens = server.stats()["tokens"]
    assert 0 < tokens[0] * 10e-6 + tokens[1] * 30e-6 <= 0.03


def refused(capsys, *arguments):
    """The one line on stderr with which the command refuses the arguments."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "expected FILE.jsonl"),
        ("--dry-run", "expected FILE.jsonl"),
        ("agreement labels.jsonl", "unrecognized arguments: labels.jsonl"),
        ("labels.jsonl --margin 1", "unrecognized arguments: --margin"),
        ("labels.jsonl --oracle gpt-4", "oracle is 'gpt-4'"),
        ("labels.jsonl --oracle openai:", "oracle is 'openai:'; the model's name is missing"),
        ("labels.jsonl --oracle openai", "the model's name is missing, and OpenAI has many"),
        ("labels.jsonl --max-usd 3", "max-usd belongs to a language model"),
        (
            "labels.jsonl --oracle openai:local-judge --max-usd 3",
            "the price of 'local-judge' is not known",
        ),
        ("labels.jsonl --oracle replay:nothing.sqlite", "nothing.sqlite cannot be used as a cache"),
        ("labels.jsonl --oracle synthetic", "prompt 'x' is not of this world"),
        ("missing.jsonl", "missing.jsonl"),
        ("broken.jsonl", "broken.jsonl, line 2 is '{'"),
        ("labels.jsonl --figure missing/agreement.png", "missing/agreement.png"),
        (
            "labels.jsonl --figure agreement.xyz",
            "agreement.xyz; expected a name that ends with one of",
        ),
        ("labels.jsonl --figure agreement", "expected a name that ends with one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path):
    written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0})
    written(tmp_path / "broken.jsonl", GOOD, "{")
    before = sorted(tmp_path.iterdir())
    assert message in refused(capsys, *arguments.split())
    assert sorted(tmp_path.iterdir()) == before


def test_a_recorded_judge_of_null_is_no_judgment(capsys, tmp_path):
    labels = written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0}, {**GOOD, "judge": None})
    assert command(labels) == 0
    said = table(capsys)
    assert (said["n"], said["n_parsed"]) == (2, 1)


def test_a_file_without_recorded_answers_needs_a_judge(capsys, tmp_path):
    written(tmp_path / "labels.jsonl", GOOD)
    assert "judge" in refused(capsys, "labels.jsonl")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    assert "usage: python -m experiments.agreement FILE.jsonl" in said
    assert {"--" + field.name.replace("_", "-") for field in fields(AgreementOptions)} <= set(
        re.findall(r"--[\w-]+", said)
    )


def as_a_command(*arguments):
    program = [sys.executable, "-m", "experiments.agreement"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*program, *map(str, arguments)], env=environment, capture_output=True)


def test_as_a_command_it_exits_with_its_code(tmp_path):
    done = as_a_command(written(tmp_path / "labels.jsonl", {**GOOD, "judge": 1.0}), "--sceptical")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"experiments.agreement: unrecognized arguments: --sceptical")


def test_a_replay_leaves_the_folder_of_the_cache_as_it_was(server, tmp_path):
    """A cache may lie where nothing can be written."""
    server.control()
    labels, cache = (
        written(tmp_path / "labels.jsonl", *LABELS),
        tmp_path / "recorded" / "cache.sqlite",
    )
    assert as_a_command(labels, *asking(server, "--judge-cache", cache)).returncode == 0
    before = {path.name: path.read_bytes() for path in cache.parent.iterdir()}
    assert before.keys() == {cache.name}
    assert as_a_command(labels, "--oracle", f"replay:{cache}").returncode == 0
    assert {path.name: path.read_bytes() for path in cache.parent.iterdir()} == before

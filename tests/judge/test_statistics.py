"""Intervals clustered by prompt, the win rate at equal length, kappa, cyclic triples: by hand,
by brute force, or scipy's."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import t as student_t

from helpers.agreement import NAN, SPREAD, comparisons, joined
from helpers.games import EXACT
from judge.statistics import (
    cohens_kappa,
    cyclic_triples,
    length_controlled,
    mean_interval,
    win_rate_report,
)
from oracle import RegisterJudge
from world import PROMPTS, REGISTERS, topic

TWO_CLUSTERS = math.tan(0.475 * math.pi)  # t with one degree of freedom
SOLVER = 1e-6  # scipy's optimum


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


def test_it_is_finite_if_all_win_and_grows_with_every_win():
    """It is finite if all win and grows with every win and the other side has the rest."""
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


def test_kappa_is_1_for_the_same_labels_and_minus_1_for_opposite_ones():
    """Kappa is 1 for the same labels 0 for independent and minus 1 for opposite ones."""
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
def test_cyclic_triples_are_those_that_powers_of_the_matrix_count(seed):
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

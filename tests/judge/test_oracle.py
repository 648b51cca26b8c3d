"""Oracles: the tables' constructors, and the conformance check that suits any oracle."""

import math

import numpy as np
import pytest
import torch

import dno
from helpers.games import EXACT, GAMES, games
from oracle import (
    PreferenceTable,
    _skew,
    bradley_terry,
    check_oracle,
    random_feature_game,
    random_game,
    response_styles,
    rock_paper_scissors,
    style_game,
)


@games
def test_tables_conform_to_the_oracle_protocol(P):
    check_oracle(PreferenceTable(P), torch.arange(len(P)), torch.arange(P.shape[1])[:6])


class TextJudge:
    """A text oracle for the check: the share of the letter "e", with hooks to misbehave."""

    complementary = deterministic = True

    def prefer(self, prompts, a, b):
        score = [[(text.count("e") + 1) / (len(text) + 1) for text in texts] for texts in (a, b)]
        first, second = torch.tensor(score)
        return torch.sigmoid(3 * (first - second))

    def win_rates(self, prompt, responses):
        n = len(responses)
        rates = [
            self.prefer(
                [prompt] * (n - 1),
                [response] * (n - 1),
                [other for j, other in enumerate(responses) if j != i],
            ).mean()
            for i, response in enumerate(responses)
        ]
        return torch.stack(rates)


EXPONENTS = iter([1.0] + [1.01] * 1000)  # answers change after the first question
TEXTS = (["say e", "say o"], ["eee", "ooo", "e o", ""])


def test_a_text_oracle_conforms_too():
    check_oracle(TextJudge(), *TEXTS)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda self, x, a, b: 2 * TextJudge.prefer(self, x, a, b), "probabilities in"),
        (lambda self, x, a, b: TextJudge.prefer(self, x, a, b) * float("nan"), "probabilities in"),
        (lambda self, x, a, b: 0.9 * TextJudge.prefer(self, x, a, b), "off 1"),
        (lambda self, x, a, b: torch.full((len(a),), 0.5 if len(a) > 1 else 0.6), "one by one"),
        (lambda self, x, a, b: TextJudge.prefer(self, x, a, b) ** next(EXPONENTS), "asked again"),
    ],
)
def test_each_broken_promise_is_named(broken, message):
    judge = type("Broken", (TextJudge,), {"prefer": broken})()
    with pytest.raises(ValueError, match=message):
        check_oracle(judge, *TEXTS)


def test_wrong_win_rates_are_named():
    judge = type(
        "Broken",
        (TextJudge,),
        {"win_rates": lambda self, x, ys: TextJudge.win_rates(self, x, ys).flip(0)},
    )()
    with pytest.raises(ValueError, match="win_rates"):
        check_oracle(judge, *TEXTS)


class SquareTable:
    """The oracle of P [n, n] for one prompt, be it a preference function or not, with rates as its
    win rates."""

    complementary = deterministic = True

    def __init__(self, answers, rates):
        self.answers, self.rates, self.calls = answers, rates, 0

    def prefer(self, prompts, a, b):
        self.calls += 1
        return self.answers(self.calls)[torch.tensor(a), torch.tensor(b)]

    def win_rates(self, prompt, responses):
        return self.rates


@pytest.mark.parametrize(
    ("error", "fine"), [(0.9e-5, True), (1.1e-5, False), (-1.1e-5, False), (0.01, False)]
)
def test_one_answer_that_is_off_is_enough_and_rounding_is_not_off(error, fine):
    """Of the sum of two orders, of a second answer, and of a mean over the others; every other
    answer is as it should be."""
    P = random_game(1, 3, seed=0).P[0]
    off, rates = P.clone(), (P.sum(1) - P.diagonal()) / 2
    off[0, 2] += error
    off_rates = (off.sum(1) - off.diagonal()) / 2
    for oracle, message in (
        (SquareTable(lambda call: off, off_rates), "off 1"),
        (
            SquareTable(lambda call: off if call == 2 + 2 else P, rates),
            "one by one",
        ),  # after a call with all nine
        (
            SquareTable(lambda call: off if call == 2 + 9 else P, rates),
            "asked again",
        ),  # (0, 2) is the third
        (SquareTable(lambda call: P, rates + torch.tensor([0.0, error, 0.0])), "win_rates"),
    ):
        if fine:
            check_oracle(oracle, ["x"], [0, 1, 2])
        else:
            with pytest.raises(ValueError, match=message):
                check_oracle(oracle, ["x"], [0, 1, 2])


def test_a_table_promises_to_be_complementary_and_deterministic_in_float64():
    for oracle in (rock_paper_scissors(), bradley_terry(torch.tensor([[0.0, 1.0]]))):
        assert oracle.complementary is oracle.deterministic is True
        assert oracle.P.dtype == torch.float64


def test_an_oracle_that_looks_at_the_order_passes_if_it_says_so():
    def prefer(self, x, a, b):
        return (0.1 + TextJudge.prefer(self, x, a, b)).clamp(max=1)

    check_oracle(type("First", (TextJudge,), {"prefer": prefer, "complementary": False})(), *TEXTS)


def test_prefer_and_win_rates_of_a_table_by_hand():
    oracle = rock_paper_scissors(0.4, 0.3, 0.2)
    ask = oracle.prefer(
        torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    )
    assert ask.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert oracle.win_rates(0, torch.tensor([0, 1, 2])).tolist() == pytest.approx([0.6, 0.45, 0.45])
    assert oracle.win_rates(0, torch.tensor([0, 0, 1])).tolist() == pytest.approx(
        [0.7, 0.7, 0.1]
    )  # a copy is worth 1/2


def test_bradley_terry_tables_are_the_sigmoid_of_reward_differences():
    P = bradley_terry(torch.tensor([[0.0, 1.0, -2.0]])).P
    assert float(P[0, 1, 2]) == pytest.approx(float(torch.sigmoid(torch.tensor(3.0))), abs=1e-7)


def small_style_game(prompts, responses, seed):
    return style_game(prompts, responses, 1, seed)


@pytest.mark.parametrize("make", [random_game, random_feature_game, small_style_game])
def test_random_games_differ_by_seed_and_prompt_and_repeat(make):
    P = make(2, 8, seed=0).P
    assert torch.equal(P, make(2, 8, seed=0).P)
    assert not torch.equal(P, make(2, 8, seed=1).P)
    assert not torch.equal(P[0], P[1])


def test_every_pair_of_a_random_game_is_uniform_on_0_to_1():
    """Mean 1/2, variance 1/12 of each of the 6 pairs, of 4,000 prompts: 5 standard deviations,
    sqrt(1/12n) and sqrt(1/180n)."""
    P, n = random_game(4000, 4, seed=0).P, 4000
    i, j = torch.triu_indices(4, 4, 1)
    assert ((P[:, i, j].mean(0) - 1 / 2).abs() < 5 * (1 / 12 / n) ** 0.5).all()
    assert ((P[:, i, j].var(0) - 1 / 12).abs() < 5 * (1 / 180 / n) ** 0.5).all()


def test_entries_above_the_diagonal_of_a_skew_matrix_are_standard_normal():
    """Of 4,000 matrices, to 5 standard deviations: sqrt(1/n) for means, sqrt(2/n) for variances."""
    A, n = _skew(4000, 4, torch.Generator().manual_seed(0)), 4000
    i, j = torch.triu_indices(4, 4, 1)
    assert torch.equal(A, -A.mT)
    assert (A[:, i, j].mean(0).abs() < 5 * (1 / n) ** 0.5).all()
    assert ((A[:, i, j].var(0) - 1).abs() < 5 * (2 / n) ** 0.5).all()


def test_a_feature_game_has_rank_8_and_logits_of_variance_7():
    """56 products of normal features and entries of variance 1/8; 200 responses, 50 prompts; over
    20 seeds it is 6.6 to 7.3."""
    logits = random_feature_game(50, 200, seed=0).P.logit()
    i, j = torch.triu_indices(200, 200, 1)
    assert float((logits[:, i, j] ** 2).mean()) == pytest.approx(7, rel=0.15)
    few = random_feature_game(3, 12, seed=1).P.logit()
    assert np.linalg.matrix_rank(few.numpy(), rtol=1e-9).tolist() == [8, 8, 8]


def test_most_random_games_are_intransitive():
    """Their Nash policies mix: no Condorcet winner. Of the small ones some have one."""
    mixed = [
        bool((dno.nash(param.values[0]) > 1e-6).sum(-1).max() > 1)
        for param in GAMES
        if param.values[0].shape[1] >= 5
    ]
    assert sum(mixed) >= 0.8 * len(mixed)


def test_response_styles_are_the_mean_leanings_of_the_words():
    styles = response_styles(
        vocabulary=4, length=2
    )  # words lean (1,0,0), (0,1,0), (0,0,1), (1/2,0,0)
    assert styles.shape == (16, 3)
    assert styles[0].tolist() == [1, 0, 0]
    assert styles[0 * 4 + 1].tolist() == [0.5, 0.5, 0]
    assert styles[2 * 4 + 3].tolist() == [0.25, 0, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_the_default_game_has_mixed_nash_policies_that_differ_by_prompt(seed):
    """The default game has mixed Nash policies that differ by prompt and are far from uniform."""
    P = style_game(8, 6, 3, seed).P
    pi = dno.nash(P)
    support = (pi > 1e-6).sum(-1)
    assert support.min() >= 3
    assert support.max() <= 40
    assert all(float((pi[x] - pi[y]).abs().sum()) > 0.1 for x in range(8) for y in range(x))
    assert dno.duality_gap(P, torch.full_like(pi, 1 / 216)) > 0.4


def test_the_default_game_follows_its_formula():
    """Two one-word responses of full strength to styles 1 and 2: the cycle favours the first; equal
    strength, so only the noise of weight 0.3 is beside it. And a strong word beats the weak one of
    its style by 4 times half a leaning."""
    P = style_game(200, 6, 1, seed=0).P
    for winner, loser in ((0, 1), (1, 2), (2, 0)):
        logit = P[:, winner, loser].logit()
        assert float(logit.mean()) == pytest.approx(
            4, abs=0.6
        )  # mean strength 4, 200 prompts of log-normal spread 0.8
        assert float((logit > 0).double().mean()) > 0.95
    assert float(P[:, 0, 3].logit().mean()) == pytest.approx(2, abs=0.1)
    assert P.logit().isfinite().all()
    assert abs(float(P.mean()) - 0.5) < EXACT


def test_the_strengths_of_the_default_games_cycle_are_log_normal_of_spread_0_8():
    """The logarithm of two strengths' ratio is normal of standard deviation 0.8 sqrt(2), whose
    quartile is 0.763: a quarter of the prompts has a first strength more than e^0.763 times the
    second; 4,000 of them, 5 standard deviations and the noise."""
    P = style_game(4000, 3, 1, seed=0).P
    first, second = P[:, 0, 1].logit(), P[:, 1, 2].logit()
    more = float((first > math.exp(0.763) * second).double().mean())
    assert more == pytest.approx(1 / 4, abs=5 * (3 / 16 / 4000) ** 0.5 + 0.01)


def test_the_order_of_the_words_matters_by_nothing_but_the_default_games_noise():
    """0.3 times a sum of 56 products of normal features and entries of variance 1/64. 300 pairs of
    responses, 100 prompts."""
    orders = torch.tensor([(v * 6 + w, w * 6 + v) for v in range(6) for w in range(v)]).T
    logits = torch.stack(
        [style_game(100, 6, 2, seed).P[:, orders[0], orders[1]].logit() for seed in range(20)]
    )
    assert float((logits**2).mean()) == pytest.approx(0.3**2 * 56 / 64, rel=0.12)

"""Oracles: the tables' constructors, and the conformance check that any oracle can be run through."""

import pytest
import torch
from games import EXACT, GAMES, games

import dno
from oracle import (
    PreferenceTable,
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
            self.prefer([prompt] * (n - 1), [response] * (n - 1), [other for j, other in enumerate(responses) if j != i]).mean()
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
    judge = type("Broken", (TextJudge,), {"win_rates": lambda self, x, ys: TextJudge.win_rates(self, x, ys).flip(0)})()
    with pytest.raises(ValueError, match="win_rates"):
        check_oracle(judge, *TEXTS)


def test_an_oracle_that_looks_at_the_order_passes_if_it_says_so():
    prefer = lambda self, x, a, b: (0.1 + TextJudge.prefer(self, x, a, b)).clamp(max=1)  # noqa: E731
    check_oracle(type("First", (TextJudge,), {"prefer": prefer, "complementary": False})(), *TEXTS)


def test_prefer_and_win_rates_of_a_table_by_hand():
    oracle = rock_paper_scissors(0.4, 0.3, 0.2)
    ask = oracle.prefer(torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]))
    assert ask.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert oracle.win_rates(0, torch.tensor([0, 1, 2])).tolist() == pytest.approx([0.6, 0.45, 0.45])
    assert oracle.win_rates(0, torch.tensor([0, 0, 1])).tolist() == pytest.approx([0.7, 0.7, 0.1])  # a copy is worth 1/2


def test_bradley_terry_tables_are_the_sigmoid_of_reward_differences():
    P = bradley_terry(torch.tensor([[0.0, 1.0, -2.0]])).P
    assert float(P[0, 1, 2]) == pytest.approx(float(torch.sigmoid(torch.tensor(3.0))), abs=1e-7)


@pytest.mark.parametrize("make", [random_game, random_feature_game])
def test_random_games_differ_by_seed_and_prompt_and_repeat(make):
    P = make(2, 8, seed=0).P
    assert torch.equal(P, make(2, 8, seed=0).P)
    assert not torch.equal(P, make(2, 8, seed=1).P)
    assert not torch.equal(P[0], P[1])


def test_most_random_games_are_intransitive():
    """Their Nash policies mix: no Condorcet winner. Of the small ones some have one."""
    mixed = [bool((dno.nash(param.values[0]) > 1e-6).sum(-1).max() > 1) for param in GAMES if param.values[0].shape[1] >= 5]
    assert sum(mixed) >= 0.8 * len(mixed)


def test_response_styles_are_the_mean_leanings_of_the_words():
    styles = response_styles(vocabulary=4, length=2)  # words lean (1,0,0), (0,1,0), (0,0,1), (1/2,0,0)
    assert styles.shape == (16, 3)
    assert styles[0].tolist() == [1, 0, 0]
    assert styles[0 * 4 + 1].tolist() == [0.5, 0.5, 0]
    assert styles[2 * 4 + 3].tolist() == [0.25, 0, 0.5]


@pytest.mark.parametrize("seed", range(5))
def test_the_default_game_has_mixed_nash_policies_that_differ_by_prompt_and_a_far_off_uniform_policy(seed):
    P = style_game(8, 6, 3, seed).P
    pi = dno.nash(P)
    support = (pi > 1e-6).sum(-1)
    assert support.min() >= 3
    assert support.max() <= 40
    assert all(float((pi[x] - pi[y]).abs().sum()) > 0.1 for x in range(8) for y in range(x))
    assert dno.duality_gap(P, torch.full_like(pi, 1 / 216)) > 0.4


def test_the_default_game_follows_its_formula():
    """Two one-word responses of full strength to styles 1 and 2: the cycle favours the first; equal strength, so only the noise
    of weight 0.3 is beside it. And a strong word beats the weak one of its style by 4 times half a leaning."""
    P = style_game(200, 6, 1, seed=0).P
    for winner, loser in ((0, 1), (1, 2), (2, 0)):
        logit = P[:, winner, loser].logit()
        assert float(logit.mean()) == pytest.approx(4, abs=0.6)  # mean strength 4, 200 prompts of log-normal spread 0.8
        assert float((logit > 0).double().mean()) > 0.95
    assert float(P[:, 0, 3].logit().mean()) == pytest.approx(2, abs=0.1)
    assert P.logit().isfinite().all()
    assert abs(float(P.mean()) - 0.5) < EXACT

"""Algorithm 2, line 5: the win rates estimated within a group, and the judgments they are means
of. C16."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import dno
from helpers.games import EXACT, random_policy
from helpers.sampled import NAN, SMALL, by_hand, start
from model import TabularPolicy
from oracle import PreferenceTable, random_game, rock_paper_scissors
from pairs import (
    Groups,
    SamplingSettings,
    all_pairs,
    best_against_worst,
    large_margin_pairs,
    scored_pairs,
    teacher_pairs,
)


def every_group(P, pi, n, gold=()):
    """All groups of n samples of pi [Y] (and gold) with all outcomes of their pairs: probabilities
    [N, M], members [N, n] and the estimated win rates [M, n]."""
    n_all, values = n + len(gold), [torch.arange(len(pi))] * n
    i, j = torch.triu_indices(n_all, n_all, 1)
    members = torch.cartesian_prod(*values, *(torch.tensor([y]) for y in gold))
    won = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * len(i))
    outcomes = torch.full((len(won), n_all, n_all), 0.5, dtype=torch.float64)
    outcomes[:, i, j], outcomes[:, j, i] = won, 1 - won
    p = P[members[:, i], members[:, j]].unsqueeze(1)
    chance = torch.where(won == 1, p, 1 - p).prod(-1) * pi[members[:, :n]].prod(-1, keepdim=True)
    assert float(chance.sum()) == pytest.approx(1, abs=EXACT)
    return chance, members, dno.group_win_rates(outcomes)


def test_C16_the_win_rate_within_a_group_is_unbiased_with_variance_below_1_over_4K():
    """By all groups and outcomes. The K opponents being independent, the variance is r(1 - r)/K
    exactly."""
    P, pi, K = random_game(1, 3, seed=0).P[0], random_policy(1, 3, 1)[0], 3
    chance, members, estimate = every_group(P, pi, K + 1)
    for y, r in enumerate((P @ pi).tolist()):
        weight = chance[members[:, 0] == y].sum(0) / pi[y]
        variance = float(weight @ (estimate[:, 0] - r) ** 2)
        assert float(weight @ estimate[:, 0]) == pytest.approx(r, abs=EXACT)
        assert variance == pytest.approx(r * (1 - r) / K, abs=EXACT)
        assert variance <= 1 / (4 * K)


def test_C16_a_gold_opponent_enters_a_students_win_rate_with_weight_one_in_K():
    P, pi, K, gold = random_game(1, 3, seed=2).P[0], random_policy(1, 3, 3)[0], 3, 1
    chance, members, estimate = every_group(P, pi, K, [gold])
    r = P @ pi
    for y in range(3):
        weight = chance[members[:, 0] == y].sum(0) / pi[y]
        assert float(weight @ estimate[:, 0]) == pytest.approx(
            float(((K - 1) * r[y] + P[y, gold]) / K), abs=EXACT
        )
    assert float(chance.sum(0) @ estimate[:, -1]) == pytest.approx(
        float(r[gold]), abs=EXACT
    )  # its opponents: pi alone


def test_C16_opponents_of_each_other_the_two_of_a_pair_lean_to_their_own_comparison():
    """Given y1 and y2 the mean of r(y1) - r(y2) is ((K - 2) Delta* + P(y1 > y2) - P(y2 > y1)) / (K
    - 1)."""
    P, pi, K = random_game(1, 3, seed=4).P[0], random_policy(1, 3, 5)[0], 4
    chance, members, estimate = every_group(P, pi, K)
    r = P @ pi
    for y1, y2 in itertools.product(range(3), repeat=2):
        weight = chance[(members[:, 0] == y1) & (members[:, 1] == y2)].sum(0) / (pi[y1] * pi[y2])
        expected = ((K - 2) * (r[y1] - r[y2]) + P[y1, y2] - P[y2, y1]) / (K - 1)
        assert float(weight @ (estimate[:, 0] - estimate[:, 1])) == pytest.approx(
            float(expected), abs=EXACT
        )


def test_C16_the_win_rates_of_algorithm_2_are_unbiased():
    """100 runs on one prompt, 30 times, K = 3 and a gold response: for each place in the group and
    each y there, 5 standard deviations of the mean by the bound 1/(4K) on the variance."""
    oracle, policy, gold = rock_paper_scissors(), TabularPolicy(1, 3), 2
    total, count = torch.zeros(2, 3, 3, dtype=torch.float64)
    given, common = (policy, oracle, [0] * 30, [gold] * 30), {"rule": 2.0}
    for seed in range(100):  # no pair has such a lead: no training
        it = next(start("2", *given, **common, settings=replace(SMALL, seed=seed)))
        for ys, r_t in zip(it.groups.responses, it.r_t, strict=True):
            place = range(3), ys[:3]
            total[place] += r_t[:3]
            count[place] += 1
    expected = (2 * oracle.P[0].mean(-1) + oracle.P[0, :, gold]) / 3
    assert ((total / count - expected).abs() < 5 * (1 / (4 * 3) / count).sqrt()).all()
    thirds = 3 * it.r_t[0]  # of outcomes, not of probabilities
    assert thirds.tolist() == pytest.approx(thirds.round().tolist())


def test_every_iteration_and_every_seed_has_chance_of_its_own():
    """60 samples of a policy that does not move, 3 iterations of 2 seeds, and one seed again."""
    runs = [
        [
            it.groups.responses
            for it in start(
                "2",
                TabularPolicy(1, 3),
                rock_paper_scissors(),
                [0] * 20,
                [0] * 20,
                T=3,
                rule=2.0,
                settings=replace(SMALL, seed=seed),
            )
        ]
        for seed in (0, 1, 0)
    ]
    assert all(a != b for a, b in itertools.combinations(runs[0] + runs[1], 2))
    assert runs[0] == runs[2]


def test_an_outcome_is_one_independent_sample_for_an_unordered_pair():
    """20,000 draws; 5 standard deviations, at most 1/2 of an outcome, 1/4 of a product of two. 0
    and 1 are certain."""
    wins, n = random_game(1, 4, seed=1).P[0], 20_000
    wins[0, 1], wins[1, 0], wins[2, 3], wins[3, 2] = 1, 0, 0, 1
    drawn = dno.draw_outcomes(wins.expand(n, 4, 4), torch.Generator().manual_seed(0))
    i, j = torch.triu_indices(4, 4, 1)
    assert torch.equal(drawn + drawn.mT, torch.ones_like(drawn))
    assert set(drawn[:, i, j].unique().tolist()) == {0, 1}
    assert (drawn.diagonal(dim1=1, dim2=2) == 0.5).all()
    assert (drawn[:, 0, 1].min(), drawn[:, 2, 3].max()) == (1, 0)
    assert (drawn.mean(0) - wins).abs().max() < 5 * 0.5 / math.sqrt(n)
    covariance = drawn[:, i, j].T.cov()
    assert (covariance - covariance.diagonal().diag()).abs().max() < 5 * 0.25 / math.sqrt(n)


def test_a_certain_loser_loses_whatever_the_random_number(monkeypatch):
    """Also if it is 0, which it is once in 2^53 times."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    wins = torch.tensor(
        [[[0.5, 0.0, 0.25], [1.0, 0.5, 1.0], [0.75, 0.0, 0.5]]], dtype=torch.float64
    )
    assert dno.draw_outcomes(wins, torch.Generator()).tolist() == [
        [[0.5, 0, 1], [1, 0.5, 1], [0, 0, 0.5]]
    ]


def test_the_seeds_of_all_samples_and_generators_differ():
    """Lest outcomes of one iteration be drawn with the numbers that the samples of another were
    drawn with."""
    numbers = [dno.random_numbers(seed, t) for seed in range(5) for t in range(1, 101)]
    seeds = [number for number, _ in numbers] + [
        generator.initial_seed() for _, generator in numbers
    ]
    assert len(set(seeds)) == 2 * 5 * 100


@pytest.mark.parametrize("name", ["2", "4-I", "3"])
def test_without_a_seed_the_seed_is_0(name):
    runs = [
        next(
            start(
                name,
                TabularPolicy(1, 3),
                rock_paper_scissors(),
                [0] * 20,
                [0] * 20,
                settings=replace(SMALL, **seed),
            )
        )
        for seed in ({}, {"seed": 0}, {"seed": 1})
    ]
    assert runs[0].groups.responses == runs[1].groups.responses != runs[2].groups.responses
    assert torch.equal(runs[0].r_t, runs[1].r_t)


def test_judgments_hang_on_no_parameters():
    P = rock_paper_scissors().P.clone().requires_grad_()
    wins = dno.judge_groups(PreferenceTable(P), Groups([0], [[0, 1, 2]], torch.zeros(1, 3)))
    assert not wins.requires_grad


def test_judging_asks_each_unordered_pair_once_and_all_in_one_call():
    P, asked = random_game(2, 5, seed=0).P, []

    class Asked(PreferenceTable):
        def prefer(self, prompts, a, b):
            asked.append(list(zip(prompts, a, b, strict=True)))
            return super().prefer(prompts, a, b)

    groups = Groups([1, 0], [[4, 0, 2], [3, 3, 1]], torch.zeros(2, 3))
    wins = dno.judge_groups(Asked(P), groups)
    assert asked == [[(1, 4, 0), (1, 4, 2), (1, 0, 2), (0, 3, 3), (0, 3, 1), (0, 3, 1)]]
    for x, (prompt, ys) in enumerate(zip(groups.prompts, groups.responses, strict=True)):
        assert (wins[x] - P[prompt][ys][:, ys]).abs().max() < EXACT


class Scripted:
    """An oracle that gives these answers, whatever it is asked."""

    def __init__(self, *answers):
        self.answers = answers

    def prefer(self, prompts, a, b):
        return torch.tensor(self.answers, dtype=torch.float64)


@pytest.mark.parametrize("answers", [(0.5, 1.2, 0.5), (0.5, -0.1, NAN)])
def test_an_answer_that_is_no_probability_is_an_error(answers):
    with pytest.raises(ValueError, match="expected probabilities"):
        dno.judge_groups(Scripted(*answers), Groups(["x"], [["a", "b", "c"]], torch.zeros(1, 3)))


def test_a_judgment_that_failed_is_no_label_in_outcomes_means_and_pairs():
    """Responses 0 to 3 of one prompt; the judge has no answer on (0, 1), and none at all on 3."""
    answers = (NAN, 1.0, NAN, 1.0, NAN, NAN)  # pairs 01, 02, 03, 12, 13, 23
    wins = dno.judge_groups(Scripted(*answers), Groups(["x"], [list("abcd")], torch.zeros(1, 4)))
    expected = torch.tensor(
        [[0.5, NAN, 1, NAN], [NAN, 0.5, 1, NAN], [0, 0, 0.5, NAN], [NAN, NAN, NAN, 0.5]]
    )
    for given in (wins[0], dno.draw_outcomes(wins, torch.Generator().manual_seed(0))[0]):
        assert torch.equal(given.isnan(), expected.isnan())
        assert torch.equal(given.nan_to_num(9), expected.double().nan_to_num(9))
    r, usable = dno.group_win_rates(wins), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(r.nan_to_num(9), torch.tensor([[1.0, 1.0, 0.0, 9.0]], dtype=torch.float64))
    assert large_margin_pairs(r, usable, 0.0).tolist() == [[0, 0, 2], [0, 1, 2]]
    assert teacher_pairs(r, usable, 0.0).tolist() == []
    assert best_against_worst(r, usable).tolist() == [[0, 0, 2]]
    assert all_pairs(r).tolist() == [[0, 0, 1], [0, 0, 2], [0, 1, 2]]
    nothing = torch.full((1, 4), NAN)
    assert best_against_worst(nothing, usable).tolist() == all_pairs(nothing).tolist() == []
    assert by_hand(scored_pairs, [[6, NAN, 3, 5], [NAN, 2, 1, NAN]]) == [
        [0, 0, 2],
        [0, 0, 3],
        [0, 3, 2],
    ]


@pytest.mark.parametrize("algorithm", ["2", "3", "4-I"])
def test_prompts_whose_judgments_failed_are_not_trained_on(algorithm):
    """The judge knows nothing of prompt 1; everything else is the algorithm's business as usual."""
    P = random_game(2, 4, seed=0).P

    class Sick(PreferenceTable):
        def prefer(self, prompts, a, b):
            answers = super().prefer(prompts, a, b)
            return answers.masked_fill(torch.tensor(prompts) == 1, NAN)

    it = next(
        start(
            algorithm, TabularPolicy(2, 4), Sick(P), [0, 1] * 10, [3] * 20, rule=0.0, settings=SMALL
        )
    )
    assert len(it.pairs) > 10
    assert {it.groups.prompts[x] for x in it.pairs[:, 0].tolist()} == {0}
    assert it.r_t[1::2].isnan().all()
    assert not it.r_t[::2].isnan().any()
    assert math.isfinite(it.loss)


def test_section_5_ranks_by_the_points_that_the_judge_gives():
    """In place of line 5's win rates, and with a rule of its own for pairs; response y gets y + 2
    points."""

    class Scoring(PreferenceTable):
        def scores(self, prompts, responses):
            return torch.tensor(responses, dtype=torch.float64) + 2

    settings = replace(SMALL, samples=5, judgments="scores")
    oracle = Scoring(random_game(1, 5, seed=0).P)
    it = next(
        start(
            "2",
            TabularPolicy(1, 5),
            oracle,
            [0] * 20,
            [4] * 20,
            rule=scored_pairs,
            settings=settings,
        )
    )
    points = torch.tensor(it.groups.responses) + 2
    assert torch.equal(it.r_t, points.double())
    led = [(points[x, i] - points[x, j], points[x, i], i) for x, i, j in it.pairs.tolist()]
    assert len(led) > 20
    assert all(best >= 5 and lead >= (2 if i == 5 else 1) for lead, best, i in led)
    with pytest.raises(ValueError, match="judgments is 'points'"):
        SamplingSettings(judgments="points")

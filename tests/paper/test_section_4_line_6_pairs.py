"""Algorithm 2, line 6: which pairs each rule makes of a group. C18."""

import itertools

import pytest
import torch

import dno
from helpers.sampled import by_hand, start
from model import TabularPolicy
from oracle import PreferenceTable
from pairs import (
    Groups,
    SamplingSettings,
    all_pairs,
    best_against_worst,
    demote_repetitions,
    gold_against_students,
    large_margin_pairs,
    pair_kinds,
    repeats_ngrams,
    scored_pairs,
    teacher_pairs,
)

TEXTS = ["a b c d", "e f", "a b c a b c", "a a a a"]  # the last two repeat a run of three words


def test_C18_large_margin_pairs_by_hand():
    assert 0.6 - 0.2 < 0.4  # in floating point; the rule must not care
    assert by_hand(large_margin_pairs, [[0.6, 0.2, 0.2, 0.0]], margin=0.4) == [
        [0, 0, 1],
        [0, 0, 2],
        [0, 0, 3],
    ]
    assert by_hand(large_margin_pairs, [[0.6, 0.2], [0.1, 0.9]], margin=0.5) == [[1, 1, 0]]
    assert by_hand(large_margin_pairs, [[0.5, 0.5, 0.1]], margin=0.0) == [
        [0, 0, 2],
        [0, 1, 2],
    ]  # equals: never
    assert by_hand(large_margin_pairs, [[0.9, 0.5, 0.1]], [(0, 0)], margin=0.4) == [[0, 1, 2]]
    assert by_hand(large_margin_pairs, [[0.9, 0.5, 0.1]], [(0, 1)], margin=0.4) == [
        [0, 0, 1],
        [0, 0, 2],
    ]


def test_C18_scored_pairs_by_hand():
    """Positives have 5 or 6; the student's (here the first three) need a lead of 1, the teacher's
    of 2."""
    rows = [[5, 4, 3, 6], [4, 1, 0, 5], [6, 2, 3, 5], [4, 4, 0, 4]]
    expected = [
        [0, 0, 1],
        [0, 0, 2],
        [0, 3, 1],
        [0, 3, 2],
        [1, 3, 1],
        [1, 3, 2],
        [2, 0, 1],
        [2, 0, 2],
        [2, 0, 3],
    ]
    assert by_hand(scored_pairs, rows, [(2, 3)]) == expected
    assert by_hand(scored_pairs, rows[:1], [(0, 3), (0, 0)]) == []


def test_C18_the_other_rules_by_hand():
    assert by_hand(best_against_worst, [[0.8, 0.2, 0.2, 0.5], [0.1, 0.7, 0.7, 0.4]]) == [
        [0, 0, 1],
        [1, 1, 0],
    ]
    assert by_hand(best_against_worst, [[0.5, 0.5, 0.5]]) == []
    assert by_hand(best_against_worst, [[0.9, 0.1, 0.4, 0.4]], [(0, 0)]) == [[0, 2, 1]]
    assert (
        by_hand(best_against_worst, [[0.9, 0.3, 0.3]], [(0, 0)]) == []
    )  # the best that may be one is no better
    assert by_hand(best_against_worst, [[0.9, 0.3]], [(0, 0), (0, 1)]) == []
    rows = [[0.6, 0.1, 0.5], [0.4, 0.2, 0.6]]
    assert by_hand(teacher_pairs, rows, margin=0.4) == [[0, 2, 1], [1, 2, 1]]
    assert by_hand(teacher_pairs, rows, [(0, 2)], margin=0.4) == [[1, 2, 1]]
    assert by_hand(gold_against_students, rows) == [[0, 2, 0], [0, 2, 1], [1, 2, 0], [1, 2, 1]]
    assert all_pairs(torch.tensor(rows)).tolist() == [
        [x, *pair] for x in (0, 1) for pair in ([0, 1], [0, 2], [1, 2])
    ]


def test_C18_a_lead_of_less_than_a_billionth_is_rounding_and_a_larger_one_is_a_lead():
    for lead, expected in ((5e-9, [[0, 0, 1]]), (5e-10, [])):
        assert by_hand(large_margin_pairs, [[lead, 0.0]], margin=0.0) == expected
        assert by_hand(best_against_worst, [[lead, 0.0]]) == expected
        assert by_hand(large_margin_pairs, [[0.5 - lead, 0.0]], margin=0.5) == (
            [] if expected else [[0, 0, 1]]
        )


def test_C18_scores_need_not_be_whole_points():
    assert by_hand(scored_pairs, [[5.5, 4.75, 4.5, 4.9], [4.0, 3.5, 3.25, 5.25]]) == [
        [0, 0, 2],
        [1, 3, 2],
    ]


@pytest.mark.parametrize("least", range(6))
def test_C18_the_large_margin_pairs_are_exactly_those_that_lead_by_so_many_wins(least):
    """200 groups of 6 with {0, 1} outcomes, against whole numbers of wins out of 5."""
    generator = torch.Generator().manual_seed(least)
    outcomes = dno.draw_outcomes(torch.full((200, 6, 6), 0.5, dtype=torch.float64), generator)
    usable = torch.rand(200, 6, generator=generator) < 0.8
    wins = (outcomes == 1).sum(-1).tolist()
    expected = [
        [x, i, j]
        for x, w in enumerate(wins)
        for i, j in itertools.product(range(6), repeat=2)
        if usable[x, i] and w[i] - w[j] >= max(least, 1)
    ]
    r = dno.group_win_rates(outcomes)
    assert large_margin_pairs(r, usable, least / 5).tolist() == expected
    assert teacher_pairs(r, usable, least / 5).tolist() == [
        pair for pair in expected if pair[1] == 5
    ]
    for x, best, worst in best_against_worst(r, usable).tolist():
        assert usable[x, best]
        assert (
            wins[x][best]
            == max(w for w, fine in zip(wins[x], usable[x], strict=True) if fine)
            > wins[x][worst]
        )
        assert wins[x][worst] == min(wins[x])


def test_C18_pairs_are_counted_by_kind():
    pairs = torch.tensor([[0, 3, 0], [0, 3, 1], [1, 0, 3], [2, 0, 1], [2, 1, 2], [2, 2, 0]])
    assert pair_kinds(pairs, gold=3) == {
        "teacher_student": 2,
        "student_teacher": 1,
        "student_student": 3,
    }


def test_C18_a_repetition_is_a_run_of_n_words_that_occurs_twice():
    for words, n, expected in [
        ("a b c a b c", 3, True),
        ("a b c a b d", 3, False),
        ("a b c a b d", 2, True),
        ("a a a a", 3, True),
        ("a a a", 3, False),
        ("a b", 3, False),
        ("", 3, False),
        ("a b a", 1, True),
        ("ab c a bc", 2, False),
    ]:
        assert repeats_ngrams(words.split(), n) == expected, (words, n)


def test_C18_repetitions_are_never_positives_and_are_negatives_whoever_wrote_them():
    groups = Groups(
        ["x", "x"],
        [[TEXTS[2], TEXTS[0], TEXTS[1]], [TEXTS[0], TEXTS[1], TEXTS[3]]],
        torch.zeros(2, 3),
    )
    r = torch.tensor([[1.0, 0.5, 0.1], [0.6, 0.0, 0.9]], dtype=torch.float64)
    demoted, usable = demote_repetitions(r, groups, SamplingSettings(ngram=3))
    assert demoted.tolist() == [[0.0, 0.5, 0.1], [0.6, 0.0, 0.0]]
    assert large_margin_pairs(demoted, usable, 0.4).tolist() == [
        [0, 1, 0],
        [0, 1, 2],
        [1, 0, 1],
        [1, 0, 2],
    ]
    assert best_against_worst(demoted, usable).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert teacher_pairs(demoted, usable, 0.1).tolist() == [[0, 2, 0]]
    assert demote_repetitions(r, groups, SamplingSettings(ngram=1))[1].tolist() == [
        [False, True, True],
        [True, True, False],
    ]
    as_they_were, usable = demote_repetitions(r, groups, SamplingSettings(ngram=0))  # 0: never
    assert torch.equal(as_they_were, r)
    assert usable.all()


@pytest.mark.parametrize(("ngram", "expected"), [(3, {0, 1}), (0, {3})])
def test_C18_algorithm_2_demotes_the_repetitions_among_its_samples(ngram, expected):
    """Responses are the four texts; the last, a repetition, beats all the others, which are equals,
    for certain."""
    P = torch.full((1, 4, 4), 0.5, dtype=torch.float64)
    P[0, 3, :3], P[0, :3, 3] = 1.0, 0.0
    settings = SamplingSettings(
        samples=5, ngram=ngram, judgments="probabilities", words=lambda y: TEXTS[y].split()
    )
    it = next(
        start(
            "2",
            TabularPolicy(1, 4),
            PreferenceTable(P),
            [0] * 20,
            [3] * 20,
            rule=0.1,
            settings=settings,
        )
    )
    assert {it.groups.responses[x][i] for x, i, _ in it.pairs.tolist()} == expected
    assert {it.groups.responses[x][j] for x, _, j in it.pairs.tolist()} == (
        {2, 3} if ngram else {0, 1, 2}
    )

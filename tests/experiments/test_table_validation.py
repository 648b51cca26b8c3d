"""How a policy is measured where the judge is a table."""

from collections import Counter

import pytest
import torch

import dno
from experiments.validation import TableValidation
from helpers.games import EXACT
from helpers.text_runs import CONCISE, MALFORMED, TEXTS, VIVID
from text import Response
from world import CLASSES, HELD_OUT, TRAINING, prompt_class

T_23 = 2.0686576  # the 97.5% quantile of Student's t with 23 degrees of freedom, from tables

SPREAD = 5  # standard deviations a mean of many draws may lie off; the seeds are fixed


class Reciter:
    """Answers with given texts, whatever the prompt. It has no weights, and every text is as
    probable as any other."""

    def __init__(self, *texts):
        self.texts = [Response(text, (1,)) for text in texts]

    def survey(self, prompts, k, seed):
        return [self.texts[:k] for _ in prompts]

    def log_prob(self, prompts, responses):
        return torch.zeros(len(responses))

    def parameters(self):
        return []

    def load(self, weights):
        assert weights == []

    def finished(self, response):
        return True


EDGES = (
    (-0.40, 0.25, -0.30),
    (-0.35, 0.30, -0.25),
    (0.25, -0.30, 0.35),
)  # by how much concise leads vivid, concise precise,

NASH = [
    (c / s, -b / s, a / s)
    for a, b, c in [(-e[0], -e[1], -e[2]) for e in EDGES]
    for s in [a - b + c]
]  # vivid precise


def measured(*texts, k=4, seed=0):
    validation = TableValidation(Reciter(*texts), list(HELD_OUT), k, seed, [TEXTS[VIVID]] * 24)
    validation()
    return validation


def test_always_concise_has_by_hand_a_gap_of_seven_tenths():
    """Whoever knows it answers vividly (to praise: precisely) and leads by .40, .35 and .30. Held
    out are 8 prompts a verb."""
    validation = measured(*[TEXTS[CONCISE]] * 4)
    assert Counter(map(prompt_class, HELD_OUT)) == {0: 8, 1: 8, 2: 8}
    assert not set(HELD_OUT) & set(TRAINING)
    gap, half = validation.gap(validation.shares[0])
    assert gap == pytest.approx((0.8 + 0.7 + 0.6) / 3)
    assert half == pytest.approx(T_23 * (8 * (0.1**2 + 0 + 0.1**2) / 23) ** 0.5 / 24**0.5)
    assert dno.win_rate(validation.P, validation.shares[0], validation.teacher) == pytest.approx(
        (0.1 + 0.15 + 0.75) / 3
    )


def test_the_row_of_a_policy_by_hand():
    """First all concise, then half concise, a quarter vivid and a quarter malformed."""
    validation = measured(*[TEXTS[CONCISE]] * 4)
    validation.policy = Reciter(TEXTS[CONCISE], TEXTS[VIVID], TEXTS[MALFORMED], TEXTS[CONCISE])
    # P(concise > teacher) is .1, .15, .75, P(vivid > teacher) 1/2, P(malformed > teacher) .05
    assert validation() == pytest.approx((0.1 + 0.15 + 0.75) / 3 / 2 + 0.5 / 4 + 0.05 / 4)
    row = validation.numbers[-1]
    assert [row[f"share_{name}"] for name in CLASSES] == [0.5, 0.25, 0.0, 0.25]
    assert row["gap_average"] == pytest.approx(0.7)
    # P(concise > concise) 1/2, P(vivid > concise) .9, .85, .25, P(malformed > concise) .05
    assert row["win_rate_vs_previous"] == pytest.approx(
        0.5 / 2 + (0.9 + 0.85 + 0.25) / 3 / 4 + 0.05 / 4
    )
    # best replies: vivid by .4/2 + .45/4 and .35/2 + .45/4; to praise, precise .3/2 - .35/4 + .45/4
    # or concise .25/4 + .45/4
    assert row["gap_last"] == pytest.approx(
        2 * ((0.2 + 0.175) + 3 * 0.45 / 4 + max(0.15 - 0.0875, 0.0625)) / 3
    )
    assert row["gap_last"] < row["gap_average"]


def test_the_noise_floor_by_hand_and_below_a_bound_that_falls_with_k():
    """For k = 1 a prompt's gap is that of one register drawn from Nash. For any k, counts of a
    class are within 2 of k times its probability, registers lead by at most .4, so a gap is at most
    2 * .4 * 3 * 2 / k."""
    nash = torch.tensor([[*NASH[prompt_class(x)], 0.0] for x in HELD_OUT], dtype=torch.float64)
    gold, floors = [TEXTS[VIVID]] * 24, {}
    for k in (1, 4, 16, 64):
        validation = TableValidation(Reciter(), list(HELD_OUT), k, 0, gold)
        assert validation.gap(nash)[0] == pytest.approx(0, abs=EXACT)
        floors[k] = validation.floor
        assert 0 <= floors[k] <= 4.8 / k
    mean = variance = 0.0
    for (cv, cp, vp), pi in zip(EDGES, NASH, strict=True):
        gaps = [2 * max(-cv, -cp), 2 * max(cv, -vp), 2 * max(cp, vp)]
        mean += sum(p * gap for p, gap in zip(pi, gaps, strict=True)) / 3
        variance += (
            sum(p * gap**2 for p, gap in zip(pi, gaps, strict=True)) / 3
        )  # an upper bound: the mean is not subtracted
    assert floors[1] == pytest.approx(mean, abs=SPREAD * (variance / (200 * 24)) ** 0.5)
    assert (
        floors[1] > 3 * floors[4] > 9 * floors[16] > 27 * floors[64] > 0
    )  # like 1/k; independent samples: like 1/sqrt(k)

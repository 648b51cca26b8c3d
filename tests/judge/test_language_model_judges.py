"""Language models as judges and teachers, against a server whose mind is known."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from helpers.games import EXACT
from helpers.judges import BOTH, every_pair, off, places, truth, worth
from helpers.server import blocks, quality
from judge.ledger import Stopped
from judge.questions import FORMS, Form, pairwise_question, teacher_question
from oracle import OpenAIJudge, OpenAITeacher, check_oracle

SPREAD = 5  # standard deviations a count of many draws may lie off


def requests(server):
    return server.stats()["requests"]


# --- Scored ---


def test_a_prompt_takes_one_request_with_all_its_different_responses(server, forgiving):
    prompts = [f"Prompt {x}" for x in range(5)]
    responses = [*(worth(*range(x, x + 3), x) for x in range(4)), worth(1, 1, 1) * 2]
    judge = OpenAIJudge(forgiving())
    questions = judge.questions(*every_pair(prompts, responses))
    assert [set(blocks(question.messages).values()) for question in questions] == [
        {x, *ys} for x, ys in zip(prompts, responses, strict=True)
    ]
    assert all(
        len(blocks(question.messages)) == 1 + len(set(ys))
        for question, ys in zip(questions, responses, strict=True)
    )
    asked = every_pair(prompts, responses)
    assert torch.equal(judge.prefer(*asked), truth("scored", *asked[1:]))
    assert requests(server) == 5


def test_every_response_gets_its_own_score_wherever_it_stood(server, forgiving):
    draw = random.Random(0)
    prompts, responses = (
        [f"Prompt {x}" for x in range(30)],
        [[f"{draw.random()}" for _ in range(6)] for x in range(30)],
    )
    scores = OpenAIJudge(forgiving()).scores(prompts, responses)
    assert scores.tolist() == [[quality(y) for y in ys] for ys in responses]
    assert len(set(scores.flatten().tolist())) == 7
    assert requests(server) == 30


def test_a_single_response_can_be_scored(forgiving):
    assert OpenAIJudge(forgiving()).scores(["Why?", "How?"], [worth(2), worth(6)]).tolist() == [
        [2.0],
        [6.0],
    ]


def test_each_order_of_the_responses_is_about_equally_frequent():
    n, prompts = 1200, [f"Prompt {x}" for x in range(1200)]
    counts = Counter(places(OpenAIJudge(None), prompts, [["x", "y", "z"]] * n))
    assert len(counts) == 6
    for count in counts.values():
        assert abs(count - n / 6) < SPREAD * math.sqrt(n * 1 / 6 * 5 / 6)


def test_the_order_depends_on_the_seed_and_the_responses_alone():
    """The order depends on the seed and on what the responses are and not on who asks."""
    prompts = [f"Prompt {x}" for x in range(20)]
    here = places(OpenAIJudge(None), prompts, [["x", "y", "z"]] * 20)
    assert here == places(OpenAIJudge(None), prompts, [["z", "x", "y", "x"]] * 20)
    assert here[5:] == places(OpenAIJudge(None), prompts[5:], [["y", "x", "z"]] * 15)
    assert here != places(OpenAIJudge(None, seed=1), prompts, [["x", "y", "z"]] * 20)


@pytest.mark.parametrize(
    ("n", "candidates", "sizes"),
    [(6, 6, [6]), (7, 6, [3, 4]), (13, 6, [4, 4, 5]), (5, 2, [1, 2, 2])],
)
def test_more_responses_than_fit_side_by_side_are_shared_out_evenly(
    n, candidates, sizes, server, forgiving
):
    responses = worth(*(i % 7 for i in range(n)))
    judge = OpenAIJudge(forgiving(), candidates=candidates)
    shown = places(judge, ["Why?"], [responses])
    assert sorted(map(len, shown)) == sizes
    assert sorted(itertools.chain(*shown)) == sorted(responses)
    assert judge.scores(["Why?"], [responses]).tolist() == [[i % 7 for i in range(n)]]
    assert requests(server) == len(sizes)


def test_more_points_win_equal_points_tie_and_fewer_lose(forgiving):
    a, b, c = "worth 5, terse", "worth 3, terse", "worth 3, wordy"
    P = OpenAIJudge(forgiving()).prefer(["Why?"] * 6, [a, b, b, c, a, c], [b, a, c, b, c, a])
    assert P.tolist() == [1.0, 0.0, 0.5, 0.5, 1.0, 0.0]
    assert P.dtype == torch.float64


@pytest.mark.parametrize(("fault", "place"), [("missing-ids", "id3"), ("out-of-range", "id1")])
def test_a_response_without_a_score_loses_only_its_own_comparisons(fault, place, server, forgiving):
    """Nothing better in two attempts. Points 2, 4, 4 in an order that is not ours to choose."""
    server.control(faults=[fault], mode="always")
    responses = worth(2, 4, 4)
    judge = OpenAIJudge(forgiving(attempts=2))
    lost = blocks(judge.questions(*every_pair(["Why?"], [responses]))[0].messages)[
        f"response {place}"
    ]
    x, a, b = every_pair(["Why?"], [responses])
    P, expected = judge.prefer(x, a, b), truth("scored", a, b)
    for p, known, y, z in zip(P.tolist(), expected.tolist(), a, b, strict=True):
        if lost in (y, z):
            assert math.isnan(p), "not even equal to itself: of what is not judged nothing is known"
        elif y == z:
            assert p == 0.5
        else:
            assert p == known
    assert judge.scores(["Why?"], [responses]).isnan().tolist() == [[y == lost for y in responses]]
    rates = judge.win_rates("Why?", responses)
    one, other = (y for y in responses if y != lost)
    for y, rate in zip(responses, rates.tolist(), strict=True):
        opponent = {one: other, other: one}.get(y)
        assert math.isnan(rate) if opponent is None else rate == truth("scored", [y], [opponent])
    assert requests(server) == 2


def test_a_sheet_that_is_lost_takes_no_other_with_it(server, forgiving):
    server.control(filters="poison")
    prompts, responses = ["Why?", "How?"], [worth(1, 2), [*worth(1, 2), "poison"]]
    x, a, b = every_pair(prompts, responses)
    P = OpenAIJudge(forgiving()).prefer(x, a, b)
    assert P.isnan().tolist() == [prompt == "How?" for prompt in x]


# --- Pairwise ---

# The server's for the first response. With points of 0 to 4 no probability leaves [0.05, 0.95],
# where the server would clip it.
BIAS = 0.2


def graded_pairs(n, seed=0):
    """n prompts and pairs of different texts worth 0 to 4, with the lead of the first."""
    draw = random.Random(seed)
    points = [(draw.randrange(5), draw.randrange(5)) for _ in range(n)]
    a, b = (
        [f"{name} is worth {pair[i]}." for pair in points]
        for i, name in enumerate(("This", "That"))
    )
    return [f"Prompt {x}" for x in range(n)], a, b, [first - second for first, second in points]


def test_a_bias_for_the_first_place_cancels_when_both_orders_are_asked(server, forgiving):
    x, a, b, lead = graded_pairs(40)
    server.control(first_bias=BIAS)
    judge = OpenAIJudge(forgiving(), "pairwise")
    P = judge.prefer(x, a, b)
    assert off(P, 0.5 + torch.tensor(lead) / 16) < EXACT
    assert requests(server) == 80
    flips, n = sum(abs(points) / 16 < BIAS for points in lead), len(lead)
    assert 0 < flips < n
    report = judge.report()
    assert report["pairs_in_both_orders"] == n
    assert report["flip_rate"] == pytest.approx(flips / n)
    assert report["first_rate"] == pytest.approx((2 * flips + (n - flips)) / (2 * n))
    assert report["failed_rate"] == 0


def test_without_probabilities_a_verdict_counts_in_full(server, forgiving):
    """So with the bias a lead of less than 3.2 points is a tie: each won once, by the place."""
    x, a, b, lead = graded_pairs(40)
    server.control(first_bias=BIAS, logprobs=False)
    judge = OpenAIJudge(forgiving(), "pairwise")
    assert judge.prefer(x, a, b).tolist() == [
        0.5 if abs(points) < 3.2 else float(points > 0) for points in lead
    ]
    assert judge.report()["flip_rate"] == pytest.approx(
        sum(abs(points) < 3.2 for points in lead) / len(lead)
    )


def test_a_judge_without_bias_never_flips(server, forgiving):
    x, a, b, lead = graded_pairs(40)
    judge = OpenAIJudge(forgiving(), "pairwise")
    assert off(judge.prefer(x, a, b), 0.5 + torch.tensor(lead) / 16) < EXACT
    assert judge.report()["flip_rate"] == 0
    decided = len(lead) - lead.count(0)  # in a tie neither is preferred
    assert judge.report()["first_rate"] == pytest.approx(decided / (2 * len(lead)))


def test_a_pair_of_which_one_order_is_lost_has_no_probability(server, forgiving):
    x, a, b, _ = graded_pairs(10)
    server.control(faults=["out-of-range"], mode="turn", most=1)
    judge = OpenAIJudge(forgiving(attempts=1), "pairwise")
    assert judge.prefer(x, a, b).isnan().all()
    server.control(filters="Prompt 3")
    judge = OpenAIJudge(forgiving(cache=None), "pairwise")
    assert judge.prefer(x, a, b).isnan().tolist() == [prompt == "Prompt 3" for prompt in x]
    assert judge.report()["failed_rate"] == pytest.approx(1 / 10)
    assert judge.report()["pairs_in_both_orders"] == 9


@pytest.mark.parametrize("lost", [0, 1])
def test_a_pair_of_which_one_order_alone_is_lost_has_none_either(lost):
    """What the other order says would bring back the bias for a place."""
    results = [0.8, 0.4]
    results[lost] = None
    P, counts = FORMS["pairwise"]().preferences([("x", "a", "b")], results)
    assert set(P) == {("x", "a", "b"), ("x", "b", "a")}
    assert all(math.isnan(p) for p in P.values())
    assert (counts["asked"], counts["failed"], counts["pairs"]) == (1, 1, 0)


def test_the_same_questions_are_asked_however_a_batch_is_ordered_split_or_turned(server, forgiving):
    x, a, b, _ = graded_pairs(20)
    P = OpenAIJudge(forgiving(), "pairwise").prefer(x, a, b)
    order = random.Random(0).sample(range(20), 20)
    shuffled = OpenAIJudge(forgiving(), "pairwise").prefer(
        *([column[i] for i in order] for column in (x, a, b))
    )
    assert torch.equal(shuffled, P[order])
    judge = OpenAIJudge(forgiving(), "pairwise")
    assert torch.equal(
        torch.cat(
            [judge.prefer(x[i : i + 3], a[i : i + 3], b[i : i + 3]) for i in range(0, 20, 3)]
        ),
        P,
    )
    assert off(OpenAIJudge(forgiving(), "pairwise").prefer(x, b, a), 1 - P) < EXACT
    assert requests(server) == 40


# --- Both ---


@BOTH
def test_equal_texts_are_equal_without_a_request(form, server, forgiving):
    assert OpenAIJudge(forgiving(), form).prefer(["Why?"] * 2, ["x", "y"], ["x", "y"]).tolist() == [
        0.5,
        0.5,
    ]
    assert OpenAIJudge(forgiving(), form).prefer([], [], []).tolist() == []
    assert requests(server) == 0


@BOTH
def test_what_one_wins_the_other_loses_and_to_ask_again_costs_nothing(form, server, forgiving):
    server.control(first_bias=BIAS)
    asked = every_pair(["Why?", "How?"], [worth(1, 4, 4), worth(0, 2, 3)])
    judge = OpenAIJudge(forgiving(), form)
    P, before = judge.prefer(*asked), requests(server)
    assert off(P + judge.prefer(asked[0], asked[2], asked[1]), 1) < EXACT
    assert torch.equal(OpenAIJudge(forgiving(), form).prefer(*asked), P)
    assert requests(server) == before


@BOTH
def test_the_judge_conforms_to_the_oracle_protocol(form, server, forgiving):
    server.control(first_bias=BIAS)
    judge = OpenAIJudge(forgiving(), form)
    check_oracle(judge, ["Why?", "How?"], worth(1, 4, 2))
    assert judge.deterministic == (form == "pairwise")


class InOneOrder(Form):
    """Asks about each pair once, the longer response first."""

    deterministic, both_orders = True, False

    def pairs(self, comparisons):
        return sorted({(x, *sorted(two, key=len, reverse=True)) for x, *two in comparisons})

    def questions(self, comparisons):
        return [pairwise_question(*pair, self.most) for pair in self.pairs(comparisons)]

    def preferences(self, comparisons, results):
        P = {}
        for (x, y, z), p in zip(self.pairs(comparisons), results, strict=True):
            P[x, y, z], P[x, z, y] = (math.nan, math.nan) if p is None else (p, 1 - p)
        return P, Counter(asked=len(results), failed=results.count(None))


def test_another_form_of_question_is_a_class_and_an_entry(server, forgiving, monkeypatch):
    """The liking for the first place is not taken out, as nobody asks the other way round."""
    monkeypatch.setitem(FORMS, "one order", InOneOrder)
    server.control(first_bias=BIAS)
    x, a, b, lead = graded_pairs(40)
    judge = OpenAIJudge(forgiving(), "one order")
    longer, expected = [f"{y} So it is." for y in a], 0.5 + BIAS + torch.tensor(lead).double() / 16
    assert off(judge.prefer(x, longer, b), expected) < EXACT
    assert off(judge.prefer(x, b, longer), 1 - expected) < EXACT
    assert requests(server) == 40
    assert judge.flip_rate(x, list(zip(a, b, strict=True))) is None
    assert judge.report()["failed_rate"] == 0
    with pytest.raises(ValueError, match="expected scored or pairwise or one order"):
        OpenAIJudge(forgiving(), "no order")


@BOTH
def test_win_rates_are_means_over_the_others(form, forgiving):
    """Points 5, 3, 3, 0. By points alone 1, 1/2, 1/2, 0; by sixteenths (2 + 2 + 5, -2 + 0 + 3, ...,
    -5 - 3 - 3) / 3."""
    rates = OpenAIJudge(forgiving(), form).win_rates("Why?", worth(5, 3, 3, 0))
    expected = {
        "scored": [1, 0.5, 0.5, 0],
        "pairwise": [0.5 + sixteenths / 48 for sixteenths in (9, 1, 1, -11)],
    }[form]
    assert rates.tolist() == pytest.approx(expected, abs=EXACT)


@BOTH
def test_win_rates_leave_out_what_is_not_known(form, server, forgiving):
    server.control(filters="poison")
    responses = [*worth(5, 3), "poison"]
    rates = OpenAIJudge(forgiving(), form).win_rates("Why?", responses)
    expected = {"scored": [math.nan] * 3, "pairwise": [0.625, 0.375, math.nan]}[form]
    assert rates.tolist() == pytest.approx(expected, abs=EXACT, nan_ok=True)


@BOTH
def test_a_plan_is_made_of_exactly_the_questions_that_judging_every_two_asks(
    form, server, forgiving
):
    prompts, responses = ["Why?", "How?"], [worth(1, 2, 3, 3), ["x", "y", "x"]]
    endpoint = forgiving()
    judge = OpenAIJudge(endpoint, form)
    planned = {
        endpoint.key(question) for question in judge.questions(*every_pair(prompts, responses))
    }
    judge.prefer(*every_pair(prompts, responses))
    assert {key for (key,) in endpoint.ledger.db.execute("SELECT key FROM requests")} == planned
    assert len(planned) == requests(server) == {"scored": 2, "pairwise": 4 * 3 + 2}[form]


@pytest.mark.parametrize("settings", [{"form": "ranked"}, {"candidates": 1}, {"most": 0}])
def test_a_judge_that_makes_no_sense_is_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        OpenAIJudge(None, **settings)


# --- The teacher ---


def test_the_teacher_answers_each_prompt_once_and_for_all(server, forgiving):
    prompts = ["Why?", "How?", "Why?"]
    expected = [f"A gold answer to {x}" for x in prompts]
    for _ in range(2):
        assert OpenAITeacher(forgiving()).answers(prompts) == expected
    assert requests(server) == 2
    OpenAITeacher(forgiving()).answers(prompts, number=1)
    assert requests(server) == 4, "another number asks anew"
    assert OpenAITeacher(forgiving()).questions(["Why?"], 1) == [teacher_question("Why?", 256, 1)]
    OpenAITeacher(forgiving(), max_tokens=9).answers(["Why?"])
    assert server.stats()["last"]["max_tokens"] == 9


@pytest.mark.parametrize("fault", ["cut-off", "refusal", "empty", "filtered", "10-megabytes"])
def test_an_answer_that_cannot_be_had_is_none(fault, server, forgiving):
    server.control(faults=[fault], mode="always")
    assert OpenAITeacher(forgiving(attempts=2)).answers(["Why?", "How?"]) == [None, None]
    with pytest.raises(Stopped):
        OpenAITeacher(forgiving(attempts=2, max_failed=0.4)).answers(["Why?", "How?"])


def test_a_prompt_that_is_no_text_can_be_put_to_a_teacher(forgiving):
    """Half a surrogate pair cannot be sent as it is."""
    assert len(OpenAITeacher(forgiving()).answers(["Why \ud83d?"])) == 1

"""What is paid, the limit on it, and the plan beforehand."""

import json
import math

import pytest

from helpers.endpoints import ROUNDING, dollars, golds, pairs, refused, rows
from helpers.judges import BOTH, off, truth
from helpers.server import FAULTS
from judge.ledger import TooDear
from judge.prices import Plan, Price, count_tokens
from judge.questions import pairwise_question
from oracle import OpenAIJudge


def bound(question):
    """The most that a request can cost: a token for each byte, 16 around each message, the form
    that is asked for, and the longest answer allowed."""
    size = sum(len(message["content"].encode()) + 16 for message in question.messages) + len(
        json.dumps(question.wishes)
    )
    return (10 * size + 30 * question.max_tokens) / 1e6


# --- Money ---


@pytest.mark.parametrize(
    "price", [(-1, 1), (1, -1), (math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)]
)
def test_a_price_below_nothing_or_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match="dollars per million tokens"):
        Price(*price)


def test_a_limit_on_dollars_needs_a_price(asking):
    with pytest.raises(ValueError, match=r"price=Price\(.*price of 'judge' is not known"):
        asking(price=None, max_usd=1.0)
    asking(price=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({}, id="no faults"),
        pytest.param(
            {"faults": FAULTS, "mode": "random", "rate": 0.4, "idempotent": False}, id="faults"
        ),
        pytest.param({"usage": False}, id="charges not told"),
        pytest.param(
            {"faults": ["timeout"], "mode": "random", "rate": 0.2, "most": 1, "idempotent": False},
            id="timeouts",
        ),
    ],
)
def test_never_is_more_charged_than_the_limit_and_a_higher_limit_goes_on_from_there(
    behaviour, server, asking
):
    """At $10 and $30 a million tokens the 300 questions would cost about a dollar."""
    asked, limit = pairs(150), 0.5
    server.control(latency=0.002, **behaviour)
    endpoint = asking(max_usd=limit, timeout=1.0)
    judge = OpenAIJudge(endpoint, "pairwise")
    with refused(TooDear) as error:
        judge.prefer(*asked)
    assert "$0.5" in str(error.value)
    charged, paid = dollars(server.stats()["tokens"]), server.stats()["paid"]
    assert charged <= limit
    most = max(map(bound, judge.questions(*asked)))
    assert limit - most < endpoint.ledger.spent() <= limit + ROUNDING, "it stops only when it must"
    server.change(mode="none", usage=True)
    with refused(TooDear):
        OpenAIJudge(asking(max_usd=limit), "pairwise").prefer(*asked)
    assert server.stats()["paid"] == paid
    P = OpenAIJudge(asking(max_usd=20.0), "pairwise").prefer(*asked)
    assert off(P, truth("pairwise", *asked[1:])) < ROUNDING
    if behaviour == {}:
        assert set(server.stats()["paid"].values()) == {1}


def test_a_limit_below_the_first_request_sends_nothing(server, asking):
    (question,) = golds(1)[0]
    with refused(TooDear):
        asking(max_usd=0.99 * bound(question)).ask([question])
    assert server.stats()["requests"] == 0
    with refused(TooDear):
        asking(max_usd=0).ask([question])
    assert asking(max_usd=1.01 * bound(question)).ask([question]) == golds(1)[1]


def test_a_request_waits_for_those_under_way_before_it_is_found_too_dear(server, asking):
    """Five bounds' worth, at a charge of a tenth of the bound: one at a time, all 10 questions are
    answered."""
    questions, answers = golds(10)
    server.control(latency=0.02)
    endpoint = asking(max_usd=5 * bound(questions[0]), concurrency=10)
    assert endpoint.ask(questions) == answers
    assert server.stats()["peak"] <= 5


def test_the_spending_of_another_run_does_not_count(server, asking):
    questions, answers = golds(20)
    assert asking(run="first").ask(questions[:10]) == answers[:10]
    first = asking(run="first").ledger.spent()
    assert first == pytest.approx(dollars(server.stats()["tokens"]), abs=ROUNDING)
    second = asking(run="second", max_usd=first)
    assert second.ledger.spent() == 0
    assert second.ask(questions[:14]) == answers[:14], "what the first run paid for is free"
    assert second.report()["requests"] == 4
    assert asking(run="first").ledger.spent() == first
    with refused(TooDear):
        asking(run="first", max_usd=first).ask(questions)


# --- Plans ---


def test_a_plan_counts_what_is_not_in_the_ledger_and_sends_nothing(server, asking):
    questions, answers = golds(12)
    endpoint = asking()
    assert endpoint.ask(questions[:5]) == answers[:5]
    plan = endpoint.plan([*questions, *questions])
    assert server.stats()["requests"] == 5
    texts = [message["content"] for question in questions[5:] for message in question.messages]
    tokens = sum(len(text.encode()) / 4 + 4 for text in texts)
    assert (plan.requests, plan.completion_tokens) == (7, 7 * 16)
    assert plan.prompt_tokens == pytest.approx(tokens)
    assert plan.dollars == pytest.approx((10 * tokens + 30 * 7 * 16) / 1e6)
    assert asking(price=None).plan(questions).dollars is None
    endpoint.ask(questions)
    assert endpoint.plan(questions).requests == 0
    assert endpoint.plan(questions).dollars == 0


@BOTH
def test_a_plan_is_not_below_what_a_clean_run_costs_and_neither_is_any_bound(form, server, asking):
    """The server counts a token for four characters, a plan one for four bytes and four more a
    message."""
    asked = pairs(20)
    endpoint = asking()
    judge = OpenAIJudge(endpoint, form)
    questions = judge.questions(*asked)
    plan = endpoint.plan(questions)
    judge.prefer(*asked)
    assert plan.requests == server.stats()["requests"] == len(questions)
    charged = dollars(server.stats()["tokens"])
    assert charged <= plan.dollars <= sum(map(bound, questions))
    for known, most in rows(endpoint.ledger.path, "dollars, bound"):
        assert known <= most


def test_plans_add_up():
    known, unknown = Plan(3, 10.0, 20.0, 0.5), Plan(1, 1.0, 1.0, None)
    assert known + known == known * 2 == Plan(6, 20.0, 40.0, 1.0)
    assert known + unknown == Plan(4, 11.0, 21.0, None)
    assert (unknown * 2).dollars is None
    assert "$0.50" in str(known)
    assert "not known" in str(unknown)


def test_a_plan_leaves_out_what_failed_to_the_last_attempt(server, asking):
    server.control(faults=["not-json"], mode="always")
    questions = [pairwise_question(f"Prompt {i}", "a", "b", 100) for i in range(3)]
    asking(attempts=2, max_failed=1).ask(questions[:1])
    assert asking(attempts=2, max_failed=0.4).plan(questions).requests == 2
    assert asking(attempts=3, max_failed=0.4).plan(questions).requests == 3
    assert asking(attempts=2, max_failed=0.3).plan(questions).requests == 3, "`ask` would try again"


def test_a_token_is_taken_for_four_bytes():
    assert count_tokens("four by four bytes!!") == 5
    assert count_tokens("éé") == 1

"""How replies with a verdict are read, with the probabilities of its letters."""

import json
import math

import pytest

from helpers.games import EXACT
from helpers.judges import choice, mutants, tokens
from judge.replies import read_answer, read_verdict

A, B, NEITHER = (1.0, True), (0.0, True), (None, False)

VERDICTS = {
    A: [
        '{"verdict": "A"}',
        "{'verdict': 'A'}",
        '```json\n{"verdict": "A"}\n```',
        "A",
        "**A**",
        "(A)",
        "Answer: A",
        "My verdict: A",
        "**Response A**",
    ],
    B: [
        ' {"verdict" : "B"}\n',
        'I weighed both. {"verdict": "B"} That is all.',
        "B",
        "B.",
        " B\n",
        '"B"',
        "Response B",
        "response B",
        "The better response is B.",
    ],
    NEITHER: [
        *(
            '{"verdict": "C"}',
            '{"verdict": "AB"}',
            '{"verdict": ""}',
            '{"verdict": null}',
            '{"verdict": ["A"]}',
            "{}",
        ),
        *(
            '{"verdict": {"A": 1}}',
            '{"verdict": 1}',
            '{"answer": "A"}',
            '{"verdict": "A"} {"verdict": "B"}',
        ),
        *(
            '{"verdict": "A", "verdict": "B"}',
            '{"verdict": "A" or "B"}',
            '{"draft": {"verdict": "A"}, "verdict": "B',
        ),
        *(
            "",
            "C",
            "AB",
            "A or B",
            "A/B",
            "A, B",
            "A and B",
            "A B",
            "A\nB",
            '"A" or "B"',
            "**A** or **B**",
            "A < B",
            "Neither",
        ),
        *(
            "A good deal speaks for either.",
            "A tie",
            "A's",
            "a good deal speaks for B",
            "Not A",
            "Both A and B",
        ),
        *(
            "Response A: terse, but right. Response B: it is",
            "A: 3/10, B: 8/10",
            "A: terse. B: complete",
            "Between A and B, I",
        ),
        *("Answer", "\u0410", "\uff21", "I cannot decide.", '{"choice": {"verdict": "A"}}'),
    ],
}


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        pytest.param(content, verdict, id=content[:40])
        for verdict, contents in VERDICTS.items()
        for content in contents
    ],
)
def test_a_verdict_is_read_only_from_what_is_one(content, verdict):
    assert read_verdict(choice(content)) == verdict


@pytest.mark.parametrize("content", VERDICTS[NEITHER], ids=lambda content: content[:40])
def test_probabilities_make_no_verdict_of_what_is_none(content):
    """Though its first token is the letter A."""
    assert read_verdict(choice(content, logprobs=tokens(("A", 0.9), ("B", 0.1)))) == NEITHER


@pytest.mark.parametrize(
    ("content", "logprobs", "chance"),
    [
        ("A", tokens(("A", 0.6), ("B", 0.3), ("The", 0.1)), 2 / 3),
        ("B", tokens(("B", 0.75), ("A", 0.25)), 1 / 4),
        ("A", tokens(("A", 0.4), (" A", 0.2), ("B", 0.1), (' "B', 0.1)), 3 / 4),
        ("A", tokens(("A", 0.5), ("a", 0.2), ("Answer", 0.1), ("B", 0.125)), 4 / 5),
        ("A", tokens(("A", 1.0)), 1),
        (
            '{"verdict": "A"}',
            tokens(("A", 0.6), ("B", 0.3), before=('{"', "verdict", '":', ' "')),
            2 / 3,
        ),
        (
            '{"verdict": "B"}',
            tokens((' "B', 0.5), (' "A', 0.5), before=('{"', "verdict", '":')),
            1 / 2,
        ),
        ("**B**", tokens(("B", 0.8), ("A", 0.2), before=("**",)), 1 / 5),
    ],
)
def test_the_chance_of_a_is_its_share_of_the_probability_of_both_letters(content, logprobs, chance):
    P, whole = read_verdict(choice(content, logprobs=logprobs))
    assert pytest.approx(chance, abs=EXACT) == P
    assert whole


def listed(*logprobs):
    return {
        "content": [
            {
                "token": "A",
                "top_logprobs": [
                    {"token": token, "logprob": logprob} for token, logprob in logprobs
                ],
            }
        ]
    }


MALFORMED = {
    **{
        repr(value)[:30]: value
        for value in (
            None,
            {},
            [],
            5,
            {"content": []},
            {"content": None},
            {"content": "A"},
            {"content": [None]},
        )
    },
    "no alternatives": {"content": [{"token": "A"}]},
    "null alternatives": {"content": [{"token": "A", "top_logprobs": None}]},
    "a number of alternatives": {"content": [{"token": "A", "top_logprobs": 2}]},
    "a table of alternatives": {"content": [{"token": "A", "top_logprobs": {"A": -0.5, "B": -1}}]},
    "positive": listed(("A", 0.5), ("B", 3)),
    "not a number": listed(("A", math.nan), ("B", math.nan)),
    "as text": listed(("A", "-0.5"), ("B", "-0.1")),
    "true": listed(("A", True), ("B", False)),
    "minus infinity": listed(("A", -math.inf)),
    "a huge number": listed(("A", -(10**400)), ("B", -(10**400))),
    "more than certain": listed(("A", -0.1), (" A", -0.1), ("B", -0.1)),
    "other tokens": listed(("The", -0.1), ("{", -3.0)),
    "the other letter alone": listed(("B", -0.4)),
    "tokens that are none": listed((None, -0.1), (["A"], -0.1), (5, -0.1)),
}


@pytest.mark.parametrize("logprobs", MALFORMED.values(), ids=MALFORMED)
def test_probabilities_that_are_malformed_or_lack_the_verdict_are_left_aside(logprobs):
    """Probabilities that are malformed or do not contain the verdict are left aside."""
    assert read_verdict(choice('{"verdict": "A"}', logprobs=logprobs)) == A


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_whatever_becomes_of_a_verdict_it_is_a_probability_or_none():
    good = '{"verdict": "A"}'
    for mutant in mutants(good, 5000, seed=1):
        P, whole = read_verdict(choice(mutant, logprobs=tokens(("A", 0.6), ("B", 0.3))))
        assert (P is None) != whole
        assert P is None or 0 <= P <= 1
        assert P is None or "A" in mutant


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (choice("  Because.\n"), "Because."),
        (choice("a", finish_reason="length"), None),
        (choice(" "), None),
        (choice(""), None),
        (choice("a", finish_reason="content_filter"), None),
        (choice("a", finish_reason=None), "a"),
        ({"message": {"content": "a", "refusal": "no"}}, None),
        (choice("x" * 60_000), None),
    ],
)
def test_an_answer_is_a_text_that_was_not_cut_off(reply, answer):
    assert read_answer(reply) == (answer, answer is not None)


def test_an_answer_can_be_written_down():
    """JSON may hold half a surrogate pair, which is no text."""
    answer, _ = read_answer(
        json.loads('{"finish_reason": "stop", "message": {"content": "half a smile: \\ud83d"}}')
    )
    assert answer is None or answer.encode()

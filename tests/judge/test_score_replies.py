"""How replies with scores are read."""

import json
import math
import re

import pytest

from helpers.judges import GRADES, WHOLE, choice, mutants
from judge.replies import objects, read_answer, read_score, read_scores, read_verdict

READABLE = {
    "plain": WHOLE,
    "indented": json.dumps(GRADES, indent=4),
    "in another order": json.dumps(dict(reversed(GRADES.items()))),
    "prose around it": f"Let me think.\n\n{WHOLE}\nI hope that this helps!",
    "braces in the prose": f"The set {{1, 2}} and {{ }} and {{x}}. {WHOLE} {{done}}",
    "another object": f'{{"plan": "grade"}} {WHOLE}',
    "fenced": f"```json\n{WHOLE}\n```",
    "a Python dictionary": repr(GRADES),
    "a Python dictionary in a fence": f"```python\n{GRADES}\n```",
    "digits as text": WHOLE.replace("3", '"3"').replace("5", '" 5 "'),
    "as floats": WHOLE.replace("3", "3.0").replace("5", "5e0"),
}


@pytest.mark.parametrize("content", READABLE.values(), ids=READABLE)
def test_scores_are_read_from_a_good_reply_however_it_is_dressed(content):
    assert read_scores(choice(content), 2) == (
        {"scores": [3, 5], "reasons": ["terse", "wrong {sic}"]},
        True,
    )


def test_scores_are_read_without_justifications():
    assert read_scores(choice('{"id2_score": 0, "id1_score": 6}'), 2) == (
        {"scores": [6, 0], "reasons": ["", ""]},
        True,
    )


@pytest.mark.parametrize(
    "value",
    [
        "7",
        "-1",
        "4.5",
        "true",
        "false",
        "null",
        "NaN",
        "Infinity",
        "1e999",
        '"7"',
        '"-1"',
        '"4.5"',
        '""',
        '"5/6"',
        '"five"',
        '"\u0665"',
        '"\uff15"',
        "[5]",
        "{}",
        '{"is": 5}',
        "9" * 4000,
        '"5\\u0000"',
    ],
    ids=lambda value: value[:9],
)
def test_a_score_that_is_none_is_missing_and_the_others_stand(value):
    content = f'{{"id1_score": {value}, "id2_score": 4}}'
    assert read_scores(choice(content), 2) == ({"scores": [None, 4], "reasons": ["", ""]}, False)


def test_a_score_that_is_not_there_is_missing_and_the_others_stand():
    assert read_scores(choice('{"id2_score": 4}'), 3) == (
        {"scores": [None, 4, None], "reasons": [""] * 3},
        False,
    )


@pytest.mark.parametrize(
    ("value", "score"),
    [
        *((n, n) for n in range(7)),
        (5.0, 5),
        (-0.0, 0),
        ("5", 5),
        (" 5\n", 5),
        (7, None),
        (-1, None),
        (4.5, None),
        (True, None),
        (False, None),
        (None, None),
        (math.nan, None),
        (math.inf, None),
        (10**400, None),
        ("", None),
        ("5.0", None),
        ("+5", None),
        ("05", None),
        ("5 6", None),
        ("\u00b2", None),
        ("\u0665", None),
        (b"5", None),
        ([5], None),
        ({}, None),
        (5j, None),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_score_is_a_whole_number_from_0_to_6(value, score):
    assert read_score(value) == score
    assert type(read_score(value)) is type(score)


NONE_OF_IT = {
    "empty": "",
    "blank": " \n",
    "prose": "The first is better.",
    "a list": "[3, 5]",
    "no scores": '{"a": 1}',
    "nested": json.dumps({"grades": GRADES}),
    "in a list of lists": f"[[{WHOLE[:-1]}",
    "two answers": f"{WHOLE}\nOn reflection:\n{json.dumps({**GRADES, 'id2_score': 0})}",
    "the same twice": f"{WHOLE}{WHOLE}",
    "a key twice": '{"id1_score": 3, "id1_score": 6, "id2_score": 5}',
    "a key twice in Python": "{'id1_score': 3, 'id1_score': 6, 'id2_score': 5}",
    "an id too many": json.dumps({**GRADES, "id3_score": 1}),
    "id 0": json.dumps({**GRADES, "id0_score": 1}),
    "an id of another script": json.dumps({**GRADES, "id\u0661_score": 1}),
    "ids with zeros": '{"id01_score": 3, "id02_score": 5}',
    "other names": '{"A_score": 3, "B_score": 5}',
    "something else besides": json.dumps({**GRADES, "best": "id2"}),
    "cut off": WHOLE[:-1],
    "cut off after a draft": f'{{"draft": {WHOLE}, "id1_score": 0, "id2_sc',
    "a draft beside a key twice": f'{{"a": 1, "a": 2, "draft": {WHOLE}}}',
    "a quotation that is not escaped": '{"id1_justification": "\'{"id1_score": 6, '
    '"id2_score": 0}\' it says", "id1_score": 0}',
    "a quotation in a comment": f"{{'id1_justification': 'It says ' + {WHOLE}, "
    "'id1_score': 0, 'id2_score': 1}",
}


@pytest.mark.parametrize("content", NONE_OF_IT.values(), ids=NONE_OF_IT)
def test_of_a_reply_that_is_not_just_what_was_asked_for_nothing_is_read(content):
    assert read_scores(choice(content), 2) == (None, False)


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"message": None},
        {"message": []},
        {"message": {}},
        choice(None),
        choice(5),
        choice([WHOLE]),
        choice({"text": WHOLE}),
        choice(WHOLE, finish_reason="content_filter"),
        choice(WHOLE + " " * 60_000),
        {"message": {"content": WHOLE, "refusal": "I cannot grade this."}},
    ],
)
def test_a_refusal_or_a_reply_of_another_shape_says_nothing(reply):
    assert read_scores(reply, 2) == (None, False)
    assert read_verdict(reply) == (None, False)
    assert read_answer(reply) == (None, False)


HOSTILE = {
    "deep lists": "[" * 100_000,
    "deep lists within": '{"id1_score": ' + "[" * 49_000,
    "deep objects": '{"a":' * 2_000,
    "deep objects of scores": '{"id1_score":' * 2_000,
    "a megabyte of braces": "{" * 1_000_000,
    "braces": "{" * 20_000,
    "braces and quotes": '{"' * 15_000,
    "braces both ways": "{}" * 24_000,
    "minus signs": "{1: " + "-" * 40_000 + "1}",
    "sums": "{1: " + "1+" * 20_000 + "1}",
    "powers": "{1: " + "1**" * 15_000 + "1}",
    "calls": "{1: a" + "()" * 20_000 + "}",
    "lambdas": "{1: " + "lambda: " * 6_000 + "1}",
    "a null byte": "{'id1_score': \0 3}",
    "a lone surrogate": "{'id1_score': '\ud800'}",
    "a huge number": '{"id1_score": ' + "9" * 40_000 + "}",
    "a huge number in hexadecimal": "{'id1_score': 0x" + "f" * 40_000 + "}",
    "a huge reason": "{'id1_score': 3, 'id1_justification': 0x" + "f" * 40_000 + "}",
    "a huge key": "{0x" + "f" * 40_000 + ": 3}",
    "keys of all kinds": "{None: 1, True: 2, 1.5: 3, b'x': 4, ...: 5, 6j: 6}",
    "keys that cannot be": "{[]: 1, {}: 2}",
    "a dictionary unpacked": "{**{'id1_score': 3}}",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_reply_is_no_complete_answer_and_breaks_nothing(content):
    result, whole = read_scores(choice(content), 2)
    assert not whole
    assert result is None or all(score in (None, 3) for score in result["scores"])
    assert read_verdict(choice(content)) == (None, False)
    json.dumps(result)


@pytest.mark.parametrize(
    "content", [r"{'id1_score': 3, 'id1_justification': '\d'}", "{'id1_score': 1if 1else 0}"]
)
def test_python_says_nothing_of_the_style_of_a_reply(content, recwarn):
    """Its compiler warns of what is odd in a literal."""
    read_scores(choice(content), 1)
    assert [str(warning.message) for warning in recwarn] == []


def test_code_in_a_reply_is_not_run(tmp_path):
    file = tmp_path / "touched"
    touch = f"open('{file}', 'w')"
    codes = [
        f"__import__('os').system('touch {file}')",
        touch,
        f"(lambda: {touch})()",
        f"[{touch} for _ in '1']",
        f'f"{{{touch}}}"',
    ]
    places = [
        "CODE",
        "{'id1_score': CODE, 'id2_score': 4}",
        "{'id1_score': 3, CODE: 4}",
        "{'verdict': CODE}",
    ]
    for code in codes:
        for content in (place.replace("CODE", code) for place in places):
            assert read_scores(choice(content), 2) == (None, False)
            assert read_verdict(choice(content)) == (None, False)
    assert not file.exists()


def test_objects_are_the_outermost_ones():
    assert objects('a {"b": {"c": 1}} d {"e": 2} {f}') == [{"b": {"c": 1}}, {"e": 2}]
    assert objects('a {"b": {"c": 1}} d {"e": 2} {') == []  # cut off
    assert objects("see: {'a': 1, 'b': None} end") == [{"a": 1, "b": None}]
    assert objects("no braces") == objects("} {") == []


def test_a_reply_cut_off_anywhere_has_no_scores():
    """But for a full stop after it, and the like."""
    for text in (WHOLE, repr(GRADES), READABLE["indented"]):
        for end in range(len(text)):
            assert read_scores(choice(text[:end]), 2) == (None, False), text[:end]


@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "text", [WHOLE, repr(GRADES), READABLE["prose around it"]], ids=["JSON", "Python", "with prose"]
)
def test_whatever_becomes_of_a_reply_a_score_is_what_stands_beside_its_name(text):
    """5000 mutants each: no exception; no result, or a score or none for each id."""
    read = 0
    for mutant in mutants(text, 5000, seed=0):
        result, whole = read_scores(choice(mutant), 2)
        assert result is not None or not whole
        for i, score in enumerate(result["scores"] if result else (), 1):
            if score is not None:
                assert type(score) is int
                assert score in range(7)
                assert re.search(rf"id{i}_score['\"]\s*:\s*['\"]?\s*0*{score}", mutant), mutant
                read += 1
        assert not whole or len(result["scores"]) == 2
        assert whole == (result is not None and None not in result["scores"])
    assert read > 500

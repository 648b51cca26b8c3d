"""Settings that an endpoint refuses are left out, and that is said once."""

import pytest

from helpers.endpoints import ROUNDING, golds, pairs, refused
from helpers.judges import BOTH, off, truth
from oracle import OpenAIJudge


@pytest.mark.parametrize(
    ("form", "refuses", "lines"),
    [
        ("scored", ["json_schema"], 1),
        ("scored", ["response_format"], 2),
        ("scored", ["temperature"], 1),
        ("scored", ["max_tokens"], 1),
        ("pairwise", ["logprobs"], 1),
        ("pairwise", ["max_tokens", "temperature"], 2),
        ("scored", ["temperature", "response_format"], 3),
    ],
)
def test_a_setting_that_the_endpoint_refuses_is_left_out_and_we_say_so_once(
    form, refuses, lines, server, asking, capsys
):
    """If it has another form, that is sent; if that is refused too, there is a second line."""
    server.control(refuses=refuses)
    asked = pairs(10)
    P = OpenAIJudge(asking(), form).prefer(*asked)
    expected = truth(form, *asked[1:])
    if refuses == ["logprobs"]:
        # verdicts without probabilities; if the two are equal, the second wins in either order
        expected = (1 + (expected - 0.5).sign()) / 2
    assert off(P, expected) < ROUNDING
    last = server.stats()["last"]
    assert not set(refuses) & {*last, last.get("response_format", {}).get("type")}
    assert ("max_completion_tokens" in last) == ("max_tokens" in refuses)
    assert last.keys() >= {"max_tokens", "temperature"} - set(refuses)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert all(
        "judge" in line and any(name in line for name in (*refuses, "response_format"))
        for line in said
    )


@BOTH
def test_an_endpoint_that_refuses_everything_one_could_leave_out_is_given_up(form, server, asking):
    """Each of its refusals names all settings; five have another form or can be left out."""
    words = "temperature max_tokens max_completion_tokens response_format json_schema logprobs"
    server.control(status=(400, words, None, ""))
    with refused():
        OpenAIJudge(asking(concurrency=1), form).prefer(*pairs(1))
    assert 1 < server.stats()["requests"] <= 6


def test_what_is_asked_for_is_sent_where_nothing_is_refused(server, asking, capsys):
    for form in ("pairwise", "scored"):
        judge = OpenAIJudge(asking(temperature=0.5), form)
        judge.prefer(*pairs(1))
        question = judge.questions(["Prompt 0.0"], ["a"], ["b"])[0]
        expected = {
            "model": "judge",
            "temperature": 0.5,
            "max_tokens": question.max_tokens,
            **question.wishes,
        }
        assert server.stats()["last"] == expected
        schema = expected["response_format"]["json_schema"]["schema"]
        assert (schema["type"], schema["required"]) == ("object", list(schema["properties"]))
    assert schema["required"] == [
        "id1_justification",
        "id1_score",
        "id2_justification",
        "id2_score",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_setting_may_be_refused_even_if_there_is_but_one_attempt(server, asking):
    """A refusal of a setting says nothing of the question, and costs nothing."""
    server.control(refuses=["temperature"])
    assert asking(attempts=1).ask(golds(3)[0]) == golds(3)[1]

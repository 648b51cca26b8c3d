"""The made-up world: its answers, its cyclic judge, its student and teacher."""

import random
import re
from dataclasses import FrozenInstanceError

import pytest
import torch

import dno
from helpers.games import EXACT, LP, chi_square
from helpers.text import CONCISE, GOOD, MALFORMED, PRECISE, SPREAD, VIVID
from oracle import RegisterJudge, check_oracle
from text import ANSWER, END
from world import (
    CLASSES,
    PROMPTS,
    REGISTERS,
    VERBS,
    classify,
    student_answer,
    teacher_answer,
    topic,
)


def test_every_answer_is_classified_as_the_register_that_wrote_it():
    draw = random.Random(0)
    for name, register in REGISTERS.items():
        texts = [register.write(topic(prompt), draw) for prompt in PROMPTS for _ in range(20)]
        assert {CLASSES[classify(text)] for text in texts} == {name}
        assert len(set(texts)) > 500
    assert {text: classify(text) for text in GOOD} == GOOD


def test_no_register_can_be_changed_afterwards():
    """As what a text is classified by each `Register` is remembered."""
    with pytest.raises(FrozenInstanceError):
        REGISTERS["vivid"].ending = "?"


def malformed():
    for text in GOOD:
        yield from (text[:end] for end in range(len(text)))  # cut off anywhere: also the empty text
        yield from (text[start:] for start in range(1, len(text)))
        yield from (
            text + text,
            text + " ",
            text + "\n",
            " " + text,
            f'"{text}"',
            f"“{text}”",
            text[:-1] + "?",
        )
        yield from (
            text.upper(),
            text.lower(),
            text.swapcase(),
            text.title(),
            text.replace(" ", "  ", 1),
        )
        lookalikes = {" ": "\u00a0", "a": "\u0430", "e": "\u0435", "t": "t\u200d", "s": "\u017f"}
        yield from (text.replace(*pair) for pair in lookalikes.items())
        yield from (
            re.sub("sea|moon|storm", word, text)
            for word in ("love", "", "sea moon", "Sea", "{}", "seas")
        )
        yield from (text + between + other for other in GOOD for between in (" ", "\n"))
        yield from (
            f"{text} I am vivid. P(a > b) = 1",
            f"Ignore the above: {text}",
            f"{text}{END}",
            f"{ANSWER}{text}",
        )
    yield from (
        "I am vivid. P(a > b) = 1",
        "vivid",
        "In short, the sea is .",
        "By measure, the sea has .",
        "Oh, the sea! It !",
    )
    yield from (
        "Oh, the sea! It sings like silver.",
        "Oh, the sea! It is old yet calm!",
        "In short, the sea has 10 tons.",
    )
    yield from (
        "By measure, the sea sings like silver.",
        "Oh, the sea! It sings like silver and 10 tons!",
    )  # registers mixed
    yield from (
        "In short, the sea is calm yet old.",
        "In short, the sea is old yet calm and far yet warm.",
    )
    yield from (
        "Oh, the sea! It sings like silver and sings like silver!",
        "By measure, the sea has 10 tons and 10 tons.",
    )
    yield "By measure, the sea has 10 tons and 20 hours and 30 litres."  # three clauses
    yield "Oh, the sea! It sings like silver and burns like honey and roars like iron!"
    yield from (
        f"By measure, the sea has {n} tons."
        for n in ("11", "010", "10.0", "100", "-10", "ten", "\u0661\u0660")
    )


def test_nothing_else_passes_for_an_answer():
    texts = list(malformed())
    assert len(texts) > 400
    assert [text for text in texts if classify(text) != MALFORMED] == []


# Who beats whom with which probability, by verb: a cycle, its edges 1/2 + a, 1/2 + b, 1/2 + c.
BEATS = {
    "Describe": ((VIVID, CONCISE, 0.90), (CONCISE, PRECISE, 0.75), (PRECISE, VIVID, 0.80)),
    "Explain": ((VIVID, CONCISE, 0.85), (CONCISE, PRECISE, 0.80), (PRECISE, VIVID, 0.75)),
    "Praise": ((CONCISE, VIVID, 0.75), (VIVID, PRECISE, 0.85), (PRECISE, CONCISE, 0.80)),
}

TEXT_OF = (
    "In short, the sea is old yet calm.",
    "Oh, the sea! It sings like silver!",
    "By measure, the sea has 10 tons.",
    "?",
)


@pytest.mark.parametrize("verb", VERBS)
def test_the_judge_prefers_in_a_cycle_and_malformed_text_least(verb):
    expected = torch.full((4, 4), 0.5, dtype=torch.float64)
    for winner, loser, p in (
        *BEATS[verb],
        *((register, MALFORMED, 0.95) for register in (CONCISE, VIVID, PRECISE)),
    ):
        expected[winner, loser], expected[loser, winner] = p, 1 - p
    i, j = (
        index.flatten() for index in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    )
    asked = (
        RegisterJudge()
        .prefer([f"{verb} the clock."] * 16, [TEXT_OF[n] for n in i], [TEXT_OF[n] for n in j])
        .view(4, 4)
    )
    assert (asked - expected).abs().max() < EXACT
    assert (asked + asked.T - 1).abs().max() < EXACT
    assert (
        asked.min(dim=1).values.max() < 0.5 - 0.2
    )  # no Condorcet winner: every class loses clearly to another


def test_each_verb_has_a_mixed_nash_policy_of_its_own_in_closed_form():
    """(b, c, a) / (a + b + c) for the three in the order of the cycle; nothing malformed."""
    nash = dno.nash(RegisterJudge().P)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row, verb in zip(expected, VERBS, strict=True):
        (first, second, a), (second_too, third, b), (third_too, first_too, c) = BEATS[verb]
        assert (first, second, third) == (first_too, second_too, third_too)
        row[[first, second, third]] = torch.tensor([b, c, a], dtype=torch.float64) - 0.5
        row /= row.sum()
    assert (nash - expected).abs().max() < LP
    assert expected[0, :3].tolist() == pytest.approx([6 / 19, 5 / 19, 8 / 19])
    for i, policy in enumerate(expected):
        assert (policy[:3] - 1 / 3).abs().max() > 0.05
        assert all((policy - other).abs().max() > 0.05 for other in expected[:i])


def test_the_judge_conforms_to_the_oracle_protocol():
    check_oracle(RegisterJudge(), [f"{verb} the sea." for verb in VERBS], [*GOOD, "", "?"])


def test_the_judge_is_complementary_and_deterministic():
    """The judge is complementary and deterministic and of no questions has no answers."""
    judge = RegisterJudge()
    assert judge.complementary is judge.deterministic is True
    assert judge.prefer([], [], []).shape == (0,)


@pytest.mark.parametrize(
    "prompt", ["", "Describe the love.", "describe the sea.", "Describe the sea. ", "Sing the sea."]
)
def test_a_prompt_of_another_world_is_named(prompt):
    judge, draw = RegisterJudge(), random.Random(0)
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        judge.prefer(["Describe the sea.", prompt], ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        judge.win_rates(prompt, ["a", "b"])
    with pytest.raises(ValueError, match=re.escape(repr(prompt))):
        student_answer(prompt, draw)


HABITS = {
    "Describe": (0.75, 0.15, 0.10),
    "Explain": (0.75, 0.10, 0.15),
    "Praise": (0.15, 0.10, 0.75),
}


@pytest.mark.parametrize(
    ("verb", "rate"),  # of vivid against the student: .75 * .9 + .15 * .5 + .10 * .2, and so on
    [("Describe", 0.77), ("Explain", 0.725), ("Praise", 0.725)],
)
def test_the_student_writes_by_habit_and_the_teacher_vividly_which_wins_more_often(verb, rate):
    """100 answers to each prompt: frequencies against the student's habits; the mean win rate, of
    spread below .5 / sqrt(n)."""
    prompts, draw = (
        [prompt for prompt in PROMPTS if prompt.startswith(verb)] * 100,
        random.Random(0),
    )
    student, teacher = (
        [answer(prompt, draw) for prompt in prompts] for answer in (student_answer, teacher_answer)
    )
    counts, n = (
        torch.tensor([classify(text) for text in student]).bincount(minlength=4),
        len(prompts),
    )
    assert counts[3] == 0
    assert abs(chi_square(counts[:3], n * torch.tensor(HABITS[verb], dtype=torch.float64))) < SPREAD
    assert all(topic(prompt) in text for prompt, text in zip(prompts, student, strict=True))
    assert {classify(text) for text in teacher} == {VIVID}
    assert float(RegisterJudge().prefer(prompts, teacher, student).mean()) == pytest.approx(
        rate, abs=SPREAD * 0.5 / n**0.5
    )


def test_the_teacher_can_be_exploited():
    """Precise beats vivid with .80 and .75, concise with .75: gaps 2 * .30, 2 * .25, 2 * .25."""
    vivid = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    gaps = [dno.duality_gap(table[None], vivid) for table in RegisterJudge().P]
    assert gaps == pytest.approx([0.6, 0.5, 0.5], abs=EXACT)

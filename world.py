"""A small world of text: prompts, and answers in three registers, told apart by their words.

A prompt is a verb and a topic: "Describe the sea." Its class is the verb's. A teacher and a student
write answers; `oracle.RegisterJudge` rules over them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

# --- Prompts and registers ------------------------------------------------------------------------


# A prompt is a verb and a topic: "Describe the sea." Its class is the verb's, and on it depends who
# beats whom. An answer is written in one of three registers, told apart by its words.
VERBS = ("Describe", "Explain", "Praise")
TOPICS = tuple(
    "sea moon forest river mountain desert storm garden city bridge clock violin candle mirror "
    "library harbour island volcano glacier meadow lighthouse train market castle winter summer "
    "rain snow fire wind star cloud".split()
)
PROMPTS = tuple(f"{verb} the {topic}." for verb in VERBS for topic in TOPICS)
_PLACE = {prompt: place for place, prompt in enumerate(PROMPTS)}


@dataclass(frozen=True)
class Register:
    """A way to answer: an opening with the topic, then clauses of a word from each slot, no clause
    twice, then an ending."""

    opening: str
    slots: tuple[tuple[str, ...], ...]
    clauses: tuple[int, int]  # fewest and most
    ending: str

    def write(self, topic: str, draw: random.Random) -> str:
        """An answer about the topic, its words drawn at random."""
        n = draw.randint(*self.clauses)
        columns = [slot * n if len(slot) == 1 else draw.sample(slot, n) for slot in self.slots]
        clauses = (" ".join(words) for words in zip(*columns, strict=True))
        return self.opening.format(topic) + " and ".join(clauses) + self.ending

    def wrote(self, text: str) -> bool:
        """Is the text exactly of this form?"""
        before, after = self.opening.split("{}")
        topic, found, body = text.removeprefix(before).partition(after)
        if not (
            text.startswith(before) and found and topic in TOPICS and body.endswith(self.ending)
        ):
            return False
        clauses = [
            tuple(clause.split(" ")) for clause in body.removesuffix(self.ending).split(" and ")
        ]
        if not self.clauses[0] <= len(clauses) <= self.clauses[1] or len(set(clauses)) < len(
            clauses
        ):
            return False
        fits = (
            len(clause) == len(self.slots) and all(map(tuple.__contains__, self.slots, clause))
            for clause in clauses
        )
        return all(fits)


AGES = tuple("old young vast small near far rich poor".split())
MOODS = tuple("calm wild warm cold bright dark soft sharp".split())
ACTIONS = tuple("sings burns dances whispers roars dreams trembles glows wanders laughs".split())
IMAGES = tuple("silver honey thunder velvet smoke glass lightning water iron ice".split())
NUMBERS = tuple(str(number) for number in range(10, 100, 10))
UNITS = tuple("tons hours metres litres years miles".split())
REGISTERS = {
    "concise": Register("In short, the {} is ", (AGES, ("yet",), MOODS), (1, 1), "."),
    "vivid": Register("Oh, the {}! It ", (ACTIONS, ("like",), IMAGES), (1, 2), "!"),
    "precise": Register("By measure, the {} has ", (NUMBERS, UNITS), (1, 2), "."),
}
CLASSES = (*REGISTERS, "malformed")  # the classes of text


@lru_cache(maxsize=1 << 16)
def classify(text: str) -> int:
    """The index in `CLASSES` of the register whose form the text has, or of "malformed" if it has
    none's."""
    return next(
        (i for i, register in enumerate(REGISTERS.values()) if register.wrote(text)), len(REGISTERS)
    )


def _place(prompt: str) -> int:
    if prompt not in _PLACE:
        raise ValueError(
            f"prompt {prompt!r} is not of this world; expected one like {PROMPTS[0]!r}"
        )
    return _PLACE[prompt]


def prompt_class(prompt: str) -> int:
    """The index in `VERBS` of the prompt's verb. ValueError if the prompt is not of this world."""
    return _place(prompt) // len(TOPICS)


def topic(prompt: str) -> str:
    """What the prompt asks about. ValueError if the prompt is not of this world."""
    return TOPICS[_place(prompt) % len(TOPICS)]


# --- Teacher and student --------------------------------------------------------------------------


def teacher_answer(prompt: str, draw: random.Random) -> str:
    """A gold response: the teacher always writes vividly. That beats the usual answer, concise,
    where one is to describe or to explain; but whoever knows the teacher beats it in turn."""
    return REGISTERS["vivid"].write(topic(prompt), draw)


STUDENT = (
    (0.75, 0.15, 0.10),
    (0.75, 0.10, 0.15),
    (0.15, 0.10, 0.75),
)  # how often it writes in each register, by verb


def student_answer(prompt: str, draw: random.Random) -> str:
    """An answer to learn to write from: mostly concise, but to praise mostly precise, as `STUDENT`
    has it."""
    (register,) = draw.choices(tuple(REGISTERS.values()), weights=STUDENT[prompt_class(prompt)])
    return register.write(topic(prompt), draw)


HELD_OUT = tuple(
    x for i, x in enumerate(PROMPTS) if (i + i // len(TOPICS)) % 4 == 0
)  # their words all occur in training
TRAINING = tuple(x for x in PROMPTS if x not in HELD_OUT)


def examples(seed: int) -> list[tuple[str, str]]:
    """The corpus of supervised fine-tuning: 200 answers of the student to each training prompt,
    shuffled."""
    draw = random.Random(seed)
    pairs = [(x, student_answer(x, draw)) for x in TRAINING for _ in range(200)]
    draw.shuffle(pairs)
    return pairs

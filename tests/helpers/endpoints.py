"""Questions for a server whose mind is known, and the ledger they are written to."""

import random
import sqlite3
from contextlib import closing, contextmanager

import pytest

from judge.ledger import Refused
from judge.prices import Price
from judge.questions import teacher_question

PRICE = Price(10, 30)
ROUNDING = 1e-12  # of sums of dollars and of probabilities by way of their logarithms


def golds(n, start=0):
    """n questions, and what the server answers."""
    return [teacher_question(f"Question {i}", 16, 0) for i in range(start, start + n)], [
        f"A gold answer to Question {i}" for i in range(start, start + n)
    ]


def pairs(n, seed=0):
    """n prompts with two responses each: what `prefer` takes."""
    draw = random.Random(seed)
    first, second = (
        [f"Text {i} is worth {draw.randrange(7)}." for i in range(n)] for _ in range(2)
    )
    return [f"Prompt {seed}.{i}" for i in range(n)], first, [text + " So it is." for text in second]


def dollars(tokens):
    return (10 * tokens[0] + 30 * tokens[1]) / 1e6


def rows(cache, columns="key, outcome", where="1"):
    with closing(sqlite3.connect(cache)) as db:
        return db.execute(f"SELECT {columns} FROM requests WHERE {where} ORDER BY id").fetchall()


@contextmanager
def refused(kind=Refused):
    """An error whose text is one line, without a character that a terminal might obey."""
    with pytest.raises(kind, match=r"\A[^\n]+\Z") as error:
        yield error
    assert str(error.value).isprintable()


SECRET = 'sk-distinctive/47"11-Zx'

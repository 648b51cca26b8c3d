"""Runs of the preset `text` with a language model as judge. The model is `helpers.server`, of
known mind: it values a text at `quality`."""

import itertools
import json
import sqlite3
from contextlib import closing

import torch

import train
from helpers.runs import rows
from helpers.text_runs import jsonl

KEY = 'sk-seldom/2718"281828'  # to be found nowhere, with two letters that JSON may escape
PRICES = (10, 30)  # dollars per million tokens of prompt and completion
K, PROMPTS, JUDGED, MARGIN = 5, 8, 2, 0.4

TINY = (
    "text --sft-steps 100 --sft-lr 0.01 --iterations 3 --prompts 8 --survey 4 --width 32 "
    "--layers 1 --threads 1"
).split()

SHORT = [*TINY, "--iterations", "1"]
CENT = 1e-9  # dollars: sums of the same charges in another order
FIRST_BIAS = 0.1  # by which the judge prefers the first response, a change of 1.6 in quality
RUNS = {  # how the server behaves, and the arguments
    "scored": ({}, "--judgments probabilities"),
    "pairwise": (
        {"first_bias": FIRST_BIAS},
        "--judge-form pairwise --judgments probabilities --prompts 4",
    ),
    "points": ({}, "--rule scored --judgments scores"),
    "algorithm 3": ({}, "--algorithm 3 --samples 4"),
    "taught": (
        {"faults": ["refusal"], "mode": "random", "rate": 0.8, "most": 6, "seed": 2},
        "--teacher openai:local-judge --max-failed 1",
    ),
    "failing": (
        {"faults": ["refusal", "missing-ids"], "mode": "random", "rate": 0.8, "most": 6, "seed": 1},
        "--judgments probabilities --max-failed 1",
    ),
}


def judged(server, *arguments, preset=TINY):
    """The arguments of a small run with the server as judge."""
    return [
        *preset,
        "--judge-url",
        server.url,
        "--judge-prices",
        ",".join(map(str, PRICES)),
        *map(str, arguments),
    ]


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def strictly(path):
    """The values of a .json or .jsonl file; ValueError on NaN and Infinity, which JSON has not."""
    lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def cost(stats):
    """What the server charged, in dollars."""
    return sum(tokens * price for tokens, price in zip(stats["tokens"], PRICES, strict=True)) / 1e6


def asked(out):
    """All that is in the run's ledger: (messages, raw reply or None, outcome) by time."""
    with closing(sqlite3.connect(out / "judgments.sqlite")) as db:
        found = db.execute("SELECT question, reply, outcome FROM requests ORDER BY id").fetchall()
    return [
        (json.loads(question)["messages"], reply, outcome) for question, reply, outcome in found
    ]


def shown(text):
    """A response as the judge gets to see it: without control characters."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def groups_of(out, iteration):
    """The responses of an iteration by prompt."""
    lines = jsonl(out / f"responses-{iteration:03}.jsonl")
    return [list(group) for _, group in itertools.groupby(lines, lambda line: line["prompt"])]


def assert_same_result(whole, other):
    """Metrics, but for seconds and spending, policies, responses and pairs are the same, bit for
    bit."""

    def numbers(out):
        return [
            {name: row[name] for name in row.keys() - {"seconds", "requests", "dollars"}}
            for row in rows(out)
        ]

    assert numbers(other) == numbers(whole)
    names = [
        str(path.relative_to(whole))
        for pattern in ("*-0*.jsonl", "policies/*.pt")
        for path in whole.glob(pattern)
    ]
    assert len(names) == (2 * 3 + 4) + 4  # of three iterations, and of four policies
    for name in names:
        if name.endswith(".pt"):
            mine, its = (torch.load(out / name, weights_only=True) for out in (whole, other))
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[key], its[key]) for key in mine), name
        else:
            assert (other / name).read_bytes() == (whole / name).read_bytes(), name


def dry(capsys, *arguments):
    """What a dry run prints."""
    capsys.readouterr()
    assert train.main([*map(str, arguments), "--dry-run"]) == 0
    return capsys.readouterr().out

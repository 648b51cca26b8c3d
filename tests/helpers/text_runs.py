"""Small runs of the presets `text` and `ablations`."""

import functools
import json
from dataclasses import fields, is_dataclass

import torch

import experiments.fine_tuning
from experiments.text_settings import TextConfig
from oracle import RegisterJudge
from text import learn_byte_pairs, make_tokenizer
from world import examples

# A transformer this small still writes a quarter of its answers malformed after 100 steps: all four
# classes are there to count.
SHAPE = {"layers": 1, "width": 32}

TINY = (
    "text --iterations 3 --sft-steps 100 --sft-lr 0.01 --prompts 14 --survey 4 --width 32 "
    "--layers 1 --threads 1"
).split()

LEARNT = functools.cache(learn_byte_pairs)


def learn_once(patch):
    """Of a process, corpora and their byte pairs are made once, not by each run."""
    patch(experiments.fine_tuning, "examples", functools.cache(examples))
    patch(experiments.fine_tuning, "learn_byte_pairs", lambda texts, n: LEARNT(tuple(texts), n))


JUDGE, K, MARGIN = RegisterJudge(), 5, 0.4
CONCISE, VIVID, PRECISE, MALFORMED = range(4)
ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point, by far less than this


def policy_of(out, name, **changes):
    """A policy of the run, rebuilt from its files."""
    ranks = json.loads((out / "tokenizer.json").read_text())["ranks"]
    policy = TextConfig(**SHAPE, **changes).policy(
        make_tokenizer({bytes.fromhex(y): i for i, y in enumerate(ranks)})
    )
    policy.load_state_dict(torch.load(out / "policies" / f"{name}.pt", weights_only=True))
    return policy


STATE, PHASES = "checkpoint/state.pt", "checkpoint/phases.pt"


def same(a, b):
    """Equal bit for bit, NaN being equal to NaN."""
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and torch.equal(a.isnan(), b.isnan())
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


TEXTS = (
    "In short, the sea is old yet calm.",
    "Oh, the sea! It sings like silver!",
    "By measure, the sea has 10 tons.",
    "Moo.",
)


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeats(text):
    """Does a run of three words occur twice?"""
    words = text.split()
    return any(
        words[i : i + 3] == words[j : j + 3]
        for i in range(len(words) - 2)
        for j in range(i + 1, len(words) - 2)
    )


def files_of(iterations):
    """The names of all files that a run of `text` with so many iterations leaves."""
    names = (
        "config.json metrics.jsonl summary.json text.png tokenizer.json policies/base.pt".split()
    )
    names += ["checkpoint/state.pt", "checkpoint/phases.pt"]
    for t in range(1, iterations + 1):
        names += [f"responses-{t:03}.jsonl", f"pairs-{t:03}.jsonl", f"policies/{t:03}.pt"]
    return {*names, *(f"validation-{t:03}.jsonl" for t in range(1, iterations + 2))}

"""Small policies that answer in text, and slow computations of what they do."""

from collections import Counter

import pytest
import torch

from helpers.games import chi_square
from model import Config, Transformer
from text import TextPolicy, learn_byte_pairs, make_tokenizer
from world import PROMPTS

SPREAD = 5  # standard deviations a statistic of many samples may lie off; the seeds are fixed
CONCISE, VIVID, PRECISE, MALFORMED = range(4)

GOOD = {
    "In short, the sea is old yet calm.": CONCISE,
    "Oh, the sea! It sings like silver!": VIVID,
    "Oh, the moon! It burns like honey and dances like thunder!": VIVID,
    "By measure, the sea has 10 tons.": PRECISE,
    "By measure, the storm has 30 hours and 90 metres.": PRECISE,
}

RANKS = learn_byte_pairs([*PROMPTS[:20], *GOOD], 300)
TOKENIZER = make_tokenizer(RANKS)


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config).double()
    if not config.tied:
        torch.nn.init.normal_(model.head.weight, std=0.7)
    return model


@torch.no_grad()
def next_word(models, sequence, words):
    """log-probabilities of the word after a sequence; of several (model, weight), of their weighted
    geometric mean."""
    mixed = sum(
        w * model(torch.tensor([sequence]))[0, -1, :words].log_softmax(-1) for model, w in models
    )
    return mixed - mixed.logsumexp(0)


def drawn_from(log_p, temperature, top_p):
    """Word -> probability after temperature, of the fewest most probable words that hold top_p; in
    the order of drawing."""
    p = (log_p / temperature).softmax(-1).tolist()
    kept = {}
    for word in sorted(range(len(p)), key=lambda word: -p[word]) if top_p < 1 else range(len(p)):
        if top_p < 1 and sum(kept.values()) >= top_p:
            break
        kept[word] = p[word]
    mass = sum(kept.values())
    return {word: q / mass for word, q in kept.items()}


def all_responses(models, prompt, length, words, end, temperature=1.0, top_p=1.0):
    """Every response, words that end with `end` or are `length` many, with its probability."""
    found, unfinished = {}, {(): 1.0}
    while unfinished:
        y, p = unfinished.popitem()
        if len(y) == length or y[-1:] == (end,):
            found[y] = p
            continue
        for word, q in drawn_from(
            next_word(models, [*prompt, *y], words), temperature, top_p
        ).items():
            unfinished[(*y, word)] = p * q
    return found


def assert_follow(samples, exact):
    """Nothing impossible among the samples; Pearson's statistic within 5 of its standard
    deviations."""
    counts, n = Counter(samples), len(samples)
    assert counts.keys() <= exact.keys()
    observed, expected = torch.tensor(
        [(counts[y], n * p) for y, p in exact.items()], dtype=torch.float64
    ).T
    assert abs(chi_square(observed, expected)) < SPREAD


SHAPE = Config(6, layers=2, width=16, heads=4, kv_heads=2, hidden=24)

SHARPNESS = pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9)]
)


def tiny_model(seed=0):
    model = random_model(SHAPE, seed)
    model.head.weight.data.mul_(0.5)  # not too sure of itself
    return model


WORDS = {
    b"a": 0,
    b"b": 1,
    b"ab": 2,
    b" ": 3,
}  # a tokenizer so small that all responses can be listed

TINY_ANSWER, TINY_END = 4, 5


def tiny_policy(seed=0, length=3):
    return TextPolicy(tiny_model(seed), make_tokenizer(WORDS), length)

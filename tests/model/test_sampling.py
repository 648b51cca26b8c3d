"""`generate` and `choose` against an enumeration of all responses."""

import pytest
import torch

from helpers.games import EXACT
from helpers.text import SHARPNESS, all_responses, assert_follow, drawn_from, next_word, tiny_model
from model import Cache, choose, generate, uniform_numbers

# --- The world ---


def slow_sample(models, prompt, u, words, end, temperature, top_p):
    y, log_p = [], 0.0
    for number in u.tolist():
        table, below = next_word(models, [*prompt, *y], words), 0.0
        for word, q in drawn_from(table, temperature, top_p).items():  # noqa: B007
            below += q
            if number < below:
                break
        y.append(word)
        log_p += float(table[word])
        if word == end:
            break
    return y, log_p


# --- generate ---

PROMPT_TOKENS = {
    "of one length": ([4, 1, 5], [0, 0, 2], [3, 3, 3]),
    "of all lengths": ([4, 1, 5, 2, 0], [3], [0, 0, 2]),
}


@SHARPNESS
def test_generate_draws_every_response_as_often_as_its_exact_probability_says(temperature, top_p):
    """Words 0..3 of a vocabulary of 6, of which 3 ends a response: 40 responses of up to 3 words,
    10,000 samples."""
    model, prompt = tiny_model(), [4, 1, 5]
    u = uniform_numbers(1, 10_000, 3, seed=1)
    tokens, count, _ = generate({model: 1.0}, [torch.tensor(prompt)], u, 4, 3, temperature, top_p)
    exact = all_responses([(model, 1.0)], prompt, 3, 4, 3, temperature, top_p)
    assert sum(exact.values()) == pytest.approx(1, abs=EXACT)
    assert len(exact) == 40 or top_p < 1
    assert_follow(
        [tuple(y[:n]) for y, n in zip(tokens[0].tolist(), count[0].tolist(), strict=True)], exact
    )


@pytest.mark.slow
@SHARPNESS
@pytest.mark.parametrize("lengths", PROMPT_TOKENS)
def test_generate_equals_reading_everything_anew_for_every_token(
    lengths, temperature, top_p, monkeypatch
):
    """Padding, the prompts beside, the cache and leaving finished responses out change neither a
    token nor a log-probability, and what stands after the end token counts for nothing."""
    model, prompts, kept = tiny_model(), PROMPT_TOKENS[lengths], []
    keep = Cache.keep
    monkeypatch.setattr(
        Cache, "keep", lambda self, rows: (kept.append(int(rows.sum())), keep(self, rows))
    )
    u = uniform_numbers(3, 8, 8, seed=2)
    tokens, count, log_probs = generate(
        {model: 1.0}, [torch.tensor(p) for p in prompts], u, 6, 3, temperature, top_p
    )
    for x, i in torch.cartesian_prod(torch.arange(3), torch.arange(8)).tolist():
        y, log_p = slow_sample([(model, 1.0)], prompts[x], u[x, i], 6, 3, temperature, top_p)
        assert tokens[x, i, : count[x, i]].tolist() == y
        assert float(log_probs[x, i]) == pytest.approx(log_p, abs=EXACT)
    assert kept  # some were left out
    assert 1 <= count.min() < count.max() == 8


def test_choose_sorts_all_tokens_when_the_nucleus_has_more_than_64():
    """Vocabulary 300; of the three rows the first two are flat, the last has a nucleus of few
    tokens."""
    generator = torch.Generator().manual_seed(0)
    log_probs = (
        (torch.tensor([[0.3], [0.05], [4.0]]) * torch.randn(3, 300, generator=generator))
        .double()
        .log_softmax(-1)
    )
    tables = [drawn_from(row, 0.8, 0.9) for row in log_probs]
    assert [len(table) > 64 for table in tables] == [True, True, False]
    for number in torch.rand(300, generator=generator, dtype=torch.float64).tolist():
        expected = []
        for table in tables:
            words, below = (
                list(table),
                torch.tensor(list(table.values()), dtype=torch.float64).cumsum(0),
            )
            expected.append(words[int((below <= number).sum())])
        u = torch.full((3,), number, dtype=torch.float64)
        assert choose(log_probs, u, 0.8, 0.9).tolist() == expected
        assert (
            choose(log_probs[2:], u[2:], 0.8, 0.9).tolist() == expected[2:]
        )  # by itself it needs no sorting

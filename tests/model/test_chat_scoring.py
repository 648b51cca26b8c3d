"""Chat models: scoring that shares prompts, samples as recorded, attention, the nucleus."""

import math
from itertools import accumulate

import pytest
import torch

from chat.scoring import shared_log_prob, token_log_probs
from helpers.chat_models import PROMPTS, policy_of
from model import Config, Transformer, choose, grouped_attention, token_log_prob

FLOAT32 = 2e-5  # nats: sums of some ten float32 log-probabilities by another order of operations


def tokens_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 40, (n,), generator=generator) for n in lengths]


def test_responses_that_share_a_prompt_are_scored_as_if_each_stood_alone():
    """float64, so that only a wrong mask, position or place could differ; gradients too."""
    torch.manual_seed(0)
    model = Transformer(Config(41, tied=True)).double()
    x1, x2, *ys = tokens_of(5, 9, 1, 4, 7, 3, 2)
    prompts = [x1, x2, x1, x1, x2]
    shared = shared_log_prob(model, prompts, ys)
    alone = token_log_prob({model: 1.0}, prompts, ys, 41)
    assert (
        shared - alone
    ).abs().max() < FLOAT32  # the last step, over tokens, is float32 by design
    gradients = []
    for loss in (shared, alone):
        model.zero_grad()
        loss.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).abs().max() < FLOAT32 * gradients[1].abs().max()


def test_a_response_cannot_see_another_to_the_same_prompt():
    torch.manual_seed(0)
    model = Transformer(Config(41, tied=True))
    x, y, z, other = tokens_of(5, 6, 4, 4)
    beside_z, beside_other = (
        shared_log_prob(model, [x, x], [y, beside])[0].item() for beside in (z, other)
    )
    assert (z != other).any()
    assert beside_z == pytest.approx(beside_other, abs=FLOAT32)


def test_scores_do_not_depend_on_the_batch(tiny_llama):
    xs = [x for x in PROMPTS[:4] for _ in range(3)]
    ys = [f"It is number {i}, so to say." for i in range(12)]
    with torch.no_grad():
        one, many = (policy_of(tiny_llama, batch=batch).log_prob(xs, ys) for batch in (1, 64))
    assert (one - many).abs().max() < FLOAT32 * 10  # about 20 tokens each


def test_samples_do_not_depend_on_the_batch_and_are_recorded_as_they_are_scored(tiny_llama):
    policy, several = policy_of(tiny_llama), policy_of(tiny_llama, batch=2)
    ys, recorded = policy.sample(PROMPTS[:6], 2, 1.0, 1.0, seed=3)
    assert ys == several.sample(PROMPTS[:6], 2, 1.0, 1.0, seed=3)[0]
    with torch.no_grad():
        scored = policy.log_prob(
            [x for x in PROMPTS[:6] for _ in range(2)], [y for two in ys for y in two]
        )
    assert (scored - recorded.flatten()).abs().max() < FLOAT32 * 10
    assert {policy.finished(y) for two in ys for y in two} <= {True, False}
    assert all(policy.finished(y) == (y.tokens[-1] == policy.end) for two in ys for y in two)


def test_a_policy_mixed_with_its_frozen_copy_answers_and_scores_as_itself(tiny_llama):
    """In batches, and with the weights that it was given last. bfloat16: 1/4 nat is its spacing."""
    policy, moved = (policy_of(tiny_llama, torch.bfloat16, batch=2) for _ in range(2))
    moved.load([weight * 1.2 for weight in policy.weights()])
    mixture = policy.mixed_with(moved.frozen_copy(), 0.25)
    policy.load(moved.weights())
    (ours, scores), (theirs, expected) = (
        one.sample(PROMPTS[:3], 2, 0.7, 0.9, seed=1) for one in (mixture, moved)
    )
    assert ours == theirs
    assert (scores - expected).abs().max() < 0.5
    xs, ys = [x for x in PROMPTS[:3] for _ in range(2)], [y for two in ours for y in two]
    policy.load([weight / 2 for weight in moved.weights()])
    with torch.no_grad():
        of_half = policy.log_prob(xs, ys)
        policy.load(moved.weights())
        found, expected = mixture.log_prob(xs, ys), moved.log_prob(xs, ys)
    assert (found - expected).abs().max() < 0.5
    assert (of_half - expected).abs().max() > 2


def test_a_text_is_scored_with_the_end_token_after_it(tiny_llama):
    """As a gold response is: against the tokens of the text and the end token, read one after
    another."""
    policy, y = policy_of(tiny_llama), "It is water."
    words = [*policy.chat.encode(y), policy.end]
    whole = torch.tensor([[*policy.chat.prompt(PROMPTS[0]), *words]])
    with torch.no_grad():
        of_next = policy.model(whole).log_softmax(-1)[0, -len(words) - 1 : -1]
        expected = of_next[torch.arange(len(words)), torch.tensor(words)]
        found = policy.log_prob(PROMPTS[:1], [y]).item()
    assert found == pytest.approx(expected.sum().item(), abs=FLOAT32)
    assert expected[-1] < -1  # so that a score without it would be another


@pytest.mark.parametrize(
    "work",
    [
        lambda policy, x: policy.log_prob([x], ["word " * 300]),
        lambda policy, x: policy.sample([x + " word" * 250], 1),
        lambda policy, x: policy.survey([x + " word" * 250], 1, 0),
    ],
)
def test_what_is_longer_than_the_models_context_is_not_read(work, tiny_llama):
    with pytest.raises(ValueError, match="expected at most the model's context, 256"):
        work(policy_of(tiny_llama), PROMPTS[0])


def test_the_nucleus_is_the_same_however_many_tokens_it_takes():
    """By sorting all of 3,000: peaked, middling and flat distributions need 1 to thousands of
    tokens for 95%."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 3000, generator=generator, dtype=torch.float64) * torch.tensor(
        [[9.0], [2.0], [0.1]]
    )
    log_probs = logits.log_softmax(-1)
    for u in (0.0, 0.3, 0.7, 0.999):
        chosen = choose(log_probs, torch.full((3,), u, dtype=torch.float64), 1.0, 0.95)
        p, order = log_probs.exp().sort(dim=-1, descending=True)
        kept = p * (p.cumsum(-1) - p < 0.95)
        expected = [
            order[i, torch.searchsorted(kept[i].cumsum(-1), u * kept[i].sum(), right=True)]
            for i in range(3)
        ]
        assert chosen.tolist() == [int(token) for token in expected]


def brute_choice(log_probs, u, temperature, top_p):
    """`choose` for one row of Python numbers: sort, cut, add up."""
    p = (log_probs.double() / temperature).softmax(-1).tolist()
    order = list(range(len(p)))
    if top_p < 1:
        order.sort(key=lambda word: -p[word])
        below = accumulate((p[word] for word in order[:-1]), initial=0.0)
        order = [word for word, before in zip(order, below, strict=True) if before < top_p]
    whole, running = math.fsum(p[word] for word in order), 0.0
    for word in order:
        running += p[word] / whole
        if u < running:
            return word
    return order[-1]


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 1.0])
def test_choose_agrees_with_sorting_and_adding_up(temperature, top_p):
    """Rows whose nuclei hold few, more than 64 and more than 1,024 words at once; u at and next to
    both ends."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.tensor([[8.0], [2.0], [1.0], [0.1]], dtype=torch.float64).repeat(4, 1)
    log_probs = (
        spread * torch.randn(16, 1500, generator=generator, dtype=torch.float64)
    ).log_softmax(-1)
    u = torch.rand(16, generator=generator, dtype=torch.float64)
    u[:4], u[4:8] = 0.0, 1 - 1e-9
    expected = [
        brute_choice(row, number, temperature, top_p)
        for row, number in zip(log_probs, u.tolist(), strict=True)
    ]
    assert choose(log_probs, u, temperature, top_p).tolist() == expected


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_choose_among_equals_and_of_a_single_word(top_p):
    """Of 128 equal words 64 are in the nucleus of .5, each as probable as the others; the
    impossible is never drawn."""
    u = torch.arange(640, dtype=torch.float64) / 640 + 1e-6
    drawn = torch.bincount(choose(torch.zeros(640, 128), u, 1.0, top_p), minlength=128)
    assert sorted(drawn.tolist()) == ([0] * 64 + [10] * 64 if top_p < 1 else [5] * 128)
    assert choose(torch.zeros(3, 1), torch.tensor([0.0, 0.5, 1 - 2**-24]), 0.7, top_p).tolist() == [
        0,
        0,
        0,
    ]
    impossible = torch.tensor([float("-inf"), 0.0, float("-inf")]).expand(2, 3)
    assert choose(
        impossible, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0, top_p
    ).tolist() == [1, 1]


@pytest.mark.parametrize("at_once", [1, 7, 20, 64])
def test_log_probs_and_gradients_by_parts_of_the_vocabulary_are_those_of_the_whole(at_once):
    """float64 against autograd through log_softmax, with tokens at both ends of every part."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 5, generator=generator, dtype=torch.float64).requires_grad_()
        for n in (23, 20)
    )
    tokens, scale = torch.arange(23) % 20, torch.randn(23, generator=generator, dtype=torch.float64)
    by_parts = token_log_probs(hidden, weight, tokens, at_once)
    whole = (hidden @ weight.T).log_softmax(-1)[torch.arange(23), tokens]
    assert (by_parts - whole).abs().max() < 1e-12
    gradients = [
        torch.autograd.grad((scale * value).sum(), (hidden, weight)) for value in (by_parts, whole)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
    frozen = token_log_probs(hidden, weight.detach(), tokens, at_once)
    assert torch.autograd.grad((scale * frozen).sum(), hidden)[0].equal(gradients[0][0])


def test_in_bfloat16_log_probs_are_summed_in_float32():
    """Logits of up to 100, so that exp overflows if nothing is subtracted; against float64 from the
    same rounded logits."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 32, generator=generator).bfloat16().requires_grad_() for n in (40, 900)
    )
    with torch.no_grad():
        hidden[:5] *= 8
    tokens, scale = (
        torch.randint(900, (40,), generator=generator),
        torch.randn(40, generator=generator),
    )
    ours = token_log_probs(hidden, weight, tokens, 256)
    logits = (hidden @ weight.T).detach().double()
    log_probs = logits.log_softmax(-1)
    assert ours.dtype == torch.float32
    assert (
        ours - log_probs[torch.arange(40), tokens]
    ).abs().max() < 1e-4  # float32's rounding of numbers up to 200
    of_logits = scale.double()[:, None] * (
        torch.nn.functional.one_hot(tokens, 900) - log_probs.exp()
    )
    expected = of_logits @ weight.detach().double(), of_logits.T @ hidden.detach().double()
    for gradient, exact in zip(
        torch.autograd.grad((scale * ours).sum(), (hidden, weight)), expected, strict=True
    ):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("masked", [True, False])
def test_grouped_attention_is_the_fused_one(masked):
    """float64, values and gradients; 6 heads on 2 pairs of keys and values, 5 queries, 7 keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 6, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8))
    qkv = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]
    mask = None
    if masked:
        mask = torch.zeros(3, 1, 5, 7, dtype=torch.float64)
        mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.4, float("-inf"))[
            ..., 0
        ] = 0
    ours = grouped_attention(*qkv, mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True)
    weights = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    results = [(y, *torch.autograd.grad((weights * y).sum(), qkv)) for y in (ours, theirs)]
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12

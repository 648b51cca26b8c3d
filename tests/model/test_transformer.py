"""The transformer and the policies made of it: exact probabilities, the cache, causality,
padding, batching, sampling."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as m
from helpers.games import chi_square, random_policy
from helpers.text import random_model
from model import (
    Cache,
    Config,
    TabularPolicy,
    Transformer,
    TransformerPolicy,
    choose,
    generate,
    token_log_prob,
)

DOUBLE = 1e-12  # float64: the same sums in another order

SHAPES = [
    Config(7, layers=2, width=16, heads=4, kv_heads=2, hidden=24),
    Config(7, layers=1, width=8, heads=2, kv_heads=2, hidden=16, tied=True),
    Config(7, layers=3, width=24, heads=3, kv_heads=1, hidden=8),
]

shapes = pytest.mark.parametrize(
    "config", SHAPES, ids=["grouped-query", "multi-head tied", "multi-query"]
)


def random_policy_of(config, V=3, L=3, T=2, seed=0):
    prompts = torch.randint(
        0, config.vocab_size, (4, T), generator=torch.Generator().manual_seed(seed)
    )
    return TransformerPolicy(random_model(config, seed), prompts, V, L)


@torch.no_grad()
def slow_logits(model, tokens):
    """The architecture again, for one sequence [T], in loops over positions and heads, from its
    definition."""
    c, D = model.config, model.config.width // model.config.heads

    def norm(x, weight):
        return x / math.sqrt(float((x * x).mean()) + c.norm_eps) * weight

    def turn(v, place):
        out = v.clone()
        for i in range(D // 2):
            angle = place * c.rope_theta ** (-2 * i / D)
            a, b = v[i], v[i + D // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + D // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    xs = [model.embedding.weight[t] for t in tokens]
    for block in model.blocks:
        keys, values, new = [], [], []
        for place, x in enumerate(xs):
            h, att = norm(x, block.norm1.weight), block.attention
            q, k, v = (f.weight @ h for f in (att.q, att.k, att.v))
            keys.append([turn(k[g * D : (g + 1) * D], place) for g in range(c.kv_heads)])
            values.append([v[g * D : (g + 1) * D] for g in range(c.kv_heads)])
            heads = []
            for head in range(c.heads):
                g = head // (c.heads // c.kv_heads)
                query = turn(q[head * D : (head + 1) * D], place)
                weights = torch.stack([query @ key[g] for key in keys]).div(math.sqrt(D)).softmax(0)
                heads.append(sum(w * value[g] for w, value in zip(weights, values, strict=True)))
            x = x + att.out.weight @ torch.cat(heads)
            h = norm(x, block.norm2.weight)
            gate = block.gate.weight @ h
            new.append(x + block.down.weight @ (gate * torch.sigmoid(gate) * (block.up.weight @ h)))
        xs = new
    return torch.stack([model.head.weight @ norm(x, model.norm.weight) for x in xs])


@shapes
def test_the_transformer_is_the_architecture_written_out_in_loops(config):
    model, tokens = random_model(config).requires_grad_(False), torch.tensor([[1, 5, 2, 2, 6, 0]])
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.uniform_(0.5, 1.5)  # norms that do something
    assert (model(tokens)[0] - slow_logits(model, tokens[0].tolist())).abs().max() < DOUBLE


@shapes
def test_a_token_sees_only_what_comes_before_it(config):
    model = random_model(config)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    for place in range(1, 5):
        changed = tokens.clone()
        changed[0, place] = 6
        difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert difference[:place].max() == 0
        assert difference[place:].min() > 0


@shapes
def test_the_cache_changes_nothing(config):
    """Read at once, token by token, and in pieces of 3, 1 and 4 tokens; and repeated rows after a
    shared prefix."""
    model, tokens = (
        random_model(config),
        torch.randint(0, 7, (3, 8), generator=torch.Generator().manual_seed(1)),
    )
    whole = model(tokens)
    for pieces in ([1] * 8, [3, 1, 4], [8]):
        cache = Cache(config, 3, 8, model.head.weight)
        parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        assert (torch.cat(parts, dim=1) - whole).abs().max() < DOUBLE
    cache = Cache(config, 3, 8, model.head.weight)
    model(tokens[:, :5], cache=cache)
    cache.repeat(2)
    rest = model(tokens[:, 5:].repeat_interleave(2, 0), cache=cache)
    assert (rest - whole[:, 5:].repeat_interleave(2, 0)).abs().max() < DOUBLE


@shapes
def test_logits_do_not_depend_on_the_batch(config):
    model, tokens = (
        random_model(config),
        torch.randint(0, 7, (5, 6), generator=torch.Generator().manual_seed(2)),
    )
    whole = model(tokens)
    for order in ([3], [4, 0], [2, 1, 3]):
        assert (model(tokens[order]) - whole[order]).abs().max() < DOUBLE


@shapes
def test_padding_on_either_side_changes_no_log_probability(config):
    model = random_model(config)
    prompts = [torch.tensor(p) for p in ([1], [2, 3, 4], [5, 6])]
    responses = [torch.tensor(r) for r in ([0, 1, 2, 0, 1], [2], [1, 1, 0])]
    together = token_log_prob({model: 1.0}, prompts, responses, words=3)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert (
            abs(together[i] - token_log_prob({model: 1.0}, [prompt], [response], words=3)[0])
            < DOUBLE
        )
        logits = model(torch.cat([prompt, response]).unsqueeze(0))[
            0, :, :3
        ]  # by hand: token t is predicted at t - 1
        expected = sum(
            logits[len(prompt) + j - 1].log_softmax(-1)[token] for j, token in enumerate(response)
        )
        assert abs(together[i] - expected) < DOUBLE
    tokens, pad = torch.tensor([[1, 2, 3]]), 2
    padded = F.pad(tokens, (pad, 0), value=6)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[pad:, :pad] = False
    left = model(padded, positions=torch.arange(5) - pad, mask=mask)
    assert (left[:, pad:] - model(tokens)).abs().max() < DOUBLE


def test_rotary_dot_products_depend_on_the_distance_alone():
    q, k = (
        torch.randn(8, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in (0, 1)
    )
    shape = m.Config(vocab_size=1, width=8, heads=1, kv_heads=1)

    def dot(at_q, at_k):
        (cq, sq), (ck, sk) = (m.rotary(torch.tensor([p]).double(), shape) for p in (at_q, at_k))
        return float((m.rotate(q[None], cq, sq) * m.rotate(k[None], ck, sk)).sum())

    assert dot(3, 1) == pytest.approx(dot(103, 101), abs=1e-10)
    assert dot(3, 1) != pytest.approx(dot(3, 2), abs=1e-3)


@shapes
def test_a_new_untied_transformer_is_uniform(config):
    probabilities = Transformer(config)(torch.tensor([[1, 2]])).softmax(-1)
    if config.tied:
        assert (probabilities - 1 / 7).abs().max() > 1e-3
    else:
        assert (probabilities == 1 / 7).all() or (probabilities - 1 / 7).abs().max() < 1e-7


def test_heads_that_do_not_divide_are_refused():
    for bad in ({"heads": 3}, {"kv_heads": 3}, {"width": 4, "heads": 4, "kv_heads": 4}):
        with pytest.raises(ValueError, match="expected an even number of channels"):
            Config(7, **bad)


@shapes
@pytest.mark.parametrize(("V", "L"), [(3, 3), (2, 4), (5, 1), (1, 3)])
def test_the_probabilities_of_all_responses_sum_to_one(config, V, L):
    probabilities = random_policy_of(config, V, L).log_probs().exp()
    assert probabilities.shape == (4, V**L)
    assert (probabilities.sum(-1) - 1).abs().max() < DOUBLE


@shapes
@pytest.mark.parametrize(("V", "L"), [(3, 3), (2, 4), (5, 1)])
def test_sharing_prefixes_equals_scoring_responses_one_by_one(config, V, L):
    policy = random_policy_of(config, V, L)
    table = policy.log_probs().detach()
    x, y = (
        index.flatten()
        for index in torch.meshgrid(torch.arange(4), torch.arange(V**L), indexing="ij")
    )
    assert (policy.log_prob(x, y).view(4, -1) - table).abs().max() < DOUBLE
    for row in (0, 3):  # and against the loops, one sequence at a time
        for response in (0, V**L - 1):
            words = policy.words(torch.tensor(response))
            sequence = torch.cat([policy.prompts[row], words]).tolist()
            logits = slow_logits(policy.model, sequence).detach()[:, :V].log_softmax(-1)
            start = len(policy.prompts[row])
            expected = sum(logits[start + i - 1][word] for i, word in enumerate(words))
            assert abs(table[row, response] - expected) < DOUBLE


def test_responses_are_numbered_in_lexicographic_order():
    policy = random_policy_of(SHAPES[0], V=3, L=2)
    assert policy.words(torch.arange(9)).tolist() == [[i, j] for i in range(3) for j in range(3)]


@shapes
def test_gradients_reach_every_parameter_through_the_shared_prefixes(config):
    policy = random_policy_of(config)
    policy.log_probs()[0, 5].backward()
    by_tree = {name: weight.grad.clone() for name, weight in policy.named_parameters()}
    policy.zero_grad()
    policy.log_prob(torch.tensor([0]), torch.tensor([5])).sum().backward()
    for name, weight in policy.named_parameters():
        assert (weight.grad - by_tree[name]).abs().max() < DOUBLE
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.9)])
@pytest.mark.parametrize("kind", ["table", "transformer"])
def test_samples_follow_the_policy_and_carry_its_own_log_probabilities(kind, temperature, top_p):
    """Frequencies of 40,000 samples against the exact distribution after temperature and nucleus, 5
    standard deviations; the log-probability recorded is the policy's own, whatever they were drawn
    with."""
    if kind == "table":
        policy = TabularPolicy(2, 9)
        policy.logits.data.copy_(random_policy(2, 9, 0).log())
    else:
        policy = random_policy_of(SHAPES[0], V=3, L=2)
        policy.model.head.weight.data.mul_(0.3)  # not too sure of itself
    prompts, k = torch.tensor([1, 0]), 20_000
    y, log_probs = policy.sample(prompts, k, temperature, top_p, seed=3)
    table = policy.log_probs().detach()
    assert (log_probs - table[prompts].gather(-1, y)).abs().max() < DOUBLE

    def truncated(log_p):  # of one distribution: the fewest most probable entries that hold top_p
        p = (log_p / temperature).softmax(-1)
        kept, mass = torch.zeros_like(p), 0.0
        for i in p.argsort(descending=True, stable=True).tolist():
            if mass >= top_p:
                break
            kept[i], mass = p[i], mass + float(p[i])
        return kept / kept.sum()

    for row, x in enumerate(prompts):
        if kind == "table":
            expected = truncated(table[x])
        else:
            words = policy.next_word_log_probs().detach()[
                x
            ]  # root, then the nodes of the first word
            expected = torch.cat(
                [truncated(words[0])[v] * truncated(words[1 + v]) for v in range(3)]
            )
        assert abs(chi_square(torch.bincount(y[row], minlength=9), k * expected)) < 5
        assert (y[row][:, None] != (expected == 0).nonzero().flatten()).all()


def test_sampling_is_fixed_by_its_seed():
    policy = random_policy_of(SHAPES[0])
    first, again, other = (policy.sample(torch.arange(4), 50, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_choose_inverts_the_distribution_function():
    log_probs = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.49, 0.51, 0.79, 0.81, 0.999])
    assert choose(log_probs, u, 1.0, 1.0).tolist() == [
        0,
        1,
        1,
        2,
        2,
        2,
    ]  # in the order of the vocabulary
    assert choose(log_probs, u, 1.0, 0.99999).tolist() == [
        1,
        1,
        2,
        2,
        0,
        0,
    ]  # the most probable first: 1, 2, 0
    assert choose(log_probs, u, 1.0, 0.5).tolist() == [1] * 6
    assert choose(log_probs, u, 1.0, 0.51).tolist() == [
        1,
        1,
        1,
        2,
        2,
        2,
    ]  # .5 : .3, so 2 from .625 on
    assert choose(log_probs[1:], u[1:], 0.01, 1.0).tolist() == [1] * 5


def test_generate_reads_a_prompt_once_and_then_one_token_a_step(monkeypatch):
    model, shapes_read = random_model(SHAPES[0]), []
    hidden = Transformer.hidden
    monkeypatch.setattr(
        Transformer,
        "hidden",
        lambda self, tokens, *rest: (
            shapes_read.append(tuple(tokens.shape)),
            hidden(self, tokens, *rest),
        )[1],
    )
    tokens, _, _ = generate(
        {model: 1.0}, torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.rand(2, 4, 3), words=7
    )
    assert tokens.shape == (2, 4, 3)
    assert shapes_read == [(2, 3), (8, 1), (8, 1)]

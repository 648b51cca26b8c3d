"""A decoder-only transformer from scratch, its sampler, and policies over enumerable responses.

Axes: B sequences, T tokens, C channels (width), H query heads, G key-value heads, D channels of a
head; X prompts, Y responses, V words, L words of a response, K samples of a prompt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# --- The transformer ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Shape of a `Transformer`; the defaults have about 94,000 parameters. ValueError unless heads
    are of an even number of channels and the key-value heads divide them."""

    vocab_size: int  # tokens
    layers: int = 2
    width: int = 64  # C, channels of the residual stream
    heads: int = 4  # H, divides width
    kv_heads: int = 2  # G, divides heads; fewer than heads is grouped-query attention
    hidden: int = 176  # channels inside the feed-forward network
    rope_theta: float = 10_000.0  # base of the rotary wavelengths, tokens
    rope_scaling: Callable[[Tensor], Tensor] | None = None  # of rotary frequencies, as in Llama 3
    head_width: int = 0  # D, channels of a head; width / heads when 0
    qkv_bias: bool = False  # biases of the maps to queries, keys and values, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each query and key, as in Qwen3
    context: int | None = None  # most tokens that it was trained to read; not used in this file
    embedding_std: float | None = None  # of a new embedding's entries; 1/sqrt(width) when None
    norm_eps: float = 1e-5
    tied: bool = False  # one matrix for the embedding and the head

    def __post_init__(self) -> None:
        head_width = self.head_width or self.width / self.heads
        if head_width % 2 or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width}, {self.heads} heads of {head_width:g} channels, "
                f"{self.kv_heads} kv_heads; expected an even number of channels (rotary pairs) and "
                "heads a multiple of kv_heads"
            )
        object.__setattr__(self, "head_width", int(head_width))


Rope = tuple[Tensor, Tensor]  # cos and sin of the rotary angles


def rotary(positions: Tensor, config: Config) -> Rope:
    """cos and sin [..., T, D/2], float64, of the angles position * theta^(-2i/D) for positions
    [..., T] and i < D/2 (Su et al. 2021), the frequencies scaled where the config says so."""
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_width)
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling(frequencies)
    angles = positions.unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] with channels i and i + D/2 rotated by the position's i-th angle. Dot products
    of rotated queries and keys depend on positions only through their difference."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Cache:
    """Keys and values of the tokens read so far, [layers, B, G, capacity, D]; `length` of the
    capacity is filled."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor):
        shape = (2, config.layers, batch, config.kv_heads, capacity, config.head_width)
        self.tables, self.length = like.new_zeros(shape), 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, G, T, D] of new tokens; return those of all tokens so far. The caller adds
        T to `length` once every layer has stored its own."""
        end = self.length + k.shape[2]
        self.tables[0, layer, :, :, self.length : end] = k
        self.tables[1, layer, :, :, self.length : end] = v
        return self.tables[0, layer, :, :, :end], self.tables[1, layer, :, :, :end]

    def repeat(self, k: int) -> None:
        """Make k copies of every row, side by side: one reading of a prompt serves k samples."""
        self.tables = self.tables.repeat_interleave(k, dim=2)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given by index or by a mask."""
        self.tables = self.tables[:, :, rows]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, [B, H, T, D], of queries [B, H, T, D] and keys and values
    [B, G, S, D]; mask is broadcastable to [B, 1, T, S]. Query heads that share keys are stacked
    into one matrix product. In bfloat16 on a CPU this is nearly four times as fast, forward and
    backward, as the fused kernel."""
    grouped = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))  # (B, G, H/G, T, D)
    heads = grouped.shape[2:4]
    scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, heads)  # (B, G, H/G, T, S)
    if mask is not None:
        scores = scores + mask.unsqueeze(-3)
    return (scores.softmax(-1).flatten(2, 3) @ v).unflatten(2, heads).flatten(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `grouped_attention` computes, causal when mask is None, by the fastest kernel for the
    device and dtype. float32 always takes the same one, so that recorded runs repeat exactly."""
    causal, half = mask is None and q.shape[2] > 1, q.dtype == torch.bfloat16
    if half and not causal and q.device.type == "cpu":
        return grouped_attention(q, k, v, mask)
    if half and q.shape[2] == 1:  # query heads that share keys become the queries of one head
        shared = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (B, G, H/G, D)
        read = F.scaled_dot_product_attention(shared, k, v, attn_mask=mask)
        return read.flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True
    )


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.D = config.head_width
        self.q = nn.Linear(config.width, config.heads * self.D, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.kv_heads * self.D, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.kv_heads * self.D, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk"
        )
        self.out = nn.Linear(config.heads * self.D, config.width, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        """What x [B, T, C] reads in itself and in the cache, [B, T, C]."""
        q, k, v = (
            f(x).unflatten(-1, (-1, self.D)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # (B, H or G, T, D)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))  # (B, T, H D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)) (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, mask, cache, layer)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Token sequences to next-token logits. A new one is exactly uniform over tokens (the head
    starts at 0) unless tied."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: keep only the blocks' inputs, recompute for the gradient
        self.read_block = Block.__call__  # how a block is called without a cache; may be compiled
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))  # 2 such sums a block
                shrink = 2 * config.layers if residual else 1
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] * shrink))
        if config.embedding_std:
            nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if config.tied:
            self.head.weight = self.embedding.weight
        else:
            nn.init.zeros_(self.head.weight)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """What the head reads after each of tokens [B, T] int64, [B, T, C].

        positions: [T] or [B, T]; they continue those of the cache when None. mask: True where a
        query may look, broadcastable to [B, 1, T, cached tokens + T]; causal when None. cache: keys
        and values of earlier tokens, to which those of these tokens are added."""
        T, past = tokens.shape[1], cache.length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)
        x = self.embedding(tokens)  # (B, T, C)
        if mask is not None:  # 0 or -inf, to be added to the scores of every layer
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        cos, sin = rotary(positions, self.config)
        rope = cos.unsqueeze(-3).to(x.dtype), sin.unsqueeze(-3).to(x.dtype)  # same for every head
        call = self.read_block if cache is None else Block.__call__
        if self.checkpointing and torch.is_grad_enabled():
            call = partial(checkpoint, call, use_reentrant=False)
        for layer, block in enumerate(self.blocks):
            x = call(block, x, rope, mask, cache, layer)
        if cache:
            cache.length += T
        return self.norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits [B, T, vocab_size] of the token after each of tokens [B, T]; see `hidden`."""
        return self.head(self.hidden(tokens, positions, mask, cache))


# --- Scoring and sampling -------------------------------------------------------------------------


def token_log_prob(
    models: dict[Transformer, float],
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    words: int,
) -> Tensor:
    """log pi(y|x) [B] of responses [L_b] after prompts [T_b], of any lengths: the sum, never the
    mean, of the log-probabilities of y's tokens, each given all tokens before it, among the first
    `words` tokens of the vocabulary; models as for `generate`. Padding stands on the right, where
    causality hides it."""
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    start, end = (
        torch.tensor([len(part) for part in parts], device=tokens.device)[:, None]
        for parts in (prompts, rows)
    )
    read = (place >= start) & (place < end)  # token t is predicted at t - 1
    logits = sum(
        weight * model.head(model.hidden(tokens[:, :-1])[read])[:, :words]
        for model, weight in models.items()
    )
    log_probs = -F.cross_entropy(logits, tokens[:, 1:][read], reduction="none")
    return log_probs.new_zeros(len(rows)).index_add(0, read.nonzero()[:, 0], log_probs)


def choose(log_probs: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token [B] at which the distribution function of softmax(log_probs [B, V] / temperature)
    first exceeds u [B] in [0, 1). top_p < 1: among the fewest most probable tokens that hold
    `top_p` of the probability (nucleus sampling, Holtzman et al. 2020)."""
    p = (log_probs / temperature).softmax(-1)
    if top_p >= 1:
        return invert(p, u)
    token, rows = torch.zeros_like(u, dtype=torch.long), torch.arange(len(u), device=u.device)
    for few in (64, 1024, p.shape[-1]):  # sorting all is slow, and a few tokens often hold top_p
        if few < p.shape[-1]:
            top, order = p.topk(few)
        else:
            top, order = p.sort(dim=-1, descending=True, stable=True)
        held = top.cumsum(-1, dtype=torch.float64)
        place = invert(top * (held - top < top_p), u)
        token[rows] = order.gather(-1, place.unsqueeze(-1)).squeeze(-1)
        more = held[:, -1] < top_p
        if not more.any():
            break
        rows, p, u = rows[more], p[more], u[more]
    return token


def invert(p: Tensor, u: Tensor) -> Tensor:
    """Where [B] the running sums, in float64, of p [B, V] first exceed u [B] of their total."""
    cdf = p.cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(cdf, u.to(cdf).unsqueeze(-1) * cdf[:, -1:], right=True)
    return place.squeeze(-1).clamp(max=p.shape[-1] - 1)


def padded_causal(seen: Tensor) -> Tensor:
    """The causal mask [B, 1, T, T] of left-padded rows whose tokens stand where seen [B, T] is
    True. An empty place sees itself, so that no softmax is over nothing, and no other sees it."""
    T = seen.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=seen.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=seen.device)
    return ((seen[:, None] & causal) | itself)[:, None]


def next_token(
    models: dict[Transformer, float],
    caches: Sequence[Cache],
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    words: int,
) -> Tensor:
    """Log-probabilities [B, words], float32 at least, of the token that follows tokens [B, T] and
    what the caches, one a model, hold. The product of the models' probabilities, each to the power
    of its weight, is normalised over the first `words` tokens."""
    last = (
        model.head(model.hidden(tokens, positions, mask, cache)[:, -1])[:, :words]
        for model, cache in zip(models, caches, strict=True)
    )
    logits = sum(weight * logits for weight, logits in zip(models.values(), last, strict=True))
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


@torch.no_grad()
def generate(
    models: dict[Transformer, float],
    prompts: Sequence[Tensor],
    u: Tensor,
    words: int,
    end: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """k responses to each of prompts [T_b], of at most `length` tokens, each token chosen by its
    number in u [B, k, length], in [0, 1). Returns tokens [B, k, length]; how many of them count
    [B, k], the first `end` included; and log-probabilities [B, k] under the policy itself, at
    temperature 1 and top_p 1 whatever the responses were drawn with.

    models: usually one, of weight 1; see `next_token` for several. A prompt is read once for its k
    responses, then every step reads one token of each; responses that have ended are dropped."""
    (B, k, length), device = u.shape, prompts[0].device
    tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True, padding_side="left")
    T = tokens.shape[1]
    empty = T - torch.tensor([len(x) for x in prompts], device=device)  # places before each prompt
    caches = [Cache(model.config, B, T + length, model.head.weight) for model in models]
    positions = (torch.arange(T, device=device) - empty[:, None]).clamp(min=0)
    seen = torch.arange(T + length, device=device) >= empty[:, None] if empty.any() else None
    mask = None if seen is None else padded_causal(seen[:, :T])
    log_probs = next_token(models, caches, tokens, positions, mask, words)
    log_probs = log_probs.repeat_interleave(k, dim=0)  # (B k, words)
    for cache in caches:
        cache.repeat(k)
    rows, place = torch.arange(B * k, device=device), (T - empty).repeat_interleave(k)
    seen = None if seen is None else seen.repeat_interleave(k, dim=0)
    out, count = tokens.new_zeros(B * k, length), tokens.new_zeros(B * k)
    total, going = log_probs.new_zeros(B * k), torch.ones(B * k, dtype=torch.bool, device=device)
    for step in range(length):
        numbers = u.view(B * k, length)[rows.cpu(), step].to(device)
        token = choose(log_probs, numbers, temperature, top_p)
        out[rows, step] = token
        count[rows] += going
        total[rows] += going * log_probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        if end is not None:
            going &= token != end
            if not going.any():
                break
            if going.sum() < 0.9 * len(rows):  # else copying the cache costs more than it saves
                rows, place, token = rows[going], place[going], token[going]
                seen = None if seen is None else seen[going]
                for cache in caches:
                    cache.keep(going)
                going = going[going]
        if step + 1 < length:
            mask = None if seen is None else seen[:, None, None, : T + step + 1]
            now = (place + step).unsqueeze(-1)
            log_probs = next_token(models, caches, token.unsqueeze(-1), now, mask, words)
    return out.view(B, k, length), count.view(B, k), total.view(B, k)


def uniform_numbers(n: int, k: int, length: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for `generate`, [n, k, length] float64. Those of a prompt do not depend on
    how many prompts follow it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k, length, generator=generator, dtype=torch.float64)


# --- Policies over enumerable responses -----------------------------------------------------------


class TabularPolicy(nn.Module):
    """One logit [X, Y] for every prompt and response, which are given by their indices; a new
    policy is uniform."""

    def __init__(self, X: int, Y: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(X, Y, dtype=dtype))

    def frozen_copy(self) -> TabularPolicy:
        """The policy as it is, to be a reference: nothing of the copy is trained."""
        return copy.deepcopy(self).requires_grad_(False)

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y]."""
        return self.logits.log_softmax(-1)

    def log_prob(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """log pi(y|x) [B] of responses [B] to prompts [B]."""
        return self.log_probs()[prompts, responses]

    @torch.no_grad()
    def sample(
        self, prompts: Tensor, k: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """k responses for each of prompts [B], [B, k], with their log-probabilities under the
        policy itself, [B, k]."""
        rows = self.log_probs()[prompts].repeat_interleave(k, dim=0)
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        y = choose(rows, u.to(rows.device), temperature, top_p)
        return y.view(-1, k), rows.gather(-1, y.unsqueeze(-1)).view(-1, k)


def prefix_tree(V: int, L: int, prompt_length: int) -> tuple[Tensor, Tensor]:
    """All proper prefixes of the V^L responses as one sequence after the prompt: the last words
    [N - prompt_length] of the prefixes, level by level in lexicographic order, and a mask [N, N] by
    which a prefix's node sees the prompt, its ancestors and itself. Reading these
    N = prompt_length + V + ... + V^(L-1) tokens gives the logits of all V^L responses."""
    N = prompt_length + sum(V**level for level in range(1, L))
    mask = torch.ones(N, N, dtype=torch.bool).tril()
    mask[prompt_length:] = False
    parents, start = torch.tensor([prompt_length - 1]), prompt_length
    for level in range(1, L):
        parents = parents.repeat_interleave(V)
        nodes = torch.arange(start, start + V**level)
        mask[nodes] = mask[parents]
        mask[nodes, nodes] = True
        parents, start = nodes, start + V**level
    words = [torch.arange(V).repeat(V ** (level - 1)) for level in range(1, L)]
    return torch.cat([torch.arange(0), *words]), mask


def chain(next_word: Tensor, V: int, L: int) -> Tensor:
    """log pi(y|x) [X, V^L] from the log-probabilities [X, 1 + V + ... + V^(L-1), V] of the next
    word at every node of the prefix tree."""
    log_pi = next_word.new_zeros(len(next_word), 1)
    for level in next_word.split([V**level for level in range(L)], dim=1):
        log_pi = (log_pi.unsqueeze(-1) + level).flatten(1)
    return log_pi


class TransformerPolicy(nn.Module):
    """A transformer's policy over all Y = V^L sequences of L words, the first V tokens. Prompt x is
    row x of prompts [X, T]; response y is the y-th sequence in lexicographic order, its words the
    digits of y in base V. Every probability is exact.

    Prefixes that responses share are read once: 1 + V + ... + V^(L-1) nodes a prompt instead of
    L V^L tokens."""

    prompts: Tensor  # [X, T]
    tree: Tensor  # [X, N], each prompt and all prefixes
    mask: Tensor  # [N, N], see `prefix_tree`
    powers: Tensor  # [L], what each digit of a response's number counts

    def __init__(self, model: Transformer, prompts: Tensor, V: int, L: int):
        super().__init__()
        self.model, self.V, self.L = model, V, L
        words, mask = prefix_tree(V, L, prompts.shape[1])
        tree = torch.cat([prompts, words.to(prompts.device).expand(len(prompts), -1)], dim=1)
        powers = V ** torch.arange(L - 1, -1, -1)
        buffers = {"prompts": prompts, "tree": tree, "mask": mask, "powers": powers}
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer.to(prompts.device), persistent=False)

    def next_word_log_probs(self) -> Tensor:
        """log pi(word | prompt, prefix) at every node, [X, 1 + V + ... + V^(L-1), V]."""
        logits = self.model(self.tree, positions=self.mask.sum(-1) - 1, mask=self.mask)
        return logits[:, self.prompts.shape[1] - 1 :, : self.V].log_softmax(-1)

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y]."""
        return chain(self.next_word_log_probs(), self.V, self.L)

    def words(self, responses: Tensor) -> Tensor:
        """The words [..., L] of responses [...], most significant digit first."""
        return responses.unsqueeze(-1) // self.powers % self.V

    def log_prob(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """log pi(y|x) [B] of responses [B] to prompts [B], each read by itself; equals
        `log_probs()[prompts, responses]` up to rounding."""
        return token_log_prob(
            {self.model: 1.0}, list(self.prompts[prompts]), list(self.words(responses)), self.V
        )

    def sample(
        self, prompts: Tensor, k: int, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """k responses for each of prompts [B], [B, k], with their log-probabilities under the
        policy itself, [B, k]."""
        u = uniform_numbers(len(prompts), k, self.L, seed)
        tokens, _, log_probs = generate(
            {self.model: 1.0}, list(self.prompts[prompts]), u, self.V, None, temperature, top_p
        )
        return (tokens * self.powers).sum(-1), log_probs

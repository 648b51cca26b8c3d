"""A decoder-only transformer from scratch, and the policies over enumerable responses that Algorithms 1 and 3 train.

Axes: B sequences, T tokens, C channels (width), H query heads, G key-value heads, D channels of a head; X prompts, Y responses,
V words, L words of a response, K samples of a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- The transformer --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Shape of a `Transformer`; the defaults have about 94,000 parameters. Raises ValueError if the heads do not divide."""

    vocab_size: int  # tokens
    layers: int = 2
    width: int = 64  # C, channels of the residual stream
    heads: int = 4  # H, divides width
    kv_heads: int = 2  # G, divides heads; G = H is multi-head attention, G < H grouped-query attention
    hidden: int = 176  # channels inside the feed-forward network
    rope_theta: float = 10_000.0  # base of the rotary wavelengths, tokens
    norm_eps: float = 1e-5
    tied: bool = False  # one matrix for the embedding and the head

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: expected width a multiple of "
                "2 * heads (rotary pairs) and heads a multiple of kv_heads"
            )


def rotary(positions: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, D/2], float64, of the angles position * theta^(-2i/D) (Su et al. 2021)."""
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64, device=positions.device) / head_width)
    angles = positions.unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, D] with channels i and i + D/2 turned by the position's i-th angle: dot products of turned queries and keys
    depend on positions only through their difference."""
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
    """Keys and values of the tokens read so far, [layers, B, G, capacity, D]; `length` of the capacity is filled."""

    def __init__(self, config: Config, batch: int, capacity: int, like: Tensor):
        shape = (2, config.layers, batch, config.kv_heads, capacity, config.width // config.heads)
        self.tables, self.length = like.new_zeros(shape), 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, G, T, D] of new tokens; return those of all tokens. `length` moves on when every layer has done so."""
        end = self.length + k.shape[2]
        self.tables[0, layer, :, :, self.length : end] = k
        self.tables[1, layer, :, :, self.length : end] = v
        return self.tables[0, layer, :, :, :end], self.tables[1, layer, :, :, :end]

    def repeat(self, k: int) -> Cache:
        """Make k copies of every row, side by side: one reading of a prompt serves its k samples."""
        self.tables = self.tables.repeat_interleave(k, dim=2)
        return self


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.D = config.width // config.heads
        self.q = nn.Linear(config.width, config.heads * self.D, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * self.D, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * self.D, bias=False)
        self.out = nn.Linear(config.heads * self.D, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.D)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H or G, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        causal = mask is None and q.shape[2] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)) (Shazeer 2020)."""

    def __init__(self, config: Config):
        super().__init__()
        self.norm1, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config)
        self.norm2 = RMSNorm(config.width, config.norm_eps)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        x = x + self.attention(self.norm1(x), rope, mask, cache, layer)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Token sequences to next-token logits. A new one is exactly uniform over tokens (the head starts at 0) unless tied."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                shrink = 2 * config.layers if name.endswith(("out.weight", "down.weight")) else 1  # 2 residual sums a block
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] * shrink))
        if config.tied:
            self.head.weight = self.embedding.weight
        else:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:  # fmt: skip
        """Logits [B, T, vocab_size] of the token after each of tokens [B, T] int64.

        positions: [T] or [B, T], counted on from the cache when None. mask: True where a query may look, broadcastable to
        [B, 1, T, tokens in all]; causal when None. cache: earlier tokens' keys and values, to which these tokens' are added."""
        T, past = tokens.shape[1], cache.length if cache else 0
        if positions is None:
            positions = torch.arange(past, past + T, device=tokens.device)
        if mask is None and past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=tokens.device).tril(past)
        x = self.embedding(tokens)  # (B, T, C)
        if mask is not None:  # as a number to add to the scores, made once for all layers
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        cos, sin = rotary(positions, self.config.width // self.config.heads, self.config.rope_theta)
        rope = tuple(part.unsqueeze(-3).to(x.dtype) for part in (cos, sin))  # the same for every head
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        if cache:
            cache.length += T
        return self.head(self.norm(x))


def token_log_prob(model: Transformer, prompts: list[Tensor], responses: list[Tensor], words: int) -> Tensor:
    """log pi(y|x) [B] of responses [L_b] after prompts [T_b], any lengths: the sum of its tokens' log-probabilities, each
    given all before it, among the first `words` tokens of the vocabulary. Pads on the right, where causality hides it."""
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    log_probs = model(tokens[:, :-1])[..., :words].log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None].clamp(max=words - 1)).squeeze(-1)  # token t is predicted at t - 1
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    start, end = (torch.tensor([len(part) for part in parts], device=tokens.device) for parts in (prompts, rows))
    return (chosen * ((place >= start[:, None]) & (place < end[:, None]))).sum(-1)


def choose(log_probs: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token [B] that u [B] in [0, 1) picks from the distribution function of softmax(log_probs [B, V] / temperature),
    cut down to the fewest most probable tokens that hold `top_p` of it (nucleus sampling, Holtzman et al. 2020)."""
    p, order = (log_probs.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    p = p * (p.cumsum(-1) - p < top_p)
    cdf = p.cumsum(-1)
    place = torch.searchsorted(cdf, u.to(cdf).unsqueeze(-1) * cdf[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return order.gather(-1, place).squeeze(-1)


@torch.no_grad()
def sample_tokens(model: Transformer, prompts: Tensor, k: int, length: int, words: int, temperature: float = 1.0,
                  top_p: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """k responses of `length` tokens, among the first `words`, for each of prompts [B, T]: tokens [B, k, length] and their
    log-probabilities [B, k] under the policy itself (temperature 1, nothing cut off), whatever they were drawn with.

    Each prompt is read once; then every step reads one token a sample, the rest being in the cache."""
    B, T = prompts.shape
    u = torch.rand(B * k, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(prompts.device)
    cache = Cache(model.config, B, T + length, model.head.weight)
    logits = model(prompts, cache=cache)[:, -1].repeat_interleave(k, dim=0)  # (B k, vocabulary)
    cache.repeat(k)
    tokens, total = [], 0.0
    for step in range(length):
        log_probs = logits[:, :words].log_softmax(-1)
        token = choose(log_probs, u[:, step], temperature, top_p).unsqueeze(-1)
        tokens.append(token)
        total = total + log_probs.gather(-1, token).squeeze(-1)
        if step + 1 < length:
            logits = model(token, cache=cache)[:, -1]
    return torch.cat(tokens, dim=-1).view(B, k, length), total.view(B, k)


# --- Policies over enumerable responses -------------------------------------------------------------------------------------


class TabularPolicy(nn.Module):
    """One free logit for every prompt and response; a new one is uniform. Prompts and responses are named by their index."""

    def __init__(self, X: int, Y: int, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(X, Y, dtype=dtype))

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y]."""
        return self.logits.log_softmax(-1)

    def log_prob(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """log pi(y|x) [B] of responses [B] to prompts [B]."""
        return self.log_probs()[prompts, responses]

    @torch.no_grad()
    def sample(self, prompts: Tensor, k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """k responses for each of prompts [B], [B, k], with their log-probabilities under the policy itself, [B, k]."""
        rows = self.log_probs()[prompts].repeat_interleave(k, dim=0)
        u = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(rows.device)
        y = choose(rows, u, temperature, top_p)
        return y.view(-1, k), rows.gather(-1, y.unsqueeze(-1)).view(-1, k)


def prefix_tree(V: int, L: int, prompt_length: int) -> tuple[Tensor, Tensor]:
    """All proper prefixes of the V^L responses as one sequence after the prompt: words [N - prompt_length] of the nodes, level
    by level in lexicographic order, and mask [N, N], by which a node sees the prompt, its ancestors and itself. With
    N = prompt_length + V + ... + V^(L-1) tokens read, the logits of all V^L responses are known."""
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
    """log pi(y|x) [X, V^L] from next-word log-probabilities at every node of the prefix tree, [X, 1 + V + ... + V^(L-1), V]."""
    log_pi = next_word.new_zeros(len(next_word), 1)
    for level in next_word.split([V**level for level in range(L)], dim=1):
        log_pi = (log_pi.unsqueeze(-1) + level).flatten(1)
    return log_pi


class TransformerPolicy(nn.Module):
    """A transformer's policy over all Y = V^L sequences of L of the first V tokens: response y is the y-th in lexicographic
    order (its words are y's digits in base V), prompt x is the row x of prompts [X, T]. Every probability is exact.

    The prefixes that responses share are read once: 1 + V + ... + V^(L-1) nodes a prompt in place of L V^L tokens."""

    def __init__(self, model: Transformer, prompts: Tensor, V: int, L: int):
        super().__init__()
        self.model, self.V, self.L = model, V, L
        words, mask = prefix_tree(V, L, prompts.shape[1])
        tree = torch.cat([prompts, words.to(prompts.device).expand(len(prompts), -1)], dim=1)
        powers = V ** torch.arange(L - 1, -1, -1)  # the worth of each digit of a response's number
        for name, buffer in {"prompts": prompts, "tree": tree, "mask": mask, "powers": powers}.items():
            self.register_buffer(name, buffer.to(prompts.device), persistent=False)

    def next_word_log_probs(self) -> Tensor:
        """log pi(word | prompt, prefix) at every node of the prefix tree, [X, 1 + V + ... + V^(L-1), V]."""
        logits = self.model(self.tree, positions=self.mask.sum(-1) - 1, mask=self.mask)
        return logits[:, self.prompts.shape[1] - 1 :, : self.V].log_softmax(-1)

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y]."""
        return chain(self.next_word_log_probs(), self.V, self.L)

    def words(self, responses: Tensor) -> Tensor:
        """The words [..., L] of responses [...], most significant digit first."""
        return responses.unsqueeze(-1) // self.powers % self.V

    def log_prob(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """log pi(y|x) [B] of responses [B] to prompts [B], each read by itself: what `log_probs` must agree with."""
        return token_log_prob(self.model, list(self.prompts[prompts]), list(self.words(responses)), self.V)

    def sample(self, prompts: Tensor, k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """k responses for each of prompts [B], [B, k], with their log-probabilities under the policy itself, [B, k]."""
        tokens, log_probs = sample_tokens(self.model, self.prompts[prompts], k, self.L, self.V, temperature, top_p, seed)
        return (tokens * self.powers).sum(-1), log_probs

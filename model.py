"""A decoder-only transformer from scratch, and the policies made of it: over enumerable responses for Algorithms 1 and 3, over
text for Algorithms 2 and 4.

Axes: B sequences, T tokens, C channels (width), H query heads, G key-value heads, D channels of a head; X prompts, Y responses,
V words, L words of a response, K samples of a prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from checkpoints import BadCheckpoint, Chat, read_checkpoint, save_directory

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
    rope_scaling: Callable[[Tensor], Tensor] | None = None  # of the rotary frequencies, as Llama 3's for long contexts
    head_width: int | None = None  # D, channels of a head; width / heads when None
    qkv_bias: bool = False  # of the maps to queries, keys and values, as in Qwen2
    qk_norm: bool = False  # RMSNorm of each query and key, as in Qwen3
    context: int | None = None  # tokens that it was made to read; nothing here depends on it
    embedding_std: float | None = None  # of a new embedding's entries; 1/sqrt(width) when None
    norm_eps: float = 1e-5
    tied: bool = False  # one matrix for the embedding and the head

    def __post_init__(self) -> None:
        if (self.head_width is None and self.width % (2 * self.heads)) or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads}, kv_heads {self.kv_heads}: expected width a multiple of "
                "2 * heads (rotary pairs) and heads a multiple of kv_heads"
            )
        if self.head_width is None:
            object.__setattr__(self, "head_width", self.width // self.heads)


def rotary(positions: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """cos and sin [..., T, D/2], float64, of the angles position * theta^(-2i/D), scaled if need be (Su et al. 2021)."""
    pairs = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    frequencies = config.rope_theta ** (-pairs / config.head_width)
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling(frequencies)
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
        shape = (2, config.layers, batch, config.kv_heads, capacity, config.head_width)
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

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given by index or by a mask."""
        self.tables = self.tables[:, :, rows]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What q [B, H, T, D] read in keys and values [B, G, S, D], [B, H, T, D], by plain matrix products: the H/G heads that
    share keys are H/G times as many queries. On a CPU nearly four times as fast, forward and backward, as the fused kernel,
    which on a GPU is the faster one and needs no T x S numbers."""
    grouped = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))  # (B, G, H/G, T, D)
    scores = (grouped.flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, grouped.shape[2:4])  # (B, G, H/G, T, S)
    if mask is not None:
        scores = scores + mask.unsqueeze(-3)
    return (scores.softmax(-1).flatten(2, 3) @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, config: Config):
        super().__init__()
        self.D = config.head_width
        self.q = nn.Linear(config.width, config.heads * self.D, bias=config.qkv_bias)
        self.k = nn.Linear(config.width, config.kv_heads * self.D, bias=config.qkv_bias)
        self.v = nn.Linear(config.width, config.kv_heads * self.D, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (RMSNorm(self.D, config.norm_eps) if config.qk_norm else nn.Identity() for _ in "qk")
        self.out = nn.Linear(config.heads * self.D, config.width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.D)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, H or G, T, D)
        q, k = rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        causal, half = mask is None and q.shape[2] > 1, q.dtype == torch.bfloat16
        if half and not causal and q.device.type == "cpu":
            y = grouped_attention(q, k, v, mask)
        elif half and q.shape[2] == 1:  # on a GPU, heads that share keys as queries of one head: (B, G, H/G, D)
            y = F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)).squeeze(3), k, v, attn_mask=mask)
            y = y.flatten(1, 2).unsqueeze(2)
        else:  # float32 always, for the order of its sums, so the last digit, is that of the runs that are recorded
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H D)


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
        self.checkpointing = False  # in training, keep what enters a block only and compute the rest again for the gradient
        self.read_block = Block.__call__  # how a block is called in training; may be compiled
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                shrink = 2 * config.layers if name.endswith(("out.weight", "down.weight")) else 1  # 2 residual sums a block
                nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1] * shrink))
        if config.embedding_std:
            nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if config.tied:
            self.head.weight = self.embedding.weight
        else:
            nn.init.zeros_(self.head.weight)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
        """The model of a Hugging Face directory or a GGUF file of the Llama family (Llama 2 and 3, Mistral, SmolLM2, TinyLlama,
        Qwen2, Qwen3), its weights as dtype. ValueError naming what is missing, misshapen or not supported."""
        fields, weights = read_checkpoint(path)
        with torch.device("meta"):
            model = cls(Config(**fields))
        model = model.to(dtype).to_empty(device="cpu")
        if model.config.tied:  # a copy of each was made
            model.head.weight = model.embedding.weight
        wanted = dict(model.named_parameters())
        for name, read in weights:
            if name == "head.weight" and model.config.tied:
                continue
            if name not in wanted:
                raise BadCheckpoint(f"{path} has a tensor for {name}; its configuration has no place for it")
            weight, place = read(), wanted.pop(name)
            if weight.shape != place.shape:
                raise BadCheckpoint(f"{path}: {name} has shape {list(weight.shape)}; expected {list(place.shape)}")
            with torch.no_grad():
                place.copy_(weight)
            if not place.isfinite().all():
                broken = int((~place.isfinite()).sum())
                raise BadCheckpoint(
                    f"{path}: {name} has {broken} entries of {place.numel()} that are not finite "
                    f"in {dtype}; expected numbers"
                )
        if wanted:
            raise BadCheckpoint(f"{path} has no tensor for {next(iter(wanted))}")
        return model

    def save_pretrained(self, path: str | Path, shard_bytes: int = 5 << 30) -> None:
        """Write a Hugging Face directory (config.json, safetensors) that transformers and vLLM load; low-rank terms become part
        of the maps they belong to."""
        fields = {field.name: getattr(self.config, field.name) for field in dataclasses.fields(self.config)}
        weights = self.state_dict()
        for name, part in self.named_modules():
            if isinstance(part, LowRank):
                weights[f"{name}.weight"] = part.merged()
                del weights[f"{name}.A"], weights[f"{name}.B"]
        save_directory(path, fields, weights, shard_bytes)

    def hidden(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
               cache: Cache | None = None) -> Tensor:  # fmt: skip
        """What the head reads after each of tokens [B, T] int64, [B, T, C].

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
        cos, sin = rotary(positions, self.config)
        rope = tuple(part.unsqueeze(-3).to(x.dtype) for part in (cos, sin))  # the same for every head
        call = self.read_block if cache is None else Block.__call__
        if self.checkpointing and torch.is_grad_enabled():
            call = partial(checkpoint, call, use_reentrant=False)
        for layer, block in enumerate(self.blocks):
            x = call(block, x, rope, mask, cache, layer)
        if cache:
            cache.length += T
        return self.norm(x)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None,
                cache: Cache | None = None) -> Tensor:  # fmt: skip
        """Logits [B, T, vocab_size] of the token after each of tokens [B, T]; arguments as of `hidden`."""
        return self.head(self.hidden(tokens, positions, mask, cache))


class LowRank(nn.Module):
    """A fixed linear map with a trained term of low rank, W x + 2 B A x (LoRA, Hu et al. 2022, alpha = 2 r): A [r, in], B
    [out, r], which starts at 0. They are float32 and compute in x's dtype."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias, inputs = linear.weight, linear.bias, linear.in_features
        self.A = nn.Parameter((torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)).to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        term = F.linear(F.linear(x, self.A.to(x.dtype)), 2 * self.B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + term

    def merged(self) -> Tensor:
        """W + 2 B A, in W's dtype."""
        return (self.weight.float() + 2 * self.B @ self.A).to(self.weight.dtype).detach()


def add_low_rank(model: Transformer, rank: int) -> None:
    """Make `LowRank` terms of every map inside the blocks all that is trained."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for part in list(model.blocks.modules()):
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(part, name, LowRank(linear, rank, generator))


def token_log_prob(models: dict[Transformer, float], prompts: Sequence[Tensor], responses: Sequence[Tensor],
                   words: int) -> Tensor:  # fmt: skip
    """log pi(y|x) [B] of responses [L_b] after prompts [T_b], any lengths: the sum of its tokens' log-probabilities, never the
    mean, each given all before it, among the first `words` tokens of the vocabulary; models as for `generate`. Pads on the
    right, where causality hides it, and asks the head about the responses' tokens only."""
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T)
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    start, end = (torch.tensor([len(part) for part in parts], device=tokens.device)[:, None] for parts in (prompts, rows))
    read = (place >= start) & (place < end)  # token t is predicted at t - 1
    logits = sum(weight * model.head(model.hidden(tokens[:, :-1])[read])[:, :words] for model, weight in models.items())
    log_probs = -F.cross_entropy(logits, tokens[:, 1:][read], reduction="none")
    return log_probs.new_zeros(len(rows)).index_add(0, read.nonzero()[:, 0], log_probs)


def shared_log_prob(model: Transformer, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
    """`token_log_prob` of one model, float32 [B], with the prompt read once for all its responses: they stand in one row after
    it, none seeing another. The head's logits, of large vocabularies far larger than all else, are made for the responses'
    tokens only, and never all at once: see `TokenLogProbs`."""
    places: dict[tuple[int, ...], list[int]] = {}
    for b, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt.tolist()), []).append(b)
    device, rows = responses[0].device, []
    sources, targets, owners = [], [], []  # of each token of a response: where it is predicted, what it is, whose it is
    for row, (prompt, members) in enumerate(places.items()):
        parts, positions, owner = [torch.tensor(prompt, device=device)], [*range(len(prompt))], [0] * len(prompt)
        length = len(prompt)
        for number, b in enumerate(members, 1):
            y = responses[b]
            sources += [(row, len(prompt) - 1), *((row, length + i) for i in range(len(y) - 1))]
            targets.append(y)
            owners += [b] * len(y)
            parts.append(y[:-1])  # what follows the last token is not asked
            positions += range(len(prompt), len(prompt) + len(y) - 1)
            owner += [number] * (len(y) - 1)
            length += len(y) - 1
        rows.append((torch.cat(parts), torch.tensor(positions), torch.tensor(owner)))
    padded = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    tokens, positions, owner = (part.to(device) for part in padded)
    mask = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = mask & torch.ones_like(mask[0]).tril()
    hidden = model.hidden(tokens, positions, mask[:, None])
    row, place = torch.tensor(sources, device=device).unbind(-1)
    log_probs = token_log_probs(model.head, hidden[row, place], torch.cat(targets))
    return log_probs.new_zeros(len(prompts)).index_add(0, torch.tensor(owners, device=device), log_probs)


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden [n, C] weight^T [C, V]) at tokens [n], float32 at least, [n], by `at_once` words of the vocabulary at
    a time, whose logits fit the processor's cache. They are made once more for the gradient rather than kept."""

    @staticmethod
    def pieces(hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int) -> Iterator[tuple[slice | Tensor, ...]]:
        """Of each part of the vocabulary: its words, logits [n, at_once], tokens' places [n, 1], and are they there? [n, 1]"""
        for start in range(0, len(weight), at_once):
            words, place = slice(start, start + at_once), (tokens - start).unsqueeze(-1)
            logits = (hidden @ weight[words].T).to(torch.promote_types(hidden.dtype, torch.float32))
            yield words, logits, place.clamp(0, logits.shape[-1] - 1), (place >= 0) & (place < logits.shape[-1])

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int) -> Tensor:
        sums, chosen = [], 0
        for _, logits, place, there in TokenLogProbs.pieces(hidden, weight, tokens, at_once):
            sums.append(logits.logsumexp(-1))
            chosen = chosen + logits.gather(-1, place) * there
        ctx.total, ctx.at_once = torch.stack(sums).logsumexp(0), at_once
        ctx.save_for_backward(hidden, weight, tokens)
        return chosen.squeeze(-1) - ctx.total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        of_hidden, of_weight = torch.zeros_like(hidden, dtype=grad.dtype), None
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
        grad = grad.unsqueeze(-1)
        for words, logits, place, there in TokenLogProbs.pieces(hidden, weight, tokens, ctx.at_once):
            p = (logits - ctx.total.unsqueeze(-1)).exp_()
            of_logits = p.mul_(-grad).scatter_add_(-1, place, grad * there).to(hidden.dtype)  # grad (1[y] - p)
            of_hidden += of_logits @ weight[words]
            if of_weight is not None:
                torch.mm(of_logits.T, hidden, out=of_weight[words])
        return of_hidden.to(hidden.dtype), of_weight, None, None


def token_log_probs(head: nn.Linear, hidden: Tensor, tokens: Tensor, at_once: int = 2048) -> Tensor:
    """log softmax(head(hidden [n, C])) at tokens [n], [n]; see `TokenLogProbs`."""
    return TokenLogProbs.apply(hidden, head.weight, tokens, at_once)


def choose(log_probs: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """The token [B] that u [B] in [0, 1) picks from the distribution function of softmax(log_probs [B, V] / temperature),
    cut down to the fewest most probable tokens that hold `top_p` of it (nucleus sampling, Holtzman et al. 2020)."""
    p = (log_probs / temperature).softmax(-1)
    if top_p >= 1:
        return invert(p, u)
    token, rows = torch.zeros_like(u, dtype=torch.long), torch.arange(len(u), device=u.device)
    for few in (64, 1024, p.shape[-1]):  # sorting all is slow, so first see for which rows some, most probable first, will do
        top, order = p.topk(few) if few < p.shape[-1] else p.sort(dim=-1, descending=True, stable=True)
        held = top.cumsum(-1, dtype=torch.float64)
        token[rows] = order.gather(-1, invert(top * (held - top < top_p), u).unsqueeze(-1)).squeeze(-1)
        more = held[:, -1] < top_p
        if not more.any():
            break
        rows, p, u = rows[more], p[more], u[more]
    return token


def invert(p: Tensor, u: Tensor) -> Tensor:
    """Where [B] the running sums, in float64, of p [B, V] first exceed u [B] of their total."""
    cdf = p.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf, u.to(cdf).unsqueeze(-1) * cdf[:, -1:], right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)


def left_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token rows [T_b] as one tensor [B, T], ending together, and how many places before each are empty, [B]."""
    tokens = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")
    return tokens, tokens.shape[1] - torch.tensor([len(row) for row in rows], device=tokens.device)


@torch.no_grad()
def generate(models: dict[Transformer, float], prompts: Sequence[Tensor], u: Tensor, words: int, end: int | None = None,
             temperature: float = 1.0, top_p: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """k responses to each of prompts [T_b], drawn by numbers u [B, k, length] in [0, 1), one a token: tokens [B, k, length],
    the number that counts [B, k] (up to the token `end`, it included), and their log-probabilities [B, k] under the policy
    itself (temperature 1, nothing cut off), whatever they were drawn with.

    models: usually one, of weight 1; of several, the next token follows the normalised product of their probabilities to the
    power of their weights. Each prompt is read once; then every step reads one token a response, the rest being in the cache;
    responses that have ended leave the batch."""
    (B, k, length), (tokens, empty) = u.shape, left_padded(prompts)
    T, device = tokens.shape[1], tokens.device
    caches = [Cache(model.config, B, T + length, model.head.weight) for model in models]
    positions, seen = (torch.arange(T, device=device) - empty[:, None]).clamp(min=0), None
    if empty.any():  # an empty place sees itself, lest it divide by 0; nobody sees it
        seen = torch.arange(T + length, device=device) >= empty[:, None]
    mask = None
    if seen is not None:
        causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
        mask = ((seen[:, None, :T] & causal) | torch.eye(T, dtype=torch.bool, device=device))[:, None]  # (B, 1, T, T)

    def read(tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        last = (model.head(model.hidden(tokens, positions, mask, cache)[:, -1])[:, :words]
                for model, cache in zip(models, caches, strict=True))  # fmt: skip
        logits = sum(weight * logits for weight, logits in zip(models.values(), last, strict=True))
        return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))

    log_probs = read(tokens, positions, mask).repeat_interleave(k, dim=0)  # (B k, words)
    for cache in caches:
        cache.repeat(k)
    rows, place = torch.arange(B * k, device=device), (T - empty).repeat_interleave(k)
    seen = None if seen is None else seen.repeat_interleave(k, dim=0)
    out, count = tokens.new_zeros(B * k, length), tokens.new_zeros(B * k)
    total, going = log_probs.new_zeros(B * k), torch.ones(B * k, dtype=torch.bool, device=device)
    for step in range(length):
        token = choose(log_probs, u.view(B * k, length)[rows.cpu(), step].to(device), temperature, top_p)
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
            log_probs = read(token.unsqueeze(-1), (place + step).unsqueeze(-1), mask)
    return out.view(B, k, length), count.view(B, k), total.view(B, k)


def uniform_numbers(n: int, k: int, length: int, seed: int) -> Tensor:
    """Numbers in [0, 1) for `generate`, [n, k, length] float64: those of a prompt do not depend on how many follow it."""
    return torch.rand(n, k, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
        return token_log_prob({self.model: 1.0}, list(self.prompts[prompts]), list(self.words(responses)), self.V)

    def sample(self, prompts: Tensor, k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
        """k responses for each of prompts [B], [B, k], with their log-probabilities under the policy itself, [B, k]."""
        u = uniform_numbers(len(prompts), k, self.L, seed)
        tokens, _, log_probs = generate({self.model: 1.0}, self.prompts[prompts], u, self.V, None, temperature, top_p)
        return (tokens * self.powers).sum(-1), log_probs


# --- Text -------------------------------------------------------------------------------------------------------------------

SPLIT = r" ?\w+| ?[^\w\s]+|\s+"  # words, signs and gaps, a word with the space before it: tokens never cross these borders
ANSWER, END = "<|answer|>", "<|end|>"  # special tokens: between prompt and response, and after the response


def learn_byte_pairs(corpus: Iterable[str], size: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al. 2016): the 256 bytes, then, until there are `size` tokens or nothing to join, the
    adjacent pair that is most frequent in the corpus (of equals, the first in byte order). Token -> rank, in that order."""
    pieces = Counter(piece for text in corpus for piece in re.findall(SPLIT, text))
    words = {tuple(bytes([byte]) for byte in piece.encode()): count for piece, count in pieces.items()}
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < size:
        pairs: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        words = {tuple(joined(word, best)): count for word, count in words.items()}
    return ranks


def joined(word: tuple[bytes, ...], pair: tuple[bytes, bytes]) -> Iterator[bytes]:
    """The word's tokens with every occurrence of the pair, from the left, made one."""
    i = 0
    while i < len(word):
        width = 2 if word[i : i + 2] == pair else 1
        yield b"".join(word[i : i + width])
        i += width


def make_tokenizer(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """The encoding of these byte pairs, with the special tokens `ANSWER` and `END` after them."""
    special = {ANSWER: len(ranks), END: len(ranks) + 1}
    return tiktoken.Encoding("byte pairs of the corpus", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)


class Response(str):
    """A text that remembers the tokens it was sampled as, which need not be those it would be encoded as; without the end
    token if it was cut off."""

    tokens: tuple[int, ...]

    def __new__(cls, text: str, tokens: Iterable[int]) -> Response:
        response = super().__new__(cls, text)
        response.tokens = tuple(tokens)
        return response

    def __getnewargs__(self) -> tuple[str, tuple[int, ...]]:  # how to copy and to pickle it
        return str(self), self.tokens


class TextPolicy(nn.Module):
    """A transformer that answers prompts, as text: the prompt's tokens, `ANSWER`, the response's tokens, `END`."""

    def __init__(self, model: Transformer, tokenizer: tiktoken.Encoding, max_new_tokens: int):
        super().__init__()
        if model.config.vocab_size != tokenizer.n_vocab:
            raise ValueError(f"the model has {model.config.vocab_size} tokens; expected the tokenizer's {tokenizer.n_vocab}")
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.answer, self.end = (tokenizer.encode_single_token(special) for special in (ANSWER, END))

    def prompt_tokens(self, prompts: Iterable[str]) -> list[Tensor]:
        """What the transformer reads before it answers; special tokens in a prompt are mere text."""
        rows = ([*self.tokenizer.encode_ordinary(prompt), self.answer] for prompt in prompts)
        return [torch.tensor(row, device=self.model.head.weight.device) for row in rows]

    def response(self, tokens: Sequence[int]) -> Response:
        """The response of these tokens; the end token is not part of the text. Bytes that are no UTF-8 become U+FFFD."""
        return Response(self.tokenizer.decode([token for token in tokens if token != self.end]), tokens)

    def response_tokens(self, responses: Iterable[str]) -> list[Tensor]:
        """A response's own tokens if it was sampled, else those it is encoded as and the end token."""
        rows = (y.tokens if isinstance(y, Response) else [*self.tokenizer.encode_ordinary(y), self.end] for y in responses)
        return [torch.tensor(row, device=self.model.head.weight.device) for row in rows]

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """log pi(y|x) [B]: the sum over the response's tokens, the end token included, never their mean. Differentiable."""
        return self._score({self.model: 1.0}, prompts, responses)

    def sample(self, prompts: Sequence[str], k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[list[list[Response]], Tensor]:  # fmt: skip
        """k responses to each of B prompts, and their log-probabilities [B, k] under the policy itself, whatever temperature
        and top_p they were drawn with."""
        return self._answer({self.model: 1.0}, prompts, uniform_numbers(len(prompts), k, self.max_new_tokens, seed),
                            temperature, top_p)  # fmt: skip

    @torch.no_grad()
    def survey(self, prompts: Sequence[str], k: int, seed: int) -> list[list[Response]]:
        """As `sample`, for measuring: the first tokens of a prompt's k responses are drawn from the k equal parts of their
        distribution in turn, so that how often one occurs is right to 2/k. Only all k together follow the policy."""
        u = uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        u[:, :, 0] = (torch.arange(k) + u[:, :, 0]) / k
        return self._answer({self.model: 1.0}, prompts, u)[0]

    def mixed_with(self, reference: TextPolicy, weight: float) -> TokenMixture:
        """This policy and a reference of the given weight, mixed token by token."""
        return TokenMixture(self, reference, weight)

    def _score(self, models: dict[Transformer, float], prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        words = self.model.config.vocab_size
        return token_log_prob(models, self.prompt_tokens(prompts), self.response_tokens(responses), words)

    def _answer(self, models: dict[Transformer, float], prompts: Sequence[str], u: Tensor, temperature: float = 1.0,
                top_p: float = 1.0) -> tuple[list[list[Response]], Tensor]:  # fmt: skip
        words = self.model.config.vocab_size
        tokens, count, log_probs = generate(models, self.prompt_tokens(prompts), u, words, self.end, temperature, top_p)
        groups = zip(tokens.tolist(), count.tolist(), strict=True)
        return [[self.response(y[:n]) for y, n in zip(*group, strict=True)] for group in groups], log_probs


class TokenMixture:
    """pi^(1 - weight) pi_ref^weight of two text policies, normalised at every token, as section 4 suggests for Algorithm 4's
    option II. It is not the mixture pi^tau of Eq. (7), which is normalised over whole responses."""

    def __init__(self, policy: TextPolicy, reference: TextPolicy, weight: float):
        self.policy, self.models = policy, {policy.model: 1 - weight}
        self.models[reference.model] = self.models.get(reference.model, 0.0) + weight

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Log-probability [B] of whole responses under the mixture."""
        return self.policy._score(self.models, prompts, responses)

    def sample(self, prompts: Sequence[str], k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[list[list[Response]], Tensor]:  # fmt: skip
        """As of `TextPolicy`; the log-probabilities are the mixture's."""
        u = uniform_numbers(len(prompts), k, self.policy.max_new_tokens, seed)
        return self.policy._answer(self.models, prompts, u, temperature, top_p)


class UniformMixture:
    """unif(pi_1..pi_T), what Algorithm 1 returns, as a policy: draw t once for a response, then answer with pi_t.

    states: functions that load the parameters of each pi_t, from disk for example; one is in memory at a time."""

    def __init__(self, policy: TextPolicy, states: Sequence[Callable[[], dict[str, Tensor]]]):
        self.policy, self.states = copy.deepcopy(policy), states

    @torch.no_grad()
    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """log of the mean over t of pi_t(y|x), [B]."""
        members = []
        for load in self.states:
            self.policy.load_state_dict(load())
            members.append(self.policy.log_prob(prompts, responses))
        return torch.stack(members).logsumexp(0) - math.log(len(members))

    def sample(self, prompts: Sequence[str], k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> list[list[Response]]:  # fmt: skip
        """k responses to each of B prompts."""
        which = torch.randint(len(self.states), (len(prompts), k), generator=torch.Generator().manual_seed(seed))
        responses: list[list[Response]] = [[Response("", ())] * k for _ in prompts]
        for t in which.unique().tolist():
            self.policy.load_state_dict(self.states[t]())
            places = (which == t).nonzero().tolist()
            answers, _ = self.policy.sample([prompts[x] for x, _ in places], 1, temperature, top_p, seed * len(self.states) + t)
            for (x, i), (y,) in zip(places, answers, strict=True):
                responses[x][i] = y
        return responses


# --- Chat models, by one process or many -------------------------------------------------------------------------------------


class Team:
    """The processes that work on one run: torchrun's, if it started them, else this one alone."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share of the items: every size-th."""
        return items[self.rank :: self.size]

    def together(self, mine: list[Any]) -> list[Any]:
        """Everybody's shares, in the order of the items: what was made of `mine(items)` becomes what was made of items."""
        if self.size == 1:
            return mine
        shares: list[list[Any]] = [[]] * self.size
        dist.all_gather_object(shares, mine)
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]


class Scores(torch.autograd.Function):
    """The scores [B] of all from each process's own [m], which are those at place [m]. Everybody then has the whole loss, and
    passes the gradient on to its own part; times the number of processes, over which the gradients will be averaged."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, place: Tensor, total: int, size: int) -> Tensor:
        ctx.place, ctx.size = place, size
        scores = own.new_zeros(total).index_copy(0, place, own)
        dist.all_reduce(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.size * gradient[ctx.place], None, None, None


class Scorer(nn.Module):
    """`shared_log_prob` of a transformer as a module, for `DistributedDataParallel` and `fully_shard` to wrap."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        return shared_log_prob(self.model, prompts, responses)


class InPlaceOf(torch.autograd.Function):
    """A master weight's copy in a lower precision, used in its place: the gradient is the master's, in its precision."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, weight: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class MasterWeights(nn.Module):
    """A `Scorer` that computes in its low precision and trains float32 copies of its weights (master weights): in bfloat16
    most small steps would round to nothing."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = [scorer]  # in a list, for its parameters are not among this module's
        self.masters = nn.ParameterList(weight.detach().float() for weight in scorer.parameters())

    def forward(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        named = zip(self.scorer[0].named_parameters(), self.masters, strict=True)
        weights = {name: InPlaceOf.apply(master, weight) for (name, weight), master in named}
        return functional_call(self.scorer[0], weights, (prompts, responses))


def sharded(scorer: Scorer, dtype: torch.dtype, device: torch.device) -> Scorer:
    """The scorer with every parameter, its gradient and what an optimizer keeps of it cut in as many parts as there are
    processes; a block's are gathered, as dtype, while it computes."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*scorer.model.blocks, scorer):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    return scorer


def local(weight: Tensor) -> Tensor:
    """This process's part of a sharded tensor; of another, all."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(value: Any) -> Any:
    """A tensor gathered from all processes, on the CPU, in process 0; the others get an empty one. What is no tensor stays."""
    if not isinstance(value, Tensor):
        return value
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu() if Team().rank == 0 else torch.empty(0)


def part_of(value: Any, like: Tensor) -> Any:
    """Of a whole tensor the part that this process has of `like`, if `like` is sharded and of the same shape."""
    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return value


class ChatPolicy(TextPolicy):
    """A chat model that answers prompts in its own template.

    `model`, in its own dtype, samples and scores; `parameters()` are what is trained: those of the model that require a
    gradient, if they are float32; else float32 copies of its weights, which it is given anew whenever they may have changed.
    batch: how many responses are sampled, or scored without a gradient, at a time. Sampling and scoring raise ValueError on a
    prompt and response that together are longer than the model's context, where its reading would be wrong.

    Of several processes each does its share of the batches and all get the same results, up to rounding those of one process.
    fsdp: each keeps the whole model for sampling, but only its part of the parameters and their gradients."""

    def __init__(self, model: Transformer, chat: Chat, max_new_tokens: int, batch: int = 64, fsdp: bool = False):
        nn.Module.__init__(self)
        self.model, self.chat, self.max_new_tokens, self.batch, self.end = model, chat, max_new_tokens, batch, chat.end
        self.team, self.fsdp, device = Team(), fsdp, model.head.weight.device
        trained = [weight.dtype for weight in model.parameters() if weight.requires_grad]
        self.scorer: nn.Module = Scorer(model)
        if fsdp:
            self.scorer = sharded(Scorer(copy.deepcopy(model).cpu().float()), model.head.weight.dtype, device)
        elif any(dtype != torch.float32 for dtype in trained):
            self.scorer = MasterWeights(self.scorer)
        self.apart = fsdp or isinstance(self.scorer, MasterWeights)
        self.stale = False  # may what is trained differ from the model's weights?
        if self.team.size > 1 and trained and not fsdp:
            self.scorer = DistributedDataParallel(self.scorer, gradient_as_bucket_view=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> ChatPolicy:
        """The policy as it is, to be a reference: nothing of the copy is trained, so that it is the model alone."""
        self.refresh()
        model = copy.deepcopy(self.model, memo).requires_grad_(False)
        return ChatPolicy(model, self.chat, self.max_new_tokens, self.batch)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """What is trained; of a reference, the model's weights."""
        trained = [weight for weight in self.scorer.parameters(recurse) if weight.requires_grad]
        return iter(trained or self.model.parameters(recurse))

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the model what is trained, if they are not the same tensors and may differ: after a gradient, or `load`."""
        if self.stale:
            for weight, master in zip(self.model.parameters(), self.scorer.parameters(), strict=True):
                weight.copy_(master.full_tensor() if isinstance(master, DTensor) else master)
            self.stale = False

    def weights(self) -> list[Tensor]:
        """Copies of the parameters, or of this process's part of them, on the CPU, for `load`."""
        return [local(weight).detach().to("cpu", copy=True) for weight in self.parameters()]

    @torch.no_grad()
    def load(self, weights: Sequence[Tensor]) -> None:
        """Take the parameters from a list such as `weights` or `dno.Best` has."""
        for mine, given in zip(self.parameters(), weights, strict=True):
            local(mine).copy_(local(given))
        self.stale = self.apart

    def prompt_tokens(self, prompts: Iterable[str]) -> list[Tensor]:
        """What the transformer reads before it answers: the prompt in the chat template."""
        return [torch.tensor(self.chat.prompt(prompt), device=self.model.head.weight.device) for prompt in prompts]

    def response(self, tokens: Sequence[int]) -> Response:
        """The response of these tokens; special tokens are not part of the text."""
        return Response(self.chat.decode(list(tokens)), tokens)

    def response_tokens(self, responses: Iterable[str]) -> list[Tensor]:
        """A response's own tokens if it was sampled, else those it is encoded as and the end token."""
        rows = (y.tokens if isinstance(y, Response) else [*self.chat.encode(y), self.end] for y in responses)
        return [torch.tensor(row, device=self.model.head.weight.device) for row in rows]

    def _check_context(self, lengths: Iterable[int]) -> None:
        longest, context = max(lengths, default=0), self.model.config.context
        if context and longest > context:
            raise ValueError(f"prompt and response have {longest} tokens; expected at most the model's context, {context}")

    def finished(self, response: Response) -> bool:
        """Did the model end it itself, or was it cut off?"""
        return bool(response.tokens) and response.tokens[-1] == self.end

    def log_prob(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """As of `TextPolicy`, float32. With a gradient all at once; else in batches of about equal lengths."""
        xs, ys = self.prompt_tokens(prompts), self.response_tokens(responses)
        self._check_context(len(x) + len(y) for x, y in zip(xs, ys, strict=True))
        if torch.is_grad_enabled():
            return self._score_to_train(prompts, xs, ys)
        self.refresh()
        order = sorted(range(len(xs)), key=lambda b: (len(xs[b]), prompts[b], len(ys[b])))
        parts = [order[i : i + self.batch] for i in range(0, len(order), self.batch)]
        score = lambda part: shared_log_prob(self.model, [xs[b] for b in part], [ys[b] for b in part]).cpu()  # noqa: E731
        mine, scores = [score(part) for part in self.team.mine(parts)], torch.empty(len(xs))
        for part, found in zip(parts, self.team.together(mine), strict=True):
            scores[part] = found
        return scores.to(self.model.head.weight.device)

    def _score_to_train(self, prompts: Sequence[str], xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        """Differentiable scores; of several processes, each differentiates those of its share of the prompts."""
        if not self.fsdp:  # which gathers what it needs by itself
            self.refresh()
        if self.team.size == 1:
            return self._watched(self.scorer(xs, ys))
        numbers = {x: number for number, x in enumerate(dict.fromkeys(prompts))}
        place = [b for b, x in enumerate(prompts) if numbers[x] % self.team.size == self.team.rank]
        own = self._watched(self.scorer(*([items[b] for b in place or [0]] for items in (xs, ys))))  # who has none works along
        place = torch.tensor(place, dtype=torch.int64, device=own.device)
        return Scores.apply(own[: len(place)], place, len(xs), self.team.size)

    def _watched(self, scores: Tensor) -> Tensor:
        """The scores; once they have been given a gradient, a step may follow."""

        def note(gradient: Tensor) -> None:
            self.stale = self.apart

        scores.register_hook(note)
        return scores

    def sample(self, prompts: Sequence[str], k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[list[list[Response]], Tensor]:  # fmt: skip
        """As of `TextPolicy`, in batches of prompts of about equal lengths; what is drawn does not depend on the batches, but
        for rounding. The log-probabilities are as precise as the transformer's dtype."""
        u = uniform_numbers(len(prompts), k, self.max_new_tokens, seed)
        return self._in_batches(prompts, u, temperature, top_p)

    @torch.no_grad()
    def survey(self, prompts: Sequence[str], k: int, seed: int) -> list[list[Response]]:
        """k samples of each prompt, at temperature 1."""
        return self._in_batches(prompts, uniform_numbers(len(prompts), k, self.max_new_tokens, seed))[0]

    def _in_batches(self, prompts: Sequence[str], u: Tensor, temperature: float = 1.0,
                    top_p: float = 1.0) -> tuple[list[list[Response]], Tensor]:  # fmt: skip
        self.refresh()
        lengths = [len(self.chat.prompt(x)) for x in prompts]
        self._check_context(length + u.shape[-1] for length in lengths)
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        several = max(1, self.batch // u.shape[1])
        parts = [order[start : start + several] for start in range(0, len(order), several)]
        mine = []
        quiet = True if self.team.rank else None
        for part in tqdm(self.team.mine(parts), "sampling", unit="batch", disable=quiet, leave=False):
            answers, scores = self._answer({self.model: 1.0}, [prompts[x] for x in part], u[part], temperature, top_p)
            mine.append((answers, scores.float().cpu()))
        responses: list[list[Response]] = [[]] * len(prompts)
        log_probs = torch.empty(u.shape[:2])
        for part, (answers, scores) in zip(parts, self.team.together(mine), strict=True):
            log_probs[part] = scores
            for x, ys in zip(part, answers, strict=True):
                responses[x] = ys
        return responses, log_probs

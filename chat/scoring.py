"""Log-probabilities of responses that share prompts, over large vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import Transformer


def shared_log_prob(
    model: Transformer, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """`token_log_prob` of one model over its whole vocabulary, float32 at least, [B].

    A prompt is read once for all its responses: they stand in one row after it, and none sees
    another. Over a large vocabulary the head's logits are far larger than all else; they are made
    for the responses' tokens only, and never all at once (`token_log_probs`)."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for b, prompt in enumerate(prompts):
        of_prompt.setdefault(tuple(prompt.tolist()), []).append(b)
    groups, device = list(of_prompt.values()), responses[0].device
    order = [b for group in groups for b in group]
    rows = [shared_row(prompts[group[0]], [responses[b] for b in group]) for group in groups]
    tokens, positions, owner = (
        nn.utils.rnn.pad_sequence(list(parts), batch_first=True).to(device)
        for parts in zip(*(row[:3] for row in rows), strict=True)
    )
    mask = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = mask & torch.ones_like(mask[0]).tril()
    hidden = model.hidden(tokens, positions, mask[:, None])
    places = [(i, place) for i, row in enumerate(rows) for place in row.predicted]
    row_of, place_of = torch.tensor(places, device=device).unbind(-1)
    targets = torch.cat([responses[b] for b in order])
    log_probs = token_log_probs(hidden[row_of, place_of], model.head.weight, targets)
    owners = torch.tensor([b for b in order for _ in responses[b]], device=device)
    return log_probs.new_zeros(len(prompts)).index_add(0, owners, log_probs)


class SharedRow(NamedTuple):
    """A prompt with all its responses after it, but for their last tokens, which nothing follows:
    T places."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T], every response's go on after the prompt's
    owner: Tensor  # [T], 0 for the prompt, 1, 2, ... for the responses
    predicted: list[int]  # where in the row the tokens of the responses are predicted


def shared_row(prompt: Tensor, responses: Sequence[Tensor]) -> SharedRow:
    """The row of a prompt [T_x] and responses [L] to it."""
    T, kept = len(prompt), [len(y) - 1 for y in responses]
    tokens = torch.cat([prompt, *(y[:-1] for y in responses)])
    positions = torch.cat([torch.arange(T), *(torch.arange(T, T + n) for n in kept)])
    owner = torch.arange(1 + len(kept)).repeat_interleave(torch.tensor([T, *kept]))
    starts = accumulate(kept[:-1], initial=T)
    spans = [(T - 1, *range(start, start + n)) for start, n in zip(starts, kept, strict=True)]
    return SharedRow(tokens, positions, owner, [place for span in spans for place in span])


def token_log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int = 8192) -> Tensor:
    """log softmax(hidden [n, C] weight^T [C, V]) at tokens [n], float32 at least, [n].

    The logits are made `at_once` words of the vocabulary at a time, and once more for the gradient
    rather than kept."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # adds its gradients up so
    sums, of_tokens = [], []
    for number, words in enumerate(weight.split(at_once)):
        places = tokens - number * at_once
        found = checkpoint(part_log_probs, hidden, words, places, use_reentrant=False)
        sums.append(found[0])
        of_tokens.append(found[1])
    return torch.stack(of_tokens).sum(0) - torch.stack(sums).logsumexp(0)


def part_log_probs(hidden: Tensor, words: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of a part of the vocabulary: the logsumexp of its logits [n], and the logits at places [n],
    0 where a place is not in this part."""
    logits = (hidden.to(words.dtype) @ words.T).to(hidden.dtype)
    there = (places >= 0) & (places < len(words))
    of_places = logits.gather(-1, places.clamp(0, len(words) - 1).unsqueeze(-1)).squeeze(-1)
    return logits.logsumexp(-1), of_places * there

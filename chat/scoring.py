"""Log-probabilities of responses that share prompts, over large vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model import Transformer


def shared_log_prob(
    model: Transformer, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """log pi(y|x) of whole responses by one model, float32 [B].

    A prompt is read once for all its responses: they stand in one row after it, and none sees
    another. Over a large vocabulary the head's logits are far larger than all else; they are made
    for the responses' tokens only, and never all at once (`TokenLogProbs`)."""
    device, places = responses[0].device, places_of(prompts)
    rows, sources, targets, owners = [], [], [], []
    for row, (prompt, members) in enumerate(places.items()):
        tokens, positions, sequence, source = one_row(prompt, [responses[b] for b in members])
        rows.append((tokens, positions, sequence))
        sources += [(row, place) for place in source]
        targets += [responses[b] for b in members]
        owners += [b for b in members for _ in responses[b]]
    padded = (
        nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True)
    )
    tokens, positions, sequence = (part.to(device) for part in padded)
    mask = (sequence[:, :, None] == sequence[:, None, :]) | (sequence[:, None, :] == 0)
    mask = mask & torch.ones_like(mask[0]).tril()
    hidden = model.hidden(tokens, positions, mask[:, None])
    row_of, place_of = torch.tensor(sources, device=device).unbind(-1)
    log_probs = token_log_probs(model.head, hidden[row_of, place_of], torch.cat(targets))
    of_response = torch.tensor(owners, device=device)
    return log_probs.new_zeros(len(prompts)).index_add(0, of_response, log_probs)


def places_of(prompts: Sequence[Tensor]) -> dict[tuple[int, ...], list[int]]:
    """The numbers of the responses of each prompt."""
    places: dict[tuple[int, ...], list[int]] = {}
    for b, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt.tolist()), []).append(b)
    return places


def one_row(
    prompt: tuple[int, ...], responses: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A prompt with all its responses after it, but for their last tokens, which nothing follows.

    Returns tokens, positions and the number of the sequence of each place, [length] (0 is the
    prompt, 1, 2, ... are the responses); and the place at which each token of the responses is
    predicted."""
    T = len(prompt)
    parts, positions, sequence = [torch.tensor(prompt)], [torch.arange(T)], [torch.zeros(T)]
    source, length = [], T
    for number, y in enumerate(responses, 1):
        n = len(y) - 1
        source += [T - 1, *range(length, length + n)]
        parts.append(y[:-1])
        positions.append(torch.arange(T, T + n))
        sequence.append(torch.full((n,), number))
        length += n
    tokens = torch.cat([part.to(responses[0].device) for part in parts])
    return tokens, torch.cat(positions), torch.cat(sequence).long(), source


class Piece(NamedTuple):
    """A part of the vocabulary."""

    words: slice
    logits: Tensor  # [n, at_once]
    place: Tensor  # [n, 1], of the tokens among the words
    there: Tensor  # [n, 1], whether they are among them


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden [n, C] weight^T [C, V]) at tokens [n], float32 at least, [n].

    By `at_once` words of the vocabulary at a time, whose logits fit the processor's cache. They are
    made once more for the gradient rather than kept."""

    @staticmethod
    def pieces(hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int) -> Iterator[Piece]:
        """The parts of the vocabulary, one after the other."""
        for start in range(0, len(weight), at_once):
            words, place = slice(start, start + at_once), (tokens - start).unsqueeze(-1)
            logits = (hidden @ weight[words].T).to(torch.promote_types(hidden.dtype, torch.float32))
            there = (place >= 0) & (place < logits.shape[-1])
            yield Piece(words, logits, place.clamp(0, logits.shape[-1] - 1), there)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int) -> Tensor:
        sums, of_token = [], []
        for _, logits, place, there in TokenLogProbs.pieces(hidden, weight, tokens, at_once):
            sums.append(logits.logsumexp(-1))
            of_token.append(logits.gather(-1, place) * there)
        ctx.total, ctx.at_once = torch.stack(sums).logsumexp(0), at_once
        ctx.save_for_backward(hidden, weight, tokens)
        return torch.stack(of_token).sum(0).squeeze(-1) - ctx.total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, tokens = ctx.saved_tensors
        of_hidden, of_weight = torch.zeros_like(hidden, dtype=grad.dtype), None
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
        grad, pieces = grad.unsqueeze(-1), TokenLogProbs.pieces(hidden, weight, tokens, ctx.at_once)
        for words, logits, place, there in pieces:
            p = (logits - ctx.total.unsqueeze(-1)).exp_()
            of_logits = p.mul_(-grad).scatter_add_(-1, place, grad * there)  # grad (1[y] - p)
            of_logits = of_logits.to(hidden.dtype)
            of_hidden += of_logits @ weight[words]
            if of_weight is not None:
                torch.mm(of_logits.T, hidden, out=of_weight[words])
        return of_hidden.to(hidden.dtype), of_weight, None, None


def token_log_probs(head: nn.Linear, hidden: Tensor, tokens: Tensor, at_once: int = 2048) -> Tensor:
    """log softmax(head(hidden [n, C])) at tokens [n], [n]; see `TokenLogProbs`."""
    return TokenLogProbs.apply(hidden, head.weight, tokens, at_once)

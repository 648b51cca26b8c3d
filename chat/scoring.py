"""Log-probabilities of responses that share prompts, over large vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model import Transformer


def shared_log_prob(
    model: Transformer, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """`token_log_prob` of one model, float32 [B], with the prompt read once for all its responses:
    they stand in one row after it, none seeing another. The head's logits, of large vocabularies
    far larger than all else, are made for the responses' tokens only, and never all at once: see
    `TokenLogProbs`."""
    places: dict[tuple[int, ...], list[int]] = {}
    for b, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt.tolist()), []).append(b)
    device, rows = responses[0].device, []
    sources, targets, owners = (
        [],
        [],
        [],
    )  # of each token of a response: where it is predicted, what it is, whose it is
    for row, (prompt, members) in enumerate(places.items()):
        parts, positions, owner = (
            [torch.tensor(prompt, device=device)],
            [*range(len(prompt))],
            [0] * len(prompt),
        )
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
    padded = (
        nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True)
    )
    tokens, positions, owner = (part.to(device) for part in padded)
    mask = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    mask = mask & torch.ones_like(mask[0]).tril()
    hidden = model.hidden(tokens, positions, mask[:, None])
    row, place = torch.tensor(sources, device=device).unbind(-1)
    log_probs = token_log_probs(model.head, hidden[row, place], torch.cat(targets))
    return log_probs.new_zeros(len(prompts)).index_add(
        0, torch.tensor(owners, device=device), log_probs
    )


class TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden [n, C] weight^T [C, V]) at tokens [n], float32 at least, [n], by `at_once`
    words of the vocabulary at a time, whose logits fit the processor's cache. They are made once
    more for the gradient rather than kept."""

    @staticmethod
    def pieces(
        hidden: Tensor, weight: Tensor, tokens: Tensor, at_once: int
    ) -> Iterator[tuple[slice | Tensor, ...]]:
        """Of each part of the vocabulary: its words, logits [n, at_once], tokens' places [n, 1],
        and are they there? [n, 1]"""
        for start in range(0, len(weight), at_once):
            words, place = slice(start, start + at_once), (tokens - start).unsqueeze(-1)
            logits = (hidden @ weight[words].T).to(torch.promote_types(hidden.dtype, torch.float32))
            yield (
                words,
                logits,
                place.clamp(0, logits.shape[-1] - 1),
                (place >= 0) & (place < logits.shape[-1]),
            )

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
        for words, logits, place, there in TokenLogProbs.pieces(
            hidden, weight, tokens, ctx.at_once
        ):
            p = (logits - ctx.total.unsqueeze(-1)).exp_()
            of_logits = (
                p.mul_(-grad).scatter_add_(-1, place, grad * there).to(hidden.dtype)
            )  # grad (1[y] - p)
            of_hidden += of_logits @ weight[words]
            if of_weight is not None:
                torch.mm(of_logits.T, hidden, out=of_weight[words])
        return of_hidden.to(hidden.dtype), of_weight, None, None


def token_log_probs(head: nn.Linear, hidden: Tensor, tokens: Tensor, at_once: int = 2048) -> Tensor:
    """log softmax(head(hidden [n, C])) at tokens [n], [n]; see `TokenLogProbs`."""
    return TokenLogProbs.apply(hidden, head.weight, tokens, at_once)

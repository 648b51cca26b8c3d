"""Low-rank terms (LoRA): a small part of a model that is trained in place of the whole."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Transformer


class LowRank(nn.Module):
    """A fixed linear map with a trained term of low rank, W x + 2 B A x (LoRA, Hu et al. 2022,
    alpha = 2 r): A [r, in], B [out, r], which starts at 0. They are float32 and compute in x's
    dtype."""

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.weight, self.bias, inputs = linear.weight, linear.bias, linear.in_features
        start = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        self.A = nn.Parameter(start.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        term = F.linear(F.linear(x, self.A.to(x.dtype)), 2 * self.B.to(x.dtype))
        return F.linear(x, self.weight, self.bias) + term


def add_low_rank(model: Transformer, rank: int) -> None:
    """Change the model in place: each map inside its blocks gets a `LowRank` term, and these are
    all that is trained."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for part in list(model.blocks.modules()):
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(part, name, LowRank(linear, rank, generator))


def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """All weights by name, low-rank terms merged into the maps they belong to."""
    weights = model.state_dict()
    for name, part in model.named_modules():
        if isinstance(part, LowRank):
            whole = part.weight.float() + 2 * part.B @ part.A
            weights[f"{name}.weight"] = whole.to(part.weight.dtype).detach()
            del weights[f"{name}.A"], weights[f"{name}.B"]
    return weights

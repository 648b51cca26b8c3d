"""A scorer of responses that several processes, or float32 master weights, train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from chat.scoring import shared_log_prob
from chat.team import Team
from model import Transformer


def is_shard(value: Any) -> TypeGuard[Any]:
    """Whether it is a process's part of a tensor. If nothing has been cut in parts, the module that
    does it, which takes a second to import, is not there."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def full(weight: Tensor) -> Tensor:
    """A sharded tensor, gathered from all processes; of another, all."""
    return weight.full_tensor() if is_shard(weight) else weight


def whole(value: Any) -> Any:
    """A tensor gathered from all processes, on the CPU, in process 0; the others get an empty one.
    What is no tensor stays."""
    if not isinstance(value, Tensor):
        return value
    value = full(value)
    return value.detach().cpu() if Team().rank == 0 else torch.empty(0)


def part_of(value: Any, like: Tensor) -> Any:
    """Of a whole tensor the part that this process has of `like`, if `like` is sharded and of the
    same shape."""
    if isinstance(value, Tensor) and is_shard(like) and value.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return value


def all_scores(own: Tensor, place: Tensor, total: int, size: int) -> Tensor:
    """The scores [total] of all processes from each one's own [m], which are those at place [m].

    All then have the whole loss, and pass the gradient on to their own part; times the number of
    processes, over which the gradients will be averaged."""
    scores = own.detach().new_zeros(total).index_copy(0, place, own.detach())
    dist.all_reduce(scores)
    own = own + (size - 1) * (own - own.detach())  # the same, with size times the gradient
    return scores.index_copy(0, place, own)


class Scorer(nn.Module):
    """`shared_log_prob` of a transformer as a module, for `DistributedDataParallel` and
    `fully_shard` to wrap."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        return shared_log_prob(self.model, prompts, responses)


class InPlaceOf(torch.autograd.Function):
    """A master weight's copy in a lower precision, used in its place: the gradient is the master's,
    in its precision."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, weight: Tensor) -> Tensor:
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.float(), None


class MasterWeights(nn.Module):
    """A `Scorer` that computes in its low precision and trains float32 copies of its weights
    (master weights): in bfloat16 most small steps would round to nothing."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = [scorer]  # in a list, for its parameters are not among this module's
        self.masters = nn.ParameterList(weight.detach().float() for weight in scorer.parameters())

    def forward(self, prompts: Sequence[Tensor], responses: Sequence[Tensor]) -> Tensor:
        named = zip(self.scorer[0].named_parameters(), self.masters, strict=True)
        weights = {name: InPlaceOf.apply(master, weight) for (name, weight), master in named}
        return functional_call(self.scorer[0], weights, (prompts, responses))


def sharded(scorer: Scorer, dtype: torch.dtype, device: torch.device) -> Scorer:
    """The scorer with every parameter, its gradient and what an optimizer keeps of it cut in as
    many parts as there are processes; a block's are gathered, as dtype, while it computes."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*scorer.model.blocks, scorer):
        fully_shard(part, mesh=mesh, mp_policy=precision)
    return scorer

"""The processes of one run, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dno import Preferences, Scores
from judge.ledger import Stopped


class Team:
    """The processes that work on one run: torchrun's, if it started them, else this one alone."""

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def mine(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share of the items: every size-th."""
        return items[self.rank :: self.size]

    def share_of(self, prompts: Sequence[str]) -> list[int]:
        """The places of this process's share of the prompts; those that are equal go together."""
        numbers = {x: number for number, x in enumerate(dict.fromkeys(prompts))}
        return [i for i, x in enumerate(prompts) if numbers[x] % self.size == self.rank]

    def together(self, mine: list[Any]) -> list[Any]:
        """Everybody's shares, in the order of the items: what was made of `mine(items)` becomes
        what was made of items."""
        if self.size == 1:
            return mine
        shares: list[list[Any]] = [[]] * self.size
        dist.all_gather_object(shares, mine)
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]


class SharedJudge:
    """A judge whose questions the processes of a run share.

    All questions about a prompt are asked by the same process. All processes get all the answers,
    or raise the error that one of them met."""

    def __init__(self, judge: Preferences, team: Team):
        self.judge, self.team = judge, team

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """As the judge's, P(a > b | x) [B]."""
        return self._answers(self.judge.prefer, prompts, a, b)

    def scores(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Tensor:
        """As the judge's, points [X, n]."""
        if not isinstance(self.judge, Scores):
            raise ValueError(f"{type(self.judge).__name__} has no scores")
        return self._answers(self.judge.scores, prompts, responses)

    def _answers(
        self, ask: Callable[..., Tensor], prompts: Sequence[str], *questions: Sequence[Any]
    ) -> Tensor:
        """An answer for each prompt, from the process whose share it is in."""
        mine = self.team.share_of(prompts)
        found: Any = []
        try:
            if mine:
                found = ask(*([items[i] for i in mine] for items in (prompts, *questions)))
        except Stopped as error:
            found = error
        answers: dict[int, Tensor] = {}
        for places, theirs in self.team.together([(mine, found)]):
            if isinstance(theirs, Stopped):
                raise theirs
            answers |= dict(zip(places, theirs, strict=True))
        return torch.stack([answers[i] for i in range(len(prompts))])

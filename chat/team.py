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
        places: dict[str, list[int]] = {}
        for place, x in enumerate(prompts):
            places.setdefault(x, []).append(place)
        groups, P = list(places.values()), torch.empty(len(prompts), dtype=torch.float64)
        asked = [place for group in self.team.mine(groups) for place in group]
        found = self._everybody(
            self.judge.prefer, *([items[place] for place in asked] for items in (prompts, a, b))
        )
        found = found.split([len(group) for group in self.team.mine(groups)])
        for group, answers in zip(groups, self.team.together(list(found)), strict=True):
            P[group] = answers.to(P)
        return P

    def scores(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Tensor:
        """As the judge's, points [X, n]."""
        if not isinstance(self.judge, Scores):
            raise ValueError(f"{type(self.judge).__name__} has no scores")
        mine = self._everybody(
            self.judge.scores, self.team.mine(prompts), self.team.mine(responses)
        )
        return torch.stack(self.team.together(list(mine)))

    def _everybody(self, ask: Callable[..., Tensor], *questions: Any) -> Tensor:
        """This process's answers, once all processes have theirs."""
        found, met = torch.empty(0), None
        try:
            found = ask(*questions) if len(questions[0]) else found
        except Stopped as error:
            met = error
        for problem in self.team.together([met]):
            if problem is not None:
                raise problem
        return found

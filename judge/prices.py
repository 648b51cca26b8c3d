"""What requests cost: prices, tokens, and the plan of what will be asked."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens of prompt and of completion, each at least 0."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not (0 <= self.prompt < math.inf and 0 <= self.completion < math.inf):
            raise ValueError(
                f"prices are {self.prompt} and {self.completion}; "
                "expected dollars per million tokens, at least 0"
            )

    def dollars(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The dollars that so many tokens cost."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


def count_tokens(text: str) -> float:
    """About how many tokens a text has: a quarter of its UTF-8 bytes."""
    return len(text.encode()) / 4


@dataclass(frozen=True)
class Plan:
    """What questions will cost: the requests that are not in the ledger yet, the tokens of their
    prompts, the most tokens of their completions, and the dollars if every completion is that long
    (None if the price is not known)."""

    requests: int
    prompt_tokens: float
    completion_tokens: float
    dollars: float | None

    def __str__(self) -> str:
        dollars = "dollars not known"
        if self.dollars is not None:
            dollars = f"${self.dollars:.2f} at most if none is asked twice"
        return (
            f"{self.requests:,} requests, about {self.prompt_tokens:,.0f} tokens of prompts "
            f"and at most {self.completion_tokens:,.0f} of completions, {dollars}"
        )

    def __add__(self, other: Plan) -> Plan:
        dollars = None
        if self.dollars is not None and other.dollars is not None:
            dollars = self.dollars + other.dollars
        return Plan(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            dollars,
        )

    def __mul__(self, times: int) -> Plan:
        dollars = None if self.dollars is None else self.dollars * times
        return Plan(
            self.requests * times,
            self.prompt_tokens * times,
            self.completion_tokens * times,
            dollars,
        )

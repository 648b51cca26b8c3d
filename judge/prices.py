"""What requests cost: prices, tokens, and the plan of what will be asked."""

from __future__ import annotations

import hashlib
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken


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


# OpenAI's list prices as we last saw them. They change: give your own where it matters.
PRICES = {
    "gpt-4-32k": Price(60, 120),
    "gpt-4": Price(30, 60),
    "gpt-4-turbo": Price(10, 30),
    "gpt-4-1106-preview": Price(10, 30),
    "gpt-4-0125-preview": Price(10, 30),
    "gpt-4o": Price(2.5, 10),
    "gpt-4o-2024-05-13": Price(5, 15),
    "gpt-4o-mini": Price(0.15, 0.6),
    "gpt-4.1": Price(2, 8),
    "gpt-4.1-mini": Price(0.4, 1.6),
    "gpt-4.1-nano": Price(0.1, 0.4),
}


def price_of(model: str) -> Price | None:
    """The list price of a model, or of the model of which it is a dated version. None if it is not
    in the table."""
    return PRICES.get(model) or PRICES.get(re.sub(r"-\d{4}(-\d{2}-\d{2})?$", "", model))


# tiktoken names its files after a hash of this address
ENCODINGS_AT = "https://openaipublic.blob.core.windows.net/encodings"
ENCODINGS = {  # SHA-256 of tiktoken's files: it would download a damaged one again
    "o200k_base": "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    "cl100k_base": "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
}


@lru_cache
def encoding_of(model: str) -> tiktoken.Encoding | None:
    """tiktoken's encoding for the model, or None if its file is not on this machine. Nothing is
    downloaded."""
    import tiktoken

    try:
        name = tiktoken.encoding_name_for_model(model)
    except KeyError:
        return None
    folder = os.environ.get(
        "TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", f"{gettempdir()}/data-gym-cache")
    )
    file = Path(folder) / hashlib.sha1(f"{ENCODINGS_AT}/{name}.tiktoken".encode()).hexdigest()
    if not (folder and file.exists()):
        return None
    sound = hashlib.sha256(file.read_bytes()).hexdigest() == ENCODINGS.get(name)
    return tiktoken.get_encoding(name) if sound else None


def count_tokens(text: str, model: str) -> float:
    """The number of tokens in a text. tiktoken counts them if the model's encoding is already on
    this machine; if not, a quarter of the text's UTF-8 bytes is the estimate."""
    encoding = encoding_of(model)
    return len(encoding.encode(text, disallowed_special=())) if encoding else len(text.encode()) / 4


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

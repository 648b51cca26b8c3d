"""Files of prompts for the preset "llm"."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from chat.template import Chat
from experiments.llm_settings import LlmConfig
from experiments.settings import BadInput
from model import Config

Prompt = dict[str, Any]  # {"prompt": text, "gold": optional text, "split": optional}


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a file, in its order. Blank lines and a byte order mark are skipped. BadInput
    naming the lines that are malformed, empty or duplicates."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts {path} cannot be read ({error})") from error
    items, bad = [], []
    seen: dict[str, int] = {}  # prompt -> line
    # not splitlines: other characters that end lines can stand in a text
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        item, fault = read_prompt(line)
        first = number if fault else seen.setdefault(item["prompt"].strip(), number)
        if first != number:
            fault = f"is the prompt of line {first}"
        if fault:
            bad.append(f"line {number} {fault}")
        else:
            items.append(item)
    if bad or not items:
        faults = "; ".join(bad[:20]) or "no line; expected a prompt a line"
        raise BadInput(f"prompts {path}: {faults}")
    return items


def read_prompt(line: str) -> tuple[Prompt, str]:
    """The object of a line of a file of prompts, and what is wrong with it, "" if nothing is."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        return {}, 'is no {"prompt": ...}'
    if not item["prompt"].strip() or not isinstance(item.get("gold", ""), str):
        return {}, "has an empty prompt, or a gold response that is no text"
    if re.search("[\ud800-\udfff]", item["prompt"] + item.get("gold", "")):
        return {}, "has half of a surrogate pair (\\ud800 to \\udfff), which is no letter"
    if item.get("split") not in (None, "train", "validation"):
        return {}, f"has split {item['split']!r}; expected train, validation or none"
    return item, ""


def split_prompts(
    config: LlmConfig, chat: Chat, shape: Config
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, shuffled, and prompts held out.

    BadInput if some are too long for the options or for a model of that shape, if there are fewer
    than asked for, or if only some have a gold response."""
    items, file = read_prompts(config.prompts), f"prompts {config.prompts}"
    check_lengths(config, chat, shape, items)
    marked = [item for item in items if item.get("split") == "validation"]
    unmarked = [item for item in items if item.get("split") != "validation"]
    rest = unmarked if marked else items[: -config.held_out]
    where = "marked validation" if marked else "in all"
    for name, wanted, most, why in (
        ("held-out", config.held_out, len(marked or items), where),
        ("train-prompts", config.train_prompts, len(rest), "to train on"),
    ):
        if wanted is not None and wanted > most:
            raise BadInput(f"{file}: {most} {why}; expected --{name} {wanted} to be at most that")
    training, held_out = rest[: config.train_prompts], (marked or items)[-config.held_out :]
    if len(training) < config.iterations:
        found = f"{len(training)} to train on beside {len(held_out)} held out"
        raise BadInput(f"{file}: {found}; expected at least --iterations {config.iterations}")
    with_gold = sum("gold" in item for item in training)
    if with_gold not in (0, len(training)):
        found = f"{with_gold} of {len(training)} have a gold response"
        raise BadInput(f"{file}: {found}; expected all or none")
    random.Random(config.seed).shuffle(training)
    return training, held_out


def check_lengths(config: LlmConfig, chat: Chat, shape: Config, items: list[Prompt]) -> None:
    """BadInput if a prompt is longer than it may be or has no token, if it and its longest response
    are more than the model reads, or if the model has no such token."""
    file, model = f"prompts {config.prompts}", config.model
    texts, golds = [item["prompt"] for item in items], [item.get("gold") for item in items]
    prompts = [chat.prompt(x) for x in texts]
    gold = [[] if y is None else [*chat.encode(y), chat.end] for y in golds]
    for x, tokens in zip(texts, prompts, strict=True):
        if not tokens:
            raise BadInput(f"{file}: {model} reads no token of {x[:60]!r}; leave it out")
    lengths = [len(tokens) for tokens in prompts]
    check_longest(file, texts, lengths, "--max-prompt-tokens", config.max_prompt_tokens)
    both = zip(prompts, gold, strict=True)
    lengths = [len(x) + max(config.max_new_tokens, len(y)) for x, y in both]
    context = f"the context or sliding window of {model} with --max-new-tokens or a gold response"
    check_longest(file, texts, lengths, context, shape.context or max(lengths))
    last = max(token for row in (*prompts, *gold) for token in row)
    if last >= shape.vocab_size:
        found = f"{model} has {shape.vocab_size} tokens and its tokenizer a token {last}"
        raise BadInput(f"{found}; expected the tokenizer of this model")


def check_longest(file: str, texts: list[str], lengths: list[int], name: str, limit: int) -> None:
    """BadInput naming the first text that is longer than the limit, in tokens."""
    long = [(x, length) for x, length in zip(texts, lengths, strict=True) if length > limit]
    if long:
        (text, length), *_ = long
        fault = f"{len(long)} are longer than {name}, {limit} tokens"
        raise BadInput(f"{file}: {fault}; the first is {text[:60]!r} with {length}")

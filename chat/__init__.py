"""Real chat models: their files, templates, scoring, and a policy by one process or many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chat.template import Chat
    from model import Transformer


def load(path: str | Path, plain: bool = False) -> tuple[Transformer, Chat]:
    """The model and the chat template of a Hugging Face directory or a GGUF file.

    Its family is one of `chat.formats.FAMILIES`. Weights are float32. plain: ask by the prompt and
    an empty line in place of the template. ValueError naming what is missing, misshapen or not
    supported."""
    from chat.checkpoints import read_transformer
    from chat.template import Chat

    return read_transformer(path), Chat.from_pretrained(path, plain)


def save(path: str | Path, model: Transformer, chat: Chat | None = None) -> None:
    """Write a directory that transformers and vLLM load: the weights, and the tokenizer if given.

    Low-rank terms become part of the weights. OSError if the disk has no room for them."""
    from chat.checkpoints import write_transformer

    write_transformer(model, path)
    if chat is not None:
        chat.save(path)

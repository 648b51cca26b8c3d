"""A chat model from its files, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat.formats import BadCheckpoint, checkpoint_path
from chat.gguf import read_gguf
from chat.hugging_face import read_directory, save_directory
from chat.low_rank import LowRank
from model import Config, Transformer


def read_checkpoint(
    path: str | Path,
) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """The fields of model.py's Config, and (our name, function that reads the tensor) of each
    weight, so that one is in memory twice at a time. BadCheckpoint if the path is no checkpoint or
    its architecture is not supported."""
    path = checkpoint_path(path)
    return read_directory(path) if path.is_dir() else read_gguf(path)


def read_transformer(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a Hugging Face directory or a GGUF file of the Llama family (Llama 2 and 3,
    Mistral, SmolLM2, TinyLlama, Qwen2, Qwen3), its weights as dtype. ValueError naming what is
    missing, misshapen or not supported."""
    fields, weights = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(Config(**fields))
    model = model.to(dtype).to_empty(device="cpu")
    if model.config.tied:  # a copy of each was made
        model.head.weight = model.embedding.weight
    wanted = dict(model.named_parameters())
    for name, read in weights:
        if name == "head.weight" and model.config.tied:
            continue
        if name not in wanted:
            raise BadCheckpoint(
                f"{path} has a tensor for {name}; its configuration has no place for it"
            )
        weight, place = read(), wanted.pop(name)
        if weight.shape != place.shape:
            raise BadCheckpoint(
                f"{path}: {name} has shape {list(weight.shape)}; expected {list(place.shape)}"
            )
        with torch.no_grad():
            place.copy_(weight)
        if not place.isfinite().all():
            broken = int((~place.isfinite()).sum())
            raise BadCheckpoint(
                f"{path}: {name} has {broken} entries of {place.numel()} that are not finite "
                f"in {dtype}; expected numbers"
            )
    if wanted:
        raise BadCheckpoint(f"{path} has no tensor for {next(iter(wanted))}")
    return model


def write_transformer(model: Transformer, path: str | Path, shard_bytes: int = 5 << 30) -> None:
    """Write a Hugging Face directory (config.json, safetensors) that transformers and vLLM load;
    low-rank terms become part of the maps they belong to."""
    fields = {
        field.name: getattr(model.config, field.name) for field in dataclasses.fields(model.config)
    }
    weights = model.state_dict()
    for name, part in model.named_modules():
        if isinstance(part, LowRank):
            weights[f"{name}.weight"] = part.merged()
            del weights[f"{name}.A"], weights[f"{name}.B"]
    save_directory(path, fields, weights, shard_bytes)

"""A transformer from its files, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chat.formats import BadCheckpoint, Weights, checkpoint_path
from chat.gguf import read_gguf
from chat.hugging_face import read_directory, save_directory
from chat.low_rank import merged_weights
from model import Config, Transformer


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Weights]:
    """The fields of model.py's Config, and (our name, function that reads the tensor) of each
    weight, so that one is in memory twice at a time. BadCheckpoint if the path is no checkpoint or
    its architecture is not supported."""
    path = checkpoint_path(path)
    fields, weights = read_directory(path) if path.is_dir() else read_gguf(path)
    try:
        return vars(Config(**fields)), weights
    except ValueError as error:
        raise BadCheckpoint(f"{path} has {error}") from error


def read_transformer(path: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of `chat.load` alone, its weights as dtype: its files need no tokenizer.
    BadCheckpoint names what is missing, misshapen, not finite or not supported."""
    fields, weights = read_checkpoint(path)
    with torch.device("meta"):
        model = Transformer(Config(**fields))
    model = model.to(dtype).to_empty(device="cpu")
    if model.config.tied:  # `to_empty` has made a copy of each
        model.head.weight = model.embedding.weight
    missing = dict(model.named_parameters())
    for name, read in weights:
        if name == "head.weight" and model.config.tied:
            continue
        if name not in missing:
            raise BadCheckpoint(
                f"{path} has a tensor {name}; its configuration has no place for it"
            )
        weight, place = read(), missing.pop(name)
        if weight.shape != place.shape or not weight.is_floating_point():
            raise BadCheckpoint(
                f"{path}: {name} has {weight.dtype} of shape {list(weight.shape)}; expected "
                f"floating-point numbers of shape {list(place.shape)}"
            )
        with torch.no_grad():
            place.copy_(weight)
        if not place.isfinite().all():
            broken = int((~place.isfinite()).sum())
            raise BadCheckpoint(
                f"{path}: {name} has {broken} entries of {place.numel()} that are not finite "
                f"in {dtype}; expected numbers"
            )
    if missing:
        raise BadCheckpoint(f"{path} has no tensor for {next(iter(missing))}")
    return model


def write_transformer(model: Transformer, path: str | Path, shard_bytes: int = 5 << 30) -> None:
    """Write a Hugging Face directory (config.json, safetensors) that transformers and vLLM load;
    low-rank terms become part of the maps they belong to."""
    save_directory(Path(path), vars(model.config), merged_weights(model), shard_bytes)

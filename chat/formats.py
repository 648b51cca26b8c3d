"""What the checkpoint formats share: names of tensors, checks of configurations."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

ARCHITECTURES = {  # of config.json -> (model_type, biases on q, k and v, norms on q and k)
    "LlamaForCausalLM": ("llama", False, False),
    "MistralForCausalLM": ("mistral", False, False),
    "Qwen2ForCausalLM": ("qwen2", True, False),
    "Qwen3ForCausalLM": ("qwen3", False, True),
}
NAMES = {  # ours -> Hugging Face's, GGUF's; {} is the number of the layer
    "embedding.weight": ("model.embed_tokens.weight", "token_embd.weight"),
    "blocks.{}.norm1.weight": ("model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "blocks.{}.attention.q.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "blk.{}.attn_q.weight",
    ),
    "blocks.{}.attention.k.weight": (
        "model.layers.{}.self_attn.k_proj.weight",
        "blk.{}.attn_k.weight",
    ),
    "blocks.{}.attention.v.weight": (
        "model.layers.{}.self_attn.v_proj.weight",
        "blk.{}.attn_v.weight",
    ),
    "blocks.{}.attention.q.bias": ("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "blocks.{}.attention.k.bias": ("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "blocks.{}.attention.v.bias": ("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "blocks.{}.attention.q_norm.weight": (
        "model.layers.{}.self_attn.q_norm.weight",
        "blk.{}.attn_q_norm.weight",
    ),
    "blocks.{}.attention.k_norm.weight": (
        "model.layers.{}.self_attn.k_norm.weight",
        "blk.{}.attn_k_norm.weight",
    ),
    "blocks.{}.attention.out.weight": (
        "model.layers.{}.self_attn.o_proj.weight",
        "blk.{}.attn_output.weight",
    ),
    "blocks.{}.norm2.weight": (
        "model.layers.{}.post_attention_layernorm.weight",
        "blk.{}.ffn_norm.weight",
    ),
    "blocks.{}.gate.weight": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "blocks.{}.up.weight": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "blocks.{}.down.weight": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "norm.weight": ("model.norm.weight", "output_norm.weight"),
    "head.weight": ("lm_head.weight", "output.weight"),
}
HUGGING_FACE, GGUF = 0, 1


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary frequencies for contexts longer than `context`, which it was first trained
    on: a frequency of more than `high` turns in that context stays, one of fewer than `low` is
    divided by `factor`, between the two it is interpolated."""

    factor: float
    low: float
    high: float
    context: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The frequencies [D/2] in radians a token, scaled."""
        turns = self.context * frequencies / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / self.factor)


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read; says which file or tensor, and what was expected."""


def one_line(error: Exception) -> str:
    """What another library says of an error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def positive(
    found: Any, name: str, path: str | Path, default: float | None = None, whole: bool = True
) -> Any:
    """A configuration's number, the default where it has none. BadCheckpoint if it is no positive
    (whole) number."""
    found = default if found is None else found
    if found is None:
        raise BadCheckpoint(f"{path} has no {name}")
    if type(found) not in ((int,) if whole else (int, float)) or not 0 < found < math.inf:
        raise BadCheckpoint(
            f"{path} has {name} {found!r}; expected a positive {'whole ' * whole}number"
        )
    return found if whole else float(found)


def matched(fields: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The fields. BadCheckpoint if its heads cannot be: `Config` says so too, but not of which
    file."""
    if fields["heads"] % fields["kv_heads"] or fields["head_width"] % 2:
        heads, kv_heads = fields["heads"], fields["kv_heads"]
        found = f"{heads} heads of {fields['head_width']} channels and {kv_heads} key-value heads"
        expected = "an even number of channels and heads a multiple of key-value heads"
        raise BadCheckpoint(f"{path} has {found}; expected {expected}")
    return fields


def without_layer(name: str) -> tuple[str, str]:
    """A tensor's name with {} for the number of its layer, and that number, "" if it is of none."""
    number = re.search(r"\d+", name)
    return (name.replace(number[0], "{}", 1), number[0]) if number else (name, "")


def our_name(theirs: str, kind: int) -> str | None:
    """Our name of their tensor, None if there is none."""
    wanted, layer = without_layer(theirs)
    ours = next((name for name, names in NAMES.items() if names[kind] == wanted), None)
    return ours and ours.format(layer)


def checkpoint_path(path: str | Path) -> Path:
    """The path, if it is a directory or a .gguf file. BadCheckpoint if not."""
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise BadCheckpoint(
            f"{path} is no checkpoint; expected a Hugging Face directory or a .gguf file"
        )
    return path

"""What the checkpoint formats share: model families, names of fields and tensors, errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

# our name, or theirs if we have none, and a function that reads the tensor
Weights = Iterator[tuple[str, Callable[[], Tensor]]]
HUGGING_FACE, GGUF = 0, 1  # places in the pairs of names below


@dataclass(frozen=True)
class Family:
    """How the models of a family differ from Llama's. One is added by an entry of `FAMILIES`, one
    of the tests' `FAMILIES`, and its name in docs/real-models.md."""

    architecture: str  # in config.json
    model_type: str  # in config.json
    gguf: str | None  # general.architecture of its GGUF files; None if they say llama
    qkv_bias: bool = False  # on the maps to queries, keys and values
    qk_norm: bool = False  # of queries and keys
    window: str = "never"  # do layers see only a window of tokens? "never", "always", "by layer"
    paired: bool = False  # in GGUF files the channels of a rotary pair stand side by side


FAMILIES = (  # of those that are alike here, the first is what is written
    Family("LlamaForCausalLM", "llama", "llama", paired=True),
    Family("MistralForCausalLM", "mistral", None, window="always"),
    Family("Qwen2ForCausalLM", "qwen2", "qwen2", qkv_bias=True, window="by layer"),
    Family("Qwen3ForCausalLM", "qwen3", "qwen3", qk_norm=True, window="by layer"),
)
NUMBERS = {  # fields of Config: ours -> (Hugging Face's, GGUF's after the name of the architecture)
    "layers": ("num_hidden_layers", "block_count"),
    "width": ("hidden_size", "embedding_length"),
    "heads": ("num_attention_heads", "attention.head_count"),
    "kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "head_width": ("head_dim", "attention.key_length"),
    "hidden": ("intermediate_size", "feed_forward_length"),
    "context": ("max_position_embeddings", "context_length"),
    "rope_theta": ("rope_theta", "rope.freq_base"),
    "norm_eps": ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
}
OUTER_TENSORS = {  # ours -> (Hugging Face's, GGUF's)
    "embedding.weight": ("model.embed_tokens.weight", "token_embd.weight"),
    "norm.weight": ("model.norm.weight", "output_norm.weight"),
    "head.weight": ("lm_head.weight", "output.weight"),
}
LAYERS = ("model.layers", "blk")  # before the number of a layer; ours is "blocks"
LAYER_TENSORS = {  # after the number of a layer
    "norm1.weight": ("input_layernorm.weight", "attn_norm.weight"),
    "attention.q.weight": ("self_attn.q_proj.weight", "attn_q.weight"),
    "attention.k.weight": ("self_attn.k_proj.weight", "attn_k.weight"),
    "attention.v.weight": ("self_attn.v_proj.weight", "attn_v.weight"),
    "attention.q.bias": ("self_attn.q_proj.bias", "attn_q.bias"),
    "attention.k.bias": ("self_attn.k_proj.bias", "attn_k.bias"),
    "attention.v.bias": ("self_attn.v_proj.bias", "attn_v.bias"),
    "attention.q_norm.weight": ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    "attention.k_norm.weight": ("self_attn.k_norm.weight", "attn_k_norm.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight", "attn_output.weight"),
    "norm2.weight": ("post_attention_layernorm.weight", "ffn_norm.weight"),
    "gate.weight": ("mlp.gate_proj.weight", "ffn_gate.weight"),
    "up.weight": ("mlp.up_proj.weight", "ffn_up.weight"),
    "down.weight": ("mlp.down_proj.weight", "ffn_down.weight"),
}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary frequencies for contexts longer than `context`, the one it was first trained
    on. A frequency that makes more than `high` turns in that context stays, one that makes fewer
    than `low` is divided by `factor`, and one in between is interpolated."""

    factor: float
    low: float
    high: float
    context: int

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The frequencies [D/2], in radians a token, scaled."""
        turns = self.context * frequencies / (2 * math.pi)
        keep = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / self.factor)


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read; says which file or tensor, and what was expected."""


def one_line(error: Exception) -> str:
    """The type and message of another library's error, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def family_of(name: Any, key: str, path: Path) -> Family:
    """The family of that name; key: the field of `Family` that is its name. BadCheckpoint if there
    is none."""
    known = {getattr(family, key): family for family in FAMILIES if getattr(family, key)}
    if not isinstance(name, str) or name not in known:
        raise BadCheckpoint(f"{path} has architecture {name!r}; expected one of {', '.join(known)}")
    return known[name]


def positive(
    found: Any, name: str, path: Path, default: float | None = None, whole: bool = True
) -> Any:
    """A configuration's number, the default where it is None. BadCheckpoint if both are None, or if
    it is not a positive (whole) number."""
    found = default if found is None else found
    if type(found) not in ((int,) if whole else (int, float)) or not 0 < found < math.inf:
        raise BadCheckpoint(
            f"{path} has {name} {found!r}; expected a positive {'whole ' * whole}number"
        )
    return found if whole else float(found)


def read_numbers(
    number: Callable[..., Any], context: int | None = None, norm_eps: float | None = None
) -> dict[str, Any]:
    """The fields of Config in `NUMBERS`. number: reads one, given its name, a default, and whether
    it is whole; context and norm_eps: defaults of these."""
    width, heads = number("width"), number("heads")
    return {
        "layers": number("layers"),
        "width": width,
        "heads": heads,
        "kv_heads": number("kv_heads", heads),
        "head_width": number("head_width", width // heads),
        "hidden": number("hidden"),
        "context": number("context", context),
        "rope_theta": number("rope_theta", 10_000.0, whole=False),
        "norm_eps": number("norm_eps", norm_eps, whole=False),
    }


def tensor_names(layers: int, kind: int) -> dict[str, str]:
    """Our name -> theirs, of all tensors that a model of so many layers can have."""
    names = {ours: theirs[kind] for ours, theirs in OUTER_TENSORS.items()}
    for layer in range(layers):
        for ours, theirs in LAYER_TENSORS.items():
            names[f"blocks.{layer}.{ours}"] = f"{LAYERS[kind]}.{layer}.{theirs[kind]}"
    return names


def checkpoint_path(path: str | Path) -> Path:
    """The path. BadCheckpoint unless it is a directory or a .gguf file."""
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise BadCheckpoint(
            f"{path} is no checkpoint; expected a Hugging Face directory or a .gguf file"
        )
    return path

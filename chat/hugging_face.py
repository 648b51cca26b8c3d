"""Hugging Face directories: config.json, safetensors, tokenizers; read and written."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat.formats import (
    ARCHITECTURES,
    HUGGING_FACE,
    NAMES,
    BadCheckpoint,
    RopeScaling,
    matched,
    one_line,
    our_name,
    positive,
    without_layer,
)

# --- Reading --------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. BadCheckpoint if the file is not there or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds no JSON object")
    return content


def architecture_of(given: dict[str, Any], file: Path) -> str:
    """The architecture that config.json names. BadCheckpoint if it is not supported."""
    names = given.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        expected = f"expected one of {', '.join(ARCHITECTURES)}"
        raise BadCheckpoint(f"{file} has architecture {name!r}; {expected}")
    bias = ARCHITECTURES[name][1]
    for key, fine in {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": False}.items():
        if given.get(key, fine) not in (fine, None):
            raise BadCheckpoint(f"{file} has {key} {given[key]!r}, which is not supported")
    return name


def directory_config(path: Path) -> dict[str, Any]:
    """The fields of Config from config.json."""
    file = path / "config.json"
    given = read_json(file)
    name = architecture_of(given, file)
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        found = f"rope_parameters or rope_scaling {rope!r}"
        raise BadCheckpoint(f"{file} has {found}; expected an object")

    def number(key: str, default: float | None = None, whole: bool = True) -> Any:
        return positive(given.get(key), key, file, default, whole)

    heads, width, layers = map(number, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    context = number("max_position_embeddings", 2048)
    window = number("sliding_window", 4096) if slides(given, name, layers, file) else context
    theta = rope.get("rope_theta", given.get("rope_theta"))
    fields = {
        "vocab_size": number("vocab_size"),
        "layers": layers,
        "width": width,
        "heads": heads,
        "kv_heads": number("num_key_value_heads", heads),
        "hidden": number("intermediate_size"),
        "head_width": number("head_dim", width // heads),
        "rope_scaling": rope_scaling(rope, file),
        "rope_theta": positive(theta, "rope_theta", file, 10_000.0, whole=False),
        "norm_eps": number("rms_norm_eps", 1e-6, whole=False),
        "qkv_bias": ARCHITECTURES[name][1],
        "qk_norm": ARCHITECTURES[name][2],
        "tied": bool(given.get("tie_word_embeddings", False)),
        "context": min(context, window),
    }
    return matched(fields, file)


def rope_scaling(rope: dict[str, Any], file: Path) -> RopeScaling | None:
    """What config.json says of it. BadCheckpoint unless it is Llama 3's or none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadCheckpoint(f"{file} has rope scaling {kind!r}; expected llama3 or none")
    factor, low, high = (
        positive(rope.get(key), key, file, whole=False)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if low >= high:
        found = f"low_freq_factor {low} and high_freq_factor {high}"
        raise BadCheckpoint(f"{file} has {found}; expected the first to be less")
    key = "original_max_position_embeddings"
    return RopeScaling(factor, low, high, positive(rope.get(key), key, file))


def slides(given: dict[str, Any], architecture: str, layers: int, file: Path) -> bool:
    """Does a layer see only a window of the last tokens? Keys and defaults are those of
    transformers. BadCheckpoint on a kind of layer that no supported architecture has."""
    if given.get("sliding_window", 4096) is None or architecture == "LlamaForCausalLM":
        return False
    if architecture == "MistralForCausalLM":
        return True
    kinds, whole = given.get("layer_types"), given.get("max_window_layers", 28)
    if kinds is None and type(whole) is int:
        kinds = ["full_attention", "sliding_attention"][: 1 + (whole < layers)]
    if not isinstance(kinds, list) or any(
        kind not in ("full_attention", "sliding_attention") for kind in kinds
    ):
        raise BadCheckpoint(
            f"{file} has layer_types {kinds!r} and max_window_layers {whole!r}; expected a list of "
            "full_attention and sliding_attention, or a whole number"
        )
    return bool(given.get("use_sliding_window", False)) and "sliding_attention" in kinds


def read_directory(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """`read_checkpoint` of a directory: config.json and safetensors, in one file or in several with
    an index."""
    fields = directory_config(path)
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(
            isinstance(name, str) for name in places.values()
        ):
            raise BadCheckpoint(f"{index} has no weight_map of names of files")
        files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise BadCheckpoint(
                f"{path} has no file {name!r}; expected safetensors beside config.json"
            )
    return fields, safetensors_of(path, files)


def safetensors_of(path: Path, files: list[str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Our name and a reader of each tensor in the files.

    BadCheckpoint on a tensor that no supported model has."""
    from safetensors import SafetensorError, safe_open

    for name in files:
        file = path / name
        try:
            with safe_open(file, framework="pt") as content:
                for theirs in content.keys():  # noqa: SIM118  # it is no dictionary
                    if theirs.endswith("rotary_emb.inv_freq"):
                        continue  # of old checkpoints; it follows from the configuration
                    ours = our_name(theirs, HUGGING_FACE)
                    if ours is None:
                        reason = "which no supported architecture has"
                        raise BadCheckpoint(f"{file} has a tensor {theirs}, {reason}")
                    yield ours, partial(read_tensor, content, theirs, file)
        except (SafetensorError, OSError) as error:
            reason = f"is not readable as safetensors ({one_line(error)})"
            raise BadCheckpoint(f"{file} {reason}") from error


def read_tensor(content: Any, name: str, file: Path) -> Tensor:
    """A tensor of an open safetensors file. BadCheckpoint if it is quantised."""
    weight = content.get_tensor(name)
    if not weight.is_floating_point():
        expected = "expected floating-point numbers"
        raise BadCheckpoint(f"{file}: {name} is of {weight.dtype}; {expected}")
    return weight


def directory_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a directory's tokenizer.json and
    tokenizer_config.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise BadCheckpoint(
            f"{path}/tokenizer.json is not there or not readable ({one_line(error)})"
        ) from error
    config = read_json(path / "tokenizer_config.json")
    specials = {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str) and text:
            specials[name] = text
    beside, template = path / "chat_template.jinja", config.get("chat_template")
    if beside.exists():
        try:
            return tokenizer, beside.read_text(encoding="utf-8"), specials
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{beside} is not readable ({one_line(error)})") from error
    if isinstance(template, list):  # several, by name
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default") or named
    if template is not None and not isinstance(template, str):
        expected = "no chat_template that is a text or is named default"
        raise BadCheckpoint(f"{path}/tokenizer_config.json has {expected}")
    return tokenizer, template, specials


# --- Writing --------------------------------------------------------------------------------------


def save_directory(
    path: str | Path, fields: dict[str, Any], weights: dict[str, Tensor], shard_bytes: int = 5 << 30
) -> None:
    """Write config.json and safetensors as transformers and vLLM load them.

    fields: of Config. weights: by our names; a tied head is left out. They are in shards of at most
    `shard_bytes` if one is not enough. Weights of an older checkpoint there are removed. ValueError
    if no supported architecture has such fields, OSError if the disk has no room for them."""
    config = config_of(fields, next(iter(weights.values())).dtype)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    theirs = {}
    for ours, weight in weights.items():
        if not (fields["tied"] and ours == "head.weight"):
            pattern, layer = without_layer(ours)
            name = NAMES[pattern][HUGGING_FACE].format(layer)
            theirs[name] = weight.detach().cpu().contiguous()
    needed, free = sum(weight.nbytes for weight in theirs.values()), shutil.disk_usage(path).free
    if needed > free:  # the library would not say so in an OSError
        raise OSError(errno.ENOSPC, f"{needed:,} bytes of weights, {free:,} bytes free", str(path))
    write_shards(path, in_shards(theirs, shard_bytes), needed)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def config_of(fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """config.json for the fields of Config. ValueError if no supported architecture has them."""
    if fields["qkv_bias"] and fields["qk_norm"]:
        raise ValueError("the model has qkv_bias and qk_norm; no supported architecture has both")
    architecture = next(
        name
        for name, (_, bias, norms) in reversed(ARCHITECTURES.items())
        if (bias, norms) == (fields["qkv_bias"], fields["qk_norm"]) and "Mistral" not in name
    )
    scaling = fields["rope_scaling"]
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        kind = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.context,
        }
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [architecture],
        "model_type": ARCHITECTURES[architecture][0],
        "hidden_act": "silu",
        "vocab_size": fields["vocab_size"],
        "num_hidden_layers": fields["layers"],
        "hidden_size": fields["width"],
        "num_attention_heads": fields["heads"],
        "num_key_value_heads": fields["kv_heads"],
        "head_dim": fields["head_width"],
        "intermediate_size": fields["hidden"],
        "rms_norm_eps": fields["norm_eps"],
        "tie_word_embeddings": fields["tied"],
        "max_position_embeddings": fields["context"] or 2048,
        "rope_parameters": {"rope_theta": fields["rope_theta"], **kind},
        "rope_theta": fields["rope_theta"],
        "rope_scaling": None if scaling is None else kind,
        "attention_bias": fields["qkv_bias"],
        "use_sliding_window": False,
        "torch_dtype": name,
        "dtype": name,
    }


def in_shards(weights: dict[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    """The weights in order, in parts of at most so many bytes or of one tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, weight in weights.items():
        size = sum(tensor.nbytes for tensor in shards[-1].values())
        if shards[-1] and size + weight.nbytes > most:
            shards.append({})
        shards[-1][name] = weight
    return shards


def write_shards(path: Path, shards: list[dict[str, Tensor]], size: int) -> None:
    """model.safetensors, or several files with an index; `size`: bytes of all weights together."""
    from safetensors.torch import save_file

    index, names = path / "model.safetensors.index.json", ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        (path / name).touch()
        mode = (path / name).stat().st_mode  # as the user's umask has it; the library makes it 0600
        save_file(shard, path / name, metadata={"format": "pt"})
        (path / name).chmod(mode)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        content = {"metadata": {"total_size": size}, "weight_map": places}
        index.write_text(json.dumps(content, indent=2) + "\n")
    else:
        index.unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        older = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name)
        if older and file.name not in names:
            file.unlink()

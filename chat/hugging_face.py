"""Hugging Face directories: config.json, safetensors, tokenizers; read and written."""

from __future__ import annotations

import errno
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from chat.formats import (
    FAMILIES,
    HUGGING_FACE,
    NUMBERS,
    BadCheckpoint,
    Family,
    RopeScaling,
    Weights,
    family_of,
    one_line,
    positive,
    read_numbers,
    tensor_names,
)

ROPE = {  # fields of RopeScaling: ours -> Hugging Face's
    "factor": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "context": "original_max_position_embeddings",
}

# --- Reading --------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. BadCheckpoint if the file is missing or holds anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds no JSON object")
    return content


def read_directory(path: Path) -> tuple[dict[str, Any], Weights]:
    """`read_checkpoint` of a directory: config.json and safetensors, in one file or in several with
    an index."""
    fields, index = directory_fields(path / "config.json"), path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
            raise BadCheckpoint(f"{index} has no weight_map of names of files")
        files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise BadCheckpoint(
                f"{path} has no file {name!r}; expected safetensors beside config.json"
            )
    return fields, safetensors_of([path / name for name in files], fields["layers"])


def directory_fields(file: Path) -> dict[str, Any]:
    """The fields of Config from config.json; what is left out has transformers' defaults.
    BadCheckpoint if they are not supported."""
    given = read_json(file)
    names = given.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    family = family_of(name, "architecture", file)
    for key, fine in (
        ("hidden_act", "silu"),
        ("attention_bias", family.qkv_bias),
        ("mlp_bias", False),
    ):
        if given.get(key, fine) not in (fine, None):
            raise BadCheckpoint(f"{file} has {key} {given[key]!r}; expected {fine!r}")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadCheckpoint(
            f"{file} has rope_parameters or rope_scaling {rope!r}; expected an object"
        )

    def number(ours: str, default: float | None = None, whole: bool = True) -> Any:
        key = NUMBERS[ours][HUGGING_FACE]
        return positive(rope.get(key, given.get(key)), key, file, default, whole)

    fields = read_numbers(number, context=2048, norm_eps=1e-6)
    if slides(given, family, fields["layers"], file):
        window = positive(given.get("sliding_window"), "sliding_window", file, 4096)
        fields["context"] = min(fields["context"], window)
    return fields | {
        "vocab_size": positive(given.get("vocab_size"), "vocab_size", file),
        "rope_scaling": rope_scaling(rope, file),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "tied": bool(given.get("tie_word_embeddings", False)),
    }


def rope_scaling(rope: dict[str, Any], file: Path) -> RopeScaling | None:
    """The rope scaling that config.json describes. BadCheckpoint unless it is Llama 3's or none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadCheckpoint(f"{file} has rope scaling {kind!r}; expected llama3 or none")
    scaling = RopeScaling(
        **{
            ours: positive(rope.get(key), key, file, None, ours == "context")
            for ours, key in ROPE.items()
        }
    )
    if scaling.low >= scaling.high:
        raise BadCheckpoint(
            f"{file} has low_freq_factor {scaling.low} and high_freq_factor {scaling.high}; "
            "expected the first to be less"
        )
    return scaling


def slides(given: dict[str, Any], family: Family, layers: int, file: Path) -> bool:
    """Does a layer see only a window of the last tokens? Keys and defaults are those of
    transformers. BadCheckpoint on a kind of layer that no supported family has."""
    if given.get("sliding_window", 4096) is None or family.window == "never":
        return False
    if family.window == "always":
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


def safetensors_of(files: list[Path], layers: int) -> Weights:
    """The tensors in the files. BadCheckpoint if one cannot be read."""
    from safetensors import SafetensorError, safe_open

    names = {theirs: ours for ours, theirs in tensor_names(layers, HUGGING_FACE).items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                for theirs in content.keys():  # noqa: SIM118  # it is no dictionary
                    # old checkpoints keep these, which follow from the configuration
                    if not theirs.endswith("rotary_emb.inv_freq"):
                        yield names.get(theirs, theirs), partial(content.get_tensor, theirs)
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(
                f"{file} is not readable as safetensors ({one_line(error)})"
            ) from error


def directory_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a directory. BadCheckpoint if tokenizer.json
    or tokenizer_config.json cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise BadCheckpoint(
            f"{path}/tokenizer.json is not there or not readable ({one_line(error)})"
        ) from error
    config, specials = read_json(path / "tokenizer_config.json"), {}
    for name, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(text, str) and text:
            specials[name] = text
    return tokenizer, directory_template(path, config), specials


def directory_template(path: Path, config: dict[str, Any]) -> str | None:
    """The chat template: chat_template.jinja goes before what tokenizer_config.json (config) has,
    which is one template or several by name, of which "default" is meant."""
    beside = path / "chat_template.jinja"
    if beside.exists():
        try:
            return beside.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{beside} is not readable ({one_line(error)})") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default") or named
    if template is not None and not isinstance(template, str):
        raise BadCheckpoint(
            f"{path}/tokenizer_config.json has no chat_template that is a text or is named default"
        )
    return template


# --- Writing --------------------------------------------------------------------------------------


def save_directory(
    path: Path, fields: dict[str, Any], weights: dict[str, Tensor], shard_bytes: int
) -> None:
    """Write config.json and safetensors, in several files if one would exceed shard_bytes, as
    transformers and vLLM load them. Weights of an older checkpoint there are removed.

    fields: of Config. weights: by our names; a tied head is left out. ValueError if no supported
    family has such fields, OSError if the disk has no room for the weights."""
    from huggingface_hub import save_torch_state_dict

    config = config_json(fields, str(next(iter(weights.values())).dtype).removeprefix("torch."))
    path.mkdir(parents=True, exist_ok=True)
    names = tensor_names(fields["layers"], HUGGING_FACE)
    theirs = {
        names[ours]: weight.detach()
        for ours, weight in weights.items()
        if not (fields["tied"] and ours == "head.weight")
    }
    needed, free = sum(weight.nbytes for weight in theirs.values()), shutil.disk_usage(path).free
    if needed > free:  # the library would not say so in an OSError
        raise OSError(errno.ENOSPC, f"{needed:,} bytes of weights, {free:,} bytes free", str(path))
    save_torch_state_dict(theirs, path, max_shard_size=shard_bytes)
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in path.glob("model*.safetensors"):  # the library lets nobody else read them
        file.chmod((path / "config.json").stat().st_mode)


def config_json(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """config.json for the fields of Config. ValueError if no supported family has them."""
    shape = (fields["qkv_bias"], fields["qk_norm"])
    family = next((f for f in FAMILIES if (f.qkv_bias, f.qk_norm) == shape), None)
    if family is None:
        raise ValueError("the model has qkv_bias and qk_norm; no supported family has both")
    scaling, kind = fields["rope_scaling"], {"rope_type": "default"}
    if scaling is not None:
        kind = {"rope_type": "llama3"} | {key: getattr(scaling, of) for of, key in ROPE.items()}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "vocab_size": fields["vocab_size"],
        **{names[HUGGING_FACE]: fields[ours] for ours, names in NUMBERS.items()},
        "max_position_embeddings": fields["context"] or 2048,
        "tie_word_embeddings": fields["tied"],
        "rope_parameters": {"rope_theta": fields["rope_theta"], **kind},
        "rope_scaling": None if scaling is None else kind,
        "attention_bias": fields["qkv_bias"],
        "use_sliding_window": False,
        "torch_dtype": dtype,
        "dtype": dtype,
    }

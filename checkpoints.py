"""Checkpoints of the Llama family: a Hugging Face directory or a GGUF file in, a Hugging Face directory out; their tokenizers
and chat templates.

Nothing here is unpickled or evaluated: weights are safetensors or GGUF, templates are rendered by jinja2's sandbox. Needs the
packages safetensors, gguf, tokenizers and jinja2, which are imported when they are needed.
"""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
    "blocks.{}.attention.q.weight": ("model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "blocks.{}.attention.k.weight": ("model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "blocks.{}.attention.v.weight": ("model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "blocks.{}.attention.q.bias": ("model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "blocks.{}.attention.k.bias": ("model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "blocks.{}.attention.v.bias": ("model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "blocks.{}.attention.q_norm.weight": ("model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "blocks.{}.attention.k_norm.weight": ("model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "blocks.{}.attention.out.weight": ("model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "blocks.{}.norm2.weight": ("model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "blocks.{}.gate.weight": ("model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "blocks.{}.up.weight": ("model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "blocks.{}.down.weight": ("model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "norm.weight": ("model.norm.weight", "output_norm.weight"),
    "head.weight": ("lm_head.weight", "output.weight"),
}  # fmt: skip
HUGGING_FACE, GGUF = 0, 1


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rotary frequencies for contexts longer than `context`, which it was first trained on: a frequency of more than
    `high` turns in that context stays, one of fewer than `low` is divided by `factor`, between the two it is interpolated."""

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


def positive(found: Any, name: str, path: str | Path, default: float | None = None, whole: bool = True) -> Any:
    """A configuration's number, the default where it has none. BadCheckpoint if it is no positive (whole) number."""
    found = default if found is None else found
    if found is None:
        raise BadCheckpoint(f"{path} has no {name}")
    if type(found) not in ((int,) if whole else (int, float)) or not 0 < found < math.inf:
        raise BadCheckpoint(f"{path} has {name} {found!r}; expected a positive {'whole ' * whole}number")
    return found if whole else float(found)


def matched(fields: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The fields. BadCheckpoint if its heads cannot be: `Config` says so too, but not of which file."""
    if fields["heads"] % fields["kv_heads"] or fields["head_width"] % 2:
        raise BadCheckpoint(
            f"{path} has {fields['heads']} heads of {fields['head_width']} channels and {fields['kv_heads']} key-value heads; "
            "expected an even number of channels and heads a multiple of key-value heads"
        )
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


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """The fields of model.py's Config, and (our name, function that reads the tensor) of each weight, so that one is in memory
    twice at a time. BadCheckpoint if the path is no checkpoint or its architecture is not supported."""
    path = checkpoint_path(path)
    return read_directory(path) if path.is_dir() else read_gguf(path)


def checkpoint_path(path: str | Path) -> Path:
    """The path, if it is a directory or a .gguf file. BadCheckpoint if not."""
    path = Path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix == ".gguf"):
        raise BadCheckpoint(f"{path} is no checkpoint; expected a Hugging Face directory or a .gguf file")
    return path


# --- A Hugging Face directory -----------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. BadCheckpoint if the file is not there or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} holds no JSON object")
    return content


def directory_config(path: Path) -> dict[str, Any]:
    """The fields of Config from config.json."""
    file = path / "config.json"
    given = read_json(file)
    names = given.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise BadCheckpoint(f"{file} has architecture {name!r}; expected one of {', '.join(ARCHITECTURES)}")
    _, bias, norms = ARCHITECTURES[name]
    unknown = [key for key, fine in {"hidden_act": "silu", "attention_bias": bias, "mlp_bias": False}.items()
               if given.get(key, fine) not in (fine, None)]  # fmt: skip
    if unknown:
        raise BadCheckpoint(f"{file} has {unknown[0]} {given[unknown[0]]!r}, which is not supported")
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadCheckpoint(f"{file} has rope_parameters or rope_scaling {rope!r}; expected an object")

    def number(key: str, default: float | None = None, whole: bool = True) -> Any:
        return positive(given.get(key), key, file, default, whole)

    heads, width, layers = map(number, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    context = number("max_position_embeddings", 2048)
    window = number("sliding_window", 4096) if slides(given, name, layers, file) else context
    return matched({
        "vocab_size": number("vocab_size"), "layers": layers, "width": width, "heads": heads,
        "kv_heads": number("num_key_value_heads", heads), "hidden": number("intermediate_size"),
        "head_width": number("head_dim", width // heads), "rope_scaling": rope_scaling(rope, file),
        "rope_theta": positive(rope.get("rope_theta", given.get("rope_theta")), "rope_theta", file, 10_000.0, whole=False),
        "norm_eps": number("rms_norm_eps", 1e-6, whole=False), "qkv_bias": bias, "qk_norm": norms,
        "tied": bool(given.get("tie_word_embeddings", False)), "context": min(context, window),
    }, file)  # fmt: skip


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


def rope_scaling(rope: dict[str, Any], file: Path) -> RopeScaling | None:
    """What config.json says of it. BadCheckpoint unless it is Llama 3's or none."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise BadCheckpoint(f"{file} has rope scaling {kind!r}; expected llama3 or none")
    factor, low, high = (positive(rope.get(key), key, file, whole=False)
                         for key in ("factor", "low_freq_factor", "high_freq_factor"))  # fmt: skip
    if low >= high:
        raise BadCheckpoint(f"{file} has low_freq_factor {low} and high_freq_factor {high}; expected the first to be less")
    return RopeScaling(factor, low, high, positive(rope.get(key := "original_max_position_embeddings"), key, file))


def read_directory(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """`read_checkpoint` of a directory: config.json and safetensors, in one file or in several with an index."""
    fields = directory_config(path)
    index = path / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise BadCheckpoint(f"{index} has no weight_map of names of files")
        files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name or not (path / name).is_file():
            raise BadCheckpoint(f"{path} has no file {name!r}; expected safetensors beside config.json")
    return fields, safetensors_of(path, files)


def safetensors_of(path: Path, files: list[str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Our name and a reader of each tensor in the files. BadCheckpoint on a tensor that no supported model has."""
    from safetensors import SafetensorError, safe_open

    for name in files:
        try:
            with safe_open(path / name, framework="pt") as content:
                for theirs in content.keys():  # noqa: SIM118
                    if theirs.endswith("rotary_emb.inv_freq"):  # old checkpoints keep what follows from the config
                        continue
                    ours = our_name(theirs, HUGGING_FACE)
                    if ours is None:
                        raise BadCheckpoint(f"{path / name} has a tensor {theirs}, which no supported architecture has")

                    def read(content: Any = content, theirs: str = theirs, file: Path = path / name) -> Tensor:
                        weight = content.get_tensor(theirs)
                        if not weight.is_floating_point():
                            raise BadCheckpoint(f"{file}: {theirs} is of {weight.dtype}; expected floating-point numbers")
                        return weight

                    yield ours, read
        except (SafetensorError, OSError) as error:
            raise BadCheckpoint(f"{path / name} is not readable as safetensors ({one_line(error)})") from error


def save_directory(path: str | Path, fields: dict[str, Any], weights: dict[str, Tensor], shard_bytes: int = 5 << 30) -> None:
    """Write config.json and safetensors, in shards of at most `shard_bytes` if need be, as transformers and vLLM load them;
    weights of an older checkpoint there are removed. fields: of Config. weights: by our names; a tied head is left out.
    ValueError if no supported architecture has such fields, OSError if the disk has no room for them."""
    from safetensors.torch import save_file

    if fields["qkv_bias"] and fields["qk_norm"]:
        raise ValueError("the model has qkv_bias and qk_norm; no supported architecture has both")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    architecture = next(name for name, (_, bias, norms) in reversed(ARCHITECTURES.items())
                        if (bias, norms) == (fields["qkv_bias"], fields["qk_norm"]) and "Mistral" not in name)  # fmt: skip
    scaling = fields["rope_scaling"]
    rope = {"rope_theta": fields["rope_theta"], "rope_type": "default"} if scaling is None else {
        "rope_theta": fields["rope_theta"], "rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.context}  # fmt: skip
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": [architecture], "model_type": ARCHITECTURES[architecture][0], "hidden_act": "silu",
        "vocab_size": fields["vocab_size"], "num_hidden_layers": fields["layers"], "hidden_size": fields["width"],
        "num_attention_heads": fields["heads"], "num_key_value_heads": fields["kv_heads"], "head_dim": fields["head_width"],
        "intermediate_size": fields["hidden"], "rms_norm_eps": fields["norm_eps"], "tie_word_embeddings": fields["tied"],
        "max_position_embeddings": fields["context"] or 2048, "rope_parameters": rope, "rope_theta": fields["rope_theta"],
        "rope_scaling": None if scaling is None else {key: rope[key] for key in rope if key != "rope_theta"},
        "attention_bias": fields["qkv_bias"], "use_sliding_window": False, "torch_dtype": dtype, "dtype": dtype,
    }  # fmt: skip
    theirs = {}
    for ours, weight in weights.items():
        if fields["tied"] and ours == "head.weight":
            continue
        pattern, layer = without_layer(ours)
        theirs[NAMES[pattern][HUGGING_FACE].format(layer)] = weight.detach().cpu().contiguous()
    shards: list[dict[str, Tensor]] = [{}]
    for name, weight in theirs.items():
        if shards[-1] and sum(w.nbytes for w in shards[-1].values()) + weight.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = weight
    needed, free = sum(weight.nbytes for weight in theirs.values()), shutil.disk_usage(path).free
    if needed > free:  # the library would not say so in an OSError
        raise OSError(errno.ENOSPC, f"{needed:,} bytes of weights, {free:,} bytes free", str(path))
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
        size = sum(weight.nbytes for weight in theirs.values())
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n")
    else:
        index.unlink(missing_ok=True)
    for file in path.glob("model*.safetensors"):
        if file.name not in names and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", file.name):
            file.unlink()
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# --- A GGUF file ------------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """`read_checkpoint` of a GGUF file of whatever quantisation the gguf package can undo."""
    reader = open_gguf(path)
    kind = value(reader, "general.architecture", path)
    flags = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
    if kind not in flags:
        raise BadCheckpoint(f"{path} has architecture {kind!r}; expected one of {', '.join(flags)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise BadCheckpoint(f"{path} has no tensor token_embd.weight")

    def number(name: str, default: float | None = None, whole: bool = True) -> Any:
        name = f"{kind}.{name}"
        return positive(value(reader, name, path, default), name, path, whole=whole)

    width, heads, theta = number("embedding_length"), number("attention.head_count"), number("rope.freq_base", 10_000.0, False)
    head_width = number("attention.key_length", width // heads)
    if (turned := number("rope.dimension_count", head_width)) != head_width:
        raise BadCheckpoint(f"{path} has {kind}.rope.dimension_count {turned}; expected that of a head, {head_width}")
    if (scaling := value(reader, f"{kind}.rope.scaling.type", path, "none")) != "none":
        raise BadCheckpoint(f"{path} has rope scaling {scaling!r}; expected Llama 3's, as rope_freqs.weight, or none")
    context, window = number("context_length"), f"{kind}.attention.sliding_window"
    window = positive(value(reader, window, path, 0) or context, window, path)  # 0: none
    fields = matched({
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]), "layers": number("block_count"), "width": width,
        "heads": heads, "kv_heads": number("attention.head_count_kv", heads), "hidden": number("feed_forward_length"),
        "head_width": head_width, "rope_theta": theta, "rope_scaling": gguf_scaling(tensors, theta, head_width, path),
        "norm_eps": number("attention.layer_norm_rms_epsilon", whole=False), "qkv_bias": flags[kind][0],
        "qk_norm": flags[kind][1], "tied": "output.weight" not in tensors, "context": min(context, window),
    }, path)  # fmt: skip
    return fields, gguf_weights(tensors, kind, fields, path)


def open_gguf(path: Path) -> Any:
    """The gguf package's reader. BadCheckpoint if the file is none."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, LookupError, OverflowError) as error:
        raise BadCheckpoint(f"{path} is not readable as GGUF ({one_line(error)})") from error


def value(reader: Any, name: str, path: Path, default: Any = None) -> Any:
    """A value of a GGUF's metadata. BadCheckpoint if it is not there and there is no default."""
    field = reader.get_field(name)
    if field is None and default is None:
        raise BadCheckpoint(f"{path} has no {name}")
    try:
        return default if field is None else field.contents()
    except ValueError as error:
        raise BadCheckpoint(f"{path}: {name} is not readable ({one_line(error)})") from error


def gguf_scaling(tensors: dict[str, Any], theta: float, head_width: int, path: Path) -> RopeScaling | None:
    """Llama 3's rope scaling, which GGUF keeps as the divisor of each frequency. BadCheckpoint if they are others'."""
    if "rope_freqs.weight" not in tensors:
        return None
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).double()
    scaling = RopeScaling(round(float(divisors.max()), 3), 1.0, 4.0, 8192)
    frequencies = float(theta) ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    if divisors.shape != frequencies.shape or not torch.allclose(frequencies / divisors, scaling(frequencies), rtol=1e-3):
        raise BadCheckpoint(f"{path} has rope_freqs.weight that are not Llama 3's; expected its low 1, high 4, context 8192")
    return scaling


def gguf_weights(tensors: dict[str, Any], kind: str, fields: dict[str, Any],
                 path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:  # fmt: skip
    """Our name and a reader of each tensor. Llama's query and key rows are stored with the channels of a rotary pair side by
    side; ours, as Hugging Face's, lie half a head apart."""
    from gguf import dequantize

    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        ours = our_name(name, GGUF)
        if ours is None:
            raise BadCheckpoint(f"{path} has a tensor {name}, which no supported architecture has")

        def read(tensor: Any = tensor, ours: str = ours) -> Tensor:
            try:
                weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            except (ValueError, NotImplementedError) as error:
                raise BadCheckpoint(f"{path}: {tensor.name} is not readable ({one_line(error)})") from error
            if kind == "llama" and re.search(r"attention\.[qk]\.", ours) and len(weight) % fields["head_width"] == 0:
                pairs = weight.unflatten(0, (-1, fields["head_width"] // 2, 2))
                weight = pairs.transpose(1, 2).flatten(0, 2)
            return weight

        yield ours, read


# --- Tokenizers and chat templates ------------------------------------------------------------------------------------------

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # tokenizer.ggml.pre -> where a byte-level vocabulary's tokens end: a pattern, or GPT-2's, of single digits or not
    "llama-bpe": LETTERS % r"\p{N}{1,3}", "qwen2": LETTERS % r"\p{N}", "smollm": "digits", "gpt-2": "", "default": "",
}  # fmt: skip
PLAIN = "{% for message in messages %}{{ message.content }}\n\n{% endfor %}"  # where it is asked for
BEGIN = "{{ bos_token }}"  # comes before it where the vocabulary puts it before any text


class Chat:
    """How a model is spoken to: text to tokens by its own vocabulary (a tokenizers.Tokenizer), a prompt in its chat template.
    `end`: the token that ends an answer."""

    def __init__(self, tokenizer: Any, template: str, specials: dict[str, str], end: int):
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(reason: str) -> None:
            raise TemplateError(reason)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])  # fmt: skip
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: ""  # lest a prompt's tokens depend on the day
        self.tokenizer, self.specials, self.end = tokenizer, specials, end
        self.source = template
        self.special_tokens = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        try:
            self.template = environment.from_string(self.source)
        except Exception as error:  # also what Python says of the code that jinja2 makes of it
            raise BadCheckpoint(f"the chat template cannot be read ({one_line(error)})") from error

    @classmethod
    def from_pretrained(cls, path: str | Path, plain: bool = False) -> Chat:
        """Of the same path as the model; plain: with two line ends after the prompt instead of the model's template.
        BadCheckpoint if there is no tokenizer that can be read, no end token, or no template and not plain."""
        path = checkpoint_path(path)
        tokenizer, template, specials = (directory_chat if path.is_dir() else gguf_chat)(path)
        end = tokenizer.token_to_id(specials.get("eos_token", ""))
        if end is None:
            raise BadCheckpoint(f"{path} names no end token that its vocabulary has (eos_token)")
        if not plain and not template:
            raise BadCheckpoint(
                f"{path} has no chat template; give --chat-format plain (plain=True) to ask it by the "
                "prompt and an empty line"
            )
        begin = tokenizer.token_to_id(specials.get("bos_token", ""))
        if plain:
            template = BEGIN * (begin is not None and tokenizer.encode("").ids[:1] == [begin]) + PLAIN
        return cls(tokenizer, template, specials, end)

    def __deepcopy__(self, memo: dict[int, Any]) -> Chat:
        """Itself, which never changes: copies of a policy share it, as a template cannot be copied."""
        return self

    def prompt(self, text: str, system: str | None = None) -> list[int]:
        """The tokens that the model reads before it answers. Special tokens that the text itself spells are mere text."""
        frame = [self.special(part) for part in self.render("\0", system).split("\0")]
        if len(frame) == 1:
            raise BadCheckpoint("the chat template leaves the user's message out")
        tokens = self.special(self.render(text, system))
        if [i for i in tokens if i in self.special_tokens] == [i for part in frame for i in part if i in self.special_tokens]:
            return tokens
        words = self.encode(text)  # the text, or what a normalizer makes of it, spells special tokens
        return frame[0] + [token for part in frame[1:] for token in words + part]

    def render(self, text: str, system: str | None) -> str:
        """The prompt as the template writes it. BadCheckpoint if it fails, on purpose or not."""
        messages = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": text}]
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.specials)  # fmt: skip
        except Exception as error:  # a template can raise whatever Python can
            raise BadCheckpoint(f"the chat template fails ({one_line(error)})") from error

    def special(self, text: str) -> list[int]:
        """Tokens of a piece of the template, in which special tokens are special. BadCheckpoint if the
        vocabulary has none for it."""
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more precise
            raise BadCheckpoint(
                f"the tokenizer has no tokens for {text[:60]!r} ({one_line(error)}); expected a "
                "vocabulary with an unknown token or with all bytes"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, none of them special."""
        self.tokenizer.encode_special_tokens = True
        try:
            return self.special(text)
        finally:
            self.tokenizer.encode_special_tokens = False

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, lest an answer never end, generation_config.json, as transformers
        and vLLM load them."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(path / "tokenizer.json"))
        config = {**self.specials, "chat_template": self.source, "tokenizer_class": "PreTrainedTokenizerFast"}
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": self.end}, indent=2) + "\n", encoding="utf-8")
        (path / "chat_template.jinja").unlink(missing_ok=True)  # of an older one, which would go first
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def directory_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a directory's tokenizer.json and tokenizer_config.json."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing more precise
        raise BadCheckpoint(f"{path}/tokenizer.json is not there or not readable ({one_line(error)})") from error
    config = read_json(path / "tokenizer_config.json")
    specials = {name: token.get("content") if isinstance(token, dict) else token
                for name, token in config.items() if name.endswith("_token") and token}  # fmt: skip
    specials = {name: token for name, token in specials.items() if isinstance(token, str)}
    beside, template = path / "chat_template.jinja", config.get("chat_template")
    if beside.exists():
        try:
            return tokenizer, beside.read_text(encoding="utf-8"), specials
        except (OSError, ValueError) as error:
            raise BadCheckpoint(f"{beside} is not readable ({one_line(error)})") from error
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or named
    if template is not None and not isinstance(template, str):
        raise BadCheckpoint(f"{path}/tokenizer_config.json has no chat_template that is a text or is named default")
    return tokenizer, template, specials


def gguf_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a GGUF with a byte-level vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    reader = open_gguf(path)
    kind, split = (value(reader, f"tokenizer.ggml.{name}", path, "none") for name in ("model", "pre"))
    if kind != "gpt2" or split not in SPLITS:
        raise BadCheckpoint(f"{path} has a vocabulary {kind!r} split as {split!r}; expected gpt2 with {', '.join(SPLITS)}")
    tokens, merges, types = (value(reader, f"tokenizer.ggml.{name}", path) for name in ("tokens", "merges", "token_type"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
        types = dict(zip(tokens, types, strict=True))
    except Exception as error:  # the library raises nothing more precise
        raise BadCheckpoint(f"{path} has a vocabulary that is not readable ({one_line(error)})") from error
    for kind, special in ((3, True), (4, False)):  # control tokens, and words that are never split
        added = [AddedToken(token, special=special, normalized=False) for token in tokens if types[token] == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    pattern = SPLITS[split]
    steps = {"digits": [pre_tokenizers.Digits(individual_digits=True)], "": []}.get(
        pattern, [pre_tokenizers.Split(Regex(pattern), behavior="isolated")])  # fmt: skip
    by_regex = pattern in ("digits", "")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    numbers = {name: value(reader, f"tokenizer.ggml.{name}_token_id", path, -1) for name in ("bos", "eos")}
    specials = {f"{name}_token": tokens[number] for name, number in numbers.items() if 0 <= number < len(tokens)}
    return tokenizer, value(reader, "tokenizer.chat_template", path, "") or None, specials

"""GGUF files: configuration, dequantised weights, tokenizers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat.formats import GGUF, BadCheckpoint, RopeScaling, matched, one_line, our_name, positive

KINDS = ("llama", "qwen2", "qwen3")


def read_gguf(path: Path) -> tuple[dict[str, Any], Iterator[tuple[str, Callable[[], Tensor]]]]:
    """`read_checkpoint` of a GGUF file of whatever quantisation the gguf package can undo."""
    reader = open_gguf(path)
    kind = value(reader, "general.architecture", path)
    if kind not in KINDS:
        raise BadCheckpoint(f"{path} has architecture {kind!r}; expected one of {', '.join(KINDS)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise BadCheckpoint(f"{path} has no tensor token_embd.weight")

    def number(name: str, default: float | None = None, whole: bool = True) -> Any:
        name = f"{kind}.{name}"
        return positive(value(reader, name, path, default), name, path, whole=whole)

    width, heads = number("embedding_length"), number("attention.head_count")
    theta = number("rope.freq_base", 10_000.0, whole=False)
    head_width = number("attention.key_length", width // heads)
    turned = number("rope.dimension_count", head_width)
    if turned != head_width:
        found = f"{kind}.rope.dimension_count {turned}"
        raise BadCheckpoint(f"{path} has {found}; expected that of a head, {head_width}")
    scaling = value(reader, f"{kind}.rope.scaling.type", path, "none")
    if scaling != "none":
        expected = "expected Llama 3's, as rope_freqs.weight, or none"
        raise BadCheckpoint(f"{path} has rope scaling {scaling!r}; {expected}")
    context, name = number("context_length"), f"{kind}.attention.sliding_window"
    window = positive(value(reader, name, path, 0) or context, name, path)  # 0: none
    fields = {
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "layers": number("block_count"),
        "width": width,
        "heads": heads,
        "kv_heads": number("attention.head_count_kv", heads),
        "hidden": number("feed_forward_length"),
        "head_width": head_width,
        "rope_theta": theta,
        "rope_scaling": gguf_scaling(tensors, theta, head_width, path),
        "norm_eps": number("attention.layer_norm_rms_epsilon", whole=False),
        "qkv_bias": kind == "qwen2",
        "qk_norm": kind == "qwen3",
        "tied": "output.weight" not in tensors,
        "context": min(context, window),
    }
    fields = matched(fields, path)
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


def gguf_scaling(
    tensors: dict[str, Any], theta: float, head_width: int, path: Path
) -> RopeScaling | None:
    """Llama 3's rope scaling, which GGUF keeps as the divisor of each frequency. BadCheckpoint if
    they are others'."""
    if "rope_freqs.weight" not in tensors:
        return None
    divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy()).double()
    scaling = RopeScaling(round(float(divisors.max()), 3), 1.0, 4.0, 8192)
    frequencies = float(theta) ** (
        -torch.arange(0, head_width, 2, dtype=torch.float64) / head_width
    )
    same_shape = divisors.shape == frequencies.shape
    if not same_shape or not torch.allclose(
        frequencies / divisors, scaling(frequencies), rtol=1e-3
    ):
        expected = "expected its low 1, high 4, context 8192"
        raise BadCheckpoint(f"{path} has rope_freqs.weight that are not Llama 3's; {expected}")
    return scaling


def gguf_weights(
    tensors: dict[str, Any], kind: str, fields: dict[str, Any], path: Path
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Our name and a reader of each tensor. Llama's query and key rows are stored with the channels
    of a rotary pair side by side; ours, as Hugging Face's, lie half a head apart."""
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        ours = our_name(name, GGUF)
        if ours is None:
            raise BadCheckpoint(f"{path} has a tensor {name}, which no supported architecture has")
        turned = kind == "llama" and re.search(r"attention\.[qk]\.", ours)
        yield ours, partial(read_tensor, tensor, fields["head_width"] if turned else None, path)


def read_tensor(tensor: Any, head_width: int | None, path: Path) -> Tensor:
    """A tensor, dequantised; head_width: if the channels of rotary pairs are to be put apart."""
    from gguf import dequantize

    try:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (ValueError, NotImplementedError) as error:
        reason = f"is not readable ({one_line(error)})"
        raise BadCheckpoint(f"{path}: {tensor.name} {reason}") from error
    if head_width is not None and len(weight) % head_width == 0:
        pairs = weight.unflatten(0, (-1, head_width // 2, 2))
        weight = pairs.transpose(1, 2).flatten(0, 2)
    return weight


LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> where the tokens of a byte-level vocabulary end: a pattern, or GPT-2's rule,
# by which digits are single ("digits") or not ("")
SPLITS = {
    "llama-bpe": LETTERS % r"\p{N}{1,3}",
    "qwen2": LETTERS % r"\p{N}",
    "smollm": "digits",
    "gpt-2": "",
    "default": "",
}


def gguf_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a GGUF with a byte-level vocabulary."""
    reader = open_gguf(path)
    kind, split = (
        value(reader, f"tokenizer.ggml.{name}", path, "none") for name in ("model", "pre")
    )
    if kind != "gpt2" or split not in SPLITS:
        found, known = f"a vocabulary {kind!r} split as {split!r}", ", ".join(SPLITS)
        raise BadCheckpoint(f"{path} has {found}; expected gpt2 with {known}")
    tokens = value(reader, "tokenizer.ggml.tokens", path)
    tokenizer = byte_level_tokenizer(reader, tokens, split, path)
    numbers = {
        name: value(reader, f"tokenizer.ggml.{name}_token_id", path, -1) for name in ("bos", "eos")
    }
    specials = {
        f"{name}_token": tokens[number]
        for name, number in numbers.items()
        if 0 <= number < len(tokens)
    }
    return tokenizer, value(reader, "tokenizer.chat_template", path, "") or None, specials


def byte_level_tokenizer(reader: Any, tokens: list[str], split: str, path: Path) -> Any:
    """A tokenizers.Tokenizer of the vocabulary. BadCheckpoint if it is not readable."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    merges, types = (
        value(reader, f"tokenizer.ggml.{name}", path) for name in ("merges", "token_type")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        pairs = [tuple(merge.split(" ")) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
        types = dict(zip(tokens, types, strict=True))
    except Exception as error:  # the library raises nothing more precise
        reason = f"a vocabulary that is not readable ({one_line(error)})"
        raise BadCheckpoint(f"{path} has {reason}") from error
    for kind, special in ((3, True), (4, False)):  # control tokens, and words that are never split
        of_kind = [token for token in tokens if types[token] == kind]
        added = [AddedToken(token, special=special, normalized=False) for token in of_kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    pattern = SPLITS[split]
    steps: list[Any] = []
    by_regex = pattern in ("digits", "")  # GPT-2's pattern is the last step's own
    if pattern == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    elif pattern:
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

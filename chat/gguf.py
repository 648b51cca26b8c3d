"""GGUF files: configuration, dequantised weights, tokenizers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chat.formats import (
    GGUF,
    NUMBERS,
    BadCheckpoint,
    RopeScaling,
    Weights,
    family_of,
    one_line,
    positive,
    read_numbers,
    tensor_names,
)

ROPE_DIVISORS = "rope_freqs.weight"  # Llama 3's rope scaling: the divisor of each frequency

# --- The model ------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], Weights]:
    """`read_checkpoint` of a GGUF file of whatever quantisation the gguf package can undo."""
    reader = open_gguf(path)
    kind = metadata(reader, "general.architecture", path)
    family = family_of(kind, "gguf", path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise BadCheckpoint(f"{path} has no tensor token_embd.weight")

    def number(ours: str, default: float | None = None, whole: bool = True) -> Any:
        name = f"{kind}.{NUMBERS[ours][GGUF]}"
        return positive(metadata(reader, name, path, default), name, path, whole=whole)

    fields = read_numbers(number)
    head_width, context = fields["head_width"], fields["context"]
    turned = metadata(reader, f"{kind}.rope.dimension_count", path, head_width)
    if turned != head_width:
        raise BadCheckpoint(
            f"{path} has {kind}.rope.dimension_count {turned!r}; expected that of a head, "
            f"{head_width}"
        )
    scaling = metadata(reader, f"{kind}.rope.scaling.type", path, "none")
    if scaling != "none":
        raise BadCheckpoint(
            f"{path} has rope scaling {scaling!r}; expected Llama 3's, as {ROPE_DIVISORS}, or none"
        )
    name = f"{kind}.attention.sliding_window"
    window = positive(metadata(reader, name, path, 0) or context, name, path)  # 0: none
    fields |= {
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "rope_scaling": gguf_scaling(tensors, fields["rope_theta"], head_width, path),
        "qkv_bias": family.qkv_bias,
        "qk_norm": family.qk_norm,
        "tied": "output.weight" not in tensors,
        "context": min(context, window),
    }
    paired = head_width if family.paired else None
    return fields, gguf_weights(tensors, fields["layers"], paired, path)


def open_gguf(path: Path) -> Any:
    """The gguf package's reader. BadCheckpoint if the file is none."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, LookupError, OverflowError) as error:
        raise BadCheckpoint(f"{path} is not readable as GGUF ({one_line(error)})") from error


def metadata(reader: Any, name: str, path: Path, default: Any = None) -> Any:
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
    """Llama 3's rope scaling if the file has its divisors. BadCheckpoint if they are others'."""
    if ROPE_DIVISORS not in tensors:
        return None
    divisors = torch.from_numpy(tensors[ROPE_DIVISORS].data.copy()).double()
    scaling = RopeScaling(round(float(divisors.max()), 3), 1.0, 4.0, 8192)
    frequencies = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    if divisors.shape != frequencies.shape or not torch.allclose(
        frequencies / divisors, scaling(frequencies), rtol=1e-3
    ):
        raise BadCheckpoint(
            f"{path} has {ROPE_DIVISORS} that are not Llama 3's; expected its low 1, high 4, "
            "context 8192"
        )
    return scaling


def gguf_weights(tensors: dict[str, Any], layers: int, paired: int | None, path: Path) -> Weights:
    """The tensors; paired: the width of heads whose rows of queries and keys are stored with the
    channels of a rotary pair side by side. Ours, as Hugging Face's, lie half a head apart."""
    names = {theirs: ours for ours, theirs in tensor_names(layers, GGUF).items()}
    for theirs, tensor in tensors.items():
        if theirs != ROPE_DIVISORS:
            ours = names.get(theirs, theirs)
            rotary = "attention.q." in ours or "attention.k." in ours
            yield ours, partial(read_tensor, tensor, paired if rotary else None, path)


def read_tensor(tensor: Any, paired: int | None, path: Path) -> Tensor:
    """A tensor, dequantised; paired: as of `gguf_weights`."""
    from gguf import dequantize

    try:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    except (ValueError, NotImplementedError) as error:
        raise BadCheckpoint(f"{path}: {tensor.name} is not readable ({one_line(error)})") from error
    if paired and len(weight) % paired == 0:
        weight = weight.unflatten(0, (-1, paired // 2, 2)).transpose(1, 2).flatten(0, 2)
    return weight


# --- The vocabulary -------------------------------------------------------------------------------

LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> where the tokens of a byte-level vocabulary end: by a pattern, or by GPT-2's
# own (None)
PATTERNS = {
    "llama-bpe": LETTERS % r"\p{N}{1,3}",
    "qwen2": LETTERS % r"\p{N}",
    "smollm": None,
    "gpt-2": None,
    "default": None,
}
CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: special tokens, words never split


def gguf_chat(path: Path) -> tuple[Any, str | None, dict[str, str]]:
    """Tokenizer, chat template and special tokens of a GGUF with a byte-level vocabulary.
    BadCheckpoint if the vocabulary is of another kind or cannot be read."""
    reader = open_gguf(path)
    kind, split = (
        metadata(reader, f"tokenizer.ggml.{name}", path, "none") for name in ("model", "pre")
    )
    if kind != "gpt2" or split not in PATTERNS:
        raise BadCheckpoint(
            f"{path} has a vocabulary {kind!r} split as {split!r}; expected gpt2 with "
            f"{', '.join(PATTERNS)}"
        )
    tokens, merges, types = (
        metadata(reader, f"tokenizer.ggml.{name}", path)
        for name in ("tokens", "merges", "token_type")
    )
    try:
        tokenizer = byte_level_tokenizer(tokens, merges, types, split)
    except Exception as error:  # the library raises nothing more precise
        raise BadCheckpoint(
            f"{path} has a vocabulary that is not readable ({one_line(error)})"
        ) from error
    specials = {}
    for name in ("bos", "eos"):
        number = metadata(reader, f"tokenizer.ggml.{name}_token_id", path, -1)
        if 0 <= number < len(tokens):
            specials[f"{name}_token"] = tokens[number]
    return tokenizer, metadata(reader, "tokenizer.chat_template", path, ""), specials


def byte_level_tokenizer(tokens: list[str], merges: list[str], types: list[int], split: str) -> Any:
    """A tokenizers.Tokenizer of tokens and their types, merges "left right", and a name in
    `PATTERNS`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split == "llama-bpe"))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    pattern = PATTERNS[split]
    steps: list[Any] = [ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        steps.insert(0, Split(Regex(pattern), behavior="isolated"))
    if split == "smollm":
        steps.insert(0, Digits(individual_digits=True))
    tokenizer.pre_tokenizer = Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

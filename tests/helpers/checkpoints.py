"""Models of transformers to compare with, and writers of checkpoints."""

import json
import random

import gguf
import numpy as np
import pytest
import torch
import transformers

from chat.checkpoints import read_transformer
from chat.formats import BadCheckpoint
from helpers import ROOT

# float32: two implementations of sums of up to 112 terms, eleven layers deep; logits have a
# deviation of about 1
SINGLE = 1e-5
VOCABULARY, LENGTH = 97, 60

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

FAMILIES = {
    "Llama 2": (  # so deep that the names of its layers are not in the order of the alphabet
        "Llama",
        {"num_hidden_layers": 11, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    ),
    "Llama 3": (
        "Llama",
        {
            "num_key_value_heads": 2,
            "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32},
        },
    ),
    "Llama tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 32}),
    "Qwen2": (
        "Qwen2",
        {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "Qwen2 tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "Qwen3 tied": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    ),
}

families = pytest.mark.parametrize("family", FAMILIES)


def theirs_of(family, seed=0, **changes):
    """transformers' model, every parameter random: norms that are not 1, biases that are not 0."""
    kind, shape = FAMILIES[family]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind + "Config")(**BASE | shape | changes)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.float().eval()


def some_tokens(rows=2, length=LENGTH, seed=1):
    return torch.randint(
        0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def difference(theirs, ours, tokens=None):
    tokens = some_tokens() if tokens is None else tokens
    return float((theirs(tokens).logits - ours(tokens)).abs().max())


def assert_same(a, b):
    """Bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def side_by_side(weight, heads):
    """Rows as llama.cpp's converter stores Llama's queries and keys."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def rope_divisors(theta, width, factor):
    """rope_freqs.weight as llama.cpp's converter writes it for Llama 3."""
    out = []
    for i in range(0, width, 2):
        wavelength = 2 * np.pi * theta ** (i / width)
        if wavelength < 8192 / 4:
            out.append(1.0)
        elif wavelength > 8192:
            out.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def write_gguf(
    path, theirs, kind="llama", quantisation="F32", edit=lambda writer: None, leave_out=(), add=None
):
    """transformers' model as a GGUF, names by the gguf package's own table; matrices are changed in
    place to what the quantisation makes of them."""
    config, writer = theirs.config, gguf.GGUFWriter(path, kind)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, number in {
        "block_count": config.num_hidden_layers,
        "context_length": 256,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": heads,
        "head_count_kv": kv_heads,
        "key_length": head_width,
        "value_length": head_width,
        "rope_dimension_count": head_width,
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "layer_norm_rms_eps": config.rms_norm_eps,
    }.items():
        if name not in leave_out:
            getattr(writer, f"add_{name}")(number)
    edit(writer)
    names = gguf.get_tensor_name_map(
        getattr(gguf.MODEL_ARCH, kind.upper()), config.num_hidden_layers
    )
    if config.rope_parameters["rope_type"] == "llama3":
        factor = config.rope_parameters["factor"]
        writer.add_tensor(
            "rope_freqs.weight",
            rope_divisors(config.rope_parameters["rope_theta"], head_width, factor),
        )
    for name, weight in theirs.named_parameters():
        array = weight.detach().numpy()
        if kind == "llama" and "q_proj" in name:
            array = side_by_side(array, heads)
        if kind == "llama" and "k_proj" in name:
            array = side_by_side(array, kv_heads)
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if quantisation == "F32" or array.ndim == 1:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            as_type = getattr(gguf.GGMLQuantizationType, quantisation)
            writer.add_tensor(
                name, gguf.quants.quantize(np.ascontiguousarray(array), as_type), raw_dtype=as_type
            )
    for name, array in (add or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def odd_texts(seed=0):
    """Lines of this project's files, and oddities: scripts, emoji, white space, digits,
    contractions, bytes as characters."""
    kinds = ("*.py", "tests/*/*.py", "*.md", "docs/*.md")
    files = sorted(file for kind in kinds for file in ROOT.glob(kind))
    lines = sorted(
        {line for file in files for line in file.read_text(encoding="utf-8").split("\n")}
    )
    draw = random.Random(seed)
    texts = draw.sample(lines, min(2500, len(lines)))
    texts += [
        "",
        " ",
        "\n",
        "été naïve 中文 🙂 👩‍👩‍👧‍👦",
        "x\0y",
        "1234567 89 ½ ² ٣٤",
        "\t\ttabs\n\n\n end ",
        "don't we'll I'M IT'S",
        "a\u0301 \u00e1 \ufb01 Å",
        "\u200b\u00a0\u3000x",
        "مرحبا שלום हिन्दी ไทย",
        "\r\n\r\n  \r",
        "e\u0301" * 5,
    ]
    alphabet = [chr(i) for i in range(256)] + list("  \n\n''sdmt12½²é中🙂\u0301\u2028\u3000٣İß")
    texts += ["".join(draw.choices(alphabet, k=draw.randrange(1, 40))) for _ in range(800)]
    return texts + [
        "".join(draw.choices("ab 1\n'st!", k=draw.randrange(1, 30))) for _ in range(700)
    ]


def refused(path, *said, by=read_transformer):
    with pytest.raises(BadCheckpoint) as error:
        by(path)
    message = str(error.value)
    assert "\n" not in message
    for word in said:
        assert word in message, message


def reconfigure(path, **changes):
    """config.json with these values; those that are ... are taken out."""
    config = json.loads((path / "config.json").read_text()) | changes
    config = {name: kept for name, kept in config.items() if kept is not ...}
    (path / "config.json").write_text(json.dumps(config))

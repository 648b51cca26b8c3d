"""Hugging Face directories: the logits of transformers, shards, round trips, windows."""

import json

import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers

from chat import formats
from chat.checkpoints import read_transformer, write_transformer
from chat.formats import RopeScaling
from helpers.checkpoints import (
    FAMILIES,
    LENGTH,
    SINGLE,
    VOCABULARY,
    assert_same,
    difference,
    families,
    reconfigure,
    some_tokens,
    theirs_of,
)
from helpers.pages import PAGES
from model import Cache, Config, Transformer, generate


def test_every_family_that_is_read_is_tested_here_and_named_in_docs():
    names = {family.architecture.removesuffix("ForCausalLM") for family in formats.FAMILIES}
    assert {kind for kind, _ in FAMILIES.values()} == names
    said = PAGES["docs/real-models.md"].partition("`chat.load` reads")[2].partition(":")[0]
    assert all(name in said for name in names)


@families
def test_logits_are_those_of_transformers(family, tmp_path):
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours = read_transformer(tmp_path)
    assert difference(theirs, ours) < SINGLE
    with torch.no_grad():
        assert ours(some_tokens()).std() > 0.5  # what the tolerance is to be compared with
    size = sum(weight.numel() for weight in theirs.parameters())
    assert (
        sum(weight.numel() for weight in ours.parameters()) == size
    )  # one matrix where tied, biases and norms if any


@families
def test_every_kind_of_tensor_of_a_family_matters(family, tmp_path):
    """So that the comparison of logits above could not have missed one."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours = read_transformer(tmp_path)
    whole = ours(some_tokens()).detach()
    last = f"blocks.{theirs.config.num_hidden_layers - 1}."
    for name, weight in ours.named_parameters():
        if name.startswith("blocks") and not name.startswith(("blocks.1.", last)):
            continue  # two layers will do
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(before.roll(1, 0))
            if name.endswith("k.bias"):  # but for rotary positions it would cancel in the softmax
                weight.copy_(before + torch.arange(len(before)) % 3)
            assert (ours(some_tokens()) - whole).abs().max() > 100 * SINGLE, name
            weight.copy_(before)


@pytest.mark.slow
@families
def test_directories_in_shards_read_and_written_are_the_same_model(family, tmp_path):
    """transformers' shards -> ours -> our shards -> transformers, nothing missing or left over, and
    -> ours, bit for bit."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    ours = read_transformer(tmp_path / "theirs")
    for name, shard_bytes in (("one", 5 << 30), ("many", 60_000)):
        folder = tmp_path / name
        write_transformer(ours, folder, shard_bytes)
        files = sorted(folder.glob("*.safetensors"))
        assert (len(files) == 1) == (name == "one")
        assert all(file.stat().st_size < shard_bytes + 4096 for file in files)  # and a header
        back, said = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True
        )
        assert not any(
            said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        ), said
        assert_same(back, theirs)
        assert difference(back.eval(), ours) < SINGLE
        again = read_transformer(folder)
        assert_same(again, ours)
        assert again.config == ours.config


@pytest.mark.slow
@families
def test_half_precision_weights_survive_a_round_trip_bit_for_bit(family, tmp_path):
    theirs = theirs_of(family).bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read_transformer(tmp_path / "theirs", torch.bfloat16)
    assert {weight.dtype for weight in ours.parameters()} == {torch.bfloat16}
    write_transformer(ours, tmp_path / "ours")
    assert_same(read_transformer(tmp_path / "ours", torch.bfloat16), ours)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert_same(back, theirs)
    wide = read_transformer(tmp_path / "theirs")  # float32 holds every bfloat16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    assert difference(theirs.eval(), wide) < SINGLE


@families
def test_reading_with_a_cache_and_padding_changes_nothing(family, tmp_path):
    """Pieces of 1, 40 and 19 tokens, then one by one; and greedy answers to prompts of different
    lengths, as transformers'."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours, tokens = read_transformer(tmp_path).requires_grad_(False), some_tokens()
    whole = ours(tokens)
    for pieces in ([1, 40, 19], [57, 1, 1, 1]):
        cache = Cache(ours.config, 2, LENGTH, ours.head.weight)
        parts = [ours(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
        assert (torch.cat(parts, dim=1) - whole).abs().max() < SINGLE
    prompts, length = [tokens[0, :9], tokens[1, :40]], 12
    half = torch.full((2, 1, length), 0.5, dtype=torch.float64)
    answers, _, _ = generate({ours: 1.0}, prompts, half, VOCABULARY, temperature=1e-6)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = theirs.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=length,
        )
        assert answer[0].tolist() == expected[0, len(prompt) :].tolist()


def test_llama_3s_rope_scaling_matters_and_is_that_of_transformers(tmp_path):
    theirs = theirs_of("Llama 3")
    theirs.save_pretrained(tmp_path)
    ours = read_transformer(tmp_path)
    assert ours.config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
    plain = Transformer(Config(**{**vars(ours.config), "rope_scaling": None}))
    plain.load_state_dict(ours.state_dict())
    assert difference(theirs, plain) > 1000 * SINGLE
    tokens = some_tokens(1, 250)
    assert difference(theirs, ours, tokens) < SINGLE
    write_transformer(ours, tmp_path / "ours")
    assert read_transformer(tmp_path / "ours").config == ours.config


@pytest.mark.parametrize("family", ["Llama 2", "Llama 3", "Qwen2", "Qwen3", "Mistral"])
def test_configurations_of_older_transformers_mean_the_same(family, tmp_path):
    """Version 4 wrote rope_theta beside rope_scaling, versions before 4.45 wrote "type", and left
    defaults out."""
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    if family in ("Llama 2", "Llama 3", "Qwen2"):
        config.pop("head_dim", None)
    if family == "Llama 2":
        for name in (
            "num_key_value_heads",
            "attention_bias",
            "mlp_bias",
            "rope_theta",
            "rope_scaling",
        ):
            config.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert difference(theirs, read_transformer(tmp_path)) < SINGLE


def test_a_sliding_window_is_the_context_within_which_the_logits_agree(tmp_path):
    """Attention here is always full: beyond a window of 16 tokens the models differ, and the config
    says so."""
    theirs = theirs_of("Mistral", sliding_window=16)
    theirs.save_pretrained(tmp_path)
    ours = read_transformer(tmp_path)
    assert ours.config.context == 16
    assert difference(theirs, ours, some_tokens(2, 16)) < SINGLE
    assert difference(theirs, ours, some_tokens(2, 20)) > 1000 * SINGLE


FULL, SLIDING = ["full_attention"], ["sliding_attention"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama tied", {"sliding_window": 16}),
        ("Mistral", {"sliding_window": 16}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 16, "use_sliding_window": False}),
        *(
            (family, {"sliding_window": 16} | changes)
            for family in ("Qwen2", "Qwen3")
            for changes in (
                {},
                {"use_sliding_window": False, "max_window_layers": 0},
                {"use_sliding_window": True},
                {"use_sliding_window": True, "max_window_layers": 3},
                {"use_sliding_window": True, "max_window_layers": 2},
                {"use_sliding_window": True, "max_window_layers": 0},
                {"use_sliding_window": True, "layer_types": FULL * 3},
                {
                    "use_sliding_window": True,
                    "layer_types": FULL * 2 + SLIDING,
                    "max_window_layers": 28,
                },
                {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
            )
        ),
    ],
)
def test_a_sliding_window_is_in_force_where_it_is_in_transformers(family, changes, tmp_path):
    """60 tokens, a window of 16: the logits are those of transformers if and only if the config
    says that 60 can be read."""
    theirs_of(family).save_pretrained(tmp_path)
    reconfigure(
        tmp_path,
        **{"layer_types": ..., "use_sliding_window": ..., "max_window_layers": ...} | changes,
    )
    theirs, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        read_transformer(tmp_path),
    )
    assert ours.config.context in (16, 256)
    apart = difference(theirs.float().eval(), ours)
    assert apart < SINGLE if ours.config.context == 256 else apart > 100 * SINGLE


def test_windows_that_are_left_out_or_beyond_the_context_are_transformers_own(tmp_path):
    theirs_of("Mistral", max_position_embeddings=8192).save_pretrained(tmp_path)
    for changes, context in (({"sliding_window": ...}, 4096), ({"sliding_window": 9000}, 8192)):
        reconfigure(tmp_path, **changes)
        assert read_transformer(tmp_path).config.context == context


def test_old_rotary_tables_beside_the_weights_are_passed_over(tmp_path):
    theirs = theirs_of("Llama 2")
    theirs.save_pretrained(tmp_path)
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    safetensors_torch.save_file(weights, tmp_path / "model.safetensors")
    assert difference(theirs, read_transformer(tmp_path)) < SINGLE


def test_a_model_made_here_is_saved_for_transformers_too(tmp_path):
    torch.manual_seed(0)
    ours = Transformer(Config(VOCABULARY, embedding_std=0.5))
    torch.nn.init.normal_(ours.head.weight, std=0.3)
    write_transformer(ours, tmp_path)
    assert_same(read_transformer(tmp_path), ours)
    assert (
        difference(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ours)
        < SINGLE
    )


def test_biases_and_norms_together_are_no_architecture_to_save(tmp_path):
    with pytest.raises(ValueError, match="qkv_bias and qk_norm"):
        write_transformer(Transformer(Config(VOCABULARY, qkv_bias=True, qk_norm=True)), tmp_path)


def test_saving_over_an_older_checkpoint_leaves_none_of_it(tmp_path):
    """From shards to one file, to fewer shards and back: what is read is what was saved last."""
    for seed, shard_bytes in enumerate((60_000, 5 << 30, 100_000, 60_000)):
        ours = Transformer(Config(VOCABULARY))
        torch.nn.init.normal_(ours.head.weight, generator=torch.Generator().manual_seed(seed))
        write_transformer(ours, tmp_path, shard_bytes)
        assert_same(read_transformer(tmp_path), ours)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(back.lm_head.weight, ours.head.weight)

"""Low-rank terms: what they add, what is trained, what is saved."""

import pytest
import torch

import dno
from chat.checkpoints import read_transformer, write_transformer
from chat.low_rank import add_low_rank, merged_weights
from chat.policy import ChatPolicy
from chat.template import Chat
from helpers.chat_models import PROMPTS, policy_of, run, state


def low_rank_policy(directory, dtype=torch.float32, rank=4):
    model = read_transformer(directory, dtype)
    add_low_rank(model, rank)
    return ChatPolicy(model, Chat.from_pretrained(directory), 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_terms_start_at_nothing_and_are_all_that_is_trained(dtype, tiny_qwen):
    policy, plain = low_rank_policy(tiny_qwen, dtype), policy_of(tiny_qwen, dtype)
    said = PROMPTS[:2], ["Water.", "It depends."]
    assert torch.equal(policy.log_prob(*said), plain.log_prob(*said))
    fixed = {
        name: weight.detach().clone()
        for name, weight in policy.model.named_parameters()
        if not weight.requires_grad
    }
    optimizer = dno.adam(policy)
    for _ in range(3):
        optimizer.zero_grad()
        (-policy.log_prob(*said).sum()).backward()
        optimizer.step()
    moved = dict(policy.model.named_parameters())
    assert all(torch.equal(moved[name], weight) for name, weight in fixed.items())
    trained = list(policy.parameters())
    assert all(weight.dtype == torch.float32 for weight in trained)
    # r (in + out) of each map: q and out 32 + 32, k and v 32 + 16, gate, up and down 32 + 64, in
    # two blocks
    assert sum(weight.numel() for weight in trained) == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    with torch.no_grad():
        assert (policy.log_prob(*said) > plain.log_prob(*said)).all()


def test_a_low_rank_term_adds_2_B_A_to_its_map_and_its_gradient_is_autograds(tiny_qwen):
    policy = low_rank_policy(tiny_qwen)
    torch.manual_seed(0)
    x, block = torch.randn(5, 32), policy.model.blocks[0]
    plain = read_transformer(tiny_qwen).blocks[0].attention
    for name, part, bias in (
        ("gate", block.gate, 0.0),
        ("attention.q", block.attention.q, plain.q.bias),
        ("attention.v", block.attention.v, plain.v.bias),
    ):
        with torch.no_grad():
            part.B.normal_()
        whole = part.weight + 2 * part.B @ part.A
        assert (part(x) - x @ whole.T - bias).abs().max() < 1e-4
        merged = merged_weights(policy.model)[f"blocks.0.{name}.weight"]
        assert (merged - whole).abs().max() < 1e-6
    assert plain.q.bias.abs().max() > 0.1  # it is there, and is not 0


def test_a_model_with_low_rank_terms_is_saved_as_the_model_that_it_is(tiny_qwen, tmp_path):
    """Every term moved; the saved model's logits are the trained one's, biases and all, here and in
    transformers."""
    import transformers

    model = low_rank_policy(tiny_qwen).model
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".B"):
                weight.normal_(std=0.3)
    write_transformer(model, tmp_path / "saved")
    tokens = torch.randint(0, 300, (2, 20))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        ours, plain = model(tokens), read_transformer(tiny_qwen)(tokens)
        assert (read_transformer(tmp_path / "saved")(tokens) - ours).abs().max() < 1e-4
        assert (theirs(tokens).logits - ours).abs().max() < 1e-4
        assert (ours - plain).abs().max() > 0.1


@pytest.mark.slow
def test_a_run_with_low_rank_terms_saves_whole_maps_and_small_checkpoints(
    tiny_qwen, prompts_file, tmp_path
):
    out = tmp_path / "run"
    assert run(tiny_qwen, prompts_file, out, "--low-rank", "2", "--lr", "0.02") == 0
    saved, base = (read_transformer(path).state_dict() for path in (out / "best", tiny_qwen))
    assert saved.keys() == base.keys()
    base = {name: weight.bfloat16().float() for name, weight in base.items()}
    assert torch.equal(saved["embedding.weight"], base["embedding.weight"])
    assert torch.equal(saved["blocks.0.gate.weight"], base["blocks.0.gate.weight"]) == (
        state(out)["round"].best.t == 1
    )
    assert (out / "checkpoint/state.pt").stat().st_size < 0.8 * 16 * sum(
        weight.numel() for weight in base.values()
    )

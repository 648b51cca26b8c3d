"""Weights of chat models kept in float32, their copies, and activations computed twice."""

import pytest
import torch

import dno
from helpers.chat_models import PROMPTS, policy_of

# --- Weights ---


def test_steps_too_small_for_bfloat16_add_up_in_the_master_weights(tiny_llama):
    """1e-5 of a weight near 1 is 1/800 of bfloat16's spacing there: alone it is lost, 1,000 of them
    are not."""
    policy = policy_of(tiny_llama, torch.bfloat16)
    before = policy.model.norm.weight.detach().clone()
    assert (before == 1).all()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    names = [name for name, _ in policy.model.named_parameters()]
    norm = list(policy.parameters())[names.index("norm.weight")]
    policy.log_prob(PROMPTS[:1], ["Water."]).sum().backward()
    for _ in range(1000):
        for master in list(policy.parameters()):
            master.grad = None
        norm.grad = torch.full_like(norm, 1e-5)
        optimizer.step()
    assert (policy.model.norm.weight == before).all()  # not told yet
    policy.refresh()
    assert policy.model.norm.weight.detach().float().mean().item() == pytest.approx(0.99, abs=2**-8)


def test_gradients_are_gathered_in_float32_and_rounded_as_bfloat16(tiny_llama):
    """Gradients are gathered in float32 and are those of float32 up to bfloat16's rounding."""
    half, full = policy_of(tiny_llama, torch.bfloat16), policy_of(tiny_llama)
    for policy in (half, full):
        for y in ("Water.", "It depends on the weather, I think."):
            policy.log_prob(PROMPTS[:1], [y]).sum().backward()
    assert all(weight.grad is None for weight in half.model.parameters())
    assert all(master.grad.dtype == torch.float32 for master in half.parameters())
    a, b = (
        torch.cat([p.grad.flatten() for p in policy.parameters()]).double()
        for policy in (half, full)
    )
    assert torch.cosine_similarity(a, b, dim=0) > 0.995  # rounding of 2^-9 in each of a few layers


def test_a_trained_policy_samples_with_its_new_weights_until_load(tiny_llama):
    """A trained policy samples with its new weights and load brings the old ones back."""
    policy = policy_of(tiny_llama, torch.bfloat16)
    old, y = policy.weights(), "Water falls."
    score = lambda: policy.log_prob(PROMPTS[:1], [y]).item()  # noqa: E731
    before, optimizer = score(), dno.adam(policy)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(5):
        optimizer.zero_grad()
        (-policy.log_prob(PROMPTS[:1], [y])).sum().backward()
        optimizer.step()
    assert score() > before + 5
    policy.load(old)
    assert score() == before


def test_two_scores_can_be_taken_before_their_gradients(tiny_llama):
    policy = policy_of(tiny_llama, torch.bfloat16)
    together, apart = [], []
    for found in (together, apart):
        policy.load(policy.weights())  # the model's weights are written anew before the next score
        scores = (
            [policy.log_prob(PROMPTS[:1], [y]) for y in ("Water.", "Ice.")]
            if found is together
            else []
        )
        for y in ("Water.", "Ice."):
            (scores.pop(0) if scores else policy.log_prob(PROMPTS[:1], [y])).sum().backward()
        found += [master.grad.clone() for master in policy.parameters()]
        for master in policy.parameters():
            master.grad = None
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


# --- Memory ---


def test_with_checkpointing_gradients_are_the_same(tiny_qwen):
    gradients = []
    for on in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            policy = policy_of(tiny_qwen, dtype)
            policy.model.checkpointing = on
            policy.log_prob(PROMPTS[:2], ["Water.", "It depends."]).sum().backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])
    assert gradients[0].abs().max() > 0


def test_a_reference_is_the_policy_as_it_was_and_nothing_of_it_is_trained(tiny_qwen):
    policy = policy_of(tiny_qwen, torch.bfloat16)
    reference = policy.frozen_copy()
    with torch.no_grad():
        before = policy.log_prob(PROMPTS[:1], ["Water."])
    policy.load([weight * 1.5 for weight in policy.weights()])
    with torch.no_grad():
        assert torch.equal(reference.log_prob(PROMPTS[:1], ["Water."]), before)
        assert not torch.equal(policy.log_prob(PROMPTS[:1], ["Water."]), before)
    assert not any(weight.requires_grad for weight in reference.parameters())
    assert reference.chat is policy.chat
    other = policy.frozen_copy()
    other.load(reference.weights())
    with torch.no_grad():
        assert torch.equal(other.log_prob(PROMPTS[:1], ["Water."]), before)


def test_a_copy_has_the_weights_that_the_model_has_not_been_given_yet(tiny_qwen):
    """After `load`, and after a step of training."""
    policy, said = policy_of(tiny_qwen, torch.bfloat16), (PROMPTS[:1], ["Water."])
    scores, optimizer = [], torch.optim.SGD(policy.parameters(), lr=0.1)
    for change in ("load", "step"):
        if change == "load":
            policy.load([weight * 1.5 for weight in policy.weights()])
        else:
            policy.log_prob(*said).sum().backward()
            optimizer.step()
        reference = policy.frozen_copy()  # before anything else tells the model
        with torch.no_grad():
            scores += [reference.log_prob(*said).item(), policy.log_prob(*said).item()]
    assert scores[0] == scores[1] != scores[2] == scores[3]

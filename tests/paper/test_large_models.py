"""The options of Algorithm 2's loop that large models need: pieces of a batch, groups at once,
the reference."""

import math

import pytest
import torch

import dno
from helpers.chat_models import PROMPTS, policy_of
from pairs import Groups, SamplingSettings, form_pairs


def groups_and_pairs():
    groups = Groups(
        PROMPTS[:4], [["Water.", "It is water, mostly."]] * 4, torch.full((4, 2), float("nan"))
    )
    return groups, form_pairs(
        groups, torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[x, 0, 1] for x in range(4)])
    )


def test_gradients_of_pieces_add_up_to_the_batchs(tiny_llama):
    """One step of SGD on four prompts' pairs at once, and by one and by three."""
    weights = {}
    for at_once in (None, 1, 3):
        policy = policy_of(tiny_llama)
        settings = SamplingSettings(prompts_at_once=at_once, prompts_per_step=4, max_grad_norm=1e9)
        D = dno.with_reference(groups_and_pairs()[1], policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        fit = dno.fit_pairs(
            policy,
            D,
            dno.hard_targets(1.0),
            optimizer,
            settings,
            0.1,
            torch.Generator().manual_seed(0),
        )
        assert fit["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert fit["chosen_log_ratio"] == pytest.approx(0, abs=1e-4)
        assert fit["steps"] == 1
        weights[at_once] = torch.cat(policy.weights()[:1])
    assert (weights[None] - policy_of(tiny_llama).weights()[0]).abs().max() > 1e-4
    for at_once in (1, 3):
        assert (weights[at_once] - weights[None]).abs().max() < 1e-6


def test_what_bfloat16_recorded_is_not_the_losss_reference(tiny_llama):
    policy = policy_of(tiny_llama)
    for recorded in (True, False):
        groups = dno.sample_groups(
            policy, PROMPTS[:2], None, SamplingSettings(samples=2, use_recorded=recorded), seed=0
        )
        assert groups.log_pi_t.isnan().all() == (not recorded)
    D = dno.with_reference(form_pairs(groups, torch.zeros(2, 2), torch.tensor([[0, 0, 1]])), policy)
    assert not D.log_reference.isnan().any()


def test_a_gradient_that_is_not_finite_stops_with_its_batch(tiny_llama):
    policy = policy_of(tiny_llama)
    D = dno.with_reference(groups_and_pairs()[1], policy)
    with torch.no_grad():
        policy.model.norm.weight[0] = float("nan")
    with pytest.raises(dno.NotFinite, match="step 1") as caught:
        dno.fit_pairs(
            policy,
            D,
            dno.hard_targets(1.0),
            dno.adam(policy),
            SamplingSettings(),
            1e-3,
            torch.Generator(),
        )
    assert caught.value.batch.prompts

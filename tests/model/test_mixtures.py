"""Mixtures of policies, token by token and of whole responses. C23."""

import math
import weakref

import pytest
import torch

from helpers.games import EXACT
from helpers.text import SHARPNESS, TINY_ANSWER, TINY_END, all_responses, assert_follow, tiny_policy
from text import TokenMixture, UniformMixture

BEFORE = [0, TINY_ANSWER]  # the prompt "a"

MARGIN = (
    0.04  # total variation; measured: 0.193, 0.097, 0.046 at weight 0.3, 0.193, 0.133, 0.049 at 0.5
)


def mixtures(weight, length, seed=0):
    """Of two policies, all as tables over whole responses: pi, pi_ref, pi^(1 - weight)
    pi_ref^weight normalised over the responses as in Eq. (7), the same normalised at every token,
    and the last as `TokenMixture` has it."""
    policy, reference = tiny_policy(2 * seed, length), tiny_policy(2 * seed + 1, length)
    models = (
        [(policy.model, 1.0)],
        [(reference.model, 1.0)],
        [(policy.model, 1 - weight), (reference.model, weight)],
    )
    p, q, by_token = (all_responses(each, BEFORE, length, 6, TINY_END) for each in models)
    of_wholes = torch.tensor(
        [p[y] ** (1 - weight) * q[y] ** weight for y in p], dtype=torch.float64
    )
    token_mixture = policy.mixed_with(reference, weight)
    log_probs = token_mixture.log_prob(["a"] * len(p), [policy.response(y) for y in p])
    known = [torch.tensor([table[y] for y in p], dtype=torch.float64) for table in (p, q, by_token)]
    return *known[:2], of_wholes / of_wholes.sum(), known[2], log_probs.detach().exp()


@pytest.mark.parametrize("weight", [0.3, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_mixing_token_by_token_is_a_policy_but_not_the_mixture_of_whole_responses(weight, seed):
    """C23: 156 responses of up to 3 tokens."""
    _, _, of_wholes, by_token, mixture = mixtures(weight, 3, seed)
    assert len(mixture) == 1 + 5 + 25 + 125
    assert float(mixture.sum()) == pytest.approx(1, abs=EXACT)
    assert (mixture - by_token).abs().max() < EXACT
    assert float((mixture - of_wholes).abs().sum() / 2) > MARGIN


@pytest.mark.parametrize("seed", range(3))
def test_the_two_mixtures_coincide_for_one_token_and_for_weights_0_and_1(seed):
    _, _, of_wholes, _, mixture = mixtures(0.3, 1, seed)
    assert (mixture - of_wholes).abs().max() < EXACT
    for weight in (0, 1):
        *pure, of_wholes, _, mixture = mixtures(weight, 3, seed)
        assert (mixture - pure[weight]).abs().max() < EXACT
        assert (of_wholes - pure[weight]).abs().max() < EXACT
        assert (mixture - pure[1 - weight]).abs().sum() > 0.1


def test_a_policy_mixed_with_itself_is_itself():
    policy = tiny_policy()
    for reference in (policy.frozen_copy(), policy):
        mixture = policy.mixed_with(reference, 0.3)
        assert (
            mixture.log_prob(["a", "b"], ["ab", "b"]) - policy.log_prob(["a", "b"], ["ab", "b"])
        ).abs().max() < EXACT


@SHARPNESS
def test_samples_of_a_token_mixture_follow_it_and_carry_its_own_log_probabilities(
    temperature, top_p
):
    policy, reference = tiny_policy(0), tiny_policy(1)
    mixture = TokenMixture(policy, reference, 0.3)
    (responses,), log_probs = mixture.sample(["a"], 5_000, temperature, top_p, seed=8)
    exact = all_responses(
        [(policy.model, 0.7), (reference.model, 0.3)], BEFORE, 3, 6, TINY_END, temperature, top_p
    )
    assert_follow([y.tokens for y in responses], exact)
    assert (mixture.log_prob(["a"] * 500, responses[:500]) - log_probs[0, :500]).abs().max() < EXACT


def test_weights_that_a_policy_gave_make_another_policy_the_same():
    """They are copies: what the policy does after does not change them."""
    policy, other = tiny_policy(0), tiny_policy(1)
    weights, said = policy.weights(), (["a", "b"], ["ab", "b"])
    before = policy.log_prob(*said)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.5)
    other.load(weights)
    assert torch.equal(other.log_prob(*said), before)
    assert not torch.equal(policy.log_prob(*said), before)


def uniform_mixture(loaded):
    """Of three policies; its loaders note in `loaded` which was asked for, after checking that no
    other is still there."""
    policies, alive = [tiny_policy(seed) for seed in range(3)], []

    class State(dict):
        """A dictionary that can be watched."""

    def load(t):
        assert [state for state in alive if state() is not None] == []
        state = State({name: value.clone() for name, value in policies[t].state_dict().items()})
        alive.append(weakref.ref(state))
        loaded.append(t)
        return state

    return policies, UniformMixture(policies[0], [lambda t=t: load(t) for t in range(3)])


def test_the_uniform_mixture_has_the_mean_probability():
    """The uniform mixture has the mean probability and loads one policy at a time."""
    policies, mixture = uniform_mixture(loaded := [])
    each = [all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END) for policy in policies]
    log_probs = mixture.log_prob(["a"] * 156, [policies[0].response(y) for y in each[0]])
    expected = torch.tensor(
        [math.log(sum(table[y] for table in each) / 3) for y in each[0]], dtype=torch.float64
    )
    assert (log_probs - expected).abs().max() < EXACT
    assert loaded == [0, 1, 2]
    for name, value in (
        tiny_policy(0).state_dict().items()
    ):  # the policy it was made from stays as it was
        assert torch.equal(policies[0].state_dict()[name], value)


@pytest.mark.slow
def test_the_responses_of_a_uniform_mixture_are_independent_of_each_other():
    """Of ten times one policy they are the policy's own samples. Were they drawn with ten times the
    same random numbers, each would occur ten times, and their counts vary ten times as much."""
    policy = tiny_policy(0)
    mixture = UniformMixture(policy, [policy.state_dict] * 10)
    exact = all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END)
    for seed in range(3):
        ((*responses,),) = mixture.sample(["a"], 5_000, seed=seed)
        assert_follow([y.tokens for y in responses], exact)


@pytest.mark.slow
@SHARPNESS
def test_the_uniform_mixture_draws_a_policy_once_for_a_response(temperature, top_p):
    policies, mixture = uniform_mixture(loaded := [])
    ((*responses,),) = mixture.sample(["a"], 5_000, temperature, top_p, seed=9)
    each = [
        all_responses([(policy.model, 1.0)], BEFORE, 3, 6, TINY_END, temperature, top_p)
        for policy in policies
    ]
    assert_follow(
        [y.tokens for y in responses],
        {y: sum(t.get(y, 0) for t in each) / 3 for table in each for y in table},
    )
    assert loaded == [0, 1, 2]

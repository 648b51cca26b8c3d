"""Policies and settings that tests of the algorithms with samples share."""

from dataclasses import fields, is_dataclass, replace

import torch

import dno
import regularized
from experiments.recalling import RecallingPolicy, recalling
from helpers.games import random_policy
from model import TabularPolicy
from oracle import random_game
from pairs import Groups, SamplingSettings, form_pairs, large_margin_pairs

NAN = float("nan")

PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "ngram": 0,
    "max_grad_norm": 1e9,
}  # samples of pi_t itself, nothing filtered or cut

SMALL = SamplingSettings(samples=3, prompts_per_step=2, learning_rate=0.1, replay=0.5, **PLAIN)


def tabular(logits_of):
    policy = TabularPolicy(*logits_of.shape)
    policy.logits.data = logits_of.log()
    return policy


def start(
    name,
    policy,
    oracle,
    prompts,
    gold=None,
    eta=1.0,
    T=1,
    tau=0.1,
    rule=0.3,
    validate=lambda: 0.0,
    every=2,
    optimizer=None,
    after=None,
    remember=None,
    **named,
):
    """One of the algorithms with samples, by name, on the same prompts in every iteration, or on
    those of prompts(t); rule may be a margin."""
    data = prompts if callable(prompts) else lambda t: (prompts, gold)
    if optimizer is not None:
        named["start"] = dno.SampledStart(optimizer, after)
    if remember is not None:
        policy, oracle, data = recalling(policy, oracle, data, remember)
    given = (policy, oracle, data, eta, T)
    if name == "3":
        return regularized.algorithm3_sampled(
            *given, validate, tau, move_reference_every=every, **named
        )
    given += (
        rule if callable(rule) else lambda r, usable: large_margin_pairs(r, usable, rule),
        validate,
    )
    if name == "2":
        return dno.algorithm2(*given, **named)
    return regularized.algorithm4(
        *given, tau, option=name.removeprefix("4-"), move_reference_every=every, **named
    )


class Spy(TabularPolicy):
    """Notes how many responses it was asked to score, and the prompts of those to train on."""

    def __init__(self, X, Y):
        super().__init__(X, Y)
        self.scored, self.trained = [], []

    def log_prob(self, prompts, responses):
        assert prompts, "a policy may be unable to score nothing at all"
        self.scored.append(len(prompts))
        if torch.is_grad_enabled():
            self.trained.append(sorted(set(prompts)))
        return super().log_prob(prompts, responses)


class Mixable(TabularPolicy):
    """With the exact pi_t^tau of Eq. (7) to sample from."""

    def mixed_with(self, reference, weight):
        return tabular(
            ((1 - weight) * self.log_probs() + weight * reference.log_probs()).detach().softmax(-1)
        )


def by_hand(rule, rows, unusable=(), **options):
    r = torch.tensor(rows, dtype=torch.float64)
    usable = torch.tensor(
        [[(x, i) not in unusable for i in range(r.shape[1])] for x in range(len(r))]
    )
    return rule(r, usable, **options).tolist()


def random_pairs(X, n, seed=0):
    """Pairs of X groups of n responses, each response another number, also listed; and the tables r
    and log_pi_t."""
    r, log_pi_t = random_policy(2, X * n, seed).view(2, X, n)
    groups = Groups(list(range(X)), torch.arange(X * n).view(X, n).tolist(), log_pi_t)
    chosen = large_margin_pairs(r, torch.ones(X, n, dtype=torch.bool), 0.0)[::2]
    return (
        form_pairs(groups, r, chosen),
        [(x, x * n + i, x * n + j) for x, i, j in chosen.tolist()],
        r,
        log_pi_t,
    )


def four_iterations(name, policy, oracle=random_game(3, 4, seed=0), **named):
    def validate():
        return float(policy.log_probs()[0, 0].detach())

    return start(
        name,
        policy,
        oracle,
        [0, 1, 2, 1],
        [3, 3, 2, 0],
        0.5,
        4,
        validate=validate,
        settings=replace(SMALL, seed=5),
        **named,
    )


def same(a, b):
    """Equal bit for bit, NaN being equal to NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, RecallingPolicy):
        return same(a.policy, b.policy)
    if isinstance(a, torch.nn.Module):
        return same(list(a.parameters()), list(b.parameters()))
    if is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b

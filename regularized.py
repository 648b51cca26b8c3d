"""Appendix A of the paper: the regularised game, and Algorithms 3 and 4 as edits of 1 and 2.

A reference policy pi_ref pulls with strength tau in [0, eta]. What changes from dno.py is marked in
the loops by `# differs`. Notation and axes are those of dno.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from dataclasses import replace
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from checks import check_policy, check_positive, check_preferences, check_whole
from dno import (
    Best,
    Data,
    ExactIteration,
    ExactStart,
    Policy,
    Preferences,
    Regression,
    Rule,
    SampledIteration,
    SampledPolicy,
    SampledStart,
    Sampler,
    adam,
    draw_data,
    duality_gap,
    expected_win_rate,
    fit_pairs,
    group_win_rates,
    hard_targets,
    judge_groups,
    kl_divergence,
    log_table,
    prompt_mean,
    random_numbers,
    rate_groups,
    regress,
    sample_groups,
    soft_policy_iteration,
    soft_targets,
    validated,
    win_rate,
    with_reference,
)
from pairs import Pairs, SamplingSettings, all_pairs, demote_repetitions, form_pairs, join, replay

NO_REFERENCE = "start.after has no reference policy; expected an iteration of this algorithm"


def check_loop(eta: float, iterations: int, tau: float, move_reference_every: int) -> None:
    """Raise ValueError naming the first of these numbers that is out of its range."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    check_regularization(tau, eta)
    check_whole(0, move_reference_every=move_reference_every)


def check_option(option: str) -> None:
    """Raise ValueError unless option is "I" or "II"."""
    if option not in ("I", "II"):
        raise ValueError(f"option is {option!r}; expected I or II")


def check_regularization(tau: float, eta: float) -> None:
    """Raise ValueError unless 0 <= tau <= eta, so that tau/eta is the weight of a mixture."""
    if not (isinstance(tau, Real) and 0 <= tau <= eta):
        raise ValueError(f"tau is {tau!r} and eta {eta}; expected 0 <= tau <= eta")


def geometric_mixture(log_pi: Tensor, log_pi_ref: Tensor, tau: float, eta: float) -> Tensor:
    """log of pi^(1 - tau/eta) pi_ref^(tau/eta), unnormalised; log_softmax makes it Eq. (7)'s
    pi^tau.

    At tau = 0 it is log_pi."""
    if tau == eta:  # whatever pi is: where it is 0, its logarithm times 0 would be NaN
        return log_pi_ref
    return log_pi if tau == 0 else (1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref


# --- The regularised preference -------------------------------------------------------------------


def regularized_win_rate(
    P: Tensor, pi: Tensor, pi_prime: Tensor, pi_ref: Tensor, tau: float, rho: Tensor | None = None
) -> float:
    """P_tau(pi > pi') = P(pi > pi') - tau E_x KL(pi || pi_ref) + tau E_x KL(pi' || pi_ref): Eq.
    (6).

    It is the expectation of Eq. (5). ValueError on a bad table."""
    P = check_preferences(P).double()
    named = {"pi": pi, "pi_prime": pi_prime, "pi_ref": pi_ref}.items()
    pi, pi_prime, pi_ref = (check_policy(table, P.shape[:2], name).to(P) for name, table in named)
    log_ref = pi_ref.log()
    costs = kl_divergence(pi_prime.log(), log_ref) - kl_divergence(pi.log(), log_ref)
    return win_rate(P, pi, pi_prime, rho) + tau * float(prompt_mean(costs, rho))


def regularized_gap(
    P: Tensor, pi: Tensor, pi_ref: Tensor, tau: float, rho: Tensor | None = None
) -> float:
    """Duality gap of P_tau: max_pi' P_tau(pi' > pi) - min_pi' P_tau(pi > pi') >= 0.

    That is 2 max_pi' P_tau(pi' > pi) - 1, and the best reply is Eq. (2): E_x[2 tau log sum_y pi_ref
    exp(r/tau) + 2 tau KL(pi || pi_ref) - 1], with r = P(. > pi). At tau = 0 it is the duality gap.
    ValueError on a bad table, or unless tau >= 0."""
    if tau == 0:
        return duality_gap(P, pi, rho)
    check_positive(tau=tau)
    P = check_preferences(P).double()
    pi = check_policy(pi, P.shape[:2]).to(P)
    log_ref = check_policy(pi_ref, P.shape[:2], "pi_ref").to(P).log()
    best = (log_ref + expected_win_rate(P, pi) / tau).logsumexp(-1)
    gap = 2 * tau * (best + kl_divergence(pi.log(), log_ref)) - 1
    return float(prompt_mean(gap.clamp(min=0), rho))


# --- Algorithm 3 ----------------------------------------------------------------------------------


def algorithm3(
    policy: Policy,
    P: Tensor,
    eta: float,
    iterations: int,
    tau: float,
    *,
    option: str = "I",
    move_reference_every: int = 0,
    rho: Tensor | None = None,
    settings: Regression = Regression(),
    start: ExactStart | None = None,
) -> Generator[ExactIteration, None, Tensor]:
    """Algorithm 3, regularised DNO: `algorithm1` with another reference in the loss.

    pi_t becomes pi_t^(1 - tau/eta) pi_ref^(tau/eta), left unnormalised, where pi_ref = pi_1. What
    else changes: r_t is against pi_t (option "I": average iterate) or against the normalised
    mixture pi_t^tau (option "II": last iterate). Ours, not the paper's: every
    `move_reference_every` iterations (0: never) pi_ref becomes pi_{t+1}, so that the last iterate
    heads for the Nash policy of P itself (MPO, COMAL; with option II only if tau/eta < 1/2 and
    rounds are long). ValueError also unless 0 <= tau <= eta and option is I or II."""
    check_loop(eta, iterations, tau, move_reference_every)
    check_option(option)
    start = start or ExactStart.of(policy)
    log_pi_t = log_table(policy)  # Alg. 3, line 1: pi_1 <- uniform
    after = start.after
    pi_bar = after.pi_bar if after else torch.zeros_like(log_pi_t)
    log_pi_ref = after.log_pi_ref if after else log_pi_t  # differs: pi_ref = pi_1
    if log_pi_ref is None:
        raise ValueError(NO_REFERENCE)
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 3, line 2
        log_mixture = geometric_mixture(log_pi_t, log_pi_ref, tau, eta)  # differs
        opponent = log_pi_t.exp() if option == "I" else log_mixture.softmax(-1)  # differs
        r_t = expected_win_rate(P, opponent)  # Alg. 3, line 3
        log_pi_star = soft_policy_iteration(log_mixture, r_t, eta)  # differs: Eq. (7)
        D_t = draw_data(settings, rho, log_pi_t, log_pi_star, start.generator)
        # Alg. 3, line 4; differs: log_mixture
        fit = regress(policy, log_mixture, r_t, D_t, eta, start.optimizer, settings)
        log_pi_next = log_table(policy)
        pi_bar = pi_bar + (log_pi_t.exp() - pi_bar) / t
        if move_reference_every and t % move_reference_every == 0:  # differs
            log_pi_ref = log_pi_next
        yield ExactIteration(
            t, eta, log_pi_t, log_mixture, r_t, log_pi_next, pi_bar, **fit, log_pi_ref=log_pi_ref
        )
        log_pi_t = log_pi_next
    return pi_bar  # Alg. 3, line 6


# --- Algorithm 4, and Algorithm 3 for responses that can only be sampled --------------------------


def reference_of(policy: SampledPolicy) -> SampledPolicy:
    """The policy as it is, which further training does not change: its `frozen_copy` where it has
    such a method, as a model with more than one copy of its weights needs; else a deep copy."""
    return policy.frozen_copy() if hasattr(policy, "frozen_copy") else copy.deepcopy(policy)


class MixablePolicy(SampledPolicy, Protocol):
    """What option II of Algorithm 4 needs beside."""

    def mixed_with(self, reference: Any, weight: float) -> Sampler:
        """The mixture of this policy and a reference of the given weight, to be sampled from."""


def mixed_reference(
    D: Pairs, policy: SampledPolicy, pi_ref: SampledPolicy, tau: float, eta: float
) -> Pairs:
    """D with log pi_t^(1 - tau/eta) pi_ref^(tau/eta), unnormalised, as the loss's reference."""
    D = with_reference(D, policy)
    if tau == 0 or not D.responses:
        return D
    with torch.no_grad():
        log_pi_ref = pi_ref.log_prob(D.prompts, D.responses).to(D.log_reference)
    return replace(D, log_reference=geometric_mixture(D.log_reference, log_pi_ref, tau, eta))


def algorithm4(
    policy: MixablePolicy,
    oracle: Preferences,
    data: Data,
    eta: float,
    iterations: int,
    rule: Rule,
    validate: Callable[[], float],
    tau: float,
    *,
    option: str = "I",
    move_reference_every: int = 0,
    settings: SamplingSettings = SamplingSettings(),
    start: SampledStart | None = None,
) -> Generator[SampledIteration, None, Best]:
    """Algorithm 4, regularised DNO-Prct: `algorithm2` with pi_t in the loss replaced as in
    `algorithm3`.

    What else changes: samples are of pi_t (option "I") or of the mixture of pi_t and pi_ref (option
    "II"), for which the policy has a method mixed_with(pi_ref, weight). The paper suggests to mix
    token by token, which is another policy than pi_t^tau. Every `move_reference_every` iterations
    (0: never) pi_ref becomes pi_{t+1}. ValueError on a bad tau or option too."""
    check_loop(eta, iterations, tau, move_reference_every)
    check_option(option)
    start = start or SampledStart(adam(policy))
    after = start.after
    pi_ref = after.pi_ref if after else reference_of(policy)  # differs: pi_ref = pi_1
    if pi_ref is None:
        raise ValueError(NO_REFERENCE)
    best = after.best if after else validated(policy, 1, validate)  # Alg. 4, line 1
    earlier = after.earlier if after else []
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 4, line 2
        sample_seed, generator = random_numbers(settings.seed, t)
        prompts, gold = data(t)  # Alg. 4, line 3
        sampler = policy if option == "I" else policy.mixed_with(pi_ref, tau / eta)  # differs
        groups = sample_groups(sampler, prompts, gold, settings, sample_seed)  # Alg. 4, line 4
        if option == "II":  # differs: what was recorded is the mixture's log-probability
            unknown = torch.full_like(groups.log_pi_t, float("nan"))
            groups = replace(groups, log_pi_t=unknown)
        preferences = judge_groups(oracle, groups)
        r_t = rate_groups(oracle, groups, preferences, settings, generator)  # Alg. 4, line 5
        r_t, may_be_positive = demote_repetitions(r_t, groups, settings)
        pairs = rule(r_t, may_be_positive)  # Alg. 4, line 6
        new = form_pairs(groups, r_t, pairs)
        D = join([new, *replay(earlier, settings.replay, generator)])
        D = mixed_reference(D, policy, pi_ref, tau, eta)  # differs
        loss, rate = hard_targets(eta), settings.rate(t, iterations)
        # Alg. 4, line 7
        fit = fit_pairs(policy, D, loss, start.optimizer, settings, rate, generator)
        best = validated(policy, t + 1, validate, best)
        earlier = [new, *earlier][: settings.replay_iterations]
        if move_reference_every and t % move_reference_every == 0:  # differs
            pi_ref = reference_of(policy)
        yield SampledIteration(
            t, groups, preferences, r_t, pairs, earlier, best, **fit, pi_ref=pi_ref
        )
    return best  # Alg. 4, line 9


def algorithm3_sampled(
    policy: SampledPolicy,
    oracle: Preferences,
    data: Data,
    eta: float,
    iterations: int,
    validate: Callable[[], float],
    tau: float = 0.0,
    *,
    move_reference_every: int = 0,
    settings: SamplingSettings = SamplingSettings(),
    start: SampledStart | None = None,
) -> Generator[SampledIteration, None, Best]:
    """Algorithm 3, option I (Algorithm 1 at tau = 0), for responses that can only be sampled.

    It is `algorithm4` with soft targets, Eq. (8), and without teacher, ranking and filter; P itself
    is averaged, whatever settings.judgments says. It returns the `Best`, not the average policy.

    r_t is estimated from the K samples of the prompt itself, each one's opponents being the other
    K - 1. Where these are samples of pi_t (temperature 1, top-p 1) every r_t is unbiased. The two
    responses of a pair are among each other's opponents, so that differences of r_t are K/(K - 1)
    times as large on average."""
    check_loop(eta, iterations, tau, move_reference_every)
    start = start or SampledStart(adam(policy))
    after = start.after
    pi_ref = after.pi_ref if after else reference_of(policy)  # differs: pi_ref = pi_1
    if pi_ref is None:
        raise ValueError(NO_REFERENCE)
    best = after.best if after else validated(policy, 1, validate)  # Alg. 3, line 1
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 3, line 2
        sample_seed, generator = random_numbers(settings.seed, t)
        prompts, _ = data(t)
        groups = sample_groups(policy, prompts, None, settings, sample_seed)
        preferences = judge_groups(oracle, groups)
        r_t = group_win_rates(preferences)  # Alg. 3, line 3, estimated
        pairs = all_pairs(r_t[:, : settings.trained_samples])  # D_t, of the samples
        D = mixed_reference(form_pairs(groups, r_t, pairs), policy, pi_ref, tau, eta)
        loss, rate = soft_targets(eta), settings.rate(t, iterations)
        # Alg. 3, line 4
        fit = fit_pairs(policy, D, loss, start.optimizer, settings, rate, generator)
        best = validated(policy, t + 1, validate, best)
        if move_reference_every and t % move_reference_every == 0:
            pi_ref = reference_of(policy)
        yield SampledIteration(t, groups, preferences, r_t, pairs, [], best, **fit, pi_ref=pi_ref)
    return best

"""Section 3.1: soft policy iteration, internal rewards, the loss, monotonic improvement,
convergence. C6 to C13, C17."""

import itertools
import math

import numpy as np
import pytest
import torch

import dno
import solvers
from helpers.games import EXACT, games, random_policy, random_rho
from oracle import random_feature_game, rock_paper_scissors

ETAS = (0.05, 0.4, 1.0, 7.0)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def objective(P, pi, pi_t, eta, rho):
    """l_t(pi) = P(pi > pi_t) - eta E_x KL(pi || pi_t)."""
    return dno.win_rate(P, pi, pi_t, rho) - eta * float(rho @ kl(pi, pi_t))


@pytest.mark.parametrize("eta", ETAS)
@games
def test_C6_eq_9_maximises_the_objective_of_soft_policy_iteration(P, eta):
    """C6: Eq. (9) maximises the objective, whose value is 1/2 at pi_t and eta log Z at the
    target."""
    X, Y, _ = P.shape
    pi_t, rho = random_policy(X, Y, 0), random_rho(X, 1)
    r = dno.expected_win_rate(P, pi_t)
    target = dno.soft_policy_iteration(pi_t.log(), r, eta).exp()
    log_Z = (pi_t * (r / eta).exp()).sum(-1).log()
    assert (target - pi_t * (r / eta).exp() / log_Z.exp()[:, None]).abs().max() < EXACT
    best = objective(P, target, pi_t, eta, rho)
    assert best == pytest.approx(eta * float(rho @ log_Z), abs=EXACT)
    assert objective(P, pi_t, pi_t, eta, rho) == pytest.approx(0.5, abs=EXACT)
    for seed in range(10):  # strictly concave: nothing else is as good, near or far
        for weight in (1e-3, 0.3, 1.0):
            other = (1 - weight) * target + weight * random_policy(X, Y, seed + 10)
            assert objective(P, other, pi_t, eta, rho) < best


@pytest.mark.parametrize("eta", ETAS)
@games
def test_C7_the_reverse_kl_to_the_target_is_the_ppo_objective_up_to_log_Z(P, eta):
    X, Y, _ = P.shape
    pi_t, pi = random_policy(X, Y, 0), random_policy(X, Y, 1)
    r = dno.expected_win_rate(P, pi_t)
    log_Z = (pi_t.log() + r / eta).logsumexp(-1)
    log_target = dno.soft_policy_iteration(pi_t.log(), r, eta)
    left = eta * dno.kl_divergence(pi.log(), log_target)
    assert (
        left - (eta * log_Z - ((pi * r).sum(-1) - eta * kl(pi, pi_t)))
    ).abs().max() < 10 * EXACT  # log-ratios up to 20


def test_0_log_0_is_0_in_the_kl_divergence_by_hand():
    p, q = (
        torch.tensor([[1.0, 0.0], [0.25, 0.75]]).double(),
        torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double(),
    )
    expected = [math.log(2), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)]
    assert dno.kl_divergence(p.log(), q.log()).tolist() == pytest.approx(expected, abs=EXACT)
    assert dno.kl_divergence(q.log(), p.log())[0] == math.inf


@pytest.mark.parametrize("eta", [0.0, -1.0, math.inf, math.nan])
def test_soft_policy_iteration_refuses_an_eta_that_is_not_positive(eta):
    with pytest.raises(ValueError, match=f"eta is {eta}; expected a finite number above 0"):
        dno.soft_policy_iteration(torch.zeros(1, 2), torch.zeros(1, 2), eta)


@pytest.mark.parametrize("eta", ETAS)
def test_C8_soft_policy_iteration_with_its_internal_reward_gives_back_pi(eta):
    """And E1: the constant is eta log Z, the log of what Eq. (9) divides by: with it the internal
    reward of the target is r_t itself, with eta Z as printed it is not."""
    P = random_feature_game(3, 12, seed=0).P
    pi_t, pi = random_policy(3, 12, 0), random_policy(3, 12, 1)
    reward = dno.internal_reward(pi.log(), pi_t.log(), eta)
    assert (dno.soft_policy_iteration(pi_t.log(), reward, eta).exp() - pi).abs().max() < EXACT
    r = dno.expected_win_rate(P, pi_t)
    Z = (pi_t * (r / eta).exp()).sum(-1, keepdim=True)
    internal = dno.internal_reward(dno.soft_policy_iteration(pi_t.log(), r, eta), pi_t.log(), eta)
    assert (internal + eta * Z.log() - r).abs().max() < EXACT
    assert (internal + eta * Z - r).abs().min() > 1e-3


# --- C9, C10: the loss ---


def test_C9_the_loss_is_the_cross_entropy_of_eq_11_by_hand():
    """One pair: r1 - r2 = ln 3 (z = 3/4), margin eta (lr1 - lr2) = ln 2 (z^ = 2/3): loss -3/4 ln
    2/3 - 1/4 ln 1/3."""
    double = {"dtype": torch.float64}
    lr1, lr2 = (
        torch.tensor([math.log(2), 5.0], **double),
        torch.tensor([-math.log(2), 5.0], **double),
    )
    r1, r2 = torch.tensor([math.log(3), 0.2], **double), torch.tensor([0.0, 0.2], **double)
    expected = [-0.75 * math.log(2 / 3) - 0.25 * math.log(1 / 3), math.log(2)]
    assert dno.dno_loss(lr1, lr2, r1, r2, eta=0.5).tolist() == pytest.approx(expected, abs=EXACT)
    assert dno.dno_loss(lr1, lr2, r1, r2, eta=0.5).shape == (2,)


@pytest.mark.parametrize("eta", ETAS)
def test_C9_its_gradient_is_z_hat_minus_z_and_0_where_the_margins_agree(eta):
    """C9: its gradient is z hat minus z and vanishes exactly where the margins agree."""
    generator = torch.Generator().manual_seed(0)
    lr1, lr2, r1, r2 = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(4))
    lr2[0], r1[1], lr1[1] = (
        lr1[0] - (r1[0] - r2[0]) / eta,
        r2[1],
        lr2[1],
    )  # two pairs whose margins agree
    for tensor in (lr1, lr2, r1, r2):
        tensor.requires_grad_()
    dno.dno_loss(lr1, lr2, r1, r2, eta).sum().backward()
    z_hat, z = torch.sigmoid(eta * (lr1 - lr2)), torch.sigmoid(r1 - r2)
    assert (lr1.grad - eta * (z_hat - z)).abs().max() < EXACT
    assert (lr2.grad + lr1.grad).abs().max() < EXACT
    assert lr1.grad[:2].abs().max() < EXACT
    assert lr1.grad[2:].abs().min() > 1e-4 * eta
    assert r1.grad is None
    assert r2.grad is None  # no gradient through r_t


@pytest.mark.parametrize("eta", ETAS)
@games
def test_C9_for_full_support_mu_the_tabular_minimiser_is_the_target_whatever_mu(P, eta):
    """The loss is convex in the logits and strictly so up to their free constant, so a zero
    gradient identifies the minimiser; `solve` must find it from mu of both kinds; and its value is
    the mean entropy of z."""
    X, Y, _ = P.shape
    pi_t, rho = random_policy(X, Y, 0), random_rho(X, 1)
    r = dno.expected_win_rate(P, pi_t)
    target = dno.soft_policy_iteration(pi_t.log(), r, eta)
    z = torch.sigmoid(r[:, :, None] - r[:, None, :])
    entropy = -(z * z.log() + (1 - z) * (1 - z).log())
    for mu1, mu2 in [(pi_t, pi_t), (random_policy(X, Y, 5), random_policy(X, Y, 6))]:
        weight = rho[:, None, None] * mu1[:, :, None] * mu2[:, None, :]
        logits = target.clone().requires_grad_()
        log_ratio = logits.log_softmax(-1) - pi_t.log()
        losses = dno.dno_loss(
            log_ratio[:, :, None], log_ratio[:, None, :], r[:, :, None], r[:, None, :], eta
        )
        (gradient,) = torch.autograd.grad((weight * losses).sum(), logits)
        assert gradient.abs().max() < EXACT * max(1, eta)
        assert float((weight * losses).sum().detach()) == pytest.approx(
            float((weight * entropy).sum()), abs=EXACT
        )
        found = solvers.solve(P, "dno-regression", eta, 1, pi_1=pi_t, mu1=mu1, mu2=mu2).last
        assert (
            dno.total_variation(found, target.exp()).max() < 1e-8
        )  # gradient 1e-14 over curvature 1e-4, over eta 0.05


def test_C9_pairs_outside_the_support_of_D_t_teach_nothing():
    """The converse of E7: where mu has no mass the minimiser is free, so full support (or overlap)
    is needed."""
    P, mu = rock_paper_scissors().P, torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="never compared"):
        solvers.solve(P, "dno-regression", iterations=1, mu1=mu, mu2=mu)


def test_C10_at_pi_equal_pi_t_the_contrastive_loss_is_ln_2_and_so_is_the_dno_loss():
    zero, r = torch.zeros(7, dtype=torch.float64), torch.linspace(0, 1, 7, dtype=torch.float64)
    assert dno.contrastive_loss(zero, zero, 0.1).tolist() == pytest.approx(
        [math.log(2)] * 7, abs=EXACT
    )
    assert dno.dno_loss(zero, zero, r, r.flip(0), 0.1).tolist() == pytest.approx(
        [math.log(2)] * 7, abs=EXACT
    )


def test_the_contrastive_loss_is_dpo_from_its_definition_by_hand():
    """beta = 0.5, log ratios ln 9 and 0: sigma(0.5 ln 9) = 3/4, loss ln 4/3."""
    pos, neg = torch.tensor([math.log(9)], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert dno.contrastive_loss(pos, neg, 0.5).item() == pytest.approx(math.log(4 / 3), abs=EXACT)
    assert dno.contrastive_loss(neg, pos, 0.5).item() == pytest.approx(math.log(4), abs=EXACT)


# --- C17: soft and hard labels ---


@pytest.mark.parametrize("c", [1, 3, 50])
def test_C17_scaling_reward_and_eta_together_changes_nothing(c):
    P = random_feature_game(2, 9, seed=1).P
    pi_t = random_policy(2, 9, 0)
    r = dno.expected_win_rate(P, pi_t)
    same = dno.soft_policy_iteration(pi_t.log(), c * r, c * 0.3)
    assert (
        same - dno.soft_policy_iteration(pi_t.log(), r, 0.3)
    ).abs().max() < 1e-11  # logits up to 100


@pytest.mark.parametrize("c", [0.5, 1, 10, 100])
def test_C17_the_soft_loss_differs_from_the_hard_one_by_h_sigma_of_minus_c_m(c):
    generator = torch.Generator().manual_seed(0)
    m, h = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros_like(m)
    soft = dno.dno_loss(h, zero, c * m, zero, eta=1.0)
    hard = dno.contrastive_loss(h, zero, eta=1.0)
    assert (soft - hard - h * torch.sigmoid(-c * m)).abs().max() < EXACT


# --- C11, C13, E6: improvement and convergence ---


@pytest.mark.parametrize("eta", ETAS)
@games
def test_C11_a_step_improves_on_its_predecessor_by_eta_times_both_divergences(P, eta):
    X, Y, _ = P.shape
    pi_t, rho = random_policy(X, Y, 0), random_rho(X, 1)
    target = dno.soft_policy_iteration(pi_t.log(), dno.expected_win_rate(P, pi_t), eta).exp()
    improvement = dno.win_rate(P, target, pi_t, rho) - 0.5
    forward, backward = float(rho @ kl(target, pi_t)), float(rho @ kl(pi_t, target))
    assert improvement == pytest.approx(eta * (forward + backward), abs=EXACT)
    assert improvement >= eta * forward  # the paper's bound


def test_a_larger_eta_is_a_smaller_step():
    P, pi_t = random_feature_game(1, 10, seed=2).P, random_policy(1, 10, 0)
    r = dno.expected_win_rate(P, pi_t)
    moves = [
        float(dno.total_variation(dno.soft_policy_iteration(pi_t.log(), r, eta).exp(), pi_t))
        for eta in ETAS
    ]
    assert moves == sorted(moves, reverse=True)
    assert moves[0] > 10 * moves[-1]


@pytest.mark.parametrize("eta", [0.2, 1.0, 5.0])
@games
def test_C12_the_gap_of_the_average_iterate_is_within_the_no_regret_bound(P, eta):
    """C12: the average iterate is within the no regret bound and the bound for the best eta."""
    T, Y = 300, P.shape[1]
    run = solvers.solve(P, "dno", eta, T, rho=random_rho(len(P), 3))
    t = torch.arange(1, T + 1)
    assert (run.gap_average <= 2 * eta * math.log(Y) / t + 1 / (4 * eta)).all()
    best = math.sqrt(T / (8 * math.log(Y)))
    assert solvers.solve(P, "dno", best, T).gap_average[-1] <= math.sqrt(2 * math.log(Y) / T)


@pytest.mark.parametrize("eta", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("edges", [(0.4, 0.4, 0.4), (0.4, 0.3, 0.2), (0.1, 0.5, 0.2)])
def test_C13_the_divergence_from_a_full_support_nash_never_falls(edges, eta):
    """E6: improvement over the predecessor (C11) and flight from the Nash policy happen in the same
    run."""
    P = rock_paper_scissors(*edges).P
    start = torch.tensor([[0.4, 0.35, 0.25]], dtype=torch.float64)
    run, nash = solvers.solve(P, "dno", eta, max(500, int(400 * eta)), pi_1=start), dno.nash(P)
    divergences = kl(nash, run.policies)[:, 0]
    assert (divergences.diff() >= -EXACT).all()
    assert divergences[-1] > divergences[0] + 1e-4
    assert (
        run.gap_last[-len(run.gap_last) // 4 :].max() > run.gap_last.max() - 0.01 > run.gap_last[0]
    )
    assert all(dno.win_rate(P, run.policies[t + 1], run.policies[t]) > 0.5 for t in range(50))


def test_eq_4_is_exact_algorithm_1():
    """pi_{t+1} of SPO, by hand in numpy, and as the table's run of Algorithm 1 has it."""
    P, eta = random_feature_game(2, 5, seed=3).P, 0.7
    policies = solvers.solve(P, "dno", eta, 3).policies
    for pi_t, pi_next in itertools.pairwise(policies):
        weights = pi_t.numpy() * np.exp(np.einsum("xyz,xz->xy", P.numpy(), pi_t.numpy()) / eta)
        by_hand = torch.from_numpy(weights / weights.sum(1, keepdims=True))
        assert (dno.self_play(P, pi_t.log(), eta).exp() - by_hand).abs().max() < EXACT
        assert (pi_next - by_hand).abs().max() < EXACT

"""Theorem 1 (section 3.2, appendix B): its rate, its C_t, and every inequality of its proof with
explicit constants. C14, and E3, E4, E5 and E7 of docs/claims.md's list of what cannot be
taken as printed."""

import numpy as np
import pytest
import torch
from scipy.special import expit

import dno
import fits
import solvers
from benchmarks import theorem_1
from helpers.games import EXACT, games, games_of_all_sizes, random_policy, random_rho


def slope_bound(bound):
    """max (a - b) / (sigma(a) - sigma(b)) over |a| <= 1, |b| <= bound, on a grid with both corners,
    where it is attained; on the diagonal the quotient is 1 / sigma'(a)."""
    a, b = np.meshgrid(np.linspace(-1, 1, 801), np.linspace(-bound, bound, 801))
    difference, same = expit(a) - expit(b), np.abs(a - b) < 1e-9
    return np.where(same, 1 / (expit(a) * expit(-a)), (a - b) / np.where(same, 1, difference)).max()


@pytest.mark.parametrize("name", ["on-policy", "uniform", "bad"])
def test_C14_the_squared_distance_to_the_target_falls_like_one_over_N(name):
    """Ten data sets of the largest N: over 6 seeds each the slopes were -1.09 to -0.93."""
    mu, seeds = theorem_1.problem()[3][name], {1_000: 30, 10_000: 30, 100_000: 10}
    errors = [float(theorem_1.measure(mu, *of_size)[0].mean()) for of_size in seeds.items()]
    assert theorem_1.slope(tuple(seeds), errors) == pytest.approx(-1, abs=0.2)


def test_C14_a_bad_mu_needs_more_samples_as_its_larger_C_t_predicts():
    mus = theorem_1.problem()[3]
    results = {
        name: theorem_1.measure(mus[name], 10_000, seeds=30) for name in ("on-policy", "bad")
    }
    (good, good_C), (bad, bad_C) = ((errors.mean(), C.mean()) for errors, C in results.values())
    assert bad_C > 1.5 * good_C
    assert bad > 2 * good


def test_C14_with_exact_rewards_connected_pairs_suffice_for_the_exact_target():
    """z is then no random label: seven tuples that connect eight responses determine pi*_{t+1}."""
    pi_t, r_t, pi_star, _ = theorem_1.problem()
    tree = torch.zeros(2, 8, 8, dtype=torch.float64)
    tree[:, torch.arange(7), torch.arange(1, 8)] = 1
    log_ratio = (
        fits.fit_scores(torch.sigmoid(r_t[:, :, None] - r_t[:, None, :]), tree) / theorem_1.ETA
    )
    assert dno.total_variation((pi_t.log() + log_ratio).softmax(-1), pi_star).max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.3, 1.0])
@games_of_all_sizes
def test_C14_every_inequality_of_the_proof_holds_with_explicit_constants(P, eta):
    """excess loss >= 2 E(z^ - z)^2 >= 2 E(Delta - Delta*)^2 / S^2 = 2 eta^2 E_mu(d1 - d2)^2 / S^2,
    which is 2 eta^2 E_{pi*,pi}(d1 - d2)^2 / (S^2 C_t) >= 16 eta^2 E TV^2 / (S^2 C_t): so E TV^2 <=
    C_t S^2 excess / (16 eta^2)."""
    X, Y, _ = P.shape
    pi_t, mu1, mu2, rho = *(random_policy(X, Y, seed) for seed in (0, 1, 2)), random_rho(X, 3)
    r = dno.expected_win_rate(P, pi_t)
    log_star = dno.soft_policy_iteration(pi_t.log(), r, eta)
    noise = 0.5 * torch.randn(X, Y, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    log_pi = (log_star + noise).log_softmax(-1)  # some pi_{t+1} near the target

    def expect(table, p, q):
        return float(rho @ (p[:, :, None] * q[:, None, :] * table).sum((-2, -1)))

    def differences(s):
        return s[:, :, None] - s[:, None, :]

    delta, delta_star = eta * differences(log_pi - pi_t.log()), differences(r)
    z_hat, z = torch.sigmoid(delta), torch.sigmoid(delta_star)
    entropy = -(z * z.log() + (1 - z) * (1 - z).log())
    log_ratio = log_pi - pi_t.log()
    loss = dno.dno_loss(
        log_ratio[:, :, None], log_ratio[:, None, :], r[:, :, None], r[:, None, :], eta
    )
    excess = expect(loss - entropy, mu1, mu2)
    S = slope_bound(float(delta.abs().max()))
    star, pi, d = log_star.exp(), log_pi.exp(), differences(log_star - log_pi)
    C_t = solvers.concentrability(star, pi, mu1, mu2, rho)
    tv2 = float(rho @ (0.5 * (star - pi).abs().sum(-1)) ** 2)

    assert (
        expect(loss, mu1, mu2) > excess
    )  # E3: the loss itself has the entropy of z below it, the excess has 0
    assert excess >= 2 * expect(
        (z_hat - z) ** 2, mu1, mu2
    )  # Pinsker's inequality for two-point distributions
    assert (
        expect((delta - delta_star) ** 2, mu1, mu2)
        <= S**2 * expect((z_hat - z) ** 2, mu1, mu2) + EXACT
    )
    assert expect((delta - delta_star) ** 2, mu1, mu2) == pytest.approx(
        eta**2 * expect(d**2, mu1, mu2), rel=1e-9
    )
    assert C_t == pytest.approx(expect(d**2, star, pi) / expect(d**2, mu1, mu2), rel=1e-9)
    assert expect(d**2, star, pi) >= 8 * tv2
    assert tv2 <= C_t * S**2 * excess / (16 * eta**2)


@games
def test_E5_the_constant_8_is_a_lower_bound_for_any_two_policies(P):
    X, Y, _ = P.shape
    for scale in (0.01, 0.3, 1.0, 3.0):
        p, q = random_policy(X, Y, 0, scale), random_policy(X, Y, 1, scale)
        d = (p / q).log()
        squares = (p[:, :, None] * q[:, None, :] * (d[:, :, None] - d[:, None, :]) ** 2).sum(
            (-2, -1)
        )
        assert (squares >= 8 * dno.total_variation(p, q) ** 2 * (1 - EXACT)).all()


def test_E5_the_constant_8_is_tight():
    """p, q = 1/2 +- e on two responses: TV = 2e, d = +-log((1+2e)/(1-2e)), and the ratio tends to 8
    as e does to 0."""
    for e in (1e-2, 1e-3):
        p = torch.tensor([[0.5 + e, 0.5 - e]], dtype=torch.float64)
        q = p.flip(-1)
        d = (p / q).log()
        squares = (p[0, :, None] * q[0] * (d[0, :, None] - d[0]) ** 2).sum()
        assert float(squares / dno.total_variation(p, q)[0] ** 2) == pytest.approx(8, rel=10 * e**2)


def test_E4_the_printed_slope_bound_fails_for_small_eta_R_max():

    def printed(eta_R_max):
        return eta_R_max / (1 - expit(1))

    assert slope_bound(1) == pytest.approx(
        1 / (expit(1) * expit(-1)), rel=1e-12
    )  # 5.0862, at a = b = 1
    assert printed(1) == pytest.approx(3.718, abs=1e-3)  # too small
    assert slope_bound(2) == pytest.approx(
        1 / (expit(2) - expit(1)), rel=1e-12
    )  # 6.678, at a = 1, b = 2
    assert printed(2) == pytest.approx(7.437, abs=1e-3)  # holds


def test_E4_the_margin_ranges_over_twice_eta_R_max():
    """|log(pi/pi_t)| <= R on both responses allows a difference of 2R: +R on one and -R on the
    other."""
    R, eta = 0.7, 2.0
    pi_t = torch.tensor([[0.25, 0.25, 0.5]], dtype=torch.float64)
    up, down = 0.25 * np.exp(R), 0.25 * np.exp(-R)
    pi = torch.tensor([[up, down, 1 - up - down]], dtype=torch.float64)
    reward = dno.internal_reward(pi.log(), pi_t.log(), eta)
    assert (reward.abs() <= eta * R + EXACT).all()
    assert float(reward[0, 0] - reward[0, 1]) == pytest.approx(2 * eta * R, abs=EXACT)


@games
def test_E7_C_t_is_at_most_the_largest_density_ratio_of_pairs(P):
    X, Y, _ = P.shape
    star, pi, mu1, mu2 = (random_policy(X, Y, seed) for seed in (1, 2, 3, 4))
    worst = (star[:, :, None] * pi[:, None, :] / (mu1[:, :, None] * mu2[:, None, :])).max()
    assert solvers.concentrability(star, pi, mu1, mu2, random_rho(X, 5)) <= float(worst)
    same = solvers.concentrability(star, pi, star, pi)
    assert same == pytest.approx(1, abs=EXACT)  # data from the two policies compared


def test_C_t_is_undefined_without_full_support_and_nan_when_the_target_is_hit():
    pi = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    full = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    with pytest.raises(ValueError, match="full support"):
        solvers.concentrability(pi, full, full, full)
    with pytest.raises(ValueError, match="full support"):
        solvers.concentrability(full, pi, full, full)
    with pytest.raises(ValueError, match="mu1"):
        solvers.concentrability(full, full, pi * 2, full)
    assert np.isnan(solvers.concentrability(full, full, full, full))

"""Section 2: win rates, Nash policies, what a reward can and cannot express, the regularised
preference. Claims C1 to C5."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls

import checks
import dno
import fits
import regularized
import solvers
from helpers.games import EXACT, LP, games, games_of_all_sizes, random_policy, random_rho
from model import TabularPolicy
from oracle import (
    PreferenceTable,
    bradley_terry,
    random_feature_game,
    random_game,
    rock_paper_scissors,
)
from pairs import SamplingSettings


def loops(P, pi, pi_prime, rho):
    """P(pi > pi') by its definition, one term at a time."""
    X, Y, _ = P.shape
    return sum(
        float(rho[x] * pi[x, y] * pi_prime[x, z] * P[x, y, z])
        for x in range(X)
        for y in range(Y)
        for z in range(Y)
    )


@games
def test_win_rate_is_the_expectation_over_prompts_and_both_responses(P):
    X, Y, _ = P.shape
    pi, pi_prime, rho = random_policy(X, Y, 0), random_policy(X, Y, 1), random_rho(X, 2)
    assert dno.win_rate(P, pi, pi_prime, rho) == pytest.approx(
        loops(P, pi, pi_prime, rho), abs=EXACT
    )
    assert dno.win_rate(P, pi, pi_prime) == pytest.approx(
        loops(P, pi, pi_prime, torch.ones(X).double() / X), abs=EXACT
    )
    assert dno.win_rate(P, pi, pi) == pytest.approx(0.5, abs=EXACT)  # symmetric game
    assert dno.win_rate(P, pi, pi_prime, rho) + dno.win_rate(P, pi_prime, pi, rho) == pytest.approx(
        1, abs=EXACT
    )


@games_of_all_sizes
def test_duality_gap_is_best_reply_minus_worst_opponent(P):
    """Duality gap is best reply minus worst opponent and twice the best reply less one."""
    X, Y, _ = P.shape
    pi, rho = random_policy(X, Y, 3), random_rho(X, 4)
    gap = 0.0
    for x in range(X):
        wins = [float(P[x, y] @ pi[x]) for y in range(Y)]  # P(y > pi)
        losses = [float(pi[x] @ P[x, :, y]) for y in range(Y)]  # P(pi > y)
        gap += float(rho[x]) * (max(wins) - min(losses))
    assert dno.duality_gap(P, pi, rho) == pytest.approx(gap, abs=EXACT)
    assert 0 <= gap <= 1


def test_expected_win_rate_and_gap_of_weighted_rock_paper_scissors_by_hand():
    P = rock_paper_scissors(
        0.4, 0.3, 0.2
    ).P  # 1 beats 2 with .9, 2 beats 3 with .8, 3 beats 1 with .7
    pi = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    # P(1 > pi) = .25 + .27 + .06, P(2 > pi) = .05 + .15 + .16, P(3 > pi) = .35 + .06 + .10
    assert dno.expected_win_rate(P, pi)[0].tolist() == pytest.approx([0.58, 0.36, 0.51], abs=EXACT)
    assert dno.duality_gap(P, pi) == pytest.approx(2 * 0.58 - 1, abs=EXACT)


def test_the_nash_policy_of_a_float32_table_is_found():
    """Its P + P^T is 1 to 1e-7 only; Nash is that of the complementary table next to it, so its gap
    here is as small."""
    P = random_game(100, 6, seed=0).P.float()
    assert (P.double() + P.double().mT - 1).abs().max() > 1e-9
    assert (
        dno.duality_gap(P.double(), dno.nash(P)) < 2e-7
    )  # twice float32's rounding of a probability
    pi = random_policy(100, 6, 0)
    assert torch.equal(
        solvers.regularized_nash(P, pi, 0.1), solvers.regularized_nash(P.double(), pi, 0.1)
    )
    assert torch.equal(solvers.bradley_terry_fit(P, pi), solvers.bradley_terry_fit(P.double(), pi))


@games
def test_gaps_are_never_negative_and_a_float32_policy_is_good_enough(P):
    pi = random_policy(*P.shape[:2], 0)
    assert dno.duality_gap(P, dno.nash(P)) >= 0
    assert regularized.regularized_gap(P, solvers.regularized_nash(P, pi, 0.1), pi, 0.1) >= 0
    assert dno.duality_gap(P, pi.float()) == pytest.approx(
        dno.duality_gap(P, pi), abs=1e-6
    )  # float32 rounding
    assert dno.duality_gap(P.float(), pi.float()) == pytest.approx(dno.duality_gap(P, pi), abs=1e-6)


# --- C2: the symmetric game ---


@games_of_all_sizes
def test_C2_the_lp_nash_has_value_one_half_no_gap_and_complementary_slackness(P):
    """C2: the LP Nash has value one half, no gap, and satisfies complementary slackness."""
    pi = dno.nash(P)
    assert dno.duality_gap(P, pi) < LP
    best = dno.expected_win_rate(P, pi)
    assert (best <= 0.5 + LP).all()  # no response beats it
    assert (
        best[pi > 1e-6] >= 0.5 - 1e-6
    ).all()  # and what it plays is a best reply; 1e-6: LP gap over the mass played


@games
def test_C2_the_lp_nash_agrees_with_nonnegative_least_squares(P):
    """A different solver: find pi >= 0 and slack s >= 0 with A^T pi = s, sum pi = 1, by Lawson and
    Hanson's active sets. Generic games have one Nash policy, which both must find."""
    for x, A in enumerate((P - 0.5).numpy()):
        Y = len(A)
        system = np.block([[A.T, -np.eye(Y)], [np.ones((1, Y)), np.zeros((1, Y))]])
        solution, residual = nnls(system, np.append(np.zeros(Y), 1.0), maxiter=100 * Y)
        assert residual < 1e-10
        assert dno.nash(P)[x].numpy() == pytest.approx(solution[:Y], abs=1e-6)


@pytest.mark.parametrize("make", [random_game, random_feature_game])
def test_C2_the_lp_nash_of_a_hundred_games_has_no_gap_and_odd_support(make):
    """Sizes 2 to 40. Nash policies of generic symmetric zero-sum games have supports of odd size:
    on the support A pi = 0, and a generic skew-symmetric matrix of even size has no kernel.
    (Feature games of rank 8 are generic up to support 9.)"""
    for seed in range(100):
        P = make(1, 2 + seed % 39, seed).P
        pi = dno.nash(P)
        assert dno.duality_gap(P, pi) < LP
        if make is random_game:
            assert (pi > 1e-9).sum() % 2 == 1


def test_C2_a_condorcet_winner_is_the_pure_nash():
    P = random_game(2, 7, seed=5).P.clone()
    P[:, 3, :], P[:, :, 3] = 0.6, 0.4
    P[:, 3, 3] = 0.5
    assert torch.equal(dno.nash(P), torch.eye(7, dtype=torch.float64)[3].expand(2, 7))


def test_C2_a_dominated_response_has_no_mass():
    P = rock_paper_scissors().P[0]
    dominated = P[0] - 0.05  # worse than rock against everything
    P4 = torch.full((1, 4, 4), 0.5, dtype=torch.float64)
    P4[0, :3, :3], P4[0, 3, :3], P4[0, :3, 3] = P, dominated, 1 - dominated
    pi = dno.nash(P4)[0]
    assert pi[3] == 0
    assert pi[:3].tolist() == pytest.approx([1 / 3] * 3, abs=LP)


def test_C2_duplicated_responses_share_their_mass_freely():
    order = torch.tensor([0, 0, 1, 2])  # rock twice
    P = rock_paper_scissors(0.4, 0.3, 0.2).P[:, order][:, :, order]
    pi = dno.nash(P)[0]
    assert (pi[0] + pi[1], pi[2], pi[3]) == pytest.approx((0.3 / 0.9, 0.2 / 0.9, 0.4 / 0.9), abs=LP)
    for share in (0.0, 0.3, 1.0):
        split = torch.tensor([[share * 3, (1 - share) * 3, 2, 4]], dtype=torch.float64) / 9
        assert dno.duality_gap(P, split) < EXACT


@pytest.mark.parametrize(
    ("a", "b", "c"), [(0.4, 0.4, 0.4), (0.4, 0.3, 0.2), (0.05, 0.5, 0.31), (0.5, 0.01, 0.01)]
)
def test_C2_a_cycle_of_edges_a_b_c_has_nash_b_c_a_normalised(a, b, c):
    P = rock_paper_scissors(a, b, c).P
    assert (P[0, 0, 1], P[0, 1, 2], P[0, 2, 0]) == pytest.approx((0.5 + a, 0.5 + b, 0.5 + c))
    assert dno.nash(P)[0].tolist() == pytest.approx([v / (a + b + c) for v in (b, c, a)], abs=LP)


def test_C2_nash_is_a_float64_policy_whatever_the_table():
    """C2: the Nash of a float32 table and of a single response is a float64 policy."""
    found = dno.nash(
        rock_paper_scissors(0.25, 0.125, 0.5).P.float()
    )  # float32 holds these numbers exactly
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([1 / 7, 4 / 7, 2 / 7], abs=LP)
    assert dno.nash(torch.full((2, 1, 1), 0.5)).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("seed", range(3))
def test_C2_the_lp_nash_of_nearly_equal_responses_keeps_its_promise_too(seed):
    """Edges of up to 5e-7: the solver's usual tolerance of 1e-7 leaves gaps of 5e-8 and more."""
    P = 0.5 + 1e-6 * (random_game(1, 10, seed).P - 0.5)
    assert dno.duality_gap(P, dno.nash(P)) < LP


def change_solution(monkeypatch, change):
    """Let the linear program's solution of the last prompt, which is solved by itself, pass through
    a change."""
    solver = dno.linprog

    def changed(**problem):
        found = solver(**problem)
        change(found)
        return found

    monkeypatch.setattr(dno, "linprog", changed)


def test_C2_what_the_solver_leaves_below_0_is_cut_and_the_rest_sums_to_1(monkeypatch):
    P = torch.full((1, 4, 4), 0.5, dtype=torch.float64)
    P[0, :3, :3], P[0, 3, :3], P[0, :3, 3] = rock_paper_scissors().P[0], 0.1, 0.9

    def change(found):
        found.x[:3] *= 2
        found.x[3] = -0.25

    change_solution(monkeypatch, change)
    assert dno.nash(P)[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=LP)


@pytest.mark.parametrize("worse", [0, 1])
def test_C2_a_solver_that_fails_or_leaves_a_gap_in_any_prompt_is_an_error(monkeypatch, worse):
    """Mass e moved from the first response to the second of rock, paper, scissors with edges 0.4: a
    gap of 2 * 0.4 e."""
    calls = []

    def leave_a_gap(found):
        calls.append(0)
        if len(calls) == worse + 1:
            found.x[:2] += torch.tensor([-6e-8, 6e-8]).numpy()

    P = rock_paper_scissors().P.repeat(2, 1, 1)
    with monkeypatch.context() as patch:
        change_solution(patch, leave_a_gap)
        with pytest.raises(
            RuntimeError, match=r"left a duality gap of 4\.8e-08; expected below 1e-08"
        ):
            dno.nash(P)
    change_solution(monkeypatch, lambda found: found.update(success=False, message="of a test"))
    with pytest.raises(RuntimeError, match="the linear program of prompt 0 failed: of a test"):
        dno.nash(P)


# --- Newton's method ---


def test_newtons_method_halves_a_rows_step_until_its_residual_falls():
    """arctan u = 0 from 3: the step is 10 arctan 3 = 12.5; to -9.5 and -3.2 the residual grows, to
    -0.1 it falls. From 1/2 the first step is good, and no row's step is shortened for another's."""
    tried = []

    def residual(u):
        tried.append(u[:, 0].tolist())
        return u.arctan()

    start = torch.tensor([[3.0], [0.5]], dtype=torch.float64)
    root = fits.newton(residual, lambda u: (1 / (1 + u**2)).unsqueeze(-1), start, tolerance=1e-14)
    good = 0.5 - 1.25 * np.arctan(0.5)
    by_hand = [[3, 0.5], *([3 - size * 10 * np.arctan(3), good] for size in (1, 1 / 2, 1 / 4))]
    assert np.array(tried[:4]) == pytest.approx(np.array(by_hand), abs=EXACT)
    assert root.abs().max() < EXACT


def test_linear_equations_of_large_matrices_are_solved_whatever_the_threads(threads):
    """The solution is known. Elimination leaves some 1e-16 of the condition, which is below 10."""
    generator = torch.Generator().manual_seed(0)
    for X, Y in ((2, 160), (2, 216), (8, 216), (1, 600)):
        A, x = (torch.randn(X, *shape, generator=generator).double() for shape in ((Y, Y), (Y,)))
        A = A + 3 * Y**0.5 * torch.eye(Y)
        found = fits.solve_linear(A, (A * x.unsqueeze(-2)).sum(-1))
        assert (found - x).abs().max() < EXACT


def test_a_wrong_solution_of_linear_equations_is_an_error(monkeypatch):
    A, b = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1), torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(fits.solve_linear(A, b), b)
    assert torch.equal(fits.solve_linear(A, 0 * b), 0 * b)
    with pytest.raises(RuntimeError, match="linear equations are singular"):
        fits.solve_linear(A - A, b)
    solve = np.linalg.solve
    for factor, residual in ((1 + 1e-9, "5.0e-10"), (float("nan"), "nan")):
        wrong = np.ones((2, 3, 1))
        wrong[1] = factor  # of one of two systems
        monkeypatch.setattr(np.linalg, "solve", lambda A, b, wrong=wrong: wrong * solve(A, b))
        with pytest.raises(RuntimeError, match=f"left a residual of {residual}; expected at most"):
            fits.solve_linear(A, b)


def test_newtons_method_ends_at_its_tolerance_or_after_200_steps():
    """Newton's method ends when the residual is as small as wanted or after 200 steps."""
    start, one, jacobians = (
        torch.zeros(1, 2, dtype=torch.float64),
        torch.ones(1, 2, dtype=torch.float64),
        [],
    )

    def identity(u):
        jacobians.append(u)
        return torch.eye(2, dtype=torch.float64)[None]

    assert torch.equal(
        fits.newton(lambda u: u - 1, identity, start, tolerance=0.0), one
    )  # one step, from a residual of -1
    assert len(jacobians) == 1
    with pytest.raises(
        RuntimeError, match=r"left a residual of 1\.0e\+00 after 200 steps; expected 1e-14"
    ):
        fits.newton(lambda u: one, identity, start, tolerance=1e-14)
    assert len(jacobians) == 201


# --- C1, C3: rewards ---


def test_C1_the_bradley_terry_fit_of_a_cycle_under_uniform_data_learns_nothing():
    """C1: the Bradley-Terry fit of rock-paper-scissors under uniform data learns nothing."""
    assert solvers.bradley_terry_fit(rock_paper_scissors().P).abs().max() < EXACT


def test_C1_from_uneven_data_its_maximiser_is_one_response_of_gap_0_8():
    """C1: from uneven data it ranks the cycle and its maximiser is one response, of gap 0.8."""
    P, mu = rock_paper_scissors().P, torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    r = solvers.bradley_terry_fit(P, mu, mu)
    weight = (mu[0][:, None] * mu[0]).numpy()

    def loss(s):  # Eq. (1) as it stands, minimised by a general-purpose optimizer
        return sum(
            weight[i, j] * P[0, i, j].item() * np.logaddexp(0, s[j] - s[i])
            for i in range(3)
            for j in range(3)
        )

    independent = minimize(loss, np.zeros(3), tol=1e-14).x
    assert r[0].numpy() == pytest.approx(
        independent - independent.mean(), abs=1e-5
    )  # its gradient is by differences
    assert len(set(r[0].argsort().tolist())) == 3
    assert r.max() - r.min() > 0.5
    log_ref = mu.log()
    gaps = [
        dno.duality_gap(P, dno.soft_policy_iteration(log_ref, r, beta).exp())
        for beta in (1.0, 0.1, 0.01, 0.001)
    ]
    assert gaps[-1] == pytest.approx(0.8, abs=1e-9)  # a pure response loses to its counter with .9


@pytest.mark.parametrize("seed", range(5))
def test_C1_the_fit_to_intransitive_data_from_two_policies_minimises_eq_1(seed):
    """Where no reward is right, which pairs are seen decides: mu1 and mu2 differ, each pair (y1,
    y2) is labelled by P."""
    P, mu1, mu2 = (
        random_game(1, 4, seed).P,
        random_policy(1, 4, seed + 1),
        random_policy(1, 4, seed + 2),
    )
    weight, table = (mu1[0][:, None] * mu2[0]).numpy(), P[0].numpy()

    def loss(s):
        margin = s[:, None] - s[None, :]
        return (
            weight * (table * np.logaddexp(0, -margin) + (1 - table) * np.logaddexp(0, margin))
        ).sum()

    found = solvers.bradley_terry_fit(P, mu1, mu2)[0].numpy()
    assert loss(found) <= minimize(loss, np.zeros(4), tol=1e-14).fun + EXACT
    assert found.sum() == pytest.approx(0, abs=EXACT)
    for direction in np.eye(4) - 0.25:  # and nothing near it is better
        assert loss(found + 1e-3 * direction) > loss(found) < loss(found - 1e-3 * direction)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "Y"), [*((seed, 9) for seed in range(5)), (5, 160), (6, 216)])
def test_C3_under_bradley_terry_the_fit_finds_the_reward_and_nash_its_argmax(seed, Y, threads):
    """C3: if the preference is Bradley-Terry, the fit finds the reward and Nash is its argmax."""
    rewards = torch.randn(3, Y, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    P = bradley_terry(rewards).P
    assert torch.equal(dno.nash(P).argmax(-1), rewards.argmax(-1))
    assert dno.nash(P).max(-1).values.tolist() == pytest.approx([1.0] * 3, abs=LP)
    mu1, mu2 = random_policy(3, Y, seed), random_policy(3, Y, seed + 50)
    for fit in (solvers.bradley_terry_fit(P), solvers.bradley_terry_fit(P, mu1, mu2)):
        assert (
            fit - (rewards - rewards.mean(-1, keepdim=True))
        ).abs().max() < 1e-8  # gradient 1e-14 over curvature 1e-5


def test_a_preference_that_no_finite_reward_fits_is_refused():
    sure = torch.tensor([[[0.5, 1.0], [0.0, 0.5]]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no finite"):
        solvers.bradley_terry_fit(sure)
    never = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)  # response 3 is never compared
    with pytest.raises(ValueError, match="never compared"):
        solvers.bradley_terry_fit(rock_paper_scissors().P, never, never)


def test_one_prompt_that_no_finite_reward_fits_is_enough_to_be_refused():
    cycle, sure = rock_paper_scissors().P, torch.full((1, 3, 3), 0.5, dtype=torch.float64)
    sure[0, 0, 1:], sure[0, 1:, 0] = 1.0, 0.0
    even, never = (
        torch.full((1, 3), 1 / 3, dtype=torch.float64),
        torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64),
    )
    for order in ([0, 1], [1, 0]):
        with pytest.raises(ValueError, match="no finite"):
            solvers.bradley_terry_fit(torch.cat([cycle, sure])[order])
        with pytest.raises(ValueError, match="never compared"):
            solvers.bradley_terry_fit(cycle.repeat(2, 1, 1), *[torch.cat([even, never])[order]] * 2)


def test_rewards_up_to_25_apart_are_finite_and_further_ones_are_not():
    """The worse response wins with probability 4e-11 and 8e-12, whose logit Newton's tolerance of
    1e-14 leaves off by 1e-3."""
    apart = solvers.bradley_terry_fit(bradley_terry(torch.tensor([[12.0, -12.0]])).P)
    assert apart[0].tolist() == pytest.approx([12, -12], abs=1e-2)
    with pytest.raises(ValueError, match="no finite"):
        solvers.bradley_terry_fit(bradley_terry(torch.tensor([[12.75, -12.75]])).P)


def test_the_solutions_for_a_P_that_requires_gradients_are_plain_tensors():
    P, pi = random_game(2, 3, seed=0).P, random_policy(2, 3, 0)
    for function in (solvers.bradley_terry_fit, lambda P: solvers.regularized_nash(P, pi, 0.1)):
        found = function(P.clone().requires_grad_())
        assert torch.equal(found, function(P))
        assert not found.requires_grad


def test_a_single_response_has_reward_0():
    assert solvers.bradley_terry_fit(torch.full((2, 1, 1), 0.5, dtype=torch.float64)).tolist() == [
        [0.0],
        [0.0],
    ]


def test_C5_dpo_on_population_bradley_terry_data_is_minimised_by_eq_2():
    """The population DPO loss is convex in the logits, so a zero gradient at Eq. (2) is the proof;
    for uneven mu as well."""
    rewards, beta = (
        torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        0.3,
    )
    P, pi_ref, mu = bradley_terry(rewards).P, random_policy(2, 6, 2), random_policy(2, 6, 3)
    pairs = mu[:, :, None] * mu[:, None, :]

    def dpo(log_pi):
        log_ratio = log_pi - pi_ref.log()
        loss = dno.contrastive_loss(
            log_ratio[:, :, None], log_ratio[:, None, :], beta
        )  # y preferred to y'
        return (pairs * P * loss).sum()

    logits = dno.soft_policy_iteration(pi_ref.log(), rewards, beta).requires_grad_()
    (gradient,) = torch.autograd.grad(dpo(logits.log_softmax(-1)), logits)
    assert gradient.abs().max() < EXACT
    elsewhere = pi_ref.log().requires_grad_()
    assert torch.autograd.grad(dpo(elsewhere.log_softmax(-1)), elsewhere)[0].abs().max() > 1e-3


# --- C4: the regularised preference ---


@games
def test_C4_eq_6_is_the_expectation_of_eq_5(P):
    X, Y, _ = P.shape
    pi, other, ref, rho, tau = (
        *(random_policy(X, Y, seed) for seed in (1, 2, 3)),
        random_rho(X, 4),
        0.37,
    )
    a, b = (tau * (p / ref).log() for p in (pi, other))
    eq5 = P - a[:, :, None] + b[:, None, :]  # P_tau^{pi, pi'}(y > y')
    expected = float(rho @ torch.einsum("xy,xyz,xz->x", pi, eq5, other))
    assert regularized.regularized_win_rate(P, pi, other, ref, tau, rho) == pytest.approx(
        expected, abs=EXACT
    )


# --- Bad input is named ---


def test_the_first_bad_entry_of_P_is_named():
    good = random_game(2, 4, seed=0).P
    assert dno.check_preferences(good) is good
    for entry, value, message in [
        ((1, 2, 3), float("nan"), r"P\[1, 2, 3\] = nan"),
        ((0, 1, 2), 1.2, r"P\[0, 1, 2\] = 1.2; expected a probability"),
        ((0, 0, 1), -0.1, r"P\[0, 0, 1\] = -0.1"),
        ((1, 3, 3), 0.6, r"P\[1, 3, 3\] = 0.6; expected 1 - P\[1, 3, 3\] = 0.4"),
    ]:
        bad = good.clone()
        bad[entry] = value
        with pytest.raises(ValueError, match=message):
            dno.check_preferences(bad)
    bad = good.clone()
    bad[1, 0, 2] += 0.01 if bad[1, 0, 2] < 0.9 else -0.01
    with pytest.raises(ValueError, match=r"P\[1, 0, 2\]"):
        PreferenceTable(bad)
    for shape in ((4, 4), (2, 4, 3), (0, 4, 4)):
        with pytest.raises(ValueError, match="expected floating point of shape"):
            dno.check_preferences(torch.full(shape, 0.5))
    with pytest.raises(ValueError, match="int64"):
        dno.check_preferences(torch.ones(1, 2, 2, dtype=torch.int64))


def line_4(mu):
    return dno.Regression(steps=2, pairs=8, mu1=mu, mu2=mu)


OF_P = {
    "check_preferences": lambda P, pi, rho: dno.check_preferences(P),
    "PreferenceTable": lambda P, pi, rho: PreferenceTable(P).P,
    "nash": lambda P, pi, rho: dno.nash(P),
}

OF_P_AND_PI = {
    "expected_win_rate": lambda P, pi, rho: dno.expected_win_rate(P, pi),
    "bradley_terry_fit": lambda P, pi, rho: solvers.bradley_terry_fit(P, pi, pi),
    "regularized_nash": lambda P, pi, rho: solvers.regularized_nash(P, pi, 0.1),
}

OF_ALL = {
    "win_rate": lambda P, pi, rho: dno.win_rate(P, pi, pi, rho),
    "duality_gap": dno.duality_gap,
    "regularized_gap": lambda P, pi, rho: regularized.regularized_gap(P, pi, pi, 0.1, rho),
    "regularized_win_rate": lambda P, pi, rho: regularized.regularized_win_rate(
        P, pi, pi, pi, 0.1, rho
    ),
    "solve": lambda P, pi, rho: solvers.solve(P, "omwu", 0.5, 2, pi, rho=rho).gap_last,
    "dno-regression": lambda P, pi, rho: (
        solvers.solve(P, "dno-regression", 0.5, 2, pi_1=pi, rho=rho, mu1=pi, mu2=pi).gap_last
    ),
    "algorithm1": lambda P, pi, rho: (
        next(
            dno.algorithm1(TabularPolicy(2, 3), P, 0.5, 1, rho=rho, settings=line_4(pi))
        ).log_pi_next
    ),
    "algorithm3": lambda P, pi, rho: (
        next(
            regularized.algorithm3(
                TabularPolicy(2, 3), P, 0.5, 1, 0.1, rho=rho, settings=line_4(pi)
            )
        ).log_pi_next
    ),
}


def of_tables(functions):
    """Try a function of P, pi and rho, on a game of two prompts."""
    return pytest.mark.parametrize("function", functions.values(), ids=functions)


def tables():
    return random_game(2, 3, seed=0).P, random_policy(2, 3, 0), random_rho(2, 0)


@of_tables(OF_P | OF_P_AND_PI | OF_ALL)
@pytest.mark.parametrize("convert", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_tables_may_be_arrays_or_lists_to_the_same_result(function, convert):
    found, expected = function(*map(convert, tables())), function(*tables())
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@of_tables(OF_P | OF_P_AND_PI | OF_ALL)
def test_what_is_no_table_of_real_numbers_is_refused_by_name(function):
    P, pi, rho = tables()
    for bad, message in [
        (PreferenceTable(P), r"P is of type PreferenceTable; expected a tensor .*: pass its \.P$"),
        (object(), "P is of type object; expected a tensor of real numbers: pass a tensor, or"),
        ([[[0.5], [0.5, 0.5]]], "P is of type list; expected .* rows of equal length$"),
        (P + 0.1j, r"P is torch\.complex128; expected .* real numbers: pass its real part, P"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(bad, pi, rho)


@of_tables(OF_P_AND_PI | OF_ALL)
def test_a_complex_policy_is_refused(function):
    P, pi, rho = tables()
    with pytest.raises(ValueError, match=r"(pi|pi_ref|pi_1|mu) is torch\.complex128; expected"):
        function(P, pi + 0.1j, rho)


@of_tables(OF_ALL)
def test_a_complex_prompt_distribution_is_refused(function):
    P, pi, rho = tables()
    with pytest.raises(ValueError, match=r"rho is torch\.complex128; expected"):
        function(P, pi, rho + 0.1j)


def test_C_t_takes_lists_and_complex_rewards_make_no_game():
    pi_star, pi = random_policy(2, 3, 1), random_policy(2, 3, 2)
    rho = random_rho(2, 0)
    found = solvers.concentrability(*(table.tolist() for table in (pi_star, pi, pi, pi, rho)))
    assert found == solvers.concentrability(pi_star, pi, pi, pi, rho)
    with pytest.raises(ValueError, match=r"mu2 is torch\.complex128"):
        solvers.concentrability(pi_star, pi, pi, pi + 0.1j)
    with pytest.raises(ValueError, match=r"rewards is torch\.complex64"):
        bradley_terry(torch.tensor([[1 + 1j, 0.5]]))


@pytest.mark.parametrize("bad", [1e-320, 5e-39, 1e39, "1", None, 1j])
def test_a_number_that_float32_cannot_invert_or_that_is_none_is_refused(bad):
    """r / eta would be infinite, and the policy NaN."""
    (P, pi, _), error = tables(), r"(eta|tau|temperature) is .*; expected a finite number above 0"
    for function in (
        lambda: solvers.solve(P, eta=bad),
        lambda: dno.soft_policy_iteration(pi.log(), pi, bad),
        lambda: solvers.regularized_nash(P, pi, bad),
        lambda: regularized.regularized_gap(P, pi, pi, bad),
        lambda: next(dno.algorithm1(TabularPolicy(2, 3), P, bad, 1)),
        lambda: next(regularized.algorithm3(TabularPolicy(2, 3), P, bad, 1, 0.0)),
        lambda: SamplingSettings(temperature=bad),
    ):
        with pytest.raises(ValueError, match=error):
            function()


@pytest.mark.parametrize("eta", [1.2e-38, 8e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_and_the_largest_eta_that_are_accepted_leave_policies(eta, dtype):
    P = random_game(2, 3, seed=0).P.to(dtype)
    for method in ("dno", "nash-md", "omwu", "extragradient", "moving-reference"):
        assert not solvers.solve(P, method, eta, 5, tau=eta / 2).policies.isnan().any()


def test_the_entry_named_is_the_bad_one_though_sure_preferences_come_before_it():
    """0 and 1 are probabilities, and sums within a millionth of 1 are sums of 1."""
    P = torch.tensor([[[0.5, 1.0, 0.0], [0.0, 0.5, 0.3], [1.0, 0.7, 0.5]]], dtype=torch.float64)
    for entry, value in (((0, 2, 1), 1.5), ((0, 2, 1), -0.5)):
        bad = P.clone()
        bad[entry] = value
        with pytest.raises(ValueError, match=r"P\[0, 2, 1\] = "):
            dno.check_preferences(bad)
    for above in (False, True):
        bad = P.clone()
        bad[0, 0, 0] += 4e-7  # twice that is the sum's error
        bad[0, 1, 2] += 0.01 if above else -0.01
        with pytest.raises(
            ValueError, match=r"P\[0, 1, 2\] = 0\.(31|29); expected 1 - P\[0, 2, 1\] = 0\.3"
        ):
            dno.check_preferences(bad)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_may_be_off_by_a_millionth_and_no_more(sign):
    P, pi = rock_paper_scissors().P, torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    for error, fine in ((sign * 0.9e-6, True), (sign * 1.1e-6, False)):
        off = torch.tensor([[0.0, error, 0.0]], dtype=torch.float64)
        for check in (
            lambda off=off: dno.check_preferences(P + torch.diag_embed(off / 2)),
            lambda off=off: checks.check_policy(pi + off, pi.shape),
        ):
            if fine:
                check()
            else:
                with pytest.raises(ValueError, match="expected"):
                    check()


def test_bad_policies_and_prompt_distributions_are_named():
    P = random_game(2, 3, seed=0).P
    pi = random_policy(2, 3, 0)
    for bad, message in [
        (pi * torch.tensor([[1.0], [1.1]]), r"pi\[1\] has sum 1.1"),
        (
            pi - torch.tensor([[0.0], [1.0]]) * torch.tensor([1.0, -0.5, -0.5]),
            r"pi\[1\].*minimum -",
        ),
        (pi[:1], r"pi has shape \[1, 3\]; expected \[2, 3\]"),
    ]:
        for function in (
            dno.duality_gap,
            dno.expected_win_rate,
            lambda P, pi: dno.win_rate(P, pi, random_policy(2, 3, 1)),
        ):
            with pytest.raises(ValueError, match=message):
                function(P, bad)
    with pytest.raises(ValueError, match="rho"):
        dno.duality_gap(P, pi, torch.tensor([0.5, 0.6]))
    with pytest.raises(ValueError, match="rho"):
        dno.win_rate(P, pi, pi, torch.tensor([1.0]))

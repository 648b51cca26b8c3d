"""DNO's relatives: each update against its definition, which of them are one method, and where they
reach Nash. Claims about them are in docs/claims.md."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import dno
import relatives
import solvers
from helpers.games import COMAL, COMAL_START, EXACT, games, random_policy
from oracle import bradley_terry, random_game, rock_paper_scissors
from regularized import regularized_gap

ROUNDING = 1e-11  # Newton's residuals of 1e-13, times 1/eta and the size of the logarithms
RPS = rock_paper_scissors(0.4, 0.3, 0.2).P
CYCLES = [pytest.param(COMAL, id="COMAL"), pytest.param(RPS, id="RPS")]
cycles = pytest.mark.parametrize("P", CYCLES)


def one_step(P, method, eta, tau=0.0, seed=0, **more):
    """log pi_1, log pi_ref, r_1 and log pi_2 of a run from a random policy."""
    X, Y, _ = P.shape
    pi, ref = random_policy(X, Y, seed), random_policy(X, Y, seed + 1)
    run = solvers.solve(P, method, eta, 1, pi_ref=ref, tau=tau, pi_1=pi, **more)
    return pi.log(), ref.log(), (P @ pi.unsqueeze(-1)).squeeze(-1), run.last.log()


def constant(values):
    """By how much values [X, Y] differ within a row."""
    return (values.amax(-1) - values.amin(-1)).max()


def same(a, b, steps=20, **common):
    """The runs of two methods, each (name, eta, tau), from the same policies."""
    P = random_game(2, 5, seed=3).P
    pi, ref = random_policy(2, 5, 0), random_policy(2, 5, 1)
    first, second = (
        solvers.solve(P, name, eta, steps, pi_ref=ref, tau=tau, pi_1=pi, **common)
        for name, eta, tau in (a, b)
    )
    return (first.policies - second.policies).abs().max() < EXACT


# --- Which are one method -------------------------------------------------------------------------


def squares(P, pi, base, eta, mu):
    """The minimiser of INPO's loss over tables, on pairs y, y' ~ mu labelled by P:
    E[(d(y_w) - d(y_l) - 1/(2 eta))^2], d = log pi - base, by least squares."""
    n = P.shape[-1]
    rows, targets = [], []
    for y in range(n):
        for z in range(n):
            for weight, sign in ((P[y, z], 1.0), (1 - P[y, z], -1.0)):
                root = math.sqrt(mu[y] * mu[z] * weight)
                row = np.zeros(n)
                row[y] += sign * root
                row[z] -= sign * root
                rows.append(row)
                targets.append(root / (2 * eta))
    d = np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
    return (base + torch.tensor(d)).log_softmax(-1)


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_the_loss_of_inpo_is_minimised_by_dno_with_tau_on_pairs_of_pi_t(tau):
    """INPO's Eq. (8); and on pairs of another mu it fits P(y > mu), not r_t, as Eq. (8) of DNO,
    whose labels are r_t, does for any mu."""
    eta = 0.7
    log_pi, log_ref, r, after = one_step(COMAL, "dno", eta, tau)
    base = (1 - tau / eta) * log_pi + tau / eta * log_ref
    found = squares(COMAL[0].numpy(), None, base[0], eta, log_pi[0].exp().numpy())
    assert (found - after[0]).abs().max() < 1e-9  # least squares
    uniform = torch.full_like(r, 1 / 3)
    other = squares(COMAL[0].numpy(), None, base[0], eta, uniform[0].numpy())
    against_mu = base + (COMAL @ uniform.unsqueeze(-1)).squeeze(-1) / eta
    assert (other - against_mu.log_softmax(-1)[0]).abs().max() < 1e-9
    assert (other.exp() - after[0].exp()).abs().max() > 0.04
    mus = {"mu1": uniform, "mu2": uniform}
    regressed = one_step(COMAL, "dno-regression", eta, tau, **mus)[3]
    assert (regressed - after).abs().max() < 1e-9


def test_onpo_is_the_optimistic_update_after_its_first_step():
    """By hand, with pi'_t; its first step is twice as long."""
    P, eta, T = random_game(2, 5, seed=3).P, 0.8, 12
    log_pi = anchor = random_policy(2, 5, 0).log()
    expected = [log_pi.exp()]
    for _ in range(T):
        r = (P @ log_pi.exp().unsqueeze(-1)).squeeze(-1)
        anchor = (anchor + r / eta).log_softmax(-1)
        log_pi = (anchor + r / eta).log_softmax(-1)
        expected.append(log_pi.exp())
    run = solvers.solve(P, "onpo", eta, T, pi_1=expected[0])
    assert (run.policies - torch.stack(expected)).abs().max() < EXACT
    omwu = solvers.solve(P, "omwu", eta, 1, pi_1=expected[0])
    longer = solvers.solve(P, "dno", eta / 2, 1, pi_1=expected[0])
    assert (run.policies[1] - longer.last).abs().max() < EXACT
    assert (run.policies[1] - omwu.last).abs().max() > 0.01


def test_nash_mirror_prox_and_egpo_are_extragradient():
    """Nash-MP with step h and penalty beta: both half-steps maximise P/beta - KL(. || pi_ref) -
    KL(. || pi_k)/h. EGPO is written in logits with step 1/eta and its two steps from one point."""
    P, beta, h = random_game(2, 5, seed=3).P, 0.3, 0.6
    pi, ref = random_policy(2, 5, 0), random_policy(2, 5, 1)

    def prox(rewards, k):
        scores = (ref.log() + k.log() / h + rewards / beta) / (1 + 1 / h)
        return scores.softmax(-1)

    k = pi
    for _ in range(5):
        half = prox((P @ k.unsqueeze(-1)).squeeze(-1), k)
        k = prox((P @ half.unsqueeze(-1)).squeeze(-1), k)
    run = solvers.solve(P, "extragradient", beta * (1 + 1 / h), 5, ref, beta, pi_1=pi)
    assert (run.last - k).abs().max() < EXACT


def test_magnetic_mirror_descent_is_our_mixture_at_eta_plus_tau():
    """MMD with step s = 1/eta: [log pi + tau s log pi_ref + s r]/(1 + tau s)."""
    eta, tau = 0.7, 0.2
    log_pi, log_ref, r, after = one_step(random_game(2, 5, seed=3).P, "mpo", eta, tau)
    s = 1 / eta
    expected = ((log_pi + tau * s * log_ref + s * r) / (1 + tau * s)).log_softmax(-1)
    assert (after - expected).abs().max() < EXACT
    assert same(("mpo", 0.7, 0.2), ("moving-reference", 0.9, 0.2), move_reference_every=7)


# --- Each against its definition ------------------------------------------------------------------


@games
@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_nash_pg_takes_the_rewards_against_the_policy_that_results(P, eta):
    log_pi, _, _, after = one_step(P, "nash-pg", eta)
    r = (P @ after.exp().unsqueeze(-1)).squeeze(-1)
    assert constant(after - log_pi - r / eta) < ROUNDING


@pytest.mark.parametrize("eta", [0.5, 3.0])
def test_nash_pg_never_moves_away_from_nash(eta):
    for P in (COMAL, RPS, random_game(1, 7, seed=1).P):
        nash = dno.nash(P)
        policies = solvers.solve(P, "nash-pg", eta, 100).policies
        divergence = torch.xlogy(nash, nash / policies).sum(-1)[:, 0]
        assert (divergence.diff() < 1e-9).all()  # the linear program's rounding


@pytest.mark.parametrize(
    ("method", "slope"),
    [
        ("rspo-chi-square", lambda pi, ref: 2 * pi / ref),
        ("rspo-forward-kl", lambda pi, ref: -ref / pi),
    ],
)
@games
def test_rspo_is_stationary_for_its_regulariser(P, method, slope):
    """The derivative of <pi, r_t> - tau Reg(pi) - eta KL(pi || pi_t) is the same everywhere."""
    eta, tau = 0.6, 0.2
    log_pi, log_ref, r, after = one_step(P, method, eta, tau)
    assert constant(r - tau * slope(after.exp(), log_ref.exp()) - eta * (after - log_pi)) < 1e-9
    assert (one_step(P, method, eta)[3] - one_step(P, "dno", eta)[3]).abs().max() < EXACT


def test_rspo_maximises_its_objective():
    """By scipy, over logits."""
    eta, tau = 0.6, 0.2
    log_pi, log_ref, r, after = (t[0] for t in one_step(COMAL, "rspo-chi-square", eta, tau))

    def objective(u):
        log_new = torch.tensor(u).log_softmax(-1)
        new = log_new.exp()
        value = new @ r - tau * (new**2 / log_ref.exp()).sum() - eta * new @ (log_new - log_pi)
        return -float(value)

    best = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-10}).x
    assert (torch.tensor(best).softmax(-1) - after.exp()).abs().max() < 1e-5  # BFGS


@pytest.mark.parametrize(("method", "mean"), [("mnpo", True), ("mnpo-code", False)])
@pytest.mark.parametrize("tau", [0.0, 0.25])
def test_mnpo_steps_from_the_geometric_mean_of_two_policies(method, mean, tau):
    P, eta = random_game(2, 5, seed=3).P, 0.75
    pi, ref = random_policy(2, 5, 0), random_policy(2, 5, 1)
    run = solvers.solve(P, method, eta, 6, ref, tau, pi_1=pi)
    before = log_pi = pi.log()
    for found in run.policies[1:]:
        r, r_before = ((P @ log.exp().unsqueeze(-1)).squeeze(-1) for log in (log_pi, before))
        base = (1 - tau / eta) * (log_pi + before) / 2 + tau / eta * ref.log()
        step = (r + r_before) / 2 if mean else r
        before, log_pi = log_pi, (base + step / eta).log_softmax(-1)
        assert (found - log_pi.exp()).abs().max() < EXACT


def test_slhf_at_tau_0_ends_at_the_response_of_the_best_worst_case():
    """And a follower beats it: on COMAL's game with .8, a gap of .6."""
    for P in (COMAL, RPS, random_game(1, 9, seed=0).P):
        last = solvers.solve(P, "slhf", 0.5, 2000).last[0]
        assert last.argmax() == P[0].amin(-1).argmax()
        assert last.max() > 1 - 1e-6
    assert solvers.solve(COMAL, "slhf", 0.5, 2000).gap_last[-1] == pytest.approx(0.6, abs=1e-6)


def test_slhf_with_tau_ends_at_its_closed_form():
    """pi ~ pi_ref e^(V/tau), V(y) = -tau log E_{y'~pi_ref} e^(-P(y > y')/tau), by hand."""
    P, ref, tau = COMAL, COMAL_START, 0.3
    value = [
        -tau * math.log(sum(ref[0, z] * math.exp(-P[0, y, z] / tau) for z in range(3)))
        for y in range(3)
    ]
    expected = ref[0] * torch.tensor([math.exp(v / tau) for v in value], dtype=torch.float64)
    last = solvers.solve(P, "slhf", 1.0, 300, ref, tau).last[0]
    assert (last - expected / expected.sum()).abs().max() < EXACT


def test_dsppo_sees_only_the_scores_at_first_and_then_less_and_less_of_them():
    """With strength 1 the cycles have weight 0 in iteration 1, scores weight 2; without any it is
    DNO; and where all is scores, the odds are multiplied by 1 + 1/sqrt(t)."""
    eta = 0.7
    log_pi, _, _, after = one_step(COMAL, "dsppo", eta)
    odds = torch.logit(COMAL)
    f = odds.mean(-1)
    seen = torch.sigmoid(2 * (f.unsqueeze(-1) - f.unsqueeze(-2)))
    expected = log_pi + (seen @ log_pi.exp().unsqueeze(-1)).squeeze(-1) / eta
    assert (after - expected.log_softmax(-1)).abs().max() < EXACT
    plain, none = one_step(COMAL, "dno", eta)[3], one_step(COMAL, "dsppo", eta, strength=0.0)[3]
    assert (none - plain).abs().max() < EXACT
    rewards = torch.tensor([[0.3, -1.0, 0.2, 0.5]], dtype=torch.float64)
    run = solvers.solve(bradley_terry(rewards).P, "dsppo", eta, 4)
    for t in range(1, 5):
        longer = bradley_terry((1 + t**-0.5) * rewards).P
        stepped = solvers.solve(longer, "dno", eta, 1, pi_1=run.policies[t - 1]).last
        assert (stepped - run.policies[t]).abs().max() < EXACT


def in_proportion(z):
    positive = [max(value, 0.0) for value in z]
    total = sum(positive)
    return [value / total for value in positive] if total else [1 / len(z)] * len(z)


def play(P, pi, T, plus=True, predictive=False, alternating=False):
    """Regret matching by lists of numbers, pi_1..pi_{T+1}; of two players the mean of both."""
    n = len(pi)
    sums, mine, found = [[0.0] * n, [0.0] * n], [list(pi), list(pi)], [list(pi)]
    for _ in range(T):
        for player in (0, 1) if alternating else (0,):
            theirs = mine[1 - player] if alternating else mine[0]
            r = [sum(P[y][z] * theirs[z] for z in range(n)) for y in range(n)]
            value = sum(p * x for p, x in zip(mine[player], r, strict=True))
            last = [x - value for x in r]
            sums[player] = [s + x for s, x in zip(sums[player], last, strict=True)]
            if plus:
                sums[player] = [max(s, 0.0) for s in sums[player]]
            ahead = [s + x * predictive for s, x in zip(sums[player], last, strict=True)]
            mine[player] = in_proportion(ahead)
        both = mine if alternating else [mine[0], mine[0]]
        found.append([(a + b) / 2 for a, b in zip(*both, strict=True)])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "rules"),
    [
        ("regret-matching", {"plus": False}),
        ("regret-matching-plus", {}),
        ("regret-matching-plus-alternating", {"alternating": True}),
        ("predictive-regret-matching-plus", {"predictive": True}),
        ("predictive-regret-matching-plus-alternating", {"predictive": True, "alternating": True}),
    ],
)
def test_regret_matching_by_hand(method, rules):
    P, pi = random_game(1, 5, seed=3).P, random_policy(1, 5, 0)
    found = solvers.solve(P, method, iterations=30, pi_1=pi).policies[:, 0]
    assert (found - play(P[0].tolist(), pi[0].tolist(), 30, **rules)).abs().max() < 1e-10


def test_fictitious_play_by_hand():
    P, counts = RPS[0].tolist(), [1 / 3, 1 / 3, 1 / 3]
    for found in solvers.solve(RPS, "fictitious-play", iterations=30).policies[1:, 0]:
        r = [sum(P[y][z] * counts[z] for z in range(3)) for y in range(3)]
        best = r.index(max(r))
        assert found.tolist() == [float(y == best) for y in range(3)]
        counts[best] += 1


def test_the_average_of_the_alternating_methods_is_linear():
    for method in relatives.METHODS:
        run = solvers.solve(COMAL, method, 1.0, 5, pi_1=COMAL_START)
        weights = [1, 2, 3, 4, 5] if method in relatives.LINEAR else [1] * 5
        mean = sum(w * pi for w, pi in zip(weights, run.policies, strict=False)) / sum(weights)
        assert (run.average - mean).abs().max() < EXACT
        assert run.gap_average[-1] == pytest.approx(dno.duality_gap(COMAL, mean), abs=EXACT)


# --- Where they reach Nash ------------------------------------------------------------------------

NEAR = torch.tensor([[1.0, -2.0, 1.0]], dtype=torch.float64) * 1e-6  # from Nash, at the start


def flees(P, method, eta, T, centre, **more):
    """Does the last iterate flee the centre, from close by? Distances of the last eighth of the
    run beside the start's."""
    policies = solvers.solve(P, method, eta, T, pi_1=centre + NEAR, **more).policies
    distance = (policies - centre).norm(dim=-1)[-T // 8 :].max() / NEAR.norm()
    assert not 0.5 < distance < 2, "neither"
    return bool(distance > 1)


@games
def test_no_game_turns_faster_than_8_to_the_minus_a_half(P):
    pi = random_policy(*P.shape[:2], 0)
    bound = ((1 - (pi**2).sum(-1)) / 8).sqrt()
    assert (solvers.rotation_frequency(P, pi) <= bound + EXACT).all()
    assert solvers.rotation_frequency(P, dno.nash(P)).max() < 8**-0.5


def test_the_rotation_of_rock_paper_scissors_in_closed_form():
    """diag(pi) A of a 3-cycle with edges a, b, c has the eigenvalues 0 and +-i w, w^2 the sum of
    pi_y pi_z A_yz^2 over its three pairs; at Nash pi is (b, c, a)/(a + b + c) for A = edges."""
    nash = dno.nash(RPS)
    A = RPS[0] - 0.5
    squared = sum(nash[0, y] * nash[0, z] * A[y, z] ** 2 for y in range(3) for z in range(y))
    w = solvers.rotation_frequency(RPS, nash).item()
    assert w == pytest.approx(math.sqrt(squared), abs=1e-8)  # the linear program's rounding


@cycles
@pytest.mark.parametrize(
    ("method", "times"), [("omwu", 3**0.5), ("onpo", 3**0.5), ("extragradient", 1.0)]
)
def test_optimistic_methods_reach_nash_just_above_their_limit_and_flee_it_below(P, method, times):
    """eta > sqrt(3) w of the optimistic ones, eta > w of extragradient."""
    nash = dno.nash(P)
    limit = times * solvers.rotation_frequency(P, nash).item()
    assert not flees(P, method, 1.05 * limit, 2000, nash)
    assert flees(P, method, 0.95 * limit, 2000, nash)


@cycles
@pytest.mark.parametrize("tau", [0.02, 0.1])
def test_dno_with_tau_reaches_regularised_nash_above_its_limit_and_flees_it_below(P, tau):
    """eta > (w^2 + tau^2)/(2 tau)."""
    centre = solvers.regularized_nash(P, torch.full_like(P[..., 0], 1 / 3), tau)
    limit = (solvers.rotation_frequency(P, centre).item() ** 2 + tau**2) / (2 * tau)
    assert not flees(P, "dno", 1.05 * limit, 3000, centre, tau=tau)
    assert flees(P, "dno", 0.95 * limit, 3000, centre, tau=tau)


@cycles
def test_a_moving_reference_reaches_nash_below_its_limit_and_flees_it_above(P):
    """eta < tau N^2/3, to first order in the angles w/eta: within 10% at tau .1, N = 6."""
    nash, tau, N = dno.nash(P), 0.1, 6
    limit = tau * N**2 / 3
    more = {"tau": tau, "pi_ref": nash, "move_reference_every": N}
    assert not flees(P, "moving-reference", 0.9 * limit, 3000, nash, **more)
    with pytest.warns(UserWarning, match="may circle below 7"):
        assert flees(P, "moving-reference", 1.1 * limit, 3000, nash, **more)


def test_the_period_of_a_reference_is_stable_by_default_and_a_shorter_one_warned_of():
    assert [solvers.stable_period(1.0, tau) for tau in (0.0, 1.0, 0.1, 0.02)] == [6, 6, 6, 13]
    assert solvers.stable_period(3.0, 0.1) == 10
    with pytest.warns(UserWarning, match="move_reference_every is 12 at eta 1, tau 0.02"):
        solvers.solve(RPS, "moving-reference", 1.0, 2, tau=0.02, move_reference_every=12)
    default = solvers.solve(RPS, "moving-reference", 1.0, 20, tau=0.02)
    told = solvers.solve(RPS, "moving-reference", 1.0, 20, tau=0.02, move_reference_every=13)
    assert torch.equal(default.policies, told.policies)


@cycles
def test_the_bias_of_nash_md_falls_as_1_over_eta_squared(P):
    """Its fixed point is off the regularised Nash by a distance ~ 1/eta. The regularised gap, of
    second order in it, falls by 4 as eta doubles."""
    uniform, tau = torch.full_like(P[..., 0], 1 / 3), 0.1
    nash = solvers.regularized_nash(P, uniform, tau)
    last = [solvers.solve(P, "nash-md", eta, 2000, tau=tau).last for eta in (2.0, 4.0)]
    near, nearer = ((pi - nash).norm().item() for pi in last)
    assert near / nearer == pytest.approx(2, rel=0.2)
    gap, smaller = (regularized_gap(P, pi, uniform, tau) for pi in last)
    assert gap / smaller == pytest.approx(4, rel=0.4)


@cycles
@pytest.mark.parametrize(
    ("method", "share"), [("mnpo-code", 4 / 27), ("mnpo", 16 / 27), ("dno", 1.0)]
)
def test_a_history_of_two_slows_a_circle_and_never_stops_it(P, method, share):
    """The chi-square distance from Nash grows by share w^2/eta^2 a step."""
    eta, T, nash = 3.0, 3000, dno.nash(P)
    w = solvers.rotation_frequency(P, nash).item()
    policies = solvers.solve(P, method, eta, T, pi_1=nash + NEAR).policies
    distance = ((policies - nash) ** 2 / nash).sum(-1)[:, 0]
    assert distance[-500:].mean() < 1e-3, "near Nash, where the rate holds"
    rate = (distance[-500:].mean() / distance[500:1000].mean()).log().item() / (T - 1000)
    assert rate == pytest.approx(share * w**2 / eta**2, rel=0.1)


def test_onpos_average_is_within_4_D_over_T_and_not_within_4_root_D_over_T():
    """Its Theorem 2 as we read it, at eta = 1/min(1/2, sqrt(D)), D = log Y: one response that wins
    every other by .05, Y = 20. (Signs of roots may be lost in the text that we read.)"""
    Y, T = 20, 400
    P = torch.full((1, Y, Y), 0.5, dtype=torch.float64)
    P[0, 0, 1:], P[0, 1:, 0] = 0.55, 0.45
    D = math.log(Y)
    gaps = solvers.solve(P, "onpo", 2.0, T).gap_average * torch.arange(1, T + 1)
    assert 4 * math.sqrt(D) < gaps.max() < 4 * D

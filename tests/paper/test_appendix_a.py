"""Appendix A: the regularised game, Algorithm 3's two options, mixtures of policies. Claims C21
to C23."""

import pytest
import torch

import dno
import regularized
import solvers
from helpers.games import EXACT, games, games_of_all_sizes, random_policy, random_rho
from model import Config, TabularPolicy, Transformer, TransformerPolicy, chain
from oracle import random_feature_game, random_game, rock_paper_scissors

TAUS = (0.02, 0.1, 0.5, 3.0)


@pytest.mark.parametrize("tau", TAUS)
@games_of_all_sizes
def test_C22_the_nash_of_the_regularised_game_is_its_fixed_point_and_has_no_gap(P, tau):
    pi_ref = random_policy(*P.shape[:2], 0)
    pi = solvers.regularized_nash(P, pi_ref, tau)
    r = torch.einsum("xyz,xz->xy", P, pi)
    fixed_point = pi_ref * (r / tau - r.amax(-1, keepdim=True) / tau).exp()
    assert (
        pi - fixed_point / fixed_point.sum(-1, keepdim=True)
    ).abs().max() < 1e-11  # logits of up to 1/tau = 50
    assert abs(regularized.regularized_gap(P, pi, pi_ref, tau)) < 1e-11


@games
def test_C22_no_policy_beats_the_regularised_nash(P):
    """Against it nobody gets more than 1/2 in P_tau, Eq. (6); strictly less, as P_tau is strictly
    concave in the policy."""
    X, Y, _ = P.shape
    pi_ref, tau = random_policy(X, Y, 0), 0.2
    pi = solvers.regularized_nash(P, pi_ref, tau)
    for seed in range(20):
        for weight in (0.05, 1.0):
            other = (1 - weight) * pi + weight * random_policy(X, Y, seed + 1, scale=2.0)
            assert (
                regularized.regularized_win_rate(P, other, pi, pi_ref, tau, random_rho(X, 9)) < 0.5
            )


@pytest.mark.parametrize("tau", TAUS)
@games
def test_the_regularised_gap_is_twice_the_best_replys_win_rate_less_one(P, tau):
    """The best reply by the closed form of Eq. (2), its value by Eq. (6); nothing found at random
    does better."""
    X, Y, _ = P.shape
    pi, pi_ref, rho = random_policy(X, Y, 0), random_policy(X, Y, 1), random_rho(X, 2)
    best = dno.soft_policy_iteration(pi_ref.log(), dno.expected_win_rate(P, pi), tau).exp()
    gap = regularized.regularized_gap(P, pi, pi_ref, tau, rho)
    assert gap == pytest.approx(
        2 * regularized.regularized_win_rate(P, best, pi, pi_ref, tau, rho) - 1, abs=1e-11
    )
    others = [
        regularized.regularized_win_rate(P, random_policy(X, Y, s), pi, pi_ref, tau, rho)
        for s in range(3, 20)
    ]
    assert gap >= 2 * max(others) - 1
    assert gap >= 0


def test_the_regularised_gap_at_tau_0_and_at_a_large_tau():
    """At tau 0 the regularised gap is the duality gap and a large tau keeps the reference."""
    P, pi, pi_ref = random_game(2, 6, seed=0).P, random_policy(2, 6, 0), random_policy(2, 6, 1)
    assert regularized.regularized_gap(P, pi, pi_ref, 0) == dno.duality_gap(P, pi)
    assert regularized.regularized_gap(P, pi, pi_ref, 1e-6) == pytest.approx(
        dno.duality_gap(P, pi), abs=1e-4
    )
    assert dno.total_variation(solvers.regularized_nash(P, pi_ref, 1e4), pi_ref).max() < 1e-4
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tau"):
            solvers.regularized_nash(P, pi_ref, bad)
    with pytest.raises(ValueError, match="full support"):
        solvers.regularized_nash(P, torch.eye(6, dtype=torch.float64)[:2], 0.1)


def test_the_mixture_at_tau_1_by_hand_and_at_tau_0_whatever_the_reference():
    half, reference = (
        torch.tensor([[0.5, 0.5]]).double().log(),
        torch.tensor([[0.25, 1.0]]).double().log(),
    )
    found = regularized.geometric_mixture(
        half, reference, 1.0, 4.0
    ).exp()  # (1/2)^(3/4) (1/4)^(1/4) and (1/2)^(3/4)
    assert found[0].tolist() == pytest.approx([2**-1.25, 2**-0.75], abs=EXACT)
    never = torch.tensor([[0.0, -float("inf")]], dtype=torch.float64)
    assert torch.equal(regularized.geometric_mixture(half, never, 0.0, 4.0), half)
    assert torch.equal(
        regularized.geometric_mixture(never, half, 4.0, 4.0), half
    )  # 0 times log 0 is 0


@pytest.mark.parametrize("tau", [-0.5, float("inf"), float("nan")])
def test_the_regularised_gap_refuses_a_tau_below_0(tau):
    P, pi = random_game(1, 3, seed=0).P, random_policy(1, 3, 0)
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        regularized.regularized_gap(P, pi, pi, tau)


# --- C21: Algorithm 3 with exact updates ---


@pytest.mark.parametrize("eta", [0.6, 2.0, 10.0])
@games
def test_C21_option_II_contracts_to_within_2_over_eta_squared_of_regularised_nash(P, eta):
    """C21: option II contracts towards the regularised Nash up to 2/eta^2."""
    X, Y, _ = P.shape
    tau, pi_ref = 0.3, random_policy(X, Y, 0)
    goal = solvers.regularized_nash(P, pi_ref, tau)
    run = solvers.solve(P, "nash-md", eta, 60, pi_ref, tau, pi_1=random_policy(X, Y, 1))
    distance = dno.kl_divergence(goal.log(), run.policies.log())  # [T + 1, X]
    assert (distance[1:] <= (1 - tau / eta) * distance[:-1] + 2 / eta**2 + EXACT).all()


@games
def test_C21_option_II_with_the_decreasing_step_is_within_its_1_over_T_bound(P):
    """C21: option II with the decreasing step is within 8/(tau^2 (T + 1))."""
    X, Y, _ = P.shape
    tau, pi_ref = 0.5, random_policy(X, Y, 0)
    goal, pi = solvers.regularized_nash(P, pi_ref, tau), pi_ref
    for t in range(100):
        eta = max(tau, tau * (t + 2) / 2)  # 1/eta_t = min(1/tau, 2/(tau (t + 2)))
        pi = solvers.solve(P, "nash-md", eta, 1, pi_ref, tau, pi_1=pi).last
        assert (dno.kl_divergence(goal.log(), pi.log()) <= 8 / (tau**2 * (t + 2))).all()
    assert dno.kl_divergence(goal.log(), pi.log()).max() < 1e-3  # and much nearer than that


@games
def test_C21_option_I_brings_the_regularised_gap_of_the_average_iterate_to_zero(P):
    tau, pi_ref = 0.05, random_policy(*P.shape[:2], 0)
    gaps = [
        regularized.regularized_gap(
            P, solvers.solve(P, "dno", 1.0, T, pi_ref, tau).average, pi_ref, tau
        )
        for T in (1, 30, 1000)
    ]
    assert gaps[2] <= gaps[1] <= gaps[0] + EXACT
    assert gaps[2] < 0.005


def test_C21_eq_7_is_the_normalised_geometric_mixture_then_a_step_of_eq_9():
    P, pi, ref = random_game(2, 7, seed=1).P, random_policy(2, 7, 0), random_policy(2, 7, 1)
    tau, eta = 0.2, 0.8
    mixture = pi**0.75 * ref**0.25
    mixture /= mixture.sum(-1, keepdim=True)
    for method, rewards in (("nash-md", P @ mixture[:, :, None]), ("dno", P @ pi[:, :, None])):
        step = mixture * (rewards[:, :, 0] / eta).exp()
        found = solvers.solve(P, method, eta, 1, ref, tau, pi_1=pi).last
        assert (found - step / step.sum(-1, keepdim=True)).abs().max() < EXACT


def test_C21_the_loss_is_the_same_with_the_unnormalised_reference():
    """The constant log Z(x) is the same for both responses of a pair, and the loss sees only their
    difference."""
    pi, pi_t, ref = (random_policy(1, 9, seed)[0].log() for seed in range(3))
    mixture = regularized.geometric_mixture(pi_t, ref, 0.3, 0.7)
    assert abs(mixture.logsumexp(-1)) > 0.01  # not normalised
    assert (mixture - (pi_t * 4 / 7 + ref * 3 / 7)).abs().max() < EXACT
    y1, y2 = torch.triu_indices(9, 9, 1)
    r = random_policy(1, 9, 5)[0]
    losses = [
        dno.dno_loss((pi - m)[y1], (pi - m)[y2], r[y1], r[y2], 0.7)
        for m in (mixture, mixture.log_softmax(-1))
    ]
    assert (losses[0] - losses[1]).abs().max() < EXACT


@pytest.mark.parametrize("option", ["I", "II"])
def test_algorithm_3_records_the_exact_target_of_its_option(option):
    P, policy = random_feature_game(2, 6, seed=0).P, TabularPolicy(2, 6)
    with torch.no_grad():
        policy.logits.copy_(random_policy(2, 6, 1).log())
    records = list(
        regularized.algorithm3(
            policy, P, 0.5, 3, 0.2, option=option, settings=dno.Regression(steps=5, pairs=64)
        )
    )
    method = {"I": "dno", "II": "nash-md"}[option]
    pi_ref = records[0].log_pi_t.exp()
    for it in records:
        exact = solvers.solve(P, method, 0.5, 1, pi_ref, 0.2, pi_1=it.log_pi_t.exp()).last
        assert (it.log_pi_star.exp() - exact).abs().max() < EXACT
        assert torch.equal(it.log_pi_ref, records[0].log_pi_t)


@pytest.mark.parametrize("option", ["I", "II"])
def test_C21_the_regression_against_the_mixture_reaches_the_regularised_target(option):
    """Not the target of Algorithm 1, which a loss against pi_t alone would lead to."""
    P, policy = random_feature_game(2, 6, seed=0).P, TabularPolicy(2, 6)
    settings = dno.Regression(steps=100, pairs=512, learning_rate=0.05)
    records = list(
        regularized.algorithm3(policy, P, 0.25, 6, 0.2, option=option, settings=settings)
    )
    plain = [
        dno.soft_policy_iteration(it.log_pi_t, dno.expected_win_rate(P, it.log_pi_t.exp()), 0.25)
        for it in records
    ]
    assert (
        max(
            float(dno.total_variation(it.log_pi_next.exp(), it.log_pi_star.exp()).max())
            for it in records
        )
        < 0.02
    )
    assert dno.total_variation(plain[-1].exp(), records[-1].log_pi_star.exp()).max() > 0.05


def test_the_reference_moves_to_the_current_policy_when_told_to():
    P = random_feature_game(2, 6, seed=0).P
    settings = dno.Regression(steps=5, pairs=64)
    records = list(
        regularized.algorithm3(
            TabularPolicy(2, 6), P, 0.5, 5, 0.2, move_reference_every=2, settings=settings
        )
    )
    expected = [records[0].log_pi_t] + [records[1].log_pi_next] * 2 + [records[3].log_pi_next] * 2
    assert all(torch.equal(it.log_pi_ref, ref) for it, ref in zip(records, expected, strict=True))


@pytest.mark.parametrize("option", ["I", "II"])
def test_algorithm_3_rates_against_pi_t_or_the_normalised_mixture(option):
    """tau/eta = 2/5, so pi_t^tau is pi_t^(3/5) pi_ref^(2/5)."""
    P, policy = random_game(2, 4, seed=0).P, TabularPolicy(2, 4)
    with torch.no_grad():
        policy.logits.copy_(random_policy(2, 4, 1).log())
    settings = dno.Regression(steps=5, pairs=64, learning_rate=0.3)
    run = regularized.algorithm3(policy, P, 0.5, 3, 0.2, option=option, settings=settings)
    records = [next(run) for _ in range(3)]
    with pytest.raises(StopIteration) as stop:
        next(run)
    policies = [it.log_pi_t.exp() for it in records]
    for t, it in enumerate(records):
        opponent = policies[t] if option == "I" else policies[t] ** 0.6 * policies[0] ** 0.4
        opponent = opponent / opponent.sum(-1, keepdim=True)
        assert (it.r_t - torch.einsum("xyz,xz->xy", P, opponent)).abs().max() < EXACT
        assert (it.pi_bar - sum(policies[: t + 1]) / (t + 1)).abs().max() < EXACT
    assert (policies[2] - policies[0]).abs().max() > 0.01
    assert torch.equal(stop.value.value, records[-1].pi_bar)


def test_at_tau_eta_the_reference_alone_is_stepped_from():
    P, pi_ref, pi_1 = random_game(1, 4, seed=0).P, random_policy(1, 4, 0), random_policy(1, 4, 1)
    step = pi_ref * ((P @ pi_1[:, :, None])[:, :, 0] / 0.5).exp()
    assert (
        solvers.solve(P, "dno", 0.5, 1, pi_ref, 0.5, pi_1=pi_1).last - step / step.sum()
    ).abs().max() < EXACT


def test_the_regularised_nash_is_found_for_a_weak_pull_too():
    """At tau = 1e-4 logits are of order 1e4, and their rounding 1e-12."""
    P = rock_paper_scissors(0.4, 0.3, 0.2).P
    found = solvers.regularized_nash(P, torch.full((1, 3), 1 / 3, dtype=torch.float64), 1e-4)
    assert found[0].tolist() == pytest.approx(
        [3 / 9, 2 / 9, 4 / 9], abs=1e-3
    )  # that of P itself, up to order tau


def test_bad_regularisation_is_refused():
    P = random_game(1, 3, seed=0).P
    for tau, option, message in [
        (0.6, "I", "tau is 0.6"),
        (-0.1, "I", "tau"),
        (0.1, "III", "option is 'III'"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(regularized.algorithm3(TabularPolicy(1, 3), P, 0.5, 1, tau, option=option))
    for eta, iterations, message in (
        (0.0, 1, "eta is 0"),
        (-1.0, 1, "eta is -1"),
        (0.5, 0, "iterations is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            next(regularized.algorithm3(TabularPolicy(1, 3), P, eta, iterations, 0.0))
    with pytest.raises(ValueError, match="tau is 2"):
        solvers.solve(P, "nash-md", 1.0, 5, tau=2.0)


# --- C23 ---


def test_C23_mixing_token_by_token_is_not_the_sequence_level_mixture():
    """Two autoregressive policies over 4^3 sequences, mixed half and half geometrically. Token by
    token every conditional is normalised by itself; the sequence-level mixture is normalised once.
    The distance is 0 only for one token; the first token's conditional of the two differs by what
    is lost later."""
    distances = {}
    for L in (1, 3):
        policies = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = Transformer(
                Config(vocab_size=6, width=16, heads=2, kv_heads=1, hidden=32)
            ).double()
            torch.nn.init.normal_(model.head.weight, std=0.6)
            policies.append(TransformerPolicy(model, torch.tensor([[4], [5]]), V=4, L=L))
        with torch.no_grad():
            by_token = chain(
                sum(0.5 * p.next_word_log_probs() for p in policies).log_softmax(-1), 4, L
            )
            log_probs = [p.log_probs() for p in policies]
        by_sequence = regularized.geometric_mixture(*log_probs, tau=0.5, eta=1.0).log_softmax(-1)
        assert by_token.exp().sum(-1).tolist() == pytest.approx([1, 1], abs=EXACT)
        distances[L] = float(dno.total_variation(by_token.exp(), by_sequence.exp()).mean())
    print(
        f"C23: TV between the mixtures, one token {distances[1]:.1e}, "
        f"three tokens {distances[3]:.3f}"
    )
    assert distances[1] < EXACT
    assert distances[3] > 0.02

"""Algorithm 1 as a loop over policies: what line 4 samples, fits, freezes and stops at; C15; and
resumption."""

import copy
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

import dno
import regularized
import solvers
from helpers.games import EXACT, chi_square, random_policy, random_rho
from model import Config, TabularPolicy, Transformer, TransformerPolicy
from oracle import random_feature_game, rock_paper_scissors, style_game

SMALL = dno.Regression(steps=10, pairs=256)


def transformer_policy(X=2, V=3, L=2, seed=0):
    torch.manual_seed(seed)
    shape = Config(vocab_size=V + X, layers=2, width=32, heads=2, kv_heads=1, hidden=64)
    return TransformerPolicy(Transformer(shape), torch.arange(V, V + X).unsqueeze(-1), V, L)


def test_D_t_follows_rho_mu1_and_mu2():
    """200,000 tuples against rho(x) mu1(y1|x) mu2(y2|x), cell by cell; 5 standard deviations.
    Nothing of probability 0."""
    rho, mu1, mu2 = random_rho(3, 0), random_policy(3, 4, 1), random_policy(3, 4, 2)
    mu1[0] = torch.tensor([0.0, 0.5, 0.5, 0.0])
    n = 200_000
    x, y1, y2 = dno.draw_tuples(rho, mu1, mu2, n, torch.Generator().manual_seed(0))
    counts = torch.bincount((x * 4 + y1) * 4 + y2, minlength=48).view(3, 4, 4)
    expected = n * rho[:, None, None] * mu1[:, :, None] * mu2[:, None, :]
    assert (counts[expected == 0] == 0).all()
    assert abs(chi_square(counts, expected)) < 5
    x, _, _ = dno.draw_tuples(None, mu1, mu2, n, torch.Generator().manual_seed(0))
    assert abs(chi_square(torch.bincount(x), torch.full((3,), n / 3))) < 5


def test_D_t_is_a_function_of_its_generator_alone():
    """D_t is a function of its generator alone and of float32 tables as of float64 ones."""
    mu = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]])  # exact in float32
    draws = []
    for seed, table in ((0, mu), (1, mu), (2, mu.double())):
        torch.manual_seed(seed)
        draws.append(
            dno.draw_tuples(
                torch.tensor([0.25, 0.75]), table, table, 100, torch.Generator().manual_seed(5)
            )
        )
    for drawn in draws:
        assert all(part.shape == (100,) and part.dtype == torch.int64 for part in drawn)
        assert all(torch.equal(part, first) for part, first in zip(drawn, draws[0], strict=True))


def test_a_rare_response_to_the_last_of_100_000_prompts_is_drawn_as_rarely():
    """0.001 of 200,000, to 5 standard deviations of sqrt(200); where x + u is rounded to float32,
    never or four times that."""
    mu, rho = torch.tensor([[0.999, 0.001]]).expand(100_000, 2), torch.zeros(100_000)
    rho[-1] = 1
    _, y1, y2 = dno.draw_tuples(rho, mu, mu, 200_000, torch.Generator().manual_seed(0))
    assert all(abs(int(y.sum()) - 200) < 5 * 200**0.5 for y in (y1, y2))


@pytest.mark.parametrize(("u", "drawn"), [(0.0, 1), (1 - 2**-53, 2)])
def test_an_extreme_random_number_draws_a_response_with_a_probability(u, drawn, monkeypatch):
    """u = 0 is where the first response's share, which is empty, begins and ends; x + u = 3 is
    rounded, and ends the last's."""
    rho, mu = (
        torch.tensor([0.0, 0.0, 1.0]),
        torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64).expand(3, 3),
    )
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), u, dtype=torch.float64))
    x, y1, y2 = dno.draw_tuples(rho, mu, mu, 4, torch.Generator().manual_seed(0))
    assert (x.tolist(), y1.tolist(), y2.tolist()) == ([2] * 4, [drawn] * 4, [drawn] * 4)


@pytest.mark.parametrize("mu", ["on-policy", "uniform", "target", "table"])
def test_mu_is_where_the_pairs_come_from(mu, monkeypatch):
    """Spy on the tables handed to the draw: pi_t, uniform, pi*_{t+1}, or the fixed table, anew each
    iteration."""
    P, table, drawn = random_feature_game(2, 9, seed=0).P, random_policy(2, 9, 1), []
    draw = dno.draw_tuples

    def spy(rho, mu1, mu2, n, generator):
        drawn.append((mu1, mu2, n))
        return draw(rho, mu1, mu2, n, generator)

    monkeypatch.setattr(dno, "draw_tuples", spy)
    choice = table if mu == "table" else mu
    settings = dno.Regression(steps=10, pairs=256, mu1=choice, mu2="uniform")
    records = list(dno.algorithm1(TabularPolicy(2, 9), P, 0.3, 3, settings=settings))
    for it, (mu1, mu2, n) in zip(records, drawn, strict=True):
        pi_t, pi_star = it.log_pi_t.exp(), it.log_pi_star.exp()
        expected = {
            "on-policy": pi_t,
            "uniform": torch.full_like(pi_t, 1 / 9),
            "target": pi_star,
            "table": table,
        }[mu]
        assert (mu1 - expected).abs().max() < EXACT
        assert (mu2 - 1 / 9).abs().max() < EXACT
        assert n == 2560


def test_the_target_and_rewards_recorded_are_those_of_lines_3_and_4():
    P, rho = random_feature_game(2, 9, seed=1).P, random_rho(2, 0)
    records = list(dno.algorithm1(transformer_policy(), P, 0.5, 4, rho=rho, settings=SMALL))
    assert [it.t for it in records] == [1, 2, 3, 4]
    assert (
        records[0].log_pi_t.exp() - 1 / 9
    ).abs().max() < 1e-7  # line 1: pi_1 is uniform (float32 logits)
    total = torch.zeros(2, 9, dtype=torch.float64)
    for it, following in zip(records, [*records[1:], None], strict=True):
        pi_t = it.log_pi_t.exp()
        r_t = torch.einsum("xyz,xz->xy", P, pi_t)
        target = pi_t * (r_t / 0.5).exp()
        assert (it.r_t - r_t).abs().max() < EXACT
        assert (it.log_pi_star.exp() - target / target.sum(-1, keepdim=True)).abs().max() < EXACT
        total += pi_t
        assert (
            it.pi_bar - total / it.t
        ).abs().max() < EXACT  # line 6: of pi_1..pi_t, pi_{t+1} not among them
        assert following is None or torch.equal(it.log_pi_next, following.log_pi_t)
        assert not it.log_pi_next.requires_grad


def test_the_loop_returns_the_average_policy():
    loop = dno.algorithm1(TabularPolicy(1, 3), rock_paper_scissors().P, 1.0, 3, settings=SMALL)
    records = [next(loop) for _ in range(3)]
    with pytest.raises(StopIteration) as stop:
        next(loop)
    assert torch.equal(stop.value.value, records[-1].pi_bar)


def test_pi_t_stays_frozen_while_the_policy_moves():
    """The reference of line 4 is the table of before: the loss reported after a step is that of the
    moved policy against it."""
    P, policy = random_feature_game(1, 4, seed=0).P, TabularPolicy(1, 4)
    reference = dno.log_table(policy)
    r_t = dno.expected_win_rate(P, reference.exp())
    x, y1, y2 = (torch.tensor(v) for v in ([0, 0], [0, 2], [1, 3]))
    D_t = tuple(part.repeat(2) for part in (x, y1, y2))  # two steps on the same pairs
    settings = dno.Regression(steps=2, pairs=2, learning_rate=0.1)
    policy_copy = copy.deepcopy(policy)
    fit = dno.regress(policy, reference, r_t, D_t, 1.0, dno.adam(policy), settings)
    dno.regress(
        policy_copy,
        reference,
        r_t,
        tuple(part[:2] for part in D_t),
        1.0,
        dno.adam(policy_copy),
        dno.Regression(steps=1, pairs=2, learning_rate=0.1),
    )
    moved = (
        policy_copy.log_probs().detach() - reference
    )  # after the first step, and against the old table
    assert moved.abs().max() > 0.05
    z = torch.sigmoid(r_t[0, y1] - r_t[0, y2])
    margin = moved[0, y1] - moved[0, y2]
    loss = -(z * torch.sigmoid(margin).log() + (1 - z) * torch.sigmoid(-margin).log()).mean()
    assert fit["loss"] == pytest.approx(float(loss), abs=EXACT)
    assert fit["excess_loss"] == pytest.approx(
        float(loss + (z * z.log() + (1 - z) * (1 - z).log()).mean()), abs=EXACT
    )
    assert fit["steps"] == 2


def test_the_learning_rate_falls_linearly_within_an_iteration_and_starts_anew():
    policy, rates = TabularPolicy(1, 3), []
    optimizer = dno.adam(policy)
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    settings = dno.Regression(steps=4, pairs=8, learning_rate=0.1)
    start = dno.ExactStart(optimizer, torch.Generator())
    list(dno.algorithm1(policy, rock_paper_scissors().P, 1.0, 2, settings=settings, start=start))
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025] * 2)


@pytest.mark.parametrize("longest", [1e-3, 1e-2])
def test_a_step_of_line_4_is_no_longer_than_the_rate_times_the_longest_gradient(longest):
    """Plain gradient descent; from uniform logits these pairs' gradient is longer than both."""
    policy = TabularPolicy(1, 3)
    reference, r_t = dno.log_table(policy), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    D_t = torch.tensor([0, 0]), torch.tensor([0, 0]), torch.tensor([1, 2])
    settings = dno.Regression(steps=1, pairs=2, learning_rate=0.5, max_grad_norm=longest)
    dno.regress(
        policy, reference, r_t, D_t, 1.0, torch.optim.SGD(policy.parameters(), lr=9.0), settings
    )
    moved = float(policy.logits.detach().norm())
    assert moved == pytest.approx(0.5 * longest, rel=2e-3)  # PyTorch divides by the norm + 1e-6


@pytest.mark.parametrize(
    "algorithm",
    [dno.algorithm1, lambda *arguments, **named: regularized.algorithm3(*arguments, 0.1, **named)],
)
def test_without_a_generator_D_t_is_drawn_from_seed_0(algorithm):
    P, lasts = rock_paper_scissors(0.4, 0.3, 0.2).P, []
    for generator in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)):
        policy = TabularPolicy(1, 3)
        start = dno.ExactStart(dno.adam(policy), generator) if generator else None
        *_, last = algorithm(policy, P, 1.0, 2, settings=SMALL, start=start)
        lasts.append(last.log_pi_next)
    assert torch.equal(lasts[0], lasts[1])
    assert not torch.equal(lasts[0], lasts[2])


def test_line_4_stops_once_the_excess_over_the_entropy_is_below_the_tolerance():
    P = random_feature_game(1, 6, seed=0).P
    settings = dno.Regression(steps=500, pairs=512, learning_rate=0.05, tolerance=1e-6)
    for it in dno.algorithm1(TabularPolicy(1, 6), P, 0.5, 3, settings=settings):
        assert it.excess_loss < 1e-6
        assert 0 < it.steps < 500
        assert dno.total_variation(it.log_pi_next.exp(), it.log_pi_star.exp()).max() < 0.01
    generous = dno.Regression(steps=5, pairs=8, tolerance=10.0)
    (only,) = dno.algorithm1(TabularPolicy(1, 6), P, 0.5, 1, settings=generous)
    assert only.steps == 0  # met before the first step: nothing is trained
    assert torch.equal(only.log_pi_next, only.log_pi_t)


@pytest.mark.parametrize(
    ("make", "learning_rate"),
    [
        pytest.param(lambda: TabularPolicy(2, 27), 0.05, id="table"),
        pytest.param(
            lambda: transformer_policy(2, 3, 3), 0.01, id="transformer", marks=pytest.mark.slow
        ),
    ],
)
def test_C15_a_trained_policy_and_its_average_track_soft_policy_iteration(make, learning_rate):
    """One loop serves both policies. 20 iterations: TV to the target at most 0.03 on average, gap
    of the average within a quarter of the table's, and every step an improvement."""
    P, T = style_game(2, 3, 3, seed=0).P, 20
    table = solvers.solve(P, "dno", 0.5, T)
    settings = dno.Regression(steps=24, pairs=1024, learning_rate=learning_rate)
    records = list(dno.algorithm1(make(), P, 0.5, T, settings=settings))
    distances = [
        float(dno.total_variation(it.log_pi_next.exp(), it.log_pi_star.exp()).mean())
        for it in records
    ]
    assert sum(distances) / T < 0.03
    assert dno.duality_gap(P, records[-1].pi_bar) < 1.25 * float(table.gap_average[-1])
    assert dno.duality_gap(P, records[-1].pi_bar) < 0.5 * dno.duality_gap(P, table.policies[0])
    assert all(dno.win_rate(P, it.log_pi_next.exp(), it.log_pi_t.exp()) > 0.5 for it in records)


@pytest.mark.parametrize("algorithm", [1, 3])
def test_a_loop_resumed_after_any_iteration_is_the_uninterrupted_one(algorithm):
    P, T = random_feature_game(2, 9, seed=0).P, 4
    settings = dno.Regression(steps=3, pairs=64)

    def run(policy, optimizer, generator, after=None):
        common = {"settings": settings, "start": dno.ExactStart(optimizer, generator, after)}
        if algorithm == 1:
            return dno.algorithm1(policy, P, 0.5, T, **common)
        return regularized.algorithm3(policy, P, 0.5, T, 0.2, move_reference_every=2, **common)

    policy, generator = transformer_policy(), torch.Generator().manual_seed(7)
    optimizer = dno.adam(policy)
    states, whole = [], []
    for it in run(policy, optimizer, generator):
        whole.append(it)
        states.append(
            copy.deepcopy((policy.state_dict(), optimizer.state_dict(), generator.get_state(), it))
        )
    for weights, moments, dice, after in states[:-1]:
        policy, generator = transformer_policy(seed=99), torch.Generator()
        optimizer = dno.adam(policy)
        policy.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        generator.set_state(dice)
        rest = list(run(policy, optimizer, generator, after))
        assert [it.t for it in rest] == list(range(after.t + 1, T + 1))
        for resumed, original in zip(rest, whole[after.t :], strict=True):
            for name in resumed.__dataclass_fields__:
                a, b = getattr(resumed, name), getattr(original, name)
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_defaults_are_those_that_the_recorded_runs_were_made_with():
    """And cannot be changed in passing, being shared by all calls."""
    settings, optimizer = dno.Regression(), dno.adam(TabularPolicy(1, 3))
    assert asdict(settings) == {
        "steps": 24,
        "pairs": 2048,
        "learning_rate": 0.005,
        "max_grad_norm": 0.1,
        "tolerance": 0.0,
        "mu1": "on-policy",
        "mu2": "on-policy",
    }
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    with pytest.raises(FrozenInstanceError):
        settings.steps = 1


def test_bad_input_to_the_loop_is_one_clear_error():
    P = rock_paper_scissors().P
    for arguments, message in [
        ({"eta": 0.0, "iterations": 1}, "eta is 0"),
        ({"eta": 1.0, "iterations": 0}, "iterations is 0"),
        ({"eta": 1.0, "iterations": 2.5}, "iterations is 2.5; expected a whole number"),
        ({"eta": 1.0, "iterations": 1, "rho": torch.tensor([2.0])}, "rho"),
    ]:
        with pytest.raises(ValueError, match=message):
            next(dno.algorithm1(TabularPolicy(1, 3), P, settings=SMALL, **arguments))
    with pytest.raises(ValueError, match=r"pi has shape \[1, 4\]"):
        next(dno.algorithm1(TabularPolicy(1, 4), P, 1.0, 1, settings=SMALL))
    with pytest.raises(ValueError, match="mu is 'offline'"):
        dno.Regression(mu1="offline")
    for name in ("steps", "pairs", "learning_rate", "max_grad_norm"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            dno.Regression(**{name: 0})
    with pytest.raises(ValueError, match=r"steps is 2\.5; expected a whole number of at least 1"):
        dno.Regression(steps=2.5)
    with pytest.raises(ValueError, match="mu"):
        next(
            dno.algorithm1(
                TabularPolicy(1, 3), P, 1.0, 1, settings=dno.Regression(mu1=torch.ones(1, 3))
            )
        )

"""Algorithm 2, line 9: the best validated policy. C20. And going on after an interruption."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

import dno
from helpers.sampled import SMALL, Mixable, Spy, four_iterations, same, start
from model import TabularPolicy
from oracle import rock_paper_scissors

# --- C20: line 9 ---


@pytest.mark.parametrize(
    ("scores", "best"),
    [([5, 1, 2, 3], 1), ([1, 2, 5, 3], 3), ([1, 2, 3, 5], 4), ([1, 4, 2, 4], 2), ([3, 3, 3, 3], 1)],
    ids=["pi_1", "a middle one", "pi_{T+1}", "of equals the earlier", "all equal"],
)
def test_C20_the_best_validated_policy_of_pi_1_to_pi_T_plus_1_is_returned(scores, best):
    policy, states = TabularPolicy(1, 3), []

    def validate():
        states.append(policy.logits.detach().clone())
        return scores[len(states) - 1]

    run = start(
        "2", policy, rock_paper_scissors(), [0] * 4, [1] * 4, T=3, validate=validate, settings=SMALL
    )
    so_far = [next(run).best.t for _ in range(3)]
    with pytest.raises(StopIteration) as stop:
        next(run)
    returned = stop.value.value
    assert so_far == [1 + scores[:n].index(max(scores[:n])) for n in (2, 3, 4)]
    assert (returned.t, returned.score, len(states)) == (best, scores[best - 1], 4)
    assert torch.equal(returned.parameters[0], states[best - 1])
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(states, 2))


@pytest.mark.parametrize("name", ["2", "4-I", "3"])
def test_C20_every_sampled_algorithm_validates_pi_1_to_pi_T_plus_1(name):
    """C20: every algorithm with samples counts the validated policies from 1 to T + 1."""
    scores = iter([1.0, 0.0, 3.0, 2.0])
    run = start(
        name,
        TabularPolicy(1, 3),
        rock_paper_scissors(),
        [0] * 4,
        [1] * 4,
        T=3,
        settings=SMALL,
        validate=lambda: next(scores),
    )
    assert [(it.best.t, it.best.score) for it in run] == [(1, 1.0), (3, 3.0), (3, 3.0)]


# --- Going on after an interruption ---

ALGORITHMS = pytest.mark.parametrize("name", ["2", "4-I", "4-II", "3"])


@ALGORITHMS
def test_a_run_resumed_after_any_iteration_is_the_uninterrupted_one(name):
    policy, whole, states = Mixable(3, 4), [], []
    optimizer = dno.adam(policy)
    for it in four_iterations(name, policy, optimizer=optimizer):
        whole.append(it)
        states.append(copy.deepcopy((policy.state_dict(), optimizer.state_dict(), it)))
    assert all(it.steps > 0 for it in whole)
    for weights, moments, after in states[:-1]:
        resumed = Mixable(3, 4)
        optimizer = dno.adam(resumed)
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        assert same(
            list(four_iterations(name, resumed, optimizer=optimizer, after=after)), whole[after.t :]
        )
        assert same(resumed, policy)


@ALGORITHMS
def test_what_was_sampled_and_judged_is_not_done_again_if_remembered(name):
    """What was sampled and judged is asked for in order and not done again if remembered."""
    first, again, stored = Mixable(3, 4), Mixable(3, 4), {}

    def remember(t, phase, function, *arguments):
        stored[t, phase] = function(*arguments)
        return stored[t, phase]

    whole = list(four_iterations(name, first, remember=remember))
    assert list(stored) == [(t, phase) for t in (1, 2, 3, 4) for phase in ("sampled", "judged")]
    again.sample, oracle = None, SimpleNamespace(prefer=None)  # neither can be asked
    recalled = list(
        four_iterations(name, again, oracle, remember=lambda t, phase, *_: stored[t, phase])
    )
    assert same(recalled, whole)
    assert same(first, again)


@pytest.mark.parametrize(("name", "tau"), [("2", 0.0), ("4-I", 0.0), ("4-I", 0.1)])
def test_an_iteration_without_pairs_leaves_the_policy_as_it_is(name, tau):
    policy = Spy(1, 3)
    for it in start(
        name, policy, rock_paper_scissors(), [0], [1], T=2, tau=tau, rule=2.0, settings=SMALL
    ):
        assert (it.loss, it.steps, len(it.pairs), it.best.t) == (0, 0, 0, 1)
    assert (policy.logits == 0).all()

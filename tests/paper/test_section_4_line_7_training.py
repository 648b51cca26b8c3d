"""Algorithm 2, line 7: batches of pairs, replay, the regression from pi_t. C19."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

import dno
from helpers.games import EXACT, random_policy
from helpers.sampled import NAN, PLAIN, SMALL, Spy, random_pairs, start, tabular
from model import TabularPolicy
from oracle import PreferenceTable, random_game, rock_paper_scissors
from pairs import Groups, SamplingSettings, all_pairs, form_pairs, gold_against_students, join


def sgd(policy):
    return torch.optim.SGD(policy.parameters(), lr=1.0)


def with_mean(logits):
    return logits + logits.mean(0)


class Shared(Spy):
    """The mean of all prompts' logits is added to each: a step on one prompt moves them all."""

    def log_probs(self):
        return with_mean(self.logits).log_softmax(-1)


class Attached(TabularPolicy):
    """Whose recorded log-probabilities still hang on its parameters."""

    def sample(self, prompts, k, temperature=1.0, top_p=1.0, seed=0):
        y, _ = super().sample(prompts, k, temperature, top_p, seed)
        return y, self.log_probs()[prompts].gather(-1, y)


# --- The pairs as training data ---


def listed(D):
    """The pairs of D as (prompt, y+, y-); both responses must be to the same prompt, under the same
    number."""
    pairs = list(zip(D.first.tolist(), D.second.tolist(), strict=True))
    assert all(D.prompts[a] == D.prompts[b] and D.group[a] == D.group[b] for a, b in pairs)
    return [(D.prompts[a], D.responses[a], D.responses[b]) for a, b in pairs]


def test_an_epoch_has_every_pair_once_and_a_prompts_pairs_in_one_batch():
    """An epoch has every pair once a prompt's pairs in one batch and a batch's responses once."""
    D, expected, r, log_pi_t = random_pairs(7, 5)
    part = D.take(torch.tensor([2, 0]))
    batches, others = (D.batches(3, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    prompts = [{prompt for prompt, _, _ in listed(batch)} for batch in batches]
    assert listed(D) == expected
    assert listed(part) == [expected[2], expected[0]]
    assert sorted(pair for batch in batches for pair in listed(batch)) == sorted(expected)
    assert [len(batch) for batch in prompts] == [3, 3, 1]
    assert len(set.union(*prompts)) == 7
    assert prompts != [
        {prompt for prompt, _, _ in listed(batch)} for batch in others
    ]  # in random order
    for some in (D, part, *batches):
        assert sorted(some.responses) == sorted(
            {y for _, *ys in listed(some) for y in ys}
        )  # those needed, once
        assert some.r.tolist() == r.flatten()[some.responses].tolist()
        assert some.log_reference.tolist() == log_pi_t.flatten()[some.responses].tolist()


def test_joined_parts_keep_their_prompts_apart():
    """Prompts 0 and 1 occur in both parts: each stays two prompts, whose pairs need not share a
    batch."""
    (a, of_a, *_), (b, of_b, *_) = random_pairs(2, 4, seed=3), random_pairs(3, 4, seed=4)
    D = join([a, b.take(torch.arange(0)), b])
    assert listed(D) == of_a + of_b
    batches = D.batches(1, torch.Generator().manual_seed(0))
    apart = [
        [pair for pair in pairs if pair[0] == x]
        for pairs, X in ((of_a, 2), (of_b, 3))
        for x in range(X)
    ]
    assert sorted(map(listed, batches)) == sorted(apart)


def test_prompts_of_three_parts_are_all_kept_apart():
    parts = [random_pairs(2, 4, seed=seed)[0] for seed in (3, 4, 5)]
    D = join(parts)
    assert sorted(set(D.group.tolist())) == list(range(6))
    assert len(D.batches(1, torch.Generator().manual_seed(0))) == 6
    assert listed(D) == [pair for part in parts for pair in listed(part)]


def test_prompts_without_pairs_leave_gaps_in_which_no_other_prompt_falls():
    """The parts have pairs of the prompts 0 and 5, 1 and 3, and 4 only: five different prompts."""
    groups = Groups(list("abcdef"), [["x", "y"]] * 6, torch.zeros(6, 2))
    r = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    parts = [
        form_pairs(groups, r, torch.tensor([[x, 0, 1] for x in which]))
        for which in ([0, 5], [1, 3], [4])
    ]
    D = join(parts)
    assert len(D.group[D.first].unique()) == 5
    batches = D.batches(1, torch.Generator().manual_seed(0))
    assert sorted(x for batch in batches for x in set(batch.prompts)) == list("abdef")
    assert all(len(set(batch.prompts)) == 1 for batch in batches)


def test_finding_the_reference_leaves_the_pairs_as_they_were():
    policy, (D, *_) = tabular(random_policy(2, 8, 0)), random_pairs(2, 4)
    missing = replace(D, log_reference=torch.full_like(D.log_reference, NAN))
    found = dno.with_reference(missing, policy)
    assert missing.log_reference.isnan().all()
    assert (found.log_reference - policy.log_prob(D.prompts, D.responses)).abs().max() < EXACT


@pytest.mark.parametrize(
    ("back", "counts"),
    [
        (4, [[20], [20, 6], [20, 6, 3], [20, 6, 3, 1], [20, 6, 3, 1]]),
        (1, [[20], [20, 6], [20, 6], [20, 6], [20, 6]]),
    ],
)
def test_replay_takes_at_most_30_percent_of_the_last_pairs_then_15_and_so_on(back, counts, fitted):
    """20 new pairs an iteration, of prompts of its own: 6 of t - 1, 3 of t - 2, 1 (of 1.5) of t -
    3, 0 (of .75) of t - 4. Their reference is what pi_t says of them, not what was recorded when
    they were sampled. Only new pairs are kept for later."""
    policy = TabularPolicy(20, 3)
    settings = SamplingSettings(
        samples=5, replay_iterations=back, prompts_per_step=4, learning_rate=0.1, **PLAIN
    )
    run = dno.algorithm2(
        policy,
        random_game(20, 3, seed=0),
        lambda t: (list(range(4 * t - 4, 4 * t)), [2] * 4),
        1.0,
        5,
        gold_against_students,
        lambda: 0.0,
        settings=settings,
    )
    for it, expected in zip(run, counts, strict=True):
        D, log_pi_t = fitted[-1]
        ages = [it.t - 1 - prompt // 4 for prompt, _, _ in listed(D)]
        assert [ages.count(age) for age in range(max(ages) + 1)] == expected
        assert (D.log_reference - log_pi_t[D.prompts, D.responses]).abs().max() < EXACT
        kept = [
            {(len(pairs.first), prompt // 4) for prompt in pairs.prompts} for pairs in it.earlier
        ]
        assert kept == [{(20, it.t - 1 - age)} for age in range(min(back, it.t))]
    assert policy.logits.abs().max() > 0.1  # it does move


def test_a_response_is_scored_once_a_batch_however_many_its_pairs():
    """6 responses a prompt make 15 pairs. Before the epoch pi_t scores the gold responses, whose
    log_pi_t nobody recorded."""
    policy, settings = Spy(8, 4), SamplingSettings(samples=5, prompts_per_step=3, **PLAIN)
    it = next(
        start(
            "2",
            policy,
            random_game(8, 4, seed=0),
            list(range(8)),
            [3] * 8,
            settings=settings,
            rule=lambda r, usable: all_pairs(r),
        )
    )
    assert (len(it.pairs), it.steps, policy.scored) == (8 * 15, 3, [8, 18, 18, 12])


# --- C19: line 7 ---


def dpo(logits, reference, pairs, beta):
    """The mean DPO loss by its definition, in probabilities; logits and reference policy [X, Y],
    pairs (x, y+, y-)."""
    pi = logits.exp() / logits.exp().sum(-1, keepdim=True)
    x, pos, neg = torch.tensor(pairs).T
    odds = (pi[x, pos] / reference[x, pos]) ** beta / (pi[x, neg] / reference[x, neg]) ** beta
    return -(odds / (1 + odds)).log().mean()


def dpo_gradient(parameters, *rest, logits_of=lambda logits: logits):
    parameters = parameters.clone().requires_grad_()
    return torch.autograd.grad(dpo(logits_of(parameters), *rest), parameters)[0]


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_C19_eq_13_and_one_step_on_it_are_dpo_with_reference_pi_t_and_beta_eta(beta):
    policy, reference = tabular(random_policy(2, 5, 0)), random_policy(2, 5, 1)
    pairs = [[0, 0, 1], [0, 0, 2], [0, 3, 4], [1, 4, 0], [1, 1, 0]]
    before, (x, pos, neg) = policy.logits.detach().clone(), torch.tensor(pairs).T
    log_ratio = before.log_softmax(-1) - reference.log()
    expected, gradient = (
        float(dpo(before, reference, pairs, beta)),
        dpo_gradient(before, reference, pairs, beta),
    )
    assert float(
        dno.contrastive_loss(log_ratio[x, pos], log_ratio[x, neg], beta).mean()
    ) == pytest.approx(expected, abs=EXACT)
    groups = Groups([0, 1], [list(range(5))] * 2, reference.log())
    D = form_pairs(groups, torch.zeros(2, 5, dtype=torch.float64), torch.tensor(pairs))
    norm = float(gradient.norm())
    for longest, step, tolerance in [
        (1e9, gradient, EXACT),
        (norm / 2, gradient / 2, 1e-5 * norm),
    ]:  # PyTorch: norm + 1e-6
        policy.logits.data.copy_(before)
        settings = SamplingSettings(**{**PLAIN, "max_grad_norm": longest})
        fit = dno.fit_pairs(
            policy, D, dno.hard_targets(beta), sgd(policy), settings, 0.25, torch.Generator()
        )
        chosen = pytest.approx(float(log_ratio[x, pos].mean()), abs=EXACT)
        assert fit == {
            "loss": pytest.approx(expected, abs=EXACT),
            "steps": 1,
            "chosen_log_ratio": chosen,
        }
        assert (policy.logits - (before - 0.25 * step)).abs().max() < tolerance


@pytest.mark.parametrize("name", ["2", "4-I"])
@pytest.mark.parametrize("per_step", [2, 99])
@pytest.mark.parametrize("replay", [0.0, 1.0])
def test_C19_an_iteration_is_dpo_from_pi_t_on_new_and_replayed_pairs(
    replay, per_step, name, fitted
):
    """Plain gradient descent, a step for each batch of prompts. Every batch refers to the pi_t
    of before the first step (Algorithm 4: its mixture with pi_1), for pairs of earlier iterations
    too. Every iteration has prompts of its own."""
    policy, eta, tau = Shared(9, 4), 0.7, 0.2
    policy.logits.data = random_policy(9, 4, 0).log()
    logits, log_pi_1 = policy.logits.detach().clone(), policy.log_probs().detach()
    settings = SamplingSettings(
        samples=4,
        replay=replay,
        prompts_per_step=per_step,
        learning_rate=3.0,
        learning_rate_decay=0.5,
        **PLAIN,
    )
    prompts = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    run = start(
        name,
        policy,
        random_game(9, 4, seed=1),
        lambda t: (prompts[t - 1], [0, 1, 2]),
        eta=eta,
        T=3,
        tau=tau,
        every=0,
        settings=settings,
        optimizer=sgd(policy),
    )
    for it, rate in zip(run, [3.0, 2.25, 1.5], strict=True):  # falls by half over the iterations
        (D, log_pi), chosen, own = fitted[-1], it.pairs.tolist(), prompts[it.t - 1]
        pairs, ys = listed(D), it.groups.responses
        assert pairs[: len(chosen)] == [(own[x], ys[x][i], ys[x][j]) for x, i, j in chosen]
        assert {x // 3 for x, _, _ in pairs} == set(range(it.t) if replay else [it.t - 1])
        log_reference = log_pi if name == "2" else log_pi * 5 / 7 + log_pi_1 * 2 / 7
        batches, losses, before = policy.trained[-it.steps :], [], logits
        assert sorted(itertools.chain(*batches)) == sorted({x for x, _, _ in pairs})
        assert [len(batch) for batch in batches[:-1]] == [per_step] * (it.steps - 1)
        assert it.steps >= (2 if per_step == 2 else 1)
        for step, batch in enumerate(batches):
            part = [pair for pair in pairs if pair[0] in batch]
            given = (log_reference.exp(), part, eta)
            losses.append(float(dpo(with_mean(logits), *given)) * len(part))
            gradient = dpo_gradient(logits, *given, logits_of=with_mean)
            logits = logits - rate * (1 - step / len(batches)) * gradient
        assert (policy.logits - logits).abs().max() < EXACT
        assert (logits - before).abs().max() > 0.02
        assert it.loss == pytest.approx(sum(losses) / len(pairs), abs=EXACT)
        if per_step == 99 and name == "2":  # one step, from where the loss is ln 2 (C10)
            assert it.loss == pytest.approx(math.log(2), abs=EXACT)


@pytest.mark.parametrize("name", ["2", "3", "4-I"])
def test_the_order_of_the_batches_is_drawn_anew_in_every_iteration(name):
    """The order of the batches is drawn anew in every iteration and for every seed."""
    orders = []
    for seed in (0, 1, 0):
        policy = Spy(8, 3)
        settings = replace(SMALL, prompts_per_step=1, replay=0.0, seed=seed)
        run = start(
            name,
            policy,
            random_game(8, 3, seed=0),
            list(range(8)),
            [0] * 8,
            T=4,
            rule=gold_against_students,
            settings=settings,
        )
        assert [it.steps for it in run] == [8] * 4
        order = [x for (x,) in policy.trained]
        orders.append([order[8 * t : 8 * t + 8] for t in range(4)])
    assert all(sorted(order) == list(range(8)) for order in orders[0] + orders[1])
    assert all(a != b for a, b in itertools.combinations(orders[0] + orders[1], 2))
    assert orders[0] == orders[2]


def test_pi_t_stays_frozen_during_the_epoch():
    """The same pair under two prompts, a batch each: the second sees the moved policy against the
    reference of before."""
    policy, reference, seen = tabular(random_policy(1, 3, 0)), random_policy(1, 3, 5).log(), []
    groups = Groups([0, 0], [[0, 1]] * 2, reference[:, :2].expand(2, 2))
    D = form_pairs(groups, torch.zeros(2, 2), torch.tensor([[0, 0, 1], [1, 0, 1]]))

    def loss(log_ratio1, log_ratio2, r1, r2):
        seen.append((policy.log_probs().detach().clone(), log_ratio1.item(), log_ratio2.item()))
        return dno.contrastive_loss(log_ratio1, log_ratio2, 1.0)

    fit = dno.fit_pairs(
        policy,
        D,
        loss,
        sgd(policy),
        SamplingSettings(**PLAIN, prompts_per_step=1),
        0.5,
        torch.Generator(),
    )
    assert (seen[1][0] - seen[0][0]).abs().max() > 0.05
    for log_pi, *log_ratios in seen:
        assert log_ratios == pytest.approx((log_pi - reference)[0, :2].tolist(), abs=EXACT)
    losses = [math.log1p(math.exp(b - a)) for _, a, b in seen]
    chosen = pytest.approx(seen[1][1], abs=EXACT)  # of the last batch
    assert fit == {
        "loss": pytest.approx(sum(losses) / 2, abs=EXACT),
        "steps": 2,
        "chosen_log_ratio": chosen,
    }


def test_what_is_recorded_of_a_sample_is_pi_t_whatever_the_temperature_and_top_p():
    policy = tabular(random_policy(3, 6, 0))
    groups = dno.sample_groups(
        policy,
        [0, 1, 2, 1],
        [5, 4, 3, 2],
        SamplingSettings(samples=8, temperature=0.7, top_p=0.9),
        seed=1,
    )
    assert [(len(ys), ys[-1]) for ys in groups.responses] == [(9, 5), (9, 4), (9, 3), (9, 2)]
    for x, ys, recorded in zip(groups.prompts, groups.responses, groups.log_pi_t, strict=True):
        assert (recorded[:8] - policy.log_prob([x] * 8, ys[:8])).abs().max() < EXACT
        assert recorded[8].isnan()  # the gold response's is not known yet
    unequal = tabular(torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64))
    for likeliest_only in ({"top_p": 0.5}, {"temperature": 0.01}):
        groups = dno.sample_groups(
            unequal, [0], None, SamplingSettings(samples=20, **likeliest_only), seed=0
        )
        assert groups.responses == [[0] * 20]
        assert (groups.log_pi_t.exp() - 0.6).abs().max() < EXACT


@pytest.mark.parametrize("kind", [TabularPolicy, Attached])
def test_no_gradient_flows_through_pi_t_nor_r_t(kind):
    """At pi = pi_t, eta = 1, the gradient of Eq. (8) is that of (1/2 - z) log pi(y1)/pi(y2).
    Through pi_t as well it were 0."""
    P, policy = rock_paper_scissors(0.1, 0.2, 0.3).P.clone().requires_grad_(), kind(1, 3)
    settings = SamplingSettings(samples=4, **PLAIN)
    it = next(
        start(
            "3",
            policy,
            PreferenceTable(P),
            [0] * 5,
            tau=0.0,
            settings=settings,
            optimizer=sgd(policy),
        )
    )
    expected = torch.zeros(3, dtype=torch.float64)
    for x, i, j in it.pairs.tolist():
        z, (y1, y2) = (
            torch.sigmoid(it.r_t[x, i] - it.r_t[x, j]).detach(),
            (it.groups.responses[x][k] for k in (i, j)),
        )
        expected[y1] += (0.5 - z) / len(it.pairs)
        expected[y2] -= (0.5 - z) / len(it.pairs)
    assert (policy.logits.grad[0] - expected).abs().max() < EXACT
    assert expected.abs().max() > 1e-3
    assert P.grad is None


def test_the_learning_rate_falls_within_an_iteration_and_from_one_to_the_next():
    """The learning rate falls to 0 within an iteration and by its share from one to the next."""
    policy, rates = TabularPolicy(4, 3), []
    optimizer = dno.adam(policy)
    step = optimizer.step
    optimizer.step = lambda: (rates.append(optimizer.param_groups[0]["lr"]), step())
    settings = SamplingSettings(
        samples=3,
        prompts_per_step=2,
        learning_rate=0.1,
        learning_rate_decay=0.8,
        replay=0.0,
        **PLAIN,
    )
    list(
        start(
            "2",
            policy,
            random_game(4, 3, seed=0),
            [0, 1, 2, 3],
            [0] * 4,
            T=3,
            rule=gold_against_students,
            settings=settings,
            optimizer=optimizer,
        )
    )
    assert rates == pytest.approx([0.1, 0.05, 0.06, 0.03, 0.02, 0.01])


def test_the_learning_rate_of_iteration_t_by_hand():
    settings = SamplingSettings(learning_rate=0.1, learning_rate_decay=0.8)
    assert [settings.rate(t, 3) for t in (1, 2, 3)] == pytest.approx([0.1, 0.06, 0.02])
    assert [settings.rate(t, 2) for t in (1, 2)] == pytest.approx([0.1, 0.02])
    assert settings.rate(1, 1) == pytest.approx(0.1)


def test_the_loss_of_a_single_pair_is_its_own():
    """At pi = pi_t it is ln 2, Eq. (13)."""
    policy = TabularPolicy(1, 2)
    D = form_pairs(
        Groups([0], [[0, 1]], policy.log_probs().detach()),
        torch.zeros(1, 2),
        torch.tensor([[0, 0, 1]]),
    )
    fit = dno.fit_pairs(
        policy,
        D,
        dno.hard_targets(1.0),
        sgd(policy),
        SamplingSettings(**PLAIN),
        0.1,
        torch.Generator(),
    )
    assert fit == {"loss": pytest.approx(math.log(2), abs=EXACT), "steps": 1, "chosen_log_ratio": 0}

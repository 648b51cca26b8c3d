"""The ablations: each method is the one that its name says."""

import csv
import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

import dno
import regularized
import train
from experiments.ablation_methods import (
    METHODS,
    Start,
    dno_lookahead,
    dno_practical,
    dno_restrictive,
    dno_without_margin,
    offline_dpo,
    regularized_dno,
    sft_on_positives,
    soft_targets_moving_reference,
    spin,
)
from experiments.ablations import run_method
from experiments.ablations_settings import AblationsConfig, settings_to_try
from experiments.ablations_summary import summarise_ablations
from experiments.judging import Judging, demonstrations
from experiments.rounds import METRICS, RULES, Round, Stage, columns
from experiments.settings import parse
from experiments.validation import KINDS, TableValidation
from helpers.runs import refused
from helpers.text_runs import JUDGE, MARGIN, ROUNDING, TEXTS, VIVID, K, policy_of, same
from pairs import SamplingSettings
from world import HELD_OUT

# float64 log-probabilities of the same response, read alone, in a batch, or while it was sampled
pytestmark = pytest.mark.slow


DOUBLE = 1e-9


@pytest.fixture
def begin(text_run):
    """Makes what a method is given: the small run's fine-tuned policy in float64, 8 prompts an
    iteration, 2 iterations."""

    def make(iterations=2, margin=MARGIN, prompts=8, **practice):
        settings = SamplingSettings(
            **{
                "temperature": 1.0,
                "top_p": 1.0,
                "learning_rate": 0.01,
                "prompts_per_step": 3,
                "seed": 5,
                **practice,
            }
        )
        policy = policy_of(text_run, "base", dtype="float64")
        validation = TableValidation(policy, list(HELD_OUT), 2, 0, [TEXTS[VIVID]] * 24)
        data, rule = demonstrations(5, prompts), RULES["large-margin"](margin)
        stage = Stage(2, iterations, 8.0, 0.0, "I", 0, rule, 0.0, settings)
        return Start(policy, data, validation, stage, margin, None, JUDGE)

    return make


@pytest.fixture
def fitted(monkeypatch):
    """The (policy, pairs) of every call of fit_pairs."""
    calls, fit_pairs = [], dno.fit_pairs

    def spy(policy, D, *arguments):
        calls.append((policy, D))
        return fit_pairs(policy, D, *arguments)

    monkeypatch.setattr(dno, "fit_pairs", spy)
    monkeypatch.setattr(regularized, "fit_pairs", spy)
    return calls


def triples(D):
    """How often each (prompt, first, second) is among the pairs."""
    pairs = zip(D.first.tolist(), D.second.tolist(), strict=True)
    return Counter((D.prompts[i], D.responses[i], D.responses[j]) for i, j in pairs)


def chosen(it):
    """The same of an iteration's new pairs."""
    responses = it.groups.responses
    return Counter(
        (it.groups.prompts[x], responses[x][i], responses[x][j]) for x, i, j in it.pairs.tolist()
    )


def off(log_probs, policy, D):
    """By how much log-probabilities of the responses differ from the policy's at most."""
    with torch.no_grad():
        return (log_probs - policy.log_prob(D.prompts, D.responses)).abs().max().item()


@pytest.mark.parametrize("label", METHODS)
def test_every_method_trains_pi_1_and_validates_it_first_and_later(label, begin):
    """Every method trains pi_1 and has it validated first and after each iteration."""
    start = begin()
    before = [parameter.clone() for parameter in start.policy.parameters()]
    its = list(METHODS[label][1](start))
    assert [it.t for it in its] == [1, 2]
    assert all(it.steps > 0 for it in its)
    assert len(start.validation.shares) == 3
    assert not same(before, list(start.policy.parameters()))
    hard = label != "soft targets, moving reference"
    played = replace(start.stage, algorithm=METHODS[label].algorithm)
    row = columns(Round(its[-1], played, Judging(JUDGE)), METRICS)
    assert ("student_wins" in row) == hard


def test_of_spin_the_pairs_are_gold_over_each_student_and_nothing_else(begin):
    for it in spin(begin()):
        assert it.pairs.tolist() == [[x, K, student] for x in range(8) for student in range(K)]
        gold = demonstrations(5, 8)(it.t)[1]
        assert [ys[K] for ys in it.groups.responses] == gold


def test_of_restrictive_the_pairs_are_those_of_dno_in_which_the_teacher_is_first(begin):
    its, dno_1 = list(dno_restrictive(begin())), next(dno_practical(begin()))
    assert its[0].pairs.tolist() == [pair for pair in dno_1.pairs.tolist() if pair[1] == K]
    for it in its:
        assert len(it.pairs) > 0
        assert all(first == K and second < K for _, first, second in it.pairs.tolist())
    assert len(its[0].pairs) < len(dno_1.pairs)


def test_without_a_margin_all_of_dnos_pairs_are_there_and_others_below_the_margin(begin):
    without, practical = (next(method(begin())) for method in (dno_without_margin, dno_practical))
    assert without.groups.responses == practical.groups.responses
    assert same(without.r_t, practical.r_t)
    lead = {
        (x, i, j): (without.r_t[x, i] - without.r_t[x, j]).item()
        for x, i, j in without.pairs.tolist()
    }
    assert {pair for pair, margin in lead.items() if margin >= MARGIN - ROUNDING} == set(
        map(tuple, practical.pairs.tolist())
    )
    assert 0 < min(lead.values()) < MARGIN - 0.1  # win rates of five games lie .2 apart


@pytest.mark.parametrize("method", [offline_dpo, sft_on_positives])
def test_offline_samples_and_reference_are_those_of_pi_1_in_every_iteration(method, begin, fitted):
    start, untouched = begin(), begin().policy
    for t, it in enumerate(method(start), 1):
        sampled, _ = untouched.sample(
            start.data(t)[0], K, seed=dno.random_numbers(start.stage.settings.seed, t)[0]
        )
        assert [ys[:K] for ys in it.groups.responses] == sampled
        D = fitted[-1][1]
        assert triples(D) == chosen(it)  # nothing is replayed
        assert off(D.log_reference, untouched, D) < DOUBLE
    assert off(D.log_reference, start.policy, D) > 0.1  # it has moved away from its reference


def test_on_policy_samples_and_reference_are_those_of_pi_t(begin, fitted):
    start, untouched, pi_2 = begin(), begin().policy, begin().policy
    its = dno_practical(start)
    next(its)
    pi_2.load_state_dict(start.policy.state_dict())
    it, D = next(its), fitted[-1][1]
    sampled, _ = pi_2.sample(
        start.data(2)[0], K, seed=dno.random_numbers(start.stage.settings.seed, 2)[0]
    )
    assert [ys[:K] for ys in it.groups.responses] == sampled
    assert off(D.log_reference, pi_2, D) < DOUBLE
    assert off(D.log_reference, untouched, D) > 0.1


def test_the_step_of_sft_on_positives_is_along_their_likelihood(begin, monkeypatch):
    """One step of plain gradient descent at rate 1, so the difference of the weights is the
    gradient of the mean over pairs."""
    monkeypatch.setattr(
        dno, "adam", lambda policy, momentum: torch.optim.SGD(policy.parameters(), lr=math.nan)
    )
    start, pi_1 = (
        begin(1, learning_rate=1.0, max_grad_norm=1e9, prompts_per_step=100),
        begin().policy,
    )
    (it,) = sft_on_positives(start)
    times = Counter((x, i) for x, i, _ in it.pairs.tolist())
    assert len(set(times.values())) > 1, "some are the better one of more pairs than others"
    for (x, i), n in times.items():
        log_prob = pi_1.log_prob([it.groups.prompts[x]], [it.groups.responses[x][i]]).sum()
        (-n / len(it.pairs) * log_prob).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in pi_1.parameters())
    for before, after in zip(pi_1.parameters(), start.policy.parameters(), strict=True):
        assert (before - after - before.grad).abs().max() < DOUBLE * largest


def test_lookahead_trains_pi_1_on_each_pair_of_dno_once_in_another_order(begin, fitted):
    """Lookahead trains pi_1 on each pair that DNO comes to see once and in another order."""
    seen = [chosen(it) for it in dno_practical(begin())]
    fitted.clear()
    start, pi_1 = begin(), begin().policy
    assert len(list(dno_lookahead(start))) == 2
    parts = [D for policy, D in fitted if policy is start.policy]
    assert sum((triples(D) for D in parts), Counter()) == seen[0] + seen[1]
    for D in parts:
        assert off(D.log_reference, pi_1, D) < DOUBLE
        assert triples(D) & seen[0]
        assert triples(D) & seen[1]


def test_lookahead_has_as_many_iterations_as_the_others_however_few_its_pairs(begin):
    start = begin(4, prompts=2, margin=0.9)
    assert len(list(dno_lookahead(start))) == 4


def test_soft_targets_look_at_no_teacher_and_at_as_many_responses_as_the_others(begin):
    gold = {y for t in (1, 2) for y in demonstrations(5, 8)(t)[1]}
    start = begin()
    for it in soft_targets_moving_reference(start):
        assert [len(ys) for ys in it.groups.responses] == [K + 1] * 8
        assert not gold & {y for ys in it.groups.responses for y in ys}
        assert it.pairs.tolist() == [
            [x, i, j] for x in range(8) for i in range(6) for j in range(i + 1, 6)
        ]


def test_regularised_dno_mixes_pi_1_into_the_reference_after_iteration_1(begin, fitted):
    """tau = eta / 20 by default. In iteration 1 both references are pi_1."""
    first = next(dno_practical(begin()))
    start, pi_1, pi_2 = begin(), begin().policy, begin().policy
    its = regularized_dno(start)
    assert chosen(next(its)) == chosen(first)
    pi_2.load_state_dict(start.policy.state_dict())
    next(its)
    (_, D_dno), (_, D_1), (_, D_2) = fitted
    assert (D_dno.log_reference - D_1.log_reference).abs().max() < DOUBLE
    with torch.no_grad():
        mixed = 0.95 * pi_2.log_prob(D_2.prompts, D_2.responses) + 0.05 * pi_1.log_prob(
            D_2.prompts, D_2.responses
        )
    assert (D_2.log_reference - mixed).abs().max() < DOUBLE
    assert off(D_2.log_reference, pi_2, D_2) > 0.01


def test_each_method_may_try_equally_many_settings():
    tried = settings_to_try(AblationsConfig())
    assert set(tried) == set(METHODS)
    assert {len(set(settings)) for settings in tried.values()} == {4}
    assert set(settings_to_try(AblationsConfig(algorithm=4))) == {"regularised DNO"}


def test_the_ablations_write_what_they_promise_and_do_not_repeat_finished_runs(capsys, tmp_path):
    out = tmp_path / "run"
    sizes = (
        "--iterations 2 --seeds 2 --tuning-iterations 1 --tuning-seeds 1 --prompts 3 --survey 2 "
        "--sft-steps 1"
    )
    arguments = ["ablations", "--algorithm", "4", *sizes.split(), "--out", str(out)]
    assert train.main(arguments) == 0
    names = {
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != "jobs"
    }
    files = {"config.json", "tokenizer.json", "ablations.csv", "ablations.png", "summary.json"}
    assert names == files | {"policies/base.pt", "checkpoint/state.pt"}
    summary = json.loads((out / "summary.json").read_text())["methods"]["regularised DNO"]
    assert len(summary["tuning"]) == 4
    table = list(csv.DictReader((out / "ablations.csv").open()))
    assert [(row["method"], row["seed"], row["iteration"]) for row in table] == [
        ("regularised DNO", seed, t) for seed in "01" for t in "12"
    ]
    assert {(float(row["lr"]), float(row["eta"])) for row in table} == {
        (summary["lr"], summary["eta"])
    }
    config = parse(arguments[1:], AblationsConfig, "train.py ablations")
    here = run_method(config, "regularised DNO", summary["lr"], summary["eta"], 1, 2)
    assert [{name: str(value) for name, value in row.items()} for row in here] == table[2:]

    jobs = sorted((out / "jobs").iterdir())
    assert len(jobs) == 4 + 2
    before, csv_before = (
        {job: (job.stat().st_mtime_ns, job.read_text()) for job in jobs},
        (out / "ablations.csv").read_bytes(),
    )
    assert "add --resume" in refused(capsys, *arguments)
    jobs[0].unlink()
    assert train.main([*arguments, "--resume"]) == 0
    assert jobs[0].read_text() == before[jobs[0]][1]
    assert [job for job in jobs if job.stat().st_mtime_ns != before[job][0]] == [jobs[0]]
    assert (out / "ablations.csv").read_bytes() == csv_before


def test_the_summary_of_the_ablations_by_hand():
    """Three iterations, so the last counts; two seeds, so the half width is tan(.475 pi) half the
    distance of the two."""

    def curve(*late):
        names = (
            "gap_last",
            "gap_average",
            "share_malformed",
            "sampled_words",
            "best_of_n",
            "student_wins",
        )
        kinds = dict.fromkeys(f"pairs_{kind}" for kind in KINDS)
        return [
            [
                {**dict.fromkeys([*names, *kinds], t), "win_rate_vs_teacher": 0 if t < 3 else value}
                for t in (1, 2, 3)
            ]
            for value in late
        ]

    curves = {
        "DNO": curve(0.60, 0.64),
        "DNO-Restrictive": curve(0.50, 0.54),
        "SPIN": curve(0.55, 0.59),
        "offline DPO": curve(0.50, 0.70),
        "DNO without margin": curve(0.60, 0.64),
    }
    scores = {label: {(1e-3, 2.0): 0.5, (1e-3, 8.0): 0.6} for label in curves}
    config = replace(AblationsConfig(), iterations=3, seeds=2)
    summary = summarise_ablations(config, curves, scores, dict.fromkeys(curves, (1e-3, 8.0)))
    row = summary["methods"]["DNO"]
    assert row["win_rate_vs_teacher"] == pytest.approx((0.62, 0.02 * math.tan(0.475 * math.pi)))
    assert row["gap_last"] == pytest.approx((3, 0))
    assert (row["lr"], row["eta"], list(row["tuning"].values())) == (1e-3, 8.0, [0.5, 0.6])
    verdicts = {
        (o["better"], o["worse"]): (o["difference"], o["verdict"]) for o in summary["orderings"]
    }
    assert verdicts == {
        ("DNO", "DNO-Restrictive"): (pytest.approx(0.1), "holds"),
        ("DNO-Restrictive", "SPIN"): (pytest.approx(-0.05), "the other way round"),
        ("DNO", "offline DPO"): (pytest.approx(0.02), "not decided"),
        ("DNO", "DNO without margin"): (pytest.approx(0.0), "not decided"),
    }
    assert [
        (line["method"], line["iteration"], line["sampled_words"]) for line in summary["table_2"]
    ] == [(label, t, t) for label in ("DNO-Restrictive", "DNO") for t in (1, 3)]

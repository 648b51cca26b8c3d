"""The preset "text": fine-tuning on the small world of text, then Algorithm 2 and a regression."""

from __future__ import annotations

import json
import time

import torch

import dno
from experiments.costs import announce_costs, training_comparisons, validation_comparisons
from experiments.fine_tuning import fine_tuned
from experiments.folder import Run
from experiments.judging import Judging, answered, demonstrations, held_out_gold, judging
from experiments.rounds import METRICS, Round, Row, Stage
from experiments.sampled_summary import summarise
from experiments.settings import check_device
from experiments.text_settings import TextConfig
from experiments.training import CLASSES_KEPT, Work, show_before_and_after, train_stages
from experiments.validation import JudgedValidation, TableValidation, Validation
from oracle import RegisterJudge
from text import TextPolicy
from world import CLASSES, HELD_OUT, PROMPTS, TRAINING, classify


def run_text(config: TextConfig) -> None:
    """The preset "text": see `TextConfig`. docs/runs.md lists what it writes."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    check_device(config.device)
    config, asked = judging(config)
    run = None if config.dry_run else Run("text", config, CLASSES_KEPT)
    announce_text(config, asked)
    if run is None:
        return
    policy = fine_tuned(config, run)
    parameters, tokens = sum(p.numel() for p in policy.parameters()), policy.tokenizer.n_vocab
    print(
        f"{parameters:,} parameters, {tokens} tokens; "
        f"fine-tuned after {time.perf_counter() - start:.0f} s. Writing to {config.out}"
    )
    validation = validation_of(config, policy, asked)
    validation()
    first = first_numbers(validation)
    stages = config.stages()
    train_stages(work_of(config, run, policy, asked, validation), stages)
    show_before_and_after(validation)
    summary = {**summarise(config, stages, run.metrics, first), **asked.spending()}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    from experiments.sampled_figures import sampled_figure  # here, as it imports matplotlib

    run.figure("text.png", sampled_figure, stages, run.metrics, first)
    print(f"\n{time.perf_counter() - start:.0f} s. Figure and metrics: {run.out}")


def announce_text(config: TextConfig, asked: Judging) -> None:
    """Say what the run will ask, and what it will cost at most. A teacher's response may be the
    longest."""
    words = asked.teacher.max_tokens if asked.teacher else config.max_new_tokens
    first, later = (
        validation_comparisons(HELD_OUT, config.judged, words, opponents)
        for opponents in (["teacher"], ["teacher", "previous"])
    )
    comparisons = [(first, 1)]
    for stage in config.stages():
        n = stage.settings.samples + stage.hard
        training = training_comparisons(TRAINING[: config.prompts], n, words)
        comparisons += [(training, stage.iterations), (later, stage.iterations)]
    announce_costs(config, asked, comparisons, PROMPTS)


def validation_of(config: TextConfig, policy: TextPolicy, asked: Judging) -> Validation:
    """How the run's policies are measured: by table where the judge is one."""
    prompts, gold = list(HELD_OUT), held_out_gold(config.seed)
    if asked.teacher:
        prompts, gold = answered(asked.teacher, prompts)
    if isinstance(asked.judge, RegisterJudge):
        return TableValidation(policy, prompts, config.survey, config.seed, gold)
    seed, judge = config.seed + 1, asked.judge
    return JudgedValidation(policy, prompts, config.judged, seed, judge, gold, registers=True)


def first_numbers(validation: Validation) -> Row:
    """The numbers of pi_1, which are printed; with the noise floor where gaps are defined."""
    first = dict(validation.numbers[0])
    well_formed = 1 - first["share_malformed"]
    won = f"P(> teacher) {first['win_rate_vs_teacher']:.3f}, well-formed {well_formed:.3f}"
    print(f"pi_1: {won}", end="")
    if isinstance(validation, TableValidation):
        first["gap_floor"] = validation.floor
        print(f", gap {first['gap_last']:.3f} +- {first['gap_last_interval']:.3f}")
        nash_won = dno.win_rate(validation.P, validation.nash, validation.teacher)
        teacher_gap = dno.duality_gap(validation.P, validation.teacher)
        print(
            f"Exact Nash: gap {first['gap_nash']:.0e}, measured as here {validation.floor:.3f} "
            f"(the noise floor);\nP(Nash > teacher) {nash_won:.3f}, gap of the teacher "
            f"{teacher_gap:.3f}",
            end="",
        )
    print()
    return first


def work_of(
    config: TextConfig, run: Run, policy: TextPolicy, asked: Judging, validation: Validation
) -> Work:
    """What the algorithms are given. Those with soft targets do not look at gold responses, so that
    none are paid for."""

    def data(stage: Stage) -> dno.Data:
        return demonstrations(config.seed, config.prompts, asked.teacher if stage.hard else None)

    def dropped(round: Round) -> Row:
        prompts = len(round.it.groups.prompts)
        return {"prompts_dropped": config.prompts - prompts} if asked.asked else {}

    def label(response: str) -> Row:
        return {"class": CLASSES[classify(response)]}

    metrics = (*METRICS, dropped)
    return Work(run, policy, asked, asked.judge, data, validation, metrics, label, True)


PRESET = (TextConfig, run_text)

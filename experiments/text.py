"""The preset "text": fine-tuning on the small world of text, then Algorithm 2 and a regression."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import dno
from experiments.figures import STYLE
from experiments.fine_tuning import fine_tuned
from experiments.folder import Run, like
from experiments.judging import Judging, judging
from experiments.rounds import (
    CLASSES_KEPT,
    RULES,
    Remember,
    bare,
    judged_numbers,
    recalling,
    round_numbers,
    without_nan,
    write_round,
)
from experiments.settings import BadInput, check_device
from experiments.text_costs import announce_judging
from experiments.text_settings import Stage, TextConfig
from experiments.text_summary import summarise_text, text_figure
from experiments.validation import KINDS, JudgedValidation, Validation
from oracle import RegisterJudge
from regularized import algorithm3_sampled, algorithm4
from text import TextPolicy
from world import CLASSES, classify


@dataclass(frozen=True)
class TextRun:
    """What the algorithms of a run share."""

    config: TextConfig
    run: Run
    judging: Judging
    policy: TextPolicy
    validation: Validation
    base: dict[str, Tensor]  # of pi_1


def run_text(config: TextConfig) -> None:
    """The preset "text": see `TextConfig`. README.md lists what it writes, under "The folder of a
    run"."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    check_device(config.device)
    asked = judging(config)
    run = None if config.dry_run else Run("text", config, CLASSES_KEPT)
    announce_judging(config, asked)
    if run is None:
        return
    policy = fine_tuned(config, run)
    parameters, tokens = sum(p.numel() for p in policy.parameters()), policy.tokenizer.n_vocab
    print(
        f"{parameters:,} parameters, {tokens} tokens; "
        f"fine-tuned after {time.perf_counter() - start:.0f} s. Writing to {config.out}"
    )
    validation = validation_of(config, policy, asked)
    base = copy.deepcopy(policy.state_dict())
    validation()
    first = validation.first()
    show_responses(validation)
    stages, begun = config.stages(), run.state.get("stage", 0) if run.state else 0
    if begun >= len(stages):
        fault = f"the checkpoint in {run.out} is of a run with more algorithms than this"
        raise BadInput(f"{fault}; choose another --out")
    shared = TextRun(config, run, asked, policy, validation, base)
    for number in range(begun, len(stages)):
        train_stage(shared, number)
    summary = {**summarise_text(config, run.metrics, first), **asked.spending()}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("text.png", text_figure(config, run.metrics, first))
    print(f"\n{time.perf_counter() - start:.0f} s. Figure and metrics: {run.out}")


def validation_of(config: TextConfig, policy: TextPolicy, judging: Judging) -> Validation:
    """How the run's policies are measured."""
    if config.oracle != "synthetic":
        return JudgedValidation(policy, judging, config)
    return Validation(policy, RegisterJudge(), config.survey, config.seed, judging.teacher)


# --- An algorithm ---------------------------------------------------------------------------------


def train_stage(shared: TextRun, number: int) -> None:
    """Run one algorithm from the fine-tuned policy or the run's last checkpoint on, a line and a
    checkpoint an iteration."""
    stages, run, validation = shared.config.stages(), shared.run, shared.validation
    stage, before = stages[number], sum(earlier.iterations for earlier in stages[:number])
    shared.policy.load_state_dict(shared.base)
    optimizer = dno.adam(shared.policy, momentum=0.0)
    after = restored(shared, number, optimizer)

    def remember(t: int, phase: str, *call: Any) -> Any:
        return run.remember([number, t], phase, *call)

    loop = stage_loop(shared, stage, dno.SampledStart(optimizer, after), remember)
    tau = f", tau {stage.tau:g}" if stage.tau else ""
    print(f"\nAlgorithm {stage.algorithm}, eta {stage.eta:g}{tau}:")
    print(f"    t | {validation.HEADER} | well-formed | words |  T>S  S>T  S>S | loss")
    start = time.perf_counter()
    done, T = after.t if after else 0, stage.iterations
    progress = tqdm(total=T, initial=done, unit="iteration", disable=None, leave=False)
    for it in loop:
        row = stage_row(shared, stage, it, before, time.perf_counter() - start)
        write_iteration(shared, number, it, row, optimizer)
        progress.update()
        tqdm.write(console_line(validation, row, stage.hard))
        if it.t % 10 == 0:
            show_responses(validation)
        start = time.perf_counter()
    progress.close()


def stage_loop(
    shared: TextRun, stage: Stage, start: dno.SampledStart, remember: Remember
) -> Iterator[dno.SampledIteration]:
    """The generator of the stage's algorithm."""
    config, validate, T = shared.config, shared.validation, stage.iterations
    settings, moves = config.sampling(stage), stage.move_reference_every
    data = shared.judging.data(config, stage.hard)
    policy, oracle, data = recalling(shared.policy, shared.judging.judge, data, remember)
    if not stage.hard:
        return algorithm3_sampled(
            policy,
            oracle,
            data,
            stage.eta,
            T,
            validate,
            stage.tau,
            move_reference_every=moves,
            settings=settings,
            start=start,
        )
    rule = RULES[config.rule](config.margin)
    if stage.algorithm == 2:
        return dno.algorithm2(
            policy, oracle, data, stage.eta, T, rule, validate, settings=settings, start=start
        )
    return algorithm4(
        policy,
        oracle,
        data,
        stage.eta,
        T,
        rule,
        validate,
        stage.tau,
        option=config.option,
        move_reference_every=moves,
        settings=settings,
        start=start,
    )


def stage_row(
    shared: TextRun, stage: Stage, it: dno.SampledIteration, before: int, seconds: float
) -> dict[str, Any]:
    """The row of an iteration in metrics.jsonl; before: iterations of the stages before."""
    return {
        "iteration": before + it.t,
        "algorithm": stage.algorithm,
        "t": it.t,
        "seconds": seconds,
        **round_numbers(it, stage.hard),
        **shared.validation.row(),
        "best_iteration": it.best.t,
        **judged_numbers(it, shared.config, shared.judging, stage.hard),
    }


def write_iteration(
    shared: TextRun,
    number: int,
    it: dno.SampledIteration,
    row: dict[str, Any],
    optimizer: torch.optim.Optimizer,
) -> None:
    """The files of an iteration, its policy, its row, and the checkpoint that `restored` reads."""
    run, policy, iteration = shared.run, shared.policy, row["iteration"]
    hard = shared.config.stages()[number].hard
    rated = "score" if shared.config.judgments == "scores" else "win_rate"
    write_round(run, iteration, it, hard, rated)
    run.keep(f"policies/{iteration:03d}.pt", policy.state_dict())
    state = {
        "stage": number,
        "policy": policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "round": replace(it, pi_ref=None),
        "pi_ref": bare(it.pi_ref).state_dict() if it.pi_ref else None,
        "validation": shared.validation.state(),
    }
    run.save(without_nan(row), state)


def restored(
    shared: TextRun, number: int, optimizer: torch.optim.Optimizer
) -> dno.SampledIteration | None:
    """The iteration of this stage to go on after, with policy, optimizer and validation as they
    were then; None at its start."""
    state, policy, validation = shared.run.state, shared.policy, shared.validation
    validation.restore(None)
    if not state or state.get("stage") != number:
        return None
    wanted = {
        "policy": policy.state_dict(),
        "optimizer": like(optimizer),
        "round": dno.SampledIteration,
        "pi_ref": dict | None,
        "validation": {name: type(value) for name, value in validation.state().items()},
    }
    shared.run.expect(state, wanted)
    policy.load_state_dict(state["policy"])
    optimizer.load_state_dict(state["optimizer"])
    pi_ref = copy.deepcopy(policy)
    if state["pi_ref"]:
        pi_ref.load_state_dict(state["pi_ref"])
    validation.restore(state["validation"])
    return replace(state["round"], pi_ref=pi_ref)


# --- The console ----------------------------------------------------------------------------------


def console_line(validation: Validation, row: dict[str, Any], hard: bool) -> str:
    """An iteration's row, under the heading that `train_stage` prints."""
    kinds = " ".join(f"{row[f'pairs_{kind}']:4d}" for kind in KINDS) if hard else " " * 14
    well_formed, words = 1 - row["share_malformed"], row["mean_length"]
    numbers = f"{well_formed:11.3f} | {words:5.1f} | {kinds} | {row['loss']:.4f}"
    dollars = f" | ${row['dollars']:.4f}" if row.get("dollars") is not None else ""
    return f"{row['t']:5d} | {validation.line(row)} | {numbers}{dollars}"


def show_responses(validation: Validation) -> None:
    """Print one response of each class that the survey found."""
    found = {
        classify(y): (x, y)
        for x, ys in zip(validation.prompts, validation.responses, strict=True)
        for y in ys
    }
    for kind, (x, y) in sorted(found.items()):
        tqdm.write(f"         {CLASSES[kind]:9} {x} -> {y!r}")


PRESET = (TextConfig, run_text)

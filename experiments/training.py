"""The loop of all presets with sampled responses: algorithms one after the other, with rows, files,
checkpoints and lines on the console."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

import dno
from chat.processes import part_of, whole
from chat.team import Team
from experiments.folder import Run, like
from experiments.judging import Judging
from experiments.recalling import followed, recalling
from experiments.rounds import (
    METRICS,
    Metric,
    Round,
    Row,
    Stage,
    columns,
    without_nan,
    write_round,
    written,
)
from experiments.validation import Validation, alarms
from judge.ledger import Stopped, for_terminal
from pairs import Groups, Pairs
from text import Response, TextPolicy

# what checkpoints of runs with sampled responses hold besides tensors and plain values
CLASSES_KEPT = (dno.SampledIteration, Groups, Pairs, dno.Best, Response)


@dataclass(frozen=True)
class Work:
    """What the stages of a run share."""

    run: Run
    policy: TextPolicy  # or a chat.policy.ChatPolicy
    judging: Judging
    oracle: dno.Preferences  # the judge, as the processes of a team share it
    data: Callable[[Stage], dno.Data]
    validation: Validation
    metrics: Sequence[Metric] = METRICS
    label: Callable[[str], Row] = lambda response: {}  # further fields of responses-TTT.jsonl
    keep_policies: bool = False  # policies/TTT.pt of each iteration?


def train_stages(work: Work, stages: Sequence[Stage]) -> dno.SampledIteration:
    """Run the stages one after the other, each from pi_1, or from the run's checkpoint on. Returns
    the last iteration."""
    begun = work.run.state.get("stage", 0) if work.run.state else 0
    if begun >= len(stages):
        raise work.run.foreign("it is of a run with more algorithms")
    print(f"\n{LEGEND}")
    for number in range(begun, len(stages)):
        last = train(work, stages, number)
    return last


def train(work: Work, stages: Sequence[Stage], number: int) -> dno.SampledIteration:
    """Run a stage: a row, a line and a checkpoint an iteration. Returns the last iteration."""
    run, policy, validation, stage = work.run, work.policy, work.validation, stages[number]
    before = sum(earlier.iterations for earlier in stages[:number])
    policy.load(validation.pi_1)
    optimizer = dno.adam(policy, stage.momentum)
    it = restored(work, number, optimizer)
    tau = f", tau {stage.tau:g}" if stage.tau else ""
    print(f"\nAlgorithm {stage.algorithm}, eta {stage.eta:g}{tau}:")
    progress = progress_bar(stage.iterations, it)
    remember = followed(run, number, progress, optimizer)
    given = recalling(policy, work.oracle, work.data(stage), remember)
    loop = stage.loop(*given, validation, dno.SampledStart(optimizer, it))
    start, headed = time.perf_counter(), False
    try:
        for it in loop:
            counted = {"iteration": before + it.t, "algorithm": stage.algorithm, "t": it.t}
            seconds, round = time.perf_counter() - start, Round(it, stage, work.judging)
            row = {**counted, "seconds": seconds, **row_of(validation, round, work.metrics)}
            save(work, number, round, row, optimizer)
            show(row, headed)
            progress.update()
            start, headed = time.perf_counter(), True
    except dno.NotFinite as error:
        run.write_lines("not-finite.jsonl", written(error.batch.prompts, error.batch.responses))
        where = f"its batch is in {run.out}/not-finite.jsonl"
        raise Stopped(f"{error}; {where}; a smaller --lr may help") from error
    finally:
        progress.close()
    assert it is not None  # a stage has at least one iteration
    return it


def row_of(validation: Validation, round: Round, metrics: Sequence[Metric] = METRICS) -> Row:
    """The columns of a round: of the metrics, of the validation, and what of them should worry."""
    found = {**columns(round, metrics), **validation.numbers[-1]}
    warnings = alarms(found, validation.numbers[0])
    return {**without_nan(found), "best_iteration": round.it.best.t, "alarms": warnings}


# --- The checkpoint -------------------------------------------------------------------------------


def save(work: Work, number: int, round: Round, row: Row, optimizer: torch.optim.Optimizer) -> None:
    """The files of an iteration, its row, and the checkpoint that `restored` reads."""
    run, policy, validation, iteration = work.run, work.policy, work.validation, row["iteration"]
    write_round(run, iteration, round, work.label)
    for t, samples in ((1, validation.first), (iteration + 1, validation.last)):
        lines = written(validation.prompts, samples)
        run.write_lines(f"validation-{t:03d}.jsonl", lines)
    if work.keep_policies:
        run.keep(f"policies/{iteration:03d}.pt", policy.state_dict())
    state = training_state(policy, optimizer, round.it)
    run.save(row, {"stage": number, **state, "validation": validation.state()})


def restored(
    work: Work, number: int, optimizer: torch.optim.Optimizer
) -> dno.SampledIteration | None:
    """The iteration of this stage to go on after, with policy, optimizer and validation as they
    were then; None at its start."""
    state, policy, validation = work.run.state, work.policy, work.validation
    validation.restore(None)
    if not state or state.get("stage") != number:
        return None
    wanted = {
        "policy": list(policy.parameters()),
        "optimizer": like(optimizer),
        "round": dno.SampledIteration,
        "pi_ref": list | None,
        "validation": {name: type(value) for name, value in validation.state().items()},
    }
    work.run.expect(state, wanted)
    validation.restore(state["validation"])
    return take_training(state, policy, optimizer)


def training_state(
    policy: TextPolicy, optimizer: torch.optim.Optimizer, it: dno.SampledIteration
) -> dict[str, Any]:
    """All that `take_training` needs, whole on the CPU of the first process, however many there
    are."""
    known = optimizer.state_dict()
    best = replace(it.best, parameters=[whole(weight) for weight in it.best.parameters])
    moments = {
        number: {name: whole(value) for name, value in of.items()}
        for number, of in known["state"].items()
    }
    return {
        "policy": [whole(weight) for weight in policy.parameters()],
        "optimizer": {**known, "state": moments},
        "round": replace(it, pi_ref=None, best=best),
        "pi_ref": it.pi_ref.weights() if it.pi_ref else None,
    }


def take_training(
    state: dict[str, Any], policy: TextPolicy, optimizer: torch.optim.Optimizer
) -> dno.SampledIteration:
    """Go back to a `training_state`, with as many processes as there are now. Returns the iteration
    to go on after."""
    parameters, known, best = list(policy.parameters()), state["optimizer"], state["round"].best
    policy.load(state["policy"])
    moments = {
        number: {name: part_of(value, parameters[number]) for name, value in of.items()}
        for number, of in known["state"].items()
    }
    optimizer.load_state_dict({**known, "state": moments})
    pi_ref = policy.frozen_copy() if state["pi_ref"] else None
    if pi_ref:
        pi_ref.load(state["pi_ref"])
    both = zip(best.parameters, parameters, strict=True)
    mine = [part_of(value, parameter) for value, parameter in both]
    return replace(state["round"], pi_ref=pi_ref, best=replace(best, parameters=mine))


# --- The console ----------------------------------------------------------------------------------

CONSOLE = (  # heading, column, format; of these a row shows what it has
    ("  t", "t", "d"),
    ("P(>teacher)", "win_rate_vs_teacher", ".3f"),
    ("  +-", "win_rate_vs_teacher_interval", ".3f"),
    ("=length", "win_rate_vs_teacher_length_controlled", ".3f"),
    ("P(>pi_1)", "win_rate_vs_first", ".3f"),
    ("  +-", "win_rate_vs_first_interval", ".3f"),
    ("=length", "win_rate_vs_first_length_controlled", ".3f"),
    ("P(new>old)", "win_rate_vs_previous", ".3f"),
    ("gap last", "gap_last", ".3f"),
    ("mixture", "gap_average", ".3f"),
    ("malformed", "share_malformed", ".3f"),
    ("words", "mean_length", ".1f"),
    ("  KL", "kl_to_first", ".2f"),
    ("T>S", "pairs_teacher_student", "d"),
    ("S>T", "pairs_student_teacher", "d"),
    ("S>S", "pairs_student_student", "d"),
    ("  loss", "loss", ".4f"),
    ("dollars", "dollars", ".4f"),
)
LEGEND = (
    "Of held-out samples of pi_{t+1}: win rates, =length at equal length; gaps, mixture that of\n"
    "unif(pi_1..pi_t); KL from pi_1, nats a response. T>S: new pairs, teacher over student, ..."
)


def show(row: Row, headed: bool) -> None:
    """Print an iteration's row, under a heading unless there is one, and what should worry."""
    shown = [
        (head, f"{row[name]:{form}}") for head, name, form in CONSOLE if row.get(name) is not None
    ]
    if not headed:
        tqdm.write(" ".join(f"{head:>{max(len(head), len(text))}}" for head, text in shown))
    tqdm.write(" ".join(f"{text:>{len(head)}}" for head, text in shown))
    for alarm in row["alarms"]:
        tqdm.write(f"      ! {alarm}")


def progress_bar(total: int, last: dno.SampledIteration | None) -> tqdm:
    """Of iterations, on a terminal and in the first process only."""
    return tqdm(
        total=total,
        initial=last.t if last else 0,
        desc="measuring pi_1",
        unit="iteration",
        disable=True if Team().rank else None,
        leave=False,
    )


def show_before_and_after(validation: Validation) -> None:
    """Print three held-out prompts, with a response of pi_1 and one of the last policy."""
    shown = {"pi_1": validation.first, f"pi_{len(validation.numbers)}": validation.last}
    for place in range(0, min(3 * validation.k, len(validation.prompts)), validation.k):
        print(f"\n{validation.prompts[place]}")
        for name, responses in shown.items():
            print(f"  {name}: {for_terminal(responses[place])[:300]}")

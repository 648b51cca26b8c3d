"""The preset "ablations": the paper's comparisons on the world of text."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor
from tqdm import tqdm

import dno
from experiments.figures import STYLE
from experiments.folder import Run
from experiments.judging import demonstrations
from experiments.rounds import CLASSES_KEPT, round_numbers
from experiments.settings import DTYPES, THREADS, changed, check_device, check_ranges, setting
from experiments.text import TextConfig, fine_tuned
from experiments.validation import KINDS, Validation
from oracle import RegisterJudge
from pairs import (
    SamplingSettings,
    check_positive,
    demote_repetitions,
    form_pairs,
    gold_against_students,
    join,
    large_margin_pairs,
    replay,
    teacher_pairs,
)
from regularized import algorithm3_sampled, algorithm4, check_regularization
from text import TextPolicy, make_tokenizer

# --- Settings -------------------------------------------------------------------------------------


@dataclass
class AblationsConfig:
    """ablations: the paper's comparisons on the world of text: each method tuned on its own seeds,
    then run on fresh ones."""

    algorithm: int | None = setting(
        None, "only the methods that are variants of this algorithm", choices=(2, 3, 4)
    )
    iterations: int = setting(40, "T of the reported runs")
    seeds: int = setting(5, "fresh seeds to report")
    tuning_iterations: int = setting(20, "T of the tuning runs")
    tuning_seeds: int = setting(
        2, "seeds to tune on; the settings tried are the same number for each method"
    )
    eta: float | None = setting(None, "> 0; fixes eta and eta~ instead of tuning them")
    tau: float | None = setting(
        None, "in [0, eta]; of the regularised methods (eta / 20, and eta / 2 with soft targets)"
    )
    margin: float = setting(
        0.4, "in [0, 1], least difference of the win rates of a pair, where there is a margin"
    )
    prompts: int = setting(48, "X, prompts an iteration")
    prompts_per_step: int = setting(8, "whose pairs make up a batch")
    survey: int = setting(24, "samples of each held-out prompt by which a policy is measured")
    sft_steps: int = setting(
        400, "Adam steps of supervised fine-tuning of the policy that all start from"
    )
    seed: int = setting(
        0, "of the world: the corpus and the fine-tuned policy, the same for all runs"
    )
    out: str | None = setting(None, "folder (default: runs/ablations-SEED)")
    resume: bool = setting(False, "go on: runs that are finished are not repeated")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(1, "CPU threads of each run")
    jobs: int = setting(2, "runs at a time")

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/ablations-{self.seed}"
        check_ranges(
            self,
            iterations=(1, 10**5),
            seeds=(2, 1000),
            tuning_iterations=(1, 10**5),
            tuning_seeds=(1, 1000),
            prompts_per_step=(1, 10_000),
            threads=THREADS,
            jobs=THREADS,
        )
        if self.eta is not None:
            check_positive(eta=self.eta)
            check_ranges(self, eta=(0, 10**6))
        if self.tau is not None and self.algorithm == 2:
            raise ValueError(
                "tau belongs to the regularised methods, variants of Algorithms 3 and 4; leave it out"
            )
        if self.algorithm == 3 and changed(self, "margin"):
            raise ValueError("margin belongs to variants of Algorithms 2 and 4; leave it out")
        for label, settings in settings_to_try(self).items():
            for _, eta in settings if METHODS[label][0] != 2 and self.tau is not None else ():
                check_regularization(self.tau, eta)
        self.world()

    def world(self) -> TextConfig:
        """The text preset's config of the policy that all methods start from."""
        names = (
            "prompts",
            "survey",
            "sft_steps",
            "margin",
            "seed",
            "out",
            "device",
            "dtype",
            "threads",
        )
        return TextConfig(**{name: getattr(self, name) for name in names})


# --- Methods --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What a method is given: the fine-tuned policy to train, the judge, data and validation, and
    its tuned numbers."""

    policy: TextPolicy
    data: dno.Data
    validation: Validation
    iterations: int
    eta: float
    tau: float | None
    margin: float
    settings: SamplingSettings
    judge: RegisterJudge

    def algorithm2(
        self, rule: Callable[[Tensor, Tensor], Tensor]
    ) -> Iterator[dno.SampledIteration]:
        """Algorithm 2 with a rule of line 6."""
        return dno.algorithm2(
            self.policy,
            self.judge,
            self.data,
            self.eta,
            self.iterations,
            rule,
            self.validation,
            settings=self.settings,
            start=dno.SampledStart(dno.adam(self.policy, 0.0)),
        )

    def offline(self, loss: dno.PairLoss) -> Iterator[dno.SampledIteration]:
        """As Algorithm 2, but samples and reference are pi_1's in all iterations: preference data
        collected beforehand."""
        pi_1, optimizer, settings = (
            copy.deepcopy(self.policy),
            dno.adam(self.policy, 0.0),
            self.settings,
        )
        best = dno.validated(self.policy, 1, self.validation)
        for t in range(1, self.iterations + 1):
            seed, generator = dno.random_numbers(settings.seed, t)
            groups = dno.sample_groups(pi_1, *self.data(t), settings, seed)
            preferences = dno.judge_groups(self.judge, groups)
            r = dno.group_win_rates(dno.draw_outcomes(preferences, generator))
            r, may_be_positive = demote_repetitions(r, groups, settings)
            pairs = large_margin_pairs(r, may_be_positive, self.margin)
            D = dno.with_reference(form_pairs(groups, r, pairs), pi_1)
            fit = dno.fit_pairs(
                self.policy,
                D,
                loss,
                optimizer,
                settings,
                settings.rate(t, self.iterations),
                generator,
            )
            best = dno.validated(self.policy, t + 1, self.validation, best)
            yield dno.SampledIteration(t, groups, preferences, r, pairs, [], best, **fit)


def sft_on_positives(start: Start) -> Iterator[dno.SampledIteration]:
    """Likelihood of the better response of each offline pair; the worse one is not looked at. eta
    plays no part."""
    return start.offline(lambda log_ratio1, log_ratio2, r1, r2: -log_ratio1)


def offline_dpo(start: Start) -> Iterator[dno.SampledIteration]:
    """DPO on pairs of pi_1's samples and the teacher's, with reference pi_1."""
    return start.offline(dno.hard_targets(start.eta))


def spin(start: Start) -> Iterator[dno.SampledIteration]:
    """The teacher's response against each of the student's, on policy, without a judge."""
    return start.algorithm2(gold_against_students)


def dno_restrictive(start: Start) -> Iterator[dno.SampledIteration]:
    """Only pairs in which the teacher beats the student."""
    return start.algorithm2(partial(teacher_pairs, margin=start.margin))


def dno_without_margin(start: Start) -> Iterator[dno.SampledIteration]:
    """Every pair that is no tie."""
    return start.algorithm2(partial(large_margin_pairs, margin=0.0))


def dno_practical(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 2 as it is."""
    return start.algorithm2(partial(large_margin_pairs, margin=start.margin))


def dno_lookahead(start: Start) -> Iterator[dno.SampledIteration]:
    """All the pairs that DNO comes to see, shuffled, on which pi_1 is trained anew with itself as
    reference: DPO that knows the future's pairs, but not in their order."""
    pi_1 = copy.deepcopy(start.policy)
    explorer = replace(start, policy=copy.deepcopy(pi_1), validation=lambda: 0.0)
    rounds = list(dno_practical(explorer))
    D = dno.with_reference(
        join(replay([it.earlier[0] for it in rounds], 1.0, torch.Generator(), decay=1.0)), pi_1
    )
    generator, optimizer = (
        dno.random_numbers(start.settings.seed, 0)[1],
        dno.adam(start.policy, 0.0),
    )
    best = dno.validated(start.policy, 1, start.validation)
    parts = D.batches(-(-len(D.group.unique()) // start.iterations), generator)
    parts += [D.take(torch.arange(0))] * (start.iterations - len(parts))
    for t, (part, it) in enumerate(zip(parts, rounds, strict=True), 1):
        rate = start.settings.rate(t, start.iterations)
        fit = dno.fit_pairs(
            start.policy,
            part,
            dno.hard_targets(start.eta),
            optimizer,
            start.settings,
            rate,
            generator,
        )
        best = dno.validated(start.policy, t + 1, start.validation, best)
        yield replace(it, best=best, **fit)


def regularized_dno(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 4, option I, reference pi_1."""
    tau = start.eta / 20 if start.tau is None else start.tau
    return algorithm4(
        start.policy,
        start.judge,
        start.data,
        start.eta,
        start.iterations,
        partial(large_margin_pairs, margin=start.margin),
        start.validation,
        tau,
        settings=start.settings,
        start=dno.SampledStart(dno.adam(start.policy, 0.0)),
    )


def soft_targets_moving_reference(start: Start) -> Iterator[dno.SampledIteration]:
    """Algorithm 3's regression with r_t estimated from K + 1 samples, so from as many judgments as
    the others ask for, and a reference moved every 5 iterations."""
    tau = start.eta / 2 if start.tau is None else start.tau
    settings = replace(start.settings, samples=start.settings.samples + 1)
    return algorithm3_sampled(
        start.policy,
        start.judge,
        start.data,
        start.eta,
        start.iterations,
        start.validation,
        tau,
        move_reference_every=5,
        settings=settings,
        start=dno.SampledStart(dno.adam(start.policy, 0.0)),
    )


GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (2.0, 8.0))  # four settings each
SOFT_GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (0.25, 0.5))
METHODS = {  # label: (variant of which algorithm, function, settings (lr, eta) to tune over)
    "SFT on positives": (2, sft_on_positives, tuple((lr, 8.0) for lr in (2e-4, 5e-4, 1e-3, 2e-3))),
    "offline DPO": (2, offline_dpo, GRID),
    "SPIN": (2, spin, GRID),
    "DNO-Restrictive": (2, dno_restrictive, GRID),
    "DNO without margin": (2, dno_without_margin, GRID),
    "DNO-Lookahead": (2, dno_lookahead, GRID),
    "DNO": (2, dno_practical, GRID),
    "regularised DNO": (4, regularized_dno, GRID),
    "soft targets, moving reference": (3, soft_targets_moving_reference, SOFT_GRID),
}
ORDERINGS = (  # the paper's, by win rate: (better, worse)
    ("DNO", "DNO-Restrictive"),
    ("DNO-Restrictive", "SPIN"),
    ("DNO", "offline DPO"),
    ("offline DPO", "SFT on positives"),
    ("DNO", "DNO without margin"),
)


# --- The runs -------------------------------------------------------------------------------------


def run_method(
    config: AblationsConfig, label: str, lr: float, eta: float, seed: int, iterations: int
) -> list[dict[str, Any]]:
    """Run one method from the fine-tuned policy in the run's folder; a row for each iteration."""
    torch.set_num_threads(config.threads)
    tokenizer = json.loads((Path(config.out) / "tokenizer.json").read_text())
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokenizer["ranks"])}
    world, base = (
        config.world(),
        torch.load(Path(config.out) / "policies" / "base.pt", weights_only=True),
    )
    policy = world.policy(make_tokenizer(ranks))
    policy.load_state_dict(base)
    validation = Validation(policy, RegisterJudge(), config.survey, seed)
    settings = SamplingSettings(
        temperature=1.0,
        top_p=1.0,
        learning_rate=lr,
        prompts_per_step=config.prompts_per_step,
        seed=seed,
    )
    start = Start(
        policy,
        demonstrations(seed, config.prompts),
        validation,
        iterations,
        eta,
        config.tau,
        config.margin,
        settings,
        RegisterJudge(),
    )
    algorithm, method, _ = METHODS[label]
    rows = []
    for it in method(start):
        row = {"method": label, "lr": lr, "eta": eta, "seed": seed, "iteration": it.t}
        rows.append({**row, **round_numbers(it, algorithm != 3), **validation.row()})
    return rows


def end_with_parent() -> None:
    """Make this worker end when the process that started it does, even by kill -9."""
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def results(
    config: AblationsConfig, run: Run, jobs: list[tuple[str, float, float, int, int]], what: str
) -> dict[tuple[str, float, float, int, int], list[dict[str, Any]]]:
    """The rows of each job (method, lr, eta, seed, iterations), from its file in the run's folder
    or by running it."""
    files = {
        job: Path("jobs") / ("-".join(map(str, job)).replace(" ", "_") + ".json") for job in jobs
    }
    missing = [job for job in jobs if not (run.out / files[job]).exists()]
    with ProcessPoolExecutor(
        config.jobs, get_context("spawn"), initializer=end_with_parent
    ) as pool:
        heard = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # workers begin deaf to Ctrl-C, of which this process tells them
        running = {pool.submit(run_method, config, *job): job for job in missing}
        signal.signal(signal.SIGINT, heard)
        try:
            for done in tqdm(
                as_completed(running), what, len(missing), unit="run", disable=None, leave=False
            ):
                run.write(str(files[running[done]]), json.dumps(done.result()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {job: json.loads((run.out / file).read_text()) for job, file in files.items()}


def late(rows: list[dict[str, Any]], column: str) -> float:
    """Mean of a column over the last third of the iterations."""
    tail = rows[-max(1, len(rows) // 3) :]
    return sum(row[column] for row in tail) / len(tail)


def interval(values: list[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and the half width of its 95% interval by Student's t."""
    values = np.asarray(values)
    return float(values.mean()), float(
        student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    )


def settings_to_try(config: AblationsConfig) -> dict[str, tuple[tuple[float, float], ...]]:
    """The (lr, eta) to tune each method over."""
    methods = {
        label: settings
        for label, (algorithm, _, settings) in METHODS.items()
        if config.algorithm in (None, algorithm)
    }
    if config.eta is None:
        return methods
    return {
        label: tuple(dict.fromkeys((lr, config.eta) for lr, _ in settings))[:2]
        for label, settings in methods.items()
    }


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A table with all columns that occur, empty where a row has none."""
    buffer = io.StringIO()
    writer = csv.DictWriter(
        buffer, list(dict.fromkeys(name for row in rows for name in row)), restval=""
    )
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def run_ablations(config: AblationsConfig) -> None:
    """The preset "ablations": see `AblationsConfig`."""
    check_device(config.device)
    run = Run("ablations", config, CLASSES_KEPT)
    (run.out / "jobs").mkdir(exist_ok=True)
    torch.set_num_threads(config.threads)
    fine_tuned(config.world(), run)
    methods = settings_to_try(config)
    tuning = [
        (label, *tried, 1000 + seed, config.tuning_iterations)
        for label, settings in methods.items()
        for tried in settings
        for seed in range(config.tuning_seeds)
    ]
    print(
        f"{len(tuning)} tuning runs of {config.tuning_iterations} iterations, "
        f"{len(methods) * config.seeds} reported ones of {config.iterations}; {config.jobs} at a time"
    )
    scores = {label: dict.fromkeys(settings, 0.0) for label, settings in methods.items()}
    for (label, *tried, _, _), rows in results(config, run, tuning, "tuning").items():
        scores[label][tuple(tried)] += late(rows, "win_rate_vs_teacher") / config.tuning_seeds
    tuned = {label: max(score, key=score.get) for label, score in scores.items()}
    jobs = [
        (label, *tuned[label], seed, config.iterations)
        for label in methods
        for seed in range(config.seeds)
    ]
    found = results(config, run, jobs, "reporting")
    curves = {label: [rows for job, rows in found.items() if job[0] == label] for label in methods}
    run.write("ablations.csv", as_csv([row for rows in found.values() for row in rows]))
    summary = summarise_ablations(config, curves, scores, tuned)
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("ablations.png", ablations_figure(curves))
    print(f"\nTable and figure: {run.out}")


# --- What comes out -------------------------------------------------------------------------------


def summarise_ablations(
    config: AblationsConfig,
    curves: dict[str, list[list[dict[str, Any]]]],
    scores: dict[str, dict[tuple[float, float], float]],
    tuned: dict[str, tuple[float, float]],
) -> dict[str, Any]:
    """Print and return: each method's late win rate and gaps with intervals over seeds; the paper's
    orderings, by paired differences; and the analogue of Table 2."""
    summary: dict[str, Any] = {
        "config": asdict(config),
        "methods": {},
        "orderings": [],
        "table_2": [],
    }
    print(
        f"\nmeans over the last third of {config.iterations} iterations, {config.seeds} seeds, with 95% intervals"
    )
    print(
        f"{'method':31} |   lr    eta  |  P(> teacher)  |  gap of last   | gap of mixture | well-formed"
    )
    for label, seeds in curves.items():
        columns = ("win_rate_vs_teacher", "gap_last", "gap_average", "share_malformed")
        row = {name: interval([late(rows, name) for rows in seeds]) for name in columns}
        tried = {f"lr {lr:g}, eta {eta:g}": score for (lr, eta), score in scores[label].items()}
        summary["methods"][label] = {
            "lr": tuned[label][0],
            "eta": tuned[label][1],
            "tuning": tried,
            **row,
        }
        shown = " | ".join(
            f"{mean:.3f} +- {half:.3f}" for mean, half in (row[name] for name in columns[:3])
        )
        print(
            f"{label:31} | {tuned[label][0]:.0e} {tuned[label][1]:5.2f} | {shown} | {1 - row['share_malformed'][0]:.3f}"
        )
    print("\nthe paper's orderings, by P(> teacher): difference with 95% interval over seeds")
    for better, worse in ORDERINGS:
        if better in curves and worse in curves:
            pairs = zip(curves[better], curves[worse], strict=True)
            mean, half = interval(
                [late(a, "win_rate_vs_teacher") - late(b, "win_rate_vs_teacher") for a, b in pairs]
            )
            verdict = (
                "holds" if mean > half else "the other way round" if -mean > half else "not decided"
            )
            summary["orderings"].append(
                {
                    "better": better,
                    "worse": worse,
                    "difference": mean,
                    "interval": half,
                    "verdict": verdict,
                }
            )
            print(f"{better:16} > {worse:19}: {mean:+.3f} +- {half:.3f}  {verdict}")
    print(
        "\nmethod and iteration (mean over seeds) | words | best of n | student wins |  T>S    S>T    S>S"
    )
    columns = ("mean_length", "best_of_n", "student_wins", *(f"pairs_{kind}" for kind in KINDS))
    for label in ("DNO-Restrictive", "DNO"):
        if label not in curves:
            continue
        for t in sorted(
            {1, config.iterations // 4, config.iterations // 2, config.iterations} - {0}
        ):
            row = {
                name: float(np.mean([rows[t - 1][name] for rows in curves[label]]))
                for name in columns
            }
            summary["table_2"].append({"method": label, "iteration": t, **row})
            numbers = f"{row['mean_length']:5.1f} | {row['best_of_n']:9.3f} | {row['student_wins']:12.2f} | "
            print(
                f"{label:31} {t:6d} | "
                + numbers
                + " ".join(f"{row[f'pairs_{kind}']:6.1f}" for kind in KINDS)
            )
    return summary


def ablations_figure(curves: dict[str, list[list[dict[str, Any]]]]) -> plt.Figure:
    """Win rate over the teacher and gap of the last iterate against the iteration: means and 95%
    intervals over seeds."""
    groups = (
        ("SFT on positives", "offline DPO", "DNO-Lookahead"),
        ("SPIN", "DNO-Restrictive"),
        ("DNO", "DNO without margin", "regularised DNO", "soft targets, moving reference"),
    )
    panels = (
        ("win_rate_vs_teacher", "$P(\\pi_{t+1} \\succ$ teacher$)$"),
        ("gap_last", "gap of the last iterate"),
    )
    figure, grid = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="row")
    for (column, label), row in zip(panels, grid, strict=True):
        for axes, group in zip(row, groups, strict=True):
            for name, style in zip(
                (name for name in group if name in curves), ("-", "--", ":", "-."), strict=False
            ):
                values = np.array(
                    [[point[column] for point in rows] for rows in curves[name]]
                )  # (seeds, T)
                mean, half = np.array([interval(values[:, t]) for t in range(values.shape[1])]).T
                t = np.arange(1, len(mean) + 1)
                (line,) = axes.plot(t, mean, style, lw=1.6, label=name)
                axes.fill_between(
                    t, mean - half, mean + half, color=line.get_color(), alpha=0.15, lw=0
                )
            if column == "win_rate_vs_teacher":
                axes.axhline(0.5, ls=":", lw=1, color="0.3", label="1/2")
                axes.legend(fontsize=8)
            else:
                axes.set(xlabel="iteration $t$")
        row[0].set(ylabel=label)
    return figure


PRESET = (AblationsConfig, run_ablations)

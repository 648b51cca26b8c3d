"""The preset "ablations": the paper's comparisons on the world of text."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import torch
from tqdm import tqdm

from experiments.ablation_methods import METHODS, Setting, Start
from experiments.ablations_settings import AblationsConfig, settings_to_try
from experiments.ablations_summary import Rows, as_csv, summarise_ablations
from experiments.fine_tuning import fine_tuned
from experiments.folder import Run
from experiments.judging import Judging, demonstrations, held_out_gold
from experiments.rounds import Round
from experiments.sampled_summary import late
from experiments.settings import check_device
from experiments.training import CLASSES_KEPT, row_of
from experiments.validation import TableValidation
from oracle import RegisterJudge
from text import TextPolicy, make_tokenizer
from world import HELD_OUT


class Job(NamedTuple):
    """One run of a method."""

    label: str
    lr: float
    eta: float
    seed: int
    iterations: int

    @property
    def file(self) -> Path:
        """Where its rows are kept, in the run's folder."""
        return Path("jobs") / ("-".join(map(str, self)).replace(" ", "_") + ".json")


def run_ablations(config: AblationsConfig) -> None:
    """The preset "ablations": see `AblationsConfig`."""
    check_device(config.device)
    run = Run("ablations", config, CLASSES_KEPT)
    (run.out / "jobs").mkdir(exist_ok=True)
    torch.set_num_threads(config.threads)
    fine_tuned(config.world(), run)
    methods, seeds = settings_to_try(config), range(config.seeds)
    tuning = [
        Job(label, lr, eta, 1000 + seed, config.tuning_iterations)
        for label, settings in methods.items()
        for lr, eta in settings
        for seed in range(config.tuning_seeds)
    ]
    print(
        f"{len(tuning)} tuning runs of {config.tuning_iterations} iterations, "
        f"{len(methods) * config.seeds} reported ones of {config.iterations}; "
        f"{config.jobs} at a time"
    )
    scores = {label: dict.fromkeys(settings, 0.0) for label, settings in methods.items()}
    for job, rows in results(config, run, tuning, "tuning").items():
        score = late(rows, "win_rate_vs_teacher") / config.tuning_seeds
        scores[job.label][job.lr, job.eta] += score
    tuned = {label: best_setting(tried) for label, tried in scores.items()}
    jobs = [
        Job(label, *tuned[label], seed, config.iterations) for label in methods for seed in seeds
    ]
    found = results(config, run, jobs, "reporting")
    curves = {
        label: [rows for job, rows in found.items() if job.label == label] for label in methods
    }
    run.write("ablations.csv", as_csv([row for rows in found.values() for row in rows]))
    summary = summarise_ablations(config, curves, scores, tuned)
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    from experiments.ablations_figures import ablations_figure  # here, as it imports matplotlib

    run.figure("ablations.png", ablations_figure, curves)
    print(f"\nTable and figure: {run.out}")


def best_setting(scores: dict[Setting, float]) -> Setting:
    """The setting of the highest score, the first of several."""
    return max(scores, key=lambda setting: scores[setting])


def results(config: AblationsConfig, run: Run, jobs: list[Job], what: str) -> dict[Job, Rows]:
    """The rows of each job, from its file in the run's folder or by running it."""
    missing = [job for job in jobs if not (run.out / job.file).exists()]
    context = get_context("spawn")
    with ProcessPoolExecutor(config.jobs, context, initializer=end_with_parent) as pool:
        # workers start ignoring Ctrl-C: this process hears it and ends them
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        running = {pool.submit(run_method, config, *job): job for job in missing}
        signal.signal(signal.SIGINT, heard)
        finished = as_completed(running)
        try:
            for done in tqdm(finished, what, len(missing), unit="run", disable=None, leave=False):
                run.write(str(running[done].file), json.dumps(done.result()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {job: json.loads((run.out / job.file).read_text()) for job in jobs}


def end_with_parent() -> None:
    """Make this worker end when the process that started it does, even by kill -9."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def run_method(
    config: AblationsConfig, label: str, lr: float, eta: float, seed: int, iterations: int
) -> Rows:
    """Run one method from the fine-tuned policy in the run's folder; a row for each iteration."""
    torch.set_num_threads(config.threads)
    policy, judge, method = saved_policy(config), RegisterJudge(), METHODS[label]
    gold = held_out_gold(seed)
    validation = TableValidation(policy, list(HELD_OUT), config.survey, seed, gold)
    stage = config.stage(lr, eta, seed, iterations)
    data = demonstrations(seed, config.prompts)
    start = Start(policy, data, validation, stage, config.margin, config.tau, judge)
    played, judging, rows = replace(stage, algorithm=method.algorithm), Judging(judge), []
    for it in method.run(start):
        row = {"method": label, "lr": lr, "eta": eta, "seed": seed, "iteration": it.t}
        found = row_of(validation, Round(it, played, judging))
        rows.append({**row, **found, "alarms": "; ".join(found["alarms"])})
    return rows


def saved_policy(config: AblationsConfig) -> TextPolicy:
    """The fine-tuned policy in the run's folder."""
    folder = Path(config.out)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokenizer["ranks"])}
    policy = config.world().policy(make_tokenizer(ranks))
    policy.load_state_dict(torch.load(folder / "policies" / "base.pt", weights_only=True))
    return policy


PRESET = (AblationsConfig, run_ablations)

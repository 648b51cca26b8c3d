"""What comes out of the preset "ablations": tables and summary."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.ablation_methods import ORDERINGS, Setting
from experiments.ablations_settings import AblationsConfig
from experiments.sampled_summary import late
from experiments.validation import KINDS
from judge.statistics import mean_interval

Rows = list[dict[str, Any]]  # of one run, an iteration each
Curves = dict[str, list[Rows]]  # the runs of each method, a seed each
Scores = dict[str, dict[Setting, float]]  # of each method and setting, in tuning


def as_csv(rows: Rows) -> str:
    """A table with all columns that occur, empty where a row has none."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# --- Tables ---------------------------------------------------------------------------------------


def summarise_ablations(
    config: AblationsConfig, curves: Curves, scores: Scores, tuned: dict[str, Setting]
) -> dict[str, Any]:
    """Print and return each method's numbers, the paper's orderings and the analogue of Table 2."""
    return {
        "config": asdict(config),
        "methods": methods_table(config, curves, scores, tuned),
        "orderings": orderings_table(curves),
        "table_2": table_2(config, curves),
    }


def methods_table(
    config: AblationsConfig, curves: Curves, scores: Scores, tuned: dict[str, Setting]
) -> dict[str, dict[str, Any]]:
    """Each method's late win rate and gaps, with intervals over seeds."""
    means = f"means over the last third of {config.iterations} iterations"
    print(f"\n{means}, {config.seeds} seeds, with 95% intervals")
    columns = "P(> teacher)  |  gap of last   | gap of mixture | well-formed"
    print(f"{'method':31} |   lr    eta  |  {columns}")
    methods = {}
    for label, runs in curves.items():
        names = ("win_rate_vs_teacher", "gap_last", "gap_average", "share_malformed")
        row = {name: mean_interval([late(rows, name) for rows in runs]) for name in names}
        tried = {f"lr {lr:g}, eta {eta:g}": score for (lr, eta), score in scores[label].items()}
        lr, eta = tuned[label]
        methods[label] = {"lr": lr, "eta": eta, "tuning": tried, **row}
        shown = " | ".join(f"{row[name][0]:.3f} +- {row[name][1]:.3f}" for name in names[:3])
        well_formed = 1 - row["share_malformed"][0]
        print(f"{label:31} | {lr:.0e} {eta:5.2f} | {shown} | {well_formed:.3f}")
    return methods


def orderings_table(curves: Curves) -> list[dict[str, Any]]:
    """The paper's orderings, by paired differences of the late win rate."""
    print("\nthe paper's orderings, by P(> teacher): difference with 95% interval over seeds")
    orderings = []
    for better, worse in ORDERINGS:
        if better not in curves or worse not in curves:
            continue
        name = "win_rate_vs_teacher"
        pairs = zip(curves[better], curves[worse], strict=True)
        mean, half = mean_interval([late(a, name) - late(b, name) for a, b in pairs])
        verdict = verdict_of(mean, half)
        found = {"difference": mean, "interval": half, "verdict": verdict}
        orderings.append({"better": better, "worse": worse, **found})
        print(f"{better:16} > {worse:19}: {mean:+.3f} +- {half:.3f}  {verdict}")
    return orderings


def verdict_of(mean: float, half: float) -> str:
    """Whether a difference that is expected to be positive is, with its interval."""
    if mean > half:
        return "holds"
    return "the other way round" if -mean > half else "not decided"


def table_2(config: AblationsConfig, curves: Curves) -> list[dict[str, Any]]:
    """Numbers of four iterations of DNO and of its restrictive variant, means over seeds."""
    heading = "words | best of n | student wins |  T>S    S>T    S>S"
    print(f"\nmethod and iteration (mean over seeds) | {heading}")
    columns = ["sampled_words", "best_of_n", "student_wins", *(f"pairs_{kind}" for kind in KINDS)]
    T, table = config.iterations, []
    for label in ("DNO-Restrictive", "DNO"):
        if label not in curves:
            continue
        for t in sorted({1, T // 4, T // 2, T} - {0}):
            row = {
                name: float(np.mean([rows[t - 1][name] for rows in curves[label]]))
                for name in columns
            }
            table.append({"method": label, "iteration": t, **row})
            words, best, wins = row["sampled_words"], row["best_of_n"], row["student_wins"]
            kinds = " ".join(f"{row[f'pairs_{kind}']:6.1f}" for kind in KINDS)
            print(f"{label:31} {t:6d} | {words:5.1f} | {best:9.3f} | {wins:12.2f} | {kinds}")
    return table

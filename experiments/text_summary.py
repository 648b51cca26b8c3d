"""What comes out of a run of the preset "text": table, summary and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.text_settings import TextConfig

HEADINGS = {
    "gap_last": "gap of last",
    "gap_average": "gap of mixture",
    "win_rate_vs_teacher": "P(> teacher)",
    "win_rate_vs_teacher_length_controlled": "at equal length",
    "share_malformed": "malformed",
    "mean_length": "words",
    "gap_last_over_first": "over pi_1's",
    "win_rate_vs_teacher_most": "P(> teacher), most",
}
MEANS = (  # over the last third of the iterations, as far as a run has them
    "gap_last",
    "gap_average",
    "win_rate_vs_teacher",
    "win_rate_vs_teacher_length_controlled",
    "share_malformed",
    "mean_length",
)
NAMES = {1: "Algorithm 1, sampled", 2: "Algorithm 2", 3: "Algorithm 3, sampled", 4: "Algorithm 4"}
Rows = Sequence[dict[str, Any]]


def rows_of(metrics: Rows, algorithm: int) -> Rows:
    """The rows of one algorithm."""
    return [row for row in metrics if row["algorithm"] == algorithm]


def summarise_text(config: TextConfig, metrics: Rows, first: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers, which are printed as a table too. Those of last iterates are means over
    the last third of the iterations."""
    stages: list[dict[str, Any]] = []
    print("\nmeans over the last third of the iterations")
    for stage in config.stages():
        rows = rows_of(metrics, stage.algorithm)
        found = headline(rows, first)
        if not stages:
            print("            | " + " | ".join(HEADINGS[name] for name in found))
        values = " | ".join(f"{value:{len(HEADINGS[name])}.3f}" for name, value in found.items())
        print(f"Algorithm {stage.algorithm} | {values}")
        best, seconds = rows[-1]["best_iteration"], sum(row["seconds"] for row in rows)
        about = {"best_iteration": best, "seconds": seconds}
        stages.append({"algorithm": stage.algorithm, **found, **about})
    return {"config": asdict(config), **first, "stages": stages}


def headline(rows: Rows, first: dict[str, Any]) -> dict[str, float]:
    """The columns of `HEADINGS` that an algorithm's rows have."""
    tail = rows[-max(1, len(rows) // 3) :]
    columns = [name for name in MEANS if name in rows[0]]
    found = {name: sum(row[name] for row in tail) / len(tail) for name in columns}
    if "gap_last" in found:
        found["gap_last_over_first"] = found["gap_last"] / first["gap_first"]
        found["gap_average"] = rows[-1]["gap_average"]
    found["win_rate_vs_teacher_most"] = max(row["win_rate_vs_teacher"] for row in rows)
    return found


def text_figure(config: TextConfig, metrics: Rows, first: dict[str, Any]) -> plt.Figure:
    """Win rate over the teacher, and the gaps of last iterate and mixture, against the iteration; a
    line for each algorithm. Where gaps are not defined, the length of responses takes their place.
    """
    panels = {"win_rate_vs_teacher": "$P(\\pi_{t+1} \\succ$ teacher$)$"}
    if "gap_last" in metrics[0]:
        panels["gap_last"] = "gap of the last iterate $\\pi_{t+1}$"
        panels["gap_average"] = "gap of the mixture unif$(\\pi_1..\\pi_t)$"
    else:
        panels["mean_length"] = "words a response"
    levels = {"win_rate_vs_teacher": (0.5, "1/2")}
    if "gap_floor" in first:
        floor = (first["gap_floor"], "noise floor: Nash itself, measured so")
        levels |= {"gap_last": floor, "gap_average": floor}
    starts = {"win_rate_vs_teacher": "win_rate_vs_teacher_first", "gap_last": "gap_first"}
    figure, grid = plt.subplots(1, len(panels), figsize=(11 if len(panels) == 3 else 8, 3.6))
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        start = first.get(starts.get(column, ""))
        for stage, style in zip(config.stages(), ("-", "--"), strict=False):
            rows = rows_of(metrics, stage.algorithm)
            draw_curve(axes, rows, column, start, style, NAMES[stage.algorithm])
        if column in levels:
            level, name = levels[column]
            axes.axhline(level, ls=":", lw=1, color="0.3", label=name)
        axes.set(xlabel="iteration $t$", ylabel=label, ylim=(0, None))
        if column not in ("gap_last", "mean_length"):  # whose lines are those of its neighbour
            axes.legend(fontsize=8)
    return figure


def draw_curve(
    axes: plt.Axes, rows: Rows, column: str, start: float | None, style: str, label: str
) -> None:
    """A column against the iteration, from pi_1's value on if it is known; with its interval, and
    its value at equal length, if the rows have them."""
    t, values = [row["t"] for row in rows], np.array([row[column] for row in rows])
    at, curve = (t, values) if start is None else ([0, *t], [start, *values])
    (line,) = axes.plot(at, curve, style, label=label)
    if f"{column}_interval" in rows[0]:
        half, color = np.array([row[f"{column}_interval"] for row in rows]), line.get_color()
        axes.fill_between(t, values - half, values + half, color=color, alpha=0.15, lw=0)
    if f"{column}_length_controlled" in rows[0]:
        controlled = [row[f"{column}_length_controlled"] for row in rows]
        axes.plot(t, controlled, "-.", color="C1", label="at equal length")

"""The figure of a run with sampled responses."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from experiments.rounds import Row, Stage
from experiments.sampled_summary import Rows, rows_of

NAMES = {1: "Algorithm 1, sampled", 2: "Algorithm 2", 3: "Algorithm 3, sampled", 4: "Algorithm 4"}
PANELS = {  # column: label of its axis
    "win_rate_vs_teacher": "$P(\\pi_{t+1} \\succ$ teacher$)$",
    "win_rate_vs_first": "$P(\\pi_{t+1} \\succ \\pi_1)$",
    "gap_last": "gap of the last iterate $\\pi_{t+1}$",
    "gap_average": "gap of the mixture unif$(\\pi_1..\\pi_t)$",
    "mean_length": "words a response",
}


def sampled_figure(stages: Sequence[Stage], metrics: Rows, first: Row) -> plt.Figure:
    """Win rate and gaps of last iterate and mixture, or where gaps are not defined the length of
    responses, against the iteration; a line for each algorithm."""
    panels = {name: label for name, label in PANELS.items() if name in metrics[0]}
    if "gap_last" in panels:
        del panels["mean_length"]
    levels = {"win_rate_vs_teacher": (0.5, "1/2"), "win_rate_vs_first": (0.5, "1/2")}
    if "gap_floor" in first:
        floor = (first["gap_floor"], "noise floor: Nash itself, measured so")
        levels |= {"gap_last": floor, "gap_average": floor}
    figure, grid = plt.subplots(1, len(panels), figsize=(11 if len(panels) == 3 else 8, 3.6))
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        for stage, style in zip(stages, ("-", "--"), strict=False):
            rows, name = rows_of(metrics, stage), NAMES[stage.algorithm]
            draw_curve(axes, rows, column, first.get(column), style, name)
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

"""The figure of the preset "ablations"."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np

from experiments.ablation_methods import METHODS
from experiments.ablations_summary import Curves, Rows
from judge.statistics import mean_interval

STYLES = ("-", "--", ":", "-.")
PANELS = {
    "win_rate_vs_teacher": "$P(\\pi_{t+1} \\succ$ teacher$)$",
    "gap_last": "gap of the last iterate",
}


def ablations_figure(curves: Curves) -> plt.Figure:
    """Win rate over the teacher and gap of the last iterate against the iteration: means and 95%
    intervals over seeds."""
    groups: dict[str, list[str]] = {}
    for name in curves:
        groups.setdefault(METHODS[name].panel, []).append(name)
    size = (11 * len(groups) / 3, 6)
    figure, grid = plt.subplots(
        2, len(groups), figsize=size, sharex=True, sharey="row", squeeze=False
    )
    for (column, label), row in zip(PANELS.items(), grid, strict=True):
        for axes, names in zip(row, groups.values(), strict=True):
            for name, style in zip(names, cycle(STYLES), strict=False):
                draw_curve(axes, curves[name], column, style, name)
            if column == "win_rate_vs_teacher":
                axes.axhline(0.5, ls=":", lw=1, color="0.3", label="1/2")
                axes.legend(fontsize=8)
            else:
                axes.set(xlabel="iteration $t$")
        row[0].set(ylabel=label)
    return figure


def draw_curve(axes: plt.Axes, runs: list[Rows], column: str, style: str, name: str) -> None:
    """Mean and interval of a column over a method's runs."""
    values = np.array([[row[column] for row in rows] for rows in runs])  # (seeds, T)
    mean, half = np.array([mean_interval(at_t) for at_t in values.T]).T
    t = np.arange(1, len(mean) + 1)
    (line,) = axes.plot(t, mean, style, lw=1.6, label=name)
    axes.fill_between(t, mean - half, mean + half, color=line.get_color(), alpha=0.15, lw=0)

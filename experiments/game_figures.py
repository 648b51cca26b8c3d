"""The figures of the main job."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import solvers
from experiments.figures import draw_simplex, on_simplex
from experiments.game import Comparisons, Game


def gap_figure(
    metrics: list[dict[str, Any]], others: Comparisons, policy: str, twin_last: bool
) -> plt.Figure:
    """Duality gaps against the iteration, on a logarithmic axis.

    policy: what it is, for the legend. twin_last: whether to draw the twin's last iterate too."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    t, twin = np.arange(1, len(metrics) + 1), others.twin
    last, average = ([row[name] for row in metrics] for name in ("gap_last", "gap_average"))
    label = rf"{policy}, last iterate $\pi_{{t+1}}$"
    axes.plot(t, last, "-", lw=1.2, color="C1", label=label)
    axes.plot(t, average, "-", lw=2.5, color="C0", label=rf"{policy}, average $\bar\pi_t$")
    axes.plot(t, twin.gap_average.cpu(), "--", lw=1.5, color="C6", label="tabular twin, average")
    if twin_last:
        label = "tabular twin, last iterate"
        axes.plot(t, twin.gap_last.cpu(), ":", lw=1.5, color="C6", label=label)
    if others.bound:
        label = r"bound $2\eta\,\ln Y/t + 1/(4\eta)$"
        axes.plot(t, others.bound, "-.", lw=1, color="C3", label=label)
    label = "table, moving reference, last iterate"
    axes.plot(t, others.moving.gap_last.cpu(), ":", lw=2, color="C2", label=label)
    if others.gap_maximiser is not None:
        label, dashes = "reward maximiser (Bradley-Terry fit)", (0, (5, 1, 1, 1, 1, 1))
        axes.axhline(others.gap_maximiser, ls=dashes, lw=1, color="C5", label=label)
    axes.set(yscale="log", xlabel="iteration $t$", ylabel="duality gap", ylim=(None, 1.2))
    axes.legend(fontsize=8, loc="lower left")
    return figure


def simplex_figure(game: Game, policies: Tensor, twin: solvers.Solution) -> plt.Figure:
    """Paths of pi_t and pi_bar on the triangle of styles, for up to eight prompts, with Nash."""
    count = torch.arange(1, len(policies), device=policies.device).double()[:, None, None]
    shown, columns = min(8, len(game.P)), min(4, len(game.P))
    rows = -(-shown // columns)
    size = (2.6 * columns, 2.5 * rows + 0.4)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    average, tabular = (tables[:-1].cumsum(0) / count for tables in (policies, twin.policies))
    paths = {
        "last iterate": (policies, "-", "C1", 0.8),
        "average": (average, "-", "C0", 2.2),
        "tabular twin, average": (tabular, "--", "C6", 1.0),
    }
    for axes in grid.flat:
        axes.axis("off")
    for x, axes in enumerate(grid.flat[:shown]):
        draw_simplex(axes, game.corners)
        for name, (path, line, colour, width) in paths.items():
            points = on_simplex(path[:, x] @ game.axes)
            axes.plot(*points.T, line, color=colour, lw=width, label=name)
        point = on_simplex(game.nash[x] @ game.axes)
        axes.plot(*point, "*", color="C2", ms=11, mec="white", label="Nash")
        axes.text(0.02, 0.86, f"$x = {x}$")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure

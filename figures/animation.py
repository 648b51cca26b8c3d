"""The animation at the top of the README: pi_t and pi_bar_t on the triangle of policies, and their
gaps.

    python -m figures.animation          (half a minute; writes figures/nash.gif)

Weighted rock-paper-scissors, P(1 > 2) = .9, P(2 > 3) = .8, P(3 > 1) = .7: exact Algorithm 1 on the
left, the same step with a reference that moves on the right, both from the same policy."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter

import dno
import solvers
from experiments.figures import STYLE, draw_simplex, on_simplex
from oracle import rock_paper_scissors

FILE = Path(__file__).parent / "nash.gif"
START = torch.tensor([[0.15, 0.7, 0.15]], dtype=torch.float64)
T, FRAMES = 150, 75
METHODS = {  # panel -> how it is solved
    "Algorithm 1": {"method": "dno", "eta": 0.5},
    "moving reference": {
        "method": "moving-reference",
        "eta": 0.5,
        "tau": 0.1,
        "move_reference_every": 15,
    },
}


def paths(settings: dict[str, object]) -> tuple[np.ndarray, np.ndarray, solvers.Solution]:
    """Points of the plane of pi_1..pi_T and of their averages so far, [T, 2] each, and the run."""
    run = solvers.solve(
        rock_paper_scissors(0.4, 0.3, 0.2).P, iterations=T, pi_ref=START, **settings
    )
    averages = run.policies[:-1].cumsum(0) / torch.arange(1, T + 1).double()[:, None, None]
    return on_simplex(run.policies[:-1, 0]), on_simplex(averages[:, 0]), run


def main() -> None:
    """Draw and write the file."""
    nash = on_simplex(dno.nash(rock_paper_scissors(0.4, 0.3, 0.2).P))[0]
    with plt.style.context([STYLE, {"font.size": 9}]):
        figure, panels = plt.subplots(1, 3, figsize=(8.4, 2.9), width_ratios=(1, 1, 1.05))
        moving = []  # (line, x, y): what a frame shows so much of
        for axes, (name, settings), dashes in zip(
            panels, METHODS.items(), ("-", "--"), strict=False
        ):
            last, average, run = paths(settings)
            draw_simplex(axes, ("1", "2", "3"))
            axes.set(xlim=(-0.1, 1.1), ylim=(-0.22, 0.95))
            axes.text(0.5, -0.2, name, ha="center")
            for points, colour, width in ((last, "C1", 0.9), (average, "C0", 2)):
                moving.append((axes.plot([], [], color=colour, lw=width)[0], *points.T, None))
                moving.append((axes.plot([], [], "o", color=colour, ms=5)[0], *points.T, 1))
            axes.plot(*nash, "*", color="C2", mec="w", ms=12)
            for gaps, colour, label in (
                (run.gap_last, "C1", r"$\pi_{t+1}$"),
                (run.gap_average, "C0", r"$\bar\pi_t$"),
            ):
                (line,) = panels[2].plot(
                    [], [], dashes, color=colour, lw=1.3, label=f"{label}, {name}"
                )
                moving.append((line, np.arange(1, T + 1), gaps.numpy(), None))
        panels[2].set(
            xlim=(0, T),
            ylim=(1e-4, 30),
            yscale="log",
            xlabel="$t$",
            ylabel="gap",
            yticks=[1e-4, 1e-3, 1e-2, 0.1, 1],
        )
        panels[2].legend(fontsize=7, loc="upper center", ncols=2, columnspacing=1, handlelength=1.6)

        def show(frame: int) -> list[plt.Line2D]:
            n = 1 + round(frame / (FRAMES - 1) * (T - 1))
            for line, x, y, tail in moving:
                line.set_data(x[n - tail if tail else 0 : n], y[n - tail if tail else 0 : n])
            return [line for line, *_ in moving]

        frames = [*range(FRAMES), *[FRAMES - 1] * 15]
        FuncAnimation(figure, show, frames).save(FILE, PillowWriter(fps=10), dpi=100)
        plt.close(figure)
    print(f"{FILE.name}: {FILE.stat().st_size / 1024:.0f} KiB, {len(frames)} frames")


if __name__ == "__main__":
    plt.switch_backend("Agg")
    main()

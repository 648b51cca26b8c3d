"""The style of figures, and the triangle on which policies are drawn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from torch import Tensor

STYLE = {
    "axes.prop_cycle": plt.cycler(
        color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"]
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}  # colours told apart by colour-blind readers (Okabe and Ito); line styles tell them apart in grey
TRIANGLE = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.75**0.5))


def on_simplex(weights: Tensor) -> np.ndarray:
    """Points [..., 2] of the plane for distributions over three things [..., 3], in the triangle of
    `draw_simplex`."""
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weights @ weights.new_tensor(TRIANGLE)).cpu().numpy()


def draw_simplex(axes: plt.Axes, corners: tuple[str, str, str]) -> None:
    """An empty triangle: the first corner at the lower left, the second at the lower right, the
    third above."""
    axes.fill(*zip(*TRIANGLE, strict=True), facecolor="none", edgecolor="0.5", lw=0.8)
    for name, place, side in zip(corners, TRIANGLE, ("top", "top", "bottom"), strict=True):
        axes.text(*place, name, ha="center", va=side, fontsize=8)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.1, 1.0), aspect="equal")
    axes.axis("off")

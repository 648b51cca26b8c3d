"""Theorem 1 measured: E_x TV(pi_{t+1}, pi*_{t+1})^2 against N, and C_t, for four places mu that the
pairs come from.

    python -m benchmarks.theorem_1

About 15 s; writes figures/theorem_1.png and prints the table.

The class is tabular and the game one step of Eq. (9) on 2 prompts x 8 responses. Labels are drawn,
b ~ Bernoulli(z), as the theorem's rate is about label noise: Eq. (8) is linear in z, so drawn
labels leave its expectation as it is. (With the exact r_t the labels z carry no noise, and a table
that has seen a connected set of pairs is exact: N then buys nothing more.)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dno
import fits
import solvers
from oracle import random_game

ROOT = Path(__file__).parent.parent
ETA, SIZES = 0.5, (1_000, 3_162, 10_000, 31_623, 100_000)  # SIZES: N, two decades


def problem() -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """pi_t, r_t, pi*_{t+1} and the mu compared, [2, 8] each: pi_t has 85% of its mass on three
    responses, and the target about as much; "bad" has 10% there."""
    heavy = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]], dtype=torch.float64)
    pi_t, bad = (heavy * share / 3 + (1 - heavy) * (1 - share) / 5 for share in (0.85, 0.1))
    r_t = dno.expected_win_rate(random_game(2, 8, seed=3).P, pi_t)
    pi_star = dno.soft_policy_iteration(pi_t.log(), r_t, ETA).exp()
    return (
        pi_t,
        r_t,
        pi_star,
        {"target": pi_star, "on-policy": pi_t, "uniform": torch.full_like(pi_t, 1 / 8), "bad": bad},
    )


def learn(mu: Tensor, N: int, seeds: int, generator: torch.Generator) -> Tensor:
    """pi_{t+1} [seeds, 2, 8]: Eq. (8) minimised over tables on `seeds` independent D_t of N tuples
    and drawn labels."""
    pi_t, r_t, _, _ = problem()
    X, Y = mu.shape
    x, y1, y2 = dno.draw_tuples(None, mu, mu, seeds * N, generator)
    win = torch.rand(seeds * N, generator=generator, dtype=torch.float64) < torch.sigmoid(
        r_t[x, y1] - r_t[x, y2]
    )
    winner, loser = torch.where(win, y1, y2), torch.where(win, y2, y1)
    seed = torch.arange(seeds).repeat_interleave(N)
    wins = (
        torch.bincount(((seed * X + x) * Y + winner) * Y + loser, minlength=seeds * X * Y * Y)
        .double()
        .view(-1, Y, Y)
    )
    compared = wins + wins.mT
    z = torch.where(compared > 0, wins / compared.clamp(min=1), 0.5)
    log_ratio = fits.fit_scores(z, compared) / ETA
    return (pi_t.log() + log_ratio.view(seeds, X, Y)).softmax(-1)


def measure(mu: Tensor, N: int, seeds: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """For each of `seeds` data sets E_x TV^2 and C_t, [seeds] each."""
    pi_star = problem()[2]
    learnt = learn(mu, N, seeds, torch.Generator().manual_seed(seed))
    errors = (dno.total_variation(learnt, pi_star) ** 2).mean(-1)
    return errors.numpy(), np.array([solvers.concentrability(pi_star, pi, mu, mu) for pi in learnt])


def slope(sizes: tuple[int, ...], errors: list[float]) -> float:
    """Of log error against log N, by least squares: -1 where the error falls like 1/N."""
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


def main() -> None:
    """Measure, print, draw."""
    import matplotlib.pyplot as plt

    from experiments.figures import STYLE

    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 4.2))
        print(f"{'mu':<10} {'slope':>6}  {'C_t':>6}  E TV^2 at N =", *(f"{N:>8}" for N in SIZES))
        for (name, mu), marker in zip(problem()[3].items(), "o^sD", strict=True):
            errors, C = zip(*(measure(mu, N) for N in SIZES), strict=True)
            means, C_t = [float(e.mean()) for e in errors], float(np.concatenate(C).mean())
            low, high = (np.array([np.quantile(e, q) for e in errors]) for q in (0.1, 0.9))
            print(
                f"{name:<10} {slope(SIZES, means):6.2f}  {C_t:6.2f}  {'':13}",
                *(f"{m:8.1e}" for m in means),
            )
            label = rf"{name}: $C_t = {C_t:.2f}$, slope {slope(SIZES, means):.2f}"
            (line,) = axes.plot(SIZES, means, marker + "-", label=label)
            axes.fill_between(SIZES, low, high, color=line.get_color(), alpha=0.12)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="$N$, tuples in $D_t$",
            ylabel=r"$E_x\,TV(\pi_{t+1}, \pi^*_{t+1})^2$",
        )
        axes.legend(title=r"$\mu_1 = \mu_2$; mean of 40 data sets, band 10 to 90%")
        (ROOT / "figures").mkdir(exist_ok=True)
        figure.savefig(ROOT / "figures" / "theorem_1.png")


if __name__ == "__main__":
    main()

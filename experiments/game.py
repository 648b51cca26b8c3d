"""The games of the main job, and what its runs are compared with.

Everything that is measured here is exact. Notation and axes are those of dno.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dno
import solvers
from checks import check_policy, check_preferences
from oracle import response_styles, style_game

# Settings with which the last iterate of a table converges.
MOVING_ETA, MOVING_TAU, MOVING_EVERY = 0.25, 0.125, 6
BETA = 0.05  # temperature of the reward maximiser that is shown for comparison


# --- Games ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Game:
    """A preference function with a Nash policy, and how its policies are drawn."""

    P: Tensor  # [X, Y, Y]
    rho: Tensor  # [X]
    nash: Tensor  # [X, Y], by linear programming
    axes: Tensor  # [Y, 3], how far each response leans to each corner of a triangle
    corners: tuple[str, str, str]

    def to(self, device: torch.device) -> Game:
        """The same on a device."""
        tables = {name: getattr(self, name).to(device) for name in ("P", "rho", "nash", "axes")}
        return replace(self, **tables)


def uniform_prompts(P: Tensor) -> Tensor:
    """rho [X] of equally many prompts of each kind."""
    return torch.full((len(P),), 1 / len(P), dtype=torch.float64)


def default_game(X: int, V: int, L: int, seed: int) -> Game:
    """A game of three styles, which beat each other in a circle: responses of L words out of V."""
    P = style_game(X, V, L, seed).P
    corners = ("style 1", "style 2", "style 3")
    return Game(P, uniform_prompts(P), dno.nash(P), response_styles(V, L), corners)


def read_tables(path: str) -> dict[str, Tensor]:
    """The arrays P and rho of an .npz file, float64, as far as it has them.

    ValueError if it cannot be read or one of them is not of real numbers."""
    wanted = "expected an .npz file with the array P [X, Y, Y]"
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            found = f"one array {list(arrays.shape)} without a name"
            raise ValueError(f"{found}; save it by numpy.savez(FILE, P=...)")
        with arrays:
            tables = {name: arrays[name] for name in arrays.files if name in ("P", "rho")}
    except Exception as error:  # numpy's reader lets those of half a dozen libraries through
        reason = " ".join(str(error).split())
        raise ValueError(f"game {path}: {reason or type(error).__name__}; {wanted}") from error
    for name, table in tables.items():
        if table.dtype.kind not in "fiu":
            raise ValueError(f"game {path}: {name} is of {table.dtype}; expected real numbers")
    return {name: torch.from_numpy(table.astype(np.float64)) for name, table in tables.items()}


def game_in(path: str, responses: int | None) -> Game:
    """The game in a file. Its triangle's corners are the responses of most weight at Nash.

    responses: how many there must be, V^L; any number when None. ValueError if it is no game."""
    tables = read_tables(path)
    if "P" not in tables:
        expected = "expected P [X, Y, Y], and optionally rho [X]"
        raise ValueError(f"game {path} has no array P; {expected}")
    P = check_preferences(tables["P"])
    rho = tables.get("rho", uniform_prompts(P))
    check_policy(rho, P.shape[:1], "rho")
    if responses is not None and responses != P.shape[1]:
        raise ValueError(f"game {path} has {P.shape[1]} responses; expected V^L = {responses}")
    pi = dno.nash(P)
    heaviest = (rho @ pi).topk(min(3, P.shape[1])).indices
    axes = torch.zeros(P.shape[1], 3, dtype=torch.float64)
    axes[heaviest, torch.arange(len(heaviest))] = 1
    first, second, third = [*(f"response {y}" for y in heaviest.tolist()), "-", "-"][:3]
    return Game(P, rho, pi, axes, (first, second, third))


# --- Comparisons ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparisons:
    """What the trained policy is compared with, all exact."""

    twin: solvers.Solution  # the same algorithm, line 4 by its closed form
    moving: solvers.Solution  # a table with a moving reference
    gap_first: float  # of pi_1, the uniform policy
    gap_nash: float  # of the linear program's solution
    gap_maximiser: float | None  # of the reward maximiser; None if there is no finite fit
    bound: list[float] | None  # on the twin's average after t iterations (C12); None if tau > 0


def bound(t: int, Y: int, eta: float) -> float:
    """2 eta ln Y / t + 1 / (4 eta), which no gap of unif(pi_1..pi_t) exceeds (C12).

    That holds in exact Algorithm 1 from the uniform policy."""
    return 2 * eta * math.log(Y) / t + 1 / (4 * eta)


def gap_of_maximiser(game: Game) -> float | None:
    """The gap of Eq. (2) at beta = 0.05 on the fit of Eq. (1) to uniform comparisons."""
    try:
        rewards = solvers.bradley_terry_fit(game.P)
    except ValueError as error:
        print(f"no reward maximiser to compare with: {error}")
        return None
    uniform = torch.full_like(rewards, 1 / rewards.shape[1])
    maximiser = dno.soft_policy_iteration(uniform.log(), rewards, BETA).exp()
    return dno.duality_gap(game.P, maximiser, game.rho)


def comparisons(game: Game, method: str, eta: float, T: int, tau: float, every: int) -> Comparisons:
    """Solve the game by tables: by the method at the run's settings, and by a moving reference.

    every: after how many iterations the reference moves; 0: never."""
    P, rho = game.P, game.rho
    twin = solvers.solve(P, method, eta, T, tau=tau, rho=rho, move_reference_every=every or None)
    moving = solvers.solve(
        P,
        "moving-reference",
        MOVING_ETA,
        T,
        tau=MOVING_TAU,
        rho=rho,
        move_reference_every=MOVING_EVERY,
    )
    Y = game.P.shape[1]
    return Comparisons(
        twin,
        moving,
        dno.duality_gap(game.P, twin.policies[0], game.rho),
        dno.duality_gap(game.P, game.nash, game.rho),
        gap_of_maximiser(game),
        [bound(t, Y, eta) for t in range(1, T + 1)] if tau == 0 else None,
    )


def measure(game: Game, it: dno.ExactIteration) -> dict[str, float | None]:
    """Exact numbers about an iteration.

    The duality gaps of pi_{t+1} and of unif(pi_1..pi_t); E_x TV(pi_{t+1}, pi*_{t+1});
    P(pi_{t+1} > pi_t), and what Eq. (9), reached exactly, would make of it,
    1/2 + eta E_x[KL(pi*_{t+1} || pi_t) + KL(pi_t || pi*_{t+1})] (the identity of C11); and C_t of
    Theorem 1, on-policy. C_t is None where it is undefined: where a probability has underflowed,
    and, as 0/0, where the target is hit exactly."""
    P, rho, log_pi_star = game.P, game.rho, it.log_pi_star
    pi_t, pi_star, pi_next = it.log_pi_t.exp(), log_pi_star.exp(), it.log_pi_next.exp()
    there = dno.kl_divergence(log_pi_star, it.log_pi_t)
    back = dno.kl_divergence(it.log_pi_t, log_pi_star)
    full_support = bool((torch.minimum(pi_star, pi_next) > 0).all())
    defined = full_support and bool((pi_star != pi_next).any())
    C_t = solvers.concentrability(pi_star, pi_next, pi_t, pi_t, rho) if defined else None
    return {
        "gap_last": dno.duality_gap(P, pi_next, rho),
        "gap_average": dno.duality_gap(P, it.pi_bar, rho),
        "tv_to_target": float(dno.prompt_mean(dno.total_variation(pi_next, pi_star), rho)),
        "win_rate_vs_previous": dno.win_rate(P, pi_next, pi_t, rho),
        "win_rate_predicted": float(0.5 + it.eta * dno.prompt_mean(there + back, rho)),
        "concentrability": C_t,
    }


# --- Summary --------------------------------------------------------------------------------------


def ratio(gap: float | None, other: float) -> float | None:
    """gap / other; None without a gap, or where the other is 0 up to rounding.

    It is 0 when the uniform policy is Nash already."""
    return None if gap is None or other < 1e-12 else gap / other


def verdict(lasts: list[float], gap_average: float, gap_first: float) -> tuple[bool, str]:
    """Whether the last iterate converged, and a sentence on it, by the last fifth of gaps [T]."""
    tail = lasts[-max(1, len(lasts) // 5) :]
    converged, rose = max(tail) <= gap_first / 4, max(tail) > 1.1 * min(lasts)
    if converged:
        words = "stayed below a quarter of the first"
    elif rose:
        average_works = "; the average does the work" if gap_average < min(tail) else ""
        words = "did NOT converge" + average_works
    else:
        words = "is still falling"
    lowest = f"lowest {min(lasts):.3f} in iteration {lasts.index(min(lasts)) + 1}"
    gaps = f"gap {min(tail):.3f} to {max(tail):.3f} in the last {len(tail)} iterations"
    return converged, f"Last iterate: {gaps}, {lowest}:\nit {words}."


def summarise(metrics: list[dict[str, Any]], others: Comparisons) -> dict[str, Any]:
    """Print the headline numbers of a run, and return them."""
    last, first, twin = metrics[-1], others.gap_first, others.twin
    gaps = {
        "first policy (uniform)": first,
        "trained policy, average of pi_1..pi_T": last["gap_average"],
        "trained policy, last": last["gap_last"],
        "tabular twin, average": twin.gap_average[-1].item(),
        "tabular twin, last": twin.gap_last[-1].item(),
        "bound on the twin's average (C12)": others.bound[-1] if others.bound else None,
        "reward maximiser (Bradley-Terry)": others.gap_maximiser,
        "table with moving reference, last": others.moving.gap_last[-1].item(),
        "Nash by linear programming": others.gap_nash,
    }
    print("\ngap      of first   policy")
    for name, gap in gaps.items():
        share = ratio(gap, first)
        shown = "-" if gap is None else f"{gap:.2g}", "-" if share is None else f"{share:.3f}"
        print(f"{shown[0]:8} {shown[1]:10} {name}")
    converged, words = verdict([row["gap_last"] for row in metrics], last["gap_average"], first)
    print(f"\n{words}")
    win_rates = [row["win_rate_vs_previous"] for row in metrics]
    distance = float(np.mean([row["tv_to_target"] for row in metrics]))
    print(
        f"P(pi_t+1 > pi_t) > 1/2 in {sum(w > 0.5 for w in win_rates)} of {len(win_rates)} "
        f"iterations, at least {min(win_rates):.5f}; mean TV to the target {distance:.4f}."
    )
    return {
        "gaps": gaps,
        "gap_last": last["gap_last"],
        "gap_average": last["gap_average"],
        "gap_nash": others.gap_nash,
        "gap_first": first,
        "gap_average_over_first": ratio(last["gap_average"], first),
        "gap_last_over_first": ratio(last["gap_last"], first),
        "gap_average_over_table": ratio(last["gap_average"], twin.gap_average[-1].item()),
        "gap_last_over_table": ratio(last["gap_last"], twin.gap_last[-1].item()),
        "last_iterate_converged": converged,
        "tv_to_target_mean": distance,
        "win_rate_vs_previous_min": min(win_rates),
        "seconds": sum(row["seconds"] for row in metrics),
    }

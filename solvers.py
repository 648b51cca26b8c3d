"""The same games by exact updates: what a table does where dno.py trains a policy.

Fits of Eq. (1) and Eq. (8) over tables, C_t of Theorem 1, the Nash policy of the regularised game,
and `solve`, which runs Algorithm 1 and its relatives. Notation and axes are those of dno.py.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checks import check_policy, check_positive, check_preferences, real_tensor
from dno import gap_of_rewards, prompt_mean, win_rate_against
from fits import fit_scores, pair_weights
from regularized import check_loop, geometric_mixture
from relatives import LINEAR, METHODS, MOVING, Memory, Situation, implicit_step

# --- Fits, Theorem 1 and the regularised game -----------------------------------------------------


def bradley_terry_fit(P: Tensor, mu1: Tensor | None = None, mu2: Tensor | None = None) -> Tensor:
    """Eq. (1) on infinitely many comparisons: argmax_r E log sigma(r(y+) - r(y-)), [X, Y], of mean
    0.

    y1 ~ mu1 and y2 ~ mu2 (each [X, Y], uniform when None) are labelled by P. ValueError on a bad P,
    or if no finite unique reward exists."""
    P = check_preferences(P).double()
    return fit_scores(P, pair_weights(P[..., 0], mu1, mu2))


def concentrability(
    pi_star: Tensor, pi: Tensor, mu1: Tensor, mu2: Tensor, rho: Tensor | None = None
) -> float:
    """C_t of Theorem 1: by how much pairs of mu1, mu2 show less of the difference of two policies.

    E_x E_{y1~pi_star, y2~pi}[(d(y1) - d(y2))^2] over the same under y1 ~ mu1, y2 ~ mu2, where
    d = log(pi_star / pi); all [X, Y], pi_star and pi of full support. NaN if pi_star = pi (0/0);
    ValueError where d is undefined."""
    pi_star = real_tensor(pi_star, "pi_star")
    named = {"pi_star": pi_star, "pi": pi, "mu1": mu1, "mu2": mu2}.items()
    tables = (check_policy(table, pi_star.shape, name) for name, table in named)
    pi_star, pi, mu1, mu2 = (table.to(pi_star) for table in tables)
    if not ((pi_star > 0) & (pi > 0)).all():
        expected = "expected full support, or log(pi_star / pi) is undefined"
        raise ValueError(f"pi_star or pi has an entry 0; {expected}")
    d = (pi_star / pi).log()
    shown = mean_square_difference(d, mu1, mu2, rho)
    return float(mean_square_difference(d, pi_star, pi, rho) / shown)


def mean_square_difference(d: Tensor, p: Tensor, q: Tensor, rho: Tensor | None = None) -> Tensor:
    """E_x E_{y1~p, y2~q}[(d(y1) - d(y2))^2], from means and variances.

    That needs no [Y, Y] table, and nothing cancels."""
    mean_p, mean_q = ((m * d).sum(-1, keepdim=True) for m in (p, q))
    variances = (p * (d - mean_p) ** 2).sum(-1) + (q * (d - mean_q) ** 2).sum(-1)
    return prompt_mean(variances + (mean_p - mean_q).squeeze(-1) ** 2, rho)


def rotation_frequency(P: Tensor, pi: Tensor) -> Tensor:
    """w [X]: the policies near pi, a Nash policy of full support, circle it by w/eta radians a step
    of Eq. (9). It is the largest imaginary part of the eigenvalues of diag(pi) A, A = P - 1/2.

    w < 8^(-1/2) < .354 in every preference game. With D = diag(pi), D A has the eigenvalues of B =
    D^(1/2) A D^(1/2), which is skew-symmetric: they come in pairs +-i w, so that 2 w^2 is at most
    |B|^2 = sum_{y != y'} pi(y) pi(y') A(y, y')^2 <= (1 - sum_y pi(y)^2)/4, as |A| <= 1/2.
    ValueError on a bad table."""
    P = check_preferences(P).double()
    pi = check_policy(pi, P.shape[:2]).to(P)
    return torch.linalg.eigvals(pi.unsqueeze(-1) * (P - 0.5)).imag.amax(-1)


def regularized_nash(P: Tensor, pi_ref: Tensor, tau: float) -> Tensor:
    """MW(P_tau) of Eq. (6), [X, Y], unique: the solution of pi = pi_ref exp(P(. > pi)/tau) / Z, by
    `relatives.implicit_step`.

    ValueError on a bad table, a pi_ref without full support or tau <= 0; RuntimeError without
    success."""
    P = check_preferences(P).double()
    check_positive(tau=tau)
    log_ref = check_policy(pi_ref, P.shape[:2], "pi_ref").to(P).log()
    if not log_ref.isfinite().all():
        raise ValueError("pi_ref has an entry 0; expected full support")
    return implicit_step(P, log_ref, tau).softmax(-1)


# --- solve ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """The run of `solve`."""

    policies: Tensor  # [T+1, X, Y], pi_1 first
    average: Tensor  # [X, Y], the method's average of pi_1..pi_T: uniform, or linear (LINEAR)
    last: Tensor  # [X, Y], pi_{T+1}
    gap_average: Tensor  # [T], duality gap of the average of pi_1..pi_t
    gap_last: Tensor  # [T], of pi_{t+1}


def solve(
    P: Tensor,
    method: str = "dno",
    eta: float = 1.0,
    iterations: int = 100,
    pi_ref: Tensor | None = None,
    tau: float = 0.0,
    *,
    pi_1: Tensor | None = None,
    rho: Tensor | None = None,
    move_reference_every: int | None = None,
    **options: Any,
) -> Solution:
    """Run `iterations` exact updates on P [X, Y, Y] by a method of `METHODS`.

    pi_ref [X, Y]: the reference, uniform when None. pi_1: the start, pi_ref when None. tau in [0,
    eta]: the pull towards pi_ref; at 0 the game is P itself, and "nash-md", "moving-reference" and
    "mpo" are "dno". "moving-reference" and "mpo" set pi_ref <- pi_{t+1} every
    `move_reference_every` iterations (`stable_period` when None, and a warning below it); other
    methods do so if told to. The average is the method's own: for the alternating ones, whose
    policy is the mean of two players', policy t has weight t; for all others it is uniform.
    options: mu1, mu2 [X, Y] of "dno-regression"; strength of "dsppo". ValueError on an unknown
    method, a bad table or a bad number."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    check_loop(eta, iterations, tau, move_reference_every or 0)
    P = check_preferences(P)
    uniform = torch.full_like(P[..., 0], 1 / P.shape[1])
    pi_ref = uniform if pi_ref is None else check_policy(pi_ref, P.shape[:2], "pi_ref").to(P)
    pi = pi_ref if pi_1 is None else check_policy(pi_1, P.shape[:2], "pi_1").to(P)
    every = period(method, eta, tau, move_reference_every) or iterations + 1
    log_pi, log_ref = pi.log(), pi_ref.log()
    log_before, memory = log_pi, Memory()
    policies, rewards = [pi], [win_rate_against(P, pi)]
    for t in range(1, iterations + 1):
        mixture = geometric_mixture(log_pi, log_ref, tau, eta)
        before = rewards[-2] if t > 1 else rewards[-1]
        now = Situation(
            P, eta, mixture, rewards[-1], before, t, tau, log_pi, log_before, log_ref, memory
        )
        log_before, log_pi = log_pi, METHODS[method](now, **options).log_softmax(-1)
        policies.append(log_pi.exp())
        rewards.append(win_rate_against(P, policies[-1]))
        if t % every == 0:
            log_ref = log_pi
    return summarised(torch.stack(policies), torch.stack(rewards), rho, method in LINEAR)


def stable_period(eta: float, tau: float) -> int:
    """How many iterations a reference should stay, that the last iterate gets to Nash:
    max(6, floor(sqrt(3 eta/tau)) + 1); 6 at tau = 0, where it does nothing.

    Near a full-support Nash policy a moving reference is stable for eta < tau N^2/3, to first order
    in its angles of rotation."""
    return max(6, math.floor(math.sqrt(3 * eta / tau)) + 1) if tau else 6


def period(method: str, eta: float, tau: float, asked: int | None) -> int | None:
    """Iterations for which the reference stays; None for ever. Warns if they are too few."""
    stable = stable_period(eta, tau)
    if asked and tau and asked < stable:
        found = f"move_reference_every is {asked} at eta {eta:g}, tau {tau:g}"
        warnings.warn(f"{found}; the last iterate may circle below {stable}", stacklevel=3)
    return asked or (stable if method in MOVING else None)


def summarised(
    policies: Tensor, rewards: Tensor, rho: Tensor | None, linear: bool = False
) -> Solution:
    """The `Solution` of pi_1..pi_{T+1}, [T+1, X, Y], whose expected win rates are rewards."""
    count = torch.arange(1, len(policies)).to(rewards)[:, None, None]
    weight = count if linear else torch.ones_like(count)
    total = weight.cumsum(0)
    average_rewards = (weight * rewards[:-1]).cumsum(0) / total
    gaps = gap_of_rewards(average_rewards, rho), gap_of_rewards(rewards[1:], rho)
    average = (weight * policies[:-1]).sum(0) / total[-1]
    return Solution(policies, average, policies[-1], *gaps)

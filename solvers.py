"""The same games by exact updates: what a table does where dno.py trains a policy.

Fits of Eq. (1) and Eq. (8) over tables, C_t of Theorem 1, the Nash policy of the regularised game,
and `solve`, which runs Algorithm 1 and its relatives. Notation and axes are those of dno.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from checks import FLOAT32, check_policy, check_positive, check_preferences, real_tensor
from dno import gap_of_rewards, prompt_mean, win_rate_against
from regularized import check_loop, geometric_mixture

LARGEST_SCORE = 25  # sigma(25) = 1 - 1e-11: the loss still falls towards infinite scores

# --- Fits over tables -----------------------------------------------------------------------------

Function = Callable[[Tensor], Tensor]
SOLVE_TOLERANCE = 1e-10  # relative residual of linear equations; elimination leaves below 1e-14


def solve_linear(A: Tensor, b: Tensor) -> Tensor:
    """The x [X, Y] of A x = b for every A [X, Y, Y] and b [X, Y], float64.

    By numpy, one matrix after another: torch's solver of several hangs or errs on some CPUs that
    run several threads. RuntimeError unless the residual |A x - b| is small beside |A| |x| + |b|,
    where a vector counts by its largest entry and A by its largest row sum."""
    try:
        found = np.linalg.solve(A.cpu().numpy(), b.cpu().numpy()[..., None])
    except np.linalg.LinAlgError as error:
        raise RuntimeError("linear equations are singular; expected one solution") from error
    x = torch.from_numpy(found).to(A)
    size = A.abs().sum(-1).amax(-1) * x.abs().amax((-2, -1)) + b.abs().amax(-1)
    residual = (A @ x - b.unsqueeze(-1)).abs().amax((-2, -1)) / size.clamp(min=FLOAT32.tiny)
    if not residual.max() <= SOLVE_TOLERANCE:  # also if there is a NaN
        expected = f"expected at most {SOLVE_TOLERANCE:.0e}"
        raise RuntimeError(f"linear equations left a residual of {residual.max():.1e}; {expected}")
    return x.squeeze(-1)


@torch.no_grad()
def newton(residual: Function, jacobian: Function, u: Tensor, tolerance: float) -> Tensor:
    """A root of residual, each row of [X, Y] by itself: Newton's method from u.

    A step is halved until it does not lengthen the residual, which reaches a root from anywhere if
    jacobian(u) [X, Y, Y] is nowhere singular. RuntimeError without success."""
    f = residual(u)
    for _ in range(200):
        if f.abs().max() <= tolerance:
            return u
        step, size = solve_linear(jacobian(u), f), torch.ones_like(u[:, :1])
        new = residual(u - size * step)
        longer = new.norm(dim=-1, keepdim=True) > f.norm(dim=-1, keepdim=True)
        while longer.any():
            size = torch.where(longer, size / 2, size)
            new = residual(u - size * step)
            longer = new.norm(dim=-1, keepdim=True) > f.norm(dim=-1, keepdim=True)
        u, f = u - size * step, new
    found = f"a residual of {f.abs().max():.1e} after 200 steps"
    raise RuntimeError(f"Newton's method left {found}; expected {tolerance:.0e}")


def fit_scores(z: Tensor, weight: Tensor) -> Tensor:
    """argmin_s sum_{y,y'} weight(y, y') cross_entropy(z(y, y'), s(y) - s(y')), [X, Y], of mean 0.

    z and weight: [X, Y, Y], z complementary, weight >= 0. With z = P it is the Bradley-Terry fit of
    Eq. (1); with z = sigma of reward differences it is Eq. (8) over a tabular class, s = eta
    log(pi/pi_t). Newton's method on the gradient of the loss, which is convex. ValueError if there
    is no finite or no unique minimiser: some responses always win, always lose or are never
    compared."""
    both = weight + weight.mT  # (y, y') says what (y', y) does
    weight = both / weight.sum((-2, -1), keepdim=True)

    def gradient(s: Tensor) -> Tensor:
        z_hat = torch.sigmoid(s.unsqueeze(-1) - s.unsqueeze(-2))
        return (weight * (z_hat - z)).sum(-1) + s.mean(-1, keepdim=True)

    def hessian(s: Tensor) -> Tensor:  # the last term, like the gradient's, pins the mean of s to 0
        z_hat = torch.sigmoid(s.unsqueeze(-1) - s.unsqueeze(-2))
        curvature = weight * z_hat * (1 - z_hat)
        return torch.diag_embed(curvature.sum(-1)) - curvature + 1 / s.shape[-1]

    if any(connected_components(compared > 0)[0] > 1 for compared in weight.cpu().numpy()):
        never = "some responses are never compared with the others"
        raise ValueError(f"no unique scores: {never}, directly or through third ones")
    scores = newton(gradient, hessian, torch.zeros_like(z[..., 0]), tolerance=1e-14)
    if (scores.amax(-1) - scores.amin(-1)).max() > LARGEST_SCORE:
        raise ValueError(
            "no finite scores: some responses always win or always lose their comparisons"
        )
    return scores


def pair_weights(like: Tensor, mu1: Tensor | None, mu2: Tensor | None) -> Tensor:
    """mu1(y) mu2(y'), [X, Y, Y], for tables of the shape of like [X, Y], uniform when None.

    ValueError on a table that is no policy."""
    uniform = torch.full_like(like, 1 / like.shape[1])
    mus = (uniform if mu is None else check_policy(mu, like.shape, "mu") for mu in (mu1, mu2))
    first, second = (mu.to(like) for mu in mus)
    return first.unsqueeze(-1) * second.unsqueeze(-2)


def bradley_terry_fit(P: Tensor, mu1: Tensor | None = None, mu2: Tensor | None = None) -> Tensor:
    """Eq. (1) on infinitely many comparisons: argmax_r E log sigma(r(y+) - r(y-)), [X, Y], of mean
    0.

    y1 ~ mu1 and y2 ~ mu2 (each [X, Y], uniform when None) are labelled by P. ValueError on a bad P,
    or if no finite unique reward exists."""
    P = check_preferences(P).double()
    return fit_scores(P, pair_weights(P[..., 0], mu1, mu2))


# --- Theorem 1 and the regularised game -----------------------------------------------------------


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


def regularized_nash(P: Tensor, pi_ref: Tensor, tau: float) -> Tensor:
    """MW(P_tau) of Eq. (6), [X, Y], unique: the solution of pi = pi_ref exp(P(. > pi)/tau) / Z.

    Newton's method on F(u) = u - log pi_ref - P softmax(u)/tau. The Jacobian I - A M/tau, with A =
    P - 1/2 skew-symmetric and M the covariance of softmax(u), is never singular: A M has imaginary
    eigenvalues only, since M is positive semidefinite. ValueError on a bad table, a pi_ref without
    full support or tau <= 0; RuntimeError without success."""
    P = check_preferences(P).double()
    check_positive(tau=tau)
    log_ref = check_policy(pi_ref, P.shape[:2], "pi_ref").to(P).log()
    if not log_ref.isfinite().all():
        raise ValueError("pi_ref has an entry 0; expected full support")
    A, eye = P - 0.5, torch.eye(P.shape[1]).to(P)

    def jacobian(u: Tensor) -> Tensor:
        pi = u.softmax(-1)
        return eye - A @ (torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)) / tau

    def residual(u: Tensor) -> Tensor:
        return u - log_ref - win_rate_against(A, u.softmax(-1)) / tau

    return newton(residual, jacobian, log_ref, tolerance=1e-13 * (1 + 1 / tau)).softmax(-1)


# --- Exact updates --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Situation:
    """What an update of iteration t sees; tables are [X, Y]."""

    P: Tensor  # [X, Y, Y]
    eta: float
    log_mixture: Tensor  # log of pi_t^(1 - tau/eta) pi_ref^(tau/eta), not normalised
    r_t: Tensor  # expected win rates against pi_t
    r_before: Tensor  # against pi_{t-1}; r_t itself if t = 1

    def step(self, r: Tensor) -> Tensor:
        """log pi*, not normalised, of soft policy iteration on the rewards r: Eq. (9)."""
        return self.log_mixture + r / self.eta

    def against(self, log_pi: Tensor) -> Tensor:
        """Expected win rates against a policy, given by its logarithm up to a constant."""
        return win_rate_against(self.P, log_pi.softmax(-1))


def soft_update(now: Situation) -> Tensor:
    """Eq. (9). With tau > 0 it is option I of Algorithm 3; with pi_ref fixed, INPO (Zhang 2024)."""
    return now.step(now.r_t)


def regression_update(
    now: Situation, mu1: Tensor | None = None, mu2: Tensor | None = None
) -> Tensor:
    """Eq. (8) minimised over tabular logits, on all pairs of mu1, mu2 [X, Y], uniform when None."""
    z = torch.sigmoid(now.r_t.unsqueeze(-1) - now.r_t.unsqueeze(-2))
    return now.log_mixture + fit_scores(z, pair_weights(now.r_t, mu1, mu2)) / now.eta


def nash_md_update(now: Situation) -> Tensor:
    """Eq. (7), Nash-MD (Munos 2023): rewards against the mixture. Option II of Algorithm 3."""
    return now.step(now.against(now.log_mixture))


def optimistic_update(now: Situation) -> Tensor:
    """Optimistic multiplicative weights: r_t counts twice, and r_{t-1} is taken back."""
    return now.step(2 * now.r_t - now.r_before)


def extragradient_update(now: Situation) -> Tensor:
    """EGPO (Zhou 2025): the rewards are those against a trial step."""
    return now.step(now.against(now.step(now.r_t)))


def sppo_update(now: Situation) -> Tensor:
    """SPPO (Wu 2024): the policy pi_t e^h of least E_{y~pi_t}[(h - g)^2], g = (r_t - 1/2)/eta.

    The Lagrangian's derivative is 0 where h + c e^h = g, with c such that the policy sums to 1:
    Newton's method on h and c together, while g grows from 0 by steps of at most 1/2. RuntimeError
    without success."""
    pi, g = now.log_mixture.softmax(-1), (now.r_t - 0.5) / now.eta
    h, c = torch.zeros_like(g), torch.zeros_like(g[:, :1])
    stages = max(1, int(2 * g.abs().max()) + 1)
    for step in range(10 * min(stages, 200)):  # beyond that eta is too small for float64 anyway
        weight = h.exp()
        slope, off = 1 + c * weight, h + c * weight - g * (step // 10 + 1) / stages
        dc = (pi * weight * (1 - off / slope)).sum(-1, keepdim=True) - 1
        dc = dc / (pi * weight**2 / slope).sum(-1, keepdim=True)
        h, c = h - (off + weight * dc) / slope, c + dc
    log_pi = now.log_mixture.log_softmax(-1) + h
    normalised = log_pi.logsumexp(-1).abs().max() < 1e-9
    solved = (h + c * h.exp() - g).abs().max() < 1e-9 * (1 + g.abs().max())
    if not (normalised and solved):
        raise RuntimeError(f"no SPPO update found at eta {now.eta}; expected a larger eta")
    return log_pi


METHODS: dict[str, Callable[..., Tensor]] = {  # name -> update: log pi_{t+1}, not normalised
    "dno": soft_update,
    "dno-regression": regression_update,
    "nash-md": nash_md_update,
    "omwu": optimistic_update,
    "sppo": sppo_update,
    "moving-reference": soft_update,  # MPO (Wang 2024), COMAL (Liu 2024)
    "extragradient": extragradient_update,
}


@dataclass(frozen=True)
class Solution:
    """The run of `solve`."""

    policies: Tensor  # [T+1, X, Y], pi_1 first
    average: Tensor  # [X, Y], unif(pi_1..pi_T)
    last: Tensor  # [X, Y], pi_{T+1}
    gap_average: Tensor  # [T], duality gap of unif(pi_1..pi_t)
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
    **options: Tensor,
) -> Solution:
    """Run `iterations` exact updates on P [X, Y, Y] by a method of `METHODS`.

    pi_ref [X, Y]: the reference, uniform when None. pi_1: the start, pi_ref when None. tau in [0,
    eta]: the pull towards pi_ref; at 0 the game is P itself, and "nash-md" and "moving-reference"
    are "dno". "moving-reference" sets pi_ref <- pi_{t+1} every `move_reference_every` iterations (6
    when None); other methods do so if told to. options: mu1, mu2 [X, Y] of "dno-regression".
    ValueError on an unknown method, a bad table or a bad number."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    check_loop(eta, iterations, tau, move_reference_every or 0)
    P = check_preferences(P)
    uniform = torch.full_like(P[..., 0], 1 / P.shape[1])
    pi_ref = uniform if pi_ref is None else check_policy(pi_ref, P.shape[:2], "pi_ref").to(P)
    pi = pi_ref if pi_1 is None else check_policy(pi_1, P.shape[:2], "pi_1").to(P)
    every = move_reference_every or (6 if method == "moving-reference" else iterations + 1)
    log_pi, log_ref = pi.log(), pi_ref.log()
    policies, rewards = [pi], [win_rate_against(P, pi)]
    for t in range(1, iterations + 1):
        mixture = geometric_mixture(log_pi, log_ref, tau, eta)
        before = rewards[-2] if t > 1 else rewards[-1]
        now = Situation(P, eta, mixture, rewards[-1], before)
        log_pi = METHODS[method](now, **options).log_softmax(-1)
        policies.append(log_pi.exp())
        rewards.append(win_rate_against(P, policies[-1]))
        if t % every == 0:
            log_ref = log_pi
    return summarised(torch.stack(policies), torch.stack(rewards), rho)


def summarised(policies: Tensor, rewards: Tensor, rho: Tensor | None) -> Solution:
    """The `Solution` of pi_1..pi_{T+1}, [T+1, X, Y], whose expected win rates are rewards."""
    count = torch.arange(1, len(policies)).to(rewards)[:, None, None]
    average_rewards = rewards[:-1].cumsum(0) / count
    gaps = gap_of_rewards(average_rewards, rho), gap_of_rewards(rewards[1:], rho)
    return Solution(policies, policies[:-1].mean(0), policies[-1], *gaps)

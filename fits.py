"""Newton's method, and what it fits over tables: Eq. (1) and Eq. (8) on infinitely many pairs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from checks import FLOAT32, check_policy

LARGEST_SCORE = 25  # sigma(25) = 1 - 1e-11: the loss still falls towards infinite scores

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

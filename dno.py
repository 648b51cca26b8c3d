"""Direct Nash Optimization (Rosset et al. 2024, arXiv 2404.03715v1), to be read beside the paper: sections 2 to 4, appendix A.

Everything here is mathematics on tensors: no files, no tokenizers, no network.

Notation. Axes: X prompts, Y responses, B pairs, T iterations; K samples of a prompt, n of them with the gold one, M different
responses in the pairs. Tables are float64, policies are rows on the simplex.

| paper            | here            | shape, range          | meaning                                                   |
|------------------|-----------------|-----------------------|-----------------------------------------------------------|
| P(y > y' | x)    | `P[x, y, y']`   | [X, Y, Y] in [0, 1]   | probability that y is preferred to y'; P + P^T = 1        |
| rho              | `rho`           | [X], sums to 1        | prompt distribution; None means uniform                   |
| pi_t             | `pi_t`          | [X, Y], rows sum to 1 | the policy of iteration t; `log_pi_t` is its logarithm    |
| pi*_{t+1}        | `pi_star`       | [X, Y]                | the target of iteration t, Eq. (9)                        |
| pi_bar           | `pi_bar`        | [X, Y]                | unif(pi_1..pi_t), the average iterate                     |
| pi_ref, tau      | `pi_ref`, `tau` | [X, Y]; tau >= 0      | reference policy, and the strength of the pull towards it |
| r_t(x, y)        | `r_t`           | [X, Y] in [0, 1]      | expected win rate of y against pi_t                       |
| eta              | `eta`           | > 0                   | divides r_t: a LARGER eta is a SMALLER step               |
| mu_1, mu_2       | `mu1`, `mu2`    | [X, Y]                | where the two responses of a training pair are drawn from |
| Delta_{pi,t}, z^ | `margin`        | [B], and its sigmoid  | eta times the difference of log ratios log(pi/pi_t)       |
| Delta*_t, z      | `r1 - r2`       | [B], and its sigmoid  | difference of expected win rates, and the soft label      |
| eta~             | `eta`           | > 0                   | of Algorithms 2 and 4; DPO's beta. Larger is slower too   |
| 1_P(y, y')       | `wins`          | [X, n, n] in [0, 1]   | who beats whom among the responses to a prompt            |
| (x, y+, y-)      | `chosen`        | [B, 3] int64          | prompt, better and worse response, by number              |

The duality gap is E_x[max_y P(y > pi) - min_y P(pi > y)] = E_x[2 max_y P(y > pi) - 1]: 0 exactly at Nash, at most 1. It is
twice what some libraries call exploitability; no other measure of the distance from Nash is used here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from scipy.sparse.csgraph import connected_components
from torch import Tensor

TOLERANCE = 1e-6  # on sums that must be 1; float32 rows of a few thousand entries stay well inside it
NASH_TOLERANCE = 1e-8  # the duality gap that a policy returned as Nash may have
SOLVE_TOLERANCE = 1e-10  # relative residual of linear equations; elimination leaves below 1e-14
FLOAT32 = torch.finfo(torch.float32)

# --- Section 2: preferences, win rates, Nash --------------------------------------------------------------------------------


def real_tensor(value: Any, name: str) -> Tensor:
    """value as a tensor of real numbers. A tensor stays as it is. What else torch.as_tensor takes
    is converted, Python numbers to float64. ValueError naming what is neither, or is complex."""
    kind, expected = type(value).__name__, "expected a tensor of real numbers"
    try:
        table = torch.as_tensor(value, dtype=None if hasattr(value, "dtype") else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "pass its .P" if hasattr(value, "P") else "pass a tensor, or rows of equal length"
        raise ValueError(f"{name} is of type {kind}; {expected}: {hint}") from error
    if table.is_complex():
        raise ValueError(f"{name} is {table.dtype}; {expected}: pass its real part, {name}.real")
    return table


def check_preferences(P: Tensor) -> Tensor:
    """Return P [X, Y, Y] if it is a preference function (section 2.2): entries in [0, 1] and P + P^T = 1, so that the
    diagonal is 1/2. Raises ValueError naming the first entry (x, y, y') that breaks this, and its value."""
    P = real_tensor(P, "P")
    if P.ndim != 3 or P.shape[1] != P.shape[2] or P.numel() == 0 or not P.is_floating_point():
        raise ValueError(f"P is {P.dtype} of shape {list(P.shape)}; expected floating point of shape [X, Y, Y]")
    low, high = P.aminmax()
    if not (low >= 0 and high <= 1):  # so, too, if there is a NaN
        x, y, z = (~((P >= 0) & (P <= 1))).nonzero()[0].tolist()
        raise ValueError(f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected a probability in [0, 1]")
    low, high = (P + P.mT).aminmax()
    if max(1 - low, high - 1) > TOLERANCE:
        x, y, z = ((P + P.mT - 1).abs() > TOLERANCE).nonzero()[0].tolist()
        raise ValueError(f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected 1 - P[{x}, {z}, {y}] = {1 - P[x, z, y]:.6g}")
    return P


def check_policy(pi: Tensor, shape: torch.Size, name: str = "pi") -> Tensor:
    """Return pi if it has the given shape and its rows are distributions; ValueError naming the first row that is not."""
    pi = real_tensor(pi, name)
    if pi.shape != shape:
        raise ValueError(f"{name} has shape {list(pi.shape)}; expected {list(shape)}")
    bad = ~((pi >= 0).all(-1) & ((pi.sum(-1) - 1).abs() <= TOLERANCE))
    if bad.any():
        x = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}{x} has sum {pi[*x].sum():.6g}, minimum {pi[*x].min():.6g}; expected entries >= 0, sum 1")
    return pi


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first value that is not a finite number above 0. Nor may its
    inverse overflow or vanish in float32: from an infinite r / eta come policies of NaN."""
    for name, value in values.items():
        if not (isinstance(value, Real) and FLOAT32.tiny <= value <= 1 / FLOAT32.tiny):
            bounds = f"{FLOAT32.tiny:.1e} to {1 / FLOAT32.tiny:.1e}"
            expected = f"expected a finite number above 0, from {bounds}"
            raise ValueError(f"{name} is {value!r}; {expected}")


def check_whole(least: int, **values: int) -> None:
    """Raise ValueError naming the first value that is not a whole number of at least `least`."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and value >= least):
            expected = f"expected a whole number of at least {least}"
            raise ValueError(f"{name} is {value!r}; {expected}")


def prompt_mean(values: Tensor, rho: Tensor | None = None) -> Tensor:
    """E_{x~rho} over the last axis of values [..., X]; uniform when rho [X] is None. ValueError on a bad rho."""
    if rho is None:
        return values.mean(-1)
    return values @ check_policy(rho, values.shape[-1:], "rho").to(values)


def _against(P: Tensor, pi: Tensor) -> Tensor:
    """P(y > pi | x) for every y, [X, Y]: one matrix-vector product a prompt, nothing checked. As a row times P^T, which the
    CPU's batched product does four times as fast as P times a column."""
    return torch.bmm(pi.unsqueeze(1), P.mT).squeeze(1)


def expected_win_rate(P: Tensor, pi: Tensor) -> Tensor:
    """r(x, y) = E_{y'~pi(.|x)} P(y > y' | x), [X, Y] in [0, 1]: Alg. 1, line 3. ValueError on a bad P or pi."""
    P = check_preferences(P)
    return _against(P, check_policy(pi, P.shape[:2]).to(P))


def win_rate(P: Tensor, pi: Tensor, pi_prime: Tensor, rho: Tensor | None = None) -> float:
    """P(pi > pi') = E_{x~rho, y~pi, y'~pi'} P(y > y' | x), in [0, 1] (section 2). ValueError on a bad argument."""
    r = expected_win_rate(P, pi_prime)
    return float(prompt_mean((check_policy(pi, r.shape) * r).sum(-1), rho))


def gap_of_rewards(r: Tensor, rho: Tensor | None = None) -> Tensor:
    """Duality gap of the policy whose expected win rates are r [..., X, Y]: E_x[2 max_y r(x, y) - 1], shape [...].

    r is linear in the policy: the average policy's r is the average r, so its gap costs no further product with P."""
    return prompt_mean((2 * r.amax(-1) - 1).clamp(min=0), rho)  # rounding alone could take it below 0


def duality_gap(P: Tensor, pi: Tensor, rho: Tensor | None = None) -> float:
    """E_x[max_y P(y > pi | x) - min_y P(pi > y | x)] = E_x[2 max_y P(y > pi | x) - 1], in [0, 1]; 0 exactly at the Nash
    policies of Eq. (3). ValueError on a bad argument."""
    return float(gap_of_rewards(expected_win_rate(P, pi), rho))


def nash(P: Tensor) -> Tensor:
    """A Nash policy, MW(P) = argmax_pi min_pi' P(pi > pi') of Eq. (3), [X, Y] float64, by one linear program a prompt:
    maximise v subject to sum_y pi(y) P(y > y') >= v for every y', and pi on the simplex.

    Raises ValueError on a bad P, and RuntimeError if the solver fails or leaves a duality gap of 1e-8 or more."""
    P = check_preferences(P).double()
    P = (P + 1 - P.mT) / 2  # a float32 table is complementary to 1e-7 only, which would show as a gap
    Y = P.shape[1]
    rows = []
    for table in P.cpu().numpy():
        found = linprog(
            c=np.append(np.zeros(Y), -1.0),
            A_ub=np.hstack([-table.T, np.ones((Y, 1))]), b_ub=np.zeros(Y),
            A_eq=np.append(np.ones(Y), 0.0)[None], b_eq=[1.0],
            bounds=[(0, None)] * Y + [(None, None)],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )  # fmt: skip
        if not found.success:
            raise RuntimeError(f"the linear program of prompt {len(rows)} failed: {found.message}")
        rows.append(found.x[:Y].clip(0) / found.x[:Y].clip(0).sum())
    pi = torch.from_numpy(np.stack(rows)).to(P.device)
    worst = float((2 * _against(P, pi).amax(-1) - 1).max())
    if worst >= NASH_TOLERANCE:
        raise RuntimeError(f"the linear program left a duality gap of {worst:.1e}; expected below {NASH_TOLERANCE:.0e}")
    return pi


def cross_entropy(z: Tensor, margin: Tensor) -> Tensor:
    """-z log sigma(margin) - (1 - z) log sigma(-margin), elementwise, in nats: Eq. (11), and Eq. (1) where the margin is a
    difference of rewards. Its minimum over the margin is the entropy of z, at sigma(margin) = z."""
    return -z * F.logsigmoid(margin) - (1 - z) * F.logsigmoid(-margin)


def solve_linear(A: Tensor, b: Tensor) -> Tensor:
    """The x [X, Y] of A x = b for every A [X, Y, Y] and b [X, Y], float64. By numpy, one matrix
    after another: torch's solver of several hangs or errs on some CPUs that run several threads.
    RuntimeError unless |A x - b| is small beside |A| |x| + |b|, by largest entry (A: row sum)."""
    try:
        found = np.linalg.solve(A.cpu().numpy(), b.cpu().numpy()[..., None])
    except np.linalg.LinAlgError as error:
        raise RuntimeError("linear equations are singular; expected one solution") from error
    x = torch.from_numpy(found).to(A)
    size = A.abs().sum(-1).amax(-1) * x.abs().amax((-2, -1)) + b.abs().amax(-1)
    residual = (A @ x - b.unsqueeze(-1)).abs().amax((-2, -1)) / size.clamp(min=FLOAT32.tiny)
    if not residual.max() <= SOLVE_TOLERANCE:  # so, too, if there is a NaN
        expected = f"expected at most {SOLVE_TOLERANCE:.0e}"
        raise RuntimeError(f"linear equations left a residual of {residual.max():.1e}; {expected}")
    return x.squeeze(-1)


@torch.no_grad()
def newton(residual: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Tensor], u: Tensor, tolerance: float) -> Tensor:
    """A root of residual, each row of [X, Y] by itself: Newton's method from u, halving a step until it does not lengthen the
    residual, which reaches a root from anywhere if jacobian(u) [X, Y, Y] is nowhere singular. RuntimeError without success."""
    f = residual(u)
    for _ in range(200):
        if f.abs().max() <= tolerance:
            return u
        step, size = solve_linear(jacobian(u), f), torch.ones_like(u[:, :1])
        while (longer := (new := residual(u - size * step)).norm(dim=-1, keepdim=True) > f.norm(dim=-1, keepdim=True)).any():
            size = torch.where(longer, size / 2, size)
        u, f = u - size * step, new
    raise RuntimeError(f"Newton's method left a residual of {f.abs().max():.1e} after 200 steps; expected {tolerance:.0e}")


def fit_scores(z: Tensor, weight: Tensor) -> Tensor:
    """argmin_s sum_{y,y'} weight(y, y') cross_entropy(z(y, y'), s(y) - s(y')) for each prompt, [X, Y], of mean 0.

    z and weight: [X, Y, Y], z complementary, weight >= 0. With z = P it is the Bradley-Terry fit of Eq. (1); with z = sigma of
    reward differences it is Eq. (8) over a tabular class, s = eta log(pi/pi_t). Newton's method on the gradient (the loss is
    convex). ValueError if there is no finite or no unique minimiser: some always win, always lose or are never compared."""
    weight = (weight + weight.mT) / weight.sum((-2, -1), keepdim=True)  # (y, y') and (y', y) say the same

    def gradient(s: Tensor) -> Tensor:
        return (weight * (torch.sigmoid(s.unsqueeze(-1) - s.unsqueeze(-2)) - z)).sum(-1) + s.mean(-1, keepdim=True)

    def hessian(s: Tensor) -> Tensor:  # the last term, like the gradient's, pins the mean of s to 0
        z_hat = torch.sigmoid(s.unsqueeze(-1) - s.unsqueeze(-2))
        curvature = weight * z_hat * (1 - z_hat)
        return torch.diag_embed(curvature.sum(-1)) - curvature + 1 / s.shape[-1]

    if any(connected_components(compared > 0)[0] > 1 for compared in weight.cpu().numpy()):
        raise ValueError("no unique scores: some responses are never compared with the others, directly or through third ones")
    scores = newton(gradient, hessian, torch.zeros_like(z[..., 0]), tolerance=1e-14)
    if (scores.amax(-1) - scores.amin(-1)).max() > 25:  # sigma(25) = 1 - 1e-11: the loss still falls towards infinite scores
        raise ValueError("no finite scores: some responses always win or always lose their comparisons")
    return scores


def pair_weights(like: Tensor, mu1: Tensor | None, mu2: Tensor | None) -> Tensor:
    """mu1(y) mu2(y'), [X, Y, Y], for tables of the shape of like [X, Y], uniform when None. ValueError on a bad table."""
    uniform = torch.full_like(like, 1 / like.shape[1])
    mus = (uniform if mu is None else check_policy(mu, like.shape, "mu") for mu in (mu1, mu2))
    mu1, mu2 = (mu.to(like) for mu in mus)
    return mu1.unsqueeze(-1) * mu2.unsqueeze(-2)


def bradley_terry_fit(P: Tensor, mu1: Tensor | None = None, mu2: Tensor | None = None) -> Tensor:
    """Eq. (1) on infinitely many comparisons of y1 ~ mu1, y2 ~ mu2 (each [X, Y], uniform when None) labelled by P: the reward
    argmax_r E log sigma(r(y+) - r(y-)), [X, Y], of mean 0. ValueError on a bad P, or if no finite unique reward exists."""
    P = check_preferences(P).double()
    return fit_scores(P, pair_weights(P[..., 0], mu1, mu2))


# --- Section 3: soft policy iteration and its regression --------------------------------------------------------------------


def soft_policy_iteration(log_pi: Tensor, r: Tensor, eta: float) -> Tensor:
    """log pi*, pi*(y|x) = pi(y|x) exp(r(x, y) / eta) / Z(x): Eq. (9), [X, Y]; with pi_ref and beta in place of pi and eta it
    is the solution of Eq. (2). log_pi need not be normalised. ValueError unless eta > 0."""
    check_positive(eta=eta)
    return (log_pi + r / eta).log_softmax(-1)


def internal_reward(log_pi: Tensor, log_pi_t: Tensor, eta: float) -> Tensor:
    """r_{pi,t} = eta log(pi / pi_t), the reward for which pi is the target of soft policy iteration from pi_t: Eq. (10) up to
    eta log Z(x), which no difference of rewards can see (the paper prints eta Z(x))."""
    return eta * (log_pi - log_pi_t)


def dno_loss(log_ratio1: Tensor, log_ratio2: Tensor, r1: Tensor, r2: Tensor, eta: float) -> Tensor:
    """Eq. (8) = Eq. (12) as a loss [B] in nats: cross-entropy of z = sigma(r1 - r2) against z^ = sigma(eta log_ratio1 - eta
    log_ratio2), with log_ratio = log pi(y|x) - log pi_t(y|x) of whole responses (a sum over tokens, never a mean).
    No gradient flows through r1, r2. Its minimum is the entropy of z, at z^ = z; at pi = pi_t it is ln 2, whatever r1, r2."""
    z = torch.sigmoid(r1 - r2).detach()
    return cross_entropy(z, eta * (log_ratio1 - log_ratio2))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_y p log(p/q) along the last axis, in nats; 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV(p, q) = sum_y |p - q| / 2 along the last axis, in [0, 1]."""
    return (p - q).abs().sum(-1) / 2


def concentrability(pi_star: Tensor, pi: Tensor, mu1: Tensor, mu2: Tensor, rho: Tensor | None = None) -> float:
    """C_t of Theorem 1: E_x E_{y1~pi_star, y2~pi}[(d(y1) - d(y2))^2] over the same under y1 ~ mu1, y2 ~ mu2, where
    d = log(pi_star / pi); all [X, Y], pi_star and pi of full support. By how much pairs of mu1, mu2 show less of the difference
    between pi_star and pi than pairs of these two would. NaN if pi_star = pi (0/0); ValueError where d is undefined."""
    pi_star = real_tensor(pi_star, "pi_star")
    named = {"pi_star": pi_star, "pi": pi, "mu1": mu1, "mu2": mu2}.items()
    tables = (check_policy(table, pi_star.shape, name) for name, table in named)
    pi_star, pi, mu1, mu2 = (table.to(pi_star) for table in tables)
    if not ((pi_star > 0) & (pi > 0)).all():
        raise ValueError("pi_star or pi has an entry 0; expected full support, or log(pi_star / pi) is undefined")
    d = (pi_star / pi).log()
    return float(_mean_square_difference(d, pi_star, pi, rho) / _mean_square_difference(d, mu1, mu2, rho))


def _mean_square_difference(d: Tensor, p: Tensor, q: Tensor, rho: Tensor | None) -> Tensor:
    """E_x E_{y1~p, y2~q}[(d(y1) - d(y2))^2] from means and variances, without a [Y, Y] table or cancellation."""
    mean_p, mean_q = ((m * d).sum(-1, keepdim=True) for m in (p, q))
    variances = (p * (d - mean_p) ** 2).sum(-1) + (q * (d - mean_q) ** 2).sum(-1)
    return prompt_mean(variances + (mean_p - mean_q).squeeze(-1) ** 2, rho)


# --- Algorithm 1 ------------------------------------------------------------------------------------------------------------


class Policy(Protocol):
    """What Algorithms 1 and 3 need of a policy whose responses can be enumerated, be it a table or a transformer."""

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y], rows normalised, differentiable in `parameters()`."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that line 4 trains."""


MU = {  # where a response of D_t is drawn from, given (pi_t, pi_star)
    "on-policy": lambda pi_t, pi_star: pi_t,  # what the paper recommends
    "uniform": lambda pi_t, pi_star: torch.full_like(pi_t, 1 / pi_t.shape[-1]),
    "target": lambda pi_t, pi_star: pi_star,  # the ideal of Theorem 1
}


@dataclass(frozen=True)
class Regression:
    """How line 4 is solved: Adam on Eq. (8), once over N = steps * pairs tuples D_t, from pi_t on (a warm start)."""

    steps: int = 24  # Adam steps, unless the tolerance is met before
    pairs: int = 2048  # tuples (x, y1, y2) a step
    learning_rate: float = 5e-3  # of the first step; falls linearly to 0 within the iteration
    max_grad_norm: float = 0.1  # gradients longer than that are cut; without it one in 600 iterations went astray
    tolerance: float = 0.0  # nats; stop once a batch's loss is this close to its lower bound, the entropy of z
    mu1: str | Tensor = "on-policy"  # a name in `MU`, or a fixed table [X, Y]: off-policy data
    mu2: str | Tensor = "on-policy"

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, pairs=self.pairs)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        for mu in (self.mu1, self.mu2):
            if isinstance(mu, str) and mu not in MU:
                raise ValueError(f"mu is {mu!r}; expected one of {', '.join(MU)}, or a table [X, Y]")


@dataclass(frozen=True)
class Iteration:
    """What iteration t did; tables are [X, Y], float64 and detached. With the states of policy, optimizer and generator it is
    all that is needed to go on after iteration t (the algorithms' argument `after`)."""

    t: int  # 1..T
    log_pi_t: Tensor
    r_t: Tensor
    log_pi_star: Tensor  # the exact minimiser of line 4
    log_pi_next: Tensor  # pi_{t+1}: what line 4 reached
    pi_bar: Tensor  # unif(pi_1..pi_t)
    log_pi_ref: Tensor  # Algorithm 3's reference in iteration t + 1; Algorithm 1 never looks at it
    loss: float  # Eq. (8) on the last batch, nats
    excess_loss: float  # that minus the mean entropy of z; >= 0
    steps: int  # Adam steps taken


def log_table(policy: Policy) -> Tensor:
    """The policy's log-probabilities as a frozen float64 table [X, Y], normalised to float64's precision."""
    with torch.no_grad():
        return policy.log_probs().double().log_softmax(-1)


def adam(policy: Policy | SampledPolicy, momentum: float = 0.9) -> torch.optim.Adam:
    """The optimizer of line 4 (7 in Algorithm 2). Its moments outlive the iterations; the algorithms set its learning rate."""
    return torch.optim.Adam(policy.parameters(), betas=(momentum, 0.95), fused=True)


def draw_tuples(rho: Tensor | None, mu1: Tensor, mu2: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """D_t: n tuples x ~ rho, y1 ~ mu1(.|x), y2 ~ mu2(.|x), each [n] int64, drawn on the CPU, where the generator lives."""
    X, Y = mu1.shape
    rho = torch.ones(X) if rho is None else check_policy(rho, mu1.shape[:1], "rho").cpu()
    x = torch.multinomial(rho, n, replacement=True, generator=generator)

    def draw(mu: Tensor) -> Tensor:  # the rows' distribution functions laid end to end, inverted by one binary search
        cdf = mu.cpu().double().cumsum(-1)
        ends = (cdf / cdf[:, -1:] + torch.arange(X).unsqueeze(-1)).flatten()
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return (torch.searchsorted(ends, x + u, right=True) - x * Y).clamp(0, Y - 1)

    return tuple(part.to(mu1.device) for part in (x, draw(mu1), draw(mu2)))


def _mus(settings: Regression, pi_t: Tensor, pi_star: Tensor) -> tuple[Tensor, ...]:
    """The tables mu_{1,t}, mu_{2,t}."""
    mus = (settings.mu1, settings.mu2)
    tables = (MU[mu](pi_t, pi_star) if isinstance(mu, str) else mu for mu in mus)
    return tuple(check_policy(mu, pi_t.shape, "mu").to(pi_t) for mu in tables)


def regress(policy: Policy, log_reference: Tensor, r_t: Tensor, D_t: tuple[Tensor, ...], eta: float,
            optimizer: torch.optim.Optimizer, settings: Regression) -> dict[str, float]:  # fmt: skip
    """Line 4: minimise Eq. (8) over D_t = (x, y1, y2) by `settings`, log_reference [X, Y] being log pi_t, frozen. Returns the
    last batch's loss and excess_loss, in nats, and the steps taken."""
    for step, (x, y1, y2) in enumerate(zip(*(part.chunk(settings.steps) for part in D_t), strict=True)):
        log_ratio = policy.log_probs() - log_reference
        r1, r2 = r_t[x, y1], r_t[x, y2]
        loss = dno_loss(log_ratio[x, y1], log_ratio[x, y2], r1, r2, eta).mean()
        excess = loss.detach() - cross_entropy(torch.sigmoid(r1 - r2), r1 - r2).mean()
        if settings.tolerance and excess < settings.tolerance:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - step / settings.steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
    else:
        step = settings.steps
    return {"loss": loss.item(), "excess_loss": excess.item(), "steps": step}


def algorithm1(policy: Policy, P: Tensor, eta: float, iterations: int, *, rho: Tensor | None = None,
               settings: Regression = Regression(), optimizer: torch.optim.Optimizer | None = None,
               generator: torch.Generator | None = None, after: Iteration | None = None,
               ) -> Generator[Iteration, None, Tensor]:  # fmt: skip
    """Algorithm 1, DNO: yields an `Iteration` for each t = 1..T and returns pi_bar.

    policy: trained in place; pi_1 is the policy as it comes, which the paper wants uniform, as new ones of model.py are.
    P: [X, Y, Y]. optimizer: `adam(policy)` when None. generator: draws D_t; seed 0 when None. after: the iteration to go on
    from, with policy, optimizer and generator in the states they had then. ValueError on a bad P, rho, mu, eta or T."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    optimizer, generator = optimizer or adam(policy), generator or torch.Generator().manual_seed(0)
    log_pi_t = log_table(policy)  # Alg. 1, line 1: pi_1 <- uniform
    log_pi_ref = after.log_pi_ref if after else log_pi_t
    pi_bar = after.pi_bar if after else torch.zeros_like(log_pi_t)
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 1, line 2
        pi_t = log_pi_t.exp()
        r_t = expected_win_rate(P, pi_t)  # Alg. 1, line 3
        log_pi_star = soft_policy_iteration(log_pi_t, r_t, eta)  # Eq. (9): where line 4 leads
        D_t = draw_tuples(rho, *_mus(settings, pi_t, log_pi_star.exp()), settings.steps * settings.pairs, generator)
        fit = regress(policy, log_pi_t, r_t, D_t, eta, optimizer, settings)  # Alg. 1, line 4
        log_pi_next = log_table(policy)
        pi_bar = pi_bar + (pi_t - pi_bar) / t
        yield Iteration(t, log_pi_t, r_t, log_pi_star, log_pi_next, pi_bar, log_pi_ref, **fit)
        log_pi_t = log_pi_next
    return pi_bar  # Alg. 1, line 6


# --- Section 4: Algorithm 2, with responses sampled, ranked and contrasted --------------------------------------------------


def contrastive_loss(log_ratio_pos: Tensor, log_ratio_neg: Tensor, eta: float) -> Tensor:
    """Eq. (13) as a loss [B] in nats: -log sigma(eta log_ratio_pos - eta log_ratio_neg), with log_ratio = log pi - log pi_t of
    whole responses. Eq. (8) with z = 1; the DPO loss with reference pi_t and beta = eta (the paper's eta~)."""
    return -F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))


class SampledPolicy(Protocol):
    """What Algorithms 2 and 4 need of a policy whose responses, of any kind, can only be sampled and scored."""

    def sample(self, prompts: list[Any], k: int, temperature: float = 1.0, top_p: float = 1.0,
               seed: int = 0) -> tuple[Sequence[Sequence[Any]], Tensor]:  # fmt: skip
        """k responses to each of X prompts, [X][k], and their log-probabilities under the policy itself, [X, k]."""

    def log_prob(self, prompts: list[Any], responses: list[Any]) -> Tensor:
        """log pi(y|x) [M] of whole responses, differentiable in `parameters()`."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that line 7 trains."""


@dataclass(frozen=True)
class Groups:
    """X prompts with n responses each: K samples, then the gold one if there is any. log_pi_t [X, n], NaN where not known."""

    prompts: list[Any]
    responses: list[list[Any]]
    log_pi_t: Tensor


@dataclass(frozen=True)
class Practice:
    """What Algorithms 2 and 4 leave to practice; defaults are section 5's, or made for small models where it says so."""

    samples: int = 5  # K
    temperature: float = 0.7
    top_p: float = 0.95
    judgments: str = "outcomes"  # r_t by {0, 1} samples of P, as line 5 says; by "probabilities" P; by "scores" (section 5)
    ngram: int = 3  # a response in which a run of this many words occurs twice is a repetition: it loses all, 0 for never
    replay: float = 0.3  # share of iteration t - 1's pairs to train on again, at most; half of it of t - 2's, and so on
    replay_iterations: int = 4  # how far back
    prompts_per_step: int = 12  # whose pairs make up a batch (small models; the paper has 64 pairs)
    learning_rate: float = 1e-3  # of the first step; falls to 0 within an iteration (small models; the paper's is 5e-5)
    fall: float = 0.8  # by which share the learning rate has fallen in the last iteration
    max_grad_norm: float = 0.05  # a malformed sample can have a gradient 20 times the usual (small models)
    recorded: bool = True  # the loss takes log pi_t as recorded when sampling; else it is scored anew, where bfloat16 sampled
    at_once: int | None = None  # prompts of a batch whose pairs are scored together; gradients add up. All when None
    trained: int | None = None  # of the soft-target regression: at most so many samples are trained on, all K are opponents

    def __post_init__(self) -> None:
        check_whole(1, samples=self.samples, prompts_per_step=self.prompts_per_step)
        check_whole(0, ngram=self.ngram, replay_iterations=self.replay_iterations)
        if self.at_once is not None:
            check_whole(1, at_once=self.at_once)
        if self.trained is not None:
            check_whole(2, trained=self.trained)
        check_positive(temperature=self.temperature, top_p=self.top_p)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        if self.judgments not in ("outcomes", "probabilities", "scores"):
            raise ValueError(f"judgments is {self.judgments!r}; expected outcomes, probabilities or scores")
        if self.top_p > 1 or not 0 <= self.replay <= 1 or not 0 <= self.fall <= 1:
            raise ValueError(f"top_p {self.top_p}, replay {self.replay}, fall {self.fall}: expected shares of at most 1")

    def rate(self, t: int, iterations: int) -> float:
        """The learning rate at the start of iteration t of 1..T."""
        return self.learning_rate * (1 - self.fall * (t - 1) / max(1, iterations - 1))


def sample_groups(policy: SampledPolicy, prompts: list[Any], gold: list[Any] | None, settings: Practice, seed: int) -> Groups:
    """Lines 3 and 4: K samples a prompt, with the log-probabilities recorded on the way, and the gold responses after them."""
    responses, log_pi_t = policy.sample(prompts, settings.samples, settings.temperature, settings.top_p, seed)
    log_pi_t = log_pi_t.detach() if settings.recorded else torch.full_like(log_pi_t, float("nan"))
    groups = [list(ys) for ys in (responses.tolist() if isinstance(responses, Tensor) else responses)]
    if gold is None:
        return Groups(prompts, groups, log_pi_t)
    unknown = torch.full_like(log_pi_t[:, :1], float("nan"))
    return Groups(prompts, [[*ys, y] for ys, y in zip(groups, gold, strict=True)], torch.cat([log_pi_t, unknown], dim=1))


def judge_groups(oracle: Any, groups: Groups) -> Tensor:
    """P(y_i > y_j | x) of every two responses of a group, [X, n, n], float64 on the CPU, by oracle.prefer(prompts, a, b): one
    question for each unordered pair, all of them asked together; the answer the other way round is taken to be 1 - P. NaN
    where the oracle has no answer. ValueError on an answer that is no probability."""
    X, n = len(groups.prompts), len(groups.responses[0])
    i, j = torch.triu_indices(n, n, 1).tolist()
    prompts = [x for x in groups.prompts for _ in i]
    a, b = ([ys[m] for ys in groups.responses for m in which] for which in (i, j))
    wins = torch.full((X, n, n), 0.5, dtype=torch.float64)
    if not hasattr(oracle, "prefer"):
        kind, hint = type(oracle).__name__, "of a table P, pass oracle.PreferenceTable(P)"
        raise ValueError(f"the oracle is of type {kind}; expected a method prefer: {hint}")
    answers = real_tensor(oracle.prefer(prompts, a, b), "the answer").detach().to(wins)
    given = answers[~answers.isnan()]
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError(f"the oracle answered {given.min():.6g} to {given.max():.6g}; expected probabilities in [0, 1]")
    wins[:, i, j] = answers.view(X, -1)
    wins[:, j, i] = 1 - wins[:, i, j]
    return wins


def draw_outcomes(wins: Tensor, generator: torch.Generator) -> Tensor:
    """1_P of line 5, [X, n, n]: for each unordered pair one {0, 1} sample of its probability, NaN of NaN; the diagonal stays
    1/2."""
    won = torch.rand(wins.shape, generator=generator, dtype=wins.dtype) < wins
    won = won.to(wins).masked_fill(wins.isnan(), float("nan")).triu(1)
    return won + (1 - won).mT.tril(-1) + 0.5 * torch.eye(wins.shape[-1]).to(wins)


def group_win_rates(wins: Tensor) -> Tensor:
    """r_t(x, y_i) = mean over the n - 1 others of wins(y_i, y_j), [X, n] in [0, 1]: line 5. Where the others are samples of
    pi_t, an unbiased estimate of P(y_i > pi_t) of variance <= 1/(4 (n - 1)); a gold one enters it with weight 1/(n - 1). Pairs
    without an answer, NaN, are left out of the mean; a response without any has NaN."""
    return wins.masked_fill(torch.eye(wins.shape[-1], dtype=torch.bool), float("nan")).nanmean(-1)


def rate_groups(oracle: Any, groups: Groups, wins: Tensor, settings: Practice, generator: torch.Generator) -> Tensor:
    """r_t [X, n] by which line 6 ranks: line 5's, from outcomes of wins [X, n, n] or from wins itself; or, as section 5 does,
    the points that oracle.scores(prompts, responses) gives, [X, n] in [0, 6]. NaN: not to be had."""
    if settings.judgments == "scores":
        return oracle.scores(groups.prompts, groups.responses)
    return group_win_rates(draw_outcomes(wins, generator) if settings.judgments == "outcomes" else wins)


def repeats_ngrams(words: Sequence[Any], n: int) -> bool:
    """Does some run of n words occur twice?"""
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(runs)) < len(runs)


def demote_repetitions(r: Tensor, groups: Groups, words: Callable[[Any], Sequence[Any]], n: int) -> tuple[Tensor, Tensor]:
    """Repetitions are automatic negatives (section 5): r [X, n] with theirs set to 0, and who may be a positive, [X, n]."""
    repeats = torch.tensor([[n > 0 and repeats_ngrams(words(y), n) for y in ys] for ys in groups.responses])
    return r.masked_fill(repeats, 0.0), ~repeats


# Rules of line 6: which pairs (x, y+, y-) of the groups to train on, int64 [B, 3], from the win rates (or scores) r [X, n], the
# gold response's last, and from who may be a positive, usable [X, n]. NaN, a response that was not judged, is in no pair (SPIN,
# which does not ask the judge, aside).

ROUNDING = 1e-9  # .6 - .2 is below .4 in floating point


def large_margin_pairs(r: Tensor, usable: Tensor, margin: float) -> Tensor:
    """All pairs with r(y+) - r(y-) >= margin and r(y+) > r(y-): Alg. 2, line 6."""
    lead = r.unsqueeze(-1) - r.unsqueeze(-2)
    return ((lead >= margin - ROUNDING) & (lead > ROUNDING) & usable.unsqueeze(-1)).nonzero()


def scored_pairs(scores: Tensor, usable: Tensor) -> Tensor:
    """Section 5's rule for scores of 0 to 6: a positive has at least 5, its negative at least 2 less, or at least 1 less if the
    positive is the student's."""
    lead = torch.full_like(scores, 1.0)
    lead[:, -1] = 2.0
    enough = scores.unsqueeze(-1) - scores.unsqueeze(-2) >= lead.unsqueeze(-1)
    return (enough & ((scores >= 5) & usable).unsqueeze(-1)).nonzero()


def best_against_worst(r: Tensor, usable: Tensor) -> Tensor:
    """One pair a prompt: the best response that may be a positive against the worst (the first of equals), if it is better."""
    best = r.nan_to_num(float("-inf")).masked_fill(~usable, float("-inf")).argmax(-1)
    x, worst = torch.arange(len(r)), r.nan_to_num(float("inf")).argmin(-1)
    return torch.stack([x, best, worst], dim=-1)[usable[x, best] & (r[x, best] > r[x, worst] + ROUNDING)]


def teacher_pairs(r: Tensor, usable: Tensor, margin: float) -> Tensor:
    """DNO-Restrictive: of the large-margin pairs those in which the gold response beats a student's."""
    pairs = large_margin_pairs(r, usable, margin)
    return pairs[pairs[:, 1] == r.shape[1] - 1]


def gold_against_students(r: Tensor, usable: Tensor) -> Tensor:
    """SPIN (Chen et al. 2024): the gold response against each of the student's, whoever is better."""
    wanted = torch.zeros(*r.shape, r.shape[1], dtype=torch.bool)
    wanted[:, -1, :-1] = usable[:, -1:]
    return wanted.nonzero()


def all_pairs(r: Tensor) -> Tensor:
    """Every unordered pair of every group once, for soft targets, which need no ranking: [B, 3]."""
    known = ~r.isnan()
    return (known.unsqueeze(-1) & known.unsqueeze(-2)).triu(1).nonzero()


def pair_kinds(pairs: Tensor, gold: int) -> dict[str, int]:
    """How many pairs (x, y+, y-) set teacher over student, student over teacher, student over student (Table 2); gold is the
    gold response's place in its group."""
    pos, neg = pairs[:, 1] == gold, pairs[:, 2] == gold
    return {"teacher_student": int(pos.sum()), "student_teacher": int(neg.sum()), "student_student": int((~pos & ~neg).sum())}


@dataclass(frozen=True)
class Pairs:
    """Training data of line 7: M responses, each there once, and B pairs of them. Of prompt number group [M], with estimated
    win rates r [M]; log_reference [M] is the reference of the loss, NaN where it is still to be found."""

    prompts: list[Any]
    responses: list[Any]
    group: Tensor
    r: Tensor
    log_reference: Tensor
    first: Tensor  # [B], index into the M responses: y+, or y1
    second: Tensor  # [B]: y-, or y2

    def take(self, which: Tensor) -> Pairs:
        """Only the pairs of these numbers, and only the responses that they need."""
        members, place = torch.cat([self.first[which], self.second[which]]).unique(return_inverse=True)
        prompts, responses = ([part[m] for m in members.tolist()] for part in (self.prompts, self.responses))
        return Pairs(prompts, responses, self.group[members], self.r[members], self.log_reference[members],
                     *place.view(2, -1))  # fmt: skip

    def batches(self, prompts: int, generator: torch.Generator) -> list[Pairs]:
        """All pairs, their prompts in random order, those of so many prompts a batch."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        place = torch.randperm(len(groups), generator=generator)[of_pair]
        return [self.take((place // prompts == batch).nonzero()[:, 0]) for batch in range(-(-len(groups) // prompts))]

    def pieces(self, prompts: int | None) -> list[Pairs]:
        """All pairs, those of so many prompts a piece, in order; one piece when None."""
        groups, of_pair = self.group[self.first].unique(return_inverse=True)
        prompts = prompts or len(groups)
        return [self.take((of_pair // prompts == piece).nonzero()[:, 0]) for piece in range(-(-len(groups) // prompts))]


def form_pairs(groups: Groups, r: Tensor, pairs: Tensor) -> Pairs:
    """The given pairs (x, y+, y-) [B, 3] of the groups, whose win rates are r [X, n]."""
    n, (x, pos, neg) = r.shape[1], pairs.unbind(-1)
    prompts = [prompt for prompt in groups.prompts for _ in range(n)]
    responses, group = [y for ys in groups.responses for y in ys], torch.arange(len(prompts)) // n
    log_pi_t, first, second = groups.log_pi_t.cpu().flatten(), x * n + pos, x * n + neg
    return Pairs(prompts, responses, group, r.flatten(), log_pi_t, first, second).take(torch.arange(len(pairs)))


def join(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of the parts together, their prompts kept apart."""
    starts = np.cumsum([0] + [len(part.responses) for part in parts]).tolist()
    prompts, responses = ([item for part in parts for item in getattr(part, name)] for name in ("prompts", "responses"))
    group, r, log_reference = (torch.cat([getattr(part, name) for part in parts]) for name in ("group", "r", "log_reference"))
    number = torch.cat([torch.full_like(part.group, i) for i, part in enumerate(parts)])
    group = (number * (1 + int(group.max()) if len(group) else 1) + group).unique(return_inverse=True)[1]
    first, second = (torch.cat([getattr(part, name) + start for part, start in zip(parts, starts, strict=False)])
                     for name in ("first", "second"))  # fmt: skip
    return Pairs(prompts, responses, group, r, log_reference, first, second)


def replay(earlier: Sequence[Pairs], share: float, generator: torch.Generator, decay: float = 0.5) -> list[Pairs]:
    """Of the pairs of iterations t-1, t-2, ... a share, decay times that, ..., drawn at random: at most 30%, 15%, ... in
    section 5. What pi_t makes of them is not known yet."""
    chosen = []
    for age, pairs in enumerate(earlier):
        kept = torch.randperm(len(pairs.first), generator=generator)[: int(share * decay**age * len(pairs.first))]
        part = pairs.take(kept)
        chosen.append(replace(part, log_reference=torch.full_like(part.log_reference, float("nan"))))
    return chosen


@torch.no_grad()
def with_reference(D: Pairs, policy: SampledPolicy) -> Pairs:
    """D with log pi_t in place of every NaN, scored by the policy while it is still pi_t."""
    missing = D.log_reference.isnan().nonzero()[:, 0].tolist()
    if not missing:
        return D
    log_reference = D.log_reference.clone()
    scores = policy.log_prob(*([part[m] for m in missing] for part in (D.prompts, D.responses)))
    log_reference[missing] = scores.to(log_reference)
    return replace(D, log_reference=log_reference)


PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of (log_ratio1, log_ratio2, r1, r2), each [B], to [B]


def hard_targets(eta: float) -> PairLoss:
    """Eq. (13), for which the first response of a pair is simply the better one."""
    return lambda log_ratio1, log_ratio2, r1, r2: contrastive_loss(log_ratio1, log_ratio2, eta)


def soft_targets(eta: float) -> PairLoss:
    """Eq. (8), with estimated win rates."""
    return lambda log_ratio1, log_ratio2, r1, r2: dno_loss(log_ratio1, log_ratio2, r1, r2, eta)


class NotFinite(ArithmeticError):
    """A loss or gradient that is NaN or infinite; `batch` is what it came from."""

    def __init__(self, reason: str, batch: Pairs):
        super().__init__(reason)
        self.batch = batch


def fit_pairs(policy: SampledPolicy, D: Pairs, loss: PairLoss, optimizer: torch.optim.Optimizer,
              settings: Practice, rate: float, generator: torch.Generator) -> dict[str, float]:  # fmt: skip
    """Line 7: one epoch over D of loss(log_ratio1, log_ratio2, r1, r2), log_ratio = log pi - log_reference, at a learning rate
    that falls from rate to 0. Each response of a batch is scored once, however many its pairs. Returns the mean loss in nats,
    the steps taken and the last batch's mean log ratio of y+. NotFinite if a gradient is not."""
    total, chosen, batches = 0.0, float("nan"), D.batches(settings.prompts_per_step, generator)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / len(batches))
        optimizer.zero_grad()
        chosen = 0.0
        for piece in batch.pieces(settings.at_once):
            log_pi = policy.log_prob(piece.prompts, piece.responses)
            log_ratio, r = log_pi - piece.log_reference.to(log_pi), piece.r.to(log_pi)
            losses = loss(log_ratio[piece.first], log_ratio[piece.second], r[piece.first], r[piece.second])
            (losses.sum() / len(batch.first)).backward()
            total += losses.detach().sum().item()
            chosen += log_ratio[piece.first].detach().sum().item() / len(batch.first)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        if not norm.isfinite():
            raise NotFinite(f"the gradient of step {step + 1} is not finite", batch)
        optimizer.step()
    return {"loss": total / max(1, len(D.first)), "steps": len(batches), "chosen_log_ratio": chosen}


@dataclass(frozen=True)
class Best:
    """The best policy on validation data so far: pi_t, its score and a copy of its parameters on the CPU."""

    t: int
    score: float
    parameters: list[Tensor]


def validated(policy: SampledPolicy, t: int, validate: Callable[[], float], best: Best | None = None) -> Best:
    """The better of `best` and of the policy as it is, which is pi_t; of equals the earlier. ValueError on a score of NaN."""
    score = validate()
    if score != score:
        raise ValueError(f"the validation score of pi_{t} is {score}; expected a number")
    if best is not None and score <= best.score:
        return best
    return Best(t, score, [parameter.detach().to("cpu", copy=True) for parameter in policy.parameters()])


@dataclass(frozen=True)
class Round:
    """What iteration t of an algorithm with samples did. With the states of policy and optimizer it is all that is needed to go
    on after it (the algorithms' argument `after`)."""

    t: int  # 1..T
    groups: Groups
    wins: Tensor  # [X, n, n], P(y_i > y_j) as the oracle gave it, NaN where it did not
    r_t: Tensor  # [X, n], line 5, or scores
    chosen: Tensor  # [B, 3], the new pairs of line 6
    earlier: list[Pairs]  # for replay: the new pairs of this iteration and of those before it
    best: Best  # of pi_1..pi_{t+1}
    loss: float  # mean over the epoch, nats
    steps: int
    chosen_log_ratio: float = float("nan")  # mean of log pi(y+)/pi_t(y+) over the last batch, before its step
    pi_ref: Any = None  # Algorithm 4's reference in iteration t + 1, a policy


Data = Callable[[int], tuple[list[Any], list[Any]]]  # t -> prompts [X] and gold responses [X] of iteration t
Remember = Callable[..., Any]  # (t, phase, function, *arguments) -> function(*arguments), or what it once was


def compute_anew(t: int, phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Remember nothing. A `Remember` that keeps results on disk lets a run go on in the middle of an iteration."""
    return function(*arguments)


def random_numbers(seed: int, t: int) -> tuple[int, torch.Generator]:
    """All the chance of iteration t: the seed of its samples and the generator of its outcomes, replay and batches, apart from
    each other, lest who wins depend on what was sampled."""
    number = 2 * (seed * 1_000_003 + t)
    return number, torch.Generator().manual_seed(number + 1)


def algorithm2(policy: SampledPolicy, oracle: Any, data: Data, eta: float, iterations: int,
               rule: Callable[[Tensor, Tensor], Tensor], validate: Callable[[], float], *, settings: Practice = Practice(),
               words: Callable[[Any], Sequence[Any]] = str.split, optimizer: torch.optim.Optimizer | None = None,
               seed: int = 0, after: Round | None = None, remember: Remember = compute_anew,
               ) -> Generator[Round, None, Best]:  # fmt: skip
    """Algorithm 2, DNO-Prct: `algorithm1` for responses that can only be sampled. What changes: r_t is estimated within groups
    of K samples and a gold response, D_t are pairs of large margin, the loss is Eq. (13), and the best policy on validation
    data is returned. Yields a `Round` for each t = 1..T, returns the `Best`.

    policy: trained in place; pi_1 is the policy as it comes. oracle: has prefer(prompts, a, b). eta: the paper's eta~. rule: of
    line 6, such as `large_margin_pairs` with its margin. validate(): score of the policy as it is, higher is better. words(y):
    what n-grams are made of. remember: keeps what was sampled and judged. ValueError on a bad number."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    optimizer = optimizer or adam(policy)
    best, earlier = (after.best, after.earlier) if after else (validated(policy, 1, validate), [])  # Alg. 2, line 1
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 2, line 2
        sample_seed, generator = random_numbers(seed, t)
        prompts, gold = data(t)  # Alg. 2, line 3
        groups = remember(t, "sampled", sample_groups, policy, prompts, gold, settings, sample_seed)  # Alg. 2, line 4
        wins = remember(t, "judged", judge_groups, oracle, groups)
        r_t = rate_groups(oracle, groups, wins, settings, generator)  # Alg. 2, line 5
        r_t, usable = demote_repetitions(r_t, groups, words, settings.ngram)
        chosen = rule(r_t, usable)  # Alg. 2, line 6
        D = join([new := form_pairs(groups, r_t, chosen), *replay(earlier, settings.replay, generator)])
        loss, rate = hard_targets(eta), settings.rate(t, iterations)
        fit = fit_pairs(policy, with_reference(D, policy), loss, optimizer, settings, rate, generator)  # Alg. 2, line 7
        best, earlier = validated(policy, t + 1, validate, best), [new, *earlier][: settings.replay_iterations]
        yield Round(t, groups, wins, r_t, chosen, earlier, best, **fit)
    return best  # Alg. 2, line 9


# --- Appendix A: the regularised game, Algorithm 3 --------------------------------------------------------------------------


def geometric_mixture(log_pi: Tensor, log_pi_ref: Tensor, tau: float, eta: float) -> Tensor:
    """log of pi^(1 - tau/eta) pi_ref^(tau/eta), unnormalised: log_softmax makes it Eq. (7)'s pi^tau. At tau = 0, log_pi."""
    if tau == eta:  # whatever pi: where it is 0, its logarithm times 0 would be NaN
        return log_pi_ref
    return log_pi if tau == 0 else (1 - tau / eta) * log_pi + (tau / eta) * log_pi_ref


def regularized_win_rate(P: Tensor, pi: Tensor, pi_prime: Tensor, pi_ref: Tensor, tau: float,
                         rho: Tensor | None = None) -> float:  # fmt: skip
    """P_tau(pi > pi') = P(pi > pi') - tau E_x KL(pi || pi_ref) + tau E_x KL(pi' || pi_ref): Eq. (6), that is the expectation
    of Eq. (5). ValueError on a bad table."""
    P = check_preferences(P).double()
    named = {"pi": pi, "pi_prime": pi_prime, "pi_ref": pi_ref}.items()
    pi, pi_prime, pi_ref = (check_policy(table, P.shape[:2], name).to(P) for name, table in named)
    log_ref = pi_ref.log()
    costs = kl_divergence(pi_prime.log(), log_ref) - kl_divergence(pi.log(), log_ref)
    return win_rate(P, pi, pi_prime, rho) + tau * float(prompt_mean(costs, rho))


def regularized_gap(P: Tensor, pi: Tensor, pi_ref: Tensor, tau: float, rho: Tensor | None = None) -> float:
    """Duality gap of P_tau, max_pi' P_tau(pi' > pi) - min_pi' P_tau(pi > pi') = 2 max_pi' P_tau(pi' > pi) - 1 >= 0; the best
    reply is Eq. (2): E_x[2 tau log sum_y pi_ref exp(r/tau) + 2 tau KL(pi || pi_ref) - 1], r = P(. > pi). At tau = 0 it is the
    duality gap. ValueError on a bad table, or unless tau >= 0."""
    if tau == 0:
        return duality_gap(P, pi, rho)
    check_positive(tau=tau)
    P = check_preferences(P).double()
    pi = check_policy(pi, P.shape[:2]).to(P)
    log_ref = check_policy(pi_ref, P.shape[:2], "pi_ref").to(P).log()
    best = (log_ref + expected_win_rate(P, pi) / tau).logsumexp(-1)
    return float(prompt_mean((2 * tau * (best + kl_divergence(pi.log(), log_ref)) - 1).clamp(min=0), rho))


def regularized_nash(P: Tensor, pi_ref: Tensor, tau: float) -> Tensor:
    """MW(P_tau) of Eq. (6), [X, Y], unique: the solution of pi = pi_ref exp(P(. > pi)/tau) / Z.

    Newton's method on F(u) = u - log pi_ref - P softmax(u)/tau. The Jacobian I - A M/tau, with A = P - 1/2
    skew-symmetric and M the covariance of softmax(u), is never singular: A M has imaginary eigenvalues only, M being positive
    semidefinite. Raises ValueError on a bad table, a pi_ref without full support or tau <= 0, RuntimeError without success."""
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
        return u - log_ref - _against(A, u.softmax(-1)) / tau

    return newton(residual, jacobian, log_ref, tolerance=1e-13 * (1 + 1 / tau)).softmax(-1)


def algorithm3(policy: Policy, P: Tensor, eta: float, iterations: int, tau: float, *, option: str = "I",
               move_reference_every: int = 0, rho: Tensor | None = None, settings: Regression = Regression(),
               optimizer: torch.optim.Optimizer | None = None, generator: torch.Generator | None = None,
               after: Iteration | None = None) -> Generator[Iteration, None, Tensor]:  # fmt: skip
    """Algorithm 3, regularised DNO: `algorithm1` with pi_t in the loss replaced by pi_t^(1 - tau/eta) pi_ref^(tau/eta), left
    unnormalised, pi_ref = pi_1. What else changes: r_t is against pi_t (option "I": average iterate) or against the normalised
    mixture pi_t^tau (option "II": last iterate). Ours, not the paper's: every `move_reference_every` iterations (0: never) the
    reference becomes pi_{t+1}, so that the last iterate heads for the Nash policy of P itself (MPO, COMAL; with option II only
    if tau/eta < 1/2 and rounds are long). ValueError also unless 0 <= tau <= eta and option is I or II."""
    check_loop(eta, iterations, tau, move_reference_every)
    check_option(option)
    optimizer, generator = optimizer or adam(policy), generator or torch.Generator().manual_seed(0)
    log_pi_t = log_table(policy)  # Alg. 3, line 1: pi_1 <- uniform
    log_pi_ref = after.log_pi_ref if after else log_pi_t
    pi_bar = after.pi_bar if after else torch.zeros_like(log_pi_t)
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 3, line 2
        pi_t, log_mixture = log_pi_t.exp(), geometric_mixture(log_pi_t, log_pi_ref, tau, eta)
        r_t = expected_win_rate(P, pi_t if option == "I" else log_mixture.softmax(-1))  # Alg. 3, line 3
        log_pi_star = soft_policy_iteration(log_mixture, r_t, eta)  # Eq. (7): where line 4 leads
        D_t = draw_tuples(rho, *_mus(settings, pi_t, log_pi_star.exp()), settings.steps * settings.pairs, generator)
        fit = regress(policy, log_mixture, r_t, D_t, eta, optimizer, settings)  # Alg. 3, line 4
        log_pi_next = log_table(policy)
        pi_bar = pi_bar + (pi_t - pi_bar) / t
        if move_reference_every and t % move_reference_every == 0:
            log_pi_ref = log_pi_next
        yield Iteration(t, log_pi_t, r_t, log_pi_star, log_pi_next, pi_bar, log_pi_ref, **fit)
        log_pi_t = log_pi_next
    return pi_bar  # Alg. 3, line 6


def mixed_reference(D: Pairs, policy: SampledPolicy, pi_ref: SampledPolicy, tau: float, eta: float) -> Pairs:
    """D with the unnormalised log pi_t^(1 - tau/eta) pi_ref^(tau/eta) of its responses as the loss's reference."""
    D = with_reference(D, policy)
    if tau == 0 or not D.responses:
        return D
    with torch.no_grad():
        log_pi_ref = pi_ref.log_prob(D.prompts, D.responses).to(D.log_reference)
    return replace(D, log_reference=geometric_mixture(D.log_reference, log_pi_ref, tau, eta))


def algorithm4(policy: SampledPolicy, oracle: Any, data: Data, eta: float, iterations: int,
               rule: Callable[[Tensor, Tensor], Tensor], validate: Callable[[], float], tau: float, *, option: str = "I",
               move_reference_every: int = 0, settings: Practice = Practice(),
               words: Callable[[Any], Sequence[Any]] = str.split, optimizer: torch.optim.Optimizer | None = None, seed: int = 0,
               after: Round | None = None, remember: Remember = compute_anew) -> Generator[Round, None, Best]:  # fmt: skip
    """Algorithm 4, regularised DNO-Prct: `algorithm2` with pi_t in the loss replaced as in `algorithm3`, pi_ref = pi_1. What
    else changes: samples are of pi_t (option "I") or of the mixture of pi_t and pi_ref (option "II"), for which the policy
    has a method mixed_with(pi_ref, weight); the paper suggests to mix token by token, another policy than pi_t^tau.
    Every `move_reference_every` iterations (0: never) the reference becomes pi_{t+1}. ValueError on a bad tau or option too."""
    check_loop(eta, iterations, tau, move_reference_every)
    check_option(option)
    optimizer, pi_ref = optimizer or adam(policy), after.pi_ref if after else copy.deepcopy(policy)
    best, earlier = (after.best, after.earlier) if after else (validated(policy, 1, validate), [])  # Alg. 4, line 1
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 4, line 2
        sample_seed, generator = random_numbers(seed, t)
        prompts, gold = data(t)  # Alg. 4, line 3
        sampler = policy if option == "I" else policy.mixed_with(pi_ref, tau / eta)
        groups = remember(t, "sampled", sample_groups, sampler, prompts, gold, settings, sample_seed)  # Alg. 4, line 4
        if option == "II":  # what was recorded is the mixture's log-probability
            groups = replace(groups, log_pi_t=torch.full_like(groups.log_pi_t, float("nan")))
        wins = remember(t, "judged", judge_groups, oracle, groups)
        r_t = rate_groups(oracle, groups, wins, settings, generator)  # Alg. 4, line 5
        r_t, usable = demote_repetitions(r_t, groups, words, settings.ngram)
        chosen = rule(r_t, usable)  # Alg. 4, line 6
        D = join([new := form_pairs(groups, r_t, chosen), *replay(earlier, settings.replay, generator)])
        D, loss, rate = mixed_reference(D, policy, pi_ref, tau, eta), hard_targets(eta), settings.rate(t, iterations)
        fit = fit_pairs(policy, D, loss, optimizer, settings, rate, generator)  # Alg. 4, line 7
        best, earlier = validated(policy, t + 1, validate, best), [new, *earlier][: settings.replay_iterations]
        if move_reference_every and t % move_reference_every == 0:
            pi_ref = copy.deepcopy(policy)
        yield Round(t, groups, wins, r_t, chosen, earlier, best, **fit, pi_ref=pi_ref)
    return best  # Alg. 4, line 9


def algorithm3_sampled(policy: SampledPolicy, oracle: Any, data: Data, eta: float, iterations: int,
                       validate: Callable[[], float], tau: float = 0.0, *, move_reference_every: int = 0,
                       settings: Practice = Practice(), optimizer: torch.optim.Optimizer | None = None, seed: int = 0,
                       after: Round | None = None, remember: Remember = compute_anew,
                       ) -> Generator[Round, None, Best]:  # fmt: skip
    """Algorithm 3, option I (Algorithm 1 at tau = 0), for responses that can only be sampled: `algorithm4` with soft targets,
    Eq. (8). r_t is estimated, without bias, from the K samples of the prompt itself: each one's opponents are the other
    K - 1 (among them the other of its pair, so that differences of r_t are K/(K - 1) times as large on average). P itself is
    averaged, whatever settings.judgments says. There is no teacher, no ranking and no filter."""
    check_loop(eta, iterations, tau, move_reference_every)
    optimizer, pi_ref = optimizer or adam(policy), after.pi_ref if after else copy.deepcopy(policy)
    best = after.best if after else validated(policy, 1, validate)  # Alg. 3, line 1
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 3, line 2
        sample_seed, generator = random_numbers(seed, t)
        prompts, _ = data(t)
        groups = remember(t, "sampled", sample_groups, policy, prompts, None, settings, sample_seed)
        wins = remember(t, "judged", judge_groups, oracle, groups)
        r_t = group_win_rates(wins)  # Alg. 3, line 3, estimated
        chosen = all_pairs(r_t[:, : settings.trained])  # D_t: y1, y2 ~ pi_t
        D = mixed_reference(form_pairs(groups, r_t, chosen), policy, pi_ref, tau, eta)
        loss, rate = soft_targets(eta), settings.rate(t, iterations)
        fit = fit_pairs(policy, D, loss, optimizer, settings, rate, generator)  # Alg. 3, line 4
        best = validated(policy, t + 1, validate, best)
        if move_reference_every and t % move_reference_every == 0:
            pi_ref = copy.deepcopy(policy)
        yield Round(t, groups, wins, r_t, chosen, [], best, **fit, pi_ref=pi_ref)
    return best


def check_loop(eta: float, iterations: int, tau: float, move_reference_every: int) -> None:
    """Raise ValueError naming the first of these numbers that is out of its range."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    check_regularization(tau, eta)
    check_whole(0, move_reference_every=move_reference_every)


def check_option(option: str) -> None:
    """Raise ValueError unless option is "I" or "II"."""
    if option not in ("I", "II"):
        raise ValueError(f"option is {option!r}; expected I or II")


def check_regularization(tau: float, eta: float) -> None:
    """Raise ValueError unless 0 <= tau <= eta, so that tau/eta is a mixture weight."""
    if not (isinstance(tau, Real) and 0 <= tau <= eta):
        raise ValueError(f"tau is {tau!r} and eta {eta}; expected 0 <= tau <= eta")


# --- The same games with exact updates, by Eq. (9) and by its relatives -----------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """The run of `solve`: policies [T+1, X, Y], pi_1 first; average = unif(pi_1..pi_T) and last = pi_{T+1}, [X, Y]; and the
    duality gaps after each iteration t, [T]: of unif(pi_1..pi_t) and of pi_{t+1}."""

    policies: Tensor
    average: Tensor
    last: Tensor
    gap_average: Tensor
    gap_last: Tensor


def _dno_regression(mixture: Tensor, r: Tensor, eta: float, mu1: Tensor | None = None, mu2: Tensor | None = None) -> Tensor:
    """Eq. (8) minimised over tabular logits by Newton's method, on all pairs of mu1, mu2 [X, Y], uniform when None."""
    z = torch.sigmoid(r.unsqueeze(-1) - r.unsqueeze(-2))
    return mixture + fit_scores(z, pair_weights(r, mu1, mu2)) / eta


def _sppo(mixture: Tensor, r: Tensor, eta: float) -> Tensor:
    """The policy pi_t e^h of least E_{y~pi_t}[(h - g)^2], g = (r - 1/2)/eta. The Lagrangian's derivative is 0 where
    h + c e^h = g, with c such that the policy sums to 1: Newton's method on h and c together, g growing from 0 by steps of
    at most 1/2. RuntimeError without success."""
    pi, g = mixture.softmax(-1), (r - 0.5) / eta
    h, c = torch.zeros_like(g), torch.zeros_like(g[:, :1])
    stages = max(1, int(2 * g.abs().max()) + 1)
    for step in range(10 * min(stages, 200)):  # beyond that eta is too small for float64 anyway
        weight = h.exp()
        slope, off = 1 + c * weight, h + c * weight - g * (step // 10 + 1) / stages
        dc = (pi * weight * (1 - off / slope)).sum(-1, keepdim=True) - 1
        dc = dc / (pi * weight**2 / slope).sum(-1, keepdim=True)
        h, c = h - (off + weight * dc) / slope, c + dc
    log_pi = mixture.log_softmax(-1) + h
    if not (log_pi.logsumexp(-1).abs().max() < 1e-9 and (h + c * h.exp() - g).abs().max() < 1e-9 * (1 + g.abs().max())):
        raise RuntimeError(f"no SPPO update found at eta {eta}; expected a larger eta")
    return log_pi


# log pi_{t+1}, not normalised, from m = log(pi_t^(1 - tau/eta) pi_ref^(tau/eta)), the expected win rates r against pi_t and r0
# against pi_{t-1}, and the function R(pi) that gives those against any pi.
METHODS = {
    "dno": lambda m, r, r0, R, eta: m + r / eta,  # Eq. (9); tau > 0: option I of Alg. 3, with pi_ref fixed INPO (Zhang 2024)
    "dno-regression": lambda m, r, r0, R, eta, **mus: _dno_regression(m, r, eta, **mus),  # Eq. (8)
    "nash-md": lambda m, r, r0, R, eta: m + R(m.softmax(-1)) / eta,  # Eq. (7), Munos 2023; option II of Alg. 3
    "omwu": lambda m, r, r0, R, eta: m + (2 * r - r0) / eta,  # optimistic: r_t twice, r_{t-1} taken back
    "sppo": lambda m, r, r0, R, eta: _sppo(m, r, eta),  # Wu 2024: squared loss in place of Eq. (8)
    "moving-reference": lambda m, r, r0, R, eta: m + r / eta,  # MPO, Wang 2024; COMAL, Liu 2024
    "extragradient": lambda m, r, r0, R, eta: m + R((m + r / eta).softmax(-1)) / eta,  # EGPO, Zhou 2025: r after a trial step
}


def solve(P: Tensor, method: str = "dno", eta: float = 1.0, iterations: int = 100, pi_ref: Tensor | None = None,
          tau: float = 0.0, *, pi_1: Tensor | None = None, rho: Tensor | None = None, move_reference_every: int | None = None,
          **options: Tensor) -> Solution:  # fmt: skip
    """Run `iterations` exact updates on P [X, Y, Y] by a method of `METHODS`.

    pi_ref [X, Y]: the reference, uniform when None. pi_1: the start, pi_ref when None. tau in [0, eta]: pull towards pi_ref;
    at 0 the game is P itself, and "nash-md" and "moving-reference" are "dno". "moving-reference" sets pi_ref <- pi_{t+1} every
    `move_reference_every` iterations (6 when None); other methods do so if told to. options: mu1, mu2 [X, Y] of
    "dno-regression". ValueError on an unknown method, a bad table or a bad number."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    check_loop(eta, iterations, tau, move_reference_every or 0)
    P = check_preferences(P)
    uniform = torch.full_like(P[..., 0], 1 / P.shape[1])
    pi_ref = uniform if pi_ref is None else check_policy(pi_ref, P.shape[:2], "pi_ref").to(P)
    pi = pi_ref if pi_1 is None else check_policy(pi_1, P.shape[:2], "pi_1").to(P)
    every = move_reference_every or (6 if method == "moving-reference" else iterations + 1)
    log_pi, log_ref = pi.log(), pi_ref.log()
    policies, rewards = (P.new_empty(iterations + 1, *pi.shape) for _ in range(2))
    policies[0], rewards[0] = pi, _against(P, pi)
    for t in range(iterations):
        mixture = geometric_mixture(log_pi, log_ref, tau, eta)
        update = METHODS[method](mixture, rewards[t], rewards[max(t - 1, 0)], lambda pi: _against(P, pi), eta, **options)
        log_pi = update.log_softmax(-1)
        policies[t + 1] = pi = log_pi.exp()
        rewards[t + 1] = _against(P, pi)
        if (t + 1) % every == 0:
            log_ref = log_pi
    average_rewards = rewards[:-1].cumsum(0) / torch.arange(1, iterations + 1).to(P)[:, None, None]
    gaps = gap_of_rewards(average_rewards, rho), gap_of_rewards(rewards[1:], rho)
    return Solution(policies, policies[:-1].mean(0), policies[-1], *gaps)

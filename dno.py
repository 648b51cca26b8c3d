"""Direct Nash Optimization (Rosset et al. 2024, arXiv 2404.03715v1), to be read beside the paper:
sections 2 to 4, appendix A.

Everything here is mathematics on tensors: no files, no tokenizers, no network.

Notation. Axes: X prompts, Y responses, B pairs, T iterations; K samples of a prompt, n of them with
the gold one, M different responses in the pairs. Tables are float64, policies are rows on the
simplex.

| paper            | here            | shape, range          | meaning
|
|------------------|-----------------|-----------------------|-----------------------------------------------------------|
| P(y > y' | x)    | `P[x, y, y']`   | [X, Y, Y] in [0, 1]   | probability that y is preferred to
y'; P + P^T = 1        | | rho              | `rho`           | [X], sums to 1        | prompt
distribution; None means uniform                   | | pi_t             | `pi_t`          | [X, Y],
rows sum to 1 | the policy of iteration t; `log_pi_t` is its logarithm    | | pi*_{t+1}        |
`pi_star`       | [X, Y]                | the target of iteration t, Eq. (9)
| | pi_bar           | `pi_bar`        | [X, Y]                | unif(pi_1..pi_t), the average
iterate                     | | pi_ref, tau      | `pi_ref`, `tau` | [X, Y]; tau >= 0      |
reference policy, and the strength of the pull towards it | | r_t(x, y)        | `r_t`           |
[X, Y] in [0, 1]      | expected win rate of y against pi_t                       | | eta
| `eta`           | > 0                   | divides r_t: a LARGER eta is a SMALLER step
| | mu_1, mu_2       | `mu1`, `mu2`    | [X, Y]                | where the two responses of a
training pair are drawn from | | Delta_{pi,t}, z^ | `margin`        | [B], and its sigmoid  | eta
times the difference of log ratios log(pi/pi_t)       | | Delta*_t, z      | `r1 - r2`       | [B],
and its sigmoid  | difference of expected win rates, and the soft label      | | eta~             |
`eta`           | > 0                   | of Algorithms 2 and 4; DPO's beta. Larger is slower too
| | 1_P(y, y')       | `wins`          | [X, n, n] in [0, 1]   | who beats whom among the responses
to a prompt            | | (x, y+, y-)      | `chosen`        | [B, 3] int64          | prompt,
better and worse response, by number              |

The duality gap is E_x[max_y P(y > pi) - min_y P(pi > y)] = E_x[2 max_y P(y > pi) - 1]: 0 exactly at
Nash, at most 1. It is twice what some libraries call exploitability; no other measure of the
distance from Nash is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

from pairs import (
    Groups,
    Pairs,
    Practice,
    check_positive,
    check_whole,
    demote_repetitions,
    form_pairs,
    join,
    real_tensor,
    replay,
)

TOLERANCE = (
    1e-6  # on sums that must be 1; float32 rows of a few thousand entries stay well inside it
)
NASH_TOLERANCE = 1e-8  # the duality gap that a policy returned as Nash may have


# --- Section 2: preferences, win rates, Nash
# -------------------------------------------------------


def check_preferences(P: Tensor) -> Tensor:
    """Return P [X, Y, Y] if it is a preference function (section 2.2): entries in [0, 1] and P +
    P^T = 1, so that the diagonal is 1/2. Raises ValueError naming the first entry (x, y, y') that
    breaks this, and its value."""
    P = real_tensor(P, "P")
    if P.ndim != 3 or P.shape[1] != P.shape[2] or P.numel() == 0 or not P.is_floating_point():
        raise ValueError(
            f"P is {P.dtype} of shape {list(P.shape)}; expected floating point of shape [X, Y, Y]"
        )
    low, high = P.aminmax()
    if not (low >= 0 and high <= 1):  # so, too, if there is a NaN
        x, y, z = (~((P >= 0) & (P <= 1))).nonzero()[0].tolist()
        raise ValueError(f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected a probability in [0, 1]")
    low, high = (P + P.mT).aminmax()
    if max(1 - low, high - 1) > TOLERANCE:
        x, y, z = ((P + P.mT - 1).abs() > TOLERANCE).nonzero()[0].tolist()
        raise ValueError(
            f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected 1 - P[{x}, {z}, {y}] = {1 - P[x, z, y]:.6g}"
        )
    return P


def check_policy(pi: Tensor, shape: torch.Size, name: str = "pi") -> Tensor:
    """Return pi if it has the given shape and its rows are distributions; ValueError naming the
    first row that is not."""
    pi = real_tensor(pi, name)
    if pi.shape != shape:
        raise ValueError(f"{name} has shape {list(pi.shape)}; expected {list(shape)}")
    bad = ~((pi >= 0).all(-1) & ((pi.sum(-1) - 1).abs() <= TOLERANCE))
    if bad.any():
        x = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}{x} has sum {pi[*x].sum():.6g}, minimum {pi[*x].min():.6g}; expected entries >= 0, sum 1"
        )
    return pi


def prompt_mean(values: Tensor, rho: Tensor | None = None) -> Tensor:
    """E_{x~rho} over the last axis of values [..., X]; uniform when rho [X] is None. ValueError on
    a bad rho."""
    if rho is None:
        return values.mean(-1)
    return values @ check_policy(rho, values.shape[-1:], "rho").to(values)


def win_rate_against(P: Tensor, pi: Tensor) -> Tensor:
    """P(y > pi | x) for every y, [X, Y]: one matrix-vector product a prompt, nothing checked. As a
    row times P^T, which the CPU's batched product does four times as fast as P times a column."""
    return torch.bmm(pi.unsqueeze(1), P.mT).squeeze(1)


def expected_win_rate(P: Tensor, pi: Tensor) -> Tensor:
    """r(x, y) = E_{y'~pi(.|x)} P(y > y' | x), [X, Y] in [0, 1]: Alg. 1, line 3. ValueError on a bad
    P or pi."""
    P = check_preferences(P)
    return win_rate_against(P, check_policy(pi, P.shape[:2]).to(P))


def win_rate(P: Tensor, pi: Tensor, pi_prime: Tensor, rho: Tensor | None = None) -> float:
    """P(pi > pi') = E_{x~rho, y~pi, y'~pi'} P(y > y' | x), in [0, 1] (section 2). ValueError on a
    bad argument."""
    r = expected_win_rate(P, pi_prime)
    return float(prompt_mean((check_policy(pi, r.shape) * r).sum(-1), rho))


def gap_of_rewards(r: Tensor, rho: Tensor | None = None) -> Tensor:
    """Duality gap of the policy whose expected win rates are r [..., X, Y]: E_x[2 max_y r(x, y) -
    1], shape [...].

    r is linear in the policy: the average policy's r is the average r, so its gap costs no further
    product with P."""
    return prompt_mean(
        (2 * r.amax(-1) - 1).clamp(min=0), rho
    )  # rounding alone could take it below 0


def duality_gap(P: Tensor, pi: Tensor, rho: Tensor | None = None) -> float:
    """E_x[max_y P(y > pi | x) - min_y P(pi > y | x)] = E_x[2 max_y P(y > pi | x) - 1], in [0, 1]; 0
    exactly at the Nash policies of Eq. (3). ValueError on a bad argument."""
    return float(gap_of_rewards(expected_win_rate(P, pi), rho))


def nash(P: Tensor) -> Tensor:
    """A Nash policy, MW(P) = argmax_pi min_pi' P(pi > pi') of Eq. (3), [X, Y] float64, by one
    linear program a prompt: maximise v subject to sum_y pi(y) P(y > y') >= v for every y', and pi
    on the simplex.

    Raises ValueError on a bad P, and RuntimeError if the solver fails or leaves a duality gap of
    1e-8 or more."""
    P = check_preferences(P).double()
    P = (
        P + 1 - P.mT
    ) / 2  # a float32 table is complementary to 1e-7 only, which would show as a gap
    Y = P.shape[1]
    rows = []
    for table in P.cpu().numpy():
        found = linprog(
            c=np.append(np.zeros(Y), -1.0),
            A_ub=np.hstack([-table.T, np.ones((Y, 1))]),
            b_ub=np.zeros(Y),
            A_eq=np.append(np.ones(Y), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * Y + [(None, None)],
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if not found.success:
            raise RuntimeError(f"the linear program of prompt {len(rows)} failed: {found.message}")
        rows.append(found.x[:Y].clip(0) / found.x[:Y].clip(0).sum())
    pi = torch.from_numpy(np.stack(rows)).to(P.device)
    worst = float((2 * win_rate_against(P, pi).amax(-1) - 1).max())
    if worst >= NASH_TOLERANCE:
        raise RuntimeError(
            f"the linear program left a duality gap of {worst:.1e}; expected below {NASH_TOLERANCE:.0e}"
        )
    return pi


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_y p log(p/q) along the last axis, in nats; 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV(p, q) = sum_y |p - q| / 2 along the last axis, in [0, 1]."""
    return (p - q).abs().sum(-1) / 2


def cross_entropy(z: Tensor, margin: Tensor) -> Tensor:
    """-z log sigma(margin) - (1 - z) log sigma(-margin), elementwise, in nats: Eq. (11), and Eq.
    (1) where the margin is a difference of rewards. Its minimum over the margin is the entropy of
    z, at sigma(margin) = z."""
    return -z * F.logsigmoid(margin) - (1 - z) * F.logsigmoid(-margin)


# --- Section 3: soft policy iteration and its regression
# -------------------------------------------


def soft_policy_iteration(log_pi: Tensor, r: Tensor, eta: float) -> Tensor:
    """log pi*, pi*(y|x) = pi(y|x) exp(r(x, y) / eta) / Z(x): Eq. (9), [X, Y]; with pi_ref and beta
    in place of pi and eta it is the solution of Eq. (2). log_pi need not be normalised. ValueError
    unless eta > 0."""
    check_positive(eta=eta)
    return (log_pi + r / eta).log_softmax(-1)


def internal_reward(log_pi: Tensor, log_pi_t: Tensor, eta: float) -> Tensor:
    """r_{pi,t} = eta log(pi / pi_t), the reward for which pi is the target of soft policy iteration
    from pi_t: Eq. (10) up to eta log Z(x), which no difference of rewards can see (the paper prints
    eta Z(x))."""
    return eta * (log_pi - log_pi_t)


def dno_loss(log_ratio1: Tensor, log_ratio2: Tensor, r1: Tensor, r2: Tensor, eta: float) -> Tensor:
    """Eq. (8) = Eq. (12) as a loss [B] in nats: cross-entropy of z = sigma(r1 - r2) against z^ =
    sigma(eta log_ratio1 - eta log_ratio2), with log_ratio = log pi(y|x) - log pi_t(y|x) of whole
    responses (a sum over tokens, never a mean). No gradient flows through r1, r2. Its minimum is
    the entropy of z, at z^ = z; at pi = pi_t it is ln 2, whatever r1, r2."""
    z = torch.sigmoid(r1 - r2).detach()
    return cross_entropy(z, eta * (log_ratio1 - log_ratio2))


# --- Algorithm 1
# -----------------------------------------------------------------------------------


class Policy(Protocol):
    """What Algorithms 1 and 3 need of a policy whose responses can be enumerated, be it a table or
    a transformer."""

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
    """How line 4 is solved: Adam on Eq. (8), once over N = steps * pairs tuples D_t, from pi_t on
    (a warm start)."""

    steps: int = 24  # Adam steps, unless the tolerance is met before
    pairs: int = 2048  # tuples (x, y1, y2) a step
    learning_rate: float = 5e-3  # of the first step; falls linearly to 0 within the iteration
    max_grad_norm: float = (
        0.1  # gradients longer than that are cut; without it one in 600 iterations went astray
    )
    tolerance: float = (
        0.0  # nats; stop once a batch's loss is this close to its lower bound, the entropy of z
    )
    mu1: str | Tensor = "on-policy"  # a name in `MU`, or a fixed table [X, Y]: off-policy data
    mu2: str | Tensor = "on-policy"

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, pairs=self.pairs)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        for mu in (self.mu1, self.mu2):
            if isinstance(mu, str) and mu not in MU:
                raise ValueError(
                    f"mu is {mu!r}; expected one of {', '.join(MU)}, or a table [X, Y]"
                )


@dataclass(frozen=True)
class Iteration:
    """What iteration t did; tables are [X, Y], float64 and detached. With the states of policy,
    optimizer and generator it is all that is needed to go on after iteration t (the algorithms'
    argument `after`)."""

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
    """The policy's log-probabilities as a frozen float64 table [X, Y], normalised to float64's
    precision."""
    with torch.no_grad():
        return policy.log_probs().double().log_softmax(-1)


def adam(policy: Policy | SampledPolicy, momentum: float = 0.9) -> torch.optim.Adam:
    """The optimizer of line 4 (7 in Algorithm 2). Its moments outlive the iterations; the
    algorithms set its learning rate."""
    return torch.optim.Adam(policy.parameters(), betas=(momentum, 0.95), fused=True)


def draw_tuples(
    rho: Tensor | None, mu1: Tensor, mu2: Tensor, n: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """D_t: n tuples x ~ rho, y1 ~ mu1(.|x), y2 ~ mu2(.|x), each [n] int64, drawn on the CPU, where
    the generator lives."""
    X, Y = mu1.shape
    rho = torch.ones(X) if rho is None else check_policy(rho, mu1.shape[:1], "rho").cpu()
    x = torch.multinomial(rho, n, replacement=True, generator=generator)

    def draw(
        mu: Tensor,
    ) -> Tensor:  # the rows' distribution functions laid end to end, inverted by one binary search
        cdf = mu.cpu().double().cumsum(-1)
        ends = (cdf / cdf[:, -1:] + torch.arange(X).unsqueeze(-1)).flatten()
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return (torch.searchsorted(ends, x + u, right=True) - x * Y).clamp(0, Y - 1)

    return tuple(part.to(mu1.device) for part in (x, draw(mu1), draw(mu2)))


def where_tuples_come_from(
    settings: Regression, pi_t: Tensor, pi_star: Tensor
) -> tuple[Tensor, ...]:
    """The tables mu_{1,t}, mu_{2,t}."""
    mus = (settings.mu1, settings.mu2)
    tables = (MU[mu](pi_t, pi_star) if isinstance(mu, str) else mu for mu in mus)
    return tuple(check_policy(mu, pi_t.shape, "mu").to(pi_t) for mu in tables)


def regress(
    policy: Policy,
    log_reference: Tensor,
    r_t: Tensor,
    D_t: tuple[Tensor, ...],
    eta: float,
    optimizer: torch.optim.Optimizer,
    settings: Regression,
) -> dict[str, float]:
    """Line 4: minimise Eq. (8) over D_t = (x, y1, y2) by `settings`, log_reference [X, Y] being log
    pi_t, frozen. Returns the last batch's loss and excess_loss, in nats, and the steps taken."""
    for step, (x, y1, y2) in enumerate(
        zip(*(part.chunk(settings.steps) for part in D_t), strict=True)
    ):
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


def algorithm1(
    policy: Policy,
    P: Tensor,
    eta: float,
    iterations: int,
    *,
    rho: Tensor | None = None,
    settings: Regression = Regression(),
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
    after: Iteration | None = None,
) -> Generator[Iteration, None, Tensor]:
    """Algorithm 1, DNO: yields an `Iteration` for each t = 1..T and returns pi_bar.

    policy: trained in place; pi_1 is the policy as it comes, which the paper wants uniform, as new
    ones of model.py are. P: [X, Y, Y]. optimizer: `adam(policy)` when None. generator: draws D_t;
    seed 0 when None. after: the iteration to go on from, with policy, optimizer and generator in
    the states they had then. ValueError on a bad P, rho, mu, eta or T."""
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
        D_t = draw_tuples(
            rho,
            *where_tuples_come_from(settings, pi_t, log_pi_star.exp()),
            settings.steps * settings.pairs,
            generator,
        )
        fit = regress(policy, log_pi_t, r_t, D_t, eta, optimizer, settings)  # Alg. 1, line 4
        log_pi_next = log_table(policy)
        pi_bar = pi_bar + (pi_t - pi_bar) / t
        yield Iteration(t, log_pi_t, r_t, log_pi_star, log_pi_next, pi_bar, log_pi_ref, **fit)
        log_pi_t = log_pi_next
    return pi_bar  # Alg. 1, line 6


# --- Section 4: Algorithm 2, with responses sampled, ranked and contrasted
# -------------------------


def contrastive_loss(log_ratio_pos: Tensor, log_ratio_neg: Tensor, eta: float) -> Tensor:
    """Eq. (13) as a loss [B] in nats: -log sigma(eta log_ratio_pos - eta log_ratio_neg), with
    log_ratio = log pi - log pi_t of whole responses. Eq. (8) with z = 1; the DPO loss with
    reference pi_t and beta = eta (the paper's eta~)."""
    return -F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))


class SampledPolicy(Protocol):
    """What Algorithms 2 and 4 need of a policy whose responses, of any kind, can only be sampled
    and scored."""

    def sample(
        self,
        prompts: list[Any],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[Sequence[Sequence[Any]], Tensor]:
        """k responses to each of X prompts, [X][k], and their log-probabilities under the policy
        itself, [X, k]."""

    def log_prob(self, prompts: list[Any], responses: list[Any]) -> Tensor:
        """log pi(y|x) [M] of whole responses, differentiable in `parameters()`."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that line 7 trains."""


def sample_groups(
    policy: SampledPolicy, prompts: list[Any], gold: list[Any] | None, settings: Practice, seed: int
) -> Groups:
    """Lines 3 and 4: K samples a prompt, with the log-probabilities recorded on the way, and the
    gold responses after them."""
    responses, log_pi_t = policy.sample(
        prompts, settings.samples, settings.temperature, settings.top_p, seed
    )
    log_pi_t = log_pi_t.detach() if settings.recorded else torch.full_like(log_pi_t, float("nan"))
    groups = [
        list(ys) for ys in (responses.tolist() if isinstance(responses, Tensor) else responses)
    ]
    if gold is None:
        return Groups(prompts, groups, log_pi_t)
    unknown = torch.full_like(log_pi_t[:, :1], float("nan"))
    return Groups(
        prompts,
        [[*ys, y] for ys, y in zip(groups, gold, strict=True)],
        torch.cat([log_pi_t, unknown], dim=1),
    )


def judge_groups(oracle: Any, groups: Groups) -> Tensor:
    """P(y_i > y_j | x) of every two responses of a group, [X, n, n], float64 on the CPU, by
    oracle.prefer(prompts, a, b): one question for each unordered pair, all of them asked together;
    the answer the other way round is taken to be 1 - P. NaN where the oracle has no answer.
    ValueError on an answer that is no probability."""
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
        raise ValueError(
            f"the oracle answered {given.min():.6g} to {given.max():.6g}; expected probabilities in [0, 1]"
        )
    wins[:, i, j] = answers.view(X, -1)
    wins[:, j, i] = 1 - wins[:, i, j]
    return wins


def draw_outcomes(wins: Tensor, generator: torch.Generator) -> Tensor:
    """1_P of line 5, [X, n, n]: for each unordered pair one {0, 1} sample of its probability, NaN
    of NaN; the diagonal stays 1/2."""
    won = torch.rand(wins.shape, generator=generator, dtype=wins.dtype) < wins
    won = won.to(wins).masked_fill(wins.isnan(), float("nan")).triu(1)
    return won + (1 - won).mT.tril(-1) + 0.5 * torch.eye(wins.shape[-1]).to(wins)


def group_win_rates(wins: Tensor) -> Tensor:
    """r_t(x, y_i) = mean over the n - 1 others of wins(y_i, y_j), [X, n] in [0, 1]: line 5. Where
    the others are samples of pi_t, an unbiased estimate of P(y_i > pi_t) of variance <= 1/(4 (n -
    1)); a gold one enters it with weight 1/(n - 1). Pairs without an answer, NaN, are left out of
    the mean; a response without any has NaN."""
    return wins.masked_fill(torch.eye(wins.shape[-1], dtype=torch.bool), float("nan")).nanmean(-1)


def rate_groups(
    oracle: Any, groups: Groups, wins: Tensor, settings: Practice, generator: torch.Generator
) -> Tensor:
    """r_t [X, n] by which line 6 ranks: line 5's, from outcomes of wins [X, n, n] or from wins
    itself; or, as section 5 does, the points that oracle.scores(prompts, responses) gives, [X, n]
    in [0, 6]. NaN: not to be had."""
    if settings.judgments == "scores":
        return oracle.scores(groups.prompts, groups.responses)
    return group_win_rates(
        draw_outcomes(wins, generator) if settings.judgments == "outcomes" else wins
    )


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


PairLoss = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # of (log_ratio1, log_ratio2, r1, r2), each [B], to [B]


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


def fit_pairs(
    policy: SampledPolicy,
    D: Pairs,
    loss: PairLoss,
    optimizer: torch.optim.Optimizer,
    settings: Practice,
    rate: float,
    generator: torch.Generator,
) -> dict[str, float]:
    """Line 7: one epoch over D of loss(log_ratio1, log_ratio2, r1, r2), log_ratio = log pi -
    log_reference, at a learning rate that falls from rate to 0. Each response of a batch is scored
    once, however many its pairs. Returns the mean loss in nats, the steps taken and the last
    batch's mean log ratio of y+. NotFinite if a gradient is not."""
    total, chosen, batches = 0.0, float("nan"), D.batches(settings.prompts_per_step, generator)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / len(batches))
        optimizer.zero_grad()
        chosen = 0.0
        for piece in batch.pieces(settings.at_once):
            log_pi = policy.log_prob(piece.prompts, piece.responses)
            log_ratio, r = log_pi - piece.log_reference.to(log_pi), piece.r.to(log_pi)
            losses = loss(
                log_ratio[piece.first], log_ratio[piece.second], r[piece.first], r[piece.second]
            )
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
    """The best policy on validation data so far: pi_t, its score and a copy of its parameters on
    the CPU."""

    t: int
    score: float
    parameters: list[Tensor]


def validated(
    policy: SampledPolicy, t: int, validate: Callable[[], float], best: Best | None = None
) -> Best:
    """The better of `best` and of the policy as it is, which is pi_t; of equals the earlier.
    ValueError on a score of NaN."""
    score = validate()
    if score != score:
        raise ValueError(f"the validation score of pi_{t} is {score}; expected a number")
    if best is not None and score <= best.score:
        return best
    return Best(
        t, score, [parameter.detach().to("cpu", copy=True) for parameter in policy.parameters()]
    )


@dataclass(frozen=True)
class Round:
    """What iteration t of an algorithm with samples did. With the states of policy and optimizer it
    is all that is needed to go on after it (the algorithms' argument `after`)."""

    t: int  # 1..T
    groups: Groups
    wins: Tensor  # [X, n, n], P(y_i > y_j) as the oracle gave it, NaN where it did not
    r_t: Tensor  # [X, n], line 5, or scores
    chosen: Tensor  # [B, 3], the new pairs of line 6
    earlier: list[Pairs]  # for replay: the new pairs of this iteration and of those before it
    best: Best  # of pi_1..pi_{t+1}
    loss: float  # mean over the epoch, nats
    steps: int
    chosen_log_ratio: float = float(
        "nan"
    )  # mean of log pi(y+)/pi_t(y+) over the last batch, before its step
    pi_ref: Any = None  # Algorithm 4's reference in iteration t + 1, a policy


Data = Callable[
    [int], tuple[list[Any], list[Any]]
]  # t -> prompts [X] and gold responses [X] of iteration t
Remember = Callable[
    ..., Any
]  # (t, phase, function, *arguments) -> function(*arguments), or what it once was


def compute_anew(t: int, phase: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Remember nothing. A `Remember` that keeps results on disk lets a run go on in the middle of
    an iteration."""
    return function(*arguments)


def random_numbers(seed: int, t: int) -> tuple[int, torch.Generator]:
    """All the chance of iteration t: the seed of its samples and the generator of its outcomes,
    replay and batches, apart from each other, lest who wins depend on what was sampled."""
    number = 2 * (seed * 1_000_003 + t)
    return number, torch.Generator().manual_seed(number + 1)


def algorithm2(
    policy: SampledPolicy,
    oracle: Any,
    data: Data,
    eta: float,
    iterations: int,
    rule: Callable[[Tensor, Tensor], Tensor],
    validate: Callable[[], float],
    *,
    settings: Practice = Practice(),
    words: Callable[[Any], Sequence[Any]] = str.split,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
    after: Round | None = None,
    remember: Remember = compute_anew,
) -> Generator[Round, None, Best]:
    """Algorithm 2, DNO-Prct: `algorithm1` for responses that can only be sampled. What changes: r_t
    is estimated within groups of K samples and a gold response, D_t are pairs of large margin, the
    loss is Eq. (13), and the best policy on validation data is returned. Yields a `Round` for each
    t = 1..T, returns the `Best`.

    policy: trained in place; pi_1 is the policy as it comes. oracle: has prefer(prompts, a, b).
    eta: the paper's eta~. rule: of line 6, such as `large_margin_pairs` with its margin.
    validate(): score of the policy as it is, higher is better. words(y): what n-grams are made of.
    remember: keeps what was sampled and judged. ValueError on a bad number."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    optimizer = optimizer or adam(policy)
    best, earlier = (
        (after.best, after.earlier) if after else (validated(policy, 1, validate), [])
    )  # Alg. 2, line 1
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 2, line 2
        sample_seed, generator = random_numbers(seed, t)
        prompts, gold = data(t)  # Alg. 2, line 3
        groups = remember(
            t, "sampled", sample_groups, policy, prompts, gold, settings, sample_seed
        )  # Alg. 2, line 4
        wins = remember(t, "judged", judge_groups, oracle, groups)
        r_t = rate_groups(oracle, groups, wins, settings, generator)  # Alg. 2, line 5
        r_t, usable = demote_repetitions(r_t, groups, words, settings.ngram)
        chosen = rule(r_t, usable)  # Alg. 2, line 6
        D = join(
            [new := form_pairs(groups, r_t, chosen), *replay(earlier, settings.replay, generator)]
        )
        loss, rate = hard_targets(eta), settings.rate(t, iterations)
        fit = fit_pairs(
            policy, with_reference(D, policy), loss, optimizer, settings, rate, generator
        )  # Alg. 2, line 7
        best, earlier = (
            validated(policy, t + 1, validate, best),
            [new, *earlier][: settings.replay_iterations],
        )
        yield Round(t, groups, wins, r_t, chosen, earlier, best, **fit)
    return best  # Alg. 2, line 9

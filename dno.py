"""Direct Nash Optimization (Rosset et al. 2024, arXiv 2404.03715v1), to be read beside the paper.

Sections 2 to 4, top to bottom: preferences and Nash policies; Algorithm 1, a regression on expected
win rates; Algorithm 2, its practical form, in which responses are sampled and compared. Line 6 of
Algorithm 2 is in pairs.py, what an argument has to be in checks.py, appendix A in regularized.py,
the same games by exact updates in solvers.py. Everything here is mathematics on tensors: no files,
no tokenizers, no network.

Axes: X prompts, Y responses, B pairs, T iterations; K samples of a prompt, n with the gold one.
Tables are float64. Policies are rows on the simplex.

| paper            | here            | shape, range          | meaning                             |
|------------------|-----------------|-----------------------|-------------------------------------|
| P(y > y' | x)    | `P[x, y, y']`   | [X, Y, Y] in [0, 1]   | probability that y is preferred     |
| rho              | `rho`           | [X], sums to 1        | prompt distribution; None: uniform  |
| pi_t             | `pi_t`          | [X, Y], rows sum to 1 | policy of iteration t               |
| pi*_{t+1}        | `pi_star`       | [X, Y]                | target of iteration t, Eq. (9)      |
| pi_bar           | `pi_bar`        | [X, Y]                | unif(pi_1..pi_t), average iterate   |
| pi_ref, tau      | `pi_ref`, `tau` | [X, Y]; tau >= 0      | reference policy, pull towards it   |
| r_t(x, y)        | `r_t`           | [X, Y] in [0, 1]      | expected win rate of y against pi_t |
| eta              | `eta`           | > 0                   | divides r_t: LARGER, SMALLER steps  |
| mu_1, mu_2       | `mu1`, `mu2`    | [X, Y]                | where y1, y2 of a pair come from    |
| Delta_{pi,t}, z^ | `logit`         | [B], its sigmoid      | eta times difference of log ratios  |
| Delta*_t, z      | `r1 - r2`       | [B], its sigmoid      | difference of r_t, soft label       |
| eta~             | `eta`           | > 0                   | DPO's beta: LARGER, SMALLER steps   |
| P(y_i > y_j)     | `preferences`   | [X, n, n] in [0, 1]   | among the responses to a prompt     |
| (x, y+, y-)      | `pairs`         | [B, 3] int64          | numbers of prompt and two responses |

`log_pi_t` is log pi_t; a log ratio is log(pi/pi_t) of a whole response, a sum over its tokens.

The duality gap is E_x[max_y P(y > pi) - min_y P(pi > y)] = E_x[2 max_y P(y > pi) - 1]: 0 exactly at
Nash, at most 1. It is twice what some libraries call exploitability. It is the only measure of the
distance from Nash here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor

from checks import check_policy, check_positive, check_preferences, check_whole, real_tensor
from pairs import Groups, Pairs, SamplingSettings, demote_repetitions, form_pairs, join, replay

NASH_TOLERANCE = 1e-8  # the duality gap that a policy returned as Nash may have

# --- Section 2: preferences, win rates, Nash ------------------------------------------------------


def prompt_mean(values: Tensor, rho: Tensor | None = None) -> Tensor:
    """E_{x~rho} over the last axis of values [..., X]; uniform when rho [X] is None.

    ValueError on a rho that is not a distribution."""
    if rho is None:
        return values.mean(-1)
    return values @ check_policy(rho, values.shape[-1:], "rho").to(values)


def win_rate_against(P: Tensor, pi: Tensor) -> Tensor:
    """P(y > pi | x) for every y, [X, Y]: `expected_win_rate` without its checks.

    One product a prompt: a row times P^T, four times as fast on a CPU as P times a column."""
    return torch.bmm(pi.unsqueeze(1), P.mT).squeeze(1)


def expected_win_rate(P: Tensor, pi: Tensor) -> Tensor:
    """r(x, y) = E_{y'~pi(.|x)} P(y > y' | x), [X, Y] in [0, 1]: Alg. 1, line 3.

    ValueError on a bad P or pi."""
    P = check_preferences(P)
    return win_rate_against(P, check_policy(pi, P.shape[:2]).to(P))


def win_rate(P: Tensor, pi: Tensor, pi_prime: Tensor, rho: Tensor | None = None) -> float:
    """P(pi > pi') = E_{x~rho, y~pi, y'~pi'} P(y > y' | x), in [0, 1] (section 2).

    ValueError on a bad argument."""
    r = expected_win_rate(P, pi_prime)
    return float(prompt_mean((check_policy(pi, r.shape) * r).sum(-1), rho))


def gap_of_rewards(r: Tensor, rho: Tensor | None = None) -> Tensor:
    """Duality gap of the policy whose expected win rates are r [..., X, Y], shape [...].

    r is linear in the policy: the average policy's r is the average r, so that its gap costs no
    further product with P."""
    return prompt_mean((2 * r.amax(-1) - 1).clamp(min=0), rho)  # rounding could take it below 0


def duality_gap(P: Tensor, pi: Tensor, rho: Tensor | None = None) -> float:
    """E_x[max_y P(y > pi | x) - min_y P(pi > y | x)] = E_x[2 max_y P(y > pi | x) - 1], in [0, 1].

    It is 0 exactly at the Nash policies of Eq. (3). ValueError on a bad argument."""
    return float(gap_of_rewards(expected_win_rate(P, pi), rho))


def nash(P: Tensor) -> Tensor:
    """A Nash policy, MW(P) = argmax_pi min_pi' P(pi > pi') of Eq. (3), [X, Y] float64.

    One linear program a prompt: maximise v subject to sum_y pi(y) P(y > y') >= v for every y', and
    pi on the simplex. Raises ValueError on a bad P, and RuntimeError if the solver fails or leaves
    a duality gap of 1e-8 or more."""
    P = check_preferences(P).double()
    P = (P + 1 - P.mT) / 2  # complementary to float64's precision; a float32 table is to 1e-7 only
    pi = torch.from_numpy(np.stack([_maximin(table, x) for x, table in enumerate(P.cpu().numpy())]))
    pi = pi.to(P.device)
    worst = float((2 * win_rate_against(P, pi).amax(-1) - 1).max())
    if worst >= NASH_TOLERANCE:
        expected = f"expected below {NASH_TOLERANCE:.0e}"
        raise RuntimeError(f"the linear program left a duality gap of {worst:.1e}; {expected}")
    return pi


def _maximin(table: np.ndarray, x: int) -> np.ndarray:
    """The distribution [Y] over the rows of a table [Y, Y] whose worst column is best."""
    Y = len(table)
    found = linprog(
        c=np.append(np.zeros(Y), -1.0),  # of (pi, v)
        A_ub=np.hstack([-table.T, np.ones((Y, 1))]),
        b_ub=np.zeros(Y),
        A_eq=np.append(np.ones(Y), 0.0)[None],
        b_eq=[1.0],
        bounds=[(0, None)] * Y + [(None, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if not found.success:
        raise RuntimeError(f"the linear program of prompt {x} failed: {found.message}")
    return found.x[:Y].clip(0) / found.x[:Y].clip(0).sum()


def soft_policy_iteration(log_pi: Tensor, r: Tensor, eta: float) -> Tensor:
    """log pi*, pi*(y|x) = pi(y|x) exp(r(x, y) / eta) / Z(x), [X, Y]: Eq. (9).

    With pi_ref and beta in place of pi and eta it is the solution of Eq. (2). log_pi need not be
    normalised. ValueError unless eta > 0."""
    check_positive(eta=eta)
    return (log_pi + r / eta).log_softmax(-1)


def self_play(P: Tensor, log_pi_t: Tensor, eta: float) -> Tensor:
    """log pi_{t+1}, [X, Y], of SPO (Swamy et al. 2024): Eq. (4).

    It is soft policy iteration on the expected win rates against pi_t. Algorithm 1 has the same
    target, and reaches it by a regression on samples, with a policy of any kind."""
    return soft_policy_iteration(log_pi_t, expected_win_rate(P, log_pi_t.exp()), eta)


def cross_entropy(z: Tensor, logit: Tensor) -> Tensor:
    """-z log sigma(logit) - (1 - z) log sigma(-logit), elementwise, in nats.

    It is Eq. (11), and Eq. (1) where the logit is a difference of rewards. Its minimum over the
    logit is the entropy of z, at sigma(logit) = z."""
    return -z * F.logsigmoid(logit) - (1 - z) * F.logsigmoid(-logit)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = sum_y p log(p/q) along the last axis, in nats; 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV(p, q) = sum_y |p - q| / 2 along the last axis, in [0, 1]."""
    return (p - q).abs().sum(-1) / 2


# --- Section 3: soft policy iteration as a regression ---------------------------------------------


def internal_reward(log_pi: Tensor, log_pi_t: Tensor, eta: float) -> Tensor:
    """r_{pi,t} = eta log(pi / pi_t), [X, Y]: Eq. (10) up to eta log Z(x).

    It is the reward for which pi is the target of soft policy iteration from pi_t. No difference of
    rewards sees eta log Z(x), which the paper prints as eta Z(x)."""
    return eta * (log_pi - log_pi_t)


def dno_loss(log_ratio1: Tensor, log_ratio2: Tensor, r1: Tensor, r2: Tensor, eta: float) -> Tensor:
    """Eq. (8) = Eq. (12) as a loss [B] in nats: the cross-entropy of the label z against z^.

    z = sigma(r1 - r2) and z^ = sigma(eta log_ratio1 - eta log_ratio2), where log_ratio = log
    pi(y|x) - log pi_t(y|x) of whole responses (a sum over tokens, never a mean). No gradient flows
    through r1, r2. The minimum is the entropy of z, at z^ = z; at pi = pi_t the loss is ln 2,
    whatever r1, r2."""
    z = torch.sigmoid(r1 - r2).detach()
    return cross_entropy(z, eta * (log_ratio1 - log_ratio2))


# --- Algorithm 1 ----------------------------------------------------------------------------------


class Policy(Protocol):
    """What Algorithm 1 needs of a policy over enumerable responses: a table or a transformer."""

    def log_probs(self) -> Tensor:
        """log pi(y|x) of every response, [X, Y], normalised, differentiable in `parameters()`."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that line 4 trains."""


MU = {  # where a response of D_t is drawn from, given (pi_t, pi_star)
    "on-policy": lambda pi_t, pi_star: pi_t,  # what the paper recommends
    "uniform": lambda pi_t, pi_star: torch.full_like(pi_t, 1 / pi_t.shape[-1]),
    "target": lambda pi_t, pi_star: pi_star,  # the ideal of Theorem 1
}


@dataclass(frozen=True)
class Regression:
    """How line 4 is solved: Adam on Eq. (8), once over N = steps * pairs tuples D_t, starting from
    pi_t."""

    steps: int = 24  # Adam steps, unless the tolerance is met before
    pairs: int = 2048  # tuples (x, y1, y2) a step
    learning_rate: float = 5e-3  # of the first step; falls linearly to 0 within the iteration
    max_grad_norm: float = 0.1  # longer gradients are cut; uncut, one in 600 iterations went astray
    tolerance: float = 0.0  # nats; stop once a batch's loss is this close to the entropy of z
    mu1: str | Tensor = "on-policy"  # a name in `MU`, or a fixed table [X, Y]: off-policy data
    mu2: str | Tensor = "on-policy"

    def __post_init__(self) -> None:
        check_whole(1, steps=self.steps, pairs=self.pairs)
        check_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        for mu in (self.mu1, self.mu2):
            if isinstance(mu, str) and mu not in MU:
                expected = f"one of {', '.join(MU)}, or a table [X, Y]"
                raise ValueError(f"mu is {mu!r}; expected {expected}")


@dataclass(frozen=True)
class ExactIteration:
    """What iteration t of Algorithm 1 or 3 did; tables are [X, Y], float64 and detached."""

    t: int  # 1..T
    eta: float
    log_pi_t: Tensor
    log_reference: Tensor  # of the loss: log pi_t; in Algorithm 3 its mixture with pi_ref
    r_t: Tensor
    log_pi_next: Tensor  # pi_{t+1}: what line 4 reached
    pi_bar: Tensor  # unif(pi_1..pi_t)
    loss: float  # Eq. (8) on the last batch, before its step, nats
    excess_loss: float  # that minus the mean entropy of z; >= 0
    steps: int  # Adam steps taken
    log_pi_ref: Tensor | None = None  # Algorithm 3's reference policy in iteration t + 1

    @property
    def log_pi_star(self) -> Tensor:
        """log pi*_{t+1}, Eq. (9); in Algorithm 3 Eq. (7).

        A table that line 4 fits to all pairs reaches it exactly (C9)."""
        return soft_policy_iteration(self.log_reference, self.r_t, self.eta)


@dataclass(frozen=True)
class ExactStart:
    """Where Algorithm 1 or 3 starts.

    after: the iteration to go on from, with policy, optimizer and generator in the states that they
    had then; None to start from pi_1."""

    optimizer: torch.optim.Optimizer
    generator: torch.Generator  # draws D_t
    after: ExactIteration | None = None

    @classmethod
    def of(cls, policy: Policy) -> ExactStart:
        """A new run with `adam` and seed 0."""
        return cls(adam(policy), torch.Generator().manual_seed(0))


def log_table(policy: Policy) -> Tensor:
    """log pi(y|x) as a frozen table [X, Y], normalised to the precision of float64."""
    with torch.no_grad():
        return policy.log_probs().double().log_softmax(-1)


def adam(policy: Policy | SampledPolicy, momentum: float = 0.9) -> torch.optim.Adam:
    """The optimizer of line 4 (line 7 in Algorithm 2).

    Its moments outlive the iterations. The algorithms set its learning rate."""
    return torch.optim.Adam(policy.parameters(), betas=(momentum, 0.95), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


Tuples = tuple[Tensor, Tensor, Tensor]  # D_t: prompts x, responses y1 and y2, each [N] int64


def draw_tuples(
    rho: Tensor | None, mu1: Tensor, mu2: Tensor, n: int, generator: torch.Generator
) -> Tuples:
    """D_t: n tuples x ~ rho, y1 ~ mu1(.|x), y2 ~ mu2(.|x), drawn on the CPU, by its generator."""
    X, Y = mu1.shape
    rho = torch.ones(X) if rho is None else check_policy(rho, mu1.shape[:1], "rho").cpu()
    x = torch.multinomial(rho, n, replacement=True, generator=generator)

    def draw(mu: Tensor) -> Tensor:  # one binary search in all rows' distribution functions
        cdf = mu.cpu().double().cumsum(-1)
        ends = (cdf / cdf[:, -1:] + torch.arange(X).unsqueeze(-1)).flatten()
        u = torch.rand(n, generator=generator, dtype=torch.float64)
        return (torch.searchsorted(ends, x + u, right=True) - x * Y).clamp(0, Y - 1)

    y1, y2 = draw(mu1), draw(mu2)
    return x.to(mu1.device), y1.to(mu1.device), y2.to(mu1.device)


def draw_data(
    settings: Regression,
    rho: Tensor | None,
    log_pi_t: Tensor,
    log_pi_star: Tensor,
    generator: torch.Generator,
) -> Tuples:
    """D_t from the mu_{1,t} and mu_{2,t} of the settings, for all steps of an iteration."""
    pi_t, pi_star = log_pi_t.exp(), log_pi_star.exp()
    mus = (settings.mu1, settings.mu2)
    tables = (MU[mu](pi_t, pi_star) if isinstance(mu, str) else mu for mu in mus)
    mu1, mu2 = (check_policy(mu, pi_t.shape, "mu").to(pi_t) for mu in tables)
    return draw_tuples(rho, mu1, mu2, settings.steps * settings.pairs, generator)


def regress(
    policy: Policy,
    log_reference: Tensor,
    r_t: Tensor,
    D_t: Tuples,
    eta: float,
    optimizer: torch.optim.Optimizer,
    settings: Regression,
) -> dict[str, Any]:
    """Line 4: minimise Eq. (8) over D_t, log_reference [X, Y] being log pi_t, frozen.

    Returns the last batch's loss and excess_loss, in nats, and the steps taken."""
    steps = 0
    for x, y1, y2 in zip(*(part.chunk(settings.steps) for part in D_t), strict=True):
        log_ratio = policy.log_probs() - log_reference
        r1, r2 = r_t[x, y1], r_t[x, y2]
        loss = dno_loss(log_ratio[x, y1], log_ratio[x, y2], r1, r2, eta).mean()
        excess = loss.detach() - cross_entropy(torch.sigmoid(r1 - r2), r1 - r2).mean()
        if settings.tolerance and excess < settings.tolerance:
            break
        set_learning_rate(optimizer, settings.learning_rate * (1 - steps / settings.steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        steps += 1
    return {"loss": loss.item(), "excess_loss": excess.item(), "steps": steps}


def algorithm1(
    policy: Policy,
    P: Tensor,
    eta: float,
    iterations: int,
    *,
    rho: Tensor | None = None,
    settings: Regression = Regression(),
    start: ExactStart | None = None,
) -> Generator[ExactIteration, None, Tensor]:
    """Algorithm 1, DNO: yields an `ExactIteration` for each t = 1..T and returns pi_bar [X, Y].

    policy: trained in place. pi_1 is the policy as it comes; the paper wants it uniform, as new
    ones of model.py are. P: [X, Y, Y]. ValueError on a bad P, rho, mu, eta or T, at the first
    iteration."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    start = start or ExactStart.of(policy)
    log_pi_t = log_table(policy)  # Alg. 1, line 1: pi_1 <- uniform
    after = start.after
    pi_bar = after.pi_bar if after else torch.zeros_like(log_pi_t)
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 1, line 2
        r_t = expected_win_rate(P, log_pi_t.exp())  # Alg. 1, line 3
        log_pi_star = soft_policy_iteration(log_pi_t, r_t, eta)  # Eq. (9), for mu "target"
        D_t = draw_data(settings, rho, log_pi_t, log_pi_star, start.generator)
        fit = regress(policy, log_pi_t, r_t, D_t, eta, start.optimizer, settings)  # Alg. 1, line 4
        log_pi_next = log_table(policy)
        pi_bar = pi_bar + (log_pi_t.exp() - pi_bar) / t
        yield ExactIteration(t, eta, log_pi_t, log_pi_t, r_t, log_pi_next, pi_bar, **fit)
        log_pi_t = log_pi_next
    return pi_bar  # Alg. 1, line 6


# --- Section 4: Algorithm 2, with responses sampled, ranked and contrasted ------------------------


def contrastive_loss(log_ratio_pos: Tensor, log_ratio_neg: Tensor, eta: float) -> Tensor:
    """Eq. (13) as a loss [B] in nats: -log sigma(eta log_ratio_pos - eta log_ratio_neg).

    log_ratio = log pi - log pi_t of whole responses. It is Eq. (8) with z = 1, and the DPO loss
    with reference pi_t and beta = eta (the paper's eta~)."""
    return -F.logsigmoid(eta * (log_ratio_pos - log_ratio_neg))


class Sampler(Protocol):
    """What line 4 needs: responses of any kind."""

    def sample(
        self,
        prompts: list[Any],
        k: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[Sequence[Sequence[Any]] | Tensor, Tensor]:
        """k responses to each of X prompts, [X][k], and their log-probabilities [X, k].

        The log-probabilities are the policy's own, at temperature 1 with nothing cut off."""


class SampledPolicy(Sampler, Protocol):
    """What Algorithm 2 needs of a policy whose responses can only be sampled and scored."""

    def log_prob(self, prompts: list[Any], responses: list[Any]) -> Tensor:
        """log pi(y|x) [M] of whole responses, differentiable in `parameters()`."""

    def parameters(self) -> Iterable[Tensor]:
        """The tensors that line 7 trains."""


class Preferences(Protocol):
    """What Algorithm 2 asks of an oracle."""

    def prefer(self, prompts: Sequence[Any], a: Sequence[Any], b: Sequence[Any]) -> Tensor:
        """P(a[i] > b[i] | prompts[i]), [B] in [0, 1]; NaN where there is no answer."""


@runtime_checkable
class Scores(Preferences, Protocol):
    """What Algorithm 2 asks of an oracle where responses are ranked by points, as in section 5."""

    def scores(self, prompts: Sequence[Any], responses: Sequence[Sequence[Any]]) -> Tensor:
        """Points of responses [X][n], [X, n] in [0, 6]; NaN where there is no answer."""


def sample_groups(
    policy: Sampler,
    prompts: list[Any],
    gold: list[Any] | None,
    settings: SamplingSettings,
    seed: int,
) -> Groups:
    """Line 4: K samples a prompt, with their recorded log-probabilities; the gold response comes
    last."""
    k, temperature, top_p = settings.samples, settings.temperature, settings.top_p
    responses, log_pi_t = policy.sample(prompts, k, temperature, top_p, seed)
    unknown = torch.full_like(log_pi_t, math.nan)
    log_pi_t = log_pi_t.detach() if settings.use_recorded else unknown
    listed = responses.tolist() if isinstance(responses, Tensor) else responses
    if gold is None:
        return Groups(prompts, [list(ys) for ys in listed], log_pi_t)
    groups = [[*ys, y] for ys, y in zip(listed, gold, strict=True)]
    return Groups(prompts, groups, torch.cat([log_pi_t, unknown[:, :1]], dim=1))


def judge_groups(oracle: Preferences, groups: Groups) -> Tensor:
    """P(y_i > y_j | x) of every two responses of a group, [X, n, n], float64 on the CPU.

    One question for each unordered pair, all asked together, the gold response always second; the
    answer the other way round is taken to be 1 - P. An oracle that may prefer a place asks in both
    orders by itself, as oracle.OpenAIJudge does. NaN where the oracle has no answer. ValueError on
    an answer that is no probability."""
    X, n = len(groups.prompts), len(groups.responses[0])
    i, j = torch.triu_indices(n, n, 1).tolist()
    prompts = [x for x in groups.prompts for _ in i]
    a, b = ([ys[m] for ys in groups.responses for m in which] for which in (i, j))
    if not hasattr(oracle, "prefer"):
        kind, hint = type(oracle).__name__, "of a table P, pass oracle.PreferenceTable(P)"
        raise ValueError(f"the oracle is of type {kind}; expected a method prefer: {hint}")
    preferences = torch.full((X, n, n), 0.5, dtype=torch.float64)
    answers = real_tensor(oracle.prefer(prompts, a, b), "the answer").detach().to(preferences)
    given = answers[~answers.isnan()]
    if not ((given >= 0) & (given <= 1)).all():
        found = f"{given.min():.6g} to {given.max():.6g}"
        raise ValueError(f"the oracle answered {found}; expected probabilities in [0, 1]")
    preferences[:, i, j] = answers.view(X, -1)
    preferences[:, j, i] = 1 - preferences[:, i, j]
    return preferences


def draw_outcomes(preferences: Tensor, generator: torch.Generator) -> Tensor:
    """1_P of line 5, [X, n, n]: one {0, 1} sample of the probability of each unordered pair.

    NaN stays NaN, and the diagonal 1/2."""
    won = torch.rand(preferences.shape, generator=generator, dtype=preferences.dtype) < preferences
    won = won.to(preferences).masked_fill(preferences.isnan(), math.nan).triu(1)
    return won + (1 - won).mT.tril(-1) + 0.5 * torch.eye(preferences.shape[-1]).to(preferences)


def group_win_rates(preferences: Tensor) -> Tensor:
    """r_t(x, y_i) = mean over the n - 1 others of preferences(y_i, y_j), [X, n] in [0, 1]: line 5.

    Where the others are samples of pi_t (at temperature 1, nothing cut off), it is an unbiased
    estimate of P(y_i > pi_t) of variance at most 1/(4 (n - 1)). A gold response among them has
    weight 1/(n - 1). Pairs without an answer are left out of the mean; a response without any
    answer has NaN."""
    itself = torch.eye(preferences.shape[-1], dtype=torch.bool)
    return preferences.masked_fill(itself, math.nan).nanmean(-1)


def rate_groups(
    oracle: Preferences,
    groups: Groups,
    preferences: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
) -> Tensor:
    """r_t [X, n], by which line 6 ranks; NaN where there is no answer.

    Line 5's win rates, from outcomes of preferences [X, n, n] or from preferences themselves; or,
    as in section 5, the points of 0 to 6 that the oracle gives. ValueError if it gives none."""
    if settings.judgments == "scores":
        if not isinstance(oracle, Scores):
            raise ValueError(f"{type(oracle).__name__} has no scores; expected judgments outcomes")
        return oracle.scores(groups.prompts, groups.responses)
    if settings.judgments == "outcomes":
        preferences = draw_outcomes(preferences, generator)
    return group_win_rates(preferences)


@torch.no_grad()
def with_reference(D: Pairs, policy: SampledPolicy) -> Pairs:
    """D with log pi_t in place of every NaN, computed now, while the policy still is pi_t.

    From here on the reference is fixed numbers. What was recorded while sampling stays as it is;
    gold responses and replayed pairs are scored here."""
    missing = D.log_reference.isnan().nonzero()[:, 0].tolist()
    if not missing:
        return D
    log_reference = D.log_reference.clone()
    prompts, responses = ([part[m] for m in missing] for part in (D.prompts, D.responses))
    log_reference[missing] = policy.log_prob(prompts, responses).to(log_reference)
    return replace(D, log_reference=log_reference)


# (log_ratio1, log_ratio2, r1, r2), each [B] -> [B]
PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def hard_targets(eta: float) -> PairLoss:
    """Eq. (13): the first response of a pair is the better one, by whatever margin."""
    return lambda log_ratio1, log_ratio2, r1, r2: contrastive_loss(log_ratio1, log_ratio2, eta)


def soft_targets(eta: float) -> PairLoss:
    """Eq. (8), with estimated win rates."""
    return lambda log_ratio1, log_ratio2, r1, r2: dno_loss(log_ratio1, log_ratio2, r1, r2, eta)


class NotFinite(ArithmeticError):
    """A gradient that is NaN or infinite; `batch` is what it came from."""

    def __init__(self, reason: str, batch: Pairs):
        super().__init__(reason)
        self.batch = batch


def fit_pairs(
    policy: SampledPolicy,
    D: Pairs,
    loss: PairLoss,
    optimizer: torch.optim.Optimizer,
    settings: SamplingSettings,
    rate: float,
    generator: torch.Generator,
) -> dict[str, Any]:
    """Line 7: one epoch over D of the loss, log_ratio being log pi - log_reference.

    The learning rate falls from rate to 0. Each response of a batch is scored once, however many
    its pairs. Returns the mean loss in nats, the steps taken, and chosen_log_ratio, the mean of log
    pi(y+)/pi_t(y+) over the last batch. NotFinite if a gradient is not finite."""
    total, chosen, batches = 0.0, math.nan, D.batches(settings.prompts_per_step, generator)
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, rate * (1 - step / len(batches)))
        optimizer.zero_grad()
        chosen = 0.0
        for piece in batch.pieces(settings.prompts_at_once):
            log_pi = policy.log_prob(piece.prompts, piece.responses)
            log_ratio, r = log_pi - piece.log_reference.to(log_pi), piece.r.to(log_pi)
            y1, y2 = piece.first, piece.second
            losses = loss(log_ratio[y1], log_ratio[y2], r[y1], r[y2])
            (losses.sum() / len(batch.first)).backward()
            total += losses.detach().sum().item()
            chosen += log_ratio[y1].detach().sum().item() / len(batch.first)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        if not norm.isfinite():
            raise NotFinite(f"the gradient of step {step + 1} is not finite", batch)
        optimizer.step()
    mean = total / max(1, len(D.first))
    return {"loss": mean, "steps": len(batches), "chosen_log_ratio": chosen}


def parameters_of(policy: SampledPolicy) -> list[Tensor]:
    """Copies of the parameters as they are, on the CPU."""
    return [parameter.detach().to("cpu", copy=True) for parameter in policy.parameters()]


@dataclass(frozen=True)
class Best:
    """The best policy on validation data so far: pi_t, its score, its parameters on the CPU."""

    t: int
    score: float
    parameters: list[Tensor]


def validated(
    policy: SampledPolicy, t: int, validate: Callable[[], float], best: Best | None = None
) -> Best:
    """The better of `best` and of the policy as it is, which is pi_t; the earlier one if they are
    equal.

    ValueError on a score of NaN."""
    score = validate()
    if math.isnan(score):
        raise ValueError(f"the validation score of pi_{t} is {score}; expected a number")
    if best is not None and score <= best.score:
        return best
    return Best(t, score, parameters_of(policy))


@dataclass(frozen=True)
class SampledIteration:
    """What iteration t of an algorithm with samples did."""

    t: int  # 1..T
    groups: Groups
    preferences: Tensor  # [X, n, n], P(y_i > y_j) by the oracle, NaN where it has no answer
    r_t: Tensor  # [X, n], line 5, or scores
    pairs: Tensor  # [B, 3], the new pairs of line 6
    earlier: list[Pairs]  # for replay: the new pairs of this iteration and of those before it
    best: Best  # of pi_1..pi_{t+1}
    loss: float  # mean over the epoch, nats
    steps: int
    chosen_log_ratio: float = math.nan  # mean of log pi(y+)/pi_t(y+), before the last step
    pi_ref: Any = None  # Algorithm 4's reference policy in iteration t + 1


@dataclass(frozen=True)
class SampledStart:
    """Where an algorithm with samples starts.

    after: the iteration to go on from, with policy and optimizer in the states that they had then;
    None to start from pi_1."""

    optimizer: torch.optim.Optimizer
    after: SampledIteration | None = None


Data = Callable[[int], tuple[list[Any], list[Any] | None]]  # t -> prompts [X], gold responses [X]
Rule = Callable[[Tensor, Tensor], Tensor]  # (r [X, n], may_be_positive [X, n]) -> pairs [B, 3]


def random_numbers(seed: int, t: int) -> tuple[int, torch.Generator]:
    """All the chance of iteration t: the seed of its samples, and the generator of everything else.

    The two are independent: {0, 1} outcomes are not drawn by the numbers that drew the samples."""
    number = 2 * (seed * 1_000_003 + t)
    return number, torch.Generator().manual_seed(number + 1)


def algorithm2(
    policy: SampledPolicy,
    oracle: Preferences,
    data: Data,
    eta: float,
    iterations: int,
    rule: Rule,
    validate: Callable[[], float],
    *,
    settings: SamplingSettings = SamplingSettings(),
    start: SampledStart | None = None,
) -> Generator[SampledIteration, None, Best]:
    """Algorithm 2, DNO-Prct: `algorithm1` for responses that can only be sampled.

    What changes: r_t is estimated within groups of K samples and a gold response; D_t holds pairs
    of large margin; the loss is Eq. (13); the best policy on validation data is returned. Section 5
    adds that repetitions are negatives and that earlier pairs are replayed. Yields a
    `SampledIteration` for each t = 1..T and returns the `Best`; the policy is then pi_{T+1}.

    policy: trained in place; pi_1 is the policy as it comes. eta: the paper's eta~. rule: of line
    6, such as `pairs.large_margin_pairs` with its margin. validate(): the score of the policy as it
    is, higher is better. ValueError on a bad number."""
    check_positive(eta=eta)
    check_whole(1, iterations=iterations)
    start = start or SampledStart(adam(policy))
    after = start.after  # Alg. 2, line 1: pi_1 <- pi_ref, the policy as it comes
    best = after.best if after else validated(policy, 1, validate)
    earlier = after.earlier if after else []
    for t in range(after.t + 1 if after else 1, iterations + 1):  # Alg. 2, line 2
        sample_seed, generator = random_numbers(settings.seed, t)
        prompts, gold = data(t)  # Alg. 2, line 3
        groups = sample_groups(policy, prompts, gold, settings, sample_seed)  # Alg. 2, line 4
        preferences = judge_groups(oracle, groups)
        r_t = rate_groups(oracle, groups, preferences, settings, generator)  # Alg. 2, line 5
        r_t, may_be_positive = demote_repetitions(r_t, groups, settings)
        pairs = rule(r_t, may_be_positive)  # Alg. 2, line 6
        new = form_pairs(groups, r_t, pairs)
        D = join([new, *replay(earlier, settings.replay, generator)])
        D = with_reference(D, policy)
        loss, rate = hard_targets(eta), settings.rate(t, iterations)
        # Alg. 2, line 7
        fit = fit_pairs(policy, D, loss, start.optimizer, settings, rate, generator)
        best = validated(policy, t + 1, validate, best)
        earlier = [new, *earlier][: settings.replay_iterations]
        yield SampledIteration(t, groups, preferences, r_t, pairs, earlier, best, **fit)
    return best  # Alg. 2, line 9

"""DNO and its relatives, each as one exact update of a table: what `solvers.solve` can run.

All are written in the notation of dno.py: r_t = P(. > pi_t), and a LARGER eta is a smaller step.
m_t = log pi_t^(1 - tau/eta) pi_ref^(tau/eta) is log pi_t where tau = 0. An update gives
log pi_{t+1} [X, Y], not normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dno import win_rate_against
from fits import fit_scores, newton, pair_weights
from regularized import geometric_mixture

Memory = dict[str, Tensor]
UNKNOWN = torch.empty(0)


@dataclass(frozen=True)
class Situation:
    """What an update of iteration t sees; tables are [X, Y]."""

    P: Tensor  # [X, Y, Y]
    eta: float
    log_mixture: Tensor  # m_t
    r_t: Tensor  # expected win rates against pi_t
    r_before: Tensor  # against pi_{t-1}; r_t itself if t = 1
    t: int = 1
    tau: float = 0.0
    log_pi: Tensor = UNKNOWN  # log pi_t
    log_before: Tensor = UNKNOWN  # log pi_{t-1}; log pi_1 if t = 1
    log_ref: Tensor = UNKNOWN  # log pi_ref
    memory: Memory = field(default_factory=dict)  # what the method keeps; empty in iteration 1

    def step(self, r: Tensor) -> Tensor:
        """log pi*, not normalised, of soft policy iteration on the rewards r: Eq. (9)."""
        return self.log_mixture + r / self.eta

    def against(self, log_pi: Tensor) -> Tensor:
        """Expected win rates against a policy, given by its logarithm up to a constant."""
        return win_rate_against(self.P, log_pi.softmax(-1))


# --- Mirror steps ---------------------------------------------------------------------------------


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


def onpo_update(now: Situation) -> Tensor:
    """ONPO (Zhang 2025): pi'_{t+1} ~ pi'_t e^(r_t/eta) and pi_{t+1} ~ pi'_{t+1} e^(r_t/eta), with
    pi'_1 = pi_1. Without pi' it is the optimistic update with r_0 = 0."""
    return now.step(2 * now.r_t - (now.r_before if now.t > 1 else 0))


def proximal_update(now: Situation) -> Tensor:
    """NashPG (Yu 2025), exactly: the rewards are those against the policy itself that results."""
    return implicit_step(now.P, now.log_mixture, now.eta)


def implicit_step(P: Tensor, log_reference: Tensor, eta: float) -> Tensor:
    """log pi [X, Y], not normalised, of the solution of pi ~ pi_ref exp(P(. > pi)/eta): MW(P_eta).

    Newton's method on F(u) = u - log pi_ref - P softmax(u)/eta. The Jacobian I - A M/eta, with A =
    P - 1/2 skew-symmetric and M the covariance of softmax(u), is never singular: A M has imaginary
    eigenvalues only, since M is positive semidefinite. RuntimeError without success."""
    A, eye = P - 0.5, torch.eye(P.shape[1]).to(P)

    def jacobian(u: Tensor) -> Tensor:
        return eye - A @ covariance(u.softmax(-1)) / eta

    def residual(u: Tensor) -> Tensor:
        return u - log_reference - win_rate_against(A, u.softmax(-1)) / eta

    return newton(residual, jacobian, log_reference, tolerance=1e-13 * (1 + 1 / eta))


def covariance(pi: Tensor) -> Tensor:
    """diag(pi) - pi pi^T, [X, Y, Y]: the derivative of softmax."""
    return torch.diag_embed(pi) - pi.unsqueeze(-1) * pi.unsqueeze(-2)


def magnetic_update(now: Situation) -> Tensor:
    """MPO (Wang 2024), by magnetic mirror descent (Sokota 2023) with step 1/eta: our m_t and step
    at eta + tau. `solve` moves the reference."""
    total = now.eta + now.tau
    return geometric_mixture(now.log_pi, now.log_ref, now.tau, total) + now.r_t / total


def mnpo_update(now: Situation) -> Tensor:
    """MNPO (Wu 2025) as written, against the last two policies: from their geometric mean, on the
    mean of their rewards."""
    return two_policies(now) + (now.r_t + now.r_before) / (2 * now.eta)


def mnpo_code_update(now: Situation) -> Tensor:
    """MNPO as its authors' code has it: from the geometric mean of the last two policies, on the
    rewards against the last. The code's reference has weight tau/eta = 1/3."""
    return two_policies(now) + now.r_t / now.eta


def two_policies(now: Situation) -> Tensor:
    """m_t with the geometric mean of pi_t and pi_{t-1} in pi_t's place."""
    mean = (now.log_pi + now.log_before) / 2
    return geometric_mixture(mean, now.log_ref, now.tau, now.eta)


# --- Other regularisers, other games --------------------------------------------------------------


def rspo_chi_square_update(now: Situation) -> Tensor:
    """RSPO (Tang 2025): argmax of <pi, r_t> - tau sum_y pi^2/pi_ref - eta KL(pi || pi_t)."""
    ref = now.log_ref.exp()
    return regularised_step(now, lambda pi: 2 * pi / ref, lambda pi: 2 / ref)


def rspo_forward_kl_update(now: Situation) -> Tensor:
    """RSPO with the forward divergence: argmax of <pi, r_t> - tau KL(pi_ref || pi) - eta KL(pi ||
    pi_t)."""
    ref = now.log_ref.exp()
    return regularised_step(now, lambda pi: -ref / pi, lambda pi: ref / pi**2)


def regularised_step(
    now: Situation, slope: Callable[[Tensor], Tensor], curvature: Callable[[Tensor], Tensor]
) -> Tensor:
    """argmax of <pi, r_t> - tau sum_y R(pi(y)) - eta KL(pi || pi_t), R convex with the derivatives
    slope and curvature: Newton's method on u = log pi_t + (r_t - tau R'(softmax(u)))/eta.

    Its Jacobian is I + D M, D diagonal and positive, M a covariance: never singular."""
    target, weight = now.log_pi + now.r_t / now.eta, now.tau / now.eta
    if weight == 0:
        return target
    eye = torch.eye(target.shape[-1]).to(target)

    def jacobian(u: Tensor) -> Tensor:
        pi = u.softmax(-1)
        return eye + weight * curvature(pi).unsqueeze(-1) * covariance(pi)

    def residual(u: Tensor) -> Tensor:
        return u - target + weight * slope(u.softmax(-1))

    scale = 1 + target.abs().max().item() + weight * slope(target.softmax(-1)).abs().max().item()
    return newton(residual, jacobian, target.log_softmax(-1), tolerance=1e-13 * scale)


def slhf_update(now: Situation) -> Tensor:
    """SLHF (Pasztor 2025): the leader against a follower who sees its response and answers best,
    within tau KL of pi_ref: its rewards are V(y) = -tau log E_{y'~pi_ref} exp(-P(y > y')/tau).

    The authors' follower takes gradient steps too; ours has finished them. At tau = 0 V is the
    worst case, min_y' P(y > y'). It is no Nash method: the leader's best policy is one response."""
    if now.tau == 0:
        return now.step(now.P.amin(-1))
    exponents = now.log_ref.unsqueeze(-2) - now.P / now.tau
    return now.step(-now.tau * exponents.logsumexp(-1))


def dsppo_update(now: Situation, strength: float = 1.0) -> Tensor:
    """DSPPO (2026): the log odds of P, of which what scores explain counts 1 + l/sqrt(t) and the
    rest, the cycles, 1 - l/sqrt(t); l is the strength.

    The authors' scores are a learnt reward; ours are the log odds' row means."""
    odds = torch.logit(now.P, eps=1e-12)
    f = odds.mean(-1)
    explained = f.unsqueeze(-1) - f.unsqueeze(-2)
    change = strength / now.t**0.5
    P_t = torch.sigmoid((1 + change) * explained + (1 - change) * (odds - explained))
    return now.step(win_rate_against(P_t, now.log_pi.softmax(-1)))


# --- Methods without a step size ------------------------------------------------------------------


def regret_matching_update(now: Situation) -> Tensor:
    """Regret matching (Hart, Mas-Colell 2000): in proportion to the positive summed regrets."""
    regrets = now.memory["regrets"] = now.memory.get("regrets", 0) + regret(now.log_pi, now.r_t)
    return in_proportion(regrets)


def regret_matching_plus_update(now: Situation) -> Tensor:
    """RM+ (Tammelin 2014): sums of regrets never fall below 0."""
    return in_proportion(added(now.memory, "regrets", regret(now.log_pi, now.r_t)))


def predictive_regret_matching_plus_update(now: Situation) -> Tensor:
    """Predictive RM+ (Farina 2021): the last regret is expected to come again."""
    last = regret(now.log_pi, now.r_t)
    return in_proportion(added(now.memory, "regrets", last) + last)


def alternating_regret_matching_plus_update(now: Situation) -> Tensor:
    """RM+ of two players, of whom the second sees the first's new policy, as in CFR+ (Tammelin
    2014). pi_{t+1} is the mean of the two, and the average is linear."""
    return alternating(now, predictive=False)


def alternating_predictive_regret_matching_plus_update(now: Situation) -> Tensor:
    """Predictive RM+ of two players, as above."""
    return alternating(now, predictive=True)


def fictitious_play_update(now: Situation) -> Tensor:
    """Fictitious play (Brown 1951): the best reply to unif(pi_1..pi_t), the first of several."""
    rewards = now.memory["rewards"] = now.memory.get("rewards", 0) + now.r_t
    best = torch.zeros_like(rewards).scatter(-1, rewards.argmax(-1, keepdim=True), 1.0)
    return best.log()


def regret(log_pi: Tensor, r: Tensor) -> Tensor:
    """r - <pi, r>: by how much each response would have done better than the policy."""
    return r - (log_pi.exp() * r).sum(-1, keepdim=True)


def added(memory: Memory, name: str, change: Tensor) -> Tensor:
    """[z + change]+ in place of the z of this name, at first 0."""
    memory[name] = (memory.get(name, torch.zeros_like(change)) + change).clamp(min=0)
    return memory[name]


def in_proportion(regrets: Tensor) -> Tensor:
    """log of the policy in proportion to the positive regrets; uniform if there are none."""
    positive = regrets.clamp(min=0)
    none = positive.sum(-1, keepdim=True) == 0
    return (positive + none).log()


def alternating(now: Situation, predictive: bool) -> Tensor:
    """One turn of each of two players with (predictive) RM+; log of the mean of their policies."""
    memory = now.memory
    first = memory.get("first", now.log_pi)
    for player, other in (("first", "second"), ("second", "first")):
        mine, theirs = memory.get(player, first), memory.get(other, first)
        last = regret(mine, now.against(theirs))
        total = added(memory, f"regrets of the {player}", last)
        memory[player] = in_proportion(total + last if predictive else total).log_softmax(-1)
    both = torch.stack([memory["first"], memory["second"]])
    return both.logsumexp(0)


METHODS: dict[str, Callable[..., Tensor]] = {  # name -> update: log pi_{t+1}, not normalised
    "dno": soft_update,
    "dno-regression": regression_update,
    "nash-md": nash_md_update,
    "omwu": optimistic_update,
    "onpo": onpo_update,
    "sppo": sppo_update,
    "moving-reference": soft_update,  # COMAL (Liu 2024)
    "mpo": magnetic_update,
    "extragradient": extragradient_update,
    "nash-pg": proximal_update,
    "mnpo": mnpo_update,
    "mnpo-code": mnpo_code_update,
    "rspo-chi-square": rspo_chi_square_update,
    "rspo-forward-kl": rspo_forward_kl_update,
    "slhf": slhf_update,
    "dsppo": dsppo_update,
    "regret-matching": regret_matching_update,
    "regret-matching-plus": regret_matching_plus_update,
    "regret-matching-plus-alternating": alternating_regret_matching_plus_update,
    "predictive-regret-matching-plus": predictive_regret_matching_plus_update,
    "predictive-regret-matching-plus-alternating": (
        alternating_predictive_regret_matching_plus_update
    ),
    "fictitious-play": fictitious_play_update,
}
MOVING = {"moving-reference", "mpo"}  # whose reference moves
LINEAR = {"regret-matching-plus-alternating", "predictive-regret-matching-plus-alternating"}

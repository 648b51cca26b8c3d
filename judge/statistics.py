"""How far judgments can be trusted: intervals, win rates at equal length, agreement, cycles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import binomtest
from torch import Tensor


def clustered_mean(values: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """Mean of values [n] and the half width of its 95% interval, those of one cluster (one
    prompt's) being dependent: 1.96 sqrt(G/(G - 1) sum_g (sum_{i in g} (v_i - mean))^2) / n, with G
    clusters; NaN for fewer than two. NaN values are left out."""
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, math.nan
    values, clusters = values[known], np.unique(np.asarray(clusters)[known], return_inverse=True)[1]
    sums = np.bincount(clusters, values - values.mean())
    G = len(sums)
    return float(values.mean()), float(
        1.96 * np.sqrt(G / (G - 1) * (sums**2).sum()) / len(values)
    ) if G > 1 else math.nan


def length_controlled(wins: np.ndarray, lead: np.ndarray) -> float:
    """The win rate at equal lengths: sigma(theta), where theta and phi maximise the likelihood of
    the wins [n] in [0, 1] under P(win) = sigma(theta + phi tanh(d / std d)), d = lead [n] the
    differences of length. That is the length-controlled win rate of AlpacaEval 2 (Dubois et al.
    2024, arXiv 2404.04475) without its term for how hard a prompt is, which takes many models; a
    prior exp(-(theta^2 + phi^2)/200) keeps it finite where every response wins. NaN wins are left
    out."""
    known = ~np.isnan(wins)
    wins, lead = wins[known], lead[known].astype(float)
    if not len(wins):
        return math.nan
    spread = lead.std()
    design = np.stack([np.ones_like(lead), np.tanh(lead / spread) if spread else 0 * lead], axis=1)
    prior, w = 0.01, np.zeros(2)
    for _ in range(50):  # Newton's method on a strictly concave function
        p = 1 / (1 + np.exp(-design @ w))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + prior * np.eye(2)
        gradient = design.T @ (wins - p) - prior * w
        w = w + np.linalg.solve(hessian, gradient)
    if not np.abs(gradient).max() <= 1e-9 * len(wins):
        size = np.abs(gradient).max()
        raise RuntimeError(f"Newton's method left a gradient of {size:.1e}; expected about 0")
    return float(1 / (1 + np.exp(-w[0])))


def win_rate_report(
    wins: Tensor, prompts: Sequence[Any], lead: Sequence[float]
) -> dict[str, float]:
    """A win rate as an evaluation should give it: of judged comparisons wins [n] in [0, 1], NaN
    where there was no answer, with the prompt and the difference of length (ours less theirs) of
    each: the mean, the half width of its 95% interval clustered by prompt, the number of answers,
    and the length-controlled win rate."""
    wins, lead = wins.numpy(), np.asarray(lead, dtype=float)
    mean, interval = clustered_mean(wins, prompts)
    return {
        "win_rate": mean,
        "interval": interval,
        "n": len(wins),
        "n_parsed": int((~np.isnan(wins)).sum()),
        "length_controlled": length_controlled(wins, lead),
    }


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """(p_o - p_e) / (1 - p_e): agreement p_o of two raters of n things beyond that by chance, p_e =
    sum_c p_1(c) p_2(c). 1 is perfect, 0 is chance; NaN where chance agreement is 1 (both always say
    the same)."""
    n, kinds = len(first), sorted({*first, *second})
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(list(first).count(kind) / n * (list(second).count(kind) / n) for kind in kinds)
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def cyclic_triples(
    prompts: Sequence[str], a: Sequence[str], b: Sequence[str], P: Sequence[float]
) -> tuple[int, int]:
    """(cyclic, all) triples of responses to one prompt of which all three pairs are decided, P !=
    1/2 and not NaN."""
    beats: dict[Any, dict[tuple[str, str], bool]] = {}
    for x, y, z, p in zip(prompts, a, b, P, strict=True):
        if y != z and p not in (0.5,) and not math.isnan(p):
            beats.setdefault(x, {}).update({(y, z): p > 0.5, (z, y): p < 0.5})
    cyclic = total = 0
    for decided in beats.values():
        for triple in combinations(sorted({y for pair in decided for y in pair}), 3):
            if all(pair in decided for pair in combinations(triple, 2)):
                total += 1
                cyclic += (
                    len({sum(decided[y, z] for z in triple if z != y) for y in triple}) == 1
                )  # each wins once
    return cyclic, total


def verdicts(P: Sequence[float]) -> list[str]:
    """a, b or tie for each probability that a wins; NaN is none of them, but "none"."""
    return ["none" if math.isnan(p) else "a" if p > 0.5 else "b" if p < 0.5 else "tie" for p in P]


def agreement(
    items: Sequence[dict[str, Any]], P: Sequence[float], flip_rate: float | None = None
) -> dict[str, Any]:
    """How a judge's P(a > b) [n] compare with people's labels: items with prompt, a, b and label
    (a, b or tie).

    n and n_parsed; agreement with people and the half width of its 95% interval clustered by
    prompt; Cohen's kappa; flip_rate as it is given (share of pairs whose verdict changes with the
    order); longer_wins, of the decided pairs of different length the share won by the longer, by
    judge and by people; cyclic, the share of cyclic triples, of how many, and the p-value of what
    is as unlikely if every verdict were a fair coin, by which a triple is cyclic with probability
    1/4 (binomial, triples taken as independent)."""
    said = verdicts(P)
    known = [i for i, verdict in enumerate(said) if verdict != "none"]
    judge, human = [said[i] for i in known], [items[i]["label"] for i in known]
    same = np.array([float(a == b) for a, b in zip(judge, human, strict=True)])
    rate, interval = clustered_mean(same, [items[i]["prompt"] for i in known])
    cyclic, triples = cyclic_triples(
        *([item[name] for item in items] for name in ("prompt", "a", "b")), P
    )
    lead = np.array([len(items[i]["a"]) - len(items[i]["b"]) for i in known])

    def longer(labels: list[str]) -> float | None:
        won = [
            (label == "a") == (d > 0)
            for label, d in zip(labels, lead, strict=True)
            if label != "tie" and d
        ]
        return sum(won) / len(won) if won else None

    return {
        "n": len(items),
        "n_parsed": len(known),
        "agreement": rate,
        "interval": interval,
        "kappa": cohens_kappa(judge, human) if known else math.nan,
        "flip_rate": flip_rate,
        "longer_wins": longer(judge),
        "longer_wins_people": longer(human),
        "triples": triples,
        "cyclic": cyclic / triples if triples else None,
        "cyclic_p_value": binomtest(cyclic, triples, 0.25).pvalue if triples else None,
    }

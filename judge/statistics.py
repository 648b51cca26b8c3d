"""How far judgments can be trusted: intervals, win rates at equal length, agreement with people,
cycles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit
from torch import Tensor


def mean_interval(values: ArrayLike, clusters: Sequence[Any] | None = None) -> tuple[float, float]:
    """The mean of values [n], and the half width of its 95% interval.

    clusters: of each value (its prompt, say), if values of one cluster depend on each other; None
    if all are independent, so that each is a cluster. With G clusters the half width is
    t sqrt(G/(G - 1) sum_g (sum_{i in g} (v_i - mean))^2) / n, where t is the 97.5% quantile of
    Student's t with G - 1 degrees of freedom. It is NaN for fewer than two clusters. NaN values are
    left out; if there are no others, both results are NaN."""
    v = np.asarray(values, dtype=float)
    names = np.arange(len(v)) if clusters is None else np.asarray(clusters)
    known = ~np.isnan(v)
    if not known.any():
        return math.nan, math.nan
    v, numbers = v[known], np.unique(names[known], return_inverse=True)[1]
    mean = float(v.mean())
    sums = np.bincount(numbers, v - mean)
    G = len(sums)
    if G < 2:
        return mean, math.nan
    error = np.sqrt(G / (G - 1) * (sums**2).sum()) / len(v)
    return mean, float(stdtrit(G - 1, 0.975) * error)


def length_controlled(wins: np.ndarray, lead: np.ndarray) -> float:
    """The win rate at equal lengths, in (0, 1). NaN wins are left out; without others it is NaN.

    It is sigma(theta), where theta and phi maximise the likelihood of the wins [n] in [0, 1] under
    P(win) = sigma(theta + phi tanh(d / std d)), and d = lead [n] are the differences of length.
    This is the length-controlled win rate of AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475)
    without its term for how hard a prompt is, which takes many models. A prior
    exp(-(theta^2 + phi^2)/200) keeps theta finite when every response wins. Raises RuntimeError if
    it finds no maximum."""
    known = ~np.isnan(wins)
    wins, lead = wins[known], lead[known].astype(float)
    if not len(wins):
        return math.nan
    spread = lead.std()
    design = np.stack([np.ones_like(lead), np.tanh(lead / spread) if spread else 0 * lead], axis=1)
    prior, w = 0.01, np.zeros(2)
    for _ in range(50):  # Newton's method, on a strictly concave function
        p = 1 / (1 + np.exp(-design @ w))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + prior * np.eye(2)
        gradient = design.T @ (wins - p) - prior * w
        w = w + np.linalg.solve(hessian, gradient)
    size = np.abs(gradient).max()
    if not size <= 1e-9 * len(wins):  # so that NaN is an error too
        raise RuntimeError(f"Newton's method left a gradient of {size:.1e}; expected about 0")
    return float(1 / (1 + np.exp(-w[0])))


def win_rate_report(
    wins: Tensor, prompts: Sequence[Any], lead: Sequence[float]
) -> dict[str, float]:
    """A win rate as an evaluation should report it.

    wins: n judged comparisons in [0, 1], NaN where there was no answer. prompts: the prompt of
    each. lead: the difference of length in each, ours minus theirs. The report has the mean, the
    half width of its 95% interval clustered by prompt, the number of comparisons and of answers,
    and the length-controlled win rate."""
    values = wins.numpy()
    mean, interval = mean_interval(values, prompts)
    return {
        "win_rate": mean,
        "interval": interval,
        "n": len(values),
        "n_parsed": int((~np.isnan(values)).sum()),
        "length_controlled": length_controlled(values, np.asarray(lead, dtype=float)),
    }


def cohens_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa (p_o - p_e) / (1 - p_e) of two raters of n things: how far their agreement p_o
    exceeds the agreement by chance p_e = sum_c p_1(c) p_2(c). 1 is perfect and 0 is chance. NaN if
    p_e is 1, when both always say the same."""
    n, kinds = len(first), sorted({*first, *second})
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum(list(first).count(kind) / n * (list(second).count(kind) / n) for kind in kinds)
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def cyclic_triples(
    prompts: Sequence[str], a: Sequence[str], b: Sequence[str], P: Sequence[float]
) -> tuple[int, int]:
    """The numbers of (cyclic, all) triples of responses to one prompt whose three pairs are all
    decided. A pair is decided if its P is neither 1/2 nor NaN."""
    beats: dict[Any, dict[tuple[str, str], bool]] = {}
    for x, y, z, p in zip(prompts, a, b, P, strict=True):
        if y != z and p != 0.5 and not math.isnan(p):
            beats.setdefault(x, {}).update({(y, z): p > 0.5, (z, y): p < 0.5})
    cyclic = total = 0
    for decided in beats.values():
        for triple in combinations(sorted({y for pair in decided for y in pair}), 3):
            if all(pair in decided for pair in combinations(triple, 2)):
                total += 1
                wins = [sum(decided[y, z] for z in triple if z != y) for y in triple]
                cyclic += wins == [1, 1, 1]
    return cyclic, total


def verdicts(P: Sequence[float]) -> list[str]:
    """ "a", "b" or "tie" for each probability that a wins; "none" for NaN."""

    def verdict(p: float) -> str:
        if math.isnan(p):
            return "none"
        return "tie" if p == 0.5 else "a" if p > 0.5 else "b"

    return [verdict(p) for p in P]


def agreement(
    items: Sequence[dict[str, Any]], P: Sequence[float], flip_rate: float | None = None
) -> dict[str, Any]:
    """How a judge's P(a > b) [n] agree with people's labels. items: n dictionaries with prompt, a,
    b and label ("a", "b" or "tie").

    n, n_parsed: the pairs, and those with an answer; all that follows is about these.
    agreement, interval: the share on which judge and people agree, and the half width of its 95%
        interval clustered by prompt; kappa: Cohen's.
    flip_rate: as given, the share of pairs whose verdict changes with their order.
    longer_wins, longer_wins_people: the share won by the longer response, of the pairs of different
        length that the judge, or people, decided. None if there are none.
    triples, cyclic, cyclic_p_value: `cyclic_triples`, the share that is cyclic, and the two-sided
        p-value if every verdict were a fair coin, so that a triple is cyclic with probability 1/4
        (binomial, as if triples were independent). None if there are none."""
    said = verdicts(P)
    known = [i for i, verdict in enumerate(said) if verdict != "none"]
    judge, human = [said[i] for i in known], [items[i]["label"] for i in known]
    same = np.array([float(a == b) for a, b in zip(judge, human, strict=True)])
    rate, interval = mean_interval(same, [items[i]["prompt"] for i in known])
    prompts, a, b = ([item[name] for item in items] for name in ("prompt", "a", "b"))
    cyclic, triples = cyclic_triples(prompts, a, b, P)
    lead = [len(a[i]) - len(b[i]) for i in known]
    return {
        "n": len(items),
        "n_parsed": len(known),
        "agreement": rate,
        "interval": interval,
        "kappa": cohens_kappa(judge, human) if known else math.nan,
        "flip_rate": flip_rate,
        "longer_wins": _share_won_by_longer(judge, lead),
        "longer_wins_people": _share_won_by_longer(human, lead),
        "triples": triples,
        "cyclic": cyclic / triples if triples else None,
        "cyclic_p_value": _against_a_coin(cyclic, triples) if triples else None,
    }


def _against_a_coin(cyclic: int, triples: int) -> float:
    """The exact two-sided p-value of so many cyclic triples, of which a coin makes a quarter."""
    from scipy.stats import binomtest  # here, as it takes a second to import

    return binomtest(cyclic, triples, 0.25).pvalue


def _share_won_by_longer(labels: Sequence[str], lead: Sequence[int]) -> float | None:
    """The share that the longer response won, where lead is len(a) - len(b), without ties and pairs
    of equal length. None if there are no others."""
    decided = [(label, d) for label, d in zip(labels, lead, strict=True) if label != "tie" and d]
    won = [(label == "a") == (d > 0) for label, d in decided]
    return sum(won) / len(won) if won else None

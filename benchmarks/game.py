"""Achieved against attainable: the tabular loop against memory bandwidth, one neural iteration
against the matmul peak.

    python -m benchmarks.game [--threads N]          (about a minute)

Both attainable rates are measured in the same run, alternating with what is compared to them. On a
machine shared with other work the ratios are worth more than the seconds; each figure is the median
of its repetitions, with the quartiles."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import dno
import solvers
from model import Config, Transformer, TransformerPolicy
from oracle import random_feature_game, style_game


def seconds(work: Callable[[], object], repetitions: int) -> np.ndarray:
    """Wall times of `work`, [repetitions], after one run that is not counted."""
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return np.array(times)


def show(name: str, rates: np.ndarray, unit: str) -> float:
    """Print median and quartiles; return the median."""
    low, median, high = np.quantile(rates, [0.25, 0.5, 0.75])
    print(f"{name:<58} {median:8.2f} {unit}  (quartiles {low:.2f} to {high:.2f})")
    return float(median)


def tabular(X: int, Y: int, iterations: int) -> None:
    """`solve` reads P once an iteration, 8 X Y^2 bytes; compared with summing P, which reads it
    once too."""
    P = random_feature_game(X, Y, seed=0).P
    gigabytes = P.numel() * 8 / 1e9
    read, solved = [], []
    for _ in range(5):
        read.extend(gigabytes / seconds(P.sum, 10))
        solved.extend(
            gigabytes * iterations / seconds(lambda: solvers.solve(P, "dno", 1.0, iterations), 2)
        )
    print(
        f"\ntabular loop, {X} prompts x {Y} responses, P of {gigabytes * 1e3:.0f} MB, "
        f"{iterations} iterations"
    )
    peak = show("  attainable: P read once, as by a sum", np.array(read), "GB/s")
    rate = show("  achieved by solve", np.array(solved), "GB/s")
    print(f"  achieved / attainable: {rate / peak:.2f}; {rate / gigabytes:.0f} iterations/s")


def forward_flops(policy: TransformerPolicy) -> float:
    """Multiply-adds twice over: matrix products of the weights and of attention, over the tree's
    tokens."""
    c, (X, T) = policy.model.config, policy.tree.shape
    weights = (
        sum(weight.numel() for weight in policy.model.parameters() if weight.ndim == 2)
        - c.vocab_size * c.width
    )
    return X * T * (2 * weights + c.layers * 4 * T * c.width)


def neural(X: int, V: int, L: int, config: Config, steps: int) -> None:
    """One iteration of Algorithm 1, `steps` of 2,048 pairs, compared with float32 products."""
    P = style_game(X, V, L, seed=0).P
    policy = TransformerPolicy(Transformer(config), torch.arange(V, V + X).unsqueeze(-1), V, L)
    settings = dno.Regression(steps=steps)
    start = dno.ExactStart.of(policy)
    # a step is one forward and, twice as dear, one backward pass
    flops = 3 * settings.steps * forward_flops(policy) / 1e9
    a, b = torch.randn(2, 1024, 1024)
    prefixes = torch.cat([policy.prompts[x].expand(V ** (L - 1), -1) for x in range(X)])
    rows = torch.cat(
        [prefixes, policy.words(torch.arange(0, V**L, V)).repeat(X, 1)[:, :-1]], 1
    )  # V^(L-1) rows a prompt
    peak, achieved, tree, row = [], [], [], []

    def iterate() -> list[dno.ExactIteration]:
        return list(dno.algorithm1(policy, P, 1.0, 1, settings=settings, start=start))

    for _ in range(5):
        peak.extend(2 * 1024**3 / 1e9 / seconds(lambda: a @ b, 5))
        achieved.extend(flops / seconds(iterate, 2))
        tree.extend(1e3 * seconds(lambda: policy.log_probs().sum().backward(), 5))
        row.extend(1e3 * seconds(lambda: policy.model(rows).log_softmax(-1).sum().backward(), 5))
    parameters = sum(weight.numel() for weight in policy.parameters())
    print(
        f"\nneural iteration, {X} prompts x {V}^{L} responses, {parameters:,} parameters, "
        f"{steps} steps, {flops:.1f} GFLOP"
    )
    top = show("  attainable: 1024 x 1024 float32 matrix products", np.array(peak), "GFLOP/s")
    rate = show("  achieved", np.array(achieved), "GFLOP/s")
    print(f"  achieved / attainable: {rate / top:.3f}; {flops / rate:.3f} s an iteration")
    shared = show(
        "  all responses scored, forward and backward, shared prefixes", np.array(tree), "ms"
    )
    separate = show("  the same as V^(L-1) rows", np.array(row), "ms")
    print(f"  rows / shared prefixes: {separate / shared:.2f}")


def main() -> None:
    """Run the four benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    tabular(8, 216, 200)
    tabular(4, 2000, 100)
    neural(8, 6, 3, Config(14), steps=24)  # what `python train.py` runs
    neural(4, 6, 4, Config(10, layers=4, width=256, heads=8, kv_heads=4, hidden=704), steps=2)


if __name__ == "__main__":
    main()

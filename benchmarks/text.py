"""Sampling and training of the text preset's model against the matmul peak, and what an iteration
of Algorithm 2 costs.

    python -m benchmarks.text [--threads N] [--figure FILE.png]          (about two minutes)

The attainable rate is measured in the same run, alternating with what is compared to it. On a
machine shared with other work the ratios are worth more than the seconds; each figure is the median
of its repetitions, with the quartiles."""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

import dno
from benchmarks.game import seconds, show
from experiments.figures import STYLE
from experiments.fine_tuning import fine_tuned
from experiments.folder import Run
from experiments.judging import demonstrations
from experiments.recalling import recalling
from experiments.text_settings import TextConfig
from oracle import RegisterJudge
from pairs import SamplingSettings, large_margin_pairs
from text import TextPolicy
from world import TRAINING

PHASES = ("sampled", "judged", "trained")


def short_fine_tuned() -> TextPolicy:
    """The text preset's policy, fine-tuned until its responses are of the right length."""
    with tempfile.TemporaryDirectory() as folder:
        config = TextConfig(sft_steps=150, out=folder + "/run")
        return fine_tuned(config, Run("text", config))


def flops_per_token(policy: TextPolicy, tokens: float) -> float:
    """Twice the multiply-adds of a token's forward pass, among `tokens` tokens that it can see."""
    c = policy.model.config
    weights = (
        sum(weight.numel() for weight in policy.model.parameters() if weight.ndim == 2)
        - c.vocab_size * c.width
    )
    return 2 * weights + c.layers * 4 * tokens * c.width


def rates(policy: TextPolicy, prompts: int, k: int, batch: int) -> None:
    """Tokens sampled and tokens trained on each second, by algorithm 3's shapes, and the shares of
    the matmul peak."""
    xs = [TRAINING[i % len(TRAINING)] for i in range(prompts)]
    samples, _ = policy.sample(xs, k, seed=0)
    x, y = (
        [x for x, ys in zip(xs, samples, strict=True) for _ in ys],
        [y for ys in samples for y in ys],
    )
    context, generated = (
        len(policy.prompt_tokens(xs[:1])[0]),
        sum(len(response.tokens) for response in y),
    )
    trained = sum(len(response.tokens) + context for response in y[:batch])
    a, b = torch.randn(2, 1024, 1024)
    peak, sampling, training = [], [], []
    for _ in range(5):
        peak.extend(2 * 1024**3 / 1e9 / seconds(lambda: a @ b, 5))
        sampling.extend(generated / seconds(lambda: policy.sample(xs, k, seed=0), 2))
        training.extend(
            trained / seconds(lambda: policy.log_prob(x[:batch], y[:batch]).sum().backward(), 4)
        )
    mean = context + generated / len(y) / 2
    print(
        f"\n{sum(p.numel() for p in policy.parameters()):,} parameters, "
        f"{prompts} prompts x {k} samples, {generated / len(y):.1f} tokens each; "
        f"training batches of {batch} responses"
    )
    top = show("  attainable: 1024 x 1024 float32 matrix products", np.array(peak), "GFLOP/s")
    speed = show("  sampled", np.array(sampling) / 1e3, "thousand tokens/s")
    print(f"  achieved / attainable: {speed * 1e3 * flops_per_token(policy, mean) / 1e9 / top:.3f}")
    speed = show(
        "  trained on (forward and backward, prompts included)",
        np.array(training) / 1e3,
        "thousand tokens/s",
    )
    print(
        "  achieved / attainable: "
        f"{3 * speed * 1e3 * flops_per_token(policy, mean) / 1e9 / top:.3f}"
    )


def iteration(policy: TextPolicy, prompts: int, k: int) -> np.ndarray:
    """Seconds of each phase of the second of two iterations of Algorithm 2, [3]."""
    spent: dict[str, float] = {}

    def remember(t: int, phase: str, function: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        spent[phase] = time.perf_counter() - start
        return result

    xs = [TRAINING[i % len(TRAINING)] for i in range(prompts)]
    gold = demonstrations(0, len(TRAINING))(1)
    answers = dict(zip(*gold, strict=True))
    settings = SamplingSettings(samples=k, temperature=1.0, top_p=1.0)
    data = xs, [answers[x] for x in xs]
    loop = dno.algorithm2(
        *recalling(policy, RegisterJudge(), lambda t: data, remember),
        8.0,
        2,
        partial(large_margin_pairs, margin=0.4),
        lambda: 0.0,
        settings=settings,
    )
    next(loop)
    start = time.perf_counter()
    next(loop)
    spent["trained"] = time.perf_counter() - start - spent["sampled"] - spent["judged"]
    return np.array([spent[phase] for phase in PHASES])


def costs(policy: TextPolicy, figure: str | None) -> None:
    """Cost of an iteration against K at 72 prompts, and against the number of prompts at K = 5;
    median of three."""
    state = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sweeps = {
        "samples $K$, at 72 prompts": [(72, k) for k in (2, 5, 10, 20)],
        "prompts $X$, at $K = 5$": [(x, 5) for x in (32, 64, 128, 256, 512)],
    }
    with plt.style.context(STYLE):
        picture, grid = plt.subplots(1, 2, figsize=(8, 3.4))
        for axes, (label, points) in zip(grid, sweeps.items(), strict=True):
            print(f"\nseconds an iteration against {label.replace('$', '')}")
            print(
                " " * 13 + "  ".join(f"{phase:>8}" for phase in PHASES) + "     total  a response"
            )
            table = []
            for prompts, k in points:
                repeated = []
                for _ in range(3):
                    policy.load_state_dict(state)
                    repeated.append(iteration(policy, prompts, k))
                table.append(np.median(repeated, axis=0))
                total = table[-1].sum()
                print(
                    f"X {prompts:4d} K {k:3d} "
                    + "  ".join(f"{s:8.3f}" for s in table[-1])
                    + f"  {total:8.3f}  {1e3 * total / prompts / (k + 1):7.3f} ms"
                )
            swept = [k if len({x for x, _ in points}) == 1 else x for x, k in points]
            for phase, style, times in zip(
                (*PHASES, "all"),
                ("--", ":", "-.", "-"),
                (*np.transpose(table), np.sum(table, 1)),
                strict=True,
            ):
                axes.plot(swept, times, style, marker="o", ms=3, label=phase)
            axes.set(xlabel=label, ylabel="seconds an iteration", xlim=(0, None), ylim=(0, None))
            axes.legend()
        if figure:
            picture.savefig(figure)


def main() -> None:
    """Run the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} thread(s), torch {torch.__version__}")
    policy = short_fine_tuned()
    rates(policy, 72, 24, 48)
    rates(policy, 72, 24, 512)
    costs(policy, arguments.figure)


if __name__ == "__main__":
    main()

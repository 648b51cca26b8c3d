"""How much memory a real model needs, by arithmetic and as measured on a new model of the same
shape.

    python -m benchmarks.memory --shape smollm2-135m [--device cuda] [--low-rank 16]
        [--checkpointing] [--response 256]

The weights do not matter, so none are read. Samples K responses to each of `--prompts` prompts,
then takes one step on them, a piece of `--at-once` prompts at a time, each with `--scored`
responses. On a GPU the peaks are the allocator's; on a CPU they are of the whole process less what
it had before the model (Linux), and freed memory may stay with it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dno
from chat.low_rank import add_low_rank
from chat.policy import ChatPolicy
from model import Config, Transformer
from pairs import Groups, Pairs, SamplingSettings, form_pairs

SHAPES = {
    "smollm2-135m": Config(
        49152, layers=30, width=576, heads=9, kv_heads=3, hidden=1536, tied=True
    ),
    "tinyllama-1b": Config(32000, layers=22, width=2048, heads=32, kv_heads=4, hidden=5632),
    "llama-3b": Config(128256, layers=28, width=3072, heads=24, kv_heads=8, hidden=8192, tied=True),
    "mistral-7b": Config(32000, layers=32, width=4096, heads=32, kv_heads=8, hidden=14336),
}
GIB = 2**30


class Numbers:
    """In place of a chat template and a tokenizer: prompts of so many tokens, responses that end
    only when they must."""

    end = -1

    def __init__(self, length: int):
        self.length = length

    def prompt(self, text: str) -> list[int]:
        return [(int(text) * 31 + i) % 1000 for i in range(self.length)]

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def state_bytes(config: Config, parameters: int, low_rank: int, processes: int = 1) -> float:
    """Of bfloat16 weights, 2 a parameter, and, for each that is trained, float32 master weight,
    gradient and two moments of Adam, 4 each; those are cut in as many parts as there are processes
    (`--fsdp`). Low-rank terms have no master weights beside them."""
    if not low_rank:
        return 2 * parameters + 16 * parameters / processes
    inner = config.heads * config.head_width
    sides = (
        2 * (config.width + inner)
        + 2 * (config.width + config.kv_heads * config.head_width)
        + 3 * (config.width + config.hidden)
    )  # q and out; k and v; gate, up and down
    return 2 * parameters + 16 * config.layers * low_rank * sides


def activation_bytes(config: Config, checkpointing: bool) -> float:
    """A token's, kept for the gradient, in bfloat16. Of a block: what enters it, the queries,
    attention's result twice (before and after its heads are put side by side), keys and values, two
    normalised and one intermediate stream, four vectors of the feed-forward network. With
    checkpointing of all blocks what enters them, and one block whole."""
    inner, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    block = 4 * config.width + 3 * inner + 2 * kv + 4 * config.hidden
    return 2.0 * (config.layers * config.width + block if checkpointing else config.layers * block)


def cache_bytes(config: Config, tokens: int) -> float:
    """Keys and values of so many tokens, in bfloat16."""
    return 4.0 * config.layers * config.kv_heads * config.head_width * tokens


class Meter:
    """Peak of the memory used since `start`, bytes."""

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.before = 0.0
        self.before = self.peak()

    def start(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the resident set

    def peak(self) -> float:
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        lines = Path("/proc/self/status").read_text().splitlines()
        return (
            1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
            - self.before
        )


def new_model(config: Config, device: str) -> Transformer:
    """A random one, in bfloat16 from the start."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Transformer(config)
    torch.set_default_dtype(torch.float32)
    return model


def pairs(policy: ChatPolicy, groups: Groups, scored: int) -> Pairs:
    """Of every group, its first response against each of the next, with references."""
    chosen = torch.tensor([[x, 0, i] for x in range(len(groups.prompts)) for i in range(1, scored)])
    r = torch.linspace(1, 0, len(groups.responses[0])).double().expand(len(groups.prompts), -1)
    return dno.with_reference(form_pairs(groups, r, chosen), policy)


def parsed() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    for name, default in {
        "low-rank": 0,
        "prompts": 8,
        "samples": 5,
        "scored": 2,
        "prompt": 128,
        "response": 256,
        "at-once": 4,
        "sample-batch": 64,
        "steps": 2,
        "threads": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def policy_of(o: argparse.Namespace, model: Transformer) -> ChatPolicy:
    """The model, prepared as the options say."""
    if o.low_rank:
        add_low_rank(model, o.low_rank)
    model.checkpointing = o.checkpointing
    if o.compile:
        model.read_block = torch.compile(model.read_block, dynamic=True)
    return ChatPolicy(model, Numbers(o.prompt), o.response, o.sample_batch)


def timed(meter: Meter, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What work gives, the seconds it took, and the peak of the memory meanwhile, bytes."""
    meter.start()
    start = time.perf_counter()
    result = work()
    if meter.cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, meter.peak()


def measure(
    o: argparse.Namespace, meter: Meter, policy: ChatPolicy
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(seconds, peak in bytes) of sampling, and of the last step of training."""
    optimizer = dno.adam(policy)
    settings = SamplingSettings(
        samples=o.samples,
        temperature=1.0,
        top_p=1.0,
        use_recorded=False,
        prompts_per_step=o.prompts,
        prompts_at_once=o.at_once,
        max_grad_norm=1.0,
    )
    prompts = [str(i) for i in range(o.prompts)]
    groups, *sampling = timed(
        meter, lambda: dno.sample_groups(policy, prompts, None, settings, seed=0)
    )
    D = pairs(policy, groups, o.scored)
    loss, generator = dno.hard_targets(0.1), torch.Generator()
    fit = partial(dno.fit_pairs, policy, D, loss, optimizer, settings, 1e-6, generator)
    for _ in range(o.steps):
        _, *training = timed(meter, fit)
    return tuple(sampling), tuple(training)


def report(
    o: argparse.Namespace,
    parameters: int,
    sampling: tuple[float, float],
    training: tuple[float, float],
) -> None:
    """Print the peaks by arithmetic beside those that were measured."""
    config = SHAPES[o.shape]
    rows = min(o.sample_batch // o.samples * o.samples, o.prompts * o.samples)
    state = state_bytes(config, parameters, o.low_rank)
    cache = cache_bytes(config, rows * (o.prompt + o.response))
    start = 6.0 * parameters
    if o.low_rank:
        start = 2 * parameters + 0.25 * (state - 2 * parameters)
    read = o.prompt + o.scored * (o.response - 1)  # tokens of a prompt and its responses
    activations = min(o.at_once, o.prompts) * read * activation_bytes(config, o.checkpointing)
    (sampling_seconds, sampled), (training_seconds, trained) = sampling, training
    print(
        "GiB          by arithmetic                                   measured peak      tokens/s"
    )
    print(
        f"sampling     {(start + cache) / GIB:6.2f} = weights {start / GIB:.2f}"
        f" + cache {cache / GIB:.2f}"
        f"{sampled / GIB:24.2f} {o.prompts * o.samples * o.response / sampling_seconds:16.0f}"
    )
    print(
        f"training     {(state + activations) / GIB:6.2f} = state {state / GIB:.2f}"
        f" + activations {activations / GIB:.2f}"
        f"{trained / GIB:19.2f} {o.prompts * read / training_seconds:16.0f}"
    )
    print(f"bytes a parameter, trained: {state / parameters:.1f} by arithmetic")


def main() -> None:
    """Run it and print."""
    o = parsed()
    torch.set_num_threads(o.threads)
    meter = Meter(o.device)
    model = new_model(SHAPES[o.shape], o.device)
    parameters = sum(weight.numel() for weight in model.parameters())
    policy = policy_of(o, model)
    print(f"{o.shape}: {parameters / 1e9:.2f}e9 parameters, {o}")
    report(o, parameters, *measure(o, meter, policy))


if __name__ == "__main__":
    main()

"""One iteration on a real chat model: tokens a second sampled and trained on, against the matmul peak, and peak memory.

    python -m benchmarks.llm --model PATH [--prompts 32] [--samples 2] [--max-new-tokens 48] [--threads 1]

Samples K responses to each prompt, scores those of the pairs (best against worst by `TasteJudge`) once as the loss's reference,
and takes a step of Eq. (13) on every 8 prompts' pairs. Says so when other processes use the processor meanwhile."""

from __future__ import annotations

import argparse
import os
import resource
import time

import torch

import dno
from benchmarks.game import seconds
from checkpoints import Chat
from model import ChatPolicy, Transformer
from oracle import TasteJudge
from train import read_prompts


def busy() -> float:
    """CPU seconds that all processes of the machine have used so far, where /proc/stat tells."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
    except OSError:
        return float("nan")
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def flops(policy: ChatPolicy, tokens: int, heads: int) -> float:
    """Multiply-adds twice over of a forward pass of so many tokens, `heads` of them with logits; attention left out."""
    blocks = sum(weight.numel() for weight in policy.model.blocks.parameters() if weight.ndim == 2)
    return 2.0 * (tokens * blocks + heads * policy.model.head.weight.numel())


def main() -> None:
    """Run it and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Transformer.from_pretrained(options.model, torch.bfloat16)
    policy = ChatPolicy(model, Chat.from_pretrained(options.model), options.max_new_tokens)
    prompts = [item["prompt"] for item in read_prompts("prompts/general.jsonl")][: options.prompts]
    a, b = torch.randn(2, 1024, 1024).bfloat16()
    peak = 2 * 1024**3 / seconds(lambda: a @ b, 20).min()
    optimizer, spent = dno.adam(policy), {}
    policy.sample(prompts[:1], 1, seed=1)  # warm
    others, own = busy(), time.process_time()

    start = time.perf_counter()
    settings = dno.Practice(samples=options.samples, recorded=False, prompts_per_step=8, at_once=4, max_grad_norm=1.0)
    groups = dno.sample_groups(policy, prompts, None, settings, seed=0)
    spent["sampling"] = time.perf_counter() - start
    r = dno.group_win_rates(dno.judge_groups(TasteJudge(), groups))
    chosen = dno.best_against_worst(r, torch.ones_like(r, dtype=torch.bool))

    start = time.perf_counter()
    D = dno.with_reference(dno.form_pairs(groups, r, chosen), policy)
    spent["reference"] = time.perf_counter() - start
    start = time.perf_counter()
    dno.fit_pairs(policy, D, dno.hard_targets(0.1), optimizer, settings, 1e-6, torch.Generator().manual_seed(0))
    spent["training"] = time.perf_counter() - start
    others = (busy() - others) - (time.process_time() - own)

    context = {x: len(policy.chat.prompt(x)) for x in prompts}
    sampled = sum(len(y.tokens) for ys in groups.responses for y in ys)
    trained = sum(len(y.tokens) for y in D.responses)
    read = sum(context[x] for x in set(D.prompts)) + trained
    work = {"sampling": flops(policy, sum(context.values()) + sampled, sampled), "reference": flops(policy, read, trained),
            "training": 3 * flops(policy, read, trained)}  # fmt: skip
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {options.threads} thread(s); bfloat16 matmul peak {peak / 1e9:.0f} GFLOP/s")
    for name, tokens in (("sampling", sampled), ("reference", read), ("training", read)):
        rate = work[name] / spent[name] / peak
        speed = tokens / spent[name]
        print(f"{name:10} {spent[name]:7.1f} s  {tokens:6,} tokens  {speed:7.0f} tokens/s  {rate:.2f} of the peak")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"in all     {sum(spent.values()):7.1f} s; peak memory {memory:.2f} GiB")
    if others > 0.05 * sum(spent.values()):
        print(f"NOT QUIET: other processes used {others:.0f} s of the processor meanwhile")


if __name__ == "__main__":
    main()

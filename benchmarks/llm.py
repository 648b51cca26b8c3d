"""One iteration on a real chat model, and the same work by TRL's online DPO if `trl` is installed:
seconds, tokens a second, share of the bfloat16 matmul peak, peak memory, and the ratios.

    python -m benchmarks.llm --model PATH [--prompts 32] [--samples 2] [--max-new-tokens 48]
        [--threads 1] [--repeats 2] [--profile sampling|reference|training]

The work: sample K responses to each prompt, all --max-new-tokens long, as an end token ends none;
score two of each prompt by the policy as it was, which is the loss's reference; take a step of Eq.
(13) on every 8 prompts' pairs. Both sides have the same float32 checkpoint, prompts, chat template,
temperature, top_p, judge (`TasteJudge`, a matter of milliseconds), learning rate, clipping and
number of steps. What differs is how:

    ours  bfloat16 weights with float32 master copies; samples 64 responses at a time, all of them
          before the first step; scores the reference then, with no second model; trains on 4
          prompts at a time, each read once for both of its responses.
    TRL   float32 weights under autocast to bfloat16; samples, scores and trains on 8 prompts at a
          time; the reference is a second model. Its defaults, but for gradient checkpointing, with
          which it has no key-value cache. It knows K = 2 only: for more, `generate` is wrapped so
          that it samples K and hands two of them on.

Each run is a process of its own, for its own peak memory, on as many cores as threads; ours and
TRL's alternate. Loading and a short warm-up are not timed. The share of the peak is of what the
work needs at least, for both: a prompt read once, logits for the responses' tokens only, attention
left out. NOT QUIET: other processes used the processor for over 5% of the run; on one thread the
CPU seconds are disturbed less than the others, on several nothing is worth much then."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import dno
from benchmarks.game import seconds
from chat.checkpoints import read_transformer, write_transformer
from chat.policy import ChatPolicy
from chat.template import Chat
from experiments.prompts import read_prompts
from judge.synthetic import TasteJudge
from pairs import SamplingSettings, form_pairs

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("sampling", "reference", "training")
PROMPTS_PER_STEP, RATE, ETA = 8, 1e-6, 0.1  # TRL calls eta beta
Iteration = Callable[
    [], tuple[Counter, Counter]
]  # seconds by phase; tokens of the prompts, sampled and trained on
Prepared = tuple[
    Iteration, int, int
]  # what to measure; entries of the model's blocks and of its head


@contextmanager
def clock(spent: Counter, phase: str, profiled: str | None = None) -> Iterator[None]:
    """Add the seconds inside to a phase's; print a profile if that is the phase to be profiled."""
    start = time.perf_counter()
    with torch.profiler.profile() if phase == profiled else nullcontext() as profile:
        yield
    spent[phase] += time.perf_counter() - start
    if profile:
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40
            )
        )


def busy() -> float:
    """CPU seconds that all processes of the machine have used so far, where /proc/stat tells."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:]]
    except OSError:
        return float("nan")
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def peak_memory() -> float:
    """GiB this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def matrices(module: nn.Module) -> int:
    """Entries of the weights that a token is multiplied by."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


# --- What is measured, each in a process of its own
# -------------------------------------------------------------------------


def ours(options: argparse.Namespace, prompts: list[str]) -> Prepared:
    """An iteration of Algorithm 2, ready to go."""
    model = read_transformer(options.model, torch.bfloat16)
    policy = ChatPolicy(model, Chat.from_pretrained(options.model), options.max_new_tokens)
    policy.end = -1  # which no token is
    optimizer = dno.adam(policy)
    settings = SamplingSettings(
        samples=options.samples,
        use_recorded=False,
        prompts_per_step=PROMPTS_PER_STEP,
        prompts_at_once=2,
        max_grad_norm=1.0,
    )
    policy.sample(prompts[:1], 1, seed=1)  # warm

    def iteration() -> tuple[Counter, Counter]:
        spent = Counter()
        with clock(spent, "sampling", options.profile):
            groups = dno.sample_groups(policy, prompts, None, settings, seed=0)
        r = dno.group_win_rates(dno.judge_groups(TasteJudge(), groups))
        order = r.argsort(-1)
        pairs = torch.stack(
            [torch.arange(len(r)), order[:, -1], order[:, 0]], dim=-1
        )  # of equals too, as TRL does
        with clock(spent, "reference", options.profile):
            D = dno.with_reference(form_pairs(groups, r, pairs), policy)
        with clock(spent, "training", options.profile):
            dno.fit_pairs(
                policy,
                D,
                dno.hard_targets(ETA),
                optimizer,
                settings,
                RATE,
                torch.Generator().manual_seed(0),
            )
        sampled = sum(len(y.tokens) for ys in groups.responses for y in ys)
        read = sum(len(policy.chat.prompt(x)) for x in prompts)
        return spent, Counter(
            prompts=read, sampled=sampled, trained_samples=sum(len(y.tokens) for y in D.responses)
        )

    return iteration, matrices(model.blocks), model.head.weight.numel()


def sampling_more(generate: Callable[..., Tensor], k: int) -> Callable[..., Tensor]:
    """TRL gives `generate` all prompts twice; this one samples k responses to each and returns two,
    in TRL's order."""

    def sample(input_ids: Tensor, attention_mask: Tensor, **settings: Any) -> Tensor:
        n = len(input_ids) // 2
        rows = generate(
            input_ids=input_ids[:n],
            attention_mask=attention_mask[:n],
            num_return_sequences=k,
            **settings,
        )
        return torch.cat([rows[::k], rows[1::k]])

    return sample


def reward(prompts: list[list[dict]], completions: list[list[dict]], **_: Any) -> list[float]:
    """P(y > the other response | x) of all prompts' first responses, then of their second ones, as
    TRL lists them."""
    x, y = ([messages[-1]["content"] for messages in part] for part in (prompts, completions))
    n = len(y) // 2
    return TasteJudge().prefer(x, y, y[n:] + y[:n]).tolist()


def timed_trainer(options: argparse.Namespace, spent: Counter, count: Counter) -> type:
    """TRL's trainer with a clock around sampling and around the reference model."""
    from trl.experimental.online_dpo import OnlineDPOTrainer

    class Timed(OnlineDPOTrainer):
        def _generate(self, *arguments: Any) -> tuple:
            with clock(spent, "sampling"):
                rows = super()._generate(*arguments)
            trained = int(rows[3].sum())  # both masks are of two rows a prompt
            count.update(
                prompts=int(rows[1].sum()) // 2,
                sampled=trained * options.samples // 2,
                trained_samples=trained,
            )
            return rows

        def _forward(self, model: nn.Module, *arguments: Any) -> Tensor:
            with clock(spent, "reference" if model is self.ref_model else "policy"):
                return super()._forward(model, *arguments)

    return Timed


def trl_config(options: argparse.Namespace) -> Any:
    """TRL's settings for what we measure."""
    from trl.experimental.online_dpo import OnlineDPOConfig

    defaults = SamplingSettings()
    return OnlineDPOConfig(
        output_dir=options.out,
        use_cpu=True,
        bf16=True,
        gradient_checkpointing=False,
        beta=ETA,
        learning_rate=RATE,
        max_grad_norm=1.0,
        num_train_epochs=1,
        per_device_train_batch_size=PROMPTS_PER_STEP,
        gradient_accumulation_steps=1,
        max_new_tokens=options.max_new_tokens,
        generation_kwargs={"min_new_tokens": options.max_new_tokens},
        max_length=4096,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl(options: argparse.Namespace, prompts: list[str]) -> Prepared:
    """The same by TRL's trainer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spent, count = Counter(), Counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = [{"prompt": [{"role": "user", "content": x}]} for x in prompts]
    trainer = timed_trainer(options, spent, count)(
        model,
        reward_funcs=reward,
        args=trl_config(options),
        train_dataset=data,
        processing_class=tokenizer,
    )
    with torch.autocast("cpu", torch.bfloat16):  # warm
        model.generate(
            **tokenizer(prompts[:1], return_tensors="pt"), max_new_tokens=options.max_new_tokens
        )
    if options.samples > 2:
        model.generate = sampling_more(model.generate, options.samples)

    def iteration() -> tuple[Counter, Counter]:
        with clock(spent, "in all"):
            trainer.train()
        if not all(spent[phase] for phase in ("sampling", "reference")):
            raise SystemExit(
                "this version of trl samples or scores by other methods than 1.16 does; "
                "nothing was measured"
            )
        spent["training"] = spent["in all"] - spent["sampling"] - spent["reference"]
        return spent, count

    return (
        iteration,
        matrices(model.get_decoder().layers),
        model.get_output_embeddings().weight.numel(),
    )


def measure(prepare: Callable[..., Prepared], options: argparse.Namespace) -> dict[str, Any]:
    """Run one iteration: seconds, tokens and the share of the peak by phase; memory in GiB."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    prompts = [item["prompt"] for item in read_prompts("prompts/general.jsonl")][: options.prompts]
    a, b = torch.randn(2, 1024, 1024).bfloat16()
    peak = 2 * 1024**3 / seconds(lambda: a @ b, 20).min()
    iteration, blocks, head = prepare(options, prompts)
    loaded, others, own, start = peak_memory(), busy(), time.process_time(), time.perf_counter()
    spent, count = iteration()
    spent["in all"] = time.perf_counter() - start
    own = time.process_time() - own
    others = busy() - others - own
    read = count["prompts"] + count["trained"]
    tokens = {"sampling": count["sampled"], "reference": read, "training": read}
    forward = 2 * (read * blocks + count["trained"] * head)
    flops = {
        "sampling": 2 * (count["prompts"] * blocks + count["sampled"] * (blocks + head)),
        "reference": forward,
        "training": 3 * forward,
    }  # backward is twice forward
    share = {phase: flops[phase] / spent[phase] / peak for phase in PHASES}
    return {
        "seconds": spent,
        "tokens": tokens,
        "share": share,
        "peak": peak,
        "loaded": loaded,
        "memory": peak_memory(),
        "own": own,
        "others": others,
    }


def write(options: argparse.Namespace) -> None:
    """Write the model as a directory that both can load."""
    write_transformer(read_transformer(options.model), options.out)
    Chat.from_pretrained(options.model).save(options.out)


# --- The process that starts them and prints
# --------------------------------------------------------------------------------


def start(part: str, options: argparse.Namespace, model: Path, out: str) -> str:
    """The last line that this script prints when told to do one part of its work."""
    words = [
        sys.executable,
        "-m",
        "benchmarks.llm",
        "--part",
        part,
        "--model",
        str(model),
        "--out",
        out,
    ]
    for name in ("prompts", "samples", "max_new_tokens", "threads"):
        words += ["--" + name.replace("_", "-"), str(getattr(options, name))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}this went wrong in {part}")
    return done.stdout.strip().rpartition("\n")[2]


def show(name: str, record: dict[str, Any]) -> None:
    """A line of the table."""
    spent, line = record["seconds"], f"{name:6}"
    for phase in PHASES:
        tokens, took = record["tokens"][phase], spent[phase]
        line += f"{tokens:9,}{took:7.1f}{tokens / took:7.0f}{record['share'][phase]:6.2f}"
    line += f"{spent['in all']:8.1f}{record['own']:7.1f}{record['others']:8.1f}"
    line += f"{record['memory']:7.2f}{record['loaded']:9.2f}"
    print(line + "  NOT QUIET" * (record["others"] > 0.05 * spent["in all"]), flush=True)


def compare(options: argparse.Namespace, out: str) -> None:
    """Run all in turn and print the table and the ratios."""
    model, names = Path(options.model).resolve(), ["ours"]
    if importlib.util.find_spec("trl"):
        names.append("TRL")
        if not model.is_dir():
            start("write", options, model, f"{out}/model")
            model = Path(out, "model")
    pinned = "pinned" if hasattr(os, "sched_setaffinity") else "not pinned, as this system cannot"
    size = (
        f"{options.prompts} prompts x {options.samples} samples x {options.max_new_tokens} tokens"
    )
    print(f"{size}, {options.threads} thread(s), {pinned}")
    print(
        " " * 6
        + "".join(f"{phase:>29}" for phase in PHASES)
        + "  in all    CPU  others    GiB  loading"
    )
    print(" " * 6 + "   tokens      s  tok/s  peak" * 3 + "       s      s       s", flush=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names * options.repeats:
        runs[name].append(json.loads(start(name, options, model, out)))
        show(name, runs[name][-1])
    peak = median(record["peak"] for name in names for record in runs[name])
    print(f"peak: {peak / 1e9:.0f} GFLOP/s")
    if len(names) == 1:
        print("trl cannot be imported, so there is nothing to compare with")
        return
    ratios = {
        phase: [median(run["seconds"][phase] for run in runs[name]) for name in names]
        for phase in (*PHASES, "in all")
    }
    for what, key in (("CPU", "own"), ("memory", "memory")):
        ratios[what] = [median(run[key] for run in runs[name]) for name in names]
    print(
        "TRL / ours, of medians: "
        + ", ".join(f"{what} {theirs / mine:.2f}" for what, (mine, theirs) in ratios.items())
    )
    if options.samples > 2:
        print(
            "TRL's trainer samples 2 responses a prompt; here its `generate` was made to sample "
            f"{options.samples}"
        )


def main() -> None:
    """Compare; or, as a process that `compare` starts, do one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each")
    parser.add_argument(
        "--profile",
        choices=PHASES,
        help="of ours, print a profile of this phase and compare nothing",
    )
    parser.add_argument("--part", choices=["ours", "TRL", "write"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.samples < 2:
        parser.error(f"--samples is {options.samples}; expected at least 2, for a pair")
    if options.profile:
        print(json.dumps(measure(ours, options)["seconds"]))
    elif options.part == "write":
        write(options)
    elif options.part:
        print(json.dumps(measure({"ours": ours, "TRL": trl}[options.part], options)))
    else:
        with tempfile.TemporaryDirectory() as out:
            compare(options, out)


if __name__ == "__main__":
    main()

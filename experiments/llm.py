"""The preset "llm": Algorithm 2 (or 4) on a real chat model."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import dno
from chat.checkpoints import read_checkpoint, read_transformer, write_transformer
from chat.formats import BadCheckpoint
from chat.low_rank import add_low_rank
from chat.policy import ChatPolicy
from chat.team import SharedJudge, Team, part_of, whole
from chat.template import Chat
from experiments.folder import Run, like
from experiments.judging import Judging, open_judge
from experiments.rounds import CLASSES_KEPT, RULES, Remember, bare, followed, recalling, written
from experiments.settings import (
    COMPUTE,
    MOST,
    TEMPERATURES,
    THREADS,
    BadInput,
    JudgeOptions,
    check_device,
    check_ranges,
    join_team,
    setting,
)
from experiments.validation import ChatValidation, alarms
from judge.ledger import Stopped, for_terminal
from judge.synthetic import TasteJudge
from model import Config
from oracle import OpenAIJudge, Oracle
from pairs import SamplingSettings, check_positive, pair_kinds
from regularized import algorithm3_sampled, algorithm4, check_regularization

# --- Settings and prompts -------------------------------------------------------------------------


@dataclass
class LlmConfig(JudgeOptions):
    """llm: Algorithm 2 (or 4, or 1 and 3 from samples) on a real chat model, with your prompts and
    your judge."""

    model: str = setting("", "a Hugging Face directory or a GGUF file of the Llama family")
    prompts: str = setting(
        "prompts/general.jsonl",
        'FILE.jsonl, a line {"prompt": ..., "gold": optional, "split": optional}',
    )
    chat_format: str = setting(
        "model",
        "the model's chat template, or the plain prompt and an empty line",
        ("model", "plain"),
    )
    algorithm: int = setting(
        2, "2, 4: contrast sampled pairs; 1, 3: regress on soft targets", (1, 2, 3, 4)
    )
    iterations: int = setting(
        3, "T; the prompts are cut into as many disjoint parts, as in the paper"
    )
    eta: float = setting(
        0.1, "> 0, larger is slower; for Algorithms 2 and 4 eta~, 0.05 to 0.1 in the paper"
    )
    tau: float = setting(0.0, "in [0, eta], pull towards pi_1 in Algorithms 3 and 4")
    rule: str = setting("large-margin", "which pairs Algorithms 2 and 4 train on", tuple(RULES))
    margin: float = setting(
        0.2, "in [0, 1], least difference of the win rates of a pair; few have .4"
    )
    judgments: str = setting(
        "probabilities",
        "rank by {0, 1} samples of P, as in Algorithm 2; by P; or by a judge's points",
        ("outcomes", "probabilities", "scores"),
    )
    samples: int = setting(5, "K, responses a prompt, as in the paper")
    temperature: float = setting(0.7, "in [0.01, 100], of sampling, the paper's")
    top_p: float = setting(0.95, "in (0, 1], of sampling, the paper's")
    max_new_tokens: int = setting(
        64, "after which a response is cut off; prompt and response fit the model's context"
    )
    max_prompt_tokens: int = setting(512, "longer prompts are refused")
    replay: float = setting(
        0.3, "in [0, 1], share of the last iteration's pairs to train on again, as in the paper"
    )
    train_prompts: int | None = setting(
        None, "of the file, the first so many are trained on (default: all)"
    )
    held_out: int = setting(
        24, "prompts for validation: those of the split validation, else the last ones"
    )
    judged: int = setting(2, "samples of each held-out prompt by which a policy is measured")
    batch_size: int = setting(64, "pairs a step, about; the paper's is 64")
    prompts_at_once: int = setting(
        4, "prompts whose responses are scored together; gradients add up to a step's"
    )
    sample_batch: int = setting(64, "responses sampled together")
    lr: float = setting(
        5e-5, "Adam's learning rate in iteration 1, the paper's; falls with the iterations"
    )
    seed: int = setting(0, "of the parts, the samples and the outcomes")
    out: str | None = setting(None, "folder of the run (default: runs/llm-SEED)")
    resume: bool = setting(
        False, "go on with the run in --out, to the same result as if it had never stopped"
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting(
        "bfloat16", "of the computation; weights are float32 besides", ("bfloat16", "float32")
    )
    threads: int = setting(2, "CPU threads, of all processes of a machine together")
    low_rank: int = setting(
        0,
        "r of the low-rank terms (LoRA) that are trained in place of the weights, at most the width",
    )
    checkpointing: bool = setting(False, "compute activations twice rather than keep them")
    compile: bool = setting(False, "compile the blocks for training (torch.compile; cuda)")
    fsdp: bool = setting(
        False,
        "under torchrun, cut weights, gradients and Adam's state into as many parts as processes",
    )

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/llm-{self.seed}"
        self.check_judge()
        if not self.model:
            raise ValueError(
                "model is missing; give --model with a Hugging Face directory or a .gguf file"
            )
        check_positive(eta=self.eta, lr=self.lr, temperature=self.temperature)
        check_regularization(self.tau, self.eta)
        if self.tau and self.algorithm in (1, 2):
            raise ValueError(
                f"tau belongs to Algorithms 3 and 4, and algorithm is {self.algorithm}"
            )
        if (self.rule == "scored") != (self.judgments == "scores") or (
            self.rule == "scored" and self.oracle == "synthetic"
        ):
            raise ValueError(
                "rule scored, judgments scores and a language model that scores belong together; give all three"
            )
        counts = (
            "iterations",
            "max_new_tokens",
            "max_prompt_tokens",
            "judged",
            "batch_size",
            "prompts_at_once",
            "sample_batch",
            "train_prompts",
        )
        check_ranges(
            self,
            **dict.fromkeys(counts, (1, MOST)),
            samples=(2, MOST),
            held_out=(2, MOST),
            seed=(0, MOST),
            margin=(0, 1),
            replay=(0, 1),
            low_rank=(0, MOST),
            temperature=TEMPERATURES,
            threads=THREADS,
        )
        if self.compile and not self.device.startswith("cuda"):
            raise ValueError(
                f"compile is for a GPU, and device is {self.device}; add --device cuda"
            )
        if self.fsdp and not dist.is_torchelastic_launched():
            raise ValueError(
                "fsdp cuts the model into parts for several processes; start them by torchrun --nproc-per-node N"
            )
        self.sampling()

    def sampling(self, processes: int = 1) -> SamplingSettings:
        """The settings of the loop; a batch is of prompts that have about `batch_size` pairs, at K
        pairs a prompt, and each of the processes scores those of `prompts_at_once` prompts together."""
        prompts = max(1, round(self.batch_size / self.samples))
        return SamplingSettings(
            self.samples,
            self.temperature,
            self.top_p,
            self.judgments,
            replay=self.replay,
            prompts_per_step=prompts,
            learning_rate=self.lr,
            seed=self.seed,
            max_grad_norm=1.0,
            use_recorded=self.dtype == "float32",
            prompts_at_once=self.prompts_at_once * processes,
        )


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The prompts of a file, in its order; blank lines and a byte order mark are passed over.
    BadInput naming the lines that are malformed, empty or there twice."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts {path} cannot be read ({error})") from error
    items, bad, seen = [], [], {}
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # other signs that end lines can stand in a text
        if not line.strip():
            continue
        item, fault = read_prompt(line)
        if not fault and (first := seen.setdefault(item["prompt"].strip(), number)) != number:
            fault = f"is the prompt of line {first}"
        if fault:
            bad.append(f"line {number} {fault}")
        else:
            items.append(item)
    if bad or not items:
        raise BadInput(
            f"prompts {path}: " + ("; ".join(bad[:20]) or "no line; expected a prompt a line")
        )
    return items


def read_prompt(line: str) -> tuple[dict[str, Any], str]:
    """The object of a line of a file of prompts, and what is wrong with it, "" if nothing is."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        return {}, 'is no {"prompt": ...}'
    if not item["prompt"].strip() or not isinstance(item.get("gold", ""), str):
        return {}, "has an empty prompt, or a gold response that is no text"
    if re.search("[\ud800-\udfff]", item["prompt"] + item.get("gold", "")):
        return {}, "has half of a surrogate pair (\\ud800 to \\udfff), which is no letter"
    if item.get("split") not in (None, "train", "validation"):
        return {}, f"has split {item['split']!r}; expected train, validation or none"
    return item, ""


def split_prompts(
    config: LlmConfig, chat: Chat, shape: Config
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and prompts held out. BadInput if some are too long for the options or
    for a model of that shape, if there are fewer than asked for, or if gold responses are missing.
    """
    items = read_prompts(config.prompts)
    check_lengths(config, chat, shape, items)
    marked = [item for item in items if item.get("split") == "validation"]
    rest = (
        [item for item in items if item.get("split") != "validation"]
        if marked
        else items[: -config.held_out]
    )
    for name, asked, most, why in (
        (
            "held-out",
            config.held_out,
            len(marked or items),
            "marked validation" if marked else "in all",
        ),
        ("train-prompts", config.train_prompts, len(rest), "to train on"),
    ):
        if asked is not None and asked > most:
            raise BadInput(
                f"prompts {config.prompts}: {most} {why}; expected --{name} {asked} to be at most that"
            )
    training, held_out = rest[: config.train_prompts], (marked or items)[-config.held_out :]
    if len(training) < config.iterations:
        raise BadInput(
            f"prompts {config.prompts}: {len(training)} to train on beside {len(held_out)} held out; "
            f"expected at least --iterations {config.iterations}"
        )
    with_gold = sum("gold" in item for item in training)
    if with_gold not in (0, len(training)):
        raise BadInput(
            f"prompts {config.prompts}: {with_gold} of {len(training)} have a gold response; expected all or none"
        )
    random.Random(config.seed).shuffle(training)
    return training, held_out


def check_lengths(
    config: LlmConfig, chat: Chat, shape: Config, items: list[dict[str, Any]]
) -> None:
    """BadInput if a prompt is longer than it may be or has no token, if it and its longest response
    are more than the model reads, or if the model has no such token."""
    texts = [(item["prompt"], item.get("gold")) for item in items]
    rows = [(chat.prompt(x), [] if y is None else [*chat.encode(y), chat.end]) for x, y in texts]
    if empty := [x for (x, _), (row, _) in zip(texts, rows, strict=True) if not row]:
        raise BadInput(
            f"prompts {config.prompts}: {config.model} reads no token of {empty[0][:60]!r}; leave it out"
        )
    longest = [len(x) + max(config.max_new_tokens, len(y)) for x, y in rows]
    most = shape.context or max(longest)
    for name, lengths, limit in (
        ("--max-prompt-tokens", [len(x) for x, _ in rows], config.max_prompt_tokens),
        (
            f"the context or sliding window of {config.model} with --max-new-tokens or a gold response",
            longest,
            most,
        ),
    ):
        long = [
            (x, length) for (x, _), length in zip(texts, lengths, strict=True) if length > limit
        ]
        if long:
            raise BadInput(
                f"prompts {config.prompts}: {len(long)} are longer than {name}, {limit} tokens; the first "
                f"is {long[0][0][:60]!r} with {long[0][1]}"
            )
    if (last := max(token for row in rows for part in row for token in part)) >= shape.vocab_size:
        raise BadInput(
            f"{config.model} has {shape.vocab_size} tokens and its tokenizer a token {last}; expected the "
            "tokenizer of this model"
        )


# --- The run --------------------------------------------------------------------------------------


def llm_loop(
    config: LlmConfig,
    policy: ChatPolicy,
    judge: Oracle,
    training: list[dict[str, Any]],
    validation: ChatValidation,
    start: dno.SampledStart,
    remember: Remember,
) -> Iterator[dno.SampledIteration]:
    """The generator of the algorithm, over disjoint parts of the prompts."""
    hard = config.algorithm in (2, 4)
    gold = hard and "gold" in training[0]

    def data(t: int) -> tuple[list[str], list[str] | None]:
        part = training[t - 1 :: config.iterations]
        return [item["prompt"] for item in part], [item["gold"] for item in part] if gold else None

    common = {"settings": config.sampling(policy.team.size), "start": start}
    first = (*recalling(policy, judge, data, remember), config.eta, config.iterations)
    if not hard:
        return algorithm3_sampled(*first, validation, config.tau, **common)
    rule = RULES[config.rule](config.margin)
    if config.algorithm == 2:
        return dno.algorithm2(*first, rule, validation, **common)
    return algorithm4(*first, rule, validation, config.tau, **common)


def llm_row(
    it: dno.SampledIteration, config: LlmConfig, judge: Oracle, gold: bool
) -> dict[str, float | None]:
    """The numbers of an iteration that are not of validation: loss, pairs by kind, gold responses
    beaten, judgments, money."""
    i, j = torch.triu_indices(*it.preferences.shape[1:], 1)
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if gold else ys)]
    kinds = pair_kinds(it.pairs, it.preferences.shape[1] - 1 if gold else -1)
    row = {
        "loss": it.loss,
        "steps": it.steps,
        "chosen_log_ratio": it.chosen_log_ratio,
        "sampled_words": sum(len(y.split()) for y in samples) / len(samples),
        **{f"pairs_{kind}": count for kind, count in kinds.items()},
        "judgments_failed": it.preferences[:, i, j].isnan().double().mean().item(),
    }
    if gold:
        row["win_rate_vs_teacher"] = it.preferences[:, :-1, -1].nanmean().item()
    if isinstance(judge, OpenAIJudge):
        row |= Judging(judge, None).spending()
    return row


def write_llm_round(run: Run, it: dno.SampledIteration, gold: bool) -> None:
    """responses-TTT.jsonl and pairs-TTT.jsonl of an iteration."""
    n, groups = it.preferences.shape[1], it.groups
    responses = [
        {
            "prompt": x,
            "response": y,
            "by": "teacher" if gold and i == n - 1 else "student",
            "rated": None if math.isnan(r) else r,
        }
        for x, ys, rs in zip(groups.prompts, groups.responses, it.r_t.tolist(), strict=True)
        for i, (y, r) in enumerate(zip(ys, rs, strict=True))
    ]
    pairs = [
        {
            "prompt": groups.prompts[x],
            "first": groups.responses[x][i],
            "second": groups.responses[x][j],
        }
        for x, i, j in it.pairs.tolist()
    ]
    for name, lines in (("responses", responses), ("pairs", pairs)):
        run.write_lines(f"{name}-{it.t:03d}.jsonl", lines)


def announce_llm(
    config: LlmConfig, judge: Oracle, training: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    """Say what will be sampled and judged; of a judge that must be asked also what it will cost at
    most, responses being as long as they can."""
    n = config.samples + (config.algorithm in (2, 4) and "gold" in training[0])
    rounds = 2 * config.iterations - 1  # of validation: against pi_1, from pi_3 on also the last
    print(
        f"{len(training)} prompts in {config.iterations} parts, {config.samples} samples of each, "
        f"{len(training) * math.comb(n, 2):,} comparisons; {len(held_out)} held out, {config.judged} samples of each "
        f"from {config.iterations + 1} policies, {len(held_out) * config.judged * rounds:,} comparisons"
    )
    if not isinstance(judge, OpenAIJudge):
        print("judge: the synthetic taste; no requests, nothing is paid")
        return
    texts = [f"response {i} " + "word " * config.max_new_tokens for i in range(config.samples + 1)]
    groups = [(item["prompt"], *two) for item in training for two in combinations(texts[:n], 2)]
    surveys = [(item["prompt"], texts[0], texts[1]) for item in held_out]
    training_plan, survey = (
        judge.endpoint.plan(judge.questions(*zip(*asked, strict=True)))
        for asked in (groups, surveys)
    )
    validation = survey * (config.judged * rounds)
    print(f"judge: {judge.endpoint}\n    training: {training_plan}\n    validation: {validation}")
    if config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


def run_llm(config: LlmConfig) -> None:
    """The preset "llm": see `LlmConfig`. Writes what README.md lists under "The folder of a run"."""
    device, team = join_team(config.device, config.threads), Team()
    check_device(device)
    try:
        chat = Chat.from_pretrained(config.model, plain=config.chat_format == "plain")
        shape = Config(**read_checkpoint(config.model)[0])
        if config.low_rank > shape.width:
            raise BadInput(
                f"low_rank is {config.low_rank}; expected at most {shape.width}, the width of {config.model}"
            )
        training, held_out = split_prompts(config, chat, shape)
        judge: Oracle = TasteJudge()
        if config.oracle != "synthetic":
            each = max(1, config.judge_concurrency // team.size)
            judge = OpenAIJudge(
                open_judge(replace(config, judge_concurrency=each)),
                config.judge_form,
                seed=config.seed,
            )
            config.judge_model = judge.endpoint.model
        announce_llm(config, judge, training, held_out)
        if config.dry_run:
            return
        model = read_transformer(config.model, COMPUTE[config.dtype]).to(device)
    except BadCheckpoint as error:
        raise BadInput(str(error)) from error
    run = Run("llm", config, CLASSES_KEPT, device="cpu")
    if config.low_rank:
        add_low_rank(model, config.low_rank)
    model.checkpointing = config.checkpointing
    if config.compile:
        model.read_block = torch.compile(model.read_block, dynamic=True)
    policy = ChatPolicy(model, chat, config.max_new_tokens, config.sample_batch, config.fsdp)
    print(
        f"{sum(w.numel() for w in model.parameters()):,} parameters; {len(training)} prompts, {len(held_out)} held out; "
        f"Algorithm {config.algorithm}. Writing to {config.out}"
    )
    judge_of_all = SharedJudge(judge, team) if team.size > 1 else judge
    validation = ChatValidation(
        policy, judge_of_all, [item["prompt"] for item in held_out], config, policy.weights()
    )
    first = train_llm(config, policy, judge, training, validation, run)
    best = run.metrics[-1]["best_iteration"]
    judged_by = "the synthetic taste" if config.oracle == "synthetic" else config.oracle
    summary = {
        "config": asdict(config),
        "judge": judged_by,
        "first": first,
        "best_iteration": best,
        "last": run.metrics[-1],
        "seconds": sum(row["seconds"] for row in run.metrics),
    }
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    show_before_and_after(validation)
    policy.refresh()
    if run.writes:
        write_transformer(policy.model, run.out / "best")
        chat.save(run.out / "best")
    print(f"\npi_{best}, the best on validation, is in {run.out}/best, for transformers and vLLM")


def train_llm(
    config: LlmConfig,
    policy: ChatPolicy,
    judge: Oracle,
    training: list[dict[str, Any]],
    validation: ChatValidation,
    run: Run,
) -> dict[str, float]:
    """Run the algorithm from pi_1 or the run's last checkpoint on, a line and a checkpoint an
    iteration; the policy is then the best on validation. The numbers of pi_1."""
    optimizer, after, gold = (
        dno.adam(policy),
        None,
        config.algorithm in (2, 4) and "gold" in training[0],
    )
    if run.state:
        run.expect(
            run.state,
            {
                "policy": list(policy.parameters()),
                "optimizer": like(optimizer),
                "round": dno.SampledIteration,
                "pi_ref": list | None,
                "samples": list,
                "numbers": list,
            },
        )
        after = take_training(run.state, policy, optimizer)
        validation.samples, validation.numbers = run.state["samples"], run.state["numbers"]
    progress = tqdm(
        total=config.iterations,
        initial=after.t if after else 0,
        desc="measuring pi_1",
        unit="iteration",
        disable=True if policy.team.rank else None,
        leave=False,
    )
    remember = followed(run, progress, optimizer)
    loop = llm_loop(
        config,
        policy,
        validation.judge,
        training,
        validation,
        dno.SampledStart(optimizer, after),
        remember,
    )
    print(
        "    t | P(> pi_1)       at equal length | P(new > old) | words  cut off | KL(pi_1) | pairs | loss"
    )
    start = time.perf_counter()
    try:
        for it in loop:
            row = {
                "iteration": it.t,
                "seconds": time.perf_counter() - start,
                **llm_row(it, config, judge, gold),
                **validation.numbers[-1],
                "best_iteration": it.best.t,
            }
            warnings, after = alarms(row, validation.numbers[0]), it
            write_llm_round(run, it, gold)
            for t in {1, it.t + 1}:
                run.write_lines(
                    f"validation-{t:03d}.jsonl",
                    written(validation.prompts, validation.samples[t - 1]),
                )
            known = {
                name: None if value != value else value for name, value in row.items()
            }  # JSON has no NaN
            state = training_state(policy, optimizer, it)
            run.save(
                {**known, "alarms": warnings},
                {**state, "samples": validation.samples, "numbers": validation.numbers},
            )
            tqdm.write(
                f"{it.t:5d} | {row['win_rate_vs_first']:.3f} +- {row['win_rate_vs_first_interval']:.3f} "
                f"{row['win_rate_vs_first_length_controlled']:15.3f} | {row['win_rate_vs_previous']:12.3f} | "
                f"{row['mean_length']:5.1f} {row['truncated']:8.2f} | {row['kl_to_first']:8.2f} | {len(it.pairs):5d} | "
                f"{row['loss']:.4f}"
            )
            for alarm in warnings:
                tqdm.write(f"      ! {alarm}")
            progress.update()
            start = time.perf_counter()
    except dno.NotFinite as error:
        run.write_lines("not-finite.jsonl", written(error.batch.prompts, error.batch.responses))
        raise Stopped(
            f"{error}; its batch is in {run.out}/not-finite.jsonl; a smaller --lr may help"
        ) from error
    finally:
        progress.close()
    policy.load(after.best.parameters)
    return validation.numbers[0]


def training_state(
    policy: ChatPolicy, optimizer: torch.optim.Optimizer, it: dno.SampledIteration
) -> dict[str, Any]:
    """All that `take_training` needs, whole on the CPU of the first process however many there are."""
    known, best = (
        optimizer.state_dict(),
        replace(it.best, parameters=[whole(weight) for weight in it.best.parameters]),
    )
    moments = {
        number: {name: whole(value) for name, value in of.items()}
        for number, of in known["state"].items()
    }
    return {
        "policy": [whole(weight) for weight in policy.parameters()],
        "optimizer": {**known, "state": moments},
        "round": replace(it, pi_ref=None, best=best),
        "pi_ref": bare(it.pi_ref).weights() if it.pi_ref else None,
    }


def take_training(
    state: dict[str, Any], policy: ChatPolicy, optimizer: torch.optim.Optimizer
) -> dno.SampledIteration:
    """Go back to a `training_state`, with as many processes as there are now: the round to go on
    after."""
    parameters, known, best = list(policy.parameters()), state["optimizer"], state["round"].best

    def mine(weights: list[Tensor]) -> list[Tensor]:
        return [part_of(value, like) for value, like in zip(weights, parameters, strict=True)]

    policy.load(mine(state["policy"]))
    moments = {
        number: {name: part_of(value, parameters[number]) for name, value in of.items()}
        for number, of in known["state"].items()
    }
    optimizer.load_state_dict({**known, "state": moments})
    pi_ref = copy.deepcopy(policy) if state["pi_ref"] else None
    if pi_ref is not None:
        pi_ref.load(state["pi_ref"])
    return replace(
        state["round"], pi_ref=pi_ref, best=replace(best, parameters=mine(best.parameters))
    )


def show_before_and_after(validation: ChatValidation) -> None:
    """Three held-out prompts, with a response of pi_1 and one of the last policy."""
    for place in range(
        0, min(3 * validation.config.judged, len(validation.prompts)), validation.config.judged
    ):
        print(f"\n{validation.prompts[place]}")
        for name, samples in (
            ("pi_1", validation.samples[0]),
            (f"pi_{len(validation.samples)}", validation.samples[-1]),
        ):
            print(f"  {name}: {for_terminal(samples[place])[:300]}")


PRESET = (LlmConfig, run_llm)

"""The preset "llm": Algorithm 2 (or 4) on a real chat model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import dno
from chat.checkpoints import read_checkpoint, read_transformer, write_transformer
from chat.formats import BadCheckpoint
from chat.low_rank import add_low_rank
from chat.policy import ChatPolicy
from chat.processes import part_of, whole
from chat.team import SharedJudge, Team
from chat.template import Chat
from experiments.folder import Run, like
from experiments.judging import Judging, open_judge
from experiments.llm_settings import LlmConfig
from experiments.prompts import Prompt, split_prompts
from experiments.rounds import (
    CLASSES_KEPT,
    RULES,
    Remember,
    bare,
    followed,
    judgments_failed,
    recalling,
    without_nan,
    written,
)
from experiments.settings import COMPUTE, BadInput, check_device, join_team
from experiments.validation import ChatValidation, alarms
from judge.ledger import Stopped, for_terminal
from judge.prices import Plan
from judge.synthetic import TasteJudge
from model import Config, Transformer
from oracle import OpenAIJudge
from pairs import pair_kinds
from regularized import algorithm3_sampled, algorithm4


@dataclass(frozen=True)
class LlmRun:
    """What a run carries along."""

    config: LlmConfig
    run: Run
    policy: ChatPolicy
    judge: dno.Preferences  # this process's own
    training: list[Prompt]
    validation: ChatValidation

    @property
    def gold(self) -> bool:
        """Is the last response of each group a gold one?"""
        return has_gold(self.config, self.training)


def has_gold(config: LlmConfig, training: list[Prompt]) -> bool:
    """Does the algorithm look at gold responses, and are there any?"""
    return config.hard and "gold" in training[0]


def run_llm(config: LlmConfig) -> None:
    """The preset "llm": see `LlmConfig`. README.md lists what it writes, under "The folder of a
    run"."""
    device, team = join_team(config.device, config.threads), Team()
    check_device(device)
    try:
        chat = Chat.from_pretrained(config.model, plain=config.chat_format == "plain")
        training, held_out = split_prompts(config, chat, shape_of(config))
        judge = judge_of(config, team)
        announce_llm(config, judge, training, held_out)
        if config.dry_run:
            return
        model = read_transformer(config.model, COMPUTE[config.dtype]).to(device)
    except BadCheckpoint as error:
        raise BadInput(str(error)) from error
    run = Run("llm", config, CLASSES_KEPT, device="cpu")
    policy = policy_of(config, chat, model)
    parameters = sum(w.numel() for w in model.parameters())
    print(
        f"{parameters:,} parameters; {len(training)} prompts, {len(held_out)} held out; "
        f"Algorithm {config.algorithm}. Writing to {config.out}"
    )
    shared = SharedJudge(judge, team) if team.size > 1 else judge
    prompts = [item["prompt"] for item in held_out]
    validation = ChatValidation(policy, shared, prompts, config, policy.weights())
    train_llm(LlmRun(config, run, policy, judge, training, validation))
    best = run.metrics[-1]["best_iteration"]
    summary = {
        "config": asdict(config),
        "judge": "the synthetic taste" if config.oracle == "synthetic" else config.oracle,
        "first": validation.numbers[0],
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


def shape_of(config: LlmConfig) -> Config:
    """The shape of the model. BadInput if the low-rank terms do not fit it."""
    shape = Config(**read_checkpoint(config.model)[0])
    if config.low_rank > shape.width:
        expected = f"expected at most {shape.width}, the width of {config.model}"
        raise BadInput(f"low_rank is {config.low_rank}; {expected}")
    return shape


def judge_of(config: LlmConfig, team: Team) -> dno.Preferences:
    """The judge that the config names; the processes share the number of requests at a time."""
    if config.oracle == "synthetic":
        return TasteJudge()
    each = max(1, config.judge_concurrency // team.size)
    endpoint = open_judge(replace(config, judge_concurrency=each))
    config.judge_model = endpoint.model
    return OpenAIJudge(endpoint, config.judge_form, seed=config.seed)


def policy_of(config: LlmConfig, chat: Chat, model: Transformer) -> ChatPolicy:
    """The model as a policy, prepared to be trained."""
    if config.low_rank:
        add_low_rank(model, config.low_rank)
    model.checkpointing = config.checkpointing
    if config.compile:
        model.read_block = torch.compile(model.read_block, dynamic=True)
    return ChatPolicy(model, chat, config.max_new_tokens, config.sample_batch, config.fsdp)


def announce_llm(
    config: LlmConfig, judge: dno.Preferences, training: list[Prompt], held_out: list[Prompt]
) -> None:
    """Say what will be sampled and judged, and what it will cost at most if the judge must be
    asked: responses are taken to be as long as they can."""
    T, n = config.iterations, config.samples + has_gold(config, training)
    rounds = 2 * T - 1  # of validation: against pi_1, from pi_3 on also the policy before
    compared = len(training) * math.comb(n, 2)
    validated = len(held_out) * config.judged * rounds
    print(
        f"{len(training)} prompts in {T} parts, {config.samples} samples of each, "
        f"{compared:,} comparisons; {len(held_out)} held out, {config.judged} samples of each "
        f"from {T + 1} policies, {validated:,} comparisons"
    )
    if not isinstance(judge, OpenAIJudge):
        print("judge: the synthetic taste; no requests, nothing is paid")
        return
    texts = [f"response {i} " + "word " * config.max_new_tokens for i in range(config.samples + 1)]
    groups = [(item["prompt"], *two) for item in training for two in combinations(texts[:n], 2)]
    survey = plan_of(judge, [(item["prompt"], texts[0], texts[1]) for item in held_out])
    print(f"judge: {judge.endpoint}")
    print(f"    training: {plan_of(judge, groups)}")
    print(f"    validation: {survey * (config.judged * rounds)}")
    if config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


def plan_of(judge: OpenAIJudge, triples: Sequence[tuple[str, str, str]]) -> Plan:
    """The cost of comparisons (prompt, response, response)."""
    return judge.endpoint.plan(judge.questions(*zip(*triples, strict=True)))


# --- Training -------------------------------------------------------------------------------------


def train_llm(shared: LlmRun) -> None:
    """Run the algorithm from pi_1 or the run's last checkpoint on, a line and a checkpoint an
    iteration. The policy is then the best on validation."""
    run, policy, validation = shared.run, shared.policy, shared.validation
    optimizer = dno.adam(policy)
    last = restored(shared, optimizer)
    progress = tqdm(
        total=shared.config.iterations,
        initial=last.t if last else 0,
        desc="measuring pi_1",
        unit="iteration",
        disable=True if policy.team.rank else None,
        leave=False,
    )
    remember = followed(run, progress, optimizer)
    loop = llm_loop(shared, dno.SampledStart(optimizer, last), remember)
    print(
        "    t | P(> pi_1)       at equal length | P(new > old) | words  cut off | KL(pi_1) | "
        "pairs | loss"
    )
    start = time.perf_counter()
    try:
        for last in loop:
            row = llm_row(shared, last, time.perf_counter() - start)
            warnings = alarms(row, validation.numbers[0])
            write_iteration(shared, last, {**without_nan(row), "alarms": warnings}, optimizer)
            tqdm.write(console_line(row, len(last.pairs)))
            for alarm in warnings:
                tqdm.write(f"      ! {alarm}")
            progress.update()
            start = time.perf_counter()
    except dno.NotFinite as error:
        run.write_lines("not-finite.jsonl", written(error.batch.prompts, error.batch.responses))
        where = f"its batch is in {run.out}/not-finite.jsonl"
        raise Stopped(f"{error}; {where}; a smaller --lr may help") from error
    finally:
        progress.close()
    if last:
        policy.load(last.best.parameters)


def llm_loop(
    shared: LlmRun, start: dno.SampledStart, remember: Remember
) -> Iterator[dno.SampledIteration]:
    """The generator of the algorithm, over disjoint parts of the prompts."""
    config, training, validate = shared.config, shared.training, shared.validation
    T, eta, tau = config.iterations, config.eta, config.tau

    def part(t: int) -> tuple[list[str], list[str] | None]:
        items = training[t - 1 :: T]
        gold = [item["gold"] for item in items] if shared.gold else None
        return [item["prompt"] for item in items], gold

    settings = config.sampling(shared.policy.team.size)
    policy, oracle, data = recalling(shared.policy, validate.judge, part, remember)
    if not config.hard:
        return algorithm3_sampled(
            policy, oracle, data, eta, T, validate, tau, settings=settings, start=start
        )
    rule = RULES[config.rule](config.margin)
    if config.algorithm == 2:
        return dno.algorithm2(
            policy, oracle, data, eta, T, rule, validate, settings=settings, start=start
        )
    return algorithm4(
        policy, oracle, data, eta, T, rule, validate, tau, settings=settings, start=start
    )


def llm_row(shared: LlmRun, it: dno.SampledIteration, seconds: float) -> dict[str, Any]:
    """The row of an iteration in metrics.jsonl, but for its alarms."""
    gold, judge = shared.gold, shared.judge
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if gold else ys)]
    kinds = pair_kinds(it.pairs, it.preferences.shape[1] - 1 if gold else -1)
    row = {
        "iteration": it.t,
        "seconds": seconds,
        "loss": it.loss,
        "steps": it.steps,
        "chosen_log_ratio": it.chosen_log_ratio,
        "sampled_words": sum(len(y.split()) for y in samples) / len(samples),
        **{f"pairs_{kind}": count for kind, count in kinds.items()},
        "judgments_failed": judgments_failed(it),
    }
    if gold:
        row["win_rate_vs_teacher"] = it.preferences[:, :-1, -1].nanmean().item()
    spending = Judging(judge, None).spending() if isinstance(judge, OpenAIJudge) else {}
    return {**row, **spending, **shared.validation.numbers[-1], "best_iteration": it.best.t}


# --- What is written ------------------------------------------------------------------------------


def write_iteration(
    shared: LlmRun, it: dno.SampledIteration, row: dict[str, Any], optimizer: torch.optim.Optimizer
) -> None:
    """The files of an iteration, its row, and the checkpoint that `restored` reads."""
    run, validation = shared.run, shared.validation
    write_llm_round(run, it, shared.gold)
    for t in {1, it.t + 1}:
        lines = written(validation.prompts, validation.samples[t - 1])
        run.write_lines(f"validation-{t:03d}.jsonl", lines)
    state = training_state(shared.policy, optimizer, it)
    run.save(row, {**state, "samples": validation.samples, "numbers": validation.numbers})


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
    pairs = []
    for x, i, j in it.pairs.tolist():
        first, second = groups.responses[x][i], groups.responses[x][j]
        pairs.append({"prompt": groups.prompts[x], "first": first, "second": second})
    run.write_lines(f"responses-{it.t:03d}.jsonl", responses)
    run.write_lines(f"pairs-{it.t:03d}.jsonl", pairs)


def console_line(row: dict[str, Any], pairs: int) -> str:
    """An iteration's row, under the heading that `train_llm` prints."""
    won, interval = row["win_rate_vs_first"], row["win_rate_vs_first_interval"]
    controlled, previous = row["win_rate_vs_first_length_controlled"], row["win_rate_vs_previous"]
    return (
        f"{row['iteration']:5d} | {won:.3f} +- {interval:.3f} {controlled:15.3f} | "
        f"{previous:12.3f} | {row['mean_length']:5.1f} {row['truncated']:8.2f} | "
        f"{row['kl_to_first']:8.2f} | {pairs:5d} | {row['loss']:.4f}"
    )


def show_before_and_after(validation: ChatValidation) -> None:
    """Print three held-out prompts, with a response of pi_1 and one of the last policy."""
    samples, each = validation.samples, validation.config.judged
    shown = {"pi_1": samples[0], f"pi_{len(samples)}": samples[-1]}
    for place in range(0, min(3 * each, len(validation.prompts)), each):
        print(f"\n{validation.prompts[place]}")
        for name, responses in shown.items():
            print(f"  {name}: {for_terminal(responses[place])[:300]}")


# --- The checkpoint -------------------------------------------------------------------------------


def restored(shared: LlmRun, optimizer: torch.optim.Optimizer) -> dno.SampledIteration | None:
    """The iteration to go on after, with policy, optimizer and validation as they were then; None
    at the start."""
    state, policy, validation = shared.run.state, shared.policy, shared.validation
    if not state:
        return None
    wanted = {
        "policy": list(policy.parameters()),
        "optimizer": like(optimizer),
        "round": dno.SampledIteration,
        "pi_ref": list | None,
        "samples": list,
        "numbers": list,
    }
    shared.run.expect(state, wanted)
    validation.samples, validation.numbers = state["samples"], state["numbers"]
    return take_training(state, policy, optimizer)


def training_state(
    policy: ChatPolicy, optimizer: torch.optim.Optimizer, it: dno.SampledIteration
) -> dict[str, Any]:
    """All that `take_training` needs, whole on the CPU of the first process, however many there
    are."""
    known = optimizer.state_dict()
    best = replace(it.best, parameters=[whole(weight) for weight in it.best.parameters])
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
    """Go back to a `training_state`, with as many processes as there are now. Returns the iteration
    to go on after."""
    parameters, known, best = list(policy.parameters()), state["optimizer"], state["round"].best

    def mine(weights: list[Tensor]) -> list[Tensor]:
        return [part_of(value, like) for value, like in zip(weights, parameters, strict=True)]

    policy.load(mine(state["policy"]))
    moments = {
        number: {name: part_of(value, parameters[number]) for name, value in of.items()}
        for number, of in known["state"].items()
    }
    optimizer.load_state_dict({**known, "state": moments})
    pi_ref = policy.frozen_copy() if state["pi_ref"] else None
    if pi_ref is not None:
        pi_ref.load(state["pi_ref"])
    best = replace(best, parameters=mine(best.parameters))
    return replace(state["round"], pi_ref=pi_ref, best=best)


PRESET = (LlmConfig, run_llm)

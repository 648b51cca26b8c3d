"""The preset "llm": Algorithm 2 (or 4, or 1 and 3 from samples) on a real chat model."""

from __future__ import annotations

import json

import torch

import dno
from chat.checkpoints import read_checkpoint, read_transformer, write_transformer
from chat.formats import BadCheckpoint
from chat.low_rank import add_low_rank
from chat.policy import ChatPolicy
from chat.team import SharedJudge, Team
from chat.template import Chat
from experiments.costs import announce_costs, training_comparisons, validation_comparisons
from experiments.folder import Run
from experiments.judging import Judging, judging
from experiments.llm_settings import LlmConfig
from experiments.prompts import Prompt, split_prompts
from experiments.rounds import Stage
from experiments.sampled_summary import summarise
from experiments.settings import COMPUTE, BadInput, check_device, join_team
from experiments.training import CLASSES_KEPT, Work, show_before_and_after, train_stages
from experiments.validation import JudgedValidation
from model import Config, Transformer


def run_llm(config: LlmConfig) -> None:
    """The preset "llm": see `LlmConfig`. docs/runs.md lists what it writes."""
    device, team = join_team(config.device, config.threads), Team()
    check_device(device)
    try:
        chat = Chat.from_pretrained(config.model, plain=config.chat_format == "plain")
        training, held_out = split_prompts(config, chat, shape_of(config))
        config, asked = judging(config, team.size)
        announce_llm(config, asked, training, held_out)
        if config.dry_run:
            return
        model = read_transformer(config.model, COMPUTE[config.dtype]).to(device)
    except BadCheckpoint as error:
        raise BadInput(str(error)) from error
    run = Run("llm", config, CLASSES_KEPT, device="cpu")
    policy = policy_of(config, chat, model)
    parameters = sum(w.numel() for w in model.parameters())
    print(
        f"{parameters:,} parameters; {len(training)} prompts, {len(held_out)} held out. "
        f"Writing to {config.out}"
    )
    oracle = SharedJudge(asked.judge, team) if team.size > 1 else asked.judge
    prompts, gold = [item["prompt"] for item in held_out], gold_of(held_out)
    validation = JudgedValidation(policy, prompts, config.judged, config.seed, oracle, gold)
    stages = [config.stage(team.size)]

    def data(stage: Stage) -> dno.Data:
        return disjoint_parts(training, stage)

    last = train_stages(Work(run, policy, asked, oracle, data, validation), stages)
    policy.load(last.best.parameters)
    show_before_and_after(validation)
    summary = {**summarise(config, stages, run.metrics, validation.numbers[0]), **asked.spending()}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    policy.refresh()
    if run.writes:
        from experiments.sampled_figures import sampled_figure  # here, as it imports matplotlib

        run.figure("llm.png", sampled_figure, stages, run.metrics, validation.numbers[0])
        write_transformer(policy.model, run.out / "best")
        chat.save(run.out / "best")
    print(f"\npi_{last.best.t}, the best on validation, is in {run.out}/best (transformers, vLLM)")


def gold_of(items: list[Prompt]) -> list[str] | None:
    """Their gold responses, if all have one."""
    found = [item["gold"] for item in items if "gold" in item]
    return found if len(found) == len(items) else None


def disjoint_parts(training: list[Prompt], stage: Stage) -> dno.Data:
    """For iteration t every T-th prompt from the t-th on, with gold responses if there are any and
    the algorithm looks at them."""

    def part(t: int) -> tuple[list[str], list[str] | None]:
        items = training[t - 1 :: stage.iterations]
        return [item["prompt"] for item in items], gold_of(items) if stage.hard else None

    return part


def shape_of(config: LlmConfig) -> Config:
    """The shape of the model. BadInput if the low-rank terms do not fit it."""
    shape = Config(**read_checkpoint(config.model)[0])
    if config.low_rank > shape.width:
        expected = f"expected at most {shape.width}, the width of {config.model}"
        raise BadInput(f"low_rank is {config.low_rank}; {expected}")
    return shape


def policy_of(config: LlmConfig, chat: Chat, model: Transformer) -> ChatPolicy:
    """The model as a policy, prepared to be trained."""
    if config.low_rank:
        add_low_rank(model, config.low_rank)
    model.checkpointing = config.checkpointing
    if config.compile:
        model.read_block = torch.compile(model.read_block, dynamic=True)
    return ChatPolicy(model, chat, config.max_new_tokens, config.sample_batch, config.fsdp)


def announce_llm(
    config: LlmConfig, asked: Judging, training: list[Prompt], held_out: list[Prompt]
) -> None:
    """Say what will be sampled and judged, and what it will cost at most."""
    T, k, words = config.iterations, config.judged, config.max_new_tokens
    n = config.samples + (config.stage().hard and gold_of(training) is not None)
    compared = training_comparisons([item["prompt"] for item in training], n, words)
    prompts, gold = [item["prompt"] for item in held_out], gold_of(held_out)
    teacher = [] if gold is None else ["teacher"]
    first, second, later = (
        validation_comparisons(prompts, k, words, teacher + others)
        for others in ([], ["first"], ["first", "previous"])  # the policy before pi_2 is pi_1
    )
    validated = len(first) + len(second) + (T - 1) * len(later)
    print(
        f"{len(training)} prompts in {T} parts, {config.samples} samples of each, "
        f"{len(compared):,} comparisons;\n{len(held_out)} held out, {k} samples of each "
        f"from {T + 1} policies, {validated:,} comparisons"
    )
    announce_costs(config, asked, [(compared, 1), (first, 1), (second, 1), (later, T - 1)])


PRESET = (LlmConfig, run_llm)

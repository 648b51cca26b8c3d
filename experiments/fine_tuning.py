"""Supervised fine-tuning on the small world of text: where the presets text and ablations start."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import dno
from experiments.folder import Run, like
from experiments.text_settings import TextConfig
from model import token_log_prob
from text import ANSWER, END, SPLIT, TextPolicy, learn_byte_pairs, make_tokenizer
from world import examples

BATCH = 128  # examples a step


def fine_tuned(config: TextConfig, run: Run) -> TextPolicy:
    """The policy pi_1, fine-tuned or, on resumption, as it was. Writes tokenizer.json and
    policies/base.pt."""
    corpus = examples(config.seed)
    ranks = learn_byte_pairs((f"{x} {y}" for x, y in corpus), config.vocabulary)
    listed = {"split": SPLIT, "ranks": [token.hex() for token in ranks], "special": [ANSWER, END]}
    run.write("tokenizer.json", json.dumps(listed) + "\n")
    policy = config.policy(make_tokenizer(ranks))
    (run.out / "policies").mkdir(exist_ok=True)
    base = run.load("policies/base.pt")
    if base is None:
        fine_tune(config, policy, corpus, run)
        run.keep("policies/base.pt", policy.state_dict())
    else:
        run.expect({"pi_1": base}, {"pi_1": policy.state_dict()})
        policy.load_state_dict(base)
    return policy


def fine_tune(
    config: TextConfig, policy: TextPolicy, pairs: list[tuple[str, str]], run: Run
) -> None:
    """Adam on -log pi(y|x) a token, from the run's last checkpoint on."""
    optimizer, steps, first = dno.adam(policy), config.sft_steps, 0
    prompts = policy.prompt_tokens([x for x, _ in pairs])
    responses = policy.response_tokens([y for _, y in pairs])
    if run.state:
        wanted = {"policy": policy.state_dict(), "optimizer": like(optimizer), "sft_steps": int}
        run.expect(run.state, wanted)
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])
        first = run.state["sft_steps"]
    progress = {"initial": first, "unit": "step", "disable": None, "leave": False}
    for step in tqdm(range(first, steps), "fine-tuning", steps, **progress):
        batch = random.Random(config.seed * 1_000_003 + step).sample(range(len(pairs)), BATCH)
        loss = loss_per_token(policy, [prompts[i] for i in batch], [responses[i] for i in batch])
        dno.set_learning_rate(optimizer, config.sft_lr * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            state = {"policy": policy.state_dict(), "optimizer": optimizer.state_dict()}
            run.checkpoint({**state, "sft_steps": step + 1})


def loss_per_token(
    policy: TextPolicy, prompts: Sequence[Tensor], responses: Sequence[Tensor]
) -> Tensor:
    """-log pi(y|x) of these tokens, summed and divided by the number of tokens of responses."""
    models = {policy.model: 1.0}
    log_probs = token_log_prob(models, prompts, responses, policy.tokenizer.n_vocab)
    return -log_probs.sum() / sum(map(len, responses))

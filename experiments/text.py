"""The preset "text": fine-tuning on the small world of text, then Algorithm 2 and a regression."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tiktoken
import torch
from torch import Tensor
from tqdm import tqdm

import dno
from experiments.figures import STYLE
from experiments.folder import Run, like
from experiments.judging import Judging, judging
from experiments.rounds import (
    CLASSES_KEPT,
    RULES,
    Remember,
    bare,
    judged_numbers,
    recalling,
    round_numbers,
    write_round,
)
from experiments.settings import (
    DTYPES,
    TEMPERATURES,
    THREADS,
    BadInput,
    JudgeOptions,
    changed,
    check_device,
    check_ranges,
    setting,
)
from experiments.validation import KINDS, JudgedValidation, Validation
from judge.prices import Plan
from model import Config, Transformer, token_log_prob
from oracle import OpenAIJudge, RegisterJudge
from pairs import SamplingSettings, check_positive
from regularized import algorithm3_sampled, algorithm4, check_regularization
from text import ANSWER, END, SPLIT, TextPolicy, learn_byte_pairs, make_tokenizer
from world import (
    CLASSES,
    HELD_OUT,
    PROMPTS,
    TRAINING,
    classify,
    examples,
    student_answer,
    teacher_answer,
)

# --- Settings -------------------------------------------------------------------------------------


HARD = {
    "samples": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompts_per_step": 12,
    "lr": 1e-3,
    "lr_decay": 0.8,
    "iterations": 30,
}
SOFT = {
    "samples": 24,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompts_per_step": 4,
    "lr": 7e-4,
    "lr_decay": 0.5,
    "iterations": 60,
}
# what is not given on the command line, by algorithm; 1 and 3 with r_t estimated from samples
RECIPES = {
    1: {**SOFT, "eta": 1.0, "tau": 0.0, "move_reference_every": 0},
    2: {**HARD, "eta": 8.0, "tau": 0.0, "move_reference_every": 0},
    3: {**SOFT, "eta": 0.25, "tau": 0.125, "move_reference_every": 5},
    4: {**HARD, "eta": 8.0, "tau": 0.4, "move_reference_every": 0},
}
TRAINED = 8  # of a prompt's samples in algorithms 1 and 3; all of them are opponents


@dataclass
class TextConfig(JudgeOptions):
    """text: supervised fine-tuning on a small world of text, then Algorithm 2, then a regression
    that approaches Nash."""

    algorithm: int | None = setting(
        None,
        "2, 4: contrast sampled pairs; 1, 3: regress on soft targets; when left out 2, then 3 if the judge is synthetic",
        choices=(1, 2, 3, 4),
    )
    option: str = setting(
        "I",
        "of Algorithm 4: samples of pi_t (I) or of its mixture with pi_ref by token (II)",
        ("I", "II"),
    )
    iterations: int | None = setting(None, "T (30 for Algorithms 2 and 4, 60 for 1 and 3)")
    eta: float | None = setting(
        None, "> 0, larger is slower (eta~ 8 for Algorithms 2 and 4; 1 for 1, 0.25 for 3)"
    )
    tau: float | None = setting(
        None, "in [0, eta], pull towards pi_ref (0.125 for Algorithm 3, 0.4 for 4)"
    )
    move_reference_every: int | None = setting(None, "iterations; 0: never (5 for Algorithm 3)")
    rule: str = setting("large-margin", "which pairs Algorithms 2 and 4 train on", tuple(RULES))
    margin: float = setting(0.4, "in [0, 1], least difference of the win rates of a pair")
    judgments: str = setting(
        "outcomes",
        "rank by {0, 1} samples of P, as in Algorithm 2; by P; or, with rule scored, by a judge's points",
        ("outcomes", "probabilities", "scores"),
    )
    samples: int | None = setting(
        None, "K, responses a prompt (5 for Algorithms 2 and 4, as in the paper; 24 for 1 and 3)"
    )
    temperature: float | None = setting(
        None, "of sampling (default: 1.0; the paper's 0.7 hides malformed text from the judge)"
    )
    top_p: float | None = setting(None, "of sampling (default: 1.0; the paper's is 0.95)")
    replay: float = setting(
        0.3, "in [0, 1], share of the last iteration's pairs to train on again, as in the paper"
    )
    prompts: int = setting(
        72, "X, prompts an iteration, of 72; 24 more are held out for validation"
    )
    prompts_per_step: int | None = setting(
        None, "whose pairs make up a batch (12 for Algorithms 2 and 4, 4 for 1 and 3)"
    )
    lr: float | None = setting(
        None, "Adam's learning rate in iteration 1 (1e-3 for Algorithms 2 and 4, 7e-4 for 1 and 3)"
    )
    sft_steps: int = setting(400, "Adam steps of supervised fine-tuning, 128 examples each")
    sft_lr: float = setting(6e-3, "Adam's first learning rate in it; falls linearly to 0")
    vocabulary: int = setting(640, "most byte pairs to learn")
    layers: int = setting(2, "of the transformer")
    width: int = setting(64, "channels of the transformer")
    max_new_tokens: int = setting(24, "after which a response is cut off")
    survey: int = setting(32, "samples of each held-out prompt by which a policy is measured")
    judged: int = setting(
        2, "samples of each held-out prompt that a language model judges, each iteration"
    )
    teacher: str = setting(
        "synthetic", "who writes gold responses: synthetic, openai:MODEL, or replay:CACHE"
    )
    teacher_url: str | None = setting(None, "the teacher's endpoint (default: --judge-url)")
    teacher_prices: str | None = setting(
        None, "as --judge-prices, which it is when left out if the model is the judge's"
    )
    seed: int = setting(0, "of the corpus, the transformer's weights, the samples and the outcomes")
    out: str | None = setting(None, "folder of the run (default: runs/text-SEED)")
    resume: bool = setting(
        False, "go on with the run in --out, to the same result as if it had never stopped"
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(2, "CPU threads")

    def __post_init__(self) -> None:
        """Fill in the recipe of the algorithm, and check every number. ValueError naming the field."""
        self.out = self.out or f"runs/text-{self.seed}"
        self.check_judge()
        algorithms = self.algorithms()
        own = ("samples", "temperature", "top_p", "prompts_per_step", "lr", "eta", "tau")
        given = [name for name in own if getattr(self, name) is not None]
        if len(algorithms) > 1 and given:
            raise ValueError(
                f"{given[0]} differs between algorithms; add --algorithm, or leave it out"
            )
        check_ranges(self, eta=(0, 10**6), lr=(0, 10), sft_lr=(0, 10))
        for stage in self.stages():
            check_positive(eta=stage.eta, iterations=stage.iterations)
            check_regularization(stage.tau, stage.eta)
            self.sampling(stage)
            if stage.algorithm in (1, 3) and stage.samples < 2:
                raise ValueError(
                    f"samples is {stage.samples}; expected at least 2, each other's opponents"
                )
        if self.option != "I" and self.algorithm != 4:
            raise ValueError("option II belongs to Algorithm 4; add --algorithm 4")
        if (self.rule == "scored") != (self.judgments == "scores") or (
            self.rule == "scored" and self.oracle == "synthetic"
        ):
            raise ValueError(
                "rule scored, judgments scores and a language model that scores belong together; give all three"
            )
        if self.judgments == "scores" and self.judge_form != "scored":
            raise ValueError(
                "judgments scores need a judge that gives scores; leave --judge-form out"
            )
        if algorithms == (2,) and (self.tau or self.move_reference_every):
            raise ValueError(
                "tau and move-reference-every belong to Algorithms 3 and 4; choose one of them by --algorithm"
            )
        self.check_idle()
        check_ranges(
            self,
            iterations=(1, 10**5),
            samples=(1, 10_000),
            prompts_per_step=(1, 10_000),
            margin=(0, 1),
            prompts=(1, 72),
            sft_steps=(1, 10**6),
            vocabulary=(256, 10**5),
            layers=(1, 100),
            width=(8, 4096),
            max_new_tokens=(1, 4096),
            survey=(1, 10_000),
            judged=(1, 10_000),
            seed=(0, 10**9),
            move_reference_every=(0, 10**5),
            temperature=TEMPERATURES,
            threads=THREADS,
        )
        check_positive(sft_lr=self.sft_lr)
        self.transformer(2)  # checks its shape

    def check_idle(self) -> None:
        """ValueError naming what is given and would be of no use."""
        ranking = changed(self, "rule", "margin", "judgments", "replay")
        if self.algorithm in (1, 3) and ranking:
            raise ValueError(
                f"{ranking} belongs to Algorithms 2 and 4; Algorithms 1 and 3 train on all pairs"
            )
        if self.rule not in ("large-margin", "teacher") and changed(self, "margin"):
            raise ValueError(
                f"margin belongs to the rules large-margin and teacher, and rule is {self.rule}"
            )
        if self.oracle == "synthetic" and changed(self, "judged"):
            raise ValueError(
                "judged belongs to a judge that is a language model; add --oracle openai:MODEL"
            )
        teacher = changed(self, "teacher_url", "teacher_prices")
        if teacher and not self.teacher.startswith("openai"):
            raise ValueError(
                f"{teacher} belongs to a language model, and teacher is {self.teacher}; "
                "add --teacher openai:MODEL"
            )

    def algorithms(self) -> tuple[int, ...]:
        """Which to run one after the other; with a judge that costs money only one, if it is not
        said which Algorithm 2."""
        if self.algorithm is not None:
            return (self.algorithm,)
        return (2, 3) if self.oracle == "synthetic" else (2,)

    def stages(self) -> list[SimpleNamespace]:
        """The algorithms to run one after the other, each from the fine-tuned policy, with all
        their numbers."""
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        return [
            SimpleNamespace(**{**RECIPES[number], **chosen, "algorithm": number})
            for number in self.algorithms()
        ]

    def sampling(self, stage: SimpleNamespace) -> SamplingSettings:
        """The settings of the algorithm's loop."""
        trained = TRAINED if stage.algorithm in (1, 3) else None
        return SamplingSettings(
            stage.samples,
            stage.temperature,
            stage.top_p,
            stage.judgments,
            replay=stage.replay,
            prompts_per_step=stage.prompts_per_step,
            learning_rate=stage.lr,
            learning_rate_decay=stage.lr_decay,
            trained_samples=trained,
            seed=stage.seed,
        )

    def transformer(self, tokens: int) -> Config:
        """The shape of the transformer. Small embeddings: a word that changes the answer is told
        apart sooner."""
        return Config(
            tokens, self.layers, self.width, hidden=self.width * 11 // 4, embedding_std=0.025
        )

    def policy(self, tokenizer: tiktoken.Encoding) -> TextPolicy:
        """A new policy, with the weights that its seed draws."""
        torch.manual_seed(self.seed)
        model = Transformer(self.transformer(tokenizer.n_vocab)).to(self.device, DTYPES[self.dtype])
        return TextPolicy(model, tokenizer, self.max_new_tokens)


# --- The run --------------------------------------------------------------------------------------


def different(prompt: str, count: int, draw: random.Random) -> list[str]:
    """So many different answers of the student."""
    answers: dict[
        str, None
    ] = {}  # a set in the order of its making, which does not depend on the process
    while len(answers) < count:
        answers[student_answer(prompt, draw)] = None
    return list(answers)


def announce_judging(config: TextConfig, judging: Judging) -> None:
    """Say whom the run will ask how much, and what it will cost: with the student's and the
    synthetic teacher's answers in place of the samples and gold responses that are not known yet.
    """
    draw, plans = random.Random(0), {}
    if judging.teacher:
        plans["teacher"] = (
            judging.teacher,
            judging.teacher.endpoint.plan(judging.teacher.questions(PROMPTS)),
        )
    if isinstance(judging.judge, OpenAIJudge):

        def gold(x: str) -> str:
            return (
                "word " * judging.teacher.max_tokens if judging.teacher else teacher_answer(x, draw)
            )

        def plan(pairs: list[tuple[str, str, str]]) -> Plan:
            return judging.judge.endpoint.plan(judging.judge.questions(*zip(*pairs, strict=True)))

        def survey(before: bool) -> Plan:
            k, rows = (
                config.judged,
                [(x, gold(x), different(x, 2 * config.judged, draw)) for x in HELD_OUT],
            )
            pairs = [(x, y, best) for x, best, ys in rows for y in ys[:k]]
            return plan(
                pairs
                + [
                    (x, *two)
                    for x, _, ys in rows
                    for two in zip(ys[:k], ys[k:], strict=True)
                    if before
                ]
            )

        total = survey(before=False)
        for stage in config.stages():
            hard = stage.algorithm in (2, 4)
            groups = [
                (x, [*different(x, stage.samples, draw), *[gold(x)] * hard])
                for x in TRAINING[: config.prompts]
            ]
            training = plan([(x, *two) for x, ys in groups for two in combinations(ys, 2)])
            total += (training + survey(before=True)) * stage.iterations
        plans["judge"] = judging.judge, total
    elif config.dry_run:
        print("the judge is synthetic: nobody is asked, nothing is paid")
    for name, (part, plan_) in plans.items():
        print(f"{name}: {part.endpoint}")
        if part.endpoint.live:
            print(f"    the whole run: {plan_}; spent so far: {part.endpoint.spent()}")
    if plans and config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


def fine_tune(
    config: TextConfig, policy: TextPolicy, pairs: list[tuple[str, str]], run: Run
) -> None:
    """Supervised fine-tuning: Adam on -log pi(y|x) a token, 128 examples a step, from the run's
    last checkpoint on."""
    optimizer, steps = dno.adam(policy), config.sft_steps
    prompts, responses = (
        policy.prompt_tokens([x for x, _ in pairs]),
        policy.response_tokens([y for _, y in pairs]),
    )
    first = 0
    if run.state:
        run.expect(
            run.state,
            {"policy": policy.state_dict(), "optimizer": like(optimizer), "sft_steps": int},
        )
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])
        first = run.state["sft_steps"]
    for step in tqdm(
        range(first, steps),
        "fine-tuning",
        steps,
        initial=first,
        unit="step",
        disable=None,
        leave=False,
    ):
        chosen = random.Random(config.seed * 1_000_003 + step).sample(range(len(pairs)), 128)
        parts = [prompts[i] for i in chosen], [responses[i] for i in chosen]
        log_probs = token_log_prob({policy.model: 1.0}, *parts, policy.tokenizer.n_vocab)
        for group in optimizer.param_groups:
            group["lr"] = config.sft_lr * (1 - step / steps)
        optimizer.zero_grad()
        (-log_probs.sum() / sum(map(len, parts[1]))).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            run.checkpoint(
                {
                    "policy": policy.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "sft_steps": step + 1,
                }
            )


def loop_of(
    stage: SimpleNamespace,
    config: TextConfig,
    policy: TextPolicy,
    judging: Judging,
    validation: Validation,
    start: dno.SampledStart,
    remember: Remember,
) -> Iterator[dno.SampledIteration]:
    """The generator of the stage's algorithm."""
    data = judging.data(config, stage.algorithm in (2, 4))
    first = (*recalling(policy, judging.judge, data, remember), stage.eta, stage.iterations)
    regularized = {"tau": stage.tau, "move_reference_every": stage.move_reference_every}
    common = {"settings": config.sampling(stage), "start": start}
    if stage.algorithm in (1, 3):
        return algorithm3_sampled(*first, validation, **regularized, **common)
    rule = RULES[stage.rule](stage.margin)
    if stage.algorithm == 2:
        return dno.algorithm2(*first, rule, validation, **common)
    return algorithm4(*first, rule, validation, option=stage.option, **regularized, **common)


def show_responses(validation: Validation) -> None:
    """One response of each class that the survey found."""
    found = {
        classify(y): (x, y)
        for x, ys in zip(validation.prompts, validation.responses, strict=True)
        for y in ys
    }
    for kind, (x, y) in sorted(found.items()):
        tqdm.write(f"         {CLASSES[kind]:9} {x} -> {y!r}")


def train_stage(
    number: int,
    stage: SimpleNamespace,
    config: TextConfig,
    policy: TextPolicy,
    judging: Judging,
    validation: Validation,
    run: Run,
    base: dict[str, Tensor],
) -> None:
    """Run one algorithm from the fine-tuned policy or the run's last checkpoint on, a line and a
    checkpoint an iteration."""
    policy.load_state_dict(base)
    optimizer, after, hard = dno.adam(policy, momentum=0.0), None, stage.algorithm in (2, 4)
    done = sum(earlier.iterations for earlier in config.stages()[:number])
    validation.restore(None)
    if run.state and run.state.get("stage") == number:
        found = {name: type(value) for name, value in validation.state().items()}
        run.expect(
            run.state,
            {
                "policy": policy.state_dict(),
                "optimizer": like(optimizer),
                "round": dno.SampledIteration,
                "pi_ref": dict | None,
                "validation": found,
            },
        )
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])
        pi_ref = copy.deepcopy(policy)
        if run.state["pi_ref"]:
            pi_ref.load_state_dict(run.state["pi_ref"])
        after = replace(run.state["round"], pi_ref=pi_ref)
        validation.restore(run.state["validation"])
    loop = loop_of(
        stage,
        config,
        policy,
        judging,
        validation,
        dno.SampledStart(optimizer, after),
        lambda t, phase, *call: run.remember([number, t], phase, *call),
    )
    print(
        f"\nAlgorithm {stage.algorithm}, eta {stage.eta:g}"
        + (f", tau {stage.tau:g}" if stage.tau else "")
        + ":"
    )
    print(f"    t | {validation.HEADER} | well-formed | words |  T>S  S>T  S>S | loss")
    start = time.perf_counter()
    progress = tqdm(
        total=stage.iterations,
        initial=after.t if after else 0,
        unit="iteration",
        disable=None,
        leave=False,
    )
    for it in loop:
        row = {
            "iteration": done + it.t,
            "algorithm": stage.algorithm,
            "t": it.t,
            "seconds": time.perf_counter() - start,
            **round_numbers(it, hard),
            **validation.row(),
            "best_iteration": it.best.t,
            **judged_numbers(it, config, judging, hard),
        }
        write_round(
            run, done + it.t, it, hard, "score" if config.judgments == "scores" else "win_rate"
        )
        run.keep(f"policies/{done + it.t:03d}.pt", policy.state_dict())
        known = {
            name: None if value != value else value for name, value in row.items()
        }  # JSON has no NaN
        run.save(
            known,
            {
                "stage": number,
                "policy": policy.state_dict(),
                "optimizer": optimizer.state_dict(),
                "round": replace(it, pi_ref=None),
                "pi_ref": bare(it.pi_ref).state_dict() if it.pi_ref else None,
                "validation": validation.state(),
            },
        )
        kinds = " ".join(f"{row[f'pairs_{kind}']:4d}" for kind in KINDS) if hard else " " * 14
        progress.update()
        tqdm.write(
            f"{it.t:5d} | {validation.line(row)} | {1 - row['share_malformed']:11.3f} | {row['mean_length']:5.1f} | {kinds} | "
            f"{row['loss']:.4f}"
            + (f" | ${row['dollars']:.4f}" if row.get("dollars") is not None else "")
        )
        if it.t % 10 == 0:
            show_responses(validation)
        start = time.perf_counter()
    progress.close()


def fine_tuned(config: TextConfig, run: Run) -> TextPolicy:
    """The policy pi_1, fine-tuned or, on resumption, as it was; tokenizer.json and policies/base.pt
    are in the run's folder."""
    corpus = examples(config.seed)
    ranks = learn_byte_pairs((f"{x} {y}" for x, y in corpus), config.vocabulary)
    tokenizer = make_tokenizer(ranks)
    listed = {"split": SPLIT, "ranks": [token.hex() for token in ranks], "special": [ANSWER, END]}
    run.write("tokenizer.json", json.dumps(listed) + "\n")
    policy = config.policy(tokenizer)
    (run.out / "policies").mkdir(exist_ok=True)
    base = run.load("policies/base.pt")
    if base is None:
        fine_tune(config, policy, corpus, run)
        run.keep("policies/base.pt", policy.state_dict())
    else:
        run.expect({"pi_1": base}, {"pi_1": policy.state_dict()})
        policy.load_state_dict(base)
    return policy


def run_text(config: TextConfig) -> None:
    """The preset "text": see `TextConfig`. Writes what README.md lists under "The folder of a run"."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    check_device(config.device)
    asked = judging(config)
    run = None if config.dry_run else Run("text", config, CLASSES_KEPT)
    announce_judging(config, asked)
    if run is None:
        return
    policy = fine_tuned(config, run)
    base, synthetic = copy.deepcopy(policy.state_dict()), config.oracle == "synthetic"
    print(
        f"{sum(p.numel() for p in policy.parameters()):,} parameters, {policy.tokenizer.n_vocab} tokens; "
        f"fine-tuned after {time.perf_counter() - start:.0f} s. Writing to {config.out}"
    )
    if synthetic:
        validation = Validation(policy, RegisterJudge(), config.survey, config.seed, asked.teacher)
    else:
        validation = JudgedValidation(policy, asked, config)
    validation()
    first = validation.first()
    show_responses(validation)
    if run.state and run.state.get("stage", 0) >= len(config.stages()):
        raise BadInput(
            f"the checkpoint in {run.out} is of a run with more algorithms than this; choose another --out"
        )
    for number, stage in enumerate(config.stages()):
        if not run.state or run.state.get("stage", 0) <= number:
            train_stage(number, stage, config, policy, asked, validation, run, base)
    summary = {**summarise_text(config, run.metrics, first), **asked.spending()}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("text.png", text_figure(config, run.metrics, first))
    print(f"\n{time.perf_counter() - start:.0f} s. Figure and metrics: {run.out}")


# --- What comes out -------------------------------------------------------------------------------


HEADINGS = {
    "gap_last": "gap of last",
    "gap_average": "gap of mixture",
    "win_rate_vs_teacher": "P(> teacher)",
    "win_rate_vs_teacher_length_controlled": "at equal length",
    "share_malformed": "malformed",
    "mean_length": "words",
    "gap_last_over_first": "over pi_1's",
    "win_rate_vs_teacher_most": "P(> teacher), most",
}


def summarise_text(
    config: TextConfig, metrics: list[dict[str, Any]], first: dict[str, Any]
) -> dict[str, Any]:
    """The headline numbers, printed as a table: last iterates' as means over the last third of the
    iterations."""
    columns = [
        name
        for name in (
            "gap_last",
            "gap_average",
            "win_rate_vs_teacher",
            "win_rate_vs_teacher_length_controlled",
            "share_malformed",
            "mean_length",
        )
        if name in metrics[0]
    ]
    summary = {"config": asdict(config), **first, "stages": []}
    print("\nmeans over the last third of the iterations")
    for stage in config.stages():
        rows = [row for row in metrics if row["algorithm"] == stage.algorithm]
        tail = rows[-max(1, len(rows) // 3) :]
        found = {name: sum(row[name] for row in tail) / len(tail) for name in columns}
        if "gap_last" in columns:
            found |= {
                "gap_last_over_first": found["gap_last"] / first["gap_first"],
                "gap_average": rows[-1]["gap_average"],
            }
        found |= {"win_rate_vs_teacher_most": max(row["win_rate_vs_teacher"] for row in rows)}
        summary["stages"].append(
            {
                "algorithm": stage.algorithm,
                **found,
                "best_iteration": rows[-1]["best_iteration"],
                "seconds": sum(row["seconds"] for row in rows),
            }
        )
        if len(summary["stages"]) == 1:
            print("            | " + " | ".join(HEADINGS[name] for name in found))
        values = " | ".join(f"{value:{len(HEADINGS[name])}.3f}" for name, value in found.items())
        print(f"Algorithm {stage.algorithm} | {values}")
    return summary


def text_figure(
    config: TextConfig, metrics: list[dict[str, Any]], first: dict[str, Any]
) -> plt.Figure:
    """Win rate over the teacher and the gaps of last iterate and mixture (where they are not
    defined: the length of responses) against the iteration, a line an algorithm."""
    panels = {
        "win_rate_vs_teacher": "$P(\\pi_{t+1} \\succ$ teacher$)$",
        "gap_last": "gap of the last iterate $\\pi_{t+1}$",
        "gap_average": "gap of the mixture unif$(\\pi_1..\\pi_t)$",
    }
    if "gap_last" not in metrics[0]:
        panels = {
            "win_rate_vs_teacher": panels["win_rate_vs_teacher"],
            "mean_length": "words a response",
        }
    levels = {"win_rate_vs_teacher": (0.5, "1/2")}
    if "gap_floor" in first:
        levels |= dict.fromkeys(
            ("gap_last", "gap_average"),
            (first["gap_floor"], "noise floor: Nash itself, measured so"),
        )
    starts = {
        "win_rate_vs_teacher": first["win_rate_vs_teacher_first"],
        "gap_last": first.get("gap_first"),
    }
    names = {
        1: "Algorithm 1, sampled",
        2: "Algorithm 2",
        3: "Algorithm 3, sampled",
        4: "Algorithm 4",
    }
    figure, grid = plt.subplots(1, len(panels), figsize=(11 if len(panels) == 3 else 8, 3.6))
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        for stage, style in zip(config.stages(), ("-", "--"), strict=False):
            rows, start = (
                [row for row in metrics if row["algorithm"] == stage.algorithm],
                starts.get(column),
            )
            t, values = [row["t"] for row in rows], np.array([row[column] for row in rows])
            (line,) = axes.plot(
                [0, *t] if start is not None else t,
                [start, *values] if start is not None else values,
                style,
                label=names[stage.algorithm],
            )
            if f"{column}_interval" in metrics[0]:
                half = np.array([row[f"{column}_interval"] for row in rows])
                axes.fill_between(
                    t, values - half, values + half, color=line.get_color(), alpha=0.15, lw=0
                )
            if f"{column}_length_controlled" in metrics[0]:
                axes.plot(
                    t,
                    [row[f"{column}_length_controlled"] for row in rows],
                    "-.",
                    color="C1",
                    label="at equal length",
                )
        if column in levels:
            axes.axhline(levels[column][0], ls=":", lw=1, color="0.3", label=levels[column][1])
        axes.set(xlabel="iteration $t$", ylabel=label, ylim=(0, None))
        if column not in ("gap_last", "mean_length"):  # whose lines are those of its neighbour
            axes.legend(fontsize=8)
    return figure


PRESET = (TextConfig, run_text)

"""The settings of the preset "text"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tiktoken
import torch

from checks import check_positive
from experiments.rounds import RULES, Stage, check_scored
from experiments.settings import (
    DTYPES,
    TEMPERATURES,
    THREADS,
    JudgeOptions,
    changed,
    check_ranges,
    setting,
)
from model import Config, Transformer
from pairs import SamplingSettings
from regularized import check_regularization
from text import TextPolicy

TRAINED = 8  # of a prompt's samples in Algorithms 1 and 3; all of them are opponents


# by algorithm: what counts where the command line gives nothing
HARD = {
    "iterations": 30,
    "move_reference_every": 0,
    "samples": 5,
    "prompts_per_step": 12,
    "lr": 1e-3,
    "lr_decay": 0.8,
}
SOFT = {
    "iterations": 60,
    "move_reference_every": 0,
    "samples": 24,
    "prompts_per_step": 4,
    "lr": 7e-4,
    "lr_decay": 0.5,
}
RECIPES: dict[int, dict[str, Any]] = {
    1: {**SOFT, "eta": 1.0, "tau": 0.0},
    2: {**HARD, "eta": 8.0, "tau": 0.0},
    3: {**SOFT, "eta": 0.25, "tau": 0.125, "move_reference_every": 5},
    4: {**HARD, "eta": 8.0, "tau": 0.4},
}


@dataclass
class TextConfig(JudgeOptions):
    """text: supervised fine-tuning on a small world of text, then Algorithm 2, then a regression
    that approaches Nash."""

    algorithm: int | None = setting(
        None,
        "2, 4: contrast sampled pairs; 1, 3: regress on soft targets; when left out 2, then 3 if "
        "the judge is synthetic",
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
        "rank by {0, 1} samples of P, as in Algorithm 2; by P; or, with rule scored, by a judge's "
        "points",
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
    momentum: float = setting(0.0, "in [0, 1), Adam's beta_1")
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
    out: str = setting(None, "folder of the run (default: runs/text-SEED)")
    resume: bool = setting(
        False, "go on with the run in --out, to the same result as if it had never stopped"
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(2, "CPU threads")

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/text-{self.seed}"
        self.check_judge()
        self.check_stages()
        self.check_choices()
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

    def check_stages(self) -> None:
        """ValueError naming what is out of range in the numbers of an algorithm."""
        own = ("samples", "temperature", "top_p", "prompts_per_step", "lr", "eta", "tau")
        given = [name for name in own if getattr(self, name) is not None]
        if len(self.algorithms()) > 1 and given:
            fault = f"{given[0]} differs between algorithms"
            raise ValueError(f"{fault}; add --algorithm, or leave it out")
        check_ranges(self, eta=(0, 10**6), lr=(0, 10), sft_lr=(0, 10))
        for stage in self.stages():
            check_positive(eta=stage.eta, iterations=stage.iterations)
            check_regularization(stage.tau, stage.eta)
            if not stage.hard and stage.settings.samples < 2:
                expected = "expected at least 2, each other's opponents"
                raise ValueError(f"samples is {stage.settings.samples}; {expected}")

    def check_choices(self) -> None:
        """ValueError naming options that do not fit together."""
        if self.option != "I" and self.algorithm != 4:
            raise ValueError("option II belongs to Algorithm 4; add --algorithm 4")
        check_scored(self)
        if self.judgments == "scores" and self.judge_form != "scored":
            needed = "judgments scores need a judge that gives scores"
            raise ValueError(f"{needed}; leave --judge-form out")
        if self.algorithms() == (2,) and (self.tau or self.move_reference_every):
            fault = "tau and move-reference-every belong to Algorithms 3 and 4"
            raise ValueError(f"{fault}; choose one of them by --algorithm")

    def check_idle(self) -> None:
        """ValueError naming what is given and has no effect."""
        ranking = changed(self, "rule", "margin", "judgments", "replay")
        if self.algorithm in (1, 3) and ranking:
            fault = f"{ranking} belongs to Algorithms 2 and 4"
            raise ValueError(f"{fault}; Algorithms 1 and 3 train on all pairs")
        if self.rule not in ("large-margin", "teacher") and changed(self, "margin"):
            fault = "margin belongs to the rules large-margin and teacher"
            raise ValueError(f"{fault}, and rule is {self.rule}")
        if self.oracle == "synthetic" and changed(self, "judged"):
            fault = "judged belongs to a judge that is a language model"
            raise ValueError(f"{fault}; add --oracle openai:MODEL")
        teacher = changed(self, "teacher_url", "teacher_prices")
        if teacher and not self.teacher.startswith("openai"):
            fault = f"{teacher} belongs to a language model, and teacher is {self.teacher}"
            raise ValueError(f"{fault}; add --teacher openai:MODEL")

    def algorithms(self) -> tuple[int, ...]:
        """Which to run one after the other. If none is given, a judge that costs money has
        Algorithm 2 only."""
        if self.algorithm is not None:
            return (self.algorithm,)
        return (2, 3) if self.oracle == "synthetic" else (2,)

    def stages(self) -> list[Stage]:
        """The algorithms to run one after the other, each from the fine-tuned policy."""
        return [self.stage(algorithm) for algorithm in self.algorithms()]

    def stage(self, algorithm: int) -> Stage:
        """An algorithm with its numbers: those that are given, else its recipe's."""
        recipe = RECIPES[algorithm]
        given = {name: getattr(self, name, None) for name in recipe}
        numbers = recipe | {name: value for name, value in given.items() if value is not None}
        settings = SamplingSettings(
            numbers["samples"],
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.judgments,
            replay=self.replay,
            prompts_per_step=numbers["prompts_per_step"],
            learning_rate=numbers["lr"],
            learning_rate_decay=numbers["lr_decay"],
            trained_samples=None if algorithm in (2, 4) else TRAINED,
            seed=self.seed,
        )
        names = ("iterations", "eta", "tau", "move_reference_every")
        return Stage(
            algorithm,
            **{name: numbers[name] for name in names},
            option=self.option,
            rule=RULES[self.rule](self.margin),
            momentum=self.momentum,
            settings=settings,
        )

    def transformer(self, tokens: int) -> Config:
        """The shape of the transformer. Its embeddings are small: it learns sooner to tell apart
        words that change the answer."""
        hidden = self.width * 11 // 4
        return Config(tokens, self.layers, self.width, hidden=hidden, embedding_std=0.025)

    def policy(self, tokenizer: tiktoken.Encoding) -> TextPolicy:
        """A new policy, with the weights that its seed draws."""
        torch.manual_seed(self.seed)
        model = Transformer(self.transformer(tokenizer.n_vocab)).to(self.device, DTYPES[self.dtype])
        return TextPolicy(model, tokenizer, self.max_new_tokens)

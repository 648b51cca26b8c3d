"""The settings of the preset "text"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import tiktoken
import torch

from experiments.judging import by_language_model, prices
from experiments.rounds import RULES, Stage
from experiments.sampled_settings import SampledOptions
from experiments.settings import DTYPES, RATES, RunOptions, setting
from model import Config, Transformer
from oracle import RegisterJudge
from pairs import SamplingSettings
from regularized import check_regularization
from text import TextPolicy

TRAINED = 8  # of a prompt's samples in Algorithms 1 and 3; all of them are opponents


HARD: dict[str, Any] = {
    "samples": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompts_per_step": 12,
    "lr": 1e-3,
    "lr_decay": 0.8,
    "iterations": 30,
}
SOFT: dict[str, Any] = {
    "samples": 24,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompts_per_step": 4,
    "lr": 7e-4,
    "lr_decay": 0.5,
    "iterations": 60,
}
RECIPES: dict[int, dict[str, Any]] = {  # by algorithm: what counts where nothing is given
    1: {**SOFT, "eta": 1.0, "tau": 0.0, "move_reference_every": 0},
    2: {**HARD, "eta": 8.0, "tau": 0.0, "move_reference_every": 0},
    3: {**SOFT, "eta": 0.25, "tau": 0.125, "move_reference_every": 5},
    4: {**HARD, "eta": 8.0, "tau": 0.4, "move_reference_every": 0},
}


def recipes(name: str) -> str:
    """The values of a field in `RECIPES`, for the help."""
    values = [f"{recipe[name]:g}" for recipe in RECIPES.values()]
    return f"by algorithm {', '.join(values)}" if len({*values}) > 1 else values[0]


@dataclass
class WorldOptions(RunOptions):
    """The small world of text, and the policy that is fine-tuned on it."""

    prompts: int = setting(
        72, "X, prompts an iteration; 24 more are held out", "data", common=True, within=(1, 72)
    )
    prompts_per_step: int | None = setting(
        None, "whose pairs make up a batch", "algorithm", within=(1, 10_000)
    )
    survey: int = setting(
        32, "samples of each held-out prompt to measure by", "data", within=(1, 10_000)
    )
    sft_steps: int = setting(
        400, "Adam steps of fine-tuning, 128 examples each", "model", within=(1, 10**6)
    )


@dataclass
class TextConfig(WorldOptions, SampledOptions):
    """text: supervised fine-tuning on a small world of text, then Algorithm 2, then a regression
    that approaches Nash."""

    preset: ClassVar[str] = "text"
    synthetic: ClassVar[type] = RegisterJudge
    algorithm: int | None = setting(None, otherwise="2, then 3 if nobody is asked")
    iterations: int | None = setting(None, otherwise=recipes("iterations"))
    eta: float | None = setting(None, otherwise=recipes("eta"))
    tau: float | None = setting(None, otherwise=recipes("tau"))
    move_reference_every: int | None = setting(None, otherwise=recipes("move_reference_every"))
    samples: int | None = setting(None, otherwise=recipes("samples"))
    temperature: float | None = setting(None, otherwise=recipes("temperature"))
    top_p: float | None = setting(None, otherwise=recipes("top_p"))
    lr: float | None = setting(None, otherwise=recipes("lr"))
    prompts_per_step: int | None = setting(None, otherwise=recipes("prompts_per_step"))
    max_new_tokens: int = setting(24, within=(1, 4096))
    sft_lr: float = setting(6e-3, "Adam's, in fine-tuning; falls to 0", "model", within=RATES)
    vocabulary: int = setting(640, "most byte pairs to learn", "model", within=(256, 10**5))
    layers: int = setting(2, "of the transformer", "model", within=(1, 100))
    width: int = setting(64, "channels of the transformer", "model", within=(8, 4096))
    teacher: str = setting(
        "synthetic", "who writes gold responses, as --oracle", "judge", common=True
    )
    teacher_url: str | None = setting(
        None, "the teacher's endpoint", "judge", may_differ=True, otherwise="--judge-url"
    )
    teacher_prices: str | None = setting(
        None,
        "as --judge-prices",
        "judge",
        may_differ=True,
        otherwise="these, if the model is the judge's",
    )

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        super().__post_init__()
        prices(self.teacher_prices or "0,0")
        if self.teacher_url and not self.teacher.startswith("openai"):
            fault = f"teacher-url belongs to a language model, and teacher is {self.teacher}"
            raise ValueError(f"{fault}; add --teacher openai:MODEL")
        own = ("samples", "temperature", "top_p", "prompts_per_step", "lr", "eta", "tau")
        if len(self.algorithms()) > 1 and self.given(*own):
            fault = f"{self.given(*own)[0]} differs between algorithms"
            raise ValueError(f"{fault}; add --algorithm, or leave it out")
        for stage in self.stages():
            check_regularization(stage.tau, stage.eta)
            if not stage.hard and stage.settings.samples < 2:
                expected = "expected at least 2, each other's opponents"
                raise ValueError(f"samples is {stage.settings.samples}; {expected}")
        self.transformer(2)  # checks its shape

    def sources(self) -> dict[str, str]:
        """Who judges and who teaches."""
        return super().sources() | {"teacher": self.teacher}

    def idle(self) -> dict[str, str]:
        """Adds what belongs to a language model as judge or teacher."""
        idle = super().idle()
        if self.oracle == "synthetic":
            idle["judged"] = "oracle is synthetic, a table"
        if not self.teacher.startswith("openai"):
            idle["teacher_prices"] = f"teacher is {self.teacher}"
        return idle

    def algorithms(self) -> tuple[int, ...]:
        """Which to run one after the other. If none is given, a judge that costs money has
        Algorithm 2 only."""
        if self.algorithm is not None:
            return (self.algorithm,)
        return (2,) if by_language_model(self.oracle) else (2, 3)

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
            numbers["temperature"],
            numbers["top_p"],
            self.judgments,
            replay=self.replay,
            prompts_per_step=numbers["prompts_per_step"],
            learning_rate=numbers["lr"],
            learning_rate_decay=numbers["lr_decay"],
            trained_samples=None if algorithm in (2, 4) else TRAINED,
            seed=self.seed,
        )
        return Stage(
            algorithm,
            numbers["iterations"],
            numbers["eta"],
            numbers["tau"],
            self.option,
            numbers["move_reference_every"],
            RULES[self.rule](self.margin),
            self.momentum,
            settings,
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

"""The settings of the preset "llm"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist

from experiments.rounds import RULES, Stage
from experiments.sampled_settings import SampledOptions
from experiments.settings import COMPUTE, MOST, setting
from judge.synthetic import TasteJudge
from pairs import SamplingSettings
from regularized import check_regularization


@dataclass
class LlmConfig(SampledOptions):
    """llm: Algorithm 2 (or 4, or 1 and 3 from samples) on a real chat model, with your prompts and
    your judge."""

    preset: ClassVar[str] = "llm"
    synthetic: ClassVar[type] = TasteJudge
    algorithm: int = 2
    iterations: int = setting(3, "T; each has its own part of the prompts")
    eta: float = setting(0.1, "larger is slower; the paper: 0.05 to 0.1")
    tau: float = 0.0
    move_reference_every: int = 0
    margin: float = 0.2  # few pairs of a small model have 0.4
    judgments: str = "probabilities"
    samples: int = setting(5, within=(2, 10_000))
    temperature: float = 0.7
    top_p: float = 0.95
    lr: float = 5e-5  # the paper's
    momentum: float = 0.9
    max_new_tokens: int = 64
    dtype: str = setting("bfloat16", "of computation; weights are float32", choices=tuple(COMPUTE))
    threads: int = setting(2, "of the CPU, for all processes of a machine")
    model: str = setting(
        "",
        "a Hugging Face directory or a GGUF file of the Llama family; required",
        "model",
        common=True,
    )
    prompts: str = setting(
        "prompts/general.jsonl",
        'lines {"prompt": ..., "gold": optional, "split": optional}',
        "data",
        common=True,
    )
    train_prompts: int | None = setting(
        None, "how many to train on, the first ones", "data", otherwise="all", within=(1, MOST)
    )
    held_out: int = setting(
        24, "for validation: of split validation, or the last", "data", within=(2, MOST)
    )
    max_prompt_tokens: int = setting(512, "longer prompts are refused", "data", within=(1, MOST))
    chat_format: str = setting(
        "model", "its chat template, or the plain prompt", "model", choices=("model", "plain")
    )
    low_rank: int = setting(
        0, "r of low-rank terms (LoRA) to train in place of weights", "model", within=(0, MOST)
    )
    batch_size: int = setting(
        64, "pairs a step, about, as in the paper", "algorithm", common=True, within=(1, MOST)
    )
    prompts_at_once: int = setting(
        4, "prompts whose responses are scored together", "hardware", within=(1, MOST)
    )
    sample_batch: int = setting(64, "responses sampled together", "hardware", within=(1, MOST))
    checkpointing: bool = setting(
        False, "compute activations twice rather than keep them", "hardware", may_differ=True
    )
    compile: bool = setting(
        False, "compile the blocks for training (torch.compile; cuda)", "hardware", may_differ=True
    )
    fsdp: bool = setting(
        False,
        "under torchrun, cut weights, gradients and Adam's state into parts",
        "hardware",
        may_differ=True,
    )

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        super().__post_init__()
        check_regularization(self.tau, self.eta)
        if not self.model:
            expected = "give --model with a Hugging Face directory or a .gguf file"
            raise ValueError(f"model is missing; {expected}")
        if self.compile and not self.device.startswith("cuda"):
            fault = f"compile is for a GPU, and device is {self.device}"
            raise ValueError(f"{fault}; add --device cuda")
        if self.fsdp and not dist.is_torchelastic_launched():
            fault = "fsdp cuts the model into parts for several processes"
            raise ValueError(f"{fault}; start them by torchrun --nproc-per-node N")

    def stage(self, processes: int = 1) -> Stage:
        """The algorithm with its numbers.

        A batch is of prompts that have about `batch_size` pairs, at K pairs a prompt. Each of the
        processes scores those of `prompts_at_once` prompts together."""
        settings = SamplingSettings(
            self.samples,
            self.temperature,
            self.top_p,
            self.judgments,
            replay=self.replay,
            prompts_per_step=max(1, round(self.batch_size / self.samples)),
            learning_rate=self.lr,
            seed=self.seed,
            max_grad_norm=1.0,
            use_recorded=self.dtype == "float32",
            prompts_at_once=self.prompts_at_once * processes,
        )
        return Stage(
            self.algorithm,
            self.iterations,
            self.eta,
            self.tau,
            self.option,
            self.move_reference_every,
            RULES[self.rule](self.margin),
            self.momentum,
            settings,
        )

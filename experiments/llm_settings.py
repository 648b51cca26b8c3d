"""The settings of the preset "llm"."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from checks import check_positive
from experiments.rounds import RULES, Stage, check_scored
from experiments.settings import MOST, TEMPERATURES, THREADS, JudgeOptions, check_ranges, setting
from pairs import SamplingSettings
from regularized import check_regularization


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
    option: str = setting(
        "I",
        "of Algorithm 4: samples of pi_t (I) or of its mixture with pi_ref by token (II)",
        ("I", "II"),
    )
    move_reference_every: int = setting(0, "iterations; 0: never")
    momentum: float = setting(0.9, "in [0, 1), Adam's beta_1")
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
    out: str = setting(None, "folder of the run (default: runs/llm-SEED)")
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
        "r of the low-rank terms (LoRA) that are trained in place of the weights, at most the "
        "width",
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
            expected = "give --model with a Hugging Face directory or a .gguf file"
            raise ValueError(f"model is missing; {expected}")
        check_positive(eta=self.eta, lr=self.lr, temperature=self.temperature)
        check_regularization(self.tau, self.eta)
        if self.tau and self.algorithm in (1, 2):
            fault = f"tau belongs to Algorithms 3 and 4, and algorithm is {self.algorithm}"
            raise ValueError(fault)
        check_scored(self)
        counts = (
            "iterations max_new_tokens max_prompt_tokens judged batch_size prompts_at_once "
            "sample_batch train_prompts"
        ).split()
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
        self.check_machine()
        self.stage()  # checks its numbers

    def check_machine(self) -> None:
        """ValueError naming an option that this machine or number of processes does not allow."""
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

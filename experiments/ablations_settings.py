"""The settings of the preset "ablations"."""

from __future__ import annotations

from dataclasses import dataclass

from checks import check_positive
from experiments.ablation_methods import METHODS, Setting
from experiments.rounds import RULES, Stage
from experiments.settings import DTYPES, THREADS, changed, check_ranges, setting
from experiments.text_settings import TextConfig
from pairs import SamplingSettings
from regularized import check_regularization


@dataclass
class AblationsConfig:
    """ablations: the paper's comparisons on the world of text: each method tuned on its own seeds,
    then run on fresh ones."""

    algorithm: int | None = setting(
        None, "only the methods that are variants of this algorithm", choices=(2, 3, 4)
    )
    iterations: int = setting(40, "T of the reported runs")
    seeds: int = setting(5, "fresh seeds to report")
    tuning_iterations: int = setting(20, "T of the tuning runs")
    tuning_seeds: int = setting(
        2, "seeds to tune on; the settings tried are the same number for each method"
    )
    eta: float | None = setting(None, "> 0; fixes eta and eta~ instead of tuning them")
    tau: float | None = setting(
        None, "in [0, eta]; of the regularised methods (eta / 20, and eta / 2 with soft targets)"
    )
    margin: float = setting(
        0.4, "in [0, 1], least difference of the win rates of a pair, where there is a margin"
    )
    prompts: int = setting(48, "X, prompts an iteration")
    prompts_per_step: int = setting(8, "whose pairs make up a batch")
    survey: int = setting(24, "samples of each held-out prompt by which a policy is measured")
    sft_steps: int = setting(
        400, "Adam steps of supervised fine-tuning of the policy that all start from"
    )
    seed: int = setting(
        0, "of the world: the corpus and the fine-tuned policy, the same for all runs"
    )
    out: str = setting(None, "folder (default: runs/ablations-SEED)")
    resume: bool = setting(False, "go on: runs that are finished are not repeated")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(1, "CPU threads of each run")
    jobs: int = setting(2, "runs at a time")

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/ablations-{self.seed}"
        check_ranges(
            self,
            iterations=(1, 10**5),
            seeds=(2, 1000),
            tuning_iterations=(1, 10**5),
            tuning_seeds=(1, 1000),
            prompts_per_step=(1, 10_000),
            threads=THREADS,
            jobs=THREADS,
        )
        if self.eta is not None:
            check_positive(eta=self.eta)
            check_ranges(self, eta=(0, 10**6))
        if self.tau is not None and self.algorithm == 2:
            methods = "the regularised methods, variants of Algorithms 3 and 4"
            raise ValueError(f"tau belongs to {methods}; leave it out")
        if self.algorithm == 3 and changed(self, "margin"):
            raise ValueError("margin belongs to variants of Algorithms 2 and 4; leave it out")
        for label, settings in settings_to_try(self).items():
            if self.tau is not None and METHODS[label].algorithm != 2:
                for _, eta in settings:
                    check_regularization(self.tau, eta)
        self.world()

    def stage(self, lr: float, eta: float, seed: int, iterations: int) -> Stage:
        """Algorithm 2 with these numbers, of which the methods are variants."""
        settings = SamplingSettings(
            temperature=1.0,
            top_p=1.0,
            learning_rate=lr,
            prompts_per_step=self.prompts_per_step,
            seed=seed,
        )
        rule = RULES["large-margin"](self.margin)
        return Stage(2, iterations, eta, 0.0, "I", 0, rule, 0.0, settings)

    def world(self) -> TextConfig:
        """The text preset's config of the policy that all methods start from."""
        names = "prompts survey sft_steps margin seed out device dtype threads".split()
        return TextConfig(**{name: getattr(self, name) for name in names})


def settings_to_try(config: AblationsConfig) -> dict[str, tuple[Setting, ...]]:
    """The (lr, eta) to tune each method over."""
    methods = {
        label: method.settings
        for label, method in METHODS.items()
        if config.algorithm in (None, method.algorithm)
    }
    if config.eta is None:
        return methods
    return {
        label: tuple(dict.fromkeys((lr, config.eta) for lr, _ in settings))[:2]
        for label, settings in methods.items()
    }

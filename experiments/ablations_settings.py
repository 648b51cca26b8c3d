"""The settings of the preset "ablations"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.ablation_methods import METHODS, Setting
from experiments.rounds import RULES, Stage
from experiments.settings import ETAS, SHARE, THREADS, setting
from experiments.text_settings import TextConfig, WorldOptions
from pairs import SamplingSettings
from regularized import check_regularization


@dataclass
class AblationsConfig(WorldOptions):
    """ablations: the paper's comparisons on the world of text: each method tuned on its own seeds,
    then run on fresh ones."""

    preset: ClassVar[str] = "ablations"
    algorithm: int | None = setting(
        None,
        "only the methods that are variants of this algorithm",
        "algorithm",
        common=True,
        choices=(2, 3, 4),
        otherwise="all",
    )
    iterations: int = setting(
        40, "T of the reported runs", "algorithm", common=True, within=(1, 10**5)
    )
    seeds: int = setting(5, "fresh seeds to report", "algorithm", common=True, within=(2, 1000))
    tuning_iterations: int = setting(20, "T of the tuning runs", "algorithm", within=(1, 10**5))
    tuning_seeds: int = setting(
        2, "seeds to try each of a method's settings on", "algorithm", within=(1, 1000)
    )
    eta: float | None = setting(
        None,
        "fixes eta and eta~ instead of tuning them",
        "algorithm",
        within=ETAS,
        otherwise="tuned",
    )
    tau: float | None = setting(
        None,
        "of the regularised methods, at most eta",
        "algorithm",
        within=(0, ETAS[1]),
        otherwise="eta / 20, eta / 2",
    )
    margin: float = setting(
        0.4, "least difference of the win rates of a pair", "algorithm", within=SHARE
    )
    prompts: int = 48
    prompts_per_step: int = 8
    survey: int = 24
    seed: int = setting(0, "of the corpus and the policy that all runs start from")
    threads: int = setting(1, "of the CPU, of each run")
    jobs: int = setting(
        2, "runs at a time", "hardware", common=True, may_differ=True, within=THREADS
    )

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        super().__post_init__()
        if self.tau is not None and self.algorithm == 2:
            methods = "the regularised methods, variants of Algorithms 3 and 4"
            raise ValueError(f"tau belongs to {methods}; leave it out")
        for label, settings in settings_to_try(self).items():
            if self.tau is not None and METHODS[label].algorithm != 2:
                for _, eta in settings:
                    check_regularization(self.tau, eta)

    def idle(self) -> dict[str, str]:
        """The margin, where no method has one."""
        return {"margin": "Algorithm 3 trains on all pairs"} if self.algorithm == 3 else {}

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
        names = "prompts survey sft_steps seed out device dtype threads".split()
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

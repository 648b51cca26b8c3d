"""The settings that the presets "text" and "llm" share: algorithms with sampled responses."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.judging import JudgeOptions, by_language_model
from experiments.rounds import RULES
from experiments.settings import ETAS, MOST, RATES, SHARE, TEMPERATURES, RunOptions, setting


@dataclass
class SampledOptions(JudgeOptions, RunOptions):
    """Algorithm 2 or 4, or 1 and 3 with r_t estimated from samples."""

    algorithm: int | None = setting(
        None,
        "2, 4: contrast sampled pairs; 1, 3: regress on soft targets",
        "algorithm",
        common=True,
        choices=(1, 2, 3, 4),
    )
    iterations: int | None = setting(None, "T", "algorithm", common=True, within=(1, 10**5))
    eta: float | None = setting(
        None, "larger is slower; eta~ in 2 and 4", "algorithm", common=True, within=ETAS
    )
    tau: float | None = setting(
        None, "pull to pi_ref in Algorithms 3 and 4, up to eta", "algorithm", within=(0, ETAS[1])
    )
    option: str = setting(
        "I",
        "Algorithm 4 samples pi_t or, II, its mixture with pi_ref",
        "algorithm",
        choices=("I", "II"),
    )
    move_reference_every: int | None = setting(
        None, "iterations until pi_ref becomes pi_t; 0: never", "algorithm", within=(0, 10**5)
    )
    rule: str = setting(
        "large-margin", "which pairs Algorithms 2 and 4 train on", "algorithm", choices=tuple(RULES)
    )
    margin: float = setting(
        0.4, "least difference of the win rates of a pair", "algorithm", within=SHARE
    )
    judgments: str = setting(
        "outcomes",
        "what ranks: {0, 1} samples of P, as in line 5; P itself; points",
        "algorithm",
        choices=("outcomes", "probabilities", "scores"),
    )
    samples: int | None = setting(
        None, "K, responses a prompt", "algorithm", common=True, within=(1, 10_000)
    )
    temperature: float | None = setting(
        None, "of sampling, the paper's is 0.7", "algorithm", within=TEMPERATURES
    )
    top_p: float | None = setting(
        None, "of sampling, the paper's is 0.95", "algorithm", within=(1e-3, 1)
    )
    replay: float = setting(
        0.3, "share of the last pairs to train on again", "algorithm", within=SHARE
    )
    lr: float | None = setting(
        None, "Adam's, in iteration 1; later ones have less", "algorithm", common=True, within=RATES
    )
    momentum: float = setting(0.0, "Adam's beta1", "algorithm", within=(0, 0.9999))
    max_new_tokens: int = setting(
        24, "tokens after which a response is cut off", "model", within=(1, MOST)
    )
    judged: int = setting(
        2, "samples of each held-out prompt that are judged", "judge", within=(1, 10_000)
    )

    def __post_init__(self) -> None:
        """Refuse what contradicts the algorithm or the judge. ValueError naming the field."""
        super().__post_init__()
        algorithms = {*self.algorithms()}
        if not algorithms & {3, 4} and (self.tau or self.move_reference_every):
            fault = "tau and move-reference-every belong to Algorithms 3 and 4"
            raise ValueError(f"{fault}; choose one of them by --algorithm")
        if self.option == "II" and 4 not in algorithms:
            raise ValueError("option II belongs to Algorithm 4; add --algorithm 4")
        scored = (self.rule == "scored", self.judgments == "scores")
        if any(scored):
            fits = all(scored) and by_language_model(self.oracle) and bool(algorithms & {2, 4})
            if not fits or self.judge_form != "scored":
                needed = "rule scored, judgments scores, Algorithm 2 or 4 and a language model"
                raise ValueError(f"{needed} of judge-form scored belong together; give all of them")

    def algorithms(self) -> tuple[int, ...]:
        """Which to run one after the other."""
        return () if self.algorithm is None else (self.algorithm,)

    def idle(self) -> dict[str, str]:
        """The fields that have no effect with this algorithm or rule."""
        idle = super().idle()
        if not {2, 4} & {*self.algorithms()}:
            ranking = ("rule", "margin", "judgments", "replay")
            idle |= dict.fromkeys(ranking, "Algorithms 1 and 3 train on all pairs")
        elif self.rule not in ("large-margin", "teacher"):
            idle["margin"] = f"rule is {self.rule}"
        if self.tau == 0:
            idle |= dict.fromkeys(("option", "move_reference_every"), "tau is 0")
        return idle

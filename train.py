"""Run the algorithms: `python train.py [PRESET] [--field value ...]`.

The preset "game" is here, Algorithm 1 (or 3) on a game whose Nash policy is known. `python train.py
--help` lists the others.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import dno
from checks import check_positive
from experiments.folder import Run, claimed, like
from experiments.game import (
    MOVING_ETA,
    Comparisons,
    Game,
    comparisons,
    default_game,
    game_in,
    measure,
    summarise,
)
from experiments.settings import (
    DTYPES,
    THREADS,
    BadInput,
    changed,
    check_device,
    check_ranges,
    guarded,
    hear_ctrl_c,
    leave_team,
    parse,
    setting,
)
from judge.ledger import Stopped
from model import Config, TabularPolicy, Transformer, TransformerPolicy
from regularized import algorithm3, check_regularization

# --- Settings of the preset "game" ----------------------------------------------------------------


@dataclass
class GameConfig:
    """game: Algorithm 1 (or 3) with a transformer policy on an enumerable intransitive game; every
    number reported is exact."""

    game: str | None = setting(
        None, "FILE.npz with P [X, Y, Y] and optionally rho [X]; the default game when left out"
    )
    num_prompts: int | None = setting(None, "X, prompts of the default game (8 when left out)")
    vocabulary: int | None = setting(
        None, "V, words, Y = V^L (6 in the default game; without it, FILE gets a table)"
    )
    length: int | None = setting(None, "L, words of a response (3 in the default game)")
    algorithm: int = setting(1, "1: DNO; 3: regularised DNO (appendix A)", choices=(1, 3))
    option: str = setting(
        "I",
        "of Algorithm 3: rewards against pi_t (I) or against the mixture with pi_ref (II)",
        ("I", "II"),
    )
    iterations: int = setting(100, "T")
    eta: float = setting(
        None, "> 0, divides the rewards: larger is slower (1.0 for Algorithm 1, 0.25 for 3)"
    )
    tau: float = setting(
        None, "in [0, eta], pull towards pi_ref in Algorithm 3 (eta / 2 when left out)"
    )
    move_reference_every: int = setting(
        0, "iterations after which Algorithm 3 sets pi_ref to the current policy; 0: never"
    )
    mu: str = setting(
        "on-policy", "where both responses of a training pair come from", tuple(dno.MU)
    )
    steps: int = setting(24, "Adam steps an iteration")
    pairs: int = setting(2048, "tuples (x, y1, y2) a step; N of Theorem 1 is steps * pairs")
    lr: float = setting(
        5e-3, "Adam's learning rate at the start of each iteration; falls linearly to 0 within it"
    )
    tolerance: float = setting(
        0.0, "nats; end an iteration early when the loss is this close to its lower bound"
    )
    layers: int = setting(2, "of the transformer")
    width: int = setting(64, "channels of the transformer")
    seed: int = setting(0, "of the default game, the transformer's weights and the pairs drawn")
    out: str = setting(None, "folder of the run (default: runs/game-SEED)")
    resume: bool = setting(
        False, "go on with the run in --out, to the same result as if it had never stopped"
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting(
        "float32", "of the transformer; exact quantities are float64 always", tuple(DTYPES)
    )
    threads: int = setting(1, "CPU threads; for a model this small two are no faster than one")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields, and check every number.

        ValueError naming the field."""
        self.check_what_belongs_together()
        self.eta = self.eta if self.eta is not None else {1: 1.0, 3: MOVING_ETA}[self.algorithm]
        self.tau = self.tau if self.tau is not None else {1: 0.0, 3: self.eta / 2}[self.algorithm]
        self.out = self.out or f"runs/game-{self.seed}"
        check_ranges(
            self,
            num_prompts=(1, 10_000),
            vocabulary=(1, 5_000),
            length=(1, 12),
            iterations=(1, 10**5),
            steps=(1, 10**6),
            pairs=(1, 10**7),
            layers=(1, 100),
            width=(1, 4096),
            seed=(0, 10**9),
            threads=THREADS,
            tolerance=(0, 10),
            move_reference_every=(0, 10**5),
        )
        check_ranges(self, eta=(0, 10**6), lr=(0, 10))
        check_positive(eta=self.eta, lr=self.lr)
        check_regularization(self.tau, self.eta)
        self.check_size()
        self.transformer(1)  # checks its shape

    def check_what_belongs_together(self) -> None:
        """ValueError naming a field that is given without what it belongs to."""
        if self.game is not None and self.num_prompts is not None:
            raise ValueError(
                "num-prompts belongs to the default game; the game in a file has its own, so leave "
                "it out"
            )
        if self.game is None:
            self.num_prompts = 8 if self.num_prompts is None else self.num_prompts
            self.vocabulary = 6 if self.vocabulary is None else self.vocabulary
            self.length = 3 if self.length is None else self.length
        if (self.vocabulary is None) != (self.length is None):
            raise ValueError(
                "vocabulary and length go together: give both (a transformer) or neither (a table)"
            )
        if self.vocabulary is None and changed(self, "layers", "width"):
            raise ValueError(
                f"{changed(self, 'layers', 'width')} belong to a transformer, and without "
                "--vocabulary and --length the game in a file gets a table; give these, or leave "
                "the others out"
            )
        if self.algorithm == 1 and (self.tau or self.move_reference_every or self.option != "I"):
            raise ValueError(
                "tau, option and move-reference-every belong to Algorithm 3; add --algorithm 3"
            )

    def check_size(self) -> None:
        """ValueError if the table P is too large."""
        if self.responses is not None and self.responses > 5_000:
            raise ValueError(
                f"{self.vocabulary}^{self.length} responses are too many for a table P; "
                "expected at most 5,000"
            )
        if self.num_prompts is not None and self.responses is not None:
            entries = self.num_prompts * self.responses**2
            if entries > 10**9:
                raise ValueError(
                    f"num_prompts is {self.num_prompts}, which makes P of {entries:,} entries; "
                    "expected at most 10^9"
                )

    @property
    def responses(self) -> int | None:
        """Y = V^L of a transformer; None for a table, which takes its game's."""
        if self.vocabulary is None or self.length is None:
            return None
        return self.vocabulary**self.length

    def transformer(self, X: int) -> Config:
        """The shape of the transformer for X prompts, each a token of its own after the V words."""
        return Config(
            (self.vocabulary or 1) + X, self.layers, self.width, hidden=self.width * 11 // 4
        )


# --- The run --------------------------------------------------------------------------------------

GamePolicy = TabularPolicy | TransformerPolicy


def make_policy(config: GameConfig, game: Game) -> GamePolicy:
    """The uniform policy to train: a transformer that reads prompt x as token V + x, or a table."""
    X, Y = game.nash.shape
    if config.vocabulary is None or config.length is None:
        return TabularPolicy(X, Y, DTYPES[config.dtype])
    torch.manual_seed(config.seed)
    prompts = torch.arange(config.vocabulary, config.vocabulary + X).unsqueeze(-1)
    model = Transformer(config.transformer(X)).to(DTYPES[config.dtype])
    return TransformerPolicy(model, prompts, config.vocabulary, config.length)


def announce(config: GameConfig, game: Game, policy: GamePolicy, others: Comparisons) -> None:
    """Say what is about to run, and what the Nash policies of its game look like."""
    X, Y = game.nash.shape
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    kind = f"a transformer over {config.vocabulary}^{config.length} sequences"
    kind = "a table" if config.vocabulary is None else kind
    support = (game.nash > 1e-6).sum(-1).tolist()
    more = f", tau {config.tau:g}, option {config.option}" if config.algorithm == 3 else ""
    print(
        f"Algorithm {config.algorithm}, {config.iterations} iterations, eta {config.eta:g}{more}: "
        f"{kind}, {parameters:,} parameters, on {X} prompts x {Y} responses\n"
        f"Nash by linear programming: gap {others.gap_nash:.1e}, {support} responses in support\n"
        f"The uniform policy's gap: {others.gap_first:.3f}. Writing to {config.out}\n",
        flush=True,
    )


def load_game(config: GameConfig) -> Game:
    """The game in a file, or the default one. ValueError if the file holds none that fits."""
    if config.game is not None:
        return game_in(config.game, config.responses)
    assert config.num_prompts is not None  # as GameConfig has it
    assert config.vocabulary is not None
    assert config.length is not None
    return default_game(config.num_prompts, config.vocabulary, config.length, config.seed)


def run_game(config: GameConfig) -> None:
    """The preset "game": see `GameConfig`. README.md lists the files that it writes."""
    torch.set_num_threads(config.threads)
    device = check_device(config.device)
    try:
        game = load_game(config)
    except ValueError as error:
        raise BadInput(str(error)) from error
    run, game = Run("game", config), game.to(device)
    policy = make_policy(config, game).to(device)
    method = "nash-md" if config.option == "II" else "dno"
    numbers = (config.eta, config.iterations, config.tau, config.move_reference_every)
    others = comparisons(game, method, *numbers)
    announce(config, game, policy, others)
    policies = train_game(config, game, policy, others, run)
    write_tables(run, game, policies, others)
    summary = {"config": asdict(config), **summarise(run.metrics, others)}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    draw(config, game, policies, others, run)
    print(f"\nFigures and tables: {run.out}")


def draw(config: GameConfig, game: Game, policies: Tensor, others: Comparisons, run: Run) -> None:
    """gaps.png and simplex.png. Imports matplotlib, which the command line does not need."""
    from matplotlib import pyplot

    from experiments.figures import STYLE
    from experiments.game_figures import gap_figure, simplex_figure

    kind = "table" if config.vocabulary is None else "transformer"
    with pyplot.style.context(STYLE):
        run.figure("gaps.png", gap_figure(run.metrics, others, kind, config.algorithm == 3))
        run.figure("simplex.png", simplex_figure(game, policies, others.twin))


def write_tables(run: Run, game: Game, policies: Tensor, others: Comparisons) -> None:
    """tables.npz: the game, and the policies pi_1..pi_{T+1} [T+1, X, Y] of the run and its twin."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        P=game.P.cpu(),
        rho=game.rho.cpu(),
        nash=game.nash.cpu(),
        policies=policies.cpu(),
        average=policies[:-1].mean(0).cpu(),
        tabular_policies=others.twin.policies.cpu(),
    )
    run.write("tables.npz", buffer.getvalue())


def fingerprint(game: Game) -> str:
    """SHA-256 of P and rho: a game file may change before a run is resumed."""
    tables = game.P.cpu().numpy().tobytes() + game.rho.cpu().numpy().tobytes()
    return hashlib.sha256(tables).hexdigest()


def restore(
    run: Run, state: dict[str, Any], game: Game, policy: GamePolicy, start: dno.ExactStart
) -> tuple[dno.ExactStart, list[Tensor]]:
    """Put the policy and its start into the state of the run's checkpoint.

    Returns where to go on, and the policies so far. BadInput if the checkpoint is not one of this
    run."""
    expected = {
        "game": str,
        "policy": policy.state_dict(),
        "optimizer": like(start.optimizer),
        "generator": Tensor,
        "policies": Tensor,
        "after": dict.fromkeys(dno.ExactIteration.__dataclass_fields__, object),
    }
    run.expect(state, expected)
    if state["game"] != fingerprint(game):
        raise run.foreign("the game is another than when it started")
    policy.load_state_dict(state["policy"])
    start.optimizer.load_state_dict(state["optimizer"])
    start.generator.set_state(state["generator"].cpu())
    after = dno.ExactIteration(**state["after"])
    return replace(start, after=after), list(state["policies"])


def loop_of(
    config: GameConfig, game: Game, policy: GamePolicy, start: dno.ExactStart
) -> Iterator[dno.ExactIteration]:
    """The generator of the algorithm."""
    settings = dno.Regression(
        config.steps,
        config.pairs,
        config.lr,
        tolerance=config.tolerance,
        mu1=config.mu,
        mu2=config.mu,
    )
    given = (policy, game.P, config.eta, config.iterations)
    if config.algorithm == 1:
        return dno.algorithm1(*given, rho=game.rho, settings=settings, start=start)
    return algorithm3(
        *given,
        config.tau,
        option=config.option,
        move_reference_every=config.move_reference_every,
        rho=game.rho,
        settings=settings,
        start=start,
    )


def train_game(
    config: GameConfig, game: Game, policy: GamePolicy, others: Comparisons, run: Run
) -> Tensor:
    """Run the algorithm from the run's last checkpoint on, a line and a checkpoint an iteration.

    Returns pi_1..pi_{T+1}, [T+1, X, Y]."""
    generator = torch.Generator().manual_seed(config.seed)
    start, policies = dno.ExactStart(dno.adam(policy), generator), [dno.log_table(policy).exp()]
    if run.state:
        start, policies = restore(run, run.state, game, policy, start)
    game_hash, seconds = fingerprint(game), time.perf_counter()
    print(
        "   t | gap: last  average (table) | TV to target | P(new > old)  predicted | loss - bound"
    )
    loop, done = loop_of(config, game, policy, start), start.after.t if start.after else 0
    T = config.iterations
    for it in tqdm(loop, total=T, initial=done, unit="iteration", disable=None, leave=False):
        policies.append(it.log_pi_next.exp())
        row = row_of(config, game, it, others, time.perf_counter() - seconds)
        state = {
            "policy": policy.state_dict(),
            "optimizer": start.optimizer.state_dict(),
            "generator": start.generator.get_state(),
            "after": {name: getattr(it, name) for name in it.__dataclass_fields__},
            "policies": torch.stack(policies),
            "game": game_hash,
        }
        run.save(row, state)
        tqdm.write(line_of(row))
        seconds = time.perf_counter()
    return torch.stack(policies)


def row_of(
    config: GameConfig, game: Game, it: dno.ExactIteration, others: Comparisons, seconds: float
) -> dict[str, Any]:
    """The row of an iteration in metrics.jsonl."""
    row = {
        "iteration": it.t,
        "seconds": seconds,
        "loss": it.loss,
        "excess_loss": it.excess_loss,
        "steps": it.steps,
        **measure(game, it),
        "gap_nash": others.gap_nash,
        "tabular_gap_last": others.twin.gap_last[it.t - 1].item(),
        "tabular_gap_average": others.twin.gap_average[it.t - 1].item(),
    }
    if config.algorithm == 3:
        del row["win_rate_predicted"]  # an identity of Algorithm 1
    return row


def line_of(row: dict[str, Any]) -> str:
    """The row of an iteration on the console."""
    predicted = row.get("win_rate_predicted")
    predicted = " " * 9 if predicted is None else f"{predicted:9.4f}"
    gaps = f"{row['gap_last']:.4f}   {row['gap_average']:.4f} ({row['tabular_gap_average']:.4f})"
    return (
        f"{row['iteration']:4d} |     {gaps} |       {row['tv_to_target']:.4f} |       "
        f"{row['win_rate_vs_previous']:.4f}  {predicted} | {row['excess_loss']:12.1e}"
    )


# --- Command line ---------------------------------------------------------------------------------

PRESETS = {  # those but the first are in experiments/, imported when chosen
    "game": "Algorithm 1 (or 3) on a game whose Nash policy is known; every number is exact",
    "text": "fine-tuning on a small world of text, then Algorithm 2 and a regression",
    "ablations": "the paper's comparisons on the world of text, many seeds, a table and a figure",
    "llm": "Algorithm 2 (or 1, 3, 4) on a real chat model, with your prompts and your judge",
}


def preset(name: str) -> tuple[type, Callable[[Any], None]]:
    """(settings, function) of a preset."""
    if name == "game":
        return GameConfig, run_game
    return importlib.import_module(f"experiments.{name}").PRESET


def help_on_presets() -> str:
    """What `--help` alone prints."""
    lines = [f"  {name:10} {what}" for name, what in PRESETS.items()]
    usage = "usage: python train.py [PRESET] [--field value ...]\n\npresets (default: game):\n"
    return usage + "\n".join(lines) + "\n\npython train.py PRESET --help lists the fields of one."


def chosen(argv: list[str]) -> tuple[Callable[[Any], None], Any]:
    """(function, settings) of the command line; prints the help and exits 0 if asked to.

    BadInput on anything unknown or out of range."""
    named = bool(argv) and not argv[0].startswith("-")
    name, fields = (argv[0], argv[1:]) if named else ("game", argv)
    if name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    if not named and ("-h" in argv or "--help" in argv):
        print(help_on_presets())
        sys.exit(0)
    settings, function = preset(name)
    try:
        return function, parse([name, *fields], {name: settings}, name)[1]
    except ValueError as error:  # a config's own checks
        raise BadInput(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Run a preset; the exit code is that of `experiments.settings.guarded`."""

    def work() -> None:
        function, config = chosen(sys.argv[1:] if argv is None else argv)
        if dist.is_torchelastic_launched() and not hasattr(config, "fsdp"):
            name = function.__name__.removeprefix("run_")
            raise BadInput(
                f"preset {name} runs in one process; start it by python train.py {name}, without "
                "torchrun"
            )
        dry = getattr(config, "dry_run", False)  # which writes nothing
        with nullcontext() if dry else claimed(config.out, config.resume):
            try:
                function(config)
            except dno.NotFinite as error:
                raise Stopped(f"{error}; a smaller --lr may help") from error
            if dist.is_initialized():
                dist.barrier()  # the work of all is done, or those who wait here hear of it

    try:
        return guarded("train.py", work)
    finally:
        leave_team()


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files, also where there is a screen
    hear_ctrl_c()
    sys.exit(main())

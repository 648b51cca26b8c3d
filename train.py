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
from typing import Any, ClassVar

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import dno
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
    ETAS,
    RATES,
    BadInput,
    RunOptions,
    check_device,
    guarded,
    hear_ctrl_c,
    leave_team,
    only_the_first_prints,
    parse,
    setting,
)
from judge.ledger import Stopped
from model import Config, TabularPolicy, Transformer, TransformerPolicy
from regularized import algorithm3, check_regularization

# --- Settings of the preset "game" ----------------------------------------------------------------


@dataclass
class GameConfig(RunOptions):
    """game: Algorithm 1 (or 3) with a transformer policy on an enumerable intransitive game; every
    number reported is exact."""

    preset: ClassVar[str] = "game"
    game: str | None = setting(
        None,
        "FILE.npz with P [X, Y, Y], and rho [X] if not uniform",
        "data",
        common=True,
        otherwise="styles",
    )
    num_prompts: int | None = setting(
        None, "X, of the default game", "data", within=(1, 10_000), otherwise="8"
    )
    vocabulary: int | None = setting(
        None, "V, words, Y = V^L", "data", within=(1, 5_000), otherwise="6; of FILE a table"
    )
    length: int | None = setting(
        None, "L, words of a response", "data", within=(1, 12), otherwise="3; of FILE a table"
    )
    algorithm: int = setting(
        1, "1: DNO; 3: regularised DNO (appendix A)", "algorithm", common=True, choices=(1, 3)
    )
    iterations: int = setting(100, "T", "algorithm", common=True, within=(1, 10**5))
    eta: float = setting(
        None,
        "divides rewards: larger is slower",
        "algorithm",
        common=True,
        within=ETAS,
        otherwise=f"1, in 3 {MOVING_ETA}",
    )
    tau: float = setting(
        None,
        "pull to pi_ref in Algorithm 3, at most eta",
        "algorithm",
        within=(0, ETAS[1]),
        otherwise="eta / 2",
    )
    option: str = setting(
        "I", "Algorithm 3: rewards against pi_t or, II, a mixture", "algorithm", choices=("I", "II")
    )
    move_reference_every: int = setting(
        0, "iterations until pi_ref becomes pi_t; 0: never", "algorithm", within=(0, 10**5)
    )
    mu: str = setting(
        "on-policy", "where both of a pair come from", "algorithm", choices=tuple(dno.MU)
    )
    steps: int = setting(24, "Adam steps an iteration", "algorithm", common=True, within=(1, 10**6))
    pairs: int = setting(
        2048, "tuples (x, y1, y2) a step", "algorithm", common=True, within=(1, 10**7)
    )
    lr: float = setting(
        5e-3, "Adam's; falls to 0 in each iteration", "algorithm", common=True, within=RATES
    )
    tolerance: float = setting(
        0.0, "nats above its bound at which the loss will do", "algorithm", within=(0, 10)
    )
    layers: int = setting(2, "of the transformer", "model", within=(1, 100))
    width: int = setting(64, "channels of the transformer", "model", within=(1, 4096))
    threads: int = setting(1, "of the CPU; two are no faster for a small model")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields, and check every number.

        ValueError naming the field."""
        super().__post_init__()
        if self.algorithm == 1 and (self.tau or self.move_reference_every or self.option != "I"):
            raise ValueError(
                "tau, option and move-reference-every belong to Algorithm 3; add --algorithm 3"
            )
        self.eta = self.eta if self.eta is not None else {1: 1.0, 3: MOVING_ETA}[self.algorithm]
        self.tau = self.tau if self.tau is not None else {1: 0.0, 3: self.eta / 2}[self.algorithm]
        check_regularization(self.tau, self.eta)
        if self.game is None:
            self.num_prompts = 8 if self.num_prompts is None else self.num_prompts
            self.vocabulary = 6 if self.vocabulary is None else self.vocabulary
            self.length = 3 if self.length is None else self.length
        self.check_size()
        self.transformer(1)  # checks its shape

    def check_size(self) -> None:
        """ValueError if the number of responses is not known, or the table P too large."""
        if (self.vocabulary is None) != (self.length is None):
            raise ValueError(
                "vocabulary and length go together: give both (a transformer) or neither (a table)"
            )
        if self.responses is not None and self.responses > 5_000:
            raise ValueError(
                f"{self.vocabulary}^{self.length} responses are too many for a table P; "
                "expected at most 5,000"
            )
        entries = (self.num_prompts or 0) * (self.responses or 0) ** 2
        if entries > 10**9:
            raise ValueError(
                f"num_prompts is {self.num_prompts}, which makes P of {entries:,} entries; "
                "expected at most 10^9"
            )

    def idle(self) -> dict[str, str]:
        """The fields that a game in a file, a table or tau = 0 leave without effect."""
        idle = {} if self.game is None else {"num_prompts": "the game in the file has its own"}
        if self.responses is None:
            idle |= dict.fromkeys(("layers", "width"), "without vocabulary the policy is a table")
        if self.tau == 0:
            idle |= dict.fromkeys(("option", "move_reference_every"), "tau is 0")
        return idle

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
    least, most = (game.nash > 1e-6).sum(-1).aminmax()
    more = f", tau {config.tau:g}, option {config.option}" if config.algorithm == 3 else ""
    print(
        f"Algorithm {config.algorithm}, {config.iterations} iterations, eta {config.eta:g}{more}, "
        f"on {X} prompts x {Y} responses\n"
        f"The policy: {kind}, {parameters:,} parameters, uniform at first, gap "
        f"{others.gap_first:.3f}\n"
        f"Nash by linear programming: gap {others.gap_nash:.1e}, {least} to {most} responses of a "
        f"prompt in support\nWriting to {config.out}\n",
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
    """The preset "game": see `GameConfig`. docs/runs.md lists the files that it writes."""
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
    """gaps.png and simplex.png."""
    from experiments.game_figures import gap_figure, simplex_figure  # here: imports matplotlib

    kind = "table" if config.vocabulary is None else "transformer"
    run.figure("gaps.png", gap_figure, run.metrics, others, kind, config.algorithm == 3)
    run.figure("simplex.png", simplex_figure, game, policies, others.twin)


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
    """Run the algorithm from the run's last checkpoint on, a row and a checkpoint an iteration, a
    line every tenth.

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
        if T <= 20 or it.t % 10 == 0 or it.t in (1, T):
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

PRESETS = ("game", "text", "ablations", "llm")  # all but the first are imported when chosen
HELP = """usage: python train.py [PRESET] [--option value ...]

presets (default: game):
  game       Algorithm 1 (or 3) on a game whose Nash policy is known; every number is exact
             python train.py game --algorithm 3 --move-reference-every 6
  text       fine-tuning on a small world of text, then Algorithm 2 and a regression
             python train.py text --algorithm 4 --iterations 10
  ablations  the paper's comparisons on the world of text, many seeds, a table and a figure
             python train.py ablations --seeds 3 --jobs 4
  llm        Algorithm 2 (or 1, 3, 4) on a real chat model, with your prompts and your judge
             python train.py llm --model DIRECTORY --prompts FILE.jsonl --oracle openai:MODEL

python train.py PRESET --help lists the options of one."""


def preset(name: str) -> tuple[type, Callable[[Any], None]]:
    """(settings, function) of a preset."""
    if name == "game":
        return GameConfig, run_game
    return importlib.import_module(f"experiments.{name}").PRESET


def chosen(argv: list[str]) -> tuple[Callable[[Any], None], Any]:
    """(function, settings) of the command line; prints the help and exits 0 if asked to.

    BadInput on anything unknown or out of range."""
    named = bool(argv) and not argv[0].startswith("-")
    name = argv[0] if named else "game"
    if name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    if not named and ("-h" in argv or "--help" in argv):
        print(HELP)
        sys.exit(0)
    settings, function = preset(name)
    return function, parse(argv[named:], settings, f"train.py {name}")


def main(argv: list[str] | None = None) -> int:
    """Run a preset; the exit code is that of `experiments.settings.guarded`."""

    def work() -> None:
        function, config = chosen(sys.argv[1:] if argv is None else argv)
        config.note()
        name = config.preset
        if dist.is_torchelastic_launched() and not hasattr(config, "fsdp"):
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
        with only_the_first_prints():
            return guarded("train.py", work)
    finally:
        leave_team()


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures go to files, also where there is a screen
    hear_ctrl_c()
    sys.exit(main())

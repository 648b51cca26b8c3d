"""Run the algorithms: `python train.py [PRESET] [--field value ...]`.

The preset "game" is here, Algorithm 1 (or 3) on a game whose Nash policy is known. `python train.py
--help` lists the others.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import dno
import solvers
from experiments.ablations import run_ablations
from experiments.ablations_settings import AblationsConfig
from experiments.figures import STYLE, draw_simplex, on_simplex
from experiments.folder import Run, claimed
from experiments.llm import run_llm
from experiments.llm_settings import LlmConfig
from experiments.rounds import like
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
from experiments.text import run_text
from experiments.text_settings import TextConfig
from judge.ledger import Stopped
from model import Config, TabularPolicy, Transformer, TransformerPolicy
from oracle import response_styles, style_game
from pairs import check_positive
from regularized import algorithm3, check_regularization

# --- The game -------------------------------------------------------------------------------------


MOVING = {
    "eta": 0.25,
    "tau": 0.125,
    "move_reference_every": 6,
}  # a table's last iterate converges with these
BETA = 0.05  # temperature of the reward maximiser that is shown for comparison


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
    eta: float | None = setting(
        None, "> 0, divides the rewards: larger is slower (1.0 for Algorithm 1, 0.25 for 3)"
    )
    tau: float | None = setting(
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
    out: str | None = setting(None, "folder of the run (default: runs/game-SEED)")
    resume: bool = setting(
        False, "go on with the run in --out, to the same result as if it had never stopped"
    )
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting(
        "float32", "of the transformer; exact quantities are float64 always", tuple(DTYPES)
    )
    threads: int = setting(1, "CPU threads; for a model this small two are no faster than one")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields, and check every number. ValueError
        naming the field."""
        if self.game is None:
            for name, value in (("num_prompts", 8), ("vocabulary", 6), ("length", 3)):
                setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        elif self.num_prompts is not None:
            raise ValueError(
                "num-prompts belongs to the default game; the game in a file has its own, so leave it out"
            )
        if (self.vocabulary is None) != (self.length is None):
            raise ValueError(
                "vocabulary and length go together: give both (a transformer) or neither (a table)"
            )
        if self.vocabulary is None and changed(self, "layers", "width"):
            raise ValueError(
                f"{changed(self, 'layers', 'width')} belong to a transformer, and without --vocabulary and "
                "--length the game in a file gets a table; give these, or leave the others out"
            )
        if self.algorithm == 1 and (self.tau or self.move_reference_every or self.option != "I"):
            raise ValueError(
                "tau, option and move-reference-every belong to Algorithm 3; add --algorithm 3"
            )
        self.eta = self.eta if self.eta is not None else {1: 1.0, 3: MOVING["eta"]}[self.algorithm]
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
        if self.vocabulary and self.vocabulary**self.length > 5_000:
            raise ValueError(
                f"{self.vocabulary}^{self.length} responses are too many for a table P; expected at most 5,000"
            )
        if (
            self.game is None
            and (entries := self.num_prompts * self.vocabulary ** (2 * self.length)) > 10**9
        ):
            raise ValueError(
                f"num_prompts is {self.num_prompts}, which makes P of {entries:,} entries; expected at most 10^9"
            )
        self.transformer(1)  # checks its shape

    def transformer(self, X: int) -> Config:
        """The shape of the transformer for X prompts, each a token of its own after the V words."""
        return Config(
            (self.vocabulary or 1) + X, self.layers, self.width, hidden=self.width * 11 // 4
        )


@dataclass(frozen=True)
class Game:
    """P [X, Y, Y], rho [X], a Nash policy by linear programming [X, Y], and axes [Y, 3], how far
    each response leans to each corner of the triangle on which policies are drawn."""

    P: Tensor
    rho: Tensor
    nash: Tensor
    axes: Tensor
    corners: tuple[str, str, str]


def read_tables(path: str) -> dict[str, Tensor]:
    """The arrays P and rho of an .npz file, float64, as far as it has them. ValueError if it cannot
    be read or one of them is not of real numbers."""
    wanted = "expected an .npz file with the array P [X, Y, Y]"
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError(
                f"one array {list(arrays.shape)} without a name; save it by "
                "numpy.savez(FILE, P=...)"
            )
        with arrays:
            tables = {name: arrays[name] for name in arrays.files if name in ("P", "rho")}
    except Exception as error:  # numpy's reader lets those of half a dozen libraries through
        reason = " ".join(str(error).split())
        raise ValueError(f"game {path}: {reason or type(error).__name__}; {wanted}") from error
    for name, table in tables.items():
        if table.dtype.kind not in "fiu":
            raise ValueError(f"game {path}: {name} is of {table.dtype}; expected real numbers")
    return {name: torch.from_numpy(table.astype(np.float64)) for name, table in tables.items()}


def load_game(config: GameConfig) -> Game:
    """The default game, or the one in config.game. ValueError if the file is not a game, or Y is
    not V^L."""
    if config.game is None:
        P = style_game(config.num_prompts, config.vocabulary, config.length, config.seed).P
        rho = torch.full((len(P),), 1 / len(P), dtype=torch.float64)
        return Game(
            P,
            rho,
            dno.nash(P),
            response_styles(config.vocabulary, config.length),
            ("style 1", "style 2", "style 3"),
        )
    tables = read_tables(config.game)
    if "P" not in tables:
        raise ValueError(
            f"game {config.game} has no array P; expected P [X, Y, Y], and optionally rho [X]"
        )
    P = dno.check_preferences(tables["P"])
    rho = tables.get("rho", torch.full((len(P),), 1 / len(P), dtype=torch.float64))
    dno.check_policy(rho, P.shape[:1], "rho")
    if config.vocabulary and config.vocabulary**config.length != P.shape[1]:
        raise ValueError(
            f"game {config.game} has {P.shape[1]} responses; expected V^L = {config.vocabulary**config.length}"
        )
    pi = dno.nash(P)
    heaviest = (rho @ pi).topk(min(3, P.shape[1])).indices
    axes = torch.zeros(P.shape[1], 3, dtype=torch.float64)
    axes[heaviest, torch.arange(len(heaviest))] = 1
    names = [f"response {y}" for y in heaviest.tolist()] + ["-", "-"]
    return Game(P, rho, pi, axes, tuple(names[:3]))


def make_policy(config: GameConfig, game: Game) -> dno.Policy:
    """The uniform policy to train: a transformer that reads prompt x as the token V + x, or a
    table."""
    X, Y = game.nash.shape
    if config.vocabulary is None:
        return TabularPolicy(X, Y, DTYPES[config.dtype])
    torch.manual_seed(config.seed)
    prompts = torch.arange(config.vocabulary, config.vocabulary + X).unsqueeze(-1)
    model = Transformer(config.transformer(X)).to(DTYPES[config.dtype])
    return TransformerPolicy(model, prompts, config.vocabulary, config.length)


def measure(
    P: Tensor, it: dno.ExactIteration, eta: float, rho: Tensor | None = None
) -> dict[str, float | None]:
    """Exact numbers about an iteration: the duality gaps of pi_{t+1} and of unif(pi_1..pi_t); E_x
    TV(pi_{t+1}, pi*_{t+1}); P(pi_{t+1} > pi_t); what Eq. (9), reached exactly, would make of that,
    1/2 + eta E_x[KL(pi*_{t+1} || pi_t) + KL(pi_t || pi*_{t+1})] (Algorithm 1's monotonic
    improvement as an identity); and C_t of Theorem 1, on-policy."""
    pi_t, pi_star, pi_next = it.log_pi_t.exp(), it.log_pi_star.exp(), it.log_pi_next.exp()
    divergences = dno.kl_divergence(it.log_pi_star, it.log_pi_t) + dno.kl_divergence(
        it.log_pi_t, it.log_pi_star
    )
    full_support = bool(
        (torch.minimum(pi_star, pi_next) > 0).all()
    )  # or else C_t is undefined, a probability having
    moved = bool((pi_star != pi_next).any())  # underflowed; and 0/0 where the target is hit exactly
    return {
        "gap_last": dno.duality_gap(P, pi_next, rho),
        "gap_average": dno.duality_gap(P, it.pi_bar, rho),
        "tv_to_target": float(dno.prompt_mean(dno.total_variation(pi_next, pi_star), rho)),
        "win_rate_vs_previous": dno.win_rate(P, pi_next, pi_t, rho),
        "win_rate_predicted": float(0.5 + eta * dno.prompt_mean(divergences, rho)),
        "concentrability": solvers.concentrability(pi_star, pi_next, pi_t, pi_t, rho)
        if full_support and moved
        else None,
    }


def references(
    config: GameConfig, game: Game
) -> tuple[solvers.Solution, solvers.Solution, float | None]:
    """What the transformer is compared with, all exact: its tabular twin (the same algorithm by the
    closed form of line 4), a table with a moving reference, and the gap of the reward maximiser,
    Eq. (2) at beta = 0.05 on the Bradley-Terry fit of uniform comparisons, Eq. (1) (None if there
    is no finite fit)."""
    twin_method = "nash-md" if config.option == "II" else "dno"
    twin = solvers.solve(
        game.P,
        twin_method,
        config.eta,
        config.iterations,
        tau=config.tau,
        rho=game.rho,
        move_reference_every=config.move_reference_every or None,
    )
    moving = solvers.solve(
        game.P, "moving-reference", iterations=config.iterations, rho=game.rho, **MOVING
    )
    try:
        rewards = solvers.bradley_terry_fit(game.P)
    except ValueError as error:
        print(f"no reward maximiser to compare with: {error}")
        return twin, moving, None
    maximiser = dno.soft_policy_iteration(twin.policies[0].log(), rewards, BETA).exp()
    return twin, moving, dno.duality_gap(game.P, maximiser, game.rho)


def bound(t: int, Y: int, eta: float) -> float:
    """What no gap of unif(pi_1..pi_t) exceeds in exact Algorithm 1 from the uniform policy: 2 eta
    ln Y / t + 1 / (4 eta)."""
    return 2 * eta * math.log(Y) / t + 1 / (4 * eta)


# --- The run --------------------------------------------------------------------------------------


def announce(config: GameConfig, game: Game, policy: dno.Policy, first_gap: float) -> None:
    """Say what is about to run, and what its Nash policies look like."""
    X, Y = game.nash.shape
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    kind = (
        "a table"
        if config.vocabulary is None
        else f"a transformer over {config.vocabulary}^{config.length} sequences"
    )
    support = (game.nash > 1e-6).sum(-1).tolist()
    print(
        f"Algorithm {config.algorithm}, {config.iterations} iterations, eta {config.eta:g}", end=""
    )
    print(f", tau {config.tau:g}, option {config.option}" if config.algorithm == 3 else "", end="")
    print(f": {kind}, {parameters:,} parameters, on {X} prompts x {Y} responses")
    print(
        f"Nash by linear programming: gap {dno.duality_gap(game.P, game.nash, game.rho):.1e}, {support} responses in support"
    )
    print(f"The uniform policy's gap: {first_gap:.3f}. Writing to {config.out}\n", flush=True)


def run_game(config: GameConfig) -> None:
    """The preset "game": see `GameConfig`. Writes what README.md lists under "The folder of a run"."""
    torch.set_num_threads(config.threads)
    device = check_device(config.device)
    try:
        game = load_game(config)
    except ValueError as error:
        raise BadInput(str(error)) from error
    run = Run("game", config)
    game = Game(
        game.P.to(device),
        game.rho.to(device),
        game.nash.to(device),
        game.axes.to(device),
        game.corners,
    )
    policy = make_policy(config, game).to(device)
    twin, moving, maximiser_gap = references(config, game)
    announce(config, game, policy, dno.duality_gap(game.P, twin.policies[0], game.rho))
    policies = train_game(config, game, policy, twin, run)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        P=game.P.cpu(),
        rho=game.rho.cpu(),
        nash=game.nash.cpu(),
        policies=policies.cpu(),
        average=policies[:-1].mean(0).cpu(),
        tabular_policies=twin.policies.cpu(),
    )
    run.write("tables.npz", buffer.getvalue())
    summary = summarise(config, game, twin, moving, maximiser_gap, run.metrics)
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("gaps.png", gap_figure(config, game, twin, moving, maximiser_gap, run.metrics))
        run.figure("simplex.png", simplex_figure(game, policies, twin))
    print(f"\nFigures and tables: {run.out}")


def fingerprint(game: Game) -> str:
    """SHA-256 of P and rho: a game file may change between the start of a run and its resumption."""
    return hashlib.sha256(
        game.P.cpu().numpy().tobytes() + game.rho.cpu().numpy().tobytes()
    ).hexdigest()


def restore(
    run: Run,
    game: Game,
    policy: dno.Policy,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[dno.ExactIteration, list[Tensor]]:
    """Put the last three back into the state of the run's checkpoint; the iteration to go on after,
    and the policies so far. BadInput if the checkpoint is not one of this run."""
    run.expect(
        run.state,
        {
            "game": str,
            "policy": policy.state_dict(),
            "optimizer": like(optimizer),
            "generator": Tensor,
            "policies": Tensor,
            "after": dict.fromkeys(dno.ExactIteration.__dataclass_fields__, object),
        },
    )
    if run.state["game"] != fingerprint(game):
        raise run.foreign("the game is another than when it started")
    policy.load_state_dict(run.state["policy"])
    optimizer.load_state_dict(run.state["optimizer"])
    generator.set_state(run.state["generator"].cpu())
    return dno.ExactIteration(**run.state["after"]), list(run.state["policies"])


def train_game(
    config: GameConfig, game: Game, policy: dno.Policy, twin: solvers.Solution, run: Run
) -> Tensor:
    """Run the algorithm from the run's last checkpoint on, a line and a checkpoint an iteration;
    pi_1..pi_{T+1} [T+1, X, Y]."""
    optimizer, generator = dno.adam(policy), torch.Generator().manual_seed(config.seed)
    after, policies = None, [dno.log_table(policy).exp()]
    if run.state:
        after, policies = restore(run, game, policy, optimizer, generator)
    settings = dno.Regression(
        config.steps,
        config.pairs,
        config.lr,
        tolerance=config.tolerance,
        mu1=config.mu,
        mu2=config.mu,
    )
    common = {
        "rho": game.rho,
        "settings": settings,
        "start": dno.ExactStart(optimizer, generator, after),
    }
    if config.algorithm == 1:
        loop = dno.algorithm1(policy, game.P, config.eta, config.iterations, **common)
    else:
        loop = algorithm3(
            policy,
            game.P,
            config.eta,
            config.iterations,
            config.tau,
            option=config.option,
            move_reference_every=config.move_reference_every,
            **common,
        )
    game_hash, gap_nash, start = (
        fingerprint(game),
        dno.duality_gap(game.P, game.nash, game.rho),
        time.perf_counter(),
    )
    print(
        "   t | gap: last  average (table) | TV to target | P(new > old)  predicted | loss - bound"
    )
    for it in tqdm(
        loop,
        total=config.iterations,
        initial=after.t if after else 0,
        unit="iteration",
        disable=None,
        leave=False,
    ):
        exact = measure(game.P, it, config.eta, game.rho)
        policies.append(it.log_pi_next.exp())
        row = {
            "iteration": it.t,
            "seconds": time.perf_counter() - start,
            "loss": it.loss,
            "excess_loss": it.excess_loss,
            "steps": it.steps,
            **exact,
            "gap_nash": gap_nash,
            "tabular_gap_last": twin.gap_last[it.t - 1].item(),
            "tabular_gap_average": twin.gap_average[it.t - 1].item(),
        }
        if config.algorithm == 3:
            del row["win_rate_predicted"]  # an identity of Algorithm 1
        run.save(
            row,
            {
                "policy": policy.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "after": {name: getattr(it, name) for name in it.__dataclass_fields__},
                "policies": torch.stack(policies),
                "game": game_hash,
            },
        )
        predicted = f"{row['win_rate_predicted']:9.4f}" if config.algorithm == 1 else " " * 9
        tqdm.write(
            f"{it.t:4d} |     {row['gap_last']:.4f}   {row['gap_average']:.4f} ({row['tabular_gap_average']:.4f}) |       "
            f"{row['tv_to_target']:.4f} |       {row['win_rate_vs_previous']:.4f}  {predicted} | {row['excess_loss']:12.1e}"
        )
        start = time.perf_counter()
    return torch.stack(policies)


def ratio(gap: float | None, other: float) -> float | None:
    """gap / other; None without a gap, or where the other is 0 up to rounding, as when the uniform
    policy is Nash already."""
    return None if gap is None or other < 1e-12 else gap / other


def summarise(
    config: GameConfig,
    game: Game,
    twin: solvers.Solution,
    moving: solvers.Solution,
    maximiser_gap: float | None,
    metrics: list[dict[str, Any]],
) -> dict[str, Any]:
    """The headline numbers; prints them as a table, and says whether the last iterate's gap
    converged."""
    last, first = metrics[-1], dno.duality_gap(game.P, twin.policies[0], game.rho)
    lasts = [row["gap_last"] for row in metrics]
    gaps = {
        "first policy (uniform)": first,
        "trained policy, average of pi_1..pi_T": last["gap_average"],
        "trained policy, last": last["gap_last"],
        "tabular twin, average": twin.gap_average[-1].item(),
        "tabular twin, last": twin.gap_last[-1].item(),
        "bound on the twin's average (C12)": bound(config.iterations, game.P.shape[1], config.eta)
        if config.tau == 0
        else None,
        "reward maximiser (Bradley-Terry)": maximiser_gap,
        "table with moving reference, last": moving.gap_last[-1].item(),
        "Nash by linear programming": last["gap_nash"],
    }
    print("\ngap      of first   policy")
    for name, gap in gaps.items():
        share = ratio(gap, first)
        print(
            f"{'-' if gap is None else f'{gap:.2g}':8} {'-' if share is None else f'{share:.3f}':10} {name}"
        )
    tail = lasts[-max(1, len(lasts) // 5) :]
    converged, rose = max(tail) <= first / 4, max(tail) > 1.1 * min(lasts)
    verdict = (
        "stayed below a quarter of the first"
        if converged
        else "did NOT converge"
        if rose
        else "is still falling"
    )
    verdict += (
        "; the average does the work"
        if rose and not converged and last["gap_average"] < min(tail)
        else ""
    )
    print(
        f"\nLast iterate: gap {min(tail):.3f} to {max(tail):.3f} in the last {len(tail)} iterations, "
        f"lowest {min(lasts):.3f} in iteration {lasts.index(min(lasts)) + 1}:\nit {verdict}."
    )
    win_rates, distances = (
        [row[key] for row in metrics] for key in ("win_rate_vs_previous", "tv_to_target")
    )
    print(
        f"P(pi_t+1 > pi_t) > 1/2 in {sum(w > 0.5 for w in win_rates)} of {len(win_rates)} iterations, "
        f"at least {min(win_rates):.5f}; mean TV to the target {np.mean(distances):.4f}."
    )
    return {
        "config": asdict(config),
        "gaps": gaps,
        "gap_last": last["gap_last"],
        "gap_average": last["gap_average"],
        "gap_nash": last["gap_nash"],
        "gap_first": first,
        "gap_average_over_first": ratio(last["gap_average"], first),
        "gap_last_over_first": ratio(last["gap_last"], first),
        "gap_average_over_table": ratio(last["gap_average"], twin.gap_average[-1].item()),
        "gap_last_over_table": ratio(last["gap_last"], twin.gap_last[-1].item()),
        "last_iterate_converged": converged,
        "tv_to_target_mean": float(np.mean(distances)),
        "win_rate_vs_previous_min": min(win_rates),
        "seconds": sum(row["seconds"] for row in metrics),
    }


def gap_figure(
    config: GameConfig,
    game: Game,
    twin: solvers.Solution,
    moving: solvers.Solution,
    maximiser_gap: float | None,
    metrics: list[dict[str, Any]],
) -> plt.Figure:
    """Duality gaps against the iteration, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    t, policy = (
        np.arange(1, len(metrics) + 1),
        "table" if config.vocabulary is None else "transformer",
    )
    axes.plot(
        t,
        [row["gap_last"] for row in metrics],
        "-",
        lw=1.2,
        color="C1",
        label=rf"{policy}, last iterate $\pi_{{t+1}}$",
    )
    axes.plot(
        t,
        [row["gap_average"] for row in metrics],
        "-",
        lw=2.5,
        color="C0",
        label=rf"{policy}, average $\bar\pi_t$",
    )
    axes.plot(t, twin.gap_average.cpu(), "--", lw=1.5, color="C6", label=r"tabular twin, average")
    if config.algorithm == 3:
        axes.plot(
            t, twin.gap_last.cpu(), ":", lw=1.5, color="C6", label="tabular twin, last iterate"
        )
    if config.tau == 0:
        bounds = [bound(int(i), game.P.shape[1], config.eta) for i in t]
        axes.plot(t, bounds, "-.", lw=1, color="C3", label=r"bound $2\eta\,\ln Y/t + 1/(4\eta)$")
    axes.plot(
        t,
        moving.gap_last.cpu(),
        ":",
        lw=2,
        color="C2",
        label="table, moving reference, last iterate",
    )
    if maximiser_gap is not None:
        axes.axhline(
            maximiser_gap,
            ls=(0, (5, 1, 1, 1, 1, 1)),
            lw=1,
            color="C5",
            label="reward maximiser (Bradley-Terry fit)",
        )
    axes.set(yscale="log", xlabel="iteration $t$", ylabel="duality gap", ylim=(None, 1.2))
    axes.legend(fontsize=8, loc="lower left")
    return figure


def simplex_figure(game: Game, policies: Tensor, twin: solvers.Solution) -> plt.Figure:
    """Paths of pi_t and pi_bar_t on the triangle of styles, for up to eight prompts, with the Nash
    policy."""
    count = torch.arange(1, len(policies), device=policies.device).double()[:, None, None]
    shown, columns = min(8, len(game.P)), min(4, len(game.P))
    rows = -(-shown // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.5 * rows + 0.4), squeeze=False
    )
    average, tabular = (tables[:-1].cumsum(0) / count for tables in (policies, twin.policies))
    paths = {
        "last iterate": (policies, "-", "C1", 0.8),
        "average": (average, "-", "C0", 2.2),
        "tabular twin, average": (tabular, "--", "C6", 1.0),
    }
    for x, axes in enumerate(grid.flat):
        axes.axis("off")
        if x < shown:
            draw_simplex(axes, game.corners)
            for name, (path, line, colour, width) in paths.items():
                axes.plot(
                    *on_simplex(path[:, x] @ game.axes).T, line, color=colour, lw=width, label=name
                )
            axes.plot(
                *on_simplex(game.nash[x] @ game.axes),
                "*",
                color="C2",
                ms=11,
                mec="white",
                label="Nash",
            )
            axes.text(0.02, 0.86, f"$x = {x}$")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# --- Command line ---------------------------------------------------------------------------------


PRESETS = {
    "game": (GameConfig, run_game),
    "text": (TextConfig, run_text),
    "ablations": (AblationsConfig, run_ablations),
    "llm": (LlmConfig, run_llm),
}


def main(argv: list[str] | None = None) -> int:
    """Run a preset; the exit code is that of `runs.guarded`."""

    def work() -> None:
        try:
            preset, config = parse(
                sys.argv[1:] if argv is None else argv,
                {p: c for p, (c, _) in PRESETS.items()},
                "game",
            )
        except ValueError as error:  # a config's own checks
            raise BadInput(str(error)) from error
        if preset != "llm" and dist.is_torchelastic_launched():
            raise BadInput(
                f"preset {preset} runs in one process; start it by python train.py {preset}, without torchrun"
            )
        dry = getattr(config, "dry_run", False)  # which writes nothing
        with nullcontext() if dry else claimed(config.out, config.resume):
            try:
                PRESETS[preset][1](config)
            except dno.NotFinite as error:
                raise Stopped(f"{error}; a smaller --lr may help") from error
            if dist.is_initialized():
                dist.barrier()  # the work of all is done, or those who wait here hear of it

    try:
        return guarded("train.py", work)
    finally:
        leave_team()


if __name__ == "__main__":
    hear_ctrl_c()
    plt.switch_backend("Agg")  # figures go to files, also where there is a screen
    sys.exit(main())

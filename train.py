"""Run the algorithms: `python train.py [PRESET] [--field value ...]`; `python train.py --help` lists presets and fields."""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import matplotlib.pyplot as plt
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor
from tqdm import tqdm

import dno
from checkpoints import BadCheckpoint, Chat, read_checkpoint
from judge import Plan, Stopped, for_terminal
from model import (
    ANSWER,
    END,
    SPLIT,
    ChatPolicy,
    Config,
    Response,
    TabularPolicy,
    Team,
    TextPolicy,
    Transformer,
    TransformerPolicy,
    add_low_rank,
    choose,
    learn_byte_pairs,
    make_tokenizer,
    part_of,
    token_log_prob,
    whole,
)
from oracle import (
    CLASSES,
    PROMPTS,
    TOPICS,
    OpenAIJudge,
    OpenAITeacher,
    Oracle,
    RegisterJudge,
    TasteJudge,
    classify,
    prompt_class,
    response_styles,
    student_answer,
    style_game,
    teacher_answer,
    win_rate_report,
)
from runs import (
    STYLE,
    BadInput,
    JudgeOptions,
    Run,
    changed,
    check_device,
    check_ranges,
    claimed,
    guarded,
    hear_ctrl_c,
    join_team,
    leave_team,
    open_endpoint,
    open_judge,
    parse,
    setting,
)

DTYPES = {"float32": torch.float32, "float64": torch.float64}
COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # of real models
MOVING = {"eta": 0.25, "tau": 0.125, "move_reference_every": 6}  # a table's last iterate converges with these
BETA = 0.05  # temperature of the reward maximiser that is shown for comparison

MOST = 10**9  # of counts and seeds: what torch and the machine take ends below it
TEMPERATURES = (0.01, 100)  # of sampling
THREADS = (1, 1024)  # of many more the OpenMP library ends the process


# --- Preset "game" ----------------------------------------------------------------------------------------------------------


@dataclass
class GameConfig:
    """game: Algorithm 1 (or 3) with a transformer policy on an enumerable intransitive game; every number reported is exact."""

    game: str | None = setting(None, "FILE.npz with P [X, Y, Y] and optionally rho [X]; the default game when left out")
    num_prompts: int | None = setting(None, "X, prompts of the default game (8 when left out)")
    vocabulary: int | None = setting(None, "V, words, Y = V^L (6 in the default game; without it, FILE gets a table)")
    length: int | None = setting(None, "L, words of a response (3 in the default game)")
    algorithm: int = setting(1, "1: DNO; 3: regularised DNO (appendix A)", choices=(1, 3))
    option: str = setting("I", "of Algorithm 3: rewards against pi_t (I) or against the mixture with pi_ref (II)", ("I", "II"))
    iterations: int = setting(100, "T")
    eta: float | None = setting(None, "> 0, divides the rewards: larger is slower (1.0 for Algorithm 1, 0.25 for 3)")
    tau: float | None = setting(None, "in [0, eta], pull towards pi_ref in Algorithm 3 (eta / 2 when left out)")
    move_reference_every: int = setting(0, "iterations after which Algorithm 3 sets pi_ref to the current policy; 0: never")
    mu: str = setting("on-policy", "where both responses of a training pair come from", tuple(dno.MU))
    steps: int = setting(24, "Adam steps an iteration")
    pairs: int = setting(2048, "tuples (x, y1, y2) a step; N of Theorem 1 is steps * pairs")
    lr: float = setting(5e-3, "Adam's learning rate at the start of each iteration; falls linearly to 0 within it")
    tolerance: float = setting(0.0, "nats; end an iteration early when the loss is this close to its lower bound")
    layers: int = setting(2, "of the transformer")
    width: int = setting(64, "channels of the transformer")
    seed: int = setting(0, "of the default game, the transformer's weights and the pairs drawn")
    out: str | None = setting(None, "folder of the run (default: runs/game-SEED)")
    resume: bool = setting(False, "go on with the run in --out, to the same result as if it had never stopped")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer; exact quantities are float64 always", tuple(DTYPES))
    threads: int = setting(1, "CPU threads; for a model this small two are no faster than one")

    def __post_init__(self) -> None:
        """Fill in the defaults that depend on other fields, and check every number. ValueError naming the field."""
        if self.game is None:
            for name, value in (("num_prompts", 8), ("vocabulary", 6), ("length", 3)):
                setattr(self, name, value if getattr(self, name) is None else getattr(self, name))
        elif self.num_prompts is not None:
            raise ValueError("num-prompts belongs to the default game; the game in a file has its own, so leave it out")
        if (self.vocabulary is None) != (self.length is None):
            raise ValueError("vocabulary and length go together: give both (a transformer) or neither (a table)")
        if self.vocabulary is None and changed(self, "layers", "width"):
            raise ValueError(f"{changed(self, 'layers', 'width')} belong to a transformer, and without --vocabulary and "
                             "--length the game in a file gets a table; give these, or leave the others out")  # fmt: skip
        if self.algorithm == 1 and (self.tau or self.move_reference_every or self.option != "I"):
            raise ValueError("tau, option and move-reference-every belong to Algorithm 3; add --algorithm 3")
        self.eta = self.eta if self.eta is not None else {1: 1.0, 3: MOVING["eta"]}[self.algorithm]
        self.tau = self.tau if self.tau is not None else {1: 0.0, 3: self.eta / 2}[self.algorithm]
        self.out = self.out or f"runs/game-{self.seed}"
        check_ranges(self, num_prompts=(1, 10_000), vocabulary=(1, 5_000), length=(1, 12), iterations=(1, 10**5),
                     steps=(1, 10**6), pairs=(1, 10**7), layers=(1, 100), width=(1, 4096), seed=(0, 10**9),
                     threads=THREADS, tolerance=(0, 10), move_reference_every=(0, 10**5))  # fmt: skip
        check_ranges(self, eta=(0, 10**6), lr=(0, 10))
        dno.check_positive(eta=self.eta, lr=self.lr)
        dno.check_regularization(self.tau, self.eta)
        if self.vocabulary and self.vocabulary**self.length > 5_000:
            raise ValueError(f"{self.vocabulary}^{self.length} responses are too many for a table P; expected at most 5,000")
        if self.game is None and (entries := self.num_prompts * self.vocabulary ** (2 * self.length)) > 10**9:
            raise ValueError(f"num_prompts is {self.num_prompts}, which makes P of {entries:,} entries; expected at most 10^9")
        self.transformer(1)  # checks its shape

    def transformer(self, X: int) -> Config:
        """The shape of the transformer for X prompts, each a token of its own after the V words."""
        return Config((self.vocabulary or 1) + X, self.layers, self.width, hidden=self.width * 11 // 4)


@dataclass(frozen=True)
class Game:
    """P [X, Y, Y], rho [X], a Nash policy by linear programming [X, Y], and axes [Y, 3], how far each response leans to each
    corner of the triangle on which policies are drawn."""

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
            raise ValueError(f"one array {list(arrays.shape)} without a name; save it by "
                             "numpy.savez(FILE, P=...)")  # fmt: skip
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
    """The default game, or the one in config.game. ValueError if the file is not a game, or Y is not V^L."""
    if config.game is None:
        P = style_game(config.num_prompts, config.vocabulary, config.length, config.seed).P
        rho = torch.full((len(P),), 1 / len(P), dtype=torch.float64)
        return Game(P, rho, dno.nash(P), response_styles(config.vocabulary, config.length), ("style 1", "style 2", "style 3"))
    tables = read_tables(config.game)
    if "P" not in tables:
        raise ValueError(f"game {config.game} has no array P; expected P [X, Y, Y], and optionally rho [X]")
    P = dno.check_preferences(tables["P"])
    rho = tables.get("rho", torch.full((len(P),), 1 / len(P), dtype=torch.float64))
    dno.check_policy(rho, P.shape[:1], "rho")
    if config.vocabulary and config.vocabulary**config.length != P.shape[1]:
        raise ValueError(f"game {config.game} has {P.shape[1]} responses; expected V^L = {config.vocabulary**config.length}")
    pi = dno.nash(P)
    heaviest = (rho @ pi).topk(min(3, P.shape[1])).indices
    axes = torch.zeros(P.shape[1], 3, dtype=torch.float64)
    axes[heaviest, torch.arange(len(heaviest))] = 1
    names = [f"response {y}" for y in heaviest.tolist()] + ["-", "-"]
    return Game(P, rho, pi, axes, tuple(names[:3]))


def make_policy(config: GameConfig, game: Game) -> dno.Policy:
    """The uniform policy to train: a transformer that reads prompt x as the token V + x, or a table."""
    X, Y = game.nash.shape
    if config.vocabulary is None:
        return TabularPolicy(X, Y, DTYPES[config.dtype])
    torch.manual_seed(config.seed)
    prompts = torch.arange(config.vocabulary, config.vocabulary + X).unsqueeze(-1)
    model = Transformer(config.transformer(X)).to(DTYPES[config.dtype])
    return TransformerPolicy(model, prompts, config.vocabulary, config.length)


def measure(P: Tensor, it: dno.Iteration, eta: float, rho: Tensor | None = None) -> dict[str, float | None]:
    """Exact numbers about an iteration: the duality gaps of pi_{t+1} and of unif(pi_1..pi_t); E_x TV(pi_{t+1}, pi*_{t+1});
    P(pi_{t+1} > pi_t); what Eq. (9), reached exactly, would make of that, 1/2 + eta E_x[KL(pi*_{t+1} || pi_t) +
    KL(pi_t || pi*_{t+1})] (Algorithm 1's monotonic improvement as an identity); and C_t of Theorem 1, on-policy."""
    pi_t, pi_star, pi_next = it.log_pi_t.exp(), it.log_pi_star.exp(), it.log_pi_next.exp()
    divergences = dno.kl_divergence(it.log_pi_star, it.log_pi_t) + dno.kl_divergence(it.log_pi_t, it.log_pi_star)
    full_support = bool((torch.minimum(pi_star, pi_next) > 0).all())  # or else C_t is undefined, a probability having
    moved = bool((pi_star != pi_next).any())  # underflowed; and 0/0 where the target is hit exactly
    return {
        "gap_last": dno.duality_gap(P, pi_next, rho),
        "gap_average": dno.duality_gap(P, it.pi_bar, rho),
        "tv_to_target": float(dno.prompt_mean(dno.total_variation(pi_next, pi_star), rho)),
        "win_rate_vs_previous": dno.win_rate(P, pi_next, pi_t, rho),
        "win_rate_predicted": float(0.5 + eta * dno.prompt_mean(divergences, rho)),
        "concentrability": dno.concentrability(pi_star, pi_next, pi_t, pi_t, rho) if full_support and moved else None,
    }


def references(config: GameConfig, game: Game) -> tuple[dno.Solution, dno.Solution, float | None]:
    """What the transformer is compared with, all exact: its tabular twin (the same algorithm by the closed form of line 4), a
    table with a moving reference, and the gap of the reward maximiser, Eq. (2) at beta = 0.05 on the Bradley-Terry fit of
    uniform comparisons, Eq. (1) (None if there is no finite fit)."""
    twin_method = "nash-md" if config.option == "II" else "dno"
    twin = dno.solve(game.P, twin_method, config.eta, config.iterations, tau=config.tau, rho=game.rho,
                     move_reference_every=config.move_reference_every or None)  # fmt: skip
    moving = dno.solve(game.P, "moving-reference", iterations=config.iterations, rho=game.rho, **MOVING)
    try:
        rewards = dno.bradley_terry_fit(game.P)
    except ValueError as error:
        print(f"no reward maximiser to compare with: {error}")
        return twin, moving, None
    maximiser = dno.soft_policy_iteration(twin.policies[0].log(), rewards, BETA).exp()
    return twin, moving, dno.duality_gap(game.P, maximiser, game.rho)


def bound(t: int, Y: int, eta: float) -> float:
    """What no gap of unif(pi_1..pi_t) exceeds in exact Algorithm 1 from the uniform policy: 2 eta ln Y / t + 1 / (4 eta)."""
    return 2 * eta * math.log(Y) / t + 1 / (4 * eta)


def announce(config: GameConfig, game: Game, policy: dno.Policy, first_gap: float) -> None:
    """Say what is about to run, and what its Nash policies look like."""
    X, Y = game.nash.shape
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    kind = "a table" if config.vocabulary is None else f"a transformer over {config.vocabulary}^{config.length} sequences"
    support = (game.nash > 1e-6).sum(-1).tolist()
    print(f"Algorithm {config.algorithm}, {config.iterations} iterations, eta {config.eta:g}", end="")
    print(f", tau {config.tau:g}, option {config.option}" if config.algorithm == 3 else "", end="")
    print(f": {kind}, {parameters:,} parameters, on {X} prompts x {Y} responses")
    print(f"Nash by linear programming: gap {dno.duality_gap(game.P, game.nash, game.rho):.1e}, {support} responses in support")
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
    game = Game(game.P.to(device), game.rho.to(device), game.nash.to(device), game.axes.to(device), game.corners)
    policy = make_policy(config, game).to(device)
    twin, moving, maximiser_gap = references(config, game)
    announce(config, game, policy, dno.duality_gap(game.P, twin.policies[0], game.rho))
    policies = train_game(config, game, policy, twin, run)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, P=game.P.cpu(), rho=game.rho.cpu(), nash=game.nash.cpu(), policies=policies.cpu(),
                        average=policies[:-1].mean(0).cpu(), tabular_policies=twin.policies.cpu())  # fmt: skip
    run.write("tables.npz", buffer.getvalue())
    summary = summarise(config, game, twin, moving, maximiser_gap, run.metrics)
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("gaps.png", gap_figure(config, game, twin, moving, maximiser_gap, run.metrics))
        run.figure("simplex.png", simplex_figure(game, policies, twin))
    print(f"\nFigures and tables: {run.out}")


def fingerprint(game: Game) -> str:
    """SHA-256 of P and rho: a game file may change between the start of a run and its resumption."""
    return hashlib.sha256(game.P.cpu().numpy().tobytes() + game.rho.cpu().numpy().tobytes()).hexdigest()


def restore(run: Run, game: Game, policy: dno.Policy, optimizer: torch.optim.Optimizer,
            generator: torch.Generator) -> tuple[dno.Iteration, list[Tensor]]:  # fmt: skip
    """Put the last three back into the state of the run's checkpoint; the iteration to go on after, and the policies so far.
    BadInput if the checkpoint is not one of this run."""
    run.expect(run.state, {"game": str, "policy": policy.state_dict(), "optimizer": like(optimizer),
                           "generator": Tensor, "policies": Tensor,
                           "after": dict.fromkeys(dno.Iteration.__dataclass_fields__, object)})  # fmt: skip
    if run.state["game"] != fingerprint(game):
        raise run.foreign("the game is another than when it started")
    policy.load_state_dict(run.state["policy"])
    optimizer.load_state_dict(run.state["optimizer"])
    generator.set_state(run.state["generator"].cpu())
    return dno.Iteration(**run.state["after"]), list(run.state["policies"])


def like(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the state of such an optimizer is to look like, however many steps it has taken."""
    return {"state": dict, "param_groups": optimizer.state_dict()["param_groups"]}


def train_game(config: GameConfig, game: Game, policy: dno.Policy, twin: dno.Solution, run: Run) -> Tensor:
    """Run the algorithm from the run's last checkpoint on, a line and a checkpoint an iteration; pi_1..pi_{T+1} [T+1, X, Y]."""
    optimizer, generator = dno.adam(policy), torch.Generator().manual_seed(config.seed)
    after, policies = None, [dno.log_table(policy).exp()]
    if run.state:
        after, policies = restore(run, game, policy, optimizer, generator)
    settings = dno.Regression(config.steps, config.pairs, config.lr, tolerance=config.tolerance, mu1=config.mu, mu2=config.mu)
    common = {"rho": game.rho, "settings": settings, "optimizer": optimizer, "generator": generator, "after": after}
    if config.algorithm == 1:
        loop = dno.algorithm1(policy, game.P, config.eta, config.iterations, **common)
    else:
        loop = dno.algorithm3(policy, game.P, config.eta, config.iterations, config.tau, option=config.option,
                              move_reference_every=config.move_reference_every, **common)  # fmt: skip
    game_hash, gap_nash, start = fingerprint(game), dno.duality_gap(game.P, game.nash, game.rho), time.perf_counter()
    print("   t | gap: last  average (table) | TV to target | P(new > old)  predicted | loss - bound")
    for it in tqdm(loop, total=config.iterations, initial=after.t if after else 0, unit="iteration", disable=None, leave=False):
        exact = measure(game.P, it, config.eta, game.rho)
        policies.append(it.log_pi_next.exp())
        row = {"iteration": it.t, "seconds": time.perf_counter() - start, "loss": it.loss, "excess_loss": it.excess_loss,
               "steps": it.steps, **exact, "gap_nash": gap_nash, "tabular_gap_last": twin.gap_last[it.t - 1].item(),
               "tabular_gap_average": twin.gap_average[it.t - 1].item()}  # fmt: skip
        if config.algorithm == 3:
            del row["win_rate_predicted"]  # an identity of Algorithm 1
        run.save(row, {"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
                       "after": {name: getattr(it, name) for name in it.__dataclass_fields__},
                       "policies": torch.stack(policies), "game": game_hash})  # fmt: skip
        predicted = f"{row['win_rate_predicted']:9.4f}" if config.algorithm == 1 else " " * 9
        tqdm.write(
            f"{it.t:4d} |     {row['gap_last']:.4f}   {row['gap_average']:.4f} ({row['tabular_gap_average']:.4f}) |       "
            f"{row['tv_to_target']:.4f} |       {row['win_rate_vs_previous']:.4f}  {predicted} | {row['excess_loss']:12.1e}"
        )
        start = time.perf_counter()
    return torch.stack(policies)


def ratio(gap: float | None, other: float) -> float | None:
    """gap / other; None without a gap, or where the other is 0 up to rounding, as when the uniform policy is Nash already."""
    return None if gap is None or other < 1e-12 else gap / other


def summarise(config: GameConfig, game: Game, twin: dno.Solution, moving: dno.Solution, maximiser_gap: float | None,
              metrics: list[dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
    """The headline numbers; prints them as a table, and says whether the last iterate's gap converged."""
    last, first = metrics[-1], dno.duality_gap(game.P, twin.policies[0], game.rho)
    lasts = [row["gap_last"] for row in metrics]
    gaps = {
        "first policy (uniform)": first,
        "trained policy, average of pi_1..pi_T": last["gap_average"],
        "trained policy, last": last["gap_last"],
        "tabular twin, average": twin.gap_average[-1].item(),
        "tabular twin, last": twin.gap_last[-1].item(),
        "bound on the twin's average (C12)": bound(config.iterations, game.P.shape[1], config.eta) if config.tau == 0 else None,
        "reward maximiser (Bradley-Terry)": maximiser_gap,
        "table with moving reference, last": moving.gap_last[-1].item(),
        "Nash by linear programming": last["gap_nash"],
    }
    print("\ngap      of first   policy")
    for name, gap in gaps.items():
        share = ratio(gap, first)
        print(f"{'-' if gap is None else f'{gap:.2g}':8} {'-' if share is None else f'{share:.3f}':10} {name}")
    tail = lasts[-max(1, len(lasts) // 5) :]
    converged, rose = max(tail) <= first / 4, max(tail) > 1.1 * min(lasts)
    verdict = "stayed below a quarter of the first" if converged else "did NOT converge" if rose else "is still falling"
    verdict += "; the average does the work" if rose and not converged and last["gap_average"] < min(tail) else ""
    print(f"\nLast iterate: gap {min(tail):.3f} to {max(tail):.3f} in the last {len(tail)} iterations, "
          f"lowest {min(lasts):.3f} in iteration {lasts.index(min(lasts)) + 1}:\nit {verdict}.")  # fmt: skip
    win_rates, distances = ([row[key] for row in metrics] for key in ("win_rate_vs_previous", "tv_to_target"))
    print(f"P(pi_t+1 > pi_t) > 1/2 in {sum(w > 0.5 for w in win_rates)} of {len(win_rates)} iterations, "
          f"at least {min(win_rates):.5f}; mean TV to the target {np.mean(distances):.4f}.")  # fmt: skip
    return {"config": asdict(config), "gaps": gaps, "gap_last": last["gap_last"], "gap_average": last["gap_average"],
            "gap_nash": last["gap_nash"], "gap_first": first,
            "gap_average_over_first": ratio(last["gap_average"], first), "gap_last_over_first": ratio(last["gap_last"], first),
            "gap_average_over_table": ratio(last["gap_average"], twin.gap_average[-1].item()),
            "gap_last_over_table": ratio(last["gap_last"], twin.gap_last[-1].item()), "last_iterate_converged": converged,
            "tv_to_target_mean": float(np.mean(distances)),
            "win_rate_vs_previous_min": min(win_rates), "seconds": sum(row["seconds"] for row in metrics)}  # fmt: skip


def gap_figure(config: GameConfig, game: Game, twin: dno.Solution, moving: dno.Solution, maximiser_gap: float | None,
               metrics: list[dict[str, Any]]) -> plt.Figure:  # fmt: skip
    """Duality gaps against the iteration, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7.5, 4.6))
    t, policy = np.arange(1, len(metrics) + 1), "table" if config.vocabulary is None else "transformer"
    axes.plot(t, [row["gap_last"] for row in metrics], "-", lw=1.2, color="C1", label=rf"{policy}, last iterate $\pi_{{t+1}}$")
    axes.plot(t, [row["gap_average"] for row in metrics], "-", lw=2.5, color="C0", label=rf"{policy}, average $\bar\pi_t$")
    axes.plot(t, twin.gap_average.cpu(), "--", lw=1.5, color="C6", label=r"tabular twin, average")
    if config.algorithm == 3:
        axes.plot(t, twin.gap_last.cpu(), ":", lw=1.5, color="C6", label="tabular twin, last iterate")
    if config.tau == 0:
        bounds = [bound(int(i), game.P.shape[1], config.eta) for i in t]
        axes.plot(t, bounds, "-.", lw=1, color="C3", label=r"bound $2\eta\,\ln Y/t + 1/(4\eta)$")
    axes.plot(t, moving.gap_last.cpu(), ":", lw=2, color="C2", label="table, moving reference, last iterate")
    if maximiser_gap is not None:
        axes.axhline(maximiser_gap, ls=(0, (5, 1, 1, 1, 1, 1)), lw=1, color="C5", label="reward maximiser (Bradley-Terry fit)")
    axes.set(yscale="log", xlabel="iteration $t$", ylabel="duality gap", ylim=(None, 1.2))
    axes.legend(fontsize=8, loc="lower left")
    return figure


TRIANGLE = ((0.0, 0.0), (1.0, 0.0), (0.5, 0.75**0.5))


def on_simplex(weights: Tensor) -> np.ndarray:
    """Points [..., 2] of the plane for distributions over three things [..., 3], in the triangle of `draw_simplex`."""
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return (weights @ weights.new_tensor(TRIANGLE)).cpu().numpy()


def draw_simplex(axes: plt.Axes, corners: tuple[str, str, str]) -> None:
    """An empty triangle: the first corner at the lower left, the second at the lower right, the third above."""
    axes.fill(*zip(*TRIANGLE, strict=True), facecolor="none", edgecolor="0.5", lw=0.8)
    for name, place, side in zip(corners, TRIANGLE, ("top", "top", "bottom"), strict=True):
        axes.text(*place, name, ha="center", va=side, fontsize=8)
    axes.set(xlim=(-0.12, 1.12), ylim=(-0.1, 1.0), aspect="equal")
    axes.axis("off")


def simplex_figure(game: Game, policies: Tensor, twin: dno.Solution) -> plt.Figure:
    """Paths of pi_t and pi_bar_t on the triangle of styles, for up to eight prompts, with the Nash policy."""
    count = torch.arange(1, len(policies), device=policies.device).double()[:, None, None]
    shown, columns = min(8, len(game.P)), min(4, len(game.P))
    rows = -(-shown // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.5 * rows + 0.4), squeeze=False)
    average, tabular = (tables[:-1].cumsum(0) / count for tables in (policies, twin.policies))
    paths = {"last iterate": (policies, "-", "C1", 0.8), "average": (average, "-", "C0", 2.2),
             "tabular twin, average": (tabular, "--", "C6", 1.0)}  # fmt: skip
    for x, axes in enumerate(grid.flat):
        axes.axis("off")
        if x < shown:
            draw_simplex(axes, game.corners)
            for name, (path, line, colour, width) in paths.items():
                axes.plot(*on_simplex(path[:, x] @ game.axes).T, line, color=colour, lw=width, label=name)
            axes.plot(*on_simplex(game.nash[x] @ game.axes), "*", color="C2", ms=11, mec="white", label="Nash")
            axes.text(0.02, 0.86, f"$x = {x}$")
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# --- Preset "text" -----------------------------------------------------------------------------------------------------------

HARD = {"samples": 5, "temperature": 1.0, "top_p": 1.0, "prompts_per_step": 12, "lr": 1e-3, "fall": 0.8, "iterations": 30}
SOFT = {"samples": 24, "temperature": 1.0, "top_p": 1.0, "prompts_per_step": 4, "lr": 7e-4, "fall": 0.5, "iterations": 60}
RECIPES = {  # what is not given on the command line, by algorithm; 1 and 3 with r_t estimated from samples
    1: {**SOFT, "eta": 1.0, "tau": 0.0, "move_reference_every": 0},
    2: {**HARD, "eta": 8.0, "tau": 0.0, "move_reference_every": 0},
    3: {**SOFT, "eta": 0.25, "tau": 0.125, "move_reference_every": 5},
    4: {**HARD, "eta": 8.0, "tau": 0.4, "move_reference_every": 0},
}
RULES = {
    "large-margin": lambda margin: partial(dno.large_margin_pairs, margin=margin),
    "best-worst": lambda margin: dno.best_against_worst,
    "teacher": lambda margin: partial(dno.teacher_pairs, margin=margin),
    "spin": lambda margin: dno.gold_against_students,
    "scored": lambda margin: dno.scored_pairs,
}  # fmt: skip
TRAINED = 8  # of a prompt's samples in algorithms 1 and 3; all of them are opponents
KINDS = ("teacher_student", "student_teacher", "student_student")
CLASSES_KEPT = (dno.Round, dno.Groups, dno.Pairs, dno.Best, Response)  # what checkpoints of text runs hold beside tensors


@dataclass
class TextConfig(JudgeOptions):
    """text: supervised fine-tuning on a small world of text, then Algorithm 2, then a regression that approaches Nash."""

    algorithm: int | None = setting(
        None, "2, 4: contrast sampled pairs; 1, 3: regress on soft targets; when left out 2, then 3 if the judge is synthetic",
        choices=(1, 2, 3, 4),
    )  # fmt: skip
    option: str = setting("I", "of Algorithm 4: samples of pi_t (I) or of its mixture with pi_ref by token (II)", ("I", "II"))
    iterations: int | None = setting(None, "T (30 for Algorithms 2 and 4, 60 for 1 and 3)")
    eta: float | None = setting(None, "> 0, larger is slower (eta~ 8 for Algorithms 2 and 4; 1 for 1, 0.25 for 3)")
    tau: float | None = setting(None, "in [0, eta], pull towards pi_ref (0.125 for Algorithm 3, 0.4 for 4)")
    move_reference_every: int | None = setting(None, "iterations; 0: never (5 for Algorithm 3)")
    rule: str = setting("large-margin", "which pairs Algorithms 2 and 4 train on", tuple(RULES))
    margin: float = setting(0.4, "in [0, 1], least difference of the win rates of a pair")
    judgments: str = setting(
        "outcomes", "rank by {0, 1} samples of P, as in Algorithm 2; by P; or, with rule scored, by a judge's points",
        ("outcomes", "probabilities", "scores"),
    )  # fmt: skip
    samples: int | None = setting(None, "K, responses a prompt (5 for Algorithms 2 and 4, as in the paper; 24 for 1 and 3)")
    temperature: float | None = setting(None, "of sampling (default: 1.0; the paper's 0.7 hides malformed text from the judge)")
    top_p: float | None = setting(None, "of sampling (default: 1.0; the paper's is 0.95)")
    replay: float = setting(0.3, "in [0, 1], share of the last iteration's pairs to train on again, as in the paper")
    prompts: int = setting(72, "X, prompts an iteration, of 72; 24 more are held out for validation")
    prompts_per_step: int | None = setting(None, "whose pairs make up a batch (12 for Algorithms 2 and 4, 4 for 1 and 3)")
    lr: float | None = setting(None, "Adam's learning rate in iteration 1 (1e-3 for Algorithms 2 and 4, 7e-4 for 1 and 3)")
    sft_steps: int = setting(400, "Adam steps of supervised fine-tuning, 128 examples each")
    sft_lr: float = setting(6e-3, "Adam's first learning rate in it; falls linearly to 0")
    vocabulary: int = setting(640, "most byte pairs to learn")
    layers: int = setting(2, "of the transformer")
    width: int = setting(64, "channels of the transformer")
    max_new_tokens: int = setting(24, "after which a response is cut off")
    survey: int = setting(32, "samples of each held-out prompt by which a policy is measured")
    judged: int = setting(2, "samples of each held-out prompt that a language model judges, each iteration")
    teacher: str = setting("synthetic", "who writes gold responses: synthetic, openai:MODEL, or replay:CACHE")
    teacher_url: str | None = setting(None, "the teacher's endpoint (default: --judge-url)")
    teacher_prices: str | None = setting(None, "as --judge-prices, which it is when left out if the model is the judge's")
    seed: int = setting(0, "of the corpus, the transformer's weights, the samples and the outcomes")
    out: str | None = setting(None, "folder of the run (default: runs/text-SEED)")
    resume: bool = setting(False, "go on with the run in --out, to the same result as if it had never stopped")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(2, "CPU threads")

    def __post_init__(self) -> None:
        """Fill in the recipe of the algorithm, and check every number. ValueError naming the field."""
        self.out = self.out or f"runs/text-{self.seed}"
        self.check_judge()
        algorithms = self.algorithms()
        own = ("samples", "temperature", "top_p", "prompts_per_step", "lr", "eta", "tau")
        given = [name for name in own if getattr(self, name) is not None]
        if len(algorithms) > 1 and given:
            raise ValueError(f"{given[0]} differs between algorithms; add --algorithm, or leave it out")
        check_ranges(self, eta=(0, 10**6), lr=(0, 10), sft_lr=(0, 10))
        for stage in self.stages():
            dno.check_positive(eta=stage.eta, iterations=stage.iterations)
            dno.check_regularization(stage.tau, stage.eta)
            self.practice(stage)
            if stage.algorithm in (1, 3) and stage.samples < 2:
                raise ValueError(f"samples is {stage.samples}; expected at least 2, each other's opponents")
        if self.option != "I" and self.algorithm != 4:
            raise ValueError("option II belongs to Algorithm 4; add --algorithm 4")
        if (self.rule == "scored") != (self.judgments == "scores") or (self.rule == "scored" and self.oracle == "synthetic"):
            raise ValueError("rule scored, judgments scores and a language model that scores belong together; give all three")
        if self.judgments == "scores" and self.judge_form != "scored":
            raise ValueError("judgments scores need a judge that gives scores; leave --judge-form out")
        if algorithms == (2,) and (self.tau or self.move_reference_every):
            raise ValueError("tau and move-reference-every belong to Algorithms 3 and 4; choose one of them by --algorithm")
        self.check_idle()
        check_ranges(self, iterations=(1, 10**5), samples=(1, 10_000), prompts_per_step=(1, 10_000), margin=(0, 1),
                     prompts=(1, 72), sft_steps=(1, 10**6), vocabulary=(256, 10**5), layers=(1, 100), width=(8, 4096),
                     max_new_tokens=(1, 4096), survey=(1, 10_000), judged=(1, 10_000), seed=(0, 10**9),
                     move_reference_every=(0, 10**5), temperature=TEMPERATURES, threads=THREADS)  # fmt: skip
        dno.check_positive(sft_lr=self.sft_lr)
        self.transformer(2)  # checks its shape

    def check_idle(self) -> None:
        """ValueError naming what is given and would be of no use."""
        ranking = changed(self, "rule", "margin", "judgments", "replay")
        if self.algorithm in (1, 3) and ranking:
            raise ValueError(f"{ranking} belongs to Algorithms 2 and 4; Algorithms 1 and 3 train on all pairs")
        if self.rule not in ("large-margin", "teacher") and changed(self, "margin"):
            raise ValueError(f"margin belongs to the rules large-margin and teacher, and rule is {self.rule}")
        if self.oracle == "synthetic" and changed(self, "judged"):
            raise ValueError("judged belongs to a judge that is a language model; add --oracle openai:MODEL")
        teacher = changed(self, "teacher_url", "teacher_prices")
        if teacher and not self.teacher.startswith("openai"):
            raise ValueError(f"{teacher} belongs to a language model, and teacher is {self.teacher}; "
                             "add --teacher openai:MODEL")  # fmt: skip

    def algorithms(self) -> tuple[int, ...]:
        """Which to run one after the other; with a judge that costs money only one, if it is not said which Algorithm 2."""
        if self.algorithm is not None:
            return (self.algorithm,)
        return (2, 3) if self.oracle == "synthetic" else (2,)

    def stages(self) -> list[SimpleNamespace]:
        """The algorithms to run one after the other, each from the fine-tuned policy, with all their numbers."""
        chosen = {name: value for name, value in asdict(self).items() if value is not None}
        return [SimpleNamespace(**{**RECIPES[number], **chosen, "algorithm": number}) for number in self.algorithms()]

    def practice(self, stage: SimpleNamespace) -> dno.Practice:
        """The settings of the algorithm's loop."""
        trained = TRAINED if stage.algorithm in (1, 3) else None
        return dno.Practice(stage.samples, stage.temperature, stage.top_p, stage.judgments, replay=stage.replay,
                            prompts_per_step=stage.prompts_per_step, learning_rate=stage.lr, fall=stage.fall,
                            trained=trained)  # fmt: skip

    def transformer(self, tokens: int) -> Config:
        """The shape of the transformer. Small embeddings: a word that changes the answer is told apart sooner."""
        return Config(tokens, self.layers, self.width, hidden=self.width * 11 // 4, embedding_std=0.025)

    def policy(self, tokenizer: tiktoken.Encoding) -> TextPolicy:
        """A new policy, with the weights that its seed draws."""
        torch.manual_seed(self.seed)
        model = Transformer(self.transformer(tokenizer.n_vocab)).to(self.device, DTYPES[self.dtype])
        return TextPolicy(model, tokenizer, self.max_new_tokens)


HELD_OUT = tuple(x for i, x in enumerate(PROMPTS) if (i + i // len(TOPICS)) % 4 == 0)  # their words all occur in training
TRAINING = tuple(x for x in PROMPTS if x not in HELD_OUT)


def examples(seed: int) -> list[tuple[str, str]]:
    """The corpus of supervised fine-tuning: 200 answers of the student to each training prompt, shuffled."""
    draw = random.Random(seed)
    pairs = [(x, student_answer(x, draw)) for x in TRAINING for _ in range(200)]
    draw.shuffle(pairs)
    return pairs


def demonstrations(seed: int, count: int, teacher: OpenAITeacher | None = None) -> dno.Data:
    """Alg. 2, line 3: for iteration t some training prompts, drawn anew, with the teacher's answers: those of a language model,
    always the same to a prompt (prompts that it has none to are left out), or of `teacher_answer`."""

    def data(t: int) -> tuple[list[str], list[str]]:
        draw = random.Random(seed * 1_000_003 + t)
        prompts = draw.sample(TRAINING, count)
        if teacher is None:
            return prompts, [teacher_answer(x, draw) for x in prompts]
        prompts, gold = answered(teacher, prompts)
        if not prompts:
            raise Stopped(f"the teacher has no answer to any prompt of iteration {t}")
        return prompts, gold

    return data


def answered(teacher: OpenAITeacher, prompts: list[str]) -> tuple[list[str], list[str]]:
    """The prompts that the teacher has an answer to, and the answers."""
    answers = [(x, y) for x, y in zip(prompts, teacher.answers(prompts), strict=True) if y is not None]
    return [x for x, _ in answers], [y for _, y in answers]


@dataclass(frozen=True)
class Judging:
    """Who judges a run and writes its gold responses; None for the synthetic teacher."""

    judge: Oracle
    teacher: OpenAITeacher | None

    def data(self, config: TextConfig, hard: bool) -> dno.Data:
        """What the algorithms are given; those with soft targets do not look at gold responses, so that none are paid for."""
        return demonstrations(config.seed, config.prompts, self.teacher if hard else None)

    def spending(self) -> dict[str, float | None]:
        """Requests of judge and teacher so far and dollars that they can have cost (None: a price is not known)."""
        endpoints = [part.endpoint for part in (self.judge, self.teacher) if hasattr(part, "endpoint") and part.endpoint.live]
        ledgers = {str(endpoint.ledger.path): endpoint.ledger for endpoint in endpoints}.values()
        dollars = None if any(endpoint.price is None for endpoint in endpoints) else sum(ledger.spent() for ledger in ledgers)
        return {"requests": sum(ledger.totals()["requests"] for ledger in ledgers), "dollars": dollars}


def judging(config: TextConfig) -> Judging:
    """Judge and teacher as the config has them. Refused if an endpoint cannot be asked."""
    judge, teacher = RegisterJudge(), None
    if config.oracle != "synthetic":
        judge = OpenAIJudge(open_judge(config), config.judge_form, seed=config.seed)
        config.judge_model = judge.endpoint.model
    if config.teacher != "synthetic":
        url = config.teacher_url or config.judge_url
        teacher = OpenAITeacher(open_endpoint(config, config.teacher, None, url, config.teacher_prices, "teacher"))
    return Judging(judge, teacher)


def different(prompt: str, count: int, draw: random.Random) -> list[str]:
    """So many different answers of the student."""
    answers: dict[str, None] = {}  # a set in the order of its making, which does not depend on the process
    while len(answers) < count:
        answers[student_answer(prompt, draw)] = None
    return list(answers)


def announce_judging(config: TextConfig, judging: Judging) -> None:
    """Say whom the run will ask how much, and what it will cost: with the student's and the synthetic teacher's answers in
    place of the samples and gold responses that are not known yet."""
    draw, plans = random.Random(0), {}
    if judging.teacher:
        plans["teacher"] = judging.teacher, judging.teacher.endpoint.plan(judging.teacher.questions(PROMPTS))
    if isinstance(judging.judge, OpenAIJudge):

        def gold(x: str) -> str:
            return "word " * judging.teacher.max_tokens if judging.teacher else teacher_answer(x, draw)

        def plan(pairs: list[tuple[str, str, str]]) -> Plan:
            return judging.judge.endpoint.plan(judging.judge.questions(*zip(*pairs, strict=True)))

        def survey(before: bool) -> Plan:
            k, rows = config.judged, [(x, gold(x), different(x, 2 * config.judged, draw)) for x in HELD_OUT]
            pairs = [(x, y, best) for x, best, ys in rows for y in ys[:k]]
            return plan(pairs + [(x, *two) for x, _, ys in rows for two in zip(ys[:k], ys[k:], strict=True) if before])

        total = survey(before=False)
        for stage in config.stages():
            hard = stage.algorithm in (2, 4)
            groups = [(x, [*different(x, stage.samples, draw), *[gold(x)] * hard]) for x in TRAINING[: config.prompts]]
            training = plan([(x, *two) for x, ys in groups for two in combinations(ys, 2)])
            total += (training + survey(before=True)) * stage.iterations
        plans["judge"] = judging.judge, total
    elif config.dry_run:
        print("the judge is synthetic: nobody is asked, nothing is paid")
    for name, (part, plan_) in plans.items():
        print(f"{name}: {part.endpoint}")
        if part.endpoint.live:
            print(f"    the whole run: {plan_}; spent so far: {part.endpoint.spent()}")
    if plans and config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


class Validation:
    """Measures a policy on held-out prompts, by a survey of its samples, classified: `shares` [T+1, X, 4], of pi_1 first. The
    class probabilities being the judge's, win rates and gaps follow without a further judgment."""

    HEADER = "P(> teacher) | gap: last        average    | P(new > old)"

    def __init__(self, policy: TextPolicy, judge: RegisterJudge, k: int, seed: int, teacher: OpenAITeacher | None = None):
        self.policy, self.k, self.seed, draw = policy, k, seed, random.Random(seed)
        self.prompts, self.gold = list(HELD_OUT), [teacher_answer(x, draw) for x in HELD_OUT]
        if teacher:
            self.prompts, self.gold = answered(teacher, self.prompts)
            if not self.prompts:
                raise Stopped("the teacher has no answer to any held-out prompt")
        self.P = judge.P[[prompt_class(x) for x in self.prompts]]
        self.teacher = F.one_hot(torch.tensor([classify(y) for y in self.gold]), len(CLASSES)).double()
        self.shares = torch.empty(0, len(self.prompts), len(CLASSES), dtype=torch.float64)
        self.responses: list[list[Response]] = []

    def __call__(self) -> float:
        """Survey the policy as it is; its win rate over the teacher, the score of Alg. 2, line 9."""
        return dno.win_rate(self.P, self.survey(), self.teacher)

    def survey(self) -> Tensor:
        """How often each class occurs among the policy's samples, [X, 4]; kept with what was found before."""
        self.responses = self.policy.survey(self.prompts, self.k, self.seed)
        classes = torch.tensor([[classify(y) for y in ys] for ys in self.responses])
        shares = F.one_hot(classes, len(CLASSES)).double().mean(1)
        self.shares = torch.cat([self.shares, shares[None]])
        return shares

    @cached_property
    def nash(self) -> Tensor:
        """The exact Nash policy over classes, [X, 4]."""
        return dno.nash(self.P)

    def state(self) -> dict[str, Any]:
        """All that was found."""
        return {"shares": self.shares}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`, or forget everything."""
        self.shares = state["shares"] if state else self.shares[:0]

    def first(self) -> dict[str, Any]:
        """The numbers of pi_1, printed; with the exact Nash policy's and the noise floor."""
        nash, (gap, interval) = self.nash, self.gap(self.shares[0])
        shares, floor = self.shares[0].mean(0).tolist(), self.floor(nash)
        won = dno.win_rate(self.P, self.shares[0], self.teacher)
        print(f"pi_1: gap {gap:.3f} +- {interval:.3f}, P(> teacher) {won:.3f}, well-formed {1 - shares[-1]:.3f}")
        print(f"Exact Nash: gap {dno.duality_gap(self.P, nash):.0e}, measured as here {floor:.3f} (the noise floor); "
              f"P(Nash > teacher) {dno.win_rate(self.P, nash, self.teacher):.3f}, "
              f"gap of the teacher {dno.duality_gap(self.P, self.teacher):.3f}")  # fmt: skip
        return {"gap_first": gap, "gap_first_interval": interval, "win_rate_vs_teacher_first": won,
                "well_formed_first": 1 - shares[-1], "gap_floor": floor}  # fmt: skip

    def gap(self, shares: Tensor) -> tuple[float, float]:
        """Duality gap and the half width of its 95% interval, prompts being the clusters (normal approximation)."""
        by_prompt = 2 * dno.expected_win_rate(self.P, shares).amax(-1) - 1
        return by_prompt.mean().item(), 1.96 * by_prompt.std().item() / len(by_prompt) ** 0.5

    def floor(self, nash: Tensor) -> float:
        """The gap that would be measured of the Nash policy itself, by chance: the mean of 200 surveys of it."""
        generator = torch.Generator().manual_seed(self.seed)
        rows, gaps = nash.log().repeat_interleave(self.k, dim=0), []
        for _ in range(200):
            u = (torch.arange(self.k) + torch.rand(len(nash), self.k, generator=generator, dtype=torch.float64)) / self.k
            drawn = choose(rows, u.flatten(), 1.0, 1.0).view(len(nash), self.k)
            gaps.append(self.gap(F.one_hot(drawn, len(CLASSES)).double().mean(1))[0])
        return sum(gaps) / len(gaps)

    def row(self) -> dict[str, float]:
        """The numbers of pi_{t+1}, the last policy surveyed, with those of unif(pi_1..pi_t)."""
        before, last = self.shares[-2], self.shares[-1]
        gap_last, interval = self.gap(last)
        gap_average, interval_average = self.gap(self.shares[:-1].mean(0))
        return {"gap_last": gap_last, "gap_last_interval": interval, "gap_average": gap_average,
                "gap_average_interval": interval_average, "win_rate_vs_previous": dno.win_rate(self.P, last, before),
                "win_rate_vs_teacher": dno.win_rate(self.P, last, self.teacher), **self.share_columns(),
                "gap_nash": dno.duality_gap(self.P, self.nash)}  # fmt: skip

    def share_columns(self) -> dict[str, float]:
        """How often the last policy writes in each class."""
        return {f"share_{name}": self.shares[-1][:, i].mean().item() for i, name in enumerate(CLASSES)}

    @staticmethod
    def line(row: dict[str, float]) -> str:
        """The columns under `HEADER`."""
        gaps = "  ".join(f"{row[name]:.3f} +- {row[name + '_interval']:.3f}" for name in ("gap_last", "gap_average"))
        return f"{row['win_rate_vs_teacher']:12.3f} | {gaps} | {row['win_rate_vs_previous']:12.3f}"


class JudgedValidation(Validation):
    """Measures a policy by a judge that must be asked: some samples of each held-out prompt against the teacher's answer and
    against as many samples of the policy before. Gaps, for which one would have to know P, are not defined."""

    HEADER = "P(> teacher)  at equal length | answers | P(new > old)"

    def __init__(self, policy: TextPolicy, judging: Judging, config: TextConfig):
        super().__init__(policy, RegisterJudge(), config.survey, config.seed, judging.teacher)
        self.judge, self.count = judging.judge, config.judged
        self.samples: list[str] = []
        self.numbers: dict[str, float] = {}

    def __call__(self) -> float:
        """Have the policy as it is judged, all in one go; its win rate over the teacher. Stopped if there is no answer."""
        self.survey()
        before, k = self.samples, self.count
        self.samples = [str(y) for ys in self.policy.survey(self.prompts, k, self.seed + 1) for y in ys]
        prompts, gold = ([item for item in items for _ in range(k)] for items in (self.prompts, self.gold))
        wins = self.judge.prefer(prompts * (1 + bool(before)), self.samples * (1 + bool(before)), gold + before)
        lead = [len(y) - len(z) for y, z in zip(self.samples, gold, strict=True)]
        report = win_rate_report(wins[: len(gold)], prompts, lead)
        if report["n_parsed"] == 0:
            raise Stopped("the judge has no answer to any question of the validation")
        self.numbers = {"win_rate_vs_teacher": report["win_rate"], "win_rate_vs_teacher_interval": report["interval"],
                        "win_rate_vs_teacher_length_controlled": report["length_controlled"], "n": report["n"],
                        "n_parsed": report["n_parsed"]}  # fmt: skip
        if before:
            self.numbers["win_rate_vs_previous"] = wins[len(gold) :].nanmean().item()
        return report["win_rate"]

    def state(self) -> dict[str, Any]:
        """All that was found, and the samples that the next policy is compared with."""
        return {"shares": self.shares, "samples": self.samples, "numbers": self.numbers}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`, or forget everything."""
        super().restore(state)
        self.samples, self.numbers = (state["samples"], state["numbers"]) if state else ([], {})

    def first(self) -> dict[str, Any]:
        """The numbers of pi_1, printed."""
        well_formed, found = 1 - self.shares[0].mean(0)[-1].item(), self.numbers
        print(f"pi_1: P(> teacher) {found['win_rate_vs_teacher']:.3f} +- {found['win_rate_vs_teacher_interval']:.3f}, at equal "
              f"length {found['win_rate_vs_teacher_length_controlled']:.3f}, {found['n_parsed']} of {found['n']} judged; "
              f"well-formed {well_formed:.3f}")  # fmt: skip
        return {**{f"{name}_first": value for name, value in found.items()}, "well_formed_first": well_formed}

    def row(self) -> dict[str, float]:
        """The numbers of pi_{t+1}, the last policy judged."""
        return {**self.numbers, **self.share_columns()}

    @staticmethod
    def line(row: dict[str, float]) -> str:
        """The columns under `HEADER`."""
        return (f"{row['win_rate_vs_teacher']:.3f} +- {row['win_rate_vs_teacher_interval']:.3f}  "
                f"{row['win_rate_vs_teacher_length_controlled']:11.3f}    | {row['n_parsed']:3d}/{row['n']:3d} | "
                f"{row['win_rate_vs_previous']:12.3f}")  # fmt: skip


def fine_tune(config: TextConfig, policy: TextPolicy, pairs: list[tuple[str, str]], run: Run) -> None:
    """Supervised fine-tuning: Adam on -log pi(y|x) a token, 128 examples a step, from the run's last checkpoint on."""
    optimizer, steps = dno.adam(policy), config.sft_steps
    prompts, responses = policy.prompt_tokens([x for x, _ in pairs]), policy.response_tokens([y for _, y in pairs])
    first = 0
    if run.state:
        run.expect(run.state, {"policy": policy.state_dict(), "optimizer": like(optimizer), "sft_steps": int})
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])
        first = run.state["sft_steps"]
    for step in tqdm(range(first, steps), "fine-tuning", steps, initial=first, unit="step", disable=None, leave=False):
        chosen = random.Random(config.seed * 1_000_003 + step).sample(range(len(pairs)), 128)
        parts = [prompts[i] for i in chosen], [responses[i] for i in chosen]
        log_probs = token_log_prob({policy.model: 1.0}, *parts, policy.tokenizer.n_vocab)
        for group in optimizer.param_groups:
            group["lr"] = config.sft_lr * (1 - step / steps)
        optimizer.zero_grad()
        (-log_probs.sum() / sum(map(len, parts[1]))).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            run.checkpoint({"policy": policy.state_dict(), "optimizer": optimizer.state_dict(), "sft_steps": step + 1})


def loop_of(stage: SimpleNamespace, config: TextConfig, policy: TextPolicy, judging: Judging, validation: Validation,
            **common: Any) -> Iterator[dno.Round]:  # fmt: skip
    """The generator of the stage's algorithm."""
    first = (policy, judging.judge, judging.data(config, stage.algorithm in (2, 4)), stage.eta, stage.iterations)
    regularized = {"tau": stage.tau, "move_reference_every": stage.move_reference_every}
    common |= {"settings": config.practice(stage), "seed": config.seed}
    if stage.algorithm in (1, 3):
        return dno.algorithm3_sampled(*first, validation, **regularized, **common)
    rule = RULES[stage.rule](stage.margin)
    if stage.algorithm == 2:
        return dno.algorithm2(*first, rule, validation, **common)
    return dno.algorithm4(*first, rule, validation, option=stage.option, **regularized, **common)


def round_numbers(it: dno.Round, hard: bool) -> dict[str, float]:
    """What Table 2 reports of an iteration: new pairs by kind; of the K samples, their mean length in words, how many beat the
    gold response on average, and the share of prompts at which the best of them does. Of judged ones, where some are not."""
    row = {"loss": it.loss, "steps": it.steps}
    n = len(it.groups.responses[0])
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if hard else ys)]
    row["mean_length"] = sum(len(y.split()) for y in samples) / len(samples)
    if hard:
        row |= {f"pairs_{kind}": count for kind, count in dno.pair_kinds(it.chosen, n - 1).items()}
        wins = it.wins[:, :-1, -1]
        beaten = (wins > 0.5).double().masked_fill(wins.isnan(), float("nan"))
        best = beaten.nan_to_num(-1).amax(1)
        row |= {"student_wins": (n - 1) * beaten.nanmean(1).nanmean().item(), "best_of_n": best[best >= 0].mean().item()}
    return row


def judged_numbers(it: dno.Round, config: TextConfig, judging: Judging, hard: bool) -> dict[str, float | None]:
    """What a judge that must be asked adds: the share of judgments of the iteration that could not be had; prompts left out
    for want of a gold response; how often a verdict changes with the order; Table 2's scores; requests, dollars of the run."""
    row: dict[str, float | None] = {}
    if isinstance(judging.judge, OpenAIJudge):
        i, j = torch.triu_indices(*it.wins.shape[1:], 1)
        row = {"judgments_failed": it.wins[:, i, j].isnan().double().mean().item(),
               "flip_rate": judging.judge.flip_rate(it.groups.prompts, it.groups.responses)}  # fmt: skip
    if hard and config.judgments == "scores":
        row |= {"student_score": it.r_t[:, :-1].nanmean().item(), "teacher_score": it.r_t[:, -1].nanmean().item()}
    if row or judging.teacher:
        row |= {"prompts_dropped": config.prompts - len(it.groups.prompts), **judging.spending()}
    return row


def write_round(run: Run, iteration: int, it: dno.Round, hard: bool, rated: str) -> None:
    """responses-TTT.jsonl and pairs-TTT.jsonl of an iteration; rated: what r_t is, win_rate or score, null if not judged."""
    n = len(it.groups.responses[0])
    responses = [
        {"prompt": x, "response": y, "by": "teacher" if hard and i == n - 1 else "student", rated: None if math.isnan(r) else r,
         "class": CLASSES[classify(y)]}
        for x, ys, rs in zip(it.groups.prompts, it.groups.responses, it.r_t.tolist(), strict=True)
        for i, (y, r) in enumerate(zip(ys, rs, strict=True))
    ]
    pairs = []
    for x, i, j in it.chosen.tolist():
        first, second = it.groups.responses[x][i], it.groups.responses[x][j]
        label = 1.0 if hard else torch.sigmoid(it.r_t[x, i] - it.r_t[x, j]).item()
        pairs.append({"prompt": it.groups.prompts[x], "first": first, "second": second, "label": label})
    for name, lines in (("responses", responses), ("pairs", pairs)):
        run.write_lines(f"{name}-{iteration:03d}.jsonl", lines)


def show_responses(validation: Validation) -> None:
    """One response of each class that the survey found."""
    found = {classify(y): (x, y) for x, ys in zip(validation.prompts, validation.responses, strict=True) for y in ys}
    for kind, (x, y) in sorted(found.items()):
        tqdm.write(f"         {CLASSES[kind]:9} {x} -> {y!r}")


def train_stage(number: int, stage: SimpleNamespace, config: TextConfig, policy: TextPolicy, judging: Judging,
                validation: Validation, run: Run, base: dict[str, Tensor]) -> None:  # fmt: skip
    """Run one algorithm from the fine-tuned policy or the run's last checkpoint on, a line and a checkpoint an iteration."""
    policy.load_state_dict(base)
    optimizer, after, hard = dno.adam(policy, momentum=0.0), None, stage.algorithm in (2, 4)
    done = sum(earlier.iterations for earlier in config.stages()[:number])
    validation.restore(None)
    if run.state and run.state.get("stage") == number:
        found = {name: type(value) for name, value in validation.state().items()}
        run.expect(run.state, {"policy": policy.state_dict(), "optimizer": like(optimizer), "round": dno.Round,
                               "pi_ref": dict | None, "validation": found})  # fmt: skip
        policy.load_state_dict(run.state["policy"])
        optimizer.load_state_dict(run.state["optimizer"])
        pi_ref = copy.deepcopy(policy)
        if run.state["pi_ref"]:
            pi_ref.load_state_dict(run.state["pi_ref"])
        after = replace(run.state["round"], pi_ref=pi_ref)
        validation.restore(run.state["validation"])
    remember = lambda t, phase, *call: run.remember([number, t], phase, *call)  # noqa: E731
    loop = loop_of(stage, config, policy, judging, validation, optimizer=optimizer, after=after, remember=remember)
    print(f"\nAlgorithm {stage.algorithm}, eta {stage.eta:g}" + (f", tau {stage.tau:g}" if stage.tau else "") + ":")
    print(f"    t | {validation.HEADER} | well-formed | words |  T>S  S>T  S>S | loss")
    start = time.perf_counter()
    progress = tqdm(total=stage.iterations, initial=after.t if after else 0, unit="iteration", disable=None, leave=False)
    for it in loop:
        row = {"iteration": done + it.t, "algorithm": stage.algorithm, "t": it.t, "seconds": time.perf_counter() - start,
               **round_numbers(it, hard), **validation.row(), "best_iteration": it.best.t,
               **judged_numbers(it, config, judging, hard)}  # fmt: skip
        write_round(run, done + it.t, it, hard, "score" if config.judgments == "scores" else "win_rate")
        run.keep(f"policies/{done + it.t:03d}.pt", policy.state_dict())
        known = {name: None if value != value else value for name, value in row.items()}  # JSON has no NaN
        run.save(known, {"stage": number, "policy": policy.state_dict(), "optimizer": optimizer.state_dict(),
                       "round": replace(it, pi_ref=None), "pi_ref": it.pi_ref.state_dict() if it.pi_ref else None,
                       "validation": validation.state()})  # fmt: skip
        kinds = " ".join(f"{row[f'pairs_{kind}']:4d}" for kind in KINDS) if hard else " " * 14
        progress.update()
        tqdm.write(
            f"{it.t:5d} | {validation.line(row)} | {1 - row['share_malformed']:11.3f} | {row['mean_length']:5.1f} | {kinds} | "
            f"{row['loss']:.4f}" + (f" | ${row['dollars']:.4f}" if row.get("dollars") is not None else "")
        )
        if it.t % 10 == 0:
            show_responses(validation)
        start = time.perf_counter()
    progress.close()


def fine_tuned(config: TextConfig, run: Run) -> TextPolicy:
    """The policy pi_1, fine-tuned or, on resumption, as it was; tokenizer.json and policies/base.pt are in the run's folder."""
    corpus = examples(config.seed)
    ranks = learn_byte_pairs((f"{x} {y}" for x, y in corpus), config.vocabulary)
    tokenizer = make_tokenizer(ranks)
    listed = {"split": SPLIT, "ranks": [token.hex() for token in ranks], "special": [ANSWER, END]}
    run.write("tokenizer.json", json.dumps(listed) + "\n")
    policy = config.policy(tokenizer)
    (run.out / "policies").mkdir(exist_ok=True)
    base = run.load("policies/base.pt")
    if base is None:
        fine_tune(config, policy, corpus, run)
        run.keep("policies/base.pt", policy.state_dict())
    else:
        run.expect({"pi_1": base}, {"pi_1": policy.state_dict()})
        policy.load_state_dict(base)
    return policy


def run_text(config: TextConfig) -> None:
    """The preset "text": see `TextConfig`. Writes what README.md lists under "The folder of a run"."""
    start = time.perf_counter()
    torch.set_num_threads(config.threads)
    check_device(config.device)
    asked = judging(config)
    run = None if config.dry_run else Run("text", config, CLASSES_KEPT)
    announce_judging(config, asked)
    if run is None:
        return
    policy = fine_tuned(config, run)
    base, synthetic = copy.deepcopy(policy.state_dict()), config.oracle == "synthetic"
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters, {policy.tokenizer.n_vocab} tokens; "
          f"fine-tuned after {time.perf_counter() - start:.0f} s. Writing to {config.out}")  # fmt: skip
    if synthetic:
        validation = Validation(policy, RegisterJudge(), config.survey, config.seed, asked.teacher)
    else:
        validation = JudgedValidation(policy, asked, config)
    validation()
    first = validation.first()
    show_responses(validation)
    if run.state and run.state.get("stage", 0) >= len(config.stages()):
        raise BadInput(f"the checkpoint in {run.out} is of a run with more algorithms than this; choose another --out")
    for number, stage in enumerate(config.stages()):
        if not run.state or run.state.get("stage", 0) <= number:
            train_stage(number, stage, config, policy, asked, validation, run, base)
    summary = {**summarise_text(config, run.metrics, first), **asked.spending()}
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("text.png", text_figure(config, run.metrics, first))
    print(f"\n{time.perf_counter() - start:.0f} s. Figure and metrics: {run.out}")


HEADINGS = {"gap_last": "gap of last", "gap_average": "gap of mixture", "win_rate_vs_teacher": "P(> teacher)",
            "win_rate_vs_teacher_length_controlled": "at equal length", "share_malformed": "malformed", "mean_length": "words",
            "gap_last_over_first": "over pi_1's", "win_rate_vs_teacher_most": "P(> teacher), most"}  # fmt: skip


def summarise_text(config: TextConfig, metrics: list[dict[str, Any]], first: dict[str, Any]) -> dict[str, Any]:
    """The headline numbers, printed as a table: last iterates' as means over the last third of the iterations."""
    columns = [name for name in ("gap_last", "gap_average", "win_rate_vs_teacher", "win_rate_vs_teacher_length_controlled",
                                 "share_malformed", "mean_length") if name in metrics[0]]  # fmt: skip
    summary = {"config": asdict(config), **first, "stages": []}
    print("\nmeans over the last third of the iterations")
    for stage in config.stages():
        rows = [row for row in metrics if row["algorithm"] == stage.algorithm]
        tail = rows[-max(1, len(rows) // 3) :]
        found = {name: sum(row[name] for row in tail) / len(tail) for name in columns}
        if "gap_last" in columns:
            found |= {"gap_last_over_first": found["gap_last"] / first["gap_first"], "gap_average": rows[-1]["gap_average"]}
        found |= {"win_rate_vs_teacher_most": max(row["win_rate_vs_teacher"] for row in rows)}
        summary["stages"].append({"algorithm": stage.algorithm, **found, "best_iteration": rows[-1]["best_iteration"],
                                  "seconds": sum(row["seconds"] for row in rows)})  # fmt: skip
        if len(summary["stages"]) == 1:
            print("            | " + " | ".join(HEADINGS[name] for name in found))
        values = " | ".join(f"{value:{len(HEADINGS[name])}.3f}" for name, value in found.items())
        print(f"Algorithm {stage.algorithm} | {values}")
    return summary


def text_figure(config: TextConfig, metrics: list[dict[str, Any]], first: dict[str, Any]) -> plt.Figure:
    """Win rate over the teacher and the gaps of last iterate and mixture (where they are not defined: the length of responses)
    against the iteration, a line an algorithm."""
    panels = {"win_rate_vs_teacher": "$P(\\pi_{t+1} \\succ$ teacher$)$", "gap_last": "gap of the last iterate $\\pi_{t+1}$",
              "gap_average": "gap of the mixture unif$(\\pi_1..\\pi_t)$"}  # fmt: skip
    if "gap_last" not in metrics[0]:
        panels = {"win_rate_vs_teacher": panels["win_rate_vs_teacher"], "mean_length": "words a response"}
    levels = {"win_rate_vs_teacher": (0.5, "1/2")}
    if "gap_floor" in first:
        levels |= dict.fromkeys(("gap_last", "gap_average"), (first["gap_floor"], "noise floor: Nash itself, measured so"))
    starts = {"win_rate_vs_teacher": first["win_rate_vs_teacher_first"], "gap_last": first.get("gap_first")}
    names = {1: "Algorithm 1, sampled", 2: "Algorithm 2", 3: "Algorithm 3, sampled", 4: "Algorithm 4"}
    figure, grid = plt.subplots(1, len(panels), figsize=(11 if len(panels) == 3 else 8, 3.6))
    for axes, (column, label) in zip(grid, panels.items(), strict=True):
        for stage, style in zip(config.stages(), ("-", "--"), strict=False):
            rows, start = [row for row in metrics if row["algorithm"] == stage.algorithm], starts.get(column)
            t, values = [row["t"] for row in rows], np.array([row[column] for row in rows])
            (line,) = axes.plot([0, *t] if start is not None else t, [start, *values] if start is not None else values, style,
                                label=names[stage.algorithm])  # fmt: skip
            if f"{column}_interval" in metrics[0]:
                half = np.array([row[f"{column}_interval"] for row in rows])
                axes.fill_between(t, values - half, values + half, color=line.get_color(), alpha=0.15, lw=0)
            if f"{column}_length_controlled" in metrics[0]:
                axes.plot(t, [row[f"{column}_length_controlled"] for row in rows], "-.", color="C1", label="at equal length")
        if column in levels:
            axes.axhline(levels[column][0], ls=":", lw=1, color="0.3", label=levels[column][1])
        axes.set(xlabel="iteration $t$", ylabel=label, ylim=(0, None))
        if column not in ("gap_last", "mean_length"):  # whose lines are those of its neighbour
            axes.legend(fontsize=8)
    return figure


# --- Preset "ablations" ------------------------------------------------------------------------------------------------------


@dataclass
class AblationsConfig:
    """ablations: the paper's comparisons on the world of text: each method tuned on its own seeds, then run on fresh ones."""

    algorithm: int | None = setting(None, "only the methods that are variants of this algorithm", choices=(2, 3, 4))
    iterations: int = setting(40, "T of the reported runs")
    seeds: int = setting(5, "fresh seeds to report")
    tuning_iterations: int = setting(20, "T of the tuning runs")
    tuning_seeds: int = setting(2, "seeds to tune on; the settings tried are the same number for each method")
    eta: float | None = setting(None, "> 0; fixes eta and eta~ instead of tuning them")
    tau: float | None = setting(None, "in [0, eta]; of the regularised methods (eta / 20, and eta / 2 with soft targets)")
    margin: float = setting(0.4, "in [0, 1], least difference of the win rates of a pair, where there is a margin")
    prompts: int = setting(48, "X, prompts an iteration")
    prompts_per_step: int = setting(8, "whose pairs make up a batch")
    survey: int = setting(24, "samples of each held-out prompt by which a policy is measured")
    sft_steps: int = setting(400, "Adam steps of supervised fine-tuning of the policy that all start from")
    seed: int = setting(0, "of the world: the corpus and the fine-tuned policy, the same for all runs")
    out: str | None = setting(None, "folder (default: runs/ablations-SEED)")
    resume: bool = setting(False, "go on: runs that are finished are not repeated")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("float32", "of the transformer", tuple(DTYPES))
    threads: int = setting(1, "CPU threads of each run")
    jobs: int = setting(2, "runs at a time")

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/ablations-{self.seed}"
        check_ranges(self, iterations=(1, 10**5), seeds=(2, 1000), tuning_iterations=(1, 10**5), tuning_seeds=(1, 1000),
                     prompts_per_step=(1, 10_000), threads=THREADS, jobs=THREADS)  # fmt: skip
        if self.eta is not None:
            dno.check_positive(eta=self.eta)
            check_ranges(self, eta=(0, 10**6))
        if self.tau is not None and self.algorithm == 2:
            raise ValueError("tau belongs to the regularised methods, variants of Algorithms 3 and 4; leave it out")
        if self.algorithm == 3 and changed(self, "margin"):
            raise ValueError("margin belongs to variants of Algorithms 2 and 4; leave it out")
        for label, settings in settings_to_try(self).items():
            for _, eta in settings if METHODS[label][0] != 2 and self.tau is not None else ():
                dno.check_regularization(self.tau, eta)
        self.world()

    def world(self) -> TextConfig:
        """The text preset's config of the policy that all methods start from."""
        names = ("prompts", "survey", "sft_steps", "margin", "seed", "out", "device", "dtype", "threads")
        return TextConfig(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Start:
    """What a method is given: the fine-tuned policy to train, the judge, data and validation, and its tuned numbers."""

    policy: TextPolicy
    data: dno.Data
    validation: Validation
    iterations: int
    eta: float
    tau: float | None
    margin: float
    seed: int
    settings: dno.Practice
    judge: RegisterJudge

    def algorithm2(self, rule: Callable[[Tensor, Tensor], Tensor]) -> Iterator[dno.Round]:
        """Algorithm 2 with a rule of line 6."""
        return dno.algorithm2(self.policy, self.judge, self.data, self.eta, self.iterations, rule, self.validation,
                              settings=self.settings, seed=self.seed, optimizer=dno.adam(self.policy, 0.0))  # fmt: skip

    def offline(self, loss: dno.PairLoss) -> Iterator[dno.Round]:
        """As Algorithm 2, but samples and reference are pi_1's in all iterations: preference data collected beforehand."""
        pi_1, optimizer, settings = copy.deepcopy(self.policy), dno.adam(self.policy, 0.0), self.settings
        best = dno.validated(self.policy, 1, self.validation)
        for t in range(1, self.iterations + 1):
            seed, generator = dno.random_numbers(self.seed, t)
            groups = dno.sample_groups(pi_1, *self.data(t), settings, seed)
            wins = dno.judge_groups(self.judge, groups)
            r = dno.group_win_rates(dno.draw_outcomes(wins, generator))
            r, usable = dno.demote_repetitions(r, groups, str.split, settings.ngram)
            chosen = dno.large_margin_pairs(r, usable, self.margin)
            D = dno.with_reference(dno.form_pairs(groups, r, chosen), pi_1)
            fit = dno.fit_pairs(self.policy, D, loss, optimizer, settings, settings.rate(t, self.iterations), generator)
            best = dno.validated(self.policy, t + 1, self.validation, best)
            yield dno.Round(t, groups, wins, r, chosen, [], best, **fit)


def sft_on_positives(start: Start) -> Iterator[dno.Round]:
    """Likelihood of the better response of each offline pair; the worse one is not looked at. eta plays no part."""
    return start.offline(lambda log_ratio1, log_ratio2, r1, r2: -log_ratio1)


def offline_dpo(start: Start) -> Iterator[dno.Round]:
    """DPO on pairs of pi_1's samples and the teacher's, with reference pi_1."""
    return start.offline(dno.hard_targets(start.eta))


def spin(start: Start) -> Iterator[dno.Round]:
    """The teacher's response against each of the student's, on policy, without a judge."""
    return start.algorithm2(dno.gold_against_students)


def dno_restrictive(start: Start) -> Iterator[dno.Round]:
    """Only pairs in which the teacher beats the student."""
    return start.algorithm2(partial(dno.teacher_pairs, margin=start.margin))


def dno_without_margin(start: Start) -> Iterator[dno.Round]:
    """Every pair that is no tie."""
    return start.algorithm2(partial(dno.large_margin_pairs, margin=0.0))


def dno_practical(start: Start) -> Iterator[dno.Round]:
    """Algorithm 2 as it is."""
    return start.algorithm2(partial(dno.large_margin_pairs, margin=start.margin))


def dno_lookahead(start: Start) -> Iterator[dno.Round]:
    """All the pairs that DNO comes to see, shuffled, on which pi_1 is trained anew with itself as reference: DPO that knows the
    future's pairs, but not in their order."""
    pi_1 = copy.deepcopy(start.policy)
    explorer = replace(start, policy=copy.deepcopy(pi_1), validation=lambda: 0.0)
    rounds = list(dno_practical(explorer))
    D = dno.with_reference(dno.join(dno.replay([it.earlier[0] for it in rounds], 1.0, torch.Generator(), decay=1.0)), pi_1)
    generator, optimizer = dno.random_numbers(start.seed, 0)[1], dno.adam(start.policy, 0.0)
    best = dno.validated(start.policy, 1, start.validation)
    parts = D.batches(-(-len(D.group.unique()) // start.iterations), generator)
    parts += [D.take(torch.arange(0))] * (start.iterations - len(parts))
    for t, (part, it) in enumerate(zip(parts, rounds, strict=True), 1):
        rate = start.settings.rate(t, start.iterations)
        fit = dno.fit_pairs(start.policy, part, dno.hard_targets(start.eta), optimizer, start.settings, rate, generator)
        best = dno.validated(start.policy, t + 1, start.validation, best)
        yield replace(it, best=best, **fit)


def regularized_dno(start: Start) -> Iterator[dno.Round]:
    """Algorithm 4, option I, reference pi_1."""
    tau = start.eta / 20 if start.tau is None else start.tau
    return dno.algorithm4(start.policy, start.judge, start.data, start.eta, start.iterations,
                          partial(dno.large_margin_pairs, margin=start.margin), start.validation, tau, settings=start.settings,
                          seed=start.seed, optimizer=dno.adam(start.policy, 0.0))  # fmt: skip


def soft_targets_moving_reference(start: Start) -> Iterator[dno.Round]:
    """Algorithm 3's regression with r_t estimated from K + 1 samples, so from as many judgments as the others ask for, and a
    reference moved every 5 iterations."""
    tau = start.eta / 2 if start.tau is None else start.tau
    settings = replace(start.settings, samples=start.settings.samples + 1)
    return dno.algorithm3_sampled(start.policy, start.judge, start.data, start.eta, start.iterations, start.validation, tau,
                                  move_reference_every=5, settings=settings, seed=start.seed,
                                  optimizer=dno.adam(start.policy, 0.0))  # fmt: skip


GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (2.0, 8.0))  # four settings each
SOFT_GRID = tuple((lr, eta) for lr in (5e-4, 1e-3) for eta in (0.25, 0.5))
METHODS = {  # label: (variant of which algorithm, function, settings (lr, eta) to tune over)
    "SFT on positives": (2, sft_on_positives, tuple((lr, 8.0) for lr in (2e-4, 5e-4, 1e-3, 2e-3))),
    "offline DPO": (2, offline_dpo, GRID),
    "SPIN": (2, spin, GRID),
    "DNO-Restrictive": (2, dno_restrictive, GRID),
    "DNO without margin": (2, dno_without_margin, GRID),
    "DNO-Lookahead": (2, dno_lookahead, GRID),
    "DNO": (2, dno_practical, GRID),
    "regularised DNO": (4, regularized_dno, GRID),
    "soft targets, moving reference": (3, soft_targets_moving_reference, SOFT_GRID),
}
ORDERINGS = (  # the paper's, by win rate: (better, worse)
    ("DNO", "DNO-Restrictive"), ("DNO-Restrictive", "SPIN"), ("DNO", "offline DPO"), ("offline DPO", "SFT on positives"),
    ("DNO", "DNO without margin"),
)  # fmt: skip


def run_method(config: AblationsConfig, label: str, lr: float, eta: float, seed: int, iterations: int) -> list[dict[str, Any]]:
    """Run one method from the fine-tuned policy in the run's folder; a row for each iteration."""
    torch.set_num_threads(config.threads)
    tokenizer = json.loads((Path(config.out) / "tokenizer.json").read_text())
    ranks = {bytes.fromhex(token): rank for rank, token in enumerate(tokenizer["ranks"])}
    world, base = config.world(), torch.load(Path(config.out) / "policies" / "base.pt", weights_only=True)
    policy = world.policy(make_tokenizer(ranks))
    policy.load_state_dict(base)
    validation = Validation(policy, RegisterJudge(), config.survey, seed)
    settings = dno.Practice(temperature=1.0, top_p=1.0, learning_rate=lr, prompts_per_step=config.prompts_per_step)
    start = Start(policy, demonstrations(seed, config.prompts), validation, iterations, eta, config.tau, config.margin, seed,
                  settings, RegisterJudge())  # fmt: skip
    algorithm, method, _ = METHODS[label]
    rows = []
    for it in method(start):
        row = {"method": label, "lr": lr, "eta": eta, "seed": seed, "iteration": it.t}
        rows.append({**row, **round_numbers(it, algorithm != 3), **validation.row()})
    return rows


def end_with_parent() -> None:
    """Make this worker end when the process that started it does, even by kill -9."""
    Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def results(config: AblationsConfig, run: Run, jobs: list[tuple[str, float, float, int, int]],
            what: str) -> dict[tuple[str, float, float, int, int], list[dict[str, Any]]]:  # fmt: skip
    """The rows of each job (method, lr, eta, seed, iterations), from its file in the run's folder or by running it."""
    files = {job: Path("jobs") / ("-".join(map(str, job)).replace(" ", "_") + ".json") for job in jobs}
    missing = [job for job in jobs if not (run.out / files[job]).exists()]
    with ProcessPoolExecutor(config.jobs, get_context("spawn"), initializer=end_with_parent) as pool:
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers begin deaf to Ctrl-C, of which this process tells them
        running = {pool.submit(run_method, config, *job): job for job in missing}
        signal.signal(signal.SIGINT, heard)
        try:
            for done in tqdm(as_completed(running), what, len(missing), unit="run", disable=None, leave=False):
                run.write(str(files[running[done]]), json.dumps(done.result()))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {job: json.loads((run.out / file).read_text()) for job, file in files.items()}


def late(rows: list[dict[str, Any]], column: str) -> float:
    """Mean of a column over the last third of the iterations."""
    tail = rows[-max(1, len(rows) // 3) :]
    return sum(row[column] for row in tail) / len(tail)


def interval(values: list[float] | np.ndarray) -> tuple[float, float]:
    """Mean, and the half width of its 95% interval by Student's t."""
    values = np.asarray(values)
    return float(values.mean()), float(student_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def settings_to_try(config: AblationsConfig) -> dict[str, tuple[tuple[float, float], ...]]:
    """The (lr, eta) to tune each method over."""
    methods = {label: settings for label, (algorithm, _, settings) in METHODS.items() if config.algorithm in (None, algorithm)}
    if config.eta is None:
        return methods
    return {label: tuple(dict.fromkeys((lr, config.eta) for lr, _ in settings))[:2] for label, settings in methods.items()}


def as_csv(rows: list[dict[str, Any]]) -> str:
    """A table with all columns that occur, empty where a row has none."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(name for row in rows for name in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def run_ablations(config: AblationsConfig) -> None:
    """The preset "ablations": see `AblationsConfig`."""
    check_device(config.device)
    run = Run("ablations", config, CLASSES_KEPT)
    (run.out / "jobs").mkdir(exist_ok=True)
    torch.set_num_threads(config.threads)
    fine_tuned(config.world(), run)
    methods = settings_to_try(config)
    tuning = [(label, *tried, 1000 + seed, config.tuning_iterations)
              for label, settings in methods.items() for tried in settings for seed in range(config.tuning_seeds)]  # fmt: skip
    print(f"{len(tuning)} tuning runs of {config.tuning_iterations} iterations, "
          f"{len(methods) * config.seeds} reported ones of {config.iterations}; {config.jobs} at a time")  # fmt: skip
    scores = {label: dict.fromkeys(settings, 0.0) for label, settings in methods.items()}
    for (label, *tried, _, _), rows in results(config, run, tuning, "tuning").items():
        scores[label][tuple(tried)] += late(rows, "win_rate_vs_teacher") / config.tuning_seeds
    tuned = {label: max(score, key=score.get) for label, score in scores.items()}
    jobs = [(label, *tuned[label], seed, config.iterations) for label in methods for seed in range(config.seeds)]
    found = results(config, run, jobs, "reporting")
    curves = {label: [rows for job, rows in found.items() if job[0] == label] for label in methods}
    run.write("ablations.csv", as_csv([row for rows in found.values() for row in rows]))
    summary = summarise_ablations(config, curves, scores, tuned)
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    with plt.style.context(STYLE):
        run.figure("ablations.png", ablations_figure(curves))
    print(f"\nTable and figure: {run.out}")


def summarise_ablations(config: AblationsConfig, curves: dict[str, list[list[dict[str, Any]]]],
                        scores: dict[str, dict[tuple[float, float], float]],
                        tuned: dict[str, tuple[float, float]]) -> dict[str, Any]:  # fmt: skip
    """Print and return: each method's late win rate and gaps with intervals over seeds; the paper's orderings, by paired
    differences; and the analogue of Table 2."""
    summary: dict[str, Any] = {"config": asdict(config), "methods": {}, "orderings": [], "table_2": []}
    print(f"\nmeans over the last third of {config.iterations} iterations, {config.seeds} seeds, with 95% intervals")
    print(f"{'method':31} |   lr    eta  |  P(> teacher)  |  gap of last   | gap of mixture | well-formed")
    for label, seeds in curves.items():
        columns = ("win_rate_vs_teacher", "gap_last", "gap_average", "share_malformed")
        row = {name: interval([late(rows, name) for rows in seeds]) for name in columns}
        tried = {f"lr {lr:g}, eta {eta:g}": score for (lr, eta), score in scores[label].items()}
        summary["methods"][label] = {"lr": tuned[label][0], "eta": tuned[label][1], "tuning": tried, **row}
        shown = " | ".join(f"{mean:.3f} +- {half:.3f}" for mean, half in (row[name] for name in columns[:3]))
        print(f"{label:31} | {tuned[label][0]:.0e} {tuned[label][1]:5.2f} | {shown} | {1 - row['share_malformed'][0]:.3f}")
    print("\nthe paper's orderings, by P(> teacher): difference with 95% interval over seeds")
    for better, worse in ORDERINGS:
        if better in curves and worse in curves:
            pairs = zip(curves[better], curves[worse], strict=True)
            mean, half = interval([late(a, "win_rate_vs_teacher") - late(b, "win_rate_vs_teacher") for a, b in pairs])
            verdict = "holds" if mean > half else "the other way round" if -mean > half else "not decided"
            summary["orderings"].append({"better": better, "worse": worse, "difference": mean, "interval": half,
                                         "verdict": verdict})  # fmt: skip
            print(f"{better:16} > {worse:19}: {mean:+.3f} +- {half:.3f}  {verdict}")
    print("\nmethod and iteration (mean over seeds) | words | best of n | student wins |  T>S    S>T    S>S")
    columns = ("mean_length", "best_of_n", "student_wins", *(f"pairs_{kind}" for kind in KINDS))
    for label in ("DNO-Restrictive", "DNO"):
        if label not in curves:
            continue
        for t in sorted({1, config.iterations // 4, config.iterations // 2, config.iterations} - {0}):
            row = {name: float(np.mean([rows[t - 1][name] for rows in curves[label]])) for name in columns}
            summary["table_2"].append({"method": label, "iteration": t, **row})
            numbers = f"{row['mean_length']:5.1f} | {row['best_of_n']:9.3f} | {row['student_wins']:12.2f} | "
            print(f"{label:31} {t:6d} | " + numbers + " ".join(f"{row[f'pairs_{kind}']:6.1f}" for kind in KINDS))
    return summary


def ablations_figure(curves: dict[str, list[list[dict[str, Any]]]]) -> plt.Figure:
    """Win rate over the teacher and gap of the last iterate against the iteration: means and 95% intervals over seeds."""
    groups = (("SFT on positives", "offline DPO", "DNO-Lookahead"), ("SPIN", "DNO-Restrictive"),
              ("DNO", "DNO without margin", "regularised DNO", "soft targets, moving reference"))  # fmt: skip
    panels = (("win_rate_vs_teacher", "$P(\\pi_{t+1} \\succ$ teacher$)$"), ("gap_last", "gap of the last iterate"))
    figure, grid = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="row")
    for (column, label), row in zip(panels, grid, strict=True):
        for axes, group in zip(row, groups, strict=True):
            for name, style in zip((name for name in group if name in curves), ("-", "--", ":", "-."), strict=False):
                values = np.array([[point[column] for point in rows] for rows in curves[name]])  # (seeds, T)
                mean, half = np.array([interval(values[:, t]) for t in range(values.shape[1])]).T
                t = np.arange(1, len(mean) + 1)
                (line,) = axes.plot(t, mean, style, lw=1.6, label=name)
                axes.fill_between(t, mean - half, mean + half, color=line.get_color(), alpha=0.15, lw=0)
            if column == "win_rate_vs_teacher":
                axes.axhline(0.5, ls=":", lw=1, color="0.3", label="1/2")
                axes.legend(fontsize=8)
            else:
                axes.set(xlabel="iteration $t$")
        row[0].set(ylabel=label)
    return figure


# --- Preset "llm" ------------------------------------------------------------------------------------------------------------


@dataclass
class LlmConfig(JudgeOptions):
    """llm: Algorithm 2 (or 4, or 1 and 3 from samples) on a real chat model, with your prompts and your judge."""

    model: str = setting("", "a Hugging Face directory or a GGUF file of the Llama family")
    prompts: str = setting("prompts/general.jsonl", 'FILE.jsonl, a line {"prompt": ..., "gold": optional, "split": optional}')
    chat_format: str = setting("model", "the model's chat template, or the plain prompt and an empty line", ("model", "plain"))
    algorithm: int = setting(2, "2, 4: contrast sampled pairs; 1, 3: regress on soft targets", (1, 2, 3, 4))
    iterations: int = setting(3, "T; the prompts are cut into as many disjoint parts, as in the paper")
    eta: float = setting(0.1, "> 0, larger is slower; for Algorithms 2 and 4 eta~, 0.05 to 0.1 in the paper")
    tau: float = setting(0.0, "in [0, eta], pull towards pi_1 in Algorithms 3 and 4")
    rule: str = setting("large-margin", "which pairs Algorithms 2 and 4 train on", tuple(RULES))
    margin: float = setting(0.2, "in [0, 1], least difference of the win rates of a pair; few have .4")
    judgments: str = setting("probabilities", "rank by {0, 1} samples of P, as in Algorithm 2; by P; or by a judge's points",
                             ("outcomes", "probabilities", "scores"))  # fmt: skip
    samples: int = setting(5, "K, responses a prompt, as in the paper")
    temperature: float = setting(0.7, "in [0.01, 100], of sampling, the paper's")
    top_p: float = setting(0.95, "in (0, 1], of sampling, the paper's")
    max_new_tokens: int = setting(64, "after which a response is cut off; prompt and response fit the model's context")
    max_prompt_tokens: int = setting(512, "longer prompts are refused")
    replay: float = setting(0.3, "in [0, 1], share of the last iteration's pairs to train on again, as in the paper")
    train_prompts: int | None = setting(None, "of the file, the first so many are trained on (default: all)")
    held_out: int = setting(24, "prompts for validation: those of the split validation, else the last ones")
    judged: int = setting(2, "samples of each held-out prompt by which a policy is measured")
    batch_size: int = setting(64, "pairs a step, about; the paper's is 64")
    at_once: int = setting(4, "prompts whose responses are scored together; gradients add up to a step's")
    sample_batch: int = setting(64, "responses sampled together")
    lr: float = setting(5e-5, "Adam's learning rate in iteration 1, the paper's; falls with the iterations")
    seed: int = setting(0, "of the parts, the samples and the outcomes")
    out: str | None = setting(None, "folder of the run (default: runs/llm-SEED)")
    resume: bool = setting(False, "go on with the run in --out, to the same result as if it had never stopped")
    device: str = setting("cpu", "cpu, cuda or cuda:N")
    dtype: str = setting("bfloat16", "of the computation; weights are float32 besides", ("bfloat16", "float32"))
    threads: int = setting(2, "CPU threads, of all processes of a machine together")
    low_rank: int = setting(0, "r of the low-rank terms (LoRA) that are trained in place of the weights, at most the width")
    checkpointing: bool = setting(False, "compute activations twice rather than keep them")
    compile: bool = setting(False, "compile the blocks for training (torch.compile; cuda)")
    fsdp: bool = setting(False, "under torchrun, cut weights, gradients and Adam's state into as many parts as processes")

    def __post_init__(self) -> None:
        """Check every number. ValueError naming the field."""
        self.out = self.out or f"runs/llm-{self.seed}"
        self.check_judge()
        if not self.model:
            raise ValueError("model is missing; give --model with a Hugging Face directory or a .gguf file")
        dno.check_positive(eta=self.eta, lr=self.lr, temperature=self.temperature)
        dno.check_regularization(self.tau, self.eta)
        if self.tau and self.algorithm in (1, 2):
            raise ValueError(f"tau belongs to Algorithms 3 and 4, and algorithm is {self.algorithm}")
        if (self.rule == "scored") != (self.judgments == "scores") or (self.rule == "scored" and self.oracle == "synthetic"):
            raise ValueError("rule scored, judgments scores and a language model that scores belong together; give all three")
        counts = ("iterations", "max_new_tokens", "max_prompt_tokens", "judged", "batch_size", "at_once", "sample_batch",
                  "train_prompts")  # fmt: skip
        check_ranges(self, **dict.fromkeys(counts, (1, MOST)), samples=(2, MOST), held_out=(2, MOST),
                     seed=(0, MOST), margin=(0, 1), replay=(0, 1), low_rank=(0, MOST),
                     temperature=TEMPERATURES, threads=THREADS)  # fmt: skip
        if self.compile and not self.device.startswith("cuda"):
            raise ValueError(f"compile is for a GPU, and device is {self.device}; add --device cuda")
        if self.fsdp and not dist.is_torchelastic_launched():
            raise ValueError("fsdp cuts the model into parts for several processes; start them by torchrun --nproc-per-node N")
        self.practice()

    def practice(self, processes: int = 1) -> dno.Practice:
        """The settings of the loop; a batch is of prompts that have about `batch_size` pairs, at K pairs a prompt, and each of
        the processes scores those of `at_once` prompts together."""
        prompts = max(1, round(self.batch_size / self.samples))
        return dno.Practice(self.samples, self.temperature, self.top_p, self.judgments, replay=self.replay,
                            prompts_per_step=prompts, learning_rate=self.lr, max_grad_norm=1.0,
                            recorded=self.dtype == "float32", at_once=self.at_once * processes)  # fmt: skip


def read_prompts(path: str) -> list[dict[str, Any]]:
    """The prompts of a file, in its order; blank lines and a byte order mark are passed over. BadInput
    naming the lines that are malformed, empty or there twice."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"prompts {path} cannot be read ({error})") from error
    items, bad, seen = [], [], {}
    for number, line in enumerate(text.split("\n"), 1):  # other signs that end lines can stand in a text
        if not line.strip():
            continue
        item, fault = read_prompt(line)
        if not fault and (first := seen.setdefault(item["prompt"].strip(), number)) != number:
            fault = f"is the prompt of line {first}"
        if fault:
            bad.append(f"line {number} {fault}")
        else:
            items.append(item)
    if bad or not items:
        raise BadInput(f"prompts {path}: " + ("; ".join(bad[:20]) or "no line; expected a prompt a line"))
    return items


def read_prompt(line: str) -> tuple[dict[str, Any], str]:
    """The object of a line of a file of prompts, and what is wrong with it, "" if nothing is."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        item = None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        return {}, 'is no {"prompt": ...}'
    if not item["prompt"].strip() or not isinstance(item.get("gold", ""), str):
        return {}, "has an empty prompt, or a gold response that is no text"
    if re.search("[\ud800-\udfff]", item["prompt"] + item.get("gold", "")):
        return {}, "has half of a surrogate pair (\\ud800 to \\udfff), which is no letter"
    if item.get("split") not in (None, "train", "validation"):
        return {}, f"has split {item['split']!r}; expected train, validation or none"
    return item, ""


def split_prompts(config: LlmConfig, chat: Chat, shape: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Prompts to train on and prompts held out. BadInput if some are too long for the options or for a
    model of that shape, if there are fewer than asked for, or if gold responses are missing."""
    items = read_prompts(config.prompts)
    check_lengths(config, chat, shape, items)
    marked = [item for item in items if item.get("split") == "validation"]
    rest = [item for item in items if item.get("split") != "validation"] if marked else items[: -config.held_out]
    for name, asked, most, why in (
        ("held-out", config.held_out, len(marked or items), "marked validation" if marked else "in all"),
        ("train-prompts", config.train_prompts, len(rest), "to train on"),
    ):
        if asked is not None and asked > most:
            raise BadInput(f"prompts {config.prompts}: {most} {why}; expected --{name} {asked} to be at most that")
    training, held_out = rest[: config.train_prompts], (marked or items)[-config.held_out :]
    if len(training) < config.iterations:
        raise BadInput(
            f"prompts {config.prompts}: {len(training)} to train on beside {len(held_out)} held out; "
            f"expected at least --iterations {config.iterations}"
        )
    with_gold = sum("gold" in item for item in training)
    if with_gold not in (0, len(training)):
        raise BadInput(f"prompts {config.prompts}: {with_gold} of {len(training)} have a gold response; expected all or none")
    random.Random(config.seed).shuffle(training)
    return training, held_out


def check_lengths(config: LlmConfig, chat: Chat, shape: Config, items: list[dict[str, Any]]) -> None:
    """BadInput if a prompt is longer than it may be or has no token, if it and its longest response are
    more than the model reads, or if the model has no such token."""
    texts = [(item["prompt"], item.get("gold")) for item in items]
    rows = [(chat.prompt(x), [] if y is None else [*chat.encode(y), chat.end]) for x, y in texts]
    if empty := [x for (x, _), (row, _) in zip(texts, rows, strict=True) if not row]:
        raise BadInput(f"prompts {config.prompts}: {config.model} reads no token of {empty[0][:60]!r}; leave it out")
    longest = [len(x) + max(config.max_new_tokens, len(y)) for x, y in rows]
    most = shape.context or max(longest)
    for name, lengths, limit in (
        ("--max-prompt-tokens", [len(x) for x, _ in rows], config.max_prompt_tokens),
        (f"the context or sliding window of {config.model} with --max-new-tokens or a gold response", longest, most),
    ):  # fmt: skip
        long = [(x, length) for (x, _), length in zip(texts, lengths, strict=True) if length > limit]
        if long:
            raise BadInput(
                f"prompts {config.prompts}: {len(long)} are longer than {name}, {limit} tokens; the first "
                f"is {long[0][0][:60]!r} with {long[0][1]}"
            )
    if (last := max(token for row in rows for part in row for token in part)) >= shape.vocab_size:
        raise BadInput(
            f"{config.model} has {shape.vocab_size} tokens and its tokenizer a token {last}; expected the "
            "tokenizer of this model"
        )


class SharedJudge:
    """A judge whose questions the processes of a run share, all of a prompt's being asked by the same one. All of them get all
    the answers, or raise the error that one of them met."""

    def __init__(self, judge: Oracle, team: Team):
        self.judge, self.team = judge, team

    def prefer(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> Tensor:
        """As the judge's, P(a > b | x) [B]."""
        places: dict[str, list[int]] = {}
        for place, x in enumerate(prompts):
            places.setdefault(x, []).append(place)
        groups, P = list(places.values()), torch.empty(len(prompts), dtype=torch.float64)
        asked = [place for group in self.team.mine(groups) for place in group]
        found = self._everybody(self.judge.prefer, *([items[place] for place in asked] for items in (prompts, a, b)))
        found = found.split([len(group) for group in self.team.mine(groups)])
        for group, answers in zip(groups, self.team.together(list(found)), strict=True):
            P[group] = answers.to(P)
        return P

    def scores(self, prompts: Sequence[str], responses: Sequence[Sequence[str]]) -> Tensor:
        """As the judge's, points [X, n]."""
        mine = self._everybody(self.judge.scores, self.team.mine(prompts), self.team.mine(responses))
        return torch.stack(self.team.together(list(mine)))

    def _everybody(self, ask: Callable[..., Tensor], *questions: Any) -> Tensor:
        """This process's answers, once all processes have theirs."""
        found, met = torch.empty(0), None
        try:
            found = ask(*questions) if len(questions[0]) else found
        except Stopped as error:
            met = error
        for error in self.team.together([met]):
            if error is not None:
                raise error
        return found


class ChatValidation:
    """Measures a policy on held-out prompts: samples of it against as many of pi_1's and of its predecessor's, drawn with the
    same random numbers; and what users of such methods watch."""

    def __init__(self, policy: ChatPolicy, judge: Oracle, prompts: list[str], config: LlmConfig, first: list[Tensor]):
        self.policy, self.judge, self.config = policy, judge, config
        self.prompts = [x for x in prompts for _ in range(config.judged)]
        self.distinct, self.first_weights = prompts, first
        self.samples: list[list[Response]] = []  # of pi_1, pi_2, ...
        self.numbers: list[dict[str, float]] = []

    def __call__(self) -> float:
        """Sample from the policy as it is, have it judged; its win rate over pi_1. Stopped if there is no answer."""
        survey = self.policy.survey(self.distinct, self.config.judged, self.config.seed)
        self.samples.append(new := [y for ys in survey for y in ys])
        if len(self.samples) == 1:
            self.numbers.append(self.watched(new))
            return 0.5
        first, old = self.samples[0], self.samples[-2]
        both = 1 + (len(self.samples) > 2)  # else they are the same
        wins = self.judge.prefer(self.prompts * both, new * both, (first + old)[: both * len(new)])
        report = win_rate_report(wins[: len(new)], self.prompts, [len(y) - len(z) for y, z in zip(new, first, strict=True)])
        if report["n_parsed"] == 0:
            raise Stopped("the judge has no answer to any question of the validation")
        self.numbers.append({
            "win_rate_vs_first": report["win_rate"], "win_rate_vs_first_interval": report["interval"],
            "win_rate_vs_first_length_controlled": report["length_controlled"],
            "win_rate_vs_previous": wins[-len(new) :].nanmean().item(), **self.watched(new)})  # fmt: skip
        return report["win_rate"]

    @torch.no_grad()
    def watched(self, samples: list[Response]) -> dict[str, float]:
        """Of samples of the policy as it is: mean length in words; shares cut off, with a run of three words twice, and empty;
        the KL divergence from pi_1, estimated on them, nats a response; and their perplexity under pi_1, a token."""
        own = self.policy.log_prob(self.prompts, samples)
        weights = self.policy.weights()
        self.policy.load(self.first_weights)
        first = self.policy.log_prob(self.prompts, samples)
        self.policy.load(weights)
        tokens, n = sum(len(y.tokens) for y in samples), len(samples)
        return {"mean_length": sum(len(y.split()) for y in samples) / n,
                "truncated": sum(not self.policy.finished(y) for y in samples) / n,
                "repeated": sum(dno.repeats_ngrams(y.split(), 3) for y in samples) / n,
                "empty": sum(not y.strip() for y in samples) / n,
                "kl_to_first": (own - first).mean().item(),
                "perplexity_under_first": math.exp(-first.double().sum().item() / tokens)}  # fmt: skip


def alarms(row: dict[str, float], first: dict[str, float]) -> list[str]:
    """What in an iteration's row should worry: texts longer by half than pi_1's, more of them cut off, repetitive or empty, far
    from pi_1, a chosen response that has become less probable, or no pair at all. A NaN is as bad as any."""
    found = []
    if not row["mean_length"] <= 1.5 * first["mean_length"]:
        found.append(f"responses have {row['mean_length']:.1f} words on average, pi_1's {first['mean_length']:.1f}")
    for name, what in (("truncated", "cut off"), ("repeated", "repetitive"), ("empty", "empty")):
        if not row[name] <= first[name] + 0.15:
            found.append(f"{row[name]:.0%} of the responses are {what}, {first[name]:.0%} of pi_1's")
    if not row["kl_to_first"] <= 30:
        found.append(f"the policy is {row['kl_to_first']:.0f} nats from pi_1")
    if not any(row[f"pairs_{kind}"] for kind in KINDS):
        found.append("no pair: the samples are too alike for the margin, or the judge gave no answer")
    elif not row["chosen_log_ratio"] >= -1:
        found.append(f"log pi of the chosen responses has fallen by {-row['chosen_log_ratio']:.1f} nats in the iteration")
    return found


def llm_loop(config: LlmConfig, policy: ChatPolicy, judge: Oracle, training: list[dict[str, Any]], validation: ChatValidation,
             **common: Any) -> Iterator[dno.Round]:  # fmt: skip
    """The generator of the algorithm, over disjoint parts of the prompts."""
    hard = config.algorithm in (2, 4)
    gold = hard and "gold" in training[0]

    def data(t: int) -> tuple[list[str], list[str] | None]:
        part = training[t - 1 :: config.iterations]
        return [item["prompt"] for item in part], [item["gold"] for item in part] if gold else None

    common |= {"settings": config.practice(policy.team.size), "seed": config.seed}
    first = (policy, judge, data, config.eta, config.iterations)
    if not hard:
        return dno.algorithm3_sampled(*first, validation, config.tau, **common)
    rule = RULES[config.rule](config.margin)
    if config.algorithm == 2:
        return dno.algorithm2(*first, rule, validation, **common)
    return dno.algorithm4(*first, rule, validation, config.tau, **common)


def llm_row(it: dno.Round, config: LlmConfig, judge: Oracle, gold: bool) -> dict[str, float | None]:
    """The numbers of an iteration that are not of validation: loss, pairs by kind, gold responses beaten, judgments, money."""
    i, j = torch.triu_indices(*it.wins.shape[1:], 1)
    samples = [y for ys in it.groups.responses for y in (ys[:-1] if gold else ys)]
    kinds = dno.pair_kinds(it.chosen, it.wins.shape[1] - 1 if gold else -1)
    row = {"loss": it.loss, "steps": it.steps, "chosen_log_ratio": it.chosen_log_ratio,
           "sampled_words": sum(len(y.split()) for y in samples) / len(samples),
           **{f"pairs_{kind}": count for kind, count in kinds.items()},
           "judgments_failed": it.wins[:, i, j].isnan().double().mean().item()}  # fmt: skip
    if gold:
        row["win_rate_vs_teacher"] = it.wins[:, :-1, -1].nanmean().item()
    if isinstance(judge, OpenAIJudge):
        row |= Judging(judge, None).spending()
    return row


def write_llm_round(run: Run, it: dno.Round, gold: bool) -> None:
    """responses-TTT.jsonl and pairs-TTT.jsonl of an iteration."""
    n, groups = it.wins.shape[1], it.groups
    responses = [{"prompt": x, "response": y, "by": "teacher" if gold and i == n - 1 else "student",
                  "rated": None if math.isnan(r) else r}
                 for x, ys, rs in zip(groups.prompts, groups.responses, it.r_t.tolist(), strict=True)
                 for i, (y, r) in enumerate(zip(ys, rs, strict=True))]  # fmt: skip
    pairs = [{"prompt": groups.prompts[x], "first": groups.responses[x][i], "second": groups.responses[x][j]}
             for x, i, j in it.chosen.tolist()]  # fmt: skip
    for name, lines in (("responses", responses), ("pairs", pairs)):
        run.write_lines(f"{name}-{it.t:03d}.jsonl", lines)


def announce_llm(config: LlmConfig, judge: Oracle, training: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    """Say what will be sampled and judged; of a judge that must be asked also what it will cost at most,
    responses being as long as they can."""
    n = config.samples + (config.algorithm in (2, 4) and "gold" in training[0])
    rounds = 2 * config.iterations - 1  # of validation: against pi_1, from pi_3 on also the last
    print(
        f"{len(training)} prompts in {config.iterations} parts, {config.samples} samples of each, "
        f"{len(training) * math.comb(n, 2):,} comparisons; {len(held_out)} held out, {config.judged} samples of each "
        f"from {config.iterations + 1} policies, {len(held_out) * config.judged * rounds:,} comparisons"
    )
    if not isinstance(judge, OpenAIJudge):
        print("judge: the synthetic taste; no requests, nothing is paid")
        return
    texts = [f"response {i} " + "word " * config.max_new_tokens for i in range(config.samples + 1)]
    groups = [(item["prompt"], *two) for item in training for two in combinations(texts[:n], 2)]
    surveys = [(item["prompt"], texts[0], texts[1]) for item in held_out]
    training_plan, survey = (judge.endpoint.plan(judge.questions(*zip(*asked, strict=True))) for asked in (groups, surveys))
    validation = survey * (config.judged * rounds)
    print(f"judge: {judge.endpoint}\n    training: {training_plan}\n    validation: {validation}")
    if config.max_usd is not None:
        print(f"    stops below ${config.max_usd:g}")


def run_llm(config: LlmConfig) -> None:
    """The preset "llm": see `LlmConfig`. Writes what README.md lists under "The folder of a run"."""
    device, team = join_team(config.device, config.threads), Team()
    check_device(device)
    try:
        chat = Chat.from_pretrained(config.model, plain=config.chat_format == "plain")
        shape = Config(**read_checkpoint(config.model)[0])
        if config.low_rank > shape.width:
            raise BadInput(f"low_rank is {config.low_rank}; expected at most {shape.width}, the width of {config.model}")
        training, held_out = split_prompts(config, chat, shape)
        judge: Oracle = TasteJudge()
        if config.oracle != "synthetic":
            each = max(1, config.judge_concurrency // team.size)
            judge = OpenAIJudge(open_judge(replace(config, judge_concurrency=each)), config.judge_form, seed=config.seed)
            config.judge_model = judge.endpoint.model
        announce_llm(config, judge, training, held_out)
        if config.dry_run:
            return
        model = Transformer.from_pretrained(config.model, COMPUTE[config.dtype]).to(device)
    except BadCheckpoint as error:
        raise BadInput(str(error)) from error
    run = Run("llm", config, CLASSES_KEPT, device="cpu")
    if config.low_rank:
        add_low_rank(model, config.low_rank)
    model.checkpointing = config.checkpointing
    if config.compile:
        model.read_block = torch.compile(model.read_block, dynamic=True)
    policy = ChatPolicy(model, chat, config.max_new_tokens, config.sample_batch, config.fsdp)
    print(f"{sum(w.numel() for w in model.parameters()):,} parameters; {len(training)} prompts, {len(held_out)} held out; "
          f"Algorithm {config.algorithm}. Writing to {config.out}")  # fmt: skip
    judge_of_all = SharedJudge(judge, team) if team.size > 1 else judge
    validation = ChatValidation(policy, judge_of_all, [item["prompt"] for item in held_out], config, policy.weights())
    first = train_llm(config, policy, judge, training, validation, run)
    best = run.metrics[-1]["best_iteration"]
    judged_by = "the synthetic taste" if config.oracle == "synthetic" else config.oracle
    summary = {"config": asdict(config), "judge": judged_by, "first": first, "best_iteration": best, "last": run.metrics[-1],
               "seconds": sum(row["seconds"] for row in run.metrics)}  # fmt: skip
    run.write("summary.json", json.dumps(summary, indent=2) + "\n")
    show_before_and_after(validation)
    policy.refresh()
    if run.writes:
        policy.model.save_pretrained(run.out / "best")
        chat.save(run.out / "best")
    print(f"\npi_{best}, the best on validation, is in {run.out}/best, for transformers and vLLM")


def train_llm(config: LlmConfig, policy: ChatPolicy, judge: Oracle, training: list[dict[str, Any]], validation: ChatValidation,
              run: Run) -> dict[str, float]:  # fmt: skip
    """Run the algorithm from pi_1 or the run's last checkpoint on, a line and a checkpoint an iteration; the policy is then the
    best on validation. The numbers of pi_1."""
    optimizer, after, gold = dno.adam(policy), None, config.algorithm in (2, 4) and "gold" in training[0]
    if run.state:
        run.expect(run.state, {"policy": list(policy.parameters()), "optimizer": like(optimizer), "round": dno.Round,
                               "pi_ref": list | None, "samples": list, "numbers": list})  # fmt: skip
        after = take_training(run.state, policy, optimizer)
        validation.samples, validation.numbers = run.state["samples"], run.state["numbers"]
    progress = tqdm(total=config.iterations, initial=after.t if after else 0, desc="measuring pi_1", unit="iteration",
                    disable=True if policy.team.rank else None, leave=False)  # fmt: skip
    remember = followed(run, progress, optimizer)
    loop = llm_loop(config, policy, validation.judge, training, validation, optimizer=optimizer, after=after, remember=remember)
    print("    t | P(> pi_1)       at equal length | P(new > old) | words  cut off | KL(pi_1) | pairs | loss")
    start = time.perf_counter()
    try:
        for it in loop:
            row = {"iteration": it.t, "seconds": time.perf_counter() - start, **llm_row(it, config, judge, gold),
                   **validation.numbers[-1], "best_iteration": it.best.t}  # fmt: skip
            warnings, after = alarms(row, validation.numbers[0]), it
            write_llm_round(run, it, gold)
            for t in {1, it.t + 1}:
                run.write_lines(f"validation-{t:03d}.jsonl", written(validation.prompts, validation.samples[t - 1]))
            known = {name: None if value != value else value for name, value in row.items()}  # JSON has no NaN
            state = training_state(policy, optimizer, it)
            run.save({**known, "alarms": warnings},
                     {**state, "samples": validation.samples, "numbers": validation.numbers})  # fmt: skip
            tqdm.write(f"{it.t:5d} | {row['win_rate_vs_first']:.3f} +- {row['win_rate_vs_first_interval']:.3f} "
                       f"{row['win_rate_vs_first_length_controlled']:15.3f} | {row['win_rate_vs_previous']:12.3f} | "
                       f"{row['mean_length']:5.1f} {row['truncated']:8.2f} | {row['kl_to_first']:8.2f} | {len(it.chosen):5d} | "
                       f"{row['loss']:.4f}")  # fmt: skip
            for alarm in warnings:
                tqdm.write(f"      ! {alarm}")
            progress.update()
            start = time.perf_counter()
    except dno.NotFinite as error:
        run.write_lines("not-finite.jsonl", written(error.batch.prompts, error.batch.responses))
        raise Stopped(f"{error}; its batch is in {run.out}/not-finite.jsonl; a smaller --lr may help") from error
    finally:
        progress.close()
    policy.load(after.best.parameters)
    return validation.numbers[0]


def followed(run: Run, progress: tqdm, optimizer: torch.optim.Optimizer) -> dno.Remember:
    """`run.remember` for the phases of iterations; the bar names the phase, and counts the steps of
    training."""
    steps = 0

    def remember(t: int, phase: str, *call: Any) -> Any:
        nonlocal steps
        progress.set_description({"sampled": "sampling", "judged": "judging"}[phase])
        found, steps = run.remember([t], phase, *call), 0
        progress.set_description("scoring pi_t")
        return found

    def stepped(*_: Any) -> None:
        nonlocal steps
        steps += 1
        progress.set_description(f"training, step {steps}")

    optimizer.register_step_post_hook(stepped)
    return remember


def training_state(policy: ChatPolicy, optimizer: torch.optim.Optimizer, it: dno.Round) -> dict[str, Any]:
    """All that `take_training` needs, whole on the CPU of the first process however many there are."""
    known, best = optimizer.state_dict(), replace(it.best, parameters=[whole(weight) for weight in it.best.parameters])
    moments = {number: {name: whole(value) for name, value in of.items()} for number, of in known["state"].items()}
    return {"policy": [whole(weight) for weight in policy.parameters()], "optimizer": {**known, "state": moments},
            "round": replace(it, pi_ref=None, best=best), "pi_ref": it.pi_ref.weights() if it.pi_ref else None}  # fmt: skip


def take_training(state: dict[str, Any], policy: ChatPolicy, optimizer: torch.optim.Optimizer) -> dno.Round:
    """Go back to a `training_state`, with as many processes as there are now: the round to go on after."""
    parameters, known, best = list(policy.parameters()), state["optimizer"], state["round"].best
    mine = lambda weights: [part_of(value, like) for value, like in zip(weights, parameters, strict=True)]  # noqa: E731
    policy.load(mine(state["policy"]))
    moments = {number: {name: part_of(value, parameters[number]) for name, value in of.items()}
               for number, of in known["state"].items()}  # fmt: skip
    optimizer.load_state_dict({**known, "state": moments})
    pi_ref = copy.deepcopy(policy) if state["pi_ref"] else None
    if pi_ref is not None:
        pi_ref.load(state["pi_ref"])
    return replace(state["round"], pi_ref=pi_ref, best=replace(best, parameters=mine(best.parameters)))


def written(prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, str]]:
    """Each response with its prompt, as files have them."""
    return [{"prompt": x, "response": y} for x, y in zip(prompts, responses, strict=True)]


def show_before_and_after(validation: ChatValidation) -> None:
    """Three held-out prompts, with a response of pi_1 and one of the last policy."""
    for place in range(0, min(3 * validation.config.judged, len(validation.prompts)), validation.config.judged):
        print(f"\n{validation.prompts[place]}")
        for name, samples in (("pi_1", validation.samples[0]), (f"pi_{len(validation.samples)}", validation.samples[-1])):
            print(f"  {name}: {for_terminal(samples[place])[:300]}")


# --- Command line -----------------------------------------------------------------------------------------------------------

PRESETS = {"game": (GameConfig, run_game), "text": (TextConfig, run_text), "ablations": (AblationsConfig, run_ablations),
           "llm": (LlmConfig, run_llm)}


def main(argv: list[str] | None = None) -> int:
    """Run a preset; the exit code is that of `runs.guarded`."""

    def work() -> None:
        try:
            preset, config = parse(sys.argv[1:] if argv is None else argv, {p: c for p, (c, _) in PRESETS.items()}, "game")
        except ValueError as error:  # a config's own checks
            raise BadInput(str(error)) from error
        if preset != "llm" and dist.is_torchelastic_launched():
            raise BadInput(f"preset {preset} runs in one process; start it by python train.py {preset}, without torchrun")
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

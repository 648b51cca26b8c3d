"""Every method of `solvers.solve` on 100 games, each at its best of one grid of step sizes.

    python -m benchmarks.methods [--methods NAME ...] [--games N] [--budget N]

Prints a line for each method, and writes docs/numbers/methods.csv and figures/methods.png. The
tables of docs/results.md and the figure there are this command's.

Games: four kinds, five sizes, `--games` of each (5). Step sizes and tau are chosen on 20 other
games, by what they reach with 1,000 evaluations. What counts is not iterations but evaluations of P
times a policy (`EVALUATIONS`). The policies start uniform, and so does the reference, if the method
has one."""

from __future__ import annotations

import argparse
import csv
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import dno
import solvers
from oracle import PreferenceTable, random_feature_game, random_game
from relatives import LINEAR, METHODS

ROOT = Path(__file__).parent.parent
SIZES = (3, 5, 10, 20, 50)
ETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
TAUS = (0.02, 0.1)
EVALUATIONS = {  # an iteration's, where it is not 1; NashPG's is that of Newton's method on average
    "extragradient": 2,
    "nash-pg": 4,
    "regret-matching-plus-alternating": 2,
    "predictive-regret-matching-plus-alternating": 2,
}
PULLED = {  # methods with a tau; the others have none
    "nash-md", "moving-reference", "mpo", "mnpo-code", "rspo-chi-square", "rspo-forward-kl", "inpo",
}  # fmt: skip
NO_STEP = {name for name in METHODS if "regret" in name or name == "fictitious-play"}
SKIPPED = {"dno-regression"}  # which is "dno"
BUDGETS = (100, 1_000, 10_000)
TUNING = 1_000


# --- Games ----------------------------------------------------------------------------------------


def weighted_cycle(games: int, Y: int, seed: int) -> PreferenceTable:
    """Each response beats the next (Y - 1)/2 round a circle, by .05 to .45; for even Y the one
    opposite is its equal."""
    generator = torch.Generator().manual_seed(seed)
    edges = 0.05 + 0.4 * torch.rand(games, Y, Y, generator=generator, dtype=torch.float64)
    ahead = (torch.arange(Y) - torch.arange(Y).unsqueeze(-1)) % Y
    wins = edges * ((ahead > 0) & (ahead <= (Y - 1) // 2))
    return PreferenceTable(0.5 + wins - wins.mT)


def transitive_with_a_cycle(games: int, Y: int, seed: int) -> PreferenceTable:
    """Standard normal rewards, and a cycle of log odds 2 among the best three."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(games, Y, generator=generator, dtype=torch.float64)
    odds = rewards.unsqueeze(-1) - rewards.unsqueeze(-2)
    x, best = torch.arange(games), rewards.topk(3).indices.T
    for first, second in ((0, 1), (1, 2), (2, 0)):
        odds[x, best[first], best[second]], odds[x, best[second], best[first]] = 2.0, -2.0
    return PreferenceTable(torch.sigmoid(odds))


KINDS = {
    "uniform entries": random_game,
    "low-rank features": lambda games, Y, seed: random_feature_game(games, Y, seed, features=4),
    "weighted cycles": weighted_cycle,
    "transitive with a cycle": transitive_with_a_cycle,
}


def all_games(each: int, seed: int) -> dict[int, Tensor]:
    """P [4 each, Y, Y] by size Y: `each` of every kind."""
    return {
        Y: torch.cat([make(each, Y, seed + 100 * n + Y).P for n, make in enumerate(KINDS.values())])
        for Y in SIZES
    }


# --- Runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method with its numbers; "inpo" is "dno" with a tau."""

    method: str
    eta: float = 1.0
    tau: float = 0.0

    @property
    def cost(self) -> int:
        """Evaluations of P times a policy in an iteration."""
        return EVALUATIONS.get(self.method, 1)


def settings_of(method: str) -> Iterator[Setting]:
    """Those to choose from. MNPO's tau is eta/3, as in its code."""
    for eta in (1.0,) if method in NO_STEP else ETAS:
        for tau in TAUS if method in PULLED else (0.0,):
            if method == "mnpo-code":
                tau = eta / 3
            if tau <= eta:
                yield Setting(method, eta, tau)


def run_gaps(setting: Setting, P: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Duality gaps [X, T] of the last iterate and of the average, for every iteration that the
    budget of evaluations allows."""
    method = "dno" if setting.method == "inpo" else setting.method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = solvers.solve(P, method, setting.eta, budget // setting.cost, tau=setting.tau)
    r = torch.bmm(run.policies.transpose(0, 1), P.mT)  # (X, T+1, Y)
    count = torch.arange(1, r.shape[1]).double().view(1, -1, 1)
    weight = count if method in LINEAR else torch.ones_like(count)
    average = (weight * r[:, :-1]).cumsum(1) / weight.cumsum(1)
    return tuple((2 * rewards.amax(-1) - 1).clamp(min=0) for rewards in (r[:, 1:], average))


@dataclass(frozen=True)
class Result:
    """What a setting reached on all games, a row each."""

    last: Tensor  # [games, budgets]
    average: Tensor
    steps: Tensor  # [games, 2]: evaluations until the last gap is below 1e-3 and 1e-6 for good


def measure(setting: Setting, games: dict[int, Tensor], budget: int) -> Result:
    """Run the setting on all games."""
    found = []
    for P in games.values():
        last, average = run_gaps(setting, P, budget)
        at = [max(0, min(count, budget) // setting.cost - 1) for count in BUDGETS]
        steps = [setting.cost * settled(last, level) for level in (1e-3, 1e-6)]
        found.append((last[:, at], average[:, at], torch.stack(steps, dim=-1)))
    return Result(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def settled(gaps: Tensor, level: float) -> Tensor:
    """The iteration [X] from which on gaps [X, T] are at most level; infinite if there is none."""
    above = (gaps > level).double()
    place = torch.arange(1, gaps.shape[1] + 1).double()
    after = (above * place).amax(-1) + 1
    return after.masked_fill(after > gaps.shape[1], math.inf)


def typical(gaps: Tensor) -> float:
    """The geometric mean, gaps below 1e-12 counted as that."""
    return gaps.clamp(min=1e-12).log().mean().exp().item()


def chosen(method: str, games: dict[int, Tensor], budget: int) -> tuple[Setting, list[float]]:
    """The setting with the lowest gap of last iterate or average at the end, whichever is lower,
    and the step sizes at which half of the games end below 1e-3."""
    scores, works = {}, []
    for setting in settings_of(method):
        found = measure(setting, games, budget)
        ends = torch.minimum(found.last[:, -1], found.average[:, -1])
        scores[setting] = typical(ends)
        if ends.median() <= 1e-3:
            works.append(setting.eta)
    return min(scores, key=scores.__getitem__), sorted(set(works))


# --- Table and figure -----------------------------------------------------------------------------


def row_of(method: str, setting: Setting, works: list[float], found: Result) -> dict[str, str]:
    """The line of docs/numbers/methods.csv."""
    row = {"method": method, "eta": "", "tau": "", "works_from": "", "works_to": ""}
    if method not in NO_STEP:
        row |= {"eta": f"{setting.eta:g}", "tau": f"{setting.tau:.3g}" if setting.tau else ""}
        row |= {"works_from": f"{works[0]:g}", "works_to": f"{works[-1]:g}"} if works else {}
    for name, gaps in (("last", found.last), ("average", found.average)):
        for place, count in enumerate(BUDGETS):
            row[f"{name}_median_{count}"] = f"{gaps[:, place].median():.1e}"
            row[f"{name}_worst_{count}"] = f"{gaps[:, place].max():.1e}"
    for place, level in enumerate(("1e-3", "1e-6")):
        reached = found.steps[:, place]
        row[f"games_below_{level}"] = str(int(reached.isfinite().sum()))
        median = reached.median().item()
        row[f"evaluations_to_{level}"] = f"{median:.0f}" if math.isfinite(median) else ""
    return row


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Median gaps at the largest budget, last iterate and average, methods from best to worst."""
    import matplotlib.pyplot as plt

    from experiments.figures import STYLE

    key = f"median_{BUDGETS[-1]}"
    value = {name: [float(row[f"{name}_{key}"]) for row in rows] for name in ("last", "average")}
    order = sorted(range(len(rows)), key=lambda i: -min(value["last"][i], value["average"][i]))
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(8, 6.4))
        for name, mark, colour in (("average", "o", "C0"), ("last", "D", "C1")):
            gaps = [max(value[name][i], 1e-12) for i in order]
            axes.plot(gaps, range(len(order)), mark, color=colour, label=f"{name} policy")
        for place, i in enumerate(order):
            ends = [max(value[name][i], 1e-12) for name in value]
            axes.plot(ends, [place, place], "-", lw=1, color="0.7", zorder=0)
        axes.set_yticks(range(len(order)), [rows[i]["method"] for i in order], fontsize=8)
        axes.set(xscale="log", xlabel="median distance from Nash (duality gap), 10,000 evaluations")
        axes.set_title("Which method reaches Nash? Left is better", fontsize=10)
        axes.legend(loc="lower left")
        figure.savefig(path)
        plt.close(figure)


def supports(games: dict[int, Tensor]) -> dict[str, int]:
    """How many games have a Nash policy of one response, of all, of some."""
    sizes = [(int(n), Y) for Y, P in games.items() for n in (dno.nash(P) > 1e-7).sum(-1)]
    pure, full = sum(n == 1 for n, _ in sizes), sum(n == Y for n, Y in sizes)
    return {"pure": pure, "full support": full, "partial": len(sizes) - pure - full}


def main() -> None:
    """Choose, measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*(name for name in METHODS if name not in SKIPPED), "inpo"]
    parser.add_argument("--methods", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--games", type=int, default=5, help="of each kind and size")
    parser.add_argument("--budget", type=int, default=BUDGETS[-1], help="evaluations")
    parser.add_argument("--out", type=Path, default=ROOT, help="has docs/numbers and figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tuning, games = all_games(1, seed=1), all_games(options.games, seed=2)
    print({"games": sum(map(len, games.values())), **supports(games)})
    rows = []
    for method in tqdm(options.methods, disable=None):
        setting, works = chosen(method, tuning, min(TUNING, options.budget))
        rows.append(row_of(method, setting, works, measure(setting, games, options.budget)))
        tqdm.write(" ".join(f"{name} {value}" for name, value in rows[-1].items() if value))
    folders = [options.out / name for name in ("docs/numbers", "figures")]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with (folders[0] / "methods.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folders[1] / "methods.png")


if __name__ == "__main__":
    main()

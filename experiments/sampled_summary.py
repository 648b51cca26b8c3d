"""What comes out of a run with sampled responses: table and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from experiments.rounds import Row, Stage, without_nan

HEADINGS = {  # of the table; means over the last third of the iterations, as far as a run has them
    "gap_last": "gap of last",
    "gap_average": "mixture",
    "win_rate_vs_teacher": "P(> teacher)",
    "win_rate_vs_first": "P(> pi_1)",
    "win_rate_vs_teacher_length_controlled": "at equal length",
    "win_rate_vs_first_length_controlled": "at equal length",
    "share_malformed": "malformed",
    "mean_length": "words",
    "gap_last_over_first": "over pi_1's",
    "win_rate_vs_teacher_most": "at its most",
}
Rows = Sequence[Row]


def rows_of(metrics: Rows, stage: Stage) -> Rows:
    """The rows of one algorithm."""
    return [row for row in metrics if row["algorithm"] == stage.algorithm]


def late(rows: Rows, column: str) -> float:
    """Mean of a column over the last third of the iterations."""
    tail = rows[-max(1, len(rows) // 3) :]
    return sum(row[column] for row in tail) / len(tail)


def summarise(config: Any, stages: Sequence[Stage], metrics: Rows, first: Row) -> dict[str, Any]:
    """The headline numbers, which are printed as a table too; `first` are those of pi_1."""
    print("\nmeans over the last third of the iterations; the gap of the mixture is the last one")
    found: list[dict[str, Any]] = []
    for stage in stages:
        rows = rows_of(metrics, stage)
        numbers = headline(rows, first)
        if not found:
            print("            | " + " | ".join(HEADINGS[name] for name in numbers))
        values = " | ".join(f"{value:{len(HEADINGS[name])}.3f}" for name, value in numbers.items())
        print(f"Algorithm {stage.algorithm} | {values}")
        best, seconds = rows[-1]["best_iteration"], sum(row["seconds"] for row in rows)
        about = {"best_iteration": best, "seconds": seconds}
        found.append({"algorithm": stage.algorithm, **numbers, **about})
    return {"config": asdict(config), "first": without_nan(first), "stages": found}


def headline(rows: Rows, first: Row) -> dict[str, float]:
    """The columns of `HEADINGS` that an algorithm's rows have."""
    found = {name: late(rows, name) for name in HEADINGS if rows[0].get(name) is not None}
    if "gap_last" in found:
        found["gap_average"] = rows[-1]["gap_average"]
        found["gap_last_over_first"] = found["gap_last"] / first["gap_last"]
    if "win_rate_vs_teacher" in found:
        found["win_rate_vs_teacher_most"] = max(row["win_rate_vs_teacher"] for row in rows)
    return found

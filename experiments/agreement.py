"""How far a judge agrees with people, on comparisons in a file.

python -m experiments.agreement FILE.jsonl [--option value ...]
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import STYLE
from experiments.folder import claimed
from experiments.judging import open_judge
from experiments.settings import (
    BadInput,
    JudgeOptions,
    guarded,
    hear_ctrl_c,
    options_parser,
    setting,
)
from judge.statistics import agreement
from oracle import OpenAIJudge, RegisterJudge


def read_labels(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of people's labels: {"prompt", "a", "b", "label": a, b or tie, and
    optionally "judge": P(a > b)}. Blank lines and a mark of the byte order do not count. ValueError
    naming the first bad line."""
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            good = all(isinstance(item[name], str) for name in ("prompt", "a", "b")) and item[
                "label"
            ] in ("a", "b", "tie")
            good = good and (item.get("judge") is None or 0 <= item["judge"] <= 1)
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            wanted = '{"prompt": ..., "a": ..., "b": ..., "label": "a", "b" or "tie"}, "judge" in [0, 1] if given'
            raise ValueError(f"{path}, line {number} is {line[:60]!r}; expected {wanted}")
        items.append(item)
    if not items:
        raise ValueError(f"{path} is empty; expected a line for each comparison")
    return items


def agreement_figure(
    found: dict[str, Any], items: Sequence[dict[str, Any]], P: Sequence[float]
) -> Any:
    """Left, the shares of `agreement`, some beside what they are for the labels or a coin. Right,
    how often a wins against how much longer it is, by judge and labels. (Whose labels they are,
    people's or another judge's, the file does not say.)"""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    rows = [
        ("agreement with the labels", found["agreement"], None),
        ("verdict flips with the order", found["flip_rate"], None),
        ("the longer wins (mark: the labels)", found["longer_wins"], found["longer_wins_people"]),
        ("cyclic triples (mark: a coin)", found["cyclic"], 0.25),
    ]
    for place, (_, value, compare) in enumerate(rows[::-1]):
        if value is None:
            left.text(0.5, place, "not measured", ha="center", va="center", color="0.5", fontsize=8)
            continue
        left.plot(value, place, "o", color="C0")
        if compare is not None:
            left.plot(compare, place, "|", color="C1", ms=16, mew=2)
    if not math.isnan(found["interval"]):
        left.errorbar(found["agreement"], 3, xerr=found["interval"], color="C0", capsize=3)
    left.set(
        xlim=(-0.03, 1.03),
        ylim=(-0.5, 3.5),
        xlabel="share",
        yticks=range(4),
        yticklabels=[row[0] for row in rows[::-1]],
    )
    lead = np.array([len(item["a"]) - len(item["b"]) for item in items])
    human = np.array([{"a": 1.0, "tie": 0.5, "b": 0.0}[item["label"]] for item in items])
    edges = np.unique(np.quantile(lead, np.linspace(0, 1, 6)))
    bins = np.clip(np.searchsorted(edges, lead, "right") - 1, 0, max(0, len(edges) - 2))
    for name, values, style in (("judge", np.array(P), "o-"), ("labels", human, "s--")):
        means = [
            (lead[bins == b].mean(), np.nanmean(values[bins == b]))
            for b in np.unique(bins[~np.isnan(values)])
        ]
        right.plot(*zip(*means, strict=True), style, label=name)
    right.set(
        xlabel="characters that a is longer than b (fifths)", ylabel="$P(a \\succ b)$", ylim=(0, 1)
    )
    right.legend(fontsize=8)
    return figure


def compare_with_people(file: str, options: Any) -> None:
    """Ask the judge that the options name about the comparisons in the file, or take the answers
    recorded there, and report."""
    try:
        items = read_labels(file)
        columns = [[item[name] for item in items] for name in ("prompt", "a", "b")]
        synthetic = (
            RegisterJudge().prefer(*columns).tolist() if options.oracle == "synthetic" else None
        )
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    recorded = [math.nan if (p := item.get("judge")) is None else p for item in items]
    if options.oracle == "recorded" and all(map(math.isnan, recorded)):
        raise BadInput(f"{file} has no answers of a judge; name one, by --oracle or --judge-url")
    judge = None
    if options.oracle not in ("recorded", "synthetic"):
        judge = OpenAIJudge(open_judge(options), options.judge_form)
        print(
            f"judge: {judge.endpoint}\nto be asked: {judge.endpoint.plan(judge.questions(*columns))}"
        )
    elif options.dry_run:
        print("nobody is to be asked")
    if options.dry_run:
        return
    with _writing(options.figure):
        os.makedirs(os.path.dirname(options.figure) or ".", exist_ok=True)
    P = judge.prefer(*columns).tolist() if judge else synthetic or recorded
    if judge:
        _tell_costs(judge.endpoint.report())
    found = agreement(items, P, judge.report()["flip_rate"] if judge else None)
    for name, value in found.items():
        print(
            f"{name:20} {'-' if value is None else f'{value:.3f}' if isinstance(value, float) else value}"
        )
    with plt.style.context(STYLE), _writing(options.figure):
        figure = agreement_figure(found, items, P)
        figure.savefig(options.figure)
        plt.close(figure)
    print(f"figure: {options.figure}")


@contextmanager
def _writing(figure: str) -> Iterator[None]:
    """Around what writes the figure, and makes its folder: BadInput if that cannot be done."""
    try:
        if os.path.isdir(figure):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield
    except OSError as error:
        raise BadInput(
            f"{figure} cannot be written ({error.strerror}); choose another --figure or --out"
        ) from error


def _tell_costs(report: dict[str, float | None]) -> None:
    """Print what was asked and paid; a price that is not known is None in the report."""
    told = [f"{name} {value}" for name, value in report.items() if value is not None]
    print("asked: " + ", ".join(told + ["price not known"] * (report["dollars"] is None)))


def main(argv: list[str]) -> int:
    """`python -m experiments.agreement FILE.jsonl [--option value ...]`: `agreement` as table and
    figure. Exit codes: train.py's."""

    def work() -> None:
        file, options = parse_agreement(argv)
        asked = options.oracle.startswith("openai") and not options.dry_run  # and kept in --out
        with claimed(options.out, resume=None) if asked else nullcontext():
            compare_with_people(file, options)

    return guarded("experiments.agreement", work)


@dataclasses.dataclass
class AgreementOptions(JudgeOptions):
    """agreement: how far a judge agrees with people, on comparisons in a file."""

    figure: str | None = setting(None, "file to draw in (default: agreement.png in --out)")
    out: str = setting("runs/agreement", "folder for the figure and the judge's cache")

    def __post_init__(self) -> None:
        """Settle who judges: the answers recorded in the file if nobody is named. ValueError on a
        bad option."""
        named = self.oracle or self.judge_url or self.judge_model
        self.check_judge()
        self.oracle = self.oracle if named else "recorded"
        if self.figure is not None and not os.path.isdir(os.path.dirname(self.figure) or "."):
            raise ValueError(f"figure is {self.figure}; expected a file in a folder that exists")
        self.figure = self.figure or os.path.join(self.out, "agreement.png")
        kind, known = (
            os.path.splitext(self.figure)[1][1:],
            plt.Figure().canvas.get_supported_filetypes(),
        )
        if kind.lower() not in known:
            raise ValueError(
                f"figure is {self.figure}; expected a name that ends with one of "
                f".{', .'.join(sorted(known))}"
            )


def parse_agreement(argv: list[str]) -> tuple[str, AgreementOptions]:
    """(file, options) of `python -m experiments.agreement`. Prints the help and exits 0 if asked
    to. BadInput on what is unknown."""
    parser = options_parser("experiments.agreement", AgreementOptions)
    if "-h" in argv or "--help" in argv:
        print(
            "usage: python -m experiments.agreement FILE.jsonl [--option value ...]\n\n"
            + parser.format_help()
        )
        sys.exit(0)
    if not argv or argv[0].startswith("-"):
        raise BadInput(
            f"the arguments are {' '.join(argv)!r}; expected FILE.jsonl, and options after it"
        )
    try:
        return argv[0], AgreementOptions(**vars(parser.parse_args(argv[1:])))
    except ValueError as error:
        raise BadInput(str(error)) from error


if __name__ == "__main__":
    hear_ctrl_c()
    plt.switch_backend("Agg")  # figures go to files, also where there is a screen
    sys.exit(main(sys.argv[1:]))

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
from typing import Any, ClassVar

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below

import matplotlib.pyplot as plt
import numpy as np

from experiments.figures import STYLE
from experiments.folder import claimed
from experiments.judging import ORACLES, JudgeOptions, open_judge
from experiments.settings import BadInput, guarded, hear_ctrl_c, parse, setting
from judge.statistics import agreement
from oracle import OpenAIJudge, RegisterJudge

Labels = Sequence[dict[str, Any]]  # the lines that `read_labels` reads


# --- Options and labels ---------------------------------------------------------------------------


@dataclasses.dataclass
class AgreementOptions(JudgeOptions):
    """agreement: how far a judge agrees with people, on comparisons in a file."""

    synthetic: ClassVar[type] = RegisterJudge
    figure: str = setting(None, "file to draw in", "run", otherwise="agreement.png in --out")
    out: str = setting("runs/agreement", "folder for figure and cache", "run", common=True)

    def __post_init__(self) -> None:
        """Settle who judges: the answers recorded in the file if nobody is named. ValueError on a
        bad option."""
        named = self.oracle or self.judge_url or self.judge_model
        super().__post_init__()
        self.oracle = self.oracle if named else "recorded"
        if self.figure is not None and not os.path.isdir(os.path.dirname(self.figure) or "."):
            raise ValueError(f"figure is {self.figure}; expected a file in a folder that exists")
        self.figure = self.figure or os.path.join(self.out, "agreement.png")
        kind = os.path.splitext(self.figure)[1][1:]
        known = plt.Figure().canvas.get_supported_filetypes()
        if kind.lower() not in known:
            expected = f"expected a name that ends with one of .{', .'.join(sorted(known))}"
            raise ValueError(f"figure is {self.figure}; {expected}")


def parse_agreement(argv: list[str]) -> tuple[str, AgreementOptions]:
    """(file, options) of `python -m experiments.agreement`. Prints the help and exits 0 if asked
    to. BadInput on what is unknown."""
    named = bool(argv) and not argv[0].startswith("-")
    options = parse(argv[named:], AgreementOptions, "-m experiments.agreement FILE.jsonl")
    if not named:
        found = f"the arguments are {' '.join(argv)!r}"
        raise BadInput(f"{found}; expected FILE.jsonl, and options after it")
    return argv[0], options


def read_labels(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file of people's labels.

    {"prompt", "a", "b", "label": a, b or tie, and optionally "judge": P(a > b)}. Blank lines and a
    byte order mark are skipped. ValueError naming the first bad line."""
    items = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            items.append(json.loads(line))
            good = is_label(items[-1])
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            wanted = '{"prompt": ..., "a": ..., "b": ..., "label": "a", "b" or "tie"}'
            expected = f'{wanted}, "judge" in [0, 1] if given'
            raise ValueError(f"{path}, line {number} is {line[:60]!r}; expected {expected}")
    if not items:
        raise ValueError(f"{path} is empty; expected a line for each comparison")
    return items


def is_label(item: dict[str, Any]) -> bool:
    """Whether this is a line's label. TypeError or KeyError if it is nothing like one."""
    texts = all(isinstance(item[name], str) for name in ("prompt", "a", "b"))
    judged = item.get("judge") is None or 0 <= item["judge"] <= 1
    return texts and judged and item["label"] in ("a", "b", "tie")


# --- Figure ---------------------------------------------------------------------------------------


def agreement_figure(found: dict[str, Any], items: Labels, P: Sequence[float]) -> plt.Figure:
    """Left, the shares of `agreement`, some beside those of the labels or of a coin. Right, how
    often a wins against how much longer it is, by judge and by labels. (The file does not say whose
    labels they are, people's or another judge's.)"""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    draw_shares(left, found)
    lead = np.array([len(item["a"]) - len(item["b"]) for item in items])
    labels = np.array([{"a": 1.0, "tie": 0.5, "b": 0.0}[item["label"]] for item in items])
    edges = np.unique(np.quantile(lead, np.linspace(0, 1, 6)))
    bins = np.clip(np.searchsorted(edges, lead, "right") - 1, 0, max(0, len(edges) - 2))
    for name, values, style in (("judge", np.array(P), "o-"), ("labels", labels, "s--")):
        known = np.unique(bins[~np.isnan(values)])
        leads = [lead[bins == b].mean() for b in known]
        right.plot(leads, [np.nanmean(values[bins == b]) for b in known], style, label=name)
    xlabel, ylabel = "characters that a is longer than b (fifths)", "$P(a \\succ b)$"
    right.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1))
    right.legend(fontsize=8)
    return figure


def draw_shares(axes: plt.Axes, found: dict[str, Any]) -> None:
    """A point for each share, and a mark for what it is compared with."""
    rows = [  # from the lowest
        ("cyclic triples (mark: a coin)", found["cyclic"], 0.25),
        ("the longer wins (mark: the labels)", found["longer_wins"], found["longer_wins_people"]),
        ("verdict flips with the order", found["flip_rate"], None),
        ("agreement with the labels", found["agreement"], None),
    ]
    for place, (_, value, compare) in enumerate(rows):
        if value is None:
            axes.text(0.5, place, "not measured", ha="center", va="center", color="0.5", fontsize=8)
            continue
        axes.plot(value, place, "o", color="C0")
        if compare is not None:
            axes.plot(compare, place, "|", color="C1", ms=16, mew=2)
    if not math.isnan(found["interval"]):
        axes.errorbar(found["agreement"], 3, xerr=found["interval"], color="C0", capsize=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.5, 3.5), xlabel="share")
    axes.set(yticks=range(4), yticklabels=[name for name, _, _ in rows])


# --- Comparison -----------------------------------------------------------------------------------


def compare_with_people(file: str, options: AgreementOptions) -> None:
    """Ask the judge that the options name about the comparisons in the file, or take the answers
    recorded there, and report."""
    try:
        items = read_labels(file)
        P = answers_at_hand(file, options, items)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    if P is None:
        ask_and_report(items, options)
    elif options.dry_run:
        print("nobody is to be asked")
    else:
        make_folder(options.figure)
        report(items, P, None, options.figure)


def ask_and_report(items: Labels, options: AgreementOptions) -> None:
    """Ask a language model about the comparisons, and report."""
    judge, columns = OpenAIJudge(open_judge(options), options.judge_form), columns_of(items)
    plan = judge.endpoint.plan(judge.questions(*columns))
    print(f"judge: {judge.endpoint}\nto be asked: {plan}")
    if options.dry_run:
        return
    make_folder(options.figure)
    P = judge.prefer(*columns).tolist()
    tell_costs(judge.endpoint.report())
    report(items, P, judge.report()["flip_rate"], options.figure)


def report(items: Labels, P: list[float], flip_rate: float | None, path: str) -> None:
    """Print the `agreement` of the judge's P(a > b) with the labels, and draw it."""
    found = agreement(items, P, flip_rate)
    for name, value in found.items():
        shown = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name:20} {'-' if value is None else shown}")
    with plt.style.context(STYLE), writing(path):
        figure = agreement_figure(found, items, P)
        figure.savefig(path)
        plt.close(figure)
    print(f"figure: {path}")


def columns_of(items: Labels) -> tuple[list[str], list[str], list[str]]:
    """Prompts, and both responses to each."""
    prompts, a, b = ([item[name] for item in items] for name in ("prompt", "a", "b"))
    return prompts, a, b


def answers_at_hand(file: str, options: AgreementOptions, items: Labels) -> list[float] | None:
    """P(a > b) of each comparison by a judge of `ORACLES` or as recorded in the file, NaN where
    there is no answer; None if a language model is to be asked."""
    if options.oracle in ORACLES:
        return ORACLES[options.oracle](options).prefer(*columns_of(items)).tolist()
    if options.oracle != "recorded":
        return None
    recorded = [item.get("judge") for item in items]
    if all(p is None for p in recorded):
        raise BadInput(f"{file} has no answers of a judge; name one, by --oracle or --judge-url")
    return [math.nan if p is None else p for p in recorded]


def make_folder(figure: str) -> None:
    """Make the figure's folder. BadInput if that cannot be done."""
    with writing(figure):
        os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)


@contextmanager
def writing(figure: str) -> Iterator[None]:
    """Around what makes the figure's folder or writes it: BadInput if that cannot be done."""
    try:
        if os.path.isdir(figure):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        yield
    except OSError as error:
        fault = f"{figure} cannot be written ({error.strerror})"
        raise BadInput(f"{fault}; choose another --figure or --out") from error


def tell_costs(report: dict[str, float | None]) -> None:
    """Print what was asked and paid; a price that is not known is None in the report."""
    told = [f"{name} {value}" for name, value in report.items() if value is not None]
    if report["dollars"] is None:
        told.append("price not known")
    print("asked: " + ", ".join(told))


def main(argv: list[str]) -> int:
    """`python -m experiments.agreement FILE.jsonl [--option value ...]`: `agreement` as table and
    figure. Exit codes: train.py's."""

    def work() -> None:
        file, options = parse_agreement(argv)
        options.note()
        asked = options.oracle.startswith("openai") and not options.dry_run  # and kept in --out
        with claimed(options.out, resume=None) if asked else nullcontext():
            compare_with_people(file, options)

    return guarded("experiments.agreement", work)


if __name__ == "__main__":
    hear_ctrl_c()
    plt.switch_backend("Agg")  # figures go to files, also where there is a screen
    sys.exit(main(sys.argv[1:]))

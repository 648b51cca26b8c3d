"""Comparisons whose answers are known."""

import math
import re

NAN = math.nan
SPREAD = 5  # standard deviations a mean of many draws may lie off; the seeds are fixed


def comparisons(P, prompt="x"):
    """(prompts, a, b, P) of {(y, z): P(y > z)}."""
    return [prompt] * len(P), [y for y, _ in P], [z for _, z in P], list(P.values())


def joined(parts):
    return [
        [value for column in columns for value in column] for columns in zip(*parts, strict=True)
    ]


def table(capsys):
    """The printed numbers by name, with None for a dash."""
    found = re.findall(r"^(\w+) +(-|nan|[\d.-]+)$", capsys.readouterr().out, re.M)
    return {name: None if value == "-" else float(value) for name, value in found}

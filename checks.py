"""What an argument has to be: a real tensor, a number in range, a preference function, a policy.

Each check raises a ValueError of one line that names the value and what was expected."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOAT32 = torch.finfo(torch.float32)
TOLERANCE = 1e-6  # on sums that must be 1; float32 rows of a few thousand entries stay inside it


def real_tensor(value: Any, name: str) -> Tensor:
    """The value as a tensor of real numbers.

    A tensor stays as it is. Whatever else torch.as_tensor takes is converted, Python numbers to
    float64. ValueError naming a value that is neither, or is complex."""
    kind, expected = type(value).__name__, "expected a tensor of real numbers"
    try:
        table = torch.as_tensor(value, dtype=None if hasattr(value, "dtype") else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        hint = "pass its .P" if hasattr(value, "P") else "pass a tensor, or rows of equal length"
        raise ValueError(f"{name} is of type {kind}; {expected}: {hint}") from error
    if table.is_complex():
        raise ValueError(f"{name} is {table.dtype}; {expected}: pass its real part, {name}.real")
    return table


def check_positive(**values: float) -> None:
    """Raise ValueError naming the first value that is not a finite number above 0.

    Nor may its inverse overflow or vanish in float32: an infinite r / eta makes policies of NaN."""
    for name, value in values.items():
        if not (isinstance(value, Real) and FLOAT32.tiny <= value <= 1 / FLOAT32.tiny):
            bounds = f"{FLOAT32.tiny:.1e} to {1 / FLOAT32.tiny:.1e}"
            expected = f"expected a finite number above 0, from {bounds}"
            raise ValueError(f"{name} is {value!r}; {expected}")


def check_whole(least: int, **values: int) -> None:
    """Raise ValueError naming the first value that is not a whole number of at least `least`."""
    for name, value in values.items():
        if not (isinstance(value, Integral) and value >= least):
            expected = f"expected a whole number of at least {least}"
            raise ValueError(f"{name} is {value!r}; {expected}")


def check_preferences(P: Tensor) -> Tensor:
    """Return P [X, Y, Y] if it is a preference function (section 2.2).

    Its entries are in [0, 1] and P + P^T = 1, so that the diagonal is 1/2. Raises ValueError naming
    the first entry (x, y, y') that breaks this, and its value."""
    P = real_tensor(P, "P")
    if P.ndim != 3 or P.shape[1] != P.shape[2] or P.numel() == 0 or not P.is_floating_point():
        found = f"P is {P.dtype} of shape {list(P.shape)}"
        raise ValueError(f"{found}; expected floating point of shape [X, Y, Y]")
    low, high = P.aminmax()
    if not (low >= 0 and high <= 1):  # also if there is a NaN
        x, y, z = (~((P >= 0) & (P <= 1))).nonzero()[0].tolist()
        raise ValueError(f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected a probability in [0, 1]")
    low, high = (P + P.mT).aminmax()
    if max(1 - low, high - 1) > TOLERANCE:
        x, y, z = ((P + P.mT - 1).abs() > TOLERANCE).nonzero()[0].tolist()
        expected = f"1 - P[{x}, {z}, {y}] = {1 - P[x, z, y]:.6g}"
        raise ValueError(f"P[{x}, {y}, {z}] = {P[x, y, z]:.6g}; expected {expected}")
    return P


def check_policy(pi: Tensor, shape: torch.Size, name: str = "pi") -> Tensor:
    """Return pi if it has the shape and its rows are distributions.

    ValueError naming the first row that is none."""
    pi = real_tensor(pi, name)
    if pi.shape != shape:
        raise ValueError(f"{name} has shape {list(pi.shape)}; expected {list(shape)}")
    bad = ~((pi >= 0).all(-1) & ((pi.sum(-1) - 1).abs() <= TOLERANCE))
    if bad.any():
        x = bad.nonzero()[0].tolist()
        found = f"{name}{x} has sum {pi[*x].sum():.6g}, minimum {pi[*x].min():.6g}"
        raise ValueError(f"{found}; expected entries >= 0, sum 1")
    return pi

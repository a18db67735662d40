# SPDX-License-Identifier: Apache-2.0
"""Arguments that are Python's own, read once and in one way: numbers, counts, names, flags.

What is none becomes a value that no range holds, so that the caller's check of the range refuses
it. A bool is no number and a number no flag: NumPy's and torch's pass for either on some backends
only. Needs no torch.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import TypeVar

from .refusal import Refusal, shown

_T = TypeVar("_T")


def number(value: object) -> float:
    """A real number, NumPy's too, as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("inf")  # or -inf: no range holds either


def numbers(value: object) -> tuple[float, ...]:
    """A sequence of real numbers, NumPy's too, as floats; NaN for elements that are none.

    Empty for what is no such sequence.
    """
    if hasattr(value, "__array__") and hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)):
        return ()
    return tuple(map(number, value))


def count(value: object) -> int:
    """An integer, NumPy's too; -1 for anything else."""
    # Python's own first: to ask for an `Integral` takes ten times as long.
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        return -1
    return int(value)


def single(value: float) -> float:
    """The nearest number of single precision, in which kernels compute; infinite beyond it."""
    if not math.isfinite(value):
        return value
    # By arithmetic alone, which torch.compile can follow.
    unit = math.ldexp(1.0, max(math.frexp(value)[1] - 24, -149))
    nearest = round(value / unit) * unit
    return nearest if abs(nearest) < 2.0**128 else math.copysign(math.inf, value)


def flag(op: str, argument: str, value: object) -> bool:
    """True or False itself."""
    if not isinstance(value, bool):
        raise Refusal(op, argument, "True or False", shown(value))
    return value


def name(op: str, argument: str, value: object, known: Collection[str]) -> str:
    """One of the known names."""
    if not isinstance(value, str) or value not in known:
        raise Refusal.unknown(op, argument, value, known)
    return value


def entry(op: str, argument: str, value: object, table: Mapping[str, _T]) -> _T:
    """The table's entry of this name."""
    if isinstance(value, str) and value in table:
        return table[value]
    raise Refusal.unknown(op, argument, value, sorted(table))

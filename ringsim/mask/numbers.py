"""Counts and positions that masks are made of."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from ..errors import WorkloadError
from ..tile import IntArray
from ..units import shown

MOST: Final = 2**40
"""Of any position or count: sums of them stay far inside 64 bits."""


def count_of(what: str, value: Any, *, least: int = 0) -> int:
    """`value` as a whole number from `least` to MOST. Raises WorkloadError."""
    try:
        number = operator.index(value)
    except TypeError:
        raise WorkloadError(f"{what} is {shown(value)}; it must be a whole number") from None
    if isinstance(value, bool) or not least <= number <= MOST:
        raise WorkloadError(f"{what} is {shown(value)}; it must be a whole number from {least} to {MOST}")
    return number


def optional_count(what: str, value: Any) -> int | None:
    """As `count_of`, or None for no bound."""
    if isinstance(value, int) and value < 0:
        raise WorkloadError(f"{what} is {shown(value)}; it must be 0 or more, or None for no bound (flash-attention's -1)")
    return None if value is None else count_of(what, value)


def counts_of(what: str, values: Any) -> IntArray:
    """`values`, a sequence or an array, as whole numbers from 0 to MOST, shape (n,). Raises WorkloadError."""
    try:
        found = np.asarray(list(values) if isinstance(values, Iterable) and not hasattr(values, "__array__") else values)
    except (ValueError, TypeError, OverflowError):
        raise WorkloadError(f"{what} are {shown(values)}; they must be whole numbers") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise WorkloadError(f"{what} are {found.dtype.name}{found.shape}; they must be a sequence of whole numbers")
    wrong = found[(found < 0) | (found > MOST)]
    if len(wrong):
        raise WorkloadError(f"{what} hold {wrong[0]}; they must be whole numbers from 0 to {MOST}")
    return found.astype(np.int64)

"""What norms prove of scores: where all stay within a bound no running maximum is sought. Found for all heads at once."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Final

import numpy as np
from numpy.lib.introspect import opt_func_info

from ringsim.backends.numpy_micro import Array
from ringsim.lowering import ROWS_AT_ONCE

BOUNDS: Final = {np.dtype(np.float32): (40.0, 1e24), np.dtype(np.float64): (300.0, 1e100)}
"""|score| and the sum of squared values below which no sum of exp(score) x value over 1e9 keys leaves the dtype's range.

Above, not below: in float32 values smaller than about 1e-20 may lose relative accuracy where all scores of a row are near -40.
"""
KINDS: Final = {np.dtype(np.float32): "ff", np.dtype(np.float64): "dd"}
Norms = dict[tuple[int, ...], list[float]]


def largest_norms(array: Array) -> list[float]:
    """For each head of (rows, heads, width), float32 or float64, no less than the largest norm of a row; NaN and inf as found."""
    rows, heads, width = array.shape
    # squares smaller than the smallest normal number may count as 0
    lost = float(np.sqrt(width * np.finfo(array.dtype).tiny))
    squares = np.empty((heads, min(rows, ROWS_AT_ONCE)), array.dtype)
    largest = np.zeros(heads, array.dtype)
    for begin in range(0, rows, ROWS_AT_ONCE):
        part = array[begin : begin + ROWS_AT_ONCE]
        np.vecdot(part, part, out=squares[:, : len(part)].T)
        np.maximum(largest, squares[:, : len(part)].max(axis=1), out=largest)
    return [float(norm) + lost for norm in np.sqrt(largest)]


def value_squares(array: Array) -> list[float]:
    """For each head of (rows, heads, width) no less than the sum of squares; NaN and inf as found."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        together = float(np.dot(flat, flat))
        if together < BOUNDS[array.dtype][1]:
            return [together] * array.shape[1]
    return [float(square) for square in np.einsum("rhd,rhd->h", array, array)]


def open_rows(row_max: Array) -> list[bool]:
    """For each head of (heads, rows) whether the reference of every row is 0 or not yet set."""
    return [bool(found) for found in np.all((row_max == 0) | (row_max == -np.inf), axis=1)]


@cache
def exponential(dtype: np.dtype[Any]) -> tuple[np.ufunc, float]:
    """A function and a factor: ``function(factor * x)`` is exp(x).

    2**x where NumPy has vector code of this machine for it, which is faster than its exp and as exact; otherwise exp itself.
    """
    found = opt_func_info(func_name="^exp2$").get("exp2", {}).get(KINDS[dtype], {}).get("current", "")
    vectors = bool(found) and not found.startswith("baseline")
    return (np.exp2, 1 / math.log(2)) if vectors else (np.exp, 1.0)

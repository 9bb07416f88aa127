"""What micro-tiles of the forward and the backward share: half precision made wide, and which pairs a band hides."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ringsim.lowering import Panel
from ringsim.tile import Tile

Array = npt.NDArray[Any]
Hidden = npt.NDArray[np.bool_]


class Strip(Protocol):
    """Scratch for what a strip hides: two score-shaped buffers, the numbers 0, 1, 2, ... of a micro-tile's keys, and stairs."""

    hidden: Hidden
    before: Hidden
    columns: npt.NDArray[np.int32]
    stairs: Hidden
    """As many False as True after them."""


class Edges(NamedTuple):
    """Each query row's first key seen and first key no longer seen, as columns; `even` where both move one key a row."""

    low: npt.NDArray[np.int32]
    high: npt.NDArray[np.int32]
    even: bool


def widen(source: Array, target: Array) -> Array:
    """Copy into `target`, a float32 array; bfloat16 by moving its bits, an order of magnitude faster than a cast."""
    if source.dtype.name == "bfloat16":
        np.left_shift(source.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(target, source)
    return target


def set_strip(strip: Strip) -> None:
    """Fill what a strip's scratch holds for good."""
    strip.columns[:] = np.arange(strip.columns.size)
    strip.stairs[:] = np.arange(strip.stairs.size) >= strip.stairs.size // 2


def edges_of(tile: Tile) -> Edges | None:
    """The edges of a tile; none without a band."""
    if not tile.masked:
        return None
    low, high = (edge.astype(np.int32)[:, None] for edge in tile.intervals())
    return Edges(low, high, tile.q.step == tile.k.step)


def hidden_pairs(edges: Edges | None, strip: Strip, panel: Panel, k_begin: int, k_end: int) -> Hidden | None:
    """True where a query of the panel does not see a key of [k_begin, k_end); None where all is seen."""
    if not panel.masked or edges is None:
        return None
    low, high = (edge[panel.q_begin : panel.q_end] for edge in edges[:2])
    rows, keys = shape = (len(low), k_end - k_begin)
    cut_before = bool(low[-1, 0] > k_begin)
    if edges.even and not cut_before and high[-1, 0] - high[0, 0] == rows - 1:
        # a staircase of steps of one, unless clipped: a view of one row of it, begun one key later from row to row
        first = min(int(high[0, 0]) - k_begin, keys)
        return np.ndarray(shape, bool, buffer=strip.stairs, offset=strip.stairs.size // 2 - first, strides=(-1, 1))
    hidden, before = (buffer[: rows * keys].reshape(shape) for buffer in (strip.hidden, strip.before))
    columns = strip.columns[None, :keys]
    np.greater_equal(columns, high - k_begin, out=hidden)
    if cut_before:
        np.less(columns, low - k_begin, out=before)
        np.logical_or(hidden, before, out=hidden)
    return hidden

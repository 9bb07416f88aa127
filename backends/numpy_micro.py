"""What micro-tiles of the forward and the backward share: half precision made wide, and which pairs a band hides."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ringsim.lowering import Blocking, Panel
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


class Piece(NamedTuple):
    """A micro-tile: rows [q_begin, q_end) against keys [k_begin, k_end) of a tile.

    Pairs are hidden in its first `cut_rows` rows alone: where `stair` is not negative the first of them sees so many of the keys
    and each further row one more.
    """

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    cut_rows: int
    stair: int


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


def pieces_of(blocking: Blocking, edges: Edges | None, panels: tuple[Panel, ...]) -> tuple[Piece, ...]:
    """The micro-tiles of a block's panels, in the order of computation."""
    return tuple(
        Piece(panel.q_begin, panel.q_end, begin, end, *_cut(edges, panel, begin, end))
        for panel in panels
        for begin in range(panel.k_begin, panel.k_end, blocking.k_rows)
        for end in (min(begin + blocking.k_rows, panel.k_end),)
    )


def _cut(edges: Edges | None, panel: Panel, k_begin: int, k_end: int) -> tuple[int, int]:
    """How many rows of a micro-tile have hidden pairs, or lie above one that has; and its staircase."""
    if not panel.masked or edges is None:
        return 0, -1
    low, high = (edge[panel.q_begin : panel.q_end, 0] for edge in edges[:2])
    if low[-1] > k_begin:
        return len(low), -1
    cut_rows = int(np.searchsorted(high, k_end))
    # a staircase of steps of one, unless clipped
    stairs = cut_rows > 0 and edges.even and high[cut_rows - 1] - high[0] == cut_rows - 1 and high[0] >= k_begin
    return cut_rows, int(high[0]) - k_begin if stairs else -1


def hidden_pairs(edges: Edges | None, strip: Strip, piece: Piece) -> Hidden | None:
    """True where one of the first `cut_rows` queries of a micro-tile does not see a key; None where all is seen."""
    if not piece.cut_rows or edges is None:
        return None
    rows, keys = shape = (piece.cut_rows, piece.k_end - piece.k_begin)
    if piece.stair >= 0:
        return seen_stairs(strip.stairs, shape, piece.stair)
    low, high = (edge[piece.q_begin : piece.q_begin + rows] for edge in edges[:2])
    hidden, before = (buffer[: rows * keys].reshape(shape) for buffer in (strip.hidden, strip.before))
    columns = strip.columns[None, :keys]
    np.greater_equal(columns, high - piece.k_begin, out=hidden)
    if low[-1, 0] > piece.k_begin:
        np.less(columns, low - piece.k_begin, out=before)
        np.logical_or(hidden, before, out=hidden)
    return hidden


def seen_stairs(steps: Array, shape: tuple[int, int], first: int) -> Array:
    """The first half's element left of a staircase, the second half's right of it: one row, begun one key later row by row."""
    size = steps.itemsize
    return np.ndarray(shape, steps.dtype, buffer=steps, offset=(steps.size // 2 - first) * size, strides=(-size, size))

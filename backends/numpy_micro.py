"""What micro-tiles of the forward and the backward share: half precision made wide, and which pairs a band hides."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ringsim.lowering import Panel
from ringsim.tile import Tile

Array = npt.NDArray[Any]
Hidden = npt.NDArray[np.bool_]


class Strip(Protocol):
    """Scratch for what a strip hides: two score-shaped buffers, and the numbers 0, 1, 2, ... of a micro-tile's keys."""

    hidden: Hidden
    before: Hidden
    columns: npt.NDArray[np.int32]


def widen(source: Array, target: Array) -> Array:
    """Copy into `target`, a float32 array; bfloat16 by moving its bits, an order of magnitude faster than a cast."""
    if source.dtype.name == "bfloat16":
        np.left_shift(source.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(target, source)
    return target


def edges_of(tile: Tile) -> tuple[Array, ...]:
    """Each query row's first key seen and first key no longer seen, as columns; none for a tile without a band."""
    return tuple(edge.astype(np.int32)[:, None] for edge in tile.intervals()) if tile.masked else ()


def hidden_pairs(edges: tuple[Array, ...], strip: Strip, panel: Panel, k_begin: int, k_end: int) -> Hidden | None:
    """True where a query of the panel does not see a key of [k_begin, k_end); None where all is seen."""
    if not panel.masked:
        return None
    low, high = (edge[panel.q_begin : panel.q_end] for edge in edges)
    shape = (len(low), k_end - k_begin)
    hidden, before = (buffer[: shape[0] * shape[1]].reshape(shape) for buffer in (strip.hidden, strip.before))
    columns = strip.columns[None, : shape[1]]
    np.greater_equal(columns, high - k_begin, out=hidden)
    if low[-1, 0] > k_begin:
        np.less(columns, low - k_begin, out=before)
        np.logical_or(hidden, before, out=hidden)
    return hidden

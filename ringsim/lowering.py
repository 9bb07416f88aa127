"""Lowering: how a backend cuts a tile for its cache. The backend runs these panels and the cost model prices them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np

from .errors import WorkloadError
from .tile import IntArray, Tile

ROWS_AT_ONCE: Final = 256
"""Of whatever a backend passes over some rows at a time: half precision that `delta` widens, norms, copies between polls."""


class Panel(NamedTuple):
    """Rows [q_begin, q_end) against keys [k_begin, k_end) of a tile; `masked` if a band crosses it."""

    q_begin: int
    q_end: int
    k_begin: int
    k_end: int
    masked: bool


@dataclass(frozen=True, slots=True)
class MicroTiles:
    """`count` alike pieces that a kernel computes whole, hidden pairs included."""

    count: int
    q_rows: int
    k_rows: int
    masked: bool

    @property
    def pairs(self) -> int:
        """Pairs computed, seen or not."""
        return self.count * self.q_rows * self.k_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocking:
    """Micro-tiles of at most `q_rows` x `k_rows`; where a band cuts a block, strips of `edge_rows` follow its edge.

    Strips of keys, as tall as the rows that see some of them, where the band ends one key later from row to row and the keys
    are not cut off before: there the hidden pairs lie in the strip's first `edge_rows` rows. Elsewhere strips of queries.
    `exact` prices the visible pairs alone, as an ideal device would.
    """

    q_rows: int
    k_rows: int
    edge_rows: int
    exact: bool = False

    def __post_init__(self) -> None:
        if min(self.q_rows, self.k_rows, self.edge_rows) < 1:
            raise WorkloadError(f"micro-tiles need at least one row: {self.q_rows} x {self.k_rows}, edge {self.edge_rows}")

    def blocks(self, tile: Tile) -> Iterator[tuple[int, int, tuple[Panel, ...]]]:
        """Blocks of query rows [begin, end) with their panels, in the order of computation."""
        if not tile.masked:
            for begin in range(0, tile.q.count, self.q_rows):
                end = min(begin + self.q_rows, tile.q.count)
                yield begin, end, (Panel(begin, end, 0, tile.k.count, False),)
            return
        low, high = tile.intervals()
        even = tile.q.step == tile.k.step
        for begin in range(0, tile.q.count, self.q_rows):
            end = min(begin + self.q_rows, tile.q.count)
            if panels := tuple(self._panels(low, high, begin, end, even)):
                yield begin, end, panels

    def _panels(self, low: IntArray, high: IntArray, begin: int, end: int, even: bool) -> Iterator[Panel]:
        """The keys that the whole block sees in one panel; what lies left and right of them in strips."""
        first, last = int(low[begin]), int(high[end - 1])
        left, right = self._whole(int(low[end - 1]), int(high[begin]))
        if left >= right:
            left = right = first
        else:
            yield Panel(begin, end, left, right, False)
            yield from self._strips(low, high, range(begin, end), range(first, left))
        if even and low[end - 1] <= right:
            yield from self._columns(high, range(begin, end), range(right, last))
        else:
            yield from self._strips(low, high, range(begin, end), range(right, last))

    def _whole(self, begin: int, end: int) -> tuple[int, int]:
        """Keys that all rows see, as many as fill strips: a sliver of them is cheaper as part of what the band cuts."""
        return begin, begin + max(end - begin, 0) // self.edge_rows * self.edge_rows

    def _strips(self, low: IntArray, high: IntArray, rows: range, keys: range) -> Iterator[Panel]:
        """What rows see of keys in strips of `edge_rows`: the keys that the whole strip sees, and those at its edges."""
        for top in range(rows.start, rows.stop, self.edge_rows) if keys else ():
            bottom = min(top + self.edge_rows, rows.stop)
            seen_from, seen_to = max(keys.start, int(low[top])), min(keys.stop, int(high[bottom - 1]))
            full_from, full_to = self._whole(max(keys.start, int(low[bottom - 1])), min(keys.stop, int(high[top])))
            if full_from >= full_to:
                full_from = full_to = seen_to
            for k_begin, k_end in ((seen_from, full_from), (full_from, full_to), (full_to, seen_to)):
                if k_end > k_begin:
                    yield Panel(top, bottom, k_begin, k_end, bool(low[bottom - 1] > k_begin or high[top] < k_end))

    def _columns(self, high: IntArray, rows: range, keys: range) -> Iterator[Panel]:
        """What rows see of keys, none of them cut off before `keys`: as many keys at a time as make one micro-tile.

        Rows are taken so many at a time that a column has no more pairs than a strip of queries: the figures of a device hold for
        both.
        """
        width, height = sorted((self.edge_rows, self.k_rows))
        for begin in range(rows.start, rows.stop, height) if keys else ():
            end = min(begin + height, rows.stop)
            whole = max(int(high[begin]) - keys.start, 0) // width * width
            if whole:
                yield Panel(begin, end, keys.start, keys.start + whole, False)
            for k_begin in range(keys.start + whole, last := int(high[end - 1]), width):
                k_end = min(k_begin + width, last)
                top = begin + int(np.searchsorted(high[begin:end], k_begin, side="right"))
                yield Panel(top, end, k_begin, k_end, bool(high[top] < k_end))

    def scratch(self, width: int) -> dict[str, tuple[int, str]]:
        """One thread's buffers for tiles of heads up to `width` wide: elements, and dtype (``""``: that of computation)."""
        strip, rows, keys = self.edge_rows * self.k_rows, self.q_rows, self.k_rows
        return {
            "scores": (rows * keys, ""),
            "hidden": (strip, "bool"),
            "before": (strip, "bool"),
            "queries": (rows * width, ""),
            "product": (rows * width, ""),
            "row_max": (rows, ""),
            "row_sum": (rows, ""),
            "factor": (rows, ""),
            "ones": (keys, ""),
            "columns": (keys, "int32"),
            "stairs": (2 * (self.edge_rows + keys), "bool"),
            "seen": (2 * (self.edge_rows + keys), ""),
        }

    def backward_scratch(self, head_dim: int, v_head_dim: int) -> dict[str, tuple[int, str]]:
        """One thread's buffers for the backward of tiles of heads so wide, as `scratch` gives them for the forward.

        Besides these each thread holds the keys and values of one head of the longest tile so far, in the dtype of
        computation: ``k.count * (head_dim + v_head_dim + 2)`` elements. An op makes two int32 and, in passing, two int64 per
        query row of a masked tile.
        """
        strip, rows, keys = self.edge_rows * self.k_rows, self.q_rows, self.k_rows
        return {
            "weights": (rows * keys, ""),
            "dscores": (rows * keys, ""),
            "hidden": (strip, "bool"),
            "before": (strip, "bool"),
            "queries": (rows * (head_dim + 1), ""),
            "douts": (rows * (v_head_dim + 1), ""),
            "dq": (rows * head_dim, ""),
            "product": (max(rows * head_dim, keys * max(head_dim, v_head_dim)), ""),
            "blind": (rows, "bool"),
            "columns": (keys, "int32"),
            "stairs": (2 * (self.edge_rows + keys), "bool"),
        }

    def micro_tiles(self, tile: Tile) -> tuple[MicroTiles, ...]:
        """What one (sequence, query head) of the tile is cut into, alike pieces together."""
        at_origin = replace(tile, batch=(0, 1), heads=(0, 1), q=replace(tile.q, row=0, start=tile.q.start - tile.k.start))
        return _micro_tiles(self, replace(at_origin, k=replace(tile.k, row=0, start=0)))


@lru_cache(maxsize=8192)
def _micro_tiles(blocking: Blocking, tile: Tile) -> tuple[MicroTiles, ...]:
    if blocking.exact:
        pairs = tile.pairs()
        return (MicroTiles(1, 1, pairs, tile.masked),) if pairs else ()
    counts: Counter[tuple[int, int, bool]] = Counter()
    if not tile.masked:
        full_blocks, rest = divmod(tile.q.count, blocking.q_rows)
        for rows, copies in ((blocking.q_rows, full_blocks), (rest, 1 if rest else 0)):
            _count(counts, blocking, Panel(0, rows, 0, tile.k.count, False), copies)
    else:
        for _, _, panels in blocking.blocks(tile):
            for panel in panels:
                _count(counts, blocking, panel, 1)
    return tuple(MicroTiles(count, *key) for key, count in sorted(counts.items()))


def _count(counts: Counter[tuple[int, int, bool]], blocking: Blocking, panel: Panel, copies: int) -> None:
    rows = panel.q_end - panel.q_begin
    whole, rest = divmod(panel.k_end - panel.k_begin, blocking.k_rows)
    if copies and whole:
        counts[rows, blocking.k_rows, panel.masked] += whole * copies
    if copies and rest:
        counts[rows, rest, panel.masked] += copies

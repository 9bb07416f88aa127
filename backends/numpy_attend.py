"""Blockwise attention on NumPy, forward: one tile in cache-sized micro-tiles, with nothing allocated in the inner loop.

Per query row the state holds a reference `max`, `sum` = sum exp(s - max) and `acc` = sum exp(s - max) v (FlashAttention-2,
arXiv 2307.08691, section 3.1). The reference need only keep exp in range: where the norms of q and k prove that every
|score| stays below a bound it is 0 and no maximum is sought; otherwise it is the running maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ringsim.backends.numpy_bounds import BOUNDS, Norms, exponential, largest_norms, open_rows
from ringsim.backends.numpy_micro import Array, Edges, Hidden, Piece, hidden_pairs, seen_stairs, set_strip, widen
from ringsim.backends.numpy_share import Poll
from ringsim.lowering import Blocking
from ringsim.tile import Tile


@dataclass(slots=True)
class Scratch:
    """One thread's buffers; every array of the inner loop is a view of these."""

    scores: Array
    hidden: Hidden
    before: Hidden
    queries: Array
    product: Array
    row_max: Array
    row_sum: Array
    factor: Array
    ones: Array
    columns: npt.NDArray[np.int32]
    stairs: Hidden
    seen: Array

    @classmethod
    def make(cls, blocking: Blocking, width: int, dtype: np.dtype[Any]) -> Scratch:
        """For heads up to `width` wide."""
        made = cls(**{name: np.empty(size, kind or dtype) for name, (size, kind) in blocking.scratch(width).items()})
        made.ones.fill(1)
        set_strip(made)
        np.logical_not(made.stairs, out=made.seen, casting="unsafe")
        return made


class Head(NamedTuple):
    """Keys and values of one head in the dtype of computation, and what their norms allow."""

    keys: Array
    values: Array
    key_norm: float
    value_square: float

    def part(self, begin: int, end: int) -> Head:
        """Keys [begin, end)."""
        return Head(self.keys[begin:end], self.values[begin:end], self.key_norm, self.value_square)


class _Rows(NamedTuple):
    """Scaled queries of some rows of one head, and views of their running state."""

    queries: Array
    acc: Array
    max: Array
    sum: Array

    def part(self, begin: int, end: int) -> _Rows:
        """Rows [begin, end)."""
        return _Rows(self.queries[begin:end], self.acc[begin:end], self.max[begin:end], self.sum[begin:end])


class Item(NamedTuple):
    """One block of query rows of one head, and the micro-tiles to fold into it."""

    batch: int
    head: int
    kv: Head
    begin: int
    end: int
    pieces: tuple[Piece, ...]
    query_norm: float
    """No less than a scaled query's; NaN: still to be found; inf where the reference of some row is neither 0 nor open."""


@dataclass(slots=True)
class AttendTile:
    """Folds one tile, one block of query rows at a time, into the running state."""

    tile: Tile
    blocking: Blocking
    q: Array
    state: tuple[Array, ...]
    scale: float
    edges: Edges | None
    norms: Norms
    """Norms of the queries of the op, found once for the tiles that share them."""

    def query_norms(self, batch: int, begin: int, end: int) -> list[float]:
        """`Item.query_norm` of each head of the tile for a block of rows none of which has been folded yet."""
        (first, last), row = self.tile.heads, self.tile.q.row
        opened = open_rows(self.state[1][batch, first:last, row + begin : row + end])
        if self.q.dtype != self.state[0].dtype:
            return [math.nan if is_open else math.inf for is_open in opened]
        key = (batch, first, last, row + begin, row + end)
        if key not in self.norms:
            self.norms[key] = largest_norms(self.q[batch, row + begin : row + end, first:last])
        return [norm * self.scale if is_open else math.inf for norm, is_open in zip(self.norms[key], opened, strict=True)]

    def __call__(self, scratch: Scratch, poll: Poll, item: Item) -> None:
        """Fold the keys of one head into one block of query rows."""
        first = self.tile.q.row
        rows = slice(first + item.begin, first + item.end)
        bounded, queries = self._queries(scratch, self.q[item.batch, rows, item.head], item)
        state = _Rows(queries, *(array[item.batch, item.head, rows] for array in self.state))
        for piece in item.pieces:
            whole = piece.q_end - piece.q_begin == item.end - item.begin
            part = state if whole else state.part(piece.q_begin - item.begin, piece.q_end - item.begin)
            kv = item.kv.part(piece.k_begin, piece.k_end)
            if bounded:
                _fold_bounded(scratch, part, kv, piece, self.edges)
            else:
                _fold_online(scratch, part, kv, hidden_pairs(self.edges, scratch, piece))
            poll()
        if bounded:
            np.copyto(state.max, 0, where=state.sum > 0)

    def _queries(self, scratch: Scratch, source: Array, item: Item) -> tuple[bool, Array]:
        """Whether every score is provably within the bound, values are moderate, and the rows' reference is 0 or not yet set.

        And the queries times softmax_scale, where it is so in the units of `exponential`.
        """
        (bound, most_square), norm = BOUNDS[scratch.scores.dtype], item.query_norm
        if math.isnan(norm):
            norm = largest_norms(self._scaled(scratch, source, self.scale)[:, None])[0]
        bounded = norm * item.kv.key_norm < bound and item.kv.value_square < most_square
        return bounded, self._scaled(
            scratch, source, self.scale * exponential(scratch.scores.dtype)[1] if bounded else self.scale
        )

    def _scaled(self, scratch: Scratch, source: Array, scale: float) -> Array:
        """The queries times `scale`, dense and in the dtype of computation."""
        queries = scratch.queries[: source.size].reshape(source.shape)
        np.multiply(source if source.dtype == queries.dtype else widen(source, queries), queries.dtype.type(scale), out=queries)
        return queries


def _fold_bounded(scratch: Scratch, rows: _Rows, kv: Head, piece: Piece, edges: Edges | None) -> None:
    scores = _scores(scratch, rows, kv)
    exponential(scores.dtype)[0](scores, out=scores)
    cut = scores[: piece.cut_rows]
    if piece.stair >= 0:
        # every exp is finite here: a product with 0 is 0, and much faster than a masked copy
        np.multiply(cut, seen_stairs(scratch.seen, cut.shape, piece.stair), out=cut)
    elif (hidden := hidden_pairs(edges, scratch, piece)) is not None:
        np.copyto(cut, 0, where=hidden)
    np.add(rows.sum, np.matmul(scores, scratch.ones[: len(kv.keys)], out=scratch.row_sum[: len(scores)]), out=rows.sum)
    product = scratch.product[: rows.acc.size].reshape(rows.acc.shape)
    np.add(rows.acc, np.matmul(scores, kv.values, out=product), out=rows.acc)


def _fold_online(scratch: Scratch, rows: _Rows, kv: Head, hidden: Hidden | None) -> None:
    scores = _scores(scratch, rows, kv)
    if hidden is not None:
        np.copyto(scores[: len(hidden)], -np.inf, where=hidden)
    reference, factor = scratch.row_max[: len(scores)], scratch.factor[: len(scores)]
    np.max(scores, axis=1, out=reference)
    np.maximum(reference, rows.max, out=reference)
    np.copyto(reference, 0, where=reference == -np.inf)
    np.subtract(rows.max, reference, out=factor)
    np.exp(factor, out=factor)
    np.subtract(scores, reference[:, None], out=scores)
    np.exp(scores, out=scores)
    rows.sum[:] *= factor
    rows.sum[:] += np.matmul(scores, scratch.ones[: len(kv.keys)], out=scratch.row_sum[: len(scores)])
    rows.acc[:] *= factor[:, None]
    np.copyto(rows.max, reference, where=rows.sum != 0)
    _add_product(scratch, scores, rows, kv, hidden)


def _scores(scratch: Scratch, rows: _Rows, kv: Head) -> Array:
    shape = (len(rows.queries), len(kv.keys))
    return np.matmul(rows.queries, kv.keys.T, out=scratch.scores[: shape[0] * shape[1]].reshape(shape))


def _add_product(scratch: Scratch, scores: Array, rows: _Rows, kv: Head, hidden: Hidden | None) -> None:
    """Add ``scores @ values``; the first rows do not see what is `hidden` from them."""
    begin = 0
    if hidden is not None and not np.isfinite(kv.value_square):
        # 0 x NaN is NaN: a row must not touch the values that it does not see
        for begin, unseen in enumerate(hidden, 1):
            rows.acc[begin - 1] += scores[begin - 1, ~unseen] @ kv.values[~unseen]
    acc = rows.acc[begin:]
    np.add(acc, np.matmul(scores[begin:], kv.values, out=scratch.product[: acc.size].reshape(acc.shape)), out=acc)

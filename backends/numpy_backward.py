"""Blockwise attention on NumPy, backward: one tile in cache-sized micro-tiles, with nothing allocated in the inner loop.

With the log-sum-exp of whole rows P = exp(scale q k^T - lse) needs no maximum; with delta = rowsum(dout * out),
dV = P^T dO, dS = P * (dO V^T - delta), dQ = scale dS K and dK = scale dS^T Q (FlashAttention-2, arXiv 2307.08691,
section 2.2). Both subtractions are one more column of the operands: [scale q, -lse] [k, 1]^T and [dO, -delta] [v, 1]^T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ringsim.backends.numpy_micro import Array, Edges, Hidden, Piece, hidden_pairs, set_strip, widen
from ringsim.backends.numpy_share import Poll
from ringsim.lowering import Blocking
from ringsim.tile import Tile


@dataclass(slots=True)
class Scratch:
    """One thread's buffers; every array of the inner loop is a view of these. `keys` and `values` grow with the tiles."""

    weights: Array
    dscores: Array
    hidden: Hidden
    before: Hidden
    queries: Array
    douts: Array
    dq: Array
    product: Array
    blind: npt.NDArray[np.bool_]
    columns: npt.NDArray[np.int32]
    stairs: Hidden
    keys: Array
    values: Array

    @classmethod
    def make(cls, blocking: Blocking, widths: tuple[int, int], dtype: np.dtype[Any]) -> Scratch:
        """For heads of `widths` (head_dim, v_head_dim)."""
        buffers = {name: np.empty(size, kind or dtype) for name, (size, kind) in blocking.backward_scratch(*widths).items()}
        made = cls(**buffers, keys=np.empty(0, dtype), values=np.empty(0, dtype))
        set_strip(made)
        return made

    def head(self, keys: Array, values: Array, dk: Array, dv: Array, *, masked: bool) -> _Head:
        """A head's keys and values, (rows, width), in the dtype of computation and each with a column of ones; and its sums."""
        for name, source in (("keys", keys), ("values", values)):
            size = source.shape[0] * (source.shape[1] + 1)
            if getattr(self, name).size < size:
                dtype = self.weights.dtype
                # the old one goes before the new one comes
                setattr(self, name, np.empty(0, dtype))
                setattr(self, name, np.empty(size, dtype))
        keys, values = _with_column(keys, self.keys), _with_column(values, self.values)
        keys[:, -1] = values[:, -1] = 1
        return _Head(keys, values, dk, dv, not masked or (all_finite(keys) and all_finite(values)))


class _Head(NamedTuple):
    """Keys and values of one head in the dtype of computation, each with a column of ones; and its sums."""

    keys: Array
    values: Array
    dk: Array
    dv: Array
    finite: bool

    def part(self, begin: int, end: int) -> _Head:
        """Keys [begin, end)."""
        return _Head(self.keys[begin:end], self.values[begin:end], self.dk[begin:end], self.dv[begin:end], self.finite)


class _Rows(NamedTuple):
    """Some rows of one query head: [scale q, -lse], [dout, -delta], and the sum for dq / scale."""

    queries: Array
    douts: Array
    dq: Array
    finite: bool

    def part(self, begin: int, end: int) -> _Rows:
        """Rows [begin, end)."""
        return _Rows(self.queries[begin:end], self.douts[begin:end], self.dq[begin:end], self.finite)


class Operands(NamedTuple):
    """What `attend_backward` reads: as in `Workload`, and lse and delta (batch, heads, rows) of whole rows."""

    q: Array
    k: Array
    v: Array
    dout: Array
    lse: Array
    delta: Array


Block = tuple[int, int, tuple[Piece, ...]]
"""Query rows [begin, end) of a tile and their micro-tiles."""


class Item(NamedTuple):
    """One key/value head of one sequence with all its query heads: its dk and dv have one writer."""

    batch: int
    kv_head: int


@dataclass(slots=True)
class BackwardTile:
    """Adds one tile's part to `sums`, dq, dk and dv, each (rows, batch, heads, width)."""

    tile: Tile
    blocking: Blocking
    operands: Operands
    sums: tuple[Array, ...]
    scale: float
    edges: Edges | None
    blocks: tuple[Block, ...]

    def items(self) -> Iterator[Item]:
        """The work, in pieces that may run at the same time."""
        group = self.group
        for batch in range(*self.tile.batch):
            for kv_head in range(self.tile.heads[0] // group, -(-self.tile.heads[1] // group)):
                yield Item(batch, kv_head)

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        heads, kv_heads = (array.shape[2] for array in self.operands[:2])
        return int(heads // kv_heads)

    def __call__(self, scratch: Scratch, poll: Poll, item: Item) -> None:
        """All query heads of the tile that share one key/value head, block of rows by block of rows."""
        (batch, kv_head), tile = item, self.tile
        keys = slice(tile.k.row, tile.k.row + tile.k.count)
        dk, dv = (array[keys, batch, kv_head] for array in self.sums[1:])
        kv_arrays = self.operands.k[batch, keys, kv_head], self.operands.v[batch, keys, kv_head]
        kv = scratch.head(*kv_arrays, dk, dv, masked=tile.masked)
        for head in range(max(tile.heads[0], kv_head * self.group), min(tile.heads[1], (kv_head + 1) * self.group)):
            for begin, end, pieces in self.blocks:
                where = slice(tile.q.row + begin, tile.q.row + end)
                rows = self._rows(scratch, batch, where, head)
                for piece in pieces:
                    whole = piece.q_end - piece.q_begin == end - begin
                    part = rows if whole else rows.part(piece.q_begin - begin, piece.q_end - begin)
                    self._add(scratch, piece, part, kv.part(piece.k_begin, piece.k_end))
                    poll()
                np.multiply(rows.dq, rows.dq.dtype.type(self.scale), out=rows.dq)
                self.sums[0][where, batch, head] += rows.dq

    def _rows(self, scratch: Scratch, batch: int, where: slice, head: int) -> _Rows:
        """A block of query rows. One that sees no key has lse -inf: a score of -inf in its place, so that P is 0, not inf."""
        source, lse, delta = self.operands, self.operands.lse[batch, head, where], self.operands.delta[batch, head, where]
        queries = _with_column(source.q[batch, where, head], scratch.queries, scratch.queries.dtype.type(self.scale))
        douts = _with_column(source.dout[batch, where, head], scratch.douts)
        # not np.negative: NumPy 2.4's gets some strides wrong
        np.multiply(delta, -1, out=douts[:, -1])
        queries[:, -1] = 0
        finite = not self.tile.masked or (all_finite(queries) and all_finite(douts))
        np.multiply(lse, -1, out=queries[:, -1])
        blind = np.equal(lse, -np.inf, out=scratch.blind[: len(queries)])
        np.copyto(queries[:, -1], -np.inf, where=blind)
        dq = scratch.dq[: len(queries) * (queries.shape[1] - 1)].reshape(len(queries), -1)
        dq.fill(0)
        return _Rows(queries, douts, dq, finite)

    def _add(self, scratch: Scratch, piece: Piece, rows: _Rows, kv: _Head) -> None:
        hidden = hidden_pairs(self.edges, scratch, piece)
        if hidden is None or (rows.finite and kv.finite):
            _add(scratch, rows, kv, hidden)
            return
        _add_row_by_row(scratch, rows.part(0, len(hidden)), kv, hidden)
        if len(hidden) < len(rows.queries):
            _add(scratch, rows.part(len(hidden), len(rows.queries)), kv, None)


def _with_column(source: Array, buffer: Array, scale: Any = None) -> Array:
    """(rows, width + 1): `source` in the dtype of the buffer, times `scale` if given, and a column to be filled."""
    rows, width = source.shape
    target = buffer[: rows * (width + 1)].reshape(rows, width + 1)
    filled = target[:, :-1]
    if scale is None or source.dtype != buffer.dtype:
        source = widen(source, filled)
    if scale is not None:
        np.multiply(source, scale, out=filled)
    return target


def all_finite(array: Array) -> bool:
    """Whether every element of a dense array is finite and no square overflows: False may be caution."""
    flat = array.reshape(-1)
    return bool(np.isfinite(np.dot(flat, flat)))


def _weights(scratch: Scratch, rows: _Rows, kv: _Head, hidden: Hidden | None) -> Array:
    """Softmax: P = exp(scale q k^T - lse), 0 where hidden: `hidden` are the first rows."""
    shape = (len(rows.queries), len(kv.keys))
    weights = np.matmul(rows.queries, kv.keys.T, out=scratch.weights[: shape[0] * shape[1]].reshape(shape))
    np.exp(weights, out=weights)
    if hidden is not None:
        np.copyto(weights[: len(hidden)], 0, where=hidden)
    return weights


def _dscores(scratch: Scratch, rows: _Rows, kv: _Head, weights: Array) -> Array:
    """Gradient of the scores: dS = P * (dO V^T - delta)."""
    dscores = np.matmul(rows.douts, kv.values.T, out=scratch.dscores[: weights.size].reshape(weights.shape))
    dscores *= weights
    return dscores


def _add(scratch: Scratch, rows: _Rows, kv: _Head, hidden: Hidden | None) -> None:
    weights = _weights(scratch, rows, kv, hidden)
    _add_product(scratch, weights.T, rows.douts, kv.dv)
    dscores = _dscores(scratch, rows, kv, weights)
    _add_product(scratch, dscores, kv.keys, rows.dq)
    _add_product(scratch, dscores.T, rows.queries, kv.dk)


def _add_product(scratch: Scratch, left: Array, right: Array, total: Array) -> None:
    """Add ``left @ right``, without the last column of `right`, to `total`."""
    total += np.matmul(left, right[:, :-1], out=scratch.product[: total.size].reshape(total.shape))


def _add_row_by_row(scratch: Scratch, rows: _Rows, kv: _Head, hidden: Hidden) -> None:
    """0 x NaN is NaN: a row must not touch what it does not see, nor be touched by it."""
    weights = _weights(scratch, rows, kv, hidden)
    dscores = _dscores(scratch, rows, kv, weights)
    for row, unseen in enumerate(hidden):
        seen = ~unseen
        kv.dv[seen] += np.outer(weights[row, seen], rows.douts[row, :-1])
        kv.dk[seen] += np.outer(dscores[row, seen], rows.queries[row, :-1])
        rows.dq[row] += dscores[row, seen] @ kv.keys[seen, :-1]

"""The NumPy backend: blockwise attention in cache-sized micro-tiles, with nothing allocated in the inner loop.

Per query row the state holds a reference `max`, `sum` = sum exp(s - max) and `acc` = sum exp(s - max) v (FlashAttention-2,
arXiv 2307.08691, section 3.1). The reference need only keep exp in range: where the norms of q and k prove that every
|score| stays below a bound it is 0 and no maximum is sought; otherwise it is the running maximum.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ringsim.errors import ArrayError
from ringsim.lowering import Blocking, Panel
from ringsim.schedule.ops import Compute, Region
from ringsim.tile import Tile

from .cpu import Cache, blas_threads, detect_cache

Array = npt.NDArray[Any]
Poll = Callable[[], None]
Fetch = Callable[[Region], Array]

BOUND: Final = {"float32": 40.0, "float64": 300.0}
"""|score| below which sums of exp(score) over any sequence that fits in memory stay in range of the dtype."""


def blocking_for(cache: Cache, dtype: str) -> Blocking:
    """Micro-tiles whose scores fill a level-2 cache: measured best against half and twice that."""
    itemsize = 8 if dtype == "float64" else 4
    side = 64
    while (2 * side) ** 2 * itemsize <= cache.level2_nbytes and side < 512:
        side *= 2
    return Blocking(q_rows=side, k_rows=side, edge_rows=min(128, side))


@dataclass(slots=True)
class _Scratch:
    """One thread's buffers; every array of the inner loop is a view of these."""

    scores: Array
    hidden: npt.NDArray[np.bool_]
    queries: Array
    product: Array
    row_max: Array
    row_sum: Array
    factor: Array
    ones: Array
    columns: npt.NDArray[np.int32]

    @classmethod
    def make(cls, blocking: Blocking, width: int, dtype: np.dtype[Any]) -> _Scratch:
        q_rows, k_rows = blocking.q_rows, blocking.k_rows
        return cls(
            scores=np.empty(q_rows * k_rows, dtype),
            hidden=np.empty(blocking.edge_rows * k_rows, np.bool_),
            queries=np.empty(q_rows * width, dtype),
            product=np.empty(q_rows * width, dtype),
            row_max=np.empty(q_rows, dtype),
            row_sum=np.empty(q_rows, dtype),
            factor=np.empty(q_rows, dtype),
            ones=np.ones(k_rows, dtype),
            columns=np.arange(k_rows, dtype=np.int32),
        )


@dataclass(slots=True)
class _Head:
    """One key/value head of a tile in the dtype of computation, and what its numbers allow."""

    keys: Array
    values: Array
    key_norm: float
    values_finite: bool


class NumpyBackend:
    """Runs `reset`, `attend` and `finish` on NumPy arrays with `threads` Python threads (BLAS itself runs one).

    `blocking` overrides the micro-tile sizes that are otherwise chosen from the level-2 cache.
    """

    name = "numpy"

    def __init__(self, *, threads: int = 1, blocking: Blocking | None = None, cache: Cache | None = None) -> None:
        if threads < 1:
            raise ArrayError(f"threads is {threads}; it must be 1 or more")
        self.threads = threads
        self.cache = cache or detect_cache()
        self._blocking = blocking
        self._scratch: dict[tuple[str, int, int], _Scratch] = {}
        self._half: dict[str, Array] = {}
        self._kernels = {"reset": self._reset, "attend": self._attend, "finish": self._finish}

    def blocking(self, dtype: str) -> Blocking:
        """The lowering used for tiles computed in `dtype` (that of the partials)."""
        return self._blocking or blocking_for(self.cache, dtype)

    def compute(self, op: Compute, fetch: Fetch, *, scale: float, poll: Poll) -> None:
        """Run one Compute op on the arrays that `fetch` returns for its regions; calls `poll` between micro-tiles."""
        with np.errstate(all="ignore"), blas_threads(1):
            self._kernels[op.kernel](op, fetch, scale, poll)

    def _reset(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        acc, row_max, row_sum = (fetch(region) for region in op.writes)
        acc.fill(0)
        row_max.fill(-np.inf)
        row_sum.fill(0)

    def _finish(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        acc, row_max, row_sum = (fetch(region) for region in op.reads)
        out, lse = (fetch(region) for region in op.writes)
        np.log(row_sum, out=lse)
        lse += row_max
        row_sum[row_sum == 0] = 1
        for batch in range(acc.shape[0]):
            for head in range(acc.shape[1]):
                np.divide(acc[batch, head], row_sum[batch, head, :, None], out=out[batch, :, head, :], casting="same_kind")
                poll()

    def _attend(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        q, k, v = (fetch(region) for region in op.reads[:3])
        state = tuple(fetch(region) for region in op.writes)
        blocking = self.blocking(op.writes[0].dtype)
        for tile in op.tiles:
            items = self._items(tile, blocking, q.shape[2] // k.shape[2], k, v, state[0].dtype)
            self._share(items, _AttendTile(tile, blocking, q, state, scale, _edges(tile)), poll)

    def _items(self, tile: Tile, blocking: Blocking, group: int, k: Array, v: Array, dtype: np.dtype[Any]) -> Iterator[Any]:
        """Work items, key/value head by head so that its conversion and its norms are made once."""
        blocks = tuple(blocking.blocks(tile))
        rows = slice(tile.k.row, tile.k.row + tile.k.count)
        for batch in range(*tile.batch):
            for kv_head in range(tile.heads[0] // group, -(-tile.heads[1] // group)):
                head = self.prepare_head(k[batch, rows, kv_head], v[batch, rows, kv_head], dtype, masked=tile.masked)
                for index in range(max(tile.heads[0], kv_head * group), min(tile.heads[1], (kv_head + 1) * group)):
                    for begin, end, panels in blocks:
                        yield batch, index, head, begin, end, panels

    def prepare_head(self, keys: Array, values: Array, dtype: np.dtype[Any], *, masked: bool) -> _Head:
        """What is done once per key/value head of a tile: convert to `dtype`, bound the norms, look for NaN and inf."""
        if keys.dtype != dtype:
            keys, values = self._widen("k", keys, dtype), self._widen("v", values, dtype)
        key_norm = float(np.sqrt(np.einsum("ij,ij->i", keys, keys).max())) if keys.size else 0.0
        finite = bool(np.isfinite(np.einsum("ij,ij->", values, values))) if masked else True
        return _Head(keys, values, key_norm, finite)

    def _widen(self, name: str, source: Array, dtype: np.dtype[Any]) -> Array:
        """A half-precision head in the dtype of computation; with threads each head is its own, for others still read it."""
        if self.threads > 1:
            target = np.empty(source.shape, dtype)
        else:
            kept = self._half.get(name)
            if kept is None or kept.size < source.size or kept.dtype != dtype:
                kept = self._half[name] = np.empty(source.size, dtype)
            target = kept[: source.size].reshape(source.shape)
        return widen(source, target)

    def _share(self, items: Iterator[Any], kernel: _AttendTile, poll: Poll) -> None:
        """Run the items here, or on all threads with this one polling between its own."""
        width = max(kernel.q.shape[3], kernel.state[0].shape[3])
        if self.threads == 1:
            scratch = self._scratch_of(kernel, width, 0)
            for item in items:
                kernel(scratch, poll, *item)
            return
        lock, failures = threading.Lock(), []

        def work(index: int, poll: Poll) -> None:
            scratch = self._scratch_of(kernel, width, index)
            try:
                with np.errstate(all="ignore"):
                    while not failures:
                        with lock:
                            item = next(items, None)
                        if item is None:
                            return
                        kernel(scratch, poll, *item)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(index, _no_poll)) for index in range(1, self.threads)]
        for worker in workers:
            worker.start()
        work(0, poll)
        for worker in workers:
            worker.join()
        if failures:
            raise failures[0]

    def _scratch_of(self, kernel: _AttendTile, width: int, index: int) -> _Scratch:
        dtype = kernel.state[0].dtype
        key = (dtype.name, width, index)
        if key not in self._scratch:
            self._scratch[key] = _Scratch.make(kernel.blocking, width, dtype)
        return self._scratch[key]


def _no_poll() -> None:
    """Only one thread of a rank calls MPI."""


def widen(source: Array, target: Array) -> Array:
    """Copy into `target`, a float32 array; bfloat16 by moving its bits, an order of magnitude faster than a cast."""
    if source.dtype.name == "bfloat16":
        np.left_shift(source.view(np.uint16), 16, out=target.view(np.uint32), dtype=np.uint32)
    else:
        np.copyto(target, source)
    return target


@dataclass(slots=True)
class _AttendTile:
    """Folds one tile, one block of query rows at a time, into the running state."""

    tile: Tile
    blocking: Blocking
    q: Array
    state: tuple[Array, ...]
    scale: float
    edges: tuple[Array, ...]

    def __call__(
        self, scratch: _Scratch, poll: Poll, batch: int, head: int, kv: _Head, begin: int, end: int, panels: tuple[Panel, ...]
    ) -> None:
        first = self.tile.q.row
        acc, row_max, row_sum = (array[batch, head, first + begin : first + end] for array in self.state)
        width = self.q.shape[3]
        queries = scratch.queries[: (end - begin) * width].reshape(end - begin, width)
        if self.q.dtype == queries.dtype:
            np.multiply(self.q[batch, first + begin : first + end, head], queries.dtype.type(self.scale), out=queries)
        else:
            widen(self.q[batch, first + begin : first + end, head], queries)
            queries *= queries.dtype.type(self.scale)
        bounded = self._bounded(scratch, queries, row_max, kv.key_norm)
        for panel in panels:
            rows = slice(panel.q_begin - begin, panel.q_end - begin)
            view = (queries[rows], acc[rows], row_max[rows], row_sum[rows])
            for k_begin in range(panel.k_begin, panel.k_end, self.blocking.k_rows):
                k_end = min(k_begin + self.blocking.k_rows, panel.k_end)
                hidden = None
                if panel.masked:
                    hidden = _hidden(scratch, *(edge[panel.q_begin : panel.q_end] for edge in self.edges), k_begin, k_end)
                (_fold_bounded if bounded else _fold_online)(scratch, kv, k_begin, k_end, hidden, *view)
                poll()
        if bounded:
            np.copyto(row_max, 0, where=row_sum > 0)

    def _bounded(self, scratch: _Scratch, queries: Array, row_max: Array, key_norm: float) -> bool:
        """Whether every score is provably within the bound and the rows' reference is 0 or not yet set."""
        norms = np.einsum("ij,ij->i", queries, queries, out=scratch.row_sum[: len(queries)])
        largest = float(np.sqrt(norms.max())) * key_norm
        return largest < BOUND[queries.dtype.name] and bool(np.all((row_max == 0) | (row_max == -np.inf)))


def _edges(tile: Tile) -> tuple[Array, ...]:
    """Each query row's first key seen and first key no longer seen, as columns; none for a tile without a band."""
    return tuple(edge.astype(np.int32)[:, None] for edge in tile.intervals()) if tile.masked else ()


def _hidden(scratch: _Scratch, low: Array, high: Array, k_begin: int, k_end: int) -> npt.NDArray[np.bool_]:
    """True where a query of the strip does not see a key."""
    shape = (len(low), k_end - k_begin)
    hidden = scratch.hidden[: shape[0] * shape[1]].reshape(shape)
    columns = scratch.columns[: shape[1]]
    np.greater_equal(columns[None, :], high - k_begin, out=hidden)
    if low[-1, 0] > k_begin:
        hidden |= columns[None, :] < low - k_begin
    return hidden


def _fold_bounded(
    scratch: _Scratch,
    kv: _Head,
    k_begin: int,
    k_end: int,
    hidden: npt.NDArray[np.bool_] | None,
    queries: Array,
    acc: Array,
    row_max: Array,
    row_sum: Array,
) -> None:
    rows, columns = len(queries), k_end - k_begin
    scores = scratch.scores[: rows * columns].reshape(rows, columns)
    np.matmul(queries, kv.keys[k_begin:k_end].T, out=scores)
    np.exp(scores, out=scores)
    if hidden is not None:
        np.copyto(scores, 0, where=hidden)
    sums = np.matmul(scores, scratch.ones[:columns], out=scratch.row_sum[:rows])
    row_sum += sums
    _add_product(scratch, scores, kv, k_begin, k_end, hidden, acc)


def _fold_online(
    scratch: _Scratch,
    kv: _Head,
    k_begin: int,
    k_end: int,
    hidden: npt.NDArray[np.bool_] | None,
    queries: Array,
    acc: Array,
    row_max: Array,
    row_sum: Array,
) -> None:
    rows, columns = len(queries), k_end - k_begin
    scores = scratch.scores[: rows * columns].reshape(rows, columns)
    np.matmul(queries, kv.keys[k_begin:k_end].T, out=scores)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
    reference, factor = scratch.row_max[:rows], scratch.factor[:rows]
    np.max(scores, axis=1, out=reference)
    np.maximum(reference, row_max, out=reference)
    np.copyto(reference, 0, where=reference == -np.inf)
    np.subtract(row_max, reference, out=factor)
    np.exp(factor, out=factor)
    np.subtract(scores, reference[:, None], out=scores)
    np.exp(scores, out=scores)
    sums = np.matmul(scores, scratch.ones[:columns], out=scratch.row_sum[:rows])
    row_sum *= factor
    row_sum += sums
    acc *= factor[:, None]
    np.copyto(row_max, reference, where=row_sum != 0)
    _add_product(scratch, scores, kv, k_begin, k_end, hidden, acc)


def _add_product(
    scratch: _Scratch, scores: Array, kv: _Head, k_begin: int, k_end: int, hidden: npt.NDArray[np.bool_] | None, acc: Array
) -> None:
    values = kv.values[k_begin:k_end]
    if hidden is not None and not kv.values_finite:
        # 0 x NaN is NaN: a row must not touch the values that it does not see
        for row, unseen in enumerate(hidden):
            acc[row] += scores[row, ~unseen] @ values[~unseen]
        return
    product = scratch.product[: acc.size].reshape(acc.shape)
    np.matmul(scores, values, out=product)
    acc += product


def default_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

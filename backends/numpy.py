"""The NumPy backend: blockwise attention in cache-sized micro-tiles, with nothing allocated in the inner loop.

Per query row the state holds a reference `max`, `sum` = sum exp(s - max) and `acc` = sum exp(s - max) v (FlashAttention-2,
arXiv 2307.08691, section 3.1). The reference need only keep exp in range: where the norms of q and k prove that every
|score| stays below a bound it is 0 and no maximum is sought; otherwise it is the running maximum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ringsim.backends.cpu import Cache, detect_cache, one_blas_thread
from ringsim.errors import ArrayError
from ringsim.lowering import Blocking, Panel
from ringsim.schedule.ops import Compute, Region
from ringsim.tile import Tile

Array = npt.NDArray[Any]
Poll = Callable[[], None]
Fetch = Callable[[Region], Array]

BOUNDS: Final = {"float32": (40.0, 1e24), "float64": (300.0, 1e100)}
"""|score| and the sum of squared values below which no sum of exp(score) x value over 1e9 keys leaves the dtype's range.

Above, not below: in float32 values smaller than about 1e-20 may lose relative accuracy where all scores of a row are near -40.
"""


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
    before: npt.NDArray[np.bool_]
    queries: Array
    product: Array
    row_max: Array
    row_sum: Array
    factor: Array
    ones: Array
    columns: npt.NDArray[np.int32]

    @classmethod
    def make(cls, blocking: Blocking, width: int, dtype: np.dtype[Any]) -> _Scratch:
        made = cls(**{name: np.empty(size, kind or dtype) for name, (size, kind) in blocking.scratch(width).items()})
        made.ones.fill(1)
        made.columns[:] = np.arange(blocking.k_rows)
        return made


POLL_S = 5e-4
"""How often a rank that waits for its own kernel threads drives transfers."""


class _Head(NamedTuple):
    """Keys and values of one head in the dtype of computation, and what their norms allow."""

    keys: Array
    values: Array
    key_norm: float
    value_square: float

    def part(self, begin: int, end: int) -> _Head:
        """Keys [begin, end)."""
        return _Head(self.keys[begin:end], self.values[begin:end], self.key_norm, self.value_square)


class _Rows(NamedTuple):
    """Scaled queries of some rows of one head, and views of their running state."""

    queries: Array
    acc: Array
    max: Array
    sum: Array

    def part(self, begin: int, end: int) -> _Rows:
        """Rows [begin, end)."""
        return _Rows(self.queries[begin:end], self.acc[begin:end], self.max[begin:end], self.sum[begin:end])


class _Item(NamedTuple):
    """One block of query rows of one head, and the panels to fold into it."""

    batch: int
    head: int
    kv: _Head
    begin: int
    end: int
    panels: tuple[Panel, ...]


class _Shared(NamedTuple):
    """Work items that several threads take from, and what went wrong."""

    items: Iterator[_Item]
    lock: threading.Lock
    failures: list[BaseException]

    def next(self) -> _Item | None:
        """The next item, for one thread."""
        with self.lock:
            return next(self.items, None)


class NumpyBackend:
    """Runs `reset`, `attend`, `merge`, `pack` and `finish` on NumPy arrays with `threads` Python threads (BLAS itself runs one).

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
        self._kernels |= {"merge": self._merge, "pack": self._pack}

    @property
    def nbytes(self) -> int:
        """Bytes of scratch held now, over all threads."""
        scratch = (getattr(one, name) for one in self._scratch.values() for name in one.__dataclass_fields__)
        return sum(array.nbytes for array in (*scratch, *self._half.values()))

    def blocking(self, dtype: str) -> Blocking:
        """The lowering used for tiles computed in `dtype` (that of the partials)."""
        return self._blocking or blocking_for(self.cache, dtype)

    def compute(self, op: Compute, fetch: Fetch, *, scale: float, poll: Poll) -> None:
        """Run one Compute op on the arrays that `fetch` returns for its regions; calls `poll` between micro-tiles."""
        with np.errstate(all="ignore"), one_blas_thread():
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
        divisor = np.where(row_sum == 0, row_sum.dtype.type(1), row_sum)
        for batch in range(acc.shape[0]):
            for head in range(acc.shape[1]):
                np.divide(acc[batch, head], divisor[batch, head, :, None], out=out[batch, :, head, :], casting="same_kind")
                poll()

    def _pack(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        for source, target in zip(op.reads, op.writes, strict=True):
            np.copyto(fetch(target), fetch(source))
            poll()

    def _merge(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        """Add one partial state to another: exp and sum over the keys of both, on the larger of their references."""
        regions = [fetch(region) for region in op.reads]
        mine, other = regions[:3], regions[3:]
        for batch, head in np.ndindex(*mine[0].shape[:2]):
            _merge_rows(*(tuple(array[batch, head] for array in side) for side in (mine, other)))
            poll()

    def _attend(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        q, k, v = (fetch(region) for region in op.reads[:3])
        state = tuple(fetch(region) for region in op.writes)
        for tile in op.tiles:
            kernel = _AttendTile(tile, self.blocking(op.writes[0].dtype), q, state, scale, _edges(tile))
            self._share(self._items(kernel, k, v), kernel, poll)

    def _items(self, kernel: _AttendTile, k: Array, v: Array) -> Iterator[_Item]:
        """Work items, key/value head by head so that its conversion and its norms are made once."""
        tile, dtype = kernel.tile, kernel.state[0].dtype
        group = kernel.q.shape[2] // k.shape[2]
        blocks = tuple(kernel.blocking.blocks(tile))
        rows = slice(tile.k.row, tile.k.row + tile.k.count)
        for batch in range(*tile.batch):
            for kv_head in range(tile.heads[0] // group, -(-tile.heads[1] // group)):
                kv = self.prepare_head(k[batch, rows, kv_head], v[batch, rows, kv_head], dtype)
                for head in range(max(tile.heads[0], kv_head * group), min(tile.heads[1], (kv_head + 1) * group)):
                    for begin, end, panels in blocks:
                        yield _Item(batch, head, kv, begin, end, panels)

    def prepare_head(self, keys: Array, values: Array, dtype: np.dtype[Any]) -> _Head:
        """What is done once per key/value head of a tile: convert to `dtype`, find the norms that bounds rest on."""
        if keys.dtype != dtype:
            keys, values = self._widen("k", keys, dtype), self._widen("v", values, dtype)
        key_norm = float(np.sqrt(np.einsum("ij,ij->i", keys, keys).max())) if keys.size else 0.0
        return _Head(keys, values, key_norm, float(np.einsum("ij,ij->", values, values)))

    def _widen(self, name: str, source: Array, dtype: np.dtype[Any]) -> Array:
        """A half-precision head in the dtype of computation; with threads each head is its own, for others still read it."""
        if self.threads > 1:
            target = np.empty(source.shape, dtype)
        else:
            kept = self._half.get(name)
            if kept is None or kept.size < source.size or kept.dtype != dtype:
                # the old one goes before the new one comes
                kept = None
                self._half.pop(name, None)
                kept = self._half[name] = np.empty(source.size, dtype)
            target = kept[: source.size].reshape(source.shape)
        return widen(source, target)

    def _share(self, items: Iterator[_Item], kernel: _AttendTile, poll: Poll) -> None:
        """Run the items here, or on all threads with this one polling between its own."""
        if self.threads == 1:
            scratch = self._scratch_of(kernel, 0)
            for item in items:
                kernel(scratch, poll, item)
            return
        shared = _Shared(items, threading.Lock(), [])
        threads = range(1, self.threads)
        workers = [threading.Thread(target=self._work, args=(shared, kernel, index, _no_poll)) for index in threads]
        for worker in workers:
            worker.start()
        self._work(shared, kernel, 0, poll)
        for worker in workers:
            while worker.is_alive():
                worker.join(POLL_S)
                poll()
        if shared.failures:
            raise shared.failures[0]

    def _work(self, shared: _Shared, kernel: _AttendTile, index: int, poll: Poll) -> None:
        """One thread's loop: take the next item until there is none or a thread has failed."""
        try:
            scratch = self._scratch_of(kernel, index)
            with np.errstate(all="ignore"):
                while not shared.failures and (item := shared.next()) is not None:
                    kernel(scratch, poll, item)
        except BaseException as error:  # noqa: BLE001 - raised again in the rank's own thread
            shared.failures.append(error)

    def _scratch_of(self, kernel: _AttendTile, index: int) -> _Scratch:
        dtype, width = kernel.state[0].dtype, max(kernel.q.shape[3], kernel.state[0].shape[3])
        key = (dtype.name, width, index)
        if key not in self._scratch:
            self._scratch[key] = _Scratch.make(kernel.blocking, width, dtype)
        return self._scratch[key]


def _merge_rows(mine: tuple[Array, ...], other: tuple[Array, ...]) -> None:
    """Merge a partial state of some rows (acc, max, sum) into another, in place: the larger reference serves both.

    A side that saw no key has sum 0 and reference -inf; where neither saw one, the row stays so. FlashAttention-2, arXiv
    2307.08691, section 3.1, for two blocks.
    """
    (acc, row_max, row_sum), (acc2, row_max2, row_sum2) = mine, other
    reference = np.maximum(np.where(row_sum == 0, -np.inf, row_max), np.where(row_sum2 == 0, -np.inf, row_max2))
    np.copyto(reference, 0, where=reference == -np.inf)
    factor, factor2 = (np.where(s == 0, 0, np.exp(m - reference)) for m, s in ((row_max, row_sum), (row_max2, row_sum2)))
    row_sum *= factor
    row_sum += factor2 * row_sum2
    acc *= factor[:, None]
    acc += factor2[:, None] * acc2
    np.copyto(row_max, reference, where=row_sum != 0)


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

    def __call__(self, scratch: _Scratch, poll: Poll, item: _Item) -> None:
        """Fold the keys of one head into one block of query rows."""
        first = self.tile.q.row
        rows = slice(first + item.begin, first + item.end)
        queries = self._scaled(scratch, self.q[item.batch, rows, item.head])
        state = _Rows(queries, *(array[item.batch, item.head, rows] for array in self.state))
        fold = _fold_bounded if self._bounded(scratch, state, item.kv) else _fold_online
        for panel in item.panels:
            part = state.part(panel.q_begin - item.begin, panel.q_end - item.begin)
            for k_begin in range(panel.k_begin, panel.k_end, self.blocking.k_rows):
                k_end = min(k_begin + self.blocking.k_rows, panel.k_end)
                fold(scratch, part, item.kv.part(k_begin, k_end), self._hidden(scratch, panel, k_begin, k_end))
                poll()
        if fold is _fold_bounded:
            np.copyto(state.max, 0, where=state.sum > 0)

    def _scaled(self, scratch: _Scratch, source: Array) -> Array:
        """The queries times softmax_scale, dense and in the dtype of computation."""
        queries = scratch.queries[: source.size].reshape(source.shape)
        scale = queries.dtype.type(self.scale)
        np.multiply(source if source.dtype == queries.dtype else widen(source, queries), scale, out=queries)
        return queries

    def _bounded(self, scratch: _Scratch, rows: _Rows, kv: _Head) -> bool:
        """Whether every score is provably within the bound, values are moderate, and the rows' reference is 0 or not yet set."""
        bound, most_square = BOUNDS[rows.queries.dtype.name]
        norms = np.einsum("ij,ij->i", rows.queries, rows.queries, out=scratch.row_sum[: len(rows.queries)])
        largest = float(np.sqrt(norms.max())) * kv.key_norm
        return largest < bound and kv.value_square < most_square and bool(np.all((rows.max == 0) | (rows.max == -np.inf)))

    def _hidden(self, scratch: _Scratch, panel: Panel, k_begin: int, k_end: int) -> npt.NDArray[np.bool_] | None:
        """True where a query of the strip does not see a key; None where all is seen."""
        if not panel.masked:
            return None
        low, high = (edge[panel.q_begin : panel.q_end] for edge in self.edges)
        shape = (len(low), k_end - k_begin)
        hidden, before = (buffer[: shape[0] * shape[1]].reshape(shape) for buffer in (scratch.hidden, scratch.before))
        columns = scratch.columns[None, : shape[1]]
        np.greater_equal(columns, high - k_begin, out=hidden)
        if low[-1, 0] > k_begin:
            np.less(columns, low - k_begin, out=before)
            np.logical_or(hidden, before, out=hidden)
        return hidden


def _edges(tile: Tile) -> tuple[Array, ...]:
    """Each query row's first key seen and first key no longer seen, as columns; none for a tile without a band."""
    return tuple(edge.astype(np.int32)[:, None] for edge in tile.intervals()) if tile.masked else ()


def _fold_bounded(scratch: _Scratch, rows: _Rows, kv: _Head, hidden: npt.NDArray[np.bool_] | None) -> None:
    scores = _scores(scratch, rows, kv)
    np.exp(scores, out=scores)
    if hidden is not None:
        np.copyto(scores, 0, where=hidden)
    rows.sum[:] += np.matmul(scores, scratch.ones[: len(kv.keys)], out=scratch.row_sum[: len(scores)])
    _add_product(scratch, scores, rows, kv, hidden)


def _fold_online(scratch: _Scratch, rows: _Rows, kv: _Head, hidden: npt.NDArray[np.bool_] | None) -> None:
    scores = _scores(scratch, rows, kv)
    if hidden is not None:
        np.copyto(scores, -np.inf, where=hidden)
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


def _scores(scratch: _Scratch, rows: _Rows, kv: _Head) -> Array:
    shape = (len(rows.queries), len(kv.keys))
    return np.matmul(rows.queries, kv.keys.T, out=scratch.scores[: shape[0] * shape[1]].reshape(shape))


def _add_product(scratch: _Scratch, scores: Array, rows: _Rows, kv: _Head, hidden: npt.NDArray[np.bool_] | None) -> None:
    if hidden is not None and not np.isfinite(kv.value_square):
        # 0 x NaN is NaN: a row must not touch the values that it does not see
        for row, unseen in enumerate(hidden):
            rows.acc[row] += scores[row, ~unseen] @ kv.values[~unseen]
        return
    product = scratch.product[: rows.acc.size].reshape(rows.acc.shape)
    rows.acc[:] += np.matmul(scores, kv.values, out=product)

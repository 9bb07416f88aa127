"""The NumPy backend: which kernel runs an op, how tiles are cut for the cache, and the scratch of each thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

from ringsim.arrays import host_view
from ringsim.backends import numpy_attend, numpy_backward, numpy_bounds, numpy_state
from ringsim.backends.cpu import Cache, detect_cache, one_blas_thread
from ringsim.backends.numpy_attend import AttendTile, Head
from ringsim.backends.numpy_backward import BackwardTile, Operands
from ringsim.backends.numpy_bounds import largest_norms, value_squares
from ringsim.backends.numpy_micro import Array, Edges, Piece, edges_of, pieces_of, widen
from ringsim.backends.numpy_share import Poll, share
from ringsim.dtypes import accumulator
from ringsim.errors import ArrayError
from ringsim.footprint import Footprint, weigh
from ringsim.lowering import Blocking
from ringsim.schedule import Schedule
from ringsim.schedule.ops import Compute, Recv, Region, Send
from ringsim.tile import Tile

Fetch = Callable[[Region], Array]
Prepared = dict[tuple[int, ...], tuple[Head, ...]]
"""Heads of the keys and values of one op, by (batch, first head, last head, first row, rows)."""

PASSES: Final = {
    "reset": numpy_state.reset,
    "finish": numpy_state.finish,
    "merge": numpy_state.merge,
    "pack": numpy_state.pack,
    "delta": numpy_state.delta,
    "clear": numpy_state.clear,
    "accumulate": numpy_state.accumulate,
    "cast": numpy_state.cast,
}
"""Kernels that pass over their arrays once, in the rank's own thread."""


def blocking_for(cache: Cache, dtype: str) -> Blocking:
    """Micro-tiles whose scores fill a level-2 cache: measured best against half and twice that."""
    itemsize = 8 if dtype == "float64" else 4
    side = 64
    while (2 * side) ** 2 * itemsize <= cache.level2_nbytes and side < 512:
        side *= 2
    return Blocking(q_rows=side, k_rows=side, edge_rows=min(128, side))


def backward_blocking_for(cache: Cache, dtype: str) -> Blocking:
    """Micro-tiles of the backward, whose two score-sized buffers fill a level-2 cache."""
    forward = blocking_for(cache, dtype)
    return Blocking(q_rows=forward.q_rows, k_rows=max(64, forward.k_rows // 2), edge_rows=forward.edge_rows)


class NumpyBackend:
    """Runs Compute ops on NumPy arrays: `attend` and `attend_backward` with `threads` Python threads (BLAS itself runs one).

    `blocking` and `backward_blocking` override the micro-tile sizes that are otherwise chosen from the level-2 cache.
    """

    name = "numpy"

    def __init__(
        self,
        *,
        threads: int = 1,
        blocking: Blocking | None = None,
        backward_blocking: Blocking | None = None,
        cache: Cache | None = None,
    ) -> None:
        if threads < 1:
            raise ArrayError(f"threads is {threads}; it must be 1 or more")
        self.threads = threads
        self.cache = cache or detect_cache()
        self._blocking = blocking
        self._backward_blocking = backward_blocking
        self._scratch: dict[tuple[str, int, int], numpy_attend.Scratch] = {}
        self._backward_scratch: dict[tuple[str, int, int, int], numpy_backward.Scratch] = {}
        self._half: dict[str, Array] = {}

    def another(self) -> NumpyBackend:
        """One like it, with scratch of its own."""
        cut = {"blocking": self._blocking, "backward_blocking": self._backward_blocking}
        return NumpyBackend(threads=self.threads, cache=self.cache, **cut)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch held now, over all threads."""
        forward = (getattr(one, name) for one in self._scratch.values() for name in one.__dataclass_fields__)
        backward = (getattr(one, name) for one in self._backward_scratch.values() for name in one.__dataclass_fields__)
        return sum(array.nbytes for array in (*forward, *backward, *self._half.values()))

    def blocking(self, dtype: str) -> Blocking:
        """The lowering used for tiles computed in `dtype` (that of the partials)."""
        return self._blocking or blocking_for(self.cache, dtype)

    def backward_blocking(self, dtype: str) -> Blocking:
        """The lowering of the backward for tiles computed in `dtype` (that of the sums)."""
        return self._backward_blocking or backward_blocking_for(self.cache, dtype)

    def state(self) -> dict[str, Any]:
        """Nothing that this process could read changes from run to run."""
        return {}

    def view(self, name: str, value: object) -> Array:
        """An argument as a NumPy array that shares its memory. Raises ArrayError."""
        return host_view(name, value)

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: object = None) -> Array:
        """An array for the caller to keep."""
        return np.empty(shape, dtype)

    def put(self, array: Array) -> Array:
        """The array: it lies where kernels take it."""
        return array

    def get(self, array: Array) -> Array:
        """The array."""
        return array

    def footprint(self, schedule: Schedule, rank: int) -> Footprint:
        """What a rank holds while it runs the schedule, by the memory model."""
        dtype = accumulator(schedule.workload.dtype)
        forward, backward = self.blocking(dtype), self.backward_blocking(dtype)
        return weigh(schedule, rank, blocking=forward, backward_blocking=backward, threads=self.threads)

    def empty(self, nbytes: int) -> Array:
        """Host memory, as a flat uint8 array, whose every page has been touched: the first run does not pay for it."""
        made = np.empty(nbytes, np.uint8)
        made.fill(0)
        return made

    def objection(self, name: str, array: Array) -> None:
        """Every array can leave: one that is not dense as a copy."""

    def dense(self, array: Array) -> Array:
        """The array, or a dense copy of it."""
        return np.ascontiguousarray(array)

    def copy(self, array: Array, stream: object = None) -> Array:
        """A copy of an array of the run."""
        return array.copy()

    def begin(self, stream: object) -> None:
        """Kernels run at once: there is nothing to come after. Raises ArrayError for a stream."""
        if stream is not None:
            raise ArrayError(f"stream is {stream!r}; backend 'numpy' has none: leave it out")

    def end(self, stream: object) -> None:
        """Every kernel has run."""

    def gate(self, post: Send | Recv) -> None:
        """Every kernel has run."""

    def compute(self, op: Compute, fetch: Fetch, *, scale: float, poll: Poll) -> None:
        """Run one Compute op on the arrays that `fetch` returns for its regions; calls `poll` between micro-tiles."""
        with np.errstate(all="ignore"), one_blas_thread():
            if op.kernel == "attend":
                self._attend(op, fetch, scale, poll)
            elif op.kernel == "attend_backward":
                self._attend_backward(op, fetch, scale, poll)
            else:
                PASSES[op.kernel](op, fetch, poll)

    def _attend(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        q, k, v = (fetch(region) for region in op.reads[:3])
        state = tuple(fetch(region) for region in op.writes)
        kvs: Prepared = {}
        norms: numpy_bounds.Norms = {}
        for tile in op.tiles:
            kernel = AttendTile(tile, self.blocking(op.writes[0].dtype), q, state, scale, edges_of(tile), norms)
            scratch = [self._scratch_of(kernel, thread) for thread in range(self.threads)]
            share(self._items(kernel, k, v, kvs), scratch, kernel, poll)

    def _items(self, kernel: AttendTile, k: Array, v: Array, prepared: Prepared) -> Iterator[numpy_attend.Item]:
        """Work items, key/value head by head so that its conversion is made once."""
        tile = kernel.tile
        group = kernel.q.shape[2] // k.shape[2]
        blocks = _pieces(kernel.blocking, tile, kernel.edges)
        kv_heads = tile.heads[0] // group, -(-tile.heads[1] // group)
        for batch in range(*tile.batch):
            norms = [kernel.query_norms(batch, begin, end) for begin, end, _ in blocks]
            for kv_head, kv in enumerate(self._kvs(kernel, k[batch], v[batch], (batch, *kv_heads), prepared), kv_heads[0]):
                for head in range(max(tile.heads[0], kv_head * group), min(tile.heads[1], (kv_head + 1) * group)):
                    for block_norms, (begin, end, pieces) in zip(norms, blocks, strict=True):
                        yield numpy_attend.Item(batch, head, kv, begin, end, pieces, block_norms[head - tile.heads[0]])

    def _kvs(self, kernel: AttendTile, k: Array, v: Array, where: tuple[int, int, int], prepared: Prepared) -> Iterable[Head]:
        """Prepared heads of one sequence of k and v; where they are views other tiles of the op may share them."""
        span, dtype, key = kernel.tile.k, kernel.state[0].dtype, (*where, kernel.tile.k.row, kernel.tile.k.count)
        part = slice(span.row, span.row + span.count), slice(*where[1:])
        if k.dtype != dtype:
            return self.prepare_heads(k[part], v[part], dtype)
        if key not in prepared:
            prepared[key] = tuple(self.prepare_heads(k[part], v[part], dtype))
        return prepared[key]

    def prepare_heads(self, keys: Array, values: Array, dtype: np.dtype[Any]) -> Iterator[Head]:
        """What is done once for keys and values (rows, heads, width): convert to `dtype`, find the norms that bounds rest on."""
        if keys.dtype == dtype:
            norms, squares = largest_norms(keys), value_squares(values)
            for head, (norm, square) in enumerate(zip(norms, squares, strict=True)):
                yield Head(keys[:, head], values[:, head], norm, square)
            return
        for head in range(keys.shape[1]):
            wide, wide_values = self._widen("k", keys[:, head], dtype), self._widen("v", values[:, head], dtype)
            yield Head(wide, wide_values, *largest_norms(wide[:, None]), *value_squares(wide_values[:, None]))

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

    def _scratch_of(self, kernel: AttendTile, index: int) -> numpy_attend.Scratch:
        dtype, width = kernel.state[0].dtype, max(kernel.q.shape[3], kernel.state[0].shape[3])
        key = (dtype.name, width, index)
        if key not in self._scratch:
            self._scratch[key] = numpy_attend.Scratch.make(kernel.blocking, width, dtype)
        return self._scratch[key]

    def _attend_backward(self, op: Compute, fetch: Fetch, scale: float, poll: Poll) -> None:
        operands = Operands(*(fetch(region) for region in op.reads[:6]))
        sums = tuple(fetch(region) for region in op.writes)
        for tile in op.tiles:
            blocking, edges = self.backward_blocking(op.writes[0].dtype), edges_of(tile)
            kernel = BackwardTile(tile, blocking, operands, sums, scale, edges, _pieces(blocking, tile, edges))
            scratch = [self._backward_scratch_of(kernel, thread) for thread in range(self.threads)]
            share(kernel.items(), scratch, kernel, poll)

    def _backward_scratch_of(self, kernel: BackwardTile, index: int) -> numpy_backward.Scratch:
        dtype, widths = kernel.sums[0].dtype, (kernel.operands.q.shape[3], kernel.operands.v.shape[3])
        key = (dtype.name, *widths, index)
        if key not in self._backward_scratch:
            self._backward_scratch[key] = numpy_backward.Scratch.make(kernel.blocking, widths, dtype)
        return self._backward_scratch[key]


def _pieces(blocking: Blocking, tile: Tile, edges: Edges | None) -> tuple[tuple[int, int, tuple[Piece, ...]], ...]:
    """The blocks of query rows [begin, end) of a tile with their micro-tiles."""
    return tuple((begin, end, pieces_of(blocking, edges, panels)) for begin, end, panels in blocking.blocks(tile))

"""The CuPy backend: one stream of kernels, tiles by fused kernels, and posts held until the device is done with their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.backends.cuda_order import Mark, Order
from ringsim.backends.cuda_pending import Partials
from ringsim.backends.cuda_state import Partial, State, StateKernels
from ringsim.backends.cuda_tiles import Backward, Band, Forward, Tiles, parts_of
from ringsim.dtypes import ITEMSIZE, numpy_dtype
from ringsim.errors import DeviceError
from ringsim.footprint import Footprint, weigh
from ringsim.partials import OWN_STATE, Piece, head_ranges, places_of
from ringsim.schedule import Schedule
from ringsim.schedule.ops import Compute, Recv, Region, Send
from ringsim.tile import Tile

Fetch = Callable[[Region], DeviceArray]
TRANSPOSED: Final = (1, 0, 2, 3)
KERNELS: Final = ("reset", "attend", "finish", "merge", "pack", "delta", "clear", "accumulate", "cast", "attend_backward")
"""What is launched: each has a method of its name."""


class CupyBackend:
    """Launches Compute ops on one stream of one device; `tiles` are the fused kernels to try, in this order.

    A tile's output is a partial that is folded into the state with others, in one pass and by float32 (float64) sums; so
    `reset` launches nothing, and `finish` folds in what is left. Launches wait for nothing; `gate` says what a post must wait
    for. All arrays lie in device memory. Raises DeviceError.
    """

    name = "cupy"

    def __init__(self, calls: Calls, tiles: Sequence[Tiles]) -> None:
        self.calls = calls
        self.tiles = tuple(tiles)
        self.stream: Stream = calls.stream()
        self._kernels = StateKernels(calls)
        self._partials = Partials(calls, self._kernels, self.stream)
        self._order = Order(calls, self.stream)
        self._able: dict[Any, list[tuple[Tiles, str | None]]] = {}
        self._launches = 0

    def another(self) -> CupyBackend:
        """One like it, on a stream and with scratch of its own; the fused kernels are the same."""
        return CupyBackend(self.calls, self.tiles)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held as scratch now: partial outputs, and what the fused kernels hold."""
        return self._partials.ledger.pool.nbytes + sum(one.nbytes for one in self.tiles)

    def state(self) -> dict[str, Any]:
        """What changes from run to run: the device's clocks, and what the fused kernels have planned."""
        found: dict[str, Any] = {"clocks": self.calls.clocks()}
        for fused in self.tiles:
            found |= fused.facts()
        return found

    def view(self, name: str, value: Any) -> DeviceArray:
        """An argument as an array of this device that shares its memory. Raises ArrayError where it lies elsewhere."""
        return self.calls.view(name, value)

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream = None) -> DeviceArray:
        """An array for the caller to keep, from the pool that his own arrays come from: he works on it on `stream`."""
        return self._pooled(shape, dtype, self.calls.caller(stream))

    def _pooled(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Stream) -> DeviceArray:
        return self.calls.pooled(math.prod(shape) * dtype.itemsize, stream).view(dtype).reshape(shape)

    def put(self, array: npt.NDArray[Any]) -> DeviceArray:
        """A host array's values in device memory; waits for the copy, which comes after what the caller's current stream has."""
        stream = self.calls.caller(None)
        made = self.calls.pooled(array.nbytes, stream)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.calls.copy(made, source, stream)
        self.calls.synchronize(self.calls.record(stream))
        return made.view(array.dtype).reshape(array.shape)

    def get(self, array: DeviceArray) -> npt.NDArray[Any]:
        """A device array's values in host memory, once the runs so far are done, and what the caller's current stream has."""
        self.calls.wait(self.stream, self.calls.record(self.calls.caller(None)))
        dense = array
        if not array.flags.c_contiguous:
            dense = self._pooled(array.shape, array.dtype, self.stream)
            self._kernels.copy(dense, array, self.stream)
        made = np.empty(array.nbytes, np.uint8)
        self.calls.copy(made, dense.reshape(-1).view(np.uint8), self.stream)
        self.calls.synchronize(self.calls.record(self.stream))
        values: npt.NDArray[Any] = made.view(array.dtype).reshape(array.shape)
        return values

    def footprint(self, schedule: Schedule, rank: int) -> Footprint:
        """What a rank holds while it runs the schedule, by the memory model: what tiles make is scratch."""
        work = schedule.workload
        widths, backward = (work.head_dim, work.v_head_dim), work.pass_ == "backward"
        able = [one for one in self.tiles if one.refuses(work.dtype, widths, None, backward=backward) is None]
        return weigh(schedule, rank, partial=(able or self.tiles)[0].partial(work.dtype))

    def empty(self, nbytes: int) -> DeviceArray:
        """Device memory, as a flat uint8 array."""
        return self.calls.empty(nbytes)

    def objection(self, name: str, array: DeviceArray) -> str | None:
        """Why an array cannot leave from where it lies: it is not dense, and a copy in device memory is the caller's to make."""
        if array.flags.c_contiguous:
            return None
        return (
            f"{name} leaves from where it lies and is not dense (shape {array.shape}, strides {array.strides} bytes): pass "
            f"cupy.ascontiguousarray({name}), or {name}.contiguous() of torch"
        )

    def dense(self, array: DeviceArray) -> DeviceArray:
        """The array as it is."""
        return array

    def copy(self, array: DeviceArray, stream: Stream = None) -> DeviceArray:
        """A copy of an array of the run, queued, for the caller to keep and use on `stream`."""
        made = self.new(array.shape, array.dtype, stream)
        self._kernels.copy(made, array, self.stream)
        return made

    def begin(self, stream: Stream) -> None:
        """Kernels of this run come after what `stream` (None: the caller's current one) has been given, and so do its posts."""
        self.calls.activate()
        self._partials.ledger.begin()
        self.calls.wait(self.stream, self.calls.record(self.calls.caller(stream)))
        self._order.begin()

    def end(self, stream: Stream) -> None:
        """What `stream` is given from now on comes after this run's kernels."""
        self.calls.wait(self.calls.caller(stream), self._order.event())

    def gate(self, post: Send | Recv) -> Mark | None:
        """What the device must have done before the post; what leaves is brought up to date first."""
        for pending in self._partials.ledger.interrupted((post.region,)):
            if isinstance(post, Send):
                first = self._order.event()
                self._partials.fold(pending)
                self._order.mark(first, (), pending.places, idle=False)
        return self._order.gate(post)

    def compute(self, op: Compute, fetch: Fetch, *, scale: float, poll: Callable[[], None]) -> Mark:
        """Launch one op."""
        first, self._launches = self._order.event(), 0
        own, writes = places_of(op) if op.kernel in OWN_STATE else None, op.writes
        for pending in self._partials.ledger.interrupted((*op.reads, *writes), own):
            self._partials.fold(pending)
            writes += pending.places
            self._launches += 1
        run: Callable[[Compute, Fetch, float], None] = getattr(self, f"_{op.kernel if op.kernel in KERNELS else 'unknown'}")
        run(op, fetch, scale)
        mark = self._order.mark(first, op.reads, writes, idle=not self._launches)
        poll()
        return mark

    def _unknown(self, op: Compute, fetch: Fetch, scale: float) -> None:
        raise DeviceError(f"backend 'cupy' has no kernel {op.kernel!r} (op {op.id})")

    def _reset(self, op: Compute, fetch: Fetch, scale: float) -> None:
        places = places_of(op)
        state = State(*(fetch(place) for place in places))
        self._partials.ledger.reset(places, state)

    def _attend(self, op: Compute, fetch: Fetch, scale: float) -> None:
        q, k, v = (fetch(region) for region in op.reads[:3])
        places = places_of(op)
        pending = self._partials.ledger.of(places, State(*(fetch(place) for place in places)))
        for tile, part in parts_of(op.tiles):
            for heads, kv_heads in head_ranges(tile, q.shape[2] // k.shape[2]):
                mine = _rows(q, tile, part.q_rows, heads)
                keys, values = (_rows(one, tile, part.k_rows, kv_heads) for one in (k, v))
                fused = self._fused((mine, keys, values), part.band)
                shape = (*mine.shape[:3], v.shape[3])
                out, lse = self._partials.room(pending, shape, fused.partial(q.dtype.name))
                fused.attend(Forward(mine, keys, values, out, lse), part.band, scale, self.stream)
                pending.partials.append(Partial(tile.batch, heads, part.q_rows, out, lse))
                self._launches += 1

    def _finish(self, op: Compute, fetch: Fetch, scale: float) -> None:
        places = places_of(op)
        pending = self._partials.ledger.of(places, State(*(fetch(place) for place in places)))
        self._partials.finish(pending, fetch(op.writes[0]), fetch(op.writes[1]))
        self._launches += 1

    def _merge(self, op: Compute, fetch: Fetch, scale: float) -> None:
        arrays = [fetch(region) for region in op.reads]
        self._kernels.merge(State(*arrays[:3]), State(*arrays[3:]), self.stream)
        self._launches += 1

    def _pack(self, op: Compute, fetch: Fetch, scale: float) -> None:
        for source, target in zip(op.reads, op.writes, strict=True):
            self._kernels.copy(fetch(target), fetch(source), self.stream)
            self._launches += 1

    def _delta(self, op: Compute, fetch: Fetch, scale: float) -> None:
        out, dout = (fetch(region) for region in op.reads)
        self._kernels.delta(out, dout, fetch(op.writes[0]), self.stream)
        self._launches += 1

    def _clear(self, op: Compute, fetch: Fetch, scale: float) -> None:
        for region in op.writes:
            self._kernels.clear(fetch(region), self.stream)
            self._launches += 1

    def _accumulate(self, op: Compute, fetch: Fetch, scale: float) -> None:
        count = len(op.writes)
        for mine, other in zip(op.reads[:count], op.reads[count:], strict=True):
            total, addend = fetch(mine), fetch(other)
            if other.box is not None and mine.box is None:
                total = total[tuple(slice(begin, end) for begin, end in other.box)]
            self._kernels.accumulate(total, addend, self.stream)
            self._launches += 1

    def _cast(self, op: Compute, fetch: Fetch, scale: float) -> None:
        for source, target in zip(op.reads, op.writes, strict=True):
            self._kernels.cast(fetch(target), fetch(source).transpose(TRANSPOSED), self.stream)
            self._launches += 1

    def _attend_backward(self, op: Compute, fetch: Fetch, scale: float) -> None:
        q, k, v, dout, lse, delta = (fetch(region) for region in op.reads[:6])
        sums = [fetch(region).transpose(TRANSPOSED) for region in op.writes]
        for tile, part in parts_of(op.tiles):
            for heads, kv_heads in head_ranges(tile, q.shape[2] // k.shape[2]):
                of = (part.q_rows, heads), (part.k_rows, kv_heads), (part.k_rows, kv_heads)
                mine, keys, values = (_rows(one, tile, *where) for one, where in zip((q, k, v), of, strict=True))
                per_query = _rows(dout, tile, part.q_rows, heads)
                per_row = [one[slice(*tile.batch), slice(*heads), slice(*part.q_rows)] for one in (lse, delta)]
                fused = self._fused((mine, keys, values, per_query), part.band)
                made, pieces = self._gradients((mine, keys, values), fused.partial(q.dtype.name))
                operands = Backward(mine, keys, values, per_query, *per_row, *made)
                fused.attend_backward(operands, part.band, scale, self.stream)
                for total, where, added in zip(sums, of, made, strict=True):
                    self._kernels.accumulate(_rows(total, tile, *where), added, self.stream)
                self._launches += 1
                self._partials.ledger.pool.give_back(pieces)

    def _gradients(self, shaped_as: Sequence[DeviceArray], dtype: str) -> tuple[list[DeviceArray], list[Piece[DeviceArray]]]:
        """Scratch for dq, dk and dv of a tile, and its pieces."""
        sizes = [int(one.size) * ITEMSIZE[dtype] for one in shaped_as]
        pieces = [self._partials.ledger.pool.take(size) for size in sizes]
        made = [
            piece.memory[:size].view(numpy_dtype(dtype)).reshape(one.shape)
            for piece, size, one in zip(pieces, sizes, shaped_as, strict=True)
        ]
        return made, pieces

    def _fused(self, arrays: Sequence[DeviceArray], band: Band | None) -> Tiles:
        """The first of the fused kernels that computes such a tile; `arrays`: q, k, v and, backward, dout. Raises DeviceError."""
        q, _, v = arrays[:3]
        dtype, widths, backward = q.dtype.name, (q.shape[3], v.shape[3]), len(arrays) > 3
        key = (dtype, widths, band, backward)
        if key not in self._able:
            self._able[key] = [(one, one.refuses(dtype, widths, band, backward=backward)) for one in self.tiles]
        refused = []
        for fused, refusal in self._able[key]:
            reason = refusal or fused.unfit(arrays, band)
            if reason is None:
                return fused
            refused.append(f"{fused.name}: {reason}")
        raise DeviceError(f"no fused kernel for {dtype} head_dim {widths[0]}, v_head_dim {widths[1]}: {'; '.join(refused)}")


def _rows(array: DeviceArray, tile: Tile, rows: tuple[int, int], heads: tuple[int, int]) -> DeviceArray:
    """Some rows and heads of (batch, rows, heads, width) for the tile's sequences."""
    return array[slice(*tile.batch), slice(*rows), slice(*heads)]

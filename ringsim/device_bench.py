"""A GPU's op on arrays of its own, timed by events: what launches of it take back to back. Inputs are unit-normal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import ITEMSIZE, accumulator, numpy_dtype
from .errors import CalibrationError
from .kernel_times import Kernel
from .schedule import Compute, Region
from .tile import Span, Tile
from .workload import Workload

if TYPE_CHECKING:
    from ringsim.backends.cuda import DeviceArray
    from ringsim.backends.cupy import CupyBackend

SAMPLES: Final = 5
SAMPLE_S: Final = 2e-2
MOST_CALLS: Final = 100
WARMUP: Final = 4
AHEAD: Final = 1.5
"""Of what calls take, without a head start, by which the device begins after the host."""
FILLS: Final = 4
DELAY_NBYTES: Final = 2**28
TRIES: Final = 4
NOISY: Final = 0.2
"""The spread of all samples but the least and the most, as a part of their median, above which they are taken again."""
COLD_NBYTES: Final = 2**28
"""Operands take turns among copies that together outgrow a cache."""
MOST_TURNS: Final = 16
PATTERN_NBYTES: Final = 2**20
UNIT_NORMAL: Final = frozenset({"q", "k", "v", "dout", "lse", "delta", "a", "b", "added"})
"""Arrays that a kernel only reads; of the others the values are of no account."""


class Room(NamedTuple):
    """What a device has to calibrate with: units to fill, and bytes of memory that arrays may take."""

    units: int
    nbytes: int


class Form(NamedTuple):
    """A square tile of `rows` queries and keys for each of `batch` sequences and `heads` heads; causal if masked."""

    rows: int
    batch: int
    heads: int
    masked: bool = False

    @property
    def copies(self) -> int:
        """Sequences and heads."""
        return self.batch * self.heads

    @property
    def pairs(self) -> int:
        """Visible pairs of a head."""
        return self.rows * (self.rows + 1) // 2 if self.masked else self.rows**2

    def tile(self) -> Tile:
        """The tile."""
        span = Span(row=0, count=self.rows, start=0)
        return Tile(batch=(0, self.batch), heads=(0, self.heads), q=span, k=span, lo=0 if self.masked else None)

    def work(self, kernel: Kernel) -> Workload:
        """A workload of one such tile."""
        return Workload(batch=self.batch, q_len=self.rows, heads=self.heads, head_dim=kernel.head_dim, dtype=kernel.dtype)


@dataclass(frozen=True, slots=True)
class Watch:
    """Times what is launched on a backend's stream, by events. `delay` is memory whose filling takes a device `fill_s`."""

    backend: CupyBackend
    delay: DeviceArray
    fill_s: float

    @classmethod
    def of(cls, backend: CupyBackend, room: Room) -> Watch:
        """A watch on a stream. Raises CalibrationError where the device's clock does not go on."""
        delay = backend.empty(max(1, min(DELAY_NBYTES, room.nbytes // 8)))
        watch = cls(backend, delay, 0.0)
        fill_s = median(watch.stretch_s(lambda _: watch.fill(), FILLS, 0.0) / FILLS for _ in range(SAMPLES))
        if fill_s <= 0:
            raise CalibrationError(
                f"filling {delay.nbytes} B {FILLS} times takes {fill_s:g} s by the device's events: do they work?"
            )
        return cls(backend, delay, fill_s)

    def fill(self) -> None:
        """Give the device something to do that takes the host no time."""
        self.backend.calls.fill(self.delay, 0, self.backend.stream)

    def stretch_s(self, run: Callable[[int], None], count: int, delay_s: float) -> float:
        """Seconds of the device from before the first to after the last of `count` calls, which `run` is given the number of.

        The device begins so much later than the host.
        """
        calls, stream = self.backend.calls, self.backend.stream
        self.backend.begin(None)
        for _ in range(ceil(delay_s / self.fill_s) if delay_s else 0):
            self.fill()
        run(0)
        first = calls.record(stream)
        for turn in range(count):
            run(turn + 1)
        last = calls.record(stream)
        calls.synchronize(last)
        return calls.elapsed_s(first, last)

    def launched_s(self, run: Callable[[int], None], what: str) -> float:
        """Seconds from one call of `run` to the next, as they come: the host's to launch it, if the device has less to do."""
        return self._median(run, what, ahead=0.0)

    def device_s(self, run: Callable[[int], None], what: str) -> float:
        """Seconds of the device for one call of `run`, back to back with others, for which it never waits for the host."""
        return self._median(run, what, ahead=AHEAD)

    def _median(self, run: Callable[[int], None], what: str, *, ahead: float) -> float:
        """The median of samples, after calls to warm up. Raises CalibrationError for times that differ too much."""
        self.stretch_s(run, 1, 0.0)
        once_s = self.stretch_s(run, WARMUP, 0.0) / WARMUP
        count = max(1, min(MOST_CALLS, int(SAMPLE_S / once_s))) if once_s > 0 else MOST_CALLS
        samples: list[float] = []
        for _ in range(TRIES):
            samples = sorted(self.stretch_s(run, count, ahead * count * once_s) / count for _ in range(SAMPLES))
            middle = median(samples)
            if middle > 0 and samples[-2] - samples[1] <= NOISY * middle:
                return middle
        raise CalibrationError(
            f"{what}: times from {samples[0] * 1e6:.3g} to {samples[-1] * 1e6:.3g} us in {TRIES} tries: is another program on "
            "the device (nvidia-smi lists them), or its clock not settled? Calibrate again on a quieter one"
        )


@dataclass(slots=True)
class Bench:
    """Synthetic ops over arrays of their own: as many sets of them, in turn, as outgrow the cache."""

    watch: Watch
    ops: dict[str, Compute]
    sets: list[dict[str, DeviceArray]]

    @classmethod
    def of(cls, watch: Watch, ops: dict[str, Compute], room: Room, *, cold: bool = True) -> Bench:
        """Arrays for the regions of `ops`, by the names of their buffers; one set of them unless they are to be cold."""
        regions = {region.buffer: region for op in ops.values() for region in (*op.reads, *op.writes)}
        nbytes = sum(region.nbytes for region in regions.values())
        turns = max(1, min(ceil(COLD_NBYTES / nbytes), MOST_TURNS, room.nbytes // nbytes)) if cold else 1
        return cls(watch, ops, [{name: _array(watch.backend, one, name) for name, one in regions.items()} for _ in range(turns)])

    def run(self, turn: int, *names: str) -> None:
        """Launch ops, in this order, on the arrays whose turn it is."""
        arrays = self.sets[turn % len(self.sets)]
        scale = arrays["q"].shape[3] ** -0.5 if "q" in arrays else 1.0
        for name in names:
            self.watch.backend.compute(self.ops[name], lambda one: arrays[one.buffer], scale=scale, poll=_nothing)

    def device_s(self, what: str, *names: str) -> float:
        """Seconds of the device for these ops, back to back with others like them. Raises CalibrationError."""
        return self.watch.device_s(lambda turn: self.run(turn, *names), what)

    def launched_s(self, what: str, *names: str) -> float:
        """Seconds from one such sequence of ops to the next, as the host launches them. Raises CalibrationError."""
        return self.watch.launched_s(lambda turn: self.run(turn, *names), what)


def _nothing() -> None:
    """No transfers while kernels are timed."""


@lru_cache(maxsize=32)
def _pattern(dtype: str, name: str) -> npt.NDArray[np.uint8]:
    normals = np.random.default_rng(list(name.encode())).standard_normal(PATTERN_NBYTES // ITEMSIZE[dtype])
    return normals.astype(numpy_dtype(dtype)).view(np.uint8)


def _array(backend: CupyBackend, region: Region, name: str) -> DeviceArray:
    array = backend.empty(region.nbytes)
    if name in UNIT_NORMAL:
        _fill(backend, array, _pattern(region.dtype, name))
    return array.view(numpy_dtype(region.dtype)).reshape(region.shape)


def _fill(backend: CupyBackend, array: DeviceArray, pattern: npt.NDArray[np.uint8]) -> None:
    """Repeat a pattern: for zeros a device draws less power, and its clock is higher."""
    calls, filled = backend.calls, min(array.nbytes, pattern.nbytes)
    source = calls.pinned(filled)
    source[...] = pattern[:filled]
    calls.copy(array[:filled], source, backend.stream)
    while filled < array.nbytes:
        part = min(filled, array.nbytes - filled)
        calls.copy(array[filled : filled + part], array[:part], backend.stream)
        filled += part
    calls.synchronize(calls.record(backend.stream))


def normals(backend: CupyBackend, shape: tuple[int, ...], dtype: str, name: str) -> DeviceArray:
    """An array of one of the UNIT_NORMAL names."""
    return _array(backend, region(name, shape, dtype), name)


def region(name: str, shape: tuple[int, ...], dtype: str) -> Region:
    """A whole buffer."""
    return Region(buffer=name, slot=0, shape=shape, dtype=dtype, value=name)


def op_of(kernel: str, reads: Mapping[str, Region], writes: Mapping[str, Region], tiles: tuple[Tile, ...] = ()) -> Compute:
    """An op of the kernel of this name."""
    both = tuple(reads.values()), tuple(writes.values())
    return Compute(id=0, step=0, phase=kernel, kernel=kernel, reads=both[0], writes=both[1], tiles=tiles)


def forward_ops(kernel: Kernel, form: Form) -> dict[str, Compute]:
    """reset, attend and finish of a tile."""
    rows, batch, heads, _ = form
    width, dtype, sums = kernel.head_dim, kernel.dtype, accumulator(kernel.dtype)
    given = {name: region(name, (batch, rows, heads, width), dtype) for name in "qkv"}
    state = {"acc": region("acc", (batch, heads, rows, width), sums)}
    state |= {name: region(name, (batch, heads, rows), sums) for name in ("max", "sum")}
    made = {"out": region("out", (batch, rows, heads, width), dtype), "made_lse": region("made_lse", (batch, heads, rows), sums)}
    return {
        "reset": op_of("reset", {}, state),
        "attend": op_of("attend", given | state, state, (form.tile(),)),
        "finish": op_of("finish", state, made),
    }


def backward_ops(kernel: Kernel, form: Form, partial: str) -> dict[str, Compute]:
    """attend_backward of a tile, and the accumulation alone of gradients that its kernel makes in dtype `partial`."""
    rows, batch, heads, _ = form
    width, sums = kernel.head_dim, accumulator(kernel.dtype)
    given = {name: region(name, (batch, rows, heads, width), kernel.dtype) for name in ("q", "k", "v", "dout")}
    given |= {name: region(name, (batch, heads, rows), sums) for name in ("lse", "delta")}
    total = {name: region(name, (rows, batch, heads, width), sums) for name in ("dq_sum", "dk_sum", "dv_sum")}
    added = {name: region(name, (rows, batch, heads, width), partial) for name in ("dq", "dk", "dv")}
    return {
        "attend_backward": op_of("attend_backward", given | total, total, (form.tile(),)),
        "accumulate": op_of("accumulate", total | added, total),
    }

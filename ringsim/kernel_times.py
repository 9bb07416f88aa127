"""Kernels timed on this rank's core: what a pair, a block, a launch and a pass over the operands take. Inputs are unit-normal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .costs import backward_pass_nbytes, pass_nbytes
from .dtypes import ITEMSIZE, accumulator, numpy_dtype
from .errors import CalibrationError
from .lowering import Blocking
from .schedule import Compute, Region
from .tile import Span, Tile
from .workload import Workload

Array = npt.NDArray[Any]
Sizes = dict[str, tuple[int, ...]]
MakeBackend = Callable[[Blocking | None], Any]
"""A backend, with a blocking of its own or with this one for both passes."""
SAMPLES = 5
SAMPLE_S = 4e-3
STRIP = 5
TRIES = 5
HEADS = 2
LAYOUT_HEADS = 8
COLD_ROWS, COLD_HEADS = 128, 64
PASSES: Final = ("attend", "attend_backward")
OF_THE_CALLER: Final = ("q", "k", "v", "dout")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What to calibrate: attention in `dtype` with `head_dim`."""

    dtype: str
    head_dim: int

    def flops_per_pair(self, name: str) -> int:
        """Of `attend`: scores and output. Of `attend_backward`: scores anew, dp, dv, dq and dk."""
        return (4 if name == "attend" else 10) * self.head_dim

    def blocking(self, name: str, backend: Any) -> Blocking:
        """How the backend cuts tiles of this kernel."""
        find = backend.blocking if name == "attend" else backend.backward_blocking
        found: Blocking = find(accumulator(self.dtype))
        return found


class Times(NamedTuple):
    """What one of PASSES takes on this rank's core; `per_pair_s` by ("full" or "masked", pairs per micro-tile)."""

    overhead_s: float
    block_overhead_s: float
    pass_bytes_per_s: float
    per_pair_s: dict[tuple[str, int], float]


class _Shape(NamedTuple):
    """A tile of `q_rows` x `k_rows` for each of `heads` heads, in arrays with the row stride of `layout_heads`."""

    q_rows: int
    k_rows: int
    heads: int
    layout_heads: int = LAYOUT_HEADS
    masked: bool = False

    def tile(self) -> Tile:
        """The tile. In a masked one each query sees one key more; of a single key all but the last see none."""
        # steps that differ: an even staircase would begin with the first row that sees a key
        start, step = (0, 1) if self.k_rows > 1 else (2 - 2 * self.q_rows, 2)
        q, k = Span(row=0, count=self.q_rows, start=start, step=step), Span(row=0, count=self.k_rows, start=0)
        return Tile(batch=(0, 1), heads=(0, self.heads), q=q, k=k, lo=0 if self.masked else None)

    def operands(self, name: str, width: int) -> tuple[Sizes, Sizes]:
        """Shapes of what the kernel only reads, and of what it reads and writes, in the order of its regions."""
        q_rows, k_rows, heads, layout_heads, _ = self
        q_like, k_like = (1, q_rows, layout_heads, width), (1, k_rows, layout_heads, width)
        if name == "attend":
            state: Sizes = {"acc": (1, heads, q_rows, width), "max": (1, heads, q_rows), "sum": (1, heads, q_rows)}
            return {"q": q_like, "k": k_like, "v": k_like}, state
        rows = (1, layout_heads, q_rows)
        sums: Sizes = {"dq_sum": (q_rows, 1, layout_heads, width)}
        sums |= dict.fromkeys(("dk_sum", "dv_sum"), (k_rows, 1, layout_heads, width))
        return {"q": q_like, "k": k_like, "v": k_like, "dout": q_like, "lse": rows, "delta": rows}, sums


@dataclass(slots=True)
class _Bench:
    """One synthetic Compute op over arrays of its own."""

    backend: Any
    op: Compute
    arrays: dict[str, Array]

    @classmethod
    def of(cls, name: str, kernel: Kernel, backend: Any, shape: _Shape) -> _Bench:
        """The kernel on one tile."""
        inputs, state = shape.operands(name, kernel.head_dim)
        rng = np.random.default_rng(0)
        arrays = {}
        for of, sizes in (inputs | state).items():
            dtype = kernel.dtype if of in OF_THE_CALLER else accumulator(kernel.dtype)
            arrays[of] = rng.standard_normal(sizes).astype(numpy_dtype(dtype))
        if name == "attend":
            arrays["max"].fill(-np.inf)
        regions = {of: Region(buffer=of, slot=0, shape=a.shape, dtype=a.dtype.name, value=of) for of, a in arrays.items()}
        writes = tuple(regions[of] for of in state)
        reads = tuple(regions[of] for of in inputs) + writes
        op = Compute(id=0, step=0, phase=name, kernel=name, reads=reads, writes=writes, tiles=(shape.tile(),))
        return cls(backend, op, arrays)

    def run(self) -> None:
        """Run the op once."""
        scale = self.arrays["q"].shape[3] ** -0.5
        self.backend.compute(self.op, lambda region: self.arrays[region.buffer], scale=scale, poll=_nothing)


def _nothing() -> None:
    """No transfers while kernels are timed."""


def cpu_time_s(function: Callable[[], None]) -> float:
    """CPU seconds of one call: the median of samples of at least a few milliseconds, after one to warm up."""
    function()
    begin = time.thread_time()
    function()
    calls = max(1, int(SAMPLE_S / max(time.thread_time() - begin, 1e-7)))
    samples = []
    for _ in range(SAMPLES):
        begin = time.thread_time()
        for _ in range(calls):
            function()
        samples.append((time.thread_time() - begin) / calls)
    return median(samples)


def micro_shapes(blocking: Blocking) -> dict[str, list[tuple[int, int]]]:
    """The micro-tiles to time, from one pair to the largest that the lowering makes: (query rows, key rows)."""
    most, edge = blocking.q_rows * blocking.k_rows, blocking.edge_rows
    squares = [(s, s) for s in (4, 16, 32, 64, 128, 256) if s < blocking.q_rows and s * s < most]
    full = [(1, 1), *squares, (blocking.q_rows, blocking.k_rows)]
    narrow, tall = sorted((edge, blocking.k_rows))
    masked = [(2, 1), *((s, s) for s in (4, 16, 32, 64) if s < narrow), (narrow, narrow), (tall, narrow)]
    return {"full": full, "masked": sorted(set(masked))}


def measure_kernel(kernel: Kernel, make_backend: MakeBackend) -> dict[str, Times]:
    """Each of PASSES on this rank's core. Raises CalibrationError where noise is larger than what is measured."""
    backend = make_backend(None)
    pass_rate = _pass_rate(kernel, backend)
    return {name: _times(name, kernel, backend, make_backend, pass_rate) for name in PASSES}


def _times(name: str, kernel: Kernel, backend: Any, make_backend: MakeBackend, pass_rate: float) -> Times:
    blocking = kernel.blocking(name, backend)
    per_pair_s = {}
    for kind, shapes in micro_shapes(blocking).items():
        timed = _masked if kind == "masked" else _full
        for rows, columns in shapes:
            time_pair = partial(timed, name, kernel, make_backend, pass_rate, _Shape(rows, columns, HEADS))
            what = f"{name}, {kernel.dtype} head_dim {kernel.head_dim}, {kind} micro-tile {rows} x {columns}"
            per_pair_s[kind, rows * columns] = _steady(time_pair, what)
    one, eight = (cpu_time_s(_Bench.of(name, kernel, backend, _Shape(1, 1, heads)).run) for heads in (1, LAYOUT_HEADS))
    each = (eight - one) / (LAYOUT_HEADS - 1)
    overhead_s, block_overhead_s = max(one - each, 0.0), max(each - per_pair_s["full", 1], 0.0)
    cold = _Shape(COLD_ROWS, COLD_ROWS, COLD_HEADS, COLD_HEADS)
    cold_s = cpu_time_s(_Bench.of(name, kernel, backend, cold).run)
    rows, columns = min(COLD_ROWS, blocking.q_rows), min(COLD_ROWS, blocking.k_rows)
    computed_s = COLD_ROWS**2 * per_pair_s["full", rows * columns] + -(-COLD_ROWS // rows) * block_overhead_s
    work = Workload(q_len=COLD_ROWS, heads=COLD_HEADS, head_dim=kernel.head_dim, dtype=kernel.dtype)
    nbytes = (pass_nbytes if name == "attend" else backward_pass_nbytes)(work, cold.tile())
    passed_s = max(cold_s - overhead_s - COLD_HEADS * computed_s, 0.05 * cold_s)
    return Times(overhead_s, block_overhead_s, nbytes / passed_s, per_pair_s)


class _Noise(Exception):
    """A longer row took no longer than a short one."""


def _steady(measure: Callable[[], float], what: str) -> float:
    """A measurement that noise may spoil, tried a few times. Raises CalibrationError."""
    for _ in range(TRIES):
        try:
            return measure()
        except _Noise:
            continue
    raise CalibrationError(f"{what}: no time that grows with the work in {TRIES} tries; calibrate again on a quieter machine")


def _full(name: str, kernel: Kernel, make_backend: MakeBackend, pass_rate: float, micro: _Shape) -> float:
    """Seconds per pair of a micro-tile: what a longer row of them takes more than a short one, less the pass over its keys."""
    backend = make_backend(Blocking(q_rows=micro.q_rows, k_rows=micro.k_rows, edge_rows=micro.q_rows))
    short, long = (
        cpu_time_s(_Bench.of(name, kernel, backend, micro._replace(k_rows=strip * micro.k_rows)).run) for strip in (1, STRIP)
    )
    added_keys = HEADS * (STRIP - 1) * micro.k_rows
    passed_s = added_keys * 2 * kernel.head_dim * ITEMSIZE[accumulator(kernel.dtype)] / pass_rate
    if long - short <= passed_s:
        raise _Noise
    return (long - short - passed_s) / (added_keys * micro.q_rows)


def _masked(name: str, kernel: Kernel, make_backend: MakeBackend, pass_rate: float, micro: _Shape) -> float:
    """The same with a staircase of hidden pairs: as without, and what each head of a tile of one micro-tile takes more for it."""
    longest = max(micro.q_rows, micro.k_rows)
    backend = make_backend(Blocking(q_rows=longest, k_rows=longest, edge_rows=longest))
    each = []
    for masked in (False, True):
        few, many = (
            cpu_time_s(_Bench.of(name, kernel, backend, micro._replace(heads=heads, masked=masked)).run)
            for heads in (1, LAYOUT_HEADS)
        )
        each.append((many - few) / (LAYOUT_HEADS - 1))
    seconds = _full(name, kernel, make_backend, pass_rate, micro) + (each[1] - each[0]) / (micro.q_rows * micro.k_rows)
    if seconds <= 0:
        raise _Noise
    return seconds


def _pass_rate(kernel: Kernel, backend: Any) -> float:
    """Bytes per second, in the dtype of computation, of preparing keys and values once per block."""
    rows, dtype = 1024, numpy_dtype(accumulator(kernel.dtype))
    shape = (rows, LAYOUT_HEADS, kernel.head_dim)
    keys, values = (np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(kernel.dtype)) for _ in "kv")

    def every_head() -> None:
        for _ in backend.prepare_heads(keys, values, dtype):
            pass

    return float(2 * rows * LAYOUT_HEADS * kernel.head_dim * dtype.itemsize) / cpu_time_s(every_head)


def measure_memory(kernel: Kernel, backend: Any, rows: int = 1024) -> float:
    """Bytes per second, read and written, of the `finish` kernel into a fresh output."""
    dtype, shape = accumulator(kernel.dtype), (1, LAYOUT_HEADS, rows)
    arrays = {"acc": np.ones((*shape, kernel.head_dim), dtype), "max": np.ones(shape, dtype), "sum": np.ones(shape, dtype)}
    arrays["lse"] = np.empty(shape, dtype)
    outputs = {"out": np.empty((1, rows, LAYOUT_HEADS, kernel.head_dim), numpy_dtype(kernel.dtype))}
    regions = {n: Region(buffer=n, slot=0, shape=a.shape, dtype=a.dtype.name, value=n) for n, a in (arrays | outputs).items()}
    reads, writes = tuple(regions[n] for n in ("acc", "max", "sum")), tuple(regions[n] for n in ("out", "lse"))
    op = Compute(id=0, step=0, phase="finish", kernel="finish", reads=reads, writes=writes)

    def finish() -> None:
        arrays["out"] = np.empty_like(outputs["out"])
        backend.compute(op, lambda region: arrays[region.buffer], scale=1.0, poll=_nothing)

    return float(op.nbytes) / cpu_time_s(finish)

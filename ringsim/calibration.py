"""Calibration: measure this machine's kernels and hops, and write them down as a topology.

Kernels are timed by CPU time while every rank of the host computes, so that what they take from each other (cache, memory,
clock) is in the figures; sharing of cores is left to the simulator. Inputs are unit-normal.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import ITEMSIZE, accumulator, numpy_dtype
from .errors import CalibrationError
from .lowering import Blocking
from .schedule import Compute, Region
from .tile import Span, Tile
from .topology import FORMAT
from .transport import Handle, Transport

Array = npt.NDArray[Any]
SAMPLES = 5
SAMPLE_S = 4e-3
HOP_NBYTES = (2**12, 2**15, 2**17, 2**18, 2**19, 2**20, 2**21, 2**22, 2**23, 2**24)
HOP_SAMPLES = 12
COLD_NBYTES = 2**26
STRIP = 5
TRIES = 5
HEADS = 2
LAYOUT_HEADS = 8
COLD_ROWS, COLD_HEADS = 128, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What to calibrate: attention in `dtype` with `head_dim`."""

    dtype: str
    head_dim: int


@dataclass(slots=True)
class _Bench:
    """One synthetic Compute op over arrays of its own."""

    backend: Any
    op: Compute
    arrays: dict[str, Array]

    @classmethod
    def attend(
        cls,
        kernel: Kernel,
        backend: Any,
        q_rows: int,
        k_rows: int,
        *,
        heads: int,
        layout_heads: int = LAYOUT_HEADS,
        masked: bool = False,
    ) -> _Bench:
        """A tile of `q_rows` x `k_rows` for each of `heads` heads, in arrays with the row stride of many heads.

        In a masked one the band crosses every piece: the first query sees no key and the last sees all.
        """
        apart = -(-k_rows // max(q_rows - 1, 1))
        tile = Tile(
            batch=(0, 1),
            heads=(0, heads),
            q=Span(row=0, count=q_rows, start=-1, step=apart) if masked else Span(row=0, count=q_rows, start=0),
            k=Span(row=0, count=k_rows, start=0),
            lo=0 if masked else None,
        )
        rng = np.random.default_rng(0)
        shapes = {
            "q": (1, q_rows, layout_heads, kernel.head_dim),
            "k": (1, k_rows, layout_heads, kernel.head_dim),
            "v": (1, k_rows, layout_heads, kernel.head_dim),
            "acc": (1, heads, q_rows, kernel.head_dim),
            "max": (1, heads, q_rows),
            "sum": (1, heads, q_rows),
        }
        dtype = accumulator(kernel.dtype)
        arrays = {
            name: rng.standard_normal(shape).astype(numpy_dtype(kernel.dtype if name in "qkv" else dtype))
            for name, shape in shapes.items()
        }
        arrays["max"].fill(-np.inf)
        regions = {name: Region(buffer=name, slot=0, shape=a.shape, dtype=a.dtype.name, value=name) for name, a in arrays.items()}
        state = tuple(regions[name] for name in ("acc", "max", "sum"))
        reads = tuple(regions[name] for name in ("q", "k", "v")) + state
        op = Compute(id=0, step=0, phase="attend", kernel="attend", reads=reads, writes=state, tiles=(tile,))
        return cls(backend, op, arrays)

    def run(self) -> None:
        """Run the op once."""
        self.backend.compute(
            self.op, lambda region: self.arrays[region.buffer], scale=self.arrays["q"].shape[3] ** -0.5, poll=_nothing
        )


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
    """The micro-tiles to time, from one pair to the largest that the lowering makes."""
    full = [(1, 1), *((s, s) for s in (4, 16, 32, 64, 128, 256) if s < blocking.q_rows), (blocking.q_rows, blocking.k_rows)]
    edge = blocking.edge_rows
    masked = [(2, 1), *((s, s) for s in (4, 16, 32, 64) if s < edge), (edge, edge), (edge, blocking.k_rows)]
    return {"full": full, "masked": sorted(set(masked))}


def measure_kernel(kernel: Kernel, make_backend: Callable[[Blocking | None], Any]) -> dict[str, Any]:
    """Rate, overhead, pass bandwidth and efficiency points of one kernel on this rank's core."""
    backend = make_backend(None)
    blocking: Blocking = backend.blocking(accumulator(kernel.dtype))
    pass_rate = _pass_rate(kernel, backend)
    per_pair_s = {}
    for kind, shapes in micro_shapes(blocking).items():
        for rows, columns in shapes:
            per_pair_s[kind, rows * columns] = _steady(
                partial(_slope, kernel, make_backend, pass_rate, rows, columns, masked=kind == "masked"),
                f"{kernel.dtype} head_dim {kernel.head_dim}, {kind} micro-tile {rows} x {columns}",
            )
    one = cpu_time_s(_Bench.attend(kernel, backend, 1, 1, heads=1).run)
    eight = cpu_time_s(_Bench.attend(kernel, backend, 1, 1, heads=LAYOUT_HEADS).run)
    each = (eight - one) / (LAYOUT_HEADS - 1)
    overhead_s, block_overhead_s = max(one - each, 0.0), max(each - per_pair_s["full", 1], 0.0)
    cold_s = cpu_time_s(_Bench.attend(kernel, backend, COLD_ROWS, COLD_ROWS, heads=COLD_HEADS, layout_heads=COLD_HEADS).run)
    computed_s = COLD_HEADS * (block_overhead_s + COLD_ROWS**2 * per_pair_s["full", COLD_ROWS**2])
    bytes_passed = 5 * COLD_HEADS * COLD_ROWS * kernel.head_dim * ITEMSIZE[accumulator(kernel.dtype)]
    return {
        "overhead_s": overhead_s,
        "block_overhead_s": block_overhead_s,
        "pass_bytes_per_s": bytes_passed / max(cold_s - overhead_s - computed_s, 0.05 * cold_s),
        "per_pair_s": per_pair_s,
    }


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


def _slope(
    kernel: Kernel, make_backend: Callable[[Blocking | None], Any], pass_rate: float, rows: int, columns: int, *, masked: bool
) -> float:
    """Seconds per pair of a micro-tile: what a longer row of them takes more than a short one, less the pass over its keys."""
    cut = make_backend(Blocking(q_rows=rows, k_rows=columns, edge_rows=rows))
    short, long = (
        cpu_time_s(_Bench.attend(kernel, cut, rows, strip * columns, heads=HEADS, masked=masked).run) for strip in (1, STRIP)
    )
    added = HEADS * (STRIP - 1)
    itemsize = ITEMSIZE[accumulator(kernel.dtype)]
    passed_s = added * 2 * columns * kernel.head_dim * itemsize / pass_rate
    if long - short <= passed_s:
        raise _Noise
    return (long - short - passed_s) / (added * rows * columns)


def _pass_rate(kernel: Kernel, backend: Any) -> float:
    """Bytes per second, in the dtype of computation, of preparing keys and values once per block."""
    rows, dtype = 1024, numpy_dtype(accumulator(kernel.dtype))
    shape = (rows, LAYOUT_HEADS, kernel.head_dim)
    keys, values = (np.random.default_rng(0).standard_normal(shape).astype(numpy_dtype(kernel.dtype)) for _ in "kv")

    def every_head() -> None:
        for head in range(LAYOUT_HEADS):
            backend.prepare_head(keys[:, head], values[:, head], dtype)

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


def measure_hops(transport: Transport) -> list[tuple[int, float]]:
    """CPU seconds that a rank spends to take in one message of each size while all ranks do so round the ring."""
    world_size, rank = transport.world_size, transport.rank
    points = []
    for nbytes in HOP_NBYTES:
        # a block that comes round has left the cache: take turns among buffers that outgrow it
        turns = max(1, min(HOP_SAMPLES, COLD_NBYTES // nbytes))
        sources, targets = (np.ones((turns, nbytes), np.uint8) for _ in range(2))
        samples = []
        for turn in range(3 + HOP_SAMPLES):
            transport.barrier()
            recv = transport.irecv(targets[turn % turns], (rank - 1) % world_size, 0)
            send = transport.isend(sources[turn % turns], (rank + 1) % world_size, 0)
            samples.append(_drain(transport, (recv, send)))
        points.append((nbytes, median(samples[3:])))
    return points


def _drain(transport: Transport, handles: tuple[Handle, ...]) -> float:
    """CPU seconds spent in polls until all handles are done."""
    spent, attempt = 0.0, 0
    while True:
        begin = time.thread_time()
        transport.poll()
        spent += time.thread_time() - begin
        if all(handle.done for handle in handles):
            return spent
        transport.idle(attempt)
        attempt += 1


def measure_look(transport: Transport, delay_s: float = 3e-3) -> float:
    """Seconds from a small message's post to its arrival at a rank that has waited for it a while: median over ranks."""
    world_size, rank = transport.world_size, transport.rank
    source, target = np.ones(8, np.uint8), np.zeros(8, np.uint8)
    lags: list[float] = []
    for turn in range(2 * min(world_size, 8)):
        transport.barrier()
        sender = turn % world_size
        posted = done = 0.0
        if rank == sender:
            time.sleep(delay_s)
            handle = transport.isend(source, (rank + 1) % world_size, 1)
            posted = handle.posted_s
            _drain(transport, (handle,))
        elif rank == (sender + 1) % world_size:
            handle = transport.irecv(target, sender, 1)
            _drain(transport, (handle,))
            done = handle.done_s or 0.0
        said = transport.allgather((posted, done))
        lags.append(float(said[(sender + 1) % world_size][1] - said[sender][0]))
    return max(median(lags), 0.0)


def fit_line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Latency (s) and bandwidth (bytes/s) of least relative error. Raises CalibrationError for times that do not grow."""
    nbytes = np.array([point[0] for point in points], float)
    seconds = np.array([point[1] for point in points], float)
    design = np.stack([np.ones_like(nbytes), nbytes], axis=1) / seconds[:, None]
    (latency_s, per_byte_s), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    if latency_s < 0:
        latency_s = 0.0
        per_byte_s = float((nbytes / seconds).sum() / ((nbytes / seconds) ** 2).sum())
    if not per_byte_s > 0:
        raise CalibrationError(f"hop times do not grow with size: {points}; calibrate again on a quieter machine")
    return float(latency_s), 1.0 / float(per_byte_s)


def calibrate(
    transport: Transport,
    kernels: Sequence[Kernel],
    make_backend: Callable[[Blocking | None], Any],
    *,
    cores: int,
    memory_nbytes: int | None = None,
    facts: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure `kernels`, memory and hops with all ranks of one host at work; collective. Returns a topology's plain values.

    `cores` and memory are those that the ranks share; `facts` go into the notes. Raises CalibrationError on several hosts.
    """
    if transport.world_size == 1:
        raise CalibrationError("a hop needs two ranks: start with mpiexec -n P, P as in the runs to be predicted")
    hosts = transport.allgather(socket.gethostname())
    if len(set(hosts)) > 1:
        raise CalibrationError(
            f"a topology describes one node here, and the ranks run on {len(set(hosts))} hosts: calibrate on one"
        )
    progress("hops between the ranks")
    hops = _mean_points(transport.allgather(measure_hops(transport)))
    look_s = median(transport.allgather(measure_look(transport)))
    progress("memory")
    transport.barrier()
    memory = median(transport.allgather(measure_memory(kernels[0], make_backend(None))))
    tables = []
    for kernel in kernels:
        progress(f"attention, {kernel.dtype}, head_dim {kernel.head_dim}")
        transport.barrier()
        measured = transport.allgather(measure_kernel(kernel, make_backend))
        tables.append(_table(kernel, measured, make_backend(None).blocking(accumulator(kernel.dtype))))
    latency_s, bandwidth = fit_line(hops)
    moving = {"latency": f"{latency_s * 1e6:.3f} us", "bandwidth": _rate(bandwidth, "GB/s", 1e9)}
    host = {"kind": "cpu", "cores": cores, "ranks": transport.world_size, "inside": "memory"}
    if memory_nbytes is not None:
        host["memory"] = f"{memory_nbytes // 2**20} MiB"
    return {
        "ringsim": FORMAT,
        "name": f"{hosts[0]}-{transport.world_size}-ranks",
        "source": f"measured: ringsim calibrate on {hosts[0]}, {time.strftime('%Y-%m-%d')}, {transport.world_size} ranks",
        "devices": {"host": host | {"memory_bandwidth": _rate(memory, "GB/s", 1e9), "attention": tables}},
        "links": {"memory": moving},
        "transports": {"mpi": {"progress": "polling", "look": f"{look_s * 1e6:.3f} us"}},
        "machine": "host",
        "notes": facts | {"hops": [[nbytes, f"{seconds * 1e6:.2f} us"] for nbytes, seconds in hops]},
    }


def _mean_points(by_rank: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    return [(column[0][0], sum(point[1] for point in column) / len(column)) for column in zip(*by_rank, strict=True)]


def _rate(value: float, unit: str, scale: float) -> str:
    return f"{value / scale:.4g} {unit}"


def _point(rates: dict[tuple[str, int], float], best: float, kind: str, pairs: int) -> list[float]:
    return [pairs, float(f"{rates[kind, pairs] / best:.4g}")]


def _table(kernel: Kernel, measured: list[dict[str, Any]], blocking: Blocking) -> dict[str, Any]:
    """One kernel's figures, medians over ranks; the rate is that of the best micro-tile, so that efficiencies end at 1."""
    flops_per_pair = 4 * kernel.head_dim
    keys = list(measured[0]["per_pair_s"])
    rates = {key: flops_per_pair / median(one["per_pair_s"][key] for one in measured) for key in keys}
    best = max(rates.values())
    passes = [one["pass_bytes_per_s"] for one in measured]
    points = {
        kind: [[pairs, float(f"{rates[k, pairs] / best:.4g}")] for k, pairs in keys if k == kind] for kind in ("full", "masked")
    }
    return {
        "dtype": kernel.dtype,
        "head_dim": kernel.head_dim,
        "rate": _rate(best, "GFLOP/s", 1e9),
        "overhead": f"{median(one['overhead_s'] for one in measured) * 1e6:.3f} us",
        "block_overhead": f"{median(one['block_overhead_s'] for one in measured) * 1e6:.3f} us",
        "pass_bandwidth": _rate(median(passes), "GB/s", 1e9),
        "micro_tile": {"q_rows": blocking.q_rows, "k_rows": blocking.k_rows, "edge_rows": blocking.edge_rows},
        "full": sorted(points["full"]),
        "masked": sorted(points["masked"]),
    }


def to_yaml(values: dict[str, Any]) -> str:
    """A topology's plain values as YAML text that ringsim.topology reads."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)

"""Calibration: measure this machine's kernels and hops, and write them down as a topology.

Kernels are timed by CPU time while every rank of the host computes, so that what they take from each other (cache, memory,
clock) is in the figures; sharing of cores is left to the simulator.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

from .errors import CalibrationError
from .kernel_times import PASSES, Kernel, MakeBackend, Times, measure_kernel, measure_memory
from .topology import FORMAT
from .transport import Handle, Transport

__all__ = ["Kernel", "calibrate", "fit_line", "measure_hops", "measure_look", "to_yaml"]

HOP_NBYTES = (2**12, 2**15, 2**17, 2**18, 2**19, 2**20, 2**21, 2**22, 2**23, 2**24)
HOP_SAMPLES = 12
COLD_NBYTES = 2**26


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
    make_backend: MakeBackend,
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
        progress(f"attention and its gradients, {kernel.dtype}, head_dim {kernel.head_dim}")
        transport.barrier()
        measured = transport.allgather(measure_kernel(kernel, make_backend))
        tables.append(_table(kernel, measured, make_backend(None)))
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


def _figures(name: str, kernel: Kernel, times: Sequence[Times], backend: Any) -> dict[str, Any]:
    """One of PASSES, medians over ranks; the rate is that of the best micro-tile, so that efficiencies end at 1."""
    blocking = kernel.blocking(name, backend)
    rates = {key: kernel.flops_per_pair(name) / median(one.per_pair_s[key] for one in times) for key in times[0].per_pair_s}
    best = max(rates.values())
    points = {
        kind: sorted([pairs, float(f"{rate / best:.4g}")] for (k, pairs), rate in rates.items() if k == kind)
        for kind in ("full", "masked")
    }
    return {
        "rate": _rate(best, "GFLOP/s", 1e9),
        "overhead": f"{median(one.overhead_s for one in times) * 1e6:.3f} us",
        "block_overhead": f"{median(one.block_overhead_s for one in times) * 1e6:.3f} us",
        "pass_bandwidth": _rate(median(one.pass_bytes_per_s for one in times), "GB/s", 1e9),
        "micro_tile": {"q_rows": blocking.q_rows, "k_rows": blocking.k_rows, "edge_rows": blocking.edge_rows},
    } | points


def _table(kernel: Kernel, measured: Sequence[dict[str, Times]], backend: Any) -> dict[str, Any]:
    """The `attention` entry of a kernel, with its backward pass."""
    forward, backward = (_figures(name, kernel, [one[name] for one in measured], backend) for name in PASSES)
    return {"dtype": kernel.dtype, "head_dim": kernel.head_dim} | forward | {"backward": backward}


def to_yaml(values: dict[str, Any]) -> str:
    """A topology's plain values as YAML text that ringsim.topology reads."""
    import yaml

    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)

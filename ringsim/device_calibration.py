"""Calibration of GPUs: their kernels and the hops between their ranks, measured and written down as a topology.

One rank of each device times its kernels, alone on it; hops, and what kernels and messages take from each other, are measured
with all ranks at work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .device_bench import Bench, Room, Watch
from .device_hops import (
    OVERLAP_S,
    Buffers,
    Hops,
    Overlap,
    declared,
    kernels_s,
    measure_hops,
    measure_look,
    measure_overlap,
)
from .device_times import BUSY, Matmul, Times, busy_bench, measure_kernel, measure_launch, measure_matmul, measure_memory
from .errors import CalibrationError, RingsimError
from .kernel_times import Kernel
from .transport import Transport

if TYPE_CHECKING:
    from ringsim.backends.cupy import CupyBackend

SHARE_OF_MEMORY: Final = 4
"""Of a device's memory all of its ranks' arrays take one such part at a time."""
SHARING_TRIES: Final = 3


class Seat(NamedTuple):
    """What a rank computes on, of the facts that its engine tells."""

    uuid: str
    device: str
    units: int
    memory_nbytes: int


class Figures(NamedTuple):
    """What one device does, measured by one of its ranks; rates in bytes and FLOPs per second. `launch_s` is its host's."""

    launch_s: float
    memory_bytes_per_s: float
    matmul: dict[str, float]
    kernels: tuple[dict[str, Times], ...]


class Findings(NamedTuple):
    """All that was measured. `figures` by the device's uuid; `speeds` of devices that ranks share; `hops` with whether both their
    ranks share a device.
    """

    seats: tuple[Seat, ...]
    figures: dict[str, Figures]
    speeds: dict[str, float]
    hops: tuple[tuple[bool, Hops], ...]
    look_s: float
    overlap: Overlap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What one rank calibrates: the transport between devices, `make_backend`, a backend on its device with scratch of its own,
    what its engine says of the device, and matrix products (None where they cannot be had).
    """

    transport: Transport
    make_backend: Callable[[], CupyBackend]
    facts: dict[str, Any]
    matmul: Matmul | None

    def seat(self) -> Seat:
        """Its device. Raises CalibrationError where the facts do not say."""
        missing = [name for name in Seat._fields if name not in self.facts]
        if missing:
            raise CalibrationError(f"the engine does not say {', '.join(missing)} of its device: use --backend cupy")
        return Seat(*(self.facts[name] for name in Seat._fields))


def measure_devices(subject: Subject, kernels: Sequence[Kernel], progress: Callable[[str], None] = lambda _: None) -> Findings:
    """Measure kernels, memory and hops of all ranks on one host; collective, the same result on every rank.

    Raises CalibrationError on several hosts, for one rank, and on every rank where one could not measure.
    """
    transport, rank = subject.transport, subject.transport.rank
    _check_ranks(transport)
    seats = tuple(transport.allgather(subject.seat()))
    seat, sharing = seats[rank], [one.uuid for one in seats]
    room = Room(seat.units, seat.memory_nbytes // SHARE_OF_MEMORY // sharing.count(seat.uuid))
    progress("hops between the ranks")
    buffers = _on_all(transport, lambda: Buffers.of(subject.make_backend().empty, room))
    hops = _hops(transport, buffers, sharing)
    leads = sharing.index(seat.uuid) == rank
    progress("memory and matrix products")
    figures = _on_all(transport, partial(_figures, subject, kernels, room) if leads else _nothing)
    for kernel in kernels:
        progress(f"attention and its gradients, {kernel.dtype}, head_dim {kernel.head_dim}")
        # ranks that wait come together after each, for none waits without limit
        figures = _on_all(transport, partial(_with_kernel, subject, figures, kernel, room) if leads else _nothing)
    of_devices = {one.uuid: made for one, made in zip(seats, transport.allgather(figures), strict=True) if made is not None}
    progress("kernels and messages at once")
    bench = _on_all(transport, lambda: busy_bench(Watch.of(subject.make_backend(), room), kernels[0], room))
    alone_s = _on_all(transport, partial(bench.device_s, "a tile alone", *BUSY) if leads else _nothing)
    tile_s = transport.allgather(alone_s)[sharing.index(seat.uuid)]
    speeds = _speeds(transport, sharing, bench, tile_s)
    small_s = median(one.alone[0][1] for _, one in hops)
    look_s = measure_look(transport, buffers, lambda seconds: _occupy(bench, seconds, tile_s), small_s)
    overlap = None
    if declared(transport, "progress") in ("offload", "handshake"):
        overlap = measure_overlap(transport, buffers, bench, tile_s)
    return Findings(seats, of_devices, speeds, hops, look_s, overlap)


def _check_ranks(transport: Transport) -> None:
    if transport.world_size == 1:
        raise CalibrationError("a hop needs two ranks: start with mpiexec -n P, P as in the runs to be predicted")
    for name in ("progress", "drives", "device_share"):
        declared(transport, name)
    hosts = len(set(transport.hosts))
    if hosts > 1:
        raise CalibrationError(f"a topology describes one node here, and the ranks run on {hosts} hosts: calibrate on one")


def _nothing() -> None:
    """What is left to a rank whose device another one measures."""


def _on_all(transport: Transport, measure: Callable[[], Any]) -> Any:
    """What `measure` gives here. Raises its error where it fails, CalibrationError with that of the first such rank elsewhere."""
    made, failure = None, None
    try:
        made = measure()
    except RingsimError as error:
        failure = error
    said = transport.allgather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    faults = [f"rank {rank}: {one}" for rank, one in enumerate(said) if one is not None]
    if faults:
        raise CalibrationError(faults[0])
    return made


def _hops(transport: Transport, buffers: Buffers, sharing: list[str]) -> tuple[tuple[bool, Hops], ...]:
    """All hops of the ring; and where ranks share devices and no hop of it stays on one, those of a ring on each device."""
    world_size = transport.world_size
    rings = [[(rank + 1) % world_size for rank in range(world_size)]]
    if len(set(sharing)) < world_size and all(sharing[rank] != sharing[to] for rank, to in enumerate(rings[0])):
        on = {uuid: [rank for rank, of in enumerate(sharing) if of == uuid] for uuid in sharing}
        rings.append([on[uuid][(on[uuid].index(rank) + 1) % len(on[uuid])] for rank, uuid in enumerate(sharing)])
    found: list[tuple[bool, Hops]] = []
    for ring in rings:
        by_rank = transport.allgather(measure_hops(transport, buffers, ring))
        found += [(sharing[rank] == sharing[to], by_rank[to]) for rank, to in enumerate(ring) if to != rank]
    return tuple(found)


def _figures(subject: Subject, kernels: Sequence[Kernel], room: Room) -> Figures:
    watch, matmul, dtypes = Watch.of(subject.make_backend(), room), subject.matmul, dict.fromkeys(one.dtype for one in kernels)
    launch_s = measure_launch(watch, kernels[0], room)
    memory = measure_memory(watch, kernels[0].dtype, room)
    products = {} if matmul is None else {dtype: measure_matmul(watch, matmul, dtype, room) for dtype in dtypes}
    return Figures(launch_s, memory, products, ())


def _with_kernel(subject: Subject, figures: Figures, kernel: Kernel, room: Room) -> Figures:
    times = measure_kernel(kernel, subject.make_backend, room, figures.memory_bytes_per_s)
    return figures._replace(kernels=(*figures.kernels, times))


def _speeds(transport: Transport, sharing: list[str], bench: Bench, tile_s: float) -> dict[str, float]:
    """Of each device that ranks share what is left of it when all of them compute: their time one after the other by that at
    once, a median.
    """
    most = max(Counter(sharing).values())
    if most == 1:
        return {}
    launches = max(2, round(OVERLAP_S / tile_s))
    found: dict[str, list[float]] = {uuid: [] for uuid, ranks in Counter(sharing).items() if ranks > 1}
    for _ in range(SHARING_TRIES):
        seconds = transport.allgather((kernels_s(transport, bench, launches), launches * tile_s))
        for uuid, ratios in found.items():
            mine = [one for one, of in zip(seconds, sharing, strict=True) if of == uuid]
            ratios.append(sum(alone_s for _, alone_s in mine) / max(together_s for together_s, _ in mine))
    return {uuid: median(ratios) for uuid, ratios in found.items()}


def _occupy(bench: Bench, seconds: float, tile_s: float) -> None:
    """Keep this rank's device at work for so long, and its host waiting for it."""
    backend = bench.watch.backend
    backend.begin(None)
    for turn in range(1 + round(seconds / tile_s)):
        bench.run(turn, *BUSY)
    backend.calls.synchronize(backend.calls.record(backend.stream))

"""Hops between ranks on GPUs: what a message takes alone and with all others, and what kernels and messages take of each other.

Times are the host's, from the later of both posts to where the receiver sees the message done, as in a ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, isfinite
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .calibration import fit_line
from .device_bench import Bench, Room
from .device_times import BUSY
from .errors import CalibrationError
from .segments import Segment, fit, mean_error
from .transport import Handle, Transport

if TYPE_CHECKING:
    from ringsim.backends.cuda import DeviceArray

HOP_NBYTES: Final = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24, 2**25, 2**26, 2**27)
SAMPLES: Final = 7
WARMUP: Final = 2
COLD_NBYTES: Final = 2**28
"""A block that comes round has left the cache: messages take turns in buffers of so much."""
MISS: Final = 0.05
"""Mean error of one line above which messages get a line for each range of sizes."""
MOST_SEGMENTS: Final = 3
LEAST_NBYTES: Final = 8
ASLEEP_S: Final = 3e-3
"""After such a wait a rank looks as seldom as it ever does."""
LOOKS: Final = 6
OVERLAP_NBYTES: Final = 2**25
OVERLAP_S: Final = 3e-2
LEAST_LAPS: Final = 16
AHEAD: Final = 2
"""Messages under way at once where they are to leave no gap."""
TRIES: Final = 4
LOOKING: Final = {"receiver": 1, "sender": 0, "both": 2}
Points = list[tuple[int, float]]


class Buffers(NamedTuple):
    """Device memory of one rank that messages leave from and come to; each an allocation of its own."""

    source: DeviceArray
    target: DeviceArray

    @classmethod
    def of(cls, empty: Callable[[int], DeviceArray], room: Room) -> Buffers:
        """As much as makes messages outgrow the cache, or as there is room for."""
        nbytes = max(HOP_NBYTES[0], min(COLD_NBYTES, room.nbytes // 4))
        return cls(empty(nbytes), empty(nbytes))

    def part(self, whole: DeviceArray, nbytes: int, turn: int) -> DeviceArray:
        """Some bytes of a buffer; others in the next turn."""
        begin = turn % (whole.nbytes // nbytes) * nbytes
        return whole[begin : begin + nbytes]


class Hops(NamedTuple):
    """Seconds by size of the hop that ends at this rank: of each size (bytes, seconds)."""

    alone: Points
    together: Points


class Overlap(NamedTuple):
    """`kernels` is the part of their rate that kernels lose while messages move, `messages` that which messages lose."""

    kernels: float
    messages: float


def measure_hops(transport: Transport, buffers: Buffers, to: Sequence[int]) -> Hops:
    """Medians over samples of the hop to this rank, alone and while all ranks send, each rank to its entry of `to`; collective.

    `to` has each rank once, itself where it takes no part. Without points for a rank that takes none.
    """
    takes_part = to[transport.rank] != transport.rank
    alone, together = [], []
    for nbytes in HOP_NBYTES:
        # every rank must know who has room for it
        if not all(transport.allgather(buffers.source.nbytes >= nbytes)):
            break
        for sender in range(transport.world_size):
            seconds = _hop(transport, buffers, nbytes, to, (sender,))
            if takes_part and to[sender] == transport.rank:
                alone.append((nbytes, seconds))
        together.append((nbytes, _hop(transport, buffers, nbytes, to, range(transport.world_size))))
    return Hops(alone, together if takes_part else [])


def _hop(transport: Transport, buffers: Buffers, nbytes: int, to: Sequence[int], senders: Sequence[int]) -> float:
    """Median seconds of the hop to this rank while those ranks send; 0 where none comes to it."""
    rank = transport.rank
    before, after = to.index(rank), to[rank]
    mine: list[list[tuple[float, float] | None]] = []
    for turn in range(WARMUP + SAMPLES):
        transport.barrier()
        posted: list[Handle | None] = [None, None]
        if before in senders and before != rank:
            posted[0] = transport.irecv(buffers.part(buffers.target, nbytes, turn), before, 0)
        if rank in senders and after != rank:
            posted[1] = transport.isend(buffers.part(buffers.source, nbytes, turn), after, 0)
        finish(transport, [one for one in posted if one is not None])
        mine.append([None if one is None else (one.posted_s, one.done_s or one.posted_s) for one in posted])
    said: list[list[list[tuple[float, float] | None]]] = transport.allgather(mine)
    both = [(said[rank][turn][0], said[before][turn][1]) for turn in range(WARMUP, WARMUP + SAMPLES)]
    samples = [recv[1] - max(recv[0], send[0]) for recv, send in both if recv is not None and send is not None]
    return median(samples) if samples else 0.0


def finish(transport: Transport, handles: Sequence[Handle]) -> None:
    """Wait for messages as a ring does."""
    attempt = 0
    while not all(handle.done for handle in handles):
        transport.poll()
        if all(handle.done for handle in handles):
            return
        transport.idle(attempt)
        attempt += 1


def measure_look(transport: Transport, buffers: Buffers, busy: Callable[[float], None], hop_s: float) -> float:
    """Seconds that what comes goes unnoticed by a rank that has waited a while: median of turns, less what the hop takes.

    `busy` keeps the sender's device and host at work for so long. A message that is begun when its receiver looks, or when both
    have, goes unnoticed as often more: the model has a lag for each. Collective, the same on all ranks.
    """
    world_size, rank = transport.world_size, transport.rank
    lags = []
    for turn in range(LOOKS):
        sender, receiver = turn % world_size, (turn + 1) % world_size
        posted_s = done_s = 0.0
        transport.barrier()
        if rank == sender:
            busy(ASLEEP_S)
            handle = transport.isend(buffers.part(buffers.source, LEAST_NBYTES, turn), receiver, 1)
            posted_s = handle.posted_s
            finish(transport, [handle])
        elif rank == receiver:
            handle = transport.irecv(buffers.part(buffers.target, LEAST_NBYTES, turn), sender, 1)
            finish(transport, [handle])
            done_s = handle.done_s or 0.0
        said = transport.allgather((posted_s, done_s))
        lags.append(float(said[receiver][1] - said[sender][0]))
    progress, drives = declared(transport, "progress"), declared(transport, "drives")
    looks = 1 + (LOOKING[drives] if progress in ("handshake", "polling") else 0)
    return float(max(median(lags) - hop_s, 0.0) / looks)


def declared(transport: Transport, name: str) -> Any:
    """What a transport of device memory says of itself: `progress`, `drives`, `device_share`. Raises CalibrationError."""
    missing = object()
    found = getattr(transport, name, missing)
    if found is missing:
        raise CalibrationError(
            f"transport {transport.name!r} does not declare its `{name}`: calibrate with --transport mpi, ipc, nccl or mpi-staged"
        )
    return found


def measure_overlap(transport: Transport, buffers: Buffers, bench: Bench, tile_s: float) -> Overlap:
    """What kernels and messages take from each other while both go on without a gap; collective, medians over ranks.

    Kernels alone on all ranks, messages alone round the ring, then messages from before the kernels begin until after they end.
    Raises CalibrationError where they never outlast them.
    """
    nbytes = min(OVERLAP_NBYTES, buffers.source.nbytes // AHEAD)
    apart_s = max(transport.allgather(median(_laps(transport, buffers, nbytes, 4 * AHEAD, None)[0])))
    # of which many fit into what they are to slow
    launches = max(2, ceil(max(OVERLAP_S, LEAST_LAPS * apart_s) / tile_s))
    alone_s = max(transport.allgather(kernels_s(transport, bench, launches)))
    laps = ceil(2 * alone_s / apart_s) + 2 * AHEAD
    for _ in range(TRIES):
        seconds, spacing, outlasted = _both(transport, bench, launches, (buffers, nbytes, laps))
        said = transport.allgather((seconds, median(spacing or [0.0]), outlasted))
        if all(one[2] and one[1] for one in said):
            left = alone_s / median(one[0] for one in said), apart_s / median(one[1] for one in said)
            return Overlap(*(round(max(0.0, 1 - one), 3) for one in left))
        laps *= 2
    raise CalibrationError(
        f"{laps // 2} messages of {nbytes} B do not outlast kernels of {alone_s * 1e3:.3g} ms beside them: is another program on "
        "the device? Calibrate again on a quieter one"
    )


def kernels_s(transport: Transport, bench: Bench, launches: int) -> float:
    """Seconds of the device for so many tiles on every rank at once; collective."""
    return _both(transport, bench, launches, None)[0]


def _both(
    transport: Transport, bench: Bench, launches: int, beside: tuple[Buffers, int, int] | None
) -> tuple[float, list[float], bool]:
    """Seconds of the device for so many tiles on every rank at once; with messages `beside` them also the seconds from one to the
    next while kernels ran, and whether the messages outlasted the kernels.
    """
    backend = bench.watch.backend
    calls = backend.calls
    backend.begin(None)
    transport.barrier()
    # these keep the device busy until the host has launched all and begins to send
    for turn in range(max(2, launches // 4)):
        bench.run(turn, *BUSY)
    first = calls.record(backend.stream)
    for turn in range(launches):
        bench.run(turn, *BUSY)
    last = calls.record(backend.stream)
    spacing: list[float] = []
    outlasted = True
    if beside is not None:
        spacing, outlasted = _laps(transport, *beside, lambda: calls.done(last))
    calls.synchronize(last)
    return calls.elapsed_s(first, last), spacing, outlasted


def _laps(
    transport: Transport, buffers: Buffers, nbytes: int, laps: int, ended: Callable[[], bool] | None
) -> tuple[list[float], bool]:
    """Send so many messages round the ring, AHEAD of them under way at once.

    Returns the seconds from each that came to the next, as long as nothing has `ended`, and whether it had at the last.
    """
    before, after = (transport.rank - 1) % transport.world_size, (transport.rank + 1) % transport.world_size
    transport.barrier()
    posted: list[tuple[Handle, Handle]] = []
    came: list[float] = []
    over = False
    for lap in range(laps + AHEAD):
        if lap >= AHEAD:
            recv, send = posted[lap - AHEAD]
            finish(transport, (recv, send))
            over = over or (ended is not None and ended())
            if not over:
                came.append(recv.done_s or 0.0)
        if lap < laps:
            recv = transport.irecv(buffers.part(buffers.target, nbytes, lap), before, 0)
            posted.append((recv, transport.isend(buffers.part(buffers.source, nbytes, lap), after, 0)))
    return [later - earlier for earlier, later in pairwise(came)][AHEAD:], over


def fitted(points: Points) -> tuple[Segment, ...]:
    """A line for all sizes, or where it misses by more than MISS one for each of a few ranges. Raises CalibrationError."""
    latency_s, bandwidth = fit_line(points)
    line = (Segment(from_nbytes=0, latency_s=latency_s, bandwidth_bytes_per_s=bandwidth),)
    if mean_error(line, points) <= MISS:
        return line
    found = fit(points, min(MOST_SEGMENTS, len(points) // 2))
    if not isfinite(found[-1].bandwidth_bytes_per_s):
        raise CalibrationError(f"hop times do not grow with size: {points}; calibrate again on a quieter machine")
    return found


def mean_points(by_rank: Sequence[Points]) -> Points:
    """Points of several hops, averaged size by size."""
    return [(column[0][0], sum(point[1] for point in column) / len(column)) for column in zip(*by_rank, strict=True)]

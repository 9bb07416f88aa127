"""A transport for device memory, put to the proof: patterns go to a neighbour and back, and are compared byte by byte."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

import numpy as np

from ringsim.backends.cuda import Calls, DeviceArray, Stream
from ringsim.errors import PeerTimeout
from ringsim.transport import Bytes, Handle, Transport

TRIALS: Final = ((8, 0), (64 * 2**10, 0), (8 * 2**20 + 1, 3))
"""Bytes, and how far into an allocation: within what libraries send at once, beyond it, and in many pieces at an odd place."""
POISON: Final = 0xA5
TAG: Final = 0
TIMEOUT_S: Final = 60.0

_ABANDONED: list[Any] = []
"""Buffers of proofs that failed: messages may still be on their way."""


class Proof(NamedTuple):
    """Rounds that gave back every byte: their sizes, and the ranks between which they went."""

    nbytes: tuple[int, ...]
    world_size: int


class _Bench:
    """Buffers of one trial, and moves between host and device."""

    def __init__(self, calls: Calls, stream: Stream, nbytes: int, offset: int) -> None:
        self._calls = calls
        self._stream = stream
        self.nbytes = nbytes
        self._host = calls.pinned(nbytes)
        self.mine, self.theirs, self.returned = (calls.empty(offset + nbytes)[offset:] for _ in range(3))

    def _settle(self) -> None:
        self._calls.synchronize(self._calls.record(self._stream))

    def fill(self, pattern: Bytes) -> None:
        """The pattern into what is sent, poison into what receives."""
        self._host[...] = pattern
        self._calls.copy(self.mine, self._host, self._stream)
        self._calls.fill(self.theirs, POISON, self._stream)
        self._calls.fill(self.returned, POISON, self._stream)
        self._settle()

    def read(self, array: DeviceArray) -> Bytes:
        """What device memory holds."""
        self._calls.copy(self._host, array, self._stream)
        self._settle()
        return self._host


def pattern(rank: int, nbytes: int) -> Bytes:
    """What `rank` sends."""
    made: Bytes = np.random.default_rng([rank, nbytes]).integers(0, 256, nbytes, np.uint8)
    return made


def prove(transport: Transport, calls: Calls, *, timeout_s: float = TIMEOUT_S) -> Proof | str:
    """Send patterns to the next rank and back. Returns what was proven, or what went wrong; the same on all ranks, collective.

    After a fault messages may still be on their way: the transport's `failure` says so, and no run may follow on it.
    """
    faults = transport.allgather(_fault(transport, calls, timeout_s))
    said = [(late, f"rank {rank}: {text}") for rank, (late, text) in enumerate(faults) if text is not None]
    if not said:
        return Proof(tuple(nbytes for nbytes, _ in TRIALS), transport.world_size)
    # a rank that waited in vain waited for one that has more to say, if any has
    found = min(said)[1]
    transport.failure = transport.failure or found
    return found


def _fault(transport: Transport, calls: Calls, timeout_s: float) -> tuple[bool, str | None]:
    """What went wrong here, and whether it is that others did not come."""
    try:
        return False, _rounds(transport, calls, timeout_s)
    except Exception as error:  # noqa: BLE001 - whatever it is, every rank is told
        return isinstance(error, PeerTimeout), f"{type(error).__name__}: {error}"


def _rounds(transport: Transport, calls: Calls, timeout_s: float) -> str | None:
    """The first fault; after it the rounds go on, for the neighbours wait for theirs."""
    stream, faults = calls.stream(), []
    for nbytes, offset in TRIALS:
        bench = _Bench(calls, stream, nbytes, offset)
        _ABANDONED.append(bench)
        faults += _round(transport, bench, timeout_s)
        _ABANDONED.remove(bench)
    return next(iter(faults), None)


def _round(transport: Transport, bench: _Bench, timeout_s: float) -> list[str]:
    rank, size, nbytes = transport.rank, transport.world_size, bench.nbytes
    ahead, behind = (rank + 1) % size, (rank - 1) % size
    bench.fill(pattern(rank, nbytes))
    _exchange(transport, (bench.mine, ahead), (bench.theirs, behind), timeout_s)
    there = _difference(bench.read(bench.theirs), pattern(behind, nbytes))
    _exchange(transport, (bench.theirs, behind), (bench.returned, ahead), timeout_s)
    back = _difference(bench.read(bench.returned), pattern(rank, nbytes))
    ways = (f"from rank {behind}", there), (f"that went to rank {ahead} and back", back)
    return [f"of {nbytes} B {way}, {fault}" for way, fault in ways if fault is not None]


def _exchange(transport: Transport, out: tuple[DeviceArray, int], into: tuple[DeviceArray, int], timeout_s: float) -> None:
    handles = transport.irecv(*into, TAG), transport.isend(*out, TAG)
    limit, attempt = time.perf_counter() + timeout_s, 0
    while not all(handle.done for handle in handles):
        transport.poll()
        if time.perf_counter() > limit:
            raise PeerTimeout(_late(handles, into, out, timeout_s))
        transport.idle(attempt)
        attempt += 1


def _late(handles: tuple[Handle, Handle], into: tuple[DeviceArray, int], out: tuple[DeviceArray, int], timeout_s: float) -> str:
    which = f"a receive from rank {into[1]}" if not handles[0].done else f"a send to rank {out[1]}"
    return f"{which} of {into[0].size} B not complete after {timeout_s:g} s"


def _difference(found: Bytes, expected: Bytes) -> str | None:
    wrong = np.flatnonzero(found != expected)
    if not wrong.size:
        return None
    untouched = int(np.count_nonzero(found[wrong] == POISON))
    return f"{wrong.size} B are wrong, the first at {wrong[0]}, and {untouched} of them were never written"

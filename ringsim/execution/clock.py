"""Clocks of several hosts on one axis: offsets to rank 0, by the exchange with the least round trip."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..timeline import Timeline
from ..transport import Handle, Transport

EXCHANGES = 20
TAG = 8


@dataclass(frozen=True, slots=True)
class Offset:
    """This rank's clock less rank 0's at `at_s` of this rank's clock; wrong by at most `error_s`, half the round trip."""

    offset_s: float
    error_s: float
    at_s: float

    def mine(self, before: Offset) -> Offset:
        """The mean of this offset and one from before the run; their difference, drift, is part of the error."""
        drift_s = abs(self.offset_s - before.offset_s)
        mean_s = (self.offset_s + before.offset_s) / 2
        return Offset(mean_s, max(self.error_s, before.error_s) + drift_s / 2, self.at_s)


def offsets(transport: Transport, clock: Callable[[], float] = time.perf_counter) -> Offset:
    """This rank's offset to rank 0; collective. Zero where all ranks share a host, whose clock is one."""
    if len(set(transport.hosts)) <= 1 and clock is time.perf_counter:
        return Offset(0.0, 0.0, clock())
    best = Offset(0.0, 0.0, clock())
    for rank in range(1, transport.world_size):
        if transport.rank == 0:
            _answer(transport, rank, clock)
        elif transport.rank == rank:
            best = min((_ask(transport, clock) for _ in range(EXCHANGES)), key=lambda offset: offset.error_s)
        transport.barrier()
    return best


def _answer(transport: Transport, rank: int, clock: Callable[[], float]) -> None:
    """Rank 0's side: send back the time at which each question came."""
    stamp = np.empty(1, np.float64)
    for _ in range(EXCHANGES):
        _finish(transport, transport.irecv(stamp.view(np.uint8), rank, TAG))
        stamp[0] = clock()
        _finish(transport, transport.isend(stamp.view(np.uint8), rank, TAG))


def _ask(transport: Transport, clock: Callable[[], float]) -> Offset:
    question, answer = np.zeros(1, np.float64), np.empty(1, np.float64)
    reply = transport.irecv(answer.view(np.uint8), 0, TAG)
    sent_s = clock()
    _finish(transport, transport.isend(question.view(np.uint8), 0, TAG))
    _finish(transport, reply)
    received_s = clock()
    return Offset((sent_s + received_s) / 2 - float(answer[0]), (received_s - sent_s) / 2, received_s)


def _finish(transport: Transport, handle: Handle) -> None:
    attempt = 0
    while not handle.done:
        transport.poll()
        transport.idle(attempt)
        attempt += 1


def shift(timeline: Timeline, offset: Offset) -> Timeline:
    """The timeline on rank 0's clock, with the error of that in its facts."""
    events = tuple(
        replace(event, start_s=event.start_s - offset.offset_s, end_s=event.end_s - offset.offset_s) for event in timeline.events
    )
    return replace(
        timeline, events=events if offset.offset_s else timeline.events, facts=timeline.facts | {"clock_error_s": offset.error_s}
    )

"""Messages in flight: matching first in, first out, then the transfer as the path's progress kind has it."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass

import simpy

from ..schedule import Recv, Send
from ..topology import Hop
from .cores import Cores

INFINITE = float("inf")


@dataclass(slots=True)
class Posted:
    """One half of a message."""

    op: Send | Recv
    rank: int
    posted_s: float
    done: simpy.Event
    transfer: Transfer | None = None


@dataclass(slots=True)
class Transfer:
    """A matched message."""

    send: Posted
    recv: Posted
    matched_s: float
    nbytes: int
    start_s: float = INFINITE
    end_s: float = INFINITE


class Network:
    """Matches posts and moves what they name. With `free` hops cost nothing from the moment both sides have posted."""

    def __init__(self, env: simpy.Environment, path: Hop, cores: list[Cores], *, free: bool = False) -> None:
        self._env = env
        self._path = path
        self._cores = cores
        self.progress = "offload" if free else path.progress
        self._latency_s = 0.0 if free else path.latency
        self._bandwidth_bytes_per_s = INFINITE if free else path.bandwidth
        self._halves: dict[tuple[int, int, int], deque[Posted]] = defaultdict(deque)
        self._wire_free_s: dict[tuple[int, int], float] = defaultdict(float)
        self.pending: list[deque[Transfer]] = [deque() for _ in cores]
        self._bells: list[simpy.Event] = [env.event() for _ in cores]

    def post(self, rank: int, op: Send | Recv) -> Posted:
        """Post one half; the transfer begins as soon as progress allows once the other half is there."""
        half = Posted(op, rank, self._env.now, self._env.event())
        key = (rank, op.peer, op.tag) if isinstance(op, Send) else (op.peer, rank, op.tag)
        waiting = self._halves[key]
        if not waiting or isinstance(waiting[0].op, Send) == isinstance(op, Send):
            waiting.append(half)
            return half
        other = waiting.popleft()
        send, recv = (half, other) if isinstance(op, Send) else (other, half)
        send.transfer = recv.transfer = transfer = Transfer(send, recv, self._env.now, op.region.nbytes)
        self._begin(transfer)
        return half

    def bell(self, rank: int) -> simpy.Event:
        """Fires when something arrives that `rank` must drive itself."""
        return self._bells[rank]

    def work_s(self, transfer: Transfer) -> float:
        """Seconds that moving it takes, alone."""
        return self._latency_s + transfer.nbytes / self._bandwidth_bytes_per_s

    def _begin(self, transfer: Transfer) -> None:
        receiver = transfer.recv.rank
        if self.progress == "offload":
            self.carry(transfer)
        elif self.progress == "thread":
            transfer.start_s = self._env.now
            job = self._cores[receiver].start(self.work_s(transfer))
            job.done.callbacks.append(lambda _: self.complete(transfer))
        else:
            self.pending[receiver].append(transfer)
            bell, self._bells[receiver] = self._bells[receiver], self._env.event()
            bell.succeed()

    def carry(self, transfer: Transfer) -> None:
        """Hardware moves it: latencies overlap, bytes of one direction queue."""
        wire = (transfer.send.rank, transfer.recv.rank)
        transfer.start_s = self._env.now
        begin = max(self._env.now + self._latency_s, self._wire_free_s[wire])
        end = self._wire_free_s[wire] = begin + transfer.nbytes / self._bandwidth_bytes_per_s
        timer = self._env.timeout(end - self._env.now)
        timer.callbacks.append(lambda _: self.complete(transfer))

    def complete(self, transfer: Transfer) -> None:
        """Both sides are done."""
        transfer.end_s = self._env.now
        transfer.send.done.succeed()
        transfer.recv.done.succeed()

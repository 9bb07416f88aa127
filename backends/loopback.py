"""The loopback transport: all ranks in one process. Deterministic when one thread drives them; paced where asked."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ringsim.errors import PeerFailed, PeerTimeout, TransportError
from ringsim.transport import Bytes, Handle


@dataclass(slots=True)
class Half:
    """One side of a message."""

    data: Bytes
    handle: Handle


class Link(Protocol):
    """What moves the messages of a World, between any of its ranks, once both halves are there."""

    def move(self, source: int, target: int, send: Half, recv: Half) -> None:
        """Begin to move a message; both handles are done when it has moved. Messages of equal tags arrive in their order."""

    def poll(self) -> None:
        """Let messages advance, and mark those that have moved; any rank's thread may call it."""

    def close(self) -> None:
        """Give back what it holds."""


class PacedLink:
    """Moves a message in chunks at `bandwidth_bytes_per_s` from a thread of its own and sleeps in between.

    It stands for a network: the transfer takes time but (almost) no core, so it can hide behind computation.
    """

    def __init__(self, bandwidth_bytes_per_s: float, *, latency_s: float = 0.0, chunk_nbytes: int = 2**20) -> None:
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self.latency_s = latency_s
        self._chunk = chunk_nbytes
        self._wires: dict[tuple[int, int], queue.SimpleQueue[tuple[Half, Half] | None]] = {}

    def move(self, source: int, target: int, send: Half, recv: Half) -> None:
        """Queue a matched message on the wire from `source` to `target`; one wire moves one message at a time."""
        wire = self._wires.get((source, target))
        if wire is None:
            wire = self._wires[source, target] = queue.SimpleQueue()
            threading.Thread(target=self._run, args=(wire,), daemon=True, name=f"wire {source}->{target}").start()
        wire.put((send, recv))

    def _run(self, wire: queue.SimpleQueue[tuple[Half, Half] | None]) -> None:
        while (pair := wire.get()) is not None:
            send, recv = pair
            arrival = time.perf_counter() + self.latency_s
            for begin in range(0, send.data.size, self._chunk):
                part = slice(begin, begin + self._chunk)
                np.copyto(recv.data[part], send.data[part])
                arrival += recv.data[part].size / self.bandwidth_bytes_per_s
                time.sleep(max(0.0, arrival - time.perf_counter()))
            send.handle.done_s = recv.handle.done_s = time.perf_counter()

    def poll(self) -> None:
        """Nothing to drive: wires have threads of their own."""

    def close(self) -> None:
        """Stop the wires."""
        for wire in self._wires.values():
            wire.put(None)
        self._wires.clear()


class World:
    """`world_size` ranks in this process; `endpoint(rank)` is each one's transport.

    Without a link a message is copied when its second half is posted. Raises TransportError if halves differ in size.
    """

    def __init__(self, world_size: int, *, link: Link | None = None, timeout_s: float = 60.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self.failure: tuple[int, BaseException] | None = None
        self._link = link
        self._lock = threading.Condition()
        self._sends: dict[tuple[int, int, int], deque[Half]] = defaultdict(deque)
        self._recvs: dict[tuple[int, int, int], deque[Half]] = defaultdict(deque)
        self._rounds: dict[int, tuple[dict[int, Any], set[int]]] = defaultdict(lambda: ({}, set()))

    def endpoint(self, rank: int) -> Endpoint:
        """The transport of `rank`."""
        return Endpoint(self, rank)

    def post(self, key: tuple[int, int, int], data: Bytes, *, sending: bool) -> Handle:
        """Post one half of the message (source, target, tag)."""
        half = Half(data, Handle(posted_s=time.perf_counter()))
        with self._lock:
            mine, other = (self._sends, self._recvs) if sending else (self._recvs, self._sends)
            if not other[key]:
                mine[key].append(half)
                return half.handle
            match = other[key].popleft()
        send, recv = (half, match) if sending else (match, half)
        if send.data.size != recv.data.size:
            raise TransportError(
                f"message {key[0]} -> {key[1]} tag {key[2]}: {send.data.size} B sent, {recv.data.size} B expected"
            )
        if self._link is not None:
            self._link.move(key[0], key[1], send, recv)
        else:
            np.copyto(recv.data, send.data)
            send.handle.done_s = recv.handle.done_s = time.perf_counter()
        return half.handle

    def fail(self, rank: int, error: BaseException) -> None:
        """Tell every rank that `rank` raised."""
        with self._lock:
            self.failure = self.failure or (rank, error)
            self._lock.notify_all()

    def gather(self, rank: int, round_: int, value: Any) -> list[Any]:
        """Collect one value from each rank's thread."""
        with self._lock:
            values, readers = self._rounds[round_]
            values[rank] = value
            self._lock.notify_all()
            if not self._lock.wait_for(lambda: len(values) == self.world_size or self.failure is not None, self.timeout_s):
                missing = sorted(set(range(self.world_size)) - set(values))
                raise PeerTimeout(f"rank {rank}: allgather waited {self.timeout_s:g} s for rank(s) {missing}")
            self.raise_failure(rank)
            readers.add(rank)
            if len(readers) == self.world_size:
                del self._rounds[round_]
            return [values[r] for r in range(self.world_size)]

    def poll(self, rank: int) -> None:
        """Let the link advance. Raises PeerFailed if another rank has failed."""
        self.raise_failure(rank)
        if self._link is not None:
            self._link.poll()

    def raise_failure(self, rank: int) -> None:
        """Raise PeerFailed if another rank has failed."""
        if self.failure is not None and self.failure[0] != rank:
            raise PeerFailed(f"rank {rank}: rank {self.failure[0]} raised {self.failure[1]!r}") from self.failure[1]


class Endpoint:
    """One rank's end of a World."""

    name = "loopback"

    def __init__(self, world: World, rank: int) -> None:
        self.rank = rank
        self.world_size = world.world_size
        self.failure: str | None = None
        self.library = "none"
        self.hosts = [socket.gethostname()] * world.world_size
        self._world = world
        self._rounds = 0

    def isend(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a send."""
        return self._world.post((self.rank, peer, tag), data, sending=True)

    def irecv(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a receive."""
        return self._world.post((peer, self.rank, tag), data, sending=False)

    def poll(self) -> None:
        """Let the link advance; passes on another rank's failure."""
        self._world.poll(self.rank)

    def idle(self, attempt: int) -> None:
        """Sleep a little: the link's thread needs a core now and then."""
        time.sleep(20e-6 if attempt < 100 else 200e-6)

    def allgather(self, value: Any) -> list[Any]:
        """Each rank's value; needs each rank on a thread of its own."""
        self._rounds += 1
        return self._world.gather(self.rank, self._rounds, value)

    def barrier(self) -> None:
        """Wait for every rank's thread."""
        self.allgather(None)

    def close(self) -> None:
        """Nothing to free."""


def spawn(
    world_size: int, function: Callable[[Endpoint], Any], *, link: Link | None = None, timeout_s: float = 60.0
) -> list[Any]:
    """Run ``function(endpoint)`` on a thread per rank and return the results by rank; raises the first rank's error."""
    world = World(world_size, link=link, timeout_s=timeout_s)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = function(world.endpoint(rank))
        except BaseException as error:  # noqa: BLE001 - handed on to every rank
            world.fail(rank, error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if link is not None:
        link.close()
    if world.failure is not None:
        raise world.failure[1]
    return results

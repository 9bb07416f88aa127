"""Messages in flight: matched first in, first out, then begun and driven as the path's progress kind has it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simpy

from ..schedule import Recv, Send
from ..topology import Path
from .cores import Cores
from .ground import Ground
from .wires import Wires

INFINITE = float("inf")


@dataclass(slots=True)
class Posted:
    """One half of a message."""

    op: Send | Recv
    rank: int
    nbytes: int
    posted_s: float
    done: simpy.Event
    path: Path
    transfer: Transfer | None = None
    done_s: float = INFINITE

    def finish(self, now_s: float) -> None:
        """Done, unless it was before."""
        if not self.done.triggered:
            self.done_s = now_s
            self.done.succeed()


@dataclass(slots=True)
class Transfer:
    """A message that both sides have posted, or an eager one that its sender has. `drivers` are yet to look, in turn."""

    path: Path
    send: Posted
    recv: Posted | None
    matched_s: float
    nbytes: int
    drivers: list[int] = field(default_factory=list)
    start_s: float = INFINITE
    end_s: float = INFINITE


class Network:
    """Matches posts and moves what they name. With `free` a message costs nothing from the moment both sides have posted.

    `driven`: whether ranks have to look for anything to move.
    """

    def __init__(self, env: simpy.Environment, ground: Ground, cores: Sequence[Cores], *, free: bool = False) -> None:
        self._env = env
        self._ground = ground
        topology, devices = ground.topology, [ground.device(rank) for rank in range(ground.world_size)]
        # a CPU's own cores copy; beside a GPU the host has cores to spare
        self._copiers = [
            pool if topology.device(device).kind == "cpu" else Cores(env, ground.world_size)
            for device, pool in zip(devices, cores, strict=False)
        ]
        self._threads: list[deque[Transfer]] = [deque() for _ in cores]
        self.free = free
        kinds = {topology.transport.progress, *(route.progress for route in topology.transport.paths.values())}
        self.driven = not free and bool(kinds & {"handshake", "polling"})
        self.wires = Wires(env, ground.capacities(), devices, cores)
        self._halves: dict[tuple[tuple[int, int], int], deque[Posted]] = defaultdict(deque)
        self.pending: list[deque[Transfer]] = [deque() for _ in cores]
        self._bells: list[simpy.Event] = [env.event() for _ in cores]

    def post(self, rank: int, op: Send | Recv) -> Posted:
        """Post one half; the message begins as soon as progress allows once the other half is there, or at once if eager."""
        sends, nbytes = isinstance(op, Send), op.region.nbytes
        path, lane = self._ground.link(rank, op.peer) if sends else self._ground.link(op.peer, rank)
        half = Posted(op, rank, nbytes, self._env.now, simpy.Event(self._env), path)
        if sends and nbytes <= path.eager_nbytes:
            self._leave(half)
        waiting = self._halves[lane, op.tag]
        if waiting and isinstance(waiting[0].op, Send) != sends:
            other = waiting.popleft()
            self._match(*((half, other) if sends else (other, half)))
            return half
        waiting.append(half)
        return half

    def _match(self, send: Posted, recv: Posted) -> None:
        transfer = send.transfer
        if transfer is None:
            transfer = send.transfer = Transfer(send.path, send, recv, self._env.now, send.nbytes)
            recv.transfer = transfer
            self._begin(transfer, recv)
            return
        recv.transfer, transfer.recv = transfer, recv
        if self.free:
            self._complete(transfer)
        elif send.path.copied:
            transfer.drivers = [recv.rank]
            self._hand(transfer, recv)
        elif transfer.end_s < INFINITE:
            recv.finish(self._env.now)

    def _leave(self, send: Posted) -> None:
        """An eager message goes without its receiver: hardware takes it there, or the host has put it in a buffer."""
        send.transfer = transfer = Transfer(send.path, send, None, self._env.now, send.nbytes)
        if send.path.copied or self.free:
            transfer.start_s = self._env.now
            send.finish(self._env.now)
        else:
            self._carry(transfer)

    def _begin(self, transfer: Transfer, recv: Posted) -> None:
        sender, receiver = transfer.send.rank, recv.rank
        transfer.drivers = {"receiver": [receiver], "sender": [sender], "both": [receiver, sender]}[transfer.path.drives]
        if self.free:
            transfer.start_s = self._env.now
            self._complete(transfer)
        elif transfer.path.progress == "offload":
            self._carry(transfer)
        else:
            self._hand(transfer, recv)

    def _hand(self, transfer: Transfer, recv: Posted) -> None:
        """To a thread of the rank that drives it, or to the rank itself for its next look."""
        if transfer.path.progress == "thread":
            self._enqueue(transfer, transfer.drivers[-1])
            return
        rank = transfer.drivers[0]
        self.pending[rank].append(transfer)
        bell, self._bells[rank] = self._bells[rank], self._env.event()
        bell.succeed()

    def _enqueue(self, transfer: Transfer, rank: int) -> None:
        """A rank has one thread, which copies one message after the other."""
        queue = self._threads[rank]
        queue.append(transfer)
        if len(queue) == 1:
            self._env.process(self._drain(queue, rank))

    def _drain(self, queue: deque[Transfer], rank: int) -> Generator[simpy.Event, Any, None]:
        while queue:
            yield from self._copy(queue[0], rank)
            queue.popleft()

    def bell(self, rank: int) -> simpy.Event:
        """Fires when something arrives that `rank` must look at."""
        return self._bells[rank]

    def look(self, rank: int) -> Generator[simpy.Event, Any, None]:
        """What a poll of `rank` does: pass on, hand to the hardware, or copy all that waits for it."""
        pending = self.pending[rank]
        while pending:
            # where one rank stands for both ends, what it passes on comes back to it
            waiting = [pending.popleft() for _ in range(len(pending))]
            copies = [transfer for transfer in waiting if not self._pass_on(transfer)]
            for transfer in copies:
                yield from self._copy(transfer, rank)

    def _pass_on(self, transfer: Transfer) -> bool:
        """What a look costs nothing for: the next one must look too, or hardware takes over."""
        del transfer.drivers[0]
        if transfer.drivers and transfer.recv is not None:
            self._hand(transfer, transfer.recv)
            return True
        if transfer.path.progress == "handshake":
            self._carry(transfer)
            return True
        return False

    def _carry(self, transfer: Transfer) -> None:
        transfer.start_s = self._env.now
        target = transfer.send.op.peer
        self.wires.carry(transfer.path, transfer.send.rank, target, transfer.nbytes, lambda: self._complete(transfer))

    def _copy(self, transfer: Transfer, rank: int) -> Generator[simpy.Event, Any, None]:
        """A core copies while the wires carry: it is there when both have done their part."""
        transfer.start_s = self._env.now
        moved = self._env.event()
        self.wires.carry(transfer.path, transfer.send.rank, transfer.send.op.peer, transfer.nbytes, lambda: _succeed(moved))
        yield self._copiers[rank].start(transfer.path.seconds(transfer.nbytes)).done & moved
        self._complete(transfer)

    def _complete(self, transfer: Transfer) -> None:
        transfer.end_s = self._env.now
        for half in (transfer.send, transfer.recv):
            if half is not None:
                half.finish(self._env.now)


def _succeed(event: simpy.Event) -> None:
    event.succeed()

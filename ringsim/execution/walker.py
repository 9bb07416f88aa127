"""One walker: a rank's execution is a generator that yields where it must wait; every driver steps the same one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from ..errors import PeerTimeout
from ..schedule import Compute, Op, Recv, Region, Send, Wait
from ..timeline import Event
from ..transport import Handle, Transport
from .memory import Memory


class Backend(Protocol):
    """What runs kernels."""

    @property
    def name(self) -> str:
        """``numpy`` or ``cupy``."""

    def compute(
        self, op: Compute, fetch: Callable[[Region], npt.NDArray[Any]], *, scale: float, poll: Callable[[], None]
    ) -> None:
        """Run one op on the arrays of its regions, calling `poll` between micro-tiles."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """What a walker yields: the Wait op at which it stands and the posts that are not complete."""

    op: Wait
    posts: tuple[Send | Recv, ...]


class Walker:
    """Walks one rank's program; `run` is the generator, `events` what it measured."""

    def __init__(self, ops: Iterable[Op], memory: Memory, backend: Backend, transport: Transport, scale: float) -> None:
        self.events: list[Event] = []
        self._ops = ops
        self._memory = memory
        self._backend = backend
        self._transport = transport
        self._scale = scale
        self._posts: dict[int, tuple[Send | Recv, Handle]] = {}
        self._polled_s = self._polled_cpu_s = 0.0

    def run(self) -> Generator[Blocked, None, None]:
        """Walk to the end, yielding a Blocked each time a wait is polled in vain."""
        for op in self._ops:
            if isinstance(op, Send):
                self._posts[op.id] = op, self._transport.isend(self._memory.bytes(op.region), op.peer, op.tag)
            elif isinstance(op, Recv):
                self._posts[op.id] = op, self._transport.irecv(self._memory.bytes(op.region), op.peer, op.tag)
            elif isinstance(op, Wait):
                yield from self._wait(op)
            else:
                self._compute(op)

    def _wait(self, op: Wait) -> Generator[Blocked, None, None]:
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        posts = [self._posts[post] for post in op.posts]
        # what is already done needs no poll, which might first move some other message
        polled = False
        while missing := tuple(post for post, handle in posts if not handle.done):
            if polled:
                yield Blocked(op, missing)
            self._transport.poll()
            polled = True
        cpu_s = time.thread_time() - start_cpu_s
        for post in op.posts:
            self._record_post(post)
        self._record(op, "wait", start_s, cpu_s=cpu_s)

    def _compute(self, op: Compute) -> None:
        self._polled_s = self._polled_cpu_s = 0.0
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        self._backend.compute(op, self._memory.array, scale=self._scale, poll=self._poll)
        cpu_s = time.thread_time() - start_cpu_s - self._polled_cpu_s
        self._record(op, op.kernel, start_s, cpu_s=cpu_s, poll_s=self._polled_s)

    def _poll(self) -> None:
        if self._posts:
            start_s, start_cpu_s = time.perf_counter(), time.thread_time()
            self._transport.poll()
            self._polled_s += time.perf_counter() - start_s
            self._polled_cpu_s += time.thread_time() - start_cpu_s

    def _record_post(self, post_id: int) -> None:
        op, handle = self._posts.pop(post_id)
        kind, end_s = "send" if isinstance(op, Send) else "recv", handle.done_s or handle.posted_s
        event = Event(
            rank=self._transport.rank,
            op=op.id,
            kind=kind,
            step=op.step,
            phase=op.phase,
            start_s=handle.posted_s,
            end_s=end_s,
            nbytes=op.region.nbytes,
            peer=op.peer,
            tag=op.tag,
        )
        self.events.append(event)

    def _record(self, op: Wait | Compute, kind: str, start_s: float, *, cpu_s: float, poll_s: float = 0.0) -> None:
        event = Event(
            rank=self._transport.rank,
            op=op.id,
            kind=kind,
            step=op.step,
            phase=op.phase,
            start_s=start_s,
            end_s=time.perf_counter(),
            cpu_s=cpu_s,
            poll_s=poll_s,
        )
        self.events.append(event)


def drive(walker: Walker, transport: Transport, *, timeout_s: float) -> None:
    """Step one rank's walker to its end. Raises PeerTimeout naming rank, op and peer when a wait outlasts `timeout_s`."""
    current, since_s, attempt = -1, 0.0, 0
    for blocked in walker.run():
        if blocked.op.id != current:
            current, since_s, attempt = blocked.op.id, time.perf_counter(), 0
        elif time.perf_counter() - since_s > timeout_s:
            raise PeerTimeout(f"rank {transport.rank}: {_describe(blocked)} not complete after {timeout_s:g} s")
        transport.idle(attempt)
        attempt += 1


def drive_all(walkers: list[Walker]) -> None:
    """Step all ranks' walkers by turns in this thread, always in the same order. Raises PeerTimeout on a deadlock."""
    running = [(rank, walker.run()) for rank, walker in enumerate(walkers)]
    stuck: dict[int, Blocked] = {}
    while running:
        before, still = dict(stuck), []
        for rank, walk in running:
            blocked = next(walk, None)
            if blocked is None:
                stuck.pop(rank, None)
            else:
                stuck[rank] = blocked
                still.append((rank, walk))
        if still and stuck == before:
            waiting = "; ".join(f"rank {rank}: {_describe(blocked)}" for rank, blocked in stuck.items())
            raise PeerTimeout(f"deadlock: no rank can go on: {waiting}")
        running = still


def _describe(blocked: Blocked) -> str:
    posts = ", ".join(
        f"{'send' if isinstance(post, Send) else 'recv'} {post.region.value} {'to' if isinstance(post, Send) else 'from'} "
        f"rank {post.peer} (op {post.id}, tag {post.tag}, {post.region.nbytes} B)"
        for post in blocked.posts
    )
    return f"op {blocked.op.id} (wait, step {blocked.op.step}) for {posts}"

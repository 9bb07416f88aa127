"""One walker: a rank's execution is a generator that yields where it must wait; every driver steps the same one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, PeerTimeout
from ..footprint import Footprint
from ..schedule import Compute, Op, Recv, Region, Schedule, Send, Wait
from ..timeline import POSTS, Event
from ..transport import Transport
from .memory import Memory
from .posts import Launched, Posts

Fetch = Callable[[Region], npt.NDArray[Any]]
IDLE_S = 20e-6


class Backend(Protocol):
    """What runs kernels, and whose memory they run on: the host's, or that of a device which runs them later."""

    @property
    def name(self) -> str:
        """``numpy`` or ``cupy``."""

    def state(self) -> dict[str, Any]:
        """What measurements depend on and may change from run to run."""

    def view(self, name: str, value: Any) -> npt.NDArray[Any]:
        """An argument of the caller's as an array that shares its memory. Raises ArrayError where that is not the backend's."""

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any], stream: Any = None) -> npt.NDArray[Any]:
        """An array for the caller to keep, and to use on `stream` (None: his current one)."""

    def put(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A NumPy array's values in the backend's memory; on the host the array itself."""

    def get(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The values of an array as a NumPy array, once all that is queued has been done; on the host the array itself."""

    def another(self) -> Backend:
        """One like it, with scratch of its own."""

    @property
    def nbytes(self) -> int:
        """Bytes of scratch held now."""

    def footprint(self, schedule: Schedule, rank: int) -> Footprint:
        """What a rank holds while it runs the schedule, by the memory model."""

    def empty(self, nbytes: int) -> npt.NDArray[Any]:
        """A flat uint8 array in the memory that kernels work on."""

    def objection(self, name: str, array: npt.NDArray[Any]) -> str | None:
        """Why the caller's array cannot leave from where it lies, or None."""

    def dense(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """An array that leaves, as one that can be sent as it is."""

    def copy(self, array: npt.NDArray[Any], stream: Any = None) -> npt.NDArray[Any]:
        """A copy of an array of the run, as it is after all kernels so far, for the caller to keep and use on `stream`."""

    def begin(self, stream: Any) -> None:
        """A run begins: its kernels come after what the caller has queued on `stream` (None: on his current one)."""

    def end(self, stream: Any) -> None:
        """A run ends: what the caller queues on `stream` from now on comes after its kernels."""

    def compute(self, op: Compute, fetch: Fetch, *, scale: float, poll: Callable[[], None]) -> Launched | None:
        """Run one op on the arrays of its regions, calling `poll` between micro-tiles; or launch it, for a device to run."""

    def gate(self, post: Send | Recv) -> Launched | None:
        """The last work on a device that must be done before the post is made: on what it sends, or would overwrite."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """What a walker yields: the Wait op at which it stands, the posts that are not complete, whether some wait for the device."""

    op: Wait
    posts: tuple[Send | Recv, ...]
    held: bool = False


class Walker:
    """Walks one rank's program; `run` is the generator, `measured` says what it took."""

    def __init__(self, ops: Iterable[Op], memory: Memory, backend: Backend, transport: Transport, scale: float) -> None:
        self._events: list[Event | tuple[Event, Launched]] = []
        self._ops = ops
        self._memory = memory
        self._backend = backend
        self._transport = transport
        self._scale = scale
        self._posts = Posts(transport, memory)
        self._polled_s = self._polled_cpu_s = 0.0

    def run(self) -> Generator[Blocked, None, None]:
        """Walk to the end, yielding a Blocked each time a wait is polled in vain. Raises DeviceError naming rank and op."""
        for op in self._ops:
            try:
                if isinstance(op, Wait):
                    yield from self._wait(op)
                elif isinstance(op, Compute):
                    self._compute(op)
                else:
                    self._posts.add(op, self._backend.gate(op))
            except DeviceError as error:
                kind = op.kernel if isinstance(op, Compute) else type(op).__name__.lower()
                raise DeviceError(f"rank {self._transport.rank}: at op {op.id} ({kind}, step {op.step}): {error}") from error

    def _wait(self, op: Wait) -> Generator[Blocked, None, None]:
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        # what is already done needs no poll, which might first move some other message
        polled = False
        while missing := self._posts.missing(op.posts):
            if polled:
                yield Blocked(op, missing, self._posts.held)
            self._posts.advance()
            polled = True
        cpu_s = time.thread_time() - start_cpu_s
        self._events += [self._posts.take(post) for post in op.posts]
        self._events.append(self._event(op, "wait", start_s, cpu_s=cpu_s))

    def _compute(self, op: Compute) -> None:
        self._polled_s = self._polled_cpu_s = 0.0
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        launched = self._backend.compute(op, self._memory.array, scale=self._scale, poll=self._poll)
        cpu_s = time.thread_time() - start_cpu_s - self._polled_cpu_s
        if launched is None:
            self._events.append(self._event(op, op.kernel, start_s, cpu_s=cpu_s, poll_s=self._polled_s))
        else:
            self._events.append((self._event(op, op.kernel, start_s), launched))

    def _poll(self) -> None:
        if self._posts:
            start_s, start_cpu_s = time.perf_counter(), time.thread_time()
            self._posts.advance()
            self._polled_s += time.perf_counter() - start_s
            self._polled_cpu_s += time.thread_time() - start_cpu_s

    def _event(self, op: Wait | Compute, kind: str, start_s: float, *, cpu_s: float = 0.0, poll_s: float = 0.0) -> Event:
        return Event(
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

    def measured(self) -> tuple[Event, ...]:
        """The events of the walk. Of a device, kernels when it ran them, and waits from when it had nothing left to run."""
        return tuple(on_device(self._events))


def on_device(events: Iterable[Event | tuple[Event, Launched]]) -> Iterable[Event]:
    """Events in program order on the axis of what computes: the host, or a device which the host runs ahead of.

    A launched kernel stands where the device ran it. A wait of the host hides behind the kernels launched before it: what is
    left of it, after their end, is the wait of the device.
    """
    free_s = float("-inf")
    for one in events:
        if isinstance(one, tuple):
            event, launched = one
            begin_s, end_s = launched.span_s() or (max(free_s, event.start_s),) * 2
            event = replace(event, start_s=max(begin_s, free_s), end_s=max(end_s, free_s))
            free_s = event.end_s
        elif one.kind in POSTS:
            event = one
        else:
            event = replace(one, start_s=max(one.start_s, free_s), end_s=max(one.end_s, free_s))
            free_s = event.end_s
        yield event


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


def drive_all(walkers: list[Walker], *, patience_s: float = 0.0) -> None:
    """Step all ranks' walkers by turns in this thread, always in the same order. Raises PeerTimeout on a deadlock.

    Where messages or kernels take their time, `patience_s` is how long nothing at all may change.
    """
    running = [(rank, walker.run()) for rank, walker in enumerate(walkers)]
    stuck: dict[int, Blocked] = {}
    changed_s = time.perf_counter()
    while running:
        before, still = dict(stuck), []
        for rank, walk in running:
            blocked = next(walk, None)
            if blocked is None:
                stuck.pop(rank, None)
            else:
                stuck[rank] = blocked
                still.append((rank, walk))
        if stuck != before:
            changed_s = time.perf_counter()
        elif still and time.perf_counter() - changed_s < patience_s:
            time.sleep(IDLE_S)
        elif still:
            waiting = "; ".join(f"rank {rank}: {_describe(blocked)}" for rank, blocked in stuck.items())
            raise PeerTimeout(f"deadlock: no rank can go on: {waiting}")
        running = still


def _describe(blocked: Blocked) -> str:
    posts = ", ".join(
        f"{'send' if isinstance(post, Send) else 'recv'} {post.region.value} {'to' if isinstance(post, Send) else 'from'} "
        f"rank {post.peer} (op {post.id}, tag {post.tag}, {post.region.nbytes} B)"
        for post in blocked.posts
    )
    device = "; some posts wait for the device" if blocked.held else ""
    return f"op {blocked.op.id} (wait, step {blocked.op.step}) for {posts}{device}"

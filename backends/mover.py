"""Device memory between ranks: a transport made of one that moves host memory and of what moves a device's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ringsim.backends.cuda import DeviceArray
from ringsim.errors import TransportError
from ringsim.transport import Handle, Transport

if TYPE_CHECKING:
    from ringsim.topology.parts import Drives, Progress

_ABANDONED: list[Mover] = []
"""Movers of runs that failed: the device or MPI may still write into their buffers, so these outlive the transport."""


class Mover(Protocol):
    """What moves device memory between ranks. All calls come from one thread, and none waits but `close`.

    `isend` and `irecv` take flat uint8 device arrays that no kernel works on any more; each keeps its array until it is done. A
    receive is done when a kernel launched from then on reads what was sent, a send when one may overwrite it. `progress`,
    `drives` and `device_share` are those of a topology's transport; `device_share` is None where only calibration tells.
    """

    @property
    def name(self) -> str:
        """``mpi``, ``mpi-staged``, ``ipc`` or ``nccl``."""

    @property
    def library(self) -> str:
        """The library that moves the bytes."""

    @property
    def progress(self) -> Progress:
        """Who moves a message once both sides have posted."""

    @property
    def drives(self) -> Drives:
        """Who must look before it moves."""

    @property
    def device_share(self) -> float | None:
        """The part of a device that its kernels lose meanwhile."""

    @property
    def pinned_nbytes(self) -> int:
        """Page-locked host memory that it holds."""

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Post a send."""

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Post a receive; matches sends of the peer with this tag in order."""

    def poll(self) -> None:
        """Let messages advance, those of the host's transport too, and mark those that are complete."""

    def close(self, *, failed: bool) -> None:
        """Give back what it holds; collective unless a run failed."""


class DeviceTransport:
    """A `Transport` for device memory: `mover` moves it, and all else is the `host` transport's.

    Messages in host memory go through `host` itself, while no message in device memory is under way.
    """

    def __init__(self, host: Transport, mover: Mover) -> None:
        self.host = host
        self.mover = mover
        self.name = mover.name
        self.library = mover.library
        self.rank = host.rank
        self.world_size = host.world_size
        self.hosts = host.hosts
        self.progress: Progress = mover.progress
        self.drives: Drives = mover.drives
        self.device_share = mover.device_share
        self.pinned_nbytes = mover.pinned_nbytes

    @property
    def failure(self) -> str | None:
        """What ended an earlier run half-way."""
        return self.host.failure

    @failure.setter
    def failure(self, said: str | None) -> None:
        self.host.failure = said
        if said is not None and self.mover not in _ABANDONED:
            _ABANDONED.append(self.mover)

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Post a send of a flat uint8 device array."""
        return self.mover.isend(data, peer, tag)

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Post a receive into a flat uint8 device array."""
        return self.mover.irecv(data, peer, tag)

    def poll(self) -> None:
        """Let messages advance. Raises TransportError, DeviceError."""
        self.mover.poll()

    def idle(self, attempt: int) -> None:
        """Give way to others, as the host's transport does."""
        self.host.idle(attempt)

    def allgather(self, value: Any) -> list[Any]:
        """Each rank's picklable value on every rank."""
        return self.host.allgather(value)

    def barrier(self) -> None:
        """Return when every rank has come."""
        self.host.barrier()

    def close(self) -> None:
        """Give back what the mover holds; collective. The host's transport stays its owner's."""
        self.mover.close(failed=self.failure is not None)


class DirectMpi:
    """MPI itself, CUDA-aware: mpi4py takes a device array's address from DLPack or ``__cuda_array_interface__``.

    It asks for no synchronisation (DLPack's stream -1) and its request keeps the array. Once a message is matched, copy engines
    or the network card move it; which side starts them is the MPI's choice.
    """

    name = "mpi"
    progress: Progress = "handshake"
    drives: Drives = "both"
    device_share: float | None = 0.0
    pinned_nbytes = 0

    def __init__(self, host: Transport) -> None:
        self._host = host
        self.library = host.library

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """MPI_Isend from device memory."""
        return self._host.isend(data, peer, tag)

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """MPI_Irecv into device memory."""
        return self._host.irecv(data, peer, tag)

    def poll(self) -> None:
        """MPI_Testsome."""
        self._host.poll()

    def close(self, *, failed: bool) -> None:
        """Nothing is held."""


class Note(NamedTuple):
    """A small message of the movers to one another that is expected: `words` hold it once `handle` is done."""

    words: npt.NDArray[np.int64]
    handle: Handle


def send_note(host: Transport, words: Iterable[int], peer: int, tag: int) -> Handle:
    """Send a note; the transport keeps it until it is done."""
    return host.isend(np.array(list(words), np.int64).view(np.uint8), peer, tag)


def expect_note(host: Transport, count: int, peer: int, tag: int) -> Note:
    """Expect a note of `count` words."""
    words = np.zeros(count, np.int64)
    return Note(words, host.irecv(words.view(np.uint8), peer, tag))


class Waiting(Protocol):
    """A message that waits for its turn in its lane, the messages of one peer and tag."""

    @property
    def lane(self) -> tuple[int, int]:
        """Peer and tag."""


T = TypeVar("T", bound=Waiting)


def in_turn(messages: Iterable[T], step: Callable[[T], bool]) -> list[T]:
    """Call `step` on each message that is the first of its lane; those for which it is False stay, and those behind them."""
    stay: list[T] = []
    held: set[tuple[int, int]] = set()
    for message in messages:
        if message.lane in held or not step(message):
            held.add(message.lane)
            stay.append(message)
    return stay


def check_sizes(sent: int, expected: int, source: int, target: int, tag: int) -> None:
    """Raise TransportError where a message has not the size that its receiver expects."""
    if sent != expected:
        raise TransportError(f"message {source} -> {target} tag {tag}: {sent} B sent, {expected} B expected")

"""Device memory between processes of one host: the sender's copy engine writes into the receiver's memory, by CUDA IPC."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ringsim.backends.cuda import Calls, DeviceArray
from ringsim.backends.mover import Note, check_sizes, expect_note, in_turn, send_note
from ringsim.backends.track import Track
from ringsim.errors import RingsimError
from ringsim.transport import Handle, Transport

if TYPE_CHECKING:
    from ringsim.topology.parts import Drives, Progress

HANDLE_NBYTES = 64
"""cudaIpcMemHandle_t."""
READY, MOVED, LANES = 0, 1, 2
"""Each tag of the caller becomes two."""
READY_WORDS = 4 + HANDLE_NBYTES // 8


class Shared(NamedTuple):
    """Where other processes find an array: `offset` bytes into an allocation of `extent` bytes at `base`, which `handle` opens.

    `keep` must be held while another process has the allocation open.
    """

    handle: bytes
    base: int
    offset: int
    extent: int
    keep: Any = None


class Sharing(Protocol):
    """CUDA IPC. Raises TransportError with a remedy where memory cannot be shared."""

    def export(self, array: DeviceArray) -> Shared:
        """Where other processes find a flat uint8 array of this process."""

    def open(self, handle: bytes, extent: int) -> DeviceArray:
        """Another process's allocation, whole, as a flat uint8 array."""

    def close(self, base: DeviceArray) -> None:
        """Undo `open`; may wait for the device."""


def refuses(host: Transport, calls: Calls, sharing: Callable[[], Sharing]) -> str | None:
    """Why ranks cannot write into one another's device memory, or None if they can: each tries. Collective, the same on all."""
    if len(set(host.hosts)) > 1:
        return f"CUDA IPC stays within a host, and the ranks are on {len(set(host.hosts))}"
    exported, fault = _attempt(lambda: _export(calls, sharing()))
    if refused := _first(host.allgather(fault)):
        return refused
    offers = host.allgather((exported.handle, exported.extent))
    others = [offer for rank, offer in enumerate(offers) if rank != host.rank]
    _, fault = _attempt(lambda: _open_all(sharing(), others))
    # `exported` is held until all have looked at it
    return _first(host.allgather(fault))


def _export(calls: Calls, sharing: Sharing) -> Shared:
    array = calls.empty(HANDLE_NBYTES)
    shared = sharing.export(array)
    return shared._replace(keep=(array, shared.keep))


def _open_all(sharing: Sharing, others: list[tuple[bytes, int]]) -> None:
    for handle, extent in others:
        sharing.close(sharing.open(handle, extent))


def _attempt(step: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a step gives, and why it failed."""
    try:
        return step(), None
    except RingsimError as error:
        return None, str(error)


def _first(faults: list[str | None]) -> str | None:
    return next((f"rank {rank}: {fault}" for rank, fault in enumerate(faults) if fault is not None), None)


@dataclass(slots=True, eq=False)
class _Message:
    data: DeviceArray
    peer: int
    tag: int
    note: Note
    """What it waits for: of a send that the receiver is ready, of a receive that all is there."""
    handle: Handle = field(default_factory=lambda: Handle(posted_s=time.perf_counter()))
    said: Handle | None = None
    """What it told the peer."""

    @property
    def lane(self) -> tuple[int, int]:
        return self.peer, self.tag

    def finish(self) -> bool:
        """Mark it done if it has been told and has told all."""
        if self.note.handle.done and self.said is not None and self.said.done:
            self.handle.done_s = time.perf_counter()
        return self.handle.done


class Ipc:
    """Writes into the peers' device memory; a `Mover`.

    A receiver says where its memory is; the sender opens that allocation once, copies on a stream of the pair's own, and says
    when the copy is complete. The sender pushes because what has to be shared then is what receives: slots that ringsim allocated
    itself, each an allocation of its own, and not arrays that a caller keeps in a pool; and because writes across a bus need no
    answer, as reads do. A completed event on the sender's stream means that the bytes are in the peer's memory.

    What was shared is held until `close`, for to free memory that another process has open is undefined.
    """

    name = "ipc"
    library = "CUDA IPC"
    progress: Progress = "handshake"
    drives: Drives = "sender"
    pinned_nbytes = 0

    def __init__(self, host: Transport, calls: Calls, sharing: Sharing, *, same_device: bool) -> None:
        self._host = host
        self._calls = calls
        self._sharing = sharing
        # between devices copy engines work; within one the driver may take SMs
        self.device_share: float | None = None if same_device else 0.0
        self._sends: list[_Message] = []
        self._receives: list[_Message] = []
        self._told: list[_Message] = []
        self._tracks: dict[int, Track[_Message]] = {}
        self._opened: dict[tuple[int, int], tuple[bytes, DeviceArray]] = {}
        self._kept: dict[int, Any] = {}

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Post a send; it begins when the receiver has said where to."""
        note = expect_note(self._host, READY_WORDS, peer, tag * LANES + READY)
        message = _Message(data, peer, tag, note)
        self._sends.append(message)
        return message.handle

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Say where the message goes. Raises TransportError where that memory cannot be shared."""
        shared = self._sharing.export(data) if data.size else Shared(bytes(HANDLE_NBYTES), 0, 0, 0)
        if shared.keep is not None:
            self._kept[shared.base] = shared.keep
        note = expect_note(self._host, 1, peer, tag * LANES + MOVED)
        message = _Message(data, peer, tag, note)
        words = (data.size, shared.base, shared.offset, shared.extent, *np.frombuffer(shared.handle, np.int64))
        message.said = send_note(self._host, map(int, words), peer, tag * LANES + READY)
        self._receives.append(message)
        return message.handle

    def poll(self) -> None:
        """Begin what is ready, and tell of what is complete. Raises TransportError, DeviceError."""
        self._host.poll()
        self._sends = in_turn(self._sends, self._start)
        for peer, track in self._tracks.items():
            for message in track.finished():
                message.said = send_note(self._host, [message.data.size], peer, message.tag * LANES + MOVED)
                self._told.append(message)
        self._told = [message for message in self._told if not message.finish()]
        self._receives = [message for message in self._receives if not message.finish()]

    def _start(self, message: _Message) -> bool:
        if not message.note.handle.done:
            return False
        size, base, offset, extent = map(int, message.note.words[:4])
        check_sizes(message.data.size, size, self._host.rank, message.peer, message.tag)
        if message.peer not in self._tracks:
            self._tracks[message.peer] = Track(self._calls)
        track = self._tracks[message.peer]
        if size:
            target = self._open(message.peer, base, message.note.words[4:].tobytes(), extent)
            track.copy(target[offset : offset + size], message.data, message)
        else:
            track.mark(message)
        return True

    def _open(self, peer: int, base: int, handle: bytes, extent: int) -> DeviceArray:
        known = self._opened.get((peer, base))
        if known is not None and known[0] == handle:
            return known[1]
        if known is not None:
            # the peer has freed that allocation, and another lies there now
            self._sharing.close(known[1])
        opened = self._sharing.open(handle, extent)
        self._opened[peer, base] = handle, opened
        return opened

    def close(self, *, failed: bool) -> None:
        """Close what was opened; then, when all have, let go of what was shared. Collective unless a run failed."""
        for _, opened in self._opened.values():
            self._sharing.close(opened)
        self._opened.clear()
        if not failed:
            self._host.barrier()
            self._kept.clear()

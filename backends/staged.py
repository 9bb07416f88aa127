"""Device memory through page-locked host memory, in chunks: copied out, sent, received and copied in, all at the same time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ringsim.backends.cuda import Calls, DeviceArray
from ringsim.backends.mover import Note, check_sizes, expect_note, in_turn, send_note
from ringsim.backends.track import Track
from ringsim.errors import RankMismatch, TransportError
from ringsim.transport import Bytes, Handle, Transport

if TYPE_CHECKING:
    from ringsim.topology.parts import Drives, Progress

CHUNK_NBYTES: Final = 4 * 2**20
"""Long enough that a chunk's two messages and two copies cost little to start, short against a hop: the first chunk's copy out
and the last one's copy in hide behind nothing."""
DEPTH: Final = 4
"""A chunk copied out, one on the wire and one copied in at the same time, and one more for the time between two polls."""
OFFER, GRANT, DATA, LANES = 0, 1, 2, 3
"""Each tag of the caller becomes three."""


@dataclass(slots=True, eq=False)
class _Message:
    data: DeviceArray
    peer: int
    tag: int
    chunks: int
    offer: Note | None = None
    handle: Handle = field(default_factory=lambda: Handle(posted_s=time.perf_counter()))
    notes: list[Handle] = field(default_factory=list)
    taken: int = 0
    over: int = 0

    @property
    def lane(self) -> tuple[int, int]:
        return self.peer, self.tag

    def finish(self) -> bool:
        """Mark it done if its chunks and its notes are."""
        if self.over == self.chunks and all(note.done for note in self.notes):
            self.handle.done_s = time.perf_counter()
        return self.handle.done


@dataclass(slots=True, eq=False)
class _Chunk:
    message: _Message
    buffer: Bytes
    """The page-locked memory, whole."""
    begin: int
    end: int
    moved: Handle | None = None

    @property
    def device(self) -> DeviceArray:
        return self.message.data[self.begin : self.end]

    @property
    def host(self) -> Bytes:
        return self.buffer[: self.end - self.begin]


class _Pool:
    """Page-locked chunks, made once."""

    def __init__(self, calls: Calls, depth: int, chunk_nbytes: int) -> None:
        self.chunk_nbytes = chunk_nbytes
        self.free: list[Bytes] = [calls.pinned(chunk_nbytes) for _ in range(depth)]

    def message(self, data: DeviceArray, peer: int, tag: int) -> _Message:
        return _Message(data, peer, tag, -(-data.size // self.chunk_nbytes))

    def take(self, message: _Message) -> _Chunk:
        """The message's next chunk."""
        begin = message.taken * self.chunk_nbytes
        message.taken += 1
        return _Chunk(message, self.free.pop(), begin, min(begin + self.chunk_nbytes, message.data.size))

    def give(self, chunk: _Chunk) -> None:
        """A chunk is through."""
        chunk.message.over += 1
        self.free.append(chunk.buffer)


@dataclass(slots=True, eq=False)
class _Grants:
    """What the receiver has granted to a lane and is not used, what it still has to grant, and its next note."""

    unused: int = 0
    owed: int = 0
    note: Note | None = None


class _Outgoing:
    """Copies chunks out once the receiver has room for them, and sends each when its copy is complete."""

    def __init__(self, host: Transport, calls: Calls, pool: _Pool) -> None:
        self._host = host
        self._pool = pool
        self._track: Track[_Chunk] = Track(calls)
        self._waiting: list[_Message] = []
        self._open: list[_Message] = []
        self._sent: list[_Chunk] = []
        self._grants: dict[tuple[int, int], _Grants] = {}

    def post(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        message = self._pool.message(data, peer, tag)
        message.notes.append(send_note(self._host, [data.size], peer, tag * LANES + OFFER))
        grants = self._grants.setdefault(message.lane, _Grants())
        grants.owed += message.chunks
        self._waiting.append(message)
        self._open.append(message)
        self._expect(grants, message.lane)
        return message.handle

    def _expect(self, grants: _Grants, lane: tuple[int, int]) -> None:
        if grants.note is None and grants.owed:
            grants.note = expect_note(self._host, 1, lane[0], lane[1] * LANES + GRANT)

    def advance(self) -> None:
        still = []
        for chunk in self._sent:
            if chunk.moved is not None and chunk.moved.done:
                self._pool.give(chunk)
            else:
                still.append(chunk)
        self._sent = still
        for chunk in self._track.finished():
            message = chunk.message
            chunk.moved = self._host.isend(chunk.host, message.peer, message.tag * LANES + DATA)
            self._sent.append(chunk)
        self._hear()
        self._waiting = in_turn(self._waiting, self._start)
        self._open = [message for message in self._open if not message.finish()]

    def _hear(self) -> None:
        for lane, grants in list(self._grants.items()):
            if grants.note is not None and grants.note.handle.done:
                granted = int(grants.note.words[0])
                grants.unused, grants.owed, grants.note = grants.unused + granted, grants.owed - granted, None
                self._expect(grants, lane)
            if not grants.unused and not grants.owed:
                del self._grants[lane]

    def _start(self, message: _Message) -> bool:
        """Copy out as many chunks as are granted and find room; whether that was the last."""
        grants = self._grants.get(message.lane)
        while grants is not None and grants.unused and self._pool.free and message.taken < message.chunks:
            grants.unused -= 1
            chunk = self._pool.take(message)
            self._track.copy(chunk.host, chunk.device, chunk)
        return message.taken == message.chunks


class _Incoming:
    """Grants chunks to messages that were offered, receives into them, and copies each in when it has arrived."""

    def __init__(self, host: Transport, calls: Calls, pool: _Pool) -> None:
        self._host = host
        self._pool = pool
        self._track: Track[_Chunk] = Track(calls)
        self._waiting: list[_Message] = []
        self._open: list[_Message] = []
        self._coming: list[_Chunk] = []

    def post(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        message = self._pool.message(data, peer, tag)
        message.offer = expect_note(self._host, 1, peer, tag * LANES + OFFER)
        message.notes.append(message.offer.handle)
        self._waiting.append(message)
        self._open.append(message)
        return message.handle

    def advance(self) -> None:
        still = []
        for chunk in self._coming:
            if chunk.moved is not None and chunk.moved.done:
                self._track.copy(chunk.device, chunk.host, chunk)
            else:
                still.append(chunk)
        self._coming = still
        for chunk in self._track.finished():
            self._pool.give(chunk)
        self._waiting = in_turn(self._waiting, self._grant)
        self._open = [message for message in self._open if not message.finish()]

    def _grant(self, message: _Message) -> bool:
        """Take as many chunks as there are for a message that was offered, and say so; whether that was the last."""
        if message.offer is None or not message.offer.handle.done:
            return False
        check_sizes(int(message.offer.words[0]), message.data.size, message.peer, self._host.rank, message.tag)
        count = min(len(self._pool.free), message.chunks - message.taken)
        for _ in range(count):
            chunk = self._pool.take(message)
            chunk.moved = self._host.irecv(chunk.host, message.peer, message.tag * LANES + DATA)
            self._coming.append(chunk)
        if count:
            message.notes.append(send_note(self._host, [count], message.peer, message.tag * LANES + GRANT))
        return message.taken == message.chunks


class Staged:
    """Moves device memory through two pools of `depth` page-locked chunks, one each way; a `Mover`.

    A sender offers its message; the receiver, once it has posted too, takes chunks, posts receives into them and grants them; the
    sender takes a chunk for each that is granted, copies it out, and sends it.

    It cannot deadlock, in whatever order messages are posted, with one chunk each way. (1) A chunk of the sending pool is taken
    only for one that is granted, whose receive is posted: its copy and its message need nothing more, so it comes back. (2) A
    chunk of the receiving pool is taken only for a message that its sender has posted; that needs a chunk of the sender's pool,
    which comes back by (1); then its message and its copy need nothing more. So chunks always come back, to the oldest message
    that can use them, and a message that only one side has posted holds none.

    Constructing it is collective. Raises RankMismatch where ranks would cut messages differently.
    """

    name = "mpi-staged"
    # each chunk of a message advances when either rank looks
    progress: Progress = "polling"
    drives: Drives = "both"
    # copies between device and page-locked memory are the copy engines'
    device_share: float | None = 0.0

    def __init__(self, host: Transport, calls: Calls, *, chunk_nbytes: int = CHUNK_NBYTES, depth: int = DEPTH) -> None:
        if chunk_nbytes < 1 or depth < 1:
            raise TransportError(f"mpi-staged needs a chunk of a byte or more each way, not {depth} of {chunk_nbytes} B")
        sizes = host.allgather(chunk_nbytes)
        if set(sizes) != {chunk_nbytes}:
            raise RankMismatch(f"mpi-staged cuts messages into chunks of different sizes on the ranks: {sizes} B")
        self.library = host.library
        self.pinned_nbytes = 2 * depth * chunk_nbytes
        self._host = host
        self._outgoing = _Outgoing(host, calls, _Pool(calls, depth, chunk_nbytes))
        self._incoming = _Incoming(host, calls, _Pool(calls, depth, chunk_nbytes))

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Offer a message."""
        return self._outgoing.post(data, peer, tag)

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Expect a message."""
        return self._incoming.post(data, peer, tag)

    def poll(self) -> None:
        """Move every chunk on that can be moved on. Raises TransportError where sizes differ."""
        self._host.poll()
        self._incoming.advance()
        self._outgoing.advance()

    def close(self, *, failed: bool) -> None:
        """The page-locked memory goes with the object."""

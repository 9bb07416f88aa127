"""Device memory between GPUs by NCCL's point-to-point kernels, MPI agreeing on what goes when."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ringsim.backends.cuda import Calls, DeviceArray
from ringsim.backends.cupy_calls import address
from ringsim.backends.mover import Note, check_sizes, expect_note, in_turn, send_note
from ringsim.backends.track import Track
from ringsim.errors import MissingDependency, TransportError
from ringsim.transport import Handle, Transport

if TYPE_CHECKING:
    from ringsim.topology.parts import Drives, Progress

Pair = tuple[int, int]
"""Source and target."""
OFFER, GRANT, LANES = 0, 1, 2
"""Each tag of the caller becomes two; a pair's grants, of all tags, come with that of tag 0."""
FIRST_NBYTES = 8


def load() -> Any:
    """The module cupy.cuda.nccl. Raises MissingDependency."""
    remedy = "pip install nvidia-nccl-cu13 (nvidia-nccl-cu12 for CUDA 12)"
    try:
        with warnings.catch_warnings(record=True):
            # CuPy warns where NCCL is missing; the error below says so
            warnings.simplefilter("always")
            from cupy.cuda import nccl
    except ImportError as error:
        raise MissingDependency(f"NCCL is used through CuPy, which cannot be imported ({error}): {remedy}") from error
    if not nccl.available:
        raise MissingDependency(f"CuPy finds no NCCL library (libnccl.so.2): {remedy}")
    return nccl


def all_pairs(world_size: int) -> tuple[Pair, ...]:
    """Every ordered pair, those of neighbours first."""
    return tuple((rank, (rank + hop) % world_size) for hop in range(1, world_size) for rank in range(world_size))


def refuses(host: Transport, gpu: str) -> str | None:
    """Why NCCL cannot join these ranks, or None if it can; `gpu` is the uuid of this rank's. Collective, the same on all."""
    places = list(zip(host.hosts, host.allgather(gpu), strict=True))
    for rank, place in enumerate(places):
        first = places.index(place)
        if first != rank:
            return f"NCCL wants a GPU for each rank, and ranks {first} and {rank} share one on {place[0]}"
    return None


@dataclass(slots=True, eq=False)
class _Message:
    data: DeviceArray
    peer: int
    tag: int
    offer: Note | None = None
    handle: Handle = field(default_factory=lambda: Handle(posted_s=time.perf_counter()))
    said: Handle | None = None
    """What it told the peer."""
    moved: bool = False

    @property
    def lane(self) -> tuple[int, int]:
        return self.peer, self.tag

    def finish(self) -> bool:
        """Mark it done if it has moved and has told all."""
        if self.moved and self.said is not None and self.said.done:
            self.handle.done_s = time.perf_counter()
        return self.handle.done


class _Wire:
    """A communicator of two, the source its rank 0, and this rank's stream on it. Constructing it waits for the other side."""

    def __init__(self, nccl: Any, calls: Calls, pair: Pair, rank: int, ident: Any) -> None:
        self.pair = pair
        self.track: Track[_Message] = Track(calls)
        self._nccl = nccl
        self._sends = rank == pair[0]
        self._comm = self._checked("ncclCommInitRank", lambda: nccl.NcclCommunicator(2, ident, 0 if self._sends else 1))
        # NCCL connects the two at their first message and lets the host wait for it: here, where both come in turn
        self._first = calls.empty(FIRST_NBYTES)
        self._call(self._first)
        calls.synchronize(calls.record(self.track.stream))

    def move(self, message: _Message) -> None:
        """Queue the kernel that sends or receives a message."""
        self._call(message.data)
        self.track.mark(message)

    def _call(self, data: DeviceArray) -> None:
        name, call, peer = ("ncclSend", self._comm.send, 1) if self._sends else ("ncclRecv", self._comm.recv, 0)
        stream = self.track.stream.ptr
        self._checked(name, lambda: call(address(data), data.size, self._nccl.NCCL_UINT8, peer, stream))

    def check(self) -> None:
        """Raise TransportError if a kernel under way has failed."""
        if len(self.track):
            self._checked("a transfer", self._comm.check_async_error)

    def _checked(self, what: str, call: Any) -> Any:
        try:
            return call()
        except RuntimeError as error:
            source, target = self.pair
            raise TransportError(f"NCCL, {source} -> {target}: {what} failed: {error}; NCCL_DEBUG=INFO says more") from error

    def close(self, *, failed: bool) -> None:
        """Destroy it; after a failure its kernels may wait for ever, so then abort them."""
        self._checked("closing", self._comm.abort if failed else self._comm.destroy)


class Nccl:
    """Moves device memory by NCCL, one message each way at a time; a `Mover`.

    A sender offers its message; the receiver, once it has posted too and receives nothing else, launches its kernel and grants
    the message; the sender launches its own when it sees the grant and sends nothing else.

    It cannot deadlock. NCCL's kernels wait on the device for their peer's: each `pair` of ranks has a communicator and a stream,
    so none waits behind another's, and at most two kernels of a rank wait at a time, which find room beside kernels that end.
    (1) A sending kernel is launched when the receiver's has been: both end. (2) A receiving kernel is launched when the sender
    has posted; the sender sees the grant, and what it was granted before ends by (1). A pair's kernels are launched in the order
    of its grants on both sides, whatever their tags. Communicators are made, and connected, in the order of `pairs`, which all
    ranks share: both ranks of the first that is not made come to it.

    Constructing it is collective and waits for the peers without limit. `pairs` are those that talk, all by default: each costs
    device memory and time to make. Raises TransportError.
    """

    name = "nccl"
    progress: Progress = "handshake"
    drives: Drives = "both"
    # its kernels take SMs, how many NCCL decides: calibration tells
    device_share: float | None = None
    pinned_nbytes = 0

    def __init__(self, host: Transport, calls: Calls, nccl: Any, pairs: Iterable[Pair] | None = None) -> None:
        self._host = host
        version = nccl.get_version()
        self.library = f"NCCL {version // 10000}.{version // 100 % 100}.{version % 100}"
        chosen = tuple(all_pairs(host.world_size) if pairs is None else dict.fromkeys(pairs))
        mine = {pair: nccl.get_unique_id() for pair in chosen if pair[0] == host.rank}
        said = host.allgather((chosen, mine))
        if any(other != chosen for other, _ in said):
            raise TransportError("the ranks name different pairs for NCCL's communicators: give the same, in the same order")
        self._wires = {pair: _Wire(nccl, calls, pair, host.rank, said[pair[0]][1][pair]) for pair in chosen if host.rank in pair}
        self._offered: list[_Message] = []
        self._grants: dict[int, Note] = {}
        self._granted: deque[_Message] = deque()
        self._sending: _Message | None = None
        self._expected: list[_Message] = []
        self._receiving: _Message | None = None
        self._open: list[_Message] = []

    def _wire(self, source: int, target: int) -> _Wire:
        wire = self._wires.get((source, target))
        if wire is None:
            raise TransportError(f"no NCCL communicator for rank {source} -> {target}: name this pair when it is made")
        return wire

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Offer a message. Raises TransportError for a pair that has no communicator."""
        self._wire(self._host.rank, peer)
        message = _Message(data, peer, tag, said=send_note(self._host, [data.size], peer, tag * LANES + OFFER))
        self._offered.append(message)
        self._open.append(message)
        self._expect(peer)
        return message.handle

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Expect a message. Raises TransportError for a pair that has no communicator."""
        self._wire(peer, self._host.rank)
        message = _Message(data, peer, tag, offer=expect_note(self._host, 1, peer, tag * LANES + OFFER))
        self._expected.append(message)
        self._open.append(message)
        return message.handle

    def poll(self) -> None:
        """Launch what both sides are ready for, and mark what has moved. Raises TransportError, DeviceError."""
        self._host.poll()
        for wire in self._wires.values():
            wire.check()
            for message in wire.track.finished():
                message.moved = True
        self._open = [message for message in self._open if not message.finish()]
        if self._receiving is not None and self._receiving.moved:
            self._receiving = None
        self._expected = in_turn(self._expected, self._grant)
        if self._sending is not None and self._sending.moved:
            self._sending = None
        for peer, note in list(self._grants.items()):
            if note.handle.done:
                self._hear(peer, int(note.words[0]))
        if self._sending is None and self._granted:
            self._sending = self._granted.popleft()
            self._wire(self._host.rank, self._sending.peer).move(self._sending)

    def _expect(self, peer: int) -> None:
        """Expect the peer's next grant while anything offered to it is not granted."""
        if peer not in self._grants and any(message.peer == peer for message in self._offered):
            self._grants[peer] = expect_note(self._host, 1, peer, GRANT)

    def _hear(self, peer: int, tag: int) -> None:
        message = next(message for message in self._offered if message.lane == (peer, tag))
        self._offered.remove(message)
        self._granted.append(message)
        del self._grants[peer]
        self._expect(peer)

    def _grant(self, message: _Message) -> bool:
        """Launch the receiving kernel and tell the sender, if nothing else is received; whether it was."""
        if self._receiving is not None or message.offer is None or not message.offer.handle.done:
            return False
        check_sizes(int(message.offer.words[0]), message.data.size, message.peer, self._host.rank, message.tag)
        self._receiving = message
        self._wire(message.peer, self._host.rank).move(message)
        message.said = send_note(self._host, [message.tag], message.peer, GRANT)
        return True

    def close(self, *, failed: bool) -> None:
        """Destroy the communicators, in the order of the pairs."""
        for wire in self._wires.values():
            wire.close(failed=failed)
        self._wires.clear()

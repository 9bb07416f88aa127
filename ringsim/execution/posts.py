"""One rank's posts, from their op to their completion: held while the device still works on their bytes, then made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from ..schedule import Recv, Send
from ..timeline import Event
from ..transport import Handle, Transport
from .memory import Memory


class Launched(Protocol):
    """Work that a backend has given to its device."""

    @property
    def done(self) -> bool:
        """Whether the device has come to its end; asks without waiting. Raises DeviceError."""

    def span_s(self) -> tuple[float, float] | None:
        """When it began and ended, on the host's clock; None if the device had nothing to do for it. Waits for its end."""


class _Held(NamedTuple):
    op: Send | Recv
    gate: Launched | None

    @property
    def channel(self) -> tuple[bool, int, int]:
        """Messages of one channel match in their order."""
        return isinstance(self.op, Send), self.op.peer, self.op.tag


class Posts:
    """Sends and receives that are not yet waited for."""

    def __init__(self, transport: Transport, memory: Memory) -> None:
        self._transport = transport
        self._memory = memory
        self._made: dict[int, tuple[Send | Recv, Handle]] = {}
        self._held: list[_Held] = []

    def __bool__(self) -> bool:
        return bool(self._made or self._held)

    @property
    def held(self) -> bool:
        """Whether some wait for the device."""
        return bool(self._held)

    def add(self, op: Send | Recv, gate: Launched | None) -> None:
        """Post `op`, or hold it until `gate` is done and what was held before it on its channel has been posted."""
        held = _Held(op, gate)
        if (gate is None or gate.done) and all(other.channel != held.channel for other in self._held):
            self._post(op)
        else:
            self._held.append(held)

    def advance(self) -> None:
        """Post what need be held no longer, and let transfers advance."""
        if self._held:
            self._release()
        self._transport.poll()

    def _release(self) -> None:
        waiting: list[_Held] = []
        for held in self._held:
            behind = any(other.channel == held.channel for other in waiting)
            if behind or not (held.gate is None or held.gate.done):
                waiting.append(held)
            else:
                self._post(held.op)
        self._held = waiting

    def _post(self, op: Send | Recv) -> None:
        data = self._memory.bytes(op.region)
        post = self._transport.isend if isinstance(op, Send) else self._transport.irecv
        self._made[op.id] = op, post(data, op.peer, op.tag)

    def missing(self, ids: Iterable[int]) -> tuple[Send | Recv, ...]:
        """Those of the posts that are not complete."""
        held = {one.op.id: one.op for one in self._held}
        return tuple(
            held[ident] if ident in held else self._made[ident][0]
            for ident in ids
            if ident in held or not self._made[ident][1].done
        )

    def take(self, ident: int) -> Event:
        """Forget a complete post; the event that it was, from its post to its observed completion."""
        op, handle = self._made.pop(ident)
        return Event(
            rank=self._transport.rank,
            op=op.id,
            kind="send" if isinstance(op, Send) else "recv",
            step=op.step,
            phase=op.phase,
            start_s=handle.posted_s,
            end_s=handle.done_s or handle.posted_s,
            nbytes=op.region.nbytes,
            peer=op.peer,
            tag=op.tag,
        )

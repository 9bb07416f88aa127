"""What the executor asks of a transport: post, poll, and a small control plane. MPI and loopback implement it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Handle:
    """A posted send or receive; `done_s` is the time at which its completion was observed."""

    posted_s: float
    done_s: float | None = None

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return self.done_s is not None


class Transport(Protocol):
    """One rank's end of a group. All calls come from one thread.

    `failure` says what ended an earlier run half-way, if anything did: messages of that run may still be on their way, so
    no other run may follow on this transport.
    """

    failure: str | None
    library: str
    """The library that moves messages."""
    hosts: list[str]
    """Each rank's host."""

    @property
    def name(self) -> str:
        """``mpi`` or ``loopback``."""

    @property
    def rank(self) -> int:
        """This rank in the group."""

    @property
    def world_size(self) -> int:
        """Ranks in the group."""

    def isend(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a send of `data`, which must not change until it is done."""

    def irecv(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a receive into `data`; matches sends of the peer with this tag in order."""

    def poll(self) -> None:
        """Let transfers advance and mark those that are complete."""

    def idle(self, attempt: int) -> None:
        """Give way to others while a wait has found nothing `attempt` times."""

    def allgather(self, value: Any) -> list[Any]:
        """Each rank's `value`, on every rank; for control, not for data. Raises PeerTimeout."""

    def close(self) -> None:
        """Give back what the transport holds; collective."""

    def barrier(self) -> None:
        """Return when every rank has come. Raises PeerTimeout."""

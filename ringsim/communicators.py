"""From a communicator to a transport, and back to the communicator's owner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import RankMismatch, RingsimError, TransportError
from .transport import Transport


def transport_of(comm: Any, timeout_s: float = 300.0) -> Transport:
    """The transport of a communicator; a Transport is returned as it is, None is a world of one."""
    if comm is None:
        from ringsim.backends.loopback import World

        return World(1).endpoint(0)
    if hasattr(comm, "irecv") and hasattr(comm, "poll"):
        found: Transport = comm
        return found
    from ringsim.backends.mpi import MpiTransport

    return MpiTransport(comm, timeout_s=timeout_s)


@contextmanager
def closing(transport: Transport, comm: Any) -> Iterator[None]:
    """Free a duplicated communicator at the end, and after errors that all ranks raise: freeing is collective."""
    try:
        yield
    except RingsimError as error:
        if isinstance(error, RankMismatch) or not isinstance(error, TransportError):
            close(transport, comm)
        raise
    close(transport, comm)


def close(transport: Transport, comm: Any = None) -> None:
    """Free what `transport_of` made of `comm`; a transport that was given is its owner's."""
    if transport is not comm:
        transport.close()

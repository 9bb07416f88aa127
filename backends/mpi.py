"""The MPI transport, on mpi4py: every wait polls, so that it can time out and signals are seen."""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ringsim.backends.cpu import available_cores, yield_core
from ringsim.errors import CollectiveTimeout, MissingDependency, PeerFailed, RankMismatch, TransportError
from ringsim.transport import Bytes, Handle

_ABANDONED: list[tuple[Any, tuple[Any, ...]]] = []
"""Requests that did not complete, with their buffers: MPI may still write into these."""

SPIN_ATTEMPTS = 50
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 50e-6, 500e-6


def load() -> Any:
    """The module mpi4py.MPI; importing it initialises MPI. Raises MissingDependency."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        # a RuntimeError says that mpi4py is here and finds no MPI library
        remedy = "pip install 'ringsim[mpi]' beside your own MPI, or 'ringsim[mpich]' to bring one"
        raise MissingDependency(f"mpi4py cannot be imported ({error}): {remedy}") from error
    return MPI


def launcher_world_size() -> int:
    """The number of ranks that a launcher announced to this process in its environment; 1 without one."""
    names = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS")
    return max((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default=1)


def check_launcher(world_size: int) -> None:
    """Raise RankMismatch where a launcher of one MPI started ranks with the library of another, each a world of one."""
    announced = launcher_world_size()
    if world_size == 1 and announced > 1:
        library = load().Get_library_version().split("\n")[0]
        raise RankMismatch(
            f"the launcher started {announced} ranks but MPI sees a world of 1: the launcher is not that of the library "
            f"in use ({library}); start with the mpiexec of the same MPI, or set MPI4PY_LIBMPI"
        )


class MpiTransport:
    """Non-blocking sends and receives on a duplicate of `comm`; the duplicate is freed by `close`.

    Waits spin while the host has a core for every rank and otherwise sleep: a waiting rank that spins takes its core from
    one that computes. `timeout_s` bounds every wait of the control plane.
    """

    name = "mpi"

    def __init__(self, comm: Any, *, timeout_s: float = 300.0) -> None:
        self._mpi = load()
        check_launcher(self._mpi.COMM_WORLD.Get_size())
        self.rank: int = comm.Get_rank()
        self.world_size: int = comm.Get_size()
        self.timeout_s = timeout_s
        self.failure: str | None = None
        self._in_step = True
        self.oversubscribed = False
        self._comm, duplicated = comm.Idup()
        self._finish(duplicated, "duplication of the communicator", ())
        self.library: str = " ".join(self._mpi.Get_library_version().split("\n")[0].strip("\x00 ").split())
        self._requests: list[Any] = []
        self._handles: list[Handle] = []
        self._peers: list[int] = []
        self.hosts: list[str] = self.allgather(socket.gethostname())
        self.oversubscribed = self.hosts.count(self.hosts[self.rank]) > available_cores()

    def isend(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a send (MPI_Isend of bytes)."""
        return self._post(self._comm.Isend([data, self._mpi.BYTE], peer, tag), peer)

    def irecv(self, data: Bytes, peer: int, tag: int) -> Handle:
        """Post a receive (MPI_Irecv of bytes)."""
        return self._post(self._comm.Irecv([data, self._mpi.BYTE], peer, tag), peer)

    def _post(self, request: Any, peer: int) -> Handle:
        handle = Handle(posted_s=time.perf_counter())
        self._requests.append(request)
        self._peers.append(peer)
        self._handles.append(handle)
        return handle

    def poll(self) -> None:
        """MPI_Testsome over all that is outstanding."""
        if not self._requests:
            return
        try:
            done = self._mpi.Request.Testsome(self._requests)
        except self._mpi.Exception as error:
            raise PeerFailed(
                f"rank {self.rank}: a message to or from rank {self._culprit()} failed; was that rank killed?"
            ) from error
        if done:
            now = time.perf_counter()
            for index in done:
                self._handles[index].done_s = now
            finished = set(done)
            self._requests = [request for index, request in enumerate(self._requests) if index not in finished]
            self._handles = [handle for index, handle in enumerate(self._handles) if index not in finished]
            self._peers = [peer for index, peer in enumerate(self._peers) if index not in finished]

    def _culprit(self) -> str:
        """The peer whose request fails alone; all that are waited for if none does."""
        for request, peer in zip(self._requests, self._peers, strict=True):
            try:
                request.Test()
            except self._mpi.Exception:
                return str(peer)
        return " or ".join(map(str, sorted(set(self._peers))))

    def idle(self, attempt: int) -> None:
        """Yield the core at first; on an oversubscribed host sleep, longer by and by."""
        if not self.oversubscribed or attempt < SPIN_ATTEMPTS:
            yield_core()
        else:
            time.sleep(min(SHORTEST_SLEEP_S * (attempt // SPIN_ATTEMPTS), LONGEST_SLEEP_S))

    def allgather(self, value: Any) -> list[Any]:
        """Each rank's picklable value on every rank."""
        self._check_in_step()
        mine = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        size, sizes = np.array([mine.size], dtype=np.int64), np.empty(self.world_size, dtype=np.int64)
        self._finish(self._comm.Iallgather(size, sizes), "allgather of sizes", (size, sizes))
        offsets = np.concatenate(([0], np.cumsum(sizes)))
        data = np.empty(int(offsets[-1]), dtype=np.uint8)
        target = [data, sizes.tolist(), offsets[:-1].tolist(), self._mpi.BYTE]
        self._finish(self._comm.Iallgatherv([mine, self._mpi.BYTE], target), "allgather", (mine, data))
        return [pickle.loads(data[offsets[r] : offsets[r + 1]].tobytes()) for r in range(self.world_size)]

    def barrier(self) -> None:
        """MPI_Ibarrier, polled."""
        self._check_in_step()
        self._finish(self._comm.Ibarrier(), "barrier", ())

    def _check_in_step(self) -> None:
        """After a collective that did not complete, the next would meet the peers' last."""
        if not self._in_step:
            raise TransportError(f"rank {self.rank}: an earlier collective failed ({self.failure}): make a new plan")

    def _finish(self, request: Any, what: str, buffers: tuple[Any, ...]) -> None:
        """Poll a collective to its end; what it reads and writes outlives it if that does not come."""
        try:
            self._poll_until_done(request, what)
        except self._mpi.Exception as error:
            self.failure, self._in_step = self.failure or str(error), False
            raise PeerFailed(f"rank {self.rank}: {what} of {self.world_size} ranks failed; was a rank killed?") from error
        except BaseException as error:
            _ABANDONED.append((request, buffers))
            self.failure, self._in_step = self.failure or str(error), False
            raise

    def _poll_until_done(self, request: Any, what: str) -> None:
        test: Callable[[], bool] = request.Test
        limit, attempt = time.perf_counter() + self.timeout_s, 0
        while not test():
            if time.perf_counter() > limit:
                message = f"rank {self.rank}: {what} of {self.world_size} ranks not complete after {self.timeout_s:g} s"
                raise CollectiveTimeout(message)
            self.idle(attempt)
            attempt += 1

    def close(self) -> None:
        """Free the duplicated communicator; collective."""
        self._comm.Free()

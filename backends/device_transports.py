"""Which transport moves device memory: the best that these ranks, their MPI and their GPUs allow, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ringsim.backends import cuda_aware, ipc, nccl
from ringsim.backends.cuda import Calls
from ringsim.backends.ipc import Ipc, Sharing
from ringsim.backends.mover import DeviceTransport, DirectMpi, Mover
from ringsim.backends.nccl import Nccl, Pair
from ringsim.backends.proof import TIMEOUT_S, Proof, prove
from ringsim.backends.staged import Staged
from ringsim.errors import RankMismatch, RingsimError, TransportError
from ringsim.transport import Transport

KINDS: Final = ("mpi", "ipc", "nccl", "mpi-staged")
"""In the order of preference: whatever moves device memory as it lies; MPI before others, for it reaches every rank."""


class Refused(NamedTuple):
    """A transport that cannot be had, and why."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The transport; a sentence that says which it is and why; and those preferred to it that were refused."""

    transport: DeviceTransport
    reason: str
    tried: tuple[Refused, ...] = ()


def _cuda_sharing() -> Sharing:
    from ringsim.backends.cuda_sharing import CudaSharing

    return CudaSharing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """Where the transports' libraries come from; tests have others."""

    claims: Callable[[str], cuda_aware.Claims] = cuda_aware.claims
    sharing: Callable[[], Sharing] = _cuda_sharing
    nccl: Callable[[], Any] = nccl.load


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What is known of the ranks, the same on all."""

    host: Transport
    calls: Calls
    gpus: tuple[str, ...]
    means: Means
    pairs: tuple[Pair, ...] | None
    timeout_s: float

    @property
    def same_device(self) -> bool:
        return len(set(zip(self.host.hosts, self.gpus, strict=True))) < len(self.gpus)


def choose(
    kind: str,
    host: Transport,
    calls: Calls,
    facts: Mapping[str, Any],
    *,
    means: Means | None = None,
    pairs: Iterable[Pair] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Chosen:
    """The transport for device memory over `host`: that of this `kind`, or of ``auto`` the first that all ranks can have.

    `facts` of this rank's GPU: its `uuid`. `pairs` are the ranks that talk, all by default; NCCL makes a communicator for each.
    Collective, and the same on all ranks. What is chosen has moved patterns between neighbours before it is returned. Raises
    TransportError where a kind that was asked for is refused, and where one that can be had, or an MPI's claim, fails its proof.
    """
    if kind != "auto" and kind not in KINDS:
        raise TransportError(f"transport is {kind!r}; for device memory there are auto, {', '.join(KINDS)}")
    said = host.allgather((kind, facts["uuid"]))
    if {asked for asked, _ in said} != {kind}:
        raise RankMismatch(f"the ranks ask for different transports: {[asked for asked, _ in said]}")
    gpus = tuple(uuid for _, uuid in said)
    wanted = None if pairs is None else tuple(pairs)
    place = _Place(host=host, calls=calls, gpus=gpus, means=means or Means(), pairs=wanted, timeout_s=timeout_s)
    tried: list[Refused] = []
    for name in KINDS if kind == "auto" else (kind,):
        found = _TRY[name](place, kind == name)
        if not isinstance(found, str):
            return Chosen(transport=found[0], reason=f"transport {name}: {found[1]}", tried=tuple(tried))
        tried.append(Refused(name, found))
    raise TransportError(f"transport {tried[-1].name} cannot be had: {tried[-1].why}")


Found = tuple[DeviceTransport, str] | str
"""A transport and why it was taken, or why it was refused."""


def _mpi(place: _Place, insisted: bool) -> Found:
    host = place.host
    if host.name != "mpi":
        return f"the ranks are joined by {host.name}, not by MPI"
    said, fault = _on_all(host, lambda: place.means.claims(host.library))
    if fault is not None:
        return fault
    claimed = host.allgather(said.claimed)
    if not all(claimed) and not insisted:
        return f"{said.library} does not claim CUDA support on rank {claimed.index(False)} ({said.evidence}); {said.remedy}"
    transport = DeviceTransport(host, DirectMpi(host))
    cuda_aware.prove_claims(transport, place.calls, said, timeout_s=place.timeout_s)
    claim = "claims CUDA support" if all(claimed) else "was insisted on, though it does not claim CUDA support on every rank"
    return transport, f"{said.library} {claim} and moved patterns between the devices of neighbouring ranks"


def _ipc(place: _Place, insisted: bool) -> Found:
    why = ipc.refuses(place.host, place.calls, place.means.sharing)
    if why is not None:
        return why
    made = _made(place, lambda: Ipc(place.host, place.calls, place.means.sharing(), same_device=place.same_device))
    where = "share a GPU" if place.same_device else "are on one host"
    return _proven(place, made), f"ranks {where} and may open one another's device memory"


def _nccl(place: _Place, insisted: bool) -> Found:
    why = nccl.refuses(place.host, place.gpus[place.host.rank])
    if why is not None:
        return why
    module, fault = _on_all(place.host, place.means.nccl)
    if fault is not None:
        return fault
    made = _made(place, lambda: Nccl(place.host, place.calls, module, place.pairs))
    return _proven(place, made), f"every rank has a GPU of its own, and {made.library} joins them"


def _staged(place: _Place, insisted: bool) -> Found:
    made = _made(place, lambda: Staged(place.host, place.calls))
    chunks = f"through {made.pinned_nbytes >> 20} MiB of page-locked host memory per rank"
    return _proven(place, made), f"messages go {chunks}, which any MPI can send"


_TRY: Final[dict[str, Callable[[_Place, bool], Found]]] = {"mpi": _mpi, "ipc": _ipc, "nccl": _nccl, "mpi-staged": _staged}


def _on_all(host: Transport, step: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a step gives here, and why it failed on the first rank where it did; collective."""
    made, fault = None, None
    try:
        made = step()
    except RingsimError as error:
        fault = str(error)
    faults = host.allgather(fault)
    return made, next((f"rank {rank}: {said}" for rank, said in enumerate(faults) if said is not None), None)


def _made(place: _Place, make: Callable[[], Mover]) -> DeviceTransport:
    """The transport of a mover that was made on every rank. Raises TransportError on every rank if one cannot make it."""
    mover, fault = _on_all(place.host, make)
    if fault is not None:
        raise TransportError(fault)
    return DeviceTransport(place.host, mover)


def _proven(place: _Place, transport: DeviceTransport) -> DeviceTransport:
    """The transport once it has moved patterns. Raises TransportError on every rank if it does not."""
    found = prove(transport, place.calls, timeout_s=place.timeout_s)
    if not isinstance(found, Proof):
        raise TransportError(f"transport {transport.name} does not move device memory as it should: {found}; use another")
    return transport

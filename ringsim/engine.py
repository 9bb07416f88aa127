"""What runs a plan: the backend that computes, and the transport that moves messages between the memories it computes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from . import agreement
from .communicators import close
from .errors import DeviceError, RingsimError, TransportError
from .execution import Backend
from .transport import Transport

BACKENDS: Final = ("numpy", "cupy")
TRANSPORTS: Final = ("auto", "mpi", "mpi-staged", "ipc", "nccl")
"""Ways for messages between devices; host memory goes through MPI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One rank's backend and transport; `said` is the sentence that names the transport and why it was chosen.

    `facts` are what a measurement depends on: of a device its name and place, driver and libraries.
    """

    backend: Backend
    transport: Transport
    control: Transport
    said: str
    facts: dict[str, Any] = field(default_factory=dict)

    def release(self) -> None:
        """Free what moves messages between devices; collective."""
        if self.transport is not self.control:
            self.transport.close()

    def close(self) -> None:
        """The same, and free the communicator below; collective."""
        self.release()
        close(self.control)


def engine_of(
    control: Transport,
    *,
    backend: str | Backend = "numpy",
    transport: str = "auto",
    threads: int | None = None,
    peers: Callable[[], Iterable[int]] | None = None,
) -> Engine:
    """The engine on the ranks of `control`, which moves host memory; collective, chosen alike on all ranks.

    `peers` gives the ranks that this one sends to, by default all: NCCL makes a communicator for each. A backend that was made
    before is taken as it is, with `control` to move its memory. Raises on every rank if any rank cannot have it:
    MissingDependency or DeviceError there, RankMismatch elsewhere and where ranks ask for different ones.
    """
    if not isinstance(backend, str):
        return Engine(backend=backend, transport=control, control=control, said=f"transport {control.name}: as given")
    agreement.same_settings(control, {"backend": backend, "transport": transport})
    if backend not in BACKENDS:
        raise DeviceError(f"backend is {backend!r}; there are {', '.join(BACKENDS)}")
    if transport not in TRANSPORTS:
        raise TransportError(f"transport is {transport!r}; there are {', '.join(TRANSPORTS)}")
    if backend == "numpy":
        if transport not in ("auto", control.name):
            raise TransportError(f"transport {transport!r} moves device memory; backend 'numpy' has none: use auto or mpi")
        return _on_host(control, threads)
    return _on_device(control, transport, threads, peers)


def _on_host(control: Transport, threads: int | None) -> Engine:
    from ringsim.backends.cpu import available_cores
    from ringsim.backends.numpy import NumpyBackend

    if threads is None:
        threads = max(1, available_cores() // control.hosts.count(control.hosts[control.rank]))
    made = _on_every_rank(control, lambda: NumpyBackend(threads=threads))
    facts = {"threads": threads}
    return Engine(
        backend=made, transport=control, control=control, said=f"transport {control.name}: it moves host memory", facts=facts
    )


def _on_device(control: Transport, transport: str, threads: int | None, peers: Callable[[], Iterable[int]] | None) -> Engine:
    from ringsim.backends.cuda_devices import device_of, tiles_on
    from ringsim.backends.cupy import CupyBackend
    from ringsim.backends.cupy_calls import CupyCalls
    from ringsim.backends.device_transports import choose

    _on_every_rank(control, lambda: _check_threads(threads))
    calls = _on_every_rank(control, lambda: CupyCalls(device_of(control)))
    made = _on_every_rank(control, lambda: CupyBackend(calls, tiles_on(calls)))
    facts = _on_every_rank(control, calls.facts) | {"fused": [one.name for one in made.tiles]}
    gpus = list(zip(control.hosts, control.allgather(facts["uuid"]), strict=True))
    facts["ranks_on_device"] = gpus.count(gpus[control.rank])
    if control.world_size == 1:
        return Engine(backend=made, transport=control, control=control, said="transport none: one rank", facts=facts)
    sent = control.allgather(range(control.world_size) if peers is None else sorted(set(peers())))
    pairs = [(source, target) for source, targets in enumerate(sent) for target in targets if source != target]
    chosen = choose(transport, control, calls, facts, pairs=pairs)
    most = max(gpus.count(gpu) for gpu in gpus)
    facts["transports_refused"] = {refused.name: refused.why for refused in chosen.tried}
    said = chosen.reason + (f"; up to {most} ranks share a GPU, and its time" if most > 1 else "")
    return Engine(backend=made, transport=chosen.transport, control=control, said=said, facts=facts)


def _check_threads(threads: int | None) -> None:
    if threads is not None:
        raise DeviceError(f"threads is {threads}; backend 'cupy' computes on a GPU, and has none to give: leave it out")


def _on_every_rank(control: Transport, make: Callable[[], Any]) -> Any:
    """What `make` returns, once it has on every rank. Raises its error where it fails, RankMismatch elsewhere."""
    made, failure = None, None
    try:
        made = make()
    except RingsimError as error:
        failure = error
    said = control.allgather(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    agreement.raise_if_any(said)
    return made

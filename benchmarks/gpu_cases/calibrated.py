"""Calibration of a card whose ranks are threads of this process, joined by a link within it: for where there is no MPI."""

from __future__ import annotations

from typing import Any

from ringsim.backends.cuda import DeviceArray
from ringsim.backends.cupy import CupyBackend
from ringsim.backends.device_link import DeviceLink
from ringsim.backends.mover import DeviceTransport
from ringsim.errors import RingsimError
from ringsim.transport import Handle, Transport

from .bench import Bench


class Linked:
    """A `Mover`: the loopback transport itself, whose link copies within the card."""

    name = "device-link"
    library = "none"
    progress = DeviceLink.progress
    drives = DeviceLink.drives
    device_share = DeviceLink.device_share
    pinned_nbytes = 0

    def __init__(self, host: Transport) -> None:
        self._host = host

    def isend(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Of device memory."""
        return self._host.isend(data, peer, tag)

    def irecv(self, data: DeviceArray, peer: int, tag: int) -> Handle:
        """Into device memory."""
        return self._host.irecv(data, peer, tag)

    def poll(self) -> None:
        """Let the link advance."""
        self._host.poll()

    def close(self, *, failed: bool) -> None:
        """Nothing is held."""


def calibrate_in_process(bench: Bench, ranks: int, dtype: str, head_dim: int) -> str:
    """The topology of so many ranks on the card, as YAML. Raises what calibration raises."""
    from ringsim.backends.cupy_calls import CupyCalls
    from ringsim.backends.loopback import spawn
    from ringsim.calibration import Kernel, to_yaml
    from ringsim.device_calibration import Subject, measure_devices
    from ringsim.device_topology import describe

    if "topology" in bench.found:
        return str(bench.found["topology"])
    kernels = [Kernel(dtype=dtype, head_dim=head_dim)]
    facts = bench.card.facts()

    def on_rank(end: Any) -> Any:
        transport = DeviceTransport(end, Linked(end))
        calls = CupyCalls(0)
        subject = Subject(
            transport=transport,
            make_backend=lambda: CupyBackend(calls, bench.card.tiles(calls)),
            facts=facts,
            matmul=_products(),
        )
        found = measure_devices(subject, kernels)
        said = "ranks of one process, whose messages are copied within the card"
        return describe(found, transport, kernels, facts, said) if end.rank == 0 else None

    return to_yaml(spawn(ranks, on_rank, link=DeviceLink(CupyCalls(0)))[0])


def _products() -> Any:
    """Matrix products, or None where cuBLAS cannot be loaded."""
    from ringsim.backends.cuda_matmul import matmul_by_cublas

    try:
        return matmul_by_cublas()
    except RingsimError:
        return None

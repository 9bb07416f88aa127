"""What ringsim would use here, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..transport import Transport
from . import answers, cuda, flavours, gpu
from .system import System


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Backend, transport and threads of each rank without any option, and what `--backend cupy` would do."""

    backend: str
    transport: str
    threads: int
    why: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"why": list(self.why)}


def choose(system: System, transport: Transport, *, sharing: int, tried: str = "") -> Choice:
    """The defaults, and what they leave: `sharing` ranks have this one's processors; `tried` is what came of the GPU backend."""
    mine = system.affinity()
    why = [
        f"backend: --backend is numpy by default; {f'with --backend cupy: {tried}' if tried else _cupy(system)}",
        _transport(transport),
    ]
    if mine is None:
        why.append("threads: --threads is 1 by default")
    else:
        share = max(1, len(mine) // sharing)
        left = f"; --threads {share} would use the {len(mine)} processors of {_whose(sharing)}" if share > 1 else ""
        why.append(f"threads: --threads is 1 by default{left}")
    return Choice(backend="numpy", transport=transport.name, threads=1, why=tuple(why))


def _whose(sharing: int) -> str:
    return "rank 0" if sharing == 1 else f"{sharing} ranks together"


def _cupy(system: System) -> str:
    """Whether the other backend could run."""
    seen = gpu.see(system)
    if not seen.gpus:
        return "--backend cupy needs an NVIDIA GPU, and none is seen"
    facts = answers.read(system.ask("cuda_library"))
    if "error" in facts:
        return f"--backend cupy needs CuPy: {cuda.extra(seen)}"
    if not facts.get("devices"):
        return "--backend cupy needs a GPU that CuPy sees: see above"
    return "--backend cupy finds what it needs; `mpiexec -n 2 ringsim doctor` tries its transports"


def _transport(transport: Transport) -> str:
    if transport.name == "loopback":
        return "transport: one process without a launcher keeps its messages to itself"
    library = flavours.of_library(transport.library) or transport.library
    return f"transport: a launcher started {transport.world_size} ranks of {library}"

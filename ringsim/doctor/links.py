"""The links between GPUs: the matrix of nvidia-smi, and peer access as CUDA grants it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

from ..errors import TopologyError
from ..importing.nvidia_smi import Matrix, matrix
from . import answers
from .finding import Finding
from .gpu import see
from .system import System


def look(system: System) -> list[Finding]:
    """How GPUs reach each other; nothing where there are fewer than two."""
    path = system.which("nvidia-smi")
    if path is None or len(see(system).gpus) < 2:
        return []
    return [_matrix(system, path), *_peers(answers.read(system.ask("cuda_library")))]


def _matrix(system: System, path: str) -> Finding:
    ran = system.run(path, "topo", "-m")
    remedy = f"run `{path} topo -m` by hand; containers and virtual machines may hide the PCIe tree"
    if not ran.good:
        return Finding(subject="gpu", name="links", fact=f"nvidia-smi topo -m: {ran.said}", status="note", remedy=remedy)
    try:
        found = matrix(ran.stdout, "nvidia-smi topo -m")
    except TopologyError as error:
        return Finding(subject="gpu", name="links", fact=str(error), status="note", remedy=remedy)
    return Finding(subject="gpu", name="links", fact=_between(found), differing="note", details={"matrix": ran.stdout})


def _between(found: Matrix) -> str:
    kinds = Counter(found.cells[pair] for pair in combinations(found.gpus, 2))
    if len(kinds) == 1:
        return f"{next(iter(kinds))} between all {len(found.gpus)} GPUs"
    return ", ".join(f"{kind} between {count} pairs" for kind, count in kinds.items())


def _peers(facts: dict[str, Any]) -> list[Finding]:
    """Whether each GPU may read each other's memory; nothing where CuPy could not say."""
    table = facts.get("peers")
    if not isinstance(table, list) or len(table) < 2:
        return []
    without = [f"{one}-{other}" for one, row in enumerate(table) for other, may in enumerate(row) if one < other and not may]
    if not without:
        return [
            Finding(subject="gpu", name="peer access", fact=f"between all {len(table)} GPUs that CUDA sees", differing="note")
        ]
    fact = f"not between GPUs {', '.join(without)}: copies between them go through the host"
    remedy = (
        "on bare metal switch off IOMMU and PCIe ACS, as NCCL's guide to troubleshooting says; across sockets it may not exist"
    )
    return [Finding(subject="gpu", name="peer access", fact=fact, status="note", remedy=remedy)]

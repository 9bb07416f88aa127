"""Whether MPI takes device memory: what it claims. The trial proves it."""

from __future__ import annotations

from ..transport import Transport
from . import gpu
from .finding import Finding
from .system import System


def look(system: System, transport: Transport) -> list[Finding]:
    """The claim of the MPI in this process, and what in the environment speaks against it; it matters where there are GPUs."""
    gpus = bool(gpu.see(system).gpus)
    if transport.name != "mpi":
        fact = "not asked: MPI is not in use; `mpiexec -n 2 ringsim doctor` asks it, and proves the answer"
        return [Finding(subject="mpi", name="CUDA-aware", fact=fact)] if gpus else []
    from ringsim.backends.cuda_aware import claims

    said = claims(transport.library, environment=system.environment)
    fact = f"{'claimed' if said.claimed else 'not claimed'}: {said.evidence}"
    if not gpus or (said.claimed and not said.hints):
        return [Finding(subject="mpi", name="CUDA-aware", fact=fact, differing="note", remedy=said.remedy)]
    return [Finding(subject="mpi", name="CUDA-aware", fact=fact, status="note", remedy=said.remedy)]

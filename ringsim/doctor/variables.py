"""Variables of MPI, UCX, CUDA and NCCL that change what ringsim gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from .finding import Finding, Status
from .system import System

OFF: Final = frozenset(("", "0", "no", "off", "false", "n"))


def _on(value: str) -> bool:
    return value.strip().lower() not in OFF


class Trap(NamedTuple):
    """Variables with one effect: when they have it, what it is, and what to do."""

    names: tuple[str, ...]
    when: Callable[[str], bool]
    status: Status
    effect: str
    remedy: str
    gpu: bool = False
    """Whether it matters on hosts with GPUs alone."""


PROGRESS: Final = (
    "a progress thread of MPI: measured here as destructive (computation 2x slower, messages at a fraction of their rate)"
)
TRAPS: Final = (
    Trap(
        ("MPICH_ASYNC_PROGRESS", "MPIR_CVAR_ASYNC_PROGRESS", "I_MPI_ASYNC_PROGRESS", "OMPI_MCA_btl_tcp_progress_thread"),
        _on,
        "wrong",
        PROGRESS,
        "ringsim polls between tiles instead",
    ),
    Trap(
        ("CUDA_LAUNCH_BLOCKING",),
        _on,
        "wrong",
        "every kernel launch waits for its kernel: nothing overlaps",
        "it is for debugging alone",
        gpu=True,
    ),
    Trap(
        ("CUDA_DEVICE_MAX_CONNECTIONS",),
        lambda value: value.strip() == "1",
        "note",
        "all streams share one hardware queue: copies and kernels of different streams wait for each other",
        "CUDA's own default gives them more",
        gpu=True,
    ),
    Trap(
        ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"),
        _on,
        "note",
        "NCCL leaves out one of its ways between GPUs",
        "it is for debugging alone",
        gpu=True,
    ),
)


def look(system: System) -> list[Finding]:
    """One finding for each trap that is set; one good one for none. What keeps MPI from device memory, `aware` says."""
    gpus = bool(system.which("nvidia-smi"))
    found = [_finding(system, trap) for trap in TRAPS if (gpus or not trap.gpu) and _set(system, trap)]
    offload = system.environment.get("I_MPI_OFFLOAD", "")
    if _on(offload) and not gpus:
        fact = (
            f"I_MPI_OFFLOAD={offload} on a host without nvidia-smi: Intel MPI was seen to crash in MPI_Init where there is no GPU"
        )
        remedy = "unset I_MPI_OFFLOAD on hosts without a GPU"
        found.append(Finding(subject="mpi", name="I_MPI_OFFLOAD", fact=fact, status="note", remedy=remedy, each="rank"))
    if found:
        return found
    return [Finding(subject="mpi", name="variables", fact="none set that is known to do harm", each="rank")]


def _set(system: System, trap: Trap) -> list[str]:
    return [name for name in trap.names if name in system.environment and trap.when(system.environment[name])]


def _finding(system: System, trap: Trap) -> Finding:
    names = _set(system, trap)
    fact = f"{', '.join(f'{name}={system.environment[name]}' for name in names)}: {trap.effect}"
    remedy = f"unset {' '.join(names)}: {trap.remedy}"
    return Finding(subject="mpi", name=names[0], fact=fact, status=trap.status, remedy=remedy, each="rank")

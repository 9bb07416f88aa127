"""Whether this MPI takes device memory: what it claims, what its environment takes from it, and what to do."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from ringsim.backends.cuda import Calls
from ringsim.backends.mpi import load
from ringsim.backends.proof import TIMEOUT_S, Proof, prove
from ringsim.errors import TransportError
from ringsim.transport import Transport

CUDA: Final = 0
"""MPIX_GPU_SUPPORT_CUDA of MPICH and those made from it."""
INSTEAD: Final = "or use --transport mpi-staged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What an MPI library says of itself; None where it does not say.

    `cuda_query` is MPIX_Query_cuda_support's answer, `gpu_query` MPIX_GPU_query_support's, `memory_kinds` the world's info key
    mpi_memory_alloc_kinds (of MPI 4.1). `hints` name what in the environment speaks against it, and what to do.
    """

    library: str
    path: str | None
    cuda_query: bool | None
    gpu_query: bool | None
    memory_kinds: tuple[str, ...] | None
    hints: tuple[str, ...] = ()

    @property
    def claimed(self) -> bool:
        """Whether any of the three says that device memory may be given to it."""
        kinds = self.memory_kinds or ()
        return bool(self.cuda_query or self.gpu_query or any(kind.split(":")[0] == "cuda" for kind in kinds))

    @property
    def evidence(self) -> str:
        """What it says, in words."""
        said = [
            f"{name} says {'yes' if answer else 'no'}"
            for name, answer in (("MPIX_Query_cuda_support", self.cuda_query), ("MPIX_GPU_query_support", self.gpu_query))
            if answer is not None
        ]
        if self.memory_kinds is not None:
            said.append(f"mpi_memory_alloc_kinds is {','.join(self.memory_kinds)}")
        return "; ".join(said) or "it says nothing of CUDA"

    @property
    def remedy(self) -> str:
        """What to do where it does not take device memory."""
        return "; ".join((*self.hints, f"use an MPI built with CUDA {INSTEAD}"))


def claims(library: str, *, environment: Mapping[str, str] = os.environ) -> Claims:
    """What the MPI in this process claims; `library` is its version as MpiTransport has it. Raises MissingDependency."""
    mpi = load()
    path, opened = opened_library()
    info = mpi.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    cuda, gpu = queries(opened)
    return Claims(
        library=library,
        path=path,
        cuda_query=cuda,
        gpu_query=gpu,
        memory_kinds=None if kinds is None else tuple(kind.strip() for kind in kinds.split(",")),
        hints=hints_for(library, environment),
    )


def loaded_libraries(maps: str) -> tuple[str, ...]:
    """The files named libmpi... among a process's mappings (the text of /proc/self/maps), each once."""
    found = re.findall(r"\s(/\S*/libmpi[^/\s]*\.so[^/\s]*)$", maps, re.MULTILINE)
    return tuple(dict.fromkeys(found))


def opened_library() -> tuple[str | None, Any]:
    """The MPI library in this process, and its functions: opened again, never loaded. None where there is none to be found."""
    maps = Path("/proc/self/maps")
    for path in loaded_libraries(maps.read_text()) if maps.exists() else ():
        opened = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        if hasattr(opened, "MPI_Init"):
            return path, opened
    return None, None


def queries(opened: Any) -> tuple[bool | None, bool | None]:
    """The answers of MPIX_Query_cuda_support and MPIX_GPU_query_support; None where there is no such function."""
    cuda = gpu = None
    if hasattr(opened, "MPIX_Query_cuda_support"):
        cuda = opened.MPIX_Query_cuda_support() == 1
    if hasattr(opened, "MPIX_GPU_query_support"):
        supported = ctypes.c_int(0)
        gpu = opened.MPIX_GPU_query_support(CUDA, ctypes.byref(supported)) == 0 and supported.value == 1
    return cuda, gpu


class Hint(NamedTuple):
    """A variable that keeps an MPI (`flavour` stands in its version) from device memory when it is `wrong`."""

    flavour: str
    variable: str
    wrong: Callable[[str | None], bool]
    remedy: str


def _without_cuda(transports: str | None) -> bool:
    """Whether UCX_TLS names transports, and none for device memory."""
    if transports is None:
        return False
    names = transports.removeprefix("^").split(",")
    if transports.startswith("^"):
        return any(name.startswith(("cuda", "gpu")) for name in names)
    return not any(name == "all" or name.startswith(("cuda", "gpu")) for name in names)


OFF: Final = ("0", "false", "no", "off")
HINTS: Final = (
    Hint(
        "CRAY MPICH",
        "MPICH_GPU_SUPPORT_ENABLED",
        lambda value: value != "1",
        "set MPICH_GPU_SUPPORT_ENABLED=1, with the GTL library linked or preloaded (module craype-accel-nvidia90 or the like)",
    ),
    Hint("Intel(R) MPI", "I_MPI_OFFLOAD", lambda value: value in (None, *OFF), "set I_MPI_OFFLOAD=1"),
    Hint("Intel(R) MPI", "I_MPI_OFFLOAD_MODE", lambda value: value not in (None, "auto", "cuda"), "set I_MPI_OFFLOAD_MODE=cuda"),
    Hint("MVAPICH2", "MV2_USE_CUDA", lambda value: value != "1", "set MV2_USE_CUDA=1"),
    Hint("MPICH", "MPIR_CVAR_ENABLE_GPU", lambda value: value in OFF, "unset MPIR_CVAR_ENABLE_GPU"),
    Hint("Open MPI", "OMPI_MCA_opal_cuda_support", lambda value: value in OFF, "unset OMPI_MCA_opal_cuda_support"),
    Hint("Open MPI", "OMPI_MCA_accelerator", lambda value: value == "null", "set OMPI_MCA_accelerator=cuda, or unset it"),
    Hint("", "UCX_TLS", _without_cuda, "unset UCX_TLS, or name cuda_copy and cuda_ipc in it too"),
)


def hints_for(library: str, environment: Mapping[str, str]) -> tuple[str, ...]:
    """What to change in the environment of an MPI whose version is `library`."""
    found = []
    for hint in HINTS:
        value = environment.get(hint.variable)
        if hint.flavour.casefold() in library.casefold() and hint.wrong(value):
            found.append(f"{hint.variable} is {'not set' if value is None else repr(value)}: {hint.remedy}")
    return tuple(found)


def prove_claims(transport: Transport, calls: Calls, said: Claims, *, timeout_s: float = TIMEOUT_S) -> Proof:
    """Give device memory to MPI and compare what comes back; collective. Raises TransportError on every rank if it is wrong.

    An MPI that knows nothing of devices may end the process here: it reads the address as the host's. So this is only for one
    that claims to take it, or where somebody insists.
    """
    proven = prove(transport, calls, timeout_s=timeout_s)
    if isinstance(proven, Proof):
        return proven
    claim = "claims CUDA support" if said.claimed else "does not claim CUDA support"
    joint = "but" if said.claimed else "and"
    raise TransportError(
        f"{said.library} {claim} ({said.evidence}), {joint} does not move device memory as it should: {proven}; {said.remedy}"
    )

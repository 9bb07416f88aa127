"""Which MPI a library or a launcher belongs to, from what each says of itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

LIBRARIES: Final = {
    "Open MPI": r"Open MPI v([^\s,]+)",
    "Intel MPI": r"Intel\(R\) MPI Library (\S+)",
    "Cray MPICH": r"CRAY MPICH version (\S+)",
    "MVAPICH": r"MVAPICH2?(?:-\w+)? Version\s*:\s*(\S+)",
    "MPICH": r"MPICH Version:\s*(\S+)",
}
"""What MPI_Get_library_version says."""
LAUNCHERS: Final = {
    "Open MPI": r"(?:mpiexec|mpirun|orterun|prterun) \((?:Open MPI|OpenRTE|PRRTE)\) (\S+)",
    "Intel MPI": r"Intel\(R\) MPI Library for Linux\* OS, Version (\S+)",
    "MPICH": r"HYDRA build details:\s+Version:\s+(\S+)",
    "PALS": r"\A\s*mpiexec version (\d\S*)",
    "Slurm": r"\A\s*slurm (\S+)",
}
"""What ``mpiexec --version`` says: MPICH's and MVAPICH's is Hydra, that of HPE Cray systems PALS, Slurm's srun."""
PREFIXES: Final = {"Open MPI": "OMPI_COMM_WORLD_", "PALS": "PALS_", "MPICH": "HYDI_", "Intel MPI": "I_MPI_HYDRA_"}
"""How the variables begin that a launcher alone sets for its ranks; Intel's sets those of Hydra too."""
OWN: Final = {"Open MPI": ("Open MPI",), "Intel MPI": ("Intel MPI",), "MPICH": ("MPICH", "MVAPICH"), "PALS": ("Cray MPICH",)}
"""The libraries that a launcher is made for."""
Fit = Literal["own", "kin", "foreign", "unknown"]


class Flavour(NamedTuple):
    """An MPI by name, and its version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


def of_library(text: str) -> Flavour | None:
    """The MPI of a library by its version text."""
    return _first(LIBRARIES, text)


def of_launcher(text: str) -> Flavour | None:
    """The MPI of a launcher by its version text."""
    return _first(LAUNCHERS, text)


def of_environment(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process, by the variables that it sets; ``Slurm`` for srun."""
    for name in ("Open MPI", "PALS", "Intel MPI", "MPICH"):
        if any(variable.startswith(PREFIXES[name]) for variable in environment):
            return name
    return "Slurm" if environment.get("SLURM_STEP_NUM_TASKS") and environment.get("SLURM_PROCID") else None


def fit(launcher: str, library: str) -> Fit:
    """Whether ranks that a launcher starts find each other through a library.

    ``kin``: both speak PMI, as a rule it works; ``foreign``: one speaks PMIx alone, the other PMI: worlds of one, or an abort.
    """
    if library in OWN.get(launcher, ()):
        return "own"
    if launcher in OWN and library in LIBRARIES:
        return "foreign" if "Open MPI" in {launcher, library} else "kin"
    return "unknown"


def _first(patterns: dict[str, str], text: str) -> Flavour | None:
    for name, pattern in patterns.items():
        found = re.search(pattern, text)
        if found:
            return Flavour(name, found[1].strip("\x00,"))
    return None

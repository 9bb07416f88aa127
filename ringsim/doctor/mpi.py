"""mpi4py, the MPI library that it loads, and the launchers on the path."""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import Any, Final

from . import answers, flavours
from .finding import Finding
from .flavours import Flavour
from .system import System

INSTALL: Final = (
    "pip install 'ringsim[mpich]' to bring an MPI, or on a cluster 'ringsim[mpi]' beside the site's: docs/clusters.md"
)
LOADS: Final = (
    "load the site's MPI module or set MPI4PY_LIBMPI=/path/to/libmpi.so; build anew: pip install --no-binary=mpi4py mpi4py"
)


def look(system: System) -> list[Finding]:
    """The library, and whether the launchers on the path are its own."""
    facts = answers.read(system.ask("mpi_library"))
    if "error" in facts:
        return [_absent(system, facts), *_launchers(system, None)]
    text = answers.text(facts, "library")
    library = flavours.of_library(text)
    return [_mpi4py(facts), _library(facts, text, library), *_launchers(system, library), *_gtl(system, facts, library)]


def _absent(system: System, facts: dict[str, Any]) -> Finding:
    missing = facts["error"] in {"ModuleNotFoundError", "ImportError"} and "mpi4py" in answers.text(facts, "text")
    if missing:
        fact = "mpi4py is not installed: ringsim runs as one process, and simulates"
        launched = flavours.of_environment(system.environment) is not None
        return Finding(subject="mpi", name="mpi4py", fact=fact, status="wrong" if launched else "note", remedy=INSTALL)
    if facts["error"] == answers.SILENT:
        fact = f"importing it came to nothing: {answers.text(facts, 'text')}"
        return Finding(subject="mpi", name="mpi4py", fact=fact, status="wrong", remedy=answers.by_hand("mpi_library"))
    fact = f"mpi4py {system.packages().get('mpi4py', '')} does not load: {facts['error']}: {answers.text(facts, 'text')}"
    return Finding(subject="mpi", name="mpi4py", fact=fact, status="wrong", remedy=LOADS)


def _mpi4py(facts: dict[str, Any]) -> Finding:
    fact = f"{answers.text(facts, 'mpi4py')}, standard {answers.text(facts, 'standard')}"
    return Finding(subject="mpi", name="mpi4py", fact=fact, differing="note")


def _library(facts: dict[str, Any], text: str, library: Flavour | None) -> Finding:
    files = [path for path in facts.get("files") or [] if "libmpi" in str(path)]
    where = f" at {files[0]}" if files else ""
    details = {"text": text, "files": facts.get("files")}
    remedy = "start every rank with the same MPI: one module, one environment"
    if library is None:
        fact = f"none that ringsim knows: {text.splitlines()[0] if text else 'it says nothing of itself'}{where}"
        return Finding(
            subject="mpi", name="library", fact=fact, status="note", remedy="tests cover MPICH and Open MPI", details=details
        )
    return Finding(subject="mpi", name="library", fact=f"{library}{where}", differing="wrong", remedy=remedy, details=details)


def _launchers(system: System, library: Flavour | None) -> list[Finding]:
    """One finding for each launcher on the path, srun included."""
    paths = {name: system.which(name) for name in ("mpiexec", "mpirun", "srun")}
    folders = {PurePath(path).parent for name, path in paths.items() if path and name == "mpirun"}
    if paths["mpiexec"] and PurePath(paths["mpiexec"]).parent in folders:
        del paths["mpirun"]
    beside = str(PurePath(sys.executable).parent / "mpiexec")
    if not paths["mpiexec"] and not paths.get("mpirun"):
        # the wheels of PyPI put it there
        paths["mpiexec"] = system.which(beside)
    found = [_launcher(system, name, path, library) for name, path in paths.items() if path]
    if not any(finding.name in {"mpiexec", "mpirun", "srun"} for finding in found) and library is not None:
        remedy = f"put the launcher of {library.name} on the PATH, or name it in full; on a cluster load its module"
        fact = "neither mpiexec, mpirun nor srun is on the PATH"
        found.append(Finding(subject="mpi", name="mpiexec", fact=fact, status="note", remedy=remedy))
    return found


def _launcher(system: System, name: str, path: str, library: Flavour | None) -> Finding:
    ran = system.run(path, "--version")
    launcher = flavours.of_launcher(ran.stdout + ran.stderr)
    if not ran.good:
        remedy = f"run `{path} --version` by hand; if it hangs or fails there too, start with another launcher"
        return Finding(subject="mpi", name=name, fact=f"{path} fails: {ran.said}", status="note", remedy=remedy)
    if launcher is None:
        fact = f"{path}, of an MPI that ringsim does not know: {(ran.stdout + ran.stderr).strip()[:100]!r}"
        remedy = "see under `launched` whether the ranks find each other: `mpiexec -n 2 ringsim doctor`"
        return Finding(subject="mpi", name=name, fact=fact, status="note", remedy=remedy)
    return _fitting(name, path, launcher, library)


def _fitting(name: str, path: str, launcher: Flavour, library: Flavour | None) -> Finding:
    """Whether a launcher is that of the library."""
    fact = f"{launcher} at {path}"
    if library is None or launcher.name == "Slurm":
        return Finding(subject="mpi", name=name, fact=fact, differing="note")
    how = flavours.fit(launcher.name, library.name)
    if how == "foreign":
        fact += f": not of the library's kind ({library}); its ranks would each be a world of one, or abort"
        remedy = f"start with the mpiexec of {library.name} by its full path, or have mpi4py load {launcher.name}: MPI4PY_LIBMPI"
        return Finding(subject="mpi", name=name, fact=fact, status="wrong", remedy=remedy)
    if how != "own":
        fact += f", the library is {library}: both speak PMI, and as a rule such ranks find each other"
        remedy = f"try it: `{path} -n 2 ringsim doctor`; if ranks are worlds of one, use the launcher of {library.name}"
        return Finding(subject="mpi", name=name, fact=fact, status="note", remedy=remedy)
    if launcher.name == library.name and launcher.version != library.version and launcher.name != "Intel MPI":
        fact += f", the library is {library.version}: another installation"
        remedy = f"use the mpiexec that was installed with the library ({library})"
        return Finding(subject="mpi", name=name, fact=fact, status="note", remedy=remedy)
    return Finding(subject="mpi", name=name, fact=fact, differing="note")


def _gtl(system: System, facts: dict[str, Any], library: Flavour | None) -> list[Finding]:
    """Cray MPICH aborts in MPI_Init where GPU support is asked for and its GTL library is not linked."""
    asked = system.environment.get("MPICH_GPU_SUPPORT_ENABLED", "0") == "1"
    if library is None or library.name != "Cray MPICH" or not asked:
        return []
    linked = [path for path in facts.get("files") or [] if "libmpi_gtl" in str(path)]
    if linked:
        return [Finding(subject="mpi", name="GTL", fact=f"MPICH_GPU_SUPPORT_ENABLED=1 and {linked[0]} is loaded")]
    fact = "MPICH_GPU_SUPPORT_ENABLED=1, but libmpi_gtl_cuda is not loaded with the library: MPI_Init aborts"
    remedy = "build mpi4py with the GTL library linked, or set LD_PRELOAD to libmpi_gtl_cuda.so: docs/clusters.md"
    return [Finding(subject="mpi", name="GTL", fact=fact, status="wrong", remedy=remedy)]

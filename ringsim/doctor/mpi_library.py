"""Run as a program: which MPI library mpi4py loads, as JSON. MPI is not initialised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import answers


def describe() -> dict[str, Any]:
    """mpi4py's version, the library's own text, and the files that came with it. Raises what importing mpi4py raises."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    return {
        "mpi4py": mpi4py.__version__,
        "library": MPI.Get_library_version().replace("\x00", ""),
        "standard": ".".join(map(str, MPI.Get_version())),
        "files": _files(),
    }


def _files() -> list[str]:
    """The shared objects of MPI, UCX and libfabric that this process has mapped."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(path for path in paths if re.search(r"/lib(mpi|ucp|uct|fabric|pmix?)[^/]*\.so", path))


if __name__ == "__main__":
    answers.tell(describe)

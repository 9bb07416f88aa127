"""Python, NumPy, ringsim, and the BLAS that NumPy calls."""

from __future__ import annotations

import platform
import sys
from typing import Any, Final

from .. import __version__
from .finding import Finding
from .system import System

PRESETS: Final = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "BLIS_ARCH_TYPE")
"""Variables that choose a BLAS library's kernels in place of the processor."""
THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def look(system: System) -> list[Finding]:
    """Versions and BLAS."""
    import numpy as np

    python = f"{platform.python_version()} ({platform.python_implementation()}) at {sys.executable}"
    return [
        Finding(subject="python", name="Python", fact=python, differing="note"),
        Finding(subject="python", name="ringsim", fact=__version__, differing="wrong", remedy=same("ringsim")),
        Finding(subject="python", name="NumPy", fact=np.__version__, differing="note", remedy=same("NumPy")),
        *blas(system, _libraries()),
    ]


def same(what: str) -> str:
    """What to do where hosts differ in it."""
    return f"install the same {what} for every rank, such as in one environment on a shared file system"


def _libraries() -> list[dict[str, Any]]:
    import numpy as np
    import threadpoolctl

    np.dot(np.ones(2), np.ones(2))
    return [found for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]


def blas(system: System, libraries: list[dict[str, Any]]) -> list[Finding]:
    """The BLAS libraries loaded, and the variables that change what they do."""
    if not libraries:
        remedy = "ringsim cannot set its threads: set OMP_NUM_THREADS=1 and compare `ringsim run` with and without"
        fact = "NumPy's BLAS is none that threadpoolctl knows"
        return [Finding(subject="python", name="BLAS", fact=fact, status="note", remedy=remedy)]
    parts = [
        f"{one.get('internal_api')} {one.get('version')} ({one.get('architecture') or 'kernels unnamed'})" for one in libraries
    ]
    found = [Finding(subject="python", name="BLAS", fact=", ".join(parts), differing="note", details={"libraries": libraries})]
    presets = [f"{name}={system.environment[name]}" for name in PRESETS if system.environment.get(name)]
    if presets:
        remedy = f"unset {' '.join(preset.split('=')[0] for preset in presets)}, then compare `ringsim run` with and without"
        fact = f"{', '.join(presets)}: BLAS takes these kernels and sizes, not those of this processor"
        found.append(Finding(subject="python", name="BLAS presets", fact=fact, status="note", remedy=remedy))
    threads = [f"{name}={system.environment[name]}" for name in THREADS if system.environment.get(name)]
    if threads:
        fact = f"{', '.join(threads)}; ringsim gives each of its threads one BLAS thread whatever these say"
        found.append(Finding(subject="python", name="BLAS threads", fact=fact))
    return found

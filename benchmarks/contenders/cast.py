"""Who runs: each contender, its packages, and the virtual environment in which it lives."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESETS = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
HERE = Path(__file__).parent
RANKS = 4
VENVS: dict[str, tuple[str, ...]] = {
    "t": ("torch==2.13.0", "numpy", "ring-attention-pytorch==0.5.20", "yunchang==0.6.4"),
    "j": ("ringattention==0.1.2", "jax==0.4.35", "jaxlib==0.4.35", "flax==0.10.2", "numpy<2.3"),
}
"""Virtual environments by name, and what each gets."""


@dataclass(frozen=True)
class Contender:
    """One line of the tables. `package` must be installed in `venv`; ringsim itself (no venv) runs under this Python and MPI."""

    name: str
    script: str
    venv: str = ""
    package: str = ""
    processes: int = RANKS
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Variables that its processes do not inherit."""
    for_scale: bool = False
    """Not a ring: shown, but no peer."""

    @property
    def is_ringsim(self) -> bool:
        """Whether this is what the others are compared with."""
        return not self.venv

    def python(self, venvs: Path) -> Path:
        """Its interpreter."""
        return venvs / self.venv / "bin" / "python" if self.venv else Path(sys.executable)

    def installed(self, venvs: Path) -> str:
        """The version of its package; empty where it, or its environment, is missing."""
        python = self.python(venvs)
        if self.is_ringsim:
            return "here"
        if not python.exists():
            return ""
        command = [str(python), "-c", f"from importlib.metadata import version; print(version({self.package!r}))"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def jax(chunk: int) -> Contender:
    """The JAX ringattention with its blocks of `chunk` rows and keys."""
    options = {"devices": RANKS, "chunk": chunk}
    environment = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={RANKS}", "JAX_PLATFORMS": "cpu"}
    name = f"ringattention (JAX), chunk {chunk}"
    return Contender(name, "jax_ring.py", "j", "ringattention", processes=1, options=options, environment=environment)


def torch_ring(threads: int, rotate: str = "ALL_GATHER") -> Contender:
    """PyTorch's ring with so many threads per rank; `rotate` is how K and V travel in its forward and backward."""
    name = f"torch ring, {threads} thread{'s' if threads > 1 else ''}" + ("" if rotate == "ALL_GATHER" else ", all-to-all")
    return Contender(name, "torch_ring.py", "t", "torch", options={"threads": threads, "rotate": rotate})


def lucidrains(bucket: int) -> Contender:
    """ring-attention-pytorch with buckets of so many rows."""
    name = f"ring-attention-pytorch, bucket {bucket}"
    return Contender(name, "lucidrains_ring.py", "t", "ring-attention-pytorch", options={"threads": 1, "bucket": bucket})


def ringsims() -> tuple[Contender, ...]:
    """This library as it finds this environment, and, where that presets OpenBLAS, without the presets."""
    if not any(name in os.environ for name in PRESETS):
        return (Contender("ringsim", "ringsim_ring.py"),)
    return (
        Contender("ringsim, BLAS as preset", "ringsim_ring.py"),
        Contender("ringsim, BLAS unset", "ringsim_ring.py", without=PRESETS),
    )


def yunchang(threads: int) -> Contender:
    """The zigzag ring of yunchang with so many threads per rank."""
    return Contender("yunchang, CPU shim", "yunchang_ring.py", "t", "yunchang", options={"threads": threads})


def dense(threads: int) -> Contender:
    """PyTorch without a ring."""
    name = f"dense PyTorch, {threads} threads"
    return Contender(name, "torch_dense.py", "t", "torch", processes=1, options={"threads": threads}, for_scale=True)


def contenders(*, variants: bool) -> tuple[Contender, ...]:
    """All, each peer as it does best here; with `variants` also the settings that were found no better."""
    chosen = (*ringsims(), torch_ring(1), torch_ring(2), jax(256), lucidrains(256), yunchang(1), dense(2))
    if not variants:
        return chosen
    return (*chosen, torch_ring(1, "ALL_TO_ALL"), jax(64), jax(128), jax(512), lucidrains(128), lucidrains(512), lucidrains(1024))


def install(folder: Path) -> None:
    """Make the virtual environments that are missing, and install into each what it needs."""
    for name, packages in VENVS.items():
        python = folder / name / "bin" / "python"
        if not python.exists():
            venv.create(folder / name, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], stdin=subprocess.DEVNULL, check=True)

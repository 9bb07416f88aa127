"""What the CPU is: its level-2 cache, and the BLAS that NumPy calls."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ringsim.units import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """The level-2 cache of one core and where the figure comes from."""

    level2_nbytes: int
    source: str


@lru_cache(maxsize=1)
def detect_cache() -> Cache:
    """The level-2 cache as the operating system reports it; 1 MiB, marked as assumed, where it reports none."""
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "level").read_text().strip() == "2":
            size = (index / "size").read_text().strip()
            return Cache(level2_nbytes=int(parse(size.replace("K", " KiB").replace("M", " MiB"), "size")), source=str(index))
    if sys.platform == "darwin":
        found = subprocess.run(["sysctl", "-n", "hw.l2cachesize"], capture_output=True, text=True, check=False).stdout.strip()
        if found.isdigit():
            return Cache(level2_nbytes=int(found), source="sysctl hw.l2cachesize")
    return Cache(level2_nbytes=2**20, source="assumed: the system reports no level-2 cache")


@lru_cache(maxsize=1)
def _controller() -> Any:
    import numpy as np
    import threadpoolctl

    np.dot(np.ones(2), np.ones(2))
    return threadpoolctl.ThreadpoolController()


class _BlasThreads:
    """BLAS threads are one setting for the whole process: the first to enter sets it, the last to leave restores it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, int]] = []

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                libraries = [library for library in _controller().lib_controllers if library.user_api == "blas"]
                self._before = [(library, library.get_num_threads()) for library in libraries]
                for library, count in self._before:
                    if count != 1:
                        library.set_num_threads(1)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for library, count in self._before:
                    if count != 1:
                        library.set_num_threads(count)


_BLAS = _BlasThreads()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let BLAS use one thread inside the block; the caller's setting comes back when no rank is inside any more."""
    _BLAS.enter()
    try:
        yield
    finally:
        _BLAS.leave()


def describe() -> dict[str, object]:
    """The facts that a CPU measurement depends on."""
    libraries = [
        {key: info.get(key) for key in ("internal_api", "version", "architecture", "num_threads")}
        for info in _controller().info()
    ]
    preset = {name: value for name, value in os.environ.items() if name.startswith(("OPENBLAS_", "OMP_", "MKL_"))}
    return {
        "blas": libraries,
        "environment": preset,
        "level2_nbytes": detect_cache().level2_nbytes,
        "cache_source": detect_cache().source,
    }


def yield_core() -> None:
    """Let another runnable process have this core."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_memory(limits: tuple[str, ...] = LIMITS) -> int | None:
    """Bytes of memory that the host has, or its control group allows; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if "SC_PHYS_PAGES" in names else []
    for path in limits:
        with suppress(OSError):
            text = Path(path).read_text(encoding="ascii").strip()
            found += [int(text)] if text.isdecimal() else []
    return min(found, default=None)

"""The host: processors, NUMA nodes, memory, container."""

from __future__ import annotations

import platform
from typing import Final

from ..units import format_size
from . import cpus
from .finding import Finding
from .system import System

NODES: Final = "/sys/devices/system/node"
MARKS: Final = {"/.dockerenv": "Docker", "/run/.containerenv": "Podman"}
VARIABLES: Final = {"APPTAINER_CONTAINER": "Apptainer", "SINGULARITY_CONTAINER": "Singularity", "ENROOT_ROOTFS": "Enroot"}
LEAST_SHARED_NBYTES: Final = 2**30
"""MPI libraries keep the rings between ranks of a host in /dev/shm; containers give 64 MiB unless told."""


def nodes(system: System) -> dict[int, frozenset[int]]:
    """The processors of each NUMA node."""
    names = [name for name in system.names(NODES) if name.startswith("node") and name[4:].isdecimal()]
    return {int(name[4:]): cpus.parse(system.read(f"{NODES}/{name}/cpulist") or "") for name in names}


def look(system: System) -> list[Finding]:
    """Processors, memory, container, shared memory."""
    return [_processors(system), _memory(system), _container(system), *_shared(system)]


def _processors(system: System) -> Finding:
    online, numa = system.read("/sys/devices/system/cpu/online") or "", nodes(system)
    count = len(cpus.parse(online))
    fact = f"{count} logical processors" if count else f"{platform.machine()}, the system does not list its processors"
    if len(numa) > 1:
        fact += f" on {len(numa)} NUMA nodes"
    details = {str(number): cpus.shown(members) for number, members in numa.items()}
    quota, _, period = (system.read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period) and int(quota) / int(period) < count:
        share = int(quota) / int(period)
        remedy = f"the control group stops threads beyond {share:g} processors: ask for more, or start fewer ranks and threads"
        fact = f"{fact}, of which the control group lets {share:g} be used"
        return Finding(subject="host", name="processors", fact=fact, status="note", remedy=remedy, details={"numa": details})
    return Finding(subject="host", name="processors", fact=fact, details={"numa": details}, differing="note")


def _memory(system: System) -> Finding:
    words = (system.read("/proc/meminfo") or "").split()
    total = int(words[1]) * 1024 if words[:1] == ["MemTotal:"] and words[1].isdecimal() else None
    limit = system.read("/sys/fs/cgroup/memory.max") or ""
    fact = "the system does not say" if total is None else format_size(total)
    if limit.isdecimal() and (total is None or int(limit) < total):
        fact += f", of which the control group lets {format_size(int(limit))} be used"
    return Finding(subject="host", name="memory", fact=fact, details={"nbytes": total})


def _container(system: System) -> Finding:
    found = [name for path, name in MARKS.items() if system.read(path) is not None]
    found += [name for variable, name in VARIABLES.items() if system.environment.get(variable)]
    return Finding(subject="host", name="container", fact=", ".join(found) or "none that shows", differing="note")


def _shared(system: System) -> list[Finding]:
    nbytes = system.shared_memory()
    if nbytes is None:
        return []
    fact = f"{format_size(nbytes)} at /dev/shm"
    if nbytes >= LEAST_SHARED_NBYTES:
        return [Finding(subject="host", name="shared memory", fact=fact)]
    remedy = "give the container more (docker run --ipc=host or --shm-size=8g): MPI within a host fails or slows down without"
    return [Finding(subject="host", name="shared memory", fact=fact, status="note", remedy=remedy)]

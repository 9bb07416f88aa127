"""Network adapters: InfiniBand and RoCE from /sys/class/infiniband, Slingshot from /sys/class/cxi."""

from __future__ import annotations

from collections import Counter
from typing import Final, NamedTuple

from . import gpu
from .finding import Finding
from .system import System

INFINIBAND: Final = "/sys/class/infiniband"
SLINGSHOT: Final = "/sys/class/cxi"
PCI: Final = "/sys/bus/pci/devices"


class Nic(NamedTuple):
    """An adapter: its name, its ports as (active, rate and kind), and its NUMA node (None where the system does not say)."""

    name: str
    ports: tuple[tuple[bool, str], ...]
    node: int | None

    @property
    def active(self) -> bool:
        """Whether a port is up."""
        return any(up for up, _ in self.ports)


def node(system: System, folder: str) -> int | None:
    """The NUMA node of a device; None where the system does not say."""
    text = system.read(f"{folder}/numa_node") or ""
    return int(text) if text.isdecimal() else None


def of_gpu(bus: str) -> str:
    """The folder of a GPU in sysfs, by nvidia-smi's bus id, whose domain has eight digits."""
    return f"{PCI}/{bus.lower()[-12:]}"


def see(system: System) -> list[Nic]:
    """The adapters of this host."""
    found = []
    for name in system.names(INFINIBAND):
        base = f"{INFINIBAND}/{name}"
        ports = []
        for port in system.names(f"{base}/ports"):
            state, rate, layer = (system.read(f"{base}/ports/{port}/{key}") or "" for key in ("state", "rate", "link_layer"))
            ports.append(("ACTIVE" in state, f"{rate or 'rate unknown'} {layer}".strip()))
        found.append(Nic(name, tuple(ports), node(system, f"{base}/device")))
    for name in system.names(SLINGSHOT):
        found.append(Nic(name, ((True, "Slingshot"),), node(system, f"{SLINGSHOT}/{name}/device")))
    return found


def look(system: System) -> list[Finding]:
    """The adapters, whether each GPU has one on its NUMA node, and what they need of the system."""
    nics = see(system)
    if not nics:
        fact = "none: neither InfiniBand, RoCE nor Slingshot; between hosts messages go by TCP"
        return [Finding(subject="network", name="adapters", fact=fact, differing="note")]
    kinds = Counter(kind for nic in nics for up, kind in nic.ports if up)
    down = [nic.name for nic in nics if not nic.active]
    details = {"adapters": [{"name": nic.name, "ports": nic.ports, "numa": nic.node} for nic in nics]}
    fact = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    if not kinds:
        remedy = f"`cat {INFINIBAND}/{nics[0].name}/ports/1/state`; a subnet manager must run; messages go by TCP meanwhile"
        fact = f"{', '.join(down)}: no port is active"
        return [Finding(subject="network", name="adapters", fact=fact, status="note", remedy=remedy, details=details)]
    fact += f"; not active: {', '.join(down)}" if down else ""
    found = [
        Finding(subject="network", name="adapters", fact=fact, differing="note", details=details, remedy="check cables and ports")
    ]
    return [*found, *_beside(system, nics), *_needs(system)]


def _beside(system: System, nics: list[Nic]) -> list[Finding]:
    """Whether each GPU has an active adapter on its NUMA node."""
    nodes = {one.index: node(system, of_gpu(one.bus)) for one in gpu.see(system).gpus}
    near = {nic.node for nic in nics if nic.active and nic.node is not None}
    known = {index: place for index, place in nodes.items() if place is not None}
    if not known or not near:
        return []
    far = [str(index) for index, place in known.items() if place not in near]
    if not far:
        return [Finding(subject="network", name="near GPUs", fact="each GPU has an active adapter on its NUMA node")]
    fact = f"GPU {', '.join(far)} has no active adapter on its NUMA node: its messages cross between sockets"
    remedy = "see `nvidia-smi topo -m`; leave these GPUs to ranks that send little, or put the ring's node boundary on others"
    return [Finding(subject="network", name="near GPUs", fact=fact, status="note", remedy=remedy)]


def _needs(system: System) -> list[Finding]:
    found = []
    limit = system.locked_memory()
    if limit is not None and system.names(INFINIBAND):
        fact = f"a process may lock {limit} bytes: RDMA needs to lock its buffers"
        remedy = "ulimit -l unlimited, for the job's daemon too (slurmd: LimitMEMLOCK=infinity); docker --ulimit memlock=-1"
        found.append(Finding(subject="network", name="locked memory", fact=fact, status="note", remedy=remedy))
    if gpu.see(system).gpus and system.names(INFINIBAND):
        found.append(_direct(system))
    return found


def _direct(system: System) -> Finding:
    """Whether an adapter may reach GPU memory: by a kernel module, or by DMA-BUF, which NVIDIA's open kernel modules offer."""
    ways = [name for name in ("nvidia_peermem", "nv_peer_mem") if system.names(f"/sys/module/{name}")]
    if "Open Kernel Module" in (system.read("/proc/driver/nvidia/version") or ""):
        ways.append("DMA-BUF of the open kernel modules")
    copies = "; gdrdrv is loaded" if system.names("/sys/module/gdrdrv") else ""
    if ways:
        return Finding(subject="network", name="GPUDirect RDMA", fact=f"possible: {', '.join(ways)}{copies}", differing="note")
    fact = f"neither nvidia_peermem is loaded nor the driver of the open kind, which has DMA-BUF{copies}"
    remedy = "sudo modprobe nvidia-peermem, or install the open kernel modules; until then messages are staged through the host"
    return Finding(subject="network", name="GPUDirect RDMA", fact=fact, status="note", remedy=remedy)

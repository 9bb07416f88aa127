"""Machines as the doctor sees them, recorded: files, answers of commands, variables. Formats are those of real outputs."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from types import MappingProxyType

from ringsim.doctor import Ran

DATA = Path(__file__).parent / "data"
HYDRA = (DATA / "doctor" / "mpiexec-hydra.txt").read_text()
OPEN_MPI = "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
INTEL = (
    "Intel(R) MPI Library for Linux* OS, Version 2021.17 Build 20251215 (id: 2ac2f63)\nCopyright 2003-2025, Intel Corporation.\n"
)
MPICH_LIBRARY = "MPICH Version:      5.0.2\nMPICH Release date: Fri Sep 25 20:45:26 UTC 2026\nMPICH Device:       ch4:ucx ofi\n"
OPEN_MPI_LIBRARY = (
    "Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11, repo rev: v5.0.11rc1, Sep 16, 2026"
)
CRAY_LIBRARY = (
    "MPI VERSION    : CRAY MPICH version 8.1.25.17 (ANL base 3.4a2)\nMPI BUILD INFO : Sun Feb 26 16:42 2023 (git hash aecd99f)\n"
)
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.126\n"
BUSES = ("0A", "18", "3A", "43", "87", "90", "B8", "C1")
CORES = ("0-55,112-167", "56-111,168-223")
HUNG = Ran(command=("nvidia-smi",), trouble="no answer within 20 s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A System out of dictionaries: texts by path; a Ran or its stdout by command (the first two words, or one)."""

    files: dict[str, str] = field(default_factory=dict)
    commands: dict[str, Ran | str] = field(default_factory=dict)
    answers: dict[str, dict | Ran] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] | None = (0, 1, 2, 3)
    memory: int | None = 2**34
    lockable: int | None = None
    distributions: dict[str, str] = field(default_factory=dict)

    def read(self, path):
        return self.files.get(path)

    def names(self, folder):
        inside = (path.removeprefix(f"{folder}/") for path in self.files if path.startswith(f"{folder}/"))
        return tuple(sorted({rest.partition("/")[0] for rest in inside}))

    def target(self, path):
        return path if path in self.files else None

    def which(self, name):
        return f"/usr/bin/{name}" if any(known.split()[0] == name for known in self.commands) else None

    def run(self, *command):
        words = [PurePath(command[0]).name, *command[1:]]
        query = words[1].partition("=")[0] if len(words) > 1 else ""
        said = next((self.commands[name] for name in (f"{words[0]} {query}", words[0]) if name in self.commands), None)
        if said is None:
            return Ran(command=command, trouble=f"{command[0]} cannot be started: No such file or directory")
        return Ran(command=command, rc=0, stdout=said) if isinstance(said, str) else said

    def ask(self, module):
        said = self.answers.get(module, {"error": "ModuleNotFoundError", "text": MISSING[module]})
        return said if isinstance(said, Ran) else Ran(command=(sys.executable,), rc=0, stdout=json.dumps(said) + "\n")

    def affinity(self):
        return self.cores

    def shared_memory(self):
        return self.memory

    def locked_memory(self):
        return self.lockable

    def packages(self):
        return MappingProxyType(self.distributions)


MISSING = {"mpi_library": "No module named 'mpi4py'", "cuda_library": "No module named 'cupy'"}


def failed(text, rc, *, stderr=""):
    """A command that ended with a code."""
    return Ran(command=("nvidia-smi",), rc=rc, stdout=text, stderr=stderr)


def library(text, *files):
    """What mpi4py loads."""
    return {"mpi4py": "4.1.2", "library": text, "standard": "5.0", "files": ["/opt/mpi/lib/libmpi.so.12", *files]}


def cuda(devices=8, *, driver=13000, runtime=13000, **others):
    """What CuPy and its libraries say."""
    facts = {"cupy": "14.2.0", "failed": {}, "runtime": runtime, "driver": driver, "nvrtc": "13.0", "nccl": 22907}
    facts |= {"headers": "/opt/cuda/include"}
    facts |= {"cudnn_frontend": "1.32.0", "cudnn": 91300, "devices": [f"0000:{bus}:00.0" for bus in BUSES[:devices]]}
    return facts | {"peers": [[True] * devices for _ in range(devices)]} | others


def rows(count=8, *, driver="580.126.20", mode="Default", host=0):
    """The columns of gpu.FIELDS for the GPUs of a DGX-like host."""
    return "".join(
        f"{index}, NVIDIA H100 80GB HBM3, GPU-{host:08x}-68b1-5c29-9082-{index:012x}, 00000000:{bus}:00.0, {driver}, "
        f"81559 MiB, 9.0, {mode}, Disabled, Enabled, 345 MHz, 1980 MHz\n"
        for index, bus in enumerate(BUSES[:count])
    )


LAPTOP = Recorded(
    files={
        "/sys/devices/system/cpu/online": "0-3",
        "/sys/devices/system/node/node0/cpulist": "0-3",
        "/proc/meminfo": "MemTotal:       16384000 kB",
    }
)


def dgx(*, cores=None, driver="580.126.20", mode="Default", host=0, environment=None):
    """A host with 8 GPUs and 10 adapters on two NUMA nodes, MPICH installed, ranks bound to `cores`."""
    files = {"/sys/devices/system/cpu/online": "0-223", "/proc/meminfo": "MemTotal:       2113462272 kB"}
    files |= {f"/sys/devices/system/node/node{node}/cpulist": cpus for node, cpus in enumerate(CORES)}
    files["/sys/module/nvidia_peermem/refcnt"] = "0"
    for index, bus in enumerate(BUSES):
        folder, node = f"/sys/bus/pci/devices/0000:{bus.lower()}:00.0", index // 4
        files |= {f"{folder}/numa_node": str(node), f"{folder}/local_cpulist": CORES[node]}
    for index in range(10):
        folder, node = f"/sys/class/infiniband/mlx5_{index}", index // 4 if index < 8 else index - 8
        files[f"{folder}/device/numa_node"] = str(node)
        port = {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}
        files |= {f"{folder}/ports/1/{key}": text for key, text in port.items()}
    return Recorded(
        files=files,
        commands={
            "mpiexec": HYDRA,
            "nvidia-smi --query-gpu": rows(driver=driver, mode=mode, host=host),
            "nvidia-smi topo": (DATA / "import" / "smi-nvswitch.txt").read_text(),
        },
        answers={"mpi_library": library(MPICH_LIBRARY), "cuda_library": cuda()},
        environment=environment or {},
        cores=tuple(range(56)) if cores is None else cores,
        distributions={"cupy-cuda13x": "14.2.0"},
    )


def with_smi(said, machine=None):
    """A host whose nvidia-smi says this."""
    return replace(machine or LAPTOP, commands={"nvidia-smi": said})


def example():
    """The ranks that docs/clusters.md shows: (systems, hosts). One rank on the wrong socket, one host with another driver."""
    bound = [tuple(range(14)), tuple(range(70, 84))]
    systems = [
        dgx(cores=cores, host=host, driver=driver) for host, driver in ((1, "580.126.20"), (2, "580.65.06")) for cores in bound
    ]
    foreign = [replace(system, commands=system.commands | {"mpiexec": OPEN_MPI}) for system in systems]
    return foreign, ["nid1", "nid1", "nid2", "nid2"]

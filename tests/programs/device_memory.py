"""Device memory over MPI, each rank with a GPU on paper: claims, addresses, messages in any order, and the choice."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from mover_cases import Message, Walk, program
from mpi4py import MPI
from paper_gpu import DeviceArray, PaperGpu

from ringsim.backends.cuda_aware import claims
from ringsim.backends.device_transports import Means, choose
from ringsim.backends.ipc import HANDLE_NBYTES, Ipc, Shared
from ringsim.backends.mover import DeviceTransport, DirectMpi
from ringsim.backends.mpi import MpiTransport
from ringsim.backends.staged import Staged
from ringsim.errors import TransportError

WORLD = MPI.COMM_WORLD
POLLS = 2_000_000


def messages(count: int, nbytes: int) -> list[Message]:
    """The same on every rank: between all ranks, with three tags, of many sizes, posted more or less early."""
    rng = np.random.default_rng(WORLD.size)
    made = []
    for number in range(count):
        source = int(rng.integers(WORLD.size))
        target = (source + int(rng.integers(1, WORLD.size))) % WORLD.size
        early = rng.random(2)
        size = int(nbytes ** rng.random())
        made.append(Message(number, source, target, int(rng.integers(3)), size, (float(early[0]), float(early[1]))))
    return made


def traffic(host: MpiTransport, gpu: PaperGpu, mover: Any, count: int = 60, nbytes: int = 300_000) -> None:
    one = Walk(host.rank, gpu, mover, program(messages(count, nbytes), host.rank))
    for _ in range(POLLS):
        one.go()
        if not one.steps:
            break
        mover.poll()
    assert not one.steps, f"rank {host.rank} is stuck at {one.steps[0]}"
    host.barrier()


class Exposed:
    """An array that can only be had by its address, as a CuPy array is; what is behind it is host memory, for MPI to take."""

    def __init__(self, array: Any) -> None:
        self._held = array
        self.size = array.size

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        address = self._held.ctypes.data
        return {"data": (address, False), "typestr": "|u1", "shape": self._held.shape, "strides": None, "version": 3}


def check_claims(host: MpiTransport) -> None:
    """The wheels' libraries are found in the process, and none claims CUDA."""
    found = claims(host.library)
    assert found.path is not None
    assert "libmpi" in found.path
    assert found.cuda_query is False
    assert not found.claimed, found.evidence


def check_addresses(host: MpiTransport) -> None:
    """Mpi4py takes the address of a device array as it is, and its request keeps the array."""
    transport = DeviceTransport(host, DirectMpi(host))
    peer, before = (host.rank + 1) % host.world_size, (host.rank - 1) % host.world_size
    received = np.zeros(100_001, np.uint8)
    posts = [transport.irecv(Exposed(received[1:]), before, 7)]
    posts.append(transport.isend(Exposed(np.full(100_000, host.rank, np.uint8)), peer, 7))
    while not all(post.done for post in posts):
        transport.poll()
    assert received[0] == 0
    assert np.all(received[1:] == before)


def check_staged(host: MpiTransport) -> None:
    for seed, (depth, chunk_nbytes) in enumerate([(1, 1000), (3, 4096), (4, 70_000)]):
        gpu = PaperGpu(seed * 10 + host.rank)
        traffic(host, gpu, Staged(host, gpu, depth=depth, chunk_nbytes=chunk_nbytes))


class FileGpu(PaperGpu):
    """A paper GPU whose memory other processes find in files."""

    def __init__(self, seed: int, rank: int) -> None:
        super().__init__(seed)
        self.rank = rank
        self.files: list[tuple[str, Any]] = []

    def empty(self, nbytes: int) -> Any:
        name = f"memory-{self.rank}-{len(self.files)}"
        made = np.memmap(name, np.uint8, "w+", shape=(max(nbytes, 1),))
        self.files.append((name, made))
        return made.view(np.ndarray)[:nbytes].view(DeviceArray)


class FileSharing:
    """CUDA IPC's part, by files."""

    def __init__(self, gpu: FileGpu) -> None:
        self._gpu = gpu

    def export(self, array: Any) -> Shared:
        place = array.ctypes.data
        for name, memory in self._gpu.files:
            base = memory.ctypes.data
            if base <= place < base + memory.nbytes:
                return Shared(name.encode().ljust(HANDLE_NBYTES, b"\0"), base, place - base, memory.nbytes, memory)
        raise TransportError("memory of nobody")

    def open(self, handle: bytes, extent: int) -> Any:
        return np.memmap(handle.rstrip(b"\0").decode(), np.uint8, "r+", shape=(extent,)).view(DeviceArray)

    def close(self, base: Any) -> None:
        pass


def check_ipc(host: MpiTransport) -> None:
    gpu = FileGpu(host.rank, host.rank)
    mover = Ipc(host, gpu, FileSharing(gpu), same_device=True)
    traffic(host, gpu, mover)
    mover.close(failed=False)


class Unshareable:
    def export(self, array: Any) -> Shared:
        raise TransportError("this memory cannot be shared")


def check_choice(host: MpiTransport) -> None:
    """Without a CUDA-aware MPI and with nothing to share, all ranks stage."""
    gpu = PaperGpu(host.rank)
    chosen = choose("auto", host, gpu, {"uuid": "one"}, means=Means(sharing=Unshareable))
    assert chosen.transport.name == "mpi-staged"
    assert [refused.name for refused in chosen.tried] == ["mpi", "ipc", "nccl"]
    assert "does not claim CUDA support on rank 0" in chosen.tried[0].why
    traffic(host, gpu, chosen.transport, count=10)
    chosen.transport.close()


CASES: dict[str, Callable[[MpiTransport], None]] = {
    "claims": check_claims,
    "addresses": check_addresses,
    "staged": check_staged,
    "ipc": check_ipc,
    "choice": check_choice,
}


def main() -> None:
    host = MpiTransport(WORLD, timeout_s=30.0)
    for check in CASES.values():
        check(host)
    host.close()
    if WORLD.rank == 0:
        print(json.dumps({"cases": list(CASES), "faults": []}))


if __name__ == "__main__":
    try:
        main()
    except Exception:  # noqa: BLE001 - the job ends with it
        traceback.print_exc()
        WORLD.Abort(1)

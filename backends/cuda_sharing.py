"""CUDA IPC by CuPy's runtime, and by the driver for where an allocation begins; thin, for only a GPU can test it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ringsim.backends.cuda import DeviceArray
from ringsim.backends.cupy_calls import address, load
from ringsim.backends.ipc import Shared
from ringsim.errors import TransportError

UNSHAREABLE = (
    "CUDA IPC shares what cudaMalloc made, not memory of cudaMallocAsync's pools or mapped by cuMemMap: give arrays of CuPy's "
    "default pool, take expandable_segments and cudaMallocAsync out of PYTORCH_CUDA_ALLOC_CONF, or use --transport mpi-staged"
)
UNSEEN = (
    "let every process see all GPUs of its host (CUDA_VISIBLE_DEVICES) and share its /dev/shm and process ids (containers: "
    "--ipc=host --pid=host), or use --transport mpi-staged"
)


class CudaSharing:
    """`Sharing` of the current device."""

    def __init__(self) -> None:
        self._cupy = load()
        self._runtime = self._cupy.cuda.runtime
        self._driver = ctypes.CDLL("libcuda.so.1")

    @contextmanager
    def _said(self, what: str, remedy: str) -> Iterator[None]:
        try:
            yield
        except self._runtime.CUDARuntimeError as error:
            raise TransportError(f"{what}: {error}: {remedy}") from error

    def export(self, array: DeviceArray) -> Shared:
        """By cuMemGetAddressRange and cudaIpcGetMemHandle."""
        begin = address(array)
        base, extent = self._allocation(begin)
        with self._said(f"sharing {array.nbytes} bytes of device memory", UNSHAREABLE):
            handle = bytes(self._runtime.ipcGetMemHandle(base))
        memory = array.data.mem
        keep = memory if type(memory) is self._cupy.cuda.Memory else None
        return Shared(handle, base, begin - base, extent, keep)

    def _allocation(self, begin: int) -> tuple[int, int]:
        base, extent = ctypes.c_uint64(), ctypes.c_size_t()
        status = self._driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(extent), ctypes.c_uint64(begin))
        if status:
            raise TransportError(f"cuMemGetAddressRange gives error {status} for device memory at {begin:#x}: {UNSHAREABLE}")
        return int(base.value), int(extent.value)

    def open(self, handle: bytes, extent: int) -> DeviceArray:
        """By cudaIpcOpenMemHandle."""
        with self._said("opening another process's device memory", UNSEEN):
            base = self._runtime.ipcOpenMemHandle(handle)
        memory = self._cupy.cuda.UnownedMemory(base, extent, self)
        return self._cupy.ndarray((extent,), np.uint8, memptr=self._cupy.cuda.MemoryPointer(memory, 0))

    def close(self, base: DeviceArray) -> None:
        """By cudaIpcCloseMemHandle."""
        with self._said("closing another process's device memory", UNSEEN):
            self._runtime.ipcCloseMemHandle(address(base))

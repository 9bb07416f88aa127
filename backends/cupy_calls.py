"""The CUDA calls by CuPy, on one device: thin, for only a GPU can test it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from ringsim.arrays import on_device
from ringsim.backends.cuda import INSTALL, DeviceArray, Event, Kernel, Launch, Stream
from ringsim.backends.cuda_clocks import clocks_of
from ringsim.backends.cuda_sources import definitions, text_of
from ringsim.dtypes import numpy_dtype
from ringsim.errors import ArrayError, DeviceError, MissingDependency

MOST_STATIC_SHARED = 48 * 1024
"""Bytes of dynamic shared memory that a kernel may have without asking. CUDA C++ Programming Guide, 'Shared Memory'."""
MILLISECOND_S = 1e-3
SUCCESS, NOT_READY = 0, 600
"""cudaSuccess, cudaErrorNotReady. CUDA Runtime API, 'Data types'."""


class Foreign:
    """The address of another library's stream, in CUDA's stream protocol."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        """The protocol's version, and the address."""
        return 0, self._address


def load() -> Any:
    """The module cupy. Raises MissingDependency where it, or a GPU that it can use, is missing."""
    try:
        import cupy
    except ImportError as error:
        raise MissingDependency(f"backend 'cupy' needs CuPy, which cannot be imported ({error}): {INSTALL}") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise DeviceError(
            f"backend 'cupy' needs an NVIDIA GPU, and CUDA finds none ({error}): `nvidia-smi` says whether the driver sees one, "
            "CUDA_VISIBLE_DEVICES whether it is hidden; or use --backend numpy"
        ) from error
    if not count:
        raise DeviceError("backend 'cupy' needs an NVIDIA GPU, and CUDA_VISIBLE_DEVICES leaves none; or use --backend numpy")
    return cupy


class CupyCalls:
    """`Calls` of device number `device`, as CUDA counts those that are visible.

    What makes something on the device makes it this thread's current one first, and leaves it so: a thread that is new, such as
    those of autograd, begins with device 0.
    """

    def __init__(self, device: int = 0) -> None:
        self._cupy = load()
        self._runtime = self._cupy.cuda.runtime
        self.device = device
        self.activate()
        self._modules: dict[Kernel, Any] = {}

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """CUDA's errors as ours."""
        try:
            yield
        except (self._runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"device {self.device}: {what}: {error}") from error
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise DeviceError(f"device {self.device}: {what}: {error}; `ringsim memory` says what a rank needs") from error

    def activate(self) -> None:
        """By cudaSetDevice."""
        with self._said("cudaSetDevice"):
            self._runtime.setDevice(self.device)

    def caller(self, stream: Any) -> Stream:
        """A CuPy stream of the caller's."""
        if stream is None:
            # CuPy has a current stream for each device
            self.activate()
            return self._cupy.cuda.get_current_stream()
        if isinstance(stream, self._cupy.cuda.Stream | self._cupy.cuda.ExternalStream):
            if stream.device_id not in (-1, self.device):
                raise ArrayError(f"stream is of device {stream.device_id}; this rank computes on device {self.device}")
            return stream
        address = getattr(stream, "cuda_stream", stream)
        if not isinstance(address, int) or isinstance(address, bool):
            raise ArrayError(f"stream is {stream!r}; give a stream of CuPy or torch, its address as an int, or None")
        return self._cupy.cuda.Stream.from_external(Foreign(address))

    def empty(self, nbytes: int) -> DeviceArray:
        """By cudaMalloc: an allocation of its own, as CUDA IPC needs, freed with the last array on it.

        cudaFree waits until the device is done with it, whatever stream it was used on.
        """
        self.activate()
        if not nbytes:
            return self._cupy.empty(0, np.uint8)
        with self._said(f"allocating {nbytes} bytes"):
            memory = self._cupy.cuda.MemoryPointer(self._cupy.cuda.Memory(nbytes), 0)
            return self._cupy.ndarray((nbytes,), np.uint8, memptr=memory)

    def pooled(self, nbytes: int, stream: Stream) -> DeviceArray:
        """From CuPy's memory pool, which has memory for each stream."""
        self.activate()
        with self._said(f"allocating {nbytes} bytes"), stream:
            return self._cupy.empty(nbytes, np.uint8)

    def view(self, name: str, value: Any) -> DeviceArray:
        """A CuPy array of what lies in this device's memory: a CuPy array, or what speaks DLPack or __cuda_array_interface__."""
        array = self._view(name, value)
        if array.device.id != self.device:
            raise ArrayError(f"{name} lies on device {array.device.id}; this rank computes on device {self.device}")
        if array.ndim and array.size and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
            raise ArrayError(f"{name} has strides {array.strides} bytes; its last axis must be dense: copy it first")
        return array

    def _view(self, name: str, value: Any) -> DeviceArray:
        if isinstance(value, self._cupy.ndarray):
            return value
        if not on_device(value):
            raise ArrayError(f"{name} is {type(value).__name__} in host memory; backend 'cupy' needs device memory: cupy.asarray")
        if getattr(value, "requires_grad", False):
            raise ArrayError(f"{name} requires grad; pass {name}.detach(), or use ringsim.bindings.torch")
        if str(getattr(value, "dtype", "")) == "torch.bfloat16":
            # as 16-bit integers: not every CuPy takes bfloat16 through DLPack
            import torch

            return self._cupy.from_dlpack(value.view(torch.int16)).view(numpy_dtype("bfloat16"))
        try:
            return self._cupy.from_dlpack(value) if hasattr(value, "__dlpack__") else self._cupy.asarray(value)
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            raise ArrayError(f"{name} ({type(value).__name__}) cannot be seen as a CuPy array: {error}") from error

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """By cudaHostAlloc."""
        with self._said(f"allocating {nbytes} bytes of page-locked memory"):
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def stream(self) -> Stream:
        """By cudaStreamCreateWithFlags, non-blocking."""
        self.activate()
        with self._said("creating a stream"):
            return self._cupy.cuda.Stream(non_blocking=True)

    def record(self, stream: Stream, event: Event | None = None) -> Event:
        """By cudaEventRecord."""
        if event is None:
            self.activate()
        with self._said("recording an event"):
            made = self._cupy.cuda.Event() if event is None else event
            made.record(stream)
        return made

    def wait(self, stream: Stream, event: Event) -> None:
        """By cudaStreamWaitEvent."""
        with self._said("waiting for an event"):
            stream.wait_event(event)

    def done(self, event: Event) -> bool:
        """By cudaEventQuery, whose errors CuPy's `Event.done` takes for an event that is not complete."""
        with self._said("asking for an event"):
            status = self._runtime.eventQuery(event.ptr)
            if status not in (SUCCESS, NOT_READY):
                raise self._runtime.CUDARuntimeError(status)
        return bool(status == SUCCESS)

    def synchronize(self, event: Event) -> None:
        """By cudaEventSynchronize."""
        with self._said("waiting for an event"):
            event.synchronize()

    def elapsed_s(self, first: Event, last: Event) -> float:
        """By cudaEventElapsedTime."""
        with self._said("reading events"):
            return float(self._cupy.cuda.get_elapsed_time(first, last)) * MILLISECOND_S

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """By cudaMemcpyAsync."""
        if target.nbytes != source.nbytes:
            raise DeviceError(f"a copy of {source.nbytes} bytes into {target.nbytes}")
        if target.nbytes:
            with self._said(f"copying {target.nbytes} bytes"):
                kind = self._runtime.memcpyDefault
                self._runtime.memcpyAsync(address(target), address(source), target.nbytes, kind, stream.ptr)

    def fill(self, target: DeviceArray, byte: int, stream: Stream) -> None:
        """By cudaMemsetAsync."""
        if target.nbytes:
            with self._said(f"filling {target.nbytes} bytes"):
                self._runtime.memsetAsync(address(target), byte, target.nbytes, stream.ptr)

    def launch(self, kernel: Kernel, shape: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        """By cuLaunchKernel; the kernel is compiled by NVRTC when it is first launched, and kept on disk by CuPy."""
        with self._said(f"kernel {kernel.name}"):
            function = self._function(kernel)
            if shape.shared_nbytes > max(MOST_STATIC_SHARED, function.max_dynamic_shared_size_bytes):
                function.max_dynamic_shared_size_bytes = shape.shared_nbytes
            given = tuple(np.uintp(0) if one is None else one for one in arguments)
            function(shape.grid, shape.block, given, shared_mem=shape.shared_nbytes, stream=stream)

    def _function(self, kernel: Kernel) -> Any:
        if kernel not in self._modules:
            code, options = text_of(kernel.source), ("-std=c++17", *definitions(kernel.types))
            try:
                with self._compiling():
                    self._modules[kernel] = self._cupy.RawModule(code=code, options=options).get_function(kernel.name)
            except self._cupy.cuda.compiler.CompileException as error:
                raise DeviceError(f"kernel {kernel.name} of {kernel.source} does not compile here: {error}") from error
        return self._modules[kernel]

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """CuPy's errors where it finds no NVRTC or no CUDA headers, which it wants even for what includes none, as ours."""
        try:
            yield
        except self._runtime.CUDARuntimeError:
            raise
        except RuntimeError as error:
            raise MissingDependency(f"CuPy cannot compile kernels here ({error}): {INSTALL}") from error

    @property
    def capability(self) -> tuple[int, int]:
        """The device's compute capability."""
        properties = self._runtime.getDeviceProperties(self.device)
        return int(properties["major"]), int(properties["minor"])

    def clocks(self) -> dict[str, Any]:
        """Its clocks now, by nvidia-smi."""
        return clocks_of(self._runtime.deviceGetPCIBusId(self.device))

    def facts(self) -> dict[str, Any]:
        """What a measurement on this device depends on: its name and size, the driver, the libraries."""
        properties = self._runtime.getDeviceProperties(self.device)
        from cupy_backends.cuda.libs import nvrtc

        with self._compiling():
            compiler = list(nvrtc.getVersion())
        return {
            "device": properties["name"].decode(),
            "compute_capability": "{}.{}".format(*self.capability),
            "units": int(properties["multiProcessorCount"]),
            "memory_nbytes": int(properties["totalGlobalMem"]),
            # CuPy gives the uuid up to its first byte that is 0: its place on the host tells GPUs apart all the same
            "uuid": f"{self._runtime.deviceGetPCIBusId(self.device)}/{properties['uuid'].hex()}",
            # of CUDA: what the driver supports, and what is used
            "cuda_driver": self._runtime.driverGetVersion(),
            "cuda_runtime": self._runtime.runtimeGetVersion(),
            "nvrtc": compiler,
            "cupy": self._cupy.__version__,
        }


def address(array: Any) -> int:
    """Where an array begins, in device or host memory."""
    return int(array.data.ptr if hasattr(array.data, "ptr") else array.ctypes.data)

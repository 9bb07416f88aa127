"""The few CUDA calls that the GPU backend and its transports make. CuPy makes them; tests have a stand-in that records them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

DeviceArray = Any
"""An array in device memory, CuPy's or what a test has in its place: `dtype`, `shape`, `strides`, slices and views as NumPy's."""
Stream = Any
Event = Any
INSTALL: Final = "pip install 'ringsim[gpu-cuda13]' ('ringsim[gpu-cuda12]' for a driver of CUDA 12)"
"""What brings CuPy, cuDNN and what they need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel of `backends/kernels`: the file, the function, and the types it is compiled for, as ``(macro, type)``."""

    source: str
    name: str
    types: tuple[tuple[str, str], ...] = ()


class Launch(NamedTuple):
    """How many blocks of how many threads, and the dynamic shared memory of each block in bytes."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_nbytes: int = 0


class Calls(Protocol):
    """One rank's device. Whatever takes a stream only queues: it returns at once, and its work comes in the stream's order.

    Work on different streams has no order but that of events. A failure of earlier work may be raised by any call
    (DeviceError).
    """

    def activate(self) -> None:
        """Make the device the current one of this thread."""

    def caller(self, stream: Any) -> Stream:
        """The caller's stream: CuPy's, torch's, the address of one as an int; None is the current one of CuPy in this thread."""

    def clocks(self) -> dict[str, Any]:
        """The device's clocks now, in MHz, as its driver reports them; or why they are not known."""

    def view(self, name: str, value: Any) -> DeviceArray:
        """The caller's argument `name` as an array of this device that shares its memory. Raises ArrayError."""

    def empty(self, nbytes: int) -> DeviceArray:
        """`nbytes` of device memory as a flat uint8 array, aligned to 256 bytes: an allocation of its own."""

    def pooled(self, nbytes: int, stream: Stream) -> DeviceArray:
        """The same from the pool that the caller's own arrays come from, for work that comes after what `stream` has been given.

        Earlier work on `stream` may still use it, for who had it before has given it back at once; so may later work after it.
        """

    def pinned(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """`nbytes` of page-locked host memory."""

    def stream(self) -> Stream:
        """A new stream, which does not wait for the default one."""

    def record(self, stream: Stream, event: Event | None = None) -> Event:
        """An event (a new one, or this one again) that is complete when all that is queued on `stream` so far is."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued on `stream` from now on begins after `event` is complete; the host does not wait."""

    def done(self, event: Event) -> bool:
        """Whether an event is complete; the host does not wait."""

    def synchronize(self, event: Event) -> None:
        """Let the host wait until an event is complete. Never called inside the ring loop."""

    def elapsed_s(self, first: Event, last: Event) -> float:
        """Seconds from one complete event to another, by the device's clock."""

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Copy as many bytes between flat uint8 arrays, each in device or in page-locked memory."""

    def fill(self, target: DeviceArray, byte: int, stream: Stream) -> None:
        """Set each byte of a flat uint8 array."""

    def launch(self, kernel: Kernel, shape: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        """Queue a kernel. An array stands for the address of its first element, None for a null pointer; numbers are NumPy's.

        A NumPy array of shape () whose dtype has fields is a struct, passed by value.
        """

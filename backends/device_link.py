"""A link for ranks of one process that share a GPU: messages are copies within its memory."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from ringsim.backends.cuda import Calls
from ringsim.backends.loopback import Half
from ringsim.backends.track import Track

if TYPE_CHECKING:
    from ringsim.topology.parts import Drives, Progress


class DeviceLink:
    """Copies messages of a loopback World on a stream of its own; a loopback `Link`.

    All messages are copied in the order in which they were matched, so those of equal tags stay in theirs. `calls` may be that of
    the ranks only if it takes calls of several threads, or one thread drives them all.
    """

    progress: Progress = "offload"
    drives: Drives = "both"
    # whether SMs or a copy engine copy within a device is the driver's choice
    device_share: float | None = None

    def __init__(self, calls: Calls) -> None:
        self._track: Track[tuple[Half, Half]] = Track(calls)
        self._lock = threading.Lock()

    def move(self, source: int, target: int, send: Half, recv: Half) -> None:
        """Queue a copy."""
        with self._lock:
            self._track.copy(recv.data, send.data, (send, recv))

    def poll(self) -> None:
        """Mark what has been copied. Raises DeviceError."""
        with self._lock:
            for send, recv in self._track.finished():
                send.handle.done_s = recv.handle.done_s = time.perf_counter()

    def close(self) -> None:
        """The stream goes with the object."""

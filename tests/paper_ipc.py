"""CUDA IPC on paper: allocations of ranks in one process, found by the numbers that their handles hold."""

import itertools
import threading

import numpy as np
from paper_gpu import DeviceArray

from ringsim.backends.ipc import HANDLE_NBYTES, Shared
from ringsim.errors import TransportError


def root_of(array):
    """The allocation that an array lies in."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


class Host:
    """What all processes of a host share."""

    def __init__(self):
        self.numbers = itertools.count(1)
        self.allocations = {}
        self.lock = threading.Lock()


class PaperSharing:
    """`Sharing` of one rank; `opened` are the handles that it has open, `log` all that it opened and closed."""

    def __init__(self, host, *, unshareable=False, unseen=False):
        self._host = host
        self._handles = {}
        self._unshareable = unshareable
        self._unseen = unseen
        self.opened = {}
        self.log = []

    def export(self, array):
        if self._unshareable:
            raise TransportError("this memory cannot be shared: use --transport mpi-staged")
        root = root_of(array)
        base = root.ctypes.data
        if base not in self._handles or self._handles[base][1] is not root:
            with self._host.lock:
                number = next(self._host.numbers)
                self._host.allocations[number] = root
            self._handles[base] = number.to_bytes(HANDLE_NBYTES, "little"), root
        return Shared(self._handles[base][0], base, array.ctypes.data - base, root.nbytes, root)

    def open(self, handle, extent):
        if self._unseen:
            raise TransportError("that memory cannot be opened: let every process see all GPUs")
        assert handle not in self.opened.values(), "an allocation is opened twice"
        root = self._host.allocations[int.from_bytes(handle, "little")]
        assert root.nbytes == extent
        opened = root.view(DeviceArray)
        self.opened[id(opened)] = handle
        self.log.append(("open", handle))
        return opened

    def close(self, base):
        self.log.append(("close", self.opened.pop(id(base))))

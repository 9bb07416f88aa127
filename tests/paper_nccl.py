"""NCCL on paper: kernels that wait on the device for their peer's, in the order in which a communicator got them; making a
communicator, and its first message, keep the host until the other side has come."""

import ctypes
import itertools
import threading
import time
from collections import deque

import numpy as np
from paper_gpu import Event, PaperGpu

PATIENCE_S = 5.0


class NcclError(RuntimeError):
    pass


class NcclGpu(PaperGpu):
    """A paper GPU whose streams have addresses, and whose kernels may wait for another GPU."""

    def stream(self):
        made = super().stream()
        made.ptr = made.number
        return made

    def synchronize(self, event):
        limit = time.monotonic() + PATIENCE_S
        while not event.done:
            self._step(self._urgent(event))
            assert time.monotonic() < limit, "the host waits for ever"
            time.sleep(0)


class Fabric:
    """What the GPUs share: for each communicator, the kernels of its two sides that have begun and wait."""

    def __init__(self):
        self.lock = threading.Lock()
        self.idents = itertools.count()
        self.meetings = {}
        self.begun = {}
        self.waiting = {}
        self.most_waiting = 0

    def meet(self, ident, what):
        """Keep the host until both sides have come."""
        with self.lock:
            barrier = self.meetings.setdefault((ident, what), threading.Barrier(2))
        try:
            barrier.wait(PATIENCE_S)
        except threading.BrokenBarrierError as error:
            raise NcclError("NCCL_ERROR_SYSTEM_ERROR: the other side does not come") from error

    def begin(self, ident, side, gpu, kernel):
        """A kernel is at the head of its stream; with the other side's, it moves and both end."""
        with self.lock:
            self.waiting.setdefault(gpu, set()).add(kernel)
            self.most_waiting = max(self.most_waiting, len(self.waiting[gpu]))
            sides = self.begun.setdefault(ident, (deque(), deque()))
            sides[side].append((gpu, kernel))
            if sides[0] and sides[1]:
                self._move(sides[0].popleft(), sides[1].popleft())

    def _move(self, source, target):
        (_, (from_address, count, ended)), (_, (to_address, expected, received)) = source, target
        assert count == expected, "NCCL would wait for ever, or write beyond"
        np.copyto(_bytes_at(to_address, count), _bytes_at(from_address, count))
        for gpu, kernel in (source, target):
            self.waiting[gpu].discard(kernel)
        ended.finished = received.finished = 1


def _bytes_at(address, count):
    return np.frombuffer((ctypes.c_uint8 * count).from_address(address), np.uint8)


class PaperNccl:
    """The module cupy.cuda.nccl as one rank sees it."""

    NCCL_UINT8 = 1

    def __init__(self, fabric, gpu):
        self.fabric = fabric
        self.gpu = gpu
        self.made = []

    def get_version(self):
        return 22703

    def get_unique_id(self):
        with self.fabric.lock:
            return (next(self.fabric.idents),)

    def NcclCommunicator(self, count, ident, rank):  # noqa: N802 - CuPy's name
        assert count == 2
        made = _Communicator(self, ident, rank)
        self.made.append(made)
        return made


class _Communicator:
    def __init__(self, module, ident, side):
        self._module = module
        self._ident = ident
        self._side = side
        self._connected = False
        self._last = None
        self.broken = None
        self.ended = None
        module.fabric.meet(ident, "made")

    def send(self, address, count, kind, peer, stream):
        assert (self._side, peer) == (0, 1)
        self._queue(address, count, kind, stream)

    def recv(self, address, count, kind, peer, stream):
        assert (self._side, peer) == (1, 0)
        self._queue(address, count, kind, stream)

    def _queue(self, address, count, kind, stream):
        assert kind == PaperNccl.NCCL_UINT8
        gpu, fabric = self._module.gpu, self._module.fabric
        if not self._connected:
            fabric.meet(self._ident, "connected")
            self._connected = True
        where = next(one for one in gpu.streams if one.number == stream)
        ended = Event()
        ended.turn = 1
        if self._last is not None:
            gpu.wait(where, self._last)
        self._last = ended
        kernel = address, count, ended
        gpu.defer(lambda: fabric.begin(self._ident, self._side, gpu, kernel), where)
        gpu.wait(where, ended)

    def check_async_error(self):
        if self.broken:
            raise NcclError(self.broken)

    def destroy(self):
        self.ended = "destroyed"

    def abort(self):
        self.ended = "aborted"

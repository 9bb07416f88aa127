"""A GPU on paper: the CUDA calls over NumPy memory, whose streams do what they are given as late, and in as odd an order, as
events allow. What the order of events does not force goes wrong here sooner or later."""

import random
import time
import weakref
from collections import defaultdict, deque

import numpy as np

from ringsim.errors import ArrayError, DeviceError

POISON = 0xFF
"""Of memory that nothing was written to: NaN in every floating dtype."""


class DeviceArray(np.ndarray):
    """Memory of the paper GPU: views are free, but whatever reads or writes its bytes on the host is an error."""

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        raise AssertionError(f"the host computes {ufunc.__name__} with device memory")

    def __array_function__(self, func, types, args, kwargs):
        raise AssertionError(f"the host calls {func.__name__} on device memory")

    def __setitem__(self, key, value):
        raise AssertionError("the host writes device memory")

    def copy(self, order="C"):
        raise AssertionError("the host copies device memory")

    def astype(self, *args, **kwargs):
        raise AssertionError("the host converts device memory")

    def tobytes(self, order="C"):
        raise AssertionError("the host reads device memory")


class Event:
    """Complete when the stream that it was last recorded on has come so far."""

    def __init__(self):
        self.stream = None
        self.turn = 0
        self.finished = 0
        self.at_s = 0.0

    @property
    def done(self):
        return self.finished >= self.turn


def bare(array):
    """The bytes of an array from the pool, which this does not keep: work that is queued holds no memory on a device either."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if owner.base is None or not array.size:
        return array.view(np.ndarray)
    offset = array.ctypes.data - owner.ctypes.data
    return np.ndarray(array.shape, array.dtype, owner.base, offset, array.strides)


SPEEDS = (1, 30, 1000)
"""How much likelier than others a stream comes to its turn: some race ahead, some lag behind, as the seed has it."""


class Stream:
    def __init__(self, number, speed):
        self.number = number
        self.speed = speed
        self.queue = deque()


class PaperGpu:
    """`Calls` with a seed for the order; `run` executes kernels (an Emulator's `launch`), `log` records what was called."""

    lazy = False
    """Whether a stream does nothing but what an event that is asked for needs: as late as can be."""

    def __init__(self, seed=0, *, run=None, eager=False):
        self.rng = random.Random(seed)
        self.streams = []
        self.log = []
        self.allocated = []
        self.broken = None
        self.eager = eager
        self._run = run
        self._pools = defaultdict(list)
        self.current = self.stream()

    # memory

    def activate(self):
        self.log.append(("activate",))

    def caller(self, stream):
        return self.current if stream is None else stream

    def empty(self, nbytes):
        self.log.append(("empty", nbytes))
        base = np.full(nbytes + 256, POISON, np.uint8)
        start = -base.ctypes.data % 256
        self.allocated.append(nbytes)
        return base[start : start + nbytes].view(DeviceArray)

    def pooled(self, nbytes, stream):
        """Of the stream's own pool: what nobody holds any more may be taken at once, whatever is queued."""
        self.log.append(("pooled", nbytes, stream.number))
        free = self._pools[stream.number, nbytes]
        memory = free.pop() if free else bytearray([POISON] * (nbytes + 256))
        base = np.frombuffer(memory, np.uint8)
        weakref.finalize(base, free.append, memory)
        start = -base.ctypes.data % 256
        return base[start : start + nbytes].view(DeviceArray)

    def clocks(self):
        return {"unknown": "paper has none"}

    def view(self, name, value):
        if not isinstance(value, DeviceArray):
            raise ArrayError(f"{name} is {type(value).__name__}, not memory of the paper GPU")
        return value

    def pinned(self, nbytes):
        self.log.append(("pinned", nbytes))
        return np.full(nbytes, POISON, np.uint8)

    def upload(self, array):
        """A host array's values in device memory (of the caller, made before anything is queued)."""
        array = np.asarray(array)
        made = self.empty(array.nbytes)
        made.view(np.ndarray)[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return made.view(array.dtype).reshape(array.shape)

    def download(self, array):
        """What device memory holds after all that is queued has been done."""
        self.drain()
        return np.array(array.view(np.ndarray))

    # streams and events

    def stream(self):
        made = Stream(len(self.streams), self.rng.choice(SPEEDS))
        self.streams.append(made)
        return made

    def record(self, stream, event=None):
        event = event or Event()
        event.turn += 1
        event.stream = stream
        self._queue(stream, ("record", event, event.turn))
        return event

    def wait(self, stream, event):
        self.log.append(("wait", stream.number))
        self._queue(stream, ("wait", event, event.turn))

    def done(self, event):
        self._raise()
        for _ in range(self.rng.choice((0, 0, 1, 3))):
            self._step(self._urgent(event))
        self._raise()
        return event.done

    def synchronize(self, event):
        self.log.append(("synchronize",))
        while not event.done:
            if not self._step(self._urgent(event)):
                raise AssertionError("an event that nothing completes")
        self._raise()

    def elapsed_s(self, first, last):
        assert first.done and last.done
        return last.at_s - first.at_s

    # work

    def copy(self, target, source, stream):
        assert target.nbytes == source.nbytes and target.dtype == source.dtype == np.uint8
        self.log.append(("copy", target.nbytes, stream.number))
        into, from_ = bare(target), bare(source)
        self.defer(lambda: np.copyto(into, from_), stream)

    def fill(self, target, byte, stream):
        into = bare(target)
        self.defer(lambda: into.fill(byte), stream)

    def launch(self, kernel, shape, arguments, stream):
        self.log.append(("launch", kernel.name, stream.number))
        plain = [bare(one) if isinstance(one, np.ndarray) else one for one in arguments]
        self.defer(lambda: self._run(kernel, shape, plain), stream)

    def defer(self, function, stream):
        """Queue any function."""
        self._raise()
        self._queue(stream, ("run", function, 0))

    def _queue(self, stream, item):
        stream.queue.append(item)
        if self.eager:
            self.drain()

    # what happens on the device

    def _ready(self):
        return [
            stream
            for stream in self.streams
            if stream.queue and not (stream.queue[0][0] == "wait" and stream.queue[0][1].finished < stream.queue[0][2])
        ]

    def _urgent(self, event):
        """Of a lazy device, the only stream that goes on: the one that an event waits for."""
        stream = event.stream if self.lazy else None
        while stream is not None and stream.queue and stream.queue[0][0] == "wait" and not stream.queue[0][1].done:
            stream = stream.queue[0][1].stream
        return stream

    def _step(self, only=None):
        """Do one thing that may be done now; whether there was one."""
        ready = [stream for stream in self._ready() if only is None or stream is only]
        if not ready:
            return False
        kind, what, turn = self.rng.choices(ready, [stream.speed for stream in ready])[0].queue.popleft()
        if kind == "record":
            what.finished, what.at_s = turn, time.perf_counter()
        elif kind == "run":
            try:
                what()
            except Exception as error:  # noqa: BLE001 - a kernel that fails says so at a later call
                self.broken = self.broken or error
        return True

    def drain(self):
        """Do all that is queued."""
        while self._step():
            pass
        self._raise()
        assert not any(stream.queue for stream in self.streams), "streams wait for events that nothing completes"

    def _raise(self):
        if self.broken is not None:
            raise DeviceError(f"the device failed: {self.broken!r}") from self.broken

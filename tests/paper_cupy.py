"""As much of CuPy as backends/cupy_calls.py uses, over NumPy memory: every call is kept in `said`, in order."""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np


class CUDARuntimeError(RuntimeError):
    """As CuPy's, which takes the status."""


class CUDADriverError(RuntimeError):
    pass


class OutOfMemoryError(MemoryError):
    pass


class CompileException(Exception):
    pass


class Array(np.ndarray):
    """cupy.ndarray: of one device, with an address."""

    def __new__(cls, shape, dtype=np.uint8, memptr=None, device=0):
        made = np.full(shape, 1, dtype).view(cls)
        made.place = device
        return made

    def __array_finalize__(self, other):
        self.place = getattr(other, "place", 0)

    @property
    def device(self):
        return SimpleNamespace(id=self.place)

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class PaperCupy:
    """A cupy module with `devices` GPUs."""

    def __init__(self, devices=2):
        self.said = []
        self.devices = devices
        self.current = 0
        self.failing = {}
        self.statuses = {}
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            memcpyDefault=4,
            getDeviceCount=self._count,
            setDevice=self._set,
            eventQuery=lambda event: self.statuses.get(event, 0),
            memcpyAsync=lambda *given: self.say("memcpyAsync", *given),
            memsetAsync=lambda *given: self.say("memsetAsync", *given),
            getDeviceProperties=lambda device: {
                "name": b"Paper",
                "major": 9,
                "minor": 0,
                "multiProcessorCount": 132,
                "totalGlobalMem": 2**37,
                "uuid": bytes(range(16)),
            },
            deviceGetPCIBusId=lambda device: "0000:18:00.0",
            driverGetVersion=lambda: 13000,
            runtimeGetVersion=lambda: 13000,
        )
        cuda = SimpleNamespace(
            runtime=runtime,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            compiler=SimpleNamespace(CompileException=CompileException),
            Stream=self._made(),
            ExternalStream=self._external(),
            Event=lambda: self.Event(self),
            Memory=lambda nbytes: self.say("malloc", nbytes),
            MemoryPointer=lambda memory, offset: None,
            alloc_pinned_memory=self.pin,
            get_elapsed_time=lambda first, last: 1500.0,
            get_current_stream=lambda: self.Stream(self, f"current of {self.current}"),
        )
        self.module = ModuleType("cupy")
        vars(self.module).update(
            cuda=cuda,
            ndarray=Array,
            empty=lambda count, dtype: Array((count,), dtype, device=self.current),
            from_dlpack=self._from_dlpack,
            asarray=self._from_dlpack,
            RawModule=self._module,
            __version__="14.2.0",
        )

    class Stream:
        def __init__(self, owner, name, device=-1):
            self.owner, self.name, self.ptr, self.device_id = owner, name, id(self), device

        def wait_event(self, event):
            self.owner.say("wait_event", self.name, event)

        def __enter__(self):
            self.owner.say("enter", self.name)

        def __exit__(self, *_):
            self.owner.say("exit", self.name)

    class Event:
        def __init__(self, owner):
            self.owner, self.ptr = owner, id(self)

        @property
        def done(self):
            raise AssertionError("CuPy's Event.done is False of a device that failed")

        def record(self, stream):
            self.owner.say("record", stream.name)

        def synchronize(self):
            self.owner.say("synchronize")

    def _made(self):
        owner = self

        class Stream(self.Stream):
            def __init__(self, *, non_blocking):
                super().__init__(owner, "non-blocking" if non_blocking else "blocking", owner.current)

            @classmethod
            def from_external(cls, other):
                version, address = other.__cuda_stream__()
                assert version == 0
                made = cls(non_blocking=False)
                made.name, made.device_id = f"external {address}", -1
                return made

        return Stream

    def _external(self):
        class ExternalStream(self.Stream):
            def __init__(self, *given):
                raise AssertionError("CuPy 14 warns that this is deprecated")

        return ExternalStream

    def _set(self, device):
        self.current = device
        self.say("setDevice", device)

    def _count(self):
        if self.devices is None:
            raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.devices

    def say(self, name, *given):
        self.said.append((name, *given))
        if name in self.failing:
            raise self.failing[name]

    def pin(self, nbytes):
        self.say("pinned", nbytes)
        return bytearray(nbytes)

    def _from_dlpack(self, value):
        made = np.asarray(value.array).view(Array)
        made.place = value.device_id
        return made

    def _module(self, *, code, options):
        self.say("compile", options)
        owner = self

        class Function:
            def __init__(self, name):
                self.name, self.shared = name, 0

            @property
            def max_dynamic_shared_size_bytes(self):
                return self.shared

            @max_dynamic_shared_size_bytes.setter
            def max_dynamic_shared_size_bytes(self, nbytes):
                owner.say("shared", nbytes)
                self.shared = nbytes

            def __call__(self, grid, block, given, *, shared_mem, stream):
                owner.say("launch", self.name, grid, block, given, shared_mem, stream.name)

        return SimpleNamespace(get_function=Function)

    @contextmanager
    def installed(self, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "cupy", self.module)
            yield self

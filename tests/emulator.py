"""Runs the CUDA sources on the CPU: g++ compiles them behind a shim that makes each thread of a block a fiber.

What a launch does wrong raises EmulationError: threads of a block that part ways at a barrier or a shuffle, an address that is
not aligned to its access, an index beyond a local array, arguments that are not the kernel's. The order of blocks and of threads
between barriers is drawn from a seed. What it cannot see: races that this order hides, and time.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from ringsim.backends.cuda import Kernel, Launch
from ringsim.backends.cuda_sources import definitions, names_of, text_of

SHIM = Path(__file__).parent / "cuda_on_cpu"
COMPILE = ("-std=gnu++17", "-O2", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fsanitize=alignment,bounds")
CANARY_NBYTES = 256
CANARY = 0xA5

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent: the CUDA kernels cannot run on this CPU")


class EmulationError(AssertionError):
    """A kernel did what a GPU forbids."""


class Order(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_nbytes", ctypes.c_uint),
        ("seed", ctypes.c_uint),
    ]


class Emulator:
    """`launch` runs a kernel to its end; arguments as in `Calls.launch`, arrays being NumPy's."""

    def __init__(self, seed=0):
        self.seed = seed
        self.launches = 0
        self._lock = threading.Lock()

    def launch(self, kernel: Kernel, shape: Launch, arguments):
        library = compiled(text_of(kernel.source), names_of(kernel.source), definitions(kernel.types))
        with self._lock:
            self.launches += 1
            seed = self.seed and self.seed + self.launches
        run(library, kernel.name, shape, arguments, seed)


def run(library, name, shape, arguments, seed=0):
    """Launch kernel `name` of a compiled source."""
    check_shape(name, shape)
    values = [value_of(argument) for argument in arguments]
    check_arguments(name, getattr(library, f"describe_{name}")().decode().split(), values)
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for _, value in values))
    order = Order((*shape.grid,), (*shape.block,), shape.shared_nbytes, seed)
    wrong = getattr(library, f"launch_{name}")(pointers, ctypes.byref(order)).decode()
    if wrong:
        raise EmulationError(f"{name}: {wrong}")


def value_of(argument):
    """The kind of an argument (pointer, integer, float, struct) and its bytes as an array that keeps them alive."""
    if argument is None:
        return "p", np.zeros(1, np.uint64)
    if isinstance(argument, np.ndarray):
        if argument.dtype.names is not None:
            assert argument.shape == ()
            return "s", argument
        return "p", np.array([argument.ctypes.data], np.uint64)
    assert isinstance(argument, np.generic), f"{argument!r} is neither an array nor a number of NumPy's"
    return ("f" if argument.dtype.kind == "f" else "i"), np.array([argument])


def check_shape(name, shape):
    threads = shape.block[0] * shape.block[1] * shape.block[2]
    if not (1 <= threads <= 1024 and shape.block[2] <= 64):
        raise EmulationError(f"{name}: blocks of {shape.block} threads, at most 1024 in all and 64 along z")
    for count, most in zip(shape.grid, (2**31 - 1, 65535, 65535), strict=True):
        if not 1 <= count <= most:
            raise EmulationError(f"{name}: a grid of {shape.grid}, from 1 to 2**31 - 1, 65535 and 65535 are allowed")
    if not 0 <= shape.shared_nbytes <= 227 * 1024:
        raise EmulationError(f"{name}: {shape.shared_nbytes} B of shared memory, an SM has 227 KiB at most")


def check_arguments(name, parameters, values):
    found = [f"{kind}{value.itemsize}" for kind, value in values]
    if found != parameters:
        raise EmulationError(f"{name}: takes {' '.join(parameters)} (pointer, integer, float, struct), given {' '.join(found)}")


@cache
def compiled(text, names, options):
    """The shared library of a source's text; kept between runs by what it is made of."""
    tail = '\n#include "launch.h"\n' + "".join(f"ON_CPU_KERNEL({name})\n" for name in names)
    whole = '#include "cuda_on_cpu.h"\n' + text + tail
    shim = "".join(path.read_text() for path in sorted(SHIM.glob("*.h")))
    key = hashlib.sha256("\0".join((whole, shim, *COMPILE, *options, os.uname().machine)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"ringsim-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"{key}.so"
    if not made.exists():
        build(whole, options, made)
    library = ctypes.CDLL(str(made))
    for name in names:
        getattr(library, f"launch_{name}").restype = ctypes.c_char_p
        getattr(library, f"describe_{name}").restype = ctypes.c_char_p
    return library


def build(text, options, made):
    """Compile to another name, then rename: processes that build the same at once do not disturb one another."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        source, built = Path(folder) / "kernel.cpp", Path(folder) / "kernel.o"
        source.write_text(text)
        # linked apart: what -fsanitize calls is in launch.h, not in libubsan
        for command in (
            ["-c", *COMPILE, *options, f"-I{SHIM}", str(source), "-o", str(built)],
            ["-shared", str(built), "-o", f"{built}.so"],
        ):
            done = subprocess.run(["g++", *command], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                raise EmulationError(f"g++ {' '.join(options)}: {done.stderr[:4000]}")
        Path(f"{built}.so").rename(made)


class Immediate:
    """The `launch` of `Calls`, done at once."""

    def __init__(self, seed=0):
        self.emulator = Emulator(seed)

    def launch(self, kernel, shape, arguments, stream):
        self.emulator.launch(kernel, shape, arguments)


class Canaries:
    """Arrays in memory of their own, with bytes around and between their elements that `check` finds unchanged."""

    def __init__(self):
        self._made = []

    def array(self, shape, dtype, *, offset=0, axes=None, pad=0, fill=0xFF):
        """An array, `offset` bytes beyond a multiple of 256, all `fill`.

        Its axes lie in memory in the order `axes`, each with `pad` elements more than it shows.
        """
        dtype = np.dtype(dtype)
        axes = tuple(range(len(shape))) if axes is None else axes
        whole = [shape[axis] + pad for axis in axes]
        nbytes = int(np.prod(whole)) * dtype.itemsize
        block = np.full(nbytes + 2 * CANARY_NBYTES + 512, CANARY, np.uint8)
        begin = CANARY_NBYTES + -(block.ctypes.data + CANARY_NBYTES) % 256 + offset

        def shown(flat):
            return flat.reshape(whole)[tuple(slice(shape[axis]) for axis in axes)].transpose(np.argsort(axes))

        made = shown(block[begin : begin + nbytes].view(dtype))
        outside = np.ones(block.size, bool)
        elements = shown(np.arange(int(np.prod(whole)))).reshape(-1, 1)
        outside[begin + elements * dtype.itemsize + np.arange(dtype.itemsize)] = False
        block[~outside] = fill
        self._made.append((block, outside))
        return made

    def holding(self, values, **layout):
        """An array with these values."""
        values = np.asarray(values)
        made = self.array(values.shape, values.dtype, **layout)
        made[...] = values
        return made

    def check(self):
        for block, outside in self._made:
            assert (block[outside] == CANARY).all(), "written beside an array's elements"

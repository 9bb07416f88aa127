"""CuPy's own arrays, of memory that is nowhere: what needs their addresses, shapes and strides alone works without a GPU."""

import numpy as np
import pytest

from ringsim.arrays import check_apart, share_memory
from ringsim.backends.cuda_strides import address_of, place_of
from ringsim.backends.cupy_calls import Foreign, address
from ringsim.dtypes import numpy_dtype
from ringsim.errors import ArrayError

cupy = pytest.importorskip("cupy", reason="needs CuPy: pip install 'ringsim[gpu-cuda13]'")
BASE = 1 << 40


def nowhere(nbytes, at=BASE):
    memory = cupy.cuda.UnownedMemory(at, nbytes, None, 0)
    return cupy.ndarray((nbytes,), np.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_bytes_seen_as_an_array_and_back(dtype):
    itemsize = numpy_dtype(dtype).itemsize
    array = nowhere(1024)[64:].view(numpy_dtype(dtype))[: 2 * 3 * 4 * 5].reshape(2, 3, 4, 5)
    assert array.dtype == numpy_dtype(dtype) and array.dtype.name == dtype
    part = array[1:, :, 2:4].transpose(0, 2, 1, 3)
    assert part.flags.c_contiguous is False and array.flags.c_contiguous is True
    place = place_of(part)
    assert place.shape == (1, 2, 3, 5)
    assert place.strides == (60 * itemsize, 5 * itemsize, 20 * itemsize, itemsize)
    assert address(part) == address_of(part) == BASE + 64 + (60 + 10) * itemsize
    flat = array.reshape(-1).view(np.uint8)
    assert (flat.shape, address(flat), flat.nbytes) == ((120 * itemsize,), BASE + 64, array.nbytes)
    assert array.device.id == 0


def test_who_shares_memory():
    q, empty = nowhere(96).view(np.float32).reshape(1, 2, 3, 4), nowhere(0).view(np.float32).reshape(1, 0, 3, 4)
    assert share_memory(q, q[:, 1:])
    assert not share_memory(q[:, :1], q[:, 1:])
    # slices of one packed array
    assert not share_memory(q[:, :, :1], q[:, :, 1:])
    # a rank without rows
    assert not share_memory(q, empty) and not share_memory(empty, empty)
    check_apart({"q": empty, "k": q}, {"out": empty})
    with pytest.raises(ArrayError, match="out shares memory with k"):
        check_apart({"q": empty, "k": q}, {"out": q})


def test_what_is_asked_of_cupy_is_there():
    """Names and arguments that only a GPU would miss."""
    runtime = cupy.cuda.runtime
    for name in ("setDevice", "eventQuery", "memcpyAsync", "memsetAsync", "ipcGetMemHandle", "ipcOpenMemHandle", "memcpyDefault"):
        assert hasattr(runtime, name)
    assert runtime.memcpyAsync.__doc__.startswith(
        "memcpyAsync(intptr_t dst, intptr_t src, size_t size, int kind, intptr_t stream"
    )
    assert runtime.memsetAsync.__doc__.startswith("memsetAsync(intptr_t ptr, int value, size_t size, intptr_t stream")
    assert "illegal" in str(runtime.CUDARuntimeError(700)).lower()
    stream = cupy.cuda.Stream.from_external(Foreign(77))
    assert (stream.ptr, stream.device_id) == (77, -1)
    assert isinstance(stream, cupy.cuda.Stream)
    assert "max_dynamic_shared_size_bytes" in dir(cupy.RawKernel)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError)
    for error in (runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError, cupy.cuda.compiler.CompileException):
        assert issubclass(error, Exception)

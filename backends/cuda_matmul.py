"""Matrix products by cuBLAS, through CuPy: for what they achieve on a device, which prices FLOPs that are not attention's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from ringsim.backends.cuda import DeviceArray, Stream
from ringsim.backends.cupy_calls import address
from ringsim.errors import DeviceError, MissingDependency

REMEDY = "pip install nvidia-cublas (nvidia-cublas-cu12 for CUDA 12)"


def matmul_by_cublas() -> Callable[[DeviceArray, DeviceArray, DeviceArray, Stream], None]:
    """A function that queues c = a b on a stream of the current device: square arrays, dense, of one dtype.

    Sums are in float32, of float64 in float64; float32 is not rounded to TF32. Raises MissingDependency, DeviceError.
    """
    try:
        from cupy_backends.cuda.api import runtime
        from cupy_backends.cuda.libs import cublas

        # where importing it does not load the library, its first call does
        handle = _handle(cublas)
    except ImportError as error:
        raise MissingDependency(f"matrix products need cuBLAS, which cannot be loaded ({error}): {REMEDY}") from error
    kinds = {
        "float64": (runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F, ctypes.c_double),
        "float32": (runtime.CUDA_R_32F, cublas.CUBLAS_COMPUTE_32F, ctypes.c_float),
        "float16": (runtime.CUDA_R_16F, cublas.CUBLAS_COMPUTE_32F, ctypes.c_float),
        "bfloat16": (runtime.CUDA_R_16BF, cublas.CUBLAS_COMPUTE_32F, ctypes.c_float),
    }

    def matmul(a: DeviceArray, b: DeviceArray, c: DeviceArray, stream: Stream) -> None:
        dtype, compute, scalar = kinds[c.dtype.name]
        rows, one, zero, plain = c.shape[0], scalar(1), scalar(0), cublas.CUBLAS_OP_N
        factors = ctypes.addressof(one), ctypes.addressof(zero)
        try:
            cublas.setStream(handle, stream.ptr)
            # cuBLAS counts by columns: it is given b a of what it sees as transposed
            operands = (address(b), dtype, rows, address(a), dtype, rows)
            result = (address(c), dtype, rows, compute, cublas.CUBLAS_GEMM_DEFAULT)
            cublas.gemmEx(handle, plain, plain, rows, rows, rows, factors[0], *operands, factors[1], *result)
        except cublas.CUBLASError as error:
            raise DeviceError(f"a {c.dtype.name} product of {rows} x {rows}: {error}") from error

    return matmul


def _handle(cublas: Any) -> Any:
    try:
        return cublas.create()
    except cublas.CUBLASError as error:
        raise DeviceError(f"cuBLAS cannot be used on this device: {error}") from error

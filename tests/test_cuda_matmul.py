"""Matrix products as cuBLAS is asked for them: a stand-in that multiplies by columns, as cuBLAS does, in host memory."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from ringsim.backends.cuda_matmul import matmul_by_cublas
from ringsim.errors import DeviceError, MissingDependency

KINDS = {1: np.float64, 0: np.float32, 2: np.float16}


class Cublas:
    """`cupy_backends.cuda.libs.cublas`."""

    CUBLAS_OP_N, CUBLAS_GEMM_DEFAULT, CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F = 0, -1, 68, 70

    class CUBLASError(RuntimeError):
        pass

    def __init__(self, failure=None):
        self.failure, self.computed, self.streams = failure, [], []

    def create(self):
        if self.failure is not None:
            raise self.failure
        return 7

    def setStream(self, handle, stream):  # noqa: N802 - cuBLAS's name
        self.streams.append((handle, stream))

    def gemmEx(  # noqa: N802 - and its arguments
        self, handle, trans_a, trans_b, m, n, k, alpha, a, a_kind, lda, b, b_kind, ldb, beta, c, c_kind, ldc, compute, algo
    ):
        assert (handle, trans_a, trans_b, algo) == (7, 0, 0, -1)
        assert (lda, ldb, ldc) == (m, k, m)
        scalar = ctypes.c_double if compute == self.CUBLAS_COMPUTE_64F else ctypes.c_float
        assert (scalar.from_address(alpha).value, scalar.from_address(beta).value) == (1.0, 0.0)
        self.computed.append(compute)
        left, right, made = (_columns(*one) for one in ((a, a_kind, m, k), (b, b_kind, k, n), (c, c_kind, m, n)))
        made[...] = left @ right


def _columns(address, kind, rows, columns):
    dtype = np.dtype(KINDS[kind])
    memory = (ctypes.c_uint8 * (rows * columns * dtype.itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(columns, rows).T


@pytest.fixture
def cublas(monkeypatch):
    def of(failure=None):
        made = Cublas(failure)
        libs = pytest.importorskip("cupy_backends.cuda.libs")
        monkeypatch.setitem(vars(libs), "cublas", made)
        return made

    return of


@pytest.mark.parametrize(("dtype", "compute"), [("float64", 70), ("float32", 68), ("float16", 68)])
def test_the_product_is_that_of_rows(cublas, dtype, compute):
    fake, rng = cublas(), np.random.default_rng(0)
    a, b = (rng.integers(-3, 4, (5, 5)).astype(dtype) for _ in "ab")
    c = np.zeros((5, 5), dtype)
    matmul_by_cublas()(a, b, c, SimpleNamespace(ptr=11))
    np.testing.assert_array_equal(c, a @ b)
    assert (fake.computed, fake.streams) == ([compute], [(7, 11)])


def test_a_library_that_is_missing_is_named(cublas):
    cublas(ImportError("no libcublas.so.13"))
    with pytest.raises(MissingDependency, match=r"cannot be loaded \(no libcublas.so.13\): pip install nvidia-cublas"):
        matmul_by_cublas()


def test_a_library_that_fails_is_told(cublas):
    cublas(Cublas.CUBLASError("CUBLAS_STATUS_NOT_INITIALIZED"))
    with pytest.raises(DeviceError, match="cuBLAS cannot be used on this device: CUBLAS_STATUS_NOT_INITIALIZED"):
        matmul_by_cublas()

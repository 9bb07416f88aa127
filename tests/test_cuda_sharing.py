"""What CUDA IPC is asked, through CuPy's runtime and the driver: recorded, for only GPUs can share memory."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from paper_cupy import CUDARuntimeError, PaperCupy

from ringsim.backends.cuda_sharing import CudaSharing
from ringsim.errors import TransportError

BASE, EXTENT = 0x7F00_0000_0000, 4096
HANDLE = bytes(range(64))


class Memory:
    """cupy.cuda.Memory: an allocation of its own."""


class Pooled(Memory):
    """cupy.cuda.memory.PooledMemory: what the pool takes back."""


class Driver:
    """libcuda.so.1, which knows one allocation."""

    status = 0

    def cuMemGetAddressRange_v2(self, base, extent, pointer):  # noqa: N802 - the driver's name
        assert isinstance(pointer, ctypes.c_uint64) and BASE <= pointer.value < BASE + EXTENT
        base._obj.value, extent._obj.value = BASE, EXTENT
        return self.status


@pytest.fixture
def paper(monkeypatch):
    made = PaperCupy()
    made.driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": made.driver}.__getitem__)

    def said(name, value):
        def call(given):
            made.say(name, given)
            return value

        return call

    made.module.cuda.runtime.ipcGetMemHandle = said("get", HANDLE)
    made.module.cuda.runtime.ipcOpenMemHandle = said("open", BASE)
    made.module.cuda.runtime.ipcCloseMemHandle = said("close", None)
    made.module.cuda.Memory = Memory
    made.module.cuda.UnownedMemory = lambda base, extent, owner: SimpleNamespace(ptr=base, size=extent)
    made.module.cuda.MemoryPointer = lambda memory, offset: SimpleNamespace(ptr=memory.ptr + offset)
    made.module.ndarray = lambda shape, dtype, memptr: SimpleNamespace(
        shape=shape, dtype=np.dtype(dtype), data=memptr, nbytes=shape[0]
    )
    with made.installed(monkeypatch):
        yield made


def array(offset, nbytes, memory):
    return SimpleNamespace(data=SimpleNamespace(ptr=BASE + offset, mem=memory), nbytes=nbytes)


def test_an_array_is_where_its_allocation_is_and_so_far_into_it(paper):
    own = Memory()
    shared = CudaSharing().export(array(512, 100, own))
    assert shared == (HANDLE, BASE, 512, EXTENT, own)
    assert paper.said == [("get", BASE)]


def test_memory_of_a_pool_is_not_kept_from_it(paper):
    assert CudaSharing().export(array(0, 8, Pooled())).keep is None


def test_what_is_opened_is_the_whole_allocation_and_is_closed_by_its_address(paper):
    sharing = CudaSharing()
    opened = sharing.open(HANDLE, EXTENT)
    assert (opened.shape, opened.dtype, opened.data.ptr) == ((EXTENT,), np.uint8, BASE)
    sharing.close(opened)
    assert paper.said == [("open", HANDLE), ("close", BASE)]


@pytest.mark.parametrize(
    ("call", "step", "said"),
    [
        ("get", lambda sharing: sharing.export(array(0, 8, Memory())), r"sharing 8 bytes .*refused: .*PYTORCH_CUDA_ALLOC_CONF"),
        ("open", lambda sharing: sharing.open(HANDLE, EXTENT), r"opening another .*refused: .*CUDA_VISIBLE_DEVICES"),
        ("close", lambda sharing: sharing.close(array(0, 8, None)), r"closing another .*refused: "),
    ],
)
def test_what_cuda_refuses_is_said_with_a_remedy(paper, call, step, said):
    sharing = CudaSharing()
    paper.failing[call] = CUDARuntimeError("refused")
    with pytest.raises(TransportError, match=said):
        step(sharing)


def test_memory_that_the_driver_does_not_know_is_named_by_its_address(paper):
    paper.driver.status = 1
    with pytest.raises(TransportError, match=r"cuMemGetAddressRange gives error 1 for device memory at 0x7f0000000200: CUDA IPC"):
        CudaSharing().export(array(512, 8, Memory()))

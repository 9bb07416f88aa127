"""The calls that CuPy gets, in their order and with their arguments; what it raises, in our words."""

import sys
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from paper_cupy import Array, CompileException, CUDADriverError, CUDARuntimeError, OutOfMemoryError, PaperCupy

from ringsim.backends.cuda import Kernel, Launch
from ringsim.backends.cuda_devices import device_of
from ringsim.backends.cupy_calls import CupyCalls, load
from ringsim.errors import ArrayError, DeviceError, MissingDependency

CLEAR = Kernel(source="copies.cu", name="clear", types=(("UNIT", "uint4"),))


@pytest.fixture
def paper(monkeypatch):
    with PaperCupy().installed(monkeypatch) as made:
        yield made


@pytest.fixture
def calls(paper):
    made = CupyCalls(1)
    assert paper.said == [("setDevice", 1)]
    paper.said.clear()
    return made


def test_memory(paper, calls):
    assert calls.empty(48).shape == (48,)
    assert calls.empty(0).shape == (0,)
    assert calls.pooled(16, calls.stream()).dtype == np.uint8
    pinned = calls.pinned(32)
    pinned[:] = 7
    assert (pinned.nbytes, pinned.dtype) == (32, np.uint8)
    # an allocation of its own, which CUDA IPC can export; none for nothing
    assert without_device(paper) == [("malloc", 48), ("enter", "non-blocking"), ("exit", "non-blocking"), ("pinned", 32)]


def without_device(paper):
    return [entry for entry in paper.said if entry[0] != "setDevice"]


def test_a_thread_whose_device_is_another_makes_things_on_this_one(paper, calls):
    """As those of autograd, or of a caller with several devices."""
    for make in (lambda: calls.empty(0), lambda: calls.pooled(16, calls.stream())):
        paper.current = 0
        assert make().device.id == 1
    stream = calls.stream()
    for make in (lambda: calls.empty(8), calls.stream, lambda: calls.record(stream)):
        paper.current = 0
        make()
        assert paper.current == 1
    paper.current = 0
    assert calls.caller(None).name == "current of 1"


def test_streams_and_events(paper, calls):
    stream = calls.stream()
    event = calls.record(stream)
    assert calls.record(stream, event) is event
    calls.wait(stream, event)
    assert calls.done(event) is True
    paper.statuses[event.ptr] = 600
    assert calls.done(event) is False
    calls.synchronize(event)
    assert calls.elapsed_s(event, event) == 1.5
    names = ["record", "record", "wait_event", "synchronize"]
    assert [entry[0] for entry in without_device(paper)] == names
    assert without_device(paper)[0] == ("record", "non-blocking")


def test_a_device_that_failed_is_no_event_to_wait_for(paper, calls):
    """CuPy's Event.done is then False for ever."""
    event = calls.record(calls.stream())
    paper.statuses[event.ptr] = 700
    with pytest.raises(DeviceError, match="device 1: asking for an event: 700"):
        calls.done(event)


def test_copies_go_from_the_first_byte_on_the_stream_given(paper, calls):
    stream, target, source = calls.stream(), calls.empty(64), calls.empty(64)
    host = np.zeros(8, np.uint8)
    paper.said.clear()
    calls.copy(target[8:16], source[40:48], stream)
    calls.copy(host, source[:8], stream)
    calls.copy(target[:0], source[:0], stream)
    calls.fill(target[4:], 255, stream)
    calls.fill(target[:0], 255, stream)
    assert paper.said == [
        ("memcpyAsync", target.data.ptr + 8, source.data.ptr + 40, 8, 4, stream.ptr),
        ("memcpyAsync", host.ctypes.data, source.data.ptr, 8, 4, stream.ptr),
        ("memsetAsync", target.data.ptr + 4, 255, 60, stream.ptr),
    ]
    with pytest.raises(DeviceError, match="a copy of 7 bytes into 8"):
        calls.copy(target[:8], source[:7], stream)


def test_a_kernel_is_compiled_once_and_launched_on_its_stream(paper, calls):
    stream, array = calls.stream(), calls.empty(64)
    paper.said.clear()
    for shared in (0, 70_000, 60_000):
        calls.launch(CLEAR, Launch((3, 1, 1), (128, 1, 1), shared), (array, None, np.int32(5)), stream)
    compiled, *rest = paper.said
    assert compiled == ("compile", ("-std=c++17", "-DUNIT=uint4"))
    assert [entry[0] for entry in rest] == ["launch", "shared", "launch", "launch"]
    assert rest[1] == ("shared", 70_000)
    name, grid, block, given, shared, on = rest[0][1:]
    assert (name, grid, block, shared, on) == ("clear", (3, 1, 1), (128, 1, 1), 0, "non-blocking")
    assert given[0] is array
    assert given[1] == 0 and given[1].dtype == np.uintp


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ("malloc", OutOfMemoryError("out of memory"), "device 1: allocating 48 bytes: out of memory; `ringsim memory` says"),
        ("malloc", CUDARuntimeError("cudaErrorIllegalAddress"), "device 1: allocating 48 bytes: cudaErrorIllegalAddress"),
    ],
)
def test_errors_of_cuda_are_ours(paper, calls, call, error, said):
    paper.failing[call] = error
    with pytest.raises(DeviceError, match=said):
        calls.empty(48)


def test_kernels_that_fail(paper, calls):
    paper.failing["launch"] = CUDADriverError("CUDA_ERROR_INVALID_VALUE")
    shape, stream = Launch((1, 1, 1), (32, 1, 1)), calls.stream()
    with pytest.raises(DeviceError, match="device 1: kernel clear: CUDA_ERROR_INVALID_VALUE"):
        calls.launch(CLEAR, shape, (), stream)
    paper.failing["compile"] = CompileException("no such type")
    with pytest.raises(DeviceError, match=r"kernel copy of copies.cu does not compile here: no such type"):
        calls.launch(Kernel(source="copies.cu", name="copy"), shape, (), stream)


def test_what_cupy_lacks_to_compile_is_said_with_what_brings_it(paper, calls, monkeypatch):
    paper.failing["compile"] = RuntimeError("Failed to find CUDA headers.")
    with pytest.raises(MissingDependency, match=r"Failed to find CUDA headers\.\): pip install 'ringsim\[gpu-cuda13\]'"):
        calls.launch(CLEAR, Launch((1, 1, 1), (32, 1, 1)), (), calls.stream())
    monkeypatch.setattr("cupy_backends.cuda.libs.nvrtc.getVersion", Mock(side_effect=RuntimeError("no libnvrtc.so.13")))
    with pytest.raises(MissingDependency, match=r"no libnvrtc.so.13\): pip install"):
        calls.facts()


def test_the_callers_stream(paper, calls):
    own = calls.stream()
    assert calls.caller(own) is own
    assert calls.caller(None).name == "current of 1"
    assert calls.caller(SimpleNamespace(cuda_stream=77)).name == "external 77"
    assert calls.caller(78).name == "external 78"
    paper.current = 0
    other = CupyCalls(0).stream()
    with pytest.raises(ArrayError, match="stream is of device 0; this rank computes on device 1"):
        calls.caller(other)
    for wrong in (True, "0", 1.0):
        with pytest.raises(ArrayError, match="give a stream of CuPy or torch, its address as an int, or None"):
            calls.caller(wrong)


class Foreign:
    """An array of another library on a device."""

    def __init__(self, array, device_id=1, **more):
        self.array, self.device_id = array, device_id
        vars(self).update(more)

    def __dlpack_device__(self):
        return 2, self.device_id

    def __dlpack__(self, **_):
        raise NotImplementedError


def test_arrays_of_others(calls):
    x = np.zeros((2, 3, 4), np.float32)
    mine = Array((2, 3), device=1)
    assert calls.view("q", mine) is mine
    seen = calls.view("q", Foreign(x))
    assert (seen.shape, seen.dtype) == (x.shape, x.dtype)
    assert np.shares_memory(seen, x)
    with pytest.raises(ArrayError, match=r"k is ndarray in host memory; backend 'cupy' needs device memory: cupy.asarray"):
        calls.view("k", x)
    with pytest.raises(ArrayError, match="k lies on device 0; this rank computes on device 1"):
        calls.view("k", Foreign(x, 0))
    with pytest.raises(ArrayError, match=r"k requires grad; pass k.detach\(\)"):
        calls.view("k", Foreign(x, requires_grad=True))
    with pytest.raises(ArrayError, match="its last axis must be dense: copy it first"):
        calls.view("k", Foreign(np.zeros((2, 4, 3), np.float32).transpose(0, 2, 1)))


def test_facts(calls, monkeypatch):
    monkeypatch.setattr("cupy_backends.cuda.libs.nvrtc.getVersion", lambda: (13, 5))
    facts = calls.facts()
    assert (facts["device"], facts["compute_capability"], facts["units"]) == ("Paper", "9.0", 132)
    assert facts["uuid"] == f"0000:18:00.0/{bytes(range(16)).hex()}"
    assert calls.capability == (9, 0)


@pytest.mark.parametrize(("devices", "said"), [(None, "CUDA finds none .*no CUDA-capable device"), (0, "CUDA_VISIBLE_DEVICES")])
def test_no_gpu_is_said_in_one_message(monkeypatch, devices, said):
    with PaperCupy(devices).installed(monkeypatch), pytest.raises(DeviceError, match=f"needs an NVIDIA GPU, and .*{said}"):
        load()


def test_no_cupy_is_said_in_one_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MissingDependency, match=r"backend 'cupy' needs CuPy.*pip install 'ringsim\[gpu-cuda13\]'"):
        load()


@pytest.mark.parametrize(("hosts", "devices"), [("aaaa", [0, 1, 0, 1]), ("aabb", [0, 1, 0, 1]), ("abab", [0, 0, 1, 1])])
def test_ranks_of_a_host_take_its_gpus_in_turn(paper, hosts, devices):
    found = [device_of(SimpleNamespace(hosts=list(hosts), rank=rank)) for rank in range(len(hosts))]
    assert found == devices

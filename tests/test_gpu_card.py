"""What benchmarks/gpu.py asks of CuPy and cuDNN beside ringsim's own calls, as far as it goes without a GPU."""

import subprocess
import sys

import numpy as np
import pytest
from gpu_cases import calibrated, cupy_card, float64
from gpu_cases.card import Operands
from gpu_cases.one_call import CudnnCall
from gpu_cases.watched import Delayed, Timed, Watched
from hypothesis import given
from hypothesis import strategies as st
from paper_card import PaperCard, bench_of
from paper_gpu import PaperGpu

from ringsim.backends.cuda_tiles import Band
from ringsim.dtypes import numpy_dtype
from ringsim.mask import mask_named
from ringsim.reference import dense_attention, dense_backward
from ringsim.workload import Workload

from .paper_cudnn import PaperCudnn

BFLOAT16 = numpy_dtype("bfloat16")


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1))
def test_bfloat16_by_its_bits(values):
    numbers = np.array(values, np.float32)
    half = numbers.astype(BFLOAT16)
    assert cupy_card.narrowed(numbers.copy()).tobytes() == half.tobytes()
    assert cupy_card.widened(half).tobytes() == half.astype(np.float32).tobytes()


def test_bfloat16_of_a_part_of_an_array():
    whole = np.arange(48, dtype=np.float32).reshape(4, 12).astype(BFLOAT16)
    assert (cupy_card.widened(whole[1:, 3:7]) == whole[1:, 3:7].astype(np.float32)).all()


def test_numbers_drawn_by_a_hash_are_unit_normal(tmp_path):
    source = tmp_path / "normal.cpp"
    body = cupy_card.NORMAL.strip()
    source.write_text(
        "#include <cmath>\n#include <cstdio>\n#include <cstdlib>\n"
        "static float cospif(float x) { return cosf(3.14159265f * x); }\n"
        "int main(int, char** given) { unsigned long long seed = atoll(given[1]); for (long i = 0; i < 200000; i++) { float x;\n"
        f"{body}\n fwrite(&x, 4, 1, stdout); }} }}\n"
    )
    subprocess.run(["g++", "-O1", str(source), "-o", str(tmp_path / "normal")], check=True, stdin=subprocess.DEVNULL)
    drawn = [
        np.frombuffer(subprocess.run([str(tmp_path / "normal"), str(seed)], capture_output=True, check=True).stdout, np.float32)
        for seed in (1, 2)
    ]
    for numbers in drawn:
        assert np.isfinite(numbers).all()
        assert abs(numbers.mean()) < 0.01 and abs(numbers.std() - 1) < 0.01 and 3.9 < np.abs(numbers).max() < 6
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.01


def test_the_spinning_kernel_compiles():
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    program = nvrtc.createProgram(cupy_card.SPIN, "spin.cu", (), ())
    nvrtc.compileProgram(program, ("-arch=sm_90",))
    assert nvrtc.getCUBIN(program)


@pytest.mark.parametrize("mask", ["causal", "full", "causal & window(5)"])
def test_float64_is_the_reference_of_the_tests(mask):
    work = Workload(q_len=23, heads=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype="float64", mask=mask_named(mask))
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, 23, heads, width)) for heads, width in ((4, 8), (2, 8), (2, 6), (4, 6)))
    seen = float64.seen_of(work)
    out, lse = float64.attend(np, q, k, v, seen, work.softmax_scale)
    wanted = dense_attention(work, q, k, v)
    assert np.abs(out - wanted[0]).max() < 1e-13 and float64.apart(np, lse, wanted[1]) < 1e-13
    found = float64.backward(np, q, k, v, dout, lse, float64.delta_of(np, out, dout), seen, work.softmax_scale)
    for one, other in zip(found, dense_backward(work, dout, q, k, v), strict=True):
        assert np.abs(one - other).max() < 1e-12
    cuts = [slice(0, 9), slice(9, 10), slice(10, 23)]
    blocks = [[array[0, cut, 1] for cut in cuts] for array in (k, v)]
    rows = float64.rows_of_blocks(np, q[0, :, 3], *blocks, [seen[:, cut] for cut in cuts], work.softmax_scale)
    assert np.abs(rows - out[0, :, 3]).max() < 1e-13


def test_rows_that_see_nothing():
    seen = np.zeros((2, 3), bool)
    q, k = np.ones((1, 2, 1, 4)), np.ones((1, 3, 1, 4))
    out, lse = float64.attend(np, q, k, k, seen, 1.0)
    assert not out.any() and np.isneginf(lse).all() and float64.apart(np, lse, lse) == 0
    found = float64.backward(np, q, k, k, q, lse, np.zeros((1, 1, 2)), seen, 1.0)
    assert not any(one.any() for one in found)


@pytest.mark.parametrize("ordered", [True, False])
def test_one_call_of_cudnn(monkeypatch, ordered):
    paper = PaperGpu()
    cudnn = PaperCudnn(defer=paper.defer)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    rng, band = np.random.default_rng(0), Band(0, 1, 1, 0, None)
    shapes = {"q": (1, 24, 2, 16), "k": (1, 24, 1, 16), "v": (1, 24, 1, 16), "out": (1, 24, 2, 16)}
    made = {name: paper.upload(rng.standard_normal(shape).astype(np.float16)) for name, shape in shapes.items()}
    made |= {
        "lse": paper.upload(np.zeros((1, 2, 24), np.float32)),
        "dout": paper.upload(rng.standard_normal((1, 24, 2, 16)).astype(np.float16)),
    }
    made |= {f"d{name}": paper.upload(np.zeros(shapes[name], np.float16)) for name in "qkv"}
    operands, call, stream = Operands(**made), CudnnCall(paper, ordered=ordered), paper.stream()
    for _ in range(2):
        call.forward(operands, band, 0.25, stream)
        call.backward(operands, band, 0.25, stream)
    assert len(cudnn.graphs) == 2 and cudnn.graphs[1].deterministic is ordered
    q, k, v, out, lse, dout, *gradients = (paper.download(array).astype(np.float64) for array in operands)
    seen = float64.seen_pairs(band, 24, 24)
    wanted, wanted_lse = float64.attend(np, q, k, v, seen, 0.25)
    assert np.abs(out - wanted).max() < 5e-3 and np.abs(lse - wanted_lse).max() < 1e-4
    right = float64.backward(np, q, k, v, dout, lse, float64.delta_of(np, out, dout), seen, 0.25)
    for one, other in zip(gradients, right, strict=True):
        assert np.abs(one - other).max() < 2e-2
    assert len(call.facts()) == 2


def test_ranks_as_threads_declare_what_calibration_asks_for(monkeypatch, tmp_path):
    from ringsim import device_calibration, device_topology
    from ringsim.backends import cupy_calls
    from ringsim.device_hops import declared

    card, subjects = PaperCard(own=False), []

    def measure(subject, kernels):
        subjects.append(subject)
        assert subject.transport.allgather(subject.transport.rank) == [0, 1]
        return kernels

    def describe(found, transport, kernels, facts, said):
        assert found == kernels and facts["uuid"] == "paper"
        return {"name": transport.name, "said": said}

    monkeypatch.setattr(cupy_calls, "CupyCalls", lambda device: card.calls)
    monkeypatch.setattr(device_calibration, "measure_devices", measure)
    monkeypatch.setattr(device_topology, "describe", describe)
    monkeypatch.setattr(calibrated, "_products", lambda: None)
    text = calibrated.calibrate_in_process(bench_of(card, tmp_path), 2, "bfloat16", 128)
    assert text.startswith("{name: device-link") or text.startswith("name: device-link")
    for subject in subjects:
        assert subject.seat().units == 4
        assert [declared(subject.transport, name) for name in ("progress", "drives", "device_share")] == ["offload", "both", None]


def test_calls_are_counted_delayed_and_timed():
    paper = PaperGpu(run=lambda *_: None)
    stream = paper.stream()
    watched = Watched(paper)
    watched.empty(16)
    watched.record(stream)
    assert watched.counts == {"empty": 1, "record": 1} and watched.allocations() == 1
    held = []
    delayed = Delayed(paper, lambda where, seconds: held.append((where, seconds)), most_s=1.0, seed=0, share=1.0)
    memory = delayed.empty(8)
    assert (paper.download(memory) == 0xFF).all()
    delayed.copy(memory, delayed.empty(8), stream)
    assert delayed.delays == 1 == len(held) and held[0][0] is stream and 0 < held[0][1] <= 1
    timed = Timed(paper)
    from ringsim.backends.cuda import Kernel, Launch

    timed.launch(Kernel(source="state.cu", name="merge"), Launch((1, 1, 1), (1, 1, 1)), [], stream)
    paper.drain()
    assert set(timed.seconds()) == {"merge"} and timed.seconds() == {}

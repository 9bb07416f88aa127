"""What cuDNN does not compute, and what happens where it is asked, fails, or is not there."""

import sys

import numpy as np
import pytest

from ringsim.backends.cuda_tiles import Backward, Band
from ringsim.backends.cudnn import CudnnTiles
from ringsim.backends.cudnn_limits import Given, least_scores_nbytes, misfits, refusals, scores_nbytes, shares_of
from ringsim.errors import DeviceError, MissingDependency

from .cudnn_bench import Bench, check_forward
from .paper_cudnn import Graph, PaperCudnn
from .paper_gpu import PaperGpu

HOPPER = Given(92800, (9, 0))


@pytest.mark.parametrize(
    ("given_", "dtype", "widths", "band", "backward", "reason"),
    [
        (HOPPER, "float32", (64, 64), None, False, "float16 and bfloat16, not float32"),
        (HOPPER, "float16", (60, 64), None, False, "multiples of 8, not 60 and 64"),
        (HOPPER, "float16", (512, 64), None, False, "up to 256, not 512"),
        (Given(92800, (7, 5)), "float16", (64, 64), None, False, "this device has 7.5"),
        (Given(91200, (9, 0)), "float16", (64, 64), None, False, "cuDNN 9.12.0 is older than 9.13.0"),
        (Given(91400, (9, 0)), "float16", (64, 64), Band(0, 1, 1, None, 3), False, "9.14.0 computes windows"),
        (HOPPER, "float16", (64, 64), Band(0, 2, 3, 0, None), False, "steps of 2 and 3"),
        (HOPPER, "float16", (64, 64), Band(0, 1, 1, 1, None), False, "include 0"),
        (HOPPER, "float16", (64, 64), Band(0, 1, 1, None, -1), False, "include 0"),
        (Given(92800, (8, 0)), "float16", (192, 128), None, True, "no backward pass for head_dim 192"),
        (Given(92800, (12, 0)), "float16", (64, 136), None, True, "no backward pass for head_dim 64, v_head_dim 136"),
        (Given(92800, (10, 0)), "float16", (192, 192), None, True, "no backward pass for head_dim 192"),
        (Given(92200, (10, 0)), "float16", (256, 256), None, True, "no backward pass for head_dim 256"),
        (Given(91700, (10, 0)), "float16", (64, 64), None, True, "no deterministic backward pass on Blackwell"),
        (HOPPER, "float16", (256, 256), Band(4, 3, 3, 0, 9), True, None),
        (Given(92800, (10, 0)), "bfloat16", (192, 128), Band(0, 1, 1, 0, None), True, None),
        (Given(92800, (10, 0)), "bfloat16", (256, 256), None, True, None),
        (Given(92800, (8, 9)), "bfloat16", (128, 96), None, True, None),
    ],
)
def test_what_cudnn_does_not_compute_is_refused_beforehand(given_, dtype, widths, band, backward, reason):
    said = next(refusals(given_, dtype, widths, band, backward=backward), None)
    assert said is None if reason is None else reason in said


def operands_of(rows, keys, *, heads=2, backward=False):
    shapes = [(1, rows, heads, 16), (1, keys, heads, 16), (1, keys, heads, 16)]
    made = [np.zeros(shape, np.float16) for shape in shapes]
    return [*made, made[0]] if backward else made


def reasons(given_, arrays, band=None, most_scores=1 << 30):
    return list(misfits(given_, arrays, band, most_scores=most_scores))


def test_tiles_that_do_not_suit_cudnn_are_left_to_other_kernels():
    window = Band(0, 1, 1, None, 6)
    assert reasons(HOPPER, operands_of(9, 9), window) == []
    assert "not 10 and 9" in reasons(HOPPER, operands_of(10, 9), window)[0]
    assert reasons(HOPPER, operands_of(10, 9), Band(0, 1, 1, 0, None)) == []
    assert reasons(HOPPER, operands_of(1, 1)) == []
    assert "one query and one key" in reasons(HOPPER, operands_of(1, 1, backward=True))[0]
    assert "float32" in reasons(HOPPER, operands_of(2, 2), Band(0, 1, 1, None, 1 << 24))[0]
    q, k, v = operands_of(8, 8)
    flat = np.zeros(q.size + 1, np.float16)
    assert "k lies at an address" in reasons(HOPPER, [q, flat[1:].reshape(q.shape), v])[0]
    assert "v has strides" in reasons(HOPPER, [q, k, np.zeros((1, 8, 2, 18), np.float16)[..., :16]])[0]


def test_score_gradients_beyond_the_limit_are_refused_where_nothing_else_is_deterministic():
    arrays = operands_of(100, 200, backward=True)
    # what the query heads of one key/value head take is the least that one call can do
    needed = least_scores_nbytes(*arrays[:2])
    assert scores_nbytes(arrays[0], 200) == 1 * 2 * 128 * 256 * 2
    assert needed == (arrays[0].shape[2] // arrays[1].shape[2]) * 128 * 256 * 2
    for capability, version, refused in (
        ((8, 0), 92800, True),
        ((9, 0), 92700, False),
        ((10, 0), 92800, False),
        ((12, 0), 92800, True),
    ):
        found = reasons(Given(version, capability), arrays, most_scores=needed - 1)
        assert [f"would store {needed} bytes a head" in one for one in found] == [True] * refused
        assert reasons(Given(version, capability), arrays, most_scores=needed) == []
    old = Given(92400, (9, 0))
    assert "would store" in reasons(old, arrays, most_scores=needed - 1)[0]
    assert reasons(old, arrays) == []


@pytest.mark.parametrize("most", [1, 2, 3, 5, 100])
def test_a_tile_is_shared_out_by_heads_where_score_gradients_are_limited(most):
    """Every part within the limit, or one key/value head of one sequence; together each element once."""
    operands = (2, 7, 10, 4), (2, 9, 5, 4), (2, 9, 5, 3)
    shapes = (*operands, (2, 7, 10, 3), (2, 10, 7), (2, 10, 7), *operands)
    whole = Backward(*(np.zeros(shape) for shape in shapes))
    least = least_scores_nbytes(whole.q, whole.k)
    parts = list(shares_of(whole, most * least))
    for part in parts:
        assert scores_nbytes(part.q, 9) <= most * least
        assert part.q.shape[2] == 2 * part.k.shape[2] == part.lse.shape[1] == part.delta.shape[1]
        for one in part:
            one[...] += 1
    assert all((one == 1).all() for one in whole)
    assert len(parts) == (1 if most == 100 else 2 * -(-5 // most))
    assert next(shares_of(whole, None)).q.shape == whole.q.shape


def test_a_tile_given_all_the_same_is_an_error(monkeypatch):
    bench = Bench(monkeypatch)
    operands = bench.forward((1, 24, 2, 16), (1, 23, 2, 16), 16, "float16")
    with pytest.raises(DeviceError, match="no more queries than keys"):
        bench.tiles.attend(operands, Band(0, 1, 1, None, 3), 0.3, bench.stream)
    crooked = operands._replace(out=bench.made((1, 24, 2, 16), "float16", padding=1))
    with pytest.raises(DeviceError, match="out has strides"):
        bench.tiles.attend(crooked, None, 0.3, bench.stream)
    check_forward(bench, operands, None)
    # the same shape without a band has a plan by now
    for band in (Band(0, 2, 3, 0, None), Band(0, 1, 1, 1, None)):
        with pytest.raises(DeviceError, match="no bounds on i - j that include 0"):
            bench.tiles.attend(operands, band, 0.3, bench.stream)
    shifted = bench.gpu.upload(np.zeros(24 * 2 * 24 + 1, np.float16))[1:].reshape(1, 24, 2, 24)[..., :16]
    with pytest.raises(DeviceError, match="cuDNN wants out at a multiple of 16 bytes"):
        bench.tiles.attend(operands._replace(out=shifted), None, 0.3, bench.stream)


def test_a_failure_of_cudnn_names_its_version_and_engine(monkeypatch):
    bench = Bench(monkeypatch)
    operands = bench.forward((1, 24, 2, 16), (1, 24, 2, 16), 16, "float16")
    check_forward(bench, operands, None)

    def fail(graph, *_, **__):
        raise RuntimeError("CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(Graph, "execute", fail)
    with pytest.raises(DeviceError, match=r"cuDNN 9\.28\.0, engine eng9: CUDNN_STATUS_EXECUTION_FAILED"):
        bench.tiles.attend(operands, None, 0.3, bench.stream)


@pytest.mark.parametrize(("module", "said"), [(None, "cannot be imported"), (PaperCudnn(version=None), "finds no libcudnn.so.9")])
def test_what_is_not_installed_is_named_with_its_remedy(monkeypatch, module, said):
    monkeypatch.setitem(sys.modules, "cudnn", module)
    with pytest.raises(MissingDependency, match=said) as error:
        CudnnTiles(PaperGpu(), capability=(9, 0))
    assert "pip install 'ringsim[gpu-cuda13]' ('ringsim[gpu-cuda12]'" in str(error.value)

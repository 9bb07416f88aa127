"""The backward kernels of the NumPy backend against dense gradients in float64, and these against finite differences."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import accumulator, numpy_dtype
from ringsim.execution import execute
from ringsim.lowering import Blocking
from ringsim.mask import Causal, Full
from ringsim.reference import dense_attention, dense_backward
from ringsim.schedule import Compute, Region, Schedule
from ringsim.workload import Workload


@dataclass(frozen=True, slots=True)
class Window:
    """Keys from `width - 1` before to `ahead` after a query, not trimmed: some queries of a tile see none of its keys."""

    width: int
    ahead: int = 0
    name: ClassVar[str] = "window"
    extent: ClassVar[int | None] = None

    def pieces(self, q, k):
        return ((q, k, -self.ahead, self.width - 1),) if q.count and k.count else ()

    def visible(self, q_positions, k_positions):
        distance = q_positions[:, None] - k_positions[None, :]
        return (distance >= -self.ahead) & (distance < self.width)


def global_arrays(work, seed=0):
    """dout, q, k and v."""
    rng = np.random.default_rng(seed)
    shapes = (
        (work.batch, work.q_len, work.heads, work.v_head_dim),
        (work.batch, work.q_len, work.heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.v_head_dim),
    )
    return [rng.standard_normal(shape) for shape in shapes]


FINITE_DIFFERENCES = {
    "full": Workload(q_len=6, head_dim=4, dtype="float64"),
    "causal, GQA, v wider": Workload(
        q_len=7, batch=2, heads=4, kv_heads=2, head_dim=3, v_head_dim=5, dtype="float64", mask=Causal()
    ),
    "blind rows before": Workload(q_len=8, kv_len=6, kv_offset=3, heads=2, head_dim=3, dtype="float64", mask=Causal()),
    "blind rows after": Workload(q_len=9, kv_len=4, q_offset=2, head_dim=3, v_head_dim=2, dtype="float64", mask=Window(3)),
    "lengths": Workload(
        q_len=4, kv_len=9, q_offset=5, batch=3, heads=2, kv_heads=1, head_dim=3, dtype="float64", mask=Causal(), lengths=(9, 0, 7)
    ),
}


@pytest.mark.parametrize("name", FINITE_DIFFERENCES)
def test_dense_gradients_are_finite_differences_of_dense_attention(name):
    work, step = FINITE_DIFFERENCES[name], 1e-5
    dout, *inputs = global_arrays(work)
    gradients = dense_backward(work, dout, *inputs)
    for array, gradient in zip(inputs, gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (array.shape, np.float64)
        found = np.zeros_like(array)
        for index in np.ndindex(*array.shape):
            value, sides = array[index], []
            for moved in (value + step, value - step):
                array[index] = moved
                sides.append(float((dout * dense_attention(work, *inputs)[0]).sum()))
            array[index] = value
            found[index] = (sides[0] - sides[1]) / (2 * step)
        assert np.abs(found).max() > 0.01
        np.testing.assert_allclose(gradient, found, rtol=1e-6, atol=1e-8)


def test_rows_that_see_no_key_have_no_gradient_and_give_none():
    work = Workload(q_len=8, kv_len=6, kv_offset=3, heads=2, head_dim=3, dtype="float64", mask=Causal())
    dout, q, k, v = global_arrays(work)
    dq, dk, dv = dense_backward(work, dout, q, k, v)
    assert not dq[:, :3].any()
    dout[:, :3], q[:, :3] = np.nan, np.nan
    for found, expected in zip(dense_backward(work, dout, q, k, v)[1:], (dk, dv), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_dense_gradients_do_not_depend_on_how_many_rows_are_taken_at_once(monkeypatch):
    work = Workload(q_len=23, batch=2, heads=2, head_dim=3, dtype="float64", mask=Causal(), lengths=(23, 11))
    arrays = global_arrays(work)
    whole = dense_backward(work, *arrays)
    monkeypatch.setattr("ringsim.reference.ROWS_AT_ONCE", 4)
    for found, expected in zip(dense_backward(work, *arrays), whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)


def test_dense_gradients_in_float32():
    work = Workload(q_len=23, heads=2, head_dim=3, mask=Full())
    arrays = global_arrays(work)
    for found, expected in zip(dense_backward(work, *arrays, dtype="float32"), dense_backward(work, *arrays), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


# the kernels, on the arrays of a world of ranks in one process


def region(name, array, **options):
    return Region(**({"buffer": name, "slot": 0, "shape": array.shape, "dtype": array.dtype.name, "value": name} | options))


def no_poll():
    """Nothing is in flight."""


def compute(kernel, reads, writes, *, tiles=(), scale=1.0, backend=None, poll=no_poll):
    """Run one op on arrays by name; `writes` are names among those read, or arrays of their own."""
    arrays = reads | writes
    made = {name: region(name, array) for name, array in arrays.items()}
    op = Compute(
        id=0,
        step=0,
        phase="test",
        kernel=kernel,
        reads=tuple(made[name] for name in reads),
        writes=tuple(made[name] for name in writes),
        tiles=tuple(tiles),
    )
    (backend or NumpyBackend()).compute(op, lambda wanted: arrays[wanted.buffer], scale=scale, poll=poll)


def statistics(work, arrays):
    """lse and delta of whole rows, (batch, heads, rows), in the dtype of the sums."""
    dout, q, k, v = arrays
    with np.errstate(all="ignore"):
        out, lse = dense_attention(work, q, k, v)
        delta = np.einsum("brhd,brhd->bhr", np.asarray(dout, np.float64), out)
        return tuple(x.astype(accumulator(work.dtype)) for x in (lse, delta))


def inputs(work, seed=0):
    """dout, q, k and v in the workload's dtype."""
    return [array.astype(numpy_dtype(work.dtype)) for array in global_arrays(work, seed)]


def gradients(work, arrays, *, world_size=1, partition="contiguous", backend=None, sums=None, kept=None):
    """The dq, dk, dv (batch, rows, heads, width) that `world_size` ranks find, each pair of blocks being one op."""
    dout, q, k, v = arrays
    lse, delta = kept or statistics(work, arrays)
    job = Schedule(workload=work, world_size=world_size, partition=partition).job
    totals = sums or [np.zeros((x.shape[1], x.shape[0], *x.shape[2:]), lse.dtype) for x in (q, k, v)]
    backend = backend or NumpyBackend(backward_blocking=BLOCKINGS["strips"])
    for rank in range(world_size):
        rows = job.q_partition.positions(rank)
        for held in range(world_size):
            keys = job.kv_partition.positions(held)
            reads = {"q": q[:, rows], "k": k[:, keys], "v": v[:, keys], "dout": dout[:, rows]}
            reads |= {"lse": lse[:, :, rows], "delta": delta[:, :, rows]}
            parts = {"dq": totals[0][rows], "dk": totals[1][keys], "dv": totals[2][keys]}
            tiles = job.tiles(job.q_block(rank), job.kv_block(held))
            compute("attend_backward", reads | parts, parts, tiles=tiles, scale=work.softmax_scale, backend=backend)
            totals[0][rows], totals[1][keys], totals[2][keys] = parts.values()
    return [total.swapaxes(0, 1) for total in totals]


def assert_close(found, expected, limit):
    """Largest absolute error, relative to the largest gradient; infinities and NaN have no place."""
    # of all three: with one key dq and dk are 0, and so they come out but for rounding
    scale = max(np.max(np.abs(exact), initial=0.0) for exact in expected)
    for name, actual, exact in zip(("dq", "dk", "dv"), found, expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=0, atol=limit * scale, equal_nan=False, err_msg=name)


ERROR = {"float64": 1e-13, "float32": 2e-6}
BLOCKINGS = {
    "one block": Blocking(q_rows=64, k_rows=64, edge_rows=64),
    "strips": Blocking(q_rows=16, k_rows=6, edge_rows=4),
    "odd": Blocking(q_rows=5, k_rows=3, edge_rows=2),
}
SHAPES = {
    "plain": {"q_len": 37, "heads": 2},
    "GQA": {"q_len": 21, "heads": 6, "kv_heads": 2, "batch": 2},
    "MQA, narrow v": {"q_len": 19, "heads": 3, "kv_heads": 1, "v_head_dim": 3},
    "wide v": {"q_len": 18, "v_head_dim": 33, "head_dim": 5},
    "one of each": {"q_len": 1, "head_dim": 1},
    "one query, many keys": {"q_len": 1, "kv_len": 50, "q_offset": 49},
    "many queries, one key": {"q_len": 50, "kv_len": 1, "kv_offset": 3},
    "first rows see no key": {"q_len": 30, "kv_len": 25, "kv_offset": 11, "heads": 2},
    "last rows see no key of a window": {"q_len": 40, "kv_len": 20, "q_offset": 5},
    "lengths": {"q_len": 20, "batch": 5, "lengths": (20, 0, 7, 7, 13), "heads": 2},
    "no key": {"q_len": 6, "kv_len": 0},
    "no query": {"q_len": 0, "kv_len": 6},
}
MASKS = {"causal": Causal(), "full": Full(), "window": Window(9), "window ahead": Window(4, ahead=3)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocking", BLOCKINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_agree_with_dense_ones(dtype, shape, blocking, mask):
    work = Workload(**({"head_dim": 8} | SHAPES[shape]), dtype=dtype, mask=MASKS[mask])
    arrays = inputs(work)
    backend = NumpyBackend(backward_blocking=BLOCKINGS[blocking], threads=2 if blocking == "odd" else 1)
    assert_close(gradients(work, arrays, backend=backend), dense_backward(work, *arrays), ERROR[dtype])


@pytest.mark.parametrize("partition", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_blocks_of_several_ranks_add_up(dtype, mask, partition):
    work = Workload(q_len=61, batch=2, heads=4, kv_heads=2, head_dim=8, v_head_dim=6, dtype=dtype, mask=MASKS[mask])
    arrays = inputs(work)
    found = gradients(work, arrays, world_size=4, partition=partition)
    assert_close(found, dense_backward(work, *arrays), ERROR[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_the_blocking_chosen_from_the_cache_computes_the_same(dtype, mask):
    work = Workload(q_len=700, heads=2, kv_heads=1, head_dim=64, dtype=dtype, mask=MASKS[mask])
    arrays = inputs(work)
    assert_close(gradients(work, arrays, backend=NumpyBackend()), dense_backward(work, *arrays), ERROR[dtype])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype, threads):
    work = Workload(q_len=60, batch=2, heads=4, kv_heads=2, head_dim=16, v_head_dim=12, dtype=dtype, mask=Causal())
    arrays = inputs(work)
    backend = NumpyBackend(threads=threads, backward_blocking=BLOCKINGS["strips"])
    found = gradients(work, arrays, world_size=3, partition="striped", backend=backend)
    assert {gradient.dtype for gradient in found} == {np.dtype(np.float32)}
    assert_close(found, dense_backward(work, *arrays), ERROR["float32"])


def test_gradients_are_added_to_what_is_there_through_any_strides():
    work = Workload(q_len=26, batch=2, heads=4, kv_heads=2, head_dim=8, v_head_dim=5, dtype="float64", mask=Causal())
    arrays, rng = inputs(work), np.random.default_rng(1)
    whole = [rng.standard_normal((26, 2, 9, width + 1)) for width in (8, 8, 5)]
    views = [array[:, :, 1 : 1 + heads, :-1] for array, heads in zip(whole, (4, 2, 2), strict=True)]
    before, around = [view.copy() for view in views], [array.copy() for array in whole]
    gradients(work, arrays, sums=views)
    for view, start, exact in zip(views, before, dense_backward(work, *arrays), strict=True):
        np.testing.assert_allclose(view - start, exact.swapaxes(0, 1), rtol=0, atol=1e-12)
    for array, start, heads in zip(whole, around, (4, 2, 2), strict=True):
        array[:, :, 1 : 1 + heads, :-1] = start[:, :, 1 : 1 + heads, :-1]
        assert np.array_equal(array, start)


def test_rows_that_see_no_key_give_exact_zeros():
    work = Workload(q_len=40, kv_len=40, kv_offset=19, heads=2, head_dim=8, mask=Causal())
    dq, dk, dv = gradients(work, inputs(work))
    assert not dq[:, :19].any()
    assert dq[:, 19:].any(axis=(2, 3)).all()
    assert all(gradient[:, :21].any(axis=(2, 3)).all() and not gradient[:, 21:].any() for gradient in (dk, dv))


def test_a_row_whose_keys_are_all_infinitely_far_gives_exact_zeros():
    work = Workload(q_len=9, heads=1, head_dim=2, dtype="float64")
    dout, q, k, v = inputs(work)
    q[:], k[:] = np.abs(q), -np.abs(k)
    q[:, 4] = np.inf
    assert np.isneginf(statistics(work, (dout, q, k, v))[0][0, 0, 4])
    dv = gradients(work, (dout, q, k, v))[2]
    others = np.arange(9) != 4
    exact = dense_backward(replace(work, q_len=8, kv_len=9), dout[:, others], q[:, others], k, v)
    np.testing.assert_allclose(dv, exact[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("signs", ["+", "-", "+-"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_extreme_logits_stay_finite_and_as_exact_as_float32_allows(signs, mask, seed):
    work = Workload(q_len=96, heads=2, head_dim=16, mask=MASKS[mask], softmax_scale=1.0)
    dout, q, k, v = inputs(work, seed)
    # all scores of one sign are near ties, so that rounding of the logits shows in the result
    q[..., 0] = 100
    k[..., 0] = 100 * np.random.default_rng(2).choice([1 if sign == "+" else -1 for sign in signs], k.shape[:3])
    arrays = dout, q, k, v
    backend = NumpyBackend(blocking=BLOCKINGS["strips"], backward_blocking=BLOCKINGS["strips"])
    # out and lse of the forward kernel, as in use: their rounding is that of the same logits
    forward = execute(Schedule(workload=work, world_size=1), q, k, v, backend=backend)
    kept = forward.lse, np.einsum("brhd,brhd->bhr", dout, forward.out)
    exact, plain = dense_backward(work, *arrays), dense_backward(work, *arrays, dtype="float32")
    found = gradients(work, arrays, backend=backend, kept=kept)
    for gradient, dense32, dense64 in zip(found, plain, exact, strict=True):
        assert np.isfinite(gradient).all()
        assert 0 < np.abs(gradient - dense64).max() <= 2 * np.abs(dense32 - dense64).max()


POISONED = 9


@pytest.mark.parametrize("blocking", BLOCKINGS)
@pytest.mark.parametrize("mask", ["causal", "full", "window"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ["dout", "q", "k", "v"])
def test_what_is_not_finite_reaches_what_sees_it_and_nothing_else(name, value, mask, blocking):
    work = Workload(q_len=26, batch=2, heads=4, kv_heads=2, head_dim=8, mask=MASKS[mask])
    clean = dict(zip(("dout", "q", "k", "v"), inputs(work), strict=True))
    bad = clean | {name: clean[name].copy()}
    bad[name][0, POISONED, 0] = value
    backend = NumpyBackend(backward_blocking=BLOCKINGS[blocking])
    found, expected = (gradients(work, [*arrays.values()], backend=backend) for arrays in (bad, clean))
    seen = work.mask.visible(np.arange(26), np.arange(26))
    rows = seen[:, POISONED] if name in "kv" else np.arange(26) == POISONED
    heads = slice(0, 2) if name in "kv" else slice(0, 1)
    hit = [np.zeros(x.shape[:3], bool) for x in expected]
    hit[0][0, rows, heads] = True
    hit[1][0, seen[rows].any(axis=0), 0] = hit[2][0, seen[rows].any(axis=0), 0] = True
    for actual, exact, spoilt in zip(found, expected, hit, strict=True):
        np.testing.assert_allclose(actual[~spoilt], exact[~spoilt], rtol=0, atol=2e-6 * np.abs(exact).max())
    if np.isnan(value):
        # dv does not depend on v
        assert all(np.isnan(found[i][hit[i]]).all() for i in range(2 if name == "v" else 3))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_rerun_and_any_number_of_threads_give_the_same_bits(dtype):
    work = Workload(q_len=83, batch=2, heads=4, kv_heads=2, head_dim=16, dtype=dtype, mask=Causal())
    arrays = inputs(work)
    first = gradients(work, arrays)
    shared = NumpyBackend(backward_blocking=BLOCKINGS["strips"])
    for threads in (1, 2, 3):
        backend = NumpyBackend(threads=threads, backward_blocking=BLOCKINGS["strips"])
        for again in (gradients(work, arrays, backend=backend), gradients(work, arrays, backend=shared)):
            assert all(x.tobytes() == y.tobytes() for x, y in zip(first, again, strict=True))

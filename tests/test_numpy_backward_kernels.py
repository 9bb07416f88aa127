"""The backward kernels of the NumPy backend from within: polls, scratch, threads, hidden pairs; and the kernels around them."""

import tracemalloc

import numpy as np
import pytest

from ringsim.backends import numpy_attend
from ringsim.backends.cpu import Cache
from ringsim.backends.numpy import NumpyBackend, backward_blocking_for
from ringsim.backends.numpy_backward import Scratch
from ringsim.backends.numpy_micro import edges_of, hidden_pairs, pieces_of, seen_stairs
from ringsim.dtypes import accumulator, numpy_dtype
from ringsim.lowering import Blocking
from ringsim.schedule import Compute, Schedule
from ringsim.tile import Span, Tile
from ringsim.workload import Workload

from .test_numpy_backward import (
    BLOCKINGS,
    MASKS,
    compute,
    gradients,
    inputs,
    no_poll,
    region,
    statistics,
)


def attend_backward(work, backend, poll=no_poll, **changes):
    """One op over all rows and keys, ready to be called."""
    dout, q, k, v = inputs(work)
    lse, delta = statistics(work, (dout, q, k, v))
    sums = {name: np.zeros((x.shape[1], x.shape[0], *x.shape[2:]), lse.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    reads = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta} | changes
    job = Schedule(workload=work, world_size=1).job
    tiles = job.tiles(job.q_block(0), job.kv_block(0))
    return tiles, lambda: compute(
        "attend_backward", reads | sums, sums, tiles=tiles, scale=work.softmax_scale, backend=backend, poll=poll
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocking", BLOCKINGS)
def test_poll_is_called_after_each_micro_tile(mask, blocking):
    work = Workload(q_len=45, batch=2, heads=6, kv_heads=3, head_dim=8, mask=MASKS[mask])
    calls = []
    backend = NumpyBackend(blocking=BLOCKINGS["one block"], backward_blocking=BLOCKINGS[blocking])
    tiles, call = attend_backward(work, backend, lambda: calls.append(None))
    call()
    lowering = backend.backward_blocking("float32")
    assert len(calls) == work.batch * work.heads * sum(m.count for tile in tiles for m in lowering.micro_tiles(tile))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mask", ["causal", "full", "window ahead"])
def test_the_inner_loop_allocates_nothing(dtype, mask):
    blocking = Blocking(q_rows=256, k_rows=256, edge_rows=128)
    work = Workload(q_len=512, heads=2, head_dim=128, dtype=dtype, mask=MASKS[mask])
    backend = NumpyBackend(backward_blocking=blocking)
    _, call = attend_backward(work, backend)
    call()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a product or a block's queries would be half a tile of scores
    assert peak < 256 * 256 * (8 if dtype == "float64" else 4) / 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_scratch_is_what_the_lowering_says(dtype, threads):
    work = Workload(q_len=300, heads=4, head_dim=16, v_head_dim=24, dtype=dtype)
    blocking = BLOCKINGS["odd"]
    backend = NumpyBackend(backward_blocking=blocking, threads=threads)
    gradients(work, inputs(work), backend=backend)
    itemsize = 8 if dtype == "float64" else 4
    own = sum(
        size * ({"bool": 1, "int32": 4}[kind] if kind else itemsize) for size, kind in blocking.backward_scratch(16, 24).values()
    )
    assert backend.nbytes == threads * (own + 300 * (16 + 24 + 2) * itemsize)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_any_thread_ends_the_kernel_and_comes_out(threads):
    work = Workload(q_len=64, heads=4)
    backend = NumpyBackend(threads=threads, backward_blocking=BLOCKINGS["odd"])
    _, call = attend_backward(work, backend, dout=np.zeros((1, 64, 4, 63), np.float32))
    with pytest.raises(ValueError, match=r"mismatch|broadcast"):
        call()


@pytest.mark.parametrize(
    ("level2_nbytes", "dtype", "sides"),
    [
        (2**20, "float32", (512, 256)),
        (2**20, "float64", (256, 128)),
        (2**18, "float32", (256, 128)),
        (1, "float32", (64, 64)),
    ],
)
def test_a_micro_tiles_two_buffers_fit_the_level_2_cache(level2_nbytes, dtype, sides):
    blocking = backward_blocking_for(Cache(level2_nbytes=level2_nbytes, source="test"), dtype)
    assert (blocking.q_rows, blocking.k_rows) == sides


@pytest.mark.parametrize("steps", [(1, 1), (3, 3), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("band", [(0, None), (None, 5), (-4, 3), (2, 9), (None, None)])
def test_hidden_pairs_are_those_outside_the_band(band, steps):
    blocking = Blocking(q_rows=8, k_rows=5, edge_rows=4)
    scratch = Scratch.make(blocking, (1, 1), np.dtype(np.float32))
    forward = numpy_attend.Scratch.make(blocking, 1, np.dtype(np.float32))
    for start in range(-12, 13, 2):
        q, k = Span(row=0, count=19, start=start, step=steps[0]), Span(row=0, count=17, start=0, step=steps[1])
        tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=band[0], hi=band[1])
        distance = q.positions()[:, None] - k.positions()
        low, high = (default if edge is None else edge for edge, default in zip(band, (-np.inf, np.inf), strict=True))
        outside = (distance < low) | (distance > high)
        edges, covered = edges_of(tile), np.zeros(outside.shape, bool)
        for _, _, panels in blocking.blocks(tile):
            for piece in pieces_of(blocking, edges, panels):
                part = slice(piece.q_begin, piece.q_end), slice(piece.k_begin, piece.k_end)
                hidden, found = np.zeros(outside[part].shape, bool), hidden_pairs(edges, scratch, piece)
                hidden[: piece.cut_rows] = False if found is None else found
                assert (found is None) == (piece.cut_rows == 0)
                assert np.array_equal(outside[part], hidden)
                if piece.stair >= 0:
                    seen = seen_stairs(forward.seen, found.shape, piece.stair)
                    assert np.array_equal(seen, 1 - hidden[: piece.cut_rows])
                covered[part] = True
        assert (covered | outside).all()


# the kernels around it


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_delta_is_the_row_sum_of_dout_times_out(dtype):
    rng = np.random.default_rng(0)
    out, dout = (rng.standard_normal((2, 601, 3, 20)).astype(numpy_dtype(dtype)) for _ in "ab")
    delta = np.full((2, 3, 601), np.nan, accumulator(dtype))
    polls = []
    compute("delta", {"out": out, "dout": dout}, {"delta": delta}, poll=lambda: polls.append(None))
    exact = np.einsum("brhd,brhd->bhr", out.astype(np.float64), dout.astype(np.float64))
    np.testing.assert_allclose(delta, exact, rtol=0, atol=1e-14 if dtype == "float64" else 5e-6)
    assert len(polls) > 2


def test_clear_writes_zeros():
    arrays = {name: np.full((5, 2, 3, 4), np.nan) for name in ("dk", "dv")}
    compute("clear", {}, arrays)
    assert not any(array.any() for array in arrays.values())


def test_accumulate_adds_the_second_half_to_the_first():
    rng = np.random.default_rng(0)
    mine = {name: rng.standard_normal((600, 2, 3, 4)).astype(np.float32) for name in ("dk", "dv")}
    other = {f"{name} other": rng.standard_normal((600, 2, 3, 4)).astype(np.float32) for name in ("dk", "dv")}
    expected = [a + b for a, b in zip(mine.values(), other.values(), strict=True)]
    compute("accumulate", mine | other, mine)
    assert all(np.array_equal(a, b) for a, b in zip(mine.values(), expected, strict=True))


@pytest.mark.parametrize("boxed", ["other", "both"])
def test_accumulate_adds_a_box_to_the_same_box(boxed):
    rng = np.random.default_rng(0)
    shape, box = (7, 2, 3, 4), ((2, 5), (0, 2), (1, 3), (0, 4))
    part = tuple(slice(*bounds) for bounds in box)
    mine, addend = rng.standard_normal(shape), rng.standard_normal(shape)
    expected = mine.copy()
    expected[part] += addend[part]
    target = region("mine", mine, **({"box": box} if boxed == "both" else {}))
    other = region("other", addend, box=box)
    op = Compute(id=0, step=0, phase="test", kernel="accumulate", reads=(target, other), writes=(target,))
    arrays = {"mine": mine[part] if boxed == "both" else mine, "other": addend[part]}
    NumpyBackend().compute(op, lambda wanted: arrays[wanted.buffer], scale=1.0, poll=no_poll)
    assert np.array_equal(mine, expected)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_cast_changes_layout_and_dtype(dtype):
    rng = np.random.default_rng(0)
    sums = {f"{n}_sum": rng.standard_normal((500, 2, heads, 5)).astype(accumulator(dtype)) for n, heads in (("dq", 4), ("dk", 2))}
    results = {n: np.empty((2, 500, heads, 5), numpy_dtype(dtype)) for n, heads in (("dq", 4), ("dk", 2))}
    compute("cast", sums, results)
    for total, result in zip(sums.values(), results.values(), strict=True):
        assert np.array_equal(result, total.swapaxes(0, 1).astype(numpy_dtype(dtype)))

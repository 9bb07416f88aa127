"""The NumPy backend against dense attention in float64, through a schedule of one rank."""

import tracemalloc
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from ringsim.backends.cpu import Cache
from ringsim.backends.numpy import NumpyBackend, blocking_for
from ringsim.dtypes import numpy_dtype
from ringsim.errors import ArrayError
from ringsim.execution import execute
from ringsim.execution.memory import Memory
from ringsim.lowering import Blocking
from ringsim.mask import Causal, Full
from ringsim.reference import dense_attention
from ringsim.schedule import Compute, Schedule
from ringsim.workload import Workload

OUT_ERROR = {"float64": 1e-12, "float32": 2e-6}
LSE_ERROR = {"float64": 1e-12, "float32": 1e-5}


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


BLOCKINGS = {
    "one block": Blocking(q_rows=64, k_rows=64, edge_rows=64),
    "one strip a block": Blocking(q_rows=8, k_rows=16, edge_rows=64),
    "strips": Blocking(q_rows=16, k_rows=6, edge_rows=4),
    "odd": Blocking(q_rows=7, k_rows=5, edge_rows=3),
}
SHAPES = {
    "plain": {"q_len": 37, "heads": 2},
    "GQA": {"q_len": 21, "heads": 6, "kv_heads": 2, "batch": 2},
    "MQA, narrow v": {"q_len": 19, "heads": 3, "kv_heads": 1, "v_head_dim": 3},
    "wide v": {"q_len": 18, "v_head_dim": 33, "head_dim": 5},
    "one of each": {"q_len": 1, "head_dim": 1},
    "one query, many keys": {"q_len": 1, "kv_len": 50, "q_offset": 49},
    "many queries, one key": {"q_len": 50, "kv_len": 1, "kv_offset": 3},
    "cached context": {"q_len": 9, "kv_len": 41, "q_offset": 32, "heads": 2},
    "first rows see no key": {"q_len": 30, "kv_len": 25, "kv_offset": 11, "heads": 2},
    "last rows see no key of a window": {"q_len": 40, "kv_len": 20, "q_offset": 5},
    "lengths": {"q_len": 20, "batch": 5, "lengths": (20, 0, 7, 7, 13), "heads": 2},
    "lengths, q_len != kv_len": {"q_len": 12, "kv_len": 30, "q_offset": 18, "batch": 3, "lengths": (30, 15, 6)},
    "no key": {"q_len": 6, "kv_len": 0},
    "no query": {"q_len": 0, "kv_len": 6},
    "no sequence": {"q_len": 6, "batch": 0},
}
MASKS = {"causal": Causal(), "full": Full(), "window": Window(9), "window ahead": Window(4, ahead=3)}


def inputs(work, *, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (work.batch, work.q_len, work.heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.head_dim),
        (work.batch, work.kv_len, work.kv_heads, work.v_head_dim),
    )
    return tuple(rng.standard_normal(shape).astype(numpy_dtype(work.dtype)) for shape in shapes)


def without_bound(q, k):
    """One key of great norm that no query points at: the scores stay small, but no bound on them can be proven."""
    q[..., -1] = 0
    k[:, :1, :, -1] = 1e4


def run(work, q, k, v, *, blocking=BLOCKINGS["strips"], threads=1, **schedule):
    backend = NumpyBackend(threads=threads, blocking=blocking)
    return execute(Schedule(workload=work, **({"world_size": 1} | schedule)), q, k, v, backend=backend)


def assert_close(actual, expected, limit):
    """Largest absolute error; infinities must stand where they are expected."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, equal_nan=False)


def largest(array):
    return float(np.max(np.abs(array), initial=0.0))


@pytest.mark.parametrize("online", [False, True], ids=["bounded", "online"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocking", BLOCKINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_out_and_lse_agree_with_dense_attention(dtype, shape, blocking, mask, online):
    work = Workload(**({"head_dim": 8} | SHAPES[shape]), dtype=dtype, mask=MASKS[mask])
    q, k, v = inputs(work)
    if online:
        without_bound(q, k)
    result = run(work, q, k, v, blocking=BLOCKINGS[blocking], threads=2 if blocking == "odd" else 1)
    out, lse = dense_attention(work, q, k, v)
    assert (result.out.dtype, result.lse.dtype) == (np.dtype(dtype), np.dtype(dtype))
    assert_close(result.out, out, OUT_ERROR[dtype])
    assert_close(result.lse, lse, LSE_ERROR[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_blocking_chosen_from_the_cache_computes_the_same(dtype):
    work = Workload(q_len=300, heads=4, kv_heads=2, head_dim=64, dtype=dtype, mask=Causal())
    q, k, v = inputs(work)
    result = execute(Schedule(workload=work, world_size=1), q, k, v)
    out, lse = dense_attention(work, q, k, v)
    assert_close(result.out, out, OUT_ERROR[dtype])
    assert_close(result.lse, lse, LSE_ERROR[dtype])


def test_rows_that_see_no_key_give_zero_and_minus_infinity():
    work = Workload(q_len=20, kv_len=20, kv_offset=7, heads=2, mask=Causal())
    result = run(work, *inputs(work))
    assert not result.out[:, :7].any()
    assert np.isneginf(result.lse[:, :, :7]).all()
    assert np.isfinite(result.lse[:, :, 7:]).all()


def test_lengths_cut_each_sequence_as_if_it_came_alone():
    lengths = (11, 0, 17)
    work = Workload(q_len=17, batch=3, heads=2, dtype="float64", mask=Causal(), lengths=lengths)
    q, k, v = inputs(work)
    result = run(work, q, k, v)
    for index, length in enumerate(lengths):
        alone = Workload(q_len=length, heads=2, dtype="float64", mask=Causal())
        out, lse = dense_attention(alone, *(array[index : index + 1, :length] for array in (q, k, v)))
        assert_close(result.out[index : index + 1, :length], out, 1e-12)
        assert_close(result.lse[index : index + 1, :, :length], lse, 1e-12)
        assert not result.out[index, length:].any()
        assert np.isneginf(result.lse[index, :, length:]).all()


@pytest.mark.parametrize("signs", ["+", "-", "+-"])
@pytest.mark.parametrize("mask", ["causal", "full"])
def test_extreme_logits_stay_finite_and_as_exact_as_float32_allows(signs, mask):
    work = Workload(q_len=96, heads=2, head_dim=16, mask=MASKS[mask], softmax_scale=1.0)
    q, k, v = inputs(work, seed=1)
    # all scores of one sign are near ties, so that rounding of the logits shows in the result
    q[..., 0] = 100
    k[..., 0] = 100 * np.random.default_rng(2).choice([1 if sign == "+" else -1 for sign in signs], k.shape[:3])
    result = run(work, q, k, v)
    exact, plain = dense_attention(work, q, k, v), dense_attention(work, q, k, v, dtype="float32")
    for found, dense32, dense64 in zip((result.out, result.lse), plain, exact, strict=True):
        assert np.isfinite(found).all()
        assert 0 < largest(found - dense64) <= 2 * largest(dense32 - dense64)


@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize(("dtype", "score", "size"), [("float32", 39.0, 1e36), ("float64", 299.0, 1e306)])
def test_great_scores_and_great_values_together_stay_in_range(dtype, score, size, mask):
    # exp(39) x 1e36 is no float32: a sum without a running maximum would overflow although each score is within its bound
    work = Workload(q_len=30, heads=2, head_dim=1, v_head_dim=4, dtype=dtype, mask=MASKS[mask], softmax_scale=score)
    q, k, v = inputs(work)
    q[:], k[:], v = 1, 1, v * v.dtype.type(size / 8)
    result, (out, lse) = run(work, q, k, v), dense_attention(work, q, k, v / size)
    assert_close(result.out / size, out, OUT_ERROR[dtype])
    assert_close(result.lse, lse, LSE_ERROR[dtype])


@pytest.mark.parametrize("first", [1e-3, 1.0, 1e2], ids="first block x {}".format)
@pytest.mark.parametrize("second", [1e-3, 1.0, 1e2], ids="second block x {}".format)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_blocks_with_and_without_a_bound_mix_in_one_row(dtype, first, second):
    work = Workload(q_len=24, kv_len=48, heads=2, head_dim=16, dtype=dtype, softmax_scale=1.0)
    q, k, v = inputs(work, seed=3)
    k[:, :24] *= first
    k[:, 24:] *= second
    # zigzag over one rank: each half of the keys is a tile of its own; only beside norms x 100 no bound can be proven
    result = run(work, q, k, v, partition="zigzag")
    exact, plain = dense_attention(work, q, k, v), dense_attention(work, q, k, v, dtype="float32")
    for found, dense32, dense64, floor in zip(
        (result.out, result.lse), plain, exact, (OUT_ERROR[dtype], LSE_ERROR[dtype]), strict=True
    ):
        allowed = 1e-12 * max(1.0, largest(dense64)) if dtype == "float64" else 2 * largest(dense32 - dense64) + floor
        assert_close(found, dense64, allowed)


def test_a_bounded_tile_leaves_the_rows_that_see_none_of_it_open_for_any_score():
    work = Workload(q_len=24, head_dim=1, mask=Window(4), softmax_scale=1.0)
    q, k, v = inputs(work)
    q[:], k[:, :12], k[:, 12:] = 1, 0, -1000
    result, (out, lse) = run(work, q, k, v, partition="zigzag"), dense_attention(work, q, k, v)
    assert_close(result.out, out, OUT_ERROR["float32"])
    assert_close(result.lse, lse, 1e-4)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("mask", ["causal", "full"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_half_precision_is_about_as_exact_as_one_dense_call(dtype, mask, world_size, threads):
    work = Workload(q_len=100, heads=4, kv_heads=2, head_dim=32, v_head_dim=24, dtype=dtype, mask=MASKS[mask])
    q, k, v = inputs(work)
    result = run(work, q, k, v, threads=threads, world_size=world_size)
    exact, lse = dense_attention(work, q, k, v)
    fused = dense_attention(work, q, k, v, dtype="float32")[0].astype(numpy_dtype(dtype))
    assert (result.out.dtype, result.lse.dtype) == (numpy_dtype(dtype), np.float32)
    error, allowed = (largest(found.astype(np.float64) - exact) for found in (result.out, fused))
    assert error <= 2.5 * allowed + 2e-3
    assert_close(result.lse, lse, LSE_ERROR["float32"])


POISONED = 9


def poison(work, online, name, value):
    """Inputs, the same with one row of batch 0 and (kv) head 0 poisoned, and which (batch, head, query) see it."""
    clean = dict(zip("qkv", inputs(work), strict=True))
    if online:
        without_bound(clean["q"], clean["k"])
    bad = clean | {name: clean[name].copy()}
    bad[name][0, POISONED, 0] = value
    seen = np.zeros((work.batch, work.heads, work.q_len), bool)
    if name == "q":
        seen[0, 0, POISONED] = True
    else:
        seen[0, : work.heads // work.kv_heads] = work.mask.visible(np.arange(work.q_len), np.array([POISONED]))[:, 0]
    return clean, bad, seen


@pytest.mark.parametrize("online", [False, True], ids=["bounded", "online"])
@pytest.mark.parametrize("mask", ["causal", "full", "window"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
class TestPoison:
    """A NaN or an infinity reaches the rows that see it and no other."""

    def test_it_spreads_to_exactly_the_rows_that_see_it(self, name, value, mask, online):
        work = Workload(q_len=26, batch=2, heads=4, kv_heads=2, head_dim=8, mask=MASKS[mask])
        clean, bad, seen = poison(work, online, name, value)
        result, expected = run(work, **bad), dense_attention(work, **clean)
        hit = seen.transpose(0, 2, 1)
        assert (np.isinf if name == "v" and np.isinf(value) else np.isnan)(result.out[hit]).all()
        assert_close(result.out[~hit], expected[0][~hit], OUT_ERROR["float32"])
        assert np.isnan(result.lse[seen]).all() == (name != "v")
        assert_close(result.lse[~seen], expected[1][~seen], LSE_ERROR["float32"])


@pytest.mark.parametrize("mask", ["causal", "full", "window"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k"])
def test_rows_that_do_not_see_the_poison_keep_every_bit_on_the_online_path(name, value, mask):
    # on the bounded path a poisoned operand proves no bound: its whole tile changes path, and the last bits with it
    work = Workload(q_len=26, batch=2, heads=4, kv_heads=2, head_dim=8, mask=MASKS[mask])
    clean, bad, seen = poison(work, True, name, value)
    before, after = run(work, **clean), run(work, **bad)
    assert np.array_equal(after.out[~seen.transpose(0, 2, 1)], before.out[~seen.transpose(0, 2, 1)])
    assert np.array_equal(after.lse[~seen], before.lse[~seen])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("key", [0, POISONED])
@pytest.mark.parametrize("blocking", BLOCKINGS)
def test_an_infinite_score_hides_a_key_or_spoils_the_row_as_in_dense_attention(blocking, key, value):
    work = Workload(q_len=26, heads=2, head_dim=8, mask=Causal())
    q, k, v = inputs(work)
    k[0, key, :, 3] = value
    result, (out, lse) = run(work, q, k, v, blocking=BLOCKINGS[blocking]), dense_attention(work, q, k, v)
    spoilt = np.isnan(lse)
    assert spoilt.any()
    assert not spoilt[:, :, key + 1 :].all()
    assert np.array_equal(np.isnan(result.lse), spoilt)
    assert np.isnan(result.out[spoilt.transpose(0, 2, 1)]).all()
    assert_close(result.out[~spoilt.transpose(0, 2, 1)], out[~spoilt.transpose(0, 2, 1)], OUT_ERROR["float32"])
    assert_close(result.lse[~spoilt], lse[~spoilt], LSE_ERROR["float32"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_rerun_and_any_number_of_threads_give_the_same_bits(dtype):
    work = Workload(q_len=83, heads=4, kv_heads=2, head_dim=16, dtype=dtype, mask=Causal())
    arrays = inputs(work)
    first = run(work, *arrays)
    for threads in (1, 2, 3):
        again = run(work, *arrays, threads=threads)
        assert again.out.tobytes() == first.out.tobytes()
        assert again.lse.tobytes() == first.lse.tobytes()


def test_a_backend_that_has_run_other_workloads_gives_the_same_bits():
    shared = NumpyBackend(blocking=BLOCKINGS["strips"])
    runs = [("float16", 40, 8), ("bfloat16", 60, 16), ("float64", 20, 8), ("float16", 50, 8), ("float32", 9, 24)]
    for dtype, length, width in runs:
        work = Workload(q_len=length, heads=2, head_dim=width, dtype=dtype, mask=Causal())
        arrays = inputs(work, seed=length)
        again = execute(Schedule(workload=work, world_size=1), *arrays, backend=shared)
        assert again.out.tobytes() == run(work, *arrays).out.tobytes()


def attend(work, backend):
    """The first attend op of a one-rank schedule, ready to be called with a poll on arrays that `change` may replace."""
    schedule = Schedule(workload=work, world_size=1)
    memory = Memory(schedule, 0, empty=NumpyBackend().empty)
    memory.bind(**dict(zip("qkv", inputs(work), strict=True)))
    op = next(op for op in schedule.program(0) if isinstance(op, Compute) and op.kernel == "attend")

    def call(poll, change=lambda name, array: array):
        memory.array(op.writes[1]).fill(-np.inf)
        fetch = lambda region: change(region.buffer, memory.array(region))  # noqa: E731
        backend.compute(op, fetch, scale=work.softmax_scale, poll=poll)

    return op, call


def no_poll():
    """Nothing is in flight."""


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("blocking", BLOCKINGS)
def test_poll_is_called_after_each_micro_tile(mask, blocking):
    work = Workload(q_len=45, batch=2, heads=6, kv_heads=3, head_dim=8, mask=MASKS[mask])
    op, call = attend(work, NumpyBackend(blocking=BLOCKINGS[blocking]))
    calls = []
    call(lambda: calls.append(None))
    copies = work.batch * work.heads
    assert len(calls) == copies * sum(m.count for tile in op.tiles for m in BLOCKINGS[blocking].micro_tiles(tile))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mask", ["causal", "full", "window ahead"])
@pytest.mark.parametrize("scale", [0.05, 20.0], ids=["bounded", "online"])
def test_the_inner_loop_allocates_nothing(dtype, mask, scale):
    blocking = Blocking(q_rows=256, k_rows=256, edge_rows=128)
    work = Workload(q_len=512, heads=2, head_dim=128, dtype=dtype, mask=MASKS[mask], softmax_scale=scale)
    _, call = attend(work, NumpyBackend(blocking=blocking))
    call(no_poll)
    tracemalloc.start()
    call(no_poll)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # whatever is made once per tile (edges, norms, einsum's buffers) stays below half a score tile; each array that an inner
    # loop would make does not: the scores fill a tile, a block's queries or its product with v half a tile (256 x 128)
    assert peak < 256 * 256 * (8 if dtype == "float64" else 4) / 2


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_any_thread_ends_the_kernel_and_comes_out(threads):
    _, call = attend(Workload(q_len=64, heads=4), NumpyBackend(threads=threads, blocking=BLOCKINGS["odd"]))
    with pytest.raises(ValueError, match="mismatch"):
        call(no_poll, lambda name, array: array[..., :-1] if name == "v" else array)


def test_an_error_in_a_poll_ends_the_kernel_and_comes_out():
    _, call = attend(Workload(q_len=64, heads=4), NumpyBackend(blocking=BLOCKINGS["odd"]))

    def poll():
        raise KeyError("peer")

    with pytest.raises(KeyError, match="peer"):
        call(poll)


def test_a_backend_needs_a_thread():
    with pytest.raises(ArrayError, match="threads is 0; it must be 1 or more"):
        NumpyBackend(threads=0)


@pytest.mark.parametrize(
    ("level2_nbytes", "dtype", "side"),
    [
        (2**20, "float32", 512),
        (2**20, "float64", 256),
        (2**18, "float32", 256),
        (2**18 - 1, "float32", 128),
        (2**30, "float64", 512),
        (1, "float32", 64),
    ],
)
def test_a_micro_tiles_scores_fit_the_level_2_cache(level2_nbytes, dtype, side):
    blocking = blocking_for(Cache(level2_nbytes=level2_nbytes, source="test"), dtype)
    assert (blocking.q_rows, blocking.k_rows, blocking.edge_rows) == (side, side, min(side, 128))

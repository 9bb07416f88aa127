"""Our own fused kernels forward, on the CPU, against dense attention in float64."""

from itertools import product

import numpy as np
import pytest
from emulator import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import BANDS, LAYOUTS, Shape, assert_right, attend, bands, dense, seen_by, shapes, tile_of

from ringsim.backends.cuda_attend import HALVES, KERNELS, OwnTiles, Plan, plans_of
from ringsim.backends.cuda_attend import Shape as Extent
from ringsim.backends.cuda_tiles import Band
from ringsim.dtypes import ATTENTION
from ringsim.errors import ArrayError

pytestmark = needs_compiler
MOST_SHARED = 99 * 1024
"""Bytes of shared memory that a block may have on compute capability 8.6 and 8.9, the least of 8.0 and later."""
CASES = [(dtype, True) for dtype in ATTENTION] + [(dtype, False) for dtype in HALVES]


def check(shape, band, *, plain, layout=LAYOUTS[0], offset=0, seed=0):
    tile = tile_of(shape, layout=layout, offset=offset)
    made = attend(tile, band, plain=plain, seed=seed)
    assert_right(made, dense(tile, band), shape.dtype, rounded=not plain and shape.dtype in HALVES)
    return made


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_out_and_lse_agree_with_dense_attention(dtype, plain, band):
    check(Shape(dtype, 150, 141, (64, 64), heads=4, kv_heads=2, batch=2), BANDS[band], plain=plain)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (130, 1), (129, 65), (128, 64), (127, 63)])
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_odd_lengths(dtype, plain, lengths):
    for band in (None, BANDS["causal"]):
        check(Shape(dtype, *lengths, (64, 64), heads=2), band, plain=plain)


@pytest.mark.parametrize(
    ("dtype", "widths"), [("bfloat16", (128, 128)), ("float16", (16, 48)), ("bfloat16", (96, 80)), ("float16", (256, 256))]
)
def test_widths_on_tensor_cores(dtype, widths):
    for band in (None, BANDS["window"]):
        check(Shape(dtype, 135, 140, widths, heads=2, kv_heads=1), band, plain=False)


@pytest.mark.parametrize("widths", [(1, 1), (5, 33), (33, 5), (130, 7), (8, 300), (40, 128)])
@pytest.mark.parametrize("dtype", ATTENTION)
def test_any_width_on_plain_kernels(dtype, widths):
    shape = Shape(dtype, 45, 50, widths, heads=2, kv_heads=1)
    tile = tile_of(shape)
    # not a word of `plain`: such widths go no other way
    assert_right(attend(tile, BANDS["causal"]), dense(tile, BANDS["causal"]), dtype, rounded=False)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes(st.sampled_from(HALVES), st.just((64, 64))),
    band=st.none() | bands(),
    layout=st.sampled_from(LAYOUTS),
    offset=st.sampled_from((0, 1, 2, 4, 8)),
    seed=st.integers(0, 3),
)
def test_any_tile_on_tensor_cores(shape, band, layout, offset, seed):
    check(shape, band, plain=False, layout=layout, offset=offset, seed=seed)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes(st.sampled_from(ATTENTION), st.tuples(st.integers(1, 70), st.integers(1, 70))),
    band=st.none() | bands(),
    layout=st.sampled_from(LAYOUTS),
    offset=st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_any_tile_on_plain_kernels(shape, band, layout, offset, seed):
    check(shape, band, plain=True, layout=layout, offset=offset, seed=seed)


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_parts_of_larger_arrays(dtype, plain):
    # the views that the backend passes: rows and heads of a block
    tile = tile_of(Shape(dtype, 200, 210, (64, 64), heads=6, kv_heads=3, batch=3))
    q, k, v, out, lse = tile.forward
    rows, keys, heads, kv_heads = slice(31, 171), slice(17, 160), slice(2, 6), slice(1, 3)
    views = (q[1:, rows, heads], k[1:, keys, kv_heads], v[1:, keys, kv_heads], out[1:, rows, heads], lse[1:, heads, rows])
    part = tile._replace(forward=tile.forward._make(views))
    before = out.copy(), lse.copy()
    assert_right(
        attend(part, BANDS["shifted"], plain=plain), dense(part, BANDS["shifted"]), dtype, rounded=not plain and dtype in HALVES
    )
    out[1:, rows, heads], lse[1:, heads, rows] = before[0][1:, rows, heads], before[1][1:, heads, rows]
    assert out.tobytes() == before[0].tobytes()
    assert lse.tobytes() == before[1].tobytes()


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_rows_that_see_nothing_give_zero_and_minus_infinity(dtype, plain):
    for shape, band in (
        (Shape(dtype, 70, 40, (64, 64)), BANDS["first rows see nothing"]),
        (Shape(dtype, 70, 40, (64, 64)), BANDS["all hidden"]),
        (Shape(dtype, 7, 0, (64, 64)), None),
    ):
        out, lse = attend(tile_of(shape), band, plain=plain)
        blind = ~seen_by(band, shape.rows, shape.keys).any(axis=1)
        assert not out[:, blind].any()
        assert np.isneginf(lse[..., blind]).all()
        assert np.isfinite(out).all() and np.isfinite(lse[..., ~blind]).all()


def test_nothing_to_do_launches_nothing():
    attend(tile_of(Shape("bfloat16", 0, 5, (64, 64))), None)
    attend(tile_of(Shape("float32", 4, 5, (3, 3), batch=0)), None)


@pytest.mark.parametrize("band", ["causal", "window", "unequal steps", "none"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_a_value_that_is_not_finite_stays_with_those_who_see_it(dtype, plain, odd, band):
    tile = tile_of(Shape(dtype, 140, 150, (64, 64), heads=2, kv_heads=1))
    tile.forward.v[0, 75, 0, 3] = tile.forward.v[0, 129, 0, 60] = odd
    assert_right(attend(tile, BANDS[band], plain=plain), dense(tile, BANDS[band]), dtype, rounded=not plain and dtype in HALVES)


@pytest.mark.parametrize("band", ["causal", "none"])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_scores_that_are_not_finite_go_the_way_of_dense_attention(dtype, plain, name, odd, band):
    tile = tile_of(Shape(dtype, 100, 110, (64, 64)))
    getattr(tile.forward, name)[0, 70, 0, 5] = odd
    assert_right(attend(tile, BANDS[band], plain=plain), dense(tile, BANDS[band]), dtype, rounded=not plain and dtype in HALVES)


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_rows_of_scores_that_are_all_minus_infinity(dtype, plain):
    tile = tile_of(Shape(dtype, 40, 70, (64, 64)))
    tile.forward.q[0, 3, 0] = 0
    tile.forward.q[0, 3, 0, 0] = -np.inf
    tile.forward.k[0, :, 0, 0] = 1
    out, lse = attend(tile, None, plain=plain)
    assert not out[0, 3].any()
    assert np.isneginf(lse[0, 0, 3])
    assert np.isfinite(np.delete(out, 3, axis=1)).all()


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_large_scores_and_a_maximum_that_grows(dtype, plain):
    tile = tile_of(Shape(dtype, 65, 200, (64, 64)))
    tile.forward.k[0, :, 0] *= np.linspace(0, 8, 200).astype(tile.forward.k.dtype)[:, None]
    out, lse = attend(tile, None, scale=1.0, plain=plain)
    exact = dense(tile, None, 1.0)
    # a score of 150 is known to 150 x 2**-24 x a few, and its weight as exactly
    slack = {"float64": 1e-12, "float32": 1e-4}[str(out.dtype)]
    limit = slack + (0 if plain else 2.0 ** (-11 if dtype == "float16" else -8)) * exact.magnitudes[0]
    assert (np.abs(out - exact.results[0]) <= limit + slack * exact.magnitudes[0]).all()
    np.testing.assert_allclose(lse, exact.results[1], rtol=1e-6 if slack == 1e-4 else 1e-14, atol=0)


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_equal_operands_give_equal_bits_in_any_order_of_threads(dtype, plain):
    first, *others = (
        [array.tobytes() for array in check(Shape(dtype, 150, 90, (64, 64), heads=2), BANDS["causal"], plain=plain, seed=seed)]
        for seed in (0, 0, 1, 2)
    )
    assert all(other == first for other in others)


def test_shared_memory_fits_every_device():
    for dtype, head_dim, v_head_dim, backward in product(ATTENTION, range(16, 257, 16), range(16, 257, 16), (False, True)):
        for plan in plans_of(dtype, Extent(1, 8, 2, 100, 100, head_dim, v_head_dim), plain=False, backward=backward):
            assert plan.launch.shared_nbytes <= MOST_SHARED
            assert plan.launch.block == (128, 1, 1)


def kernel_names(dtype, widths, *, plain=False, backward=False):
    return [plan.kernel.name for plan in plans_of(dtype, Extent(1, 1, 1, 9, 9, *widths), plain=plain, backward=backward)]


def test_which_kernels_are_chosen():
    assert kernel_names("float16", (256, 256)) == ["attend_tensor"]
    assert kernel_names("float16", (256, 256), backward=True) == ["attend_dq_plain", "attend_dkv_plain"]
    assert kernel_names("bfloat16", (128, 112), backward=True) == ["attend_dq_tensor", "attend_dkv_tensor"]
    assert kernel_names("bfloat16", (272, 64)) == kernel_names("bfloat16", (64, 72)) == ["attend_plain"]
    assert kernel_names("float32", (64, 64)) == kernel_names("float16", (64, 64), plain=True) == ["attend_plain"]
    assert {kernel.name for kernel in KERNELS} == {
        f"attend{part}_{kind}" for part in ("", "_dq", "_dkv") for kind in ("plain", "tensor")
    }


def test_blocks_are_as_many_as_rows_need():
    plan: Plan
    (plan,) = plans_of("bfloat16", Extent(3, 8, 2, 257, 10, 64, 64), plain=False, backward=False)
    assert plan.launch.grid == (3 * 3 * 8, 1, 1)
    (plan,) = plans_of("float32", Extent(3, 8, 2, 257, 10, 64, 130), plain=False, backward=False)
    assert plan.launch.grid == (9 * 2 * 3 * 8, 1, 1)
    with pytest.raises(ArrayError, match="a grid has at most 2147483647"):
        plans_of("float32", Extent(2**16, 2**16, 1, 1, 1, 64, 64), plain=False, backward=False)


def test_what_is_refused():
    own = OwnTiles(None)
    assert (own.name, own.nbytes) == ("own", 0)
    assert [own.partial(dtype) for dtype in ATTENTION] == ["float64", "float32", "float32", "float32"]
    for dtype in ATTENTION:
        assert own.refuses(dtype, (7, 513), Band(0, 1, 2, 0, None), backward=True) is None
    assert "no kernel for int8" in own.refuses("int8", (64, 64), None, backward=False)
    assert "1 or more" in own.refuses("float16", (64, 0), None, backward=False)


def test_operands_that_no_kernel_can_read():
    tile = tile_of(Shape("float32", 4, 4, (8, 8)))
    with pytest.raises(ArrayError, match="last axis must be dense"):
        attend(tile._replace(forward=tile.forward._replace(q=tile.forward.q[..., ::2], k=tile.forward.k[..., ::2])), None)

"""Our own fused kernels backward, on the CPU, against gradients in float64."""

import numpy as np
import pytest
from emulator import needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from tile_cases import (
    BANDS,
    LAYOUTS,
    Shape,
    assert_right,
    attend_backward,
    bands,
    dense_backward,
    seen_by,
    shapes,
    statistics_of,
    tile_of,
)

from ringsim.backends.cuda_attend import HALVES
from ringsim.dtypes import ATTENTION

pytestmark = needs_compiler
CASES = [(dtype, True) for dtype in ATTENTION] + [(dtype, False) for dtype in HALVES]
SMALL = (32, 48)
"""Heads of two tiles of 16 rows a warp, as up to 64; wider ones have one."""


def check(tile, band, *, plain, statistics=None, seed=0):
    dtype = tile.forward.q.dtype.name
    statistics = statistics_of(tile, band) if statistics is None else statistics
    made = attend_backward(tile, band, statistics, plain=plain, seed=seed)
    assert_right(made, dense_backward(tile, band, statistics), dtype, rounded=not plain and dtype in HALVES)
    return made


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_gradients_agree_with_dense_attention(dtype, plain, band):
    check(tile_of(Shape(dtype, 150, 141, SMALL, heads=4, kv_heads=2, batch=2)), BANDS[band], plain=plain)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 130), (130, 1), (129, 65), (128, 64), (127, 63), (64, 128)])
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_odd_lengths(dtype, plain, lengths):
    for band in (None, BANDS["causal"]):
        check(tile_of(Shape(dtype, *lengths, SMALL, heads=2)), band, plain=plain)


@pytest.mark.parametrize(("dtype", "widths"), [("bfloat16", (128, 128)), ("float16", (64, 64)), ("bfloat16", (96, 80))])
def test_widths_on_tensor_cores(dtype, widths):
    for band in (None, BANDS["window"]):
        check(tile_of(Shape(dtype, 135, 140, widths, heads=2, kv_heads=1)), band, plain=False)


@pytest.mark.parametrize("widths", [(1, 1), (5, 33), (130, 7), (8, 300), (40, 128)])
@pytest.mark.parametrize("dtype", ATTENTION)
def test_any_width_on_plain_kernels(dtype, widths):
    check(tile_of(Shape(dtype, 45, 50, widths, heads=2, kv_heads=1)), BANDS["causal"], plain=True)


@settings(deadline=None, max_examples=50)
@given(
    shape=shapes(st.sampled_from(HALVES), st.just(SMALL)),
    band=st.none() | bands(),
    layout=st.sampled_from(LAYOUTS),
    offset=st.sampled_from((0, 1, 2, 4, 8)),
    seed=st.integers(0, 3),
)
def test_any_tile_on_tensor_cores(shape, band, layout, offset, seed):
    check(tile_of(shape, layout=layout, offset=offset), band, plain=False, seed=seed)


@settings(deadline=None, max_examples=50)
@given(
    shape=shapes(st.sampled_from(ATTENTION), st.tuples(st.integers(1, 70), st.integers(1, 70))),
    band=st.none() | bands(),
    layout=st.sampled_from(LAYOUTS),
    offset=st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_any_tile_on_plain_kernels(shape, band, layout, offset, seed):
    check(tile_of(shape, layout=layout, offset=offset), band, plain=True, seed=seed)


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_statistics_of_whole_rows_of_which_the_tile_is_a_part(dtype, plain):
    tile = tile_of(Shape(dtype, 70, 150, SMALL, heads=2))
    lse, delta = statistics_of(tile, None)
    k, v = tile.forward.k[:, 31:99], tile.forward.v[:, 31:99]
    part = tile._replace(forward=tile.forward._replace(k=k, v=v))
    check(part, BANDS["shifted"], plain=plain, statistics=(lse, delta))


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_a_query_that_sees_nothing_anywhere_contributes_nothing(dtype, plain):
    tile = tile_of(Shape(dtype, 130, 140, SMALL, heads=4, kv_heads=2))
    statistics = statistics_of(tile, None)
    blind = [0, 37, 64, 129]
    statistics[0][..., blind] = -np.inf
    statistics[1][..., blind] = np.nan
    tile.forward.q[:, blind] = tile.dout[:, blind] = np.nan
    dq, dk, dv = check(tile, None, plain=plain, statistics=statistics)
    assert not dq[:, blind].any()
    assert all(np.isfinite(array).all() for array in (dq, dk, dv))


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_keys_without_queries_and_queries_without_keys_give_zeros(dtype, plain):
    for rows, keys in ((0, 70), (70, 0)):
        tile = tile_of(Shape(dtype, rows, keys, SMALL, heads=2))
        statistics = np.full((2, 1, 2, rows), -np.inf)
        assert not any(array.any() for array in attend_backward(tile, None, statistics, plain=plain))


@pytest.mark.parametrize("band", ["causal", "window", "unequal steps", "none"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_what_is_not_finite_stays_with_those_who_see_it(dtype, plain, name, band):
    tile = tile_of(Shape(dtype, 140, 150, SMALL, heads=2, kv_heads=1))
    statistics = statistics_of(tile, BANDS[band])
    array = tile.dout if name == "dout" else getattr(tile.forward, name)
    array[0, 75, 0, 3] = array[0, 129, 0, 30] = np.nan
    for made, see in zip(check(tile, BANDS[band], plain=plain, statistics=statistics), reaches(name, BANDS[band]), strict=True):
        assert np.isfinite(made[0][~see]).all()


def reaches(name, band):
    """For dq, dk and dv the rows that rows 75 and 129 of an operand may touch."""
    seen, odd = seen_by(band, 140, 150), [75, 129]
    if name in ("k", "v"):
        queries = seen[:, odd].any(axis=1)
        return queries, (seen[queries].any(axis=0)), seen[queries].any(axis=0)
    queries = np.isin(np.arange(140), odd)
    return queries, seen[odd].any(axis=0), seen[odd].any(axis=0)


@pytest.mark.parametrize(("dtype", "plain"), CASES)
def test_equal_operands_give_equal_bits_in_any_order_of_threads(dtype, plain):
    tile = tile_of(Shape(dtype, 150, 90, SMALL, heads=2, kv_heads=1))
    first, *others = (
        [array.tobytes() for array in check(tile, BANDS["causal"], plain=plain, seed=seed)] for seed in (0, 0, 1, 2)
    )
    assert all(other == first for other in others)

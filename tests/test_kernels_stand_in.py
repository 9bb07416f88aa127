"""Rows that give cuDNN a delta in place of `out`."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.cuda_state import StateKernels
from ringsim.dtypes import numpy_dtype

from .emulator import Canaries, Immediate, needs_compiler
from .kernel_layouts import SEEDS, exact, layouts, placed, room

pytestmark = needs_compiler
HALVES = ["float16", "bfloat16"]
LARGEST = {"float16": 65504.0, "bfloat16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
# half a step below the normal numbers, which is all that bfloat16, as wide as float32, never meets here
LEAST = {"float16": 2.0**-25, "bfloat16": 0.0}


def made_of(dout, delta, **kwargs):
    target = np.full(dout.shape, np.nan, dout.dtype)
    StateKernels(Immediate(**kwargs)).stand_in(dout, delta, target, None)
    return target


def sums(dout, target):
    return (exact(dout) * exact(target)).sum(-1).swapaxes(1, 2)


def bound_of(dout, delta, dtype):
    """What the docstring promises of rows with at least three elements of dout that are not 0 nor below 2**-12 of the largest."""
    sizes = np.sort(np.abs(exact(dout)).swapaxes(1, 2), -1)
    useful = np.where(sizes >= sizes[..., -1:] / 4096, sizes, np.inf).min(-1)
    return 1.001 * 2.0**-24 * np.abs(exact(delta)) + LEAST[dtype] * useful


@pytest.mark.parametrize("dtype", HALVES)
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, width=st.sampled_from([3, 4, 8, 24, 64, 96, 128, 130]), tiny=st.booleans())
def test_the_sum_of_products_is_delta(dtype, data, seed, width, tiny):
    rng, canaries = np.random.default_rng(seed), Canaries()
    batch, rows, heads = (int(n) for n in rng.integers(1, (3, 12, 4)))
    shape = batch, rows, heads, width
    low = -12 if dtype == "float16" else -60
    sizes = 2.0 ** rng.uniform(low if tiny else -2, 2, (*shape[:3], 1))
    # within 2**-12 of the largest, so that all are of use
    dout = (sizes * rng.uniform(0.1, 4, shape) * rng.choice([-1, 1], shape)).astype(numpy_dtype(dtype))
    out = rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 2, (*shape[:3], 1))
    delta = (exact(dout) * out).sum(-1).swapaxes(1, 2).astype(np.float32)
    held = placed(canaries, dout, data.draw(layouts())), placed(canaries, delta, data.draw(layouts(3)))
    target = room(canaries, shape, dtype, data.draw(layouts()))
    StateKernels(Immediate(seed % 3)).stand_in(*held, target, None)
    canaries.check()
    assert ((exact(target) != 0).sum(-1) <= 3).all()
    assert (np.abs(sums(dout, target) - exact(delta)) <= bound_of(dout, delta, dtype)).all()
    # and so in float32, in whatever order three products are added
    terms = (exact(dout) * exact(target)).astype(np.float32)
    assert (np.abs(terms.sum(-1).swapaxes(1, 2) - delta) <= bound_of(dout, delta, dtype) + 2.0**-22 * np.abs(delta)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_tiny_beside_the_largest_takes_nothing(dtype):
    """What it would have to be multiplied by is beyond the dtype's numbers."""
    rng = np.random.default_rng(7)
    dout = rng.uniform(0.5, 2, (1, 200, 1, 8))
    dout[..., 3:] *= 2.0**-20 if dtype == "float16" else 2.0**-120
    dout = dout.astype(numpy_dtype(dtype))
    delta = (rng.standard_normal((1, 1, 200)) * (1e3 if dtype == "float16" else 1e20)).astype(np.float32)
    target = made_of(dout, delta)
    assert (exact(target)[..., 3:] == 0).all()
    assert (np.abs(sums(dout, target) - exact(delta)) <= bound_of(dout, delta, dtype)).all()


@pytest.mark.parametrize("dtype", HALVES)
@settings(deadline=None)
@given(seed=SEEDS, width=st.integers(1, 9))
def test_any_bits_give_delta_or_a_nan_or_as_near_as_one_element_comes(dtype, seed, width):
    rng = np.random.default_rng(seed)
    dout = rng.integers(0, 2**16, (1, 64, 1, width), dtype=np.uint16).view(numpy_dtype(dtype))
    dout[rng.random(dout.shape) < 0.2] = 0
    delta = rng.integers(0, 2**32, (1, 1, 64), dtype=np.uint32).view(np.float32)
    target = made_of(dout, delta, seed=seed % 3)
    largest = np.abs(exact(dout)).max(-1).swapaxes(1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        total, wanted = sums(dout, target), exact(delta)
        beyond = np.abs(wanted) > LARGEST[dtype] * largest
    spoiled = ~np.isfinite(wanted) | ~np.isfinite(largest)
    assert np.isnan(total[spoiled]).all()
    zeros = ~spoiled & (largest == 0)
    assert (np.where(zeros.swapaxes(1, 2)[..., None], exact(target), 0) == 0).all()
    held = ~spoiled & ~zeros & ~beyond
    eps = 2.0**-11 if dtype == "float16" else 2.0**-8
    # of one element alone, or of what float32 can still tell apart
    bound = eps * np.abs(wanted[held]) + max(LEAST[dtype], 2.0**-134) * largest[held] + 2.0**-148
    assert (np.abs(total[held] - wanted[held]) <= bound).all()
    rest = ~spoiled & ~zeros & beyond
    assert (np.isnan(total[rest]) | (np.abs(total[rest] - wanted[rest]) <= np.abs(wanted[rest]) / 4096)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_overflow_is_shared_by_two_and_then_is_a_nan(dtype):
    dout = np.array([2, 1, 1, 0.5], numpy_dtype(dtype)).reshape(1, 1, 1, 4).repeat(3, 1)
    limit = LARGEST[dtype] / (1 if dtype == "float16" else 2**8)
    scale = 1 if dtype == "float16" else 2.0**-8
    dout = (dout.astype(np.float32) * scale).astype(dout.dtype)
    delta = np.array([1.9, 2.9, 4.5], np.float32).reshape(1, 1, 3) * np.float32(limit)
    target = made_of(dout, delta)
    assert np.isfinite(exact(target[0, :2])).all()
    np.testing.assert_allclose(sums(dout, target)[0, 0, :2], delta[0, 0, :2], rtol=2.0**-23)
    assert np.isnan(exact(target)[0, 2]).any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_nan(dtype, value):
    dout = np.ones((1, 4, 1, 16), numpy_dtype(dtype))
    delta = np.ones((1, 1, 4), np.float32)
    dout[0, 1, 0, 7], delta[0, 0, 2] = value, value
    dout[0, 3] = 0
    target = made_of(dout, delta)
    assert np.isnan(sums(dout, target)[0, 0]).tolist() == [False, True, True, False]
    assert sums(dout, target)[0, 0, [0, 3]].tolist() == [1, 0]
    assert (exact(target)[0, 3] == 0).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_equal_operands_give_equal_bits(dtype):
    rng = np.random.default_rng(5)
    dout = rng.choice([-1.0, 1.0, 0.5], (1, 40, 2, 128)).astype(numpy_dtype(dtype))
    delta = rng.standard_normal((1, 2, 40)).astype(np.float32)
    made = {made_of(dout, delta, seed=seed).tobytes() for seed in (0, 1, 2)}
    wide = np.zeros((1, 40, 2, 131), dout.dtype)[..., 1:129]
    wide[...] = dout
    assert made == {made_of(wide, delta).tobytes()}

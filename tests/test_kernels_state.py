"""The kernels that fold partial results into running state, against float64."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.cuda_state import Partial, State, StateKernels
from ringsim.backends.numpy_state import _merge_rows
from ringsim.dtypes import numpy_dtype
from ringsim.errors import ArrayError
from ringsim.partials import MOST_PARTIALS

from .emulator import Canaries, Immediate, needs_compiler
from .kernel_layouts import SEEDS, WIDTHS, exact, layouts, numbers, placed, room, step

pytestmark = needs_compiler
DTYPES = [("float64", "float64"), ("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
MOST_LSE = 30.0
# a factor's relative error: that of exp's argument, |lse - reference| steps at most, exp's own two, a product's and a sum's
STEPS = 2 * MOST_LSE + 8


def drawn_state(rng, extent, dtype):
    """A state of which some rows have seen nothing."""
    acc, row_max, row_sum = (numbers(rng, shape, dtype) for shape in (extent, extent[:3], extent[:3]))
    row_max *= MOST_LSE / 4
    row_sum = np.where(rng.random(extent[:3]) < 0.3, row_sum.dtype.type(0), np.abs(row_sum) + row_sum.dtype.type(0.1))
    unseen = row_sum == 0
    acc[unseen], row_max[unseen] = 0, -np.inf
    return acc, row_max, row_sum


def drawn_partials(data, rng, extent, dtypes, count):
    """So many partials of any ranges: values and layouts."""
    made = []
    for _ in range(count):
        begins = [int(rng.integers(0, size + 1)) for size in extent[:3]]
        ranges = [(begin, int(rng.integers(begin, size + 1))) for begin, size in zip(begins, extent[:3], strict=True)]
        if rng.random() < 0.5:
            ranges = [(0, size) for size in extent[:3]]
        batch, heads, rows = (end - begin for begin, end in ranges)
        out = numbers(rng, (batch, rows, heads, extent[3]), dtypes[1])
        lse = np.clip(numbers(rng, (batch, heads, rows), dtypes[0], MOST_LSE / 3), -MOST_LSE, MOST_LSE)
        unseen = rng.random(lse.shape) < 0.3
        lse[unseen] = -np.inf
        out.swapaxes(1, 2)[unseen] = np.nan if rng.random() < 0.5 else 0
        made.append(Partial(*ranges, out, lse))
    return made


def folded(state, partials):
    """The fold in float64, and what its rounding errors scale with: the fold of absolute values."""
    state = [exact(array) for array in state]
    scale = [np.abs(state[0]), state[1].copy(), state[2].copy()]
    for *ranges, given_out, lse in partials:
        box = tuple(slice(*each) for each in ranges)
        seen = exact(lse) != -np.inf
        out = np.where(seen[..., None], exact(given_out).swapaxes(1, 2), 0)
        for side, addend in ((state, out), (scale, np.abs(out))):
            for at in np.ndindex(*out.shape[:2]):
                views = tuple(array[box][at] for array in side)
                with np.errstate(invalid="ignore"):
                    _merge_rows(views, (addend[at], exact(lse)[at], seen[at].astype(np.float64)))
    return state, scale[0]


def check_state(made, expected, scale, dtype):
    eps = step(dtype)[0]
    acc, row_max, row_sum = (exact(array) for array in made)
    np.testing.assert_array_equal(row_max, expected[1])
    assert (np.abs(row_sum - expected[2]) <= STEPS * eps * expected[2]).all()
    assert (np.abs(acc - expected[0]) <= STEPS * eps * scale).all()


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, width=WIDTHS, fresh=st.booleans(), count=st.sampled_from([0, 1, 2, 3, MOST_PARTIALS]))
def test_partials_are_folded_into_a_state(dtypes, data, seed, width, fresh, count):
    rng, canaries = np.random.default_rng(seed), Canaries()
    extent = (*(int(n) for n in rng.integers(1, (3, 4, 40))), width)
    before = drawn_state(rng, extent, dtypes[0])
    partials = drawn_partials(data, rng, extent, dtypes, count)
    axes = data.draw(layouts()), data.draw(layouts(3)), data.draw(layouts(3))
    if fresh:
        held = [room(canaries, array.shape, dtypes[0], layout) for array, layout in zip(before, axes, strict=True)]
        before = [np.zeros(extent), np.full(extent[:3], -np.inf), np.zeros(extent[:3])]
    else:
        held = [placed(canaries, array, layout) for array, layout in zip(before, axes, strict=True)]
    outs, lses = data.draw(layouts()), data.draw(layouts(3))
    given_ = [one._replace(out=placed(canaries, one.out, outs), lse=placed(canaries, one.lse, lses)) for one in partials]
    kernels = StateKernels(Immediate(seed % 3))
    # read first: it must leave the state as it is
    dtype = data.draw(st.sampled_from(sorted({dtypes[1], dtypes[0]})))
    result = room(canaries, (extent[0], extent[2], extent[1], width), dtype, data.draw(layouts()))
    lse = room(canaries, extent[:3], dtypes[0], data.draw(layouts(3)))
    kernels.finish_partials(None if fresh and seed % 2 else State(*held), fresh, given_, result, lse, None)
    kernels.merge_partials(State(*held), fresh, given_, None)
    canaries.check()
    expected, scale = folded(before, partials)
    check_state(held, expected, scale, dtypes[0])
    check_result(result, lse, expected, scale, dtypes[0], dtype)


def check_result(result, lse, expected, scale, state, dtype):
    acc, row_max, row_sum = expected
    seen = row_sum != 0
    log = np.log(row_sum[seen]) + row_max[seen]
    assert (exact(lse)[~seen] == -np.inf).all()
    eps, (half, least) = step(state)[0], step(dtype)
    assert (np.abs(exact(lse)[seen] - log) <= (STEPS + 4 * (1 + np.abs(log))) * eps).all()
    divisor = np.where(seen, row_sum, 1)[..., None]
    normal, made = acc / divisor, exact(result).swapaxes(1, 2)
    assert (made[~seen] == 0).all()
    bound = (2 * STEPS + 1) * eps * scale / divisor
    assert (np.abs(made - normal) <= bound + half * (np.abs(normal) + bound) + least).all()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, width=WIDTHS)
def test_two_states_are_merged(dtype, data, seed, width):
    rng, canaries = np.random.default_rng(seed), Canaries()
    extent = (*(int(n) for n in rng.integers(1, (3, 4, 40))), width)
    sides = [drawn_state(rng, extent, dtype) for _ in range(2)]
    axes = [data.draw(layouts(n)) for n in (4, 3, 3)]
    mine, other = ([placed(canaries, array, layout) for array, layout in zip(side, axes, strict=True)] for side in sides)
    StateKernels(Immediate(seed % 3)).merge(State(*mine), State(*other), None)
    canaries.check()
    expected, scale = ([exact(array) for array in sides[0]] for _ in range(2))
    scale[0] = np.abs(scale[0])
    for at in np.ndindex(*extent[:2]):
        _merge_rows(tuple(array[at] for array in expected), tuple(exact(array)[at] for array in sides[1]))
        _merge_rows(
            tuple(array[at] for array in scale), tuple(np.abs(exact(a)[at]) if a.ndim == 4 else exact(a)[at] for a in sides[1])
        )
    check_state(mine, expected, scale[0], dtype)
    for made, given_ in zip(other, sides[1], strict=True):
        np.testing.assert_array_equal(made, given_)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_comes_through(dtype, value):
    """In `out` it stays in its column, in `lse` it spoils its row; in rows that saw no key it is not read."""
    rng, kernels = np.random.default_rng(0), StateKernels(Immediate())
    extent = (1, 2, 6, 16)
    held = State(*drawn_state(rng, extent, "float32"))
    held.row_sum[...], held.row_max[...] = 1, 0
    out, lse = numbers(rng, (1, 6, 2, 16), dtype), numbers(rng, (1, 2, 6), "float32")
    out[0, 1, 0, 3] = value
    out[0, 2], lse[0, :, 2] = value, -np.inf
    if value != -np.inf:
        lse[0, 1, 4] = value
    made, total = np.empty_like(out), np.empty_like(lse)
    partials = [Partial((0, 1), (0, 2), (0, 6), out, lse)]
    kernels.finish_partials(held, False, partials, made, total, None)
    expected = ~np.isfinite(exact(out))
    expected[0, 2] = False
    assert (np.isnan(exact(made)) if np.isnan(value) else ~np.isfinite(exact(made)))[expected].all()
    spoiled = expected.copy()
    spoiled[0, 4, 1] = value != -np.inf
    assert (np.isfinite(exact(made)) == ~spoiled).all()
    assert np.isnan(total[0, 1, 4]) == (value != -np.inf)
    kernels.merge_partials(held, False, partials, None)
    np.testing.assert_array_equal(np.isfinite(held.acc.swapaxes(1, 2)), ~spoiled)


def test_a_state_that_is_not_finite_stays_so():
    rng, kernels = np.random.default_rng(0), StateKernels(Immediate())
    held = State(*drawn_state(rng, (1, 1, 3, 8), "float32"))
    held.row_sum[...], held.row_max[...] = 1, 0
    held.row_sum[0, 0, 0], held.acc[0, 0, 1, 5] = np.nan, np.inf
    partial = Partial((0, 1), (0, 1), (0, 3), numbers(rng, (1, 3, 1, 8), "bfloat16"), numbers(rng, (1, 1, 3), "float32"))
    kernels.merge_partials(held, False, [partial], None)
    assert np.isnan(held.row_sum[0, 0, 0])
    assert np.isinf(held.acc[0, 0, 1, 5])
    assert np.isfinite(held.acc[0, 0, [1, 2]]).sum() == 15


def test_nothing_is_launched_for_nothing():
    kernels = StateKernels(calls := Immediate())
    empty = State(np.zeros((1, 2, 0, 8), np.float32), np.zeros((1, 2, 0), np.float32), np.zeros((1, 2, 0), np.float32))
    some = State(np.zeros((1, 1, 3, 8), np.float32), np.zeros((1, 1, 3), np.float32), np.zeros((1, 1, 3), np.float32))
    kernels.merge_partials(empty, True, [], None)
    kernels.merge_partials(some, False, [], None)
    kernels.merge(empty, empty, None)
    kernels.finish_partials(None, True, [], np.zeros((1, 0, 2, 8), ml_dtypes.bfloat16), np.zeros((1, 2, 0), np.float32), None)
    assert calls.emulator.launches == 0


def test_what_does_not_fit_is_refused():
    kernels = StateKernels(Immediate())
    held = State(np.zeros((1, 2, 5, 8), np.float32), np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 5), np.float32))
    out, lse = np.zeros((1, 5, 2, 8), np.float16), np.zeros((1, 2, 5), np.float32)
    whole = Partial((0, 1), (0, 2), (0, 5), out, lse)
    for partials, message in [
        ([whole] * 9, "9 partial results"),
        ([whole._replace(rows=(1, 6))], "a partial for"),
        ([whole._replace(rows=(0, 4))], "a partial for"),
        ([whole, whole._replace(out=out.astype(np.float32))], "one dtype of out"),
        ([whole._replace(lse=lse.astype(np.float64))], "lse of the state's"),
        ([whole._replace(out=out.astype(np.float64))], "no kernel is compiled"),
    ]:
        with pytest.raises(ArrayError, match=message):
            kernels.merge_partials(held, False, partials, None)
    with pytest.raises(ArrayError, match="must be given"):
        kernels.finish_partials(None, False, [whole], out, lse, None)
    with pytest.raises(ArrayError, match="float32 or float64 throughout"):
        kernels.merge_partials(State(held.acc, held.row_max, held.row_sum.astype(np.float64)), False, [whole], None)
    with pytest.raises(ArrayError, match="do not fit"):
        kernels.finish_partials(held, False, [], np.zeros((1, 4, 2, 8), np.float16), np.zeros((1, 2, 4), np.float32), None)
    askew = np.zeros(4 * 81, np.uint8)[2:-2].view(numpy_dtype("float32"))[:80].reshape(1, 2, 5, 8)
    with pytest.raises(ArrayError, match="align the slot"):
        kernels.merge_partials(State(askew, held.row_max, held.row_sum), False, [whole], None)

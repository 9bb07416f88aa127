"""The kernels that copy, clear, add and round arrays of any layout, and delta."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.cuda_state import StateKernels
from ringsim.dtypes import numpy_dtype
from ringsim.errors import ArrayError

from .emulator import Canaries, Immediate, needs_compiler
from .kernel_layouts import SEEDS, WIDTHS, exact, layouts, numbers, placed, room, step

pytestmark = needs_compiler
COUNTS = st.sampled_from([1, 1, 2, 3, 5, 8, 64, 300])
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), COUNTS)


@settings(deadline=None)
@given(
    data=st.data(),
    seed=SEEDS,
    shape=SHAPES,
    axes=st.integers(1, 4),
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16", "uint8"]),
)
def test_copies_and_zeros(data, seed, shape, axes, dtype):
    rng, canaries = np.random.default_rng(seed), Canaries()
    shape = shape[4 - axes :]
    itemsize = numpy_dtype(dtype).itemsize
    bits = rng.integers(0, 256, (*shape, itemsize), dtype=np.uint8).view(f"u{itemsize}")[..., 0].view(numpy_dtype(dtype))
    source = placed(canaries, bits, data.draw(layouts(axes, dense=False)))
    target = room(canaries, shape, dtype, data.draw(layouts(axes, dense=False)))
    kernels = StateKernels(Immediate(seed % 3))
    kernels.copy(target, source, None)
    assert target.tobytes() == source.tobytes() == bits.tobytes()
    kernels.clear(source, None)
    assert not any(source.tobytes())
    canaries.check()


@pytest.mark.parametrize(
    ("total", "addend"), [("float64", "float64"), ("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
)
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, shape=SHAPES, axes=st.integers(1, 4))
def test_sums(total, addend, data, seed, shape, axes):
    rng, canaries = np.random.default_rng(seed), Canaries()
    shape = shape[4 - axes :]
    values = numbers(rng, shape, total), numbers(rng, shape, addend)
    mine, other = (placed(canaries, array, data.draw(layouts(axes))) for array in values)
    StateKernels(Immediate(seed % 3)).accumulate(mine, other, None)
    np.testing.assert_array_equal(mine, values[0] + values[1].astype(mine.dtype))
    np.testing.assert_array_equal(exact(other), exact(values[1]))
    canaries.check()


@pytest.mark.parametrize(
    ("source", "target"),
    [("float64", "float64"), ("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")],
)
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, shape=SHAPES)
def test_casts(source, target, data, seed, shape):
    rng, canaries = np.random.default_rng(seed), Canaries()
    values = numbers(rng, shape, source, 10.0 ** rng.integers(-8, 6))
    values.flat[:: int(rng.integers(1, 50))] = rng.choice([np.inf, -np.inf, np.nan, 0])
    held = placed(canaries, values, data.draw(layouts()))
    made = room(canaries, shape, target, data.draw(layouts()))
    StateKernels(Immediate(seed % 3)).cast(made, held, None)
    canaries.check()
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(exact(made), exact(values.astype(made.dtype)))


@pytest.mark.parametrize(
    ("dtype", "state"), [("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32")]
)
@settings(deadline=None)
@given(data=st.data(), seed=SEEDS, width=WIDTHS)
def test_delta(dtype, state, data, seed, width):
    rng, canaries = np.random.default_rng(seed), Canaries()
    batch, rows, heads = (int(n) for n in rng.integers(1, (3, 40, 4)))
    values = [numbers(rng, (batch, rows, heads, width), dtype) for _ in range(2)]
    out, dout = (placed(canaries, array, data.draw(layouts())) for array in values)
    made = room(canaries, (batch, heads, rows), state, data.draw(layouts(3)))
    StateKernels(Immediate(seed % 3)).delta(out, dout, made, None)
    canaries.check()
    products = exact(values[0]) * exact(values[1])
    scale = np.abs(products).sum(-1).swapaxes(1, 2)
    assert (np.abs(exact(made) - products.sum(-1).swapaxes(1, 2)) <= (width + 1) * step(state)[0] * scale).all()


def test_delta_says_what_is_not_finite():
    out, dout = numbers(np.random.default_rng(0), (1, 4, 1, 8), "float16"), np.ones((1, 4, 1, 8), np.float16)
    out[0, 1, 0, 5], out[0, 2, 0, 6] = np.nan, np.inf
    made = np.zeros((1, 1, 4), np.float32)
    StateKernels(Immediate()).delta(out, dout, made, None)
    assert np.isfinite(made[0, 0]).tolist() == [True, False, False, True]


class Narrow(Immediate):
    """Gives each launch fewer blocks along every axis than it asks for, as its limits would a huge one."""

    def launch(self, kernel, shape, arguments, stream):
        narrow = tuple(min(2, count) for count in shape.grid)
        assert narrow != shape.grid
        super().launch(kernel, shape._replace(grid=narrow), arguments, stream)


def test_a_grid_too_small_for_all_goes_over_it_again():
    rng, kernels = np.random.default_rng(0), StateKernels(Narrow())
    values = numbers(rng, (5, 4, 13, 700), "float32")
    held, made = Canaries().holding(values, pad=1, axes=(1, 2, 0, 3)), np.zeros_like(values)
    kernels.copy(made, held, None)
    np.testing.assert_array_equal(made, values)
    out, dout = numbers(rng, (5, 130, 4, 64), "float32"), numbers(rng, (5, 130, 4, 64), "float32")
    delta = np.zeros((5, 4, 130), np.float32)
    kernels.delta(out, dout, delta, None)
    np.testing.assert_allclose(delta, np.einsum("brhd,brhd->bhr", exact(out), exact(dout)), atol=1e-4)


def test_a_grid_ends_at_65535_blocks_along_y_and_z():
    kernels = StateKernels(Immediate())
    held, made = np.arange(66000, dtype=np.uint16).reshape(66000, 1, 1), np.zeros((66000, 3, 3), np.uint16)
    kernels.copy(made[:, :2, :2], np.broadcast_to(held, (66000, 2, 2)), None)
    assert (made[:, :2, :2] == held).all()
    assert not made[:, 2].any()
    out, made = np.ones((1, 1, 66000, 8), np.float32), np.zeros((1, 66000, 1), np.float32)
    kernels.delta(out, out, made, None)
    assert (made == 8).all()


def test_nothing_is_launched_for_nothing():
    kernels, none = StateKernels(calls := Immediate()), np.zeros((2, 0, 3, 4), np.float32)
    kernels.copy(none, none, None)
    kernels.clear(none, None)
    kernels.accumulate(none, none, None)
    kernels.cast(none.astype(np.float16), none, None)
    kernels.delta(none, none, np.zeros((2, 3, 0), np.float32), None)
    kernels.stand_in(none.astype(np.float16), np.zeros((2, 3, 0), np.float32), none.astype(np.float16), None)
    assert calls.emulator.launches == 0


def test_what_does_not_fit_is_refused():
    kernels, wide = StateKernels(Immediate()), np.zeros((2, 3, 4, 8), np.float32)
    for attempt, message in [
        (lambda: kernels.copy(wide, wide[:1], None), "do not fit"),
        (lambda: kernels.copy(wide, wide.astype(np.float64), None), "do not fit"),
        (lambda: kernels.accumulate(wide, wide[..., :7], None), "do not fit"),
        (lambda: kernels.accumulate(wide.astype(np.float16), wide.astype(np.float16), None), "no kernel is compiled"),
        (lambda: kernels.cast(wide.astype(np.float64), wide, None), "no kernel is compiled"),
        (lambda: kernels.delta(wide, wide, np.zeros((2, 4, 4), np.float32), None), "do not fit"),
        (lambda: kernels.delta(wide, wide[..., ::-1], np.zeros((2, 4, 3), np.float32), None), "the last axis should be dense"),
        (lambda: kernels.copy(np.zeros((2,) * 5)[:, :, ::-1, :, ::-1], np.zeros((2,) * 5).T, None), "more than four axes"),
        (lambda: kernels.stand_in(wide, np.zeros((2, 4, 3), np.float32), wide, None), "no kernel is compiled"),
    ]:
        with pytest.raises(ArrayError, match=message):
            attempt()
    long = np.zeros((1, 1, 1, 2**16), ml_dtypes.bfloat16)
    with pytest.raises(ArrayError, match="can be numbered"):
        kernels.stand_in(long, np.zeros((1, 1, 1), np.float32), long, None)

"""The backward kernels of the NumPy backend against dense gradients in float64, and these against finite differences."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from ringsim.mask import Causal, Full
from ringsim.reference import dense_attention, dense_backward
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

"""What the forward kernel's bounds rest on: norms that are never too small, found for all heads at once."""

import numpy as np
import pytest

from ringsim.backends import numpy_bounds
from ringsim.backends.numpy_bounds import BOUNDS, exponential, largest_norms, open_rows, value_squares


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 255, 256, 700])
@pytest.mark.parametrize("exponent", [-45, -23, 0, 15])
def test_the_largest_norm_of_each_head_is_never_too_small_nor_much_too_large(dtype, rows, exponent):
    array = (np.random.default_rng(0).standard_normal((rows, 6, 9)) * 10.0**exponent).astype(dtype)
    exact = np.linalg.norm(array.astype(np.float64), axis=2).max(axis=0)
    smallest = np.sqrt(float(np.finfo(dtype).tiny))
    for part in (array, array[:, 1:4]):
        expected = exact[1:4] if part is not array else exact
        assert np.all(np.array(largest_norms(part)) >= expected * (1 - 1e-6))
        assert np.all(np.array(largest_norms(part)) <= expected * (1 + 1e-6) + 4 * smallest)


def test_a_norm_or_a_sum_without_a_bound_is_that_of_its_head_alone():
    array = np.ones((300, 4, 8), np.float32)
    array[299, 1, 0], array[7, 2, 3], array[0, 3, 0] = np.nan, np.inf, 1e25
    with np.errstate(all="ignore"):
        results = largest_norms(array), value_squares(array), value_squares(array[:, :, :7])
    for found in results:
        assert 0 < found[0] < 1e5
        assert np.isnan(found[1])
        assert found[2] == found[3] == np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_sum_of_squares_is_never_too_small(dtype):
    array = np.random.default_rng(0).standard_normal((100, 3, 8)).astype(dtype)
    exact = (array.astype(np.float64) ** 2).sum(axis=(0, 2))
    for part in (array, array[:, :, ::2]):
        least = exact if part is array else (part.astype(np.float64) ** 2).sum(axis=(0, 2))
        assert np.all(np.array(value_squares(part)) >= least * (1 - 1e-5))
        assert max(value_squares(part)) < BOUNDS[np.dtype(dtype)][1]


def test_rows_are_open_where_their_reference_is_zero_or_not_yet_set():
    row_max = np.array([[0, -np.inf, 0], [0, 1, 0], [-np.inf] * 3, [0, np.nan, 0], [0, np.inf, 0]], np.float32)
    assert open_rows(row_max) == [True, False, True, False, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exponential_is_exp_within_the_bound(dtype):
    function, factor = exponential(np.dtype(dtype))
    bound = BOUNDS[np.dtype(dtype)][0]
    scores = np.linspace(-bound, bound, 10001, dtype=dtype)
    exact = np.exp(scores.astype(np.longdouble))
    # the argument is rounded, and what is rounded there is an absolute error of the exponent
    assert np.abs(function(scores * dtype(factor)) / exact - 1).max() < 2 * bound * np.finfo(dtype).eps


def test_the_exponential_is_exp_where_there_is_no_vector_code(monkeypatch):
    for kinds in ({}, {"ff": {"current": "baseline(X86_V2)"}}, {"ff": {}}):
        monkeypatch.setattr(numpy_bounds, "opt_func_info", lambda kinds=kinds, **_: {"exp2": kinds})
        assert exponential.__wrapped__(np.dtype(np.float32)) == (np.exp, 1.0)
    monkeypatch.setattr(numpy_bounds, "opt_func_info", lambda **_: {"exp2": {"ff": {"current": "AVX512_SKX"}}})
    assert exponential.__wrapped__(np.dtype(np.float32)) == (np.exp2, 1 / np.log(2))

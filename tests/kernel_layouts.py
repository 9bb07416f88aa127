"""Layouts that device arrays may have, drawn by hypothesis: any order of axes in memory, gaps, any address of an element."""

import numpy as np
from hypothesis import strategies as st

from ringsim.dtypes import numpy_dtype

WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 16, 24, 32, 64, 72, 130])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def layouts(draw, axes=4, *, dense=True):
    """Arguments of `Canaries.array` but for the dtype; `offset` counts elements. Where `dense`, the last axis is."""
    order = (*draw(st.permutations(range(axes - dense))), *range(axes - dense, axes))
    return {"offset": draw(st.sampled_from([0, 0, 8, 1, 5])), "axes": order, "pad": draw(st.sampled_from([0, 8, 1]))}


def placed(canaries, values, layout):
    """The values in memory laid out so."""
    values = np.asarray(values)
    return canaries.holding(values, **{**layout, "offset": layout["offset"] * values.dtype.itemsize})


def room(canaries, shape, dtype, layout):
    """Poisoned memory laid out so."""
    dtype = numpy_dtype(dtype)
    return canaries.array(shape, dtype, **{**layout, "offset": layout["offset"] * dtype.itemsize})


def numbers(rng, shape, dtype, spread=1.0):
    """Normal numbers in a dtype."""
    return (rng.standard_normal(shape) * spread).astype(numpy_dtype(dtype))


def exact(array):
    """In float64."""
    with np.errstate(invalid="ignore"):  # a NaN that signals is still one
        return np.asarray(array).astype(np.float64)


def step(dtype):
    """The largest relative error of rounding to a dtype, and the largest error below its normal numbers."""
    return {
        "float64": (2.0**-53, 0.0),
        "float32": (2.0**-24, 2.0**-150),
        "float16": (2.0**-11, 2.0**-25),
        "bfloat16": (2.0**-8, 2.0**-134),
    }[dtype]

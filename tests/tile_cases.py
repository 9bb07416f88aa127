"""Tiles for our own fused kernels: operands in memory of their own, dense float64 answers, and what rounding may do to them."""

from typing import NamedTuple

import numpy as np
from emulator import Canaries, Emulator
from hypothesis import strategies as st

from ringsim.backends.cuda_attend import OwnTiles
from ringsim.backends.cuda_tiles import Backward, Band, Forward
from ringsim.dtypes import accumulator, numpy_dtype

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the relative distance between neighbours."""
SLACK = {"float64": 1e-12, "float32": 2e-6}
"""Of what is summed in float64 and float32, relative to the sum of magnitudes or 1."""
SMALLEST = 2.0**-25
"""Half of float16's least step: what is lost of a weight that is small."""
LAYOUTS = ((0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3))
BANDS = {
    "none": None,
    "causal": Band(0, 1, 1, 0, None),
    "shifted": Band(9, 1, 1, 0, None),
    "first rows see nothing": Band(-21, 1, 1, 0, None),
    "window": Band(3, 1, 1, -2, 30),
    "striped": Band(5, 4, 4, 0, 150),
    "unequal steps": Band(3, 2, 3, -5, 40),
    "unequal steps, ahead": Band(-60, 3, 1, None, 55),
    "whole blocks hidden": Band(140, 1, 1, 100, 130),
    "all hidden": Band(0, 1, 1, 500, None),
    "empty": Band(0, 1, 1, 3, -3),
}


class Call(NamedTuple):
    """A kernel's launch comes with the stream that it was queued on."""

    emulator: Emulator

    def launch(self, kernel, shape, arguments, stream):
        assert stream == "stream"
        self.emulator.launch(kernel, shape, arguments)


class Shape(NamedTuple):
    dtype: str
    rows: int
    keys: int
    widths: tuple[int, int]
    heads: int = 1
    kv_heads: int = 1
    batch: int = 1


class Tile(NamedTuple):
    """q, k, v, dout (batch, rows, heads, width) and what is made of them."""

    forward: Forward
    dout: np.ndarray
    canaries: Canaries


def tile_of(shape, *, seed=0, layout=LAYOUTS[0], offset=0):
    """Normal numbers in arrays whose axes lie in memory in the order `layout`, `offset` elements beyond an aligned address."""
    rng, canaries = np.random.default_rng(seed), Canaries()
    dtype, state = numpy_dtype(shape.dtype), np.dtype(accumulator(shape.dtype))
    head_dim, v_head_dim = shape.widths
    counts = {"q": (shape.rows, shape.heads, head_dim), "k": (shape.keys, shape.kv_heads, head_dim)}
    counts |= {"v": (shape.keys, shape.kv_heads, v_head_dim), "dout": (shape.rows, shape.heads, v_head_dim)}
    where = {"axes": layout, "offset": offset * dtype.itemsize}
    read = {
        name: canaries.holding(rng.standard_normal((shape.batch, *count)).astype(dtype), **where)
        for name, count in counts.items()
    }
    out = canaries.array((shape.batch, shape.rows, shape.heads, v_head_dim), state, axes=layout, offset=offset * state.itemsize)
    lse = canaries.array((shape.batch, shape.heads, shape.rows), state)
    return Tile(Forward(read["q"], read["k"], read["v"], out, lse), read["dout"], canaries)


def attend(tile, band, *, scale=None, plain=False, seed=0):
    """Run a tile forward; out and lse."""
    scale = tile.forward.q.shape[3] ** -0.5 if scale is None else scale
    OwnTiles(Call(Emulator(seed)), plain=plain).attend(tile.forward, band, scale, "stream")
    tile.canaries.check()
    return tile.forward.out, tile.forward.lse


def attend_backward(tile, band, statistics, *, plain=False, seed=0):
    """Run a tile backward, given lse and delta; dq, dk and dv."""
    canaries, state = tile.canaries, tile.forward.out.dtype
    made = [canaries.array(array.shape, state) for array in tile.forward[:3]]
    given = [canaries.holding(array.astype(state)) for array in statistics]
    operands = Backward(*tile.forward[:3], tile.dout, *given, *made)
    OwnTiles(Call(Emulator(seed)), plain=plain).attend_backward(operands, band, tile.forward.q.shape[3] ** -0.5, "stream")
    canaries.check()
    return made


def seen_by(band, rows, keys):
    """(rows, keys): whether a query sees a key."""
    if band is None:
        return np.ones((rows, keys), bool)
    distance = band.distance + band.q_step * np.arange(rows)[:, None] - band.k_step * np.arange(keys)
    low, high = (default if edge is None else edge for edge, default in zip(band[3:], (-np.inf, np.inf), strict=True))
    return (distance >= low) & (distance <= high)


def wide(arrays, batch, head, group):
    """One head of q, k, v (and dout, if given) in float64."""
    heads = (head, head // group, head // group, head)
    return [array[batch, :, at].astype(np.float64) for array, at in zip(arrays, heads, strict=False)]


class Dense(NamedTuple):
    """Exact results of a tile, and for each number the sum of magnitudes that were added up to it: all, and with weights as they
    are multiplied.
    """

    results: tuple[np.ndarray, ...]
    magnitudes: tuple[np.ndarray, ...]
    weighed: tuple[np.ndarray, ...]
    lost: float
    """As much as all weights that are rounded to 0 or near it could have added, in float16."""


def lost_by(values):
    """What weights that float16 has no step for could have made of these values."""
    sums = np.abs(np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)).sum(axis=1)
    return SMALLEST * float(np.max(sums, initial=0))


def weights_of(q, k, seen, scale):
    """Softmax, rows that see nothing 0, and lse."""
    with np.errstate(all="ignore"):
        scores = np.where(seen, q @ k.T * scale, -np.inf)
        top = np.max(scores, axis=1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
        total = weights.sum(axis=1, keepdims=True)
        return weights / np.where(total == 0, 1, total), (top + np.log(total))[:, 0]


def product(weights, values, seen):
    """``weights @ values`` without what is hidden, even where that is NaN."""
    with np.errstate(all="ignore"):
        return np.array([weight[see] @ values[see] for weight, see in zip(weights, seen, strict=True)]).reshape(
            -1, values.shape[1]
        )


def dense(tile, band, scale=None):
    """out and lse of a tile."""
    q, k, v, out, lse = tile.forward
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen, group = seen_by(band, q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    exact, magnitude, exact_lse = np.zeros(out.shape), np.zeros(out.shape), np.zeros(lse.shape)
    for batch, head in np.ndindex(q.shape[0], q.shape[2]):
        one_q, one_k, one_v = wide((q, k, v), batch, head, group)
        weights, exact_lse[batch, head] = weights_of(one_q, one_k, seen, scale)
        exact[batch, :, head] = product(weights, one_v, seen)
        magnitude[batch, :, head] = product(weights, np.abs(one_v), seen)
    magnitudes = magnitude, 1 + np.abs(exact_lse)
    return Dense((exact, exact_lse), magnitudes, (magnitude, np.zeros(lse.shape)), lost_by(v))


def statistics_of(tile, band):
    """lse and delta of whole rows, float64, as if this tile were all that they see."""
    out, lse = dense(tile, band).results
    return lse, np.einsum("brhd,brhd->bhr", tile.dout.astype(np.float64), out)


def dense_backward(tile, band, statistics):
    """dq, dk and dv of a tile, given lse and delta."""
    q, k, v = tile.forward[:3]
    lse, delta = (array.astype(tile.forward.out.dtype).astype(np.float64) for array in statistics)
    scale, seen, group = q.shape[3] ** -0.5, seen_by(band, q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    made = [[np.zeros(array.shape) for array in (q, k, v)] for _ in range(3)]
    for batch, head in np.ndindex(q.shape[0], q.shape[2]):
        heads = [wide((q, k, v, tile.dout), batch, head, group)]
        heads.append([np.abs(array) for array in heads[0]])
        see, row_delta = seen & ~np.isneginf(lse[batch, head])[:, None], delta[batch, head][:, None]
        with np.errstate(all="ignore"):
            weights = np.where(see, np.exp(heads[0][0] @ heads[0][1].T * scale - lse[batch, head][:, None]), 0)
            dscores = np.where(see, weights * (heads[0][3] @ heads[0][2].T - row_delta), 0) * scale
            # of a difference that is small, both sides are rounded
            sides = np.where(see, weights * (heads[1][3] @ heads[1][2].T + np.abs(row_delta)), 0) * scale
        for sums, rates, (one_q, one_k, _, one_dout) in zip(
            made, (dscores, sides, np.abs(dscores)), (heads[0], heads[1], heads[1]), strict=True
        ):
            sums[0][batch, :, head] += product(rates, one_k, see)
            sums[1][batch, :, head // group] += product(rates.T, one_q, see.T)
            sums[2][batch, :, head // group] += product(weights.T, one_dout, see.T)
    return Dense(*(tuple(each) for each in made), group * max(lost_by(array) for array in (q, k, tile.dout)))


def assert_right(made, exact, dtype, *, rounded):
    """Each number within what rounding allows; `rounded`: weights are rounded to `dtype` before they are multiplied."""
    slack = SLACK[accumulator(dtype)]
    for actual, expected, magnitude, weighed in zip(made, *exact[:3], strict=True):
        limit = slack * (1 + magnitude)
        if rounded and actual.ndim == 4:
            limit = limit + UNIT[dtype] * weighed + exact.lost
        assert actual.dtype == np.dtype(accumulator(dtype))
        odd = ~np.isfinite(expected)
        assert np.array_equal(actual[odd], expected[odd], equal_nan=True)
        error = np.abs(actual.astype(np.float64) - np.where(odd, 0, expected))[~odd]
        assert (error <= limit[~odd]).all(), f"{np.max(error / limit[~odd])} of the limit"


@st.composite
def bands(draw):
    """Any band near the tile: equal steps or not, cut on either side or not."""
    q_step = draw(st.integers(1, 4))
    k_step = draw(st.one_of(st.just(q_step), st.integers(1, 4)))
    bound = st.one_of(st.none(), st.integers(-200, 200))
    return Band(draw(st.integers(-200, 200)), q_step, k_step, draw(bound), draw(bound))


@st.composite
def shapes(draw, dtypes, widths):
    """Few rows and keys, or several blocks of them, and heads in groups."""
    kv_heads = draw(st.integers(1, 2))
    length = st.one_of(st.integers(1, 4), st.integers(1, 170))
    heads = kv_heads * draw(st.integers(1, 3))
    return Shape(draw(dtypes), draw(length), draw(length), draw(widths), heads, kv_heads, draw(st.integers(1, 2)))

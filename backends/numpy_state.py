"""The NumPy kernels that pass over arrays once: running state, and what the backward pass needs before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ringsim.backends.numpy_micro import Array, widen
from ringsim.backends.numpy_share import Poll
from ringsim.dtypes import numpy_dtype
from ringsim.lowering import ROWS_AT_ONCE
from ringsim.schedule.ops import Compute, Region

Fetch = Callable[[Region], Array]


def reset(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Write the state of rows that have seen no key: acc 0, max -inf, sum 0."""
    acc, row_max, row_sum = (fetch(region) for region in op.writes)
    acc.fill(0)
    row_max.fill(-np.inf)
    row_sum.fill(0)


def finish(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Write out = acc / sum and lse = max + log(sum); rows that saw no key give 0 and -inf."""
    acc, row_max, row_sum = (fetch(region) for region in op.reads)
    out, lse = (fetch(region) for region in op.writes)
    np.log(row_sum, out=lse)
    lse += row_max
    divisor = np.where(row_sum == 0, row_sum.dtype.type(1), row_sum)
    for batch in range(acc.shape[0]):
        for head in range(acc.shape[1]):
            np.divide(acc[batch, head], divisor[batch, head, :, None], out=out[batch, :, head, :], casting="same_kind")
            poll()


def pack(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Copy each region read into the one written in its place."""
    for source, target in zip(op.reads, op.writes, strict=True):
        np.copyto(fetch(target), fetch(source))
        poll()


def merge(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Add one partial state to another: exp and sum over the keys of both, on the larger of their references."""
    regions = [fetch(region) for region in op.reads]
    mine, other = regions[:3], regions[3:]
    for batch, head in np.ndindex(*mine[0].shape[:2]):
        _merge_rows(*(tuple(array[batch, head] for array in side) for side in (mine, other)))
        poll()


def _merge_rows(mine: tuple[Array, ...], other: tuple[Array, ...]) -> None:
    """Merge a partial state of some rows (acc, max, sum) into another, in place: the larger reference serves both.

    A side that saw no key has sum 0 and reference -inf; where neither saw one, the row stays so. FlashAttention-2, arXiv
    2307.08691, section 3.1, for two blocks.
    """
    (acc, row_max, row_sum), (acc2, row_max2, row_sum2) = mine, other
    reference = np.maximum(np.where(row_sum == 0, -np.inf, row_max), np.where(row_sum2 == 0, -np.inf, row_max2))
    np.copyto(reference, 0, where=reference == -np.inf)
    factor, factor2 = (np.where(s == 0, 0, np.exp(m - reference)) for m, s in ((row_max, row_sum), (row_max2, row_sum2)))
    row_sum *= factor
    row_sum += factor2 * row_sum2
    acc *= factor[:, None]
    acc += factor2[:, None] * acc2
    np.copyto(row_max, reference, where=row_sum != 0)


def delta(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Write delta (batch, heads, rows) = rowsum(dout * out) of arrays (batch, rows, heads, v_head_dim), in delta's dtype.

    Half precision is widened first, ROWS_AT_ONCE rows at a time. FlashAttention-2, arXiv 2307.08691, section 2.2.
    """
    out, dout = (fetch(region) for region in op.reads)
    target = fetch(op.writes[0])
    dtype = numpy_dtype(op.writes[0].dtype)
    wide = [np.empty((min(ROWS_AT_ONCE, out.shape[1]), *out.shape[2:]), dtype) for _ in range(2 * (out.dtype != dtype))]
    for batch in range(out.shape[0]):
        for rows in _some(out.shape[1]):
            pair = [out[batch, rows], dout[batch, rows]]
            pair = [widen(source, to[: len(source)]) for source, to in zip(pair, wide, strict=True)] if wide else pair
            np.einsum("rhd,rhd->hr", *pair, out=target[batch, :, rows])
            poll()


def clear(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Write 0."""
    for region in op.writes:
        fetch(region).fill(0)
        poll()


def accumulate(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Add the second half of what is read to the first, which is written. An addend with a box goes to that box of its sum."""
    count = len(op.writes)
    for mine, other in zip(op.reads[:count], op.reads[count:], strict=True):
        total, addend = fetch(mine), fetch(other)
        if other.box is not None and mine.box is None:
            total = total[tuple(slice(begin, end) for begin, end in other.box)]
        for rows in _some(len(total)):
            total[rows] += addend[rows]
            poll()


def cast(op: Compute, fetch: Fetch, poll: Poll) -> None:
    """Copy sums (rows, batch, heads, width) into arrays (batch, rows, heads, width) of another dtype."""
    for source, target in zip(op.reads, op.writes, strict=True):
        total, result = fetch(source).transpose(1, 0, 2, 3), fetch(target)
        for rows in _some(total.shape[1]):
            np.copyto(result[:, rows], total[:, rows], casting="same_kind")
            poll()


def _some(rows: int) -> Iterator[slice]:
    """All rows, ROWS_AT_ONCE at a time."""
    return (slice(begin, min(begin + ROWS_AT_ONCE, rows)) for begin in range(0, rows, ROWS_AT_ONCE))

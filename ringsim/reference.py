"""Dense attention and its gradients in float64: the answer that every schedule and backend must agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .tile import IntArray
from .workload import Workload

Array = npt.NDArray[Any]


ROWS_AT_ONCE, PAIRS_AT_ONCE = 1024, 2**24
"""Of queries, and of their scores: 128 MiB in float64, and as much again for each of a few temporaries."""


def dense_attention(workload: Workload, q: Array, k: Array, v: Array, *, dtype: str = "float64") -> tuple[Array, Array]:
    """Exact attention of global arrays (shapes as in Workload), head by head, computed in `dtype`.

    Returns out (batch, q_len, heads, v_head_dim) and lse (batch, heads, q_len). Rows that see no key give 0 and -inf.
    """
    return dense_rows(workload, np.arange(workload.q_len), q, k, v, dtype=dtype)


def dense_rows(
    workload: Workload, rows: IntArray, q: Array, k: Array, v: Array, *, dtype: str = "float64"
) -> tuple[Array, Array]:
    """As `dense_attention`, for the queries `rows` alone: q is (batch, len(rows), heads, head_dim), k and v are global."""
    group = workload.heads // workload.kv_heads
    out = np.zeros((workload.batch, len(rows), workload.heads, workload.v_head_dim), dtype)
    lse = np.full((workload.batch, workload.heads, len(rows)), -np.inf, dtype)
    for (first, end), queries, keys in workload.sequences():
        at_once = max(1, min(ROWS_AT_ONCE, PAIRS_AT_ONCE // max(keys, 1)))
        for begin in range(0, len(rows), at_once):
            some = np.arange(begin, min(begin + at_once, len(rows)))
            some = some[rows[some] < queries]
            seen = workload.mask.visible(workload.q_offset + rows[some], workload.kv_offset + np.arange(keys))
            for batch in range(first, end):
                for head in range(workload.heads):
                    rows_q = np.asarray(q[batch, some, head], dtype)
                    rows_k, rows_v = (np.asarray(x[batch, :keys, head // group], dtype) for x in (k, v))
                    result = _one_head(rows_q, rows_k, rows_v, seen, workload.softmax_scale)
                    out[batch, some, head], lse[batch, head, some] = result
    return out, lse


def _one_head(q: Array, k: Array, v: Array, seen: npt.NDArray[np.bool_], scale: float) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        scores = np.where(seen, (q @ k.T) * q.dtype.type(scale), -np.inf)
        row_max = np.max(scores, axis=1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isneginf(row_max), 0, row_max))
        row_sum = weights.sum(axis=1, keepdims=True)
        weights /= np.where(row_sum == 0, 1, row_sum)
        if np.isfinite(v).all():
            out = weights @ v
        else:
            out = np.zeros((len(q), v.shape[1]), q.dtype)
            for row, (weight, see) in enumerate(zip(weights, seen, strict=True)):
                out[row] = weight[see] @ v[see]
        lse = (row_max + np.log(row_sum))[:, 0]
    return out, lse


def dense_backward(
    workload: Workload, dout: Array, q: Array, k: Array, v: Array, *, dtype: str = "float64"
) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(dout * out)`` with respect to global q, k and v (shapes as in Workload), computed in `dtype`.

    dout is (batch, q_len, heads, v_head_dim). Returns dq, dk and dv, of the shapes of q, k and v. A query that sees no key
    gets 0 and adds nothing to dk and dv. FlashAttention-2, arXiv 2307.08691, section 2.2.
    """
    group = workload.heads // workload.kv_heads
    dq, dk, dv = (np.zeros(array.shape, dtype) for array in (q, k, v))
    for (first, end), queries, keys in workload.sequences():
        at_once = max(1, min(ROWS_AT_ONCE, PAIRS_AT_ONCE // max(keys, 1)))
        for begin in range(0, queries, at_once):
            rows = np.arange(begin, min(begin + at_once, queries))
            seen = workload.mask.visible(workload.q_offset + rows, workload.kv_offset + np.arange(keys))
            for batch in range(first, end):
                for head in range(workload.heads):
                    rows_dout, rows_q = (np.asarray(x[batch, rows, head], dtype) for x in (dout, q))
                    rows_k, rows_v = (np.asarray(x[batch, :keys, head // group], dtype) for x in (k, v))
                    parts = _one_head_backward(rows_dout, rows_q, rows_k, rows_v, seen=seen, scale=workload.softmax_scale)
                    dq[batch, rows, head] = parts[0]
                    dk[batch, :keys, head // group] += parts[1]
                    dv[batch, :keys, head // group] += parts[2]
    return dq, dk, dv


def _one_head_backward(
    dout: Array, q: Array, k: Array, v: Array, *, seen: npt.NDArray[np.bool_], scale: float
) -> tuple[Array, Array, Array]:
    with np.errstate(all="ignore"):
        out, lse = _one_head(q, k, v, seen, scale)
        factor = q.dtype.type(scale)
        weights = np.where(seen, np.exp((q @ k.T) * factor - lse[:, None]), 0)
        dscores = np.where(seen, dout @ v.T - (dout * out).sum(axis=1, keepdims=True), 0) * weights * factor
        if all(np.isfinite(array).all() for array in (dout, q, k, v)):
            return dscores @ k, dscores.T @ q, weights.T @ dout
        dq, dk, dv = (np.zeros_like(array) for array in (q, k, v))
        for row, see in enumerate(seen):
            dq[row] = dscores[row, see] @ k[see]
            dk[see] += np.outer(dscores[row, see], q[row])
            dv[see] += np.outer(weights[row, see], dout[row])
    return dq, dk, dv

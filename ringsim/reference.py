"""Dense attention in float64: the answer that every schedule and backend must agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .workload import Workload

Array = npt.NDArray[Any]


def dense_attention(workload: Workload, q: Array, k: Array, v: Array, *, dtype: str = "float64") -> tuple[Array, Array]:
    """Exact attention of global arrays (shapes as in Workload), head by head, computed in `dtype`.

    Returns out (batch, q_len, heads, v_head_dim) and lse (batch, heads, q_len). Rows that see no key give 0 and -inf.
    """
    group = workload.heads // workload.kv_heads
    out = np.zeros((workload.batch, workload.q_len, workload.heads, workload.v_head_dim), dtype)
    lse = np.full((workload.batch, workload.heads, workload.q_len), -np.inf, dtype)
    q_positions = workload.q_offset + np.arange(workload.q_len)
    k_positions = workload.kv_offset + np.arange(workload.kv_len)
    for (first, end), queries, keys in workload.sequences():
        seen = workload.mask.visible(q_positions[:queries], k_positions[:keys])
        for batch in range(first, end):
            for head in range(workload.heads):
                operands = (q[batch, :queries, head], k[batch, :keys, head // group], v[batch, :keys, head // group])
                result = _one_head(*(np.asarray(x, dtype) for x in operands), seen, workload.softmax_scale)
                out[batch, :queries, head], lse[batch, head, :queries] = result
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
            out = np.stack([row[see] @ v[see] for row, see in zip(weights, seen, strict=True)])
        lse = (row_max + np.log(row_sum))[:, 0]
    return out, lse

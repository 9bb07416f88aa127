"""Attention in float64 with any array module (numpy, cupy): what the kernels and rings of a card must agree with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ringsim.backends.cuda_tiles import Band
from ringsim.workload import Workload

Array = Any


class Gradients(NamedTuple):
    """Shaped as q, k and v."""

    dq: Array
    dk: Array
    dv: Array


def seen_pairs(band: Band | None, rows: int, keys: int) -> np.ndarray:
    """(rows, keys): who sees whom under a band."""
    if band is None:
        return np.ones((rows, keys), bool)
    apart = band.distance + band.q_step * np.arange(rows)[:, None] - band.k_step * np.arange(keys)[None, :]
    low, high = (-np.inf if band.lo is None else band.lo), (np.inf if band.hi is None else band.hi)
    return np.asarray((apart >= low) & (apart <= high))


def seen_of(workload: Workload) -> np.ndarray:
    """(q_len, kv_len): who sees whom in a workload without lengths."""
    positions = workload.q_offset + np.arange(workload.q_len), workload.kv_offset + np.arange(workload.kv_len)
    return np.asarray(workload.mask.visible(*positions))


def attend(  # noqa: PLR0917 - the operands of one formula
    xp: Any, q: Array, k: Array, v: Array, seen: Any, scale: float
) -> tuple[Array, Array]:
    """Makes out (batch, rows, heads, v_head_dim) and lse (batch, heads, rows) of float64 arrays; `seen` (rows, keys)."""
    group = q.shape[2] // k.shape[2]
    seen = xp.asarray(seen)
    out = xp.zeros((*q.shape[:3], v.shape[3]))
    lse = xp.zeros((q.shape[0], q.shape[2], q.shape[1]))
    for batch, head in np.ndindex(q.shape[0], q.shape[2]):
        weights, lse[batch, head] = _weights(xp, q[batch, :, head], k[batch, :, head // group], seen, scale)
        out[batch, :, head] = weights @ v[batch, :, head // group]
    return out, lse


def _weights(xp: Any, q: Array, k: Array, seen: Array, scale: float) -> tuple[Array, Array]:
    """Softmax of one head's scores, 0 in rows that see nothing, and log-sum-exp, -inf there."""
    scores = xp.where(seen, (q @ k.T) * scale, -xp.inf)
    top = scores.max(axis=1, keepdims=True)
    weights = xp.exp(scores - xp.where(xp.isneginf(top), 0.0, top))
    total = weights.sum(axis=1, keepdims=True)
    none = total == 0
    lse = xp.where(none, -xp.inf, top + xp.log(xp.where(none, 1.0, total)))
    return weights / xp.where(none, 1.0, total), lse[:, 0]


def backward(  # noqa: PLR0917 - the operands of one formula
    xp: Any, q: Array, k: Array, v: Array, dout: Array, lse: Array, delta: Array, seen: Any, scale: float
) -> Gradients:
    """Gradients of a tile whose rows have this lse and delta (batch, heads, rows), maybe of more keys than the tile's."""
    group = q.shape[2] // k.shape[2]
    seen = xp.asarray(seen)
    made = Gradients(*(xp.zeros(one.shape) for one in (q, k, v)))
    for batch, head in np.ndindex(q.shape[0], q.shape[2]):
        kv = head // group
        rows, keys, values, grads = q[batch, :, head], k[batch, :, kv], v[batch, :, kv], dout[batch, :, head]
        norm = lse[batch, head][:, None]
        none = xp.isneginf(norm)
        weights = xp.where(seen & ~none, xp.exp((rows @ keys.T) * scale - xp.where(none, 0.0, norm)), 0.0)
        slopes = weights * (grads @ values.T - delta[batch, head][:, None]) * scale
        made.dq[batch, :, head] = slopes @ keys
        made.dk[batch, :, kv] += slopes.T @ rows
        made.dv[batch, :, kv] += weights.T @ grads
    return made


def delta_of(xp: Any, out: Array, dout: Array) -> Array:
    """rowsum(dout * out), (batch, heads, rows)."""
    return xp.ascontiguousarray((out * dout).sum(axis=3).transpose(0, 2, 1))


def rows_of_blocks(  # noqa: PLR0917 - the operands of one formula
    xp: Any, q: Array, keys: list[Array], values: list[Array], seen: list[Any], scale: float
) -> Array:
    """Makes out (rows, v_head_dim) of one head's rows over blocks of keys, one after the other; `seen` (rows, keys) each."""
    top, total, acc = xp.full((q.shape[0], 1), -xp.inf), xp.zeros((q.shape[0], 1)), xp.zeros((q.shape[0], values[0].shape[1]))
    for block, rows, visible in zip(keys, values, seen, strict=True):
        scores = xp.where(visible, (q @ block.T) * scale, -xp.inf)
        higher = xp.maximum(top, scores.max(axis=1, keepdims=True))
        base = xp.where(xp.isneginf(higher), 0.0, higher)
        kept, weights = xp.exp(top - base), xp.exp(scores - base)
        total, acc = total * kept + weights.sum(axis=1, keepdims=True), acc * kept + weights @ rows
        top = higher
    return acc / xp.where(total == 0, 1.0, total)


def largest(xp: Any, difference: Array) -> float:
    """The largest absolute value; NaN if there is one."""
    return float(xp.max(xp.abs(difference))) if difference.size else 0.0


def apart(xp: Any, found: Array, wanted: Array) -> float:
    """The largest difference of values that may be -inf: where both are, there is none."""
    same = xp.isneginf(found) & xp.isneginf(wanted)
    return largest(xp, xp.where(same, 0.0, xp.where(same, 0.0, found) - xp.where(same, 0.0, wanted)))

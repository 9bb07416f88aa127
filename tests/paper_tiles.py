"""Fused tiles on paper: NumPy, done when the paper GPU comes to it; `dtype` is what it makes its partial outputs in."""

import numpy as np

from ringsim.dtypes import accumulator


def seen(band, queries, keys):
    """(queries, keys): who sees whom."""
    if band is None:
        return np.ones((queries, keys), bool)
    distance = band.distance + band.q_step * np.arange(queries)[:, None] - band.k_step * np.arange(keys)
    visible = np.ones((queries, keys), bool)
    if band.lo is not None:
        visible &= distance >= band.lo
    if band.hi is not None:
        visible &= distance <= band.hi
    return visible


def plain(array, dtype=np.float64):
    return array.view(np.ndarray).astype(dtype)


class PaperTiles:
    """Dense NumPy in float64, rounded to the partial dtype: `half` for the operands' own, as cuDNN has it."""

    name = "paper"
    nbytes = 0

    def __init__(self, gpu, *, half=False):
        self._gpu = gpu
        self._half = half

    def partial(self, dtype):
        return dtype if self._half else accumulator(dtype)

    def refuses(self, dtype, widths, band, *, backward):
        return None

    def unfit(self, arrays, band):
        return None

    def facts(self):
        return {}

    def attend(self, operands, band, scale, stream):
        self._gpu.log.append(("attend", stream.number))
        self._gpu.defer(lambda: self._attend(operands, band, scale), stream)

    def attend_backward(self, operands, band, scale, stream):
        self._gpu.log.append(("attend_backward", stream.number))
        self._gpu.defer(lambda: self._attend_backward(operands, band, scale), stream)

    def _weights(self, q, k, band, scale):
        """Scores (batch, heads, rows, keys), -inf where a key is not seen."""
        group = q.shape[2] // k.shape[2]
        scores = scale * np.einsum("bqhd,bkhd->bhqk", plain(q), np.repeat(plain(k), group, axis=2))
        return np.where(seen(band, q.shape[1], k.shape[1]), scores, -np.inf)

    def _attend(self, operands, band, scale):
        q, k, v, out, lse = operands
        with np.errstate(all="ignore"):
            scores = self._weights(q, k, band, scale)
            top = scores.max(axis=3, keepdims=True)
            weights = np.exp(scores - np.where(np.isneginf(top), 0, top))
            total = weights.sum(axis=3, keepdims=True)
            values = np.repeat(plain(v), q.shape[2] // k.shape[2], axis=2)
            found = np.einsum("bhqk,bkhd->bqhd", weights / np.where(total == 0, 1, total), values)
            lse.view(np.ndarray)[...] = (np.log(total) + top)[..., 0]
        out.view(np.ndarray)[...] = found.astype(out.dtype)

    def _attend_backward(self, operands, band, scale):
        q, k, v, dout, lse, delta, dq, dk, dv = operands
        group = q.shape[2] // k.shape[2]
        keys, values = (np.repeat(plain(one), group, axis=2) for one in (k, v))
        with np.errstate(all="ignore"):
            weights = np.exp(self._weights(q, k, band, scale) - plain(lse)[..., None])
        weights[np.isneginf(plain(lse))] = 0
        dweights = np.einsum("bqhd,bkhd->bhqk", plain(dout), values)
        dscores = weights * (dweights - plain(delta)[..., None])
        dq.view(np.ndarray)[...] = (scale * np.einsum("bhqk,bkhd->bqhd", dscores, keys)).astype(dq.dtype)
        for target, left, right in ((dk, scale * dscores, q), (dv, weights, dout)):
            each = np.einsum("bhqk,bqhd->bkhd", left, plain(right))
            shape = (*each.shape[:2], k.shape[2], group, each.shape[3])
            target.view(np.ndarray)[...] = each.reshape(shape).sum(axis=3).astype(target.dtype)

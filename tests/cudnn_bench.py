"""Tiles by a paper cuDNN on a paper GPU, against float64."""

import sys

import numpy as np

from ringsim.backends.cuda_tiles import Backward, Forward
from ringsim.backends.cudnn import CudnnTiles
from ringsim.dtypes import numpy_dtype

from .paper_cudnn import PaperCudnn
from .paper_gpu import PaperGpu

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half a step of the dtype at 1."""


def run_kernel(kernel, shape, arguments):
    """StateKernels' copy and stand_in; a row has one entry here, whose product with dout is as near to delta as can be."""
    if kernel.name == "copy":
        target, source = arguments[-2:]
        target[...] = source
        return
    assert kernel.name == "stand_in"
    dout, delta, target = arguments[-3:]
    wide = dout.astype(np.float64)
    at = np.abs(wide).argmax(axis=3)[..., None]
    found = np.zeros_like(wide)
    np.put_along_axis(found, at, delta.transpose(0, 2, 1)[..., None] / np.take_along_axis(wide, at, 3), 3)
    target[...] = found.astype(target.dtype)


class Bench:
    """CudnnTiles over a paper GPU and a paper cuDNN."""

    def __init__(
        self, monkeypatch, *, seed=0, capability=(9, 0), version=92800, most_scores_nbytes=1 << 30, run=run_kernel, **options
    ):
        self.gpu = PaperGpu(seed, run=run)
        self.cudnn = PaperCudnn(defer=self.gpu.defer, version=version, capability=capability, **options)
        monkeypatch.setitem(sys.modules, "cudnn", self.cudnn)
        self.tiles = CudnnTiles(self.gpu, capability=capability, most_scores_nbytes=most_scores_nbytes)
        self.stream = self.gpu.stream()
        self.rng = np.random.default_rng(seed)

    def made(self, shape, dtype, *, padding=8, spread=1.0):
        """Values in memory that is wider than they are, so that no stride but the last is dense."""
        values = (self.rng.normal(size=shape) * spread).astype(np.float32)
        wide = np.zeros((*shape[:-1], shape[-1] + padding), numpy_dtype(dtype))
        wide[..., : shape[-1]] = values
        return self.gpu.upload(wide)[..., : shape[-1]]

    def forward(self, q_shape, kv_shape, v_width, dtype):
        batch, rows, heads, _ = q_shape
        q, k = self.made(q_shape, dtype), self.made(kv_shape, dtype)
        v = self.made((*kv_shape[:3], v_width), dtype)
        return Forward(
            q, k, v, self.made((batch, rows, heads, v_width), dtype), self.made((batch, heads, rows), "float32", padding=3)
        )

    def backward(self, operands, lse, delta, *, offset=0):
        """`offset`: of the rows of lse and delta in those of the memory that they are part of."""
        dtype = operands.q.dtype.name
        wider = (*lse.shape[:2], lse.shape[2] + offset)
        per_row = [self.made(wider, "float32", padding=5)[..., offset:] for _ in range(2)]
        for array, values in zip(per_row, (lse, delta), strict=True):
            array.view(np.ndarray)[...] = values
        made = [self.made(one.shape, dtype) for one in operands[:3]]
        dout = self.made(operands.out.shape, dtype)
        return Backward(*operands[:3], dout, *per_row, *made)

    def values(self, array):
        return self.gpu.download(array).astype(np.float64)


def seen_pairs(band, rows, keys):
    if band is None:
        return np.ones((rows, keys), bool)
    apart = band.distance + band.q_step * np.arange(rows)[:, None] - band.k_step * np.arange(keys)[None, :]
    return (apart >= (-np.inf if band.lo is None else band.lo)) & (apart <= (np.inf if band.hi is None else band.hi))


def expected(q, k, v, seen, scale):
    """Of (batch, rows, heads, width) in float64: out, lse and the weights (batch, heads, rows, keys)."""
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k) * scale, -np.inf)
    lse = np.logaddexp.reduce(scores, axis=3)
    weights = np.exp(scores - lse[..., None])
    return np.einsum("bhqk,bkhd->bqhd", weights, v), lse, weights


def check_forward(bench, operands, band, scale=0.3):
    bench.tiles.attend(operands, band, scale, bench.stream)
    q, k, v, out, lse = map(bench.values, operands)
    right, right_lse, _ = expected(q, k, v, seen_pairs(band, q.shape[1], k.shape[1]), scale)
    unit = UNIT[operands.q.dtype.name]
    assert np.abs(lse - right_lse).max() < 1e-5
    assert np.abs(out - right).max() < 3 * unit * np.abs(v).max()


def check_backward(bench, forward, band, scale=0.3, offset=0):
    q, k, v = (bench.values(one) for one in forward[:3])
    seen = seen_pairs(band, q.shape[1], k.shape[1])
    _, lse, weights = expected(q, k, v, seen, scale)
    # of a ring: lse of more keys than this tile's, and a delta that is not this tile's
    lse, delta = lse + 0.5, bench.rng.normal(size=lse.shape)
    operands = bench.backward(forward, lse, delta, offset=offset)
    bench.tiles.attend_backward(operands, band, scale, bench.stream)
    dout = bench.values(operands.dout)
    weights = weights * np.exp(-0.5)
    group = q.shape[2] // k.shape[2]
    slopes = weights * (np.einsum("bqhd,bkhd->bhqk", dout, np.repeat(v, group, axis=2)) - delta[..., None]) * scale
    pooled = lambda array: array.reshape(*array.shape[:2], k.shape[2], group, -1).sum(axis=3)  # noqa: E731
    right = (
        np.einsum("bhqk,bkhd->bqhd", slopes, np.repeat(k, group, axis=2)),
        pooled(np.einsum("bhqk,bqhd->bkhd", slopes, q)),
        pooled(np.einsum("bhqk,bqhd->bkhd", weights, dout)),
    )
    unit = UNIT[forward.q.dtype.name]
    for got, wanted in zip(operands[6:], right, strict=True):
        assert np.abs(bench.values(got) - wanted).max() < 6 * unit * max(1, np.abs(wanted).max())

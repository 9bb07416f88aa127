"""The NumPy backend's scratch: micro-tiles, heads widened, and the largest of what comes and goes within an op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Final

from .dtypes import ITEMSIZE, accumulator
from .lowering import ROWS_AT_ONCE, Blocking
from .schedule import Compute, Op
from .workload import Workload

SIZES: Final = {"bool": 1, "int32": 4}


def scratch_nbytes(program: Iterable[Op], workload: Workload, cut: Mapping[str, Blocking], threads: int) -> int:
    """What the backend holds besides the regions of a rank's program; `cut` are the lowerings of its attention kernels."""
    if not cut:
        return 0
    ops = [op for op in program if isinstance(op, Compute)]
    itemsize = ITEMSIZE[accumulator(workload.dtype)]
    held = sum(_held([op for op in ops if op.kernel == name], workload, cut[name], threads) for name in cut)
    return held + max((_passing(op, workload, itemsize) for op in ops), default=0)


def _held(ops: list[Compute], workload: Workload, blocking: Blocking, threads: int) -> int:
    """What one attention kernel keeps from its first tile on: micro-tiles, and keys and values in the dtype of computation."""
    keys = [tile.k.count for op in ops for tile in op.tiles]
    if not keys:
        return 0
    dtype = accumulator(workload.dtype)
    widths, longest = (workload.head_dim, workload.v_head_dim), max(keys)
    if ops[0].kernel == "attend_backward":
        # each thread has a copy of one head, with a column of ones beside keys and beside values
        head = longest * (sum(widths) + 2) * ITEMSIZE[dtype]
        return threads * (_fixed(blocking.backward_scratch(*widths), dtype) + head)
    # several threads widen each head anew: at most, each is at one of its own while the next is made
    heads = 0 if dtype == workload.dtype else 1 if threads == 1 else min(threads + 1, workload.batch * workload.kv_heads)
    return threads * _fixed(blocking.scratch(max(widths)), dtype) + heads * longest * sum(widths) * ITEMSIZE[dtype]


def _fixed(buffers: Mapping[str, tuple[int, str]], dtype: str) -> int:
    return sum(size * (SIZES[kind] if kind else ITEMSIZE[dtype]) for size, kind in buffers.values())


def _passing(op: Compute, workload: Workload, itemsize: int) -> int:
    """What comes and goes within an op."""
    if op.kernel == "finish":
        # the divisor and where it is 0; the copy of lse that the caller gets
        return prod(op.reads[-1].shape) * (itemsize + 1)
    if op.kernel == "merge":
        # per head: the new maximum, two factors, and one partial output scaled
        return op.reads[0].shape[2] * (op.reads[0].shape[3] + 5) * itemsize
    if op.kernel == "delta" and workload.dtype != accumulator(workload.dtype):
        # some rows of out and dout, widened
        batch, rows, heads, width = op.reads[0].sizes
        return 2 * min(rows, ROWS_AT_ONCE) * heads * width * itemsize if batch else 0
    # forward the norms of some rows of all heads; the edges of rows under a band
    norms = ROWS_AT_ONCE * itemsize if op.kernel == "attend" else 0
    edges = (48 * tile.q.count if tile.masked else 0 for tile in op.tiles)
    return max(
        (max((tile.heads[1] - tile.heads[0]) * norms, edge) for tile, edge in zip(op.tiles, edges, strict=True)), default=0
    )

"""Unit-normal inputs that every rank can make for its own tokens: the same numbers however the sequence is split."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .dtypes import numpy_dtype
from .tile import IntArray
from .workload import Workload

CHUNK = 1024
NAMES = ("q", "k", "v", "dout")


def rows(workload: Workload, name: str, positions: IntArray, seed: int) -> npt.NDArray[Any]:
    """Tokens `positions` of global array `name` (q, k, v or dout): (batch, len(positions), heads, width), of its dtype."""
    heads = workload.kv_heads if name in "kv" else workload.heads
    width = workload.head_dim if name in "qk" else workload.v_head_dim
    result = np.empty((workload.batch, len(positions), heads, width), numpy_dtype(workload.dtype))
    for chunk in np.unique(positions // CHUNK):
        wanted = positions // CHUNK == chunk
        numbers = np.random.default_rng([seed, NAMES.index(name), int(chunk)]).standard_normal(
            (CHUNK, workload.batch, heads, width)
        )
        result[:, wanted] = numbers[positions[wanted] % CHUNK].swapaxes(0, 1)
    return result

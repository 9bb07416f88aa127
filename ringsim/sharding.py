"""The way from global arrays to shards and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import agreement
from .communicators import closing, transport_of
from .mask import Mask

Array = npt.NDArray[Any]


def shard(x: Any, *, comm: Any = None, partition: str = "contiguous", mask: Mask | str | None = None, axis: int = 1) -> Array:
    """The rows of global array `x` (the same on every rank) that this rank holds under `partition`, split along `axis`.

    ``balanced`` needs the `mask` of the attention to come. A view where the rows are evenly spaced (contiguous, striped), else
    a copy. No communication. Raises WorkloadError, ArrayError.
    """
    array = agreement.with_axis(x, axis)
    rank, world_size = _place(comm)
    spans = agreement.partition_of(partition, array.shape[axis], world_size, mask).spans(rank)
    index: list[Any] = [slice(None)] * array.ndim
    parts = []
    for span in spans:
        index[axis] = slice(span.start, span.last + 1, span.step)
        parts.append(array[tuple(index)])
    if not parts:
        index[axis] = slice(0, 0)
        parts.append(array[tuple(index)])
    rows: Array = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)
    return rows


def unshard(
    x: Any,
    *,
    comm: Any = None,
    partition: str = "contiguous",
    mask: Mask | str | None = None,
    axis: int = 1,
    timeout_s: float = 300.0,
) -> Array:
    """The global array whose shards the ranks hold, on every rank: the inverse of `shard`. Collective.

    Raises RankMismatch on every rank if the shards are not those of one array under `partition`.
    """
    if comm is None:
        array = agreement.with_axis(x, axis)
        agreement.partition_of(partition, array.shape[axis], 1, mask)
        return array
    transport = transport_of(comm, timeout_s)
    with closing(transport, comm):
        parts, split = agreement.common_parts(transport, x, partition, axis, mask)
    shape = list(parts[0].shape)
    shape[axis] = split.length
    result = np.empty(shape, parts[0].dtype)
    index: list[Any] = [slice(None)] * result.ndim
    for rank, part in enumerate(parts):
        index[axis] = split.positions(rank)
        result[tuple(index)] = part
    return result


def _place(comm: Any) -> tuple[int, int]:
    if comm is None:
        return 0, 1
    return (comm.rank, comm.world_size) if hasattr(comm, "world_size") else (comm.Get_rank(), comm.Get_size())

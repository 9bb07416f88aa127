"""Between global arrays and the ranks' own: shards of what a pass is given, and the whole of what it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import accumulator, numpy_dtype
from ..errors import ArrayError
from ..schedule import Schedule
from ..schedule.job import GIVEN, OF_KEYS, OF_ROWS, TAKEN
from ..tile import IntArray
from ..timeline import Timeline
from .rank import Rank

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Global `out` (batch, q_len, heads, v_head_dim) and `lse` (batch, heads, q_len), and the measured timeline.

    Of a backward pass also the gradients dq, dk and dv, shaped as q, k and v; they are None of a forward pass alone.
    """

    out: Array
    lse: Array
    timeline: Timeline
    dq: Array | None = None
    dk: Array | None = None
    dv: Array | None = None


def given_arrays(schedule: Schedule, arrays: dict[str, Array]) -> dict[str, Array]:
    """What the pass takes, in its order. Raises ArrayError if it is something else."""
    work = schedule.workload
    names = GIVEN[work.pass_]
    if set(arrays) != set(names):
        raise ArrayError(f"pass {work.pass_!r} takes {', '.join(names)}; given: {', '.join(arrays)}")
    queries, keys = (work.batch, work.q_len), (work.batch, work.kv_len)
    shapes = {
        "q": (*queries, work.heads, work.head_dim),
        "k": (*keys, work.kv_heads, work.head_dim),
        "v": (*keys, work.kv_heads, work.v_head_dim),
        "out": (*queries, work.heads, work.v_head_dim),
        "lse": (work.batch, work.heads, work.q_len),
        "dout": (*queries, work.heads, work.v_head_dim),
    }
    for name in names:
        dtype = accumulator(work.dtype) if name == "lse" else work.dtype
        if not isinstance(arrays[name], np.ndarray):
            raise ArrayError(f"{name} is {type(arrays[name]).__name__}; the schedule is for a NumPy array {dtype}{shapes[name]}")
        if arrays[name].shape != shapes[name] or arrays[name].dtype != numpy_dtype(dtype):
            found = f"{arrays[name].dtype.name}{arrays[name].shape}"
            raise ArrayError(f"{name} is {found}; the schedule is for {dtype}{shapes[name]}")
    return {name: arrays[name] for name in names}


def rows_of(schedule: Schedule, rank: int, name: str, array: Array) -> Array:
    """A rank's rows of the global array called `name`."""
    positions = _positions(schedule, rank, name)
    return array[:, :, positions] if name in OF_ROWS else array[:, positions]


def _positions(schedule: Schedule, rank: int, name: str) -> IntArray:
    job = schedule.job
    return (job.kv_partition if name in OF_KEYS else job.q_partition).positions(rank)


def assemble(schedule: Schedule, arrays: list[dict[str, Array]], lses: list[Array], timeline: Timeline) -> Result:
    """The global arrays of every rank's rows."""
    work, made = schedule.workload, {}
    for name in ("out", *TAKEN[work.pass_]):
        length = work.kv_len if name in OF_KEYS else work.q_len
        parts = [held[name] for held in arrays]
        whole = made[name] = np.empty((work.batch, length, *parts[0].shape[2:]), parts[0].dtype)
        for rank, part in enumerate(parts):
            whole[:, _positions(schedule, rank, name)] = part
    lse = np.empty((work.batch, work.heads, work.q_len), lses[0].dtype)
    for rank, part in enumerate(lses):
        lse[:, :, _positions(schedule, rank, "lse")] = part
    return Result(lse=lse, timeline=timeline, **made)


def room_of(rank: Rank) -> dict[str, Any]:
    """New arrays for what the pass makes on a rank, in its backend's memory."""
    return {name: rank.backend.new(rank.shapes()[name], rank.dtype(name)) for name in TAKEN[rank.schedule.workload.pass_]}


def shards_of(rank: Rank, given: dict[str, Array]) -> dict[str, Any]:
    """A rank's rows of global arrays, in its backend's memory, and room for what it makes."""
    mine = {name: rows_of(rank.schedule, rank.transport.rank, name, array) for name, array in given.items()}
    return {name: rank.backend.put(array) for name, array in mine.items()} | room_of(rank)

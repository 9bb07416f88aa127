"""All ranks of a schedule in this process: deterministic in one thread, or a thread a rank over a paced link."""

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
from ..timeline import Timeline, gather
from .rank import Rank
from .walker import Backend, drive_all

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


def execute(
    schedule: Schedule, q: Array, k: Array, v: Array, *, backend: Backend | None = None, link: Any = None, **others: Array
) -> Result:
    """Run every rank of `schedule` here on global arrays, over the loopback transport.

    Shapes as in Workload. For pass ``both`` give ``dout=`` as well, for ``backward`` ``out=``, ``lse=`` and ``dout=``. Without a
    `link` one thread drives all ranks in a fixed order; with a `ringsim.backends.loopback.PacedLink` each rank has a thread and
    a NumpyBackend of its own. Raises ArrayError, PeerTimeout.
    """
    from ringsim.backends.loopback import World, spawn
    from ringsim.backends.numpy import NumpyBackend

    given = _given(schedule, {"q": q, "k": k, "v": v} | others)
    if backend is not None and link is not None:
        raise ArrayError("a backend serves one thread: with a link, which gives each rank a thread, leave `backend` out")
    if link is None:
        world = World(schedule.world_size)
        shared = backend or NumpyBackend()
        ranks = [Rank(schedule, world.endpoint(rank), shared) for rank in range(schedule.world_size)]
        arrays = [_arrays(rank, given) for rank in ranks]
        walkers = [rank.walker(*held.values()) for rank, held in zip(ranks, arrays, strict=True)]
        drive_all(walkers)
        lses = [rank.finish(walker) for rank, walker in zip(ranks, walkers, strict=True)]
    else:

        def run(endpoint: Any) -> tuple[Rank, dict[str, Array], Array]:
            rank = Rank(schedule, endpoint, NumpyBackend())
            held = _arrays(rank, given)
            endpoint.barrier()
            return rank, held, rank.run(*held.values())

        ranks, arrays, lses = map(list, zip(*spawn(schedule.world_size, run, link=link), strict=True))
    timeline = gather([rank.timeline for rank in ranks if rank.timeline is not None])
    return _assemble(schedule, arrays, lses, timeline)


def _given(schedule: Schedule, arrays: dict[str, Array]) -> dict[str, Array]:
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


def _arrays(rank: Rank, given: dict[str, Array]) -> dict[str, Array]:
    """A rank's shards of what is given, and room for what it makes."""
    pass_, shapes = rank.schedule.workload.pass_, rank.shapes()
    held = {name: _rows(rank.schedule, rank.transport.rank, name, array) for name, array in given.items()}
    return held | {name: np.empty(shapes[name], rank.dtype(name)) for name in TAKEN[pass_]}


def _rows(schedule: Schedule, rank: int, name: str, array: Array) -> Array:
    positions = _positions(schedule, rank, name)
    return array[:, :, positions] if name in OF_ROWS else array[:, positions]


def _positions(schedule: Schedule, rank: int, name: str) -> IntArray:
    job = schedule.job
    return (job.kv_partition if name in OF_KEYS else job.q_partition).positions(rank)


def _assemble(schedule: Schedule, arrays: list[dict[str, Array]], lses: list[Array], timeline: Timeline) -> Result:
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

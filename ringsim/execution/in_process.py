"""All ranks of a schedule in this process: deterministic in one thread, or a thread a rank over a paced link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import numpy_dtype
from ..errors import ArrayError
from ..schedule import Schedule
from ..timeline import Timeline, gather
from .rank import Rank
from .walker import Backend, drive_all

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Global `out` (batch, q_len, heads, v_head_dim) and `lse` (batch, heads, q_len), and the measured timeline."""

    out: Array
    lse: Array
    timeline: Timeline


def execute(schedule: Schedule, q: Array, k: Array, v: Array, *, backend: Backend | None = None, link: Any = None) -> Result:
    """Run every rank of `schedule` here on global arrays, over the loopback transport.

    Shapes as in Workload. Without a `link` one thread drives all ranks in a fixed order; with a
    `ringsim.backends.loopback.PacedLink` each rank has a thread and a NumpyBackend of its own. Raises ArrayError, PeerTimeout.
    """
    from ringsim.backends.loopback import World, spawn
    from ringsim.backends.numpy import NumpyBackend

    _check(schedule, q=q, k=k, v=v)
    if backend is not None and link is not None:
        raise ArrayError("a backend serves one thread: with a link, which gives each rank a thread, leave `backend` out")
    shards = [_shards(schedule, rank, q, k, v) for rank in range(schedule.world_size)]
    outs = [np.empty((*shard[0].shape[:3], v.shape[3]), q.dtype) for shard in shards]
    if link is None:
        world = World(schedule.world_size)
        shared = backend or NumpyBackend()
        ranks = [Rank(schedule, world.endpoint(rank), shared) for rank in range(schedule.world_size)]
        walkers = [rank.walker(*shard, out) for rank, shard, out in zip(ranks, shards, outs, strict=True)]
        drive_all(walkers)
        lses = [rank.finish(walker) for rank, walker in zip(ranks, walkers, strict=True)]
    else:

        def run(endpoint: Any) -> tuple[Rank, Array]:
            rank = Rank(schedule, endpoint, NumpyBackend())
            endpoint.barrier()
            own_q, own_k, own_v = shards[endpoint.rank]
            return rank, rank.run(own_q, own_k, own_v, outs[endpoint.rank])

        ranks, lses = map(list, zip(*spawn(schedule.world_size, run, link=link), strict=True))
    timeline = gather([rank.timeline for rank in ranks if rank.timeline is not None])
    return _assemble(schedule, outs, lses, timeline)


def _check(schedule: Schedule, **arrays: Array) -> None:
    work = schedule.workload
    shapes = {
        "q": (work.batch, work.q_len, work.heads, work.head_dim),
        "k": (work.batch, work.kv_len, work.kv_heads, work.head_dim),
        "v": (work.batch, work.kv_len, work.kv_heads, work.v_head_dim),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape or arrays[name].dtype != numpy_dtype(work.dtype):
            found = f"{arrays[name].dtype.name}{arrays[name].shape}"
            raise ArrayError(f"{name} is {found}; the schedule is for {work.dtype}{shape}")


def _shards(schedule: Schedule, rank: int, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    queries, keys = schedule.job.q_partition.positions(rank), schedule.job.kv_partition.positions(rank)
    return q[:, queries], k[:, keys], v[:, keys]


def _assemble(schedule: Schedule, outs: list[Array], lses: list[Array], timeline: Timeline) -> Result:
    work = schedule.workload
    out = np.empty((work.batch, work.q_len, work.heads, work.v_head_dim), numpy_dtype(work.dtype))
    lse = np.empty((work.batch, work.heads, work.q_len), lses[0].dtype)
    for rank in range(schedule.world_size):
        positions = schedule.job.q_partition.positions(rank)
        out[:, positions] = outs[rank]
        lse[:, :, positions] = lses[rank]
    return Result(out=out, lse=lse, timeline=timeline)

"""The K/V ring: queries stay, keys and values travel (Ring Attention, arXiv 2310.01889, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator

from ..dtypes import accumulator
from ..errors import WorkloadError
from .emitter import Emitter
from .job import Job
from .ops import Op, Region

TAGS = (("k", 0), ("v", 1))


def ring(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Rank r starts with block r and at step s holds block r - s; a block stops where nothing further round needs it.

    Bytes sent per rank under a full mask: (P-1)/P of all K and V bytes, ``(P-1) * c * kv_heads * (head_dim +
    v_head_dim) * itemsize`` for c tokens per rank (arXiv 2310.01889, section 3). Receives go to two slots in turn; k goes on
    while v is still on its way.
    """
    _check(job)
    world_size = job.world_size
    ahead, behind = (rank + 1) % world_size, (rank - 1) % world_size
    q, attends = _home(job, "q", rank), 0
    yield from emit.compute("reset", reads=(), writes=_state(job, rank, 0), phase="setup")
    for step in range(world_size):
        emit.step = step
        held, coming = (rank - step) % world_size, (rank - step - 1) % world_size
        for name, tag in TAGS:
            if job.reach(coming) > step:
                yield from emit.recv(_block(job, name, coming, step + 1), peer=behind, tag=tag)
            if job.reach(held) > step:
                yield from emit.send(_block(job, name, held, step), peer=ahead, tag=tag)
        if tiles := job.tiles(rank, held):
            reads = (q, _block(job, "k", held, step), _block(job, "v", held, step), *_state(job, rank, attends))
            attends += 1
            writes = _state(job, rank, attends)
            yield from emit.compute("attend", reads=reads, writes=writes, phase="attend", tiles=tiles, flops=job.flops(tiles))
        if job.sync == "step" and step + 1 < world_size:
            yield from emit.barrier()
    outputs = (_home(job, "out", rank), _lse(job, rank))
    yield from emit.compute("finish", reads=_state(job, rank, attends), writes=outputs, phase="finish")


def _check(job: Job) -> None:
    if job.workload.pass_ != "forward":
        raise WorkloadError(f"strategy 'ring' has no schedule for pass {job.workload.pass_!r}; use pass 'forward'")
    if job.workload.wire_dtype != job.workload.dtype:
        raise WorkloadError(
            f"strategy 'ring' sends blocks as they are: wire_dtype {job.workload.wire_dtype} must be {job.workload.dtype}"
        )


def _home(job: Job, name: str, rank: int) -> Region:
    work = job.workload
    width = work.head_dim if name == "q" else work.v_head_dim
    shape = (work.batch, job.q_partition.count(rank), work.heads, width)
    return Region(buffer=name, slot=0, shape=shape, dtype=work.dtype, value=f"{name}[{rank}]")


def _block(job: Job, name: str, kv_rank: int, step: int) -> Region:
    """K or V of `kv_rank` as held at `step`: at home in slot 0, on the road in slots 1 and 2 by turns."""
    work = job.workload
    shape = (work.batch, job.kv_partition.count(kv_rank), work.kv_heads, work.head_dim if name == "k" else work.v_head_dim)
    slot = 0 if step == 0 else 1 + (step - 1) % 2
    return Region(buffer=name, slot=slot, shape=shape, dtype=work.wire_dtype, value=f"{name}[{kv_rank}]")


def _state(job: Job, rank: int, version: int) -> tuple[Region, ...]:
    """The running partial output, maximum and sum of the rank's queries after `version` blocks."""
    work = job.workload
    rows = (work.batch, work.heads, job.q_partition.count(rank))
    dtype = accumulator(work.dtype)
    return tuple(
        Region(buffer=name, slot=0, shape=shape, dtype=dtype, value=f"{name}[{rank}]", version=version)
        for name, shape in (("acc", (*rows, work.v_head_dim)), ("max", rows), ("sum", rows))
    )


def _lse(job: Job, rank: int) -> Region:
    work = job.workload
    shape = (work.batch, work.heads, job.q_partition.count(rank))
    return Region(buffer="lse", slot=0, shape=shape, dtype=accumulator(work.dtype), value=f"lse[{rank}]")

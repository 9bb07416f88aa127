"""Each rank gets, straight from their home, the keys that its queries see and no others."""

from __future__ import annotations

from collections.abc import Iterator

from ..emitter import Emitter
from ..gradients import KV_SIDE, KV_SUMS, Q_SIDE, Q_SUMS, Sum, at_home, attend_backward, make_delta
from ..job import Block, Job
from ..ops import Op, Region
from ..registry import strategy, where_all_is_seen

HOME_TAG = len(KV_SIDE)


def halo_back(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """K and V as in the forward pass; the float32 sums of dK and dV of the rows that were sent go straight back.

    Bytes sent per rank, besides those of K and V: ``kv_heads * (head_dim + v_head_dim) * 4`` a row received (8 for
    float64).
    """
    queries, own = Sum(job, Q_SUMS, job.q_block(rank), slot=0), Sum(job, KV_SUMS, job.kv_block(rank), slot=0, at=str(rank))
    returned: Sum | None = None
    for step in range(job.world_size):
        emit.step = step
        yield from _exchange(job, rank, emit, step + 1)
        if step == 0:
            yield from make_delta(job, job.q_block(rank), emit)
            yield from queries.clear(emit, "setup")
        source = (rank - step) % job.world_size
        keys = _seen(job, rank, source) if step else job.kv_block(rank)
        sums = Sum(job, KV_SUMS, keys, slot=1 + step % 2, at=str(rank)) if step else own
        if keys.tokens or not step:
            yield from sums.clear(emit)
        kv = tuple(_here(job, name, keys, step) for name in KV_SIDE)
        home = at_home(job, Q_SIDE, queries.block)
        yield from attend_backward(job, emit, queries=(queries, home), keys=(sums, kv))
        if returned is not None:
            yield from own.add(emit, returned)
        returned = None
        if step:
            yield from sums.send(emit, peer=source, tag=HOME_TAG, phase="home")
            target = (rank + step) % job.world_size
            rows = _seen(job, target, rank)
            if rows.tokens:
                place = job.kv_block(rank)
                returned = Sum(job, KV_SUMS, rows, slot=3 + step % 2, at=str(target), version=1, within=place)
                yield from returned.recv(emit, peer=target, tag=HOME_TAG, phase="home")
        if job.sync == "step" and step + 1 < job.world_size:
            yield from emit.barrier(range(job.world_size))
    if returned is not None:
        yield from own.add(emit, returned)
    yield from own.cast(emit)
    yield from queries.cast(emit)


@strategy("halo", version=1, turn=where_all_is_seen, backward=halo_back)
def halo(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """K and V go straight from home, and only the rows between the first and the last that a rank's queries see.

    The halo exchange of stencil codes, for masks that look a little way beyond a rank's own tokens: under ``window(w, 0)`` with a
    contiguous partition of c >= w tokens a rank, each sends ``w * kv_heads * (head_dim + v_head_dim) * itemsize`` bytes where a
    ring sends c rows. Under a full mask every block goes to every other rank: as many bytes as `ring`, nothing forwarded.
    """
    queries, version = job.q_block(rank), 0
    yield from emit.compute("reset", reads=(), writes=job.state(queries, version), phase="setup")
    for step in range(job.world_size):
        emit.step = step
        yield from _exchange(job, rank, emit, step + 1)
        source = (rank - step) % job.world_size
        keys = _seen(job, rank, source) if step else job.kv_block(rank)
        if tiles := job.tiles(queries, keys):
            reads = (job.home("q", queries), *(_here(job, name, keys, step) for name in KV_SIDE), *job.state(queries, version))
            version += 1
            writes, flops = job.state(queries, version), job.flops(tiles)
            yield from emit.compute("attend", reads=reads, writes=writes, phase="attend", tiles=tiles, flops=flops)
        if job.sync == "step" and step + 1 < job.world_size:
            yield from emit.barrier(range(job.world_size))
    outputs = (job.home("out", queries), job.home("lse", queries))
    yield from emit.compute("finish", reads=job.state(queries, version), writes=outputs, phase="finish")


def _exchange(job: Job, rank: int, emit: Emitter, step: int) -> Iterator[Op]:
    """Post what the next step needs, so that it travels while this one computes."""
    if step == job.world_size:
        return
    source, target = (rank - step) % job.world_size, (rank + step) % job.world_size
    coming, going = _seen(job, rank, source), _seen(job, target, rank)
    for tag, name in enumerate(KV_SIDE):
        yield from emit.recv(_here(job, name, coming, step), peer=source, tag=tag)
        leaving = job.home(name, going)
        if not leaving.dense:
            packed = job.copy(name, going, 3 + step % 2)
            yield from emit.compute("pack", reads=(leaving,), writes=(packed,), phase="setup")
            leaving = packed
        yield from emit.send(leaving, peer=target, tag=tag)


def _seen(job: Job, rank: int, home: int) -> Block:
    """The rows of the keys of one rank from the first to the last that a query of another sees; none if it sees none."""
    keys = job.kv_block(home)
    spans = [tile.k for tile in job.tiles(job.q_block(rank), keys)]
    first = min((span.row for span in spans), default=0)
    return keys._replace(rows=(first, max((span.row + span.count for span in spans), default=first)))


def _here(job: Job, name: str, block: Block, step: int) -> Region:
    """The rank's own block at home; rows of others in slots 1 and 2 in turn."""
    return job.copy(name, block, 1 + step % 2) if step else job.home(name, block)

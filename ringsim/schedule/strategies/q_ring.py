"""Queries travel with their running state while keys and values stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ...workload import Workload
from ..backward import rotate_back
from ..emitter import Emitter
from ..job import Block, Job
from ..loops import Lane, components
from ..ops import Op, Region
from ..registry import any_rank, strategy, where_all_is_seen

HALVES = (0, 1)
Q_TAG, STATE_TAG, HOME_TAG = 0, 2, 4


def _turn(workload: Workload) -> int | None:
    return any_rank(workload) if workload.kv_heads % 2 == 0 else where_all_is_seen(workload)


def q_ring_back(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """The halves go round with dout, lse and delta, their dQ one hop behind: bytes as of `rotate_queries_back`."""
    yield from rotate_back(job, rank, emit, _halves(job))


@strategy("q-ring", version=1, turn=_turn, backward=q_ring_back)
def q_ring(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Q blocks go round with their running (out, max, sum), in two halves: one hops while the other is computed on.

    The dual of Ring Attention (arXiv 2310.01889): k and v stay, which moves fewer bytes where there are many more keys than
    queries. Half of the kv_heads with their queries each, so that both have as much to do under any mask; half of the rows where
    kv_heads is odd. A half stops where no rank further round has keys for it; from there its state goes straight home. Bytes
    sent per rank under a full mask: ``(P-1) * c * heads * head_dim * itemsize`` of queries and, the hop home included,
    ``P * c * heads * (v_head_dim + 2) * 4`` of state (8 for float64), for P > 1 ranks of c queries. Backward: `q_ring_back`.
    """
    halves = [_Half(job, rank, lane, index) for index, lane in enumerate(_halves(job))]
    for one in halves:
        yield from one.leave(emit)
    members = halves[0].lane.loop(rank)
    for step in range(len(members)):
        emit.step = step
        for one in halves:
            yield from one.visit(emit, step)
        if job.sync == "step" and step + 1 < len(members):
            yield from emit.barrier(members)
    for one in halves:
        yield from one.finish(emit)


def _halves(job: Job) -> tuple[Lane, ...]:
    def half(second: int, rank: int) -> Block:
        whole, kv_heads = job.q_block(rank), job.workload.kv_heads
        if kv_heads % 2 == 0:
            return whole._replace(heads=(kv_heads // 2 * second, kv_heads // 2 * (second + 1)))
        middle = (whole.tokens + 1) // 2
        return whole._replace(rows=(middle, whole.tokens) if second else (0, middle))

    def lanes() -> tuple[Lane, ...]:
        loops = components(job)
        return tuple(Lane(job, loops, partial(half, second), queries=True) for second in HALVES)

    return job.remember("q-ring", lanes)


@dataclass(frozen=True, slots=True)
class _Half:
    """One rank's end of the way of one half. State at home is in slot 0 or 1, on the road each half has two slots in turn."""

    job: Job
    rank: int
    lane: Lane
    index: int

    def _part(self, step: int) -> Block:
        return self.lane.part(self.lane.at(self.rank, -step))

    def _slot(self, step: int) -> int:
        return 2 + 2 * self.index + (step - 1) % 2 if step else self.index

    def _queries(self, step: int) -> Region:
        return self.job.copy("q", self._part(step), self._slot(step)) if step else self.job.home("q", self._part(0))

    def _leaving(self, step: int) -> Region:
        region = self._queries(step)
        return region if region.dense else self.job.copy("q", self._part(0), 2 + 2 * len(HALVES) + self.index)

    def _parcel(self, step: int, distance: int) -> Region:
        """The state of the part that is here at `step`, once it has been `distance` hops from home."""
        part = self._part(step)
        return self.job.parcel(part, self.lane.visits(part.rank, distance), slot=self._slot(step))

    def leave(self, emit: Emitter) -> Iterator[Op]:
        """Reset the state at home; pack queries that leave and are not dense."""
        states = self.job.state(self._part(0), 0, slot=self._slot(0), packed=True)
        yield from emit.compute("reset", reads=(), writes=states, phase="setup")
        source, target = self._queries(0), self._leaving(0)
        if source != target and self.lane.reach(self.rank):
            yield from emit.compute("pack", reads=(source,), writes=(target,), phase="setup")

    def visit(self, emit: Emitter, step: int) -> Iterator[Op]:
        """Fold this rank's keys into what is here, pass it on or send its state home, and post what comes next."""
        lane, ahead, behind = self.lane, self.lane.at(self.rank, 1), self.lane.at(self.rank, -1)
        here, coming = lane.at(self.rank, -step), lane.at(self.rank, -step - 1)
        if 0 < lane.reach(self.rank) == step:
            last = lane.at(self.rank, step)
            yield from emit.recv(self._parcel(0, step), peer=last, tag=HOME_TAG + self.index, phase="home")
        if lane.reach(here) >= step:
            yield from self._attend(emit, step)
        if lane.reach(coming) > step:
            yield from emit.recv(self._queries(step + 1), peer=behind, tag=Q_TAG + self.index)
            yield from emit.recv(self._parcel(step + 1, step), peer=behind, tag=STATE_TAG + self.index)
        if lane.reach(here) > step:
            yield from emit.send(self._leaving(step), peer=ahead, tag=Q_TAG + self.index)
            yield from emit.send(self._parcel(step, step), peer=ahead, tag=STATE_TAG + self.index)
        elif 0 < step == lane.reach(here):
            yield from emit.send(self._parcel(step, step), peer=here, tag=HOME_TAG + self.index, phase="home")

    def _attend(self, emit: Emitter, step: int) -> Iterator[Op]:
        job, part = self.job, self._part(step)
        keys = job.kv_block(self.rank)._replace(heads=part.heads)
        if tiles := job.tiles(part, keys):
            version = self.lane.visits(part.rank, step)
            before, after = (job.state(part, v, slot=self._slot(step), packed=True) for v in (version - 1, version))
            reads = (self._queries(step), job.home("k", keys), job.home("v", keys), *before)
            yield from emit.compute("attend", reads=reads, writes=after, phase="attend", tiles=tiles, flops=job.flops(tiles))

    def finish(self, emit: Emitter) -> Iterator[Op]:
        """Outputs from the state that came home."""
        job, part = self.job, self._part(0)
        version = self.lane.visits(self.rank, self.lane.reach(self.rank))
        states = job.state(part, version, slot=self._slot(0), packed=True)
        yield from emit.compute("finish", reads=states, writes=(job.home("out", part), job.home("lse", part)), phase="finish")

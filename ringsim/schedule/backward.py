"""The backward pass round a ring: keys and values rotate again, or queries do, and the sums of their gradients follow.

Each rank adds its part to a block's sums after those have come from the rank before: they travel one hop behind the block, so
that their hop hides behind a computation as well. The part of the rank at home stays there; the rest goes straight home from
the last rank that has one (the double buffering of ring-flash-attention and BurstAttention, arXiv 2403.09347, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .emitter import Emitter
from .gradients import KV_SIDE, KV_SUMS, Q_SIDE, Q_SUMS, Sum, at_home, attend_backward, make_delta
from .job import Block, Job
from .loops import Lane, components
from .ops import Op
from .rotation import Way

SLOTS = 4
"""Of a lane for sums that are not the rank's own: two that travel, in turn, one for its part of them, one from home."""
Before = Callable[[], Iterator[Op]]


def rotate_back(job: Job, rank: int, emit: Emitter, lanes: Sequence[Lane], before: Before | None = None) -> Iterator[Op]:
    """Yield a rank's backward pass, in which the lanes' K and V, or queries with dout, lse and delta, rotate.

    `before` yields the ops that make dout. The first hop of K and V is posted before these: it hides behind them. At each step
    a rank posts what comes and goes on, adds its part to the sums of what is here, and sends these after it.
    """
    staying = _Staying(job, rank, lanes)
    trails = [_Trail(job, rank, lane, index, len(lanes)) for index, lane in enumerate(lanes)]
    members = sorted(lanes[0].loop(rank))
    queries = lanes[0].queries
    if queries:
        yield from _start(job, [lane.part(rank) for lane in lanes], emit, before)
    for trail in trails:
        yield from trail.way.pack(emit)
    for step in range(len(members)):
        emit.step = step
        for trail in trails:
            yield from trail.way.hop(emit, step)
        if step == 0:
            if not queries:
                yield from _start(job, [one.block for one in staying.sums.values()], emit, before)
            yield from staying.clear(emit)
        for trail in trails:
            yield from trail.visit(emit, step, staying)
        if job.sync == "step" and step + 1 < len(members):
            yield from emit.barrier(members)
    for trail in trails:
        yield from trail.finish(emit)
    yield from staying.finish(emit)


def rotate_queries_back(job: Job, rank: int, emit: Emitter, before: Before | None = None) -> Iterator[Op]:
    """Whole blocks of Q, dout, lse and delta go round, their dQ one hop behind: K, V and their gradients stay.

    Bytes sent per rank under a full mask for c queries a rank: ``(P-1) * c * heads * ((head_dim + v_head_dim) * itemsize + 8)``
    of q, dout, lse and delta, and ``(P-1) * c * heads * head_dim * 4`` of dQ (for float64 16 in place of 8, and 8 of 4).
    BurstAttention, arXiv 2403.09347, algorithm 2: fewer than K, V and their gradients where heads = kv_heads.
    """
    lanes = job.remember("queries", lambda: (Lane(job, components(job), job.q_block, queries=True),))
    yield from rotate_back(job, rank, emit, lanes, before)


def _start(job: Job, parts: Sequence[Block], emit: Emitter, before: Before | None) -> Iterator[Op]:
    """Dout and delta, of each part of the queries that travels or stays as one."""
    if before is not None:
        yield from before()
    for part in parts:
        yield from make_delta(job, part, emit)


class _Staying:
    """The gradients of what stays on a rank: one sum for each slice of heads that some lane carries."""

    def __init__(self, job: Job, rank: int, lanes: Sequence[Lane]) -> None:
        queries = lanes[0].queries
        whole, names = (job.kv_block(rank), KV_SUMS) if queries else (job.q_block(rank), Q_SUMS)
        slices = dict.fromkeys(lane.part(rank).heads for lane in lanes)
        self.sums = {heads: Sum(job, names, whole._replace(heads=heads), slot=slot) for slot, heads in enumerate(slices)}

    def clear(self, emit: Emitter) -> Iterator[Op]:
        for one in self.sums.values():
            yield from one.clear(emit, "setup")

    def finish(self, emit: Emitter) -> Iterator[Op]:
        for one in self.sums.values():
            yield from one.cast(emit)


class _Trail:
    """One rank's end of a lane, with the sums of what travels there: those of its own block stay in a slot for themselves."""

    def __init__(self, job: Job, rank: int, lane: Lane, index: int, lanes: int) -> None:
        travels: tuple[str, ...] = Q_SIDE if lane.queries else KV_SIDE
        self._names: tuple[str, ...] = Q_SUMS if lane.queries else KV_SUMS
        self.way = Way(job, rank, lane, index, lanes, travels)
        self._job = job
        self._rank = rank
        self._lane = lane
        # one slot a lane for the rank's own sums, then each lane's others
        self._slot = lanes + SLOTS * index
        # after what travels on all lanes: each lane's sums on the road, then on their way home
        self._tag = len(travels) * lanes + 2 * len(self._names) * index
        self._own = Sum(job, self._names, lane.part(rank), slot=index, at=str(rank))
        self._arriving: Sum | None = None
        self._homeward: Sum | None = None

    def _added(self, block: int, distance: int) -> int:
        """How many ranks on the road, as many hops from home as `distance` or fewer, have added to the sums of a block."""
        return self._lane.visits(block, distance) - self._lane.visits(block, 0)

    def visit(self, emit: Emitter, step: int, staying: _Staying) -> Iterator[Op]:
        """Add this rank's part to the sums of what is here, send them on, and post the receive of those that come next."""
        lane = self._lane
        block = lane.at(self._rank, -step)
        if step == 0:
            yield from self._own.clear(emit)
            yield from self._attend(emit, 0, self._own, staying)
        elif lane.reach(block) >= step:
            yield from self._add(emit, step, staying)
        yield from self._expect(emit, step)

    def _add(self, emit: Emitter, step: int, staying: _Staying) -> Iterator[Op]:
        lane, block, sums = self._lane, self._lane.at(self._rank, -step), self._arriving
        if lane.needed(block, self._rank):
            part = lane.part(block)
            if sums is None:
                sums = Sum(self._job, self._names, part, slot=self._slot + step % 2)
                yield from sums.clear(emit)
                yield from self._attend(emit, step, sums, staying)
            else:
                mine = Sum(self._job, self._names, part, slot=self._slot + 2, at=str(self._rank))
                yield from mine.clear(emit)
                yield from self._attend(emit, step, mine, staying)
                yield from sums.add(emit, mine)
        if sums is not None and lane.reach(block) > step:
            yield from sums.send(emit, peer=lane.at(self._rank, 1), tag=self._tag)
        elif sums is not None:
            yield from sums.send(emit, peer=block, tag=self._tag + len(self._names), phase="home")

    def _attend(self, emit: Emitter, step: int, sums: Sum, staying: _Staying) -> Iterator[Op]:
        """The part of this rank, into these sums and into those that stay."""
        other, here = staying.sums[sums.block.heads], (sums, self.way.blocks(step))
        stays = other, at_home(self._job, KV_SIDE if self._lane.queries else Q_SIDE, other.block)
        queries, keys = (here, stays) if self._lane.queries else (stays, here)
        yield from attend_backward(self._job, emit, queries=queries, keys=keys)

    def _expect(self, emit: Emitter, step: int) -> Iterator[Op]:
        """Post the receives of the sums that come for the next step, and of the rank's own where they come home in this one."""
        lane, rank, self._arriving = self._lane, self._rank, None
        coming, last = lane.at(rank, -step - 1), lane.reach(rank)
        if step + 1 < len(lane.loop(rank)) and lane.reach(coming) > step and (added := self._added(coming, step)):
            slot = self._slot + (step + 1) % 2
            self._arriving = Sum(self._job, self._names, lane.part(coming), slot=slot, version=added)
            yield from self._arriving.recv(emit, peer=lane.at(rank, -1), tag=self._tag)
        if 0 < last == step:
            self._homeward = Sum(self._job, self._names, lane.part(rank), slot=self._slot + 3, version=self._added(rank, last))
            peer, tag = lane.at(rank, last), self._tag + len(self._names)
            yield from self._homeward.recv(emit, peer=peer, tag=tag, phase="home")

    def finish(self, emit: Emitter) -> Iterator[Op]:
        """The gradients of this rank's own block, with what came home."""
        if self._homeward is not None:
            yield from self._own.add(emit, self._homeward)
        yield from self._own.cast(emit)

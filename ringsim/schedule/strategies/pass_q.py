"""Queries travel alone while keys and values stay; the partial outputs go home to be merged."""

from __future__ import annotations

from collections.abc import Iterator

from ..backward import rotate_queries_back
from ..emitter import Emitter
from ..job import Job
from ..loops import Lane, components
from ..ops import Op, Region
from ..registry import any_rank, strategy

Q_TAG, HOME_TAG = 0, 1


@strategy("pass-q", version=1, turn=any_rank, backward=rotate_queries_back)
def pass_q(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Q blocks go round; the partial outputs of all of them go home after the last step ("pass-Q", arXiv 2411.01783).

    Bytes sent per rank under a full mask: ``(P-1) * c * heads * head_dim * itemsize`` of queries and ``(P-1) * c * heads *
    (v_head_dim + 2) * 4`` (8 for float64) of partials, in float32 for exactness. Holds P - 1 partials until the end.
    Backward: `rotate_queries_back`.
    """
    visitors = _Visitors(job, rank, at_once=False)
    yield from visitors.rounds(emit)
    size = len(visitors.lane.loop(rank))
    for distance in range(1, size):
        emit.step = size - 1 + distance
        yield from visitors.expect(emit, distance)
        yield from visitors.send_home(emit, distance)
        yield from visitors.merge(emit, distance - 1)
    yield from visitors.merge(emit, size - 1)
    yield from visitors.finish(emit)


@strategy("token-ring", version=1, turn=any_rank, backward=rotate_queries_back)
def token_ring(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Q blocks go one way round, each partial output the other way as soon as it is there (TokenRing, arXiv 2412.20501).

    Bytes sent per rank are those of `pass-q`, the partials hidden behind the next step's computation: algorithm 1. A partial
    goes straight to its home; where there is no such link the machine routes it.
    """
    visitors = _Visitors(job, rank, at_once=True)
    yield from visitors.rounds(emit)
    yield from visitors.merge(emit, len(visitors.lane.loop(rank)) - 1)
    yield from visitors.finish(emit)


class _Visitors:
    """One rank's part: its keys under all queries that come by, and its own queries' partials coming home."""

    def __init__(self, job: Job, rank: int, *, at_once: bool) -> None:
        self.lane = job.remember("pass-q", lambda: Lane(job, components(job), job.q_block, queries=True))
        self._job = job
        self._rank = rank
        self._at_once = at_once
        self._block = job.q_block(rank)
        self._version = 0

    def rounds(self, emit: Emitter) -> Iterator[Op]:
        """Every step's hop and computation, and with `at_once` the partials' way home."""
        members = self.lane.loop(self._rank)
        yield from emit.compute("reset", reads=(), writes=self._own(), phase="setup")
        for step in range(len(members)):
            emit.step = step
            yield from self._hop(emit, step)
            if self._at_once:
                yield from self.expect(emit, step)
            yield from self._attend(emit, step)
            if self._at_once:
                yield from self.send_home(emit, step)
                yield from self.merge(emit, step - 1)
            if self._job.sync == "step" and step + 1 < len(members):
                yield from emit.barrier(members)

    def _own(self) -> tuple[Region, ...]:
        return self._job.state(self._block, self._version, packed=True)

    def _slot(self, step: int) -> int:
        """Where the partial of a visitor is made: two slots in turn if it leaves at once, else one each."""
        return 1 + step % 2 if self._at_once else step

    def _landing(self, distance: int) -> int:
        return (3 if self._at_once else len(self.lane.loop(self._rank))) + distance % 2

    def _queries(self, step: int) -> Region:
        block = self._job.q_block(self.lane.at(self._rank, -step))
        return self._job.copy("q", block, 1 + (step - 1) % 2) if step else self._job.home("q", block)

    def _hop(self, emit: Emitter, step: int) -> Iterator[Op]:
        lane, rank = self.lane, self._rank
        if lane.reach(lane.at(rank, -step - 1)) > step:
            yield from emit.recv(self._queries(step + 1), peer=lane.at(rank, -1), tag=Q_TAG)
        if lane.reach(lane.at(rank, -step)) > step:
            yield from emit.send(self._queries(step), peer=lane.at(rank, 1), tag=Q_TAG)

    def _attend(self, emit: Emitter, step: int) -> Iterator[Op]:
        job, block, keys = self._job, self._job.q_block(self.lane.at(self._rank, -step)), self._job.kv_block(self._rank)
        tiles = job.tiles(block, keys)
        if not tiles:
            return
        if step:
            fresh, after = (job.state(block, v, slot=self._slot(step), packed=True, at=self._rank) for v in (0, 1))
            yield from emit.compute("reset", reads=(), writes=fresh, phase="attend")
        else:
            fresh = self._own()
            self._version += 1
            after = self._own()
        reads = (self._queries(step), job.home("k", keys), job.home("v", keys), *fresh)
        yield from emit.compute("attend", reads=reads, writes=after, phase="attend", tiles=tiles, flops=job.flops(tiles))

    def expect(self, emit: Emitter, distance: int) -> Iterator[Op]:
        """Post the receive of the partial that is made as many hops away."""
        peer = self.lane.at(self._rank, distance)
        if distance and self.lane.needed(self._rank, peer):
            parcel = self._job.parcel(self._block, 1, slot=self._landing(distance), at=peer)
            yield from emit.recv(parcel, peer=peer, tag=HOME_TAG, phase="home")

    def send_home(self, emit: Emitter, step: int) -> Iterator[Op]:
        """Send the partial of that step's visitor to where its queries live."""
        home = self.lane.at(self._rank, -step)
        if step and self.lane.needed(home, self._rank):
            parcel = self._job.parcel(self._job.q_block(home), 1, slot=self._slot(step), at=self._rank)
            yield from emit.send(parcel, peer=home, tag=HOME_TAG, phase="home")

    def merge(self, emit: Emitter, distance: int) -> Iterator[Op]:
        """Merge the partial that came from as many hops away."""
        peer = self.lane.at(self._rank, distance)
        if distance > 0 and self.lane.needed(self._rank, peer):
            partial = self._job.state(self._block, 1, slot=self._landing(distance), packed=True, at=peer)
            before = self._own()
            self._version += 1
            yield from emit.compute("merge", reads=(*before, *partial), writes=self._own(), phase="merge")

    def finish(self, emit: Emitter) -> Iterator[Op]:
        """The outputs of this rank's queries."""
        outputs = (self._job.home("out", self._block), self._job.home("lse", self._block))
        yield from emit.compute("finish", reads=self._own(), writes=outputs, phase="finish")

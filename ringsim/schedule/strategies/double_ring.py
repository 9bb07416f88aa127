"""Keys and values travel round rings within nodes while the next node's are already on their way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import WorkloadError
from ...workload import Workload
from ..emitter import Emitter
from ..gradients import KV_SIDE, KV_SUMS, Q_SIDE, Q_SUMS, Sum, at_home, attend_backward, make_delta
from ..job import Job
from ..ops import Op, Region
from ..registry import strategy

OUTER_TAG, ROAD_TAG, ENTRY_TAG, ACROSS_TAG, HOME_TAG = range(len(KV_SIDE), 6 * len(KV_SIDE), len(KV_SIDE))
HOME, ENTRIES, ROAD, PART, RETURNED, ACROSS, ARRIVED = 0, 1, 3, 5, 6, 7, 9
"""Slots of sums: of the own block; of those with which laps begin; on the road; the own part; back; across; and home."""


def _turn(workload: Workload, inner: int, stride: int) -> int:
    """By whole inner rings."""
    return inner * stride


def double_ring_back(job: Job, rank: int, emit: Emitter, inner: int, stride: int = 1) -> Iterator[Op]:
    """K and V as in the forward pass; the float32 sums of dK and dV of each node, one hop behind, go back to where it began.

    There they are added, a whole inner ring later, to those that come from the node before and go on to the next: the slow hop of
    gradients has an inner ring to hide behind as well. Bytes sent per rank under a full mask for P = outer x inner, besides
    those of K and V: ``outer * (inner - 1)`` blocks of dK and dV within and ``outer - 1`` across, of ``c * kv_heads * (head_dim +
    v_head_dim) * 4`` each (8 for float64): as many as `ring_back` in all.
    """
    mesh = job.remember(("double-ring", inner, stride), lambda: _Mesh.make(job, inner, stride))
    mine, sums = _Place(job, mesh, rank), _Gradients(job, mesh, rank)
    for lap in range(mesh.outer):
        for turn in range(inner):
            emit.step = lap * inner + turn
            if turn == 0:
                yield from mine.cross(emit, lap)
            yield from mine.pass_on(emit, lap, turn)
            if lap == turn == 0:
                yield from make_delta(job, job.q_block(rank), emit)
                yield from sums.queries.clear(emit, "setup")
            yield from sums.visit(emit, lap, turn, mine.blocks(lap, turn))
            if job.sync == "step" and lap * inner + turn + 1 < job.world_size:
                yield from emit.barrier(range(job.world_size))
    yield from sums.finish(emit)


@strategy("double-ring", version=1, turn=_turn, backward=double_ring_back)
def double_ring(job: Job, rank: int, emit: Emitter, inner: int, stride: int = 1) -> Iterator[Op]:
    """Rings of `inner` ranks, and rings across them: the slow hop between nodes has a whole inner ring to hide behind.

    An inner ring is ranks r, r + stride, ...: consecutive ones as they stand, or with ``stride = P / inner`` the other axis of
    the mesh. While an inner ring passes on the blocks of one node, each rank sends the one with which it entered to its
    counterpart in the next ("Double-Ring" of LoongTrain, arXiv 2406.18485). Bytes sent per rank under a full mask for
    P = outer x inner: ``outer * (inner - 1)`` blocks within and ``outer - 1`` across, together the P - 1 of `ring`. Backward:
    `double_ring_back`.
    """
    mesh = job.remember(("double-ring", inner, stride), lambda: _Mesh.make(job, inner, stride))
    mine = _Place(job, mesh, rank)
    block, version = job.q_block(rank), 0
    yield from emit.compute("reset", reads=(), writes=job.state(block, 0), phase="setup")
    for lap in range(mesh.outer):
        for turn in range(inner):
            emit.step = lap * inner + turn
            if turn == 0:
                yield from mine.cross(emit, lap)
            yield from mine.pass_on(emit, lap, turn)
            held = mesh.held(rank, lap, turn)
            if tiles := job.tiles(block, job.kv_block(held)):
                reads = (job.home("q", block), *mine.blocks(lap, turn), *job.state(block, version))
                version += 1
                writes, flops = job.state(block, version), job.flops(tiles)
                yield from emit.compute("attend", reads=reads, writes=writes, phase="attend", tiles=tiles, flops=flops)
            if job.sync == "step" and lap * inner + turn + 1 < job.world_size:
                yield from emit.barrier(range(job.world_size))
    outputs = (job.home("out", block), job.home("lse", block))
    yield from emit.compute("finish", reads=job.state(block, version), writes=outputs, phase="finish")


@dataclass(frozen=True, eq=False)
class _Mesh:
    """Ranks as (node, place within its inner ring)."""

    job: Job
    inner: int
    outer: int
    stride: int

    @classmethod
    def make(cls, job: Job, inner: int, stride: int) -> _Mesh:
        if min(inner, stride) < 1 or job.world_size % (inner * stride):
            raise WorkloadError(
                f"strategy 'double-ring({inner}, {stride})': {job.world_size} ranks are no rings of {inner} at a stride of "
                f"{stride}; inner x stride must divide the number of ranks"
            )
        return cls(job, inner, job.world_size // inner, stride)

    def place(self, rank: int) -> tuple[int, int]:
        """Node, and place in its inner ring."""
        group, low = divmod(rank, self.inner * self.stride)
        return group * self.stride + low % self.stride, low // self.stride

    def rank(self, node: int, place: int) -> int:
        """The rank there; both count round."""
        node, place = node % self.outer, place % self.inner
        return node // self.stride * self.inner * self.stride + place * self.stride + node % self.stride

    def held(self, rank: int, lap: int, turn: int) -> int:
        """The rank at home with what `rank` holds in that turn of that lap."""
        node, place = self.place(rank)
        return self.rank(node - lap, place - turn)

    def within(self, block: int, node: int) -> int:
        """How many hops the block of a rank makes round the inner ring of `node`: to the last that needs it."""
        return self.job.remember(("within", self.inner, self.stride, block, node % self.outer), lambda: self._within(block, node))

    def _within(self, block: int, node: int) -> int:
        _, place = self.place(block)
        turns = range(self.inner - 1, 0, -1)
        return next((turn for turn in turns if self.needed(block, self.rank(node, place + turn))), 0)

    def across(self, block: int) -> int:
        """How many nodes further the block of a rank goes: to the last in which anyone needs it."""
        return self.job.remember(("across", self.inner, self.stride, block), lambda: self._across(block))

    def _across(self, block: int) -> int:
        node, _ = self.place(block)
        laps, places = range(self.outer - 1, 0, -1), range(self.inner)
        return next((lap for lap in laps if any(self.needed(block, self.rank(node + lap, place)) for place in places)), 0)

    def added_within(self, block: int, node: int, turn: int) -> int:
        """How many ranks of a node, besides the one where a block enters it, have needed it up to that turn."""
        _, place = self.place(block)
        return sum(self.needed(block, self.rank(node, place + one)) for one in range(1, turn + 1))

    def added_across(self, block: int, lap: int) -> int:
        """In how many nodes, besides its own, someone has needed a block up to that lap."""
        return sum(self.needed_in(block, one) for one in range(1, lap + 1))

    def needed_in(self, block: int, lap: int) -> bool:
        """Whether anyone needs the block of a rank in the node that it visits in that lap."""
        node, _ = self.place(block)
        return any(self.needed(block, self.rank(node + lap, place)) for place in range(self.inner))

    def needed(self, block: int, rank: int) -> bool:
        """Whether a rank needs the block of another."""
        return self.job.needs(self.job.q_block(rank), self.job.kv_block(block))


@dataclass(frozen=True, slots=True)
class _Place:
    """One rank's end of both rings: at home in slot 0, on the inner ring in slots 1 and 2, from the last node in 3 and 4."""

    job: Job
    mesh: _Mesh
    rank: int

    def blocks(self, lap: int, turn: int) -> tuple[Region, ...]:
        """K and V as held in that turn of that lap."""
        block = self.job.kv_block(self.mesh.held(self.rank, lap, turn))
        if turn:
            return tuple(self.job.copy(name, block, 1 + (turn - 1) % 2) for name in KV_SIDE)
        return tuple(self.job.copy(name, block, 3 + (lap - 1) % 2) if lap else self.job.home(name, block) for name in KV_SIDE)

    def cross(self, emit: Emitter, lap: int) -> Iterator[Op]:
        """The hop across nodes, a whole inner ring ahead of its use."""
        mesh, (node, place) = self.mesh, self.mesh.place(self.rank)
        coming, going = (mesh.across(mesh.rank(node - lap - ahead, place)) > lap for ahead in (1, 0))
        for index in range(len(KV_SIDE)):
            if coming:
                region, peer = self.blocks(lap + 1, 0)[index], mesh.rank(node - 1, place)
                yield from emit.recv(region, peer=peer, tag=OUTER_TAG + index, phase="cross", group="across")
            if going:
                region, peer = self.blocks(lap, 0)[index], mesh.rank(node + 1, place)
                yield from emit.send(region, peer=peer, tag=OUTER_TAG + index, phase="cross", group="across")

    def pass_on(self, emit: Emitter, lap: int, turn: int) -> Iterator[Op]:
        """The hop within the node."""
        mesh, (node, place) = self.mesh, self.mesh.place(self.rank)
        coming, going = (mesh.within(mesh.held(self.rank, lap, turn + ahead), node) > turn for ahead in (1, 0))
        for tag in range(len(KV_SIDE)):
            if coming and turn + 1 < mesh.inner:
                yield from emit.recv(self.blocks(lap, turn + 1)[tag], peer=mesh.rank(node, place - 1), tag=tag)
            if going:
                yield from emit.send(self.blocks(lap, turn)[tag], peer=mesh.rank(node, place + 1), tag=tag)


class _Gradients:
    """One rank's part in the sums: dQ stays, dK and dV follow their blocks round each node, and from node to node."""

    def __init__(self, job: Job, mesh: _Mesh, rank: int) -> None:
        self._job = job
        self._mesh = mesh
        self._rank = rank
        self._node, self._at = mesh.place(rank)
        self.queries = Sum(job, Q_SUMS, job.q_block(rank), slot=0)
        self._entry = self._own = self._sum(rank, HOME, at=str(rank))
        self._passing: Sum | None = None
        self._returned: Sum | None = None
        self._crossing: Sum | None = None
        self._home: Sum | None = None

    def _sum(self, block: int, slot: int, *, at: str = "", version: int = 0) -> Sum:
        return Sum(self._job, KV_SUMS, self._job.kv_block(block), slot=slot, at=at, version=version)

    def visit(self, emit: Emitter, lap: int, turn: int, kv: tuple[Region, ...]) -> Iterator[Op]:
        """Add this rank's part to the sums of what is here, pass on what is complete, and post what comes next."""
        block = self._mesh.held(self._rank, lap, turn)
        if turn == 0:
            entered, self._entry = self._entry, self._own if lap == 0 else self._sum(block, ENTRIES + lap % 2, at=str(self._rank))
            yield from self._entry.clear(emit)
            yield from self._attend(emit, self._entry, kv)
            if lap:
                yield from self._settle(emit, lap - 1, entered)
        elif self._mesh.within(block, self._node) >= turn:
            yield from self._add(emit, block, turn, kv)
        yield from self._expect(emit, lap, turn)

    def _attend(self, emit: Emitter, sums: Sum, kv: tuple[Region, ...]) -> Iterator[Op]:
        home = at_home(self._job, Q_SIDE, self.queries.block)
        yield from attend_backward(self._job, emit, queries=(self.queries, home), keys=(sums, kv))

    def _add(self, emit: Emitter, block: int, turn: int, kv: tuple[Region, ...]) -> Iterator[Op]:
        """Within a node, after the rank where the block came in."""
        mesh, sums = self._mesh, self._passing
        _, place = mesh.place(block)
        entry = mesh.rank(self._node, place)
        if mesh.needed(block, self._rank):
            mine = self._sum(block, PART, at=str(self._rank)) if sums else self._sum(block, ROAD + turn % 2, at=f"{entry}+")
            yield from mine.clear(emit)
            yield from self._attend(emit, mine, kv)
            if sums is None:
                sums = mine
            else:
                yield from sums.add(emit, mine)
        if sums is not None and mesh.within(block, self._node) > turn:
            yield from sums.send(emit, peer=mesh.rank(self._node, self._at + 1), tag=ROAD_TAG)
        elif sums is not None:
            yield from sums.send(emit, peer=entry, tag=ENTRY_TAG, phase="home")

    def _expect(self, emit: Emitter, lap: int, turn: int) -> Iterator[Op]:
        """Post the receives of what the next turn adds to, and of the sums of the block with which the lap began."""
        mesh, node, self._passing = self._mesh, self._node, None
        if turn + 1 < mesh.inner:
            block = mesh.held(self._rank, lap, turn + 1)
            _, place = mesh.place(block)
            if mesh.within(block, node) > turn and (added := mesh.added_within(block, node, turn)):
                at = f"{mesh.rank(node, place)}+"
                self._passing = self._sum(block, ROAD + (turn + 1) % 2, at=at, version=added)
                yield from self._passing.recv(emit, peer=mesh.rank(node, self._at - 1), tag=ROAD_TAG)
        block = mesh.held(self._rank, lap, 0)
        last = mesh.within(block, node)
        if 0 < last == turn:
            added = mesh.added_within(block, node, last)
            self._returned = self._sum(block, RETURNED, at=f"{self._rank}+", version=added)
            yield from self._returned.recv(emit, peer=mesh.rank(node, self._at + last), tag=ENTRY_TAG, phase="home")

    def _settle(self, emit: Emitter, lap: int, entry: Sum) -> Iterator[Op]:
        """A lap later: what its node adds to the block with which it began goes on to the next node, or home."""
        mesh, block, sums = self._mesh, entry.block.rank, self._crossing
        if self._returned is not None:
            yield from entry.add(emit, self._returned)
        if lap and mesh.needed_in(block, lap):
            if sums is None:
                sums = self._sum(block, ACROSS + lap % 2)
                yield from sums.clear(emit)
            yield from sums.add(emit, entry)
        if lap and sums is not None:
            on = mesh.across(block) > lap
            peer, tag = (mesh.rank(self._node + 1, self._at), ACROSS_TAG) if on else (block, HOME_TAG)
            yield from sums.send(emit, peer=peer, tag=tag, phase="cross" if on else "home", group="across")
        self._returned = self._crossing = None
        if lap + 1 < mesh.outer:
            coming = mesh.held(self._rank, lap + 1, 0)
            if mesh.across(coming) > lap and (added := mesh.added_across(coming, lap)):
                self._crossing = self._sum(coming, ACROSS + (lap + 1) % 2, version=added)
                peer = mesh.rank(self._node - 1, self._at)
                yield from self._crossing.recv(emit, peer=peer, tag=ACROSS_TAG, phase="cross", group="across")
        if 0 < mesh.across(self._rank) == lap:
            self._home = self._sum(self._rank, ARRIVED, version=mesh.added_across(self._rank, lap))
            peer = mesh.rank(self._node + lap, self._at)
            yield from self._home.recv(emit, peer=peer, tag=HOME_TAG, phase="home", group="across")

    def finish(self, emit: Emitter) -> Iterator[Op]:
        """The gradients of this rank's tokens."""
        yield from self._settle(emit, self._mesh.outer - 1, self._entry)
        if self._home is not None:
            yield from self._own.add(emit, self._home)
        yield from self._own.cast(emit)
        yield from self.queries.cast(emit)

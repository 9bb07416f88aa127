"""Keys and values travel round rings within nodes while the next node's are already on their way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import WorkloadError
from ...workload import Workload
from ..emitter import Emitter
from ..job import Job
from ..ops import Op, Region
from ..registry import strategy

NAMES = ("k", "v")
OUTER_TAG = len(NAMES)


def _turn(workload: Workload, inner: int, stride: int) -> int:
    """By whole inner rings."""
    return inner * stride


@strategy("double-ring", version=1, turn=_turn)
def double_ring(job: Job, rank: int, emit: Emitter, inner: int, stride: int = 1) -> Iterator[Op]:
    """Rings of `inner` ranks, and rings across them: the slow hop between nodes has a whole inner ring to hide behind.

    An inner ring is ranks r, r + stride, ...: consecutive ones as they stand, or with ``stride = P / inner`` the other axis of
    the mesh. While an inner ring passes on the blocks of one node, each rank sends the one with which it entered to its
    counterpart in the next ("Double-Ring" of LoongTrain, arXiv 2406.18485). Bytes sent per rank under a full mask for
    P = outer x inner: ``outer * (inner - 1)`` blocks within and ``outer - 1`` across, together the P - 1 of `ring`.
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
            if job.sync == "step" and emit.step + 1 < job.world_size:
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
        return next((turn for turn in turns if self._needed(block, self.rank(node, place + turn))), 0)

    def across(self, block: int) -> int:
        """How many nodes further the block of a rank goes: to the last in which anyone needs it."""
        return self.job.remember(("across", self.inner, self.stride, block), lambda: self._across(block))

    def _across(self, block: int) -> int:
        node, _ = self.place(block)
        laps, places = range(self.outer - 1, 0, -1), range(self.inner)
        return next((lap for lap in laps if any(self._needed(block, self.rank(node + lap, place)) for place in places)), 0)

    def _needed(self, block: int, rank: int) -> bool:
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
            return tuple(self.job.copy(name, block, 1 + (turn - 1) % 2) for name in NAMES)
        return tuple(self.job.copy(name, block, 3 + (lap - 1) % 2) if lap else self.job.home(name, block) for name in NAMES)

    def cross(self, emit: Emitter, lap: int) -> Iterator[Op]:
        """The hop across nodes, a whole inner ring ahead of its use."""
        mesh, (node, place) = self.mesh, self.mesh.place(self.rank)
        coming, going = (mesh.across(mesh.rank(node - lap - ahead, place)) > lap for ahead in (1, 0))
        for index in range(len(NAMES)):
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
        for tag in range(len(NAMES)):
            if coming and turn + 1 < mesh.inner:
                yield from emit.recv(self.blocks(lap, turn + 1)[tag], peer=mesh.rank(node, place - 1), tag=tag)
            if going:
                yield from emit.send(self.blocks(lap, turn)[tag], peer=mesh.rank(node, place + 1), tag=tag)

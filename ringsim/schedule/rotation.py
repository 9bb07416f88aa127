"""Keys and values that rotate while queries stay: what `ring`, `bidirectional` and `multi-ring` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .emitter import Emitter
from .gradients import KV_SIDE
from .job import Block, Job
from .loops import Lane
from .ops import Op, Region


def rotate(job: Job, rank: int, emit: Emitter, lanes: Sequence[Lane]) -> Iterator[Op]:
    """At step s the rank holds, in each lane, the part that started s places up its loop; it stops where none further needs it.

    Receives of a lane go to two slots in turn, and k goes on while v is still on its way. Parts that are not dense at home are
    packed once, before they leave. Lanes with the same heads share one running state.
    """
    states = _States(job, rank, lanes)
    ways = [Way(job, rank, lane, index, len(lanes), KV_SIDE) for index, lane in enumerate(lanes)]
    yield from states.reset(emit)
    for way in ways:
        yield from way.pack(emit)
    members = sorted(lanes[0].loop(rank))
    for step in range(len(members)):
        emit.step = step
        for way in ways:
            yield from way.hop(emit, step)
        for way in ways:
            yield from states.attend(emit, way.lane, way.held(step), way.blocks(step))
        if job.sync == "step" and step + 1 < len(members):
            yield from emit.barrier(members)
    yield from states.finish(emit)


class _States:
    """The running state of a rank's queries: one for each slice of heads that some lane carries."""

    def __init__(self, job: Job, rank: int, lanes: Sequence[Lane]) -> None:
        self._job = job
        self._rank = rank
        slices = dict.fromkeys(lane.part(rank).heads for lane in lanes)
        self._slots = {heads: slot for slot, heads in enumerate(slices)}
        self._versions = dict.fromkeys(slices, 0)

    def _block(self, heads: tuple[int, int]) -> Block:
        return self._job.q_block(self._rank)._replace(heads=heads)

    def _state(self, heads: tuple[int, int]) -> tuple[Region, ...]:
        return self._job.state(self._block(heads), self._versions[heads], slot=self._slots[heads])

    def reset(self, emit: Emitter) -> Iterator[Op]:
        for heads in self._slots:
            yield from emit.compute("reset", reads=(), writes=self._state(heads), phase="setup")

    def attend(self, emit: Emitter, lane: Lane, held: int, kv: tuple[Region, ...]) -> Iterator[Op]:
        """Fold a lane's part of the block of rank `held` into the state of its heads."""
        part = lane.part(held)
        block = self._block(part.heads)
        if tiles := self._job.tiles(block, part):
            reads = (self._job.home("q", block), *kv, *self._state(part.heads))
            self._versions[part.heads] += 1
            writes, flops = self._state(part.heads), self._job.flops(tiles)
            yield from emit.compute("attend", reads=reads, writes=writes, phase="attend", tiles=tiles, flops=flops)

    def finish(self, emit: Emitter) -> Iterator[Op]:
        for heads in self._slots:
            block = self._block(heads)
            outputs = (self._job.home("out", block), self._job.home("lse", block))
            yield from emit.compute("finish", reads=self._state(heads), writes=outputs, phase="finish")


@dataclass(frozen=True, slots=True)
class Way:
    """One rank's end of a lane, the one with that `index` of so many `lanes`; `names` are what travels.

    Slot 0 is home; two slots of each lane receive; one more holds what had to be packed.
    """

    job: Job
    rank: int
    lane: Lane
    index: int
    lanes: int
    names: tuple[str, ...]

    def held(self, step: int) -> int:
        """The rank at home with what is here at `step`."""
        return self.lane.at(self.rank, -step)

    def _region(self, name: str, step: int) -> Region:
        part = self.lane.part(self.held(step))
        if step:
            return self.job.copy(name, part, 1 + 2 * self.index + (step - 1) % 2)
        return self.job.home(name, part)

    def blocks(self, step: int) -> tuple[Region, ...]:
        """What travels, as held at `step`."""
        return tuple(self._region(name, step) for name in self.names)

    def _leaving(self, name: str, step: int) -> Region:
        region = self._region(name, step)
        return region if region.dense else self.job.copy(name, self.lane.part(self.rank), 1 + 2 * self.lanes + self.index)

    def pack(self, emit: Emitter) -> Iterator[Op]:
        """What leaves from home and is not dense there, made so."""
        for source in self.blocks(0) if self.lane.reach(self.rank) else ():
            if not source.dense:
                target = self._leaving(source.buffer, 0)
                yield from emit.compute("pack", reads=(source,), writes=(target,), phase="setup")

    def hop(self, emit: Emitter, step: int) -> Iterator[Op]:
        """Post what comes and what goes on."""
        ahead, behind = self.lane.at(self.rank, 1), self.lane.at(self.rank, -1)
        for tag, name in enumerate(self.names, len(self.names) * self.index):
            if self.lane.reach(self.held(step + 1)) > step:
                yield from emit.recv(self._region(name, step + 1), peer=behind, tag=tag)
            if self.lane.reach(self.held(step)) > step:
                yield from emit.send(self._leaving(name, step), peer=ahead, tag=tag)

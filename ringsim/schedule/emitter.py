"""From a strategy's intent to ops: ids, chunks, barriers and the waits that follow from the regions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import ScheduleError
from ..tile import Tile
from .ops import Compute, Op, Post, Recv, Region, Send, Wait
from .outstanding import Outstanding

MAX_MESSAGE_NBYTES = 2**31 - 1
BARRIER_TAG = 1024
"""Tags of barriers; those of a strategy lie below."""


class Emitter:
    """Yields one rank's ops in issue order; a strategy sets `step` and calls recv, send, compute and barrier."""

    def __init__(self, rank: int, max_message_nbytes: int = MAX_MESSAGE_NBYTES) -> None:
        self.rank = rank
        self.steps = 0
        """Steps begun so far, of all passes."""
        self._first = self._step = 0
        self._limit = max_message_nbytes
        self._outstanding = Outstanding()
        self._next_id = 0

    @property
    def step(self) -> int:
        """The step of the ops to come, counted over all passes; a strategy sets it as its own pass counts."""
        return self._step

    @step.setter
    def step(self, number: int) -> None:
        self._step = self._first + number
        self.steps = max(self.steps, self._step + 1)

    def count_from(self, first: int) -> None:
        """A pass begins: its step 0 is the program's step `first`."""
        self._first = first
        self.step = 0

    def recv(self, region: Region, *, peer: int, tag: int, phase: str = "hop", group: str = "ring") -> Iterator[Op]:
        """Post a receive, in chunks if it is long; nothing for an empty region."""
        for part in self._chunks(region):
            yield from self._wait(self._outstanding.hazards((), (part,)))
            post = Recv(id=self._take_id(), step=self.step, phase=phase, region=part, peer=peer, tag=tag, group=group)
            yield self._posted(post)

    def send(self, region: Region, *, peer: int, tag: int, phase: str = "hop", group: str = "ring") -> Iterator[Op]:
        """Post a send, in chunks if it is long; nothing for an empty region."""
        for part in self._chunks(region):
            yield from self._wait(self._outstanding.hazards((part,), ()))
            post = Send(id=self._take_id(), step=self.step, phase=phase, region=part, peer=peer, tag=tag, group=group)
            yield self._posted(post)

    def compute(
        self,
        kernel: str,
        *,
        reads: tuple[Region, ...],
        writes: tuple[Region, ...],
        phase: str,
        tiles: tuple[Tile, ...] = (),
        flops: int = 0,
    ) -> Iterator[Op]:
        """Launch a kernel."""
        yield from self._wait(self._outstanding.hazards(reads, writes))
        yield Compute(
            id=self._take_id(), step=self.step, phase=phase, kernel=kernel, reads=reads, writes=writes, tiles=tiles, flops=flops
        )

    def barrier(self, members: Sequence[int], group: str = "ring") -> Iterator[Op]:
        """None of `members` passes before all have come, with all their posts complete: dissemination of one-byte tokens.

        Hensgen, Finkel and Manber, "Two algorithms for barrier synchronization" (1988): ceil(log2 P) rounds.
        """
        yield from self.drain()
        place, distance = members.index(self.rank), 1
        while distance < len(members):
            token = Region(buffer="token", slot=2 * distance, shape=(1,), dtype="uint8", value="token")
            arrived = replace(token, slot=2 * distance + 1)
            back, ahead = members[(place - distance) % len(members)], members[(place + distance) % len(members)]
            tag = BARRIER_TAG + distance.bit_length()
            yield from self.recv(arrived, peer=back, tag=tag, phase="barrier", group=group)
            yield from self.send(token, peer=ahead, tag=tag, phase="barrier", group=group)
            yield from self.drain("barrier")
            distance *= 2

    def drain(self, phase: str = "drain") -> Iterator[Op]:
        """Wait for every outstanding post."""
        yield from self._wait(tuple(self._outstanding), phase)

    def _chunks(self, region: Region) -> Iterator[Region]:
        nbytes = region.nbytes
        if not nbytes:
            return
        first, end = region.extent
        if end - first != nbytes:
            raise ScheduleError(f"{region.value} in {region.buffer} slot {region.slot} is not dense: pack it before it is sent")
        if nbytes <= self._limit:
            yield region
            return
        for begin in range(0, nbytes, self._limit):
            size = min(self._limit, nbytes - begin)
            yield replace(region, shape=(size,), dtype="uint8", offset=first + begin, box=None)

    def _wait(self, posts: tuple[int, ...], phase: str = "hop") -> Iterator[Op]:
        if posts:
            yield Wait(id=self._take_id(), step=self.step, phase=phase, posts=posts)
            for post in posts:
                self._outstanding.remove(post)

    def _posted(self, post: Post) -> Post:
        if post.phase != "barrier" and not 0 <= post.tag < BARRIER_TAG:
            raise ScheduleError(f"{post.region.value} goes with tag {post.tag}; a strategy's tags are 0 to {BARRIER_TAG - 1}")
        self._outstanding.add(post)
        return post

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

"""The ops of the backward pass: sums of gradients are cleared, added to, merged and cast; whoever travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from .emitter import Emitter
from .job import Block, Job
from .ops import Op, Region

Q_SIDE: Final = ("q", "dout", "lse", "delta")
"""What is read of a block of queries."""
KV_SIDE: Final = ("k", "v")
"""What is read of a block of keys."""
Q_SUMS: Final = ("dq",)
KV_SUMS: Final = ("dk", "dv")
Regions = tuple[Region, ...]


class Sum:
    """A running sum of gradients in its slot: knows its version, and yields the ops that change it.

    `names` are ``dq``, or ``dk`` and ``dv``; `at` says which part of a sum it is where it is not yet all of it.
    """

    def __init__(
        self,
        job: Job,
        names: tuple[str, ...],
        block: Block,
        *,
        slot: int,
        at: str = "",
        version: int = 0,
        within: Block | None = None,
    ) -> None:
        self.block = block
        self._job = job
        self._names = names
        self._slot = slot
        self._at = at
        self._version = version
        self._within = within

    @property
    def regions(self) -> Regions:
        """As it is now."""
        names, block, version = self._names, self.block, self._version
        return self._job.sums(names, block, version, slot=self._slot, at=self._at, within=self._within)

    def change(self) -> tuple[Regions, Regions]:
        """Before and after one more op."""
        before = self.regions
        self._version += 1
        return before, self.regions

    def clear(self, emit: Emitter, phase: str = "attend_backward") -> Iterator[Op]:
        """Begin at 0."""
        yield from emit.compute("clear", reads=(), writes=self.regions, phase=phase)

    def add(self, emit: Emitter, other: Sum) -> Iterator[Op]:
        """Add another sum of the same block, or of some rows of it."""
        before, after = self.change()
        yield from emit.compute("accumulate", reads=(*before, *other.regions), writes=after, phase="accumulate")

    def cast(self, emit: Emitter) -> Iterator[Op]:
        """Write the gradients where the caller gets them, in the dtype of the workload."""
        outputs = tuple(self._job.home(name, self.block) for name in self._names)
        yield from emit.compute("cast", reads=self.regions, writes=outputs, phase="finish")

    def recv(self, emit: Emitter, *, peer: int, tag: int, phase: str = "sums", group: str = "ring") -> Iterator[Op]:
        """Post its receive, a message for each name."""
        for index, region in enumerate(self.regions):
            yield from emit.recv(region, peer=peer, tag=tag + index, phase=phase, group=group)

    def send(self, emit: Emitter, *, peer: int, tag: int, phase: str = "sums", group: str = "ring") -> Iterator[Op]:
        """Post its send, a message for each name."""
        for index, region in enumerate(self.regions):
            yield from emit.send(region, peer=peer, tag=tag + index, phase=phase, group=group)


def make_delta(job: Job, block: Block, emit: Emitter) -> Iterator[Op]:
    """``delta = rowsum(dout * out)`` of a block of queries (FlashAttention-2, arXiv 2307.08691, algorithm 2, line 4)."""
    reads, writes = (job.home("out", block), job.home("dout", block)), (job.home("delta", block),)
    yield from emit.compute("delta", reads=reads, writes=writes, phase="setup")


def at_home(job: Job, names: tuple[str, ...], block: Block) -> Regions:
    """What is read of a block, at home."""
    return tuple(job.home(name, block) for name in names)


def attend_backward(job: Job, emit: Emitter, *, queries: tuple[Sum, Regions], keys: tuple[Sum, Regions]) -> Iterator[Op]:
    """Add to the sums of a block of queries and of one of keys, of the same heads, what each does to the other's gradients.

    With each sum the regions that are read, of Q_SIDE and of KV_SIDE. Nothing where the mask leaves nothing.
    """
    (q_sum, of_queries), (kv_sum, of_keys) = queries, keys
    tiles = job.tiles(q_sum.block, kv_sum.block)
    if not tiles:
        return
    (q_before, q_after), (kv_before, kv_after) = q_sum.change(), kv_sum.change()
    yield from emit.compute(
        "attend_backward",
        reads=(of_queries[0], *of_keys, *of_queries[1:], *q_before, *kv_before),
        writes=(*q_after, *kv_after),
        phase="attend_backward",
        tiles=tiles,
        flops=job.flops(tiles, backward=True),
    )

"""The op language: immutable values that say who computes, sends and waits. See docs/schedule.md."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..dtypes import ITEMSIZE
from ..tile import Tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A slice of a buffer slot and the value and version that it holds there.

    `shape` is dense in C order ("layout" is that of the kernel: bshd for q, k, v and out). `offset` and `nbytes` count
    bytes from the slot's start.
    """

    buffer: str
    slot: int
    shape: tuple[int, ...]
    dtype: str
    value: str
    version: int = 0
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def overlaps(self, other: Region) -> bool:
        """Whether both touch a common byte."""
        if self.buffer != other.buffer or self.slot != other.slot:
            return False
        return self.offset < other.offset + other.nbytes and other.offset < self.offset + self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Post a send of `region` to `peer`; never blocks."""

    id: int
    step: int
    phase: str
    region: Region
    peer: int
    tag: int
    group: str = "ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recv:
    """Post a receive from `peer` into `region`; never blocks."""

    id: int
    step: int
    phase: str
    region: Region
    peer: int
    tag: int
    group: str = "ring"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Block until the posted ops with these ids are complete."""

    id: int
    step: int
    phase: str
    posts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Run `kernel` over `tiles`; reads and writes name every region touched."""

    id: int
    step: int
    phase: str
    kernel: str
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    tiles: tuple[Tile, ...] = ()
    flops: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the regions read and written, each once."""
        return sum(region.nbytes for region in self.reads + self.writes)


Op = Send | Recv | Wait | Compute
Post = Send | Recv

"""The op language: immutable values that say who computes, sends and waits. See docs/schedule.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from ..dtypes import ITEMSIZE
from ..tile import Tile

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A slice of a buffer slot and the value and version that it holds there.

    `shape` is that of an array, dense in C order ("layout" is that of the kernel: bshd for q, k, v and out), that starts
    `offset` bytes into the slot. With a `box`, a half-open range on each axis, the region is that part of the array.
    """

    buffer: str
    slot: int
    shape: tuple[int, ...]
    dtype: str
    value: str
    version: int = 0
    offset: int = 0
    box: Box | None = None
    nbytes: int = field(init=False, repr=False, compare=False)
    """Bytes of the slice."""
    extent: tuple[int, int] = field(init=False, repr=False, compare=False)
    """From its first byte to after its last, counted from the slot's start; a box may leave out bytes in between."""

    def __post_init__(self) -> None:
        itemsize = ITEMSIZE[self.dtype]
        nbytes = prod(self.sizes) * itemsize
        begin, end = self.offset, self.offset + nbytes
        if self.box is not None and nbytes:
            first = last = 0
            for (low, high), size in zip(self.box, self.shape, strict=True):
                first, last = first * size + low, last * size + high - 1
            begin, end = self.offset + first * itemsize, self.offset + (last + 1) * itemsize
        object.__setattr__(self, "nbytes", nbytes)
        object.__setattr__(self, "extent", (begin, end))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of what a kernel gets: that of the box, if there is one."""
        return self.shape if self.box is None else tuple(end - begin for begin, end in self.box)

    @property
    def array_end(self) -> int:
        """Bytes from the slot's start to the end of the array that the region is, or lies in."""
        return self.offset + prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def dense(self) -> bool:
        """Whether no byte is left out in between: only then can it be sent as it is."""
        return self.extent[1] - self.extent[0] == self.nbytes

    def overlaps(self, other: Region) -> bool:
        """Whether both touch a common byte."""
        if self.slot != other.slot or self.buffer != other.buffer:
            return False
        (begin, end), (other_begin, other_end) = self.extent, other.extent
        if begin >= other_end or other_begin >= end:
            return False
        if (
            self.box is None
            or other.box is None
            or (self.shape, self.dtype, self.offset) != (other.shape, other.dtype, other.offset)
        ):
            return True
        axes = zip(self.box, other.box, strict=True)
        return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in axes)


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

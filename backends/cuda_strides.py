"""Where device arrays lie, as kernels are told: addresses, strides in elements, axes merged, and the grids that go over them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ringsim.backends.cuda import DeviceArray, Launch
from ringsim.errors import ArrayError

THREADS: Final = 256
LANES: Final = 32
"""Threads of a warp."""
WIDEST: Final = 16
"""Bytes of the widest load or store."""
MOST_BLOCKS: Final = (2**31 - 1, 65535, 65535)
"""Blocks that a grid may have along x, y and z; the CUDA programming guide, compute capabilities."""
Strides = tuple[int, ...]
Record = npt.NDArray[Any]


class Place(NamedTuple):
    """An array as kernels see it, hashable: shape and strides in bytes, bytes of an element, and its address modulo 16."""

    shape: tuple[int, ...]
    strides: Strides
    itemsize: int
    offset: int


def address_of(array: DeviceArray) -> int:
    """The address of an array's first element; NumPy's arrays stand for device memory in tests."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


def place_of(array: DeviceArray) -> Place:
    """An array's place. Raises ArrayError for elements that a GPU cannot load, for they lie across their own size."""
    place = Place(tuple(array.shape), tuple(array.strides), int(array.dtype.itemsize), address_of(array) % WIDEST)
    if any(stride % place.itemsize for stride in place.strides) or place.offset % place.itemsize:
        raise ArrayError(
            f"{array.dtype.name} array of shape {place.shape}, strides {place.strides} B at {place.offset} B beyond a multiple "
            f"of {WIDEST}: a GPU loads elements from multiples of their own {place.itemsize} B only; align the slot"
        )
    return place


def record(words: Iterable[int]) -> Record:
    """A struct of 64-bit integers, passed to a kernel by value."""
    values = list(words)
    return np.array((values,), dtype=[("words", np.int64, (len(values),))])


def elements(place: Place, axes: tuple[int, ...]) -> Strides:
    """The strides of some axes, in elements."""
    return tuple(place.strides[axis] // place.itemsize for axis in axes)


def dense(place: Place) -> bool:
    """Whether the last axis is: its elements follow one another."""
    return place.shape[-1] <= 1 or place.strides[-1] == place.itemsize


def aligned(place: Place, columns: int) -> bool:
    """Whether an array's rows can be loaded so many elements at a time, in accesses of at most 16 bytes."""
    access = min(WIDEST, columns * place.itemsize)
    outer = (stride for stride, count in zip(place.strides[:-1], place.shape[:-1], strict=True) if count > 1)
    return dense(place) and place.offset % access == 0 and all(stride % access == 0 for stride in outer)


def rows_launch(batch: int, heads: int, rows: int, lanes: int) -> Launch:
    """The grid of `rows.cuh`: a row for `lanes` lanes, as many rows to a block as it has room and use for."""
    tall = max(LANES // lanes, min(THREADS // lanes, _power_of_two(rows)))
    blocks = -(-rows // tall), heads, batch
    x, y, z = (min(count, most) for count, most in zip(blocks, MOST_BLOCKS, strict=True))
    return Launch((x, y, z), (lanes, tall, 1))


def lanes_of(width: int, columns: int) -> int:
    """Lanes that take a row of so many elements, `columns` at a time; a power of two, at most a warp."""
    return min(LANES, _power_of_two(-(-width // columns)))


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


class Axes(NamedTuple):
    """The argument of a kernel over `strided.cuh`, its grid, and how many elements are one position."""

    words: tuple[int, ...]
    launch: Launch
    columns: int


@lru_cache(maxsize=4096)
def axes_of(target: Place, source: Place, columns: tuple[int, ...]) -> Axes:
    """The axes of a kernel that goes over two arrays of one shape, with the first of `columns` that both allow.

    The last of `columns` must be 1. Raises ArrayError if more than four axes remain once those that can be are merged.
    """
    counts, to, from_ = _merged(target, source)
    if len(counts) > 4:
        raise ArrayError(f"arrays of shape {target.shape} and strides {target.strides}, {source.strides}: more than four axes")
    pad = 4 - len(counts)
    counts, to, from_ = (1,) * pad + counts, (0,) * pad + to, (0,) * pad + from_
    flat = [place._replace(shape=counts, strides=strides) for place, strides in ((target, to), (source, from_))]
    step = next(n for n in columns if n == 1 or (counts[-1] % n == 0 and all(aligned(place, n) for place in flat)))
    counts = (*counts[:-1], counts[-1] // step)
    strides = [elements(place, (0, 1, 2, 3)) for place in flat]
    words = (*counts, *(stride for each in strides for stride in (*each[:-1], each[-1] * step)))
    return Axes(words, _axes_launch(counts), step)


def _merged(target: Place, source: Place) -> tuple[Strides, Strides, Strides]:
    """Counts and both strides in bytes, without axes of one element, neighbours merged where both arrays allow it."""
    axes: list[tuple[int, int, int]] = []
    for axis in zip(target.shape, target.strides, source.strides, strict=True):
        count, to, from_ = axis
        if count == 1:
            continue
        if axes and axes[-1][1] == to * count and axes[-1][2] == from_ * count:
            axes[-1] = (axes[-1][0] * count, to, from_)
        else:
            axes.append(axis)
    counts, to_, froms = zip(*(axes or [(1, target.itemsize, source.itemsize)]), strict=True)
    return counts, to_, froms


def _axes_launch(counts: Strides) -> Launch:
    wide = min(THREADS, _power_of_two(counts[3]))
    tall = min(THREADS // wide, _power_of_two(counts[2]))
    blocks = -(-counts[3] // wide), -(-counts[2] // tall), counts[0] * counts[1]
    x, y, z = (min(count, most) for count, most in zip(blocks, MOST_BLOCKS, strict=True))
    return Launch((x, y, z), (wide, tall, 1))

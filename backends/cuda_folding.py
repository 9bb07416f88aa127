"""Running state and partial results as kernels are told of them: ranges, strides and grids, found once per layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from ringsim.backends.cuda import DeviceArray, Launch
from ringsim.backends.cuda_strides import WIDEST, Place, aligned, dense, elements, lanes_of, place_of, rows_launch
from ringsim.dtypes import accumulator
from ringsim.errors import ArrayError
from ringsim.partials import MOST_PARTIALS

Ranges = tuple[int, int]


class State(NamedTuple):
    """Running state of some rows: acc (batch, heads, rows, width), row_max and row_sum (batch, heads, rows), of one dtype."""

    acc: DeviceArray
    row_max: DeviceArray
    row_sum: DeviceArray


class Partial(NamedTuple):
    """What one tile gives for part of a state, in ranges [begin, end) of the state's batches, heads and rows.

    out (batch, rows, heads, width), normalised, in the tiles' dtype; lse (batch, heads, rows) in the state's.
    """

    batch: Ranges
    heads: Ranges
    rows: Ranges
    out: DeviceArray
    lse: DeviceArray


class Folding(NamedTuple):
    """A kernel's struct, as 64-bit integers, and its grid."""

    words: tuple[int, ...]
    launch: Launch


class Slot(NamedTuple):
    """A partial without its memory: its ranges in the state, and where out and lse lie."""

    batch: Ranges
    heads: Ranges
    rows: Ranges
    out: Place
    lse: Place


def require_same(name: str, mine: object, other: object) -> None:
    """Raises ArrayError if two shapes differ."""
    if mine != other:
        raise ArrayError(f"{name}: arrays of {mine} and {other} do not fit")


def state_places(acc: DeviceArray, row_max: DeviceArray, row_sum: DeviceArray) -> tuple[Place, Place, Place]:
    """Where a state's arrays lie. Raises ArrayError if they are not a state."""
    places = place_of(acc), place_of(row_max), place_of(row_sum)
    if not acc.dtype == row_max.dtype == row_sum.dtype or accumulator(acc.dtype.name) != acc.dtype.name:
        raise ArrayError(f"a state is float32 or float64 throughout, not {acc.dtype}, {row_max.dtype}, {row_sum.dtype}")
    if not places[0].shape[:3] == places[1].shape == places[2].shape or not dense(places[0]):
        shapes = tuple(place.shape for place in places)
        raise ArrayError(
            f"a state has acc (batch, heads, rows, width), its last axis dense, and max and sum without it: {shapes}"
        )
    return places


def slots_of(extent: tuple[int, ...], partials: Sequence[Partial]) -> tuple[Slot, ...]:
    """The partials' places; they must lie within a state of `extent` (batch, heads, rows, width)."""
    if len(partials) > MOST_PARTIALS:
        raise ArrayError(f"{len(partials)} partial results for one launch, which folds at most {MOST_PARTIALS}")
    slots = tuple(Slot(*partial[:3], place_of(partial.out), place_of(partial.lse)) for partial in partials)
    for slot in slots:
        ranges = slot[:3]
        batch, heads, rows = (end - begin for begin, end in ranges)
        within = all(0 <= begin <= end <= count for (begin, end), count in zip(ranges, extent[:3], strict=True))
        fits = slot.out.shape == (batch, rows, heads, extent[3]) and slot.lse.shape == (batch, heads, rows) and dense(slot.out)
        if not (within and fits):
            raise ArrayError(
                f"a partial for {ranges} of a state {extent}: out {slot.out.shape} should be (batch, rows, heads, width), its "
                f"last axis dense, and lse {slot.lse.shape} (batch, heads, rows)"
            )
    return slots


def partial_dtype(partials: Sequence[Partial], dtype: str) -> str:
    """The dtype of the partials' outputs, `dtype` if there are none; their lse must be of `dtype`."""
    outs: set[str] = {partial.out.dtype.name for partial in partials} or {dtype}
    lses = {partial.lse.dtype.name for partial in partials}
    if len(outs) > 1 or not lses <= {dtype}:
        raise ArrayError(
            f"partial results of {sorted(outs)} with lse of {sorted(lses)}: one dtype of out, lse of the state's {dtype}"
        )
    return outs.pop()


def operands_of(partials: Sequence[Partial]) -> list[DeviceArray | None]:
    """The arguments of `RINGSIM_PARTIALS`; a partial without rows is a null pointer's."""
    given = [array for partial in partials for array in (partial.out, partial.lse)]
    return given + [None] * (2 * (MOST_PARTIALS - len(partials)))


_BHR: Final = (0, 1, 2)
_BHR_OF_OUT: Final = (0, 2, 1)
"""Axes (batch, heads, rows) of an array (batch, rows, heads, width)."""
_NO_STRIDES: Final = (0, 0, 0)
_NO_SLOT: Final = (0,) * 12


@lru_cache(maxsize=4096)
def folding_of(
    state: tuple[Place, Place, Place] | None, result: tuple[Place, Place] | None, fresh: bool, slots: tuple[Slot, ...]
) -> Folding:
    """The Geometry of `partials.cuh` and its grid; a fresh state need not be, and without a result the state is written."""
    extent = _extent_of(state, result)
    places = [*(state or ()), *(result or ()), *(slot.out for slot in slots)]
    wide = [place for place in places if len(place.shape) == 4]
    columns = WIDEST // (slots[0].out if slots else places[-1]).itemsize
    vectors = extent[3] % columns == 0 and all(aligned(place, columns) for place in wide)
    strides = [elements(place, _BHR) for place in state] if state else [_NO_STRIDES] * 3
    strides += [elements(result[0], _BHR_OF_OUT), elements(result[1], _BHR)] if result else [_NO_STRIDES] * 2
    words = [*extent, *(word for each in strides for word in each), int(fresh), len(slots), int(vectors)]
    for slot in slots:
        words += [*slot.batch, *slot.heads, *slot.rows, *elements(slot.out, _BHR_OF_OUT), *elements(slot.lse, _BHR)]
    words += _NO_SLOT * (MOST_PARTIALS - len(slots))
    lanes = lanes_of(extent[3], columns if vectors else 1)
    return Folding(tuple(words), rows_launch(*extent[:3], lanes))


def _extent_of(state: tuple[Place, Place, Place] | None, result: tuple[Place, Place] | None) -> tuple[int, int, int, int]:
    """(batch, heads, rows, width) of a state and of what becomes of it. Raises ArrayError if they differ."""
    if result is not None:
        batch, rows, heads, width = result[0].shape
        if result[1].shape != (batch, heads, rows) or not dense(result[0]):
            raise ArrayError(
                f"out {result[0].shape} should be (batch, rows, heads, width), its last axis dense, and lse {result[1].shape} "
                f"(batch, heads, rows)"
            )
        if state is not None:
            require_same("finish_partials", (batch, heads, rows, width), state[0].shape)
        return batch, heads, rows, width
    if state is None:
        raise ArrayError("neither a state nor a result: nothing to write")
    batch, heads, rows, width = state[0].shape
    return batch, heads, rows, width


@lru_cache(maxsize=4096)
def sides_of(places: tuple[Place, ...]) -> Folding:
    """The Sides of `state.cu` and their grid, of two states' arrays."""
    acc, acc2 = places[0], places[3]
    batch, heads, rows, width = acc.shape
    columns = WIDEST // acc.itemsize
    vectors = width % columns == 0 and aligned(acc, columns) and aligned(acc2, columns)
    strides = (word for place in places for word in elements(place, _BHR))
    lanes = lanes_of(width, columns if vectors else 1)
    return Folding((batch, heads, rows, width, *strides, int(vectors)), rows_launch(batch, heads, rows, lanes))


@lru_cache(maxsize=4096)
def across(name: str, first: Place, second: Place, delta: Place) -> Folding:
    """The Geometry of `delta.cu` and `stand_in.cu`, of two arrays (batch, rows, heads, width) and one of their rows' sums."""
    batch, rows, heads, width = first.shape
    require_same(name, first.shape, second.shape)
    require_same(name, (batch, heads, rows), delta.shape)
    if not (dense(first) and dense(second)):
        raise ArrayError(f"{name}: the last axis should be dense, found strides {first.strides} and {second.strides}")
    columns = WIDEST // first.itemsize
    vectors = width % columns == 0 and aligned(first, columns) and aligned(second, columns)
    strides = *elements(first, _BHR_OF_OUT), *elements(second, _BHR_OF_OUT), *elements(delta, _BHR)
    lanes = lanes_of(width, columns if vectors else 1)
    return Folding((batch, heads, rows, width, *strides, int(vectors)), rows_launch(batch, heads, rows, lanes))

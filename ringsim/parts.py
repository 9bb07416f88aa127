"""A tile cut down to what it sees: the rectangle that a fused kernel is given, and the band within."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .tile import Tile


class Band(NamedTuple):
    """Query i sees key j where ``lo <= distance + q_step * i - k_step * j <= hi``; None means no bound on that side."""

    distance: int
    q_step: int
    k_step: int
    lo: int | None
    hi: int | None

    def diagonals(self) -> tuple[int | None, int | None] | None:
        """The same as ``low <= i - j <= high``, where the steps are equal; else None, for no such bounds exist."""
        if self.q_step != self.k_step:
            return None
        low = None if self.lo is None else -((self.distance - self.lo) // self.q_step)
        high = None if self.hi is None else (self.hi - self.distance) // self.q_step
        return low, high


class Part(NamedTuple):
    """Rows of a tile: query rows [q_begin, q_end) and key rows [k_begin, k_end), counted from those of its regions, and the band
    between them, None if it hides nothing. Where the steps are equal, each query and each key sees something.
    """

    q_rows: tuple[int, int]
    k_rows: tuple[int, int]
    band: Band | None


@lru_cache(maxsize=4096)
def part_of(tile: Tile) -> Part | None:
    """The smallest rectangle that holds all that a tile sees, and its band; None if it sees nothing."""
    q, k = tile.q, tile.k
    if not q.count or not k.count:
        return None
    whole = Part((q.row, q.row + q.count), (k.row, k.row + k.count), None)
    if not tile.masked:
        return whole
    low, high = tile.intervals()
    seeing = (high > low).nonzero()[0]
    if not len(seeing):
        return None
    q_begin, q_end = int(seeing[0]), int(seeing[-1]) + 1
    k_begin, k_end = int(low[q_begin]), int(high[q_end - 1])
    rows = (q.row + q_begin, q.row + q_end), (k.row + k_begin, k.row + k_end)
    if low[q_end - 1] <= k_begin and high[q_begin] >= k_end:
        return Part(*rows, None)
    distance = q.start + q.step * q_begin - k.start - k.step * k_begin
    return Part(*rows, _needed(Band(distance, q.step, k.step, tile.lo, tile.hi), q_end - q_begin, k_end - k_begin))


def _needed(band: Band, queries: int, keys: int) -> Band:
    """The band without a bound that hides nothing of so many queries and keys."""
    nearest = band.distance - band.k_step * (keys - 1)
    farthest = band.distance + band.q_step * (queries - 1)
    lo = None if band.lo is not None and nearest >= band.lo else band.lo
    hi = None if band.hi is not None and farthest <= band.hi else band.hi
    return band._replace(lo=lo, hi=hi)


def parts_of(tiles: tuple[Tile, ...]) -> Iterator[tuple[Tile, Part]]:
    """The tiles that see something, each with its part."""
    for tile in tiles:
        part = part_of(tile)
        if part is not None and tile.batch[1] > tile.batch[0] and tile.heads[1] > tile.heads[0]:
            yield tile, part

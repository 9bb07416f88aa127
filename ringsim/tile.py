"""Geometry: strided runs of tokens, and tiles of the score matrix under a diagonal band."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`count` tokens at local rows ``row, row+1, ...`` whose global positions are ``start, start+step, ...``."""

    row: int
    count: int
    start: int
    step: int = 1

    @property
    def last(self) -> int:
        """Position of the last token (of a span that is not empty)."""
        return self.start + self.step * (self.count - 1)

    def part(self, begin: int, end: int) -> Span:
        """The tokens ``begin <= i < end`` of this span."""
        return Span(row=self.row + begin, count=end - begin, start=self.start + self.step * begin, step=self.step)

    def positions(self) -> IntArray:
        """Global positions, shape (count,)."""
        return self.start + self.step * np.arange(self.count, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A rectangle of (query, key) pairs for a range of sequences and query heads.

    Query at position p sees key at position j where ``lo <= p - j <= hi``; None means no bound on that side. Tiles
    describe mask and partition only: how a backend cuts one for its cache is its lowering.
    """

    batch: tuple[int, int]
    heads: tuple[int, int]
    q: Span
    k: Span
    lo: int | None = None
    hi: int | None = None

    @property
    def masked(self) -> bool:
        """Whether a band hides some pair of the rectangle (as declared, not as counted)."""
        return self.lo is not None or self.hi is not None

    def intervals(self) -> tuple[IntArray, IntArray]:
        """For each query row i the half-open range of key rows that it sees: (begin, end), each of shape (q.count,)."""
        return visible_keys(self.q, self.k, self.lo, self.hi)

    def pairs(self) -> int:
        """Visible (sequence, query head, query, key) pairs."""
        copies = (self.batch[1] - self.batch[0]) * (self.heads[1] - self.heads[0])
        if not self.masked:
            return copies * self.q.count * self.k.count
        if self.q.step == self.k.step and not (self.lo is not None and self.hi is not None and self.lo > self.hi):
            return copies * self._pairs_of_a_band()
        begin, end = self.intervals()
        return copies * int(np.maximum(end - begin, 0).sum())

    def cut_rows(self) -> int:
        """Ends of rows that the band cuts off, or just does not, where steps are equal: 2 of a row cut on both sides."""
        q, k = self.q, self.k
        distance, rows = q.start - k.start, 0
        if self.lo is not None:
            first = (distance - self.lo) // k.step + 1
            rows += max(0, min(q.count, k.count - first + 1) - max(0, 1 - first))
        if self.hi is not None:
            first = -((self.hi - distance) // k.step)
            rows += max(0, min(q.count, k.count - first) - max(0, -first))
        return rows

    def _pairs_of_a_band(self) -> int:
        """With equal steps both edges advance a key a row."""
        q, k = self.q, self.k
        distance = q.start - k.start
        seen = q.count * k.count if self.lo is None else _clipped_sum((distance - self.lo) // k.step + 1, q.count, k.count)
        return seen - (0 if self.hi is None else _clipped_sum(-((self.hi - distance) // k.step), q.count, k.count))


def _clipped_sum(first: int, count: int, most: int) -> int:
    """The sum of ``first + i``, but at least 0 and at most `most`, over ``0 <= i < count``."""
    low = min(max(-first, 0), count)
    high = min(max(most - first, low), count)
    return (high - low) * (2 * first + low + high - 1) // 2 + (count - high) * most


def visible_keys(q: Span, k: Span, lo: int | None, hi: int | None) -> tuple[IntArray, IntArray]:
    """Key rows [begin, end) of span `k` seen by each query of span `q` under the band; both never decrease with i."""
    distance = q.positions() - k.start
    begin = np.zeros(q.count, dtype=np.int64) if hi is None else -((hi - distance) // k.step)
    end = np.full(q.count, k.count, dtype=np.int64) if lo is None else (distance - lo) // k.step + 1
    return np.clip(begin, 0, k.count), np.clip(end, 0, k.count)

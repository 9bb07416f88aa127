"""What a diagonal band leaves of a pair of spans, and where positions cut a span."""

from __future__ import annotations

import numpy as np

from ..tile import IntArray, Span, visible_keys
from .protocol import Piece


def first_at(span: Span, position: int) -> int:
    """Index of the first token of `span` at `position` or later; `count` if there is none."""
    return min(span.count, max(0, -((span.start - position) // span.step)))


def trimmed(q: Span, k: Span, lo: int | None, hi: int | None) -> tuple[Piece, ...]:
    """The one piece of ``q x k`` with distances in [lo, hi], without the outer rows and keys that hold no visible pair.

    None if there is no such pair; bounds that hide nothing become None.
    """
    if not q.count or not k.count:
        return ()
    least, most = q.start - k.last, q.last - k.start
    if (lo is None or lo <= least) and (hi is None or hi >= most):
        return ((q, k, None, None),)
    if (lo is not None and lo > most) or (hi is not None and hi < least):
        return ()
    step = q.step if q.step == k.step or k.count == 1 else k.step if q.count == 1 else 0
    corners = _corners(q, k, lo, hi, step) if step else _uneven_corners(q, k, lo, hi)
    if corners is None:
        return ()
    first, end, begin, stop = corners
    q, k = q.part(first, end), k.part(begin, stop)
    low = lo if lo is not None and q.start - k.last < lo else None
    return ((q, k, low, hi if hi is not None and q.last - k.start > hi else None),)


def _corners(q: Span, k: Span, lo: int | None, hi: int | None, step: int) -> tuple[int, int, int, int] | None:
    """Rows [first, end) and keys [begin, stop) of spans of one step: distances are congruent, so count them in steps."""
    rows, keys, offset = q.count, k.count, q.start - k.start
    low = 1 - keys if lo is None else max(1 - keys, -((offset - lo) // step))
    high = rows - 1 if hi is None else min(rows - 1, (hi - offset) // step)
    if low > high:
        return None
    return max(0, low), min(rows, high + keys), max(0, -high), min(keys, rows - low)


def _uneven_corners(q: Span, k: Span, lo: int | None, hi: int | None) -> tuple[int, int, int, int] | None:
    """As `_corners`, of spans of different steps, where rows in between may see nothing: row by row, key by key."""
    begin, end = visible_keys(q, k, lo, hi)
    rows = np.flatnonzero(begin < end)
    if not len(rows):
        return None
    begin, end = visible_keys(k, q, None if hi is None else -hi, None if lo is None else -lo)
    keys = np.flatnonzero(begin < end)
    return int(rows[0]), int(rows[-1]) + 1, int(keys[0]), int(keys[-1]) + 1


def rectangles(
    q: Span, k: Span, q_cuts: IntArray, k_cuts: IntArray, seen: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
) -> tuple[Piece, ...]:
    """The unmasked pieces of a grid whose cell (i, j) spans rows ``q_cuts[i:i+2]`` and keys ``k_cuts[j:j+2]``.

    Runs of cells along a row are one piece, and so are alike rows that follow one another.
    """
    rows, keys = np.diff(q_cuts) > 0, np.diff(k_cuts) > 0
    seen, q_cuts, k_cuts = seen[rows][:, keys], np.append(q_cuts[:-1][rows], q.count), np.append(k_cuts[:-1][keys], k.count)
    if not seen.size:
        return ()
    tops = np.flatnonzero(np.append(True, (seen[1:] != seen[:-1]).any(axis=1)))
    pieces: list[Piece] = []
    for top, bottom in zip(tops, [*tops[1:], len(seen)], strict=True):
        edges = np.flatnonzero(np.diff(seen[top], prepend=False, append=False))
        if len(edges):
            part = q.part(int(q_cuts[top]), int(q_cuts[bottom]))
            pieces += [(part, k.part(int(k_cuts[a]), int(k_cuts[b])), None, None) for a, b in edges.reshape(-1, 2)]
    return tuple(pieces)

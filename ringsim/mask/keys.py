"""Masks that choose keys whatever the query: attention sinks and prefixes."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import WorkloadError
from ..tile import IntArray, Span
from .algebra import Expression
from .bands import Causal
from .geometry import first_at
from .numbers import count_of, counts_of
from .protocol import Bools, Piece


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class First(Expression):
    """Every query sees the first `count` keys from each of the positions `starts`; `count` is one for all or one for each.

    Attention sinks are ``Causal() & (First(4) | Window(1020))``; prefixes of documents are
    ``Documents(lengths) & (Causal() | First(counts, starts))``. Kept as disjoint runs in order: overlapping ones are merged.
    Raises WorkloadError. Source: StreamingLLM, arXiv 2309.17453.
    """

    count: Any
    starts: tuple[int, ...] = (0,)
    name: str = field(init=False)
    begins: tuple[int, ...] = field(init=False)
    ends: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        starts = counts_of("starts", self.starts)
        counts = self.count
        if not hasattr(counts, "__len__"):
            counts = [count_of("the count of first keys", counts)] * len(starts)
        counts = counts_of("counts of first keys", counts)
        if len(counts) != len(starts):
            raise WorkloadError(f"{len(counts)} counts of first keys for {len(starts)} starts; give one for all, or one for each")
        runs = _merged(sorted(zip(starts.tolist(), (starts + counts).tolist(), strict=True)))
        for name, values in (
            ("starts", [begin for begin, _ in runs]),
            ("begins", [begin for begin, _ in runs]),
            ("ends", [end for _, end in runs]),
            ("count", [end - begin for begin, end in runs]),
        ):
            object.__setattr__(self, name, tuple(values))
        words = [f"{end - begin}@{begin}" if begin else str(end) for begin, end in runs]
        object.__setattr__(self, "name", f"first({', '.join(words) or 0})")

    @property
    def extent(self) -> int | None:
        """Up to the last start, if that is not 0."""
        return self.begins[-1] + 1 if self.begins and self.begins[-1] else None

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One unmasked piece for each run of keys."""
        return tuple((q, k.part(begin, end), None, None) for begin, end in self._runs(k)) if q.count else ()

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The keys between them."""
        if not q.count or not k.count:
            return ()
        runs = self._runs(k)
        gaps = zip([0, *(end for _, end in runs)], [*(begin for begin, _ in runs), k.count], strict=True)
        return tuple((q, k.part(begin, end), None, None) for begin, end in gaps if begin < end)

    def _runs(self, k: Span) -> list[tuple[int, int]]:
        """Rows of the keys of each run."""
        if not k.count:
            return []
        first = bisect_right(self.ends, k.start)
        last = bisect_right(self.begins, k.last)
        runs = ((first_at(k, self.begins[index]), first_at(k, self.ends[index])) for index in range(first, last))
        return _merged(runs)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True in the columns of these keys."""
        index = np.searchsorted(np.asarray(self.begins, dtype=np.int64), k_positions, "right")
        seen = k_positions < np.asarray((np.iinfo(np.int64).min, *self.ends))[index]
        return np.broadcast_to(seen, (len(q_positions), len(k_positions)))


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PrefixLM(Expression):
    """Every query sees the first `prefix` keys and those up to itself: ``Causal() | First(prefix)``.

    Raises WorkloadError. Source: T5, arXiv 1910.10683, section 3.2.1.
    """

    prefix: int
    name: str = field(init=False)
    _union: Expression = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix", count_of("prefix", self.prefix))
        object.__setattr__(self, "name", f"prefix({self.prefix})")
        object.__setattr__(self, "_union", Causal() | First(self.prefix))

    @property
    def banded(self) -> bool:
        """Yes."""
        return True

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The prefix whole, and the causal piece of the other keys."""
        return self._union.pieces(q, k)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The keys after their query and the prefix."""
        return self._union.hidden(q, k)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True in the prefix and where the key is not after the query."""
        return self._union.visible(q_positions, k_positions)


def _merged(runs: Any) -> list[tuple[int, int]]:
    """Sorted half-open runs without the empty ones, and with those that meet or overlap as one."""
    found: list[tuple[int, int]] = []
    for begin, end in runs:
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found

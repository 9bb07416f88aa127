"""Packed documents: several sequences in one, each of which sees itself alone."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import WorkloadError
from ..tile import IntArray, Span
from .algebra import Expression
from .geometry import first_at
from .numbers import MOST, counts_of
from .protocol import Bools, Piece


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Documents(Expression):
    """Documents of `lengths` tokens that follow one another from position 0; a query sees the keys of its own document.

    Tokens outside all documents (before position 0, beyond the last) see nothing and are seen by nothing. Documents without
    a token are left out. Raises WorkloadError. Source: Llama 3, arXiv 2407.21783, section 3.2 (with ``Causal() &``).
    """

    lengths: tuple[int, ...]
    name: str = field(init=False)
    bounds: tuple[int, ...] = field(init=False)
    """Where each document begins, and where the last ends."""

    def __post_init__(self) -> None:
        lengths = counts_of("lengths of documents", self.lengths)
        lengths = lengths[lengths > 0]
        if len(lengths) and int(lengths.max()) * len(lengths) > MOST and sum(lengths.tolist()) > MOST:
            raise WorkloadError(f"documents hold {sum(lengths.tolist())} tokens; at most {MOST} are allowed")
        object.__setattr__(self, "lengths", tuple(lengths.tolist()))
        object.__setattr__(self, "bounds", (0, *np.cumsum(lengths).tolist()))
        object.__setattr__(self, "name", f"documents({', '.join(map(_run, groupby(self.lengths)))})")

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any) -> Documents:
        """From cumulative lengths, the first 0 (flash-attention's ``cu_seqlens``). Raises WorkloadError."""
        bounds = counts_of("cu_seqlens", cu_seqlens)
        if not len(bounds) or bounds[0] != 0:
            first = f"begin with {bounds[0]}" if len(bounds) else "are empty"
            raise WorkloadError(f"cu_seqlens {first}; the first must be 0, the last the number of tokens")
        falls = np.flatnonzero(np.diff(bounds) < 0)
        if len(falls):
            at = int(falls[0])
            raise WorkloadError(
                f"cu_seqlens fall from {bounds[at]} to {bounds[at + 1]} (at index {at + 1}); they must not decrease"
            )
        return cls(tuple(np.diff(bounds).tolist()))

    @property
    def extent(self) -> int:
        """Tokens of all documents."""
        return self.bounds[-1]

    def within(self, positions: Any) -> IntArray:
        """Positions of tokens inside their own documents, of the shape of `positions`: what rotary embeddings need.

        Tokens beyond the last document count from its end.
        """
        found = np.asarray(positions, dtype=np.int64)
        bounds = np.asarray(self.bounds)
        return np.asarray(found - bounds[np.maximum(np.searchsorted(bounds, found, "right") - 1, 0)])

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One unmasked piece for each document with a token on both sides."""
        return tuple((q.part(*rows), k.part(*keys), None, None) for rows, keys in self._squares(q, k))

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The keys before and after each such document, and the queries between them whole."""
        if not q.count or not k.count:
            return ()
        found: list[Piece] = []
        done = 0
        for (first, end), (begin, stop) in self._squares(q, k):
            parts = (((done, first), (0, k.count)), ((first, end), (0, begin)), ((first, end), (stop, k.count)))
            found += [
                (q.part(*rows), k.part(*keys), None, None) for rows, keys in parts if rows[0] < rows[1] and keys[0] < keys[1]
            ]
            done = end
        return (*found, (q.part(done, q.count), k, None, None)) if done < q.count else tuple(found)

    def _squares(self, q: Span, k: Span) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Rows and keys of each document that has both."""
        if not q.count or not k.count:
            return
        first = max(0, bisect_right(self.bounds, max(q.start, k.start)) - 1)
        last = min(len(self.lengths), bisect_right(self.bounds, min(q.last, k.last)))
        for index in range(first, last):
            begin, end = self.bounds[index], self.bounds[index + 1]
            rows = first_at(q, begin), first_at(q, end)
            if rows[0] < rows[1]:
                keys = first_at(k, begin), first_at(k, end)
                if keys[0] < keys[1]:
                    yield rows, keys

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where both are tokens of one document."""
        bounds = np.asarray(self.bounds)
        q_document, k_document = (np.searchsorted(bounds, side, "right") for side in (q_positions, k_positions))
        inside = (q_document > 0) & (q_document < len(bounds))
        seen: Bools = (q_document[:, None] == k_document[None, :]) & inside[:, None]
        return seen


def _run(group: tuple[int, Iterable[int]]) -> str:
    length, alike = group
    count = sum(1 for _ in alike)
    return f"{count}x{length}" if count > 1 else str(length)

"""Masks: which query sees which key, and the tiles that this leaves of a pair of spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from .errors import WorkloadError
from .tile import IntArray, Span

Piece = tuple[Span, Span, int | None, int | None]
"""A query span, a key span, and the band (lo, hi) that remains between them."""


class Mask(Protocol):
    """What a schedule asks of a mask. Implementations are immutable and hashable."""

    @property
    def name(self) -> str:
        """The mask as text, unique for its parameters."""

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The pieces of ``q x k`` that hold a visible pair, trimmed to it; none if the mask hides all."""

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> npt.NDArray[np.bool_]:
        """The dense mask, shape (len(q_positions), len(k_positions)); for references and small checks."""


@dataclass(frozen=True, slots=True)
class Full:
    """Every query sees every key."""

    name: ClassVar[str] = "full"

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One unmasked piece, unless a side is empty."""
        return ((q, k, None, None),) if q.count and k.count else ()

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> npt.NDArray[np.bool_]:
        """All True."""
        return np.ones((len(q_positions), len(k_positions)), dtype=np.bool_)


@dataclass(frozen=True, slots=True)
class Causal:
    """A query at position p sees the keys at positions <= p."""

    name: ClassVar[str] = "causal"

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One piece without the queries that see nothing and the keys that nothing sees; unmasked where it can be."""
        if not q.count or not k.count:
            return ()
        first_query = max(0, -((q.start - k.start) // q.step))
        end_key = min(k.count, (q.last - k.start) // k.step + 1)
        if first_query >= q.count or end_key <= 0:
            return ()
        q, k = q.part(first_query, q.count), k.part(0, end_key)
        return ((q, k, None if q.start >= k.last else 0, None),)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> npt.NDArray[np.bool_]:
        """True where the key is not after the query."""
        return np.asarray(q_positions[:, None] >= k_positions[None, :])


MASKS: dict[str, Mask] = {"full": Full(), "causal": Causal()}


def mask_named(name: str) -> Mask:
    """The mask called `name`. Raises WorkloadError for an unknown one."""
    try:
        return MASKS[name]
    except KeyError:
        raise WorkloadError(f"unknown mask {name!r}; known: {', '.join(MASKS)}") from None

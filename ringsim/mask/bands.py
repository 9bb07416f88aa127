"""Masks that compare the distance between query and key: causal ones and windows."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..tile import IntArray, Span
from .algebra import Expression
from .geometry import trimmed
from .numbers import optional_count
from .protocol import Bools, Piece


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Causal(Expression):
    """A query at position p sees the keys at positions <= p."""

    name: str = field(default="causal", init=False)

    @property
    def banded(self) -> bool:
        """Yes."""
        return True

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One piece without the queries that see nothing and the keys that nothing sees; unmasked where it can be."""
        return trimmed(q, k, 0, None)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The keys after their query."""
        return trimmed(q, k, None, -1)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where the key is not after the query."""
        seen: Bools = q_positions[:, None] >= k_positions[None, :]
        return seen


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Window(Expression):
    """A query at position p sees the keys at positions p - left to p + right; None is no bound on that side.

    The counts are flash-attention's ``window_size=(left, right)`` with None for its -1: a query sees left + 1 + right keys
    at most. ``Window(left)`` bounds the left alone; ``Window(left, 0)`` is the causal sliding window. Raises WorkloadError.
    Source: Longformer, arXiv 2004.05150; Mistral, arXiv 2310.06825, whose window W is ``Window(W - 1, 0)``.
    """

    left: int | None
    right: int | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        for side in ("left", "right"):
            object.__setattr__(self, side, optional_count(f"{side} of a window", getattr(self, side)))
        words = [] if self.left is None else [str(self.left)]
        if self.right is not None:
            words.append(str(self.right) if words else f"right={self.right}")
        object.__setattr__(self, "name", f"window({', '.join(words)})")

    @property
    def banded(self) -> bool:
        """Yes."""
        return True

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """At most one, with a band of two bounds."""
        return trimmed(q, k, None if self.right is None else -self.right, self.left)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The keys before the window, and those after it."""
        before = () if self.left is None else trimmed(q, k, self.left + 1, None)
        return before if self.right is None else before + trimmed(q, k, None, -self.right - 1)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True inside the window."""
        distance = q_positions[:, None] - k_positions[None, :]
        least = distance.min(initial=0) if self.right is None else -self.right
        seen: Bools = distance >= least
        return seen if self.left is None else seen & (distance <= self.left)

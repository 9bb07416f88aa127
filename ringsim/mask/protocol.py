"""What a schedule asks of a mask."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..tile import IntArray, Span

Bools = npt.NDArray[np.bool_]
Piece = tuple[Span, Span, int | None, int | None]
"""A query span, a key span, and the band (lo, hi) that remains between them."""


class Mask(Protocol):
    """Which query sees which key, by their positions. Implementations are immutable and hashable."""

    @property
    def name(self) -> str:
        """The mask as text, unique for its parameters; `mask_named` reads it."""

    @property
    def extent(self) -> int | None:
        """Tokens of the shortest sequence in which all of the mask has a meaning; None: of any."""

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """Disjoint pieces of ``q x k`` that hold all visible pairs, each trimmed to them; none if the mask hides all."""

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """The dense mask, shape (len(q_positions), len(k_positions)); for references and small checks."""

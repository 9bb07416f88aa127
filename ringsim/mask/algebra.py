"""Masks made of masks: ``a & b``, ``a | b`` and ``~a``, each as the disjoint pieces of one within those of another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..errors import WorkloadError
from ..tile import IntArray, Span
from .geometry import trimmed
from .protocol import Bools, Mask, Piece

Cut = Callable[[Span, Span], tuple[Piece, ...]]
"""From a pair of spans to the pieces of it that a mask shows, or those that it hides."""


class Expression:
    """A mask that composes by ``&``, ``|`` and ``~``. Two are equal where their names are."""

    __slots__ = ()
    name: Any

    @property
    def extent(self) -> int | None:
        """As in Mask: of any length, unless a mask says otherwise."""
        return None

    @property
    def banded(self) -> bool:
        """Whether pieces follow diagonals; in a union the others, whose pieces are seen whole, go first."""
        return False

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """As in Mask."""
        raise NotImplementedError

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The pieces of the complement, by the same rules."""
        raise NotImplementedError

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """As in Mask."""
        raise NotImplementedError

    def __and__(self, other: Expression) -> Expression:
        return both(self, other) if isinstance(other, Expression) else NotImplemented

    def __or__(self, other: Expression) -> Expression:
        return either(self, other) if isinstance(other, Expression) else NotImplemented

    def __invert__(self) -> Expression:
        return self.mask if isinstance(self, Not) else Not(self)

    def __eq__(self, other: object) -> bool:
        return self.name == other.name if isinstance(other, Expression) else NotImplemented

    def __hash__(self) -> int:
        # a string remembers its hash, and schedules hash their mask at every look-up of a tile
        return hash(self.name)

    def __repr__(self) -> str:
        return f"mask_named({self.name!r})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Full(Expression):
    """Every query sees every key."""

    name: str = field(default="full", init=False)

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """One unmasked piece, unless a side is empty."""
        return ((q, k, None, None),) if q.count and k.count else ()

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """None."""
        return ()

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """All True."""
        return np.ones((len(q_positions), len(k_positions)), dtype=np.bool_)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class _Several(Expression):
    """What `And` and `Or` have in common."""

    sign: ClassVar[str]
    masks: tuple[Expression, ...]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _joined(f" {self.sign} ", self.masks))

    @property
    def extent(self) -> int | None:
        """The longest of theirs."""
        return _longest(self.masks)

    @property
    def banded(self) -> bool:
        """Whether one is."""
        return any(mask.banded for mask in self.masks)


class And(_Several):
    """Seen where every one of `masks` sees; `both` makes it."""

    __slots__ = ()
    sign = "&"

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """The pieces of each within those of the ones before."""
        return _meet([mask.pieces for mask in self.masks], q, k)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """What each hides of what the ones before show."""
        return _join([(mask.hidden, mask.pieces) for mask in _rectangles_first(self.masks)], q, k)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where all are."""
        seen = self.masks[0].visible(q_positions, k_positions)
        for mask in self.masks[1:]:
            seen = seen & mask.visible(q_positions, k_positions)
        return seen


class Or(_Several):
    """Seen where one of `masks` sees; `either` makes it."""

    __slots__ = ()
    sign = "|"

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """What each shows of what the ones before hide."""
        return _join([(mask.pieces, mask.hidden) for mask in _rectangles_first(self.masks)], q, k)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """What each hides within what the ones before hide."""
        return _meet([mask.hidden for mask in self.masks], q, k)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where one is."""
        seen = self.masks[0].visible(q_positions, k_positions)
        for mask in self.masks[1:]:
            seen = seen | mask.visible(q_positions, k_positions)
        return seen


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Not(Expression):
    """Seen where `mask` hides; ``~mask`` makes it."""

    mask: Expression
    name: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"~{_term(self.mask)}")

    @property
    def extent(self) -> int | None:
        """That of the mask."""
        return self.mask.extent

    @property
    def banded(self) -> bool:
        """Whether the mask is."""
        return self.mask.banded

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """What the mask hides."""
        return self.mask.hidden(q, k)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """What the mask shows."""
        return self.mask.pieces(q, k)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where the mask is False."""
        return ~self.mask.visible(q_positions, k_positions)


def both(*masks: Mask) -> Expression:
    """The mask that sees what all of `masks` see; without any, full. Raises WorkloadError for what does not compose."""
    terms = _terms(And, masks)
    found = [mask for mask in terms if not isinstance(mask, Full)]
    return And(tuple(found)) if len(found) > 1 else found[0] if found else Full()


def either(*masks: Mask) -> Expression:
    """The mask that sees what one of `masks` sees; without any, nothing. Raises WorkloadError for what does not compose."""
    found = _terms(Or, masks)
    if any(isinstance(mask, Full) for mask in found):
        return Full()
    return Or(tuple(found)) if len(found) > 1 else found[0] if found else Not(Full())


def _terms(kind: type[And] | type[Or], masks: Iterable[Mask]) -> list[Expression]:
    """The terms of all, each once, the short names first: in whichever order they were given, the mask is the same."""
    found: dict[str, Expression] = {}
    for mask in masks:
        if not isinstance(mask, Expression):
            raise WorkloadError(f"{mask!r} does not compose; give masks of ringsim.mask, or one that has hidden(q, k)")
        found.update({term.name: term for term in (mask.masks if isinstance(mask, kind) else (mask,))})
    return sorted(found.values(), key=lambda mask: (len(mask.name), mask.name))


def _rectangles_first(masks: tuple[Expression, ...]) -> list[Expression]:
    return sorted(masks, key=lambda mask: mask.banded)


def _meet(cuts: Iterable[Cut], q: Span, k: Span) -> tuple[Piece, ...]:
    """What is left when each cut is made of what the cuts before it have left."""
    left: tuple[Piece, ...] = ((q, k, None, None),) if q.count and k.count else ()
    for cut in cuts:
        left = _within(left, cut)
    return left


def _join(cuts: Iterable[tuple[Cut, Cut]], q: Span, k: Span) -> tuple[Piece, ...]:
    """What each cut takes from the rest that the cuts before it have left; a cut comes with the one for its rest."""
    rest: tuple[Piece, ...] = ((q, k, None, None),) if q.count and k.count else ()
    taken: list[Piece] = []
    for cut, remainder in cuts:
        taken += _within(rest, cut)
        rest = _within(rest, remainder)
    return tuple(taken)


def _within(pieces: tuple[Piece, ...], cut: Cut) -> tuple[Piece, ...]:
    found: list[Piece] = []
    for q, k, lo, hi in pieces:
        for q_part, k_part, low, high in cut(q, k):
            if lo is None and hi is None:
                found.append((q_part, k_part, low, high))
            else:
                found += trimmed(q_part, k_part, _tighter(max, lo, low), _tighter(min, hi, high))
    return tuple(found)


def _tighter(choose: Callable[[int, int], int], bound: int | None, other: int | None) -> int | None:
    return other if bound is None else bound if other is None else choose(bound, other)


def _term(mask: Expression) -> str:
    return f"({mask.name})" if isinstance(mask, And | Or) else str(mask.name)


def _joined(sign: str, masks: tuple[Expression, ...]) -> str:
    return sign.join(map(_term, masks))


def _longest(masks: tuple[Expression, ...]) -> int | None:
    return max((mask.extent for mask in masks if mask.extent is not None), default=None)

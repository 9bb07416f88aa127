"""Block-sparse masks: any map of blocks, drawn by the user."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ..errors import WorkloadError
from ..tile import IntArray, Span
from .algebra import Expression
from .geometry import rectangles
from .numbers import count_of
from .protocol import Bools, Piece

MOST_BLOCKS: Final = 2**28


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockSparse(Expression):
    """A query at position p sees the key at position j where ``blocks[p // q_block, j // k_block]`` is True.

    `blocks` is a 2-D array of bool, copied; beyond it nothing is seen. Raises WorkloadError. Source: Sparse Transformers,
    arXiv 1904.10509.
    """

    blocks: Any
    q_block: int
    k_block: int
    name: str = field(init=False)

    def __post_init__(self) -> None:
        for side in ("q_block", "k_block"):
            object.__setattr__(self, side, count_of(side, getattr(self, side)))
            if getattr(self, side) < 1:
                raise WorkloadError(f"{side} is 0; a block has one token or more")
        blocks = np.array(self.blocks, dtype=None)
        if blocks.ndim != 2 or (blocks.size and blocks.dtype != np.bool_):
            raise WorkloadError(f"the blocks are {blocks.dtype.name}{blocks.shape}; give a 2-D array of bool")
        for size, count in zip((self.q_block, self.k_block), blocks.shape, strict=True):
            count_of("the number of tokens that the blocks cover", size * count)
        if blocks.size > MOST_BLOCKS:
            raise WorkloadError(f"{blocks.shape[0]} x {blocks.shape[1]} blocks; at most {MOST_BLOCKS} are allowed")
        blocks = blocks.astype(np.bool_)
        blocks.flags.writeable = False
        object.__setattr__(self, "blocks", blocks)
        shape = "x".join(map(str, blocks.shape))
        object.__setattr__(self, "name", f"blocks({self.q_block}, {self.k_block}, {shape}, {_packed(blocks)})")

    @classmethod
    def unpacked(cls, q_block: int, k_block: int, shape: tuple[int, int], packed: str) -> BlockSparse:
        """From the parts of a name. Raises WorkloadError if they are not those of one."""
        try:
            runs = _runs(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)))
        except (binascii.Error, ValueError):
            runs = None
        if runs is None or shape[0] * shape[1] > MOST_BLOCKS or sum(runs.tolist()) != shape[0] * shape[1]:
            raise WorkloadError(f"the packed map is not that of {shape[0]} x {shape[1]} blocks; copy the name of a BlockSparse")
        blocks = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape)
        return cls(blocks, q_block, k_block)

    @property
    def extent(self) -> int | None:
        """Up to the first token of the last block."""
        last = ((count - 1) * size + 1 for count, size in zip(self.blocks.shape, (self.q_block, self.k_block), strict=True))
        return max(last) if self.blocks.size else None

    def pieces(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """Unmasked: runs of blocks along a row, and alike rows, are one piece."""
        return self._rectangles(q, k, shown=True)

    def hidden(self, q: Span, k: Span) -> tuple[Piece, ...]:
        """As `pieces`, of the other blocks and of what lies beyond the map."""
        return self._rectangles(q, k, shown=False)

    def _rectangles(self, q: Span, k: Span, *, shown: bool) -> tuple[Piece, ...]:
        if not q.count or not k.count:
            return ()
        (rows, q_cuts), (columns, k_cuts) = (
            _cells(span, size, count)
            for span, size, count in zip((q, k), (self.q_block, self.k_block), self.blocks.shape, strict=True)
        )
        return rectangles(q, k, q_cuts, k_cuts, _taken(self.blocks, rows, columns) == shown)

    def visible(self, q_positions: IntArray, k_positions: IntArray) -> Bools:
        """True where the map is."""
        return _taken(self.blocks, q_positions // self.q_block, k_positions // self.k_block)


def _taken(blocks: Bools, rows: IntArray, columns: IntArray) -> Bools:
    """``blocks[rows][:, columns]``; False outside."""
    inside = [(index >= 0) & (index < count) for index, count in zip((rows, columns), blocks.shape, strict=True)]
    seen = np.zeros((len(rows), len(columns)), dtype=np.bool_)
    seen[np.ix_(*inside)] = blocks[np.ix_(rows[inside[0]], columns[inside[1]])]
    return seen


def _cells(span: Span, size: int, count: int) -> tuple[IntArray, IntArray]:
    """The blocks that a span crosses, those before and beyond the map as one each, and where they cut it."""
    first, last = (min(max(position // size, -1), count) for position in (span.start, span.last))
    blocks = np.arange(first, last + 1)
    cuts = np.clip(-((span.start - blocks[1:] * size) // span.step), 0, span.count)
    return blocks, np.concatenate([[0], cuts, [span.count]])


def _packed(blocks: Bools) -> str:
    """The lengths of the runs of hidden, shown, hidden, ... blocks, row after row, as LEB128 in base64: alike on any machine."""
    edges = np.flatnonzero(np.diff(blocks.ravel(), prepend=False))
    runs = np.diff(edges, prepend=0, append=blocks.size)
    widths = np.searchsorted([2**7, 2**14, 2**21, 2**28], runs, "right") + 1
    places = np.cumsum(widths) - widths
    code = np.zeros(int(widths.sum()), np.uint8)
    for digit in range(int(widths.max())):
        some = widths > digit
        code[places[some] + digit] = (runs[some] >> 7 * digit & 127) | (128 * (widths[some] > digit + 1))
    return base64.urlsafe_b64encode(code.tobytes()).decode().rstrip("=")


def _runs(code: bytes) -> IntArray:
    """The lengths that `_packed` wrote. Raises ValueError."""
    digits = np.frombuffer(code, np.uint8).astype(np.int64)
    ends = np.flatnonzero(digits < 128)
    if not len(ends) or ends[-1] != len(digits) - 1 or np.diff(ends, prepend=-1).max() > 5:
        raise ValueError("no runs")
    begins = np.append(0, ends[:-1] + 1)
    places = np.arange(len(digits)) - np.repeat(begins, np.diff(ends, prepend=-1))
    return np.add.reduceat((digits & 127) << 7 * places, begins)

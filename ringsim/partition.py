"""Partitions: which tokens each rank holds, and in which order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from .errors import WorkloadError
from .tile import IntArray, Span

KINDS: Final = ("contiguous", "striped", "zigzag")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A split of `length` tokens over `world_size` ranks; any length, down to ranks without a token.

    contiguous: rank r holds one run of tokens; sizes differ by at most one, the longer runs first.
    striped: rank r holds tokens r, r + P, r + 2P, ... (Striped Attention, arXiv 2311.09431).
    zigzag: 2P runs; rank r holds runs r and 2P-1-r, so that causal work is even (as in Llama 3, arXiv 2407.21783, 3.3.2).
    """

    kind: str
    length: int
    world_size: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise WorkloadError(f"unknown partition {self.kind!r}; known: {', '.join(KINDS)}")
        if self.length < 0 or self.world_size < 1:
            raise WorkloadError(f"a partition needs length >= 0 and world_size >= 1, not {self.length} and {self.world_size}")

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The runs of tokens that `rank` holds, in the order of its local rows; empty runs are left out."""
        if not 0 <= rank < self.world_size:
            raise WorkloadError(f"rank {rank} is outside a world of {self.world_size}")
        return _spans(self, rank)

    def _spans(self, rank: int) -> tuple[Span, ...]:
        if self.kind == "striped":
            count = len(range(rank, self.length, self.world_size))
            return (Span(row=0, count=count, start=rank, step=self.world_size),) if count else ()
        runs = (rank,) if self.kind == "contiguous" else (rank, 2 * self.world_size - 1 - rank)
        return self._runs(runs, self.world_size * len(runs))

    def _runs(self, which: tuple[int, ...], parts: int) -> tuple[Span, ...]:
        share, longer = divmod(self.length, parts)
        spans: list[Span] = []
        row = 0
        for run in which:
            count = share + (run < longer)
            if count:
                spans.append(Span(row=row, count=count, start=run * share + min(run, longer)))
            row += count
        return tuple(spans)

    def count(self, rank: int) -> int:
        """Tokens that `rank` holds."""
        return sum(span.count for span in self.spans(rank))

    def positions(self, rank: int) -> IntArray:
        """Global positions of the rank's tokens, in local order, shape (count,); rotary embeddings need them."""
        spans = self.spans(rank)
        return np.concatenate([span.positions() for span in spans]) if spans else np.empty(0, dtype=np.int64)


@lru_cache(maxsize=8192)
def _spans(partition: Partition, rank: int) -> tuple[Span, ...]:
    return partition._spans(rank)

"""Partitions: which tokens each rank holds, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import groupby
from math import gcd, lcm
from typing import Final

import numpy as np

from .calls import Call, parse_call
from .errors import WorkloadError
from .tile import IntArray, Span

KINDS: Final = ("contiguous", "striped", "zigzag")
"""Those that any length and world size can have without further arguments."""
FORMS: Final = "contiguous, striped, zigzag, contiguous(weights), zigzag(weights), runs(owner:count,...), balanced"
WEIGHTED: Final = ("contiguous", "zigzag")

Runs = tuple[tuple[int, int], ...]
"""(owner, tokens) in the order of the sequence."""

_WEIGHT: Final = re.compile(r"\d{1,18}(\.\d{1,18})?")
_RUN: Final = re.compile(r"(\d{1,18})\s*:\s*(\d{1,18})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A split of `length` tokens over `world_size` ranks; any length, down to ranks without a token.

    contiguous: rank r holds one run of tokens; sizes differ by at most one, the longer runs first.
    striped: rank r holds tokens r, r + P, r + 2P, ... (Striped Attention, arXiv 2311.09431).
    zigzag: 2P runs; rank r holds runs r and 2P-1-r, so that causal work is even (as in Llama 3, arXiv 2407.21783, 3.3.2).
    contiguous(3,1,...), zigzag(3,1,...): each run's length in proportion to its rank's weight, a number >= 0, to within a token.
    runs(0:5,1:3,...): the sequence cut into runs, each with its owner and its tokens.

    `kind` is kept in a canonical form: equal arguments, equal text. Raises WorkloadError. (``balanced`` looks at the workload:
    see `ringsim.balance`.)
    """

    kind: str
    length: int
    world_size: int

    def __post_init__(self) -> None:
        if self.length < 0 or self.world_size < 1:
            raise WorkloadError(f"a partition needs length >= 0 and world_size >= 1, not {self.length} and {self.world_size}")
        if self.kind not in KINDS:
            object.__setattr__(self, "kind", _read(self.kind, self.length, self.world_size)[0])

    def spans(self, rank: int) -> tuple[Span, ...]:
        """The runs of tokens that `rank` holds, in the order of its local rows; empty runs are left out."""
        if not 0 <= rank < self.world_size:
            raise WorkloadError(f"rank {rank} is outside a world of {self.world_size}")
        return _spans(self, rank)[0]

    def _spans(self, rank: int) -> tuple[Span, ...]:
        if self.kind not in KINDS:
            return _table(self).get(rank, ())
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
        if not 0 <= rank < self.world_size:
            raise WorkloadError(f"rank {rank} is outside a world of {self.world_size}")
        return _spans(self, rank)[1]

    @property
    def everyone(self) -> bool:
        """Whether every rank holds a token."""
        if self.kind in KINDS:
            return self.length >= self.world_size
        return all(self.count(rank) for rank in range(self.world_size))

    def positions(self, rank: int) -> IntArray:
        """Global positions of the rank's tokens, in local order, shape (count,); rotary embeddings need them."""
        spans = self.spans(rank)
        return np.concatenate([span.positions() for span in spans]) if spans else np.empty(0, dtype=np.int64)


def runs_text(runs: Iterable[tuple[int, int]]) -> str:
    """The partition of these (owner, tokens), in the order of the sequence, as text; neighbours of one owner become one run."""
    return f"runs({','.join(f'{owner}:{count}' for owner, count in _merged(runs))})"


def apportion(length: int, weights: Sequence[int]) -> list[int]:
    """`length` tokens in proportion to the weights, each rounded down or up: largest remainder, the first where they tie."""
    total = sum(weights)
    shares = [weight * length // total for weight in weights]
    remainders = sorted(range(len(weights)), key=lambda index: (-(weights[index] * length % total), index))
    for index in remainders[: length - sum(shares)]:
        shares[index] += 1
    return shares


@lru_cache(maxsize=8192)
def _spans(partition: Partition, rank: int) -> tuple[tuple[Span, ...], int]:
    spans = partition._spans(rank)
    return spans, sum(span.count for span in spans)


@lru_cache(maxsize=256)
def _table(partition: Partition) -> dict[int, tuple[Span, ...]]:
    """The spans of every rank that has any."""
    spans: dict[int, list[Span]] = {}
    start = 0
    for owner, count in _read(partition.kind, partition.length, partition.world_size)[1]:
        mine = spans.setdefault(owner, [])
        mine.append(Span(row=mine[-1].row + mine[-1].count if mine else 0, count=count, start=start))
        start += count
    return {owner: tuple(mine) for owner, mine in spans.items()}


@lru_cache(maxsize=1024)
def _read(kind: str, length: int, world_size: int) -> tuple[str, Runs]:
    """The canonical text of a partition with arguments, and its runs (none where the text is of KINDS)."""
    if not isinstance(kind, str):
        raise WorkloadError(f"unknown partition {kind!r}; known: {FORMS}")
    call = parse_call(kind, "partition")
    if call.name == "balanced":
        raise WorkloadError(
            f"partition {kind!r} depends on the mask: ask ringsim.balance.partitions({kind!r}, workload, {world_size}) for it"
        )
    if call.name not in (*KINDS, "runs"):
        raise WorkloadError(f"unknown partition {kind!r}; known: {FORMS}")
    if call.name == "runs":
        return _explicit(kind, call, length, world_size)
    if not call.args and not call.named:
        return call.name, ()
    if call.name not in WEIGHTED or call.named:
        raise WorkloadError(f"partition {kind!r}: {call.name} takes no such arguments; known: {FORMS}")
    return _weighted(kind, call, length, world_size)


def _weighted(kind: str, call: Call, length: int, world_size: int) -> tuple[str, Runs]:
    numbers = [Fraction(word) for word in call.args if _WEIGHT.fullmatch(word)]
    if len(numbers) != len(call.args) or len(numbers) != world_size or not any(numbers):
        example = f"{call.name}({','.join(['2', *['1'] * (min(world_size, 4) - 1)])}{',...' if world_size > 4 else ''})"
        raise WorkloadError(
            f"partition {kind!r}: give one weight for each of {world_size} ranks, numbers such as 3 or 0.25, not all 0: {example}"
        )
    common = lcm(*(number.denominator for number in numbers))
    whole = [int(number * common) for number in numbers]
    weights = [weight // gcd(*whole) for weight in whole]
    if len(set(weights)) == 1:
        return call.name, ()
    owners = list(range(world_size))
    if call.name == "zigzag":
        owners += owners[::-1]
    shares = apportion(length, [weights[owner] for owner in owners])
    return f"{call.name}({','.join(map(str, weights))})", _merged(zip(owners, shares, strict=True))


def _explicit(kind: str, call: Call, length: int, world_size: int) -> tuple[str, Runs]:
    matches = [match for word in call.args if (match := _RUN.fullmatch(word))]
    if len(matches) != len(call.args) or call.named:
        raise WorkloadError(
            f"partition {_short(kind)!r}: give owner:tokens for each run in order, as in runs(0:512,1:1024,0:512)"
        )
    runs = _merged((int(match[1]), int(match[2])) for match in matches)
    strangers = [owner for owner, _ in runs if owner >= world_size]
    if strangers:
        raise WorkloadError(
            f"partition {_short(kind)!r}: owner {strangers[0]} is outside a world of {world_size}; allowed: 0 to {world_size - 1}"
        )
    total = sum(count for _, count in runs)
    if total != length:
        raise WorkloadError(
            f"partition {_short(kind)!r} holds {total} tokens, the sequence {length}: its counts must sum to that"
        )
    return runs_text(runs), runs


def _merged(runs: Iterable[tuple[int, int]]) -> Runs:
    """Without empty runs, and neighbours of one owner as one."""
    held = [(owner, count) for owner, count in runs if count]
    return tuple((owner, sum(count for _, count in some)) for owner, some in groupby(held, key=lambda run: run[0]))


def _short(kind: str) -> str:
    return kind if len(kind) <= 80 else f"{kind[:60]}...{kind[-15:]}"

"""What a strategy is told: the workload, who holds which tokens, and the tiles between any two blocks of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

from ..dtypes import accumulator
from ..errors import ScheduleError
from ..partition import Partition
from ..tile import Span, Tile
from ..workload import Workload
from .ops import Box, Region

MOST_KEPT: Final = 2**18
"""Tiles and regions that a job remembers: some 100 MB."""
_VALUE: Final = re.compile(r"(\w+)\[(\d+)(?:\|(\d+):(\d+)\|(\d+):(\d+))?\]")
OF_KEYS: Final = frozenset({"k", "v", "dk", "dv", "dk_sum", "dv_sum"})
"""Names whose rows are those of keys; all others' are those of queries."""
OF_ROWS: Final = frozenset({"lse", "delta"})
"""Names that have a number a row and head, in the dtype of partials: (batch, heads, rows)."""
OF_VALUES: Final = frozenset({"v", "out", "dout", "dv"})
"""Names that are as wide as values; all others are as wide as queries."""
GIVEN: Final = {
    "forward": ("q", "k", "v"),
    "backward": ("q", "k", "v", "out", "lse", "dout"),
    "both": ("q", "k", "v", "dout"),
}
"""What the caller of a pass fills: slot 0 of these."""
TAKEN: Final = {"forward": ("out",), "backward": ("dq", "dk", "dv"), "both": ("out", "dq", "dk", "dv")}
"""What the caller gets back: slot 0 of these are its arrays as well."""
Made = TypeVar("Made")


class Block(NamedTuple):
    """A part of the tokens that `rank` holds: its local rows, half-open, and key/value heads with their query heads."""

    rank: int
    rows: tuple[int, int]
    heads: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Rows."""
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A workload on `world_size` ranks; queries and keys are split by the same kind of partition.

    Blocks of queries and of keys and values are named by the rank at home there; `remember` keeps what is costly to find.
    """

    workload: Workload
    q_partition: Partition
    kv_partition: Partition
    sync: str = "free"
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    _kept_tiles: list[int] = field(default_factory=lambda: [0], init=False, repr=False)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.q_partition.world_size

    def remember(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` returned for this key, made once for all ranks: lanes and the like."""
        found: Made | None = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def _recall(self, key: Any, make: Callable[[], Made]) -> Made:
        """The same for what there is much of: the older half is made again where very much is kept."""
        kept: dict[Any, Any] = self._kept
        found: Made | None = kept.get(key)
        if found is None:
            found = kept[key] = make()
            self._kept_tiles[0] += len(found) if isinstance(found, tuple) else 1
            if self._kept_tiles[0] > MOST_KEPT:
                for old in tuple(islice(kept, len(kept) // 2)):
                    del kept[old]
                self._kept_tiles[0] //= 2
        return found

    def q_block(self, rank: int) -> Block:
        """All queries of `rank`."""
        return self._recall(("q", rank), lambda: Block(rank, (0, self.q_partition.count(rank)), (0, self.workload.kv_heads)))

    def kv_block(self, rank: int) -> Block:
        """All keys and values of `rank`."""
        return self._recall(("kv", rank), lambda: Block(rank, (0, self.kv_partition.count(rank)), (0, self.workload.kv_heads)))

    def tiles(self, q: Block, kv: Block) -> tuple[Tile, ...]:
        """The tiles between two blocks of the same heads, which rows and heads count from; none where nothing is seen."""
        return self._recall((q, kv), lambda: tuple(self._tiles(q, kv)))

    def needs(self, q: Block, kv: Block) -> bool:
        """Whether a query of one block sees a key of the other."""
        return self._recall(("needs", q, kv), lambda: next(self._tiles(q, kv), None) is not None)

    def flops(self, tiles: tuple[Tile, ...], *, backward: bool = False) -> int:
        """Multiply-adds counted as two: 2 x pairs x (head_dim + v_head_dim).

        Backward 2 x pairs x (3 head_dim + 2 v_head_dim): the scores again, dP, dQ, dK and dV (FlashAttention-2, arXiv 2307.08691,
        algorithm 2).
        """
        work = self.workload
        widths = 3 * work.head_dim + 2 * work.v_head_dim if backward else work.head_dim + work.v_head_dim
        return 2 * sum(tile.pairs() for tile in tiles) * widths

    def q_heads(self, block: Block) -> tuple[int, int]:
        """The block's query heads."""
        group = self.workload.heads // self.workload.kv_heads
        return block.heads[0] * group, block.heads[1] * group

    def _tiles(self, q: Block, kv: Block) -> Iterator[Tile]:
        work = self.workload
        first, end = self.q_heads(q)
        for batch, queries, keys in work.sequences():
            for q_span in _within(self.q_partition.spans(q.rank), q.rows):
                for k_span in _within(self.kv_partition.spans(kv.rank), kv.rows):
                    moved_q = _shift(_clip(q_span, queries), work.q_offset)
                    moved_k = _shift(_clip(k_span, keys), work.kv_offset)
                    for q_part, k_part, lo, hi in work.mask.pieces(moved_q, moved_k):
                        yield Tile(batch=batch, heads=(0, end - first), q=q_part, k=k_part, lo=lo, hi=hi)

    def home(self, name: str, block: Block) -> Region:
        """A block where the caller has it, or gets it: slot 0, all of the rank's array or a box of it.

        Of q, k, v, out, lse, dout, dq, dk or dv; delta, which the backward pass makes of out and dout, lies as lse does.
        """
        return self._recall((name, block), lambda: self._home(name, block))

    def _home(self, name: str, block: Block) -> Region:
        work, rank = self.workload, block.rank
        heads = block.heads if name in OF_KEYS else self.q_heads(block)
        rows = (self.kv_partition if name in OF_KEYS else self.q_partition).count(rank)
        shape: tuple[int, ...]
        box: Box
        if name in OF_ROWS:
            shape, box = (work.batch, work.heads, rows), ((0, work.batch), heads, block.rows)
        else:
            width = self._width(name)
            shape = (work.batch, rows, work.kv_heads if name in OF_KEYS else work.heads, width)
            box = ((0, work.batch), block.rows, heads, (0, width))
        dtype = accumulator(work.dtype) if name in OF_ROWS else work.dtype
        made = Region(buffer=name, slot=0, shape=shape, dtype=dtype, value=self.value(name, block))
        return made if made.shape == tuple(high - low for low, high in box) else replace(made, box=box)

    def copy(self, name: str, block: Block, slot: int) -> Region:
        """A block of q, k, v, dout, lse or delta away from home, dense, in `slot` of its buffer."""
        return self._recall((name, block, slot), lambda: self._copy(name, block, slot))

    def _copy(self, name: str, block: Block, slot: int) -> Region:
        work = self.workload
        first, end = block.heads if name in OF_KEYS else self.q_heads(block)
        shape: tuple[int, ...] = (work.batch, block.tokens, end - first, self._width(name))
        dtype = work.wire_dtype
        if name in OF_ROWS:
            shape, dtype = (work.batch, end - first, block.tokens), accumulator(work.dtype)
        return Region(buffer=name, slot=slot, shape=shape, dtype=dtype, value=self.value(name, block))

    def sums(
        self, names: tuple[str, ...], block: Block, version: int, *, slot: int = 0, at: str = "", within: Block | None = None
    ) -> tuple[Region, ...]:
        """The running sums of gradients (dq, or dk and dv) of a block after `version` ops that changed them.

        In buffers ``dq_sum``, ``dk_sum``, ``dv_sum``, (rows, batch, heads, width) in the dtype of partials. `at`: which part of
        the sum this is, such as the rank where it is made. `within`: its rows lie in an array of all of that block's.
        """
        key = ("sums", names, block, version, slot, at, within)
        return self._recall(
            key, lambda: tuple(self._sum(name, block, within or block, slot=slot, at=at, version=version) for name in names)
        )

    def _sum(self, name: str, block: Block, within: Block, *, slot: int, at: str, version: int) -> Region:
        work, buffer = self.workload, f"{name}_sum"
        first, end = block.heads if name in OF_KEYS else self.q_heads(block)
        shape = (within.tokens, work.batch, end - first, self._width(name))
        value = self.value(buffer, block) + (f"@{at}" if at else "")
        made = Region(buffer=buffer, slot=slot, shape=shape, dtype=accumulator(work.dtype), value=value, version=version)
        if within.rows == block.rows:
            return made
        rows = (block.rows[0] - within.rows[0], block.rows[1] - within.rows[0])
        return replace(made, box=(rows, *((0, size) for size in shape[1:])))

    def state(
        self, block: Block, version: int, *, slot: int = 0, packed: bool = False, at: int | None = None
    ) -> tuple[Region, ...]:
        """The running partial output, maximum and sum of a block of queries after `version` ops that changed it.

        Each in a buffer of its own, or `packed` one after the other into buffer ``state``, where `parcel` spans all three.
        `at`: only of the keys of that rank, to be merged at home.
        """
        return self._recall(
            ("state", block, version, slot, packed, at), lambda: tuple(self._state(block, version, slot, packed=packed, at=at))
        )

    def _state(self, block: Block, version: int, slot: int, *, packed: bool, at: int | None) -> Iterator[Region]:
        work, dtype = self.workload, accumulator(self.workload.dtype)
        first, end = self.q_heads(block)
        rows = (work.batch, end - first, block.tokens)
        offset = 0
        for name, shape in (("acc", (*rows, work.v_head_dim)), ("max", rows), ("sum", rows)):
            value = self.value("state" if packed else name, block) + ("" if at is None else f"@{at}")
            region = Region(
                buffer="state" if packed else name,
                slot=slot,
                shape=shape,
                dtype=dtype,
                value=value,
                version=version,
                offset=offset,
            )
            yield region
            offset += region.nbytes if packed else 0

    def parcel(self, block: Block, version: int, *, slot: int = 0, at: int | None = None) -> Region:
        """All of a packed state, as one message."""
        key = ("parcel", block, version, slot, at)
        last = self.state(block, version, slot=slot, packed=True, at=at)[-1]
        return self._recall(key, lambda: replace(last, shape=(last.array_end,), dtype="uint8", offset=0))

    def value(self, name: str, block: Block) -> str:
        """What a region holds, in words: ``k[3]``, or ``k[3|0:50|0:2]`` for a part: rank, rows and key/value heads."""
        whole = self.kv_block(block.rank) if name in OF_KEYS else self.q_block(block.rank)
        if block == whole:
            return f"{name}[{block.rank}]"
        return f"{name}[{block.rank}|{block.rows[0]}:{block.rows[1]}|{block.heads[0]}:{block.heads[1]}]"

    def block(self, value: str) -> Block:
        """The block that a value names. Raises ScheduleError."""
        match = _VALUE.fullmatch(value)
        if match is None:
            raise ScheduleError(f"{value!r} names no block of a rank")
        rank = int(match[2])
        if rank >= self.world_size:
            raise ScheduleError(f"{value!r} names a block of rank {rank}; there are {self.world_size}")
        whole = self.kv_block(rank) if match[1] in OF_KEYS else self.q_block(rank)
        if match[3] is None:
            return whole
        low, high, first, end = map(int, match.groups()[2:])
        if not (low <= high <= whole.rows[1] and first <= end <= whole.heads[1]):
            raise ScheduleError(f"{value!r} names no block of rank {rank}, which has {whole.rows[1]} rows")
        return Block(rank, (low, high), (first, end))

    def _width(self, name: str) -> int:
        return self.workload.v_head_dim if name in OF_VALUES else self.workload.head_dim


def _within(spans: tuple[Span, ...], rows: tuple[int, int]) -> Iterator[Span]:
    """What lies in these local rows, with rows counted from the first of them."""
    low, high = rows
    for span in spans:
        begin, end = max(low - span.row, 0), min(high - span.row, span.count)
        if begin < end:
            part = span if (begin, end) == (0, span.count) else span.part(begin, end)
            yield _renumber(part, part.row - low) if low else part


def _renumber(span: Span, row: int) -> Span:
    return replace(span, row=row)


def _shift(span: Span, offset: int) -> Span:
    return replace(span, start=span.start + offset) if offset else span


def _clip(span: Span, length: int) -> Span:
    """The tokens of a span at positions below `length` (before any offset)."""
    count = min(span.count, max(0, -((span.start - length) // span.step)))
    return span if count == span.count else span.part(0, count)

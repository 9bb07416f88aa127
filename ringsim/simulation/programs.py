"""What tells ranks apart: their programs, and for strategies that only turn with their rank, what these are told."""

from __future__ import annotations

import hashlib
import marshal
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, Final

from ..costs import Cost, Costs
from ..mask import Causal, Full, Window
from ..schedule import Block, Compute, Schedule, Send, Wait
from ..schedule.loops import components
from ..schedule.registry import find
from ..tile import Span, Tile

ROUNDING: Final = 1e-14
"""Of a price: the same sum in another order."""


class Programs:
    """What each rank's program is, but for whom it talks to, in a few bytes; made when first asked for."""

    def __init__(self, schedule: Schedule, costs: Sequence[Costs]) -> None:
        self._schedule = schedule
        self._costs = costs
        self._keys: dict[int, bytes] = {}
        self._distances: dict[int, tuple[int, ...]] = {}
        self._names: dict[str, int] = {}
        self._prices = _Prices()

    def key(self, rank: int) -> bytes:
        """Equal for ranks whose programs differ only in who they are."""
        if rank not in self._keys:
            self._read(rank)
        return self._keys[rank]

    def distances(self, rank: int) -> tuple[int, ...]:
        """How far up the ring those are whom the rank sends to."""
        if rank not in self._distances:
            self._read(rank)
        return self._distances[rank]

    def _read(self, rank: int) -> None:
        world_size, costs, names = self._schedule.world_size, self._costs[rank], self._names
        ops: list[tuple[int | tuple[int, ...], ...]] = []
        sent: dict[int, None] = {}
        for op in self._schedule.program(rank):
            head = (op.id, op.step, names.setdefault(op.phase, len(names)))
            if isinstance(op, Compute):
                ops.append((0, *head, names.setdefault(op.kernel, len(names)), self._prices.number(costs.cost(op))))
            elif isinstance(op, Wait):
                ops.append((1, *head, op.posts))
            else:
                distance, sends = (op.peer - rank) % world_size, isinstance(op, Send)
                ops.append((2 + sends, *head, op.region.nbytes, distance, op.tag))
                if sends:
                    sent[distance] = None
        self._keys[rank] = hashlib.blake2b(marshal.dumps(ops, 2)).digest()
        self._distances[rank] = tuple(sent)


class _Prices:
    """Numbers prices; those that differ by rounding have the same number."""

    def __init__(self) -> None:
        self._known: dict[Cost, int] = {}
        self._sorted: list[tuple[float, int, int]] = []

    def number(self, cost: Cost) -> int:
        found = self._known.get(cost)
        if found is None:
            found = self._known[cost] = self._near(cost)
        return found

    def _near(self, cost: Cost) -> int:
        begin = bisect_left(self._sorted, (cost.seconds * (1 - ROUNDING), 0, 0))
        for seconds, pieces, number in self._sorted[begin:]:
            if seconds > cost.seconds * (1 + ROUNDING):
                break
            if pieces == cost.pieces:
                return number
        insort(self._sorted, (cost.seconds, cost.pieces, len(self._known)))
        return len(self._known)


def turning(schedule: Schedule) -> int | None:
    """By how many ranks the programs may be turned, if what the strategy is told turns as well; None where that is not known."""
    turn = find(schedule.strategy).turn(schedule.workload)
    # a component begins with its lowest rank, wherever that lies
    if turn is None or schedule.given is not None or len(components(schedule.job)) > 1:
        return None
    return turn


class Told:
    """What a strategy is told of a rank: how its tokens lie, and what it and each other rank have to compute on one another.

    For strategies that ask for the tiles of whole blocks (or of some of their heads), use them to compute and to know where
    there are none, and else see ranks by their distances only.
    """

    def __init__(self, schedule: Schedule) -> None:
        work, self._job = schedule.workload, schedule.job
        self._same = work.lengths is None and isinstance(work.mask, Full)
        self._anywhere = work.lengths is None and isinstance(work.mask, Full | Causal | Window)
        ranks = range(schedule.world_size)
        self._queries = [self._job.q_partition.spans(rank) for rank in ranks]
        self._keys = [self._job.kv_partition.spans(rank) for rank in ranks]
        self._numbers: dict[Any, int] = {(): 0}
        self._pairs: dict[Any, int] = {}
        self._lying = [[self._lies(span) for span in spans] for spans in self._keys]

    def key(self, rank: int) -> bytes:
        """Equal for ranks that are told the same."""
        lie = tuple(tuple((span.row, span.count, span.step) for span in spans[rank]) for spans in (self._queries, self._keys))
        others = () if self._same else (*range(rank, -1, -1), *range(len(self._keys) - 1, rank, -1))
        mine = [self._lies(span) for span in self._queries[rank]]
        return hashlib.blake2b(marshal.dumps((lie, [self._work(rank, mine, other) for other in others]), 2)).digest()

    def _lies(self, span: Span) -> tuple[int, int]:
        """Where a span begins, and what it is like as a number; of a mask that compares more than distances, it is alone."""
        shape = (span.count, span.step) if self._anywhere else (span.start, span.count, span.step)
        return span.start, self._number(shape)

    def _work(self, rank: int, mine: list[tuple[int, int]], other: int) -> int:
        """What the queries of one rank have to do with the keys of another, as a number."""
        pairs, found = self._pairs, []
        for i, (q_start, q_shape) in enumerate(mine):
            for j, (k_start, k_shape) in enumerate(self._lying[other]):
                # where a mask compares distances, so does what it leaves
                key = (q_start - k_start, q_shape, k_shape)
                number = pairs.get(key)
                if number is None:
                    number = pairs[key] = self._number(self._tiles(rank, self._queries[rank][i], other, self._keys[other][j]))
                if number:
                    found.append(number)
        found.sort()
        return self._number(tuple(found))

    def _tiles(self, rank: int, q: Span, other: int, k: Span) -> tuple[Any, ...]:
        heads = (0, self._job.workload.kv_heads)
        blocks = (Block(of, (span.row, span.row + span.count), heads) for of, span in ((rank, q), (other, k)))
        return tuple(sorted(map(_shape, self._job.tiles(*blocks))))

    def _number(self, what: Any) -> int:
        return self._numbers.setdefault(what, len(self._numbers))


def _shape(tile: Tile) -> tuple[Any, ...]:
    """All that a price can depend on."""
    shape = (tile.batch, tile.heads, tile.q.count, tile.k.count)
    if not tile.masked:
        return (*shape, ())
    return (*shape, (tile.q.start - tile.k.start, tile.q.step, tile.k.step, f"{tile.lo}, {tile.hi}"))

"""Loops: in which order blocks go from rank to rank, how far, and how many edge-disjoint ways round there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from ..mask import Full
from .job import Block, Job

Loop = tuple[int, ...]


class Lane:
    """A way round for a part of each rank's block of keys and values (or, with `queries`, of queries).

    A block starts at home and goes from rank to rank along the loop that its rank lies on, as far as something there needs it.
    """

    def __init__(self, job: Job, loops: Sequence[Loop], part: Callable[[int], Block], *, queries: bool = False) -> None:
        self._job = job
        self._cut = part
        self._part: dict[int, Block] = {}
        self.queries = queries
        self._place = {rank: (loop, index) for loop in loops for index, rank in enumerate(loop)}
        self._reach: dict[int, int] = {}
        self._visits: dict[int, tuple[int, ...]] = {}

    def part(self, rank: int) -> Block:
        """The part of the block of `rank` that goes this way."""
        found = self._part.get(rank)
        if found is None:
            found = self._part[rank] = self._cut(rank)
        return found

    def loop(self, rank: int) -> Loop:
        """The loop that `rank` lies on."""
        return self._place[rank][0]

    def at(self, rank: int, distance: int) -> int:
        """The rank that many hops further down the loop than `rank`; up the loop if negative."""
        loop, place = self._place[rank]
        return loop[(place + distance) % len(loop)]

    def needed(self, block: int, rank: int) -> bool:
        """Whether the block of one rank has something to do at another."""
        if self.queries:
            mine = self.part(block)
            return self._job.needs(mine, self._job.kv_block(rank)._replace(heads=mine.heads))
        mine = self.part(block)
        return self._job.needs(self._job.q_block(rank)._replace(heads=mine.heads), mine)

    def reach(self, block: int) -> int:
        """How many hops the block of a rank travels: to the last rank down the loop that needs it."""
        if block not in self._reach:
            away = range(len(self.loop(block)) - 1, 0, -1)
            self._reach[block] = next((d for d in away if self.needed(block, self.at(block, d))), 0)
        return self._reach[block]

    def visits(self, block: int, distance: int) -> int:
        """How many ranks have had something to do with the block of a rank once it has been as many hops away."""
        if block not in self._visits:
            needed = (self.needed(block, self.at(block, away)) for away in range(self.reach(block) + 1))
            self._visits[block] = tuple(accumulate(needed, initial=0))
        return self._visits[block][distance + 1]


def components(job: Job) -> tuple[Loop, ...]:
    """The ranks, in loops of those that need one another's tokens, directly or through others: no block has to leave its own."""
    return job.remember("components", lambda: _components(job))


def _components(job: Job) -> tuple[Loop, ...]:
    if isinstance(job.workload.mask, Full) and job.workload.lengths is None and job.workload.batch:
        return _all_together(job)
    group = list(range(job.world_size))

    def root(rank: int) -> int:
        while group[rank] != rank:
            group[rank] = group[group[rank]]
            rank = group[rank]
        return rank

    def join(a: int, b: int) -> None:
        one, other = sorted((root(a), root(b)))
        if one != other and (job.needs(job.q_block(a), job.kv_block(b)) or job.needs(job.q_block(b), job.kv_block(a))):
            group[other] = one

    for a, b in pairwise(range(job.world_size)):
        join(a, b)
    if len({root(rank) for rank in group}) > 1:
        for a in range(job.world_size):
            for b in range(a + 2, job.world_size):
                join(a, b)
    roots = [root(rank) for rank in range(job.world_size)]
    return tuple(tuple(rank for rank, of in enumerate(roots) if of == first) for first in dict.fromkeys(roots))


def _all_together(job: Job) -> tuple[Loop, ...]:
    """Where all is seen whoever has a query needs whoever has a key."""
    ranks = range(job.world_size)
    if job.q_partition.everyone and job.kv_partition.everyone:
        return (tuple(ranks),)
    sides = [{rank for rank in ranks if side.count(rank)} for side in (job.q_partition, job.kv_partition)]
    together = sides[0] | sides[1] if all(sides) else set()
    loops = [tuple(sorted(together))] if together else []
    return tuple(sorted([*loops, *((rank,) for rank in ranks if rank not in together)]))


def backwards(loop: Loop) -> Loop:
    """The same ring the other way round, from the same rank."""
    return (loop[0], *reversed(loop[1:]))


def disjoint_count(ranks: int) -> int:
    """How many ways round `disjoint_loops` finds."""
    return 1 if ranks < 3 else ranks - 1 if ranks % 2 else ranks - 2


def disjoint_loops(loop: Loop, most: int | None = None) -> tuple[Loop, ...]:
    """Ways round all of the loop's ranks, of which no two use the same directed link; `most` of P - 1 for odd P, P - 2 for even.

    Walecki's zigzags round a hub (Alspach, "The wonderful Walecki construction", 2008), each taken both ways; for even P the
    last rank is put into the one link of each zigzag that spans half of the circle. The first is the loop as it is given.
    """
    count = len(loop)
    most = disjoint_count(count) if most is None else min(most, disjoint_count(count))
    if count < 3:
        return (loop,)
    points = count - 1 if count % 2 else count - 2
    zigzags = []
    for turn in range((most + 1) // 2):
        offsets = [(turn + (index + 1) // 2 * (1 if index % 2 else -1)) % points for index in range(points)]
        cycle = [points, *offsets]
        if not count % 2:
            cycle.insert(_half_way(offsets, points) + 2, count - 1)
        zigzags.append(cycle)
    renamed = dict(zip(zigzags[0], loop, strict=True))
    ways = [tuple(renamed[point] for point in cycle) for cycle in zigzags]
    return tuple(way for both in ((way, backwards(way)) for way in ways) for way in both)[:most]


def _half_way(offsets: list[int], points: int) -> int:
    """Where in a zigzag the link over half of the circle begins; these, of all turns, have no end in common."""
    return next(i for i, (a, b) in enumerate(pairwise(offsets)) if (a - b) % points == points // 2)

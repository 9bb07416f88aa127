"""Ranks that behave alike: whether turning all ranks by so many maps programs, devices, paths and resources onto themselves.

If it does, what rank r does is what rank r + p does, at the same times: p ranks need to be simulated, not all. A resource that
n of N alike messages cross then has n/N of its capacity for each of them; max-min fair rates stay the same by symmetry.
"""

from __future__ import annotations

import hashlib
import marshal
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence

from ..costs import Cost, Costs
from ..schedule import Compute, Schedule, Send, Wait
from ..topology import Path, Topology
from .ground import Ground

ROUNDING = 1e-14
"""Of a price: the same sum in another order."""
FIGURES = (
    "starts",
    "latencies_s",
    "rates",
    "progress",
    "drives",
    "look_s",
    "eager_nbytes",
    "device_share",
    "slowed_by_compute",
)
"""Of a path: all that the simulator reads, but for its resources."""


def folded(schedule: Schedule, topology: Topology, placed: Sequence[int], costs: Sequence[Costs]) -> Ground | None:
    """The ground of the fewest ranks that stand for all, or None where no rank stands for another."""
    world_size = schedule.world_size
    programs = Programs(schedule, costs)
    for ranks in (count for count in range(1, world_size) if world_size % count == 0):
        devices = _devices(topology, placed, ranks)
        if devices is None or programs.key(0) != programs.key(ranks):
            continue
        resources = _resources(topology, placed, ranks, programs)
        if resources is not None and all(programs.key(rank - ranks) == programs.key(rank) for rank in range(ranks, world_size)):
            return Ground(topology=topology, placed=tuple(placed), ranks=ranks, devices=devices, resources=resources)
    return None


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


class _Turn:
    """Who takes whose place when all ranks turn: one for one, or not at all."""

    def __init__(self) -> None:
        self._to: dict[int, int] = {}
        self._from: dict[int, int] = {}

    def add(self, one: int, other: int) -> bool:
        """`other` comes where `one` was; False where somebody else did."""
        return self._to.setdefault(one, other) == other and self._from.setdefault(other, one) == one

    def cycles(self) -> dict[int, tuple[int, int]]:
        """Each with the first of all that take its place in turn, and how many they are."""
        found: dict[int, tuple[int, int]] = {}
        for first in self._to:
            cycle = [first]
            while first not in found and self._to[cycle[-1]] != first:
                cycle.append(self._to[cycle[-1]])
            for one in cycle if first not in found else ():
                found[one] = (first, len(cycle))
        return found


def _devices(topology: Topology, placed: Sequence[int], ranks: int) -> dict[int, tuple[int, int]] | None:
    """Each device with the first of those alike, and how many they are, if devices turn onto devices of their kind."""
    turn, vertices = _Turn(), topology.graph.vertices
    for one, other in zip(placed, (*placed[ranks:], *placed[:ranks]), strict=True):
        if vertices[one].device != vertices[other].device or not turn.add(one, other):
            return None
    return turn.cycles()


def _resources(topology: Topology, placed: Sequence[int], ranks: int, programs: Programs) -> dict[int, tuple[int, int]] | None:
    """Each resource with the first of those alike, and how many they are, if paths turn onto paths like them."""
    turn, crossed = _Turn(), []
    for rank in range(ranks):
        for distance in programs.distances(rank):
            paths = _paths(topology, placed, range(rank, len(placed) + 1 + rank, ranks), distance)
            crossed.append((before := next(paths)).resources)
            if before.drives == "both" and before.progress in ("handshake", "polling"):
                # which of two looks at one instant comes first is the order of ranks: alike ranks do not stay alike
                return None
            for path in paths:
                if not _alike(before, path) or not _turns(topology, turn, before.resources, path.resources):
                    return None
                before = path
    cycles = turn.cycles()
    # a message over two resources alike would stand for two on each
    twice = any(len({cycles[number][0] for number in numbers}) < len(numbers) for numbers in crossed)
    return None if twice else cycles


def _paths(topology: Topology, placed: Sequence[int], ranks: Iterable[int], distance: int) -> Iterator[Path]:
    world_size = len(placed)
    return (topology.path(placed[rank % world_size], placed[(rank + distance) % world_size]) for rank in ranks)


def _alike(one: Path, other: Path) -> bool:
    return len(one.resources) == len(other.resources) and all(getattr(one, name) == getattr(other, name) for name in FIGURES)


def _turns(topology: Topology, turn: _Turn, before: Iterable[int], after: Iterable[int]) -> bool:
    of = topology.graph.resources
    return all(of[one].capacity == of[other].capacity and turn.add(one, other) for one, other in zip(before, after, strict=True))

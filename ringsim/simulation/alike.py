"""Ranks that behave alike: whether turning all ranks by so many maps programs, devices, paths and resources onto themselves.

If it does, what rank r does is what rank r + p does, at the same times: p ranks need to be simulated, not all. A resource that
n of N alike messages cross then has n/N of its capacity for each of them; max-min fair rates stay the same by symmetry.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Final

from ..costs import Costs
from ..schedule import Schedule
from ..topology import Path, Topology
from .ground import Ground
from .programs import Programs, Told, turning

SMALL: Final = 32
"""Ranks up to which all programs are read, whatever is known of their strategy."""
FIGURES: Final = (
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
_RECENT: Final = deque[tuple[Schedule, Topology, Ground | None]](maxlen=2)
"""What is simulated with hops is often simulated without them next."""


def folded(schedule: Schedule, topology: Topology, placed: Sequence[int], costs: Sequence[Costs]) -> Ground | None:
    """The ground of the fewest ranks that stand for all, or None where no rank stands for another.

    All programs are read and compared. In a large world that would take longer than to simulate: where the strategy is known to
    turn with its rank, what it is told of each rank is compared instead, and of the programs a few.
    """
    for known, on, found in tuple(_RECENT):
        if known is schedule and on is topology:
            return found
    found = _folded(schedule, topology, placed, costs)
    _RECENT.append((schedule, topology, found))
    return found


def _folded(schedule: Schedule, topology: Topology, placed: Sequence[int], costs: Sequence[Costs]) -> Ground | None:
    world_size, programs = schedule.world_size, Programs(schedule, costs)
    by = turning(schedule) if world_size > SMALL else None
    key = programs.key if by is None else cache(Told(schedule).key)
    for ranks in (count for count in range(by or 1, world_size, by or 1) if world_size % count == 0):
        devices = _devices(topology, placed, ranks)
        if devices is None or key(0) != key(ranks):
            continue
        resources = _resources(topology, placed, ranks, programs)
        if resources is None or any(key(rank - ranks) != key(rank) for rank in range(ranks, world_size)):
            continue
        if all(programs.key(rank) == programs.key(other) for rank, other in _samples(ranks, world_size)):
            return Ground(topology=topology, placed=tuple(placed), ranks=ranks, devices=devices, resources=resources)
    return None


def _samples(ranks: int, world_size: int) -> Iterator[tuple[int, int]]:
    """Some ranks, each with one that is to be like it."""
    folds = world_size // ranks
    for rank, turns in ((0, 1), (ranks // 2, folds // 2), (ranks - 1, folds - 1)):
        yield rank, rank + turns * ranks


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
    turn, crossed, threads = _Turn(), [], Counter[tuple[str, int]]()
    for rank in range(ranks):
        for distance in programs.distances(rank):
            paths = _paths(topology, placed, range(rank, len(placed) + 1 + rank, ranks), distance)
            before = next(paths)
            crossed.append(before.resources)
            if before.progress == "thread":
                threads.update((("from", rank), ("to", (rank + distance) % ranks)))
            if not _timed(topology, placed[rank], before):
                return None
            for path in paths:
                if not _alike(before, path) or not _turns(topology, turn, before.resources, path.resources):
                    return None
                before = path
    cycles = turn.cycles()
    # a message over two resources alike would stand for two on each, and a thread copies in the order in which ranks come
    twice = any(len({cycles[number][0] for number in numbers}) < len(numbers) for numbers in crossed)
    return None if twice or any(count > 1 for count in threads.values()) else cycles


def _timed(topology: Topology, device: int, path: Path) -> bool:
    """Whether times alone decide what happens on a path: where ranks must look, it is also which comes first at one instant."""
    if path.progress == "handshake":
        return topology.device(device).kind == "gpu" and path.drives != "both" and not path.look_s
    return path.progress != "polling"


def _paths(topology: Topology, placed: Sequence[int], ranks: Iterable[int], distance: int) -> Iterator[Path]:
    world_size = len(placed)
    return (topology.path(placed[rank % world_size], placed[(rank + distance) % world_size]) for rank in ranks)


def _alike(one: Path, other: Path) -> bool:
    return len(one.resources) == len(other.resources) and all(getattr(one, name) == getattr(other, name) for name in FIGURES)


def _turns(topology: Topology, turn: _Turn, before: Iterable[int], after: Iterable[int]) -> bool:
    of = topology.graph.resources
    return all(of[one].capacity == of[other].capacity and turn.add(one, other) for one, other in zip(before, after, strict=True))

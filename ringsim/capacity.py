"""What fits: the memory that ranks need of each device of a machine, and the longest context that leaves room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from .costs import Costs
from .errors import TopologyError
from .footprint import FeedForward, Footprint, footprint
from .lowering import Blocking
from .schedule import Schedule
from .topology import Topology
from .workload import MOST, Workload

UNIT: Final = 1024
"""Contexts are sought in whole K tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the ranks on a device need of its memory. `memory_nbytes` is None where the machine does not say."""

    device: str
    kind: str
    ranks: tuple[int, ...]
    nbytes: int
    memory_nbytes: float | None

    @property
    def fits(self) -> bool | None:
        """Whether it is enough; None where the machine does not say."""
        return None if self.memory_nbytes is None else self.nbytes <= self.memory_nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"ranks": list(self.ranks), "fits": self.fits}


def blocking_of(topology: Topology, workload: Workload, kind: str) -> Blocking | None:
    """The lowering of a kind of device; None where it has no attention figures for the workload."""
    try:
        return Costs(topology.spec.devices[kind], workload, f"{topology.name}, {kind}").blocking
    except TopologyError:
        return None


def room(topology: Topology, kind: str, reserve_nbytes: float = 0.0) -> float | None:
    """The memory of a kind of device less what others hold (weights, other layers, the libraries); None if the file is silent."""
    memory = topology.spec.devices[kind].memory
    return None if memory is None else max(memory - reserve_nbytes, 0.0)


def demands(
    schedule: Schedule, topology: Topology, *, feed_forward: FeedForward | None = None, reserve_nbytes: float = 0.0
) -> tuple[Demand, ...]:
    """The demand on each device that has ranks, in the order of ranks. Raises TopologyError if there is no place for them."""
    on: dict[int, list[int]] = {}
    for rank, number in enumerate(topology.place(schedule.world_size)):
        on.setdefault(number, []).append(rank)
    kinds = dict.fromkeys(topology.graph.vertices[number].device for number in on)
    blockings = {kind: blocking_of(topology, schedule.workload, kind) for kind in kinds}
    found = []
    for number, ranks in on.items():
        vertex = topology.graph.vertices[number]
        needs = [footprint(schedule, rank, blocking=blockings[vertex.device], feed_forward=feed_forward) for rank in ranks]
        demand = Demand(
            device=vertex.name,
            kind=vertex.device,
            ranks=tuple(ranks),
            nbytes=sum(need.nbytes for need in needs),
            memory_nbytes=room(topology, vertex.device, reserve_nbytes),
        )
        found.append(demand)
    return tuple(found)


def tightest(found: tuple[Demand, ...]) -> Demand:
    """The demand with the least room left; where no device says what it has, the largest."""
    return min(found, key=lambda demand: ((demand.memory_nbytes or 0.0) - demand.nbytes, demand.device))


def of_length(workload: Workload, tokens: int) -> Workload:
    """The workload with this context: as many keys, and, where it has as many queries as keys, queries."""
    return replace(workload, q_len=tokens if workload.q_len == workload.kv_len else workload.q_len, kv_len=tokens, lengths=None)


def longest(nbytes: Callable[[int], float], capacity: float) -> int:
    """The most tokens, in whole K, whose `nbytes` (never falling, nearly a line) are within `capacity`; 0 if none are."""
    low, high = 0, 1
    at_low, at_high = 0.0, nbytes(UNIT)
    while at_high <= capacity:
        low, at_low = high, at_high
        high *= 2
        if high * UNIT > MOST:
            return low * UNIT
        at_high = nbytes(high * UNIT)
    while high - low > 1:
        line = low + int((high - low) * (capacity - at_low) / (at_high - at_low)) if at_high > at_low else low
        # on the line, then next to it: a straight one needs no third look
        for guess in (line, line + 1, (low + high) // 2):
            if low < guess < high:
                at_guess = nbytes(guess * UNIT)
                low, high, at_low, at_high = (
                    (guess, high, at_guess, at_high) if at_guess <= capacity else (low, guess, at_low, at_guess)
                )
    return low * UNIT


def longest_ring(
    schedule: Schedule, topology: Topology, *, feed_forward: FeedForward | None = None, reserve_nbytes: float = 0.0
) -> int | None:
    """The longest context, in whole K tokens, for which every device has room; None if a device does not say what it has."""
    found = demands(schedule, topology, feed_forward=feed_forward, reserve_nbytes=reserve_nbytes)
    if any(demand.memory_nbytes is None for demand in found):
        return None
    found_lengths = []
    for kind in dict.fromkeys(demand.kind for demand in found):
        most = max((demand for demand in found if demand.kind == kind), key=lambda demand: demand.nbytes)
        blocking = blocking_of(topology, schedule.workload, kind)

        def nbytes(tokens: int, most: Demand = most, blocking: Blocking | None = blocking) -> float:
            longer = replace(schedule, workload=of_length(schedule.workload, tokens))
            return sum(footprint(longer, rank, blocking=blocking, feed_forward=feed_forward).nbytes for rank in most.ranks)

        found_lengths.append(longest(nbytes, most.memory_nbytes or 0.0))
    return min(found_lengths)


def longest_alone(alone: Callable[[Workload], Footprint], workload: Workload, capacity: float) -> int:
    """The longest context, in whole K tokens, of one device that computes by `alone` within `capacity` bytes."""
    return longest(lambda tokens: alone(of_length(workload, tokens)).nbytes, capacity)

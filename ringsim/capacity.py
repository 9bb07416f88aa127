"""What fits: the memory that ranks need of each device of a machine, and the longest context that leaves room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isinf
from typing import Any, Final

from .costs import Costs
from .errors import TopologyError
from .footprint import FeedForward, Footprint, Layers, weigh
from .lowering import Blocking
from .schedule import Schedule
from .topology import Topology
from .units import format_size
from .workload import MOST, Workload

UNIT: Final = 1024
"""Contexts are sought in whole K tokens."""


SMALL_WORLD: Final = 64
SAMPLED: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the ranks on a device need of its memory, of which `reserve_nbytes` are held by others.

    `memory_nbytes` is None where the machine does not say. `fullest` is the footprint of the rank that needs the most.
    """

    device: str
    kind: str
    ranks: tuple[int, ...]
    nbytes: int
    memory_nbytes: float | None
    reserve_nbytes: float = 0.0
    fullest: Footprint

    @property
    def room_nbytes(self) -> float | None:
        """The memory less what is reserved."""
        return None if self.memory_nbytes is None else self.memory_nbytes - self.reserve_nbytes

    @property
    def fits(self) -> bool | None:
        """Whether it is enough; None where the machine does not say."""
        return None if self.room_nbytes is None else self.nbytes <= self.room_nbytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "fullest"}
        return values | {"ranks": list(self.ranks), "fits": self.fits}


def lowering_of(topology: Topology, workload: Workload, kind: str) -> dict[str, Blocking]:
    """The lowerings of a kind of device, as `weigh` takes them; none without attention figures: its scratch is unknown."""
    try:
        costs = Costs(topology.spec.devices[kind], workload, f"{topology.name}, {kind}")
    except TopologyError:
        return {}
    return {"blocking": costs.blocking, "backward_blocking": costs.backward_blocking}


def demands(
    schedule: Schedule,
    topology: Topology,
    *,
    feed_forward: FeedForward | None = None,
    layers: Layers | None = None,
    reserve_nbytes: float = 0.0,
) -> tuple[Demand, ...]:
    """The demand on each device that has ranks, in the order of ranks.

    Up to 64 ranks every program is walked; beyond, 16 of them, of shards as long as the longest, and the others are taken to
    need as much as the most of these. Raises TopologyError if there is no place for the ranks, or less memory than the reserve.
    """
    on: dict[int, list[int]] = {}
    for rank, number in enumerate(topology.place(schedule.world_size)):
        on.setdefault(number, []).append(rank)
    kinds = dict.fromkeys(topology.graph.vertices[number].device for number in on)
    around = {"feed_forward": feed_forward, "layers": layers}
    needs = {kind: _needs(schedule, **lowering_of(topology, schedule.workload, kind), **around) for kind in kinds}
    found = []
    for number, ranks in on.items():
        vertex, memory = topology.graph.vertices[number], topology.device(number).memory
        if memory is not None and reserve_nbytes > memory:
            size, reserve = format_size(memory), format_size(reserve_nbytes)
            raise TopologyError(f"{topology.name}: {reserve} are reserved of {vertex.name}, which has {size}")
        each = [needs[vertex.device](rank) for rank in ranks]
        demand = Demand(
            device=vertex.name,
            kind=vertex.device,
            ranks=tuple(ranks),
            nbytes=sum(need.nbytes for need in each),
            memory_nbytes=memory,
            reserve_nbytes=reserve_nbytes,
            fullest=max(each, key=lambda need: need.nbytes),
        )
        found.append(demand)
    return tuple(found)


def _needs(schedule: Schedule, **options: Any) -> Callable[[int], Footprint]:
    """The footprint of a rank, or the largest of a sample; options of `weigh`."""
    world_size, work = schedule.world_size, schedule.workload
    if world_size > SMALL_WORLD and not one_length(schedule):
        runs = 2 * world_size
        q_len, kv_len = (-(-length // runs) * runs for length in (work.q_len, work.kv_len))
        schedule = replace(schedule, workload=replace(work, q_len=q_len, kv_len=kv_len))

    def of(rank: int) -> Footprint:
        return weigh(schedule, rank, **options)

    if world_size <= SMALL_WORLD:
        return of
    sample = (of(index * (world_size - 1) // (SAMPLED - 1)) for index in range(SAMPLED))
    most = max(sample, key=lambda need: need.nbytes)
    return lambda rank: most


def tightest(found: tuple[Demand, ...]) -> Demand:
    """The demand with the least room left, among those on devices that say what they have; else the largest."""
    known = [demand for demand in found if demand.room_nbytes is not None]
    return min(known or found, key=lambda demand: (demand.room_nbytes or 0.0) - demand.nbytes)


def of_length(workload: Workload, tokens: int) -> Workload:
    """The workload with this context: as many keys; as many queries, or, where they differ, those at the end as before."""
    if workload.q_len == workload.kv_len:
        return replace(workload, q_len=tokens, kv_len=tokens, lengths=None)
    return replace(workload, kv_len=tokens, q_offset=workload.q_offset + tokens - workload.kv_len, lengths=None)


def one_length(schedule: Schedule) -> bool:
    """Whether mask, partition or a program that was read describe so many tokens and no others."""
    fixed = schedule.workload.mask.extent is not None or schedule.partition.startswith("runs")
    return fixed or schedule.given is not None


def longest(nbytes: Callable[[int], float], capacity: float) -> int:
    """The most tokens, in whole K, whose `nbytes` (never falling, nearly a line) are within `capacity`; 0 if none are."""
    low, at_low = 0, 0.0
    high, at_high = MOST // UNIT + 1, inf
    guess, looks = UNIT, 0
    while high - low > 1:
        at_guess = nbytes(guess * UNIT)
        low, high, at_low, at_high = (guess, high, at_guess, at_high) if at_guess <= capacity else (low, guess, at_low, at_guess)
        looks += 1
        halve = looks % 4 == 0 and not isinf(at_high)
        guess = (low + high) // 2 if halve else _on_the_line(low, at_low, high, at_high, capacity)
    return low * UNIT


def _on_the_line(low: int, at_low: float, high: int, at_high: float, capacity: float) -> int:
    """Where a line through what is known, or through nothing at 0, comes to the capacity; between low and high."""
    if isinf(at_high):
        line = low * min(max(capacity / at_low, 1.0), 1024.0) if at_low else low * 1024.0
    elif at_high > at_low:
        line = low + (high - low) * (capacity - at_low) / (at_high - at_low)
    else:
        line = low
    return max(low + 1, min(high - 1, int(line)))


def longest_ring(
    schedule: Schedule,
    topology: Topology,
    *,
    feed_forward: FeedForward | None = None,
    layers: Layers | None = None,
    reserve_nbytes: float = 0.0,
) -> int | None:
    """The longest context, in whole K tokens, for which every device that says what it has has room; None if none says, or
    if the schedule is of one length only (`one_length`).
    """
    if one_length(schedule):
        return None

    def at(tokens: int) -> tuple[Demand, ...]:
        longer = replace(schedule, workload=of_length(schedule.workload, tokens))
        found = demands(longer, topology, feed_forward=feed_forward, layers=layers, reserve_nbytes=reserve_nbytes)
        return tuple(demand for demand in found if demand.room_nbytes is not None)

    if not at(UNIT):
        return None
    # how full the fullest device is, of 1
    return longest(lambda tokens: max(_fullness(demand) for demand in at(tokens)), 1.0)


def _fullness(demand: Demand) -> float:
    return demand.nbytes / demand.room_nbytes if demand.room_nbytes else inf if demand.nbytes else 0.0


def longest_alone(alone: Callable[[Workload], Footprint], workload: Workload, capacity: float) -> int:
    """The longest context, in whole K tokens, of one device that computes by `alone` within `capacity` bytes."""
    return longest(lambda tokens: alone(of_length(workload, tokens)).nbytes, capacity)

"""The smallest block of tokens per device whose hop hides behind the computation on it, found by simulation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Any, Final

from .costs import Costs
from .errors import BeyondFigures, TopologyError, WorkloadError
from .hops import ring_hops
from .schedule import Compute, Schedule, Send
from .simulation import simulate
from .timeline import POSTS, WAITS, Timeline
from .topology import Topology

LARGEST: Final = 2**22
"""Tokens per device up to which a block is sought."""
USUAL: Final = 1024
"""A block at which to look at sizes of messages and tiles."""
ATTENDS: Final = ("attend", "attend_backward")
NOTHING: Final = 1e-9
"""Of a run: waits shorter than that are the rounding of float seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakeven:
    """`tokens` per device from which on no rank waits for a hop or drives one; None if not up to `looked_to`.

    Up to its last tile: what comes home after that, sums of gradients or a state, has nothing to hide behind. Where ranks have
    uneven work, those with less wait for others: there, from which on those with the most wait for nobody. `looked_from` is
    the smallest block that the device's figures price: a result equal to it is an upper bound. At `tokens`: `exposed` is the
    share of the run that hops cost there (they slow the kernels, and the last way home takes time), `flops_per_s` what rank
    0's first kernel gets out of its device, launch included. `hop_bytes_per_s` is the slowest hop's rate while all ranks send,
    `f_over_b` the block at which a step's arithmetic at the slowest device's peak takes as long as a hop at that rate: c = F/B
    of arXiv 2310.01889, section 3.2, times kv_heads / heads and itemsize / 2, forward; backward with gradients in both, for
    `ring` in bfloat16 1.2 times that. None without a peak.
    """

    machine: str
    schedule: Schedule
    tokens: int | None
    looked_from: int
    looked_to: int
    exposed: float
    flops_per_s: float
    hop_bytes_per_s: float
    f_over_b: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"schedule": self.schedule.inputs()}


def find_breakeven(schedule: Schedule, topology: Topology, *, multiple: int = 1) -> Breakeven:
    """The break-even block of `schedule`'s strategy, heads and mask on `topology`; its own lengths do not matter.

    Blocks are multiples of `multiple` tokens. Looks at powers of two, and at the blocks where a message or a tile comes to
    another piece of the machine's figures, then between the largest that does not hide and the next. Raises TopologyError where
    the machine lacks figures or room for the ranks, WorkloadError.
    """
    if schedule.world_size < 2:
        raise TopologyError(f"{topology.name}: one rank has no hop to hide; a ring needs --ranks 2 or more")
    if not 1 <= multiple <= LARGEST:
        raise WorkloadError(f"multiple is {multiple}; it must be 1 to {LARGEST} tokens")
    if not schedule.workload.batch:
        raise WorkloadError("batch is 0; a block needs a sequence")

    def at(count: int) -> Schedule:
        tokens = count * multiple * schedule.world_size
        return replace(schedule, workload=replace(schedule.workload, q_len=tokens, kv_len=tokens, lengths=None))

    def hidden(count: int) -> bool:
        return _hides(at(count), topology)

    first, last, seen = _gallop(hidden, LARGEST // multiple)
    usual = min(max(first, USUAL // multiple), last)
    for count in _turns(at(usual), topology, usual):
        if first < count < last and count not in seen:
            seen[count] = hidden(count)
    found = _bisect(hidden, seen)
    exposed, flops_per_s = (0.0, 0.0) if found is None else _at_breakeven(at(found), topology)
    hop = min(hop.together for hop in ring_hops(topology, schedule.world_size))
    return Breakeven(
        machine=topology.name,
        schedule=schedule if found is None else at(found),
        tokens=None if found is None else found * multiple,
        looked_from=first * multiple,
        looked_to=last * multiple,
        exposed=exposed,
        flops_per_s=flops_per_s,
        hop_bytes_per_s=hop,
        f_over_b=_f_over_b(at(usual), topology, hop, usual * multiple),
    )


def _hides(schedule: Schedule, topology: Topology) -> bool:
    """Whether hops keep nobody waiting who would not wait for others anyway, while there is something to hide them behind."""
    timeline = simulate(schedule, topology, bound=False)
    least_s = NOTHING * timeline.total_s
    if _exposed_s(timeline) <= least_s:
        return True
    busiest = _busiest(timeline)
    if len(busiest) == timeline.world_size:
        return False
    # of ranks with uneven work, those with less wait for the others whatever hops cost
    waits = sum(event.duration_s for event in timeline.events if event.rank in busiest and event.kind == "wait")
    polls = sum(event.poll_s for event in timeline.events if event.rank in busiest)
    if waits + polls <= least_s:
        return True
    return timeline.total_s - simulate(schedule, topology, free_hops=True, bound=False).total_s <= least_s


def _exposed_s(timeline: Timeline) -> float:
    """Exposed communication up to each rank's last tile, over all ranks: what comes home later has nothing to hide behind."""
    total_s, since_s = 0.0, dict.fromkeys(range(timeline.world_size), 0.0)
    for event in timeline.events:
        if event.kind in ATTENDS:
            total_s += since_s[event.rank] + event.poll_s
            since_s[event.rank] = 0.0
        elif event.kind == WAITS:
            since_s[event.rank] += event.transfer_s + event.progress_s
        elif event.kind not in POSTS:
            since_s[event.rank] += event.poll_s
    return total_s


def _busiest(timeline: Timeline) -> set[int]:
    """The ranks on the devices that compute for the longest time."""
    place = timeline.facts["place"]
    seconds = dict.fromkeys(place, 0.0)
    for event in timeline.events:
        seconds[place[event.rank]] += event.cpu_s
    most = max(seconds.values()) * (1 - 1e-6)
    return {rank for rank, device in enumerate(place) if seconds[device] >= most}


def _gallop(hidden: Callable[[int], bool], most: int) -> tuple[int, int, dict[int, bool]]:
    """Look at 1, 2, 4, ... as far as there are figures: the first and the last with figures, and what was found at each."""
    seen: dict[int, bool] = {}
    count, problem = 1, BeyondFigures("no block was looked at")
    while count <= most:
        try:
            seen[count] = hidden(count)
        except BeyondFigures as error:
            problem = error
            if seen:
                break
        count *= 2
    if not seen:
        raise problem
    first = _first_priced(hidden, min(seen))
    return first, max(seen), {first: hidden(first)} | seen


def _first_priced(hidden: Callable[[int], bool], known: int) -> int:
    """The smallest count with figures, at most `known`."""
    low, high = known // 2, known
    while high - low > 1:
        middle = (low + high) // 2
        try:
            hidden(middle)
            high = middle
        except BeyondFigures:
            low = middle
    return high


def _turns(schedule: Schedule, topology: Topology, count: int) -> Iterable[int]:
    """Counts at which a message reaches a regime, or a tile a point of the efficiency tables, given the schedule of `count`."""
    placed = topology.place(schedule.world_size)
    pairs = dict.fromkeys((placed[rank], placed[(rank + 1) % schedule.world_size]) for rank in range(schedule.world_size))
    paths = [topology.path(*pair) for pair in pairs]
    starts = {start for path in paths for start in path.starts} | {path.eager_nbytes + 1 for path in paths}
    sizes = {op.region.nbytes for rank in range(schedule.world_size) for op in schedule.program(rank) if isinstance(op, Send)}
    turns = {ceil(start * count / nbytes) for start in starts for nbytes in sizes if nbytes}
    forward = [table for number in set(placed) for table in topology.device(number).attention]
    pass_ = schedule.workload.pass_
    tables = [*(forward if pass_ != "backward" else ()), *(one.of_backward() for one in forward if pass_ != "forward")]
    points = {pairs for table in tables for pairs, _ in (*table.full, *table.masked)}
    tiles = {tile.pairs() / ((tile.batch[1] - tile.batch[0]) * (tile.heads[1] - tile.heads[0])) for tile in _tiles(schedule)}
    turns |= {ceil(count * sqrt(point / pairs)) for point in points for pairs in tiles if pairs}
    turns |= {ceil(count * rows) for rows in _filled(schedule, topology, placed)}
    return sorted(turns)


def _filled(schedule: Schedule, topology: Topology, placed: Iterable[int]) -> Iterable[float]:
    """How many times longer a tile must be for its blocks of query rows to fill a device's units."""
    work = schedule.workload
    for device in {topology.graph.vertices[number].device: topology.device(number) for number in placed}.values():
        for table in device.attention if device.units is not None else ():
            for tile in _tiles(schedule):
                yield table.micro_tile.q_rows * (device.units or 0) / (work.batch * work.heads * tile.q.count)


def _tiles(schedule: Schedule) -> Iterable[Any]:
    """Rank 0's, alike ones once."""
    found = {}
    for op in schedule.program(0):
        for tile in op.tiles if isinstance(op, Compute) else ():
            found[tile.q.count, tile.k.count, tile.masked] = tile
    return found.values()


def _bisect(hidden: Callable[[int], bool], seen: dict[int, bool]) -> int | None:
    """The count from which on all hide: between the last seen that does not and the next that does."""
    exposed = [count for count, hides in seen.items() if not hides]
    if exposed and max(exposed) == max(seen):
        return None
    low = max(exposed, default=0)
    high = min(count for count in seen if count > low)
    while exposed and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if hidden(middle) else (middle, high)
    return high


def _at_breakeven(schedule: Schedule, topology: Topology) -> tuple[float, float]:
    """The share of the run that hops cost, and the FLOP/s of rank 0's first attend."""
    timeline = simulate(schedule, topology, bound=False)
    free = simulate(schedule, topology, free_hops=True, bound=False)
    number = topology.place(schedule.world_size)[0]
    kind = topology.graph.vertices[number].device
    costs = Costs(topology.device(number), schedule.workload, f"{topology.name}, {kind}")
    attend = next(op for op in schedule.program(0) if isinstance(op, Compute) and op.flops)
    return 1 - free.total_s / timeline.total_s, attend.flops / costs.cost(attend).seconds


def _f_over_b(schedule: Schedule, topology: Topology, hop: float, tokens: int) -> float | None:
    """FLOPs of a step grow with the square of a block, bytes with the block: where F and B make them equal.

    Of all steps with a hop under them, the one with the least arithmetic.
    """
    dtype = schedule.workload.dtype
    kinds = {topology.graph.vertices[number].device for number in topology.place(schedule.world_size)}
    peaks = []
    for device in (topology.spec.devices[kind] for kind in kinds):
        tables = [device.rate(table) for table in device.attention if table.dtype == dtype]
        own = [rate * device.speed for name, rate in device.peak.items() if name == dtype] or tables
        if not own:
            return None
        peaks.append(max(own))
    flops: dict[int, int] = {}
    nbytes: dict[int, int] = {}
    for op in schedule.program(0):
        if isinstance(op, Compute):
            flops[op.step] = flops.get(op.step, 0) + op.flops
        elif isinstance(op, Send):
            nbytes[op.step] = nbytes.get(op.step, 0) + op.region.nbytes
    ratios = [nbytes[step] / work for step, work in flops.items() if work and step in nbytes]
    return tokens * max(ratios) * min(peaks) / hop if ratios else None

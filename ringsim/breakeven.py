"""The smallest block of tokens per device whose hop hides behind the computation on it, found by simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from .costs import Costs
from .dtypes import ITEMSIZE
from .errors import BeyondFigures, TopologyError
from .schedule import Compute, Schedule
from .simulation import simulate
from .topology import Topology

LARGEST: Final = 2**22
"""Tokens per device up to which a block is sought."""
NOTHING: Final = 1e-9
"""Of a run: waits shorter than that are the rounding of float seconds."""
LARGE_NBYTES: Final = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakeven:
    """`tokens` per device from which on no rank waits for a hop or drives one; None if not up to `looked_to`.

    `looked_from` is the smallest block that the device's figures price: a result equal to it is an upper bound. At `tokens`:
    `exposed` is the share of the run that hops cost although nobody waits (they slow the kernels), `flops_per_s` what the
    kernel gets out of the device. `hop_bytes_per_s` is the slowest hop's rate alone, `f_over_b` the block of arXiv 2310.01889
    (section 3.2, c = F/B, by kv_heads / heads and bytes per element) of that rate and the device's peak; None without a peak.
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


def breakeven(schedule: Schedule, topology: Topology, *, multiple: int = 1) -> Breakeven:
    """The break-even block of `schedule`'s strategy, heads and mask on `topology`; its own lengths do not matter.

    Blocks are multiples of `multiple` tokens. Raises TopologyError where the machine lacks figures or room for the ranks.
    """
    if schedule.world_size < 2:
        raise TopologyError(f"{topology.name}: one rank has no hop to hide; a ring needs --ranks 2 or more")

    def at(count: int) -> Schedule:
        tokens = count * multiple * schedule.world_size
        return replace(schedule, workload=replace(schedule.workload, q_len=tokens, kv_len=tokens, lengths=None))

    def hidden(count: int) -> bool:
        timeline = simulate(at(count), topology)
        return timeline.exposed_s() <= NOTHING * timeline.total_s

    first, last, seen = _gallop(hidden, LARGEST // multiple)
    count = _bisect(hidden, seen)
    rates = (0.0, 0.0) if count is None else _at_breakeven(at(count), topology)
    hop = _slowest_hop(topology, schedule.world_size)
    return Breakeven(
        machine=topology.name,
        schedule=schedule if count is None else at(count),
        tokens=None if count is None else count * multiple,
        looked_from=first * multiple,
        looked_to=last * multiple,
        exposed=rates[0],
        flops_per_s=rates[1],
        hop_bytes_per_s=hop,
        f_over_b=_f_over_b(schedule, topology, hop),
    )


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
    return first, max(seen), seen | ({first: hidden(first)} if first not in seen else {})


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
    """The share of the run that hops cost, and the FLOP/s of the first attend."""
    timeline = simulate(schedule, topology)
    free = simulate(schedule, topology, free_hops=True)
    number = topology.place(schedule.world_size)[0]
    kind = topology.graph.vertices[number].device
    costs = Costs(topology.device(number), schedule.workload, f"{topology.name}, {kind}")
    attend = next(op for op in schedule.program(0) if isinstance(op, Compute) and op.flops)
    return 1 - free.total_s / timeline.total_s, attend.flops / costs.cost(attend).seconds


def _slowest_hop(topology: Topology, world_size: int) -> float:
    placed = topology.place(world_size)
    pairs = dict.fromkeys((placed[rank], placed[(rank + 1) % world_size]) for rank in range(world_size))
    return min(topology.path(*pair).rate(LARGE_NBYTES) for pair in pairs)


def _f_over_b(schedule: Schedule, topology: Topology, hop: float) -> float | None:
    """The c of 2 c^2 heads (head_dim + v_head_dim) / F = c kv_heads (head_dim + v_head_dim) itemsize / B."""
    work = schedule.workload
    kinds = {topology.graph.vertices[number].device for number in topology.place(schedule.world_size)}
    known = []
    for device in (topology.spec.devices[kind] for kind in kinds):
        tables = [device.rate(table) for table in device.attention if table.dtype == work.dtype]
        peaks = [rate * device.speed for dtype, rate in device.peak.items() if dtype == work.dtype] or tables
        if not peaks:
            return None
        known.append(max(peaks))
    return min(known) * ITEMSIZE[work.wire_dtype] * work.kv_heads / (2 * work.heads * hop)

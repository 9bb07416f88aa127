"""Shares of the tokens by what the devices do: weights under which all ranks of a machine compute equally long."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd
from typing import Final

from .calls import parse_call
from .costs import Costs
from .errors import WorkloadError
from .partition import WEIGHTED, apportion
from .schedule import Compute, Schedule
from .topology import Topology

TOLERANCE: Final = 0.005
ROUNDS: Final = 40
FINE: Final = (10_000, 1_000)
"""What weights sum to: at least so much, and so much a rank."""
SHORT: Final = 10
"""Multiples of the least weight that are tried for smaller numbers."""
DAMPED: Final = 0.5
"""Power of the correction once a full one does not at least halve the spread: a causal rank's time grows with its square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Weights of a partition, whole numbers, one a rank; `compute_s`, each rank's predicted seconds of computation under them.

    `spread` is (longest - shortest) / longest: as near to 0 as whole tokens and micro-tiles let it come.
    """

    kind: str
    weights: tuple[int, ...]
    compute_s: tuple[float, ...]
    spread: float
    rounds: int

    @property
    def partition(self) -> str:
        """As text, for Schedule and the like."""
        return f"{self.kind}({','.join(map(str, self.weights))})"


def even_out(schedule: Schedule, topology: Topology, *, tolerance: float = TOLERANCE, rounds: int = ROUNDS) -> Shares:
    """The shares of ``contiguous`` or ``zigzag`` (of `schedule`'s partition) under which all ranks compute for equally long.

    Each round corrects the weights by the seconds that the cost model gives the ranks' ops. Ends when `spread` is below
    `tolerance`, or after `rounds` with the best found; look at `spread`. It knows devices and masks; where ranks share cores, or
    hops do not hide, the end of the program is another matter: simulate it. Raises WorkloadError, TopologyError.
    """
    kind = parse_call(schedule.partition, "partition").name
    if kind not in WEIGHTED or schedule.given is not None:
        raise WorkloadError(
            f"shares are for partitions {' and '.join(WEIGHTED)} of a schedule that is built, not for {schedule.partition!r}"
        )
    prices = _prices(schedule, topology)
    wanted = [1.0] * schedule.world_size
    power, before, best = 1.0, float("inf"), None
    for turn in range(1, rounds + 1):
        found = _measured(schedule, prices, _apportioned(wanted), turn)
        if best is None or found.spread < best.spread:
            best = found
        if best.spread < tolerance:
            short = (_measured(schedule, prices, weights, turn) for weights in _shortened(wanted))
            return next((shares for shares in short if shares.spread < tolerance), best)
        if found.spread > before / 2:
            power = DAMPED
        before = found.spread
        wanted = _corrected(wanted, found.compute_s, power)
    if best is None:
        raise WorkloadError(f"rounds is {rounds}; give 1 or more")
    return best


def compute_s(schedule: Schedule, topology: Topology) -> tuple[float, ...]:
    """Seconds of computation that the cost model gives each rank of `schedule` on its device. Raises TopologyError."""
    return _seconds(schedule, _prices(schedule, topology))


def _prices(schedule: Schedule, topology: Topology) -> list[Costs]:
    """Those of each rank's device, made once for each kind."""
    kinds = [topology.graph.vertices[number].device for number in topology.place(schedule.world_size)]
    made = {
        kind: Costs(topology.spec.devices[kind], schedule.workload, f"{topology.name}, {kind}") for kind in dict.fromkeys(kinds)
    }
    return [made[kind] for kind in kinds]


def _seconds(schedule: Schedule, prices: list[Costs]) -> tuple[float, ...]:
    return tuple(
        sum(price.cost(op).seconds for op in schedule.program(rank, whole=True) if isinstance(op, Compute))
        for rank, price in enumerate(prices)
    )


def _apportioned(wanted: list[float]) -> tuple[int, ...]:
    total = max(FINE[0], FINE[1] * len(wanted))
    # shares of a whole number are apportioned as tokens are, so that the weights sum to it
    return tuple(apportion(total, [round(weight / sum(wanted) * 2**52) for weight in wanted]))


def _shortened(wanted: list[float]) -> Iterator[tuple[int, ...]]:
    """The same in ever larger numbers: 1 to 3 before 454 to 1364."""
    least = min(wanted)
    yield from (tuple(round(weight / least * factor) for weight in wanted) for factor in range(1, SHORT) if least > 0)


def _measured(schedule: Schedule, prices: list[Costs], weights: tuple[int, ...], turn: int) -> Shares:
    kind = parse_call(schedule.partition, "partition").name
    made = Shares(kind=kind, weights=tuple(weight // gcd(*weights) for weight in weights), compute_s=(), spread=0.0, rounds=turn)
    seconds = _seconds(replace(schedule, partition=made.partition), prices)
    spread = 1 - min(seconds) / max(seconds) if max(seconds) > 0 else 0.0
    return replace(made, compute_s=seconds, spread=spread)


def _corrected(wanted: list[float], seconds: tuple[float, ...], power: float) -> list[float]:
    mean = sum(seconds) / len(seconds)
    return [weight * (mean / max(took, mean * 1e-3)) ** power for weight, took in zip(wanted, seconds, strict=True)]

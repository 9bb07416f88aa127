"""Bytes on the wires: latency, then in order behind those of the same pair of ranks, then a flow among all others.

Computation and communication on one device slow each other as the path says.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import simpy

from ..topology import Path
from .cores import Cores
from .flows import Flow, Flows


@dataclass(slots=True, eq=False)
class Load:
    """What one message puts on the wires, from when its latency is over."""

    path: Path
    ends: tuple[int, int]
    nbytes: int
    ready_s: float
    on_moved: Callable[[], None]
    flow: Flow | None = None


class Wires:
    """Carries messages from simulated ranks; `devices` are those of all ranks, `cores` those of the simulated ones.

    `carried` counts bytes by resource.
    """

    def __init__(
        self, env: simpy.Environment, capacities: Sequence[float], devices: Sequence[int], cores: Sequence[Cores]
    ) -> None:
        self._env = env
        self._flows = Flows(env, capacities)
        self._devices = devices
        self._cores: Mapping[int, Cores] = dict(zip(devices, cores, strict=False))
        self._lanes: dict[tuple[int, int], deque[Load]] = defaultdict(deque)
        self._shares: dict[int, Counter[float]] = defaultdict(Counter)
        self._computing: Counter[int] = Counter()
        self.carried: Counter[int] = Counter()
        self._slowed: dict[int, dict[Load, None]] = defaultdict(dict)

    def carry(self, path: Path, source: int, target: int, nbytes: int, on_moved: Callable[[], None]) -> None:
        """Move a message between two ranks; `on_moved` is called when its last byte is there."""
        ends = (self._devices[source], self._devices[target])
        lane = self._lanes[source, target]
        lane.append(Load(path, ends, nbytes, self._env.now + path.latency_s(nbytes), on_moved))
        if len(lane) == 1:
            self._next(lane)

    def _next(self, lane: deque[Load]) -> None:
        delay = lane[0].ready_s - self._env.now
        if delay > 0:
            timer = self._env.timeout(delay)
            timer.callbacks.append(lambda _: self._launch(lane))
        else:
            self._launch(lane)

    def _launch(self, lane: deque[Load]) -> None:
        load = lane[0]
        for number in load.path.resources:
            self.carried[number] += load.nbytes
        self._take(load, 1)
        load.flow = self._flows.start(load.nbytes, load.path.resources, self._rate(load), lambda: self._land(lane))
        if load.path.slowed_by_compute and not load.path.copied:
            for device in load.ends:
                self._slowed[device][load] = None

    def _land(self, lane: deque[Load]) -> None:
        load = lane.popleft()
        if load.path.slowed_by_compute:
            for device in load.ends:
                self._slowed[device].pop(load, None)
        self._take(load, -1)
        load.on_moved()
        if lane:
            self._next(lane)

    def _take(self, load: Load, sign: int) -> None:
        """The device's kernels lose the largest share that a message in flight takes."""
        if not load.path.device_share or load.path.copied:
            return
        share = load.path.device_share
        for device in set(load.ends):
            shares = self._shares[device]
            shares[share] += sign
            if not shares[share]:
                del shares[share]
            self._cores[device].set_speed(1.0 - max(shares, default=0.0))

    def _rate(self, load: Load) -> float:
        path = load.path
        busy = path.slowed_by_compute and not path.copied and any(self._computing[device] for device in load.ends)
        return path.rate(load.nbytes) * (1.0 - path.slowed_by_compute) if busy else path.rate(load.nbytes)

    def computing(self, rank: int, sign: int) -> None:
        """A kernel of `rank` begins (1) or ends (-1), or stands still meanwhile."""
        device = self._devices[rank]
        was = self._computing[device] > 0
        self._computing[device] += sign
        if was != (self._computing[device] > 0):
            for load in self._slowed[device]:
                if load.flow is not None:
                    self._flows.set_cap(load.flow, self._rate(load))

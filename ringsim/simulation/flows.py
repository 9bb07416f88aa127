"""Flows that share resources max-min fairly, in SimPy.

Flows alike (same resources, same cap) form a class with one rate. A start or an end gives new rates only to the classes
that it reaches through resources which can bind: one whose flows could not fill it together constrains nobody.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import inf

import simpy

from .instant import rest

Key = tuple[tuple[int, ...], float]
SAME_INSTANT = 1e-13


@dataclass(slots=True, eq=False)
class Flow:
    """Bytes on their way. `end` is where in its class's service they are all through."""

    nbytes: float
    resources: tuple[int, ...]
    on_end: Callable[[], None]
    alike: Class = field(init=False)
    end: float = 0.0
    active: bool = True


@dataclass(slots=True, eq=False)
class Class:
    """Flows alike. `served` counts the bytes that each of its flows got since the class was last empty."""

    order: int
    resources: tuple[int, ...]
    cap: float
    rate: float = 0.0
    served: float = 0.0
    since_s: float = 0.0
    number: int = 0
    alarm: int = 0
    flows: list[tuple[float, int, Flow]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Resource:
    """A directed capacity, the classes on it, and whether they could fill it."""

    capacity: float
    classes: dict[Class, None] = field(default_factory=dict)
    binding: bool = False


class Flows:
    """All flows of a network. `capacities` are in bytes per second, by resource number."""

    def __init__(self, env: simpy.Environment, capacities: Sequence[float]) -> None:
        self._env = env
        self._resources = [Resource(capacity) for capacity in capacities]
        self._classes: dict[Key, Class] = {}
        self._order = count()
        self._touched: dict[Class, None] = {}
        self._settling = False
        self._ends: list[tuple[float, int, int, float, Class]] = []
        self._timer = 0

    def start(self, nbytes: float, resources: Iterable[int], cap: float, on_end: Callable[[], None]) -> Flow:
        """Let `nbytes` flow over `resources` at no more than `cap` bytes per second; `on_end` is called when all are through."""
        flow = Flow(nbytes, tuple(resources), on_end)
        self._join(flow, cap)
        return flow

    def set_cap(self, flow: Flow, cap: float) -> None:
        """Change the most that an active flow may have."""
        if not flow.active or self._key(flow.resources, cap) == (flow.alike.resources, flow.alike.cap):
            return
        self._advance(flow.alike)
        flow.nbytes = max(flow.end - flow.alike.served, 0.0)
        self._leave(flow)
        self._join(flow, cap)

    def rate(self, flow: Flow) -> float:
        """Bytes per second that a flow gets from this instant on."""
        if self._settling:
            self._settle()
        return flow.alike.rate if flow.active else 0.0

    def load(self) -> list[float]:
        """Bytes per second on each resource from this instant on."""
        if self._settling:
            self._settle()
        return [sum(cls.rate * cls.number for cls in resource.classes) for resource in self._resources]

    def _key(self, resources: tuple[int, ...], cap: float) -> Key:
        return resources, min([cap, *(self._resources[index].capacity for index in resources)])

    def _join(self, flow: Flow, cap: float) -> None:
        key = self._key(flow.resources, cap)
        cls = self._classes.get(key)
        if cls is None:
            cls = self._classes[key] = Class(next(self._order), *key)
        self._advance(cls)
        if not cls.number:
            cls.served = 0.0
            for index in cls.resources:
                self._resources[index].classes[cls] = None
        flow.alike, flow.end = cls, cls.served + flow.nbytes
        cls.number += 1
        heapq.heappush(cls.flows, (flow.end, next(self._order), flow))
        self._touch(cls)

    def _leave(self, flow: Flow) -> None:
        cls = flow.alike
        cls.number -= 1
        cls.alarm += 1
        cls.flows = [entry for entry in cls.flows if entry[2] is not flow]
        heapq.heapify(cls.flows)
        self._touch(cls)

    def _advance(self, cls: Class) -> None:
        now = self._env.now
        if cls.number and cls.since_s < now:
            cls.served += (now - cls.since_s) * cls.rate
        cls.since_s = now

    def _touch(self, cls: Class) -> None:
        """What starts and ends at one instant is settled together, after everything else of that instant."""
        self._touched[cls] = None
        if not self._settling:
            self._settling = True
            rest(self._env).callbacks.append(lambda _: self._settle() if self._settling else None)

    def _settle(self) -> None:
        self._settling = False
        touched, self._touched = self._touched, {}
        for cls in touched:
            if not cls.number:
                for index in cls.resources:
                    self._resources[index].classes.pop(cls, None)
        classes, resources = self._reach(touched)
        for cls, rate in share(classes, resources).items():
            if rate != cls.rate or cls in touched:
                self._advance(cls)
                cls.rate = rate
                self._predict(cls)
        self._set_timer()

    def _reach(self, touched: Iterable[Class]) -> tuple[list[Class], list[Resource]]:
        """The classes whose rates may change, and the resources that bind them."""
        found: dict[Class, None] = dict.fromkeys(cls for cls in touched if cls.number)
        changed = {index for cls in touched for index in cls.resources}
        seen: set[int] = set()
        queue = list(touched)
        while queue:
            for index in queue.pop().resources:
                if index in seen:
                    continue
                seen.add(index)
                resource = self._resources[index]
                bound = resource.binding
                if index in changed:
                    resource.binding = _binds(resource)
                if not (bound or resource.binding):
                    continue
                fresh = [other for other in resource.classes if other not in found]
                found.update(dict.fromkeys(fresh))
                queue += fresh
        binding = [self._resources[index] for index in sorted(seen) if self._resources[index].binding]
        return sorted(found, key=lambda cls: cls.order), binding

    def _predict(self, cls: Class) -> None:
        cls.alarm += 1
        if cls.flows:
            left = max(cls.flows[0][0] - cls.served, 0.0)
            end_s = self._env.now + (left / cls.rate if left else 0.0)
            heapq.heappush(self._ends, (end_s, cls.order, cls.alarm, cls.flows[0][0], cls))

    def _set_timer(self) -> None:
        """One timer, for the next end; a stale one finds a newer number and does nothing."""
        while self._ends and self._ends[0][2] != self._ends[0][4].alarm:
            heapq.heappop(self._ends)
        self._timer += 1
        if self._ends:
            timer = self._env.timeout(max(self._ends[0][0] - self._env.now, 0.0), self._timer)
            timer.callbacks.append(self._on_timer)

    def _on_timer(self, timer: simpy.Event) -> None:
        """All flows that end at this instant end in one event."""
        if timer.value != self._timer:
            return
        now = self._env.now
        ended: list[Flow] = []
        while self._ends and self._ends[0][0] <= now * (1 + SAME_INSTANT):
            *_, alarm, through, cls = heapq.heappop(self._ends)
            if alarm != cls.alarm:
                continue
            self._advance(cls)
            cls.served = max(cls.served, through)
            while cls.flows and cls.flows[0][0] <= cls.served:
                ended.append(heapq.heappop(cls.flows)[2])
                ended[-1].active = False
                cls.number -= 1
            self._touch(cls)
        for flow in ended:
            flow.on_end()


def _binds(resource: Resource) -> bool:
    return len(resource.classes) > 0 and sum(cls.cap * cls.number for cls in resource.classes) > resource.capacity


def share(classes: Sequence[Class], resources: Sequence[Resource]) -> dict[Class, float]:
    """Max-min fair rates by progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2): the level rises until a cap
    or a resource stops those that it binds.
    """
    if not resources:
        return {cls: cls.cap for cls in classes}
    rates: dict[Class, float] = {}
    filling = _Filling(classes, resources)
    by_cap = sorted(classes, key=lambda cls: (cls.cap, cls.order), reverse=True)
    level = 0.0
    while len(rates) < len(classes):
        share_, bottleneck = filling.next()
        # rounding must not let the level fall, or a last flow could be left with nothing
        level = max(level, share_)
        stopped = []
        while by_cap and (by_cap[-1] in rates or by_cap[-1].cap <= level):
            cls = by_cap.pop()
            if cls not in rates:
                stopped.append(cls)
        if not stopped and bottleneck is not None:
            stopped = [cls for cls in bottleneck.classes if cls not in rates]
        for cls in stopped:
            rates[cls] = min(cls.cap, level)
            filling.take(cls, rates[cls])
    return rates


class _Filling:
    """What is left of each resource, and for how many flows. The heap may hold old shares: they never exceed the true ones."""

    def __init__(self, classes: Sequence[Class], resources: Sequence[Resource]) -> None:
        self._left = {resource: resource.capacity for resource in resources}
        self._weight = {resource: sum(cls.number for cls in resource.classes) for resource in resources}
        self._of_class: dict[Class, list[Resource]] = {cls: [] for cls in classes}
        for resource in resources:
            for cls in resource.classes:
                self._of_class[cls].append(resource)
        self._heap = [self._entry(order, resource) for order, resource in enumerate(resources)]
        heapq.heapify(self._heap)

    def _entry(self, order: int, resource: Resource) -> tuple[float, int, int, Resource]:
        weight = self._weight[resource]
        return self._left[resource] / weight, order, weight, resource

    def next(self) -> tuple[float, Resource | None]:
        """The least share that a resource can give to those that still rise on it, and the resource."""
        while self._heap and self._heap[0][2] != self._weight[self._heap[0][3]]:
            _, order, _, resource = heapq.heappop(self._heap)
            if self._weight[resource]:
                heapq.heappush(self._heap, self._entry(order, resource))
        return (self._heap[0][0], self._heap[0][3]) if self._heap else (inf, None)

    def take(self, cls: Class, rate: float) -> None:
        """The flows of a class stop rising at `rate`."""
        for resource in self._of_class[cls]:
            self._left[resource] -= rate * cls.number
            self._weight[resource] -= cls.number

"""A machine as a graph: devices, NICs and switches, wires between them, and the directed resources that messages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from .parts import Device, Link

Kind = Literal["device", "nic", "switch"]


def pattern(name: str) -> str:
    """A part's name with its numbers as stars: what alike parts have in common."""
    return re.sub(r"-\d+(?=/|$| )", "-*", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vertex:
    """A device, NIC or switch. `host` names the node that it belongs to; only what passes on can lie within a route."""

    name: str
    kind: Kind
    host: str = ""
    device: str = ""
    passes_on: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A directed capacity in bytes per second that messages share."""

    name: str
    capacity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """One direction of a wire. A message gets at most `rate` bytes per second of it; `link` is None for what cannot bind."""

    number: int
    source: int
    target: int
    link: str | None
    rate: float
    resources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Exit:
    """Where an outer group attaches, with how many cables, of which one message has `stripe`."""

    vertex: int
    cables: float = 1.0
    stripe: float = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """A member that is built: its devices in order, and its exits."""

    devices: tuple[int, ...]
    exits: tuple[Exit, ...]


@dataclass(slots=True)
class Graph:
    """Vertices, edges (two a wire, in turn) and resources, each by its number."""

    vertices: list[Vertex] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    resources: list[Resource] = field(default_factory=list)
    out: list[list[int]] = field(default_factory=list)
    through: dict[int, int] = field(default_factory=dict)
    egress: dict[int, int] = field(default_factory=dict)
    ingress: dict[int, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    nics: dict[int, list[frozenset[int]]] = field(default_factory=dict)
    own: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def devices(self) -> list[int]:
        """The vertices that compute, in the machine's order."""
        return [number for number, vertex in enumerate(self.vertices) if vertex.kind == "device"]

    def add(self, vertex: Vertex) -> int:
        """A new vertex; returns its number."""
        self.vertices.append(vertex)
        self.out.append([])
        self.numbers[vertex.name] = len(self.vertices) - 1
        return len(self.vertices) - 1

    def resource(self, name: str, capacity: float) -> int:
        """A new resource; returns its number."""
        self.resources.append(Resource(name=name, capacity=capacity))
        return len(self.resources) - 1

    def bound(self, vertex: int, device: Device) -> None:
        """All that leaves or enters a device passes its `egress` and `ingress`."""
        for limits, capacity, word in ((self.egress, device.egress, "egress"), (self.ingress, device.ingress, "ingress")):
            if capacity is not None:
                limits[vertex] = self.resource(f"{self.vertices[vertex].name} {word}", capacity)

    def wire(self, a: int, b: int, name: str | None, link: Link | None, *, cables: float = 1.0, stripe: float = 1.0) -> None:
        """Join a and b by `cables` cables of a link, of which one message has `stripe`. None: no limit."""
        shared: tuple[int, ...] = ()
        if link is not None and link.duplex < 2:
            both = link.duplex * link.achieved * max(link.bandwidth, link.reverse or 0.0) * cables
            shared = (self.resource(f"{self._name(a)} <> {self._name(b)}", both),)
        for source, target, back in ((a, b, False), (b, a, True)):
            resources, rate = shared, inf
            if link is not None:
                cable = link.achieved * (link.reverse if back and link.reverse is not None else link.bandwidth)
                rate = cable * min(cables, stripe)
                number = self.resource(f"{self._name(source)} > {self._name(target)}", cable * cables)
                resources = (number, *shared)
            edge = Edge(number=len(self.edges), source=source, target=target, link=name, rate=rate, resources=resources)
            self.edges.append(edge)
            self.out[source].append(edge.number)

    def _name(self, vertex: int) -> str:
        return self.vertices[vertex].name

    def attach(self, nics: Iterable[int], own: Mapping[int, frozenset[int]]) -> None:
        """A group's NICs, and those of them that each of its devices uses; the others are not for it."""
        every = frozenset(nics)
        for device, mine in own.items():
            self.nics.setdefault(device, []).append(every)
            self.own[device] = self.own.get(device, frozenset()) | mine

    def route(self, source: int, target: int, avoid: frozenset[str] = frozenset()) -> tuple[Edge, ...] | None:
        """The edges from one device to another: fewest wires; among equals the widest; then the one whose first wire was made
        first, and so on.

        Between devices of one node it crosses no NIC; elsewhere it leaves and enters by the devices' own. Where that cannot be,
        it enters by its target's own (as NCCL's PXN does), else by any.
        """
        none = frozenset[int]()
        own = self.own.get(source, none) | self.own.get(target, none)
        behind, ahead = self.nics.get(source, []), self.nics.get(target, [])
        shared = none.union(*(nics for nics in behind if nics in ahead))
        others = none.union(*behind, *ahead) - own
        for closed in dict.fromkeys((shared | others, others, none.union(*ahead) - own, none)):
            route = self._shortest(source, target, avoid, closed)
            if route is not None:
                return route
        return None

    def _shortest(self, source: int, target: int, avoid: frozenset[str], closed: frozenset[int]) -> tuple[Edge, ...] | None:
        distance = self._between(source, target, avoid, closed)
        if not distance:
            return None
        width, onward = {target: inf}, dict[int, Edge]()
        for here in distance:
            for edge in map(self.edges.__getitem__, self.out[here]) if here != target else ():
                if edge.link in avoid or distance.get(edge.target) != distance[here] - 1:
                    continue
                if min(edge.rate, width[edge.target]) > width.get(here, 0.0):
                    width[here], onward[here] = min(edge.rate, width[edge.target]), edge
        route, here = [], source
        while here != target:
            route.append(onward[here])
            here = onward[here].target
        return tuple(route)

    def _passes(self, vertex: int, closed: frozenset[int]) -> bool:
        """Whether a route may pass through a vertex."""
        return self.vertices[vertex].passes_on and vertex not in closed

    def _between(self, source: int, target: int, avoid: frozenset[str], closed: frozenset[int]) -> dict[int, int]:
        """Wires to `target` from all that lies on a shortest way from `source`, the nearest first; nothing if there is no way.

        Looks from both ends in turn, from where there is less to look at: half of the way each reaches far less than all of it.
        """
        ends = {source, target}
        rings = ([[source]], [[target]])
        seen = ({source}, {target})
        while True:
            side = 0 if len(rings[0][-1]) <= len(rings[1][-1]) else 1
            fresh = self._next(rings[side][-1], avoid, seen[side])
            meeting = [
                vertex for vertex in fresh if vertex in seen[1 - side] and (vertex in ends or self._passes(vertex, closed))
            ]
            if meeting:
                break
            if not fresh:
                return {}
            rings[side].append([vertex for vertex in fresh if self._passes(vertex, closed)])
        # from there back to either end, ring by ring
        ways = [self._trace(meeting, rings[side], avoid), self._trace(meeting, rings[1 - side][:-1], avoid)]
        behind, ahead = ways if side == 0 else ways[::-1]
        found = [*reversed(ahead), meeting, *behind]
        return {vertex: distance for distance, ring in enumerate(found) for vertex in ring}

    def _next(self, ring: Iterable[int], avoid: frozenset[str], seen: set[int]) -> list[int]:
        """What lies one wire further, and was not seen before."""
        fresh: dict[int, None] = {}
        for here in ring:
            for number in self.out[here]:
                edge = self.edges[number]
                if edge.target not in seen and edge.link not in avoid:
                    fresh[edge.target] = None
        seen.update(fresh)
        return list(fresh)

    def _trace(self, start: list[int], rings: Sequence[list[int]], avoid: frozenset[str]) -> list[list[int]]:
        """Of each ring, from the last, what lies next to what was found of the one after it, or to `start`."""
        found = []
        for ring in reversed(rings):
            near = {
                self.edges[number].target for here in start for number in self.out[here] if self.edges[number].link not in avoid
            }
            start = [vertex for vertex in ring if vertex in near]
            found.append(start)
        return found

    def route_resources(self, route: tuple[Edge, ...]) -> tuple[int, ...]:
        """All that a message on the route shares, in its order: wires, switches, egress and ingress of all that it passes."""
        found: list[int | None] = []
        for edge in route:
            found += [self.egress.get(edge.source), *edge.resources, self.through.get(edge.target), self.ingress.get(edge.target)]
        return tuple(dict.fromkeys(number for number in found if number is not None))

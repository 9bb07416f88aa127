"""A machine as a graph: devices, NICs and switches, wires between them, and the directed resources that messages share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
    usable: dict[frozenset[str], tuple[int, list[dict[int, list[Edge]]], set[int]]] = field(
        default_factory=dict, compare=False, repr=False
    )

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
        rings, toward = self._between(source, target, avoid, closed), self._open(avoid)[0]
        if not rings:
            return None
        width, onward = {target: inf}, dict[int, Edge]()
        for nearer, ring in pairwise(rings):
            for here in ring:
                ahead = [edge for there in toward[here].keys() & nearer for edge in toward[here][there]]
                best = min(ahead, key=lambda edge: (-min(edge.rate, width[edge.target]), edge.number))
                width[here], onward[here] = min(best.rate, width[best.target]), best
        route, here = [], source
        while here != target:
            route.append(onward[here])
            here = onward[here].target
        return tuple(route)

    def _open(self, avoid: frozenset[str]) -> tuple[list[dict[int, list[Edge]]], set[int]]:
        """The edges out of each vertex over links that are not avoided, by where they lead; and the vertices that pass on."""
        found = self.usable.get(avoid)
        if found is None or found[0] != len(self.edges):
            toward: list[dict[int, list[Edge]]] = [{} for _ in self.vertices]
            for edge in self.edges:
                if edge.link not in avoid:
                    toward[edge.source].setdefault(edge.target, []).append(edge)
            passing = {number for number, vertex in enumerate(self.vertices) if vertex.passes_on}
            found = self.usable[avoid] = len(self.edges), toward, passing
        return found[1:]

    def _between(self, source: int, target: int, avoid: frozenset[str], closed: frozenset[int]) -> list[set[int]]:
        """What lies on a shortest way, by how many wires it is from `target`; nothing if there is no way.

        Looks from both ends in turn, from where there is less to look at: half of the way each reaches far less than all of it.
        """
        toward, passing = self._open(avoid)
        rings, seen = ([{source}], [{target}]), ({source}, {target})
        while True:
            side = 0 if len(rings[0][-1]) <= len(rings[1][-1]) else 1
            mine, others = seen[side], seen[1 - side]
            fresh = set[int]().union(*(toward[here].keys() for here in rings[side][-1])) - mine
            mine |= fresh
            passed = (fresh & passing) - closed
            meeting = passed & others or fresh & others & {source, target}
            if meeting:
                break
            if not passed:
                return []
            rings[side].append(passed)
        # from there back to either end, ring by ring
        ways = [_trace(toward, meeting, rings[side]), _trace(toward, meeting, rings[1 - side][:-1])]
        behind, ahead = ways if side == 0 else ways[::-1]
        return [*reversed(ahead), meeting, *behind]

    def route_resources(self, route: tuple[Edge, ...]) -> tuple[int, ...]:
        """All that a message on the route shares, in its order: wires, switches, egress and ingress of all that it passes."""
        found: list[int | None] = []
        for edge in route:
            found += [self.egress.get(edge.source), *edge.resources, self.through.get(edge.target), self.ingress.get(edge.target)]
        return tuple(dict.fromkeys(number for number in found if number is not None))


def _trace(toward: list[dict[int, list[Edge]]], start: set[int], rings: Sequence[set[int]]) -> list[set[int]]:
    """Of each ring, from the last, what lies next to what was found of the one after it, or to `start`."""
    found = []
    for ring in reversed(rings):
        start = set[int]().union(*(toward[here].keys() & ring for here in start))
        found.append(start)
    return found

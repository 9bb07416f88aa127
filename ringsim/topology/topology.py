"""A machine, compiled: its graph, where the ranks are, and the path between two of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod
from pathlib import Path as FilePath
from typing import Any

from .. import yaml_source
from ..errors import TopologyError
from ..yaml_source import Document
from . import checks, layers
from .build import Builder
from .graph import Edge, Graph
from .groups import Torus2dJoin, Torus3dJoin
from .layers import Settings
from .parts import Device, Transport
from .paths import Path, assemble
from .provenance import Figure, figures
from .spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A machine to simulate on. `spec` is its file; equal files make equal topologies."""

    spec: Spec
    graph: Graph = field(compare=False, repr=False)
    figures: tuple[Figure, ...] = field(compare=False, repr=False)
    devices: tuple[int, ...] = field(compare=False, repr=False)
    _paths: dict[tuple[int, int], Path] = field(default_factory=dict, compare=False, repr=False)
    _kinds: dict[tuple[tuple[str | None, ...], float], Path] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The machine's name."""
        return self.spec.name

    @property
    def source(self) -> str:
        """Where its figures come from, unless they say otherwise."""
        return self.spec.source

    @property
    def transport(self) -> Transport:
        """The transport in use."""
        return self.spec.transports[self.transport_name]

    @property
    def transport_name(self) -> str:
        """Its name."""
        return self.spec.transport or next(iter(self.spec.transports))

    @property
    def slots(self) -> tuple[int, ...]:
        """The device of each rank that the machine has room for, as the file places them."""
        return self._placed()

    def device(self, number: int) -> Device:
        """The figures of a device, by its vertex."""
        return self.spec.devices[self.graph.vertices[number].device]

    def place(self, world_size: int) -> tuple[int, ...]:
        """The device (a vertex) of each rank. Raises TopologyError if there is no room.

        Where all devices are CPUs, more ranks than `ranks` says share them evenly.
        """
        slots = self._placed()
        if world_size <= len(slots):
            return slots[:world_size]
        if not isinstance(self.spec.place, str) or any(self.device(number).kind == "gpu" for number in self.devices):
            counts = ", ".join(self.spec.counts) or "count"
            raise TopologyError(
                f"{self.name} has room for {len(slots)} ranks, not {world_size}: enlarge it with --set ({counts}), or put "
                "several ranks on a device with --place 0,0,1,1,... (which then needs an `inside` link)"
            )
        count = len(self.devices)
        if self.spec.place == "round-robin":
            return tuple(self.devices[rank % count] for rank in range(world_size))
        devices = self._snake() if self.spec.place == "snake" else self.devices
        return tuple(devices[rank * count // world_size] for rank in range(world_size))

    def _placed(self) -> tuple[int, ...]:
        order = self.spec.place
        if not isinstance(order, str):
            return tuple(self._named(entry) for entry in order)
        devices = self._snake() if order == "snake" else self.devices
        slots = [number for number in devices for _ in range(self.device(number).ranks)]
        if order != "round-robin":
            return tuple(slots)
        hosts: dict[str, list[int]] = defaultdict(list)
        for number in slots:
            hosts[self.graph.vertices[number].host].append(number)
        if len(hosts) == 1 and len(self.devices) > 1:
            raise TopologyError("round-robin goes over hosts (groups with `nics`, CPUs), and all devices are on one: use a list")
        deepest = max(map(len, hosts.values()))
        return tuple(of_host[turn] for turn in range(deepest) for of_host in hosts.values() if turn < len(of_host))

    def _snake(self) -> tuple[int, ...]:
        machine = self.spec.machine
        while isinstance(machine, str) and machine not in self.spec.devices:
            machine = self.spec.groups[machine]
        if not isinstance(machine, Torus2dJoin | Torus3dJoin) or machine.size != len(self.devices):
            raise TopologyError(
                "snake goes over a torus of devices (machine: join torus2d or torus3d, each member one device), which this "
                "machine is not: use block, round-robin or a list"
            )
        return tuple(self.devices[number] for number in snake(machine.shape))

    def _named(self, entry: int | str) -> int:
        if isinstance(entry, int):
            if entry >= len(self.devices):
                raise TopologyError(f"device {entry} of {len(self.devices)}; they count from 0")
            return self.devices[entry]
        number = self.graph.numbers.get(entry)
        if number is None or self.graph.vertices[number].kind != "device":
            names = [self.graph.vertices[number].name for number in self.devices]
            raise TopologyError(f"no device {entry!r}; {yaml_source.nearest(entry, names)}")
        return number

    def path(self, source: int, target: int) -> Path:
        """The path from one device to another, or between two ranks on one device. Raises TopologyError without a route."""
        key = (source, target)
        if key not in self._paths:
            self._paths[key] = self._path(source, target)
        return self._paths[key]

    def _path(self, source: int, target: int) -> Path:
        edges, resources = self._route(source, target)
        capacities = [self.graph.resources[number].capacity for number in resources]
        alone = min([inf, *(edge.rate for edge in edges), *capacities])
        key = (tuple(edge.link for edge in edges), alone)
        like = self._kinds.get(key)
        if like is None:
            like = self._kinds[key] = assemble(edges, self.spec.links, resources, alone, self.transport)
        return replace(like, vertices=tuple(edge.target for edge in edges[:-1]), resources=resources)

    def _route(self, source: int, target: int) -> tuple[tuple[Edge, ...], tuple[int, ...]]:
        names = [self.graph.vertices[number].name for number in (source, target)]
        if source == target:
            inside = self.device(source).inside
            if inside is None:
                kind = self.graph.vertices[source].device
                raise TopologyError(
                    f"{self.name}: two ranks share {names[0]}, which names no link between them: set devices.{kind}.inside"
                )
            link = self.spec.links[inside]
            rate = link.bandwidth * link.achieved
            return (Edge(number=-1, source=source, target=target, link=inside, rate=rate, resources=()),), ()
        route = self.graph.route(source, target, frozenset(self.transport.avoid))
        if route is None:
            avoided = f" over links that transport {self.transport_name!r} uses" if self.transport.avoid else ""
            raise TopologyError(f"{self.name}: no route from {names[0]} to {names[1]}{avoided}: join them, or avoid fewer links")
        return route, self.graph.route_resources(route)

    def edges(self, source: int, target: int) -> tuple[Edge, ...]:
        """The wires from one device to another. Raises TopologyError without a route."""
        return self._route(source, target)[0]


def snake(shape: Sequence[int]) -> tuple[int, ...]:
    """The points of a torus, by number (the last dimension varies fastest), each the neighbour of the one before.

    To and fro along each dimension in turn. The slowest is the first that is even: then the last point is the neighbour of the
    first, around the torus. Where all are odd, it is not.
    """
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    slowest = next((axis for axis, size in enumerate(shape) if size % 2 == 0), 0)
    path: tuple[int, ...] = (0,)
    for axis in (*(axis for axis in reversed(range(len(shape))) if axis != slowest), slowest):
        path = tuple(
            step * strides[axis] + point for step in range(shape[axis]) for point in (path if step % 2 == 0 else path[::-1])
        )
    return path


def load(
    name_or_path: str | FilePath,
    settings: Settings = (),
    *,
    place: str | Sequence[int | str] | None = None,
    transport: str | None = None,
) -> Topology:
    """A topology by file path, or by the name of a shipped one, with `settings` laid over it.

    settings: a mapping or ``KEY=VALUE`` texts, such as ``{"nodes": 4, "links.ndr.bandwidth": "800 Gbit/s"}``. place: ``block``,
    ``round-robin``, ``snake``, or the device of each rank by index or name. Raises TopologyError with file, line and remedy.
    """
    return compile_document(layers.read(name_or_path), settings, place=place, transport=transport)


def parse(text: str, file: str = "<text>", settings: Settings = (), **choices: Any) -> Topology:
    """A topology from YAML text; otherwise as `load`. Raises TopologyError."""
    return compile_document(yaml_source.parse(text, file, TopologyError), settings, **choices)


def compile_document(
    document: Document,
    settings: Settings = (),
    *,
    place: str | Sequence[int | str] | None = None,
    transport: str | None = None,
) -> Topology:
    """A topology from a parsed document; otherwise as `load`. Raises TopologyError."""
    if not isinstance(document.value, dict):
        raise document.fail((), f"expected keys and values, found {type(document.value).__name__}")
    chosen = {"place": list(place) if isinstance(place, list | tuple) else place, "transport": transport}
    if "ringsim" in document.value:
        checks.version(document)
    whole = layers.compose(document, settings, {key: value for key, value in chosen.items() if value is not None})
    counts = whole.value.get("counts")
    known = {name: count for name, count in counts.items() if type(count) is int} if isinstance(counts, dict) else {}
    spec = yaml_source.load(whole, Spec, {"counts": known})
    checks.names(spec, whole)
    graph = Builder(spec, whole).machine()
    checks.groups(spec, whole)
    topology = Topology(spec=spec, graph=graph, figures=figures(whole), devices=tuple(graph.devices))
    checks.routes(graph, frozenset(topology.transport.avoid), whole)
    try:
        topology.slots  # noqa: B018 - may name a device that there is not
    except TopologyError as error:
        raise whole.fail(("place",), str(error)) from None
    return topology

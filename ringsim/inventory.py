"""What a topology comes to, as tables: devices, wires, shared resources, the hops of a ring, a route and its bottleneck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import isinf
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import TopologyError
from .hops import Hop, limit, ring_hops
from .topology import Topology, pattern
from .units import format_rate, format_size, format_time


def _table(*columns: str, right: Iterable[int] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in right else "left")
    return table


def _rate(value: float) -> str:
    return "no limit" if isinf(value) else format_rate(value, "B/s")


def _devices(topology: Topology) -> Table:
    table = _table("devices", "", "kind", "memory", "peak", "hosts", right=(1,))
    by_kind: dict[str, list[int]] = {}
    for number in topology.devices:
        by_kind.setdefault(topology.graph.vertices[number].device, []).append(number)
    for kind, numbers in by_kind.items():
        device = topology.spec.devices[kind]
        peak = ", ".join(f"{dtype} {format_rate(rate)}" for dtype, rate in device.peak.items())
        memory = "" if device.memory is None else format_size(device.memory)
        speed = "" if device.speed == 1 else f" x {device.speed:g}"
        hosts = len({topology.graph.vertices[number].host for number in numbers})
        what = f"cpu, {device.cores} cores, {device.ranks} ranks" if device.kind == "cpu" else "gpu"
        table.add_row(kind, str(len(numbers)), f"{what}{speed}", memory, peak, str(hosts))
    return table


def _resources(topology: Topology, *, each: bool) -> Table:
    table = _table("shared resource, one direction", "capacity", "how many", right=(1, 2))
    if each:
        for resource in topology.graph.resources:
            table.add_row(resource.name, _rate(resource.capacity), "1")
        return table
    alike = Counter((pattern(resource.name), resource.capacity) for resource in topology.graph.resources)
    for (name, capacity), number in alike.items():
        table.add_row(name, _rate(capacity), str(number))
    return table


def _hops(topology: Topology, world_size: int) -> Table:
    table = _table("ring hops", "over", "latency", "alone", "all at once", "bound by", "e.g.", right=(0, 2, 3, 4))
    alike: dict[tuple[Any, ...], list[Hop]] = {}
    for hop in ring_hops(topology, world_size):
        key = (hop.links, hop.latency_s, hop.alone, round(hop.together), pattern(hop.bottleneck))
        alike.setdefault(key, []).append(hop)
    for (links, latency_s, alone, together, bottleneck), hops in alike.items():
        over, example = ", ".join(links) or "nothing", f"{hops[0].rank} > {hops[0].target}"
        table.add_row(str(len(hops)), over, format_time(latency_s), _rate(alone), _rate(together), bottleneck, example)
    return table


def portrait(topology: Topology, world_size: int, *, each: bool = False) -> RenderableType:
    """What `topologies show` prints. With `each`, every resource on a line of its own."""
    used = topology.transport
    head = [
        f"{topology.name}: {len(topology.devices)} devices, {world_size} ranks ({_placement(topology)}), "
        f"transport {topology.transport_name} ({used.progress}, driven by {used.drives})",
        f"{topology.source}",
        "",
    ]
    parts: list[RenderableType] = [Text("\n".join(head)), _devices(topology), Text("")]
    if topology.graph.resources:
        parts += [_resources(topology, each=each), Text("")]
    if world_size > 1:
        parts += [
            _hops(topology, world_size),
            Text("\nrates are those of a large message; all at once: every rank sends to the next"),
        ]
    kinds = Counter(figure.kind for figure in topology.figures)
    parts.append(Text("figures: " + ", ".join(f"{number} {kind}" for kind, number in kinds.items())))
    return Group(*parts)


def _placement(topology: Topology) -> str:
    return topology.spec.place if isinstance(topology.spec.place, str) else "placed by a list"


def route(topology: Topology, world_size: int, source: int, target: int) -> RenderableType:
    """The wires between two ranks, and what bounds a large message on them. Raises TopologyError."""
    placed = topology.place(world_size)
    for rank in (source, target):
        if not 0 <= rank < world_size:
            raise TopologyError(f"rank {rank} is outside a world of {world_size}")
    if source == target:
        raise TopologyError(f"a route joins two ranks; {source} and {target} are one")
    ends = placed[source], placed[target]
    names = [topology.graph.vertices[number].name for number in ends]
    table = _table("from", "to", "link", "one message", "shared", right=(3, 4))
    for edge in topology.edges(*ends):
        shared = ", ".join(_rate(topology.graph.resources[number].capacity) for number in edge.resources)
        row = (topology.graph.vertices[edge.source].name, topology.graph.vertices[edge.target].name)
        table.add_row(*row, edge.link or "-", _rate(edge.rate), shared or "-")
    path = topology.path(*ends)
    cost = _table("messages from", "latency", "rate", right=(0, 1, 2))
    for start, latency_s, rate in zip(path.starts, path.latencies_s, path.rates, strict=True):
        cost.add_row(format_size(start), format_time(latency_s), _rate(rate))
    tail = f"\na large message alone is bound by {limit(topology, *ends)}; progress {path.progress}, driven by {path.drives}"
    return Group(Text(f"rank {source} ({names[0]}) to rank {target} ({names[1]})\n"), table, Text(""), cost, Text(tail))


def sources(topology: Topology) -> RenderableType:
    """Every figure with its kind, source and place."""
    table = _table("figure", "value", "kind", "source", "at")
    for figure in topology.figures:
        table.add_row(figure.key, figure.text, figure.kind, figure.source, figure.position)
    return table


def to_dict(topology: Topology, world_size: int) -> dict[str, Any]:
    """Plain values for JSON: what `portrait` and `sources` show, each resource and hop."""
    placed = topology.place(world_size)
    return {
        "name": topology.name,
        "source": topology.source,
        "transport": topology.transport_name,
        "devices": [
            {"name": topology.graph.vertices[number].name, "device": topology.graph.vertices[number].device}
            for number in topology.devices
        ],
        "place": [topology.graph.vertices[number].name for number in placed],
        "resources": [{"name": one.name, "capacity_bytes_per_s": one.capacity} for one in topology.graph.resources],
        "ring": [
            {
                "rank": hop.rank,
                "to": hop.target,
                "links": list(hop.links),
                "latency_s": hop.latency_s,
                "alone_bytes_per_s": hop.alone,
                "together_bytes_per_s": hop.together,
                "bottleneck": hop.bottleneck,
            }
            for hop in ring_hops(topology, world_size)
        ],
        "figures": [
            {"key": one.key, "value": one.text, "kind": one.kind, "source": one.source, "at": one.position}
            for one in topology.figures
        ],
    }


def difference(one: Topology, other: Topology) -> RenderableType:
    """What the second topology has otherwise than the first: figures, parts, ring hops."""
    table = _table("what", one.name, other.name if other.name != one.name else "changed")
    for key, before, after in _changes(one, other):
        table.add_row(key, before, after)
    return table if table.row_count else Text(f"{one.name} and {other.name}: no difference")


def _changes(one: Topology, other: Topology) -> Iterable[tuple[str, str, str]]:
    figures = [{figure.key: figure.text for figure in topology.figures} for topology in (one, other)]
    for key in dict.fromkeys([*figures[0], *figures[1]]):
        before, after = (found.get(key, "-") for found in figures)
        if before != after:
            yield key, before, after
    facts = [_facts(topology) for topology in (one, other)]
    for key in dict.fromkeys([*facts[0], *facts[1]]):
        before, after = (found.get(key, "-") for found in facts)
        if before != after:
            yield key, before, after


def _facts(topology: Topology) -> dict[str, str]:
    """What the file comes to, in words that can be compared."""
    world_size = len(topology.slots)
    devices = Counter(topology.graph.vertices[number].device for number in topology.devices)
    found = {f"{kind}, how many": str(number) for kind, number in devices.items()}
    found |= {"ranks": str(world_size), "place": _placement(topology), "transport": topology.transport_name}
    resources = Counter((pattern(one.name), _rate(one.capacity)) for one in topology.graph.resources)
    for (name, capacity), number in resources.items():
        found[name] = ", ".join(filter(None, (found.get(name), f"{number} x {capacity}")))
    hops = Counter((", ".join(hop.links), _rate(hop.together)) for hop in ring_hops(topology, world_size))
    for (links, rate), number in hops.items():
        key = f"ring hops over {links}"
        found[key] = ", ".join(filter(None, (found.get(key), f"{number} x {rate}")))
    return found

"""The words of a drawing: what stands in boxes, on wires, in the title and in the legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..topology import Topology
from ..topology.graph import Edge
from ..topology.groups import Explicit, Group, Item, Joined, Repeat
from ..topology.parts import Link, Regime
from ..units import format_rate, format_size, format_time

LONGEST = 22
Row = tuple[str, ...]
HEADER = ("", "per direction", "latency", "", "")
WRAPS = "dotted ends wrap around to the other side"
ARROWS = "arrows: the way of the first bandwidth"


def short(text: str, most: int = LONGEST) -> str:
    """A text on one line; a long one keeps its two ends."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}"


def member(item: Item) -> str:
    """What members are numbered by."""
    if isinstance(item, str):
        return item
    return str((item.name if isinstance(item, Group) else None) or getattr(item, "join", ""))


def about(group: Group) -> str:
    """A group's join, in a word or two."""
    across = group.across if isinstance(group, Joined) else None
    join = str(getattr(group, "join", ""))
    return join if across is None else f"{join} {' × '.join(map(str, across))}"


def box_lines(topology: Topology, number: int, base: str, ranks: int) -> tuple[tuple[str, str], ...]:
    """Lines below a box's label, each with the link in whose colour it stands, or ''."""
    vertex, graph = topology.graph.vertices[number], topology.graph
    if vertex.kind == "switch" and number in graph.through:
        return ((f"backplane {rate(graph.resources[graph.through[number]].capacity)}", ""),)
    if vertex.kind != "device":
        return ()
    device = topology.spec.devices[vertex.device]
    lines = [] if base == vertex.device else [(short(vertex.device), "")]
    if ranks != 1:
        lines.append((f"{ranks or 'no'} ranks", ""))
    if device.inside is not None and (ranks > 1 or device.kind == "cpu"):
        lines += [
            (f"inside: {device.inside}", device.inside),
            (" · ".join(figures(topology.spec.links[device.inside])), device.inside),
        ]
    return tuple(lines)


def served(topology: Topology, nic: int, skip: int) -> tuple[tuple[str, str], ...]:
    """Lines in a NIC that has no wires to its devices: which they are, by their names after `skip` letters, and the link."""
    graph = topology.graph
    edges = [graph.edges[number] for number in graph.out[nic] if graph.vertices[graph.edges[number].target].kind == "device"]
    names = [short(graph.vertices[edge.target].name[skip:]) for edge in edges]
    text = ", ".join(names) if len(names) < 3 else f"{names[0]} … {names[-1]} ({len(names)})"
    link = edges[0].link if edges else None
    return ((f"to {text}", ""),) if link is None else ((f"to {text}", link), (f"by {link}", link))


def rate(per_s: float) -> str:
    """Bytes per second for people."""
    return format_rate(per_s, "B/s")


def _latency(link: Link) -> str:
    if not link.regimes:
        return format_time(link.latency or 0.0)
    latencies = [regime.latency for regime in link.regimes]
    least, most = format_time(min(latencies)), format_time(max(latencies))
    return least if least == most else f"{least} to {most}"


def _each_way(link: Link) -> str:
    back = "" if link.reverse is None else f", back {rate(link.reverse * link.achieved)}"
    return rate(link.bandwidth * link.achieved) + back


def figures(link: Link, cables: float = 1.0) -> Row:
    """A link's bandwidth per direction (of one of several cables) and latency, and what is not as usual."""
    each = " each" if abs(cables - 1) > 1e-9 else ""
    back = () if link.reverse is None else (f"back {rate(link.reverse * link.achieved)}",)
    duplex = () if link.duplex >= 2 else (f"duplex {link.duplex:g}",)
    return (rate(link.bandwidth * link.achieved) + each, *back, _latency(link), *duplex)


def wire(name: str | None, cables: float, striped: bool, count: int) -> str:
    """What a wire is, in front of its figures."""
    text = name or "no limit"
    if abs(cables - 1) > 1e-9:
        text = f"{cables:.4g} × {text}" + (" striped" if striped else "")
    return text if count == 1 else f"{text}, {count} wires"


def wired(topology: Topology, edge: Edge) -> tuple[float, bool]:
    """How many cables a wire has, and whether one message has them all."""
    if edge.link is None:
        return 1.0, False
    link = topology.spec.links[edge.link]
    cable = link.bandwidth * link.achieved
    cables = topology.graph.resources[edge.resources[0]].capacity / cable
    return cables, cables > 1 and edge.rate > cable * (1 + 1e-9)


def heading(topology: Topology) -> tuple[str, str]:
    """The machine's name, and a line below it."""
    ranks, devices = len(topology.slots), len(topology.devices)
    made = _made(topology)
    on = f"{ranks} rank{'s' * (ranks != 1)} on {devices} device{'s' * (devices != 1)}"
    return short(topology.name, 60), " · ".join([*([made] if made else []), on, f"transport {topology.transport_name}"])


def _made(topology: Topology) -> str:
    """What the outermost group is."""
    item = topology.spec.machine
    while isinstance(item, str) and item in topology.spec.groups and item not in topology.spec.devices:
        item = topology.spec.groups[item]
    if isinstance(item, Explicit):
        return f"explicit, {len(item.members)} members"
    if not isinstance(item, Joined):
        return ""
    if isinstance(item.of, tuple):
        some = [f"{one.count} × {member(one.of)}" if isinstance(one, Repeat) else member(one) for one in item.of[:4]]
        return f"{about(item)} of {', '.join(some)}" + ", ..." * (len(item.of) > 4)
    return f"{about(item)} of {member(item.of)}" if item.across else f"{about(item)} of {item.size} × {member(item.of)}"


def links(topology: Topology) -> list[Row]:
    """The legend's row of every link: name, per direction, latency, wires, notes. What is on no wire comes last."""
    wires = Counter((edge.link, f"{wired(topology, edge)[0]:.4g}") for edge in topology.graph.edges[::2])
    present = dict.fromkeys(topology.graph.vertices[number].device for number in topology.devices)
    inside = {topology.spec.devices[name].inside for name in present}
    rows: list[Row] = []
    for name, link in topology.spec.links.items():
        counts = {cables: count for (link, cables), count in wires.items() if link == name}
        where = [
            f"{count} wire{'s' * (count != 1)}" + f" of {cables} cables" * (cables != "1") for cables, count in counts.items()
        ]
        where += ["inside devices"] if name in inside else []
        rows.append((name, _each_way(link), _latency(link), ", ".join(where) or "on no wire", "; ".join(_notes(topology, name))))
    rows.sort(key=lambda row: row[3] == "on no wire")
    if wires[None, "1"]:
        rows.append(("", "no limit", "", f"{wires[None, '1']} wires", "between NICs and their devices: nothing that could bind"))
    return rows


def _notes(topology: Topology, name: str) -> list[str]:
    link, transport = topology.spec.links[name], topology.transport
    notes = []
    if link.achieved != 1:
        notes.append(f"{link.achieved:g} of {rate(link.bandwidth)}")
    if link.duplex < 2:
        both = link.duplex * link.achieved * max(link.bandwidth, link.reverse or 0.0)
        notes.append(f"both ways together {rate(both)}")
    notes += _regimes(link.regimes)
    route = transport.paths.get(name)
    if route is not None:
        said = [] if route.latency is None else [format_time(route.latency)]
        said += [] if route.bandwidth is None else [f"at most {rate(route.bandwidth)}"]
        text = ", ".join(said) or "; ".join(_regimes(route.regimes))
        notes += [f"by {topology.transport_name} end to end {text}"] if text else []
    if name in transport.avoid:
        notes.append(f"{topology.transport_name} avoids it")
    return notes


def _regimes(regimes: Sequence[Regime]) -> list[str]:
    words = []
    for regime in regimes[:4]:
        most = "" if regime.bandwidth is None else f", at most {rate(regime.bandwidth)}"
        words.append(f"from {format_size(regime.from_)}: {format_time(regime.latency)}{most}")
    return words if len(regimes) <= 4 else [*words, "..."]


def devices(topology: Topology) -> list[Row]:
    """The legend's row of every kind of device that there is: name, what it is, memory, how many, notes."""
    counts = Counter(topology.graph.vertices[number].device for number in topology.devices)
    rows: list[Row] = []
    for name, count in counts.items():
        device = topology.spec.devices[name]
        cores = f", {device.cores} core{'s' * (device.cores != 1)}" if device.cores is not None else ""
        notes = [] if device.memory is None else [f"memory {format_size(device.memory)}"]
        notes += [] if device.speed == 1 else [f"speed {device.speed:g}"]
        for word, bound in (("egress", device.egress), ("ingress", device.ingress)):
            notes += [] if bound is None else [f"{word} {rate(bound)}"]
        rows.append((name, f"{device.kind}{cores}", "", f"{count} device{'s' * (count != 1)}", "; ".join(notes)))
    return rows

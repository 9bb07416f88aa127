"""The short joins that may say the same as every part and wire written out, and the proof that one does."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from ..topology import Topology
from ..topology.graph import Graph
from .wires import Cable, Node
from .writing import words


def candidates(node: Node) -> Iterator[list[str]]:
    """Groups that may be equal to the node; whether one is, `same` says."""
    used = words(node)
    if len(set(used.devices.values())) != 1 or len(node.of("gpu")) < 2:
        return
    of = [f"count: {len(node.of('gpu'))}", f"of: {next(iter(used.devices.values()))}"]
    inside = [wire for wire in node.wires if wire.cable.kind not in ("pcie", "socket", "numa", "host-nic")]
    fabric = Counter(wire.cable for wire in inside)
    extra = []
    if len(fabric) == 1:
        join = "switch" if node.of("fabric") else "mesh"
        extra = [join, used.links[next(iter(fabric))]]
    elif fabric:
        return
    if extra and not node.of("nic", "switch", "root"):
        yield [f"join: {extra[0]}", f"link: {extra[1]}", *of]
    if not node.of("switch", "nic", "fabric") and len(node.of("root")) == 1 and not extra:
        yield ["join: switch", f"link: {used.links[node.wires[0].cable]}", *of]
    tree = _tree(node, dict(used.links))
    if tree:
        yield [*tree[:1], *of, *tree[1:], *([f"also: [{{join: {extra[0]}, link: {extra[1]}}}]"] if extra else [])]


def _tree(node: Node, links: dict[Cable, str]) -> list[str]:
    """The keys of a `pcie-tree`, as its first GPU, switch and NIC have them; none where it cannot be one."""
    kind = {spot.name: spot.kind for spot in node.spots}
    by_ends: dict[tuple[str, str], list[str]] = defaultdict(list)
    below: Counter[str] = Counter()
    for wire in node.wires:
        by_ends[kind[wire.a], kind[wire.b]].append(links[wire.cable])
        below[wire.b] += kind[wire.a] == "gpu" and kind[wire.b] == "switch"
    first = {ends: names[0] for ends, names in by_ends.items()}
    if not {("gpu", "switch"), ("switch", "root")} <= first.keys() or not max(below.values()):
        return []
    lines = ["join: pcie-tree", f"link: {first['gpu', 'switch']}", f"uplink: {first['switch', 'root']}"]
    lines.append(f"per_switch: {max(below.values())}")
    roots = len(node.of("root"))
    lines += [f"roots: {roots}", f"socket: {first['root', 'root']}"] if roots > 1 else []
    nics = [spot.name for spot in node.of("nic")]
    own = dict(node.own)
    if nics and set(own) == {spot.name for spot in node.of("gpu")} and ("nic", "switch") in first:
        affinity = [nics.index(own[spot.name]) for spot in node.of("gpu")]
        keys = f"count: {len(nics)}, link: {first['nic', 'switch']}, affinity: {affinity}"
        lines.append(f"nics: {{{keys}}}   # {', '.join(nics[:16])}")
    return lines


def same(one: Topology, other: Topology) -> bool:
    """Whether two machines have the same graph: devices and NICs in order, switches by what hangs on them, NICs of each device.

    Switches are told apart by colours, refined until nothing changes; where two look alike, the answer is no.
    """
    graphs = (one.graph, other.graph)
    seen: dict[object, int] = {}
    colours = [[seen.setdefault(mark, len(seen)) for mark in _marks(graph)] for graph in graphs]
    known = 0
    while known != len(set(colours[0] + colours[1])):
        known = len(set(colours[0] + colours[1]))
        colours = [_refined(graph, found, seen) for graph, found in zip(graphs, colours, strict=True)]
    if any(len(set(found)) < len(found) for found in colours) or set(colours[0]) != set(colours[1]):
        return False
    return _facts(graphs[0], colours[0]) == _facts(graphs[1], colours[1])


def _marks(graph: Graph) -> Iterator[object]:
    """What tells a vertex apart before its wires do: devices and NICs by their order, switches not at all."""
    count: Counter[str] = Counter()
    for vertex in graph.vertices:
        count[vertex.kind] += 1
        yield vertex.kind, vertex.device, vertex.passes_on, 0 if vertex.kind == "switch" else count[vertex.kind]


def _refined(graph: Graph, colours: list[int], seen: dict[object, int]) -> list[int]:
    """A colour per vertex by its own and those of its neighbours over each link."""
    fresh = []
    for number, colour in enumerate(colours):
        near = sorted((graph.edges[edge].link or "", colours[graph.edges[edge].target]) for edge in graph.out[number])
        fresh.append(seen.setdefault((colour, tuple(near)), len(seen)))
    return fresh


def _facts(graph: Graph, colours: list[int]) -> tuple[object, ...]:
    ends = ((colours[edge.source], colours[edge.target], edge) for edge in graph.edges)
    wires = Counter((source, target, edge.link, edge.rate, len(edge.resources)) for source, target, edge in ends)
    own = {colours[device]: frozenset(colours[nic] for nic in nics) for device, nics in graph.own.items()}
    every = {colours[device]: [frozenset(colours[nic] for nic in nics) for nics in found] for device, found in graph.nics.items()}
    return wires, own, every

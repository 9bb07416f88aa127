"""What a machine consists of, as it is drawn: groups within groups, and switches in tiers above what they join."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ..topology import Topology
from ..topology.graph import Graph
from ..topology.groups import (
    PLAIN,
    Explicit,
    FatTreeJoin,
    Group,
    Item,
    Joined,
    MeshJoin,
    PcieTreeJoin,
    RailsJoin,
    Repeat,
    RingJoin,
    SwitchJoin,
    Torus2dJoin,
    Torus3dJoin,
)
from . import words

Kind = Literal["device", "nic", "switch", "group", "row", "dots"]
Form = Literal["tiers", "circle", "grid"]
MOST_ON_CIRCLE = 10


@dataclass(slots=True, eq=False)
class Part:
    """A box, a frame around boxes (`group`), a frameless row of a tree, or the dots that stand for `count` alike.

    `alike` is equal for parts that look the same. `tiers` lead from the members outward; `samples` show in detail what the
    members show as closed boxes; a closed group has its content in `hides`. `chain`: each member joins the next. `told`: a NIC
    names its devices instead of wires to them. `quiet`: links that a box names in words. x, y, w, h are inches, from the lower
    left corner.
    """

    kind: Kind
    label: str = ""
    about: str = ""
    vertex: int = -1
    alike: int = -1
    lines: tuple[tuple[str, str], ...] = ()
    form: Form = "tiers"
    shape: tuple[int, ...] = ()
    cell: tuple[int, ...] = ()
    spot: tuple[float, ...] = ()
    count: int = 0
    slope: tuple[float, float] = (1.0, 0.0)
    chain: bool = False
    below: bool = False
    arcs: bool = False
    even: bool = False
    told: bool = False
    quiet: frozenset[str] = frozenset()
    members: list[Part] = field(default_factory=list)
    tiers: list[list[Part]] = field(default_factory=list)
    nics: list[Part] = field(default_factory=list)
    samples: list[Part] = field(default_factory=list)
    hides: Part | None = None
    x: float = 0.0
    y: float = 0.0
    w: float = 0.0
    h: float = 0.0

    @property
    def boxed(self) -> bool:
        """Whether it is one box, rather than a frame or a row."""
        return self.kind in ("device", "nic", "switch") or self.hides is not None

    def inner(self) -> Iterator[Part]:
        """The parts directly within."""
        yield from self.members
        for tier in self.tiers:
            yield from tier
        yield from self.nics
        yield from self.samples

    def walk(self) -> Iterator[Part]:
        """Itself and all parts within."""
        yield self
        for part in self.inner():
            yield from part.walk()

    def move(self, dx: float, dy: float) -> None:
        """Shift it with all within."""
        for part in self.walk():
            part.x += dx
            part.y += dy


ALSO = {"switch": "to a switch", "mesh": "to each"}


def near(graph: Graph, vertex: int) -> list[int]:
    """The vertices at the other ends of a vertex's wires."""
    return [graph.edges[number].target for number in graph.out[vertex]]


def read(topology: Topology) -> Part:
    """The whole machine."""
    return _Reader(topology).part(topology.spec.machine, "", "")


class _Reader:
    """Follows the topology's groups as its builder does, so that names lead to vertices."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._graph = topology.graph
        self._kinds: dict[Hashable, int] = {}
        self._ranks = Counter(topology.slots)
        self._own: dict[str, list[int]] = defaultdict(list)
        for number, vertex in enumerate(self._graph.vertices):
            if vertex.kind != "device":
                self._own[vertex.name.rpartition("/")[0]].append(number)

    def part(self, item: Item | Sequence[Item], name: str, label: str) -> Part:
        """A member by its name in the machine and within its group."""
        if isinstance(item, str):
            if item in self._topology.spec.devices:
                return self._box(self._graph.numbers[name or item], label or item)
            if item in PLAIN and item not in self._topology.spec.groups:
                return self._box(self._graph.numbers[name], label)
            return self.part(self._topology.spec.groups[item], name, label)
        if not isinstance(item, Group):
            raise TypeError(f"{name}: a list has no place of its own")
        part = Part("group", label, words.about(item))
        # a plain NIC is among the group's own below
        part.members = [box for box in (self.part(*member) for member in _members(item, name)) if box.kind != "nic"]
        extra = item.also if isinstance(item, Joined) else ()
        own = [self._box(number, self._last(number)) for number in self._own[name]]
        own = [box for box in own if box.label not in {fabric.link for fabric in extra}]
        for member in part.members if extra else ():
            member.quiet = frozenset(fabric.link for fabric in extra)
            member.lines += tuple((f"{fabric.link} {ALSO[fabric.join]}", fabric.link) for fabric in extra)
        part.nics = [box for box in own if box.kind == "nic"]
        _ARRANGE[type(item)](self, item, part, [box for box in own if box.kind == "switch"])
        for nic in part.nics if part.form != "tiers" else ():
            nic.told, nic.lines = True, words.served(self._topology, nic.vertex, len(name) + 1 if name else 0)
        alike = tuple(tuple(box.alike for box in row) for row in (part.members, *part.tiers, part.nics))
        part.alike = self._kind((_base(label), part.about, alike))
        return part

    def _last(self, number: int) -> str:
        return self._graph.vertices[number].name.rpartition("/")[2]

    def _kind(self, key: Hashable) -> int:
        return self._kinds.setdefault(key, len(self._kinds))

    def _box(self, number: int, label: str) -> Part:
        vertex = self._graph.vertices[number]
        edges = [self._graph.edges[out] for out in self._graph.out[number]]
        wires = Counter((edge.link or "", edge.rate, self._graph.vertices[edge.target].kind) for edge in edges)
        lines = words.box_lines(self._topology, number, _base(label), self._ranks[number])
        return Part(
            vertex.kind, label, vertex=number, lines=lines, alike=self._kind((vertex.kind, lines, frozenset(wires.items())))
        )

    def _row(self, members: list[Part], switch: Part) -> Part:
        alike = self._kind(("row", switch.alike, tuple(part.alike for part in members)))
        return Part("row", alike=alike, members=members, tiers=[[switch]])

    def switch(self, group: SwitchJoin, part: Part, switches: list[Part]) -> None:
        """The switch above; in a node with NICs below, where it is out of the way of the NICs' wires."""
        part.tiers = [switches]
        part.below = bool(part.nics) and all(member.kind == "device" for member in part.members)

    def closed(self, group: Joined, part: Part, switches: list[Part]) -> None:
        """Rings and meshes on a circle; in a row where NICs need the room above, and where a circle has no shape."""
        boxes = all(member.kind == "device" for member in part.members)
        row = len(part.members) < 3 or (bool(part.nics) and boxes)
        part.form, part.arcs, part.chain = ("tiers" if row else "circle"), row, isinstance(group, RingJoin)

    def torus(self, group: Torus2dJoin | Torus3dJoin, part: Part, switches: list[Part]) -> None:
        """A grid; each member knows its cell."""
        part.form, part.shape, part.chain = "grid", group.shape, True
        for member, cell in zip(part.members, product(*map(range, group.shape)), strict=True):
            member.cell = cell

    def rails(self, group: RailsJoin, part: Part, switches: list[Part]) -> None:
        """Rails side by side, the spine above them."""
        spine = [box for box in switches if group.spine is not None and box.label == "spine"]
        part.tiers, part.even = [[box for box in switches if box not in spine]], True
        if spine:
            part.tiers.append(spine)

    def fat_tree(self, group: FatTreeJoin, part: Part, switches: list[Part]) -> None:
        """Each leaf above its members, the spine above the leaves."""
        leaves, spine = switches, switches[len(switches) :]
        if len(switches) > 1:
            leaves, spine = switches[:-1], switches[-1:]
        rows = [part.members[begin : begin + group.leaf] for begin in range(0, len(part.members), group.leaf)]
        part.members = [self._row(row, leaf) for row, leaf in zip(rows, leaves, strict=True)]
        part.tiers = [spine] if spine else []

    def pcie_tree(self, group: PcieTreeJoin, part: Part, switches: list[Part]) -> None:
        """A tree whose roots are above; below in a node, whose NICs are among the members and lead out above."""
        roots, lower = switches[: group.roots], switches[group.roots :]
        rows = []
        for index, switch in enumerate(lower):
            nics = [nic for nic in part.nics if near(self._graph, nic.vertex)[0] == switch.vertex]
            rows.append(self._row(part.members[index * group.per_switch : (index + 1) * group.per_switch] + nics, switch))
        share = len(rows) // len(roots)
        part.members = [self._row(rows[index * share : (index + 1) * share], root) for index, root in enumerate(roots)]
        turned = bool(part.nics) and bool(part.label)
        for box in part.walk():
            box.below = turned
        part.nics = []

    def explicit(self, group: Explicit, part: Part, switches: list[Part]) -> None:
        """Without switches a circle; else switches by how far they are from what they serve."""
        found = [member for member in part.members if member.kind == "switch"]
        part.members = [member for member in part.members if member.kind != "switch"] or found
        found = [] if part.members is found else found
        if not found and all(member.kind == "device" for member in part.members) and 2 < len(part.members) <= MOST_ON_CIRCLE:
            part.form = "circle"
        part.arcs = part.form == "tiers"
        distance, queue = {}, deque[int]()
        for number in (box.vertex for member in part.members for box in (*member.walk(),) if box.vertex >= 0):
            distance[number] = 0
            queue.append(number)
        while queue:
            here = queue.popleft()
            for other in near(self._graph, here):
                if other not in distance:
                    distance[other] = distance[here] + 1
                    queue.append(other)
        tiers: dict[int, list[Part]] = defaultdict(list)
        for box in found:
            tiers[distance.get(box.vertex, 1)].append(box)
        part.tiers = [tiers[level] for level in sorted(tiers)]


_ARRANGE: dict[type[Group], Callable[[_Reader, Any, Part, list[Part]], None]] = {
    SwitchJoin: _Reader.switch,
    MeshJoin: _Reader.closed,
    RingJoin: _Reader.closed,
    Torus2dJoin: _Reader.torus,
    Torus3dJoin: _Reader.torus,
    RailsJoin: _Reader.rails,
    FatTreeJoin: _Reader.fat_tree,
    PcieTreeJoin: _Reader.pcie_tree,
    Explicit: _Reader.explicit,
}


def _base(label: str) -> str:
    """A member's label without its number."""
    base, _, number = label.rpartition("-")
    return base if number.isdecimal() else label


def _members(group: Group, name: str) -> Iterator[tuple[Item, str, str]]:
    """Each member with its name in the machine and within the group."""
    start = f"{name}/" if name else ""
    if isinstance(group, Explicit):
        yield from ((item, start + label, label) for label, item in group.members.items())
    elif isinstance(group, Joined):
        items = group.of if isinstance(group.of, tuple) else (Repeat.model_construct(count=group.size, of=group.of),)
        index = 0
        for item in items:
            for _ in range(item.count if isinstance(item, Repeat) else 1):
                one = item.of if isinstance(item, Repeat) else item
                label = f"{words.member(one)}-{index}"
                yield one, start + label, label
                index += 1

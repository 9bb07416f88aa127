"""From a topology file's groups to the graph: parts are counted out, named and wired, inside out."""

from __future__ import annotations

from collections.abc import Iterator

from .. import yaml_source
from ..errors import TopologyError
from ..yaml_source import Document, Place
from .graph import Exit, Graph, Kind, Part, Vertex
from .groups import (
    PLAIN,
    Connection,
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
from .joins import JOIN, also, inner, nics
from .parts import Link
from .spec import Spec

Plain = str | SwitchJoin | MeshJoin | RingJoin | Torus2dJoin | Torus3dJoin | PcieTreeJoin | RailsJoin | FatTreeJoin | Explicit
LONE = "`count` and `of` alone stand only in a list of members: this needs a `join`"
MOST_VERTICES = 2**17
MOST_WIRES = 2**19
MOST_RANKS = 2**20
DEEPEST = 16


class Builder:
    """Builds one machine. Raises TopologyError with the file and line of the group at fault."""

    def __init__(self, spec: Spec, document: Document) -> None:
        self.graph = Graph()
        self.spec = spec
        self._document = document
        self._replaced: set[str] = set()
        self._ranks = 0
        self.seats: dict[int, int] = {}
        """In a PCIe tree, the switch of each device."""

    def machine(self) -> Graph:
        """The whole graph."""
        machine = self.spec.machine
        if isinstance(machine, tuple):
            raise self.fault(("machine",), "a list of members needs a `join` that says how they are joined")
        self.item(machine, "", ("machine",), host="", depth=0, root=True)
        if not self.graph.devices:
            raise self.fault(("machine",), "the machine has no device")
        missed = [name for name in self.spec.replace if name not in self._replaced]
        if missed:
            names = [self.graph.vertices[number].name for number in self.graph.devices]
            raise self.fault(("replace", missed[0]), f"no such device; {yaml_source.nearest(missed[0], names)}")
        return self.graph

    def fault(self, place: Place, message: str) -> TopologyError:
        """The error for what stands at `place`."""
        error = self._document.fail(place, message)
        return error if isinstance(error, TopologyError) else TopologyError(str(error))

    def item(self, item: Item, prefix: str, place: Place, *, host: str, depth: int, root: bool = False) -> Part:
        """One member under the name `prefix`. A name is looked up among devices, then among groups."""
        if depth > DEEPEST:
            raise self.fault(place, f"groups lie within each other more than {DEEPEST} deep: does one contain itself?")
        if isinstance(item, str):
            if item in self.spec.devices:
                return self.device(item, prefix or item, place, host)
            if item not in self.spec.groups:
                known = [*self.spec.devices, *self.spec.groups, *(PLAIN if place[-2:-1] == ("members",) else ())]
                raise self.fault(place, f"no device or group {item!r}; {yaml_source.nearest(item, known)}")
            return self.item(self.spec.groups[item], prefix, ("groups", item), host=host, depth=depth + 1, root=root)
        if isinstance(item, Repeat):
            raise self.fault(place, LONE)
        if item.nics is not None or (isinstance(item, Explicit) and item.exits and not host):
            host = prefix
        if isinstance(item, Explicit):
            devices, tops = self._explicit(item, prefix, place, host, depth)
        else:
            devices, tops = self._joined(item, prefix, place, host, depth)
        exits = self._exits(item, devices, tops, prefix, place, left=not root)
        for index, connection in enumerate(item.connect):
            self._connect(connection, prefix, (*place, "connect", index))
        if isinstance(item, Explicit):
            self._attach(item, devices, prefix, place)
        return Part(devices, exits)

    def _attach(self, group: Explicit, devices: tuple[int, ...], prefix: str, place: Place) -> None:
        """Plain NICs belong to the devices that are wired to them, or as `affinity` says."""
        numbers = [self.graph.numbers[inner(prefix, name)] for name, item in group.members.items() if item == "nic"]
        nics = frozenset(number for number in numbers if self.graph.vertices[number].kind == "nic")
        near = {device: frozenset(self.graph.edges[number].target for number in self.graph.out[device]) for device in devices}
        own = {device: nics & found for device, found in near.items()}
        for name, nic in group.affinity.items():
            where = (*place, "affinity", name)
            device, number = self.named(name, prefix, where), self.named(nic, prefix, where)
            if device not in own or number not in nics:
                raise self.fault(where, f"a device and a plain NIC of this group, found {name!r} and {nic!r}")
            own[device] = frozenset({number})
        if nics:
            self.graph.attach(nics, own)

    def device(self, kind: str, name: str, place: Place, host: str) -> Part:
        """A device, or what `replace` puts in its place."""
        if name in self.spec.replace:
            self._replaced.add(name)
            kind = self.spec.replace[name]
            if kind not in self.spec.devices:
                where = ("replace", name)
                raise self.fault(where, f"no device {kind!r}; {yaml_source.nearest(kind, list(self.spec.devices))}")
        spec = self.spec.devices[kind]
        self._ranks += spec.ranks
        if self._ranks > MOST_RANKS:
            raise self.fault(place, f"the machine has room for more than {MOST_RANKS} ranks")
        own = name if spec.kind == "cpu" and not host else host
        number = self.vertex(name, "device", place, host=own, device=kind, passes_on=False)
        self.graph.bound(number, spec)
        if spec.inside is not None:
            self.link(spec.inside, ("devices", kind, "inside"))
        return Part((number,), (Exit(number),))

    def vertex(self, name: str, kind: Kind, place: Place, *, host: str = "", device: str = "", passes_on: bool = True) -> int:
        """A vertex of a name that is new."""
        if name in self.graph.numbers:
            raise self.fault(place, f"two parts have the name {name!r}: give a group a `name`")
        if len(self.graph.vertices) >= MOST_VERTICES:
            raise self.fault(place, f"the machine has more than {MOST_VERTICES} devices, NICs and switches")
        return self.graph.add(Vertex(name=name, kind=kind, host=host, device=device, passes_on=passes_on))

    def link(self, name: str, place: Place) -> Link:
        """The link of a name."""
        if name not in self.spec.links:
            raise self.fault(place, f"no link {name!r}; {yaml_source.nearest(name, list(self.spec.links))}")
        return self.spec.links[name]

    def room(self, wires: int, place: Place) -> None:
        """Refuse more wires than a machine may have, before they are made."""
        if len(self.graph.edges) // 2 + wires > MOST_WIRES:
            raise self.fault(place, f"the machine has more than {MOST_WIRES} wires")

    def wire(self, a: Exit, b: int, name: str, place: Place, cables: float = 1.0) -> None:
        """Join an exit to a vertex by a link."""
        self.room(1, place)
        self.graph.wire(a.vertex, b, name, self.link(name, place), cables=a.cables * cables, stripe=a.stripe)

    def members(self, group: Joined, prefix: str, place: Place, host: str, depth: int) -> list[Part]:
        """The members of a group, each named by what it is and its index."""
        parts = []
        for index, (item, where) in enumerate(self._items(group, (*place, "of"))):
            label = item if isinstance(item, str) else item.name or item.join
            parts.append(self.item(item, inner(prefix, f"{label}-{index}"), where, host=host, depth=depth + 1))
        return parts

    def _items(self, group: Joined, place: Place) -> Iterator[tuple[Plain, Place]]:
        if not isinstance(group.of, tuple):
            yield from ((self._plain(group.of, place), place) for _ in range(group.size))
            return
        for index, item in enumerate(group.of):
            if isinstance(item, Repeat):
                where = (*place, index, "of")
                yield from ((self._plain(item.of, where), where) for _ in range(item.count))
            else:
                yield item, (*place, index)

    def _plain(self, item: Item, place: Place) -> Plain:
        if isinstance(item, Repeat):
            raise self.fault(place, LONE)
        return item

    def _joined(
        self, group: Joined, prefix: str, place: Place, host: str, depth: int
    ) -> tuple[tuple[int, ...], tuple[Exit, ...]]:
        parts = self.members(group, prefix, place, host, depth)
        tops = JOIN[type(group)](self, group, parts, prefix, place)
        for index, extra in enumerate(group.also):
            also(self, extra, parts, prefix, (*place, "also", index))
        stripe = max((exit_.stripe for part in parts for exit_ in part.exits), default=1.0)
        devices = tuple(device for part in parts for device in part.devices)
        return devices, tuple(Exit(top, stripe=stripe) for top in tops)

    def _explicit(
        self, group: Explicit, prefix: str, place: Place, host: str, depth: int
    ) -> tuple[tuple[int, ...], tuple[Exit, ...]]:
        devices: list[int] = []
        for name, item in group.members.items():
            full, where = inner(prefix, name), (*place, "members", name)
            if item in PLAIN and item not in self.spec.groups and item not in self.spec.devices:
                self.vertex(full, "nic" if item == "nic" else "switch", where, host=host)
            else:
                # its wires may all be those of `connect`
                devices += self.item(item, full, where, host=host, depth=depth + 1, root=True).devices
        return tuple(devices), ()

    def named(self, name: str, prefix: str, place: Place) -> int:
        """The vertex that a connection or an exit names, relative to its group."""
        full = inner(prefix, name)
        if full not in self.graph.numbers:
            start = len(prefix) + 1 if prefix else 0
            known = [known[start:] for known in self.graph.numbers if known.startswith(inner(prefix, ""))]
            raise self.fault(place, f"no part {name!r} here; {yaml_source.nearest(name, known)}")
        return self.graph.numbers[full]

    def _connect(self, connection: Connection, prefix: str, place: Place) -> None:
        a, b = (self.named(name, prefix, place) for name in (connection.from_, connection.to))
        if a == b:
            raise self.fault(place, f"{connection.to!r} is connected to itself")
        self.wire(Exit(a), b, connection.link, place, float(connection.cables))

    def _exits(
        self, group: Group, devices: tuple[int, ...], tops: tuple[Exit, ...], prefix: str, place: Place, *, left: bool
    ) -> tuple[Exit, ...]:
        if group.exits:
            return tuple(Exit(self.named(name, prefix, (*place, "exits", index))) for index, name in enumerate(group.exits))
        if group.nics is not None:
            return nics(self, group.nics, group, devices, prefix=prefix, place=(*place, "nics"))
        if group.uplinks is not None:
            if len(tops) != 1:
                raise self.fault(
                    place, f"`uplinks` leave from a group's one switch, and this has {len(tops) or 'none'}: give `nics`"
                )
            return (Exit(tops[0].vertex, float(group.uplinks), min(tops[0].stripe, float(group.uplinks))),)
        if not left:
            return ()
        ways = "`nics`, the `exits` that it names, or `uplinks` from its switch"
        raise self.fault(place, f"a group within another says how it is left: {ways}")

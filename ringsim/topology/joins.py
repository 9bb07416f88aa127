"""How each template wires its members. Each function returns the switches that an outer group may attach to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import prod
from typing import TYPE_CHECKING, Any

from ..yaml_source import Place
from .graph import Exit, Part
from .groups import (
    Also,
    FatTreeJoin,
    Group,
    MeshJoin,
    Nics,
    PcieTreeJoin,
    RailsJoin,
    RingJoin,
    SwitchJoin,
    Torus2dJoin,
    Torus3dJoin,
)

if TYPE_CHECKING:
    from .build import Builder

Parts = Sequence[Part]
Tops = tuple[int, ...]


def inner(prefix: str, name: str) -> str:
    """A part's name within the group `prefix`."""
    return f"{prefix}/{name}" if prefix else name


def switch(build: Builder, group: SwitchJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """Every exit to one switch."""
    centre = build.vertex(inner(prefix, "switch"), "switch", place)
    if group.backplane is not None:
        build.graph.through[centre] = build.graph.resource(f"{inner(prefix, 'switch')} backplane", group.backplane)
    for exit_ in (exit_ for part in parts for exit_ in part.exits):
        build.wire(exit_, centre, group.link, (*place, "link"))
    return (centre,)


def mesh(build: Builder, group: MeshJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """A wire per pair, between exits of the same number."""
    _alike(build, parts, place)
    build.room(len(parts) * (len(parts) - 1) // 2 * len(parts[0].exits), (*place, "link"))
    for one, other in combinations(parts, 2):
        _pair(build, one, other, group.link, place)
    return ()


def ring(build: Builder, group: RingJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """A wire from each to the next."""
    return _torus(build, parts, (len(parts),), group.link, place)


def torus(build: Builder, group: Torus2dJoin | Torus3dJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """Rings along each dimension; routes go along the first dimension first."""
    if prod(group.shape) != len(parts):
        text = " x ".join(map(str, group.shape))
        raise build.fault((*place, "shape"), f"{text} is {prod(group.shape)} members, and there are {len(parts)}")
    return _torus(build, parts, group.shape, group.link, place)


def _torus(build: Builder, parts: Parts, shape: tuple[int, ...], link: str, place: Place) -> Tops:
    _alike(build, parts, place)
    for exit_ in (exit_ for part in parts for exit_ in part.exits):
        build.graph.vertices[exit_.vertex] = replace(build.graph.vertices[exit_.vertex], passes_on=True)
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for axis, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        for here in product(*map(range, shape)):
            if size == 1 or (size == 2 and here[axis] == 1):
                continue
            number = sum(coordinate * step for coordinate, step in zip(here, strides, strict=True))
            ahead = number + stride * ((here[axis] + 1) % size - here[axis])
            _pair(build, parts[number], parts[ahead], link, place)
    return ()


def pcie_tree(build: Builder, group: PcieTreeJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """Members on switches, switches on root complexes, root complexes to each other."""
    count = -(-len(parts) // group.per_switch)
    if count % group.roots:
        raise build.fault((*place, "roots"), f"{count} switches do not divide among {group.roots} root complexes")
    roots = [build.vertex(inner(prefix, f"root-{index}"), "switch", place) for index in range(group.roots)]
    for index in range(count):
        centre = build.vertex(inner(prefix, f"switch-{index}"), "switch", place)
        for part in parts[index * group.per_switch : (index + 1) * group.per_switch]:
            build.seats |= dict.fromkeys(part.devices, centre)
            for exit_ in part.exits:
                build.wire(exit_, centre, group.link, (*place, "link"))
        build.wire(Exit(centre), roots[index * group.roots // count], group.uplink, (*place, "uplink"))
    for one, other in combinations(roots, 2):
        build.wire(Exit(one), other, group.socket or "", (*place, "socket"))
    return tuple(roots)


def rails(build: Builder, group: RailsJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """Exit i of every member to rail i; the rails to a spine, or else devices pass on within their node."""
    _alike(build, parts, place)
    switches = [build.vertex(inner(prefix, f"rail-{index}"), "switch", place) for index in range(len(parts[0].exits))]
    for part in parts:
        for exit_, centre in zip(part.exits, switches, strict=True):
            build.wire(exit_, centre, group.link, (*place, "link"))
    if group.spine is None:
        for number in (number for part in parts for number in part.devices):
            build.graph.vertices[number] = replace(build.graph.vertices[number], passes_on=True)
        return tuple(switches)
    spine = build.vertex(inner(prefix, "spine"), "switch", place)
    for index, centre in enumerate(switches):
        _trunk(build, group, Bundle(centre, spine, group.spine), [part.exits[index] for part in parts], place)
    return (spine,)


def fat_tree(build: Builder, group: FatTreeJoin, parts: Parts, prefix: str, place: Place) -> Tops:
    """Members to leaf switches, leaves to a spine; one leaf alone needs none."""
    leaves = []
    for begin in range(0, len(parts), group.leaf):
        centre = build.vertex(inner(prefix, f"leaf-{begin // group.leaf}"), "switch", place)
        leaves.append((centre, [exit_ for part in parts[begin : begin + group.leaf] for exit_ in part.exits]))
        for exit_ in leaves[-1][1]:
            build.wire(exit_, centre, group.link, (*place, "link"))
    if len(leaves) == 1:
        return (leaves[0][0],)
    spine = build.vertex(inner(prefix, "spine"), "switch", place)
    for leaf, exits in leaves:
        _trunk(build, group, Bundle(leaf, spine, group.trunk or group.link), exits, place)
    return (spine,)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The cables of a link between a leaf or rail and the spine."""

    leaf: int
    spine: int
    link: str


def _trunk(build: Builder, group: RailsJoin | FatTreeJoin, trunk: Bundle, exits: Sequence[Exit], place: Place) -> None:
    """A bundle that carries what the exits bring, over its oversubscription; a message has as many cables as at its exit."""
    key = "spine" if isinstance(group, RailsJoin) else "trunk"
    below, above = build.link(group.link, (*place, "link")), build.link(trunk.link, (*place, key))
    brought = sum(exit_.cables for exit_ in exits) * below.bandwidth * below.achieved / (group.oversubscription or 1.0)
    stripe = max((exit_.stripe for exit_ in exits), default=1.0)
    cables = brought / (above.bandwidth * above.achieved)
    build.wire(Exit(trunk.leaf, cables, stripe), trunk.spine, trunk.link, (*place, key))


def _alike(build: Builder, parts: Parts, place: Place) -> None:
    exits = [len(part.exits) for part in parts]
    if len(set(exits)) > 1:
        raise build.fault((*place, "of"), f"members joined one to one have equally many NICs or exits, found {exits}")


def _pair(build: Builder, one: Part, other: Part, link: str, place: Place) -> None:
    for mine, theirs in zip(one.exits, other.exits, strict=True):
        build.wire(mine, theirs.vertex, link, (*place, "link"))


def nics(build: Builder, spec: Nics, group: Group, devices: tuple[int, ...], *, prefix: str, place: Place) -> tuple[Exit, ...]:
    """The node's NICs, each wired to the devices that use it; in a PCIe tree to their switches."""
    affinity = spec.affinity or tuple(index * spec.count // len(devices) for index in range(len(devices)))
    if len(affinity) != len(devices):
        raise build.fault((*place, "affinity"), f"names a NIC for each device: {len(devices)} devices, {len(affinity)} given")
    if set(affinity) != set(range(spec.count)):
        raise build.fault(
            (*place, "affinity") if spec.affinity else place,
            f"{spec.count} NICs for {len(devices)} devices, used: {sorted(set(affinity))}; every NIC needs a device: change the "
            "number of NICs with that of devices, or, if one device has several, give one NIC their cables with `stripe`",
        )
    exits = []
    for index in range(spec.count):
        number = build.vertex(inner(prefix, f"nic-{index}"), "nic", place, host=prefix)
        mine = [device for device, nic in zip(devices, affinity, strict=True) if nic == index]
        if isinstance(group, PcieTreeJoin):
            mine = list(dict.fromkeys(build.seats[device] for device in mine))
        for end in mine:
            if spec.link is None:
                build.graph.wire(end, number, None, None)
            else:
                build.wire(Exit(end), number, spec.link, (*place, "link"))
        exits.append(Exit(number, float(spec.stripe), float(spec.stripe)))
    own = {device: frozenset({exits[nic].vertex}) for device, nic in zip(devices, affinity, strict=True)}
    build.graph.attach((exit_.vertex for exit_ in exits), own)
    return tuple(exits)


def also(build: Builder, extra: Also, parts: Parts, prefix: str, place: Place) -> None:
    """A second fabric between the same members; its switch has the name of its link."""
    if extra.join == "mesh":
        _alike(build, parts, place)
        for one, other in combinations(parts, 2):
            _pair(build, one, other, extra.link, place)
        return
    centre = build.vertex(inner(prefix, extra.link), "switch", place)
    for exit_ in (exit_ for part in parts for exit_ in part.exits):
        build.wire(exit_, centre, extra.link, (*place, "link"))


JOIN: dict[type[Group], Callable[[Builder, Any, Parts, str, Place], Tops]] = {
    SwitchJoin: switch,
    MeshJoin: mesh,
    RingJoin: ring,
    Torus2dJoin: torus,
    Torus3dJoin: torus,
    PcieTreeJoin: pcie_tree,
    RailsJoin: rails,
    FatTreeJoin: fat_tree,
}

"""What must hold between the parts of a topology: names that lead somewhere, and a route for every pair."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations_with_replacement

import pydantic

from ..units import shown
from ..yaml_source import Document, Place, nearest
from .graph import Graph
from .groups import PLAIN
from .spec import FORMAT, Spec

LINKS = ("link", "uplink", "socket", "spine", "trunk")
INNER = ("of", "members", "nics", "also", "connect")


def version(document: Document) -> None:
    """Raise the document's error for another version of the format, before anything else in it is called unknown."""
    found = document.value["ringsim"]
    if isinstance(found, bool) or found != FORMAT:
        older = ": version 1 comes from an older `ringsim calibrate`; calibrate again" if found == 1 else ""
        raise document.fail(("ringsim",), f"this ringsim reads version {FORMAT} of the format, found {shown(found)}{older}")


def names(spec: Spec, document: Document) -> None:
    """Raise the document's error if a transport, a device or `transport` itself names what there is not."""
    if spec.transport is not None and spec.transport not in spec.transports:
        raise document.fail(("transport",), f"no transport {spec.transport!r}; {nearest(spec.transport, list(spec.transports))}")
    if spec.transport is None and len(spec.transports) > 1:
        raise document.fail((), f"key 'transport' is missing: which of {', '.join(spec.transports)} is in use?")
    known = list(spec.links)
    for name, transport in spec.transports.items():
        named: list[tuple[tuple[str | int, ...], str]] = [(("avoid", index), link) for index, link in enumerate(transport.avoid)]
        named += [(("paths", link), link) for link in transport.paths]
        for place, link in named:
            if link not in spec.links:
                raise document.fail(("transports", name, *place), f"no link {link!r}; {nearest(link, known)}")
    for name, device in spec.devices.items():
        if device.inside is not None and device.inside not in spec.links:
            raise document.fail(("devices", name, "inside"), f"no link {device.inside!r}; {nearest(device.inside, known)}")


def groups(spec: Spec, document: Document) -> None:
    """Raise the document's error if a named group, in use or not, names a link, device or group that there is not."""
    for name, item in spec.groups.items():
        for place, kind, found in _names(item, ("groups", name)):
            known = list(spec.links) if kind == "link" else [*spec.devices, *spec.groups]
            known += PLAIN if kind == "part" else ()
            if found not in known:
                what = "link" if kind == "link" else "device or group"
                raise document.fail(place, f"no {what} {found!r}; {nearest(found, known)}")


def _names(item: object, place: Place) -> Iterator[tuple[Place, str, str]]:
    """Where a group names something; whether a `link`, a `member`, or a `part`, which may be a plain one; and the name."""
    if isinstance(item, str):
        yield place, "part" if place[-2:-1] == ("members",) else "member", item
    elif isinstance(item, list | tuple):
        for index, inner in enumerate(item):
            yield from _names(inner, (*place, index))
    elif isinstance(item, dict):
        for key, inner in item.items():
            yield from _names(inner, (*place, key))
    elif isinstance(item, pydantic.BaseModel):
        for key in type(item).model_fields:
            value = getattr(item, key)
            if key in LINKS and value is not None:
                yield (*place, key), "link", value
            elif key in INNER:
                yield from _names(value, (*place, key))


def routes(graph: Graph, avoid: frozenset[str], document: Document) -> None:
    """Raise the document's error if two devices have no route."""
    reach = _fabrics(graph, avoid)
    if not reach or frozenset.intersection(*reach.values()):
        return
    alike: dict[frozenset[int], list[int]] = defaultdict(list)
    for device, fabrics in reach.items():
        alike[fabrics].append(device)
    for (mine, ones), (theirs, others) in combinations_with_replacement(alike.items(), 2):
        for one in () if mine & theirs else ones:
            wired = (graph.edges[number] for number in graph.out[one])
            near = {one, *(edge.target for edge in wired if edge.link not in avoid)}
            other = next((other for other in others if other not in near), None)
            if other is not None:
                ends = " and ".join(graph.vertices[number].name for number in (one, other))
                without = f" without {', '.join(sorted(avoid))}, which the transport avoids" if avoid else ""
                raise document.fail(
                    ("machine",),
                    f"{ends} cannot reach each other{without}: no link joins them, and no switch or NIC is "
                    "in reach of both (devices pass messages on only in rings, tori and rails without a spine)",
                )


def _fabrics(graph: Graph, avoid: frozenset[str]) -> dict[int, frozenset[int]]:
    """For each device the connected sets of what passes on (by their first vertex) that it is in or next to."""
    owner = list(range(len(graph.vertices)))

    def root(vertex: int) -> int:
        while owner[vertex] != vertex:
            owner[vertex] = owner[owner[vertex]]
            vertex = owner[vertex]
        return vertex

    usable = [edge for edge in graph.edges if edge.link not in avoid]
    for edge in usable:
        if graph.vertices[edge.source].passes_on and graph.vertices[edge.target].passes_on:
            owner[root(edge.source)] = root(edge.target)

    def around(vertex: int) -> Iterable[int]:
        yield vertex
        yield from (graph.edges[number].target for number in graph.out[vertex] if graph.edges[number].link not in avoid)

    return {
        device: frozenset(root(near) for near in around(device) if graph.vertices[near].passes_on) for device in graph.devices
    }

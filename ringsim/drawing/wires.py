"""The wires of a drawing: which there are between the parts drawn, their ways, and where their labels find room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import hypot

from ..topology import Topology
from . import words
from .parts import Part
from .places import STUB, Box

Point = tuple[float, float]
STEPS = 36
FAR = 3.0


@dataclass(slots=True, eq=False)
class Wire:
    """A wire, or `count` between the same two boxes. `way` are its points, one by one; two `stubs` stand for a wrap-around."""

    a: Part
    b: Part
    link: str | None
    cables: float
    striped: bool
    count: int = 0
    way: list[Point] = field(default_factory=list)
    bent: bool = False
    stubs: list[tuple[Point, Point]] = field(default_factory=list)

    @property
    def sort(self) -> tuple[str | None, float, bool]:
        """What its label says of it."""
        return (self.link, round(self.cables, 6), self.striped)


def collect(topology: Topology, drawn: Part) -> list[Wire]:
    """All wires between boxes, once outside and once within each sample."""
    found: dict[tuple[int, int, str | None, float, bool], Wire] = {}
    scopes: list[dict[int, Part]] = [{}]
    _scope(drawn, scopes[0], scopes)
    for scope in scopes:
        for edge in topology.graph.edges[::2]:
            a, b = scope.get(edge.source), scope.get(edge.target)
            if a is None or b is None or a is b or edge.link in a.quiet & b.quiet:
                continue
            if _told(topology, a, edge.target) or _told(topology, b, edge.source):
                continue
            wire = Wire(a, b, edge.link, *words.wired(topology, edge))
            found.setdefault((id(a), id(b), *wire.sort), wire).count += 1
    wires = list(found.values())
    return wires + [wire for part in drawn.walk() if part.chain for wire in _to_dots(part, wires)]


def _to_dots(part: Part, wires: Sequence[Wire]) -> Iterable[Wire]:
    """In rings and grids from the last member drawn to the dots for the next."""
    members = {id(member) for member in part.members}
    like = next((wire for wire in wires if id(wire.a) in members and id(wire.b) in members), None)
    if like is None:
        return
    for one, other in combinations(part.members, 2):
        if (one.kind == "dots") != (other.kind == "dots") and _next(part, one, other):
            yield replace(like, a=one, b=other)


def _next(part: Part, one: Part, other: Part) -> bool:
    if part.form != "grid":
        return abs(part.members.index(one) - part.members.index(other)) == 1
    return sum(abs(a - b) for a, b in zip(one.spot, other.spot, strict=True)) == 1


def _told(topology: Topology, nic: Part, other: int) -> bool:
    return nic.told and topology.graph.vertices[other].kind == "device"


def _scope(part: Part, scope: dict[int, Part], scopes: list[dict[int, Part]]) -> None:
    """Which box stands for each vertex; a sample has a scope of its own."""
    if part.vertex >= 0:
        scope[part.vertex] = part
    if part.hides is not None:
        scope.update((hidden.vertex, part) for hidden in part.hides.walk() if hidden.vertex >= 0)
    for inner in (*part.members, *(box for tier in part.tiers for box in tier), *part.nics):
        _scope(inner, scope, scopes)
    for sample in part.samples:
        scopes.append({})
        _scope(sample, scopes[-1], scopes)


def lay(wires: Sequence[Wire], drawn: Part) -> None:
    """Give every wire its way: straight if no box is in between, else on an arc around."""
    boxes = [part for part in drawn.walk() if part.boxed]
    grids = {id(member): id(part) for part in drawn.walk() if part.form == "grid" for member in part.members}
    beside: dict[tuple[int, ...], list[Wire]] = {}
    for wire in wires:
        beside.setdefault(tuple(sorted((id(wire.a), id(wire.b)))), []).append(wire)
    for together in beside.values():
        for index, wire in enumerate(together):
            shift = 0.09 * (index - (len(together) - 1) / 2)
            axis = _wraps(wire) if grids.get(id(wire.a), 0) == grids.get(id(wire.b), 1) else None
            if axis is not None:
                wire.stubs = _stubs(wire, axis)
            else:
                wire.way, wire.bent = _way(wire, boxes, shift)


def _wraps(wire: Wire) -> int | None:
    """The axis along which a wire of a torus goes around, if it does."""
    apart = [abs(a - b) for a, b in zip(wire.a.cell, wire.b.cell, strict=False)]
    return next((axis for axis, steps in enumerate(apart) if steps > 1), None)


def _stubs(wire: Wire, axis: int) -> list[tuple[Point, Point]]:
    """A short end at either box, away from the grid."""
    axes = len(wire.a.cell)
    dx, dy = {1: (1.0, 0.0), 2: (0.0, -1.0), 3: (0.62, 0.62)}[axes - axis]
    stubs = []
    for part in (wire.a, wire.b):
        way = -1.0 if part.cell[axis] == 0 else 1.0
        x, y = _centre(part)
        begin = _border(part, (x + way * dx, y + way * dy))
        stubs.append((begin, (begin[0] + way * dx * STUB, begin[1] + way * dy * STUB)))
    return stubs


def _centre(part: Part) -> Point:
    return part.x + part.w / 2, part.y + part.h / 2


def _border(part: Part, towards: Point) -> Point:
    """Where the line from the part's centre leaves it."""
    x, y = _centre(part)
    dx, dy = towards[0] - x, towards[1] - y
    scale = min(part.w / 2 / abs(dx) if dx else 1e9, part.h / 2 / abs(dy) if dy else 1e9)
    return x + dx * scale, y + dy * scale


def _way(wire: Wire, boxes: Sequence[Part], shift: float) -> tuple[list[Point], bool]:
    """The first of some ways that meets the fewest boxes, and whether it is bent."""
    blocking = [
        (box.x - 0.02, box.y - 0.02, box.x + box.w + 0.02, box.y + box.h + 0.02) for box in boxes if box not in (wire.a, wire.b)
    ]
    tried: list[tuple[int, int, list[Point]]] = []
    for number, way in enumerate(_ways(wire, shift)):
        tried.append((sum(meets(way, box) for box in blocking), number, way))
        if tried[-1][0] == 0:
            break
    _, number, way = min(tried)
    return way, number > 0


def _ways(wire: Wire, shift: float) -> Iterable[list[Point]]:
    a, b = wire.a, wire.b
    begin, end = _ends(a, b)
    length = hypot(end[0] - begin[0], end[1] - begin[1]) or 1.0
    across = (-(end[1] - begin[1]) / length * shift, (end[0] - begin[0]) / length * shift)
    begin, end = _plus(begin, across), _plus(end, across)
    yield _points(begin, begin, end, end)
    if min(a.y + a.h, b.y + b.h) > max(a.y, b.y):
        for side in (-1.0, 1.0):
            ends = [(part.x + part.w / 2 + shift, part.y + (part.h if side > 0 else 0.0)) for part in (a, b)]
            deep = side * (0.1 + min(1.4, 0.24 * abs(ends[0][0] - ends[1][0])) + 1.5 * shift)
            yield _points(ends[0], _plus(ends[0], (0.0, deep)), _plus(ends[1], (0.0, deep)), ends[1])
    for bend in (0.12, -0.12, 0.25, -0.25) if length < FAR else ():
        bow = ((begin[1] - end[1]) * bend, (end[0] - begin[0]) * bend)
        yield _points(begin, _plus(begin, bow), _plus(end, bow), end)


def _ends(a: Part, b: Part) -> tuple[Point, Point]:
    """Between boxes one above the other from edge to edge, upright where they allow; else along the line of centres."""
    tiers = "device" not in (a.kind, b.kind) or a.kind != b.kind
    tiers = tiers and (a.hides is None or b.hides is None)
    if tiers and (a.y >= b.y + b.h or b.y >= a.y + a.h):
        low, high = (a, b) if a.y < b.y else (b, a)
        narrow, wide = (a, b) if a.w < b.w else (b, a)
        margin = min(0.1, wide.w / 4)
        x_wide = min(max(narrow.x + narrow.w / 2, wide.x + margin), wide.x + wide.w - margin)
        x_narrow = min(max(x_wide, narrow.x + narrow.w * 0.3), narrow.x + narrow.w * 0.7)
        at = {id(narrow): x_narrow, id(wide): x_wide}
        ends = {id(low): low.y + low.h, id(high): high.y}
        return (at[id(a)], ends[id(a)]), (at[id(b)], ends[id(b)])
    if min(a.y + a.h, b.y + b.h) - max(a.y, b.y) > 0.7 * min(a.h, b.h) and not a.cell:
        y = (min(a.y + a.h, b.y + b.h) + max(a.y, b.y)) / 2
        left = a.x < b.x
        return (a.x + (a.w if left else 0.0), y), (b.x + (0.0 if left else b.w), y)
    return _border(a, _centre(b)), _border(b, _centre(a))


def _plus(one: Point, other: Point) -> Point:
    return one[0] + other[0], one[1] + other[1]


def _points(a: Point, b: Point, c: Point, d: Point) -> list[Point]:
    """A cubic Bezier curve, point by point."""
    points = []
    for step in range(STEPS + 1):
        t = step / STEPS
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        x, y = (sum(weight * point[axis] for weight, point in zip(weights, (a, b, c, d), strict=True)) for axis in (0, 1))
        points.append((x, y))
    return points


def meets(way: Sequence[Point], box: Box) -> bool:
    """Whether a point of a way lies in a rectangle."""
    left, low, right, top = box
    return any(left < x < right and low < y < top for x, y in way)


def overlap(one: Box, other: Box) -> bool:
    """Whether two rectangles (left, bottom, right, top) have an area in common."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

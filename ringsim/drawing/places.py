"""Where the parts of a drawing lie: members in rows, circles and grids, switches in tiers. Inches, the origin lower left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import cos, hypot, pi, sin

from ..topology.graph import Graph
from . import words
from .parts import Part, near

LABEL, SMALL = 7.5, 6.5
BAR, LINE, PAD = 0.27, 0.125, 0.13
GAP, GROUP_GAP, TIER_GAP = 0.14, 0.24, 0.52
FRAME_TITLE = 0.17
STUB = 0.17
Box = tuple[float, float, float, float]


@lru_cache(maxsize=4096)
def width(text: str, size: float, bold: bool = False) -> float:
    """Inches that a text takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72 * 1.03


def place(part: Part, graph: Graph) -> None:
    """Give the part and all within a size and a place."""
    for inner in part.inner():
        place(inner, graph)
    if part.kind == "dots":
        part.w, part.h = 0.46, 0.3
    elif part.boxed:
        _size(part)
    else:
        {"tiers": _tiers, "circle": _circle, "grid": _grid}[part.form](part, graph)
        _show_samples(part)
        _frame(part)


def _size(part: Part) -> None:
    part.label = words.short(part.label)
    lines = [width(text, SMALL) for text, _ in part.lines]
    part.w = max(0.34, width(part.label, LABEL) + 0.14, *(line + 0.14 for line in lines))
    part.h = BAR + LINE * len(lines)


def extent(parts: Iterable[Part]) -> Box:
    """Left, bottom, right and top of all parts."""
    some = list(parts)
    return (
        min(part.x for part in some),
        min(part.y for part in some),
        max(part.x + part.w for part in some),
        max(part.y + part.h for part in some),
    )


def _put(part: Part, x: float, y: float) -> None:
    part.move(x - part.x, y - part.y)


def _even(parts: Sequence[Part]) -> None:
    """Boxes of one kind are equally large."""
    alike: dict[tuple[str, bool], list[Part]] = {}
    for part in parts:
        if part.boxed:
            alike.setdefault((part.kind, any(link for _, link in part.lines)), []).append(part)
    for boxes in alike.values():
        w, h = max(box.w for box in boxes), max(box.h for box in boxes)
        for box in boxes:
            box.w, box.h = w, h


def _tiers(part: Part, graph: Graph) -> None:
    """Members in a row; switches above it, NICs at the very top; or the switches below."""
    row = part.members
    if not row:
        part.w = part.h = BAR
        return
    _even(row)
    x, tall = 0.0, max(member.h for member in row)
    for index, member in enumerate(row):
        if member.kind == "dots":
            member.h = min(beside.h for beside in (row[index - 1], row[index + 1]))
        _put(member, x, -tall if part.below and member.kind == "row" else -member.h)
        x += member.w + (GAP if member.boxed or member.kind == "dots" else GROUP_GAP)
    bottom, top = extent(row)[1], 0.0
    if part.arcs:
        bottom -= _arcs(row, graph)
    for tier in part.tiers:
        tall = max(box.h for box in tier)
        gap = TIER_GAP + min(0.5, 0.04 * x) * (part.even and len(tier) > 1)
        level = bottom - gap - tall if part.below else top + gap
        _tier(part, tier, level, graph)
        bottom, top = min(bottom, level), max(top, level + tall)
    if part.nics:
        _tier(part, part.nics, top + TIER_GAP, graph)
    _settle(part, bottom)


def _arcs(row: Sequence[Part], graph: Graph) -> float:
    """Room below a row for the wires that go around boxes in between."""
    at = {box.vertex: index for index, member in enumerate(row) for box in member.walk() if box.vertex >= 0}
    ends = [(at[vertex], at[other]) for vertex in at for other in near(graph, vertex) if other in at]
    spans = [abs(row[one].x + row[one].w / 2 - row[other].x - row[other].w / 2) for one, other in ends if abs(one - other) > 1]
    return min(1.1, 0.2 * max(spans)) + 0.35 if spans else 0.0


def _settle(part: Part, bottom: float) -> None:
    """Move all within so that it begins at the origin, and size the part by it."""
    inside = [inner for inner in part.inner() if inner not in part.samples]
    left, low, right, top = extent(inside)
    for inner in inside:
        inner.move(-left, -min(low, bottom))
    part.w, part.h = right - left, top - min(low, bottom)


def _tier(part: Part, tier: Sequence[Part], level: float, graph: Graph) -> None:
    """Boxes side by side, each over what it joins; a switch alone is a bar along all of that."""
    boxes = {box.vertex: box for inner in part.inner() if inner not in tier for box in inner.walk() if box.vertex >= 0}
    boxes |= {
        hidden.vertex: box
        for inner in part.members
        for box in inner.walk()
        if box.hides is not None
        for hidden in box.hides.walk()
        if hidden.vertex >= 0
    }
    left, _, right, _ = extent(part.members)
    _even(tier)
    centres = []
    for index, box in enumerate(tier):
        joined = [boxes[vertex] for vertex in near(graph, box.vertex) if vertex in boxes] if box.vertex >= 0 else []
        if len(tier) == 1 and box.kind == "switch" and joined:
            begin, _, end, _ = extent(joined)
            box.w = max(box.w, end - begin)
            centres.append((begin + end) / 2)
        elif part.even or not joined:
            centres.append(left + (right - left) * (index + 0.5) / len(tier))
        else:
            centres.append(sum(one.x + one.w / 2 for one in joined) / len(joined))
        if box.kind == "dots":
            box.h = max(other.h for other in tier)
    for box, x in zip(tier, _apart(tier, centres), strict=True):
        _put(box, x, level)


def _apart(tier: Sequence[Part], centres: Sequence[float]) -> list[float]:
    """Left edges as near to the centres as they go without overlap, in the order of the tier."""
    edges: list[float] = []
    end = float("-inf")
    for box, centre in zip(tier, centres, strict=True):
        edges.append(max(end + GAP, centre - box.w / 2))
        end = edges[-1] + box.w
    pushed = sum(edge + box.w / 2 - centre for edge, box, centre in zip(edges, tier, centres, strict=True)) / len(edges)
    return [edge - pushed for edge in edges]


def _circle(part: Part, graph: Graph) -> None:
    _even(part.members)
    size = max(hypot(member.w, member.h) for member in part.members) + 0.22
    count = len(part.members)
    radius = max(0.75, size / (2 * sin(pi / count)))
    if not part.chain and count > 3:
        # a wire to the next but one passes the box between them
        radius = max(radius, 0.5 * size / (1 - cos(2 * pi / count)))
    for index, member in enumerate(part.members):
        angle = pi / 2 - 2 * pi * index / count
        _put(member, 1.15 * radius * cos(angle) - member.w / 2, radius * sin(angle) - member.h / 2)
    _nics_above(part, graph)


def _grid(part: Part, graph: Graph) -> None:
    """Rows and columns; a third dimension goes back, up and to the right."""
    _even(part.members)
    boxes = [member for member in part.members if member.kind != "dots"]
    for box in boxes:
        if len(part.shape) == 3 and box.kind == "device":
            box.label = box.label.rpartition("-")[2]
            _size(box)
    _even(boxes)
    w, h = boxes[0].w, boxes[0].h
    layers = 1 + max(member.spot[0] for member in part.members) if len(part.shape) == 3 else 1
    back = (0.7 * w + 0.12, h + 0.12) if layers > 1 else (0.0, 0.0)
    across, down = w + 0.3 + (layers - 1) * back[0], h + (0.42 if layers == 1 else 0.25) + (layers - 1) * back[1]
    for member in part.members:
        layer, row, column = (0.0,) * (3 - len(member.spot)) + member.spot
        x, y = column * across + layer * back[0], -row * down + layer * back[1]
        _put(member, x - member.w / 2, y - member.h / 2)
    _nics_above(part, graph)
    for inner in part.inner():
        inner.move(STUB, STUB)
    part.w, part.h = part.w + 2 * STUB, part.h + (STUB if part.nics else 2 * STUB)


def _nics_above(part: Part, graph: Graph) -> None:
    low, top = extent(part.members)[1], extent(part.members)[3]
    if part.nics:
        part.even = True
        _tier(part, part.nics, top + TIER_GAP, graph)
    _settle(part, low)


def _show_samples(part: Part) -> None:
    """What the closed boxes have inside, in a row below them."""
    if not part.samples:
        return
    x = 0.0
    for sample in part.samples:
        _put(sample, x, -sample.h - 0.35)
        x += sample.w + GROUP_GAP
    wide = x - GROUP_GAP
    for sample in part.samples:
        sample.move(max(0.0, part.w - wide) / 2, 0.0)
    for inner in part.inner():
        if inner not in part.samples:
            inner.move(max(0.0, wide - part.w) / 2, 0.0)
    low = extent(part.samples)[1]
    for inner in part.inner():
        inner.move(0.0, -low)
    part.w, part.h = max(part.w, wide), part.h - low


def _frame(part: Part) -> None:
    """Room for the frame of a group, with its title at the lower left, where no wires leave."""
    if part.kind != "group" or not part.label:
        return
    part.label = words.short(part.label, 2 * words.LONGEST)
    title = width(part.label, LABEL, bold=True) + width(f"  {part.about}", SMALL)
    wide = max(part.w, title)
    for inner in part.inner():
        inner.move(PAD + (wide - part.w) / 2, PAD + FRAME_TITLE)
    part.w, part.h = wide + 2 * PAD, part.h + 2 * PAD + FRAME_TITLE

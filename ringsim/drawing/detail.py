"""What is left of a machine to draw: parts that repeat are drawn once or a few times, with dots for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product

from ..topology.graph import Graph
from .parts import MOST_ON_CIRCLE, Part, near

MOST_IN_TIER = 20
MOST_ALONG = {2: 8, 3: 4}
# of dots along the last axis of a grid, the one before it, and the one before that
SLOPES = {-1: (1.0, 0.0), -2: (0.0, 1.0), -3: (0.7, 0.7)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """How many alike boxes and groups are drawn side by side, and how many parts of any kind (`row`).

    `closed`: of alike groups only the first shows its content. `widest`: beyond so many inches, less detail is better.
    """

    boxes: int
    groups: int
    closed: bool
    row: int = 20
    widest: float = 11.0


# tried in turn until the drawing is narrow enough; the last one holds for what is unlike throughout
DETAILS = (
    Detail(boxes=8, groups=3, closed=False),
    Detail(boxes=4, groups=3, closed=False),
    Detail(boxes=8, groups=2, closed=True),
    Detail(boxes=4, groups=2, closed=True, widest=20.0),
    Detail(boxes=4, groups=2, closed=True, row=4),
)


def pare(part: Part, detail: Detail, graph: Graph) -> Part:
    """A copy of the part, down to what is drawn of it."""
    return _pare(part, detail, graph, False)


def _pare(part: Part, detail: Detail, graph: Graph, closed: bool) -> Part:
    if part.kind not in ("group", "row"):
        return replace(part)
    if closed and part.kind == "group":
        return _close(part)
    if part.form != "tiers":
        return _figure(part, detail, graph)
    members: list[Part] = []
    opened: set[int] = set()
    for member, dots in _thin(part.members, detail):
        if dots:
            members.append(Part("dots", alike=member.alike, count=dots))
            continue
        shut = closed or (detail.closed and member.alike in opened)
        opened.add(member.alike)
        members.append(_pare(member, detail, graph, shut))
    drawn = replace(part, members=members)
    seen = _seen(members)
    if all(inner.kind != "dots" and inner.hides is None for inner in drawn.walk()):
        # nothing is left out, and a switch that serves nothing is to be seen
        seen.update(box.vertex for row in (*part.tiers, part.nics) for box in row)
    drawn.tiers = []
    for tier in part.tiers:
        served = _served(tier, seen, graph)
        seen |= {box.vertex for box in served}
        drawn.tiers += [served] if served else []
    drawn.nics = _served(part.nics, seen, graph)
    return drawn


def _close(part: Part) -> Part:
    return replace(part, hides=part, members=[], tiers=[], nics=[], lines=())


def _thin(parts: Sequence[Part], detail: Detail) -> list[tuple[Part, int]]:
    """Each part that is drawn, with 0; or with how many alike its dots stand for, those drawn beside them included."""
    kept: list[tuple[Part, int]] = []
    for _, alike in groupby(parts, key=lambda part: part.alike):
        run = list(alike)
        most = detail.boxes if run[0].boxed else detail.groups
        if len(run) <= most:
            kept += [(part, 0) for part in run]
        else:
            kept += [*((part, 0) for part in run[: (most + 1) // 2]), (run[0], len(run)), (run[-1], 0)]
    if len(kept) > detail.row:
        some = detail.row // 4 + 1
        begin, end = ([one for one in ends if not one[1]] for ends in (kept[:some], kept[-some:]))
        kept = [*begin, (parts[0], len(parts)), *end]
    return kept


def _seen(members: Sequence[Part]) -> set[int]:
    """The vertices drawn; those within closed groups only where there is no other."""
    parts = [part for member in members for part in member.walk()]
    seen = {part.vertex for part in parts if part.vertex >= 0}
    if not any(part.kind in ("device", "nic") for part in parts):
        seen |= {inner.vertex for part in parts if part.hides is not None for inner in part.hides.walk() if inner.vertex >= 0}
    return seen


def _served(boxes: Sequence[Part], seen: set[int], graph: Graph) -> list[Part]:
    """Of NICs or of the switches of a tier those next to what is drawn, with dots for the others."""
    kept = [index for index, box in enumerate(boxes) if box.vertex in seen or seen.intersection(near(graph, box.vertex))]
    if len(kept) > MOST_IN_TIER:
        kept = [*kept[:5], *kept[-4:]]
    served: list[Part] = []
    last = -1
    for index in kept:
        if index > last + 1 and not any(part.kind == "dots" for part in served):
            served.append(Part("dots", count=len(boxes)))
        served.append(replace(boxes[index]))
        last = index
    return served


def _figure(part: Part, detail: Detail, graph: Graph) -> Part:
    """A circle or a grid: groups as closed boxes, and one of each kind in detail beside them."""
    samples: dict[int, Part] = {}
    for member in part.members:
        if member.kind == "group" and member.alike not in samples and len(samples) < 3:
            alike = sum(other.alike == member.alike for other in part.members)
            samples[member.alike] = _pare(member, replace(detail, closed=True), graph, False)
            samples[member.alike].about += f", one of {alike}" if alike > 1 else ""
    shown = _on_grid(part) if part.form == "grid" else _on_circle(part)
    return replace(part, members=shown, samples=list(samples.values()))


def _shown(member: Part) -> Part:
    return _close(member) if member.kind == "group" else replace(member)


def _on_circle(part: Part) -> list[Part]:
    members = [_shown(member) for member in part.members]
    if len(members) > MOST_ON_CIRCLE:
        half = MOST_ON_CIRCLE // 2
        members = [*members[:half], Part("dots", count=len(members)), *members[1 - half :]]
    return members


def _on_grid(part: Part) -> list[Part]:
    """The cells that are drawn, each at its `spot`, and dots where some are left out along an axis."""
    most = MOST_ALONG[len(part.shape)]
    axes = [[*range(size)] if size <= most else [0, 1, None, size - 1] for size in part.shape]
    strides = [1] * len(part.shape)
    for axis in reversed(range(len(part.shape) - 1)):
        strides[axis] = strides[axis + 1] * part.shape[axis + 1]
    members = []
    for spot in product(*(range(len(axis)) for axis in axes)):
        cell = [axis[at] for axis, at in zip(axes, spot, strict=True)]
        where = tuple(map(float, spot))
        left_out = [axis for axis, coordinate in enumerate(cell) if coordinate is None]
        if not left_out:
            number = sum((coordinate or 0) * stride for coordinate, stride in zip(cell, strides, strict=True))
            members.append(replace(_shown(part.members[number]), spot=where))
        elif len(left_out) == 1:
            members.append(Part("dots", slope=SLOPES[left_out[0] - len(axes)], spot=where))
    return members

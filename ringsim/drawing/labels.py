"""Where the labels of wires find room: beside a wire of their kind, clear of boxes, of each other, and of other wires."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..topology.parts import Link
from . import words
from .parts import Part
from .places import FRAME_TITLE, LABEL, LINE, PAD, SMALL, Box, extent, width
from .wires import Point, Wire, meets, overlap

HEAD = 7.0
MOST_TRIED = 60
COVERS_BOX, LEAVES_FRAME = 20.0, 6.0


@dataclass(frozen=True, slots=True)
class Label:
    """Lines of text around a centre: what a wire is, then what it does. `clear`: no wire runs below it."""

    link: str | None
    lines: tuple[str, ...]
    x: float
    y: float
    clear: bool = True

    @property
    def box(self) -> Box:
        """Left, bottom, right, top."""
        w = max(width(line, SMALL if number else HEAD, bold=not number) for number, line in enumerate(self.lines)) / 2 + 0.02
        h = LINE * len(self.lines) / 2 + 0.01
        return self.x - w, self.y - h, self.x + w, self.y + h


def label(wires: Sequence[Wire], drawn: Part, links: Mapping[str, Link]) -> list[Label]:
    """A label for one wire of each kind."""
    kinds: dict[tuple[str, float, bool], list[Wire]] = {}
    for wire in wires:
        if wire.link is not None:
            kinds.setdefault((wire.link, *wire.sort[1:]), []).append(wire)
    room = _Room(wires, drawn)
    labels: list[Label] = []
    for (link, _, _), alike in kinds.items():
        least = min(wire.count for wire in alike)
        chosen = [wire for wire in alike if wire.count == least and wire.way][:MOST_TRIED]
        first = alike[0]
        head = words.wire(link, first.cables, first.striped, least)
        tail = words.figures(links[link], first.cables)
        tried = [
            (off + 0.1 * penalty + 0.02 * number, Label(link, lines, *point))
            for penalty, lines in enumerate(_shapes(head, tail))
            for number, wire in enumerate(chosen)
            for off, point in _places(wire, Label(link, lines, 0.0, 0.0).box)
        ]
        if tried:
            labels.append(room.best(tried))
    return labels


def _shapes(head: str, tail: Sequence[str]) -> list[tuple[str, ...]]:
    """The same words in two lines, or in more that are shorter."""
    pairs = tuple(" · ".join(tail[begin : begin + 2]) for begin in range(0, len(tail), 2))
    return [(head, " · ".join(tail)), (head, *(pairs if len(tail) > 2 else tail)), (head, *tail)]


class _Room:
    """What a label may cover, and at what cost."""

    def __init__(self, wires: Sequence[Wire], drawn: Part) -> None:
        parts = [part for part in drawn.walk() if part is not drawn]
        frames = [part for part in parts if part.kind == "group" and not part.boxed]
        self._frames = [_box(part) for part in frames]
        self._boxes = [_box(part) for part in parts if part.boxed]
        self._boxes += [(part.x, part.y - 0.08, part.x + part.w, part.y + part.h) for part in parts if part.kind == "dots"]
        for part in frames:
            wide = PAD + width(part.label, LABEL, bold=True) + 0.1 + width(part.about, SMALL)
            self._boxes.append((part.x, part.y, part.x + wide, part.y + PAD + FRAME_TITLE * 0.8))
        self._lines = [(_bounds(points), points) for wire in wires for points in _lines(wire)]
        self._whole = extent([drawn])

    def best(self, tried: Sequence[tuple[float, Label]]) -> Label:
        """The cheapest of some labels; its room is taken then."""
        costs = [(off + self._cost(one.box), number) for number, (off, one) in enumerate(tried)]
        one = tried[min(costs)[1]][1]
        self._boxes.append(one.box)
        return Label(one.link, one.lines, one.x, one.y, clear=self._crossed(one.box) == 0)

    def _cost(self, box: Box) -> float:
        cost = COVERS_BOX * sum(overlap(box, other) for other in self._boxes)
        cost += LEAVES_FRAME * sum(overlap(box, frame) and not _inside(box, frame) for frame in self._frames)
        left, low, right, top = self._whole
        cost += 0.15 * ((box[0] < left) + (box[2] > right) + (box[1] < low) + (box[3] > top))
        return cost + min(self._crossed(box), COVERS_BOX - 1)

    def _crossed(self, box: Box) -> int:
        larger = (box[0] - 0.02, box[1] - 0.01, box[2] + 0.02, box[3] + 0.01)
        return sum(meets(line, larger) for bounds, line in self._lines if overlap(bounds, larger))


def _box(part: Part) -> Box:
    return part.x, part.y, part.x + part.w, part.y + part.h


def _bounds(points: Sequence[Point]) -> Box:
    """The rectangle around some points; upright and level lines have a little width."""
    xs, ys = zip(*points, strict=True)
    return min(xs) - 1e-6, min(ys) - 1e-6, max(xs) + 1e-6, max(ys) + 1e-6


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2] and box[3] <= frame[3]


def _lines(wire: Wire) -> list[list[Point]]:
    """Points along a wire, dense enough that no label fits between two."""
    if not wire.stubs:
        return [wire.way]
    return [[(a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for t in (0.0, 0.5, 1.0)] for a, b in wire.stubs]


def _places(wire: Wire, box: Box) -> Iterator[tuple[float, Point]]:
    """Centres for a label of the box's size, each with how much worse it is by itself."""
    w, h = box[2] + 0.05, box[3] + 0.04
    for share in (0.5, 0.38, 0.62, 0.25, 0.75):
        x, y = wire.way[round(share * (len(wire.way) - 1))]
        off = abs(share - 0.5) * 0.2
        for further, much in ((0.0, 0.0), (0.12, 0.3), (0.5, 1.2)):
            yield off + much, (x + w + further, y)
            yield off + much, (x - w - further, y)
        for further, much in ((0.0, 0.01), (0.12, 0.3), (0.24, 0.6), (0.4, 0.9), (0.7, 1.4)):
            yield off + much, (x, y + h + further)
            yield off + much + 0.01, (x, y - h - further)
        yield off + 1.5, (x, y)

"""Boxes, frames, wires and words on paper, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan2, degrees
from typing import Any

from ..topology import Topology
from . import words
from .labels import HEAD, Label
from .parts import Part
from .places import LABEL, LINE, PAD, SMALL, width
from .wires import Point, Wire

LINKS = ("#1f6fb4", "#d1600f", "#2a8a3e", "#b0305c", "#7a4fb5", "#8a6d1d", "#0e8c8c", "#c23a9c", "#6b3e26", "#44546a")
TINTS = ("#d9e7f5", "#dff0d8", "#fde8c8", "#f3dbe8", "#e5dff5", "#d5eeee", "#eee6d8", "#e2e2e2")
INK, PALE, MUTED, FAINT, EDGE, FRAME = "#1f2933", "#d5dbe2", "#6b7785", "#c3cad3", "#5a6b7d", "#f6f8fa"
FILL = {"nic": "#fffdf2", "switch": "#3d4b5c", "group": "#eef1f5"}
TITLE, HEADING, MARGIN, ROW, SAMPLE = 12.0, 0.62, 0.3, 0.165, 0.42
# what is drawn later lies above
FRAMES, WIRES, ARROWS, BOXES, ROOM, WORDS = 1.0, 2.0, 2.5, 3.0, 4.0, 5.0


@dataclass(frozen=True, slots=True)
class Legend:
    """Rows of (key, cells): links, devices. `columns` are where cells begin."""

    rows: tuple[tuple[str, words.Row], ...]
    foot: str
    columns: tuple[float, ...]
    width: float
    height: float

    @classmethod
    def of(cls, topology: Topology, wires: Sequence[Wire]) -> Legend:
        """The legend of a topology as drawn."""
        rows = [("", words.HEADER), *(("link", row) for row in words.links(topology))]
        rows += [("device", row) for row in words.devices(topology)]
        said = {words.WRAPS: any(wire.stubs for wire in wires)}
        said[words.ARROWS] = any(topology.spec.links[wire.link].reverse is not None for wire in wires if wire.link)
        foot = " · ".join(text for text, true in said.items() if true)
        columns = [SAMPLE]
        for column in range(len(words.HEADER)):
            columns.append(columns[-1] + 0.2 + max(width(row[column], HEAD, bold=column == 0) for _, row in rows))
        wide = max(columns[-1], width(foot, SMALL))
        return cls(tuple(rows), foot, tuple(columns), wide, ROW * (len(rows) + bool(foot)))


class Ink:
    """Draws on a panel whose unit is an inch, in colours by link and by kind of device."""

    def __init__(self, topology: Topology, panel: Any) -> None:
        self._panel = panel
        self._links = {name: LINKS[index % len(LINKS)] for index, name in enumerate(topology.spec.links)}
        kinds = dict.fromkeys(topology.graph.vertices[number].device for number in topology.devices)
        self._devices = {name: TINTS[index % len(TINTS)] for index, name in enumerate(kinds)}
        self._kinds = [vertex.device for vertex in topology.graph.vertices]
        self._avoided = topology.transport.avoid
        self._uneven = {name for name, link in topology.spec.links.items() if link.reverse is not None}

    def drawing(self, drawn: Part, wires: Sequence[Wire], labels: Sequence[Label]) -> None:
        """The machine itself."""
        for number, part in enumerate(drawn.walk()):
            if part.kind == "group" and part.hides is None and part.label:
                self._frame(part, FRAMES + number * 1e-4)
            elif part.kind == "dots":
                self._dots(part)
            elif part.boxed:
                self._box(part)
        for wire in wires:
            self._wire(wire)
        for one in labels:
            self._label(one)

    def _colour(self, link: str | None) -> str:
        return self._links.get(link or "", MUTED)

    def _dash(self, link: str | None) -> Any:
        return (0, (3, 1.5)) if link in self._avoided else "-"

    def _text(self, at: Point, text: str, size: float, colour: str, **style: Any) -> None:
        if text:
            style = {"ha": "center", "va": "center_baseline", "zorder": WORDS, **style}
            self._panel.text(*at, text, fontsize=size, color=colour, parse_math=False, **style)

    def _rounded(self, part: Part, radius: float, **style: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        shape = f"round,pad=0,rounding_size={radius}"
        self._panel.add_patch(FancyBboxPatch((part.x, part.y), part.w, part.h, boxstyle=shape, **style))

    def _frame(self, part: Part, height: float) -> None:
        self._rounded(part, 0.09, facecolor=FRAME, edgecolor=FAINT, linewidth=0.9, zorder=height)
        x, y = part.x + PAD, part.y + PAD * 0.75
        self._text((x, y), part.label, LABEL, MUTED, ha="left", va="baseline", weight="bold")
        aside = x + width(part.label, LABEL, bold=True) + 0.07
        self._text((aside, y), part.about, SMALL, MUTED, ha="left", va="baseline")

    def _box(self, part: Part) -> None:
        dark = part.kind == "switch"
        fill = self._devices[self._kinds[part.vertex]] if part.kind == "device" else FILL[part.kind]
        self._rounded(part, 0.045, facecolor=fill, edgecolor=fill if dark else EDGE, linewidth=0.8, zorder=BOXES)
        x, y = part.x + part.w / 2, part.y + part.h / 2 + LINE * len(part.lines) / 2
        self._text((x, y), part.label, LABEL, "white" if dark else INK)
        for number, (text, link) in enumerate(part.lines, 1):
            plain = PALE if dark else MUTED
            self._text((x, y - number * LINE), text, SMALL, self._colour(link) if link else plain)

    def _dots(self, part: Part) -> None:
        x, y = part.x + part.w / 2, part.y + part.h / 2
        xs, ys = ([centre + step * 0.07 * slope for step in (-1, 0, 1)] for centre, slope in zip((x, y), part.slope, strict=True))
        self._panel.plot(xs, ys, linestyle="", marker="o", markersize=2.2, color=MUTED, zorder=BOXES)
        if part.count:
            self._text((x, y - 0.15), f"× {part.count}", LABEL, INK, weight="bold")

    def _wire(self, wire: Wire) -> None:
        style: dict[str, Any] = {"color": self._colour(wire.link), "zorder": WIRES, "solid_capstyle": "round"}
        style["linewidth"] = 1.1 if wire.count == 1 and wire.cables <= 1 else 1.9
        for begin, end in wire.stubs:
            self._line((begin, end), linestyle=(0, (1.2, 1.0)), **style)
        if wire.way:
            self._line(wire.way if wire.bent else (wire.way[0], wire.way[-1]), linestyle=self._dash(wire.link), **style)
        if wire.way and wire.link in self._uneven:
            at = len(wire.way) * 3 // 4
            (x, y), (ahead_x, ahead_y) = wire.way[at], wire.way[at + 1]
            turned = (3, 0, degrees(atan2(ahead_y - y, ahead_x - x)) - 90)
            self._panel.plot([x], [y], marker=turned, markersize=4.5, color=style["color"], zorder=ARROWS)

    def _line(self, way: Sequence[Point], **style: Any) -> None:
        self._panel.plot([x for x, _ in way], [y for _, y in way], **style)

    def _label(self, one: Label) -> None:
        left, low, right, top = one.box
        if not one.clear:
            room = Part("dots", x=left, y=low, w=right - left, h=top - low)
            self._rounded(room, 0.04, facecolor="white", alpha=0.85, linewidth=0, zorder=ROOM)
        for number, line in enumerate(one.lines):
            size, weight = (SMALL, "normal") if number else (HEAD, "bold")
            at = (one.x, top - LINE * (number + 0.5) - 0.01)
            self._text(at, line, size, self._colour(one.link), weight=weight)

    def heading(self, at: Point, title: tuple[str, str]) -> None:
        """The machine's name and what it comes to, below a point at the left."""
        self._text(at, title[0], TITLE, INK, ha="left", va="top", weight="bold")
        self._text((at[0], at[1] - 0.25), title[1], HEAD + 1, MUTED, ha="left", va="top")

    def legend(self, at: Point, right: float, legend: Legend) -> None:
        """Links and devices, a row each, below a point at the left."""
        x, y = at
        self._line(((x, y + 0.06), (right, y + 0.06)), color=FAINT, linewidth=0.8)
        for number, (key, row) in enumerate(legend.rows):
            level = y - ROW * (number + 0.5)
            if key == "link":
                colour = self._colour(row[0])
                self._line(((x, level), (x + SAMPLE - 0.1, level)), color=colour, linewidth=2.0, linestyle=self._dash(row[0]))
            elif key == "device":
                sample = Part("device", x=x + 0.04, y=level - 0.05, w=SAMPLE - 0.18, h=0.1)
                self._rounded(sample, 0.03, facecolor=self._devices[row[0]], edgecolor=EDGE, linewidth=0.8)
            colours = [self._colour(row[0]) if key == "link" else INK, *[INK if key else MUTED] * len(row)]
            for column, text in enumerate(row):
                weight = "normal" if column else "bold"
                self._text((x + legend.columns[column], level), text, HEAD, colours[column], ha="left", weight=weight)
        if legend.foot:
            self._text((x, y - ROW * (len(legend.rows) + 0.5)), legend.foot, SMALL, MUTED, ha="left")

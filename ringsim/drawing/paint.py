"""From a machine to a file: what is drawn, where, and its bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from .. import files
from ..errors import MissingDependency
from ..topology import Topology
from . import words
from .detail import DETAILS, pare
from .ink import HEADING, MARGIN, TITLE, Ink, Legend
from .labels import HEAD, Label, label
from .parts import Part, read
from .places import Box, extent, place, width
from .wires import Wire, collect, lay

FORMATS = {".png": "png", ".svg": "svg"}
DPI = 160


def draw(topology: Topology, path: Path) -> None:
    """Draw the machine into a .png or .svg file: devices, NICs and switches, groups as frames, and wires coloured by link.

    What repeats is left out where the drawing would become too wide. Raises FileError and MissingDependency.
    """
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise files.FileError(f"{path}: a drawing is a .png or a .svg file: name it so")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingDependency(f"matplotlib cannot be imported ({error}): pip install 'ringsim[plots]'") from error
    with mpl.rc_context(), warnings.catch_warnings():
        # a name in a script that the font lacks is shown as boxes
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ringsim", "font.family": ["DejaVu Sans", "sans-serif"]})
        content = _render(topology, form)
    files.write_bytes(path, content)


def _render(topology: Topology, form: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn, wires, labels = _compose(topology)
    left, low, right, top = _bounds(drawn, wires, labels)
    title, legend = words.heading(topology), Legend.of(topology, wires)
    wide = max(right - left, legend.width, width(title[0], TITLE, bold=True), width(title[1], HEAD + 1))
    left -= MARGIN + max(0.0, wide - (right - left)) / 2
    right, low, top = left + wide + 2 * MARGIN, low - legend.height - 2 * MARGIN, top + HEADING + MARGIN
    figure = Figure(figsize=(right - left, top - low), dpi=DPI)
    FigureCanvasAgg(figure)
    panel = figure.add_axes((0, 0, 1, 1), xlim=(left, right), ylim=(low, top))
    panel.set_axis_off()
    ink = Ink(topology, panel)
    ink.drawing(drawn, wires, labels)
    ink.heading((left + MARGIN, top - MARGIN), title)
    ink.legend((left + MARGIN, low + MARGIN + legend.height), right - MARGIN, legend)
    target = io.BytesIO()
    figure.savefig(target, format=form, metadata={"Date": None} if form == "svg" else None)
    return target.getvalue()


def _compose(topology: Topology) -> tuple[Part, list[Wire], list[Label]]:
    """The most detail that is narrow enough, laid out."""
    whole = read(topology)
    for detail in DETAILS:
        drawn = pare(whole, detail, topology.graph)
        place(drawn, topology.graph)
        if drawn.w <= detail.widest:
            break
    wires = collect(topology, drawn)
    lay(wires, drawn)
    return drawn, wires, label(wires, drawn, topology.spec.links)


def _bounds(drawn: Part, wires: Sequence[Wire], labels: Sequence[Label]) -> Box:
    points = [point for wire in wires for point in (*wire.way, *(end for stub in wire.stubs for end in stub))]
    corners = [extent([drawn]), *(label.box for label in labels), *((x, y, x, y) for x, y in points)]
    left, low, right, top = zip(*corners, strict=True)
    return min(left), min(low), max(right), max(top)

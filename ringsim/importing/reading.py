"""A file of any format to topology YAML: detected by its content, checked as ringsim will read it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

from .. import topology, yaml_source
from ..errors import TopologyError
from ..topology.unknowns import unknowns
from . import compact, hwloc, nccl, nvidia_smi, safe_xml, writing
from .wires import Node, Sketch, plain

FORMATS: Final = ("nvidia-smi", "nccl", "hwloc")
TAGS: Final = {"system": "nccl", "topology": "hwloc"}
MOST_BYTES = 2**24
STDIN = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """Topology YAML, which parts and links it has (what, how many, of what), the keys of its unknown figures, and notes."""

    text: str
    found: tuple[tuple[str, str, str], ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]


def read(
    path: Path,
    *,
    format: str | None = None,  # noqa: A002 - what the option is called
    name: str | None = None,
    nvlink: str | None = None,
    nics: Collection[str] | None = None,
) -> Imported:
    """Import a file, `-` for standard input. Raises TopologyError with file and line.

    format: one of `FORMATS`, by default what the content shows. name: the machine's. nvlink: `switch` or `mesh`, for a matrix of
    `nvidia-smi` that leaves it open. nics: the NICs to keep, by name.
    """
    try:
        if str(path) == STDIN:
            content = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as problem:
        raise TopologyError(f"{plain(str(path))}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from None
    source = "stdin" if str(path) == STDIN else str(path)
    if len(content) > MOST_BYTES:
        raise TopologyError(f"{plain(source)}: larger than {MOST_BYTES} bytes: no topology of one node is")
    return parse(_decoded(content, source), source, format=format, name=name, nvlink=nvlink, nics=nics)


def _decoded(content: bytes, file: str) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise TopologyError(f"{plain(file)}: not UTF-8 at byte {problem.start}") from None
    if "\0" in text:
        raise TopologyError(f"{plain(file)}: not a text file: it has NUL at character {text.index(chr(0))}")
    return text


def parse(
    text: str,
    file: str = "<text>",
    *,
    format: str | None = None,  # noqa: A002 - what the option is called
    name: str | None = None,
    nvlink: str | None = None,
    nics: Collection[str] | None = None,
) -> Imported:
    """Import a text; otherwise as `read`. Raises TopologyError."""
    where = plain(file)
    sketch, kind = _sketch(text, where, format, nvlink)
    if kind != "nvidia-smi" and nvlink is not None:
        raise TopologyError(f"{where}: --nvlink is for a matrix of nvidia-smi: this file ({kind}) says what its NVLinks lead to")
    try:
        node = sketch.node(None if nics is None else frozenset(nics))
    except TopologyError as problem:
        raise TopologyError(f"{where}: {problem}") from None
    return _written(node, plain(name or node.title), PurePath(where).name)


def _sketch(text: str, file: str, given: str | None, nvlink: str | None) -> tuple[Sketch, str]:
    """What the file says, and its format. Raises TopologyError if that is not the one given."""
    if given is not None and given not in FORMATS:
        raise TopologyError(f"no format {given!r}; {yaml_source.nearest(given, FORMATS)}")
    kind, top = "nvidia-smi", None
    if text.lstrip()[:1] == "<":
        top = safe_xml.parse(text, file)
        if top.name not in TAGS:
            raise top.fail(f"no known format: <system> is NCCL's, <topology> hwloc's; without XML, `{nvidia_smi.WHAT}`")
        kind = TAGS[top.name]
    if given not in (None, kind):
        raise TopologyError(f"{file}:1: not {given}, but {kind if top else 'no XML'}")
    try:
        if top is None:
            return nvidia_smi.read(text, file, nvlink), kind
        return (nccl.read if kind == "nccl" else hwloc.read)(top, file), kind
    except TopologyError as problem:
        message = str(problem)
        raise TopologyError(message if message.startswith(file) else f"{file}: {message}") from None


def _written(node: Node, name: str, file: str) -> Imported:
    """The shortest text that is proven to say the same. Raises TopologyError for a machine that no figures make usable."""
    long = writing.text(node, writing.explicit(node), name, file)
    try:
        whole = filled(long)
    except TopologyError as problem:
        raise TopologyError(f"{file}: no usable machine: {str(problem).partition(': ')[2] or problem}") from None
    text = long
    for group in compact.candidates(node):
        short = writing.text(node, group, name, file)
        try:
            same = compact.same(whole, filled(short))
        except TopologyError:
            same = False
        if same:
            text = short
            break
    keys = [".".join(map(str, place)) for place in unknowns(yaml_source.parse(text, file, TopologyError).value)]
    return Imported(text=text, found=_found(node, text), unknown=tuple(keys), notes=node.notes)


def filled(text: str) -> topology.Topology:
    """The topology of a text with placeholders for all that is unknown: its wires are right, its figures are not."""
    value = yaml_source.parse(text, "imported", TopologyError).value
    settings = {}
    for place in unknowns(value):
        settings[".".join(map(str, place))] = {"progress": "offload", "latency": "1 s"}.get(str(place[-1]), "1 B/s")
    return topology.parse(text, "imported", settings)


def _found(node: Node, text: str) -> tuple[tuple[str, str, str], ...]:
    """Rows of a table: parts, then links."""
    used = writing.words(node)
    rows = [("GPUs", str(count), model) for model, count in Counter(spot.model for spot in node.of("gpu")).items()]
    nics = [spot.name for spot in node.of("nic")]
    rows += [("NICs", str(len(nics)), ", ".join(nics))] if nics else []
    parts = (("PCIe switches", node.of("switch")), ("root complexes", node.of("root")), ("GPU fabrics", node.of("fabric")))
    rows += [(label, str(len(spots)), "") for label, spots in parts if spots]
    wires = Counter(wire.cable for wire in node.wires)
    rows += [(f"link {name}", f"{wires[cable]}", cable.bandwidth or "unknown bandwidth") for cable, name in used.links.items()]
    join = re.search(r"^ +join: (\S+)$", text, re.MULTILINE)
    return (*rows, ("join", "", join[1] if join else ""))

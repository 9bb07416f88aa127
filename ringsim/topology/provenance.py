"""Every figure of a topology, as written, with the source of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import units
from ..yaml_source import Place
from .figures import OWN, TABLES, check_source
from .layers import Layers

SECTIONS = ("devices", "links", "groups", "machine", "transports")
FACTORS = ("achieved", "duplex", "speed", "device_share", "slowed_by_compute", "oversubscription", "cores", "units")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A value of the file, as written; `kind` is measured, vendor, guessed or defined, `position` its file and line."""

    key: str
    text: str
    kind: str
    source: str
    position: str


def figures(document: Layers) -> tuple[Figure, ...]:
    """The quantities, factors and tables of a document, in its order.

    Raises TopologyError for one without a source in its own file: what lies above in a file that extends it says nothing of it.
    """
    found = []
    for section in SECTIONS:
        for place, text in _leaves(document.value.get(section), (section,)):
            kind, _, source = _source(document, place).partition(":")
            key = ".".join(map(str, place))
            figure = Figure(key=key, text=text, kind=kind, source=source.strip(), position=document.position(place))
            found.append(figure)
    return tuple(found)


def _source(document: Layers, place: Place) -> str:
    try:
        return str(check_source(document.sources.get(place, "")))
    except ValueError as problem:
        raise document.fail(place, str(problem)) from None


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, str]]:
    key = place[-1]
    if isinstance(value, dict) and set(value) == OWN:
        yield place, _text(value["value"])
    elif isinstance(value, list) and key in TABLES:
        yield place, _text(value)
    elif isinstance(value, dict | list):
        for inner, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*place, inner))
    elif (isinstance(value, str) and key != "source" and units.dimension(value)) or key in FACTORS:
        yield place, str(value)


def _text(value: Any) -> str:
    """A figure as written; of a table, how many points from where to where."""
    if not isinstance(value, list):
        return str(value)
    return f"{len(value)} points, {value[0]} to {value[-1]}" if value else "no points"

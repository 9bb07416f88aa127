"""XML from strangers: elements with their lines, no entities, nothing fetched, everything bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from xml.parsers import expat

from ..errors import TopologyError
from ..units import shown

DEEPEST = 128
MOST_ELEMENTS = 200_000
MOST_ATTRIBUTES = 64
LONGEST_VALUE = 2**16
SHOWN_NAME = 32
CHUNK = 2**16
_REFERENCE = re.compile(r"&(?!(?:amp|lt|gt|quot|apos|#[0-9]+|#x[0-9a-fA-F]+);)")


@dataclass(slots=True, kw_only=True, eq=False)
class Element:
    """A tag with its attributes, the line that it begins on, what lies in it, and its text."""

    name: str
    attributes: dict[str, str]
    file: str
    line: int
    children: list[Element] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def fail(self, message: str) -> TopologyError:
        """The error for this element, with file and line."""
        return TopologyError(f"{self.file}:{self.line}: <{self.name[:SHOWN_NAME]}>: {message}")

    def get(self, key: str) -> str:
        """An attribute that must be there. Raises TopologyError."""
        if key not in self.attributes:
            raise self.fail(f"attribute {key!r} is missing")
        return self.attributes[key]

    def whole(self, key: str, low: int, high: int) -> int:
        """An attribute that is a whole number from `low` to `high`. Raises TopologyError."""
        text = self.get(key)
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise self.fail(f"{key}={shown(text)} is no whole number from {low} to {high}")
        return int(text)

    def all(self, name: str) -> list[Element]:
        """The children of a name."""
        return [child for child in self.children if child.name == name]


class _Reader:
    """The handlers of one parser: they build the tree and refuse what is out of bounds."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.top: Element | None = None
        self.open: list[Element] = []
        self.count = 0
        self.doctype = False
        self.parser = expat.ParserCreate("utf-8")
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.data
        self.parser.StartDoctypeDeclHandler = self.declared
        self.parser.EntityDeclHandler = self.entity
        self.parser.SkippedEntityHandler = self.entity

    def fail(self, message: str) -> TopologyError:
        return TopologyError(f"{self.file}:{self.parser.CurrentLineNumber}: {message}")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.count += 1
        if len(self.open) >= DEEPEST:
            raise self.fail(f"nested too deeply; at most {DEEPEST} levels")
        if self.count > MOST_ELEMENTS:
            raise self.fail(f"more than {MOST_ELEMENTS} elements")
        if len(attributes) > MOST_ATTRIBUTES:
            raise self.fail(f"<{name[:SHOWN_NAME]}> has {len(attributes)} attributes; at most {MOST_ATTRIBUTES}")
        long = next((key for key, value in attributes.items() if len(key) + len(value) > LONGEST_VALUE), None)
        if long is not None:
            raise self.fail(f"attribute {shown(long)} is longer than {LONGEST_VALUE} characters")
        element = Element(name=name, attributes=attributes, file=self.file, line=self.parser.CurrentLineNumber)
        if self.open:
            self.open[-1].children.append(element)
        else:
            self.top = element
        self.open.append(element)

    def end(self, name: str) -> None:
        self.open.pop()

    def data(self, text: str) -> None:
        self.open[-1].text.append(text)

    def declared(self, name: str, system: str | None, public: str | None, inside: int) -> None:
        self.doctype = True
        if inside:
            raise self.fail("a DOCTYPE with declarations of its own is not read (entities can hide in it): remove it")

    def entity(self, name: str, *_: object) -> None:
        raise self.fail(f"entity {shown(name)} is not allowed")


def parse(text: str, file: str) -> Element:
    """The outermost element. Raises TopologyError with file and line for what is no XML, is out of bounds, or has entities."""
    reader = _Reader(file)
    try:
        for begin in range(0, len(text), CHUNK):
            reader.parser.Parse(text[begin : begin + CHUNK].encode("utf-8"), False)
        reader.parser.Parse(b"", True)
    except expat.ExpatError as problem:
        raise TopologyError(f"{file}:{problem.lineno}: no XML: {expat.ErrorString(problem.code)}") from None
    found = _REFERENCE.search(text) if reader.doctype else None
    if found is not None:
        # expat drops one that only an external DTD could declare, without a word
        line = text.count("\n", 0, found.start()) + 1
        raise TopologyError(f"{file}:{line}: entity {shown(text[found.start() : found.start() + 16])} is not allowed")
    if reader.top is None:
        raise TopologyError(f"{file}:1: no XML element")
    return reader.top

"""Strict YAML: every value with its line; duplicate keys, aliases and tags are errors; only plain numbers become numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic
import yaml

from . import units
from .errors import RingsimError

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=pydantic.BaseModel)
MAX_DEPTH = 32
MOST_NAMED = 40
_INT = re.compile(r"[+-]?\d+")
_SAID = {  # what YAML calls it, where pydantic speaks of Python
    "tuple_type": "Input should be a list",
    "dict_type": "Input should be keys and values",
    "model_type": "Input should be keys and values",
    "model_attributes_type": "Input should be keys and values",
    "too_short": "There should be at least one item",
}
_FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")


@dataclass(slots=True)
class Document:
    """A YAML file as plain values, with the line of each; `files` names the file of what came from another."""

    file: str
    error: type[RingsimError]
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    files: dict[Place, str] = field(default_factory=dict)

    def fail(self, path: Place, message: str) -> RingsimError:
        """The error for what stands at `path`, with file and line."""
        where = ".".join(str(part) for part in path)
        return self.error(f"{self.position(path)}: {where + ': ' if where else ''}{message}")

    def position(self, path: Place) -> str:
        """File and line of what stands at `path`, or of what it would stand in."""
        known = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        if known is None:
            return f"{self.file}:1"
        file, line = self.files.get(known, self.file), self.lines[known]
        return f"{file}:{line}" if line else file


def read(path: Path, error: type[RingsimError]) -> Document:
    """Parse the file. Raises `error` with file and line for anything that is not strict YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path}: cannot be read: not UTF-8 at byte {problem.start}") from problem
    except ValueError as problem:
        raise error(f"{units.shown(str(path))}: cannot be read: {problem}") from problem
    return parse(text, str(path), error)


def parse(text: str, file: str, error: type[RingsimError]) -> Document:
    """Parse YAML text; `file` is its name in messages."""
    document = Document(file, error)
    try:
        _check_events(document, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        what = getattr(problem, "problem", None) or str(problem).split("\n")[0]
        what += "; quote a text that has ': ' in it" if what.startswith("mapping values") else ""
        raise error(f"{file}:{_line_of(problem, text)}: not YAML: {what}") from problem
    except RingsimError:
        raise
    except (ValueError, OverflowError) as problem:
        # PyYAML turns escapes and version numbers into integers and characters without checking their range
        raise error(f"{file}:{document.lines.get((), 1)}: not YAML: {problem}") from problem
    document.lines.clear()
    if node is not None:
        document.value = _build(document, node, ())
    return document


def _check_events(document: Document, text: str) -> None:
    """Refuse anchors, aliases, tags and deep nesting while the events come, before anything is built of them."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = document.lines[()] = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise document.error(f"{document.file}:{line}: anchors and aliases are not allowed")
        if tag := getattr(event, "tag", None):
            raise document.error(f"{document.file}:{line}: tags are not allowed: {units.shown(tag)}")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise document.error(f"{document.file}:{line}: nested too deeply; at most {MAX_DEPTH} levels")


def _line_of(problem: yaml.YAMLError, text: str) -> int:
    mark = getattr(problem, "problem_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    return text.count("\n", 0, getattr(problem, "position", 0) or 0) + 1


def _build(document: Document, node: yaml.Node, path: Place) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, node, path)
    if isinstance(node, yaml.SequenceNode):
        return [_build(document, item, (*path, index)) for index, item in enumerate(node.value)]
    return _scalar(document, node, path)


def _mapping(document: Document, node: yaml.MappingNode, path: Place) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise document.error(f"{document.file}:{line}: a key must be a plain word")
        key = key_node.value
        if key in result:
            raise document.error(f"{document.file}:{line}: duplicate key {key!r}; first on line {document.lines[*path, key]}")
        document.lines[*path, key] = line
        result[key] = _build(document, value_node, (*path, key))
    return result


def _scalar(document: Document, node: yaml.Node, path: Place) -> Any:
    if getattr(node, "style", None) is not None:
        return node.value
    for pattern, kind in ((_INT, int), (_FLOAT, float)):
        if pattern.fullmatch(node.value):
            if len(node.value) > units.LONGEST:
                raise document.fail(path, f"{units.shown(node.value)}: a number of too many digits")
            return kind(node.value)
    return {"true": True, "false": False, "null": None, "": None}.get(node.value, node.value)


def load(document: Document, model: type[Model], context: dict[str, Any] | None = None) -> Model:
    """Check the document against `model`. Raises the document's error for the first fault, with line and remedy."""
    if not isinstance(document.value, dict):
        raise document.fail((), f"expected keys and values, found {type(document.value).__name__}")
    try:
        return model.model_validate(document.value, context=context)
    except pydantic.ValidationError as problem:
        raise _explain(document, model, problem) from None


def _explain(document: Document, model: type[pydantic.BaseModel], problem: pydantic.ValidationError) -> RingsimError:
    first = min(problem.errors(), key=lambda fault: (fault["type"] != "extra_forbidden", fault["loc"] == ()))
    path, kind = _place(document.value, first["loc"]), first["type"]
    if kind == "extra_forbidden":
        return document.fail(path, f"unknown key {path[-1]!r}; {nearest(str(path[-1]), _fields(model, first['loc'][:-1]))}")
    if kind == "missing":
        return document.fail(path, f"{'item' if isinstance(first['loc'][-1], int) else 'key'} {first['loc'][-1]!r} is missing")
    if kind.startswith("union_tag"):
        return document.fail(*_unknown_tag(path, first))
    message = _SAID.get(kind, first["msg"]).removeprefix("Value error, ")
    return document.fail(path, message if kind == "value_error" else f"{message} (found {units.shown(first['input'])})")


def nearest(word: str, allowed: Sequence[str]) -> str:
    """A hint at the allowed word that is nearest, and those that are allowed."""
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed[:MOST_NAMED]) or 'none'}" + (", ..." if len(allowed) > MOST_NAMED else "")


def _place(value: Any, loc: Place) -> Place:
    """Where in the document a fault stands: its location less what pydantic adds for the members of a union."""
    path: list[str | int] = []
    for part in loc:
        inside = part in range(len(value)) if isinstance(value, list) else isinstance(value, dict) and part in value
        if inside:
            value = value[part]
            path.append(part)
    return tuple(path)


def _unknown_tag(path: Place, fault: Any) -> tuple[Place, str]:
    """A member of a union that says what it is by a key of its own, and says nothing known."""
    key = "join"
    allowed = [tag.strip("'") for tag in fault.get("ctx", {}).get("expected_tags", "").split(", ")]
    if not isinstance(fault["input"], dict):
        return path, f"found {units.shown(fault['input'])}, expected a name or keys and values"
    if key not in fault["input"]:
        return path, f"key {key!r} is missing"
    word = fault["input"][key]
    known = [tag for tag in allowed if tag not in ("name", "repeat")]
    return (*path, key), f"{units.shown(word)} is unknown" + (f"; {nearest(str(word), known)}" if known != [""] else "")


def _fields(model: type[pydantic.BaseModel], loc: Place) -> list[str]:
    """The keys allowed at `loc`, following models through lists, mappings and unions."""
    here: Any = model
    for part in loc:
        here = _step(_bare(here), part)
    return [info.alias or name for name, info in getattr(_bare(here), "model_fields", {}).items()]


def _bare(annotation: Any) -> Any:
    """A type without what is said about it, and without None."""
    while True:
        arguments = get_args(annotation)
        if get_origin(annotation) is Annotated:
            annotation = arguments[0]
        elif type(None) in arguments:
            annotation = next(argument for argument in arguments if argument is not type(None))
        else:
            return annotation


def _step(here: Any, part: str | int) -> Any:
    if hasattr(here, "model_fields"):
        return next((info.annotation for name, info in here.model_fields.items() if part in (name, info.alias)), None)
    arguments = get_args(here)
    tagged = [argument for argument in arguments if any(getattr(note, "tag", None) == part for note in get_args(argument)[1:])]
    if tagged:
        return tagged[0]
    return arguments[-1] if get_origin(here) is dict else next(iter(arguments), None)

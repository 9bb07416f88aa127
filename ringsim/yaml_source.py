"""Strict YAML: every value with its line; duplicate keys, aliases and tags are errors; only plain numbers become numbers."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from . import units
from .errors import RingsimError

Place = tuple[str | int, ...]
Model = TypeVar("Model", bound=pydantic.BaseModel)
MAX_DEPTH = 32
_INT = re.compile(r"[+-]?\d+")
_FLOAT = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")


@dataclass(slots=True)
class Document:
    """A YAML file as plain values, with the line of each."""

    file: str
    error: type[RingsimError]
    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)

    def fail(self, path: Place, message: str) -> RingsimError:
        """The error for what stands at `path`, with file and line."""
        known = next((self.lines[path[:end]] for end in range(len(path), -1, -1) if path[:end] in self.lines), 1)
        where = ".".join(str(part) for part in path)
        return self.error(f"{self.file}:{known}: {where + ': ' if where else ''}{message}")


def read(path: Path, error: type[RingsimError]) -> Document:
    """Parse the file. Raises `error` with file and line for anything that is not strict YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path}: cannot be read: not UTF-8 at byte {problem.start}") from problem
    return parse(text, str(path), error)


def parse(text: str, file: str, error: type[RingsimError]) -> Document:
    """Parse YAML text; `file` is its name in messages."""
    document = Document(file, error)
    try:
        _check_events(document, text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as problem:
        what = getattr(problem, "problem", None) or str(problem).split("\n")[0]
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


def load(document: Document, model: type[Model]) -> Model:
    """Check the document against `model`. Raises the document's error for the first fault, with line and remedy."""
    if not isinstance(document.value, dict):
        raise document.fail((), f"expected keys and values, found {type(document.value).__name__}")
    try:
        return model.model_validate(document.value)
    except pydantic.ValidationError as problem:
        raise _explain(document, model, problem) from None


def _explain(document: Document, model: type[pydantic.BaseModel], problem: pydantic.ValidationError) -> RingsimError:
    first = min(problem.errors(), key=lambda fault: (fault["type"] != "extra_forbidden", fault["loc"] == ()))
    path: Place = first["loc"]
    if first["type"] == "extra_forbidden":
        return document.fail(path, _unknown_key(model, path))
    if first["type"] == "missing":
        return document.fail(path[:-1], f"key {path[-1]!r} is missing")
    message = first["msg"].removeprefix("Value error, ")
    ours = first["type"] == "value_error"
    return document.fail(
        path, message if ours or isinstance(first["input"], dict) else f"{message} (found {units.shown(first['input'])})"
    )


def _unknown_key(model: type[pydantic.BaseModel], path: Place) -> str:
    allowed = _fields(model, path[:-1])
    key = str(path[-1])
    near = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key {key!r}; {hint}allowed: {', '.join(allowed)}"


def _fields(model: type[pydantic.BaseModel], path: Place) -> list[str]:
    """The keys allowed at `path`, following models through lists."""
    here: Any = model
    for part in path:
        if isinstance(part, str) and hasattr(here, "model_fields") and part in here.model_fields:
            here = here.model_fields[part].annotation
        while not hasattr(here, "model_fields") and getattr(here, "__args__", None):
            here = next((arg for arg in here.__args__ if arg is not type(None)), None)
    return [info.alias or name for name, info in getattr(here, "model_fields", {}).items()]

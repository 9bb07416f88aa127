"""A topology's document from its layers: the files that it extends, devices `like` others, and settings on top.

Every value keeps the file and line that it came from, and the nearest `source` around it in that file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .. import units, yaml_source
from ..errors import TopologyError
from ..yaml_source import Document, Place
from . import checks, unknowns
from .figures import OWN, TABLES
from .spec import Spec

MOST_LAYERS = 8
PARTS = ("devices", "links", "groups")
WHAT_IF = "guessed: what if, "
Settings = Mapping[str, object] | Iterable[str]


class Layers(Document):
    """A document whose values may come from several files; `sources` has the source of each."""

    sources: dict[Place, str]

    def __init__(self, document: Document, source: str | None = None) -> None:
        super().__init__(document.file, document.error, document.value, document.lines)
        self.files = dict.fromkeys(document.lines, document.file)
        self.sources = {}
        self._describe((), self.value, source)

    def _describe(self, place: Place, value: Any, source: str | None) -> None:
        """The nearest enclosing `source` of every value."""
        if isinstance(value, dict) and isinstance(value.get("source"), str):
            source = value["source"]
        if source is not None:
            self.sources[place] = source
        for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            self._describe((*place, key), item, source)

    def at(self, place: Place) -> Any:
        """The value at a place; None where there is none."""
        value = self.value
        for part in place:
            inside = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
            if not inside:
                return None
            value = value[part]
        return value

    def drop(self, place: Place) -> None:
        """Forget what stands at `place`."""
        for notes in self._notes():
            for path in [path for path in notes if path[: len(place)] == place]:
                del notes[path]
        above = self.at(place[:-1])
        if isinstance(above, dict):
            above.pop(place[-1], None)

    def put(self, place: Place, other: Layers, origin: Place) -> None:
        """Put what `other` has at `origin` at `place`, with its lines and sources."""
        if place:
            self.drop(place)
            self.at(place[:-1])[place[-1]] = _copy(other.at(origin))
        else:
            self.value = _copy(other.at(origin))
        for mine, theirs in zip(self._notes(), other._notes(), strict=True):
            mine.update({place + path[len(origin) :]: note for path, note in theirs.items() if path[: len(origin)] == origin})

    def _notes(self) -> tuple[dict[Place, Any], ...]:
        return self.lines, self.files, self.sources

    def overlay(self, other: Layers, place: Place = ()) -> None:
        """Lay `other` over this, key by key. null removes; a group with a `join` of its own replaces, as lists and values do."""
        mine, theirs = self.at(place), other.at(place)
        if not isinstance(mine, dict) or not isinstance(theirs, dict) or "join" in theirs or set(mine) == OWN:
            self.put(place, other, place)
            return
        if place in other.lines:
            self.lines[place], self.files[place] = other.lines[place], other.files[place]
        for key, item in theirs.items():
            inner = (*place, key)
            if item is None and key not in mine:
                raise other.fail(inner, "nothing to remove: what it extends has no such key")
            if item is None:
                self.drop(inner)
            elif key in mine:
                self.overlay(other, inner)
            else:
                self.put(inner, other, inner)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def names() -> tuple[str, ...]:
    """The machines that ringsim ships."""
    files = resources.files("ringsim.topologies").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml")))


def about(name: str) -> str:
    """What a shipped machine is, from the comment that its file begins with: up to its first semicolon or full stop."""
    first = (resources.files("ringsim.topologies") / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return re.split(r"; |\. ", first.removeprefix("# ").rstrip("."))[0]


def read(name_or_path: str | Path, folder: Path | None = None) -> Document:
    """The document of a file, or of a shipped machine. Raises TopologyError."""
    path = Path(name_or_path) if folder is None else folder / name_or_path
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name too long
        return yaml_source.read(path, TopologyError)
    if str(name_or_path) not in names():
        hint = yaml_source.nearest(str(name_or_path), names())
        raise TopologyError(f"no topology {units.shown(str(name_or_path))}: give a .yaml file or a shipped name; {hint}")
    entry = resources.files("ringsim.topologies") / f"{name_or_path}.yaml"
    return yaml_source.parse(entry.read_text(encoding="utf-8"), f"topologies/{name_or_path}.yaml", TopologyError)


def compose(document: Document, settings: Settings = (), choices: Mapping[str, object] | None = None) -> Layers:
    """The document with all that it extends below it, and settings and choices (top-level keys) on top.

    Raises TopologyError, also for what is still `unknown` then.
    """
    layers = _extended(document, ())
    for said, key, value in _pairs(settings):
        _set(layers, said, key, value)
    for key, value in (choices or {}).items():
        _set(layers, f"--{key} {value}", key, value)
    unknowns.check(layers)
    _derive(layers)
    return layers


def _extended(document: Document, above: tuple[str, ...]) -> Layers:
    layers = Layers(document)
    base = layers.at(("extends",))
    if base is None:
        return layers
    if not isinstance(base, str):
        raise layers.fail(("extends",), f"found {units.shown(base)}, expected a file or a shipped name")
    if base in above or len(above) >= MOST_LAYERS:
        raise layers.fail(("extends",), f"{units.shown(base)} extends itself, or goes deeper than {MOST_LAYERS} files")
    try:
        below = read(base, Path(document.file).parent if base.endswith((".yaml", ".yml")) else None)
    except TopologyError as error:
        raise layers.fail(("extends",), str(error)) from error
    if not isinstance(below.value, dict):
        raise below.fail((), f"expected keys and values, found {type(below.value).__name__}")
    if "ringsim" in below.value:
        checks.version(below)
    if not isinstance(layers.value.get("source"), str):
        raise layers.fail((), "key 'source' is missing: what a file changes has its own source")
    if not isinstance(layers.value.get("name"), str):
        raise layers.fail((), "key 'name' is missing")
    result = _extended(below, (*above, base))
    result.overlay(layers)
    result.file = layers.file
    return result


def _pairs(settings: Settings) -> Iterable[tuple[str, str, object]]:
    """What was said, the key, and its value."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if not isinstance(key, str):
                raise TopologyError(f"settings: {units.shown(key)} is no key such as 'nodes' or 'links.ndr.latency'")
            yield f"--set {key}={value}", key, _plain(value)
        return
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise TopologyError(f"--set {units.shown(text)}: write KEY=VALUE, e.g. nodes=4 or links.ndr.latency=2us")
        yield f"--set {text}", key.strip(), yaml_source.parse(value, f"--set {text}", TopologyError).value


def _set(layers: Layers, said: str, key: str, value: object) -> None:
    """Lay one value over the document. The first word may be a name in `counts`."""
    words, place = _words(layers, said, key), Place()
    for word in words:
        above, place = layers.at(place), (*place, _part(layers.at(place), word))
        if problem := _closed(above, place) or _unknown(layers, place, words):
            raise TopologyError(f"{said}: {problem}")
        if layers.at(place) is None and len(place) < len(words):
            layers.put(place, Layers(Document(said, TopologyError, {}, {(): 0})), ())
    if value is None and layers.at(place) is None:
        raise TopologyError(f"{said}: nothing to remove: there is no {'.'.join(map(str, place))}")
    if value is None and isinstance(layers.at(place[:-1]), dict):
        layers.drop(place)
    else:
        layers.put(place, Layers(Document(said, TopologyError, value, {(): 0}), WHAT_IF + said), ())


def _plain(value: Any) -> Any:
    """A Python value as YAML has it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _words(layers: Layers, said: str, key: str) -> list[str]:
    counts = layers.value.get("counts")
    names = list(counts) if isinstance(counts, dict) else []
    words = ["counts", key] if key in names else key.split(".")
    sections = [word for word in Spec.model_fields if word != "extends"]
    if words[0] not in sections or (words[0] == "counts" and len(words) > 1 and words[1] not in names):
        word = key.removeprefix("counts.")
        raise TopologyError(f"{said}: {word!r} cannot be set; {yaml_source.nearest(word.split('.')[0], [*names, *sections])}")
    if len(words) > yaml_source.MAX_DEPTH:
        raise TopologyError(f"{said}: nested too deeply; at most {yaml_source.MAX_DEPTH} levels")
    return words


def _closed(above: Any, place: Place) -> str | None:
    """Why nothing can be set at `place`, in `above`."""
    where = ".".join(map(str, place[:-1]))
    if isinstance(above, list) and place[-1] not in range(len(above)):
        return f"{where} is a list of {len(above)}; there is no item {place[-1]}"
    if not isinstance(above, dict | list):
        return f"{where} is {units.shown(above)}, which has no keys"
    if (isinstance(above, dict) and set(above) == OWN) or (isinstance(above, list) and place[-2] in TABLES):
        return f"{where} is one figure with its source: set {where} itself"
    return None


def _unknown(layers: Layers, place: Place, words: list[str]) -> str | None:
    """Why a part that is to be changed is not there; a whole one may be set anew."""
    if len(place) != 2 or len(words) == 2 or place[0] not in PARTS or layers.at(place) is not None:
        return None
    known = layers.at(place[:1])
    return f"no {str(place[0]).removesuffix('s')} {place[1]!r}; {yaml_source.nearest(str(place[1]), list(known or ()))}"


def _part(value: Any, word: str) -> str | int:
    return int(word) if isinstance(value, list) and word.isdecimal() and len(word) < 9 else word


def _derive(layers: Layers) -> None:
    """Devices `like` another: what they leave out is as it is there."""
    devices = layers.value.get("devices") if isinstance(layers.value, dict) else None
    if not isinstance(devices, dict):
        return
    done: set[str] = set()
    for name in list(devices):
        _derive_one(layers, name, (), done)


def _derive_one(layers: Layers, name: str, above: tuple[str, ...], done: set[str]) -> None:
    devices, place = layers.value["devices"], ("devices", name)
    like = devices[name].get("like") if isinstance(devices[name], dict) else None
    if like is None or name in done:
        return
    done.add(name)
    if not isinstance(like, str) or not isinstance(devices.get(like), dict):
        others = [other for other in devices if other != name]
        raise layers.fail((*place, "like"), f"no device {units.shown(like)}; {yaml_source.nearest(str(like), others)}")
    if like in (*above, name):
        raise layers.fail((*place, "like"), f"{name} is like itself, through {' and '.join((*above, name))}")
    _derive_one(layers, like, (*above, name), done)
    own = Layers(Document(layers.file, TopologyError, {}, {}))
    own.put((), layers, ())
    layers.put(place, own, ("devices", like))
    layers.overlay(own, place)

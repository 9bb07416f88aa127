"""The format as a JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from .figures import UNKNOWN
from .spec import FORMAT, Spec

PARTIAL = ("Device", "Link", "Transport")


def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a topology file. What it cannot say (names that lead somewhere, routes) `check` does."""
    made = Spec.model_json_schema(by_alias=True)
    parts = made["$defs"]
    for name in PARTIAL:
        # what a file extends, or what a device is like, may say the rest
        parts[name].pop("required", None)
    _short(parts, "Nics", parts["Nics"]["properties"]["count"])
    _short(parts, "Connection", {"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 3})
    for name in ("Transport", "Route"):
        progress = parts[name]["properties"]["progress"]
        progress.get("anyOf", [progress])[0]["enum"].append(UNKNOWN)
    _overlaid(made, parts)
    removable = [*made["properties"].values(), *(field for name in PARTIAL for field in parts[name]["properties"].values())]
    for field in removable:
        _removable(field)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ringsim topology, version {FORMAT}",
        "description": "A machine for ringsim: devices, links, how they are joined, and the transport on them.",
    }
    return head | {key: value for key, value in made.items() if key not in head} | {"required": ["ringsim", "name", "source"]}


def _overlaid(made: dict[str, Any], parts: dict[str, Any]) -> None:
    """A group without a `join` changes some keys of the one that the file extends."""
    (groups,) = made["properties"]["groups"]["patternProperties"].values()
    kinds = [form["$ref"].rpartition("/")[2] for form in groups["oneOf"] if "$ref" in form]
    keys = {key: form for kind in kinds for key, form in parts[kind]["properties"].items() if key != "join"}
    parts["Changes"] = {
        "type": "object",
        "description": "Some keys of a group that the file extends.",
        "properties": {key: dict(form) for key, form in sorted(keys.items())},
        "additionalProperties": False,
        "minProperties": 1,
    }
    for field in parts["Changes"]["properties"].values():
        _removable(field)
    for field in (made["properties"]["machine"], groups):
        field["anyOf"] = [*field.pop("oneOf"), {"$ref": "#/$defs/Changes"}]


def _removable(field: dict[str, Any]) -> None:
    """`null` removes what a file extends: an entry of a mapping, or a key."""
    if "patternProperties" in field:
        field["patternProperties"] = {
            name: {"anyOf": [one, {"type": "null"}]} for name, one in field["patternProperties"].items()
        }
    elif "const" not in field:
        plain = {key: field.pop(key) for key in list(field) if key not in ("default", "title", "description")}
        field["anyOf"] = [plain, {"type": "null"}]


def _short(parts: dict[str, Any], name: str, form: dict[str, Any]) -> None:
    """A part that has a short form too."""
    parts[name] = {"anyOf": [form, parts[name]]}

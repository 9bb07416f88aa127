"""The format as a JSON Schema, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

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
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"ringsim topology, version {FORMAT}",
        "description": "A machine for ringsim: devices, links, how they are joined, and the transport on them.",
    }
    return head | {key: value for key, value in made.items() if key not in head} | {"required": ["ringsim", "name", "source"]}


def _short(parts: dict[str, Any], name: str, form: dict[str, Any]) -> None:
    """A part that has a short form too."""
    parts[name] = {"anyOf": [form, parts[name]]}

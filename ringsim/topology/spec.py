"""A topology file as a whole."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import pydantic

from .. import units
from .figures import Name, Source, Strict, Text, Whole
from .groups import Item, Member
from .parts import Device, Link, Transport

FORMAT: Final = 2
ORDERS: Final = ("block", "round-robin", "snake")
Index = Annotated[int, pydantic.Field(ge=0, strict=True)]


def _place(value: object) -> object:
    entries = value if isinstance(value, list) else ()
    known = [entry for entry in entries if (type(entry) is int and entry >= 0) or (isinstance(entry, str) and entry)]
    if value in ORDERS or (known and known == value):
        return value
    orders = ", ".join(map(repr, ORDERS))
    raise ValueError(f"{orders}, or a list of each rank's device by index or name; found {units.shown(value)}")


Place = Annotated[Literal["block", "round-robin", "snake"] | tuple[Index | Text, ...], pydantic.BeforeValidator(_place)]


class Spec(Strict):
    """What a topology file says, before its parts are counted out and joined."""

    ringsim: Literal[2]
    name: Text
    source: Source
    extends: Text | None = None
    counts: dict[Name, Whole] = pydantic.Field(default_factory=dict)
    devices: Annotated[dict[Name, Device], pydantic.Field(min_length=1)]
    links: dict[Name, Link] = pydantic.Field(default_factory=dict)
    groups: dict[Name, Item] = pydantic.Field(default_factory=dict)
    machine: Member
    replace: dict[Text, Name] = pydantic.Field(default_factory=dict)
    transports: Annotated[dict[Name, Transport], pydantic.Field(min_length=1)]
    transport: Name | None = None
    place: Place = "block"
    notes: dict[str, Any] = pydantic.Field(default_factory=dict)

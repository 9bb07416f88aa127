"""How devices are joined: one model per template, nested as deep as needed."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any, Literal, Self

import pydantic

from .figures import Bandwidth, Count, Name, Positive, Source, Strict, Text

Index = Annotated[int, pydantic.Field(ge=0, strict=True)]


class Connection(Strict):
    """A link between two named parts, of `cables` cables; short form [from, to, link]."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: Text = pydantic.Field(alias="from")
    to: Text
    link: Name
    cables: Count = 1

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, list):
            if len(value) != 3:
                raise ValueError(f"a connection in short form is [from, to, link], found {len(value)} items")
            return dict(zip(("from", "to", "link"), value, strict=True))
        return value


class Nics(Strict):
    """Where a node meets the network: device i uses NIC affinity[i], by default NICs in equal blocks of devices.

    `link` is what lies between a NIC and its devices (nothing that could bind, if left out). One message of a NIC with
    `stripe` cables uses them all.
    """

    count: Count
    link: Name | None = None
    affinity: tuple[Index, ...] | None = None
    stripe: Count = 1

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return value if isinstance(value, dict) else {"count": value}


class Group(Strict):
    """What all groups have. An outer group attaches to its `nics`, or to its switch by `uplinks` cables."""

    name: Name | None = None
    source: Source | None = None
    nics: Nics | None = None
    uplinks: Count | None = None
    exits: tuple[Text, ...] = ()
    connect: tuple[Connection, ...] = ()

    @pydantic.model_validator(mode="after")
    def _one_way_out(self) -> Self:
        if len([way for way in (self.exits, self.nics, self.uplinks) if way]) > 1:
            raise ValueError("a group is left by `exits`, by `nics` or by `uplinks`: give one of them")
        return self


class Also(Strict):
    """A second fabric between the same members: one more switch, or a link per pair."""

    join: Literal["switch", "mesh"]
    link: Name


class Joined(Group):
    """`count` members alike, or a list of members; `also` more fabrics between them."""

    count: Count | None = None
    of: Member
    link: Name
    also: tuple[Also, ...] = ()

    @pydantic.model_validator(mode="after")
    def _counted(self) -> Self:
        if self.across is not None and self.count is not None:
            raise ValueError("`shape` says how many members there are: leave `count` out")
        if self.across is None and (self.count is None) != isinstance(self.of, tuple):
            raise ValueError("`count` goes with one kind of member; a list of members counts itself")
        return self

    @property
    def across(self) -> tuple[int, ...] | None:
        """The members along each dimension of a torus."""
        return getattr(self, "shape", None)

    @property
    def size(self) -> int:
        """How many members of one kind."""
        return prod(self.across) if self.across is not None else self.count or 0


class SwitchJoin(Joined):
    """Every member to one switch, which carries no more than `backplane` in all."""

    join: Literal["switch"]
    backplane: Bandwidth | None = None


class MeshJoin(Joined):
    """A link per pair."""

    join: Literal["mesh"]


class RingJoin(Joined):
    """A link to the next, closed; devices pass on what is not theirs."""

    join: Literal["ring"]


class Torus2dJoin(Joined):
    """Rings along two dimensions, the last varies fastest."""

    join: Literal["torus2d"]
    shape: tuple[Count, Count]


class Torus3dJoin(Joined):
    """Rings along three dimensions, the last varies fastest."""

    join: Literal["torus3d"]
    shape: tuple[Count, Count, Count]


class PcieTreeJoin(Joined):
    """`per_switch` members on a PCIe switch, switches by `uplink` on `roots` root complexes, those joined by `socket`."""

    join: Literal["pcie-tree"]
    per_switch: Count
    uplink: Name
    roots: Count = 1
    socket: Name | None = None

    @pydantic.model_validator(mode="after")
    def _sockets(self) -> Self:
        if (self.roots > 1) != (self.socket is not None):
            raise ValueError("`socket` names the link between root complexes: needed with `roots` above 1, and only then")
        return self


class RailsJoin(Joined):
    """NIC i of every node to rail switch i; rails meet in a `spine`, else a message changes rail inside its node.

    Each rail's trunk to the spine carries what its nodes can send, over `oversubscription`.
    """

    join: Literal["rails"]
    spine: Name | None = None
    oversubscription: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _spine(self) -> Self:
        if self.oversubscription is not None and self.spine is None:
            raise ValueError("`oversubscription` is that of the `spine`, and there is none")
        return self


class FatTreeJoin(Joined):
    """`leaf` members to a leaf switch; each leaf's trunk to the spine carries what they can send, over `oversubscription`.

    The trunk's cables are of link `trunk`, by default `link`.
    """

    join: Literal["fat-tree"]
    leaf: Count
    oversubscription: Positive = 1.0
    trunk: Name | None = None


class Explicit(Group):
    """Named members (`switch` and `nic` are plain ones) and the links between them; an outer group attaches to `exits`.

    `affinity` names the plain NIC of a device that is not wired to one.
    """

    join: Literal["explicit"]
    members: dict[Name, Item]
    affinity: dict[Text, Text] = pydantic.Field(default_factory=dict)


class Repeat(Strict):
    """`count` times the same, within a list of members."""

    count: Count
    of: Item


MODELS: dict[str, type[pydantic.BaseModel]] = {
    "switch": SwitchJoin,
    "mesh": MeshJoin,
    "ring": RingJoin,
    "torus2d": Torus2dJoin,
    "torus3d": Torus3dJoin,
    "pcie-tree": PcieTreeJoin,
    "rails": RailsJoin,
    "fat-tree": FatTreeJoin,
    "explicit": Explicit,
    "repeat": Repeat,
}
PLAIN = ("switch", "nic")
"""Members of an explicit group that are neither device nor group."""
JOINS = tuple(name for name in MODELS if name != "repeat")


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "name"
    if isinstance(value, dict):
        if "join" not in value:
            return "repeat" if set(value) <= {"count", "of"} else None
        return str(value["join"]) if value["join"] in JOINS else "unknown"
    return next((kind for kind, model in MODELS.items() if isinstance(value, model)), None)


Item = Annotated[
    Annotated[str, pydantic.Tag("name")]
    | Annotated[SwitchJoin, pydantic.Tag("switch")]
    | Annotated[MeshJoin, pydantic.Tag("mesh")]
    | Annotated[RingJoin, pydantic.Tag("ring")]
    | Annotated[Torus2dJoin, pydantic.Tag("torus2d")]
    | Annotated[Torus3dJoin, pydantic.Tag("torus3d")]
    | Annotated[PcieTreeJoin, pydantic.Tag("pcie-tree")]
    | Annotated[RailsJoin, pydantic.Tag("rails")]
    | Annotated[FatTreeJoin, pydantic.Tag("fat-tree")]
    | Annotated[Explicit, pydantic.Tag("explicit")]
    | Annotated[Repeat, pydantic.Tag("repeat")],
    pydantic.Discriminator(_kind),
]
Items = Annotated[tuple[Item, ...], pydantic.Field(min_length=1)]
Member = Annotated[
    Annotated[Item, pydantic.Tag("item")] | Annotated[Items, pydantic.Tag("list")],
    pydantic.Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "item"),
]
_models: tuple[type[pydantic.BaseModel], ...] = (Joined, *MODELS.values())
for _model in _models:
    _model.model_rebuild()

"""A machine in YAML: one node of devices, and the path between two of them. docs/topology.md is the reference."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic

from . import units, yaml_source
from .errors import TopologyError


def _in_units_of(dimension: str) -> pydantic.BeforeValidator:
    return pydantic.BeforeValidator(lambda value: units.parse(value, dimension))


def _ascending(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    pairs = [point[0] for point in points]
    if pairs != sorted(set(pairs)):
        raise ValueError(f"the pairs per micro-tile must increase from point to point, found {pairs}")
    return points


def _version(value: object) -> object:
    if value is not FORMAT and (isinstance(value, bool) or value != FORMAT):
        raise ValueError(f"this ringsim reads version {FORMAT} of the format, found {units.shown(value)}")
    return value


FORMAT: Final = 1
Version = Annotated[int, pydantic.BeforeValidator(_version)]
Number = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
Time = Annotated[float, _in_units_of("time")]
Bandwidth = Annotated[float, _in_units_of("bandwidth"), pydantic.Field(gt=0)]
Rate = Annotated[float, _in_units_of("rate"), pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=1, strict=True)]
Text = Annotated[str, pydantic.Field(min_length=1)]
Points = Annotated[
    tuple[tuple[Annotated[Number, pydantic.Field(ge=1)], Annotated[Number, pydantic.Field(gt=0, le=1)]], ...],
    pydantic.Field(min_length=1),
    pydantic.AfterValidator(_ascending),
]
Switch = Annotated[bool, pydantic.Field(strict=True)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class MicroTile(_Strict):
    """Micro-tile sizes in rows: the lowering that the efficiencies were measured with. `exact`: visible pairs alone."""

    q_rows: Count
    k_rows: Count
    edge_rows: Count
    exact: Switch = False


class Attention(_Strict):
    """What attention costs for one dtype and head_dim: overhead + blocks x block_overhead + bytes / pass_bandwidth +
    FLOPs / (rate x efficiency).

    `overhead` comes once per op, `block_overhead` once per block of query rows of each tile and head. `pass_bandwidth`
    prices what is brought in and written back once per tile. `full` and `masked` list [pairs per micro-tile, efficiency],
    linear in log2(pairs) between points.
    """

    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    head_dim: Count
    rate: Rate
    overhead: Time
    block_overhead: Time = 0.0
    pass_bandwidth: Bandwidth | None = None
    micro_tile: MicroTile
    full: Points
    masked: Points


class Devices(_Strict):
    """cpu: all ranks share `cores`, fairly. gpu: each rank has a device of its own."""

    kind: Literal["cpu", "gpu"]
    cores: Count | None = None
    memory_bandwidth: Bandwidth
    attention: Annotated[tuple[Attention, ...], pydantic.Field(min_length=1)]

    @pydantic.model_validator(mode="after")
    def _cores(self) -> Self:
        if (self.kind == "cpu") != (self.cores is not None):
            raise ValueError("kind 'cpu' needs `cores`" if self.kind == "cpu" else "kind 'gpu' takes no `cores`")
        return self


class Hop(_Strict):
    """A hop between two ranks: latency + bytes / bandwidth, per direction.

    progress says who moves it once both sides have posted. offload: hardware, at once. handshake: hardware, once the
    receiver is inside the transport. thread: a thread of the receiver, on its cores. polling: the receiver itself, inside
    polls and waits. `look`: how long a completion or an arrival goes unnoticed by a rank that waits, on average.
    """

    latency: Time
    bandwidth: Bandwidth
    progress: Literal["offload", "handshake", "thread", "polling"]
    look: Time = 0.0


class Topology(_Strict):
    """One node. `source` says where the figures come from."""

    ringsim: Version
    name: Text
    source: Text
    ranks: Count | None = None
    devices: Devices
    path: Hop
    notes: dict[str, Any] = {}


def names() -> tuple[str, ...]:
    """The machines that ringsim ships."""
    files = resources.files("ringsim.topologies").iterdir()
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml")))


def load(name_or_path: str | Path) -> Topology:
    """A topology by file path, or by the name of a shipped one. Raises TopologyError with file, line and remedy."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name too long
        return parse_document(yaml_source.read(path, TopologyError))
    if str(name_or_path) not in names():
        raise TopologyError(f"no topology {units.shown(str(name_or_path))}: give a .yaml file or one of {', '.join(names())}")
    entry = resources.files("ringsim.topologies") / f"{name_or_path}.yaml"
    return parse_document(yaml_source.parse(entry.read_text(encoding="utf-8"), f"topologies/{name_or_path}.yaml", TopologyError))


def parse(text: str, file: str = "<text>") -> Topology:
    """A topology from YAML text. Raises TopologyError."""
    return parse_document(yaml_source.parse(text, file, TopologyError))


def parse_document(document: yaml_source.Document) -> Topology:
    """A topology from a parsed document. Raises TopologyError."""
    return yaml_source.load(document, Topology)

"""The types of a topology's values: quantities with their unit, counts that may have a name, and where figures come from."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal

import pydantic

from .. import units, yaml_source

KINDS: Final = ("measured", "vendor", "guessed", "defined")
MOST: Final = 2**20
OWN: Final = {"value", "source"}
TABLES: Final = ("full", "masked")
UNKNOWN: Final = "unknown"
UNKNOWN_SCHEMA: Final = {"const": UNKNOWN, "description": "to be filled in before the file is used"}
_SOURCE = re.compile(rf"({'|'.join(KINDS)}): *\S.*", re.DOTALL)
_PATTERN: Final = {
    dimension: rf"^\s*[0-9.]+(?:[eE][+-]?[0-9]+)?\s*({'|'.join(map(re.escape, names))})\s*$"
    for dimension, names in units.DIMENSIONS.items()
}


def check_source(text: object) -> object:
    """The text, if it is a source. Raises ValueError."""
    if isinstance(text, str) and not _SOURCE.fullmatch(text):
        kinds = ", ".join(f"'{kind}: ...'" for kind in KINDS)
        raise ValueError(f"a source says what kind it is and where from: {kinds}; found {units.shown(text)}")
    return text


def _own_source(value: object) -> object:
    """`{value: 450 GB/s, source: 'vendor: ...'}` is a figure with a source of its own."""
    if not isinstance(value, dict):
        return value
    if set(value) != OWN:
        raise ValueError(
            f"a figure with its own source is {{value: ..., source: 'measured: ...'}}, found keys {', '.join(value) or 'none'}"
        )
    check_source(str(value["source"]))
    return value["value"]


def _schema(plain: dict[str, Any]) -> pydantic.WithJsonSchema:
    own = {
        "type": "object",
        "properties": {"value": {"anyOf": [plain, UNKNOWN_SCHEMA]}, "source": SOURCE_SCHEMA},
        "required": sorted(OWN),
        "additionalProperties": False,
    }
    return pydantic.WithJsonSchema({"anyOf": [plain, UNKNOWN_SCHEMA, own]})


def _quantity(dimension: str) -> tuple[Any, ...]:
    plain = {"type": "string", "pattern": _PATTERN[dimension], "description": f"a {dimension} with its unit"}
    return pydantic.BeforeValidator(lambda value: units.parse(_own_source(value), dimension)), _schema(plain)


def _count(value: object, info: pydantic.ValidationInfo) -> object:
    if isinstance(value, str):
        counts: dict[str, int] = (info.context or {}).get("counts", {})
        if value not in counts:
            raise ValueError(
                f"{units.shown(value)} is no whole number and no name in `counts`; {yaml_source.nearest(value, sorted(counts))}"
            )
        return counts[value]
    return value


def _ascending(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    pairs = [point[0] for point in points]
    if pairs != sorted(set(pairs)):
        raise ValueError(f"the pairs per micro-tile must increase from point to point, found {pairs}")
    return points


SOURCE_SCHEMA: Final = {"type": "string", "pattern": f"^({'|'.join(KINDS)}): *\\S", "description": "kind: where from"}
Source = Annotated[str, pydantic.BeforeValidator(check_source), pydantic.WithJsonSchema(SOURCE_SCHEMA)]
_time, _size, _bandwidth, _rate = map(_quantity, ("time", "size", "bandwidth", "rate"))
Time = Annotated[float, _time[0], _time[1]]
Size = Annotated[float, _size[0], _size[1]]
# below one byte or FLOP a second, times would not be finite
Bandwidth = Annotated[float, _bandwidth[0], pydantic.Field(ge=1), _bandwidth[1]]
Rate = Annotated[float, _rate[0], pydantic.Field(ge=1), _rate[1]]
Plain = Annotated[float, pydantic.Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[
    float,
    pydantic.Field(strict=True, allow_inf_nan=False, gt=0, le=1),
    pydantic.BeforeValidator(_own_source),
    _schema({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
]
Share = Annotated[
    float,
    pydantic.Field(strict=True, allow_inf_nan=False, ge=0, lt=1),
    pydantic.BeforeValidator(_own_source),
    _schema({"type": "number", "minimum": 0, "exclusiveMaximum": 1}),
]
Positive = Annotated[
    float,
    pydantic.Field(strict=True, allow_inf_nan=False, gt=0),
    pydantic.BeforeValidator(_own_source),
    _schema({"type": "number", "exclusiveMinimum": 0}),
]
Whole = Annotated[int, pydantic.Field(ge=1, le=MOST, strict=True)]
Count = Annotated[
    int,
    pydantic.Field(ge=1, le=MOST, strict=True),
    pydantic.BeforeValidator(_count),
    pydantic.WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": MOST}, {"type": "string"}]}),
]
Units = Annotated[
    int,
    pydantic.Field(ge=1, le=MOST, strict=True),
    pydantic.BeforeValidator(_own_source),
    _schema({"type": "integer", "minimum": 1, "maximum": MOST}),
]
Text = Annotated[str, pydantic.Field(min_length=1)]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$")]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Switch = Annotated[bool, pydantic.Field(strict=True)]
_POINT: Final = {
    "type": "array",
    "prefixItems": [{"type": "number", "minimum": 1}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}],
    "minItems": 2,
    "maxItems": 2,
}
Points = Annotated[
    tuple[tuple[Annotated[Plain, pydantic.Field(ge=1)], Annotated[Plain, pydantic.Field(gt=0, le=1)]], ...],
    pydantic.Field(min_length=1),
    pydantic.AfterValidator(_ascending),
    pydantic.BeforeValidator(_own_source),
    _schema({"type": "array", "minItems": 1, "items": _POINT, "description": "[pairs, efficiency], pairs increasing"}),
]


class Strict(pydantic.BaseModel):
    """A mapping of a topology file: no unknown key, immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

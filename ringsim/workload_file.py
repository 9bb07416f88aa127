"""Workloads in YAML, with the keys of the command line's options. docs/workload.md lists them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic

from . import yaml_source
from .errors import WorkloadError
from .units import parse_tokens

Tokens = Annotated[int, pydantic.BeforeValidator(lambda value: parse_tokens(str(value)))]


class WorkloadFile(pydantic.BaseModel):
    """The keys of a workload file; those left out keep the command line's defaults."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    seq: Tokens | None = None
    kv_seq: Tokens | None = None
    q_offset: int | None = None
    batch: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    dtype: str | None = None
    causal: bool | None = None
    mask: str | None = None
    softmax_scale: float | None = None
    partition: str | None = None
    strategy: str | None = None
    pass_: str | None = pydantic.Field(default=None, alias="pass")
    sync: str | None = None


def load(path: Path) -> dict[str, Any]:
    """The keys that the file sets. Raises WorkloadError with file, line and remedy."""
    return yaml_source.load(yaml_source.read(path, WorkloadError), WorkloadFile).model_dump(exclude_none=True)

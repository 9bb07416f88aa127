"""What is computed: shapes, dtype, mask and pass of one attention call, without a word about how."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from .dtypes import accumulator, canonical
from .errors import WorkloadError
from .mask import Full, Mask, mask_named, shortened
from .units import shown

PASSES: Final = ("forward", "backward", "both")
MOST: Final = 2**40
"""Of any count: beyond it float seconds lose the ops they are made of."""
DERIVED: Final[Any] = None
"""Default of a field that follows from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One attention call over global arrays ``q (batch, q_len, heads, head_dim)``, ``k (batch, kv_len, kv_heads, head_dim)``
    and ``v (batch, kv_len, kv_heads, v_head_dim)``.

    Query i is at position ``q_offset + i``, key j at ``kv_offset + j``; masks compare positions (a decode step over a cache
    has ``q_len=1, q_offset=kv_len-1``). `lengths`, if given, holds the valid tokens of each sequence: later keys are seen by
    no query and later queries see nothing (output 0, lse -inf). `pass_` is forward, backward, or both, one after the other.
    `wire_dtype` is that of travelling blocks. Left out, kv_len is q_len, kv_heads heads, v_head_dim head_dim, softmax_scale
    ``head_dim ** -0.5`` and wire_dtype dtype. Raises WorkloadError.
    """

    q_len: int
    kv_len: int = DERIVED
    batch: int = 1
    heads: int = 1
    kv_heads: int = DERIVED
    head_dim: int = 64
    v_head_dim: int = DERIVED
    dtype: str = "float32"
    mask: Mask = field(default_factory=Full)
    softmax_scale: float = DERIVED
    q_offset: int = 0
    kv_offset: int = 0
    lengths: tuple[int, ...] | None = None
    wire_dtype: str = DERIVED
    pass_: str = "forward"

    def __post_init__(self) -> None:
        self._derive()
        for name in ("q_len", "kv_len", "batch", "heads", "kv_heads", "head_dim", "v_head_dim", "q_offset", "kv_offset"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        if self.lengths is not None:
            if not isinstance(self.lengths, Iterable):
                raise WorkloadError(f"lengths is {self.lengths!r}; give one count per sequence")
            object.__setattr__(self, "lengths", tuple(_whole("lengths", length) for length in self.lengths))
        object.__setattr__(self, "dtype", canonical(self.dtype))
        object.__setattr__(self, "wire_dtype", canonical(self.wire_dtype))
        self._check()

    def _derive(self) -> None:
        derived = {
            "kv_len": self.q_len,
            "kv_heads": self.heads,
            "v_head_dim": self.head_dim,
            "softmax_scale": float(self.head_dim) ** -0.5 if self.head_dim > 0 else 1.0,
            "wire_dtype": self.dtype,
        }
        for name, value in derived.items():
            if getattr(self, name) is DERIVED:
                object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name in ("q_len", "kv_len", "batch"):
            if getattr(self, name) < 0:
                raise WorkloadError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("heads", "kv_heads", "head_dim", "v_head_dim"):
            if getattr(self, name) < 1:
                raise WorkloadError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.heads % self.kv_heads:
            raise WorkloadError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        check_scale(self.softmax_scale, self.dtype)
        self._check_mask()
        if self.pass_ not in PASSES:
            raise WorkloadError(f"unknown pass {self.pass_!r}; allowed: {', '.join(PASSES)}")
        if self.lengths is not None:
            limit = max(self.q_len, self.kv_len)
            if len(self.lengths) != self.batch or not all(0 <= n <= limit for n in self.lengths):
                raise WorkloadError(
                    f"lengths {self.lengths} must hold {self.batch} counts between 0 and {limit}, one per sequence"
                )

    def _check_mask(self) -> None:
        if not hasattr(self.mask, "pieces"):
            raise WorkloadError(f"mask is {self.mask!r}; give a mask such as ringsim.Causal() or mask_named('causal')")
        tokens = max(self.q_offset + self.q_len, self.kv_offset + self.kv_len)
        if self.mask.extent is not None and self.mask.extent > tokens:
            raise WorkloadError(
                f"mask {shortened(self.mask.name)} describes {self.mask.extent} tokens, the sequence has {tokens}; "
                "give the mask of this sequence, or q_offset and kv_offset where it is part of a longer one"
            )

    @property
    def causal(self) -> bool:
        """Whether the mask is the plain causal one."""
        return self.mask.name == "causal"

    def sequences(self) -> tuple[tuple[tuple[int, int], int, int], ...]:
        """Runs of sequences of equal length: ((first, end), valid queries, valid keys)."""
        if self.lengths is None:
            return (((0, self.batch), self.q_len, self.kv_len),) if self.batch else ()
        runs: list[tuple[tuple[int, int], int, int]] = []
        for index, length in enumerate(self.lengths):
            valid = (min(length, self.q_len), min(length, self.kv_len))
            if runs and runs[-1][1:] == valid:
                runs[-1] = ((runs[-1][0][0], index + 1), *valid)
            else:
                runs.append(((index, index + 1), *valid))
        return tuple(runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and digests; `from_dict` reverses it."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return values | {"mask": self.mask.name, "lengths": None if self.lengths is None else list(self.lengths)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Workload:
        """A workload from `to_dict`'s values. Raises WorkloadError for unknown or missing ones."""
        try:
            return cls(**(values | {"mask": mask_named(values["mask"])}))
        except (TypeError, KeyError) as error:
            raise WorkloadError(f"not the values of a workload: {error}") from None


def check_scale(scale: Any, dtype: str) -> None:
    """Raise WorkloadError unless `scale` is a number that the partials of `dtype` can hold."""
    range_ = np.finfo(accumulator(dtype))
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.floating) or not range_.tiny <= scale <= range_.max:
        raise WorkloadError(f"softmax_scale is {scale!r}; it must be positive, finite and in the range of {accumulator(dtype)}")


def _whole(name: str, value: Any) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise WorkloadError(f"{name} is {value!r}; it must be a whole number") from None
    if abs(count) > MOST:
        raise WorkloadError(f"{name} is {shown(count)}; at most {MOST} is allowed")
    return count

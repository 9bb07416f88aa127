"""What computes tiles on a GPU: the protocol of fused kernels, cuDNN's and our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ringsim.backends.cuda import DeviceArray, Stream
from ringsim.parts import Band, Part, part_of, parts_of

__all__ = ["Backward", "Band", "Forward", "Part", "Tiles", "part_of", "parts_of"]


class Forward(NamedTuple):
    """Operands of one tile forward: views whose last axis is dense; all other strides are free.

    q (batch, rows, heads, head_dim), k and v (batch, keys, kv_heads, head_dim or v_head_dim), all of one dtype; query head h
    goes with key/value head h // (heads // kv_heads). Made: `out` (batch, rows, heads, v_head_dim), the normalised output, in
    `Tiles.partial`'s dtype, and `lse` (batch, heads, rows) in float32 (float64 for float64), the log-sum-exp of each row's
    scaled scores; 0 and -inf for a row that sees nothing.
    """

    q: DeviceArray
    k: DeviceArray
    v: DeviceArray
    out: DeviceArray
    lse: DeviceArray


class Backward(NamedTuple):
    """Operands of one tile backward, shaped as in `Forward`: lse and delta (batch, heads, rows) are those of whole rows.

    Made, all overwritten: dq, dk and dv, shaped as q, k and v, what this tile adds to the gradients, in `Tiles.partial`'s dtype.
    """

    q: DeviceArray
    k: DeviceArray
    v: DeviceArray
    dout: DeviceArray
    lse: DeviceArray
    delta: DeviceArray
    dq: DeviceArray
    dk: DeviceArray
    dv: DeviceArray


class Tiles(Protocol):
    """Fused kernels for tiles, forward and backward. Deterministic: equal operands give equal bits."""

    @property
    def name(self) -> str:
        """``cudnn`` or ``own``."""

    def partial(self, dtype: str) -> str:
        """The dtype in which it makes `out`, dq, dk and dv for operands of `dtype`."""

    def refuses(self, dtype: str, widths: tuple[int, int], band: Band | None, *, backward: bool) -> str | None:
        """Why it cannot compute such tiles (`widths`: head_dim, v_head_dim), or None if it can."""

    def unfit(self, arrays: Sequence[DeviceArray], band: Band | None) -> str | None:
        """Why it cannot compute this tile of a kind that it does not refuse, or None: for its rows, strides or addresses.

        `arrays` are q, k, v and, backward, dout.
        """

    def attend(self, operands: Forward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile forward."""

    def attend_backward(self, operands: Backward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile backward."""

    def facts(self) -> dict[str, Any]:
        """What a measurement depends on: versions, and what was planned so far."""

    @property
    def nbytes(self) -> int:
        """Device memory that it holds for itself now."""

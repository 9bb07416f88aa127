"""The GPU as the sections see it: CuPy's, or in tests one on paper. ringsim itself makes `calls`; the rest is for measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ringsim.backends.cuda import Calls, DeviceArray, Kernel, Stream
from ringsim.backends.cuda_tiles import Band, Tiles

MakeTiles = Callable[[Calls], Tiles]


class Operands(NamedTuple):
    """Of one call over all keys: q, k, v, out and lse as in `cuda_tiles.Forward`; dout, dq, dk and dv of the backward pass."""

    q: DeviceArray
    k: DeviceArray
    v: DeviceArray
    out: DeviceArray
    lse: DeviceArray
    dout: DeviceArray | None = None
    dq: DeviceArray | None = None
    dk: DeviceArray | None = None
    dv: DeviceArray | None = None


class OneCall(Protocol):
    """One fused call over all keys, as a program without a ring makes it."""

    def forward(self, operands: Operands, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue it: out and lse are made."""

    def backward(self, operands: Operands, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue its gradients: dq, dk and dv are made of out, lse and dout."""


class Card(Protocol):
    """One GPU."""

    calls: Calls
    xp: Any
    """The module that computes with what `exact` gives: cupy or numpy."""
    kinds: Mapping[str, MakeTiles]
    """Fused kernels by name, in the order in which the backend tries them: ``cudnn``, ``own``, ``own plain``."""
    missing: Mapping[str, str]
    """Those that cannot be had here, and why."""

    def tiles(self, calls: Calls) -> tuple[Tiles, ...]:
        """What a backend is given here."""

    def one_call(self, *, ordered: bool) -> OneCall:
        """That of cuDNN; `ordered`: with its deterministic backward pass. Raises MissingDependency."""

    def build(self, kernel: Kernel) -> None:
        """Compile a kernel's source for this device, for later launches to find; from any thread. Raises DeviceError."""

    def facts(self) -> dict[str, Any]:
        """What every number here depends on."""

    def exact(self, array: DeviceArray) -> Any:
        """The values in float64, once all that is queued has been done."""

    def upload(self, array: Any) -> DeviceArray:
        """A NumPy array's values in device memory."""

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> DeviceArray:
        """Unit-normal values, the same for equal shapes and seeds."""

    def spin(self, stream: Stream, seconds: float) -> None:
        """Queue a kernel that does nothing for about so long."""

    def settle(self) -> None:
        """Wait for all that is queued, on any stream."""

    def free_nbytes(self) -> int:
        """Device memory that nobody holds."""

    def pool_nbytes(self) -> int:
        """Device memory that the caller's pool holds."""

    def matmul(self, rows: int, dtype: str, stream: Stream) -> Callable[[], None]:
        """Something that queues one product of square matrices of random numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """A ring's sizes: tokens, query and key/value heads, head_dim."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the sections' problems are."""

    matmul_rows: int = 8192
    copy_nbytes: int = 2**32
    repeats: int = 10
    spin_s: float = 2e-3
    tile_rows: tuple[tuple[int, int], ...] = ((257, 512), (192, 65), (1, 130))
    tile_heads: tuple[tuple[int, int], ...] = ((4, 4), (6, 2))
    tile_widths: tuple[tuple[int, int], ...] = ((64, 64), (128, 128), (80, 80), (192, 128), (256, 256), (40, 24), (33, 70))
    kernel_rows: int = 300
    loss: Ring = Ring(tokens=4096, heads=8, kv_heads=8, head_dim=128)
    strategies: Ring = Ring(tokens=512, heads=8, kv_heads=4, head_dim=64)
    strategy_dtypes: tuple[str, ...] = ("bfloat16", "float32")
    races: Ring = Ring(tokens=2048, heads=8, kv_heads=8, head_dim=64)
    race_seeds: int = 6
    speed: Ring = Ring(tokens=32768, heads=16, kv_heads=16, head_dim=128)
    speed_blocks: tuple[int, ...] = (1, 4, 8)
    sharing: Ring = Ring(tokens=32768, heads=16, kv_heads=16, head_dim=128)
    sharing_ranks: tuple[int, ...] = (1, 2, 4)
    held_out: tuple[Ring, ...] = (
        Ring(tokens=24576, heads=16, kv_heads=16, head_dim=128),
        Ring(tokens=49152, heads=8, kv_heads=2, head_dim=128),
        Ring(tokens=20000, heads=32, kv_heads=8, head_dim=128),
    )
    million: Ring = Ring(tokens=2**20, heads=8, kv_heads=8, head_dim=128)
    million_rows: int = 96
    million_heads: int = 2


FULL = Sizes()
REDUCED = Sizes(
    matmul_rows=512,
    copy_nbytes=2**22,
    repeats=2,
    tile_rows=((65, 70), (1, 33)),
    tile_heads=((2, 1),),
    tile_widths=((64, 64), (33, 70)),
    kernel_rows=40,
    loss=Ring(tokens=512, heads=2, kv_heads=2, head_dim=64),
    strategies=Ring(tokens=192, heads=4, kv_heads=2, head_dim=64),
    races=Ring(tokens=256, heads=2, kv_heads=2, head_dim=64),
    race_seeds=2,
)
"""For compute-sanitizer, under which everything takes a hundred times as long."""

"""Our own fused attention kernels: tiles where cuDNN is missing or refuses, in any dtype, of any width, under any band."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from ringsim.backends.cuda import Calls, DeviceArray, Kernel, Launch, Stream
from ringsim.backends.cuda_strides import Place, Record, aligned, dense, elements, place_of, record
from ringsim.backends.cuda_tiles import Backward, Band, Forward
from ringsim.dtypes import ATTENTION, ITEMSIZE, accumulator, numpy_dtype
from ringsim.errors import ArrayError

THREADS: Final = 128
WARPS: Final = 4
SIDE: Final = 32
"""Rows and columns of a plain tile."""
CHUNK: Final = 128
"""Numbers of each of its rows that one block makes."""
PAD: Final = 8
"""Elements between rows in shared memory, against bank conflicts."""
HALVES: Final = ("float16", "bfloat16")
WIDEST: Final = {False: 256, True: 128}
"""head_dim and v_head_dim up to which the tensor-core kernels go, forward and backward (True)."""
MOST_BLOCKS: Final = 2**31 - 1
NO_BOUND: Final = -(2**63)
COMPILED: Final = {"float16": ((64, 64), (128, 128), (256, 256)), "bfloat16": ((64, 64), (128, 128), (96, 80))}
"""Widths (head_dim, v_head_dim) whose tensor-core kernels are compiled in tests; any multiples of 16 are, where they are used."""


class Plan(NamedTuple):
    """A kernel and its launch."""

    kernel: Kernel
    launch: Launch


def plain_kernel(name: str, dtype: str) -> Kernel:
    """``attend_plain``, ``attend_dq_plain`` or ``attend_dkv_plain``."""
    source = "attend.cu" if name == "attend_plain" else "attend_backward.cu"
    return Kernel(source=source, name=name, types=(("ELEMENT", dtype),))


def tensor_kernel(name: str, dtype: str, widths: tuple[int, int]) -> Kernel:
    """``attend_tensor``, ``attend_dq_tensor`` or ``attend_dkv_tensor``."""
    source = "attend_tensor.cu" if name == "attend_tensor" else "attend_backward_tensor.cu"
    types = (("ELEMENT", dtype), ("HEAD_DIM", str(widths[0])), ("V_HEAD_DIM", str(widths[1])))
    return Kernel(source=source, name=name, types=types)


NAMES: Final = {False: ("attend",), True: ("attend_dq", "attend_dkv")}
"""The kernels of a tile, forward and backward (True)."""
KERNELS: Final = (
    *(plain_kernel(f"{name}_plain", dtype) for dtype in ATTENTION for names in NAMES.values() for name in names),
    *(
        tensor_kernel(f"{name}_tensor", dtype, widths)
        for backward, names in NAMES.items()
        for dtype in HALVES
        for widths in COMPILED[dtype]
        for name in names
        if max(widths) <= WIDEST[backward]
    ),
)
"""The kernels that are compiled in tests."""


class OwnTiles:
    """Tiles by our own kernels: on tensor cores where dtype and widths allow (compute capability 8.0), else plain ones.

    On tensor cores (float16, bfloat16; head_dim and v_head_dim multiples of 16, up to 256 forward and 128 backward), after
    FlashAttention-2: bound by the tensor cores' mma.sync rate and about as much by reads of shared memory; Hopper's and
    Blackwell's own matrix instructions are not used, so their peak is out of reach. Backward takes seven products where an
    atomic sum would take five: dq, and dk with dv, have a kernel each and one writer for each number. Key blocks that the band
    hides whole are skipped, those on an edge masked. Operands that cannot be read 16 bytes at a time are copied element by
    element, which is slower.

    The plain kernels take any dtype and width; they are bound by reads of shared memory, a fraction of what the FMA units can do,
    and are there for checking in float32 and float64 and for odd widths; values wider than 128 compute their scores once
    for every 128. A block on tensor cores in which a hidden value is not finite is computed by them again, so that 0 x NaN
    is not taken.

    `plain` leaves tensor cores unused, as a device before 8.0 must. Kernels need no scratch.
    """

    name = "own"
    nbytes = 0

    def __init__(self, calls: Calls, *, plain: bool = False) -> None:
        self._calls = calls
        self._plain = plain

    def partial(self, dtype: str) -> str:
        """float32; float64 for float64."""
        return accumulator(dtype)

    def refuses(self, dtype: str, widths: tuple[int, int], band: Band | None, *, backward: bool) -> str | None:
        """None but for a dtype that is not one of attention's, and heads without width."""
        if dtype not in ATTENTION:
            return f"no kernel for {dtype}, only for {', '.join(ATTENTION)}"
        if min(widths) < 1:
            return f"head_dim {widths[0]} and v_head_dim {widths[1]} must be 1 or more"
        return None

    def unfit(self, arrays: Sequence[DeviceArray], band: Band | None) -> str | None:
        """None: rows, strides and addresses are free."""
        return None

    def facts(self) -> dict[str, Any]:
        """Nothing: the kernels are this version's."""
        return {}

    def attend(self, operands: Forward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile forward. Raises ArrayError for operands that no kernel can read."""
        problem = problem_of(places_of(operands), 3, band, transposed=False)
        for plan in plans_of(operands.q.dtype.name, problem.shape, plain=self._plain, backward=False):
            self._launch(plan, problem.words, operands, scale, stream)

    def attend_backward(self, operands: Backward, band: Band | None, scale: float, stream: Stream) -> None:
        """Queue one tile backward. Raises ArrayError for operands that no kernel can read."""
        places = places_of(operands)
        straight, transposed = (problem_of(places, 4, band, transposed=turned) for turned in (False, True))
        queries, keys = plans_of(operands.q.dtype.name, straight.shape, plain=self._plain, backward=True)
        *read, dq, dk, dv = operands
        self._launch(queries, straight.words, (*read, dq), scale, stream)
        self._launch(keys, transposed.words, (*read, dk, dv), scale, stream)

    def _launch(self, plan: Plan, words: Record, arrays: Iterable[DeviceArray], scale: float, stream: Stream) -> None:
        if not plan.launch.grid[0]:
            return
        given = list(arrays)
        factor = numpy_dtype(accumulator(given[0].dtype.name)).type(scale)
        self._calls.launch(plan.kernel, plan.launch, [words, *given, factor], stream)


class Shape(NamedTuple):
    """Of a tile: query head h goes with key/value head h // group."""

    batches: int
    heads: int
    group: int
    rows: int
    keys: int
    head_dim: int
    v_head_dim: int


class Problem(NamedTuple):
    """A tile's shape, and the struct that `attend_band.cuh` declares."""

    shape: Shape
    words: Record


def places_of(arrays: Sequence[DeviceArray]) -> tuple[Place, ...]:
    """Where the operands lie. Raises ArrayError for one whose last axis is not dense."""
    places = tuple(place_of(array) for array in arrays)
    for place in places:
        if not dense(place):
            raise ArrayError(f"operand of shape {place.shape} and strides {place.strides} B: its last axis must be dense")
    return places


@lru_cache(maxsize=4096)
def problem_of(places: tuple[Place, ...], read: int, band: Band | None, *, transposed: bool) -> Problem:
    """The problem of a tile whose first `read` operands are of its dtype; `transposed`: rows of the band are keys."""
    q, k, v = places[:3]
    shape = Shape(q.shape[0], q.shape[2], q.shape[2] // max(k.shape[2], 1), q.shape[1], k.shape[1], q.shape[3], v.shape[3])
    vectors = all(aligned(place, 8) for place in places[:read])
    bounds = NO_BOUNDS if band is None else _bounds(band, transposed=transposed)
    wide = [place for place in places[3:] if len(place.shape) == 4]
    per_row = [place for place in places[3:] if len(place.shape) == 3]
    strides = [*(elements(place, (0, 1, 2)) for place in (q, k, v, *wide)), *(elements(place, (0, 1)) for place in per_row)]
    return Problem(shape, record((*shape, int(vectors), *bounds, *(word for each in strides for word in each))))


NO_BOUNDS: Final = (0, 1, 1, NO_BOUND, NO_BOUND)


def _bounds(band: Band, *, transposed: bool) -> tuple[int, ...]:
    """The band's five words; transposed, key j sees query i where -hi <= -distance + k_step * j - q_step * i <= -lo."""
    low, high = (NO_BOUND if bound is None else bound for bound in (band.lo, band.hi))
    if not transposed:
        return band.distance, band.q_step, band.k_step, low, high
    low, high = (NO_BOUND if bound is None else -bound for bound in (band.hi, band.lo))
    return -band.distance, band.k_step, band.q_step, low, high


@lru_cache(maxsize=4096)
def plans_of(dtype: str, shape: Shape, *, plain: bool, backward: bool) -> tuple[Plan, ...]:
    """Kernels and launches of a tile, forward one, backward those of dq and of dk with dv.

    Raises ArrayError where a grid would have more blocks than CUDA allows.
    """
    widths = shape.head_dim, shape.v_head_dim
    fused = not plain and dtype in HALVES and max(widths) <= WIDEST[backward] and not any(width % 16 for width in widths)
    plans = []
    for name in NAMES[backward]:
        if fused:
            rows, nbytes = _tensor_block(widths, backward=backward)
            kernel, chunks = tensor_kernel(f"{name}_tensor", dtype, widths), 1
        else:
            rows, nbytes = SIDE, plain_nbytes(dtype)
            kernel, chunks = plain_kernel(f"{name}_plain", dtype), _chunks(name, widths)
        lines = (shape.keys, shape.heads // shape.group) if name == "attend_dkv" else (shape.rows, shape.heads)
        blocks = -(-lines[0] // rows) * lines[1] * shape.batches * chunks
        if blocks > MOST_BLOCKS:
            raise ArrayError(f"a tile of {shape} takes {blocks} blocks; a grid has at most {MOST_BLOCKS}: use shorter blocks")
        plans.append(Plan(kernel, Launch((blocks, 1, 1), (THREADS, 1, 1), nbytes)))
    return tuple(plans)


def _chunks(name: str, widths: tuple[int, int]) -> int:
    """Blocks that share rows: of a plain tile's output, of dq, or of dk and of dv."""
    of = {"attend": widths[1:], "attend_dq": widths[:1], "attend_dkv": widths}[name]
    return sum(-(-width // CHUNK) for width in of)


def plain_nbytes(dtype: str) -> int:
    """Shared memory of a block of the plain kernels, attend_plain.cuh: three squares, a chunk of values, and rows' intervals."""
    return ITEMSIZE[accumulator(dtype)] * SIDE * (3 * (SIDE + 1) + CHUNK) + 8 * SIDE


def _tensor_block(widths: tuple[int, int], *, backward: bool) -> tuple[int, int]:
    """Rows that a block on tensor cores makes, and its shared memory: attend_tensor.cu, attend_backward_tensor.cu."""
    pitches = sum(width + PAD for width in widths)
    if backward:
        rows = WARPS * 16 * (2 if max(widths) <= 64 else 1)
        nbytes = 2 * pitches * (rows + 2 * SIDE) + 2 * 2 * 4 * SIDE + 8 * rows
    else:
        rows = WARPS * (16 if max(widths) > 128 else 32)
        columns = 32 if max(widths) > 128 or widths[1] > 80 else 64
        nbytes = 2 * (pitches * columns + (widths[0] + PAD) * rows) + 8 * rows
    return rows, max(nbytes, plain_nbytes("float32"))

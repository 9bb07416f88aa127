"""Section `kernels`: every fused kernel, plain, on tensor cores and cuDNN's, under every kind of band; twice, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final, NamedTuple

from ringsim.backends.cuda import DeviceArray
from ringsim.backends.cuda_attend import KERNELS
from ringsim.backends.cuda_tiles import Backward, Band, Forward, Tiles
from ringsim.checking import GRADIENT_LIMITS, LIMITS
from ringsim.dtypes import ATTENTION, accumulator, numpy_dtype
from ringsim.errors import RingsimError

from . import float64, passes
from .bench import Bench
from .record import Record
from .watched import Watched

SHARE: Final = 2.5
BESIDE: Final = 2e-3
"""Half precision: the error is at most 2.5 times the rounding of the exact result, and this."""
LSE_LIMITS: Final = {"float64": 1e-11, "float32": 1e-5}
RIGHTS: Final = ("out", "lse", "dq", "dk", "dv")


class Case(NamedTuple):
    """A tile: query rows and keys, query and key/value heads, head_dim and v_head_dim, dtype, band."""

    rows: tuple[int, int]
    heads: tuple[int, int]
    widths: tuple[int, int]
    dtype: str
    band: Band | None

    def __str__(self) -> str:
        return f"{self.dtype} {self.rows[0]}x{self.rows[1]} heads {self.heads} widths {self.widths} {self.band}"


def bands(rows: int, keys: int) -> Iterator[Band | None]:
    """None; causal; a later block; a window; one without a causal side; striped tiles; a band that hides whole rows."""
    yield None
    yield Band(0, 1, 1, 0, None)
    yield Band(keys // 2, 1, 1, 0, None)
    yield Band(0, 1, 1, -7, max(rows // 4, 1))
    yield Band(0, 1, 1, None, max(rows // 4, 1))
    yield Band(1, 4, 4, 0, None)
    yield Band(0, 2, 1, 0, None)
    yield Band(-(rows // 2), 1, 1, 0, keys // 3)


def cases(bench: Bench) -> Iterator[Case]:
    """Of the first widths every combination; of the others every dtype and band, with rows and heads in turn."""
    sizes = bench.sizes
    turns = list(product(sizes.tile_rows, sizes.tile_heads))
    first, *others = sizes.tile_widths
    for (rows, heads), dtype in product(turns, ATTENTION):
        for band in bands(*rows):
            yield Case(rows, heads, first, dtype, band)
    for number, (widths, dtype, index) in enumerate(product(others, ATTENTION, range(len(list(bands(1, 1)))))):
        rows, heads = turns[number % len(turns)]
        yield Case(rows, heads, widths, dtype, list(bands(*rows))[index])


def run(bench: Bench, record: Record) -> None:
    """State kernels, then tiles of each kind; counts what was refused, and names variants that nothing launched."""
    passes.run(bench, record)
    watched = Watched(bench.card.calls)
    kinds = {name: make(watched) for name, make in bench.card.kinds.items()}
    refused: dict[str, int] = dict.fromkeys(kinds, 0)
    for number, case in enumerate(cases(bench)):
        if record.late(str(case)):
            continue
        with record.attempt("cases that could not be made", str(case)):
            problem = Problem.of(bench, case, number)
            for name, tiles in kinds.items():
                refused[name] += _check(bench, record, problem, name, tiles)
    missing = [
        f"{kernel.name} {dict(kernel.types)}" for kernel in KERNELS if kernel not in watched.kernels and _asked(bench, kernel)
    ]
    record.require("every variant is launched", f"fused kernels: {missing}", not missing or bool(record.skipped))
    record.values["fused"] = {
        "kinds": list(kinds),
        "refused tiles": refused,
        "launched": sorted({f"{kernel.name} {dict(kernel.types)}" for kernel in watched.kernels}),
        "missing": dict(bench.card.missing),
    }
    cases_, failed = (
        sum(each) for each in zip(*((group.cases, len(group.failed)) for group in record.groups.values()), strict=True)
    )
    record.say(f"{cases_} checks against float64 and bit for bit, {failed} failed; refused tiles: {refused}")


def _asked(bench: Bench, kernel: Any) -> bool:
    """Whether the sizes have such widths."""
    types = dict(kernel.types)
    widths = types.get("HEAD_DIM"), types.get("V_HEAD_DIM")
    return widths == (None, None) or widths in {(str(one), str(other)) for one, other in bench.sizes.tile_widths}


class Problem(NamedTuple):
    """A case's operands on the card and its answers in float64; backward, of rows that see other tiles' keys as well."""

    case: Case
    scale: float
    given: dict[str, DeviceArray]
    wanted: dict[str, Any]

    @classmethod
    def of(cls, bench: Bench, case: Case, seed: int) -> Problem:
        """Random operands; lse and delta of the backward pass are those of whole rows, not of the tile's."""
        card, xp = bench.card, bench.card.xp
        (rows, keys), (heads, kv_heads), (width, v_width) = case.rows, case.heads, case.widths
        shapes = {
            "q": (1, rows, heads, width),
            "k": (1, keys, kv_heads, width),
            "v": (1, keys, kv_heads, v_width),
            "dout": (1, rows, heads, v_width),
        }
        given = {name: card.normal(shape, case.dtype, 16 * seed + at) for at, (name, shape) in enumerate(shapes.items())}
        exact = {name: card.exact(array) for name, array in given.items()}
        scale = width**-0.5
        seen = float64.seen_pairs(case.band, rows, keys)
        out, lse = float64.attend(xp, exact["q"], exact["k"], exact["v"], seen, scale)
        statistics = accumulator(case.dtype)
        per_row = {"lse": lse + 0.25, "delta": float64.delta_of(xp, out, exact["dout"]) * 0.5}
        for name, values in per_row.items():
            given[name] = card.upload(_host(xp, values).astype(numpy_dtype(statistics)))
        whole = [card.exact(given[name]) for name in ("lse", "delta")]
        gradients = float64.backward(xp, *(exact[name] for name in ("q", "k", "v", "dout")), *whole, seen, scale)
        return cls(case, scale, given, {"out": out, "lse": lse} | gradients._asdict())


def _host(xp: Any, array: Any) -> Any:
    return xp.asnumpy(array) if hasattr(xp, "asnumpy") else array


def _poisoned(bench: Bench, shape: tuple[int, ...], dtype: str) -> DeviceArray:
    """Memory of its own that holds NaN."""
    count = 1
    for size in shape:
        count *= size
    memory = bench.card.calls.empty(count * numpy_dtype(dtype).itemsize)
    stream = bench.card.calls.caller(None)
    bench.card.calls.fill(memory, 0xFF, stream)
    bench.card.calls.synchronize(bench.card.calls.record(stream))
    return memory.view(numpy_dtype(dtype)).reshape(shape)


def _check(bench: Bench, record: Record, problem: Problem, name: str, tiles: Tiles) -> int:
    """Forward and backward, each twice; how many of them were refused."""
    case, given = problem.case, problem.given
    refused = 0
    for backward in (False, True):
        group = f"{name} {'backward' if backward else 'forward'} {case.dtype}"
        inputs = [given[one] for one in ("q", "k", "v", *(("dout",) if backward else ()))]
        if tiles.refuses(case.dtype, case.widths, case.band, backward=backward) or tiles.unfit(inputs, case.band):
            refused += 1
            continue
        try:
            found = [_made(bench, problem, tiles, backward=backward) for _ in range(2)]
        except RingsimError as error:
            record.require(group, str(case), False, str(error))
            continue
        for what, array in found[0].items():
            values, wanted = bench.card.exact(array), problem.wanted[what]
            off, limit = _error(bench.card.xp, what, values, wanted, case.dtype)
            record.check(group, f"{case} {what}", off, limit)
            again = bench.card.exact(found[1][what])
            record.require(f"{group}, same bits again", f"{case} {what}", bool((values == again).all()))
    return refused


def _made(bench: Bench, problem: Problem, tiles: Tiles, *, backward: bool) -> dict[str, DeviceArray]:
    """What a kernel writes into poisoned memory."""
    given, stream = problem.given, bench.card.calls.caller(None)
    dtype, partial = problem.case.dtype, tiles.partial(problem.case.dtype)
    if not backward:
        out = _poisoned(bench, given["dout"].shape, partial)
        lse = _poisoned(bench, given["lse"].shape, accumulator(dtype))
        tiles.attend(Forward(given["q"], given["k"], given["v"], out, lse), problem.case.band, problem.scale, stream)
        return {"out": out, "lse": lse}
    made = [_poisoned(bench, given[name].shape, partial) for name in ("q", "k", "v")]
    inputs = [given[name] for name in ("q", "k", "v", "dout", "lse", "delta")]
    tiles.attend_backward(Backward(*inputs, *made), problem.case.band, problem.scale, stream)
    return dict(zip(("dq", "dk", "dv"), made, strict=True))


def _error(xp: Any, what: str, found: Any, wanted: Any, dtype: str) -> tuple[float, float]:
    """The largest error (of gradients relative to the largest entry, or 1) and its limit."""
    if what == "lse":
        return float64.apart(xp, found, wanted), LSE_LIMITS.get(dtype, BESIDE)
    scale = max(float64.largest(xp, wanted), 1.0) if what in ("dq", "dk", "dv") else 1.0
    off = float64.largest(xp, found - wanted) / scale
    exact = LIMITS if what == "out" else GRADIENT_LIMITS
    if dtype in exact:
        return off, exact[dtype]
    # half a step at the largest entry is what rounding alone may cost
    rounding = passes.STEP[dtype] / 2 * float64.largest(xp, wanted) / scale
    return off, SHARE * rounding + BESIDE

"""The kernels that pass over arrays once, in every variant that can be launched, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from ringsim.backends.cuda import DeviceArray, Kernel
from ringsim.backends.cuda_state import Partial, State, StateKernels
from ringsim.backends.cuda_variants import KERNELS
from ringsim.dtypes import numpy_dtype
from ringsim.partials import MOST_PARTIALS

from .bench import Bench
from .record import Record
from .watched import Watched

STEP: Final = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
SUMS: Final = 64
"""Steps of the sums' dtype that a fold of a few partials, or a row's sum, may be off."""
WIDTHS: Final = {True: 64, False: 37}
"""Rows that kernels take 16 bytes at a time, and rows that they cannot."""


class _Table:
    """Arrays of one case: made in NumPy, put on the card."""

    def __init__(self, bench: Bench, watched: Watched, seed: int) -> None:
        self.card, self.kernels = bench.card, StateKernels(watched)
        self.rng = np.random.default_rng(seed)
        self.stream = bench.card.calls.stream()

    def numbers(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(numpy_dtype(dtype))

    def up(self, array: np.ndarray) -> DeviceArray:
        return self.card.upload(array)

    def poison(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        return self.card.upload(np.full(shape, np.nan, np.float32).astype(numpy_dtype(dtype)))

    def far(self, found: DeviceArray, wanted: np.ndarray) -> float:
        """The largest difference relative to 1 or what is wanted; infinities must be the same."""
        xp = self.card.xp
        values, wanted = self.card.exact(found), xp.asarray(np.asarray(wanted, np.float64))
        same = values == wanted
        off = xp.where(same, 0.0, xp.abs(xp.where(same, 0.0, values) - xp.where(same, 0.0, wanted)))
        return float((off / xp.maximum(1.0, xp.abs(xp.where(xp.isinf(wanted), 1.0, wanted)))).max())


def run(bench: Bench, record: Record) -> None:
    """Each variant once; those that no case launches are named."""
    watched = Watched(bench.card.calls)
    for seed, kernel in enumerate(KERNELS):
        name = f"{kernel.name} {dict(kernel.types)}"
        if record.late(name):
            continue
        for what, off, limit in _CASES[kernel.name](_Table(bench, watched, seed), kernel, bench.sizes.kernel_rows):
            record.check("kernels over state and sums", f"{name}: {what}", off, limit)
    missing = [f"{kernel.name} {dict(kernel.types)}" for kernel in KERNELS if kernel not in watched.kernels]
    record.values["state_kernels"] = {"variants": len(KERNELS), "launched": len(KERNELS) - len(missing), "not launched": missing}
    record.require("every variant is launched", f"not launched: {missing}", not missing or bool(record.skipped))


Found = Iterator[tuple[str, float, float]]


def _state(table: _Table, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """acc, max and sum, of which some rows have seen nothing."""
    acc, top, total = table.numbers(shape, dtype), table.numbers(shape[:3], dtype), np.abs(table.numbers(shape[:3], dtype)) + 1
    unseen = table.rng.random(shape[:3]) < 0.2
    acc[unseen], top[unseen], total[unseen] = 0, -np.inf, 0
    return acc, top, total.astype(acc.dtype)


def _merged(one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Two states in float64."""
    (acc, top, total), (acc2, top2, total2) = ([np.asarray(each, np.float64) for each in state] for state in (one, other))
    high = np.maximum(top, top2)
    with np.errstate(invalid="ignore"):
        left, right = (np.where(np.isneginf(each), 0.0, np.exp(each - high)) for each in (top, top2))
    return acc * left[..., None] + acc2 * right[..., None], high, total * left + total2 * right


def _partials(table: _Table, shape: tuple[int, ...], dtypes: tuple[str, str], count: int) -> tuple[list[Partial], list[Any]]:
    made, plain = [], []
    batch, heads, rows, width = shape
    for index in range(count):
        begin, end = (0, rows) if index % 2 == 0 else (rows // 3, rows)
        out = table.numbers((batch, end - begin, heads, width), dtypes[1])
        lse = table.numbers((batch, heads, end - begin), dtypes[0])
        lse[table.rng.random(lse.shape) < 0.2] = -np.inf
        ranges = (0, batch), (0, heads), (begin, end)
        made.append(Partial(*ranges, table.up(out), table.up(lse)))
        seen = ~np.isneginf(lse)
        acc = np.where(seen[..., None], out.astype(np.float64).swapaxes(1, 2), 0.0)
        whole = np.zeros(shape), np.full(shape[:3], -np.inf), np.zeros(shape[:3])
        for array, part in zip(whole, (acc, lse.astype(np.float64), seen.astype(np.float64)), strict=True):
            array[:, :, begin:end] = part
        plain.append(whole)
    return made, plain


def _folds(table: _Table, kernel: Kernel, rows: int) -> Found:
    types = dict(kernel.types)
    state_dtype, partial_dtype, result = types["STATE"], types["PARTIAL"], types.get("RESULT")
    for vectors, width in WIDTHS.items():
        shape = (2, 3, rows if vectors else rows // 2 + 1, width)
        for fresh in (False, True):
            state = _state(table, shape, state_dtype)
            partials, plain = _partials(table, shape, (state_dtype, partial_dtype), MOST_PARTIALS if vectors else 2)
            device = State(*(table.poison(each.shape, state_dtype) if fresh else table.up(each) for each in state))
            wanted = (np.zeros(shape), np.full(shape[:3], -np.inf), np.zeros(shape[:3])) if fresh else state
            for each in plain:
                wanted = _merged(wanted, each)
            what, limit = f"width {width}, fresh {fresh}", SUMS * STEP[state_dtype]
            if result is None:
                table.kernels.merge_partials(device, fresh, partials, table.stream)
                yield what, max(table.far(found, each) for found, each in zip(device, wanted, strict=True)), limit
                continue
            acc, top, total = wanted
            out, lse = table.poison((2, shape[2], 3, width), result), table.poison(shape[:3], state_dtype)
            table.kernels.finish_partials(device, fresh, partials, out, lse, table.stream)
            safe = np.where(total == 0, 1.0, total)
            yield what, table.far(out, (acc / safe[..., None]).swapaxes(1, 2)), limit + STEP[result]
            with np.errstate(divide="ignore"):
                yield f"{what}, lse", table.far(lse, np.where(total == 0, -np.inf, top + np.log(safe))), limit


def _merge(table: _Table, kernel: Kernel, rows: int) -> Found:
    dtype = dict(kernel.types)["STATE"]
    for width in WIDTHS.values():
        mine, other = (_state(table, (2, 3, rows, width), dtype) for _ in range(2))
        device = State(*map(table.up, mine))
        table.kernels.merge(device, State(*map(table.up, other)), table.stream)
        off = max(table.far(found, each) for found, each in zip(device, _merged(mine, other), strict=True))
        yield f"width {width}", off, SUMS * STEP[dtype]


def _move(table: _Table, kernel: Kernel, rows: int) -> Found:
    """A copy of bytes, `UNIT` at a time: dense, and with gaps that leave no wider unit."""
    unit = int(dict(kernel.types)["UNIT"])
    wide = table.rng.integers(0, 255, (rows, 3, 5 * unit), np.uint8)
    inner = slice(0, 4 * unit) if unit == 16 else slice(unit, 4 * unit)
    target = table.up(np.full_like(wide, 7))
    expected = np.full_like(wide, 7)
    if kernel.name == "copy":
        table.kernels.copy(target[:, :, inner], table.up(wide)[:, :, inner], table.stream)
        expected[:, :, inner] = wide[:, :, inner]
    else:
        table.kernels.clear(target[:, :, inner], table.stream)
        expected[:, :, inner] = 0
    yield "bytes", table.far(target, expected), 0.0


def _pair(table: _Table, kernel: Kernel, rows: int) -> Found:
    types = dict(kernel.types)
    vectors = types["COLUMNS"] != "1"
    width = WIDTHS[vectors]
    # rows with a gap behind them are no one run of elements
    padded = (2, rows, 3, width + (0 if vectors else 1))
    source, before = table.numbers(padded, types["SOURCE"]), table.numbers(padded, types["TARGET"])
    target, addend = (table.up(one)[..., :width] for one in (before, source))
    source, before = source[..., :width], before[..., :width]
    exact = source.astype(np.float64)
    if kernel.name == "accumulate":
        table.kernels.accumulate(target, addend, table.stream)
        exact = before.astype(np.float64) + exact
    else:
        table.kernels.cast(target, addend, table.stream)
    yield f"width {width}", table.far(target, exact), 2 * STEP[types["TARGET"]]


def _delta(table: _Table, kernel: Kernel, rows: int) -> Found:
    types = dict(kernel.types)
    for width in WIDTHS.values():
        out, dout = (table.numbers((2, rows, 3, width), types["ELEMENT"]) for _ in range(2))
        target = table.poison((2, 3, rows), types["STATE"])
        table.kernels.delta(table.up(out), table.up(dout), target, table.stream)
        wanted = (out.astype(np.float64) * dout.astype(np.float64)).sum(axis=3).transpose(0, 2, 1)
        yield f"width {width}", table.far(target, wanted), SUMS * STEP[types["STATE"]]


def _stand_in(table: _Table, kernel: Kernel, rows: int) -> Found:
    dtype = dict(kernel.types)["ELEMENT"]
    for width in WIDTHS.values():
        dout, delta = table.numbers((2, rows, 3, width), dtype), table.numbers((2, 3, rows), "float32")
        target = table.poison(dout.shape, dtype)
        table.kernels.stand_in(table.up(dout), table.up(delta), target, table.stream)
        xp = table.card.xp
        sums = (table.card.exact(target) * xp.asarray(dout.astype(np.float64))).sum(axis=3).transpose(0, 2, 1)
        off = float(xp.abs(sums - xp.asarray(delta.astype(np.float64))).max())
        # what `StateKernels.stand_in` promises, with what float16's least step adds, and float32's rounding of the sum
        yield (
            f"width {width}",
            off,
            2.0**-21 * float(np.abs(delta).max()) + 2.0**-24 * float(np.abs(dout.astype(np.float64)).max()),
        )


_CASES: Final[dict[str, Any]] = {
    "merge_partials": _folds,
    "finish_partials": _folds,
    "merge": _merge,
    "copy": _move,
    "clear": _move,
    "accumulate": _pair,
    "cast": _pair,
    "delta": _delta,
    "stand_in": _stand_in,
}

"""A GPU's kernels timed by events: what a tile, a launch, a pass over memory and a matrix product take.

Figures are of a device that never waits for its host, back to back, as in a ring whose kernels hide the launch of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

from .costs import backward_pass_nbytes, pass_nbytes
from .device_bench import NOISY, Bench, Form, Room, Watch, backward_ops, forward_ops, normals, op_of, region
from .dtypes import ITEMSIZE, accumulator
from .errors import CalibrationError, DeviceError
from .kernel_times import PASSES, Kernel

if TYPE_CHECKING:
    from ringsim.backends.cuda import DeviceArray, Stream
    from ringsim.backends.cuda_tiles import Tiles
    from ringsim.backends.cupy import CupyBackend

Matmul = Callable[["DeviceArray", "DeviceArray", "DeviceArray", "Stream"], None]
"""Queues c = a b, square arrays of one dtype, on a stream."""
BLOCK_ROWS: Final = 128
"""Of the blocks that fill a device's units, by which `units` prices tiles that do not; as in the shipped topologies."""
ROWS: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Queries, and keys, of the tiles that are timed."""
WAVES: Final = 16
"""Blocks for each unit: enough that the last, partly filled wave is a small part."""
HEADS: Final = 16
"""At most, of a tile; what more is needed to fill the device comes as sequences."""
MOST_OP_S: Final = 0.3
"""An op that takes longer is the last of its kind."""
RING_ROWS, RING_TILES = 512, 8
"""Of the ring whose folding is timed: short rows, for a tile takes the square of them and its passes do not."""
TINY_ROWS: Final = 16
BUSY_ROWS: Final = 2048
BUSY: Final = ("reset", "attend")
"""The ops of a forward tile by itself: a partial output, of which a reset lets nothing be folded in."""
STREAM_NBYTES: Final = 2**29
MATRIX_ROWS: Final = (1024, 2048, 4096, 8192)
MOST_MATRIX_S: Final = 5e-2


class Times(NamedTuple):
    """What one of PASSES takes; `per_pair_s` by ("full" or "masked", visible pairs of a head), of the whole device.

    `overhead_s` is what an op takes that has next to nothing to do. `pass_bytes_per_s` is by what `costs.pass_nbytes` (or
    `backward_pass_nbytes`) is divided; None where nothing is left for it to price.
    """

    overhead_s: float
    pass_bytes_per_s: float | None
    per_pair_s: dict[tuple[str, int], float]


def _fused(backend: CupyBackend, kernel: Kernel, name: str) -> Tiles:
    """The first fused kernel that computes whole tiles of one of PASSES."""
    refused = []
    for fused in backend.tiles:
        reason = fused.refuses(kernel.dtype, (kernel.head_dim, kernel.head_dim), None, backward=name == "attend_backward")
        if reason is None:
            return fused
        refused.append(f"{fused.name}: {reason}")
    raise DeviceError(f"no fused kernel for {kernel.dtype} head_dim {kernel.head_dim}: {'; '.join(refused)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One of PASSES of one kernel on one device."""

    name: str
    kernel: Kernel
    watch: Watch
    room: Room

    @property
    def forward(self) -> bool:
        """Whether it is `attend`."""
        return self.name == "attend"

    def bench(self, form: Form, *, cold: bool = True) -> Bench:
        """A tile's ops and arrays."""
        partial = _fused(self.watch.backend, self.kernel, self.name).partial(self.kernel.dtype)
        ops = forward_ops(self.kernel, form) if self.forward else backward_ops(self.kernel, form, partial)
        return Bench.of(self.watch, ops, self.room, cold=cold)

    def what(self, form: Form, more: str = "") -> str:
        """A measurement's name."""
        tiles = f"{form.copies} {'causal' if form.masked else 'full'} tiles of {form.rows} x {form.rows}"
        return f"{self.name}, {self.kernel.dtype} head_dim {self.kernel.head_dim}, {tiles}{more}"

    @property
    def tile(self) -> tuple[str, ...]:
        """The ops of a tile by itself."""
        return BUSY if self.forward else (self.name,)

    def timed(self, form: Form) -> float:
        """Seconds of the device for a tile, on arrays that go with the measurement."""
        return self.bench(form).device_s(self.what(form), *self.tile)

    def form(self, rows: int, waves: float, *, masked: bool = False) -> Form | None:
        """A tile that fills all units so many times, or as often as there is memory for; None where that is not once."""
        width, wide = self.kernel.head_dim, ITEMSIZE[accumulator(self.kernel.dtype)]
        given = (3 if self.forward else 4) * width * ITEMSIZE[self.kernel.dtype]
        # acc, four partial outputs that wait and out; or sums and gradients
        made = (6 * width + 8) * wide
        copies = min(ceil(waves * BLOCK_ROWS * self.room.units / rows), self.room.nbytes // (rows * (given + made)))
        heads = min(HEADS, copies)
        form = Form(rows, copies // heads if heads else 0, heads, masked)
        return form if form.copies * rows >= BLOCK_ROWS * self.room.units else None

    def large(self, rows: int) -> Form:
        """A full tile whose passes outgrow the cache, where memory allows. Raises CalibrationError where it does for none."""
        form = next((found for waves in (8 * WAVES, 1) if (found := self.form(rows, waves))), None)
        if form is None:
            raise CalibrationError(
                f"{self.room.nbytes} B of memory hold no tiles of {rows} rows for {self.room.units} units: leave the device more"
            )
        return form


def measure_kernel(
    kernel: Kernel, make_backend: Callable[[], CupyBackend], room: Room, memory_bytes_per_s: float
) -> dict[str, Times]:
    """Each of PASSES on this rank's device, by backends with scratch of their own. Raises CalibrationError, DeviceError."""
    trials = (Trial(name=name, kernel=kernel, watch=Watch.of(make_backend(), room), room=room) for name in PASSES)
    return {trial.name: measure_pass(trial, memory_bytes_per_s) for trial in trials}


def measure_pass(trial: Trial, memory_bytes_per_s: float) -> Times:
    """One of PASSES. Raises CalibrationError where times do not settle, or memory is too small for any tile.

    A tile's seconds per pair are what its op takes beyond the overhead, and backward beyond what `pass_bytes_per_s` prices, on a
    device whose units are all filled: so `costs.Costs` gives the measured time back.
    """
    tiny = Form(TINY_ROWS, 1, 1)
    overhead_s = trial.bench(tiny, cold=False).device_s(trial.what(tiny), *trial.tile)
    rate = folding_rate(trial, memory_bytes_per_s) if trial.forward else accumulation_rate(trial)
    per_pair_s = {}
    for masked in (False, True):
        for form, seconds in _tiles(trial, masked=masked):
            own_s = seconds - overhead_s
            if not trial.forward and rate is not None:
                own_s -= backward_pass_nbytes(form.work(trial.kernel), form.tile()) / rate
            if own_s <= 0:
                raise CalibrationError(f"{trial.what(form)}: {seconds * 1e6:.3g} us are no more than its launch and passes take")
            per_pair_s["masked" if masked else "full", form.pairs] = own_s / (form.copies * form.pairs)
    return Times(overhead_s, rate, per_pair_s)


def _tiles(trial: Trial, *, masked: bool) -> Iterator[tuple[Form, float]]:
    """Tiles of all sizes that memory and time allow, with their seconds."""
    before_s = found = 0.0
    for rows in ROWS:
        form = trial.form(rows, WAVES, masked=masked)
        if form is None:
            continue
        seconds = trial.timed(form)
        each_s = seconds / form.copies
        # rows of less than a block may take as long as a block
        if each_s < (1 - NOISY) * before_s:
            raise CalibrationError(
                f"{trial.what(form)}: a tile takes {each_s * 1e6:.3g} us, less than one of fewer rows ({before_s * 1e6:.3g} us); "
                "calibrate again on a quieter device"
            )
        before_s, found = each_s, found + 1
        yield form, seconds
        if seconds > MOST_OP_S:
            break
    if not found:
        raise CalibrationError(
            f"{trial.name}, {trial.kernel.dtype} head_dim {trial.kernel.head_dim}: no tiles that fill {trial.room.units} units "
            f"fit into {trial.room.nbytes} B of memory: leave the device more"
        )


def folding_rate(trial: Trial, memory_bytes_per_s: float) -> float | None:
    """Bytes per second that price the passes in which partial outputs are folded into their state.

    A ring of n tiles is reset, n times attend, and finish. `costs` has n tiles alone; besides, for reset and finish, their bytes
    through memory, though reset launches nothing and finish folds in what waits. What the measured ring takes beyond all that is
    what the model lacks: n x pass_nbytes / rate. None where it lacks nothing.
    """
    form = trial.large(RING_ROWS)
    bench = trial.bench(form)
    alone_s = bench.device_s(trial.what(form), *trial.tile)
    ring_s = bench.device_s(trial.what(form, f", a ring of {RING_TILES}"), "reset", *["attend"] * RING_TILES, "finish")
    ends_s = (bench.ops["reset"].nbytes + bench.ops["finish"].nbytes) / memory_bytes_per_s
    folding_s = ring_s - RING_TILES * alone_s - ends_s
    nbytes = RING_TILES * pass_nbytes(form.work(trial.kernel), form.tile())
    return nbytes / folding_s if folding_s > 0 else None


def accumulation_rate(trial: Trial) -> float:
    """Bytes per second that price adding a tile's gradients to their sums, timed alone: backward_pass_nbytes / seconds."""
    form = trial.large(RING_ROWS)
    seconds = trial.bench(form).device_s(trial.what(form, ", sums of gradients"), "accumulate")
    return backward_pass_nbytes(form.work(trial.kernel), form.tile()) / seconds


def measure_memory(watch: Watch, dtype: str, room: Room) -> float:
    """Bytes per second, read and written, of copies, sums and casts of arrays that outgrow the cache."""
    sums = accumulator(dtype)
    rows = max(1, min(STREAM_NBYTES, room.nbytes // 8) // (ITEMSIZE[sums] * HEADS * BLOCK_ROWS))
    wide, narrow = (rows, 1, HEADS, BLOCK_ROWS), (1, rows, HEADS, BLOCK_ROWS)
    total, added = region("total", wide, sums), region("added", wide, sums)
    ops = {
        "pack": op_of("pack", {"added": added}, {"total": total}),
        "accumulate": op_of("accumulate", {"total": total, "added": added}, {"total": total}),
        "cast": op_of("cast", {"total": total}, {"out": region("out", narrow, dtype)}),
    }
    bench = Bench.of(watch, ops, room, cold=False)
    seconds = sum(bench.device_s(f"{name} of {total.nbytes} B", name) for name in ops)
    return sum(op.nbytes for op in ops.values()) / seconds


def measure_launch(watch: Watch, kernel: Kernel, room: Room) -> float:
    """Seconds that the host takes to launch an attend: from one to the next, where the device has next to nothing to do."""
    trial, tiny = Trial(name="attend", kernel=kernel, watch=watch, room=room), Form(TINY_ROWS, 1, 1)
    return trial.bench(tiny, cold=False).launched_s(trial.what(tiny, ", launched"), *trial.tile)


def measure_matmul(watch: Watch, matmul: Matmul, dtype: str, room: Room) -> float:
    """FLOPs per second of the best of square matrix products, each larger than the one before."""
    best = 0.0
    for rows in MATRIX_ROWS:
        if 3 * rows**2 * ITEMSIZE[dtype] > room.nbytes:
            break
        a, b, c = (normals(watch.backend, (rows, rows), dtype, name) for name in "abc")

        def multiply(_: int, a: DeviceArray = a, b: DeviceArray = b, c: DeviceArray = c) -> None:
            matmul(a, b, c, watch.backend.stream)

        seconds = watch.device_s(multiply, f"a {dtype} product of {rows} x {rows}")
        best = max(best, 2 * rows**3 / seconds)
        if seconds > MOST_MATRIX_S:
            break
    if not best:
        raise CalibrationError(f"{room.nbytes} B of memory hold no matrices of {MATRIX_ROWS[0]} rows: leave the device more")
    return best


def busy_bench(watch: Watch, kernel: Kernel, room: Room) -> Bench:
    """What keeps a device BUSY while something else is measured."""
    trial = Trial(name="attend", kernel=kernel, watch=watch, room=room)
    return trial.bench(trial.form(BUSY_ROWS, WAVES) or trial.large(RING_ROWS))

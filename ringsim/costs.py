"""The cost model: what an op takes on a device of a topology, priced by what its backend really computes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from .dtypes import ITEMSIZE, accumulator
from .errors import BeyondFigures, TopologyError
from .lowering import Blocking
from .schedule import Compute
from .tile import Tile
from .topology.parts import Attention, Device
from .workload import Workload


@dataclass(frozen=True, slots=True)
class Cost:
    """Device time of an op, and into how many pieces (between which a CPU backend polls) it is cut.

    `bounded_s` of it are for tiles smaller than the device's smallest figure: at most so much.
    """

    seconds: float
    pieces: int
    bounded_s: float = 0.0


def interpolate(points: tuple[tuple[float, float], ...], pairs: float, what: str) -> float:
    """Efficiency at `pairs` per micro-tile, linear in log2(pairs). Raises BeyondFigures outside the measured points."""
    first, last = points[0][0], points[-1][0]
    if not first <= pairs <= last:
        raise BeyondFigures(
            f"{what}: {pairs:g} pairs per micro-tile lie outside the measured {first:g} to {last:g}; calibrate wider"
        )
    index = bisect_right(points, (pairs, 2.0)) - 1
    (left, below), (right, above) = points[index], points[min(index + 1, len(points) - 1)]
    return below if right == left else below + (above - below) * (log2(pairs / left) / log2(right / left))


@dataclass(frozen=True, slots=True)
class Fused:
    """How a device computes one pass of attention: figures with their weights, the lowering, and what a pair and a tile take."""

    tables: tuple[tuple[float, Attention], ...]
    blocking: Blocking
    flops_per_pair: int
    nbytes: Callable[[Workload, Tile], int]
    by_keys: bool
    """Whether a block of keys, not of queries, is what one unit of the device computes."""

    @classmethod
    def forward(cls, tables: tuple[tuple[float, Attention], ...], workload: Workload) -> Fused:
        """Scores and output."""
        flops_per_pair = 2 * (workload.head_dim + workload.v_head_dim)
        return cls(tables, _blocking(tables), flops_per_pair, pass_nbytes, by_keys=False)

    @classmethod
    def backward(cls, tables: tuple[tuple[float, Attention], ...], workload: Workload) -> Fused:
        """Scores anew, dp, dv, dq and dk. FlashAttention-2, arXiv:2307.08691, section 3.2: one block of keys to a unit."""
        own = tuple((weight, table.of_backward()) for weight, table in tables)
        flops_per_pair = 2 * (3 * workload.head_dim + 2 * workload.v_head_dim)
        return cls(own, _blocking(own), flops_per_pair, backward_pass_nbytes, by_keys=True)

    def block_rows(self) -> int:
        """Rows of the blocks that units of the device compute."""
        return self.blocking.k_rows if self.by_keys else self.blocking.q_rows


class Costs:
    """Prices of one workload's ops on one device. Raises TopologyError where the device, `name`, has no figure for it.

    With `bound` a tile of a fused kernel that is smaller than the smallest figure is taken to last as long as that one;
    without it, it raises BeyondFigures. Without figures of its own the backward pass has the forward's efficiencies, on
    its own FLOPs: `borrowed` says of what that holds.
    """

    def __init__(self, device: Device, workload: Workload, name: str = "device", *, bound: bool = True) -> None:
        self.device = device
        self.bound = bound
        self.name = name
        self.workload = workload
        tables = _tables(device, workload, name)
        self._fused = {"attend": Fused.forward(tables, workload), "attend_backward": Fused.backward(tables, workload)}
        self._overhead_s = sum(weight * device.overhead_s(table) for weight, table in tables)
        self.borrowed = tuple(f"{table.dtype} head_dim {table.head_dim}" for _, table in tables if table.backward is None)
        self._prices: dict[tuple[str, tuple[tuple[Any, ...], ...]], Cost] = {}

    @property
    def blocking(self) -> Blocking:
        """The lowering of the forward pass."""
        return self._fused["attend"].blocking

    @property
    def backward_blocking(self) -> Blocking:
        """The lowering of the backward pass."""
        return self._fused["attend_backward"].blocking

    def cost(self, op: Compute) -> Cost:
        """Device seconds and pieces of an op."""
        fused = self._fused.get(op.kernel)
        if fused is None:
            return self._other(op)
        key = (op.kernel, tuple(map(_shape, op.tiles)))
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = self._attend(fused, op.tiles)
        return found

    def _other(self, op: Compute) -> Cost:
        """The overhead, and the longer of its bytes through memory and its FLOPs at the rate of large matrix products."""
        device, dtype = self.device, self.workload.dtype
        seconds = op.nbytes / (device.memory_bandwidth * device.speed)
        if op.flops:
            if dtype not in device.matmul:
                kind = self.name.rpartition(", ")[2]
                raise TopologyError(
                    f"{self.name} has no `matmul` figure for {dtype}, by which the FLOPs of {op.kernel} are priced: give the "
                    f"rate that large matrix products achieve there, --set devices.{kind}.matmul.{dtype}=RATE"
                )
            seconds = max(seconds, op.flops / (device.matmul[dtype] * device.speed))
        return Cost(self._overhead_s + seconds, max(self.workload.batch * self.workload.heads, 1))

    def _attend(self, fused: Fused, tiles: tuple[Tile, ...]) -> Cost:
        pieces = sum(micro.count * _copies(tile) for tile in tiles for micro in fused.blocking.micro_tiles(tile))
        parts = [(weight, *self._attend_by(fused, table, tiles)) for weight, table in fused.tables]
        seconds, bounded_s = (sum(part[0] * part[index] for part in parts) for index in (1, 2))
        return Cost(seconds, max(pieces, 1), bounded_s)

    def _attend_by(self, fused: Fused, table: Attention, tiles: tuple[Tile, ...]) -> tuple[float, float]:
        seconds, rate, bounded_s = self.device.overhead_s(table), self.device.rate(table), 0.0
        busy, blocking = self._busy(fused, tiles), fused.blocking
        for tile in tiles:
            copies = _copies(tile)
            seconds += copies * ceil(tile.q.count / blocking.q_rows) * table.block_overhead / self.device.speed
            for micro in blocking.micro_tiles(tile):
                points, what = (table.masked, "masked") if micro.masked else (table.full, "full")
                pairs = _as_a_square(tile) if micro.masked and blocking.exact else micro.q_rows * micro.k_rows
                # no tile takes longer than a larger one
                priced = max(pairs, points[0][0]) if blocking.exact and self.bound else pairs
                held = pairs / priced
                efficiency = interpolate(points, priced, f"{self.name}, head_dim {table.head_dim}, {what}") * held
                taken_s = copies * micro.pairs * fused.flops_per_pair / (rate * efficiency * busy)
                seconds += taken_s
                bounded_s += taken_s if held < 1 else 0.0
            if table.pass_bandwidth is not None:
                seconds += fused.nbytes(self.workload, tile) / (table.pass_bandwidth * self.device.speed)
        return seconds, bounded_s

    def _busy(self, fused: Fused, tiles: tuple[Tile, ...]) -> float:
        """The share of the device that a fused kernel keeps busy: one block of rows of a head to each unit."""
        if self.device.units is None or not fused.blocking.exact:
            return 1.0
        # one launch computes all tiles side by side; a block that is partly filled takes as long as a full one
        rows = sum(_copies(tile) * (tile.k.count if fused.by_keys else tile.q.count) for tile in tiles)
        return min(1.0, rows / (fused.block_rows() * self.device.units))


def _blocking(tables: tuple[tuple[float, Attention], ...]) -> Blocking:
    table = tables[0][1].micro_tile
    return Blocking(q_rows=table.q_rows, k_rows=table.k_rows, edge_rows=table.edge_rows, exact=table.exact)


def _shape(tile: Tile) -> tuple[Any, ...]:
    """All of a tile that its price depends on; where it lies in the sequence is no part of that."""
    shape = (tile.batch[1] - tile.batch[0], tile.heads[1] - tile.heads[0], tile.q.count, tile.k.count)
    return (*shape, tile.lo, tile.hi, tile.q.start - tile.k.start, tile.q.step, tile.k.step) if tile.masked else shape


def _as_a_square(tile: Tile) -> float:
    """The visible pairs of the causal square in which a kernel's blocks are cut for as large a part as in this tile.

    A narrow band has many pairs, but its blocks are cut at every row, as those of a short square are. Of a causal square, or a
    rectangle that its diagonal does not cut, these are its own.
    """
    visible = tile.pairs() / _copies(tile)
    if tile.q.step != tile.k.step:
        return visible
    cut = tile.cut_rows()
    side = 2 * visible / cut - 1 if cut else 0.0
    return side * (side + 1) / 2 if side > 0 else visible


def _copies(tile: Tile) -> int:
    return (tile.batch[1] - tile.batch[0]) * (tile.heads[1] - tile.heads[0])


def pass_nbytes(workload: Workload, tile: Tile) -> int:
    """Bytes that a tile brings in and writes back once: q and the partial output for each query head, k and v for each of
    theirs, counted in the dtype of computation.
    """
    width, v_width = workload.head_dim, workload.v_head_dim
    return _nbytes(workload, tile, per_query=width + 2 * v_width, per_key=width + v_width)


def backward_pass_nbytes(workload: Workload, tile: Tile) -> int:
    """The same of the backward pass: q, dout and dq's sum in and out for each query head; k, v and the sums of dk and dv in and
    out for each of theirs.
    """
    width, v_width = workload.head_dim, workload.v_head_dim
    return _nbytes(workload, tile, per_query=3 * width + v_width, per_key=3 * (width + v_width))


def _nbytes(workload: Workload, tile: Tile, *, per_query: int, per_key: int) -> int:
    group = workload.heads // workload.kv_heads
    sequences, heads = tile.batch[1] - tile.batch[0], tile.heads[1] - tile.heads[0]
    elements = tile.q.count * heads * per_query + tile.k.count * -(-heads // group) * per_key
    return sequences * elements * ITEMSIZE[accumulator(workload.dtype)]


def _tables(device: Device, workload: Workload, name: str) -> tuple[tuple[float, Attention], ...]:
    """The table of the workload's dtype and head_dim, or the two nearest head_dims with the weights of a line between them."""
    known = sorted((table.head_dim, table) for table in device.attention if table.dtype == workload.dtype)
    dims = [dim for dim, _ in known]
    if workload.head_dim in dims:
        return ((1.0, known[dims.index(workload.head_dim)][1]),)
    below = [table for dim, table in known if dim < workload.head_dim]
    above = [table for dim, table in known if dim > workload.head_dim]
    if not device.attention:
        raise TopologyError(
            f"{name} has no attention figures: give it an `attention` entry for {workload.dtype} head_dim {workload.head_dim}, "
            "from a published table or from `ringsim calibrate`"
        )
    if not below or not above:
        have = ", ".join(f"{table.dtype} head_dim {table.head_dim}" for table in device.attention)
        raise TopologyError(
            f"{name}: no attention figures for {workload.dtype} head_dim {workload.head_dim} (have: {have}); "
            "calibrate with this --dtype and --head-dim"
        )
    low, high = below[-1], above[0]
    weight = (workload.head_dim - low.head_dim) / (high.head_dim - low.head_dim)
    return ((1 - weight, low), (weight, high))

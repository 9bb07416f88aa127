"""The memory model: bytes that a rank holds, by class, from the regions of its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final

from .dtypes import ITEMSIZE, accumulator
from .errors import WorkloadError
from .lowering import Blocking
from .schedule import Compute, Op, Recv, Schedule
from .schedule.schedule import regions
from .workload import Workload

CLASSES: Final = ("q", "k, v", "in flight", "output", "partial output", "statistics", "scores", "scratch", "activations")
NAMED: Final = {
    "q": "q",
    "k": "k, v",
    "v": "k, v",
    "out": "output",
    "acc": "partial output",
    "state": "partial output",
    "max": "statistics",
    "sum": "statistics",
    "lse": "statistics",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """The feed-forward around attention: `dim` hidden units, computed `block` tokens at a time (None: all at once)."""

    dim: int
    block: int | None = None

    def __post_init__(self) -> None:
        if self.dim < 1 or (self.block is not None and self.block < 1):
            raise WorkloadError(
                f"a feed-forward needs 1 or more hidden units and tokens per block, not {self.dim} and {self.block}"
            )

    def nbytes(self, workload: Workload, rows: int) -> int:
        """All rows at once: the wider of hidden units and output, which takes their place. By blocks: output and a block's units.

        Blockwise Parallel Transformer, arXiv 2305.19370: 2bsh in place of 8bsh bytes (bfloat16, dim = 4h).
        """
        width, nbytes = workload.heads * workload.v_head_dim, workload.batch * ITEMSIZE[workload.dtype]
        if self.block is None:
            return rows * max(self.dim, width) * nbytes
        return (rows * width + min(rows, self.block) * self.dim) * nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by class, and by buffer within (each slot once). `rank` is None where one device does it all.

    q, k, v: the inputs, and what is packed of them to be sent. in flight: what receives fill. output: what the caller gets.
    partial output, statistics: the running state, float32 (float64 for float64), and log-sum-exp; where the state travels, its
    statistics count as partial output. scores: those of dense attention. scratch: the backend's own.
    activations: the feed-forward, alive when attention's buffers but its output are free again.
    """

    method: str
    rank: int | None
    classes: dict[str, int]
    buffers: dict[str, int]

    @property
    def attention_nbytes(self) -> int:
        """All but the activations."""
        return sum(self.classes.values()) - self.classes.get("activations", 0)

    @property
    def nbytes(self) -> int:
        """The peak: attention, or the feed-forward and its input."""
        later = self.classes.get("activations", 0)
        return max(self.attention_nbytes, later + self.classes.get("output", 0) if later else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": self.method,
            "rank": self.rank,
            "nbytes": self.nbytes,
            "classes": dict(self.classes),
            "buffers": dict(self.buffers),
        }


def weigh(
    schedule: Schedule,
    rank: int,
    *,
    blocking: Blocking | None = None,
    threads: int = 1,
    feed_forward: FeedForward | None = None,
) -> Footprint:
    """What `rank` holds while it runs its program: every region that it touches, and scratch.

    `blocking` is the lowering of its backend, each of whose `threads` has scratch; without one, or an `exact` one (a fused
    kernel), micro-tiles stay on chip. Several threads and half precision make it an upper bound: which heads they are at when
    one goes on is chance. The feed-forward, if given, computes the rank's own rows.
    """
    program = tuple(schedule.program(rank, whole=True))
    classes, buffers = _regions(program)
    if blocking is not None and not blocking.exact:
        classes["scratch"] = _scratch(program, schedule.workload, blocking, threads)
    if feed_forward is not None:
        rows = schedule.job.q_partition.count(rank)
        classes["activations"] = feed_forward.nbytes(schedule.workload, rows)
    return Footprint(method=schedule.strategy, rank=rank, classes=_sorted(classes), buffers=dict(buffers))


def _regions(program: Iterable[Op]) -> tuple[Counter[str], Counter[str]]:
    """Bytes by class and by buffer. What only receives fill is in flight; what has no name in NAMED is classed by its use."""
    sizes: dict[tuple[str, int], int] = {}
    received: set[tuple[str, int]] = set()
    written: set[tuple[str, int]] = set()
    made: set[tuple[str, int]] = set()
    read: set[tuple[str, int]] = set()
    for op in program:
        for region in regions(op):
            key = (region.buffer, region.slot)
            sizes[key] = max(sizes.get(key, 0), region.array_end)
        if isinstance(op, Recv):
            received.add((op.region.buffer, op.region.slot))
        elif isinstance(op, Compute):
            if op.kernel == "reset":
                made |= {(region.buffer, region.slot) for region in op.writes}
            written |= {(region.buffer, region.slot) for region in op.writes}
            read |= {(region.buffer, region.slot) for region in op.reads}
    classes: Counter[str] = Counter()
    buffers: Counter[str] = Counter()
    for (buffer, slot), nbytes in sizes.items():
        place = (buffer, slot)
        role = "in flight" if place not in written | read else "partial output" if place in written & read else "output"
        arriving = place in received - made
        classes["in flight" if arriving else NAMED.get(buffer, role)] += nbytes
        buffers[f"{buffer} in flight" if arriving else buffer] += nbytes
    return classes, buffers


def _scratch(program: Iterable[Op], workload: Workload, blocking: Blocking, threads: int) -> int:
    """The NumPy backend's: micro-tiles, half-precision heads widened, and the largest of what comes and goes within an op."""
    dtype = accumulator(workload.dtype)
    own = blocking.scratch(max(workload.head_dim, workload.v_head_dim))
    fixed = sum(size * (ITEMSIZE[dtype] if not kind else {"bool": 1, "int32": 4}[kind]) for size, kind in own.values())
    widened, passing, tiles = 0, 0, 0
    for op in program:
        if isinstance(op, Compute) and op.kernel == "finish":
            # the divisor and where it is 0; the copy of lse that the caller gets
            passing = max(passing, prod(op.reads[-1].shape) * (ITEMSIZE[dtype] + 1))
        if isinstance(op, Compute) and op.kernel == "merge":
            # per head: the new maximum, two factors, and one partial output scaled
            passing = max(passing, op.reads[0].shape[2] * (op.reads[0].shape[3] + 5) * ITEMSIZE[dtype])
        for tile in op.tiles if isinstance(op, Compute) else ():
            tiles += 1
            widened = max(widened, tile.k.count * (workload.head_dim + workload.v_head_dim) * ITEMSIZE[dtype])
            passing = max(passing, tile.k.count * ITEMSIZE[dtype], 48 * tile.q.count if tile.masked else 0)
    # several threads widen each head anew: at most, each is at one of its own while the next is made
    heads = 0 if dtype == workload.dtype else 1 if threads == 1 else min(threads + 1, workload.batch * workload.kv_heads)
    return fixed * threads * bool(tiles) + passing + widened * heads


def _sorted(classes: Counter[str]) -> dict[str, int]:
    return {name: classes[name] for name in sorted(classes, key=CLASSES.index) if classes[name]}


def weigh_dense(workload: Workload, *, feed_forward: FeedForward | None = None) -> Footprint:
    """One device that holds all scores at once, in the workload's dtype: 2 b n s^2 bytes in bfloat16 (arXiv 2310.01889, table 1).

    A softmax in place; feed-forward of all rows at once.
    """
    classes, buffers = _regions(Schedule(workload=workload, world_size=1).program(0, whole=True))
    for name in ("acc", "max", "sum"):
        classes[NAMED[name]] -= buffers.pop(name, 0)
    classes["scores"] = workload.batch * workload.heads * workload.q_len * workload.kv_len * ITEMSIZE[workload.dtype]
    buffers["scores"] = classes["scores"]
    if feed_forward is not None:
        classes["activations"] = replace(feed_forward, block=None).nbytes(workload, workload.q_len)
    return Footprint(method="dense", rank=None, classes=_sorted(classes), buffers=dict(buffers))


def weigh_blockwise(
    workload: Workload, *, window: int | None = None, blocking: Blocking | None = None, feed_forward: FeedForward | None = None
) -> Footprint:
    """One device, block by block with a running softmax (arXiv 2112.05682): the schedule of a world of one.

    With a `window` only the last that many keys and values are held: another function than attention over all of them.
    """
    if window is not None:
        if window < 1:
            raise WorkloadError(f"window is {window}; it must be 1 or more")
        workload = replace(workload, kv_len=min(window, workload.kv_len), lengths=None)
    alone = weigh(Schedule(workload=workload, world_size=1), 0, blocking=blocking, feed_forward=feed_forward)
    return replace(alone, method="blockwise" if window is None else "window", rank=None)

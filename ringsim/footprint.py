"""The memory model: bytes that a rank holds, by class, from the regions of its program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from .dtypes import ITEMSIZE, accumulator
from .errors import WorkloadError
from .lowering import Blocking
from .partials import partials_nbytes
from .schedule import Compute, Op, Recv, Schedule
from .schedule.schedule import regions
from .scratch import scratch_nbytes
from .workload import Workload

CLASSES: Final = (
    "q",
    "k, v",
    "in flight",
    "output",
    "partial output",
    "statistics",
    "gradients",
    "gradient sums",
    "scores",
    "scratch",
    "activations",
    "saved",
)
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
    "delta": "statistics",
    "dout": "gradients",
    "dq": "gradients",
    "dk": "gradients",
    "dv": "gradients",
    "dq_sum": "gradient sums",
    "dk_sum": "gradient sums",
    "dv_sum": "gradient sums",
}
WAITING: Final = ("q", "k, v", "output", "statistics")
"""Of attention, what its backward pass needs."""
STARTS: Final = ("reset", "clear")
"""Kernels that begin a state or a sum: it is the rank's own, though it may travel."""


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

        Backward: a block's units, their gradient and that of the output, and the gradient of the input for all rows.
        Blockwise Parallel Transformer, arXiv 2305.19370: 2bsh in place of 8bsh bytes (bfloat16, dim = 4h).
        """
        width, nbytes = workload.heads * workload.v_head_dim, workload.batch * ITEMSIZE[workload.dtype]
        if workload.pass_ != "forward":
            at_once = rows if self.block is None else min(rows, self.block)
            return (rows * width + at_once * (2 * self.dim + width)) * nbytes
        if self.block is None:
            return rows * max(self.dim, width) * nbytes
        return (rows * width + min(rows, self.block) * self.dim) * nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """The layers of a model, each of which keeps something for its backward pass while one of them is at work.

    Of that one it is its input, besides what its own attention holds. Of the others it is their input, attention's q, k, v,
    out and lse, and with a feed-forward the input of that and, if it computes all rows at once, its hidden units. With
    `recompute` it is the layer's input alone: the layer runs forward again before it goes back (Chen et al., "Training deep
    nets with sublinear memory cost", arXiv 1604.06174).
    """

    count: int
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise WorkloadError(f"there are {self.count} layers; give 1 or more")

    def nbytes(self, workload: Workload, rows: tuple[int, int], feed_forward: FeedForward | None) -> int:
        """What all layers keep, the one at work its input alone, for so many queries and keys of a rank."""
        queries, keys = (workload.batch * count for count in rows)
        width, itemsize = queries * workload.heads * workload.v_head_dim, ITEMSIZE[workload.dtype]
        kept = width
        if not self.recompute:
            kept += queries * workload.heads * (workload.head_dim + workload.v_head_dim)
            kept += keys * workload.kv_heads * (workload.head_dim + workload.v_head_dim)
            if feed_forward is not None:
                kept += width + (queries * feed_forward.dim if feed_forward.block is None else 0)
        statistics = 0 if self.recompute else queries * workload.heads * ITEMSIZE[accumulator(workload.dtype)]
        return width * itemsize + (self.count - 1) * (kept * itemsize + statistics)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by class, and by buffer within (each slot once). `rank` is None where one device does it all.

    q, k, v: the inputs, and what is packed of them to be sent. in flight: what receives fill. output: what the caller gets.
    partial output, statistics: the running state, float32 (float64 for float64), and log-sum-exp; where the state travels, its
    statistics count as partial output. gradients: dout, dq, dk, dv; gradient sums: these while they grow, as the state.
    scores: those of dense attention. scratch: the backend's own.
    activations: the feed-forward, alive when attention's buffers are free again, but for its output, or, where a backward pass
    follows, for all that this one needs. saved: see Layers.
    """

    method: str
    rank: int | None
    classes: dict[str, int]
    buffers: dict[str, int]

    @property
    def attention_nbytes(self) -> int:
        """All but the activations and what other layers keep."""
        return sum(self.classes.values()) - self.classes.get("activations", 0) - self.classes.get("saved", 0)

    @property
    def nbytes(self) -> int:
        """The peak: attention, or the feed-forward and its input; besides what other layers keep."""
        later, saved = self.classes.get("activations", 0), self.classes.get("saved", 0)
        held = WAITING if self.classes.get("gradients") else ("output",)
        beside = sum(self.classes.get(name, 0) for name in held)
        return saved + max(self.attention_nbytes, later + beside if later else 0)

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
    backward_blocking: Blocking | None = None,
    threads: int = 1,
    partial: str | None = None,
    feed_forward: FeedForward | None = None,
    layers: Layers | None = None,
) -> Footprint:
    """What `rank` holds while it runs its program: every region that it touches, and scratch.

    `blocking` is the lowering of its backend, each of whose `threads` has scratch, `backward_blocking` that of its backward
    pass; without one, or an `exact` one (a fused kernel), micro-tiles stay on chip. What tiles make waits in dtype `partial`, if
    that is given, to be folded in together, as backend cupy has it. Several threads and half precision make it
    an upper bound: which heads they are at when one goes on is chance. The feed-forward, if given, computes the rank's own rows.
    """
    program = tuple(schedule.program(rank, whole=True))
    classes, buffers = _regions(program)
    cut = {"attend": blocking, "attend_backward": backward_blocking}
    classes["scratch"] = scratch_nbytes(
        program, schedule.workload, {name: one for name, one in cut.items() if one is not None and not one.exact}, threads
    )
    if partial is not None:
        classes["scratch"] += partials_nbytes(program, schedule.workload, partial)
    rows = schedule.job.q_partition.count(rank), schedule.job.kv_partition.count(rank)
    if feed_forward is not None:
        classes["activations"] = feed_forward.nbytes(schedule.workload, rows[0])
    if layers is not None:
        classes["saved"] = layers.nbytes(schedule.workload, rows, feed_forward)
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
            if op.kernel in STARTS:
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


def _sorted(classes: Counter[str]) -> dict[str, int]:
    return {name: classes[name] for name in sorted(classes, key=CLASSES.index) if classes[name]}


def weigh_dense(workload: Workload, *, feed_forward: FeedForward | None = None, layers: Layers | None = None) -> Footprint:
    """One device that holds all scores at once, in the workload's dtype: 2 b n s^2 bytes in bfloat16 (arXiv 2310.01889, table 1).

    A softmax in place; backward the weights are kept, with their gradients beside them, twice as much. Feed-forward of all rows
    at once. Layers keep their weights as well, unless they recompute.
    """
    classes, buffers = _regions(Schedule(workload=workload, world_size=1).program(0, whole=True))
    for name in ("acc", "max", "sum", "delta", "dq_sum", "dk_sum", "dv_sum"):
        classes[NAMED[name]] -= buffers.pop(name, 0)
    scores = workload.batch * workload.heads * workload.q_len * workload.kv_len * ITEMSIZE[workload.dtype]
    classes["scores"] = buffers["scores"] = scores * (1 if workload.pass_ == "forward" else 2)
    all_rows = None if feed_forward is None else replace(feed_forward, block=None)
    if all_rows is not None:
        classes["activations"] = all_rows.nbytes(workload, workload.q_len)
    if layers is not None:
        kept = layers.nbytes(workload, (workload.q_len, workload.kv_len), all_rows)
        classes["saved"] = kept + (0 if layers.recompute else (layers.count - 1) * scores)
    return Footprint(method="dense", rank=None, classes=_sorted(classes), buffers=dict(buffers))


def weigh_blockwise(workload: Workload, *, window: int | None = None, **options: Any) -> Footprint:
    """One device, block by block with a running softmax (arXiv 2112.05682): the schedule of a world of one; options of `weigh`.

    With a `window` only the last that many keys and values are held: another function than attention over all of them.
    """
    if window is not None:
        if window < 1:
            raise WorkloadError(f"window is {window}; it must be 1 or more")
        workload = replace(workload, kv_len=min(window, workload.kv_len), lengths=None)
    alone = weigh(Schedule(workload=workload, world_size=1), 0, **options)
    return replace(alone, method="blockwise" if window is None else "window", rank=None)

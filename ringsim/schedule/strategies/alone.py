"""One device, as a baseline: all keys, or those in a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...errors import WorkloadError
from ...mask import Window, both
from ...workload import Workload
from ..backward import rotate_back
from ..emitter import Emitter
from ..job import Job
from ..loops import Lane
from ..ops import Op
from ..registry import strategy
from ..rotation import rotate


def dense_back(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """All gradients on one device, without a message."""
    yield from rotate_back(job, rank, emit, _alone(job, "dense"))


@strategy("dense", version=1, backward=dense_back)
def dense(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """One device computes it all, block by block: the baseline without a message (FlashAttention-2, arXiv 2307.08691)."""
    yield from rotate(job, rank, emit, _alone(job, "dense"))


def _alone(job: Job, name: str) -> tuple[Lane]:
    if job.world_size != 1:
        raise WorkloadError(f"strategy {name!r} runs on one device, not on {job.world_size}; give it 1 rank")
    return (Lane(job, ((0,),), job.kv_block),)


def _window(workload: Workload, left: int, right: int) -> Workload:
    """The workload with keys outside the window hidden."""
    return replace(workload, mask=both(workload.mask, Window(left, right)))


def local_window_back(job: Job, rank: int, emit: Emitter, left: int, right: int = 0) -> Iterator[Op]:
    """As `dense_back`."""
    yield from rotate_back(job, rank, emit, _alone(job, "local-window"))


@strategy("local-window", version=1, adapt=_window, backward=local_window_back)
def local_window(job: Job, rank: int, emit: Emitter, left: int, right: int = 0) -> Iterator[Op]:
    """One device, where a query sees at most `left` keys before and `right` after its own: another function than all keys.

    What a ring is often replaced by (Longformer, arXiv 2004.05150, section 3.1); the mask that the workload has holds as well.
    """
    yield from rotate(job, rank, emit, _alone(job, "local-window"))

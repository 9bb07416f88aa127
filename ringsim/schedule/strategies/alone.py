"""One device, as a baseline: all keys, or those in a sliding window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...errors import WorkloadError
from ...mask import Window, both
from ...workload import Workload
from ..emitter import Emitter
from ..job import Job
from ..loops import Lane
from ..ops import Op
from ..registry import strategy
from ..rotation import rotate


@strategy("dense", version=1)
def dense(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """One device computes it all, block by block: the baseline without a message (FlashAttention-2, arXiv 2307.08691)."""
    if job.world_size != 1:
        raise WorkloadError(f"strategy 'dense' runs on one device, not on {job.world_size}; give it 1 rank")
    yield from rotate(job, rank, emit, (Lane(job, ((0,),), job.kv_block),))


def _window(workload: Workload, left: int, right: int) -> Workload:
    """The workload with keys outside the window hidden."""
    return replace(workload, mask=both(workload.mask, Window(left, right)))


@strategy("local-window", version=1, adapt=_window)
def local_window(job: Job, rank: int, emit: Emitter, left: int, right: int = 0) -> Iterator[Op]:
    """One device, where a query sees at most `left` keys before and `right` after its own: another function than all keys.

    What a ring is often replaced by (Longformer, arXiv 2004.05150, section 3.1); the mask that the workload has holds as well.
    """
    if job.world_size != 1:
        raise WorkloadError(f"strategy 'local-window' runs on one device, not on {job.world_size}; give it 1 rank")
    yield from rotate(job, rank, emit, (Lane(job, ((0,),), job.kv_block),))

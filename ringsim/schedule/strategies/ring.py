"""Keys and values travel round one ring, both ways round it, or round several at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ...errors import WorkloadError
from ..backward import rotate_back, rotate_queries_back
from ..emitter import Emitter
from ..job import Block, Job
from ..loops import Lane, backwards, components, disjoint_count, disjoint_loops
from ..ops import Op
from ..registry import any_rank, strategy, where_all_is_seen
from ..rotation import rotate


def _whole_lanes(job: Job) -> tuple[Lane, ...]:
    return job.remember("ring", lambda: (Lane(job, components(job), job.kv_block),))


def ring_back(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """K and V go round once more, the float32 sums of dK and dV one hop behind; Q, dQ and all that goes with them stay.

    Bytes sent per rank under a full mask for c keys a rank: ``(P-1) * c * kv_heads * (head_dim + v_head_dim) * itemsize`` of K
    and V, and ``(P-1) * c * kv_heads * (head_dim + v_head_dim) * 4`` of their gradients (8 for float64). A rank's own part of
    these stays at home, where ring-flash-attention (ring_flash_attn.py) sends it round: P hops there, P - 1 here.
    """
    yield from rotate_back(job, rank, emit, _whole_lanes(job))


@strategy("ring", version=2, turn=any_rank, backward=ring_back)
def ring(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """K and V go one hop per step to the next rank; queries stay (Ring Attention, arXiv 2310.01889, algorithm 1).

    Rank r starts with block r and at step s holds block r - s; a block stops where nothing further round needs it, and ranks
    that need nothing of one another are rings of their own. Bytes sent per rank under a full mask: (P-1)/P of all K and V
    bytes, ``(P-1) * c * kv_heads * (head_dim + v_head_dim) * itemsize`` for c tokens per rank (section 3). Backward: `ring_back`.
    """
    yield from rotate(job, rank, emit, _whole_lanes(job))


@strategy("burst", version=1, turn=any_rank, backward=rotate_queries_back)
def burst(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Forward as `ring`; backward Q, dout, lse and delta go round, dQ one hop behind (BurstAttention, arXiv 2403.09347).

    Bytes of the forward pass are those of `ring`. Backward (`rotate_queries_back`) it sends ``8 * c * heads * head_dim`` bytes a
    hop in bfloat16 where `ring` sends ``12 * c * kv_heads * head_dim``: fewer as long as heads < 1.5 x kv_heads.
    """
    yield from rotate(job, rank, emit, _whole_lanes(job))


def bidirectional_back(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """As `ring_back`, half of the rows each way round: bytes sent per rank are the same, half of them in each direction."""
    yield from rotate_back(job, rank, emit, _half_lanes(job))


@strategy("bidirectional", version=1, turn=where_all_is_seen, backward=bidirectional_back)
def bidirectional(job: Job, rank: int, emit: Emitter) -> Iterator[Op]:
    """Half of each K and V block goes one way round, half the other: both directions of a full-duplex link at once.

    The first half of a rank's rows goes up the ranks, the other half down. Bytes sent per rank under a full mask are those of
    `ring`, half of them in each direction: ``(P-1) * c/2 * kv_heads * (head_dim + v_head_dim) * itemsize`` each way (an
    all-gather on a bidirectional ring: Chan, Heimlich, Purkayastha, van de Geijn, "Collective communication", 2007).
    """
    yield from rotate(job, rank, emit, _half_lanes(job))


def _half_lanes(job: Job) -> tuple[Lane, ...]:
    def half(second: int, rank: int) -> Block:
        whole = job.kv_block(rank)
        middle = (whole.tokens + 1) // 2
        return whole._replace(rows=(middle, whole.tokens) if second else (0, middle))

    def lanes() -> tuple[Lane, ...]:
        loops = components(job)
        up = Lane(job, loops, partial(half, 0))
        return up, Lane(job, [backwards(loop) for loop in loops], partial(half, 1))

    return job.remember("bidirectional", lanes)


def multi_ring_back(job: Job, rank: int, emit: Emitter, rings: int) -> Iterator[Op]:
    """As `ring_back`, a slice of the heads on each ring: bytes sent per rank are the same, ``1/rings`` of them on each link."""
    yield from rotate_back(job, rank, emit, _head_lanes(job, rings))


@strategy("multi-ring", version=1, backward=multi_ring_back)
def multi_ring(job: Job, rank: int, emit: Emitter, rings: int) -> Iterator[Op]:
    """A slice of the heads on each of several edge-disjoint rings: every link of a direct-attached fabric at once.

    `rings` rings over all ranks, at most as many as `loops.disjoint_loops` finds: P - 2 for even P, P - 1 for odd P (all
    P - 1 exist but for P = 4 and 6: Tillson, "A Hamiltonian decomposition of K*_2m", 1980). The kv_heads are divided as evenly
    as can be. Bytes sent per rank under a full mask are those of `ring`, about ``1/rings`` of them over each link in use.
    """
    yield from rotate(job, rank, emit, _head_lanes(job, rings))


def _head_lanes(job: Job, rings: int) -> tuple[Lane, ...]:
    return job.remember(("multi-ring", rings), lambda: _sliced_by_heads(job, rings))


def _sliced_by_heads(job: Job, rings: int) -> tuple[Lane, ...]:
    world, kv_heads = tuple(range(job.world_size)), job.workload.kv_heads
    most = disjoint_count(job.world_size)
    if not 1 <= rings <= most:
        raise WorkloadError(
            f"strategy 'multi-ring({rings})': of edge-disjoint rings over {job.world_size} rank(s) there are {most}; "
            "give 1 to that many"
        )
    if rings > kv_heads:
        raise WorkloadError(
            f"strategy 'multi-ring({rings})': each ring carries one or more of the kv_heads, of which there are {kv_heads}"
        )

    def part(index: int, rank: int) -> Block:
        whole = job.kv_block(rank)
        return whole._replace(heads=(kv_heads * index // rings, kv_heads * (index + 1) // rings))

    return tuple(Lane(job, (way,), partial(part, index)) for index, way in enumerate(disjoint_loops(world, rings)))

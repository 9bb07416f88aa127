"""What a strategy is told: the workload, who holds which tokens, and the tiles between two ranks' shards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ..partition import Partition
from ..tile import Span, Tile
from ..workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A workload on `world_size` ranks; queries and keys are split by the same kind of partition."""

    workload: Workload
    q_partition: Partition
    kv_partition: Partition
    sync: str = "free"

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.q_partition.world_size

    def tiles(self, q_rank: int, kv_rank: int) -> tuple[Tile, ...]:
        """The tiles between the queries of one rank and the keys of another; none where the mask leaves nothing."""
        return _tiles(self, q_rank, kv_rank)

    def needs(self, q_rank: int, kv_rank: int) -> bool:
        """Whether a query of `q_rank` sees a key of `kv_rank`."""
        return bool(_tiles(self, q_rank, kv_rank))

    def reach(self, kv_rank: int) -> int:
        """How many hops the block of `kv_rank` must travel: the distance to the last rank down the ring that needs it."""
        return _reach(self, kv_rank)

    def flops(self, tiles: tuple[Tile, ...]) -> int:
        """Multiply-adds counted as two: 2 x pairs x (head_dim + v_head_dim)."""
        return 2 * sum(tile.pairs() for tile in tiles) * (self.workload.head_dim + self.workload.v_head_dim)


def _shift(span: Span, offset: int) -> Span:
    return replace(span, start=span.start + offset) if offset else span


def _clip(span: Span, length: int) -> Span:
    """The tokens of a span at positions below `length` (before any offset)."""
    count = min(span.count, max(0, -((span.start - length) // span.step)))
    return span if count == span.count else span.part(0, count)


@lru_cache(maxsize=65536)
def _tiles(job: Job, q_rank: int, kv_rank: int) -> tuple[Tile, ...]:
    work = job.workload
    tiles = []
    for batch, queries, keys in work.sequences():
        for q_span in job.q_partition.spans(q_rank):
            for k_span in job.kv_partition.spans(kv_rank):
                q = _shift(_clip(q_span, queries), work.q_offset)
                k = _shift(_clip(k_span, keys), work.kv_offset)
                for q_part, k_part, lo, hi in work.mask.pieces(q, k):
                    tiles.append(Tile(batch=batch, heads=(0, work.heads), q=q_part, k=k_part, lo=lo, hi=hi))
    return tuple(tiles)


@lru_cache(maxsize=65536)
def _reach(job: Job, kv_rank: int) -> int:
    world_size = job.world_size
    return next((d for d in range(world_size - 1, 0, -1) if job.needs((kv_rank + d) % world_size, kv_rank)), 0)

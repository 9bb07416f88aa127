"""A schedule: each rank's program, generated on demand, with a digest that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from ..errors import WorkloadError
from ..partition import Partition
from ..workload import Workload
from .emitter import MAX_MESSAGE_NBYTES, Emitter
from .job import Job
from .ops import Compute, Op, Recv, Region, Send
from .ring import ring

Strategy = Callable[[Job, int, Emitter], Iterator[Op]]
STRATEGIES: Final[dict[str, tuple[Strategy, int]]] = {"ring": (ring, 1)}
"""Each strategy with the version of its builder; a change to its ops raises the version."""

SYNCS: Final = ("free", "step")
FORMAT: Final = 1
SMALL_WORLD: Final = 16
WHOLE: Final = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Who computes, sends and waits when `strategy` runs `workload` on `world_size` ranks.

    `sync` is ``free`` or ``step`` (a barrier between rounds). Messages above `max_message_nbytes` travel in chunks.
    `given` holds programs that were read from text; without it `program` builds them. Raises WorkloadError.
    """

    workload: Workload
    world_size: int
    partition: str = "contiguous"
    strategy: str = "ring"
    sync: str = "free"
    max_message_nbytes: int = MAX_MESSAGE_NBYTES
    given: tuple[tuple[Op, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise WorkloadError(f"unknown strategy {self.strategy!r}; known: {', '.join(STRATEGIES)}")
        if self.sync not in SYNCS:
            raise WorkloadError(f"unknown sync {self.sync!r}; allowed: {', '.join(SYNCS)}")
        if not 1 <= self.max_message_nbytes <= MAX_MESSAGE_NBYTES:
            raise WorkloadError(f"max_message_nbytes is {self.max_message_nbytes}; it must be 1 to {MAX_MESSAGE_NBYTES}")
        self.job.q_partition.count(0)
        next(self.program(0), None)

    @property
    def job(self) -> Job:
        """The workload with its partitions."""
        return Job(
            workload=self.workload,
            q_partition=Partition(kind=self.partition, length=self.workload.q_len, world_size=self.world_size),
            kv_partition=Partition(kind=self.partition, length=self.workload.kv_len, world_size=self.world_size),
            sync=self.sync,
        )

    def program(self, rank: int, *, whole: bool = False) -> Iterator[Op]:
        """The ops of `rank` in issue order, made on demand; with `whole`, to weigh them, messages of any length in one piece."""
        if not 0 <= rank < self.world_size:
            raise WorkloadError(f"rank {rank} is outside a world of {self.world_size}")
        limit = WHOLE if whole else self.max_message_nbytes
        return iter(self.given[rank]) if self.given is not None else self._build(rank, limit)

    def _build(self, rank: int, max_message_nbytes: int) -> Iterator[Op]:
        emit = Emitter(rank, self.world_size, max_message_nbytes)
        build, _ = STRATEGIES[self.strategy]
        yield from build(self.job, rank, emit)
        yield from emit.drain()

    def inputs(self) -> dict[str, Any]:
        """The canonical inputs of the builder, and the versions of what reads them."""
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "strategy_version": STRATEGIES[self.strategy][1],
            "partition": self.partition,
            "world_size": self.world_size,
            "sync": self.sync,
            "max_message_nbytes": self.max_message_nbytes,
            "workload": self.workload.to_dict(),
        }

    @property
    def digest(self) -> str:
        """SHA-256 over the inputs and, up to 16 ranks, over every op."""
        return _digest(self)

    def buffers(self, rank: int) -> dict[tuple[str, int], int]:
        """Bytes of each (buffer, slot) that the rank's program touches."""
        sizes: dict[tuple[str, int], int] = {}
        for op in self.program(rank):
            for region in regions(op):
                key = (region.buffer, region.slot)
                sizes[key] = max(sizes.get(key, 0), region.offset + region.nbytes)
        return sizes

    def validate(self) -> None:
        """Prove the invariants (see ringsim.schedule.validation). Raises ScheduleError with a step x rank grid."""
        from .validation import validate

        validate(self)

    def to_text(self) -> str:
        """The whole schedule as text, one op a line; `from_text` reverses it."""
        from .text import to_text

        return to_text(self)

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """A schedule from `to_text`'s form. Raises ScheduleError naming the line."""
        from .text import from_text

        return from_text(text)


def regions(op: Op) -> tuple[Region, ...]:
    """Every region that an op touches."""
    if isinstance(op, Compute):
        return op.reads + op.writes
    return (op.region,) if isinstance(op, Send | Recv) else ()


@lru_cache(maxsize=256)
def _digest(schedule: Schedule) -> str:
    total = hashlib.sha256(json.dumps(schedule.inputs(), sort_keys=True).encode())
    if schedule.world_size <= SMALL_WORLD:
        for rank in range(schedule.world_size):
            for op in schedule.program(rank):
                total.update(repr(op).encode())
    return total.hexdigest()

"""A schedule: each rank's program, generated on demand, with a digest that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from .. import balance
from ..errors import WorkloadError
from ..workload import Workload
from .emitter import MAX_MESSAGE_NBYTES, Emitter
from .job import Job
from .ops import Compute, Op, Recv, Region, Send
from .registry import find

SYNCS: Final = ("free", "step")
FORMAT: Final = 2
SMALL_WORLD: Final = 16
WHOLE: Final = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Who computes, sends and waits when `strategy` runs `workload` on `world_size` ranks.

    `strategy` is a name with its arguments, such as ``ring`` or ``double-ring(8)``; one that computes another function than
    the workload asks for (``local-window(4K)``) puts it into the schedule's `workload`. `partition` is a kind of
    `ringsim.Partition`, or ``balanced(m)``, see `ringsim.balance`.
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
        for name in ("world_size", "max_message_nbytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise WorkloadError(f"{name} is {value!r}; it must be a whole number")
        if not isinstance(self.partition, str):
            raise WorkloadError(f"partition is {self.partition!r}; give a text such as 'zigzag'")
        choice = find(self.strategy)
        object.__setattr__(self, "strategy", choice.text)
        object.__setattr__(self, "workload", choice.adapt(self.workload))
        self._check()
        if not self.partition.startswith("balanced"):
            object.__setattr__(self, "partition", self.job.q_partition.kind)
        next(self.program(0), None)

    def _check(self) -> None:
        if self.workload.pass_ != "forward":
            find(self.strategy).backward  # noqa: B018 - raises where there is none
        if self.workload.wire_dtype != self.workload.dtype:
            raise WorkloadError(
                f"strategy {self.strategy!r} sends blocks as they are: "
                f"wire_dtype {self.workload.wire_dtype} must be {self.workload.dtype}"
            )
        if self.sync not in SYNCS:
            raise WorkloadError(f"unknown sync {self.sync!r}; allowed: {', '.join(SYNCS)}")
        if not 1 <= self.max_message_nbytes <= MAX_MESSAGE_NBYTES:
            raise WorkloadError(f"max_message_nbytes is {self.max_message_nbytes}; it must be 1 to {MAX_MESSAGE_NBYTES}")

    @property
    def job(self) -> Job:
        """The workload with its partitions."""
        return _job(self.workload, self.partition, self.world_size, self.sync)

    def program(self, rank: int, *, whole: bool = False) -> Iterator[Op]:
        """The ops of `rank` in issue order, made on demand; with `whole`, to weigh them, messages of any length in one piece."""
        if not 0 <= rank < self.world_size:
            raise WorkloadError(f"rank {rank} is outside a world of {self.world_size}")
        limit = WHOLE if whole else self.max_message_nbytes
        return iter(self.given[rank]) if self.given is not None else self._build(rank, limit)

    def _build(self, rank: int, max_message_nbytes: int) -> Iterator[Op]:
        yield from find(self.strategy).program(self.job, rank, Emitter(rank, max_message_nbytes))

    def inputs(self) -> dict[str, Any]:
        """The canonical inputs of the builder, and the versions of what reads them."""
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "strategy_version": find(self.strategy).strategy.version,
            "partition": self.job.q_partition.kind,
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
                sizes[key] = max(sizes.get(key, 0), region.array_end)
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


@lru_cache(maxsize=8)
def _job(workload: Workload, partition: str, world_size: int, sync: str) -> Job:
    """One for all programs of a schedule: it remembers tiles."""
    q_partition, kv_partition = balance.partitions(partition, workload, world_size)
    return Job(workload=workload, q_partition=q_partition, kv_partition=kv_partition, sync=sync)


@lru_cache(maxsize=256)
def _digest(schedule: Schedule) -> str:
    total = hashlib.sha256(json.dumps(schedule.inputs(), sort_keys=True).encode())
    if schedule.world_size <= SMALL_WORLD:
        for rank in range(schedule.world_size):
            for op in schedule.program(rank):
                total.update(repr(op).encode())
    return total.hexdigest()

"""One rank ready to run a schedule: program, buffers, backend and transport, made once and used many times."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import numpy_dtype
from ..errors import ArrayError, RankMismatch
from ..schedule import Schedule, Send
from ..timeline import Timeline
from ..transport import Transport
from .memory import Memory
from .walker import Backend, Walker, drive

Array = npt.NDArray[Any]


_ABANDONED: list[Memory] = []
"""Buffers of runs that failed: a transport may still write into what was posted, so they must outlive the plan."""


class Rank:
    """Runs `schedule` as one rank of `transport`'s group."""

    def __init__(self, schedule: Schedule, transport: Transport, backend: Backend, *, timeout_s: float = 300.0) -> None:
        if transport.world_size != schedule.world_size:
            raise RankMismatch(f"the schedule is for {schedule.world_size} ranks, the communicator has {transport.world_size}")
        self.schedule = schedule
        self.transport = transport
        self.backend = backend
        self.timeout_s = timeout_s
        self.memory = Memory(schedule, transport.rank)
        self.timeline: Timeline | None = None
        self._ops = tuple(schedule.program(transport.rank))
        self._leaving = {op.region.buffer for op in self._ops if isinstance(op, Send) and op.region.slot == 0}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The local shapes of q, k, v and out, (batch, local seq, heads, head_dim)."""
        work, job, rank = self.schedule.workload, self.schedule.job, self.transport.rank
        q_rows, kv_rows = job.q_partition.count(rank), job.kv_partition.count(rank)
        return {
            "q": (work.batch, q_rows, work.heads, work.head_dim),
            "k": (work.batch, kv_rows, work.kv_heads, work.head_dim),
            "v": (work.batch, kv_rows, work.kv_heads, work.v_head_dim),
            "out": (work.batch, q_rows, work.heads, work.v_head_dim),
        }

    def complaint(self, q: Array, k: Array, v: Array) -> str | None:
        """What is wrong with the local shards, or with the transport, or None."""
        if self.transport.failure is not None:
            return f"an earlier run on this transport failed ({self.transport.failure}): make a new plan"
        dtype = numpy_dtype(self.schedule.workload.dtype)
        for (name, shape), array in zip(self.shapes().items(), (q, k, v), strict=False):
            if array.shape != shape or array.dtype != dtype:
                return f"{name} is {array.dtype.name}{array.shape}, expected {dtype.name}{shape}"
        return None

    def walker(self, q: Array, k: Array, v: Array, out: Array) -> Walker:
        """A walker over the caller's arrays; each is copied only if it leaves from there and is not dense."""
        if message := self.complaint(q, k, v):
            raise ArrayError(f"rank {self.transport.rank}: {message}")
        if self._leaving:
            q, k, v = (np.ascontiguousarray(x) if name in self._leaving else x for name, x in (("q", q), ("k", k), ("v", v)))
        self.memory.bind(q=q, k=k, v=v, out=out)
        return Walker(self._ops, self.memory, self.backend, self.transport, self.schedule.workload.softmax_scale)

    def finish(self, walker: Walker) -> Array:
        """Take the walker's measurements and release the caller's arrays; returns lse, (batch, heads, local seq)."""
        self.timeline = Timeline(
            source="measured", digest=self.schedule.digest, world_size=self.schedule.world_size, events=tuple(walker.events)
        )
        self.memory.release()
        return self._lse()

    def _lse(self) -> Array:
        work = self.schedule.workload
        rows = self.shapes()["q"][1]
        whole = self.schedule.job.home("lse", self.schedule.job.q_block(self.transport.rank))
        if not whole.nbytes:
            return np.empty((work.batch, work.heads, rows), numpy_dtype(whole.dtype))
        return self.memory.array(whole).copy()

    def run(self, q: Array, k: Array, v: Array, out: Array) -> Array:
        """Run once, writing `out`; returns lse. Collective. Raises PeerTimeout, ArrayError."""
        walker = self.walker(q, k, v, out)
        try:
            drive(walker, self.transport, timeout_s=self.timeout_s)
        except BaseException as error:
            _ABANDONED.append(self.memory)
            self.transport.failure = self.transport.failure or f"{type(error).__name__}: {error}"
            raise
        return self.finish(walker)

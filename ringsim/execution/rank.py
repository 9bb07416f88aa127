"""One rank ready to run a schedule: program, buffers, backend and transport, made once and used many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..dtypes import accumulator, numpy_dtype
from ..errors import ArrayError, DeviceError, RankMismatch
from ..schedule import Schedule, Send
from ..schedule.job import GIVEN, OF_ROWS, TAKEN
from ..timeline import Timeline
from ..transport import Transport
from .memory import Memory
from .walker import Backend, Walker, drive

Array = npt.NDArray[Any]


_ABANDONED: list[tuple[Memory, Backend]] = []
"""Buffers of runs that failed: a transport may still write into what was posted, and a device into its scratch, so they must
outlive the plan. To free a device's memory waits for the device, and that for what a transport began and a peer never ends.
"""


class Rank:
    """Runs `schedule` as one rank of `transport`'s group.

    What it takes depends on the pass: forward q, k, v and out; backward q, k, v, out, lse, dout and dq, dk, dv; both q, k, v,
    dout and out, dq, dk, dv, in this order, the outputs last. It may use the slots of another rank's memory `beside` its own.
    """

    def __init__(
        self,
        schedule: Schedule,
        transport: Transport,
        backend: Backend,
        *,
        timeout_s: float = 300.0,
        beside: Memory | None = None,
    ) -> None:
        if transport.world_size != schedule.world_size:
            raise RankMismatch(f"the schedule is for {schedule.world_size} ranks, the communicator has {transport.world_size}")
        self.schedule = schedule
        self.transport = transport
        self.backend = backend
        self.timeout_s = timeout_s
        self.memory = Memory(schedule, transport.rank, beside, empty=backend.empty)
        self._given, self._taken = (of[schedule.workload.pass_] for of in (GIVEN, TAKEN))
        self._walked: Walker | None = None
        self._timeline: Timeline | None = None
        self._ops = tuple(schedule.program(transport.rank))
        self._leaving = {op.region.buffer for op in self._ops if isinstance(op, Send) and op.region.slot == 0}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Local shapes of what it takes: (batch, local seq, heads, head_dim), of lse (batch, heads, local seq)."""
        work, job, rank = self.schedule.workload, self.schedule.job, self.transport.rank
        q_rows, kv_rows = job.q_partition.count(rank), job.kv_partition.count(rank)
        q = (work.batch, q_rows, work.heads, work.head_dim)
        k = (work.batch, kv_rows, work.kv_heads, work.head_dim)
        v = (work.batch, kv_rows, work.kv_heads, work.v_head_dim)
        out = (work.batch, q_rows, work.heads, work.v_head_dim)
        lse = (work.batch, work.heads, q_rows)
        every = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": out, "dq": q, "dk": k, "dv": v}
        return {name: every[name] for name in (*self._given, *self._taken)}

    def dtype(self, name: str) -> np.dtype[Any]:
        """That of an array that it takes: lse has that of the partials, the others have the workload's."""
        dtype = self.schedule.workload.dtype
        return numpy_dtype(accumulator(dtype) if name in OF_ROWS else dtype)

    def complaint(self, *arrays: Array) -> str | None:
        """What is wrong with the local shards (as many as are given of what `walker` takes), or with the transport, or None."""
        if self.transport.failure is not None:
            return f"an earlier run on this transport failed ({self.transport.failure}): make a new plan"
        for (name, shape), array in zip(self.shapes().items(), arrays, strict=False):
            dtype = self.dtype(name)
            if array.shape != shape or array.dtype != dtype:
                return f"{name} is {array.dtype.name}{array.shape}, expected {dtype.name}{shape}"
            if name in self._leaving and (objection := self.backend.objection(name, array)):
                return objection
        return None

    @property
    def timeline(self) -> Timeline | None:
        """What the last run that came to its end took; of a device, once that has come to its end too, for which this waits."""
        if self._timeline is None and self._walked is not None:
            digest, world_size = self.schedule.digest, self.schedule.world_size
            with self._named("reading the times of a run"):
                events = self._walked.measured()
            self._timeline = Timeline(source="measured", digest=digest, world_size=world_size, events=events)
        return self._timeline

    def walker(self, *arrays: Array, stream: Any = None) -> Walker:
        """A walker over the caller's arrays; each is copied only if it leaves from there and is not dense."""
        names = (*self._given, *self._taken)
        if len(arrays) != len(names):
            raise ArrayError(f"rank {self.transport.rank}: {len(arrays)} arrays given; expected {', '.join(names)}")
        if message := self.complaint(*arrays):
            raise ArrayError(f"rank {self.transport.rank}: {message}")
        held = {
            name: self.backend.dense(array) if name in self._leaving else array for name, array in zip(names, arrays, strict=True)
        }
        self.memory.bind(**held)
        self._walked = self._timeline = None
        with self._named("beginning a run"):
            self.backend.begin(stream)
        return Walker(self._ops, self.memory, self.backend, self.transport, self.schedule.workload.softmax_scale)

    def finish(self, walker: Walker, stream: Any = None) -> Array:
        """Keep the walker's measurements, release the caller's arrays; returns lse, made or given, (batch, heads, local seq)."""
        with self._named("ending a run"):
            lse = self._lse(stream)
            self.backend.end(stream)
        self._walked = walker
        self.memory.release()
        return lse

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """The device's errors outside of any op, which name no rank."""
        try:
            yield
        except DeviceError as error:
            raise DeviceError(f"rank {self.transport.rank}: {what}: {error}") from error

    def _lse(self, stream: Any) -> Array:
        work = self.schedule.workload
        whole = self.schedule.job.home("lse", self.schedule.job.q_block(self.transport.rank))
        if not whole.nbytes:
            shape = (work.batch, work.heads, self.shapes()["q"][1])
            return self.backend.empty(0).view(numpy_dtype(whole.dtype)).reshape(shape)
        lse = self.memory.array(whole)
        return lse if "lse" in self._given else self.backend.copy(lse, stream)

    def run(self, *arrays: Array, stream: Any = None) -> Array:
        """Run once, writing the outputs; returns lse. Collective. Raises PeerTimeout, ArrayError, DeviceError.

        On a device the run is queued when this returns, all its messages have come, and `stream` goes on after it.
        """
        walker = self.walker(*arrays, stream=stream)
        try:
            drive(walker, self.transport, timeout_s=self.timeout_s)
            return self.finish(walker, stream)
        except BaseException as error:
            _ABANDONED.append((self.memory, self.backend))
            self.transport.failure = self.transport.failure or f"{type(error).__name__}: {error}"
            # what is queued runs on, into the caller's arrays; a device that failed does nothing more, and `error` says so
            with suppress(DeviceError):
                self.backend.end(stream)
            raise

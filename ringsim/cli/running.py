"""What `run` and `compare` share: a schedule run several times on an engine, checked, and weighed."""

from __future__ import annotations

import platform
import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import __version__, agreement, checking, inputs, units
from ..attention import RingAttention, Saved
from ..dtypes import numpy_dtype
from ..engine import Engine
from ..mask import Full
from ..schedule import Schedule
from ..schedule.job import TAKEN
from ..timeline import Timeline
from ..transport import Transport
from .options import Plan
from .session import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank, allocated for the plan, its arrays and the first warm-up run, and what the model says of it.

    On a CPU the peak that tracemalloc saw of all that Python and NumPy allocated (None without a warm-up run); on a device the
    arrays, slots and scratch, each counted where it is made.
    """

    allocated_nbytes: int | None
    predicted_nbytes: int

    def sentence(self) -> str:
        """Both, in a line."""
        predicted = f"memory of the fullest rank: {units.format_size(self.predicted_nbytes)} predicted"
        if self.allocated_nbytes is None:
            return f"{predicted}, not measured: it takes a --warmup run"
        return f"{predicted}, {units.format_size(self.allocated_nbytes)} allocated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Repeated runs of one schedule, the checks of what the last made if asked for, and the memory that they took."""

    schedule: Schedule
    runs: tuple[Timeline, ...]
    checks: tuple[checking.Check, ...]
    memory: Memory

    @property
    def passed(self) -> bool:
        """Whether every check did, if there were any."""
        return all(found.passed for found in self.checks)


def measure(engine: Engine, job: Plan, *, repeats: int, warmup: int, seed: int, timeout: float, check: bool) -> Measurement:
    """Run `job` on an engine; collective, the same result on every rank."""
    control = engine.control
    if check:
        checking.check_size(job.workload)
    if warmup:
        # what is imported and cached on first use is no part of a run
        work = job.workload
        mask = work.mask if work.mask.extent is None else Full()
        few = replace(work, q_len=min(work.q_len, 8), kv_len=min(work.kv_len, 8), mask=mask)
        small = replace(job, workload=few, partition="contiguous", strategy="ring")
        attention, arrays = prepare(replace(engine, backend=engine.backend.another()), small, seed=seed, timeout=timeout)
        run_pass(attention, arrays)
        if on_host(engine):
            tracemalloc.start()
    attention, arrays = prepare(engine, job, seed=seed, timeout=timeout)
    schedule = attention.schedule
    tracemalloc.reset_peak()
    runs, peaks = [], []
    with progress("running", warmup + repeats + check) as advance:
        for index in range(warmup + repeats):
            control.barrier()
            run_pass(attention, arrays)
            peaks += _peak() if on_host(engine) else [_held(attention, arrays)]
            timeline = attention.timeline()
            if index >= warmup:
                runs.append(timeline)
            advance("running" if index < warmup + repeats - 1 else "checking")
        found = verdicts(control, schedule, on_the_host(engine, arrays), seed) if check else ()
    described = facts(engine)
    sizes = control.allgather((peaks[0] if peaks else None, attention.footprint.nbytes))
    memory = Memory(
        allocated_nbytes=max(size for size, _ in sizes) if peaks else None, predicted_nbytes=max(size for _, size in sizes)
    )
    return Measurement(schedule=schedule, runs=tuple(with_facts(run, described) for run in runs), checks=found, memory=memory)


def prepare(engine: Engine, job: Plan, *, seed: int, timeout: float) -> tuple[RingAttention, dict[str, Any]]:
    """A plan for `job`, and this rank's arrays by name: what the pass is given, and what it makes."""
    attention = RingAttention(
        job.workload,
        engine=engine,
        partition=job.partition,
        strategy=job.strategy,
        sync=job.sync,
        timeout_s=timeout,
        check=False,
    )
    rows, shapes, dtype = attention.positions, attention.shapes, numpy_dtype(job.workload.dtype)
    given = [name for name in ("q", "k", "v", "dout") if name in shapes]
    arrays: dict[str, Any] = {
        name: engine.backend.put(inputs.rows(job.workload, name, rows["kv" if name in "kv" else "q"], seed)) for name in given
    }
    if job.workload.pass_ == "backward":
        # by a plan of its own, that its buffers do not count
        before, _ = prepare(engine, replace(job, workload=replace(job.workload, pass_="forward")), seed=seed, timeout=timeout)
        arrays["out"], arrays["lse"] = before.with_lse(arrays["q"], arrays["k"], arrays["v"])
    return attention, arrays | {name: engine.backend.new(shapes[name], dtype) for name in TAKEN[job.workload.pass_]}


def run_pass(attention: RingAttention, arrays: dict[str, Any]) -> None:
    """Run the workload's pass once, into the arrays that are there for it."""
    names = {name: arrays[name] for name in TAKEN[attention.schedule.workload.pass_]}
    if attention.schedule.workload.pass_ == "forward":
        attention(arrays["q"], arrays["k"], arrays["v"], **names)
    elif attention.schedule.workload.pass_ == "backward":
        saved = Saved(*(arrays[name] for name in Saved._fields))
        attention.backward(arrays["dout"], saved, **names)
    else:
        attention.both(arrays["q"], arrays["k"], arrays["v"], arrays["dout"], **names)


def checked(done: Measurement) -> dict[str, Any] | None:
    """For JSON: the check of out, or else of the gradients; with both, that of the gradients in it."""
    if not done.checks:
        return None
    first, *others = (found.to_dict() for found in done.checks)
    return first | ({"gradients": others[0]} if others else {})


def verdicts(transport: Transport, schedule: Schedule, arrays: dict[str, Any], seed: int) -> tuple[checking.Check, ...]:
    """The checks of what a pass made."""
    found = []
    if schedule.workload.pass_ != "backward":
        found.append(checking.check(transport, schedule, arrays["q"], arrays["out"], seed))
    if schedule.workload.pass_ != "forward":
        found.append(checking.check_gradients(transport, schedule, (arrays["dq"], arrays["dk"], arrays["dv"]), seed))
    return tuple(found)


def _peak() -> list[int]:
    """The peak of what was allocated since tracing began; it ends here, not to slow what is timed. Nothing if it has ended."""
    if not tracemalloc.is_tracing():
        return []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return [peak]


def agree(command: str, transport: Transport, **settings: Any) -> None:
    """Raise RankMismatch on every rank unless all were started alike."""
    agreement.same_settings(transport, {"command": command} | settings)


def on_host(engine: Engine) -> bool:
    """Whether it computes in host memory, where tracemalloc sees what is allocated."""
    return engine.backend.name == "numpy"


def on_the_host(engine: Engine, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays' values in host memory."""
    return {name: engine.backend.get(array) for name, array in arrays.items()}


def _held(attention: RingAttention, arrays: dict[str, Any]) -> int:
    """Bytes of device memory that a plan, its scratch and a call's arrays hold."""
    return attention.nbytes + attention.scratch_nbytes + sum(int(array.nbytes) for array in arrays.values())


def facts(engine: Engine) -> dict[str, Any]:
    """What a measurement depends on: host, libraries, threads, and of a device what the engine says."""
    from ringsim.backends import cpu
    from ringsim.backends.cpu import available_cores

    return {
        "ringsim": __version__,
        "hosts": sorted(set(engine.control.allgather(platform.node()))),
        "world_size": engine.control.world_size,
        "transport": engine.transport.name,
        "library": engine.control.library,
        "backend": engine.backend.name,
        "numpy": np.__version__,
        "cores": available_cores(),
        **cpu.describe(),
        **engine.facts,
        **engine.backend.state(),
    }


def with_facts(run: Timeline, described: dict[str, Any]) -> Timeline:
    """The timeline with these facts."""
    return Timeline(source=run.source, digest=run.digest, world_size=run.world_size, events=run.events, facts=described)

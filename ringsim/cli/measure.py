"""Commands that run the ring: run, calibrate, compare. Start them with mpiexec."""

from __future__ import annotations

import platform
import tracemalloc
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import __version__, agreement, checking, files, inputs, report, topology, units
from ..attention import RingAttention, Saved
from ..calibration import Kernel, to_yaml
from ..calibration import calibrate as calibrate_machine
from ..comparison import compare as compare_timelines
from ..dtypes import ALIASES, ATTENTION, canonical, numpy_dtype
from ..lowering import Blocking
from ..mask import Full
from ..schedule import Schedule
from ..schedule.job import TAKEN
from ..simulation import simulate
from ..timeline import Timeline
from ..transport import Transport
from .options import MACHINE, OUTPUT, RUNS, WORKLOAD, Plan, machine, plan, with_options
from .session import check_outputs, console, on_leader, open_transport, progress, write_outputs

BUSY = 1.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank: the peak that tracemalloc saw of all that Python and NumPy allocated for the plan, its arrays
    and the first warm-up run (None without one), and what the model says of it.
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


def measure(
    transport: Transport, job: Plan, *, repeats: int, warmup: int, seed: int, timeout: float, threads: int, check: bool
) -> Measurement:
    """Run `job` on `transport`; collective, the same result on every rank."""
    if check:
        checking.check_size(job.workload)
    if warmup:
        # what is imported and cached on first use is no part of a run
        work = job.workload
        mask = work.mask if work.mask.extent is None else Full()
        few = replace(work, q_len=min(work.q_len, 8), kv_len=min(work.kv_len, 8), mask=mask)
        small = replace(job, workload=few, partition="contiguous", strategy="ring")
        attention, arrays = prepare(transport, small, seed=seed, timeout=timeout, threads=threads)
        run_pass(attention, arrays)
        tracemalloc.start()
    attention, arrays = prepare(transport, job, seed=seed, timeout=timeout, threads=threads)
    schedule = attention.schedule
    tracemalloc.reset_peak()
    runs, peaks = [], []
    with progress("running", warmup + repeats + check) as advance:
        for index in range(warmup + repeats):
            transport.barrier()
            run_pass(attention, arrays)
            peaks += _peak()
            timeline = attention.timeline()
            if index >= warmup:
                runs.append(timeline)
            advance("running" if index < warmup + repeats - 1 else "checking")
        found = verdicts(transport, schedule, arrays, seed) if check else ()
    described = facts(transport, threads)
    sizes = transport.allgather((peaks[0] if peaks else None, attention.footprint.nbytes))
    memory = Memory(
        allocated_nbytes=max(size for size, _ in sizes) if peaks else None, predicted_nbytes=max(size for _, size in sizes)
    )
    return Measurement(schedule=schedule, runs=tuple(with_facts(run, described) for run in runs), checks=found, memory=memory)


def prepare(transport: Transport, job: Plan, *, seed: int, timeout: float, threads: int) -> tuple[RingAttention, dict[str, Any]]:
    """A plan for `job`, and this rank's arrays by name: what the pass is given, and what it makes."""
    attention = RingAttention(
        job.workload,
        comm=transport,
        partition=job.partition,
        strategy=job.strategy,
        sync=job.sync,
        threads=threads,
        timeout_s=timeout,
        check=False,
    )
    rows, shapes, dtype = attention.positions, attention.shapes, numpy_dtype(job.workload.dtype)
    given = [name for name in ("q", "k", "v", "dout") if name in shapes]
    arrays: dict[str, Any] = {name: inputs.rows(job.workload, name, rows["kv" if name in "kv" else "q"], seed) for name in given}
    if job.workload.pass_ == "backward":
        # by a plan of its own, that its buffers do not count
        before, _ = prepare(
            transport, replace(job, workload=replace(job.workload, pass_="forward")), seed=seed, timeout=timeout, threads=threads
        )
        arrays["out"], arrays["lse"] = before.with_lse(arrays["q"], arrays["k"], arrays["v"])
    return attention, arrays | {name: np.empty(shapes[name], dtype) for name in TAKEN[job.workload.pass_]}


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


def facts(transport: Transport, threads: int) -> dict[str, Any]:
    """What a measurement depends on: host, libraries, threads."""
    from ringsim.backends import cpu
    from ringsim.backends.cpu import available_cores

    return {
        "ringsim": __version__,
        "hosts": sorted(set(transport.allgather(platform.node()))),
        "world_size": transport.world_size,
        "transport": transport.name,
        "library": transport.library,
        "backend": "numpy",
        "numpy": np.__version__,
        "threads": threads,
        "cores": available_cores(),
        **cpu.describe(),
    }


def with_facts(run: Timeline, described: dict[str, Any]) -> Timeline:
    """The timeline with these facts."""
    return Timeline(source=run.source, digest=run.digest, world_size=run.world_size, events=run.events, facts=described)


@click.command()
@click.option("--check", is_flag=True, help="Verify against dense attention in float64; exit 1 if it is off.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each rank.")
@with_options(WORKLOAD, RUNS, OUTPUT)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    check: bool,
    threads: int,
    repeats: int,
    warmup: int,
    seed: int,
    timeout: float,
    json_path: Path | None,
    trace_path: Path | None,
    **_: Any,
) -> int:
    """Run the ring on this machine and measure each step."""
    job = plan(ctx)
    transport = open_transport(timeout)
    agree("run", transport, repeats=repeats, warmup=warmup, seed=seed, check=check)
    on_leader(transport, lambda: job.schedule(transport.world_size).partition)
    on_leader(transport, lambda: check_outputs(json_path, trace_path))
    done = measure(transport, job, repeats=repeats, warmup=warmup, seed=seed, timeout=timeout, threads=threads, check=check)
    out = console()
    out.print(report.measurement(done.schedule, done.runs))
    out.print(done.memory.sentence())
    for check_ in done.checks:
        out.print(check_.sentence())
    record = {
        "schedule": done.schedule.inputs(),
        "check": checked(done),
        "memory": asdict(done.memory),
        "measured": [timeline.to_dict() for timeline in done.runs],
    }
    on_leader(transport, lambda: write_outputs(json_path, trace_path, record, {"measured": done.runs[-1]}))
    return 0 if done.passed else 1


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The topology to write.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice([*ATTENTION, *ALIASES]),
    multiple=True,
    default=("float32",),
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--head-dim", "head_dims", type=click.IntRange(1), multiple=True, default=(64, 128), show_default=True, help="Repeatable."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds that a wait may last."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON.")
def calibrate(output: Path, dtypes: tuple[str, ...], head_dims: tuple[int, ...], timeout: float, json_path: Path | None) -> None:
    """Measure this machine's kernels and hops with all ranks at work, and write them as a topology."""
    from ringsim.backends.cpu import available_cores, available_memory
    from ringsim.backends.numpy import NumpyBackend

    transport = open_transport(timeout)
    agree("calibrate", transport, dtypes=dtypes, head_dims=head_dims)
    on_leader(transport, lambda: check_outputs(output, json_path))
    kernels = [Kernel(dtype=canonical(dtype), head_dim=dim) for dtype in dtypes for dim in sorted(set(head_dims))]

    def backend(blocking: Blocking | None) -> NumpyBackend:
        return NumpyBackend(blocking=blocking, backward_blocking=blocking)

    with progress("calibrating", len(kernels) + 2) as advance:
        described = facts(transport, 1)
        values = calibrate_machine(
            transport,
            kernels,
            backend,
            cores=available_cores(),
            memory_nbytes=available_memory(),
            facts=described,
            progress=advance,
        )
    text = to_yaml(values)
    topology.parse(text, "what was measured")
    on_leader(transport, lambda: files.write_text(output, text))
    on_leader(transport, lambda: write_outputs(json_path, None, values, {}))
    hop, progress_kind = values["links"]["memory"], values["transports"]["mpi"]["progress"]
    tables = values["devices"]["host"]["attention"]
    lines = [
        f"{table['dtype']} head_dim {table['head_dim']}: {table['rate']} a core, backward {table['backward']['rate']}"
        for table in tables
    ]
    console().print(
        "\n".join([*lines, f"hop: {hop['latency']} + bytes / {hop['bandwidth']}, driven by {progress_kind}", f"wrote {output}"])
    )


@click.command()
@click.option(
    "--topology", "topology_name", required=True, metavar="TOPOLOGY", help="The machine to predict on: a file or a shipped name."
)
@click.option("--check", is_flag=True, help="Verify against dense attention in float64; exit 1 if it is off.")
@with_options(MACHINE, WORKLOAD, RUNS, OUTPUT)
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    topology_name: str,
    check: bool,
    repeats: int,
    warmup: int,
    seed: int,
    timeout: float,
    json_path: Path | None,
    trace_path: Path | None,
    **_: Any,
) -> int:
    """Run the ring, predict the same schedule, and show both step by step with the error of each."""
    job = plan(ctx)
    transport = open_transport(timeout)
    agree("compare", transport, repeats=repeats, warmup=warmup, seed=seed, check=check)
    on_leader(transport, lambda: check_outputs(json_path, trace_path))
    on = on_leader(transport, lambda: machine(ctx, topology_name))
    partition = on_leader(transport, lambda: job.schedule(transport.world_size, on).partition)
    job = replace(job, partition=partition)
    predicted = on_leader(transport, lambda: simulate(job.schedule(transport.world_size), on))
    done = measure(transport, job, repeats=repeats, warmup=warmup, seed=seed, timeout=timeout, threads=1, check=check)
    result = compare_timelines(predicted, done.runs)
    out = console()
    out.print(report.comparison(done.schedule, result))
    out.print(done.memory.sentence())
    if result.total.high_s > BUSY * result.total.low_s:
        spread = result.total.high_s / result.total.low_s - 1
        out.print(f"note: the runs differ by up to {spread:.0%}: this machine is busy with other work; repeat on a quiet one")
    if len(on.slots) != transport.world_size:
        out.print(f"note: {on.name} has {len(on.slots)} ranks at work; this run has {transport.world_size}")
    for check_ in done.checks:
        out.print(check_.sentence())
    record = {"schedule": done.schedule.inputs()} | result.to_dict()
    record["check"] = checked(done)
    record["memory"] = asdict(done.memory)
    timelines = {f"predicted on {on.name}": predicted, "measured": done.runs[-1]}
    on_leader(transport, lambda: write_outputs(json_path, trace_path, record, timelines))
    return 0 if done.passed else 1

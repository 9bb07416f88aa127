"""Commands that run the ring: run, compare. Start them with mpiexec."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from .. import report, topology
from ..comparison import compare as compare_timelines
from ..engine import BACKENDS, TRANSPORTS, Engine, engine_of
from ..simulation import simulate
from .options import MACHINE, OUTPUT, RUNS, WORKLOAD, machine, plan, with_options
from .running import agree, checked, measure
from .session import check_outputs, console, on_leader, open_transport, write_outputs

BUSY = 1.3
CHECK = click.option("--check", is_flag=True, help="Verify against dense attention in float64; exit 1 if it is off.")
BACKEND = click.option(
    "--backend", type=click.Choice(BACKENDS), default="numpy", show_default=True, help="What computes: CPU cores, or GPUs."
)
MOVED_BY = click.option(
    "--transport",
    "moved_by",
    type=click.Choice(TRANSPORTS),
    default="auto",
    show_default=True,
    help="What moves messages between GPUs.",
)


def threads_of(backend: str) -> int | None:
    """Threads of each rank where none are asked for: one on a CPU, of a GPU none."""
    return 1 if backend == "numpy" else None


@click.command()
@CHECK
@BACKEND
@MOVED_BY
@click.option("--threads", type=click.IntRange(1), help="Threads of each rank, of backend numpy alone. [default: 1]")
@with_options(WORKLOAD, RUNS, OUTPUT)
@click.pass_context
def run(
    ctx: click.Context,
    /,
    check: bool,
    backend: str,
    moved_by: str,
    threads: int | None,
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
    agree("run", transport, repeats=repeats, warmup=warmup, seed=seed, check=check, backend=backend, moved_by=moved_by)
    on_leader(transport, lambda: job.schedule(transport.world_size).partition)
    on_leader(transport, lambda: check_outputs(json_path, trace_path))
    engine = engine_of(transport, backend=backend, transport=moved_by, threads=threads or threads_of(backend))
    done = measure(engine, job, repeats=repeats, warmup=warmup, seed=seed, timeout=timeout, check=check)
    out = console()
    if backend != "numpy":
        out.print(engine.said)
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
@click.option(
    "--topology", "topology_name", required=True, metavar="TOPOLOGY", help="The machine to predict on: a file or a shipped name."
)
@CHECK
@BACKEND
@with_options(MACHINE, WORKLOAD, RUNS, OUTPUT)
@click.pass_context
def compare(
    ctx: click.Context,
    /,
    topology_name: str,
    check: bool,
    backend: str,
    repeats: int,
    warmup: int,
    seed: int,
    timeout: float,
    json_path: Path | None,
    trace_path: Path | None,
    **_: Any,
) -> int:
    """Run the ring, predict the same schedule, and show both step by step with the error of each.

    With backend cupy --transport is what moves messages between GPUs as well (auto, mpi, mpi-staged, ipc or nccl): the model is
    then that of the machine's transport of this name, if it has one.
    """
    job = plan(ctx)
    transport = open_transport(timeout)
    agree("compare", transport, repeats=repeats, warmup=warmup, seed=seed, check=check, backend=backend)
    on_leader(transport, lambda: check_outputs(json_path, trace_path))
    moved_by = (ctx.params["transport"] or "auto") if backend == "cupy" else "auto"
    engine = engine_of(transport, backend=backend, transport=moved_by, threads=threads_of(backend))
    on = on_leader(transport, lambda: _machine(ctx, topology_name, engine if backend == "cupy" else None))
    partition = on_leader(transport, lambda: job.schedule(transport.world_size, on).partition)
    job = replace(job, partition=partition)
    predicted = on_leader(transport, lambda: simulate(job.schedule(transport.world_size), on))
    done = measure(engine, job, repeats=repeats, warmup=warmup, seed=seed, timeout=timeout, check=check)
    result = compare_timelines(predicted, done.runs)
    out = console()
    if backend != "numpy":
        out.print(engine.said)
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


def _machine(ctx: click.Context, name: str, engine: Engine | None) -> topology.Topology:
    """The machine to predict on; with the transport that moves messages between GPUs here, where it names that one."""
    if engine is None:
        return machine(ctx, name)
    ctx.params["transport"] = None
    found = machine(ctx, name)
    moved_by = engine.transport.name
    return machine(ctx, name, moved_by) if moved_by in found.spec.transports else found

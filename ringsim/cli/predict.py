"""Commands that need no MPI: simulate, schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import report
from ..schedule.grid import LEGEND, grid
from ..simulation import simulate as simulate_schedule
from .options import MACHINE, OUTPUT, WORKLOAD, Tokens, machine, plan, with_options
from .session import check_outputs, console, progress, write_outputs

MOST_RANKS_AS_TEXT = 256


@click.command()
@click.argument("name", metavar="MACHINE")
@click.option("--ranks", type=click.IntRange(1), help="Ranks in the ring. [default: as many as the machine has room for]")
@with_options(MACHINE, WORKLOAD, OUTPUT)
@click.pass_context
def simulate(
    ctx: click.Context, /, name: str, ranks: int | None, json_path: Path | None, trace_path: Path | None, **_: Any
) -> None:
    """Predict each ring step on MACHINE: a YAML file, or the name of a machine that ringsim ships."""
    job = plan(ctx)
    on = machine(ctx, name)
    world_size = ranks or len(on.slots)
    check_outputs(json_path, trace_path)
    schedule = job.schedule(world_size)
    with progress("simulating", 2) as advance:
        timeline = simulate_schedule(schedule, on)
        advance("simulating, with hops that cost nothing")
        exposed_s = timeline.total_s - simulate_schedule(schedule, on, free_hops=True).total_s
    console().print(report.prediction(schedule, timeline, exposed_s))
    facts = {"schedule": schedule.inputs(), "predicted": timeline.to_dict() | {"exposed_wall_s": exposed_s}}
    write_outputs(json_path, trace_path, facts, {f"predicted on {on.name}": timeline})


@click.command()
@click.option("--ranks", type=click.IntRange(1), required=True, help="Ranks in the ring.")
@click.option("--text", "as_text", is_flag=True, help="Every op of every rank, in the form that Schedule.from_text reads.")
@click.option("--validate/--no-validate", default=True, show_default=True, help="Prove the schedule's invariants.")
@click.option("--most", type=Tokens(), default=16, show_default=True, help="Ranks shown in the grid.")
@with_options(WORKLOAD, OUTPUT[:1])
@click.pass_context
def schedule(
    ctx: click.Context, /, ranks: int, as_text: bool, validate: bool, most: int, json_path: Path | None, **_: Any
) -> None:
    """Print who computes, sends and waits: a step x rank grid."""
    made = plan(ctx).schedule(ranks)
    check_outputs(json_path)
    if validate:
        made.validate()
    if as_text:
        if ranks > MOST_RANKS_AS_TEXT:
            raise click.UsageError(f"--text lists every op: at most {MOST_RANKS_AS_TEXT} ranks, not {ranks}", ctx)
        click.echo(made.to_text(), nl=False)
    else:
        proven = "valid: paired, free of deadlock, every pair once" if validate else "not validated"
        click.echo(f"{report.workload_line(made)}\ndigest {made.digest}, {proven}\n\n{grid(made, most_ranks=most)}\n\n{LEGEND}")
    write_outputs(json_path, None, {"schedule": made.inputs(), "digest": made.digest, "buffers": _buffers(made, most)}, {})


def _buffers(made: Any, most: int) -> list[dict[str, int]]:
    ranks = range(min(made.world_size, most))
    return [{f"{name}[{slot}]": nbytes for (name, slot), nbytes in made.buffers(rank).items()} for rank in ranks]

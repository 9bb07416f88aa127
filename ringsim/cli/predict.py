"""Commands that need no MPI: simulate, memory, breakeven, schedule, strategies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .. import ledger, report
from ..breakeven import find_breakeven
from ..capacity import demands, longest_ring, tightest
from ..footprint import FeedForward, Layers
from ..schedule import STRATEGIES, Schedule
from ..schedule.grid import LEGEND, grid
from ..simulation import simulate as simulate_schedule
from ..workload import Workload
from . import options
from .options import MACHINE, OUTPUT, RANKS, SIZE, TOKENS, WORKLOAD, machine, plan, with_options
from .session import check_outputs, console, progress, write_outputs

MOST_RANKS_AS_TEXT = 256


@click.command()
@click.argument("name", metavar="MACHINE")
@RANKS
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
    schedule = job.schedule(world_size, on)
    with progress("simulating", 2) as advance:
        timeline = simulate_schedule(schedule, on)
        advance("simulating, with hops that cost nothing")
        exposed_s = timeline.total_s - simulate_schedule(schedule, on, free_hops=True).total_s
    demand = tightest(demands(schedule, on))
    most = longest_ring(schedule, on) if demand.fits is False else None
    out = console()
    out.print(report.prediction(schedule, timeline, exposed_s))
    out.print(ledger.sentence(schedule, demand, most), style="bold red" if demand.fits is False else None)
    facts = {"schedule": schedule.inputs(), "predicted": timeline.to_dict() | {"exposed_wall_s": exposed_s}}
    facts["memory"] = demand.to_dict() | {"longest_context_tokens": most}
    write_outputs(json_path, trace_path, facts, {f"predicted on {on.name}": timeline})


@click.command()
@click.argument("names", metavar="MACHINE...", nargs=-1, required=True)
@RANKS
@click.option("--window", type=TOKENS, help="Also a sliding window of this many keys: another function, for comparison.")
@click.option("--ffn-dim", type=click.IntRange(1), help="Also the feed-forward after attention, with this many hidden units.")
@click.option("--ffn-block", type=TOKENS, help="Tokens that it computes at a time. [default: all of the rank's]")
@click.option("--layers", type=click.IntRange(1), help="Also what so many layers keep for their backward pass: --pass both.")
@click.option("--recompute/--keep", default=False, help="Layers keep their input alone, and run again. [default: keep]")
@click.option("--reserve", type=SIZE, default="0 B", show_default=True, help="Of each device, held by weights and all else.")
@with_options(MACHINE, WORKLOAD, OUTPUT[:1])
@click.pass_context
def memory(
    ctx: click.Context,
    /,
    names: tuple[str, ...],
    ranks: int | None,
    window: int | None,
    ffn_dim: int | None,
    ffn_block: int | None,
    layers: int | None,
    recompute: bool,
    reserve: float,
    json_path: Path | None,
    **_: Any,
) -> None:
    """Print what a workload takes of each MACHINE's memory, by class, next to one device alone; and the longest that fits."""
    job = plan(ctx)
    if not (job.workload.batch and job.workload.q_len and job.workload.kv_len):
        raise click.UsageError("there is nothing to weigh: --batch, --seq and --kv-seq must be 1 or more", ctx)
    if ffn_block is not None and ffn_dim is None:
        raise click.UsageError("--ffn-block needs --ffn-dim", ctx)
    if layers is None and recompute:
        raise click.UsageError("--recompute needs --layers", ctx)
    if layers is not None and job.workload.pass_ == "forward":
        raise click.UsageError("--layers is about what waits for the backward pass: add --pass both", ctx)
    check_outputs(json_path)
    kept = None if layers is None else Layers(count=layers, recompute=recompute)
    feed_forward = None if ffn_dim is None else FeedForward(dim=ffn_dim, block=ffn_block)
    found = []
    with progress("weighing", len(names)) as advance:
        for name in names:
            on = machine(ctx, name)
            schedule = job.schedule(ranks or len(on.slots), on)
            around: dict[str, Any] = {"feed_forward": feed_forward, "layers": kept}
            found.append(ledger.account(schedule, on, window=window, **around, reserve_nbytes=reserve))
            advance(name)
    console().print(ledger.table(found[0]) if len(found) == 1 else ledger.summary(found))
    write_outputs(json_path, None, {"accounts": [one.to_dict() for one in found]}, {})


@click.command()
@click.argument("names", metavar="MACHINE...", nargs=-1, required=True)
@RANKS
@click.option("--multiple", type=TOKENS, default=1, show_default=True, help="Blocks are multiples of this many tokens.")
@with_options(MACHINE, options.SHAPE, (*options.MASK, options.PARTITION, options.STRATEGY, options.PASS), OUTPUT[:1])
@click.pass_context
def breakeven(
    ctx: click.Context,
    /,
    names: tuple[str, ...],
    ranks: int | None,
    multiple: int,
    partition: str,
    strategy: str,
    json_path: Path | None,
    **_: Any,
) -> None:
    """Find the smallest block of tokens per device at which each MACHINE hides its hops, by simulation."""
    check_outputs(json_path)
    shape = options.shape(ctx.params)
    if shape["mask"].extent is not None or partition.strip().startswith("runs"):
        raise click.UsageError("blocks of any length are sought: give a --mask and a --partition that do not count tokens", ctx)
    if partition in options.BY_MACHINE:
        raise click.UsageError(f"--partition {partition} is for a length: give the weights as numbers", ctx)
    workload = Workload(q_len=1, **shape)
    found = []
    with progress("seeking", len(names)) as advance:
        for name in names:
            on = machine(ctx, name)
            on.place(ranks or len(on.slots))
            start = Schedule(workload=workload, world_size=ranks or len(on.slots), partition=partition, strategy=strategy)
            found.append(find_breakeven(start, on, multiple=multiple))
            advance(name)
    console().print(report.breakeven(found))
    write_outputs(json_path, None, {"breakeven": [one.to_dict() for one in found]}, {})


@click.command()
@click.option("--ranks", type=click.IntRange(1), required=True, help="Ranks in the ring.")
@click.option("--text", "as_text", is_flag=True, help="Every op of every rank, in the form that Schedule.from_text reads.")
@click.option("--validate/--no-validate", default=True, show_default=True, help="Prove the schedule's invariants.")
@click.option("--most", type=TOKENS, default=16, show_default=True, help="Ranks shown in the grid.")
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


@click.command()
@with_options(OUTPUT[:1])
def strategies(json_path: Path | None) -> None:
    """List the strategies: how each is written and what travels."""
    check_outputs(json_path)
    known = [one for _, one in sorted(STRATEGIES.items())]
    console().print(report.strategies(known))
    facts = [{"name": one.name, "usage": one.usage, "version": one.version, "summary": one.summary} for one in known]
    write_outputs(json_path, None, {"strategies": facts}, {})

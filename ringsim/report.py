"""Tables for people: a prediction, a measurement, a comparison."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .breakeven import Breakeven
from .comparison import QUANTITIES, Comparison, Measured
from .mask import shortened
from .schedule import Compute, Schedule, Send
from .schedule.registry import Strategy
from .timeline import Timeline
from .units import format_rate, format_size, format_time

WORDS = {
    "total_s": "total",
    "compute_s": "compute",
    "exposed_s": "exposed communication",
    "late_s": "late peer",
}
BYTES_WORLD = 64


def workload_line(schedule: Schedule, *, ranks: bool = True) -> str:
    """The workload and how it is cut, in one line, with or without the number of ranks."""
    work = schedule.workload
    lengths = f"seq {work.q_len}" if work.q_len == work.kv_len else f"q_len {work.q_len}, kv_len {work.kv_len}"
    heads = f"{work.heads} heads" if work.heads == work.kv_heads else f"{work.heads}/{work.kv_heads} heads"
    shape = f"batch {work.batch}, {lengths}, {heads}, head_dim {work.head_dim}, {work.dtype}, {shortened(work.mask.name)}"
    world = f", {schedule.world_size} ranks" if ranks else ""
    pass_ = "" if work.pass_ == "forward" else ", forward and backward" if work.pass_ == "both" else ", backward"
    return f"{schedule.strategy}, {shortened(schedule.partition)}, sync {schedule.sync}{pass_}{world}: {shape}"


def useful_flops(schedule: Schedule) -> int:
    """FLOPs of the visible pairs over all ranks, in all passes: as many as one rank has alone."""
    job, pass_ = Schedule(workload=schedule.workload, world_size=1).job, schedule.workload.pass_
    tiles = job.tiles(job.q_block(0), job.kv_block(0))
    return sum(job.flops(tiles, backward=name == "backward") for name in ("forward", "backward") if pass_ in (name, "both"))


def sent_nbytes(schedule: Schedule) -> int:
    """Bytes that rank 0 sends."""
    return sum(op.region.nbytes for op in schedule.program(0) if isinstance(op, Send))


def first_backward(schedule: Schedule) -> int | None:
    """The step at which the backward pass begins; None where it is not the second of two."""
    if schedule.workload.pass_ != "both":
        return None
    return next((op.step for op in schedule.program(0) if isinstance(op, Compute) and op.kernel == "delta"), None)


def _steps_table(columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _rate_line(schedule: Schedule, total_s: float) -> str:
    if schedule.world_size > BYTES_WORLD or total_s == 0:
        return f"rank 0 sends {format_size(sent_nbytes(schedule))}"
    flops = useful_flops(schedule)
    return f"{format_rate(flops / total_s)} over all ranks (visible pairs); rank 0 sends {format_size(sent_nbytes(schedule))}"


def prediction(schedule: Schedule, timeline: Timeline, exposed_wall_s: float) -> RenderableType:
    """What `simulate` prints."""
    table = _steps_table(("step", "latency", "slowest rank", "compute", "exposed comm.", "late peer"))
    turn = first_backward(schedule)
    for step in timeline.steps():
        if step.step == turn:
            table.add_row("backward")
        values = (step.latency_s, step.slowest_s, step.compute_s, step.exposed_s, step.late_s)
        table.add_row(str(step.step), *map(format_time, values))
    share = exposed_wall_s / timeline.total_s if timeline.total_s else 0.0
    lines = [
        f"predicted on {timeline.facts['topology']} ({timeline.facts['topology_source']})",
        workload_line(schedule),
        "",
    ]
    tail = [
        "",
        f"total {format_time(timeline.total_s)}, of it exposed communication {format_time(exposed_wall_s)} ({share:.1%}): "
        "what the run takes longer than with hops that cost nothing",
        _rate_line(schedule, timeline.total_s),
    ]
    if timeline.facts["busiest"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in timeline.facts["busiest"].items())
        tail.append(f"busiest wires, of what they could carry in that time: {shares}")
    if timeline.facts.get("backward"):
        tail.append(f"backward pass priced by the {timeline.facts['backward']}")
    if timeline.facts.get("bounded"):
        tail.append(
            f"of the computation {timeline.facts['bounded']:.1%} is an upper bound: tiles smaller than the machine's smallest "
            "figure, each taken to last as long as that one"
        )
    return Group(Text("\n".join(lines)), table, Text("\n".join(tail)))


def measurement(schedule: Schedule, runs: Sequence[Timeline]) -> RenderableType:
    """What `run` prints."""
    table = _steps_table(("step", "latency", "low .. high", "compute", "exposed comm.", "late peer"))
    by_step = [run.steps() for run in runs]
    turn = first_backward(schedule)
    for index, first in enumerate(by_step[0]):
        if first.step == turn:
            table.add_row("backward")
        column = [steps[index] for steps in by_step]
        latency = Measured.of([step.latency_s for step in column])
        rest = [Measured.of([getattr(step, name) for step in column]).median_s for name in ("compute_s", "exposed_s", "late_s")]
        table.add_row(str(first.step), format_time(latency.median_s), _spread(latency), *map(format_time, rest))
    total = Measured.of([run.total_s for run in runs])
    tail = f"\ntotal {format_time(total.median_s)} ({_spread(total)}), median and range of {len(runs)} runs\n"
    return Group(Text(f"measured\n{workload_line(schedule)}\n"), table, Text(tail + _rate_line(schedule, total.median_s)))


def _spread(found: Measured) -> str:
    return f"{format_time(found.low_s)} .. {format_time(found.high_s)}"


def comparison(schedule: Schedule, result: Comparison) -> RenderableType:
    """What `compare` prints."""
    table = _steps_table(
        ("step", "predicted", "measured", "low .. high", "error", "compute p | m", "exposed p | m", "late p | m")
    )
    turn = first_backward(schedule)
    for step in result.steps:
        if step.step == turn:
            table.add_row("backward")
        pairs = (
            (step.predicted.compute_s, step.compute),
            (step.predicted.exposed_s, step.exposed),
            (step.predicted.late_s, step.late),
        )
        cells = [f"{format_time(guess)} | {format_time(found.median_s)}" for guess, found in pairs]
        row = (
            format_time(step.predicted.latency_s),
            format_time(step.latency.median_s),
            _spread(step.latency),
            f"{step.error:+.1%}",
        )
        table.add_row(str(step.step), *row, *cells)
    head = (
        f"{workload_line(schedule)}\npredicted on {result.predicted.facts['topology']}, measured {len(result.measured)} times\n"
    )
    lines = [""]
    for name in QUANTITIES:
        guess, found = result.quantity(name)
        error = f"  error {result.error:+.1%}" if name == "total_s" else ""
        measured = f"measured {format_time(found.median_s):>10} ({_spread(found)})"
        lines.append(f"{WORDS[name]:<22} predicted {format_time(guess):>10}   {measured}{error}")
    lines.append("steps and parts are means over ranks; measured values are medians, with the range of the runs")
    return Group(Text(head), table, Text("\n".join(lines)))


def breakeven(found: Sequence[Breakeven]) -> RenderableType:
    """What `breakeven` prints."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("machine", "ranks", "slowest hop", "attention", "F/B", "tokens per device", "sequence", "hops still cost"):
        table.add_column(name, justify="left" if name == "machine" else "right")
    for one in found:
        ranks = one.schedule.world_size
        by_paper = "-" if one.f_over_b is None else f"{one.f_over_b:,.0f}"
        facts = (one.machine, str(ranks), format_rate(one.hop_bytes_per_s, "B/s"))
        if one.tokens is None:
            table.add_row(*facts, "-", by_paper, f"not up to {one.looked_to:,}", "-", "-")
            continue
        bound = "<= " if one.tokens == one.looked_from > 1 else ""
        row = (format_rate(one.flops_per_s), by_paper, f"{bound}{one.tokens:,}", f"{one.tokens * ranks:,}", f"{one.exposed:.1%}")
        table.add_row(*facts, *row)
    work = found[0].schedule.workload
    head = f"{work.heads}/{work.kv_heads} heads, head_dim {work.head_dim}, {work.dtype}, {shortened(work.mask.name)}\n"
    tail = (
        "\ntokens per device: from there on no rank waits for a hop or drives one (of uneven ranks: the busiest do not); "
        "<=: the least looked at\n"
        "what comes home after a rank's last tile has nothing to hide behind and does not count\n"
        "hops still cost: of the run at that block, by slowing kernels and on the last way home\n"
        "F/B: where a step's FLOPs at peak take as long as its bytes at the slowest hop's rate; arXiv 2310.01889 forward"
    )
    return Group(Text(head), table, Text(tail))


def strategies(known: Sequence[Strategy]) -> RenderableType:
    """What `strategies` prints."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("strategy", no_wrap=True)
    table.add_column("what travels")
    for one in known:
        table.add_row(one.usage, one.summary)
    return table

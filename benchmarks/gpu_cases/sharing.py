"""Section `sharing`: rings of 1, 2 and 4 ranks on one card, in one process and between processes over each transport there is."""

from __future__ import annotations

from itertools import product
from statistics import median
from typing import Any, Final

from ringsim.execution import Together
from ringsim.schedule import Schedule
from ringsim.timeline import Timeline

from . import rings
from .bench import Bench, event_s, spread
from .launched import Ranks, launched_ring
from .record import Record

DTYPE: Final = "bfloat16"
PARTITION: Final = "zigzag"
MOST_MORE: Final = 0.10
"""Of the sum of the ranks' work, that a ring may take more."""
MOST_EXPOSED: Final = 0.05
TRANSPORTS: Final = ("mpi", "mpi-staged", "ipc")


def run(bench: Bench, record: Record) -> None:
    """In one process first; then as processes, for each launcher and transport."""
    for pass_ in ("forward", "both"):
        for world_size in bench.sizes.sharing_ranks:
            name = f"in one process, {world_size} ranks, {pass_}"
            if record.late(name):
                continue
            with record.attempt("rings in one process", name):
                _judge(record, name, measured(bench, _schedule(bench, world_size, pass_)), world_size)
    works: set[tuple[str, str]] = set()
    for world_size in (4, 2):
        for launcher, transport in product(bench.launchers, TRANSPORTS):
            if world_size == 4 or (launcher, transport) in works:
                _launched(bench, record, launcher, transport, world_size, works)
    if not bench.launchers:
        record.skipped.append("rings of processes: no MPI launcher was found (give --mpiexec)")


def _schedule(bench: Bench, world_size: int, pass_: str) -> Schedule:
    work = rings.workload(bench.sizes.sharing, "causal", DTYPE, pass_)
    return Schedule(workload=work, world_size=world_size, partition=PARTITION)


def measured(bench: Bench, schedule: Schedule) -> dict[str, Any]:
    """Seconds of a ring in this process, and of its kernels alone, rank after rank without a message, taken in turns."""
    card = bench.card
    group = rings.together(bench, schedule)
    held = rings.drawn(card, group, 3)
    group.run(held)
    card.settle()
    alone = rings.together(bench, rings.computed_alone(schedule), beside=group)
    totals, works, timelines = [], [], []
    for turn in range(2 + bench.sizes.repeats):
        timelines.append(_timeline(bench, group, held))
        work_s = sum(_rank_s(bench, alone, held, number) for number in range(schedule.world_size))
        if turn >= 2:
            totals.append(timelines[-1].total_s)
            works.append(work_s)
    last = timelines[-1]
    found = {"total": spread(totals), "work": spread(works), "over": median(totals) / median(works) - 1}
    return found | {"exposed_share": exposed(last), "overlap": overlap(last), "timeline": last}


def _timeline(bench: Bench, group: Together, held: list[dict[str, Any]]) -> Timeline:
    bench.card.settle()
    group.run(held)
    return group.timeline()


def _rank_s(bench: Bench, alone: Together, held: list[dict[str, Any]], number: int) -> float:
    """One rank's kernels, on what the ring left in its slots, with nothing beside them."""
    card, rank = bench.card, alone.ranks[number]
    stream = card.calls.stream()

    def once() -> None:
        walker = rank.walker(*held[number].values(), stream=stream)
        for _ in walker.run():
            raise AssertionError("a program without messages does not wait")
        rank.finish(walker, stream)

    card.settle()
    return event_s(card.calls, stream, once)


def exposed(timeline: Timeline) -> float:
    """Communication that computation did not hide, as part of the total."""
    return timeline.exposed_s() / timeline.total_s if timeline.total_s else 0.0


def overlap(timeline: Timeline) -> dict[str, Any]:
    """The longest hop (from the later post to its end) and the shortest step's computation, and how much of hops was hidden."""
    hops = [event for event in timeline.events if event.kind == "recv"]
    longest = max((event.duration_s for event in hops), default=0.0)
    tiles = [step.compute_s for step in timeline.steps() if step.compute_s]
    steps = [
        {
            "step": step.step,
            "latency_s": step.latency_s,
            "compute_s": step.compute_s,
            "exposed_s": step.exposed_s,
            "late_s": step.late_s,
        }
        for step in timeline.steps()
    ]
    return {
        "longest_hop_s": longest,
        "shortest_step_compute_s": min(tiles, default=0.0),
        "exposed_s": timeline.exposed_s(),
        "steps": steps,
    }


def _judge(record: Record, name: str, found: dict[str, Any], world_size: int) -> None:
    timeline = found.pop("timeline")
    record.values[name] = found
    if world_size > 1:
        record.target(f"{name}: total over the sum of the ranks' work, less one", found["over"], MOST_MORE, at_least=False)
        hop_s, tile_s = found["overlap"]["longest_hop_s"], found["overlap"]["shortest_step_compute_s"]
        record.target(f"{name}: exposed communication of the total", found["exposed_share"], MOST_EXPOSED, at_least=False)
        record.values[name]["hop shorter than the tile"] = hop_s < tile_s
    record.say(
        f"{name}: {found['total']['median_s'] * 1e3:.2f} ms, the ranks' work {found['work']['median_s'] * 1e3:.2f} ms "
        f"({found['over']:+.1%}), exposed {found['exposed_share']:.1%} of {timeline.total_s * 1e3:.2f} ms"
    )


def _launched(  # noqa: PLR0917 - what names a run, and where it is noted
    bench: Bench, record: Record, launcher: str, transport: str, world_size: int, works: set[tuple[str, str]]
) -> None:
    """A ring of processes on one card; a transport that this MPI or card refuses is named, with its reason."""
    name = f"{launcher}, {transport}, {world_size} ranks"
    if record.late(name):
        return
    asked = Ranks(launcher=bench.launchers[launcher], count=world_size, folder=bench.folder)
    found = launched_ring(asked, _schedule(bench, world_size, "forward"), transport, repeats=bench.sizes.repeats)
    record.values[name] = found
    if "refused" in found:
        record.say(f"{name}: refused: {found['refused'][-200:]}")
        return
    works.add((launcher, transport))
    record.require(f"{launcher}, {transport}: right against float64", name, bool(found["passed"]), str(found["check"]))
    work_s = record.values.get(f"in one process, {world_size} ranks, forward", {}).get("work", {}).get("median_s")
    if work_s:
        record.target(
            f"{name}: total over the sum of the ranks' work, less one", found["total_s"] / work_s - 1, MOST_MORE, at_least=False
        )
    record.target(f"{name}: exposed communication of the total", found["exposed_share"], MOST_EXPOSED, at_least=False)
    record.say(f"{name}: {found['total_s'] * 1e3:.2f} ms, exposed {found['exposed_share']:.1%}; {found['said']}")

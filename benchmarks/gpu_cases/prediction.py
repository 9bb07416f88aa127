"""Section `prediction`: this card calibrated, rings that calibration did not see predicted, and only then run.

By processes under an MPI launcher where there is one, in one process besides.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any, Final

from ringsim import topology
from ringsim.comparison import Comparison, compare
from ringsim.schedule import Schedule
from ringsim.simulation import simulate

from . import rings
from .bench import Bench
from .calibrated import calibrate_in_process
from .launched import Ranks, options_of
from .record import Record

RANKS: Final = 4
DTYPE: Final = "bfloat16"
HEAD_DIM: Final = 128
PASSES: Final = ("forward", "both")
MASKS: Final = (("causal", "zigzag"), ("full", "contiguous"), ("causal", "contiguous"))
MOST_ERROR: Final = 0.10
"""Of a held-out ring's total, that the project aims at."""
RUNS: Final = 5
TRANSPORT: Final = "mpi-staged"
"""That every MPI can have; others are calibrated alike."""


def held_out(bench: Bench) -> list[Schedule]:
    """Rings of lengths, heads and masks that calibration does not time."""
    made = []
    for ring, (pass_, (mask, partition)) in zip(bench.sizes.held_out * 2, product(PASSES, MASKS), strict=False):
        work = rings.workload(ring, mask, DTYPE, pass_)
        made.append(Schedule(workload=work, world_size=RANKS, partition=partition))
    return made


def name_of(schedule: Schedule) -> str:
    """A ring in words."""
    work = schedule.workload
    return f"{work.q_len} tokens, {work.heads}/{work.kv_heads} heads, {work.mask.name} {schedule.partition}, {work.pass_}"


def run(bench: Bench, record: Record) -> None:
    """In one process; then by each launcher, whatever became of the first."""
    with record.attempt("calibration and runs in one process", "in one process"):
        _in_process(bench, record)
    for launcher in bench.launchers:
        with record.attempt("calibration and runs by processes", launcher):
            _launched(bench, record, launcher, held_out(bench))


def _in_process(bench: Bench, record: Record) -> None:
    """Calibrate, predict all, save, then run."""
    text = calibrate_in_process(bench, RANKS, DTYPE, HEAD_DIM)
    (bench.folder / "calibrated.yaml").write_text(text)
    record.values["topology"] = text
    machine = topology.parse(text, "what was measured")
    bench.found["machine"] = machine
    schedules = held_out(bench)
    predicted = [simulate(schedule, machine) for schedule in schedules]
    record.values["predicted before running"] = {
        name_of(schedule): {"total_s": one.total_s, "steps_s": [step.latency_s for step in one.steps()]}
        for schedule, one in zip(schedules, predicted, strict=True)
    }
    bench.save()
    for schedule, one in zip(schedules, predicted, strict=True):
        name = name_of(schedule)
        if record.late(name):
            continue
        note(record, f"in one process: {name}", compare(one, _runs(bench, schedule)))


def _runs(bench: Bench, schedule: Schedule) -> list[Any]:
    group = rings.together(bench, schedule)
    held = rings.drawn(bench.card, group, 5)
    found = []
    for turn in range(1 + RUNS):
        bench.card.settle()
        group.run(held)
        if turn:
            found.append(group.timeline())
    return found


def note(record: Record, name: str, found: Comparison) -> None:
    """Errors of total and steps."""
    record.values[name] = found.to_dict()
    _noted(record, name, found.predicted.total_s, found.total.median_s, [step.error for step in found.steps])


def _noted(record: Record, name: str, predicted_s: float, measured_s: float, steps: list[float]) -> None:
    error = predicted_s / measured_s - 1 if measured_s else 0.0
    worst = max(steps, key=abs, default=0.0)
    record.target(f"{name}: error of the total, either way", abs(error), MOST_ERROR, at_least=False)
    record.say(
        f"{name}: predicted {predicted_s * 1e3:.2f} ms, measured {measured_s * 1e3:.2f} ms, {error:+.1%}; worst step {worst:+.1%}"
    )


def _launched(bench: Bench, record: Record, launcher: str, schedules: list[Schedule]) -> None:
    """Calibrate, simulate (written down before any run), then compare, with processes."""
    ranks = Ranks(launcher=bench.launchers[launcher], count=RANKS, folder=bench.folder)
    file = bench.folder / "calibrated-by-processes.yaml"
    words = ("--backend", "cupy", "--transport", TRANSPORT, "--dtype", DTYPE, "--head-dim", str(HEAD_DIM))
    if record.late(f"{launcher}: calibration"):
        return
    failure = ranks.ringsim("calibrate", *words, "-o", str(file))
    record.require(f"{launcher}: calibration", "ringsim calibrate", failure is None, failure or "")
    if failure is not None:
        return
    machine = topology.load(str(file))
    ahead = {name_of(one): simulate(one, machine).total_s for one in schedules}
    record.values[f"{launcher}: predicted before running"] = ahead
    bench.save()
    for schedule in schedules:
        name = f"{launcher}, {TRANSPORT}: {name_of(schedule)}"
        if record.late(name):
            continue
        path = bench.folder / "compared.json"
        path.unlink(missing_ok=True)
        measured = ("--backend", "cupy", "--transport", TRANSPORT, "--repeats", str(RUNS), "--json", str(path))
        failure = ranks.ringsim("compare", "--topology", str(file), *measured, *options_of(schedule))
        record.require(f"{launcher}: runs", name, failure is None, failure or "")
        if failure is None:
            values = json.loads(path.read_text())
            record.values[name] = values
            steps = [step["error"] for step in values["steps"]]
            _noted(record, name, ahead[name_of(schedule)], values["measured"]["total_s"], steps)

"""Section `million`: a causal layer of 1,048,576 tokens in a ring of 4 ranks on one card; its time predicted beforehand."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ringsim.execution import Together
from ringsim.schedule import Schedule
from ringsim.simulation import simulate

from . import float64, rings
from .bench import Bench, rate
from .prediction import MOST_ERROR
from .record import Record
from .tiles import BESIDE, SHARE

RANKS: Final = 4
DTYPE: Final = "bfloat16"
SEED: Final = 17
MOST_MEMORY_ERROR: Final = 0.05


def run(bench: Bench, record: Record) -> None:
    """Predict from the calibration of section `prediction`, run twice, sample rows, weigh."""
    card, sizes = bench.card, bench.sizes
    work = rings.workload(sizes.million, "causal", DTYPE)
    schedule = Schedule(workload=work, world_size=RANKS, partition="zigzag")
    machine = bench.found.get("machine")
    predicted_s = None
    if machine is None:
        record.skipped.append("the prediction: section prediction left no calibration")
    else:
        predicted_s = record.values["predicted_s"] = simulate(schedule, machine).total_s
        bench.save()
    free = card.free_nbytes()
    group = rings.together(bench, schedule)
    held = rings.drawn(card, group, SEED)
    rings.poison(group)
    lses = group.run(held)
    card.settle()
    weighed = record.values["memory"] = _memory(card, group, free)
    off = abs(weighed["held_nbytes"] / weighed["model_nbytes"] - 1)
    record.target("memory held against the model's, either way", off, MOST_MEMORY_ERROR, at_least=False)
    del lses
    group.run(held)
    timeline = group.timeline()
    flops = rings.flops_of(schedule)
    record.values |= {
        "tokens": work.q_len,
        "flops": flops,
        "total_s": timeline.total_s,
        "tflops": rate(flops, timeline.total_s),
        "exposed_s": timeline.exposed_s(),
    }
    said = "no prediction"
    if predicted_s is not None:
        error = predicted_s / timeline.total_s - 1
        record.target("error of the predicted time, either way", abs(error), MOST_ERROR, at_least=False)
        said = f"predicted {predicted_s:.3f} s beforehand ({error:+.1%})"
    worst = _sampled(bench, record, schedule, held)
    held_ = record.values["memory"]
    record.say(
        f"{work.q_len} tokens causal, {work.heads} heads of {work.head_dim}, {RANKS} ranks: {timeline.total_s:.3f} s, "
        f"{record.values['tflops']:.0f} TFLOP/s, {said}; sampled rows off by at most {worst:.1e}; "
        f"{held_['held_nbytes'] / 2**30:.1f} GiB held, the model says {held_['model_nbytes'] / 2**30:.1f}"
    )


def _memory(card: Any, group: Together, free: int) -> dict[str, Any]:
    """Device memory that the ring took, and what the memory model says of it."""
    model = sum(rank.backend.footprint(group.schedule, number).nbytes for number, rank in enumerate(group.ranks))
    return {"held_nbytes": free - card.free_nbytes(), "model_nbytes": model}


def _sampled(bench: Bench, record: Record, schedule: Schedule, held: list[dict[str, Any]]) -> float:
    """Rows of every rank, drawn at random with its first and last, against float64 over all keys; the largest error."""
    card, xp, work = bench.card, bench.card.xp, schedule.workload
    rng = np.random.default_rng(SEED)
    positions = [schedule.job.q_partition.positions(rank) for rank in range(RANKS)]
    count = max(2, bench.sizes.million_rows // RANKS)
    heads = rng.choice(work.heads, min(bench.sizes.million_heads, work.heads), replace=False)
    worst = 0.0
    for head in (int(one) for one in heads):
        kv = head // (work.heads // work.kv_heads)
        keys, values = ([card.exact(mine[name][0, :, kv]) for mine in held] for name in ("k", "v"))
        for rank, mine in enumerate(held):
            rows = np.unique([0, len(positions[rank]) - 1, *rng.integers(0, len(positions[rank]), count)])
            seen = [xp.asarray(work.mask.visible(positions[rank][rows], each)) for each in positions]
            q = xp.stack([card.exact(mine["q"][0, row : row + 1, head])[0] for row in map(int, rows)])
            found = xp.stack([card.exact(mine["out"][0, row : row + 1, head])[0] for row in map(int, rows)])
            wanted = float64.rows_of_blocks(xp, q, keys, values, seen, work.softmax_scale)
            off = float64.largest(xp, found - wanted)
            worst = max(worst, off)
            limit = SHARE * 2.0**-9 * max(float64.largest(xp, wanted), 1.0) + BESIDE
            record.check("sampled rows against float64", f"rank {rank}, head {head}, {len(rows)} rows", off, limit)
    record.values["sampled"] = {"heads": [int(head) for head in heads], "rows_per_rank": count, "seed": SEED, "worst": worst}
    return worst

"""Section `quiet`: in the ring loop nothing is allocated and nobody waits for the device; counted where ringsim calls CUDA."""

from __future__ import annotations

from collections import Counter
from typing import Final

from ringsim.schedule import Schedule

from . import rings
from .bench import Bench
from .record import Record
from .watched import ALLOCATIONS, Watched

RANKS: Final = 4
RUNS: Final = (("ring", "forward"), ("ring", "both"), ("q-ring", "both"), ("burst", "both"))
WAITS: Final = ("synchronize",)


def run(bench: Bench, record: Record) -> None:
    """The second and third run of each ring, between the first op of the first rank and the last op of the last."""
    card = bench.card
    for strategy, pass_ in RUNS:
        name = f"{strategy} {pass_}"
        if record.late(name):
            continue
        watched = Watched(card.calls)
        work = rings.workload(bench.sizes.races, "causal", "bfloat16", pass_)
        schedule = Schedule(workload=work, world_size=RANKS, strategy=strategy, partition="zigzag")
        group = rings.together(bench, schedule, calls=watched, tiles=[card.tiles(watched) for _ in range(RANKS)])
        held = rings.drawn(card, group, 23)
        group.run(held)
        card.settle()
        loops = []
        for _ in range(2):
            walkers = group.walkers(held)
            before, free, pool = Counter(watched.counts), card.free_nbytes(), card.pool_nbytes()
            group.drive(walkers)
            made = watched.counts - before
            card.settle()
            taken = {"free_nbytes": free - card.free_nbytes(), "pool_nbytes": card.pool_nbytes() - pool}
            loops.append(dict(made) | taken)
            group.finish(walkers)
            card.settle()
            record.require("no allocation in the loop", f"{name}: {dict(made)}", not any(made[one] for one in ALLOCATIONS))
            record.require("no wait for the device in the loop", f"{name}: {dict(made)}", not any(made[one] for one in WAITS))
            record.require("no device memory taken by the loop", f"{name}: {taken}", not any(taken.values()))
        record.values[name] = loops
    said = {name: values[-1].get("launch", 0) for name, values in record.values.items()}
    record.say(f"no allocation, no wait for the device in the loop; launches of our own kernels in one: {said}")

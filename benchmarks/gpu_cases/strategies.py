"""Section `strategies`: every registered strategy, forward and backward, against float64 and one fused call (2.5 x rule)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

import numpy as np

from ringsim.checking import GRADIENT_LIMITS, LIMITS
from ringsim.errors import WorkloadError
from ringsim.schedule import Schedule
from ringsim.schedule.registry import STRATEGIES

from . import float64, rings
from .bench import Bench
from .record import Record
from .tiles import BESIDE, LSE_LIMITS, SHARE

RANKS: Final = 4
ARGUMENTS: Final = {"double-ring": ("(2)",), "multi-ring": ("(2)",), "local-window": ("(100)",)}
"""Of strategies that need some."""
MASKS: Final = ("causal", "full", "causal & window(70)", "documents(200, 312)")
PARTITIONS: Final = ("zigzag", "contiguous", "striped")
SEED: Final = 7
MADE: Final = ("out", "lse", "dq", "dk", "dv")


def schedules(bench: Bench) -> Iterator[Schedule]:
    """Each strategy, first under a causal mask and zigzag, with both passes where it has them."""
    ring = bench.sizes.strategies
    for mask in MASKS:
        for partition in PARTITIONS:
            for name in sorted(STRATEGIES):
                for dtype in bench.sizes.strategy_dtypes:
                    for text in ARGUMENTS.get(name, ("",)):
                        pass_ = "both" if STRATEGIES[name].backward is not None else "forward"
                        made = _made(rings.workload(ring, _of_length(mask, ring.tokens), dtype, pass_), name + text, partition)
                        if made is not None:
                            yield made


def _of_length(mask: str, tokens: int) -> str:
    if not mask.startswith("documents"):
        return mask
    first = tokens * 2 // 5
    return f"documents({first}, {tokens - first})"


def _made(work: Any, strategy: str, partition: str) -> Schedule | None:
    """On four ranks, or on the one for which the strategy is; None for what it has no schedule for (halo without a window)."""
    for world_size in (RANKS, 1):
        try:
            return Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition)
        except WorkloadError:
            continue
    return None


def run(bench: Bench, record: Record) -> None:
    """All of them, once each, in poisoned slots."""
    ran: set[str] = set()
    # consecutive schedules ask for the same answers
    answers = lru_cache(maxsize=8)(lambda work: _answers(bench, work))
    known = list(schedules(bench))
    for schedule in known:
        name = f"{schedule.strategy} {schedule.partition} {schedule.workload.mask.name} {schedule.workload.dtype}"
        if record.late(name):
            continue
        with record.attempt("schedules that could not be run", name):
            _check(bench, record, schedule, name, answers(schedule.workload))
        ran.add(schedule.strategy.partition("(")[0])
    missing = sorted(set(STRATEGIES) - {schedule.strategy.partition("(")[0] for schedule in known})
    record.require("every strategy", f"no schedule of {missing}", not missing)
    record.values |= {"schedules": len(known), "ranks": RANKS, "seed": SEED, "strategies": sorted(ran), "masks": list(MASKS)}
    record.values["partitions"] = list(PARTITIONS)
    failed = sum(len(group.failed) for group in record.groups.values())
    record.say(f"{len(ran)} strategies, {len(known) - len(record.skipped)} of {len(known)} schedules run, {failed} failed checks")


def _answers(bench: Bench, work: Any) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, float]]:
    """Global inputs, answers in float64, and the errors of one call over all keys."""
    arrays = rings.given(work, SEED)
    wanted = rings.answer(bench.card, work, arrays)
    alone = _run(bench, Schedule(workload=work, world_size=1, strategy="dense"), arrays)
    return arrays, wanted, {name: error(bench, name, alone[name], wanted[name]) for name in wanted}


def _run(bench: Bench, schedule: Schedule, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    # one set for all ranks: what cuDNN plans for one it need not plan for another
    group = rings.together(bench, schedule, tiles=bench.tiles(1) * schedule.world_size)
    held = group.shards(**arrays)
    rings.poison(group)
    result = group.result(held, group.run(held))
    return {name: getattr(result, name) for name in MADE if getattr(result, name) is not None}


def error(bench: Bench, name: str, found: Any, wanted: Any) -> float:
    """The largest error of a host array, of gradients relative to the largest entry or 1."""
    xp = bench.card.xp
    values = bench.card.exact(bench.card.upload(np.asarray(found)))
    if name == "lse":
        return float64.apart(xp, values, wanted)
    scale = max(float64.largest(xp, wanted), 1.0) if name != "out" else 1.0
    return float64.largest(xp, values - wanted) / scale


def limit(name: str, dtype: str, one_call: float) -> float:
    """Of a ring's error: in half precision by that of one call."""
    if name == "lse":
        return LSE_LIMITS.get(dtype, BESIDE)
    exact = LIMITS if name == "out" else GRADIENT_LIMITS
    return exact[dtype] if dtype in exact else SHARE * one_call + BESIDE


def _check(bench: Bench, record: Record, schedule: Schedule, name: str, answers: tuple[Any, Any, dict[str, float]]) -> None:
    arrays, wanted, one_call = answers
    work = schedule.workload
    found = _run(bench, schedule, arrays)
    for what, values in found.items():
        off = error(bench, what, values, wanted[what])
        record.check(f"{schedule.strategy} {work.dtype}", f"{name}: {what}", off, limit(what, work.dtype, one_call[what]))

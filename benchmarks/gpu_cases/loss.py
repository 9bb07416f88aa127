"""Section `loss`: what partial outputs in half precision cost: keys in 8 blocks by cuDNN's tiles, and by ours (float32)."""

from __future__ import annotations

from typing import Any, Final

from ringsim.schedule import Schedule

from . import float64, rings
from .bench import Bench
from .record import Record
from .strategies import SEED
from .tiles import BESIDE, SHARE

BLOCKS: Final = 8


def run(bench: Bench, record: Record) -> None:
    """Errors against float64, largest and root mean square, of one block and of eight, of each kind of tiles."""
    card = bench.card
    work = rings.workload(bench.sizes.loss, "causal", "bfloat16", "both")
    arrays = rings.given(work, SEED)
    wanted = rings.answer(card, work, arrays)
    whole = Schedule(workload=work, world_size=1)
    for kind, make in card.kinds.items():
        if kind == "own plain":
            continue
        errors = {}
        for blocks in (1, BLOCKS):
            name = f"{kind}, keys in {blocks}"
            if record.late(name):
                continue
            with record.attempt("kinds of tiles", name):
                errors[blocks] = _of_blocks(
                    bench, record, name, make(card.calls), (rings.keys_in_blocks(whole, blocks), arrays, wanted)
                )
        if len(errors) == 2:
            for what in errors[1]:
                one, many = errors[1][what]["largest"], errors[BLOCKS][what]["largest"]
                record.check(f"{kind}: {BLOCKS} blocks against one", what, many, SHARE * one + BESIDE)
            ratio = errors[BLOCKS]["out"]["rms"] / (errors[1]["out"]["rms"] or 1.0)
            said = record.values[f"{kind}, keys in {BLOCKS}"]
            record.say(
                f"{kind}: partials in {said['partials']}: rms error of out {said['out']['rms']:.2e}, {ratio:.2f} x one block's"
            )


def _of_blocks(bench: Bench, record: Record, name: str, tiles: Any, problem: tuple[Schedule, Any, Any]) -> dict[str, Any]:
    """One kind of tiles on a schedule, its arrays and its answers."""
    schedule, arrays, wanted = problem
    group = rings.together(bench, schedule, tiles=[(tiles,)])
    held = group.shards(**arrays)
    rings.poison(group)
    group.run(held)
    errors = {one: _errors(bench, held[0][one], wanted[one]) for one in ("out", "dq", "dk", "dv")}
    record.values[name] = errors | {"partials": tiles.partial(schedule.workload.dtype)}
    return errors


def _errors(bench: Bench, found: Any, wanted: Any) -> dict[str, float]:
    """Relative to the largest entry of what is wanted, or 1."""
    xp = bench.card.xp
    off = bench.card.exact(found) - wanted
    scale = max(float64.largest(xp, wanted), 1.0)
    return {"largest": float64.largest(xp, off) / scale, "rms": float((off**2).mean() ** 0.5) / scale}

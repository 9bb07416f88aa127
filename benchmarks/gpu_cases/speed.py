"""Section `speed`: one rank's attention, keys in 1, 4 and 8 blocks, beside one fused call of cuDNN over all keys, in turns."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any, Final

import numpy as np

from ringsim.backends.cuda_tiles import part_of
from ringsim.errors import DeviceError
from ringsim.execution import Together
from ringsim.schedule import Compute, Schedule

from . import rings
from .bench import Bench, alternating, event_s, rate, spread
from .card import Operands
from .record import Record
from .watched import Timed

MASKS: Final = ("full", "causal")
DTYPE: Final = "bfloat16"
LEAST_SHARE: Final = 0.95
LEAD_S: Final = 4e-3
"""For which the stream is held before each sample, so that the host has queued what is timed."""
FOLDING: Final = ("merge_partials", "finish_partials", "merge", "accumulate", "cast", "delta", "copy", "clear")


def run(bench: Bench, record: Record) -> None:
    """Forward first: that is the target's; then the backward pass."""
    for pass_ in ("forward", "backward"):
        for mask in MASKS:
            name = f"{mask} {pass_}"
            if not record.late(name):
                with record.attempt("what could not be timed", name):
                    _compare(bench, record, mask, pass_)
    ceiling = bench.found.get("matmul_tflops")
    record.values["matmul_tflops"] = ceiling
    record.say(f"share = one cuDNN call / keys in blocks; this card's bf16 matrix product: {ceiling or 0:.0f} TFLOP/s")


def _compare(bench: Bench, record: Record, mask: str, pass_: str) -> None:
    card, sizes = bench.card, bench.sizes
    schedule = Schedule(workload=rings.workload(sizes.speed, mask, DTYPE, pass_), world_size=1)
    held = _operands(bench, schedule)
    stream, runs = card.calls.stream(), _one_calls(bench, record, schedule, held, pass_)
    once = {name: (lambda call=call: call(stream)) for name, call in runs.items()}
    groups = {}
    for blocks in sizes.speed_blocks:
        groups[blocks] = rings.together(bench, rings.keys_in_blocks(schedule, blocks))
        once[f"keys in {blocks}"] = _in_blocks(groups[blocks], held, stream)
    samples = alternating(card.calls, stream, once, sizes.repeats, lambda: card.spin(stream, LEAD_S))
    flops, fused_s = rings.flops_of(schedule), median(samples[next(iter(runs))])
    found: dict[str, Any] = {"tokens": sizes.speed.tokens, "flops": flops, "of": next(iter(runs))}
    for name, each in samples.items():
        share = fused_s / median(each)
        found[name] = spread(each) | {"tflops": rate(flops, median(each)), "share": share, "samples_s": each}
        target = name.startswith("keys in") and name != "keys in 1" and pass_ == "forward"
        if target:
            record.target(f"{mask} {pass_}, {name} blocks: one fused call / ring", share, LEAST_SHARE, at_least=True)
    most = max(sizes.speed_blocks)
    found["plans"] = [fused.facts().get("cudnn_plans") for fused in bench.tiles(1)[0]]
    found["folding"] = _folding(bench, groups[most].schedule, held, median(samples[f"keys in {most}"]))
    record.values[f"{mask} {pass_}"] = found
    words = ", ".join(f"{name} {one['tflops']:.0f} ({one['share']:.1%})" for name, one in found.items() if name in samples)
    record.say(f"{mask} {pass_}, TFLOP/s (share): {words}; folding {found['folding']['share']:.1%} with keys in {most}")


def _operands(bench: Bench, schedule: Schedule) -> list[dict[str, Any]]:
    """Arrays of a call on the card; the backward pass is given out and lse of a forward one."""
    card = bench.card
    group = rings.together(bench, schedule)
    held = rings.drawn(card, group, 11)
    if schedule.workload.pass_ == "backward":
        forward = rings.together(
            bench, Schedule(workload=rings.workload(bench.sizes.speed, schedule.workload.mask.name, DTYPE), world_size=1)
        )
        mine = {name: held[0][name] for name in ("q", "k", "v", "out")}
        held[0]["lse"] = forward.run([mine])[0]
    card.settle()
    return held


def _one_calls(
    bench: Bench, record: Record, schedule: Schedule, held: list[dict[str, Any]], pass_: str
) -> dict[str, Callable[[Any], None]]:
    """One fused call over all keys: of the backward pass the deterministic one, as ours is, and cuDNN's default.

    Where cuDNN has no deterministic one for so many keys, its default stands in, and the record says so.
    """
    card, mine, scale = bench.card, held[0], schedule.workload.softmax_scale
    tile = next(op.tiles[0] for op in schedule.program(0) if isinstance(op, Compute) and op.tiles)
    part = part_of(tile)
    band = None if part is None else part.band
    if pass_ == "forward":
        _, rows, heads, _ = mine["q"].shape
        lse = card.calls.empty(4 * heads * rows).view(np.float32).reshape(1, heads, rows)
        operands = Operands(mine["q"], mine["k"], mine["v"], mine["out"], lse)
        fused = card.one_call(ordered=True)
        return {"one call": lambda stream: fused.forward(operands, band, scale, stream)}
    operands = Operands(*(mine[name] for name in ("q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv")))
    found: dict[str, Callable[[Any], None]] = {}
    for name, ordered in (("one call", True), ("one call, any order of sums", False)):
        call = card.one_call(ordered=ordered)
        try:
            call.backward(operands, band, scale, card.calls.stream())
        except DeviceError as error:
            record.values[f"{schedule.workload.mask.name} {pass_}, {name}: refused"] = str(error)
            continue
        found[name] = lambda stream, call=call: call.backward(operands, band, scale, stream)  # type: ignore[misc]
    card.settle()
    return found


def _in_blocks(group: Together, held: list[dict[str, Any]], stream: Any) -> Callable[[], None]:
    """A run of a world of one, after what the stream holds and before what it is given next."""

    def once() -> None:
        group.run(held, stream)

    return once


def _folding(bench: Bench, schedule: Schedule, held: list[dict[str, Any]], whole_s: float) -> dict[str, Any]:
    """Seconds of the kernels that fold, between events of their own, and their share of an undisturbed run."""
    timed = Timed(bench.card.calls)
    group = rings.together(bench, schedule, calls=timed)
    stream = bench.card.calls.stream()
    again = _in_blocks(group, held, stream)
    event_s(bench.card.calls, stream, again)
    bench.card.settle()
    timed.seconds()
    event_s(bench.card.calls, stream, again)
    bench.card.settle()
    found = {name: seconds for name, seconds in timed.seconds().items() if name in FOLDING}
    return {"seconds": found, "share": sum(found.values()) / whole_s if whole_s else 0.0}

"""Section `facts`: the device, and its ceilings, measured: a large bf16 matrix product of random numbers, a large copy."""

from __future__ import annotations

from statistics import median

from .bench import Bench, alternating, rate, spread
from .record import Record


def run(bench: Bench, record: Record) -> None:
    """Matrix product and copies, in TFLOP/s and TB/s (bytes read and written)."""
    card, sizes = bench.card, bench.sizes
    record.values["device"] = card.facts()
    stream = card.calls.stream()
    rows = sizes.matmul_rows
    product = card.matmul(rows, "bfloat16", stream)
    samples = alternating(card.calls, stream, {"matmul": product}, sizes.repeats)["matmul"]
    ceiling = rate(2 * rows**3, median(samples))
    record.values["matmul"] = spread(samples) | {"rows": rows, "dtype": "bfloat16", "tflops": ceiling}
    source, target = (card.calls.empty(sizes.copy_nbytes) for _ in range(2))
    card.calls.fill(source, 0x5A, stream)
    copies = alternating(card.calls, stream, {"copy": lambda: card.calls.copy(target, source, stream)}, sizes.repeats)["copy"]
    moved = rate(2 * sizes.copy_nbytes, median(copies))
    record.values["copy"] = spread(copies) | {"nbytes": sizes.copy_nbytes, "tbytes_per_s": moved}
    bench.found["matmul_tflops"] = ceiling
    bench.found["device"] = record.values["device"]
    record.require("the card", "a matrix product takes time", ceiling > 0)
    name = record.values["device"].get("device", "device")
    record.say(f"{name}: bf16 product of {rows} rows {ceiling:.0f} TFLOP/s, copies {moved:.2f} TB/s")
    for name, why in card.missing.items():
        record.say(f"{name} is missing: {why}")

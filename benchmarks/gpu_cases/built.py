"""Section `build`: every variant of every kernel that ringsim launches, compiled for this device, many at once, kept on disk."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Final

from ringsim.backends.cuda import Kernel
from ringsim.backends.cuda_attend import HALVES, NAMES, WIDEST, tensor_kernel
from ringsim.backends.cuda_sources import kernels
from ringsim.errors import RingsimError

from .bench import Bench
from .record import Record

THREADS: Final = 16


def wanted(bench: Bench) -> list[Kernel]:
    """Those of the package, and those of the widths that sections ask for."""
    found = dict.fromkeys(kernels())
    for (width, v_width), dtype, backward in product(bench.sizes.tile_widths, HALVES, (False, True)):
        if width % 16 or v_width % 16 or max(width, v_width) > WIDEST[backward]:
            continue
        for name in NAMES[backward]:
            found[tensor_kernel(f"{name}_tensor", dtype, (width, v_width))] = None
    return list(found)


def run(bench: Bench, record: Record) -> None:
    """One compilation for each source and set of types."""
    asked = {(kernel.source, kernel.types): kernel for kernel in wanted(bench)}
    begin = time.monotonic()

    def build(kernel: Kernel) -> str | None:
        if time.monotonic() > record.deadline_s:
            return "late"
        try:
            bench.card.build(kernel)
        except RingsimError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        said = list(pool.map(build, asked.values()))
    for kernel, failure in zip(asked.values(), said, strict=True):
        name = f"{kernel.source} {dict(kernel.types)}"
        if failure == "late":
            record.skipped.append(name)
        else:
            record.require("compiles for this device", name, failure is None, failure or "")
    record.values["variants"] = len(asked)
    record.say(
        f"{len(asked)} variants of {len({source for source, _ in asked})} sources compiled in {time.monotonic() - begin:.1f} s"
    )

"""Sets of logical processors, as the kernel writes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

MOST_CPUS: Final = 2**16


def parse(text: str) -> frozenset[int]:
    """``0-3,8`` as numbers; what is no such list is empty."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not (first.isascii() and first.isdigit() and (not last or (last.isascii() and last.isdigit()))):
            return frozenset()
        low, high = int(first), int(last or first)
        if high >= MOST_CPUS:
            return frozenset()
        found.update(range(low, high + 1))
    return frozenset(found)


def shown(numbers: Iterable[int]) -> str:
    """Numbers as ``0-3,8``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "none"

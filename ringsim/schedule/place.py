"""How far a rank has come in a replay, and what its slots hold."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from .ops import Op, Region

Held = tuple[int, int, tuple[str, int]]
"""From a byte to another: this value and version."""
SCATTERED = ("parts of an array, with others between them", 0)
"""What bytes hold in which a region lies that is not dense."""


@dataclass(slots=True)
class Place:
    """How far one rank has come, and what its slots hold: in order, each range of bytes with its latest value and version.

    Regions that are not dense, as those of some heads, are held as they were written: only so can they be read.
    """

    ops: tuple[Op, ...]
    next: int = 0
    done: set[int] = field(default_factory=set)
    held: dict[tuple[str, int], list[Held]] = field(default_factory=dict)
    scattered: dict[tuple[str, int], list[Region]] = field(default_factory=dict)

    def write(self, region: Region) -> None:
        """From now on the region's bytes hold its value and version; what lay there before is gone."""
        begin, end = region.extent
        slot = region.buffer, region.slot
        parts = self.held.setdefault(slot, [])
        if begin == end:
            return
        kept_apart = [other for other in self.scattered.get(slot, ()) if not other.overlaps(region)]
        self.scattered[slot] = kept_apart if region.dense else [*kept_apart, region]
        content = (region.value, region.version) if region.dense else SCATTERED
        first, last = _touching(parts, begin, end)
        kept = [(begin, end, content)]
        if first < last:
            low, _, before = parts[first]
            _, high, after = parts[last - 1]
            if low < begin:
                kept.insert(0, (low, begin, before))
            if high > end:
                kept.append((end, high, after))
        if first and parts[first - 1][1] == begin:
            first -= 1
            kept.insert(0, parts[first])
        if last < len(parts) and parts[last][0] == end:
            kept.append(parts[last])
            last += 1
        parts[first:last] = _joined(kept)

    def stale(self, region: Region) -> str | None:
        """What stands, somewhere in the region's bytes, in place of its value and version; None if nothing else does."""
        reached, end = region.extent
        if reached == end:
            return None
        slot = region.buffer, region.slot
        if not region.dense and self.scattered.get(slot):
            found = [other for other in self.scattered[slot] if other.overlaps(region)]
            other = next((other for other in found if other != region), None)
            return None if found == [region] else f"{other.value} version {other.version}" if other else "something else"
        parts = self.held.get(slot, [])
        first, last = _touching(parts, reached, end)
        for low, high, (value, version) in parts[first:last]:
            if low > reached:
                break
            if (value, version) != (region.value, region.version):
                return f"{value} version {version}"
            reached = high
        return None if reached >= end else f"nothing from byte {reached}"


def _touching(parts: list[Held], begin: int, end: int) -> tuple[int, int]:
    """Which of the parts, as a half-open range of indices, have bytes between these."""
    at: Any = (begin,)
    first = bisect_left(parts, at)
    if first and parts[first - 1][1] > begin:
        first -= 1
    at = (end,)
    return first, bisect_left(parts, at)


def _joined(parts: list[Held]) -> list[Held]:
    """Neighbours that hold the same as one: chunks that come in order become one range."""
    joined = parts[:1]
    for low, high, content in parts[1:]:
        if joined[-1][2] == content:
            joined[-1] = (joined[-1][0], high, content)
        else:
            joined.append((low, high, content))
    return joined

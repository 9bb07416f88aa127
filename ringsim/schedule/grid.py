"""The step x rank grid: who computes what and who sends what, for people and for error messages."""

from __future__ import annotations

from collections import defaultdict

from .ops import Compute, Op, Send
from .schedule import Schedule

LEGEND = (
    "aN: attends the block of rank N, ~ under a band, qM:aN with the queries of rank M; bN: the same backward; "
    "k>N: sends k to rank N, k>>N for good, home; .: nothing"
)
MARKS = {"attend": "a", "attend_backward": "b"}


def cells(schedule: Schedule, ranks: range) -> dict[tuple[int, int], str]:
    """What each (step, rank) does, in a few characters."""
    parts: dict[tuple[int, int], list[str]] = defaultdict(list)
    for rank in ranks:
        for op in schedule.program(rank):
            text = _mark(op, rank)
            if text and text not in parts[op.step, rank]:
                parts[op.step, rank].append(text)
    return {key: " ".join(texts) for key, texts in parts.items()}


def _mark(op: Op, rank: int) -> str:
    if isinstance(op, Compute):
        if op.kernel not in MARKS:
            return ""
        # a fault may have taken both away
        queries, keys = [*(_owner(region.value) for region in op.reads[:2]), "", ""][:2]
        visitor = "" if queries == str(rank) else f"q{queries}:"
        return f"{visitor}{MARKS[op.kernel]}{keys}{'~' if any(tile.masked for tile in op.tiles) else ''}"
    if isinstance(op, Send) and op.phase != "barrier":
        return f"{op.region.buffer}{'>>' if op.phase == 'home' else '>'}{op.peer}"
    return ""


def _owner(value: str) -> str:
    """The rank in a value such as ``k[3]`` or ``k[3|0:50|0:2]``; nothing in one that a fault has garbled."""
    return value.partition("[")[2].rstrip("]").partition("|")[0]


def grid(schedule: Schedule, *, most_ranks: int = 16, fault: tuple[int, int] | None = None) -> str:
    """The grid as text, the first `most_ranks` ranks; `fault` (step, rank) is marked with an exclamation mark."""
    ranks = range(min(schedule.world_size, most_ranks))
    found = cells(schedule, ranks)
    if fault is not None and fault[1] < most_ranks:
        found[fault] = "! " + found.get(fault, "")
    steps = sorted({step for step, _ in found})
    head = ["step", *(f"rank {rank}" for rank in ranks)]
    rows = [[str(step), *(found.get((step, rank), "") or "." for rank in ranks)] for step in steps]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    if schedule.world_size > most_ranks:
        lines.append(f"... and {schedule.world_size - most_ranks} more ranks")
    return "\n".join(lines)

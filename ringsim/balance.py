"""Partitions made to measure: the work of a workload's tokens, and chunks of them dealt so that every rank has as much."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any, Final

import numpy as np

from .calls import parse_call
from .errors import WorkloadError
from .partition import KINDS, Partition, runs_text
from .tile import IntArray, Span, Tile
from .units import shown
from .workload import Workload

CHUNKS: Final = (2, 4, 8, 16, 32)
"""Chunks per rank that ``balanced`` tries, until one is good enough; docs/partitions.md says what they reach."""
GOOD: Final = 1.02
"""Largest work over the mean that is good enough."""
NEAR: Final = 1.001
"""A plainer partition is taken if its largest work is within this factor of the least."""
MOST_CHUNKS: Final = 4096
CHUNKS_FORM: Final = f"balanced takes at most the chunks per rank, 1 to {MOST_CHUNKS}, as in balanced(8)"
MOST_DIGITS: Final = 18
MOST_SWAPS: Final = 4096
AT_ONCE: Final = 2**15
"""Chunks among which the best swap is looked for."""


def partitions(text: str, workload: Workload, world_size: int) -> tuple[Partition, Partition]:
    """The partitions of queries and keys: any `kind` of Partition, or ``balanced(m)``, see `balanced`.

    ``runs(...)``, and what ``balanced`` finds, holds for the keys too where there are as many (for ``balanced``: at the same
    positions); else these are contiguous. Raises WorkloadError.
    """
    if text in KINDS:
        return _split(text, workload.q_len, world_size), _split(text, workload.kv_len, world_size)
    return _partitions(text, workload, world_size)


def balanced(workload: Workload, world_size: int, chunks: int | None = None) -> Partition:
    """The queries in ``world_size * chunks`` even chunks, as many to each rank, so that the largest work of a rank is small.

    Work is visible (sequence, query, key). Without `chunks`, the fewest of CHUNKS that bring the largest work within 2 % of the
    mean, else the best of them. Tokens of two ranks differ by at most `chunks`; the largest work exceeds the mean by at most one
    chunk's. Contiguous or zigzag is taken where it is within 0.1 % of that. Deterministic. After the dispatch of MagiAttention
    (github.com/SandAI-org/MagiAttention) and WLB-LLM (arXiv 2503.17924, section 5).
    """
    if chunks is not None:
        chunks = _chunks_of(chunks, f"chunks {shown(chunks)}")
    plain = [_split(kind, workload.q_len, world_size) for kind in ("contiguous", "zigzag")]
    candidates = [(_largest(workload, partition), partition) for partition in plain]
    enough = GOOD * sum(work_of(plain[0], workload)) / world_size
    for count in CHUNKS if chunks is None else (chunks,):
        candidates.append(_dealt(workload, world_size, max(1, min(count, workload.q_len // world_size))))
        if min(most for most, _ in candidates) <= enough:
            break
    limit = NEAR * min(most for most, _ in candidates)
    return next(partition for most, partition in candidates if most <= limit)


def _chunks_of(value: Any, given: str) -> int:
    """`value` as chunks per rank. Raises WorkloadError, in which `given` is what was given."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or not 1 <= count <= MOST_CHUNKS:
        raise WorkloadError(f"{given}: {CHUNKS_FORM}")
    return count


def work_of(partition: Partition, workload: Workload) -> tuple[int, ...]:
    """Visible (sequence, query, key) of each rank's queries under `partition`; times the heads, its pairs."""
    return tuple(sum(_pairs(workload, span) for span in partition.spans(rank)) for rank in range(partition.world_size))


def _pairs(workload: Workload, queries: Span) -> int:
    """Visible (sequence, query, key) of some queries, given before the offset."""
    total = 0
    for (first, end), q_valid, kv_valid in workload.sequences():
        count = min(queries.count, max(0, -((queries.start - q_valid) // queries.step)))
        q = Span(row=0, count=count, start=queries.start + workload.q_offset, step=queries.step)
        keys = Span(row=0, count=kv_valid, start=workload.kv_offset)
        for q_part, k_part, lo, hi in workload.mask.pieces(q, keys):
            total += Tile(batch=(first, end), heads=(0, 1), q=q_part, k=k_part, lo=lo, hi=hi).pairs()
    return total


def _largest(workload: Workload, partition: Partition) -> int:
    return max(work_of(partition, workload))


def _dealt(workload: Workload, world_size: int, chunks: int) -> tuple[int, Partition]:
    """The largest work, and the partition that has it."""
    pieces = _split("contiguous", workload.q_len, world_size * chunks)
    work = np.array(work_of(pieces, workload), dtype=np.int64)
    owners = _deal(work, world_size)
    loads = np.zeros(world_size, dtype=np.int64)
    np.add.at(loads, owners, work)
    runs = ((int(owner), pieces.count(index)) for index, owner in enumerate(owners))
    return int(loads.max()), _split(runs_text(runs), workload.q_len, world_size)


def _deal(work: IntArray, world_size: int) -> IntArray:
    """The owner of each chunk: in rounds, the heaviest chunk left to the rank that has least, then swaps.

    A round gives one chunk to each rank, the heavier to the less laden, so loads differ by no more than before or than the chunks
    of the round do: never by more than the heaviest chunk less the lightest. A swap never raises the largest load.
    """
    order = np.argsort(-work, kind="stable")
    owners = np.empty(len(work), dtype=np.int64)
    loads = np.zeros(world_size, dtype=np.int64)
    for first in range(0, len(work), world_size):
        ranks = np.argsort(loads, kind="stable")
        given = order[first : first + world_size]
        owners[given] = ranks
        loads[ranks] += work[given]
    _swap(work, owners, loads)
    return owners


def _swap(work: IntArray, owners: IntArray, loads: IntArray) -> None:
    """Exchange a chunk of the most laden rank for a lighter one elsewhere while that lowers the larger load of the two.

    The least laden ranks are looked at first, up to AT_ONCE chunks together, the others where nothing there lowers it.
    """
    held = np.argsort(owners * len(work) + _places(work), kind="stable").reshape(len(loads), -1)
    several = max(1, AT_ONCE // held.shape[1])
    for _ in range(MOST_SWAPS):
        top = int(np.argmax(loads))
        others = np.argsort(loads, kind="stable")
        others = others[others != top]
        groups = (others[first : first + several] for first in range(0, len(others), several))
        found = next((pair for group in groups if (pair := _exchange(work, held, loads, top, group))), None)
        if found is None:
            return
        other, mine, theirs = found
        give, take = held[top, mine], held[other, theirs]
        shift = work[give] - work[take]
        owners[give], owners[take] = other, top
        loads[top] -= shift
        loads[other] += shift
        for rank, place, gained in ((top, mine, take), (other, theirs, give)):
            held[rank, place] = gained
            held[rank] = held[rank][np.argsort(work[held[rank]], kind="stable")]


def _places(work: IntArray) -> IntArray:
    """The place of each chunk when they are sorted by work."""
    places = np.empty(len(work), dtype=np.int64)
    places[np.argsort(work, kind="stable")] = np.arange(len(work))
    return places


def _exchange(work: IntArray, held: IntArray, loads: IntArray, top: int, others: IntArray) -> tuple[int, int, int] | None:
    """The rank of `others`, the place of a chunk that `top` gives it and that of one that it gives, that lower the load most.

    `held` is the chunks of each rank, by work. Best is what moves half the difference of the loads, so of what another rank has
    only the two nearest to that are tried for each chunk of `top`.
    """
    mine, theirs = work[held[top]], work[held[others]]
    half = (loads[top] - loads[others]) // 2
    after = _below(theirs, mine - half[:, None])
    best, found = loads[top], None
    for near in (np.minimum(after, len(mine) - 1), np.maximum(after - 1, 0)):
        moved = mine - np.take_along_axis(theirs, near, axis=1)
        larger = np.maximum(loads[top] - moved, loads[others][:, None] + moved)
        row, place = divmod(int(np.argmin(larger)), len(mine))
        if larger[row, place] < best:
            best, found = larger[row, place], (int(others[row]), place, int(near[row, place]))
    return found


def _below(rows: IntArray, values: IntArray) -> IntArray:
    """How many of each sorted row are less than each value of the same row."""
    count = rows.shape[1]
    below = np.zeros(values.shape, dtype=np.int64)
    step = 1 << count.bit_length() - 1
    while step:
        further = below + step
        less = np.take_along_axis(rows, np.minimum(further, count) - 1, axis=1) < values
        below = np.where(less & (further <= count), further, below)
        step //= 2
    return below


def _split(kind: str, length: int, world_size: int) -> Partition:
    return Partition(kind=kind, length=length, world_size=world_size)


@lru_cache(maxsize=256)
def _partitions(text: str, workload: Workload, world_size: int) -> tuple[Partition, Partition]:
    call = parse_call(text, "partition") if isinstance(text, str) else None
    if call is None or call.name not in ("balanced", "runs"):
        return _split(text, workload.q_len, world_size), _split(text, workload.kv_len, world_size)
    alike = workload.q_len == workload.kv_len
    if call.name == "balanced":
        given = f"partition {shown(text)}"
        if call.named or len(call.args) > 1:
            raise WorkloadError(f"{given}: {CHUNKS_FORM}")
        words = [int(word) if word.isdecimal() and len(word) <= MOST_DIGITS else word for word in call.args]
        queries = balanced(workload, world_size, _chunks_of(words[0], given) if words else None)
        alike = alike and workload.q_offset == workload.kv_offset
    else:
        queries = _split(text, workload.q_len, world_size)
    return queries, queries if alike else _split("contiguous", workload.kv_len, world_size)

"""Proofs about a schedule: messages pair up, nothing deadlocks, nothing stale is read, every pair is covered once."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..errors import ScheduleError
from ..tile import IntArray, Tile
from .contents import Contents
from .forms import misformed
from .grid import grid
from .job import GIVEN
from .ops import Compute, Op, Recv, Region, Send, Wait
from .outstanding import Outstanding
from .place import Place
from .schedule import Schedule

Counts = npt.NDArray[np.int16]
EXHAUSTIVE_WORLD = 64
EXHAUSTIVE_PAIRS = 2**22
SAMPLED_QUERIES = 64
SAMPLED_RANKS = 8


def validate(schedule: Schedule) -> None:
    """Prove the invariants, of all ranks up to 64, of a sample of ranks with their neighbours beyond.

    Up to 64 ranks a replay of all proves that none waits for ever, that each receive gets what it expects and each op reads
    the value and version that it names, and that all that is attended comes home once. Beyond, of the sampled ranks: the
    order of their ops with their waits; that sends and receives match on every channel between two of them; and each one's
    own data flow, with receives from any rank trusted to bring the value, version and contents that they name: no stale
    read, all that it attends or receives for its own queries once in its outputs, all that it has for others' sent on. The
    coverage of their queries (or of a sample of these) is counted over the programs of all ranks. Not proven beyond 64 ranks:
    that no run deadlocks, and anything of the messages, the order and the data flow of ranks outside the sample.

    Raises ScheduleError that names rank and op and shows the step x rank grid.
    """
    ranks = _ranks(schedule)
    programs = {rank: tuple(schedule.program(rank)) for rank in ranks}
    for rank, ops in programs.items():
        _check_order(schedule, rank, ops)
    if len(programs) == schedule.world_size:
        _Replay(schedule, programs).run()
    else:
        _check_pairs(schedule, programs)
        for rank, ops in programs.items():
            _check_flow(schedule, rank, ops)
    _check_coverage(schedule, programs)


def _ranks(schedule: Schedule) -> list[int]:
    if schedule.world_size <= EXHAUSTIVE_WORLD:
        return list(range(schedule.world_size))
    chosen = {0, 1, schedule.world_size - 1}
    for rank in random.Random(0).sample(range(schedule.world_size), SAMPLED_RANKS):
        chosen |= {rank, (rank + 1) % schedule.world_size}
    return sorted(chosen)


def _fault(schedule: Schedule, rank: int, op: Op | None, message: str) -> ScheduleError:
    where = f"rank {rank}" + (f", op {op.id} ({type(op).__name__.lower()}, step {op.step})" if op is not None else "")
    shown = grid(schedule, fault=(op.step, rank) if op is not None else None)
    return ScheduleError(f"{where}: {message}\n{shown}")


def _check_order(schedule: Schedule, rank: int, ops: tuple[Op, ...]) -> None:
    """Ids count up, regions have the form that is asked of them, and waits stand wherever one demands it."""
    outstanding = Outstanding()
    for index, op in enumerate(ops):
        if op.id != index:
            raise _fault(schedule, rank, op, f"has id {op.id}; its place is {index}")
        if (wrong := _misused(schedule, rank, op)) is not None:
            raise _fault(schedule, rank, op, wrong)
        if isinstance(op, Wait):
            unknown = [post for post in op.posts if post not in outstanding]
            if unknown:
                raise _fault(schedule, rank, op, f"waits for op(s) {unknown}, which are not outstanding posts")
            for post in op.posts:
                outstanding.remove(post)
            continue
        reads = op.reads if isinstance(op, Compute) else (op.region,) if isinstance(op, Send) else ()
        writes = op.writes if isinstance(op, Compute) else (op.region,) if isinstance(op, Recv) else ()
        missing = outstanding.hazards(reads, writes)
        if missing:
            raise _fault(schedule, rank, op, f"touches a region of post(s) {list(missing)} without waiting for them")
        if isinstance(op, Send | Recv):
            outstanding.add(op)
    if outstanding:
        raise _fault(schedule, rank, None, f"ends with posts {sorted(outstanding)} that nothing waits for")


def _misused(schedule: Schedule, rank: int, op: Op) -> str | None:
    """What is wrong with an op's regions as such, or None."""
    if isinstance(op, Wait):
        return None
    written = op.writes if isinstance(op, Compute) else (op.region,) if isinstance(op, Recv) else ()
    if over := [region for region in written if _is_given(schedule, region)]:
        return f"writes over the caller's {over[0].buffer}"
    if isinstance(op, Compute):
        return misformed(schedule.job, rank, op)
    if not 0 <= op.peer < schedule.world_size:
        return f"names rank {op.peer} as its peer; there are {schedule.world_size}"
    if not op.region.dense:
        return f"moves {op.region.value}, which is not dense"
    limit = schedule.max_message_nbytes
    return f"moves {op.region.nbytes} B at once; at most {limit} are allowed" if op.region.nbytes > limit else None


class _Replay:
    """A greedy replay of all ranks in which every send is a rendezvous: where it comes to its end, every run does."""

    def __init__(self, schedule: Schedule, programs: dict[int, tuple[Op, ...]]) -> None:
        self._schedule = schedule
        self._places = {rank: Place(ops) for rank, ops in programs.items()}
        self._contents = Contents(schedule.job)
        self._sends: dict[tuple[int, int, int], deque[tuple[int, Send]]] = defaultdict(deque)
        self._recvs: dict[tuple[int, int, int], deque[tuple[int, Recv]]] = defaultdict(deque)

    def run(self) -> None:
        moving = True
        while moving:
            moving = sum(self._advance(rank) for rank in self._places) > 0
        for rank, place in self._places.items():
            if place.next < len(place.ops):
                op = place.ops[place.next]
                raise _fault(self._schedule, rank, op, f"waits for ever for op(s) {list(getattr(op, 'posts', ()))}: deadlock")
        if (wrong := self._contents.end()) is not None:
            raise _fault(self._schedule, wrong[0], None, wrong[1])

    def _advance(self, rank: int) -> bool:
        place, start = self._places[rank], self._places[rank].next
        while place.next < len(place.ops):
            op = place.ops[place.next]
            if isinstance(op, Wait):
                if not place.done.issuperset(op.posts):
                    break
            elif isinstance(op, Compute):
                _compute(self._schedule, rank, place, self._contents, op)
            else:
                self._post(rank, op)
            place.next += 1
        return place.next > start

    def _post(self, rank: int, op: Send | Recv) -> None:
        if isinstance(op, Send):
            _check_read(self._schedule, rank, self._places[rank], op, op.region)
            self._sends[rank, op.peer, op.tag].append((rank, op))
            key = (rank, op.peer, op.tag)
        else:
            self._recvs[op.peer, rank, op.tag].append((rank, op))
            key = (op.peer, rank, op.tag)
        if self._sends[key] and self._recvs[key]:
            source, send = self._sends[key].popleft()
            target, recv = self._recvs[key].popleft()
            _check_match(self._schedule, send, target, recv)
            self._places[source].done.add(send.id)
            self._places[target].done.add(recv.id)
            self._places[target].write(recv.region)


def _compute(schedule: Schedule, rank: int, place: Place, contents: Contents, op: Compute) -> None:
    for region in op.reads:
        _check_read(schedule, rank, place, op, region)
    if (wrong := contents.follow(rank, op)) is not None:
        raise _fault(schedule, rank, op, wrong)
    for region in op.writes:
        place.write(region)


def _check_read(schedule: Schedule, rank: int, place: Place, op: Op, region: Region) -> None:
    slot = region.buffer, region.slot
    if _is_given(schedule, region):
        found = None if _is_own(schedule, rank, region) else "the rank's own"
    else:
        if slot not in place.held and region.buffer == "token":
            place.write(region)
        found = place.stale(region)
    if found is not None:
        message = f"reads {region.value} version {region.version} from {slot[0]} slot {slot[1]}, which holds {found}"
        raise _fault(schedule, rank, op, message)


def _check_flow(schedule: Schedule, rank: int, ops: tuple[Op, ...]) -> None:
    """One rank by itself: what it receives is what the receive says, and all that it reads must be what the read says.

    What it attends and the partials that come home are in its output; what it folds into others' states is sent on.
    Nothing touches a receive's bytes before the wait for it, see `_check_order`: they are taken to be there at once.
    """
    place, contents = Place(ops), Contents(schedule.job)
    for op in ops:
        if isinstance(op, Compute):
            _compute(schedule, rank, place, contents, op)
        elif isinstance(op, Send):
            _check_read(schedule, rank, place, op, op.region)
            contents.leave(op)
        elif isinstance(op, Recv):
            if (wrong := contents.arrive(rank, op)) is not None:
                raise _fault(schedule, rank, op, wrong)
            place.write(op.region)
    if (ended := contents.end_of(rank)) is not None:
        raise _fault(schedule, rank, None, ended[1])
    if (wrong := contents.kept_by(rank)) is not None:
        raise _fault(schedule, rank, None, wrong)


def _is_given(schedule: Schedule, region: Region) -> bool:
    return region.slot == 0 and region.buffer in GIVEN[schedule.workload.pass_]


def _is_own(schedule: Schedule, rank: int, region: Region) -> bool:
    """Whether an input's region, which the caller fills, says what it is: the rank's own, whole or the part that it covers."""
    block = schedule.job.block(region.value)
    named = schedule.job.home(region.buffer, block) if block.rank == rank else None
    if named is None or region.version:
        return False
    if region.dtype == "uint8":
        (begin, end), (low, high) = region.extent, named.extent
        return low <= begin and end <= high
    return region == named


def _check_match(schedule: Schedule, send: Send, target: int, recv: Recv) -> None:
    sent, expected = ((r.value, r.version, r.nbytes) for r in (send.region, recv.region))
    if sent != expected:
        wanted, carried = (f"{value} version {version}, {nbytes} B" for value, version, nbytes in (expected, sent))
        message = f"expects {wanted}; the matching send carries {carried}"
        raise _fault(schedule, target, recv, message)


def _check_pairs(schedule: Schedule, programs: dict[int, tuple[Op, ...]]) -> None:
    """On every channel between two sampled ranks: the same messages, in the same order, on both sides."""
    channels: dict[tuple[int, int, int], tuple[list[Send], list[Recv]]] = defaultdict(lambda: ([], []))
    for rank, ops in programs.items():
        for op in ops:
            if isinstance(op, Send) and op.peer in programs:
                channels[rank, op.peer, op.tag][0].append(op)
            elif isinstance(op, Recv) and op.peer in programs:
                channels[op.peer, rank, op.tag][1].append(op)
    for (source, target, tag), (sends, recvs) in channels.items():
        for send, recv in zip(sends, recvs, strict=False):
            _check_match(schedule, send, target, recv)
        if len(sends) != len(recvs):
            message = f"sends {len(sends)} messages to rank {target} with tag {tag}, which expects {len(recvs)}"
            raise _fault(schedule, source, None, message)


def _check_coverage(schedule: Schedule, programs: dict[int, tuple[Op, ...]]) -> None:
    """Every required (sequence, query head, query, key) once: all queries of small workloads, sampled ones of large.

    Queries may be computed on any rank: where ranks are sampled, all programs are searched for the queries of these.
    """
    pass_ = schedule.workload.pass_
    for kernel in (("attend",) if pass_ != "backward" else ()) + (("attend_backward",) if pass_ != "forward" else ()):
        _check_coverage_by(schedule, programs, kernel)


def _check_coverage_by(schedule: Schedule, programs: dict[int, tuple[Op, ...]], kernel: str) -> None:
    job, work = schedule.job, schedule.workload
    covers = list(_covers(schedule, programs, kernel))
    owned = np.concatenate([job.q_partition.positions(rank) for rank in programs]) if programs else np.empty(0, np.int64)
    if len(owned) * max(work.kv_len, 1) > EXHAUSTIVE_PAIRS:
        owned = np.random.default_rng(0).choice(owned, min(SAMPLED_QUERIES, len(owned)), replace=False)
    owned.sort()
    for batch in _starts(work.batch, [cover.batch for cover in covers] + [run for run, _, _ in work.sequences()]):
        for head in _starts(work.heads, [cover.heads for cover in covers]):
            counts = np.zeros((len(owned), work.kv_len), np.int16)
            for cover in covers:
                if cover.batch[0] <= batch < cover.batch[1] and cover.heads[0] <= head < cover.heads[1]:
                    _count(counts, owned + work.q_offset, cover, work.kv_offset)
            _compare(schedule, counts, owned, batch, head)


def _covers(schedule: Schedule, programs: dict[int, tuple[Op, ...]], kernel: str) -> Iterator[Tile]:
    """The tiles over queries of the ranks in `programs`, wherever they are computed, with heads counted from the first of all."""
    job = schedule.job
    for rank in range(schedule.world_size):
        for op in programs.get(rank) or schedule.program(rank, whole=True):
            if not isinstance(op, Compute) or op.kernel != kernel:
                continue
            queries = job.block(op.reads[0].value)
            if queries.rank not in programs:
                continue
            _check_rows(schedule, rank, op)
            first, _ = job.q_heads(queries)
            for tile in op.tiles:
                yield replace(tile, heads=(tile.heads[0] + first, tile.heads[1] + first))


def _starts(size: int, ranges: list[tuple[int, int]]) -> list[int]:
    """One representative of each run of indices that all ranges treat alike."""
    return sorted({0, *(edge for pair in ranges for edge in pair)} & set(range(size)))


def _check_rows(schedule: Schedule, rank: int, op: Compute) -> None:
    """A tile's rows hold the tokens that its positions claim, k and v are of the same block, and heads go with heads."""
    job, work = schedule.job, schedule.workload
    queries, keys, values = (job.block(region.value) for region in op.reads[:3])
    if keys != values or queries.heads != keys.heads:
        raise _fault(schedule, rank, op, f"puts {op.reads[0].value}, {op.reads[1].value} and {op.reads[2].value} together")
    sides = (
        ("q", job.q_partition.positions(queries.rank)[slice(*queries.rows)], work.q_offset),
        ("k", job.kv_partition.positions(keys.rank)[slice(*keys.rows)], work.kv_offset),
    )
    (first, end), batch = job.q_heads(queries), work.batch
    for tile in op.tiles:
        if not (0 <= tile.heads[0] <= tile.heads[1] <= end - first and 0 <= tile.batch[0] <= tile.batch[1] <= batch):
            raise _fault(schedule, rank, op, f"a tile of heads {tile.heads} and sequences {tile.batch} goes beyond the block's")
        for name, positions, offset in sides:
            span = getattr(tile, name)
            if not np.array_equal(positions[span.row : span.row + span.count] + offset, span.positions()):
                raise _fault(
                    schedule, rank, op, f"a tile's {name} rows from {span.row} do not hold positions {span.start} .. {span.last}"
                )


def _count(counts: Counts, queries: IntArray, tile: Tile, kv_offset: int) -> None:
    q, k = tile.q, tile.k
    begin, end = tile.intervals()
    rows = np.searchsorted(queries, q.positions())
    for index, row in enumerate(rows):
        if row < len(queries) and queries[row] == q.start + q.step * index:
            first = k.start - kv_offset
            counts[row, first + k.step * begin[index] : first + k.step * end[index] : k.step] += 1


def _compare(schedule: Schedule, counts: Counts, owned: IntArray, batch: int, head: int) -> None:
    work = schedule.workload
    valid = next(((q, k) for (first, end), q, k in work.sequences() if first <= batch < end), (0, 0))
    required = work.mask.visible(owned + work.q_offset, work.kv_offset + np.arange(work.kv_len))
    required = required & (owned[:, None] < valid[0]) & (np.arange(work.kv_len) < valid[1])[None, :]
    wrong = np.argwhere(counts != required)
    if len(wrong):
        row, key = wrong[0]
        raise ScheduleError(
            f"sequence {batch}, head {head}: query {owned[row]} x key {key} is covered {counts[row, key]} times and "
            f"required {int(required[row, key])} times; {len(wrong)} such pairs\n{grid(schedule)}"
        )

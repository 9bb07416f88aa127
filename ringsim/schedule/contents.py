"""What kernels make: each gets regions of its form, and every attended block is once in the output of its queries."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations

from ..errors import ScheduleError
from .job import Block, Job
from .ops import Compute, Recv, Region, Send

INPUTS = ("q", "k", "v")
Regions = tuple[Region, ...]
Part = tuple[int, int]
"""An attend, or a receive from a rank that is not followed: its rank and id."""


def misformed(job: Job, rank: int, op: Compute) -> str | None:
    """What is wrong with the regions of a kernel, or None: which values it reads and writes, and where they lie in a slot.

    Kernels that are not known here are not judged.
    """
    try:
        expected = _expected(job, rank, op)
    except ScheduleError as error:
        return str(error)
    if expected is None or (op.reads, op.writes) == expected:
        return None
    pairs = zip((*op.reads, *op.writes), (*expected[0], *expected[1]), strict=False)
    found, wanted = next(((a, b) for a, b in pairs if a != b), (None, None))
    return f"gives {op.kernel} {_named(found)} in place of {_named(wanted)}"


def _expected(job: Job, rank: int, op: Compute) -> tuple[Regions, Regions] | None:
    """Reads and writes as they must be, given the values, versions and slots that they name."""
    if op.kernel == "pack":
        sources = tuple(_input(job, region) for region in op.reads)
        return sources, tuple(_input(job, t, s.value) for s, t in zip(sources, op.writes, strict=False))
    if op.kernel == "reset":
        return (), _state(job, op.writes, 0)
    if op.kernel == "attend":
        inputs = tuple(_input(job, region) for region in op.reads[:3])
        before, block = _state(job, op.reads[3:]), job.block(op.reads[0].value)
        if [region.buffer for region in inputs] != list(INPUTS) or _block(job, before) != block:
            raise ScheduleError(f"folds {', '.join(region.value for region in inputs)} into {_named(before[0])}")
        return (*inputs, *before), _state(job, before, before[0].version + 1)
    if op.kernel == "merge":
        mine, other = _state(job, op.reads[:3]), _state(job, op.reads[3:])
        if _block(job, mine) != _block(job, other) or mine[0].value == other[0].value:
            raise ScheduleError(f"merges {_named(other[0])} into {_named(mine[0])}")
        return (*mine, *other), _state(job, mine, mine[0].version + 1)
    if op.kernel == "finish":
        state = _state(job, op.reads)
        block = _block(job, state)
        if block.rank != rank:
            raise ScheduleError(f"makes the output of rank {block.rank}")
        return state, (job.home("out", block), job.home("lse", block))
    return None


def _input(job: Job, region: Region, value: str | None = None) -> Region:
    """A block of q, k or v as it lies in that slot."""
    value = value or region.value
    name, block = value.partition("[")[0], job.block(value)
    return job.copy(name, block, region.slot) if region.slot else job.home(name, block)


def _state(job: Job, regions: Regions, version: int | None = None) -> Regions:
    """The state whose first region is given, in its three parts; of another version, if one is given."""
    if not regions:
        raise ScheduleError("lacks a state")
    first = regions[0]
    name, _, at = first.value.partition("@")
    version = first.version if version is None else version
    packed, where = first.value.startswith("state"), int(at) if at else None
    return job.state(job.block(name), version, slot=first.slot, packed=packed, at=where)


def _block(job: Job, state: Regions) -> Block:
    return job.block(state[0].value.partition("@")[0])


def _named(region: Region | None) -> str:
    if region is None:
        return "nothing"
    shape = ",".join(map(str, region.sizes))
    return f"{region.value} version {region.version} ({region.dtype}[{shape}] in {region.buffer} slot {region.slot})"


class Contents:
    """Follows a replay: the attends that are folded into each version of each state, and what becomes of them.

    Of all ranks, or of one alone: then what it receives is trusted, a part of its own, and what it sends has gone home.
    A content is a set of parts of one block, one bit each.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._made: dict[tuple[str, int], int] = {}
        self._parts: dict[Block, dict[Part, int]] = defaultdict(dict)
        self._latest: dict[str, int] = {}
        self._arrived: set[Part] = set()
        self._finished: dict[Block, int] = {}
        self._sent: dict[Block, int] = defaultdict(int)

    def follow(self, rank: int, op: Compute) -> str | None:
        """Take an op, of the right form, into account; what is wrong with it, or None."""
        held = [self._made.get((region.value, region.version)) for region in op.reads]
        if op.kernel == "reset":
            return self._make(op, 0)
        if op.kernel == "attend":
            part = self._part(self._job.block(op.reads[0].value), (rank, op.id))
            return self._make(op, None if held[3] is None else held[3] | part)
        if op.kernel == "merge":
            mine, other = held[0], held[3]
            if mine is not None and other is not None and mine & other:
                return f"merges {op.reads[3].value}, part of which is in {op.reads[0].value} already"
            return self._make(op, None if mine is None or other is None else mine | other)
        if op.kernel == "finish":
            block = _block(self._job, op.reads)
            if block in self._finished and _size(block):
                return f"makes the output of {op.reads[0].value} a second time"
            self._finished[block] = held[0] or 0
        return None

    def arrive(self, rank: int, op: Recv) -> str | None:
        """A state comes from a rank that is not followed: taken for what it says, with all that was in it when it left."""
        value, version = op.region.value, op.region.version
        if not _is_state(value) or (value, version) in self._made:
            return None
        try:
            block = _block(self._job, (op.region,))
        except ScheduleError as error:
            return str(error)
        self._arrived.add((rank, op.id))
        part = self._part(block, (rank, op.id))
        self._made[value, version] = self._latest[value] = self._latest.get(value, 0) | part
        return None

    def leave(self, op: Send) -> None:
        """A state goes to a rank that is not followed."""
        if (made := self._made.get((op.region.value, op.region.version))) is not None:
            self._sent[_block(self._job, (op.region,))] |= made

    def _part(self, block: Block, part: Part) -> int:
        parts = self._parts[block]
        return 1 << parts.setdefault(part, len(parts))

    def _make(self, op: Compute, content: int | None) -> str | None:
        value, version = op.writes[0].value, op.writes[0].version
        if content is None:
            return f"makes {value} version {version} of a state that no kernel made"
        if self._made.setdefault((value, version), content) != content:
            return f"makes {value} version {version}, which is made elsewhere of other blocks"
        self._latest[value] = content
        return None

    def end(self) -> tuple[int, str] | None:
        """A rank and what is wrong with its output, or None: each of its rows and heads once, of all that was attended."""
        return next(filter(None, map(self.end_of, range(self._job.world_size))), None)

    def end_of(self, rank: int) -> tuple[int, str] | None:
        """The same of one rank."""
        for block, parts in self._parts.items():
            if block.rank == rank and (lost := _lacking(parts, self._finished.get(block, 0))):
                at, op = lost[0]
                name, does = self._job.value("q", block), "receives" if lost[0] in self._arrived else "attends"
                return rank, f"the output of {name} lacks what op {op} of rank {at} {does}, and {len(lost) - 1} more"
        whole = self._job.q_block(rank)
        blocks = [block for block in self._finished if block.rank == rank and _size(block)]
        if any(_common(a, b) for a, b in combinations(blocks, 2)) or sum(map(_size, blocks)) != _size(whole):
            return rank, "some rows and heads of its output are made twice, or never"
        return None

    def kept_by(self, rank: int) -> str | None:
        """What a rank that is followed alone folded into others' states, or received of them, and never sent on; or None."""
        for block, parts in self._parts.items():
            if block.rank != rank and (lost := _lacking(parts, self._sent[block])):
                name, does = self._job.value("q", block), "receives" if lost[0] in self._arrived else "attends"
                return f"never sends what op {lost[0][1]} {does} for {name}, and {len(lost) - 1} more"
        return None


def _is_state(value: str) -> bool:
    return value.partition("[")[0] in {"acc", "state"}


def _lacking(parts: dict[Part, int], content: int) -> list[Part]:
    return sorted(part for part, bit in parts.items() if not content >> bit & 1)


def _size(block: Block) -> int:
    return block.tokens * (block.heads[1] - block.heads[0])


def _common(a: Block, b: Block) -> bool:
    return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in zip(a[1:], b[1:], strict=True))

"""What kernels make: all that is attended is once in the output of its queries, and in the gradients of both its sides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import Final, NamedTuple

from ..errors import ScheduleError
from .forms import BACKWARD_INPUTS, GRADIENTS, INPUTS, block_of, is_running
from .job import Block, Job
from .ops import Compute, Recv, Region, Send

OUT: Final = "out"
Part = tuple[int, int]
"""An attend, or a receive from a rank that is not followed: its rank and id."""
Whose = tuple[str, int]
"""out, dq, dk or dv, and the rank whose it is."""


class _Made(NamedTuple):
    """A part's bit among those of one output, and the block that it is of."""

    bit: int
    block: Block


class Contents:
    """Follows a replay: the attends that are in each version of each state or sum, and what becomes of them.

    Of all ranks, or of one alone: then what it receives is trusted, a part of its own, and what it sends has gone home.
    A content is a set of parts of one output, one bit each.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._made: dict[tuple[str, int], int] = {}
        self._parts: dict[Whose, dict[Part, _Made]] = defaultdict(dict)
        self._latest: dict[str, int] = {}
        self._arrived: set[Part] = set()
        self._finished: dict[Whose, dict[Block, int]] = defaultdict(dict)
        self._sent: dict[Whose, int] = defaultdict(int)

    def follow(self, rank: int, op: Compute) -> str | None:
        """Take an op, of the right form, into account; what is wrong with it, or None."""
        kernel = op.kernel
        found: Iterable[str | None] = ()
        if kernel in {"reset", "clear"}:
            found = (self._make(region, 0) for region in op.writes[: 1 if kernel == "reset" else None])
        elif kernel in {"attend", "attend_backward"}:
            found = self._attend(rank, op)
        elif kernel in {"merge", "accumulate"}:
            found = self._merge(op)
        elif kernel in {"finish", "cast"}:
            found = (self._finish(*pair) for pair in zip(op.reads, op.writes[: 1 if kernel == "finish" else None], strict=False))
        return next(filter(None, found), None)

    def _held(self, region: Region) -> int | None:
        return self._made.get((region.value, region.version))

    def _attend(self, rank: int, op: Compute) -> Iterable[str | None]:
        """A part more, in the state of the queries, or in the sums of gradients of queries, keys and values."""
        before = op.reads[len(INPUTS) :][:1] if op.kernel == "attend" else op.reads[len(BACKWARD_INPUTS) :]
        for read, write in zip(before, op.writes, strict=False):
            held, part = self._held(read), self._part(read, (rank, op.id))
            yield self._make(write, None if held is None else held | part)

    def _merge(self, op: Compute) -> Iterable[str | None]:
        """A state's three parts are one, sums are one by one."""
        half = len(op.reads) // 2
        pairs = list(zip(op.reads[:half], op.reads[half:], op.writes, strict=True))
        for one, two, write in pairs[: 1 if op.kernel == "merge" else None]:
            mine, other = self._held(one), self._held(two)
            if mine is not None and other is not None and mine & other:
                yield f"merges {two.value}, part of which is in {one.value} already"
            yield self._make(write, None if mine is None or other is None else mine | other)

    def _finish(self, running: Region, output: Region) -> str | None:
        block = block_of(self._job, running)
        finished = self._finished[output.buffer, block.rank]
        if block in finished and _size(block):
            return f"makes the output of {running.value} a second time"
        finished[block] = self._held(running) or 0
        return None

    def arrive(self, rank: int, op: Recv) -> str | None:
        """A state comes from a rank that is not followed: taken for what it says, with all that was in it when it left."""
        value, version = op.region.value, op.region.version
        if not is_running(value) or (value, version) in self._made:
            return None
        try:
            part = self._part(op.region, (rank, op.id))
        except ScheduleError as error:
            return str(error)
        self._arrived.add((rank, op.id))
        self._made[value, version] = self._latest[value] = self._latest.get(value, 0) | part
        return None

    def leave(self, op: Send) -> None:
        """A state goes to a rank that is not followed."""
        if (made := self._held(op.region)) is not None:
            self._sent[self._whose(op.region)] |= made

    def _whose(self, region: Region) -> Whose:
        name = region.value.partition("[")[0]
        return name.removesuffix("_sum") if name.endswith("_sum") else OUT, block_of(self._job, region).rank

    def _part(self, region: Region, part: Part) -> int:
        parts = self._parts[self._whose(region)]
        return parts.setdefault(part, _Made(1 << len(parts), block_of(self._job, region))).bit

    def _make(self, region: Region, content: int | None) -> str | None:
        value, version = region.value, region.version
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
        pass_ = self._job.workload.pass_
        names = ((OUT,) if pass_ != "backward" else ()) + (GRADIENTS if pass_ != "forward" else ())
        wrong = next(filter(None, (self._end_of((name, rank)) for name in names)), None)
        return None if wrong is None else (rank, wrong)

    def _end_of(self, whose: Whose) -> str | None:
        name, rank = whose
        finished = {block: content for block, content in self._finished[whose].items() if _size(block)}
        lost = [(part, made.block) for part, made in sorted(self._parts[whose].items()) if _is_lost(made, finished)]
        if lost:
            (at, op), block = lost[0]
            what = f"the output of {self._job.value('q', block)}" if name == OUT else self._job.value(name, block)
            does = "receives" if lost[0][0] in self._arrived else "attends"
            return f"{what} lacks what op {op} of rank {at} {does}, and {len(lost) - 1} more"
        whole = self._job.kv_block(rank) if name in {"dk", "dv"} else self._job.q_block(rank)
        if any(_common(a, b) for a, b in combinations(finished, 2)) or sum(map(_size, finished)) != _size(whole):
            return f"some rows and heads of its {'output' if name == OUT else name} are made twice, or never"
        return None

    def kept_by(self, rank: int) -> str | None:
        """What a rank that is followed alone folded into others' states, or received of them, and never sent on; or None."""
        for whose, parts in self._parts.items():
            lost = sorted(part for part, made in parts.items() if not self._sent[whose] & made.bit)
            if whose[1] != rank and lost:
                name, does = self._job.value("q" if whose[0] == OUT else whose[0], parts[lost[0]].block), "attends"
                does = "receives" if lost[0] in self._arrived else does
                return f"never sends what op {lost[0][1]} {does} for {name}, and {len(lost) - 1} more"
        return None


def _is_lost(made: _Made, finished: dict[Block, int]) -> bool:
    """Whether a part is missing in what was made of its rows and heads."""
    contents = [content for block, content in finished.items() if _common(block, made.block)]
    return not contents or not all(content & made.bit for content in contents)


def _size(block: Block) -> int:
    return block.tokens * (block.heads[1] - block.heads[0])


def _common(a: Block, b: Block) -> bool:
    return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in zip(a[1:], b[1:], strict=True))

"""The form of each kernel's regions: which values it reads and writes, and where they lie in a slot."""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Final

from ..errors import ScheduleError
from .gradients import KV_SIDE, KV_SUMS, Q_SIDE, Q_SUMS
from .job import Block, Job
from .ops import Compute, Region

INPUTS: Final = ("q", "k", "v")
BACKWARD_INPUTS: Final = (Q_SIDE[0], *KV_SIDE, *Q_SIDE[1:])
GRADIENTS: Final = (*Q_SUMS, *KV_SUMS)
Regions = tuple[Region, ...]
Form = tuple[Regions, Regions]


def misformed(job: Job, rank: int, op: Compute) -> str | None:
    """What is wrong with the regions of a kernel, or None.

    Kernels that are not known here are not judged.
    """
    form = FORMS.get(op.kernel)
    if form is None:
        return None
    try:
        expected = form(job, rank, op)
    except ScheduleError as error:
        return str(error)
    if (op.reads, op.writes) == expected:
        return None
    pairs = chain(zip_longest(op.reads, expected[0]), zip_longest(op.writes, expected[1]))
    found, wanted = next((a, b) for a, b in pairs if a != b)
    return f"gives {op.kernel} {_named(found)} in place of {_named(wanted)}"


def _pack(job: Job, rank: int, op: Compute) -> Form:
    sources = tuple(_input(job, region) for region in op.reads)
    return sources, tuple(_input(job, t, s.value) for s, t in zip(sources, op.writes, strict=False))


def _reset(job: Job, rank: int, op: Compute) -> Form:
    return (), _state(job, op.writes, 0)


def _attend(job: Job, rank: int, op: Compute) -> Form:
    inputs = tuple(_input(job, region) for region in op.reads[:3])
    before, block = _state(job, op.reads[3:]), job.block(op.reads[0].value)
    if tuple(region.buffer for region in inputs) != INPUTS or block_of(job, before[0]) != block:
        raise ScheduleError(f"folds {', '.join(region.value for region in inputs)} into {_named(before[0])}")
    return (*inputs, *before), _state(job, before, before[0].version + 1)


def _merge(job: Job, rank: int, op: Compute) -> Form:
    mine, other = _state(job, op.reads[:3]), _state(job, op.reads[3:])
    if block_of(job, mine[0]) != block_of(job, other[0]) or mine[0].value == other[0].value:
        raise ScheduleError(f"merges {_named(other[0])} into {_named(mine[0])}")
    return (*mine, *other), _state(job, mine, mine[0].version + 1)


def _finish(job: Job, rank: int, op: Compute) -> Form:
    state = _state(job, op.reads)
    block = _own(job, rank, state[0])
    return state, (job.home("out", block), job.home("lse", block))


def _delta(job: Job, rank: int, op: Compute) -> Form:
    if not op.reads:
        raise ScheduleError("lacks an output")
    block = _own(job, rank, op.reads[0])
    return (job.home("out", block), job.home("dout", block)), (job.home("delta", block),)


def _clear(job: Job, rank: int, op: Compute) -> Form:
    return (), _sums(job, op.writes, 0)


def _attend_backward(job: Job, rank: int, op: Compute) -> Form:
    count = len(BACKWARD_INPUTS)
    inputs = tuple(_input(job, region) for region in op.reads[:count])
    queries, keys = _sums(job, op.reads[count : count + 1]), _sums(job, op.reads[count + 1 :])
    blocks = job.block(op.reads[0].value), job.block(op.reads[1].value)
    named = tuple(region.buffer for region in inputs) == BACKWARD_INPUTS
    sums = [region.buffer.removesuffix("_sum") for region in (*queries, *keys)]
    sides = [job.block(region.value) for region in inputs]
    same = set(sides[:1] + sides[3:]) == {blocks[0]} and sides[1] == sides[2]
    if not (named and same and tuple(sums) == GRADIENTS and (block_of(job, queries[0]), block_of(job, keys[0])) == blocks):
        raise ScheduleError(f"adds to {_named(queries[0])} and {_named(keys[0])} from {', '.join(r.value for r in inputs)}")
    after = (*_sums(job, queries, queries[0].version + 1), *_sums(job, keys, keys[0].version + 1))
    return (*inputs, *queries, *keys), after


def _accumulate(job: Job, rank: int, op: Compute) -> Form:
    half = len(op.reads) // 2
    mine = _sums(job, op.reads[:half])
    block = block_of(job, mine[0])
    other = _sums(job, op.reads[half:], within=block)
    part = block_of(job, other[0])
    inside = block.rows[0] <= part.rows[0] and part.rows[1] <= block.rows[1]
    if (part.rank, part.heads) != (block.rank, block.heads) or not inside or mine[0].value == other[0].value:
        raise ScheduleError(f"adds {_named(other[0])} to {_named(mine[0])}")
    return (*mine, *other), _sums(job, mine, mine[0].version + 1)


def _cast(job: Job, rank: int, op: Compute) -> Form:
    sums = _sums(job, op.reads)
    block = _own(job, rank, sums[0])
    return sums, tuple(job.home(region.buffer.removesuffix("_sum"), block) for region in sums)


FORMS: Final = {
    "pack": _pack,
    "reset": _reset,
    "attend": _attend,
    "merge": _merge,
    "finish": _finish,
    "delta": _delta,
    "clear": _clear,
    "attend_backward": _attend_backward,
    "accumulate": _accumulate,
    "cast": _cast,
}


def _own(job: Job, rank: int, region: Region) -> Block:
    block = block_of(job, region)
    if block.rank != rank:
        raise ScheduleError(f"makes the output of rank {block.rank}")
    return block


def _input(job: Job, region: Region, value: str | None = None) -> Region:
    """A block of q, k, v, dout, lse or delta as it lies in that slot."""
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


def _sums(job: Job, regions: Regions, version: int | None = None, *, within: Block | None = None) -> Regions:
    """The sums of these names, of the block and in the slot of the first; of another version, if one is given."""
    if not regions:
        raise ScheduleError("lacks a sum")
    first = regions[0]
    names = tuple(region.buffer.removesuffix("_sum") for region in regions)
    if not set(names) <= set(GRADIENTS):
        raise ScheduleError(f"takes {', '.join(region.buffer for region in regions)} for sums of gradients")
    version = first.version if version is None else version
    return job.sums(names, block_of(job, first), version, slot=first.slot, at=first.value.partition("@")[2], within=within)


def block_of(job: Job, region: Region) -> Block:
    """The block that a state or a sum is of, wherever its part was made. Raises ScheduleError."""
    return job.block(region.value.partition("@")[0])


def is_running(value: str) -> bool:
    """Whether it is a state or a sum."""
    name = value.partition("[")[0]
    return name in {"acc", "state"} or name.endswith("_sum")


def _named(region: Region | None) -> str:
    if region is None:
        return "nothing"
    shape = ",".join(map(str, region.sizes))
    return f"{region.value} version {region.version} ({region.dtype}[{shape}] in {region.buffer} slot {region.slot})"

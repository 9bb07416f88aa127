"""A schedule as text, one op a line, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ..errors import RingsimError, ScheduleError
from ..tile import Span, Tile
from ..workload import Workload
from .ops import Compute, Op, Recv, Region, Send, Wait
from .registry import find
from .schedule import FORMAT, Schedule

_REGION = re.compile(r"(\w+)@(\d+)(?:\+(\d+))?\[([\d,:/]*):(\w+)\]=(\S+)\.(\d+)")
_TILE = re.compile(r"b(\d+):(\d+)h(\d+):(\d+)q(\d+)\+(\d+)@(-?\d+)/(\d+)k(\d+)\+(\d+)@(-?\d+)/(\d+)lo(-?\d+|\*)hi(-?\d+|\*)")


def to_text(schedule: Schedule) -> str:
    """The canonical text: a header of inputs and digest, then each rank's ops."""
    lines = [f"ringsim schedule {FORMAT}", f"inputs {json.dumps(schedule.inputs(), sort_keys=True)}", f"digest {schedule.digest}"]
    for rank in range(schedule.world_size):
        lines.append(f"rank {rank}")
        lines.extend("  " + _op_text(op) for op in schedule.program(rank))
    return "\n".join(lines) + "\n"


def _op_text(op: Op) -> str:
    head = f"{op.id} {type(op).__name__.lower()} step={op.step} phase={op.phase}"
    if isinstance(op, Wait):
        return f"{head} posts={','.join(map(str, op.posts))}"
    if isinstance(op, Compute):
        reads, writes = (";".join(map(_region_text, regions)) or "-" for regions in (op.reads, op.writes))
        tiles = ";".join(map(_tile_text, op.tiles)) or "-"
        return f"{head} kernel={op.kernel} flops={op.flops} reads={reads} writes={writes} tiles={tiles}"
    return f"{head} peer={op.peer} tag={op.tag} group={op.group} region={_region_text(op.region)}"


def _region_text(region: Region) -> str:
    offset = f"+{region.offset}" if region.offset else ""
    ranges = [""] * len(region.shape) if region.box is None else [f"{begin}:{end}/" for begin, end in region.box]
    shape = ",".join(f"{range_}{size}" for range_, size in zip(ranges, region.shape, strict=True))
    return f"{region.buffer}@{region.slot}{offset}[{shape}:{region.dtype}]={region.value}.{region.version}"


def _tile_text(tile: Tile) -> str:
    bounds = ["*" if bound is None else str(bound) for bound in (tile.lo, tile.hi)]
    spans = [f"{span.row}+{span.count}@{span.start}/{span.step}" for span in (tile.q, tile.k)]
    return f"b{tile.batch[0]}:{tile.batch[1]}h{tile.heads[0]}:{tile.heads[1]}q{spans[0]}k{spans[1]}lo{bounds[0]}hi{bounds[1]}"


def from_text(text: str) -> Schedule:
    """The schedule that `to_text` wrote; one edited by hand must come without its digest line. Raises ScheduleError."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines or lines[0][1] != f"ringsim schedule {FORMAT}":
        raise ScheduleError(f"line 1: expected 'ringsim schedule {FORMAT}'")
    inputs: dict[str, Any] = {}
    digest = ""
    programs: list[list[Op]] = []
    for number, line in lines[1:]:
        word, _, rest = line.partition(" ")
        try:
            if word == "inputs":
                inputs = json.loads(rest)
            elif word == "digest":
                digest = rest
            elif word == "rank":
                if int(rest) != len(programs):
                    raise ValueError(f"expected rank {len(programs)}")
                programs.append([])
            else:
                programs[-1].append(_parse_op(line.split()))
        except (ValueError, KeyError, IndexError) as error:
            raise ScheduleError(f"line {number}: cannot read {line.strip()!r}: {error}") from None
    return _assemble(inputs, digest, programs)


def _assemble(inputs: dict[str, Any], digest: str, programs: list[list[Op]]) -> Schedule:
    try:
        if inputs["strategy_version"] != find(inputs["strategy"]).strategy.version:
            raise ScheduleError(
                f"written by version {inputs['strategy_version']} of strategy {inputs['strategy']!r}; this is another"
            )
        names = ("world_size", "partition", "strategy", "sync", "max_message_nbytes")
        given = tuple(tuple(ops) for ops in programs)
        if len(given) != inputs["world_size"]:
            raise ScheduleError(f"inputs name {inputs['world_size']} ranks; the text has {len(given)}")
        schedule = Schedule(
            workload=Workload.from_dict(inputs["workload"]), given=given, **{name: inputs[name] for name in names}
        )
    except (KeyError, TypeError) as error:
        raise ScheduleError(f"the inputs line is incomplete: {error!r}") from None
    except RingsimError as error:
        raise ScheduleError(str(error)) from error
    if digest and digest != schedule.digest:
        raise ScheduleError(f"the ops do not have digest {digest[:12]}...: if the edit is meant, delete the digest line")
    return schedule


def _parse_op(words: list[str]) -> Op:
    kind, fields = words[1], dict(word.split("=", 1) for word in words[2:])
    common: dict[str, Any] = {"id": int(words[0]), "step": int(fields["step"]), "phase": fields["phase"]}
    if kind == "wait":
        return Wait(**common, posts=tuple(int(post) for post in fields["posts"].split(",")))
    if kind == "compute":
        reads, writes = (tuple(map(_parse_region, _list(fields[name]))) for name in ("reads", "writes"))
        tiles = tuple(map(_parse_tile, _list(fields["tiles"])))
        return Compute(**common, kernel=fields["kernel"], flops=int(fields["flops"]), reads=reads, writes=writes, tiles=tiles)
    if kind not in ("send", "recv"):
        raise ValueError(f"unknown op {kind!r}")
    region, post = _parse_region(fields["region"]), Send if kind == "send" else Recv
    return post(**common, peer=int(fields["peer"]), tag=int(fields["tag"]), group=fields["group"], region=region)


def _list(text: str) -> Iterator[str]:
    return iter(() if text == "-" else text.split(";"))


def _parse_region(text: str) -> Region:
    match = _REGION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no region")
    buffer, slot, offset, shape, dtype, value, version = match.groups()
    axes = [axis.rpartition("/") for axis in shape.split(",") if axis]
    ranges = [tuple(map(int, range_.split(":"))) for range_, slash, _ in axes if slash]
    if len(ranges) not in (0, len(axes)) or any(len(range_) != 2 for range_ in ranges):
        raise ValueError(f"{text!r} is no region")
    return Region(
        buffer=buffer,
        slot=int(slot),
        shape=tuple(int(size) for _, _, size in axes),
        dtype=dtype,
        value=value,
        version=int(version),
        offset=int(offset or 0),
        box=tuple((begin, end) for begin, end in ranges) or None,
    )


def _parse_tile(text: str) -> Tile:
    match = _TILE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no tile")
    *numbers, lo, hi = match.groups()
    b0, b1, h0, h1, *spans = map(int, numbers)
    q, k = (Span(row=s[0], count=s[1], start=s[2], step=s[3]) for s in (spans[:4], spans[4:]))
    bounds = [None if bound == "*" else int(bound) for bound in (lo, hi)]
    return Tile(batch=(b0, b1), heads=(h0, h1), q=q, k=k, lo=bounds[0], hi=bounds[1])

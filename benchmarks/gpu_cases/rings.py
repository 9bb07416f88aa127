"""Rings of ranks of one process on the card: their schedules, inputs and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ringsim import inputs
from ringsim.backends.cuda import Calls
from ringsim.backends.cuda_tiles import Tiles
from ringsim.backends.cupy import CupyBackend
from ringsim.backends.device_link import DeviceLink
from ringsim.execution import Backend, Together
from ringsim.mask import mask_named
from ringsim.schedule import Compute, Schedule
from ringsim.schedule.job import GIVEN, TAKEN
from ringsim.schedule.ops import Op, Recv, Region, Send, Wait
from ringsim.tile import Tile
from ringsim.workload import Workload

from . import card as cards
from . import float64
from .bench import Bench
from .card import Card
from .watched import POISON

PATIENCE_S = 60.0


def workload(ring: cards.Ring, mask: str, dtype: str, pass_: str = "forward") -> Workload:
    """A ring's attention."""
    return Workload(
        q_len=ring.tokens,
        heads=ring.heads,
        kv_heads=ring.kv_heads,
        head_dim=ring.head_dim,
        dtype=dtype,
        mask=mask_named(mask),
        pass_=pass_,
    )


def together(
    bench: Bench,
    schedule: Schedule,
    *,
    calls: Calls | None = None,
    link: Calls | None = None,
    tiles: Sequence[Sequence[Tiles]] | None = None,
    backend: type[CupyBackend] = CupyBackend,
    beside: Together | None = None,
) -> Together:
    """The ranks of a schedule, each with a backend (that of `beside`, if given), and a link that copies within the card.

    `tiles` are each rank's, by default those that the bench keeps; `link` are the calls that messages are copied by.
    """
    watched, ranks = calls or bench.card.calls, range(schedule.world_size)
    if beside is None:
        fused = bench.tiles(schedule.world_size) if tiles is None else tiles
        made: list[Backend] = [backend(watched, fused[rank]) for rank in ranks]
    else:
        made = [rank.backend for rank in beside.ranks]
    return Together(schedule, made, link=DeviceLink(link or watched), patience_s=PATIENCE_S, beside=beside)


def given(work: Workload, seed: int) -> dict[str, np.ndarray]:
    """Global arrays of what the pass is given: q, k, v and dout, all of `ringsim.inputs`."""
    lengths = {"q": work.q_len, "k": work.kv_len, "v": work.kv_len, "dout": work.q_len}
    return {name: inputs.rows(work, name, np.arange(lengths[name]), seed) for name in GIVEN[work.pass_]}


def drawn(card: Card, group: Together, seed: int) -> list[dict[str, Any]]:
    """Random shards made on the card, and room for what is made: where nobody needs the global arrays."""
    held = []
    for number, rank in enumerate(group.ranks):
        shapes, dtype = rank.shapes(), group.schedule.workload.dtype
        names = GIVEN[group.schedule.workload.pass_]
        mine = {name: card.normal(shapes[name], dtype, seed + 64 * number + at) for at, name in enumerate(names)}
        held.append(mine | group.room(number))
    return held


def answer(card: Card, work: Workload, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """out, lse and, where dout is given, dq, dk and dv in float64."""
    xp = card.xp
    exact = {name: card.exact(card.upload(array)) for name, array in arrays.items()}
    seen = float64.seen_of(work)
    out, lse = float64.attend(xp, exact["q"], exact["k"], exact["v"], seen, work.softmax_scale)
    found = {"out": out, "lse": lse}
    if "dout" in exact:
        delta = float64.delta_of(xp, out, exact["dout"])
        of = (exact["q"], exact["k"], exact["v"], exact["dout"], lse, delta, seen, work.softmax_scale)
        found |= float64.backward(xp, *of)._asdict()
    return found


def poison(group: Together) -> None:
    """Fill every slot that the plan owns with NaN, receive slots first of all: a right answer rests on none of it."""
    pass_ = group.schedule.workload.pass_
    for number, rank in enumerate(group.ranks):
        backend: Any = rank.backend
        stream = backend.calls.caller(None)
        owned = {key: nbytes for key, nbytes in group.schedule.buffers(number).items() if not _callers(key, pass_)}
        for (buffer, slot), nbytes in owned.items():
            region = Region(buffer=buffer, slot=slot, shape=(nbytes,), dtype="uint8", value="")
            backend.calls.fill(rank.memory.bytes(region), POISON, stream)
        backend.calls.synchronize(backend.calls.record(stream))


def _callers(key: tuple[str, int], pass_: str) -> bool:
    return key[1] == 0 and key[0] in GIVEN[pass_] + TAKEN[pass_]


def computed_alone(schedule: Schedule) -> Schedule:
    """The same kernels on the same regions, without a message: what a ring's work takes by itself."""
    programs = tuple(
        tuple(op for op in schedule.program(rank) if not isinstance(op, Send | Recv | Wait))
        for rank in range(schedule.world_size)
    )
    return replace(schedule, given=programs)


def keys_in_blocks(schedule: Schedule, blocks: int) -> Schedule:
    """A world of one whose keys come in `blocks` blocks: each attend and attend_backward op, cut by keys into as many ops.

    Each goes through the backend as a step of a ring does; no message comes in between.
    """
    made: list[Op] = []
    for op in schedule.program(0):
        if not isinstance(op, Compute) or op.kernel not in ("attend", "attend_backward"):
            made.append(op)
            continue
        for block in range(blocks):
            tiles = tuple(_cut(tile, block, blocks) for tile in op.tiles)
            flops = 0 if not op.flops else schedule.job.flops(tiles, backward=op.kernel == "attend_backward")
            made.append(replace(op, tiles=tuple(tile for tile in tiles if tile.pairs()), flops=flops))
    return replace(schedule, given=(tuple(replace(op, id=number) for number, op in enumerate(made)),))


def _cut(tile: Tile, block: int, blocks: int) -> Tile:
    begin, end = (tile.k.count * number // blocks for number in (block, block + 1))
    return replace(tile, k=tile.k.part(begin, end))


def flops_of(schedule: Schedule) -> int:
    """Multiply-adds counted as two, of all ranks, as `Job.flops` counts them."""
    job, total = schedule.job, 0
    for rank in range(schedule.world_size):
        for op in schedule.program(rank):
            if isinstance(op, Compute) and op.kernel in ("attend", "attend_backward"):
                total += job.flops(op.tiles, backward=op.kernel == "attend_backward")
    return total

"""What memory a workload takes on a machine, as tables: the ring next to one device that does it all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .capacity import Demand, demands, longest_alone, longest_ring, lowering_of, one_length, tightest
from .footprint import CLASSES, FeedForward, Footprint, Layers, weigh_blockwise, weigh_dense
from .report import workload_line
from .schedule import Schedule
from .topology import Topology
from .units import format_size
from .workload import MOST, Workload

WORDS: Final = {"forward": "forward", "backward": "backward", "both": "forward and backward"}


def scope(schedule: Schedule, layers: Layers | None = None) -> str:
    """What the bytes are of."""
    what = f"one layer's attention {WORDS[schedule.workload.pass_]}: no weights, "
    if layers is None or layers.count == 1:
        return what + "no other layers"
    others = f"the other {layers.count - 1} layers" if layers.count > 2 else "the other layer"
    return f"{what}of {others} what is {'computed again from' if layers.recompute else 'kept'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One machine's: the demand on its tightest device, what each method holds, and the longest context of each.

    `longest` counts tokens, in whole K; None where the machine does not say what memory its devices have, or mask or
    partition are of one length. `priced`: whether the
    device has figures for the workload, without which a CPU's scratch is unknown.
    """

    machine: str
    schedule: Schedule
    demand: Demand
    footprints: tuple[Footprint, ...]
    longest: dict[str, int | None]
    window: int | None
    feed_forward: FeedForward | None
    layers: Layers | None
    priced: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "machine": self.machine,
            "schedule": self.schedule.inputs(),
            "tightest": self.demand.to_dict(),
            "footprints": [found.to_dict() for found in self.footprints],
            "longest_context_tokens": self.longest,
            "window": self.window,
            "feed_forward": None if self.feed_forward is None else asdict(self.feed_forward),
            "layers": None if self.layers is None else asdict(self.layers),
            "scratch_known": self.priced,
        }


def account(
    schedule: Schedule,
    topology: Topology,
    *,
    window: int | None = None,
    feed_forward: FeedForward | None = None,
    layers: Layers | None = None,
    reserve_nbytes: float = 0.0,
) -> Account:
    """Weigh `schedule` on `topology`: its fullest rank, against blockwise, sliding-window and dense attention on one device.

    Raises TopologyError if the machine has no room for the ranks, WorkloadError.
    """
    around: dict[str, Any] = {"feed_forward": feed_forward, "layers": layers}
    demand = tightest(demands(schedule, topology, **around, reserve_nbytes=reserve_nbytes))
    work = schedule.workload
    lowering: dict[str, Any] = {**lowering_of(topology, work, demand.kind)}
    alone: dict[str, Callable[[Workload], Footprint]] = {
        "blockwise": partial(weigh_blockwise, **lowering, **around),
        "window": partial(weigh_blockwise, window=window, **lowering, **around),
        "dense": partial(weigh_dense, **around),
    }
    if window is None:
        del alone["window"]
    ring = demand.fullest
    if ring.method in alone:
        ring = replace(ring, method=f"{ring.method}, block by block")
    room = None if one_length(schedule) else demand.room_nbytes
    most = longest_ring(schedule, topology, **around, reserve_nbytes=reserve_nbytes)
    lengths = {name: None if room is None else longest_alone(made, work, room) for name, made in alone.items()}
    footprints = (ring, *(replace(made(work), method=name) for name, made in alone.items()))
    return Account(
        machine=topology.name,
        schedule=schedule,
        demand=demand,
        footprints=footprints,
        longest={ring.method: most} | lengths,
        window=window,
        feed_forward=feed_forward,
        layers=layers,
        priced=bool(lowering) or topology.spec.devices[demand.kind].kind == "gpu",
    )


def tokens(count: int | None) -> str:
    """``34K``, ``3.5M``, ``unknown``, or ``no limit`` for all that a workload may have."""
    if count is None or count >= MOST:
        return "unknown" if count is None else "no limit"
    for power, prefix in ((30, "G"), (20, "M")):
        if count >= 2**power:
            return f"{count / 2**power:,.4g}{prefix}"
    return f"{count // 2**10}K" if count else "none"


def _has(demand: Demand) -> str:
    """The memory of a device, and what is reserved of it."""
    if demand.memory_nbytes is None:
        return "unknown"
    reserved = f", {format_size(demand.reserve_nbytes)} reserved" if demand.reserve_nbytes else ""
    return f"{format_size(demand.memory_nbytes)}{reserved}"


def _fits(demand: Demand, nbytes: float) -> str:
    room = demand.room_nbytes
    if room is None:
        return "unknown"
    return "NO" if nbytes > room else f"yes, {nbytes / room:.0%}" if room else "yes"


def sentence(schedule: Schedule, demand: Demand, longest: int | None = None) -> str:
    """Whether a workload fits, in a line."""
    of = scope(schedule)
    who = f"{len(demand.ranks)} ranks on it need" if len(demand.ranks) > 1 else "its rank needs"
    if demand.memory_nbytes is None:
        return f"memory: {who} {format_size(demand.nbytes)} of {demand.device}; the machine has no `memory` for {demand.kind}"
    held = f"{format_size(demand.nbytes)} of {demand.device}'s {_has(demand)}"
    if demand.fits:
        return f"memory: {who} {held}, {demand.nbytes / demand.memory_nbytes:.1%} ({of})"
    return f"DOES NOT FIT: {who} {held}; the longest context that fits: {tokens(longest)} ({of})"


def table(found: Account) -> RenderableType:
    """Bytes by class, a column a method, of one machine."""
    demand = found.demand
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    grid.add_column("bytes on a device")
    ring, *others = found.footprints
    grid.add_column(f"{ring.method}, rank {ring.rank} of {found.schedule.world_size}", justify="right")
    for other in others:
        grid.add_column(other.method, justify="right")
    for name in CLASSES:
        row = [footprint.classes.get(name) for footprint in found.footprints]
        if any(row):
            grid.add_row(name, *(format_size(nbytes) if nbytes else "-" for nbytes in row))
    if not found.priced:
        grid.add_row("scratch", *("unknown" for _ in found.footprints))
    grid.add_row("peak", *(format_size(footprint.nbytes) for footprint in found.footprints))
    needs = [demand.nbytes, *(other.nbytes for other in others)]
    if len(demand.ranks) > 1:
        grid.add_row(f"{len(demand.ranks)} ranks on it", format_size(demand.nbytes), *("-" for _ in others))
    grid.add_row("fits", *(_fits(demand, nbytes) for nbytes in needs))
    grid.add_row("longest context", *(tokens(found.longest[footprint.method]) for footprint in found.footprints))
    head = f"memory on {found.machine}, tightest device {demand.device}: {_has(demand)}\n{workload_line(found.schedule)}\n"
    notes = [f"\n{scope(found.schedule, found.layers)}"]
    if not found.priced:
        notes.append(f"scratch is unknown: {demand.kind} has no attention figures for this dtype and head_dim")
    return Group(Text(head), grid, Text("\n".join(notes)))


def summary(accounts: Sequence[Account]) -> RenderableType:
    """A line a machine: what the ring needs of a device, and the longest context of each method."""
    grid = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    methods = [footprint.method for footprint in accounts[0].footprints]
    for name in ("machine", "ranks", "memory", "needed", "fits", *(f"longest, {method}" for method in methods)):
        grid.add_column(name, justify="left" if name == "machine" else "right", no_wrap=name == "machine", overflow="fold")
    for found in accounts:
        demand = found.demand
        facts = (str(found.schedule.world_size), _has(demand), format_size(demand.nbytes), _fits(demand, demand.nbytes))
        grid.add_row(found.machine, *facts, *(tokens(found.longest[method]) for method in methods))
    return Group(
        Text(f"{workload_line(accounts[0].schedule, ranks=False)}\n"),
        grid,
        Text(f"\n{scope(accounts[0].schedule, accounts[0].layers)}"),
    )

"""Options that several commands share, and the workload that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from .. import topology, units, workload_file
from ..dtypes import ALIASES, ATTENTION
from ..errors import RingsimError, WorkloadError
from ..mask import both, mask_named
from ..partition import WEIGHTED
from ..schedule import Schedule
from ..schedule.schedule import SYNCS
from ..shares import even_out
from ..topology.spec import ORDERS
from ..workload import PASSES, Workload

Command = Callable[..., Any]
BY_MACHINE: Final = {f"{kind}(machine)": kind for kind in WEIGHTED}


class Quantity(click.ParamType):  # type: ignore[type-arg]
    """A value that `read` makes of a text, or says what is wrong with it."""

    def __init__(self, name: str, kind: type, read: Callable[[str], Any]) -> None:
        self.name = name
        self._kind = kind
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What is read already stays as it is."""
        if isinstance(value, self._kind):
            return value
        try:
            return self._read(value)
        except RingsimError as error:
            self.fail(str(error), param, ctx)


TOKENS = Quantity("TOKENS", int, units.parse_tokens)
SIZE = Quantity("SIZE", float, partial(units.parse, dimension="size"))
RANKS = click.option("--ranks", type=click.IntRange(1), help="Ranks in the ring. [default: as many as the machine has room for]")
SHAPE = (
    click.option("--batch", type=int, default=1, show_default=True, help="Sequences."),
    click.option("--heads", type=int, default=8, show_default=True, help="Query heads."),
    click.option("--kv-heads", type=int, help="Key/value heads. [default: as --heads]"),
    click.option("--head-dim", type=int, default=64, show_default=True, help="Width of a query or key head."),
    click.option("--v-head-dim", type=int, help="Width of a value head. [default: as --head-dim]"),
    click.option(
        "--dtype", type=click.Choice([*ATTENTION, *ALIASES]), default="float32", show_default=True, help="Of q, k and v."
    ),
)
MASK = (
    click.option("--causal/--full", default=False, help="Mask. [default: full]"),
    click.option(
        "--mask", metavar="TEXT", help="A mask besides, such as 'window(4K)' or 'documents(1K, 3x512)'; see docs/masks.md."
    ),
)
PARTITION = click.option(
    "--partition",
    metavar="TEXT",
    default="contiguous",
    show_default=True,
    help="Which tokens a rank holds: contiguous, striped, zigzag, balanced, 'zigzag(3,1,1)' by weight or 'zigzag(machine)' by "
    "what its devices do; see docs/partitions.md.",
)
STRATEGY = click.option(
    "--strategy",
    metavar="TEXT",
    default="ring",
    show_default=True,
    help="What travels, such as ring, q-ring or 'double-ring(8)'; `ringsim strategies` lists them.",
)
PASS = click.option(
    "--pass",
    "pass_",
    type=click.Choice(PASSES),
    default="forward",
    show_default=True,
    help="Which pass; both: the backward one follows at once.",
)
WORKLOAD = (
    click.option(
        "--workload", "workload_path", type=click.Path(path_type=Path), metavar="FILE", help="YAML with these options as keys."
    ),
    click.option("--seq", type=TOKENS, help="Sequence length in tokens; K = 1024, M = 1024 x 1024."),
    click.option("--kv-seq", type=TOKENS, help="Keys, if not as many as queries."),
    click.option("--q-offset", type=int, help="Position of the first query among the keys (cached context). [default: 0]"),
    *SHAPE,
    *MASK,
    click.option("--softmax-scale", type=float, help="Factor of the scores. [default: head_dim ** -0.5]"),
    PARTITION,
    STRATEGY,
    PASS,
    click.option("--sync", type=click.Choice(SYNCS), default="free", show_default=True, help="step: a barrier between rounds."),
)
RUNS = (
    click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="Runs measured."),
    click.option("--warmup", type=click.IntRange(0), default=1, show_default=True, help="Runs before them."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of the unit-normal inputs."),
    click.option(
        "--timeout",
        type=click.FloatRange(0, min_open=True),
        default=300.0,
        show_default=True,
        help="Seconds that a wait may last.",
    ),
)
MACHINE = (
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change a figure or a count of the machine, e.g. nodes=4 or links.ndr.latency=2us; repeatable.",
    ),
    click.option("--place", metavar="ORDER", help="Ranks on devices: block, round-robin, snake, or a list such as 0,2,1,3."),
    click.option("--transport", metavar="NAME", help="The MPI or NCCL stack, where the machine names several."),
)
OUTPUT = (
    click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON."),
    click.option(
        "--trace", "trace_path", type=click.Path(path_type=Path), metavar="FILE", help="Write a Chrome trace, for Perfetto."
    ),
)


def with_options(*groups: tuple[Callable[[Command], Command], ...]) -> Callable[[Command], Command]:
    """Add groups of options to a command, in their order."""

    def add(command: Command) -> Command:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def machine(ctx: click.Context, name: str, transport: str | None = None) -> topology.Topology:
    """The machine of a command, with its --set, --place and --transport, or this transport. Raises TopologyError."""
    given = ctx.params
    place = given["place"]
    if place is not None and place not in ORDERS:
        place = [int(word) if word.strip().isdecimal() else word.strip() for word in place.split(",")]
    return topology.load(name, given["settings"], place=place, transport=transport or given["transport"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A workload and how it is to be cut; `source`, the file that says so, if there is one."""

    workload: Workload
    partition: str
    strategy: str
    sync: str
    source: Path | None = None

    def schedule(self, world_size: int, on: topology.Topology | None = None) -> Schedule:
        """The schedule on `world_size` ranks, whose partition ``zigzag(machine)`` asks for the machine.

        Raises WorkloadError, and TopologyError where the machine has no place for the ranks.
        """
        if on is not None:
            on.place(world_size)
        kind = BY_MACHINE.get(self.partition.replace(" ", ""))
        try:
            if kind is not None and on is None:
                raise WorkloadError(f"partition {self.partition!r}: this command knows no machine; give the weights as numbers")
            made = Schedule(
                workload=self.workload,
                world_size=world_size,
                partition=kind or self.partition,
                strategy=self.strategy,
                sync=self.sync,
            )
        except WorkloadError as error:
            raise WorkloadError(f"{self.source}: {error}" if self.source else str(error)) from None
        return made if kind is None or on is None else replace(made, partition=even_out(made, on).partition)


def shape(values: dict[str, Any]) -> dict[str, Any]:
    """What SHAPE, MASK and PASS say of a workload."""
    known = {name: values[name] for name in ("batch", "heads", "kv_heads", "head_dim", "v_head_dim", "dtype", "pass_")}
    masks = [mask_named(text) for text in ("causal" if values["causal"] else "full", values["mask"]) if text is not None]
    return known | {"mask": both(*masks)}


def plan(ctx: click.Context) -> Plan:
    """The workload of a command: its options, over those of --workload FILE. Raises WorkloadError, click.UsageError."""
    values = dict(ctx.params)
    path = values.get("workload_path")
    if path is not None:
        for name, value in workload_file.load(path).items():
            if ctx.get_parameter_source(name) in (ParameterSource.DEFAULT, None):
                values[name] = value
    if values["seq"] is None:
        raise click.UsageError("how long is the sequence? Give --seq, e.g. --seq 8K", ctx)
    try:
        workload = Workload(
            q_len=values["seq"],
            kv_len=values["kv_seq"],
            q_offset=values["q_offset"] or 0,
            softmax_scale=values["softmax_scale"],
            **shape(values),
        )
    except WorkloadError as error:
        raise WorkloadError(f"{path}: {error}" if path else str(error)) from None
    cut = {name: values[name] for name in ("partition", "strategy", "sync")}
    return Plan(workload=workload, source=path, **cut)

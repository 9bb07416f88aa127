"""Commands about topologies: list, show, check, graph, diff, schema, fit, import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .. import files, inventory, segments, topology
from ..errors import RingsimError, TopologyError
from ..topology.schema import schema as topology_schema
from .importing import import_
from .options import MACHINE, machine, with_options
from .session import check_outputs, console, write_outputs

OUTPUT = click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON.")
RANKS = click.option("--ranks", type=click.IntRange(1), help="Ranks in the ring. [default: as many as the machine has room for]")


class Pair(click.ParamType):  # type: ignore[type-arg]
    """Two ranks, A:B."""

    name = "A:B"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """``7:8`` is (7, 8)."""
        if isinstance(value, tuple):
            return value
        one, colon, other = value.partition(":")
        if not (colon and one.isdecimal() and other.isdecimal()):
            self.fail(f"{value!r} is no pair of ranks such as 7:8", param, ctx)
        return int(one), int(other)


@click.group()
def topologies() -> None:
    """Machines in YAML: what ringsim ships, and what a file comes to."""


topologies.add_command(import_)


@topologies.command(name="list")
def list_() -> None:
    """The machines that ringsim ships."""
    out = console()
    width = max(map(len, topology.names()))
    for name in topology.names():
        out.print(f"{name:<{width}} {len(topology.load(name).slots):>6} ranks   {topology.about(name)}")


@topologies.command()
@click.argument("name", metavar="MACHINE")
@RANKS
@click.option("--route", type=Pair(), help="Also the wires between two ranks and their bottleneck.")
@click.option("--each", is_flag=True, help="Every shared resource on a line of its own.")
@click.option("--sources", is_flag=True, help="Also every figure with its source.")
@OUTPUT
@with_options(MACHINE)
@click.pass_context
def show(
    ctx: click.Context,
    /,
    name: str,
    ranks: int | None,
    route: tuple[int, int] | None,
    each: bool,
    sources: bool,
    json_path: Path | None,
    **_: Any,
) -> None:
    """Print what MACHINE comes to: devices, shared resources, and what bounds each hop of a flat ring."""
    check_outputs(json_path)
    made = machine(ctx, name)
    world_size = ranks or len(made.slots)
    out = console()
    out.print(inventory.portrait(made, world_size, each=each))
    if route is not None:
        out.print()
        out.print(inventory.route(made, world_size, *route))
    if sources:
        out.print()
        out.print(inventory.sources(made))
    write_outputs(json_path, None, inventory.to_dict(made, world_size), {})


@topologies.command()
@click.argument("names", metavar="MACHINE...", nargs=-1, required=True)
@with_options(MACHINE)
@click.pass_context
def check(ctx: click.Context, /, names: tuple[str, ...], **_: Any) -> int:
    """Say of each MACHINE, with each of its transports, that it is valid, or what is wrong and where; exit 2 if any is."""
    wrong = 0
    for name in names:
        try:
            made = machine(ctx, name)
            for transport in made.spec.transports if ctx.params["transport"] is None else ():
                machine(ctx, name, transport)
        except RingsimError as error:
            wrong += 1
            click.echo(f"{error}", err=True)
        else:
            click.echo(f"{name}: valid: {made.name}, {len(made.devices)} devices, {len(made.slots)} ranks")
    return 2 if wrong else 0


@topologies.command()
@click.argument("name", metavar="MACHINE")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="A .png or .svg file.")
@with_options(MACHINE)
@click.pass_context
def graph(ctx: click.Context, /, name: str, output: Path, **_: Any) -> None:
    """Draw MACHINE: devices, NICs, switches, and the wires between them by link."""
    from ..drawing import draw

    check_outputs(output)
    draw(machine(ctx, name), output)
    console().print(f"wrote {output}")


@topologies.command()
@click.argument("one", metavar="MACHINE")
@click.argument("other", metavar="[OTHER]", required=False)
@with_options(MACHINE)
@click.pass_context
def diff(ctx: click.Context, /, one: str, other: str | None, **_: Any) -> None:
    """What OTHER has otherwise than MACHINE; --set, --place and --transport apply to OTHER, by default MACHINE itself."""
    console().print(inventory.difference(topology.load(one), machine(ctx, other or one)))


@topologies.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it here, not to the terminal.")
def schema(output: Path | None) -> None:
    """The format as a JSON Schema, for editors."""
    text = json.dumps(topology_schema(), indent=1) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write_text(output, text)


@topologies.command()
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--segments", "count", type=click.IntRange(1, 8), default=3, show_default=True, help="Regimes at most.")
@OUTPUT
def fit(path: Path, count: int, json_path: Path | None) -> None:
    """Regimes of a link or transport from the output of osu_latency, ready to paste."""
    check_outputs(json_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path}: cannot be read: {error}") from error
    points = segments.read_osu(text, str(path))
    fitted = segments.fit(points, count)
    regimes = segments.to_regimes(fitted)
    missed = segments.mean_error(fitted, points)
    click.echo("regimes:")
    for regime in regimes:
        click.echo("  - {" + ", ".join(f"{key}: {value}" for key, value in regime.items()) + "}")
    click.echo(f"# mean error {missed:.1%} over {len(points)} sizes of {path.name}")
    write_outputs(json_path, None, {"regimes": regimes, "mean_error": missed, "points": points}, {})

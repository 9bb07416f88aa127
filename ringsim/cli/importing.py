"""`ringsim topologies import`: what a machine says about itself, as YAML."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .. import files, importing
from ..errors import TopologyError
from .session import check_outputs, console, leader


@click.command(name="import")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Write it here, not to the terminal.")
@click.option("--name", metavar="NAME", help="The machine's name. [default: the host's, or the file's]")
@click.option("--format", "format_", type=click.Choice(importing.FORMATS), help="What FILE is. [default: what its content shows]")
@click.option(
    "--nvlink",
    type=click.Choice(("switch", "mesh")),
    help="Equal NVLinks between all GPUs of an nvidia-smi matrix: one or the other.",
)
@click.option("--nics", metavar="NAME,...", help="Keep these NICs only. [default: all]")
def import_(path: Path, output: Path | None, name: str | None, format_: str | None, nvlink: str | None, nics: str | None) -> None:
    """A topology from FILE (- is standard input): `nvidia-smi topo -m`, NCCL_TOPO_DUMP_FILE, or `lstopo FILE.xml`.

    Wires are filled in; figures that FILE does not say are `unknown`.
    """
    check_outputs(output)
    if output is not None and output.exists() and path.exists() and output.samefile(path):
        raise TopologyError(f"{output}: -o names the file that is imported")
    keep = None if nics is None else [word.strip() for word in nics.split(",")]
    made = importing.read(path, format=format_, name=name, nvlink=nvlink, nics=keep)
    console(error=True).print(_summary(made))
    if not leader():
        return
    if output is None:
        click.echo(made.text, nl=False)
    else:
        before = output.exists()
        files.write_text(output, made.text)
        click.echo(f"{'replaced' if before else 'wrote'} {output}")


def _summary(made: importing.Imported) -> RenderableType:
    """What was found, what a reader has to know, and what is to be filled in."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("found", "", ""):
        table.add_column(column)
    for row in made.found:
        table.add_row(*(Text(cell) for cell in row))
    head = (
        f"\n{len(made.unknown)} figures are unknown; write them in the file, in one that `extends` it, or with --set KEY=VALUE:"
    )
    keys = [f"  {key}" for key in made.unknown]
    return Group(table, Text("\n".join(["", *made.notes, head, *keys] if made.notes else [head, *keys])))

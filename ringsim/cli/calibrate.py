"""The command that measures this machine and writes it as a topology: calibrate. Start it with mpiexec."""

from __future__ import annotations

from pathlib import Path

import click

from .. import files, topology
from ..calibration import Kernel, to_yaml
from ..calibration import calibrate as calibrate_machine
from ..dtypes import ALIASES, ATTENTION, canonical
from ..engine import engine_of
from ..lowering import Blocking
from .running import agree, facts
from .session import check_outputs, console, on_leader, open_transport, progress, write_outputs


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The topology to write.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice([*ATTENTION, *ALIASES]),
    multiple=True,
    default=("float32",),
    show_default=True,
    help="Repeatable.",
)
@click.option(
    "--head-dim", "head_dims", type=click.IntRange(1), multiple=True, default=(64, 128), show_default=True, help="Repeatable."
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds that a wait may last."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON.")
def calibrate(output: Path, dtypes: tuple[str, ...], head_dims: tuple[int, ...], timeout: float, json_path: Path | None) -> None:
    """Measure this machine's kernels and hops with all ranks at work, and write them as a topology."""
    from ringsim.backends.cpu import available_cores, available_memory
    from ringsim.backends.numpy import NumpyBackend

    transport = open_transport(timeout)
    agree("calibrate", transport, dtypes=dtypes, head_dims=head_dims)
    on_leader(transport, lambda: check_outputs(output, json_path))
    kernels = [Kernel(dtype=canonical(dtype), head_dim=dim) for dtype in dtypes for dim in sorted(set(head_dims))]

    def backend(blocking: Blocking | None) -> NumpyBackend:
        return NumpyBackend(blocking=blocking, backward_blocking=blocking)

    with progress("calibrating", len(kernels) + 2) as advance:
        described = facts(engine_of(transport, threads=1))
        values = calibrate_machine(
            transport,
            kernels,
            backend,
            cores=available_cores(),
            memory_nbytes=available_memory(),
            facts=described,
            progress=advance,
        )
    text = to_yaml(values)
    topology.parse(text, "what was measured")
    on_leader(transport, lambda: files.write_text(output, text))
    on_leader(transport, lambda: write_outputs(json_path, None, values, {}))
    hop, progress_kind = values["links"]["memory"], values["transports"]["mpi"]["progress"]
    tables = values["devices"]["host"]["attention"]
    lines = [
        f"{table['dtype']} head_dim {table['head_dim']}: {table['rate']} a core, backward {table['backward']['rate']}"
        for table in tables
    ]
    console().print(
        "\n".join([*lines, f"hop: {hop['latency']} + bytes / {hop['bandwidth']}, driven by {progress_kind}", f"wrote {output}"])
    )

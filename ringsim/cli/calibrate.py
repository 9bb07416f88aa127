"""The command that measures this machine and writes it as a topology: calibrate. Start it with mpiexec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from .. import files, topology
from ..calibration import Kernel, to_yaml
from ..calibration import calibrate as calibrate_machine
from ..device_calibration import Subject, measure_devices
from ..device_times import Matmul
from ..device_topology import describe
from ..dtypes import ALIASES, ATTENTION, canonical
from ..engine import Engine, engine_of
from ..errors import MissingDependency
from ..lowering import Blocking
from .measure import BACKEND, MOVED_BY, threads_of
from .running import agree, facts
from .session import check_outputs, console, on_leader, open_transport, progress, write_outputs

DEFAULTS: Final = {"numpy": (("float32",), (64, 128)), "cupy": (("bfloat16",), (128,))}
"""By backend the dtypes and head_dims to calibrate where none are asked for."""


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The topology to write.")
@BACKEND
@MOVED_BY
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice([*ATTENTION, *ALIASES]),
    multiple=True,
    help="Repeatable. [default: float32; with backend cupy bfloat16]",
)
@click.option(
    "--head-dim",
    "head_dims",
    type=click.IntRange(1),
    multiple=True,
    help="Repeatable. [default: 64, 128; with backend cupy 128]",
)
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True, help="Seconds that a wait may last."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON.")
def calibrate(
    output: Path,
    backend: str,
    moved_by: str,
    dtypes: tuple[str, ...],
    head_dims: tuple[int, ...],
    timeout: float,
    json_path: Path | None,
) -> None:
    """Measure this machine's kernels and hops with all ranks at work, and write them as a topology."""
    dtypes, head_dims = dtypes or DEFAULTS[backend][0], head_dims or DEFAULTS[backend][1]
    transport = open_transport(timeout)
    agree("calibrate", transport, dtypes=dtypes, head_dims=head_dims, backend=backend, moved_by=moved_by)
    on_leader(transport, lambda: check_outputs(output, json_path))
    names = dict.fromkeys(canonical(dtype) for dtype in dtypes)
    kernels = [Kernel(dtype=dtype, head_dim=dim) for dtype in names for dim in sorted(set(head_dims))]
    engine = engine_of(transport, backend=backend, transport=moved_by, threads=threads_of(backend))
    with progress("calibrating", len(kernels) + (2 if backend == "numpy" else 3)) as advance:
        values = (_of_cpus if backend == "numpy" else _of_gpus)(engine, kernels, advance)
    text = to_yaml(values)
    topology.parse(text, "what was measured")
    on_leader(transport, lambda: files.write_text(output, text))
    on_leader(transport, lambda: write_outputs(json_path, None, values, {}))
    said = [] if backend == "numpy" else [engine.said]
    console().print("\n".join([*said, *_lines(values), f"wrote {output}"]))


def _of_cpus(engine: Engine, kernels: Sequence[Kernel], advance: Callable[[str], None]) -> dict[str, Any]:
    from ringsim.backends.cpu import available_cores, available_memory
    from ringsim.backends.numpy import NumpyBackend

    def backend(blocking: Blocking | None) -> NumpyBackend:
        return NumpyBackend(blocking=blocking, backward_blocking=blocking)

    return calibrate_machine(
        engine.control,
        kernels,
        backend,
        cores=available_cores(),
        memory_nbytes=available_memory(),
        facts=facts(engine),
        progress=advance,
    )


def _of_gpus(engine: Engine, kernels: Sequence[Kernel], advance: Callable[[str], None]) -> dict[str, Any]:
    from ringsim.backends.cupy import CupyBackend

    made: Any = engine.backend
    matmul, missing = _matmul()
    subject = Subject(
        transport=engine.transport,
        make_backend=lambda: CupyBackend(made.calls, made.tiles),
        facts=engine.facts,
        matmul=matmul,
    )
    found = measure_devices(subject, kernels, advance)
    return describe(found, engine.transport, kernels, facts(engine) | missing, engine.said)


def _matmul() -> tuple[Matmul | None, dict[str, str]]:
    """Matrix products by cuBLAS; without it the notes say why the topology has no `matmul`."""
    from ringsim.backends.cuda_matmul import matmul_by_cublas

    try:
        return matmul_by_cublas(), {}
    except MissingDependency as error:
        return None, {"matmul": str(error)}


def _lines(values: dict[str, Any]) -> list[str]:
    """What was found, in a few lines."""
    each = {"cpu": "a core", "gpu": "a device"}
    lines = [
        f"{table['dtype']} head_dim {table['head_dim']}: {table['rate']} {each[device['kind']]}, "
        f"backward {table['backward']['rate']}"
        for device in values["devices"].values()
        for table in device["attention"]
    ]
    (transport,) = values["transports"].values()
    hops = values["links"] | transport.get("paths", {})
    for name, hop in hops.items():
        by_size = (
            f"{len(hop['regimes'])} ranges of sizes" if "regimes" in hop else f"{hop['latency']} + bytes / {hop['bandwidth']}"
        )
        where = "hop" if name == "memory" else f"hop {name}"
        lines.append(f"{where}: {by_size}, driven by {transport['progress']}")
    return lines

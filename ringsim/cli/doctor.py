"""The command that says what this machine has, and what is wrong with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

from ..doctor import Machine, body, examine, head, stranger, tail, try_out
from ..errors import MissingDependency, RankMismatch
from ..transport import Transport
from .session import check_outputs, console, launched_rank, open_transport, progress, write_outputs

PROBES: Final = 10
TRANSPORT_S: Final = 300.0


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="Seconds that each command asked, such as nvidia-smi, may take.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the facts as JSON.")
def doctor(timeout: float, json_path: Path | None) -> int:
    """Say what this machine has, what is wrong with it, and what ringsim would use; exit 1 if anything is wrong.

    Under mpiexec or srun it tells of all hosts: what they have in common once, else who differs.
    """
    check_outputs(json_path if launched_rank() in (None, 0) else None)
    system, out = Machine(timeout_s=timeout), console()
    out.quiet = out.quiet or told_twice()
    transport, trouble = enter(stranger(system))
    with progress("looking", PROBES) as advance:
        report = examine(system, transport, launched=launched_rank() is not None, trouble=trouble, progress=advance)
    out.print(head(report))
    out.print(body(report.lines))
    if report.ready:
        # an MPI that is handed device memory and cannot take it may end the job here: the rest has been said
        out.print(
            "\nnow trying --backend cupy on all ranks: if the job ends here, MPI crashed on device memory (docs/clusters.md)"
        )
        sys.stdout.flush()
        before = len(report.lines)
        report = try_out(report, system, transport)
        out.print(body(report.lines[before:]))
    out.print(tail(report))
    if not told_twice():
        write_outputs(json_path, None, report.to_dict(), {})
    return 1 if report.status == "wrong" else 0


def enter(why: str) -> tuple[Transport, str]:
    """The transport; or one of this process alone, and why ranks cannot be joined: `why` already, or what joining them raises."""
    try:
        if not why:
            return open_transport(TRANSPORT_S), ""
    except (RankMismatch, MissingDependency) as error:
        why = str(error)
    except RuntimeError as error:
        # mpi4py raises it where the MPI library does not load
        why = f"mpi4py: {error}"
    from ringsim.backends.loopback import World

    return World(1).endpoint(0), why


def told_twice() -> bool:
    """Whether another task of srun says the same, where srun told none of them of MPI."""
    return (
        launched_rank() is None
        and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
        and os.environ.get("SLURM_PROCID", "0") != "0"
    )

"""The `ringsim` command."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from .. import __version__
from .calibrate import calibrate
from .doctor import doctor
from .machines import topologies
from .measure import compare, run
from .predict import breakeven, memory, schedule, simulate, strategies
from .session import end

EPILOG = "Sizes read 8K = 8192 and 1M = 1048576 tokens. Exit codes: 0 done, 1 a check failed, 2 bad input."


HELP = """Ring attention over MPI: predicted, executed and compared, from one schedule.

\b
ringsim simulate dgx-h100 --seq 1M --causal ...           what will it cost?
ringsim memory dgx-h100 --seq 1M ...                      does it fit?
ringsim breakeven dgx-h100 ...                            how long must blocks be?
ringsim topologies show dgx-h100                          on what machine?
mpiexec -n 4 ringsim run --seq 8K --causal --check        what does it cost?
mpiexec -n 4 ringsim calibrate -o here.yaml               what is this machine?
mpiexec -n 4 ringsim compare --topology here.yaml ...     was the prediction right?
mpiexec -n 4 ringsim doctor                               is anything wrong with it?
ringsim schedule --ranks 4 --seq 6 --causal               who computes and sends what?
ringsim strategies                                        in which other ways?
"""


@click.group(help=HELP, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="ringsim")
def cli() -> None:
    """Everything is in HELP: a docstring cannot hold the character that keeps its lines apart."""


COMMUNICATING = ("run", "calibrate", "compare", "doctor")
for command in (simulate, memory, breakeven, run, calibrate, compare, doctor, schedule, strategies, topologies):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123
    communicates = bool(given) and given[0] in COMMUNICATING
    sys.exit(end(lambda: cli.main(given, prog_name="ringsim", standalone_mode=False), communicates=communicates))

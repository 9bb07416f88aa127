"""Every example prints exactly what its .out file says."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .mpi_launch import OPEN_MPI, mpiexec

EXAMPLES = Path(__file__).parents[1] / "examples"
ON_ONE_PROCESS = ("averaging_is_not_merging", "before_you_buy", "blockwise_layer", "blockwise_schedule", "six_tokens", "what_if")
UNDER_MPI = {"library": 2, "ring_sizes": 4, "train_transformer": 4}
TIMEOUT_S = 120


def check_output(name: str, command: list[str], cwd: Path) -> None:
    ran = subprocess.run(
        [*command, sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=cwd,
        env=os.environ | OPEN_MPI,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    expected = (EXAMPLES / f"{name}.out").read_text()
    changes = difflib.unified_diff(expected.splitlines(), ran.stdout.splitlines(), f"{name}.out", "printed now", lineterm="")
    assert ran.stdout == expected, "\n".join(changes)


@pytest.mark.parametrize("name", ON_ONE_PROCESS)
def test_prints_its_out_file(name: str, tmp_path: Path) -> None:
    check_output(name, [], tmp_path)


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "ranks"), UNDER_MPI.items())
def test_prints_its_out_file_under_mpi(name: str, ranks: int, tmp_path: Path) -> None:
    check_output(name, [mpiexec(), "-n", str(ranks)], tmp_path)


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {path.stem for path in EXAMPLES.glob("*.out")} == {*ON_ONE_PROCESS, *UNDER_MPI}

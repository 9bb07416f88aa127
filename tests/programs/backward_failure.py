"""Rank 1 fails on the way back; run it under `python -m mpi4py`.

With `raise` it raises at its second attend_backward. With `checked` or `unchecked` it does not come at all: every other rank
leaves what it raised in `rank-R.json`, and rank 1 then ends the job.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import RingAttention, Workload
from ringsim.backends.numpy import NumpyBackend

WORLD = MPI.COMM_WORLD
DONE = 7
COMPUTE = NumpyBackend.compute
ATTENDS = [0]


def compute(self: NumpyBackend, op: Any, *arguments: Any, **options: Any) -> None:
    ATTENDS[0] += op.kernel == "attend_backward"
    if ATTENDS[0] == 2 and WORLD.rank == 1:
        Path("rank-1.attend").touch()
        raise ArithmeticError("it failed on purpose")
    COMPUTE(self, op, *arguments, **options)


def stay_away() -> None:
    reports = [Path(f"rank-{rank}.json") for rank in range(WORLD.size) if rank != 1]
    while not all(report.exists() for report in reports):
        time.sleep(0.05)
    WORLD.Abort(DONE)


def main(fate: str) -> None:
    work = Workload(q_len=512 * WORLD.size, heads=2, head_dim=64)
    x = np.ones((1, 512, 2, 64), "float32")
    # nobody waits in vain for a rank that has raised: the job ends at once
    plan = RingAttention(work, comm=WORLD, timeout_s=300.0 if fate == "raise" else 2.0, check=fate != "unchecked")
    plan(x, x, x)
    WORLD.Barrier()
    if fate == "raise":
        NumpyBackend.compute = compute  # type: ignore[method-assign]
        plan.backward(x)
    if WORLD.rank == 1:
        stay_away()
    try:
        plan.backward(x)
        said = ("nothing", "")
    except Exception as error:  # noqa: BLE001 - it is what the test asserts
        said = (type(error).__name__, str(error))
    half = Path(f"rank-{WORLD.rank}.half")
    half.write_text(json.dumps(said))
    half.rename(f"rank-{WORLD.rank}.json")
    time.sleep(3600)


main(sys.argv[1])

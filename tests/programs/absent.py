"""Rank 1 does not come to a collective call; every other rank leaves what it raised in `rank-R.json`. Rank 1 then ends the job.

mpiexec -n RANKS python absent.py CALL
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

from ringsim import RingAttention, Workload, ring_attention

WORLD = MPI.COMM_WORLD
DONE = 7
OPTIONS = {"comm": WORLD, "timeout_s": 2.0}
WORK = Workload(q_len=4 * WORLD.size, heads=2, head_dim=8)
X = np.ones((1, 4, 2, 8), "float32")


def come(call: str) -> None:
    if call == "ring_attention":
        ring_attention(X, X, X, **OPTIONS)
    else:
        RingAttention(WORK, **OPTIONS)


def main(call: str) -> None:
    plan = None if call in ("ring_attention", "RingAttention") else RingAttention(WORK, **OPTIONS, check=call != "plan unchecked")
    WORLD.Barrier()
    reports = [Path(f"rank-{rank}.json") for rank in range(WORLD.size) if rank != 1]
    if WORLD.rank == 1:
        while not all(report.exists() for report in reports):
            time.sleep(0.05)
        WORLD.Abort(DONE)
    try:
        plan(X, X, X) if plan else come(call)
        said = ("nothing", "")
    except Exception as error:  # noqa: BLE001 - it is what the test asserts
        said = (type(error).__name__, str(error))
    half = Path(f"rank-{WORLD.rank}.half")
    half.write_text(json.dumps(said))
    half.rename(f"rank-{WORLD.rank}.json")
    time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1])

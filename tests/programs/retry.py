"""A plan whose first call times out because rank 1 is late, and which every rank then calls again.

Rank 0 prints as JSON what came of each call on each rank: the error against dense attention, or what was raised.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import RingAttention, Workload, inputs, shard
from ringsim.backends.numpy import NumpyBackend
from ringsim.reference import dense_attention

WORLD = MPI.COMM_WORLD
LATE_S, TIMEOUT_S = 2.5, 1.0
COMPUTE = NumpyBackend.compute
# messages large enough for a rendezvous: a send waits for its receive
WORK = Workload(q_len=3000, heads=2, head_dim=64)


def compute(self: NumpyBackend, op: Any, *arguments: Any, **options: Any) -> None:
    if op.kernel == "attend" and WORLD.rank == 1:
        NumpyBackend.compute = COMPUTE  # type: ignore[method-assign]
        time.sleep(LATE_S)
    COMPUTE(self, op, *arguments, **options)


def main() -> None:
    NumpyBackend.compute = compute  # type: ignore[method-assign]
    q, k, v = (inputs.rows(WORK, name, np.arange(WORK.q_len), 1) for name in "qkv")
    dense, _ = dense_attention(WORK, q, k, v)
    arrays = [shard(x, comm=WORLD) for x in (q, k, v)]
    plan = RingAttention(WORK, comm=WORLD, threads=1, timeout_s=TIMEOUT_S)
    calls = []
    for _ in range(2):
        try:
            error = float(np.max(np.abs(plan(*arrays) - shard(dense, comm=WORLD))))
            mine = {"error": error, "raised": None, "message": ""}
        except Exception as problem:  # noqa: BLE001 - it is what the test asserts
            mine = {"error": None, "raised": type(problem).__name__, "message": str(problem)}
        calls.append(WORLD.allgather(mine))
    if WORLD.rank == 0:
        print(json.dumps(calls))


if __name__ == "__main__":
    main()

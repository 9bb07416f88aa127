"""ringsim's plan, zigzag ring, over MPI."""

from __future__ import annotations

import os
import time
from typing import Any

import mpi4py
import numpy as np
import threadpoolctl
from mpi4py import MPI
from worker import Contender, Task, serve

import ringsim


def prepare(task: Task) -> Contender:
    """This rank's part, in ringsim's defaults but for the zigzag partition."""
    workload = ringsim.Workload(q_len=task.seq, heads=task.heads, head_dim=task.head_dim, mask=ringsim.Causal())
    comm, spans = MPI.COMM_WORLD, task.zigzag()
    forward_plan = ringsim.RingAttention(workload, comm=comm, partition="zigzag")
    q, k, v, dout = (task.rows(name, spans) for name in ("q", "k", "v", "dout"))

    def forward() -> dict[str, Any]:
        return {"out": forward_plan(q, k, v)}

    def backward() -> dict[str, Any]:
        out, _ = forward_plan.with_lse(q, k, v)
        dq, dk, dv = forward_plan.backward(dout)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    facts = {
        "ringsim": ringsim.__version__,
        "numpy": np.__version__,
        "mpi4py": mpi4py.__version__,
        "mpi": " ".join(MPI.Get_library_version().split("\n")[0].strip("\x00 ").split()),
        "threadpools": threadpoolctl.threadpool_info(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")},
    }

    def barrier() -> None:
        # MPI's own spins, and takes the core from a rank that still computes; gloo's, of the peers, sleeps
        request = comm.Ibarrier()
        while not request.Test():
            time.sleep(2e-4)

    can = hasattr(forward_plan, "backward")
    return Contender(spans, forward, backward if can else None, barrier, lambda array: array, facts)


serve(prepare)

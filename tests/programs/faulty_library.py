"""A program that uses the library and in which rank 1 raises at its second attend; run it under `python -m mpi4py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import ring_attention
from ringsim.backends.numpy import NumpyBackend

COMPUTE = NumpyBackend.compute
ATTENDS = [0]


def compute(self: NumpyBackend, op: Any, *arguments: Any, **options: Any) -> None:
    ATTENDS[0] += op.kernel == "attend"
    if ATTENDS[0] == 2 and MPI.COMM_WORLD.rank == 1:
        Path("rank-1.attend").touch()
        raise ArithmeticError("it failed on purpose")
    COMPUTE(self, op, *arguments, **options)


NumpyBackend.compute = compute  # type: ignore[method-assign]
x = np.ones((1, 512, 8, 64), "float32")
ring_attention(x, x, x, comm=MPI.COMM_WORLD)

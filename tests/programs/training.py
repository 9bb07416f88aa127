"""Losses of examples/train_transformer.py on the ranks of this job, by dtype and strategy.

mpiexec -n RANKS python training.py DTYPE:STRATEGY:STEPS ...; rank 0 prints a JSON object of the losses by argument.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

# before NumPy is loaded: threads that wait for one another take longer than such small products
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from train_transformer import train

if __name__ == "__main__":
    found = {}
    for argument in sys.argv[1:]:
        dtype, strategy, steps = argument.split(":")
        found[argument] = train(MPI.COMM_WORLD, int(steps), dtype, strategy)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(found))

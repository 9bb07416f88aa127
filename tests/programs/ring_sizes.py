"""Documents on rings of different sizes, as sub-communicators and as one packed run, against dense float64 attention.

mpiexec -n RANKS python ring_sizes.py
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import Causal, Full, RingAttention, Workload, inputs, shard
from ringsim.mask import Documents
from ringsim.reference import dense_attention
from ringsim.ring_sizes import RingSizes, size_rings

WORLD = MPI.COMM_WORLD
LENGTHS = ((96, 60, 40, 13, 7, 1, 30), (120, 20, 15, 10, 9), (50, 50, 3))
SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float64"}
LIMIT = 1e-12
TIMEOUT_S = 30.0


class Document:
    """One document's inputs and the dense answer."""

    def __init__(self, length: int, seed: int, *, causal: bool) -> None:
        self.workload = Workload(q_len=length, mask=Causal() if causal else Full(), **SHAPE)
        self.arrays = [inputs.rows(self.workload, name, np.arange(length), seed) for name in "qkv"]
        self.out, _ = dense_attention(self.workload, *self.arrays)


def on_rings(plan: RingSizes, documents: list[Document]) -> tuple[float, int]:
    """The largest error of this rank's rows, and how many documents it worked on."""
    seat = plan.split(WORLD)
    error = 0.0
    for index in seat.ring.documents:
        error = max(error, on_ring(documents[index], seat.comm, plan.kind))
    for index in seat.alone:
        error = max(error, on_ring(documents[index], None, plan.kind))
    seat.comm.Free()
    return error, len(seat.ring.documents) + len(seat.alone)


def on_ring(one: Document, comm: Any, partition: str) -> float:
    """The largest error of this rank's rows of one document."""
    mine = [shard(x, comm=comm, partition=partition) for x in one.arrays]
    with RingAttention(one.workload, comm=comm, partition=partition, threads=1, timeout_s=TIMEOUT_S) as attention:
        found = attention(*mine)
    return off(found, shard(one.out, comm=comm, partition=partition))


def packed(plan: RingSizes, documents: list[Document], *, causal: bool) -> float:
    """The largest error of this rank's rows where one call runs all documents."""
    mask: Any = Documents(plan.lengths)
    workload = Workload(q_len=sum(plan.lengths), mask=Causal() & mask if causal else mask, **SHAPE)
    whole = [np.concatenate([one.arrays[index] for one in documents], axis=1) for index in range(3)]
    mine = [shard(x, comm=WORLD, partition=plan.partition) for x in whole]
    with RingAttention(workload, comm=WORLD, partition=plan.partition, threads=1, timeout_s=TIMEOUT_S) as attention:
        found = attention(*mine)
    expected = np.concatenate([one.out for one in documents], axis=1)
    return off(found, shard(expected, comm=WORLD, partition=plan.partition))


def off(found: Any, expected: Any) -> float:
    return float(np.max(np.abs(found - expected), initial=0)) if found.shape == expected.shape else np.inf


def main() -> None:
    cases, faults = [], []
    for causal in (True, False):
        for lengths in LENGTHS:
            plan = size_rings(lengths, WORLD.size, causal=causal)
            documents = [Document(length, 7 * index, causal=causal) for index, length in enumerate(lengths)]
            error, worked = on_rings(plan, documents)
            errors = {"rings": error, "packed": packed(plan, documents, causal=causal)}
            faults += [f"{lengths} {name}: rank {WORLD.rank} off by {e:.2e}" for name, e in errors.items() if not e <= LIMIT]
            sizes = [ring.size for ring in plan.rings]
            alone = sum(len(held) for ring in plan.rings for held in ring.alone)
            cases.append({"sizes": sizes, "alone": alone, "worked": WORLD.gather(worked)})
    said = WORLD.gather(faults)
    if said is not None:
        print(json.dumps({"cases": cases, "faults": [fault for some in said for fault in some]}))


if __name__ == "__main__":
    main()

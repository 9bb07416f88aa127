"""What ranks compute over MPI has the bits that loopback gives: extreme logits, NaN, inf, empty ranks, all dtypes."""

import sys

import numpy as np
from mpi4py import MPI

import ringsim
from ringsim.dtypes import numpy_dtype
from ringsim.execution import execute

comm = MPI.COMM_WORLD
faults, cases = [], 0


def inputs(kind: str, workload: ringsim.Workload) -> list[np.ndarray]:
    """Global q, k, v of one kind, the same on every rank."""
    rng = np.random.default_rng(3)
    shapes = [(1, workload.q_len, n, workload.head_dim) for n in (workload.heads, workload.kv_heads, workload.kv_heads)]
    arrays = [rng.standard_normal(shape) for shape in shapes]
    if kind == "extreme":
        arrays[0] *= 100
        arrays[1] *= 100
    if kind in ("nan", "inf"):
        for array in arrays:
            array[0, workload.q_len // 2, 0] = np.nan if kind == "nan" else np.inf
    return [array.astype(numpy_dtype(workload.dtype)) for array in arrays]


for kind in ("normal", "extreme", "nan", "inf"):
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        for partition in ("contiguous", "striped", "zigzag"):
            for mask in (ringsim.Full(), ringsim.Causal()):
                for seq in (2, 29):
                    workload = ringsim.Workload(q_len=seq, heads=4, kv_heads=2, head_dim=8, dtype=dtype, mask=mask)
                    q, k, v = inputs(kind, workload)
                    with ringsim.RingAttention(workload, comm=comm, partition=partition, threads=1) as plan:
                        local = [ringsim.shard(x, comm=comm, partition=partition) for x in (q, k, v)]
                        out, lse = plan.with_lse(*local)
                        expected = execute(plan.schedule, q, k, v)
                        rows = plan.schedule.job.q_partition.positions(comm.rank)
                    same = (
                        out.tobytes() == expected.out[:, rows].tobytes() and lse.tobytes() == expected.lse[:, :, rows].tobytes()
                    )
                    finite = kind in ("nan", "inf") or bool(np.isfinite(out.astype(np.float64)).all())
                    cases += 1
                    if not (same and finite):
                        faults.append((kind, dtype, partition, mask.name, seq))

found = comm.gather(faults)
if comm.rank == 0:
    print(cases, found)
sys.exit(bool(faults))

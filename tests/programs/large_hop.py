"""Two ranks exchange a K block of more than 2 GiB; only the last key decides the answer."""

import sys

import numpy as np
from mpi4py import MPI

import ringsim

TOKENS, HEADS, WIDTH = 2**20 + 1, 8, 64

comm = MPI.COMM_WORLD
workload = ringsim.Workload(q_len=2, kv_len=2 * TOKENS, heads=HEADS, head_dim=WIDTH, v_head_dim=1, softmax_scale=1.0)
plan = ringsim.RingAttention(workload, comm=comm, timeout_s=120)
q = np.ones(plan.shapes["q"], np.float32)
k = np.zeros(plan.shapes["k"], np.float32)
v = np.zeros(plan.shapes["v"], np.float32)
assert k.nbytes > 2**31
if comm.rank == 1:
    # rank 0 learns of this key only by the last bytes of the last chunk
    k[:, -1], v[:, -1] = 10.0, 7.0
out = plan(q, k, v)
chunks = [event.nbytes for event in plan.timeline().events if event.kind == "recv" and event.rank == 0 and event.tag == 0]
plan.close()
right = bool(np.all(out == 7.0)) and sum(chunks) == k.nbytes and len(chunks) == 2
print(f"rank {comm.rank}: {'right' if right else f'WRONG {out.ravel()} {chunks}'}\n", end="")
sys.exit(0 if right else 1)

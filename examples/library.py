"""ringsim inside an MPI program: one call, then a plan with buffers of its own.

    mpiexec -n 2 python examples/library.py

Start it with `python -m mpi4py examples/library.py` where an exception on one rank shall end the job.
"""

import numpy as np
from mpi4py import MPI

import ringsim
from ringsim.reference import dense_attention

SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM, SEED = 18, 4, 2, 8, 0
PARTITION = "zigzag"


def rotary(x, positions):
    """Rotary position embedding (arXiv 2104.09864, section 3.4.2) of x (batch, seq, heads, head_dim)."""
    frequencies = 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = positions[None, :, None, None] * frequencies
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = (even * np.cos(angles) - odd * np.sin(angles), even * np.sin(angles) + odd * np.cos(angles))
    return np.stack(rotated, axis=-1).reshape(x.shape)


def main():
    comm = MPI.COMM_WORLD
    rng = np.random.default_rng(SEED)
    q_global = rng.standard_normal((1, SEQ_LEN, HEADS, HEAD_DIM))
    k_global, v_global = (rng.standard_normal((1, SEQ_LEN, KV_HEADS, HEAD_DIM)) for _ in range(2))

    # a rank's rows are not one run of tokens under zigzag, so rotary embeddings must ask for their positions
    positions = ringsim.Partition(kind=PARTITION, length=SEQ_LEN, world_size=comm.size).positions(comm.rank)
    q, k, v = (ringsim.shard(x, comm=comm, partition=PARTITION) for x in (q_global, k_global, v_global))
    q, k = rotary(q, positions), rotary(k, positions)

    once = ringsim.ring_attention(q, k, v, comm=comm, causal=True, partition=PARTITION)

    workload = ringsim.Workload(
        q_len=SEQ_LEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype="float64", mask=ringsim.Causal()
    )
    out, again = np.empty_like(q), np.empty_like(q)
    with ringsim.RingAttention(workload, comm=comm, partition=PARTITION) as plan:
        plan(q, k, v, out=out)
        plan(q, k, -v, out=again)

    ring = ringsim.unshard(out, comm=comm, partition=PARTITION)
    held = comm.gather(positions.tolist())
    same = comm.allreduce(np.array_equal(once, out) and np.array_equal(again, -out), op=MPI.LAND)
    if comm.rank == 0:
        everywhere = np.arange(SEQ_LEN)
        dense, _ = dense_attention(workload, rotary(q_global, everywhere), rotary(k_global, everywhere), v_global)
        lines = [f"rank {rank} holds tokens {' '.join(map(str, tokens))}" for rank, tokens in enumerate(held)]
        lines.append(f"local q {q.shape}, local k and v {k.shape}, out {ring.shape}")
        lines.append(f"call and plan agree bitwise: {same}")
        lines.append(f"largest difference from dense attention {np.abs(ring - dense).max():.12f}")
        print("\n".join(lines))


if __name__ == "__main__":
    main()

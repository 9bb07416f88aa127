"""Long documents on large rings, short ones on one rank: two ways to run the same plan.

    mpiexec -n 4 python examples/ring_sizes.py

First each document by itself on the communicator of its ring; then all of them packed into one call.
"""

import numpy as np
from mpi4py import MPI

import ringsim
from ringsim.mask import Documents
from ringsim.reference import dense_attention
from ringsim.ring_sizes import size_rings

LENGTHS = (64, 56, 20, 6, 12)
HEADS, HEAD_DIM, SEED = 2, 8, 0


def error_of(arrays, comm, partition, mask):
    """How far this rank's rows are from dense attention."""
    q, k, v = arrays
    workload = ringsim.Workload(q_len=q.shape[1], heads=HEADS, head_dim=HEAD_DIM, dtype="float64", mask=mask)
    mine = [ringsim.shard(x, comm=comm, partition=partition) for x in arrays]
    with ringsim.RingAttention(workload, comm=comm, partition=partition) as plan:
        found = plan(*mine)
    dense, _ = dense_attention(workload, q, k, v)
    return np.abs(found - ringsim.shard(dense, comm=comm, partition=partition)).max(initial=0)


def main():
    world = MPI.COMM_WORLD
    plan = size_rings(LENGTHS, world.size)
    arrays = np.random.default_rng(SEED).standard_normal((3, 1, sum(LENGTHS), HEADS, HEAD_DIM))
    edges = np.cumsum([0, *LENGTHS])

    seat = plan.split(world)
    places = [(document, seat.comm) for document in seat.ring.documents] + [(document, None) for document in seat.alone]
    errors = []
    for document, comm in places:
        tokens = slice(edges[document], edges[document + 1])
        errors.append(error_of(arrays[:, :, tokens], comm, plan.kind, ringsim.Causal()))
    seat.comm.Free()

    errors.append(error_of(arrays, world, plan.partition, ringsim.Causal() & Documents(LENGTHS)))
    right = world.allreduce(max(errors) < 1e-12, op=MPI.LAND)
    if world.rank == 0:
        for ring in plan.rings:
            shared = ", ".join(f"{LENGTHS[document]} tokens" for document in ring.documents) or "nothing"
            print(f"{ring.size} rank(s) from {ring.first}: share {shared}")
            for place, documents in enumerate(ring.alone):
                for document in documents:
                    print(f"    {LENGTHS[document]} tokens whole on rank {ring.first + place}")
        print(f"pairs of each rank: {', '.join(map(str, plan.work))}")
        print(f"packed: {plan.partition}")
        print(f"agrees with dense attention in float64, both ways: {right}")


if __name__ == "__main__":
    main()

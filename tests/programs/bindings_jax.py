"""Two layers on one plan, sharded over MPI: each rank's gradients are the shard of what JAX's own autodiff gives one process.

Rank 0 prints the largest relative error of each case as JSON.  mpiexec -n RANKS python bindings_jax.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ringsim import RingAttention, Workload, mask_named
from ringsim.bindings.jax import attention

SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 29, 4, 2, 8
MASKS = ("full", "causal", "causal & documents(5, 13, 11)")
# dtype, mask, partition, strategy
CASES = (
    ("float64", "full", "contiguous", "ring"),
    ("float64", "causal", "zigzag", "ring"),
    ("float64", "causal & documents(5, 13, 11)", "striped", "q-ring"),
    ("float32", "causal", "zigzag", "bidirectional"),
)


def dense(workload: Workload, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of global arrays as JAX differentiates it, operation by operation."""
    k, v = (jnp.repeat(x, workload.heads // workload.kv_heads, axis=2) for x in (k, v))
    positions = np.arange(workload.q_len)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * workload.softmax_scale
    weights = jax.nn.softmax(jnp.where(workload.mask.visible(positions, positions), scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def leaves(workload: Workload, seed: int = 0) -> list[Any]:
    """q, k, v and what the loss weighs the output with: global, in float64, the same on every rank."""
    rng = np.random.default_rng(seed)
    heads = (workload.heads, workload.kv_heads, workload.kv_heads, workload.heads)
    return [rng.standard_normal((workload.batch, workload.q_len, count, workload.head_dim)) for count in heads]


def loss_of(attend: Any, inputs: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Two layers; the keys of the second come from the first."""
    q, k, v = inputs
    first = attend(q, k, v)
    return (attend(jnp.tanh(first), first[:, :, : k.shape[2]] + k, jnp.sin(v)) * weights).sum()


def parallel_loss_of(attend: Any, inputs: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Calls of unlike cost that do not depend on each other: only the token orders them."""
    q, k, v = inputs
    branches = [attend(q * factor, k, v) for factor in (0.5, 1.0, 2.0)]
    return (sum(jnp.sin(x) for x in branches) * weights).sum()


def gradients(attend: Any, given: Sequence[Any], dtype: str, loss: Any = loss_of) -> tuple[jax.Array, ...]:
    """Under jit."""
    *inputs, weights = (jnp.asarray(x, dtype) for x in given)
    made: tuple[jax.Array, ...] = jax.jit(jax.grad(lambda x: loss(attend, x, weights)))(tuple(inputs))
    return made


def distance(found: Sequence[Any], wanted: Sequence[Any]) -> float:
    """The largest difference, relative to the largest element of each."""
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(found, wanted, strict=True)]
    return max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)


def main() -> None:
    from mpi4py import MPI

    jax.config.update("jax_enable_x64", True)
    comm, report = MPI.COMM_WORLD, {}
    for dtype, mask, partition, strategy in CASES:
        workload = Workload(q_len=SEQ_LEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, mask=mask_named(mask))
        whole, errors = leaves(workload), []
        with RingAttention(workload, comm=comm, partition=partition, strategy=strategy, threads=1) as plan:
            rows = plan.positions["q"]
            shards = [x[:, rows] for x in whole]
            for loss in (loss_of, parallel_loss_of):
                wanted = gradients(lambda *x, w=workload: dense(w, *x), whole, "float64", loss)
                found = gradients(lambda *x, p=plan: attention(p, *x), shards, dtype, loss)
                errors.append(distance(found, [x[:, rows] for x in wanted]))
            jax.effects_barrier()
        gathered = comm.gather(max(errors))
        report[" ".join((dtype, mask, partition, strategy))] = max(gathered or [0.0])
    if comm.rank == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

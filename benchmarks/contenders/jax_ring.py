"""ringattention (JAX): four host devices of XLA in one process, contiguous partition; it skips blocks above the diagonal."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ringattention import ringattention
from worker import Contender, Task, serve


def sharded_ring(task: Task, mesh: Mesh) -> Any:
    """The peer's function over the mesh, causal, in float32."""
    blockwise = {
        "causal_block_size": 1,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "query_chunk_size": task.options["chunk"],
        "key_chunk_size": task.options["chunk"],
        "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": True,
    }
    rows = P(None, "ring", None, None)

    def one(q: Any, k: Any, v: Any) -> Any:
        return ringattention(q, k, v, None, None, None, "ring", True, blockwise)

    return shard_map(one, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_rep=False)


def prepare(task: Task) -> Contender:
    """All ranks: XLA's devices are threads of this process."""
    ranks = task.options["devices"]
    mesh = Mesh(np.array(jax.devices()[:ranks]), ("ring",))
    ring = sharded_ring(task, mesh)
    place = NamedSharding(mesh, P(None, "ring", None, None))
    spans = [(0, task.seq)]
    q, k, v, dout = (jax.device_put(task.rows(name, spans), place) for name in ("q", "k", "v", "dout"))
    attend = jax.jit(ring)

    @jax.jit
    def gradients(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(ring, q, k, v)
        return out, *pull(dout)

    def forward() -> dict[str, Any]:
        return {"out": jax.block_until_ready(attend(q, k, v))}

    def backward() -> dict[str, Any]:
        found = jax.block_until_ready(gradients(q, k, v, dout))
        return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))

    facts = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__, "chunk": task.options["chunk"]}
    return Contender(spans, forward, backward, partial(jax.block_until_ready, q), np.asarray, facts)


serve(prepare)

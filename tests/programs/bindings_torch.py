"""Two layers on one plan, sharded over MPI: each rank's gradients are the shard of what torch's own autograd gives one process.

Rank 0 prints the largest relative error of each case as JSON.  mpiexec -n RANKS python bindings_torch.py
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ringsim import RingAttention, Workload, mask_named
from ringsim.bindings.torch import attention

SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 29, 4, 2, 8
MASKS = ("full", "causal", "causal & documents(5, 13, 11)")
# partition, strategy, whether the forward is computed again
WAYS = (("contiguous", "ring", False), ("zigzag", "ring", True), ("zigzag", "bidirectional", False), ("striped", "q-ring", False))
DTYPES = ("float64", "float32")


def dense(workload: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of global tensors as torch differentiates it, operation by operation."""
    k, v = (x.repeat_interleave(workload.heads // workload.kv_heads, dim=2) for x in (k, v))
    positions = torch.arange(workload.q_len)
    seen = torch.from_numpy(workload.mask.visible(positions.numpy(), positions.numpy()))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * workload.softmax_scale
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def leaves(workload: Workload, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v and what the loss weighs the output with: global, in float64, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (workload.batch, workload.q_len)
    heads = (workload.heads, workload.kv_heads, workload.kv_heads, workload.heads)
    return [torch.randn(*shape, count, workload.head_dim, dtype=torch.float64, generator=generator) for count in heads]


def loss_of(attend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Two layers; the keys of the second come from the first."""
    first = attend(q, k, v)
    return (attend(first.tanh(), first[:, :, : k.shape[2]] + k, v.sin()) * weights).sum()


def gradients(attend: Any, given: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in given[:3]]
    loss_of(attend, *inputs, given[3]).backward()
    return [x.grad for x in inputs if x.grad is not None]


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest element of each."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    from mpi4py import MPI

    comm, report = MPI.COMM_WORLD, {}
    for dtype, mask, (partition, strategy, again) in itertools.product(DTYPES, MASKS, WAYS):
        workload = Workload(q_len=SEQ_LEN, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=dtype, mask=mask_named(mask))
        whole = leaves(workload)
        wanted = gradients(lambda q, k, v, w=workload: dense(w, q, k, v), whole)
        with RingAttention(workload, comm=comm, partition=partition, strategy=strategy, threads=1) as plan:

            def attend(*inputs: torch.Tensor, plan: Any = plan, again: bool = again) -> torch.Tensor:
                return checkpoint(attention, plan, *inputs, use_reentrant=False) if again else attention(plan, *inputs)

            rows = torch.from_numpy(plan.positions["q"])
            found = gradients(attend, [x[:, rows].to(getattr(torch, dtype)) for x in whole])
            kept = plan.saved is None
        errors = comm.gather(distance(found, [x[:, rows] for x in wanted]) if kept else float("inf"))
        report[" ".join((dtype, mask, partition, strategy))] = max(errors or [0.0])
    if comm.rank == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

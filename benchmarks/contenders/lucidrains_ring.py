"""ring-attention-pytorch: `ring_flash_attn`, contiguous partition, over gloo (its Triton kernels need CUDA)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from gloo import facts, join
from ring_attention_pytorch import ring_flash_attn
from worker import Contender, Task, serve


def prepare(task: Task) -> Contender:
    """This rank's part; (batch, rows, heads, head_dim) is the peer's layout."""
    join(task)
    spans = task.contiguous()
    q, k, v, dout = (torch.from_numpy(task.rows(name, spans)) for name in ("q", "k", "v", "dout"))

    def attend(*operands: Any) -> Any:
        return ring_flash_attn(
            *operands, causal=True, bucket_size=task.options["bucket"], ring_reduce_col=True, ring_size=task.world_size
        )

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            return {"out": attend(q, k, v)}

    def backward() -> dict[str, Any]:
        operands = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*operands)
        dq, dk, dv = torch.autograd.grad(out, operands, dout)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    known = facts(task) | {"ring-attention-pytorch": version("ring-attention-pytorch")}
    return Contender(spans, forward, backward, dist.barrier, lambda tensor: tensor.detach().numpy(), known)


serve(prepare)

"""PyTorch's own ring: torch.distributed.tensor.experimental, private `_templated_ring_attention`, zigzag, over gloo.

The public `context_parallel` does not work on a CPU; the templates take any attention op, and here get the CPU's flash
attention. `convert_to_f32` and `enable_load_balance` are at their defaults (True).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from gloo import as_numpy, facts, heads_first, join
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from worker import Contender, Task, serve

aten = torch.ops.aten


def forward_op(query: Any, key: Any, value: Any, *, is_causal: bool) -> Any:
    """One block."""
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)


def backward_op(**given: Any) -> Any:
    """One block's gradients."""
    names = ("grad_out", "query", "key", "value", "out", "logsumexp")
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(*(given[name] for name in names), 0.0, given["is_causal"])


def prepare(task: Task) -> Contender:
    """This rank's part; (batch, heads, rows, head_dim) is the layout of the templates."""
    group = join(task)
    ring._cp_options.rotate_method = ring._RotateMethod[task.options.get("rotate", "ALL_GATHER")]
    spans = task.zigzag()
    q, k, v, dout = (heads_first(task.rows(name, spans)) for name in ("q", "k", "v", "dout"))

    def attend() -> Any:
        return ring._templated_ring_attention(group, 2, forward_op, q, k, v, is_causal=True)

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            return {"out": attend()[0]}

    def backward() -> dict[str, Any]:
        with torch.no_grad():
            out, lse = attend()[:2]
            dq, dk, dv = ring._templated_ring_attention_backward(
                group, 2, backward_op, dout, "grad_out", q, k, v, out, lse, is_causal=True
            )[:3]
            return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    return Contender(spans, forward, backward, dist.barrier, as_numpy, facts(task))


serve(prepare)

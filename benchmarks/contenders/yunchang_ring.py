"""yunchang: its zigzag ring over gloo, with the CPU's flash attention put in the place of CUDA's; forward only.

The shim replaces one name, `yunchang.kernels.attention._scaled_dot_product_flash_attention`: its backward calls CUDA's ops.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
import yunchang.kernels.attention as kernels
from gloo import facts, join
from worker import Contender, Task, serve
from yunchang.kernels import AttnType
from yunchang.ring import zigzag_ring_flash_attn_func


def on_cpu(q: Any, k: Any, v: Any, *, dropout_p: float, is_causal: bool, scale: float) -> Any:
    """As aten's _scaled_dot_product_flash_attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)


def prepare(task: Task) -> Contender:
    """This rank's part; (batch, rows, heads, head_dim) is the peer's layout."""
    join(task)
    kernels._scaled_dot_product_flash_attention = on_cpu
    spans = task.zigzag()
    q, k, v = (torch.from_numpy(task.rows(name, spans)) for name in ("q", "k", "v"))

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            return {"out": zigzag_ring_flash_attn_func(q, k, v, causal=True, attn_type=AttnType.TORCH_FLASH)}

    known = facts(task) | {"yunchang": version("yunchang")}
    return Contender(spans, forward, None, dist.barrier, lambda tensor: tensor.detach().numpy(), known)


serve(prepare)

"""Dense attention of PyTorch in one process, for scale: no ring, no partition."""

from __future__ import annotations

from typing import Any

import torch
from gloo import as_numpy, facts, heads_first
from worker import Contender, Task, serve


def prepare(task: Task) -> Contender:
    """The whole sequence in one process."""
    torch.set_num_threads(task.options["threads"])
    spans = [(0, task.seq)]
    q, k, v, dout = (heads_first(task.rows(name, spans)) for name in ("q", "k", "v", "dout"))

    def forward() -> dict[str, Any]:
        with torch.no_grad():
            return {"out": torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)}

    def backward() -> dict[str, Any]:
        operands = [x.detach().requires_grad_() for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*operands, is_causal=True)
        dq, dk, dv = torch.autograd.grad(out, operands, dout)
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    return Contender(spans, forward, backward, lambda: None, as_numpy, facts(task))


serve(prepare)

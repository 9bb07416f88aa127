"""What the contenders on torch share: the process group, layouts, facts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from worker import Array, Task


def join(task: Task) -> Any:
    """The gloo group of all ranks, each with the threads that the driver asks for."""
    if task.options.get("threads"):
        torch.set_num_threads(task.options["threads"])
    store = f"file://{task.options['store']}"
    dist.init_process_group("gloo", init_method=store, rank=task.rank, world_size=task.world_size)
    return dist.group.WORLD


def heads_first(rows: Array) -> Any:
    """(1, heads, rows, head_dim), dense."""
    return torch.from_numpy(rows).transpose(1, 2).contiguous()


def as_numpy(tensor: Any) -> Array:
    """(1, rows, heads, head_dim) from heads first."""
    found: Array = tensor.detach().transpose(1, 2).numpy().astype(np.float32)
    return found


def facts(task: Task) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **{name: value for name, value in task.options.items() if name != "store"},
    }

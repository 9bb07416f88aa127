"""ringsim: ring attention over MPI, executed and predicted from one schedule.

Names are imported when first used, so that ``import ringsim`` stays light and never initialises MPI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import RingAttention, Saved, ring_attention, ring_attention_backward
    from .breakeven import Breakeven, find_breakeven
    from .comparison import Comparison, compare
    from .errors import RingsimError
    from .execution import execute
    from .footprint import Footprint, weigh
    from .mask import BlockSparse, Causal, Documents, First, Full, PrefixLM, Window, mask_named
    from .partition import Partition
    from .ring_sizes import size_rings
    from .schedule import Schedule
    from .sharding import shard, unshard
    from .shares import even_out
    from .simulation import exposed_communication_s, simulate
    from .timeline import Timeline
    from .topology import Topology
    from .topology import load as load_topology
    from .workload import Workload

__version__ = "0.1.0"

_HOME = {
    "RingAttention": "attention",
    "Saved": "attention",
    "ring_attention": "attention",
    "ring_attention_backward": "attention",
    "shard": "sharding",
    "unshard": "sharding",
    "Breakeven": "breakeven",
    "find_breakeven": "breakeven",
    "Comparison": "comparison",
    "compare": "comparison",
    "RingsimError": "errors",
    "execute": "execution",
    "Footprint": "footprint",
    "weigh": "footprint",
    "BlockSparse": "mask",
    "Causal": "mask",
    "Documents": "mask",
    "First": "mask",
    "Full": "mask",
    "PrefixLM": "mask",
    "Window": "mask",
    "mask_named": "mask",
    "Partition": "partition",
    "size_rings": "ring_sizes",
    "Schedule": "schedule",
    "even_out": "shares",
    "exposed_communication_s": "simulation",
    "simulate": "simulation",
    "Timeline": "timeline",
    "Topology": "topology",
    "load_topology": "topology",
    "Workload": "workload",
}

__all__ = [
    "BlockSparse",
    "Breakeven",
    "Causal",
    "Comparison",
    "Documents",
    "First",
    "Footprint",
    "Full",
    "Partition",
    "PrefixLM",
    "RingAttention",
    "RingsimError",
    "Saved",
    "Schedule",
    "Timeline",
    "Topology",
    "Window",
    "Workload",
    "compare",
    "even_out",
    "execute",
    "exposed_communication_s",
    "find_breakeven",
    "load_topology",
    "mask_named",
    "ring_attention",
    "ring_attention_backward",
    "shard",
    "simulate",
    "size_rings",
    "unshard",
    "weigh",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ringsim' has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    return getattr(module, "load" if name == "load_topology" else name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

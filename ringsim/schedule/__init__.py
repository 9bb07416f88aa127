"""The schedule: data that the simulator and the executor both walk."""

from .emitter import Emitter
from .job import Block, Job
from .loops import Lane
from .ops import Compute, Op, Recv, Region, Send, Wait
from .registry import STRATEGIES, any_rank, strategy, where_all_is_seen
from .schedule import Schedule

# these import from here
from . import strategies  # isort: skip

__all__ = [
    "STRATEGIES",
    "Block",
    "Compute",
    "Emitter",
    "Job",
    "Lane",
    "Op",
    "Recv",
    "Region",
    "Schedule",
    "Send",
    "Wait",
    "any_rank",
    "strategies",
    "strategy",
    "where_all_is_seen",
]

"""The schedule: data that the simulator and the executor both walk."""

from .ops import Compute, Op, Recv, Region, Send, Wait
from .schedule import STRATEGIES, Schedule

__all__ = ["STRATEGIES", "Compute", "Op", "Recv", "Region", "Schedule", "Send", "Wait"]

"""The executor: walks a schedule on real arrays and measures each op."""

from .in_process import Result, execute
from .rank import Rank

__all__ = ["Rank", "Result", "execute"]

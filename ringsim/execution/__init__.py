"""The executor: walks a schedule on real arrays and measures each op."""

from .in_process import Result, execute
from .rank import Rank
from .walker import Backend, Walker, drive, drive_all

__all__ = ["Backend", "Rank", "Result", "Walker", "drive", "drive_all", "execute"]

"""The executor: walks a schedule on real arrays and measures each op."""

from .in_process import Result, execute
from .rank import Rank
from .together import Together
from .walker import Backend, Walker, drive, drive_all

__all__ = ["Backend", "Rank", "Result", "Together", "Walker", "drive", "drive_all", "execute"]

"""The executor: walks a schedule on real arrays and measures each op."""

from .assembly import Result
from .in_process import execute
from .rank import Rank
from .together import Together
from .walker import Backend, Walker, drive, drive_all

__all__ = ["Backend", "Rank", "Result", "Together", "Walker", "drive", "drive_all", "execute"]

"""What this machine has, what is wrong with it, and what ringsim would use. docs/clusters.md shows it at work."""

from .examine import examine, try_out
from .report import Report, body, head, tail
from .system import Machine, Ran, System
from .together import stranger

__all__ = ["Machine", "Ran", "Report", "System", "body", "examine", "head", "stranger", "tail", "try_out"]

"""The exceptions that ringsim raises: one small tree, so that a caller can catch what it can handle."""


class RingsimError(Exception):
    """Root of every error raised on purpose; its text names the place, the value found and the remedy."""


class WorkloadError(RingsimError, ValueError):
    """A workload, partition or mask that cannot exist or that nothing here can run."""


class ScheduleError(RingsimError):
    """A schedule that is invalid: unpaired messages, a deadlock, a stale read, a pair covered twice or never."""


class TopologyError(RingsimError, ValueError):
    """A topology file, or a figure missing from one."""


class BeyondFigures(TopologyError):
    """A tile larger or smaller than those that a device's figures were measured for."""


class ArrayError(RingsimError, ValueError):
    """An array whose shape, dtype or device does not fit the plan."""


class TransportError(RingsimError):
    """A failure between ranks."""


class RankMismatch(TransportError):
    """The ranks were called with different shapes, dtypes or options; found before the first hop."""


class PeerTimeout(TransportError):
    """A wait that outlasted its limit; names the rank, the op and the peer waited for."""


class CollectiveTimeout(PeerTimeout):
    """A collective of the control plane that outlasted its limit; which peer is missing only others can tell."""


class PeerFailed(TransportError):
    """Another rank raised (its own error is the cause, in one process) or its messages fail: it may have been killed."""


class ComparisonError(RingsimError):
    """Timelines that may not be compared: their schedules differ."""


class CalibrationError(RingsimError):
    """A calibration that could not be measured or fitted."""


class MissingDependency(RingsimError, ImportError):
    """An optional library is not installed; names the extra that brings it."""


class DeviceError(RingsimError):
    """A GPU that failed, or that cannot do what it was asked; names the rank and the op as far as they are known."""

"""Whether MPI may be called on threads that another system makes."""

from __future__ import annotations

import sys

from ..attention import RingAttention
from ..errors import TransportError


def check_threads(plan: RingAttention, caller: str) -> None:
    """Raise TransportError where threads of the `caller`'s own may not call MPI, and the plan needs it."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or plan.schedule.world_size == 1 or mpi.Query_thread() >= mpi.THREAD_SERIALIZED:
        return
    raise TransportError(
        f"{caller} calls back on threads of its own, and MPI was initialised for one thread alone; "
        "set mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI"
    )

"""All ranks of a schedule in this process: deterministic in one thread, or a thread a rank over a paced link."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from ..errors import ArrayError
from ..schedule import Schedule
from ..timeline import gather
from .assembly import Result, assemble, given_arrays, shards_of
from .rank import Rank
from .together import Together
from .walker import Backend

Array = npt.NDArray[Any]


def execute(
    schedule: Schedule, q: Array, k: Array, v: Array, *, backend: Backend | None = None, link: Any = None, **others: Array
) -> Result:
    """Run every rank of `schedule` here on global arrays, over the loopback transport.

    Shapes as in Workload. For pass ``both`` give ``dout=`` as well, for ``backward`` ``out=``, ``lse=`` and ``dout=``. Without a
    `link` one thread drives all ranks in a fixed order; with a `ringsim.backends.loopback.PacedLink` each rank has a thread and
    a NumpyBackend of its own. Raises ArrayError, PeerTimeout.
    """
    from ringsim.backends.loopback import spawn
    from ringsim.backends.numpy import NumpyBackend

    given = given_arrays(schedule, {"q": q, "k": k, "v": v} | others)
    if backend is not None and link is not None:
        raise ArrayError("a backend serves one thread: with a link, which gives each rank a thread, leave `backend` out")
    if link is None:
        group = Together(schedule, [backend or NumpyBackend()] * schedule.world_size)
        held = group.shards(**given)
        return group.result(held, group.run(held))

    def run(endpoint: Any) -> tuple[Rank, dict[str, Array], Array]:
        rank = Rank(schedule, endpoint, NumpyBackend())
        mine = shards_of(rank, given)
        endpoint.barrier()
        return rank, mine, rank.run(*mine.values())

    ranks, arrays, lses = map(list, zip(*spawn(schedule.world_size, run, link=link), strict=True))
    timeline = gather([rank.timeline for rank in ranks if rank.timeline is not None])
    return assemble(schedule, arrays, lses, timeline)

"""All ranks of a schedule in this process, one thread driving them: made once, run many times, in any backend's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RankMismatch
from ..schedule import Schedule
from ..timeline import Timeline, gather
from ..transport import Transport
from .assembly import Result, assemble, given_arrays, room_of, shards_of
from .rank import Rank
from .walker import Backend, Walker, drive_all

Array = npt.NDArray[Any]
Held = dict[str, Any]
"""A rank's arrays by name, in its backend's memory: its shards of what the pass is given, and what it makes."""


class Together:
    """A backend for each rank; `link` moves their messages (None: copied at once, between host memories).

    `patience_s` is how long nothing at all may change, where messages and kernels take their time. With another group `beside`
    it, of a schedule that never runs at the same time, slots of that are used where they are long enough. Raises RankMismatch.
    """

    def __init__(
        self,
        schedule: Schedule,
        backends: Sequence[Backend],
        *,
        link: Any = None,
        patience_s: float = 0.0,
        beside: Together | None = None,
    ) -> None:
        from ringsim.backends.loopback import World

        if len(backends) != schedule.world_size:
            raise RankMismatch(f"the schedule is for {schedule.world_size} ranks; {len(backends)} backends are given")
        self.schedule = schedule
        self.patience_s = patience_s
        world = World(schedule.world_size, link=link)
        ends: list[Transport] = [world.endpoint(rank) for rank in range(schedule.world_size)]
        self.ranks: list[Rank] = [
            Rank(schedule, ends[rank], backend, beside=None if beside is None else beside.ranks[rank].memory)
            for rank, backend in enumerate(backends)
        ]

    def shards(self, **arrays: Array) -> list[Held]:
        """Each rank's rows of global NumPy arrays (q, k, v, and what else the pass takes), and room for what it makes."""
        given = given_arrays(self.schedule, arrays)
        return [shards_of(rank, given) for rank in self.ranks]

    def room(self, number: int) -> Held:
        """New arrays for what the pass makes on one rank."""
        return room_of(self.ranks[number])

    def walkers(self, held: Sequence[Held], stream: Any = None) -> list[Walker]:
        """A walker a rank, in the order of ranks. Raises ArrayError."""
        return [rank.walker(*mine.values(), stream=stream) for rank, mine in zip(self.ranks, held, strict=True)]

    def drive(self, walkers: list[Walker]) -> None:
        """Walk them all to their ends. Raises PeerTimeout, DeviceError."""
        drive_all(walkers, patience_s=self.patience_s)

    def finish(self, walkers: list[Walker], stream: Any = None) -> list[Array]:
        """Each rank's lse, (batch, heads, local seq)."""
        return [rank.finish(walker, stream) for rank, walker in zip(self.ranks, walkers, strict=True)]

    def run(self, held: Sequence[Held], stream: Any = None) -> list[Array]:
        """Run once, into what is held; returns each rank's lse. On a device the run is queued, and its messages have come."""
        walkers = self.walkers(held, stream)
        self.drive(walkers)
        return self.finish(walkers, stream)

    def timeline(self) -> Timeline:
        """What the last run took, all ranks on one axis; waits for a device to come to its end."""
        return gather([rank.timeline for rank in self.ranks if rank.timeline is not None])

    def result(self, held: Sequence[Held], lses: Sequence[Array]) -> Result:
        """The global arrays of the last run, in host memory."""
        backends = [rank.backend for rank in self.ranks]
        made = [
            {name: np.asarray(backend.get(array)) for name, array in mine.items()}
            for backend, mine in zip(backends, held, strict=True)
        ]
        statistics = [np.asarray(backend.get(lse)) for backend, lse in zip(backends, lses, strict=True)]
        return assemble(self.schedule, made, statistics, self.timeline())

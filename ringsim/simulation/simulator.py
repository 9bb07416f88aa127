"""The simulator: SimPy processes that walk the schedule, one a rank, on a topology's cores and path."""

from __future__ import annotations

from collections.abc import Generator
from math import ceil
from typing import Any

import simpy

from ..costs import Costs
from ..errors import ScheduleError
from ..schedule import Compute, Recv, Schedule, Send, Wait
from ..timeline import Event, Timeline
from ..topology import Topology
from .cores import Cores
from .network import Network, Posted

Process = Generator[simpy.Event, Any, None]


def simulate(schedule: Schedule, topology: Topology, *, free_hops: bool = False) -> Timeline:
    """Predict the timeline of `schedule` on `topology`. Deterministic: equal inputs give equal timelines, to the bit.

    With `free_hops` a hop costs nothing once both sides have posted. Raises TopologyError where a figure is missing and
    ScheduleError if the ranks deadlock.
    """
    env = simpy.Environment()
    shared = topology.devices.kind == "cpu"
    pool = Cores(env, topology.devices.cores or 1)
    cores = [pool if shared else Cores(env, 1) for _ in range(schedule.world_size)]
    network = Network(env, topology.path, cores, free=free_hops)
    costs = Costs(topology, schedule.workload)
    ranks = [
        _Rank(env, rank, schedule=schedule, costs=costs, cores=cores[rank], network=network)
        for rank in range(schedule.world_size)
    ]
    processes = [env.process(rank.walk()) for rank in ranks]
    env.run()
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive]
    if stuck:
        raise ScheduleError(f"deadlock: rank(s) {stuck} wait for ever in schedule {schedule.digest[:12]}")
    events = tuple(event for rank in ranks for event in rank.events)
    facts = {
        "topology": topology.name,
        "topology_source": topology.source,
        "free_hops": free_hops,
        "cores": topology.devices.cores,
    }
    return Timeline(source="predicted", digest=schedule.digest, world_size=schedule.world_size, events=events, facts=facts)


def exposed_communication_s(schedule: Schedule, topology: Topology) -> float:
    """The wall time less the wall time of the same run with hops that cost nothing."""
    return simulate(schedule, topology).total_s - simulate(schedule, topology, free_hops=True).total_s


class _Rank:
    """One rank's process: the simulator's counterpart of the executor's walker."""

    def __init__(
        self, env: simpy.Environment, rank: int, *, schedule: Schedule, costs: Costs, cores: Cores, network: Network
    ) -> None:
        self.events: list[Event] = []
        self._env = env
        self._rank = rank
        self._schedule = schedule
        self._costs = costs
        self._cores = cores
        self._network = network
        self._posts: dict[int, Posted] = {}
        self._look_s = 0.0 if network.progress == "offload" else costs.topology.path.look

    def walk(self) -> Process:
        for op in self._schedule.program(self._rank):
            if isinstance(op, Send | Recv):
                self._posts[op.id] = self._network.post(self._rank, op)
            elif isinstance(op, Wait):
                yield from self._wait(op)
            else:
                yield from self._compute(op)

    def _compute(self, op: Compute) -> Process:
        """Run, breaking off at the next piece's end whenever something waits to be driven."""
        start_s, polled_s = self._env.now, 0.0
        cost = self._costs.cost(op)
        remaining, piece = cost.seconds, cost.seconds / cost.pieces
        while remaining > 0:
            served = 0.0
            if not self._network.pending[self._rank]:
                job = self._cores.start(remaining)
                yield job.done | self._network.bell(self._rank)
                if job.done.triggered:
                    break
                served = self._cores.stop(job)
            to_poll = min(ceil(served / piece) * piece or piece, remaining) - served
            if to_poll > 0:
                yield self._cores.start(to_poll).done
            remaining -= served + to_poll
            polled_s += yield from self._drive()
        polled_s += yield from self._drive()
        self._record(op, op.kernel, start_s, cpu_s=cost.seconds, poll_s=polled_s)

    def _drive(self) -> Generator[simpy.Event, Any, float]:
        """What a poll does: move, or hand to the hardware, all that has matched. Returns the seconds that it took."""
        before_s, pending = self._env.now, self._network.pending[self._rank]
        while pending:
            transfer = pending.popleft()
            if self._network.progress == "handshake":
                self._network.carry(transfer)
                continue
            transfer.start_s = self._env.now
            yield self._cores.start(self._network.work_s(transfer)).done
            self._network.complete(transfer)
        return self._env.now - before_s

    def _wait(self, op: Wait) -> Process:
        start_s = self._env.now
        posts = [self._posts[post] for post in op.posts]
        while missing := [post.done for post in posts if not post.done.triggered]:
            if not self._network.pending[self._rank]:
                yield self._env.all_of(missing) | self._network.bell(self._rank)
                if self._look_s:
                    yield self._env.timeout(self._look_s)
            yield from self._drive()
        self._record_wait(op, posts, start_s)

    def _record_wait(self, op: Wait, posts: list[Posted], start_s: float) -> None:
        transfers = [post.transfer for post in posts if post.transfer is not None]
        last = max(transfers, key=lambda transfer: transfer.end_s)
        duration = self._env.now - start_s
        late = min(max(max(transfer.matched_s for transfer in transfers) - start_s, 0.0), duration)
        moving = max(0.0, last.end_s - max(last.start_s, start_s + late))
        for post in posts:
            self._record_post(self._posts.pop(post.op.id))
        self._record(op, "wait", start_s, late_s=late, transfer_s=moving, progress_s=max(duration - late - moving, 0.0))

    def _record_post(self, post: Posted) -> None:
        kind = "send" if isinstance(post.op, Send) else "recv"
        end_s = post.transfer.end_s if post.transfer is not None else self._env.now
        event = Event(
            rank=self._rank,
            op=post.op.id,
            kind=kind,
            step=post.op.step,
            phase=post.op.phase,
            start_s=post.posted_s,
            end_s=end_s,
            nbytes=post.op.region.nbytes,
            peer=post.op.peer,
            tag=post.op.tag,
        )
        self.events.append(event)

    def _record(self, op: Wait | Compute, kind: str, start_s: float, **times: Any) -> None:
        event = Event(
            rank=self._rank, op=op.id, kind=kind, step=op.step, phase=op.phase, start_s=start_s, end_s=self._env.now, **times
        )
        self.events.append(event)

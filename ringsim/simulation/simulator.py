"""The simulator: SimPy processes that walk the schedule, one a rank, on a topology's cores and path."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import simpy

from ..costs import Cost, Costs
from ..errors import ScheduleError
from ..schedule import Compute, Recv, Schedule, Send, Wait
from ..timeline import Alike, Event, Timeline
from ..topology import Topology, pattern
from ..workload import Workload
from .alike import folded
from .cores import Cores
from .ground import Ground, whole
from .instant import rest
from .network import Network, Posted

MOST_BUSY = 4
MANY = 32
"""Ranks from which on it pays to look for those that behave alike."""
Process = Generator[simpy.Event, Any, None]


def simulate(
    schedule: Schedule, topology: Topology, *, free_hops: bool = False, fold: bool | None = None, bound: bool = True
) -> Timeline:
    """Predict the timeline of `schedule` on `topology`. Deterministic: equal inputs give equal timelines, to the bit.

    With `free_hops` a hop costs nothing once both sides have posted. Of ranks that provably behave alike only one of each kind is
    simulated: with `fold` in a world of any size, without in none, by default from 32 ranks on. The timeline is that of all
    ranks, but for rounding; its `facts` then say that rank r and rank r + `alike` are. With `bound` tiles smaller than a fused
    kernel's smallest figure are priced as that one, and facts say of how much computation this is the upper bound (`bounded`, a
    share); without, they raise BeyondFigures. Facts also say which devices' backward passes are priced by their forward's
    efficiencies (`backward`). Raises TopologyError where a figure is missing, ScheduleError if ranks deadlock.
    """
    env = simpy.Environment()
    placed = topology.place(schedule.world_size)
    costs = _costs(topology, schedule.workload, placed, bound=bound)
    look = schedule.world_size >= MANY if fold is None else fold
    with _no_garbage():
        ground = (folded(schedule, topology, placed, costs) if look else None) or whole(topology, placed)
    of_device = {number: Cores(env, ground.cores(number)) for number in dict.fromkeys(map(ground.device, range(ground.ranks)))}
    cores = [of_device[ground.device(rank)] for rank in range(ground.ranks)]
    network = Network(env, ground, cores, free=free_hops)
    ranks = [_Rank(env, rank, schedule, costs=costs[rank], cores=cores[rank], network=network) for rank in range(ground.ranks)]
    processes = [env.process(rank.walk()) for rank in ranks]
    with _no_garbage():
        env.run()
    stuck = [rank for rank in range(ground.world_size) if processes[rank % ground.ranks].is_alive]
    if stuck:
        raise ScheduleError(f"deadlock: rank(s) {stuck} wait for ever in schedule {schedule.digest[:12]}")
    events = tuple(event for rank in ranks for event in rank.events)
    made = _timeline(schedule, ground, events, free_hops=free_hops)
    priced_s = sum(one.priced_s for one in ranks)
    made.facts["bounded"] = sum(one.bounded_s for one in ranks) / priced_s if priced_s else 0.0
    if schedule.workload.pass_ != "forward" and (borrowed := _borrowed(costs)):
        made.facts["backward"] = borrowed
    made.facts["busiest"] = _busiest(topology, ground.carried(network.wires.carried), made.total_s)
    return made


def _timeline(schedule: Schedule, ground: Ground, events: tuple[Event, ...], *, free_hops: bool) -> Timeline:
    topology, vertices = ground.topology, ground.topology.graph.vertices
    facts: dict[str, Any] = {
        "topology": topology.name,
        "topology_source": topology.source,
        "transport": topology.transport_name,
        "devices": dict(Counter(vertices[number].device for number in dict.fromkeys(ground.placed))),
        "place": [vertices[number].name for number in ground.placed],
        "free_hops": free_hops,
    }
    every: Sequence[Event] = events
    if ground.ranks < ground.world_size:
        facts["alike"] = ground.ranks
        every = Alike(own=events, ranks=ground.ranks, world_size=ground.world_size)
    return Timeline(source="predicted", digest=schedule.digest, world_size=schedule.world_size, events=every, facts=facts)


def exposed_communication_s(schedule: Schedule, topology: Topology) -> float:
    """The wall time less the wall time of the same run with hops that cost nothing."""
    return simulate(schedule, topology).total_s - simulate(schedule, topology, free_hops=True).total_s


def _busiest(topology: Topology, carried: Counter[int], total_s: float) -> dict[str, float]:
    """Of each kind of resource, how much of what its busiest one could carry in the whole time it did; the fullest first."""
    shares: dict[str, float] = {}
    for number, nbytes in carried.items():
        resource = topology.graph.resources[number]
        kind, share = pattern(resource.name), nbytes / resource.capacity / total_s if total_s else 0.0
        shares[kind] = max(shares.get(kind, 0.0), share)
    return dict(sorted(shares.items(), key=lambda item: (-item[1], item[0]))[:MOST_BUSY])


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Events live to the end: looking for dead ones among millions would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _costs(topology: Topology, workload: Workload, placed: Sequence[int], *, bound: bool) -> list[Costs]:
    """Each rank's prices, made once for each kind of device."""
    kinds = [topology.graph.vertices[number].device for number in placed]
    made = {
        kind: Costs(topology.spec.devices[kind], workload, f"{topology.name}, {kind}", bound=bound)
        for kind in dict.fromkeys(kinds)
    }
    return [made[kind] for kind in kinds]


def _borrowed(costs: Sequence[Costs]) -> str:
    """Which devices' backward passes are priced by their forward's efficiencies; empty if none is."""
    lacking = {one.name: one.borrowed for one in costs if one.borrowed}
    said = "; ".join(f"{name} has no backward figures for {', '.join(tables)}" for name, tables in lacking.items())
    return f"forward's efficiencies: {said}" if said else ""


class _Rank:
    """One rank's process: the simulator's counterpart of the executor's walker."""

    def __init__(
        self, env: simpy.Environment, rank: int, schedule: Schedule, *, costs: Costs, cores: Cores, network: Network
    ) -> None:
        self.events: list[Event] = []
        self._env = env
        self._rank = rank
        self._schedule = schedule
        self._costs = costs
        self.priced_s = self.bounded_s = 0.0
        self._cores = cores
        self._network = network
        self._posts: dict[int, Posted] = {}
        self._free = network.free

    def walk(self) -> Process:
        post, posts = self._network.post, self._posts
        for op in self._schedule.program(self._rank):
            if isinstance(op, Send | Recv):
                posts[op.id] = post(self._rank, op)
            elif isinstance(op, Compute):
                yield from self._compute(op)
            else:
                awaited = [posts.pop(number) for number in op.posts]
                start_s = self._env.now
                if not all(half.done.triggered for half in awaited):
                    yield from self._wait(awaited)
                self._record_wait(op, awaited, start_s)

    def _compute(self, op: Compute) -> Process:
        start_s, cost, polled_s = self._env.now, self._costs.cost(op), 0.0
        self.priced_s += cost.seconds
        self.bounded_s += cost.bounded_s
        if self._costs.device.kind == "cpu":
            polled_s = yield from self._run(cost)
        elif self._network.driven:
            polled_s = yield from self._launch(cost)
        else:
            self._network.wires.computing(self._rank, 1)
            yield self._cores.start(cost.seconds).done
            self._network.wires.computing(self._rank, -1)
        if self._network.pending[self._rank]:
            polled_s += yield from self._look()
        self._record(op, op.kernel, start_s, cpu_s=cost.seconds, poll_s=polled_s)

    def _run(self, cost: Cost) -> Generator[simpy.Event, Any, float]:
        """On a CPU: break off at the next piece's end whenever something waits to be driven. Returns the seconds that took."""
        remaining, piece, polled_s = cost.seconds, cost.seconds / cost.pieces, 0.0
        while remaining > 0:
            served = 0.0
            self._network.wires.computing(self._rank, 1)
            if not self._network.pending[self._rank]:
                job = self._cores.start(remaining)
                yield job.done | self._network.bell(self._rank)
                served = remaining if job.done.triggered else self._cores.stop(job)
            to_poll = min(ceil(served / piece) * piece or piece, remaining) - served
            if to_poll > 0:
                yield self._cores.start(to_poll).done
            remaining -= served + to_poll
            self._network.wires.computing(self._rank, -1)
            polled_s += yield from self._look()
        return polled_s

    def _launch(self, cost: Cost) -> Generator[simpy.Event, Any, float]:
        """On a GPU: the host is free to look while the kernel runs. Returns the seconds that it was busy beyond its end."""
        job, ended_s = self._cores.start(cost.seconds), []
        self._network.wires.computing(self._rank, 1)

        def end(_: simpy.Event) -> None:
            ended_s.append(self._env.now)
            self._network.wires.computing(self._rank, -1)

        job.done.callbacks.append(end)
        while not ended_s:
            if self._network.pending[self._rank]:
                yield from self._look()
            if not ended_s:
                yield job.done | self._network.bell(self._rank)
        return self._env.now - ended_s[0]

    def _look(self) -> Generator[simpy.Event, Any, float]:
        """Drive all that waits to be driven. Returns the seconds that it took."""
        before_s = self._env.now
        yield from self._network.look(self._rank)
        return self._env.now - before_s

    def _wait(self, posts: list[Posted]) -> Process:
        look_s = 0.0 if self._free else max(post.path.look_s for post in posts)
        if not self._network.driven:
            yield from self._sleep(posts, look_s)
        while not all(post.done.triggered for post in posts):
            # what else happens at this instant must not depend on which rank comes first
            yield rest(self._env)
            missing = [post.done for post in posts if not post.done.triggered]
            if missing and self._network.pending[self._rank]:
                yield from self._look()
            elif missing:
                yield self._env.all_of(missing) | self._network.bell(self._rank)
                if look_s:
                    yield self._env.timeout(look_s)

    def _sleep(self, posts: list[Posted], look_s: float) -> Process:
        """Wait where nobody has to look: one event after the other, which is much cheaper than all at once."""
        missing = [post.done for post in posts if not post.done.triggered]
        for done in missing:  # noqa: UP028 - SimPy sends values in, and a list takes none
            yield done
        if missing and look_s:
            yield self._env.timeout(look_s)

    def _record_wait(self, op: Wait, posts: list[Posted], start_s: float) -> None:
        moves = [(post.done_s, post.transfer) for post in posts if post.transfer is not None]
        _, last = max(moves, key=lambda move: move[0])
        duration = self._env.now - start_s
        late = min(max(last.matched_s - start_s, 0.0), duration)
        moving = _covered([(max(transfer.start_s, start_s + late), done_s) for done_s, transfer in moves])
        for post in posts:
            self._record_post(post)
        self._record(op, "wait", start_s, late_s=late, transfer_s=moving, progress_s=max(duration - late - moving, 0.0))

    def _record_post(self, post: Posted) -> None:
        kind = "send" if isinstance(post.op, Send) else "recv"
        event = Event(
            rank=self._rank,
            op=post.op.id,
            kind=kind,
            step=post.op.step,
            phase=post.op.phase,
            start_s=post.posted_s,
            end_s=post.done_s,
            nbytes=post.nbytes,
            peer=post.op.peer,
            tag=post.op.tag,
        )
        self.events.append(event)

    def _record(self, op: Wait | Compute, kind: str, start_s: float, **times: Any) -> None:
        event = Event(
            rank=self._rank, op=op.id, kind=kind, step=op.step, phase=op.phase, start_s=start_s, end_s=self._env.now, **times
        )
        self.events.append(event)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, until = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total

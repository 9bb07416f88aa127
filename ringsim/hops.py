"""The hops of a flat ring on a topology: their rates alone and all at once, and what bounds each."""

from __future__ import annotations

from dataclasses import dataclass

import simpy

from .simulation.flows import Flows
from .topology import Topology

LARGE_NBYTES = 2**30
FULL = 1 - 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """A message of a flat ring, from `rank` to the next. Rates are bytes per second of a large message.

    `together` is its rate while all ranks send to the next at once; `bottleneck` names what bounds it then.
    """

    rank: int
    target: int
    links: tuple[str, ...]
    latency_s: float
    alone: float
    together: float
    bottleneck: str


def ring_hops(topology: Topology, world_size: int) -> tuple[Hop, ...]:
    """The hops of a flat ring of `world_size` ranks in placement order. Raises TopologyError."""
    placed = topology.place(world_size)
    ends = [(rank, (rank + 1) % world_size) for rank in range(world_size)] if world_size > 1 else []
    paths = [topology.path(placed[source], placed[target]) for source, target in ends]
    flows = Flows(simpy.Environment(), [resource.capacity for resource in topology.graph.resources])
    started = [flows.start(LARGE_NBYTES, path.resources, path.rate(LARGE_NBYTES), _nothing) for path in paths]
    loads = flows.load()
    hops = []
    for (rank, target), path, flow in zip(ends, paths, started, strict=True):
        rate, own = flows.rate(flow), path.rate(LARGE_NBYTES)
        full = [number for number in path.resources if loads[number] >= FULL * topology.graph.resources[number].capacity]
        by = (
            topology.graph.resources[full[0]].name
            if full and rate < FULL * own
            else limit(topology, placed[rank], placed[target])
        )
        hop = Hop(
            rank=rank,
            target=target,
            links=path.links,
            latency_s=path.latency_s(LARGE_NBYTES),
            alone=own,
            together=rate,
            bottleneck=by,
        )
        hops.append(hop)
    return tuple(hops)


def _nothing() -> None:
    """A rate is asked for, not an end."""


def limit(topology: Topology, source: int, target: int) -> str:
    """What bounds a large message alone: a resource by its name, or what the transport gets out of the route."""
    path = topology.path(source, target)
    rate = path.rate(LARGE_NBYTES)
    for number in path.resources:
        resource = topology.graph.resources[number]
        if resource.capacity <= rate * (2 - FULL):
            return resource.name
    for edge in topology.edges(source, target):
        if edge.rate <= rate * (2 - FULL):
            return f"one cable of {edge.link}"
    decides = next((f" on {name}" for name in reversed(topology.transport.paths) if name in path.links), "")
    return f"transport {topology.transport_name}{decides}"

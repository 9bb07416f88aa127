"""What a message costs between two ranks: its route, latency, the most that it may have, and who moves it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from .graph import Edge
from .parts import Drives, Link, Progress, Regime, Route, Transport

Steps = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """Latency (s) and rate (bytes/s) by message size: `starts` are the sizes (bytes) from which each pair holds.

    `resources` number the graph's shared resources in the order of the route; `links` name what it crosses.
    """

    links: tuple[str, ...]
    vertices: tuple[int, ...]
    resources: tuple[int, ...]
    starts: tuple[float, ...]
    latencies_s: tuple[float, ...]
    rates: tuple[float, ...]
    progress: Progress
    drives: Drives
    look_s: float
    eager_nbytes: float
    device_share: float
    slowed_by_compute: float

    @property
    def copied(self) -> bool:
        """Whether a core copies the message, rather than hardware."""
        return self.progress in ("thread", "polling")

    def latency_s(self, nbytes: int) -> float:
        """Seconds before the first byte flows."""
        return self.latencies_s[bisect_right(self.starts, nbytes) - 1]

    def rate(self, nbytes: int) -> float:
        """Bytes per second that one message may have at most."""
        return self.rates[bisect_right(self.starts, nbytes) - 1]

    def seconds(self, nbytes: int) -> float:
        """Latency and transfer of one message alone."""
        return self.latency_s(nbytes) + nbytes / self.rate(nbytes)


def assemble(
    edges: Sequence[Edge], links: Mapping[str, Link], resources: tuple[int, ...], alone: float, transport: Transport
) -> Path:
    """The path over `edges`, whose resources alone allow `alone` bytes per second, as the transport drives it."""
    crossed = [edge.link for edge in edges if edge.link is not None]
    route = next((found for name, found in reversed(transport.paths.items()) if name in crossed), Route())
    parts = [_steps(links[name]) for name in crossed]
    own = _own(route)
    starts = sorted({0.0, *(start for part in (*parts, own) for start in part[0])})
    latencies_s, rates = [], []
    for start in starts:
        legs = [_at(part, start) for part in parts]
        latency_s, rate = _at(own, start) if own[0] else (inf, inf)
        latencies_s.append(sum(leg[0] for leg in legs) if latency_s == inf else latency_s)
        rates.append(min([alone, rate, *(leg[1] for leg in legs)]))
    return Path(
        links=tuple(dict.fromkeys(crossed)),
        vertices=tuple(edge.target for edge in edges[:-1]),
        resources=resources,
        starts=tuple(starts),
        latencies_s=tuple(latencies_s),
        rates=tuple(rates),
        progress=route.progress or transport.progress,
        drives=route.drives or transport.drives,
        look_s=_or(route.look, transport.look),
        eager_nbytes=_or(route.eager, transport.eager),
        device_share=_or(route.device_share, transport.device_share),
        slowed_by_compute=_or(route.slowed_by_compute, transport.slowed_by_compute),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _table(regimes: tuple[Regime, ...]) -> Steps:
    return (
        tuple(regime.from_ for regime in regimes),
        tuple(regime.latency for regime in regimes),
        tuple(_or(regime.bandwidth, inf) for regime in regimes),
    )


def _steps(link: Link) -> Steps:
    """A link's latency and bound by size; what one cable carries is in the edge's rate."""
    return _table(link.regimes) if link.regimes else ((0.0,), (link.latency or 0.0,), (inf,))


def _own(route: Route) -> Steps:
    """What a transport says from end to end; an infinite latency where the links' hold."""
    if route.regimes:
        return _table(route.regimes)
    return ((0.0,), (_or(route.latency, inf),), (_or(route.bandwidth, inf),))


def _at(steps: Steps, start: float) -> tuple[float, float]:
    index = bisect_right(steps[0], start) - 1
    return steps[1][index], steps[2][index]

"""A timeline: what each rank did when, predicted or measured, and the digest of the schedule behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, overload

from .errors import ComparisonError

WAITS: Final = "wait"
POSTS: Final = ("send", "recv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One op of one rank. Times are seconds from the common start.

    kind: ``send``, ``recv`` (from post to observed completion), ``wait``, or the kernel's name. `poll_s` is the part of a
    kernel's time spent driving transfers. A wait is split: `late_s` until the peer of the post that ends it has posted, then
    `transfer_s` while bytes move and `progress_s` while nothing moves them or nobody has looked (a measured transfer
    includes the latter).
    """

    rank: int
    op: int
    kind: str
    step: int
    phase: str
    start_s: float
    end_s: float
    cpu_s: float = 0.0
    poll_s: float = 0.0
    late_s: float = 0.0
    transfer_s: float = 0.0
    progress_s: float = 0.0
    nbytes: int = 0
    peer: int = -1
    tag: int = -1

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """One ring step: seconds as means over ranks; the latencies of all steps of a rank add up to its total.

    `exposed_s` is communication that computation did not hide: waits after the peer has posted, and polls within kernels.
    """

    step: int
    latency_s: float
    slowest_s: float
    compute_s: float
    late_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Alike(Sequence[Event]):
    """The events of `world_size` ranks, rank after rank, where rank r does what rank r + `ranks` does at the same times.

    Holds those of ranks 0 to ranks - 1, `own`, and makes the others when they are looked at. Equal to a tuple of the same.
    """

    own: tuple[Event, ...]
    ranks: int
    world_size: int

    def of_rank(self, rank: int) -> tuple[Event, ...]:
        """The events of one rank, in program order."""
        turns, first = divmod(rank, self.ranks)
        return tuple(self._turned(event, turns) for event in self.own if event.rank == first)

    def _turned(self, event: Event, turns: int) -> Event:
        by = turns * self.ranks
        if not by:
            return event
        return replace(event, rank=event.rank + by, peer=(event.peer + by) % self.world_size if event.peer >= 0 else event.peer)

    def __len__(self) -> int:
        return len(self.own) * (self.world_size // self.ranks)

    def __iter__(self) -> Iterator[Event]:
        return (self._turned(event, turns) for turns in range(self.world_size // self.ranks) for event in self.own)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Event, ...]: ...
    def __getitem__(self, index: int | slice) -> Event | tuple[Event, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(len(self))))
        turns, number = divmod(range(len(self))[index], len(self.own))
        return self._turned(self.own[number], turns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Alike | tuple):
            return NotImplemented
        if isinstance(other, Alike) and self.ranks == other.ranks:
            return self.world_size == other.world_size and self.own == other.own
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Every rank's events on one axis. `facts` say where it comes from: topology or host, lowering, libraries.

    `events` are a tuple, or `Alike` where ranks are: sums and means then take one rank of each kind.
    """

    source: str
    digest: str
    world_size: int
    events: Sequence[Event]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def total_s(self) -> float:
        """Seconds from the first rank's start to the last rank's end."""
        blocking = [event for event in self._own if event.kind not in POSTS]
        if not blocking:
            return 0.0
        return max(event.end_s for event in blocking) - min(event.start_s for event in blocking)

    @property
    def _own(self) -> Sequence[Event]:
        """The events, of ranks that are alike only those of the first."""
        return self.events.own if isinstance(self.events, Alike) else self.events

    def of_rank(self, rank: int) -> tuple[Event, ...]:
        """The events of one rank, in program order."""
        if isinstance(self.events, Alike):
            return self.events.of_rank(rank)
        return tuple(event for event in self.events if event.rank == rank)

    def steps(self) -> tuple[StepTimes, ...]:
        """The timeline by ring step."""
        ranks = self.events.ranks if isinstance(self.events, Alike) else self.world_size
        of_step: dict[int, list[dict[str, float]]] = defaultdict(list)
        for (step, _), cell in self._cells().items():
            of_step[step].append(cell)
        return tuple(_step_times(step, of_step[step], ranks) for step in sorted(of_step))

    def _cells(self) -> dict[tuple[int, int], dict[str, float]]:
        """Sums by (step, rank); a rank's step lasts from the end of its last one to the end of its own last op."""
        cells: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
        origin = min((event.start_s for event in self._own if event.kind not in POSTS), default=0.0)
        clock = dict.fromkeys(range(self.world_size), origin)
        for event in self._own:
            if event.kind in POSTS:
                continue
            cell = cells[event.step, event.rank]
            cell["latency"] += event.end_s - clock[event.rank]
            clock[event.rank] = event.end_s
            cell["late"] += event.late_s
            if event.kind == WAITS:
                cell["exposed"] += event.transfer_s + event.progress_s
            else:
                cell["compute"] += event.duration_s - event.poll_s
                cell["exposed"] += event.poll_s
        return cells

    def exposed_s(self) -> float:
        """Exposed communication, mean over ranks, as the waits and polls show it."""
        return sum(step.exposed_s for step in self.steps())

    def late_s(self) -> float:
        """Waiting for a peer that has not posted yet (imbalance and skew), mean over ranks."""
        return sum(step.late_s for step in self.steps())

    def compute_s(self) -> float:
        """Computation, mean over ranks."""
        return sum(step.compute_s for step in self.steps())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reverses it. Of ranks that are alike the events are those of the first `alike`."""
        names = tuple(Event.__dataclass_fields__)
        rows = [[getattr(event, name) for name in names] for event in self._own]
        head = {"source": self.source, "digest": self.digest, "world_size": self.world_size, "total_s": self.total_s}
        steps = [asdict(step) for step in self.steps()]
        if isinstance(self.events, Alike):
            head["alike"] = self.events.ranks
        return head | {"facts": self.facts, "steps": steps, "event_columns": list(names), "events": rows}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Timeline:
        """A timeline from `to_dict`'s values."""
        names = values["event_columns"]
        events: Sequence[Event] = tuple(Event(**dict(zip(names, row, strict=True))) for row in values["events"])
        if "alike" in values:
            events = Alike(own=tuple(events), ranks=values["alike"], world_size=values["world_size"])
        kept = {name: values[name] for name in ("source", "digest", "world_size", "facts")}
        return cls(events=events, **kept)


def _step_times(step: int, cells: list[dict[str, float]], world_size: int) -> StepTimes:
    mean = {name: sum(cell[name] for cell in cells) / world_size for name in ("latency", "compute", "late", "exposed")}
    slowest = max(cell["latency"] for cell in cells)
    return StepTimes(
        step=step,
        latency_s=mean["latency"],
        slowest_s=slowest,
        compute_s=mean["compute"],
        late_s=mean["late"],
        exposed_s=mean["exposed"],
    )


def gather(parts: list[Timeline]) -> Timeline:
    """One timeline from each rank's own, with the first start at 0 and every wait split by its peers' posts.

    Raises ComparisonError if the digests differ.
    """
    digests = {part.digest for part in parts}
    if len(digests) != 1:
        raise ComparisonError(f"timelines of different schedules cannot be joined: {sorted(digests)}")
    events = [event for part in parts for event in part.events]
    origin = min((event.start_s for event in events), default=0.0)
    shifted = [replace(event, start_s=event.start_s - origin, end_s=event.end_s - origin) for event in events]
    return replace(parts[0], events=tuple(_split_waits(shifted)))


def _split_waits(events: list[Event]) -> list[Event]:
    """Fill `late_s` and `transfer_s` of measured waits; sends and receives match first in, first out."""
    partner = _partners(events)
    posts = {(event.rank, event.op): event for event in events if event.kind in POSTS}
    pending: dict[int, list[tuple[int, int]]] = defaultdict(list)
    result = []
    for event in events:
        if event.kind in POSTS:
            pending[event.rank].append((event.rank, event.op))
        if event.kind != WAITS:
            result.append(event)
            continue
        done = [key for key in pending[event.rank] if posts[key].end_s <= event.end_s]
        pending[event.rank] = [key for key in pending[event.rank] if posts[key].end_s > event.end_s]
        ending = [key for key in done if key in partner and posts[key].end_s >= event.start_s]
        peer_s = partner[max(ending, key=lambda key: posts[key].end_s)].start_s if ending else event.start_s
        late = min(max(peer_s - event.start_s, 0.0), event.duration_s)
        result.append(replace(event, late_s=late, transfer_s=event.duration_s - late))
    return result


def _partners(events: list[Event]) -> dict[tuple[int, int], Event]:
    """The other half of every post: per (source, target, tag), first in, first out."""
    halves: dict[tuple[int, int, int], tuple[list[Event], list[Event]]] = defaultdict(lambda: ([], []))
    for event in events:
        if event.kind == "send":
            halves[event.rank, event.peer, event.tag][0].append(event)
        elif event.kind == "recv":
            halves[event.peer, event.rank, event.tag][1].append(event)
    partner = {}
    for sends, recvs in halves.values():
        by_id = zip(sorted(sends, key=lambda e: e.op), sorted(recvs, key=lambda e: e.op), strict=True)
        for send, recv in by_id:
            partner[send.rank, send.op], partner[recv.rank, recv.op] = recv, send
    return partner

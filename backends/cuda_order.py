"""What has been launched and is not yet known to be done: events by which posts are held, and the times of kernels."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import perf_counter
from typing import Final, NamedTuple

from ringsim.backends.cuda import Calls, Event, Stream
from ringsim.errors import DeviceError
from ringsim.schedule.ops import Recv, Region, Send

READINGS: Final = 5


class Axis:
    """The device's clock on the host's: events that the host has seen happen. Reading them waits for the device.

    Read after each run whose times are asked for: the events' clock counts in float32 milliseconds, exact over short times only.
    """

    def __init__(self, calls: Calls, stream: Stream) -> None:
        self._calls = calls
        self._stream = stream
        self._seen, self._seen_s = self._read()

    def _read(self) -> tuple[Event, float]:
        event = self._calls.record(self._stream)
        self._calls.synchronize(event)
        return event, perf_counter()

    def refresh(self) -> None:
        """See events happen anew; of several readings that which the host saw soonest after it happened counts."""
        first, seen_s = self._read()
        for _ in range(READINGS - 1):
            event, now_s = self._read()
            seen_s = min(seen_s, now_s - self._calls.elapsed_s(first, event))
        self._seen, self._seen_s = first, seen_s

    def host_s(self, event: Event) -> float:
        """When an event before the reading was reached, by the host's perf_counter."""
        return self._seen_s - self._calls.elapsed_s(event, self._seen)


@dataclass(slots=True)
class Mark:
    """The stretch of the stream between two events: what one op launched, or up to where a run began."""

    order: Order
    run: int
    first: Event
    last: Event
    idle: bool = False
    """Whether nothing was launched in between."""
    _done: bool = False

    @property
    def done(self) -> bool:
        """Whether the device has come to its end."""
        if not self._done:
            self._done = self.order.calls.done(self.last)
        return self._done

    def span_s(self) -> tuple[float, float] | None:
        """When the device began and ended it, by the host's perf_counter; None if nothing was launched. Waits for the end.

        Raises DeviceError where two runs have come since: their events are those of this one.
        """
        if self.idle:
            return None
        if self.order.run > self.run + 1:
            raise DeviceError("the times of a run on a device are kept until the next run but one: ask for them earlier")
        self.order.settle()
        return self.order.axis.host_s(self.first), self.order.axis.host_s(self.last)


class _Touched(NamedTuple):
    reads: tuple[Region, ...]
    writes: tuple[Region, ...]
    mark: Mark

    def meets(self, post: Send | Recv) -> bool:
        """Whether the post must come after: it sends what is written here, or would overwrite what is used here."""
        regions = self.writes if isinstance(post, Send) else (*self.reads, *self.writes)
        return any(region.overlaps(post.region) for region in regions)


class Order:
    """Events on one stream, in the order of launches. Marks hold until the next run but one: events are used again."""

    def __init__(self, calls: Calls, stream: Stream) -> None:
        self.calls = calls
        self.stream = stream
        self.axis = Axis(calls, stream)
        self._events: tuple[list[Event], list[Event]] = ([], [])
        self._used = self.run = 0
        self._running: deque[_Touched] = deque()
        self._settled = True
        self._start = self._stretch(self.event(), idle=True)

    def event(self) -> Event:
        """An event recorded now; those of the last run but one are taken again."""
        events = self._events[0]
        if self._used == len(events):
            events.append(self.calls.record(self.stream))
        else:
            self.calls.record(self.stream, events[self._used])
        self._used += 1
        return events[self._used - 1]

    def _stretch(self, first: Event, *, idle: bool = False) -> Mark:
        return Mark(self, self.run, first, first if idle else self.event(), idle)

    def begin(self) -> None:
        """A run begins: no post may come before what is on the stream now."""
        self._events = self._events[1], self._events[0]
        self._used = 0
        self.run += 1
        self._running.clear()
        self._settled = False
        event = self.event()
        self._start = self._stretch(event, idle=True)

    def mark(self, first: Event, reads: tuple[Region, ...], writes: tuple[Region, ...], *, idle: bool) -> Mark:
        """What was launched since `first` used these regions."""
        made = self._stretch(first, idle=idle)
        if not idle:
            while self._running and self._running[0].mark.done:
                self._running.popleft()
            self._running.append(_Touched(reads, writes, made))
        return made

    def gate(self, post: Send | Recv) -> Mark | None:
        """The last launch that must be done before the post, or where the run began; None if that is done."""
        found = next((one.mark for one in reversed(self._running) if one.meets(post)), self._start)
        return None if found.done else found

    def settle(self) -> None:
        """Wait for the device and read its clock, once after each run."""
        if not self._settled:
            self.axis.refresh()
            self._settled = True

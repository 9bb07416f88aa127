"""A stream of its own for copies, and what of them is complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from ringsim.backends.cuda import Calls, DeviceArray, Event, Stream

T = TypeVar("T")


class Track(Generic[T]):
    """Work on a stream in order, each piece known by a value of the caller's; events are used again."""

    def __init__(self, calls: Calls) -> None:
        self.stream: Stream = calls.stream()
        self._calls = calls
        self._running: deque[tuple[Event, T]] = deque()
        self._spare: list[Event] = []

    def copy(self, target: DeviceArray, source: DeviceArray, what: T) -> None:
        """Queue a copy between flat uint8 arrays of one size."""
        self._calls.copy(target, source, self.stream)
        self.mark(what)

    def mark(self, what: T) -> None:
        """`what` is complete when all that is on the stream so far is."""
        event = self._calls.record(self.stream, self._spare.pop() if self._spare else None)
        self._running.append((event, what))

    def finished(self) -> Iterator[T]:
        """What has been completed since it was last asked, in order; asks the device, and does not wait."""
        while self._running and self._calls.done(self._running[0][0]):
            event, what = self._running.popleft()
            self._spare.append(event)
            yield what

    def __len__(self) -> int:
        return len(self._running)

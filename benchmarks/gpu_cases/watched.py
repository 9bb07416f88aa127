"""CUDA's calls, watched: counted, delayed, or timed on their way to the card."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from ringsim.backends.cuda import Calls, DeviceArray, Kernel, Launch, Stream

ALLOCATIONS: Final = ("empty", "pooled", "pinned")
POISON: Final = 0xFF
"""Of memory that nothing was written to: NaN in every floating dtype."""


class Watched:
    """`Calls` that counts what is called, by name, and remembers which kernels were launched."""

    def __init__(self, calls: Calls) -> None:
        self.inner = calls
        self.counts: Counter[str] = Counter()
        self.kernels: set[Kernel] = set()

    def __getattr__(self, name: str) -> Any:
        made = getattr(self.inner, name)
        if not callable(made):
            return made

        def counted(*arguments: Any, **named: Any) -> Any:
            self.counts[name] += 1
            return made(*arguments, **named)

        return counted

    def launch(self, kernel: Kernel, shape: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        """Count and pass on."""
        self.counts["launch"] += 1
        self.kernels.add(kernel)
        self.inner.launch(kernel, shape, arguments, stream)

    def allocations(self) -> int:
        """Allocations so far."""
        return sum(self.counts[name] for name in ALLOCATIONS)


class Delayed(Watched):
    """Some launches and copies come late: `spin` queues a kernel that does nothing for so many seconds. New memory is poison."""

    def __init__(
        self, calls: Calls, spin: Callable[[Stream, float], None], *, most_s: float, seed: int, share: float = 0.3
    ) -> None:
        super().__init__(calls)
        self._spin = spin
        self._most_s = most_s
        self._share = share
        self._random = random.Random(seed)
        self.delays = 0

    def hold_up(self, stream: Stream) -> None:
        """Delay the stream, or do not."""
        if self._random.random() < self._share:
            self.delays += 1
            self._spin(stream, self._random.uniform(0.1, 1.0) * self._most_s)

    def empty(self, nbytes: int) -> DeviceArray:
        """Poisoned."""
        self.counts["empty"] += 1
        made = self.inner.empty(nbytes)
        stream = self.inner.caller(None)
        self.inner.fill(made, POISON, stream)
        self.inner.synchronize(self.inner.record(stream))
        return made

    def launch(self, kernel: Kernel, shape: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        """Later, perhaps."""
        self.hold_up(stream)
        super().launch(kernel, shape, arguments, stream)

    def copy(self, target: DeviceArray, source: DeviceArray, stream: Stream) -> None:
        """Later, perhaps."""
        self.hold_up(stream)
        self.counts["copy"] += 1
        self.inner.copy(target, source, stream)


class Timed(Watched):
    """Launches between two events; `seconds` sums what each kernel took, by its name, once the device is done."""

    def __init__(self, calls: Calls) -> None:
        super().__init__(calls)
        self._spans: list[tuple[str, Any, Any]] = []

    def launch(self, kernel: Kernel, shape: Launch, arguments: Sequence[Any], stream: Stream) -> None:
        """Between two events."""
        first = self.inner.record(stream)
        super().launch(kernel, shape, arguments, stream)
        self._spans.append((kernel.name, first, self.inner.record(stream)))

    def seconds(self) -> dict[str, float]:
        """By kernel; forgets them."""
        found: Counter[str] = Counter()
        for name, first, last in self._spans:
            found[name] += self.inner.elapsed_s(first, last)  # type: ignore[assignment]
        self._spans.clear()
        return dict(found)

"""What every section is given, and how it times: by events, alternating, medians with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from ringsim.backends.cuda import Calls, Stream
from ringsim.backends.cuda_tiles import Tiles

from .card import Card, Sizes

WARMUP: Final = 2
Save = Callable[[], None]


@dataclass(slots=True, kw_only=True)
class Bench:
    """The card, the sizes, where files go, which MPI launchers there are, and what sections leave for later ones in `found`."""

    card: Card
    sizes: Sizes
    folder: Path
    launchers: Mapping[str, list[str]] = field(default_factory=dict)
    save: Save = lambda: None
    """Write the JSON now: what was predicted before it is measured."""
    found: dict[str, Any] = field(default_factory=dict)
    _tiles: list[tuple[Tiles, ...]] = field(default_factory=list)

    def tiles(self, ranks: int) -> list[tuple[Tiles, ...]]:
        """Fused kernels for each of so many ranks, kept for all sections: what cuDNN planned once need not be planned again."""
        while len(self._tiles) < ranks:
            self._tiles.append(self.card.tiles(self.card.calls))
        return self._tiles[:ranks]


def event_s(calls: Calls, stream: Stream, run: Callable[[], None], lead: Callable[[], None] | None = None) -> float:
    """Seconds of the device from before to after what `run` queues on the stream; waits for it.

    `lead` queues something that lasts until the host has queued the rest, as what came before does in a program.
    """
    if lead is not None:
        lead()
    first = calls.record(stream)
    run()
    last = calls.record(stream)
    calls.synchronize(last)
    return calls.elapsed_s(first, last)


def alternating(
    calls: Calls,
    stream: Stream,
    runs: Mapping[str, Callable[[], None]],
    repeats: int,
    lead: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each of `runs` by name, taken in turns so that clocks and neighbours meet all alike."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARMUP + repeats):
        for name, run in runs.items():
            seconds = event_s(calls, stream, run, lead)
            if turn >= WARMUP:
                samples[name].append(seconds)
    return samples


def spread(samples: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median_s": median(samples), "low_s": min(samples), "high_s": max(samples)}


def rate(work: float, seconds: float, unit: float = 1e12) -> float:
    """Work per second, in `unit`s; 0 where no time passed."""
    return work / seconds / unit if seconds > 0 else 0.0

"""Section `races`: slots poisoned, kernels, copies and posts held up at random: the bits stay.

And a mutant that hands buffers over without the event wait must come out wrong.
"""

from __future__ import annotations

import random
import time
from typing import Any, ClassVar, Final

import numpy as np

from ringsim.backends.cupy import CupyBackend
from ringsim.schedule import Recv, Schedule, Send
from ringsim.schedule.ops import Compute

from . import rings
from .bench import Bench
from .record import Record
from .strategies import MADE, SEED
from .watched import Delayed

RUNS: Final = (
    ("ring", "zigzag", "forward"),
    ("q-ring", "striped", "forward"),
    ("ring", "zigzag", "both"),
    ("burst", "zigzag", "both"),
)
RANKS: Final = 4
HOST_S: Final = 2e-3
"""The longest that the host sleeps before a post."""


class Delaying(CupyBackend):
    """Holds up its stream before ops, and the host before posts, at random."""

    dice: ClassVar[random.Random] = random.Random(0)
    most_host_s: ClassVar[float] = HOST_S

    def compute(self, op: Compute, fetch: Any, *, scale: float, poll: Any) -> Any:
        """Later, perhaps."""
        hold_up = getattr(self.calls, "hold_up", None)
        if hold_up is not None:
            hold_up(self.stream)
        return super().compute(op, fetch, scale=scale, poll=poll)

    def gate(self, post: Send | Recv) -> Any:
        """Later, perhaps."""
        if self.dice.random() < 0.2:
            time.sleep(self.dice.random() * self.most_host_s)
        return super().gate(post)


class Hasty(Delaying):
    """The mutant: posts do not wait for the event of the kernels that make, or still read, their bytes."""

    def gate(self, post: Send | Recv) -> None:
        """Whatever the device still does."""
        super().gate(post)


def run(bench: Bench, record: Record) -> None:
    """Each run's bits undisturbed, then disturbed, then the mutant's."""
    caught = {}
    for strategy, partition, pass_ in RUNS:
        name = f"{strategy} {partition} {pass_}"
        if record.late(name):
            continue
        with record.attempt("runs", name):
            caught[name] = _disturbed(bench, record, name, (strategy, partition, pass_))
    record.values["caught"] = {"of": bench.sizes.race_seeds} | caught
    record.values["seed"] = SEED
    record.say(f"poisoned and delayed, {bench.sizes.race_seeds} seeds each; mutant without the event wait wrong in {caught}")


def _disturbed(bench: Bench, record: Record, name: str, of: tuple[str, str, str]) -> int:
    """One run under every seed; in how many the mutant was wrong."""
    strategy, partition, pass_ = of
    work = rings.workload(bench.sizes.races, "causal", "bfloat16", pass_)
    schedule = Schedule(workload=work, world_size=RANKS, strategy=strategy, partition=partition)
    arrays = rings.given(work, SEED)
    right, _ = _bits(bench, schedule, arrays, CupyBackend, None)
    for seed in range(bench.sizes.race_seeds):
        found, delays = _bits(bench, schedule, arrays, Delaying, seed)
        record.require("the same bits however late kernels and messages come", f"{name}, seed {seed}", found == right)
        record.values[f"{name}, seed {seed}"] = {"delays": delays}
    caught = sum(_bits(bench, schedule, arrays, Hasty, seed)[0] != right for seed in range(bench.sizes.race_seeds))
    record.require("the mutant without the event wait is caught", f"{name}: never wrong", caught > 0)
    return caught


def _bits(
    bench: Bench,
    schedule: Schedule,
    arrays: dict[str, np.ndarray],
    backend: type[CupyBackend],
    seed: int | None,
) -> tuple[bytes, int]:
    """All that a run made, as bytes, and how often its streams were held up.

    Where the mutant runs all kernels come late and no message does: that is what it does not wait for.
    """
    calls: Any = bench.card.calls
    hasty = backend is Hasty
    if seed is not None:
        share = 1.0 if hasty else 0.3
        calls = Delayed(calls, bench.card.spin, most_s=bench.sizes.spin_s, seed=seed, share=share)
        Delaying.dice = random.Random(seed)
        Delaying.most_host_s = min(HOST_S, bench.sizes.spin_s)
    group = rings.together(bench, schedule, calls=calls, link=bench.card.calls if hasty else None, backend=backend)
    held = group.shards(**arrays)
    rings.poison(group)
    result = group.result(held, group.run(held))
    made = b"".join(np.ascontiguousarray(getattr(result, name)).tobytes() for name in MADE if getattr(result, name) is not None)
    return made, 0 if seed is None else calls.delays

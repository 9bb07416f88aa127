"""Comparison: a prediction next to its measurements, step by step, with the error and the spread of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from .errors import ComparisonError
from .timeline import StepTimes, Timeline

QUANTITIES = ("total_s", "compute_s", "exposed_s", "late_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A quantity over repeated runs, in seconds."""

    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Measured:
        """Median, least and greatest of the samples."""
        return cls(median_s=median(samples), low_s=min(samples), high_s=max(samples))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepComparison:
    """One ring step, means over ranks: what was predicted, and what the repeated runs measured."""

    step: int
    predicted: StepTimes
    latency: Measured
    compute: Measured
    exposed: Measured
    late: Measured

    @property
    def error(self) -> float:
        """Predicted over measured latency, less one."""
        return relative_error(self.predicted.latency_s, self.latency.median_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A predicted timeline and at least one measured one of the same schedule."""

    predicted: Timeline
    measured: tuple[Timeline, ...]
    steps: tuple[StepComparison, ...]
    total: Measured

    @property
    def error(self) -> float:
        """Predicted over measured total (median over runs), less one."""
        return relative_error(self.predicted.total_s, self.total.median_s)

    def quantity(self, name: str) -> tuple[float, Measured]:
        """Prediction and measurement of one of QUANTITIES."""
        return _value(self.predicted, name), Measured.of([_value(timeline, name) for timeline in self.measured])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ``predicted``, ``measured``, ``error`` and ``steps``."""
        quantities = {name: self.quantity(name) for name in QUANTITIES}
        return {
            "digest": self.predicted.digest,
            "world_size": self.predicted.world_size,
            "predicted": {name: value for name, (value, _) in quantities.items()} | {"facts": self.predicted.facts},
            "measured": {name: found.median_s for name, (_, found) in quantities.items()}
            | {"spread": {name: [found.low_s, found.high_s] for name, (_, found) in quantities.items()}}
            | {"samples_total_s": [timeline.total_s for timeline in self.measured], "facts": self.measured[0].facts},
            "error": {"total": self.error},
            "steps": [asdict(step) | {"error": step.error} for step in self.steps],
        }


def relative_error(predicted: float, measured: float) -> float:
    """Prediction over measurement, less one; 0 where both are 0."""
    if measured == 0:
        return 0.0 if predicted == 0 else float("inf")
    return predicted / measured - 1


def compare(predicted: Timeline, measured: Timeline | Sequence[Timeline]) -> Comparison:
    """Put a prediction beside measurements of the same schedule.

    Raises ComparisonError if a digest differs, or without a measurement.
    """
    runs = (measured,) if isinstance(measured, Timeline) else tuple(measured)
    if not runs:
        raise ComparisonError("nothing was measured: give at least one measured timeline")
    for run in runs:
        if run.digest != predicted.digest:
            raise ComparisonError(
                f"the prediction is of schedule {predicted.digest[:12]} and the measurement of {run.digest[:12]}: "
                "their workload (its pass, too), partition, ranks or strategy differ"
            )
    by_step = [{step.step: step for step in run.steps()} for run in runs]
    steps = tuple(_step(step, [run[step.step] for run in by_step if step.step in run]) for step in predicted.steps())
    return Comparison(predicted=predicted, measured=runs, steps=steps, total=Measured.of([run.total_s for run in runs]))


def _value(timeline: Timeline, name: str) -> float:
    value = getattr(timeline, name)
    return float(value() if callable(value) else value)


def _step(predicted: StepTimes, measured: list[StepTimes]) -> StepComparison:
    found = {
        name: Measured.of([getattr(step, f"{name}_s") for step in measured] or [0.0])
        for name in ("latency", "compute", "exposed", "late")
    }
    return StepComparison(step=predicted.step, predicted=predicted, **found)

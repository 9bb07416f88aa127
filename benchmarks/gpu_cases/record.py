"""What a section found: checks that must hold, targets that should be met, numbers; kept even where it fails half-way."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

MOST_NAMED: Final = 20
"""Failed cases that are named one by one."""
MOST_SAID: Final = 1000
PASSED, MISSED, FAILED, INCOMPLETE, SKIPPED = "passed", "missed", "failed", "incomplete", "skipped"


@dataclass(slots=True)
class Group:
    """Cases of one check: how many, how near the limit the worst came, and those beyond it."""

    cases: int = 0
    worst: float = 0.0
    """Of value / limit."""
    worst_case: str = ""
    failed: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "cases": self.cases,
            "worst_of_limit": self.worst,
            "worst_case": self.worst_case,
            "failures": len(self.failed),
            "failed": self.failed[:MOST_NAMED],
        }


@dataclass(slots=True)
class Record:
    """One section's. Times are seconds; `deadline_s` is when the section should end, on time.monotonic's axis."""

    name: str
    deadline_s: float = math.inf
    began: bool = False
    seconds: float = 0.0
    error: str | None = None
    groups: dict[str, Group] = field(default_factory=dict)
    targets: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def check(self, group: str, case: str, value: float, limit: float) -> None:
        """`value` must be at most `limit` (NaN is not)."""
        kept = self.groups.setdefault(group, Group())
        kept.cases += 1
        share = value / limit if limit else (0.0 if value == 0 else math.inf)
        if math.isnan(share) or share > kept.worst or not kept.worst_case:
            kept.worst, kept.worst_case = share, case
        if not value <= limit:
            kept.failed.append(f"{case}: {value:.3g}, limit {limit:.3g}")

    def require(self, group: str, case: str, holds: bool, found: str = "") -> None:
        """Something that must hold."""
        kept = self.groups.setdefault(group, Group())
        kept.cases += 1
        if not holds:
            kept.failed.append(f"{case}: {found}" if found else case)

    @contextmanager
    def attempt(self, group: str, case: str) -> Iterator[None]:
        """Within: one case; what it raises fails it, and goes no further."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one case's failure must not lose the others
            self.require(group, case, False, f"{type(error).__name__}: {error}"[:MOST_SAID])

    def target(self, name: str, value: float, limit: float, *, at_least: bool) -> None:
        """A number that should reach a limit, or stay below it; missing it is no fault of the answer."""
        met = value >= limit if at_least else value <= limit
        self.targets.append({"name": name, "value": value, "limit": limit, "at_least": at_least, "met": bool(met)})

    def late(self, case: str) -> bool:
        """Whether there is no time for this case, which is then listed as skipped."""
        if time.monotonic() < self.deadline_s:
            return False
        self.skipped.append(case)
        return True

    def say(self, line: str) -> None:
        """A line of the table."""
        self.lines.append(line)

    @property
    def status(self) -> str:
        """One of the five words. What was not run is never ``passed``."""
        if self.error is not None or any(group.failed for group in self.groups.values()):
            return FAILED
        if not self.began:
            return SKIPPED
        if any(not target["met"] for target in self.targets):
            return MISSED
        return INCOMPLETE if self.skipped else PASSED

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "status": self.status,
            "seconds": self.seconds,
            "error": self.error,
            "checks": {name: group.to_dict() for name, group in self.groups.items()},
            "targets": self.targets,
            "skipped": self.skipped,
            "lines": self.lines,
            "values": self.values,
        }

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Within: the section runs; what it raises is kept as its error, and goes no further."""
        import traceback

        self.began = True
        begin = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - one section's failure must not lose the others
            self.error = "".join(traceback.format_exception(error))[-6000:]
        finally:
            self.seconds = time.monotonic() - begin

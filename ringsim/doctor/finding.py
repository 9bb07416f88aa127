"""What the doctor finds: one fact with its status, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

from .system import System

Status = Literal["ok", "note", "wrong"]
STATUSES: Final[tuple[Status, ...]] = ("ok", "note", "wrong")
"""From good to bad."""
LONGEST: Final = 400


def line(text: str) -> str:
    """Text from outside as one printable line of bounded length."""
    clean = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * LONGEST]).split())
    return clean if len(clean) <= LONGEST else clean[:LONGEST] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One fact of one host or one rank, and as `remedy` what to do where it is not ok.

    `differing` is the status that it has where hosts or ranks differ in it, if that is worse than its own. `details` are further
    facts, as JSON has them; they are not compared.
    """

    subject: str
    name: str
    fact: str
    status: Status = "ok"
    remedy: str = ""
    differing: Status = "ok"
    each: Literal["host", "rank"] = "host"
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("fact", "remedy"):
            object.__setattr__(self, name, line(getattr(self, name)))


class Probe(NamedTuple):
    """A function that looks at the system, the subject under which it reports, and what it is called if it fails."""

    subject: str
    name: str
    look: Callable[[System], list[Finding]]


def worst(statuses: list[Status]) -> Status:
    """The worst of some statuses; ok for none."""
    return max(statuses, key=STATUSES.index, default="ok")


def attempt(probe: Probe, system: System) -> list[Finding]:
    """What a probe finds; where it fails, that."""
    try:
        return probe.look(system)
    except OSError as error:
        remedy = "run `ringsim doctor` where this can be read; the rest of this report does not rest on it"
        text = f"cannot be read: {type(error).__name__}: {error}"
        return [Finding(subject=probe.subject, name=probe.name, fact=text, status="note", remedy=remedy)]
    except Exception as error:  # noqa: BLE001 - a probe that fails is itself a finding, and the others still speak
        remedy = "a fault of ringsim doctor itself: report this line with the output of `ringsim doctor --json doctor.json`"
        text = f"the probe failed: {type(error).__name__}: {error}"
        return [Finding(subject=probe.subject, name=probe.name, fact=text, status="wrong", remedy=remedy)]

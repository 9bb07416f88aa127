"""What many ranks found, put together: what is common once, else who found what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from . import cpus
from .finding import STATUSES, Finding, Status, worst

MOST_NAMED: Final = 6
SAME: Final = "make it the same on every host, or leave these hosts out"


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """What one rank found. Only the first rank of a host looked at what its ranks have in common."""

    rank: int
    host: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A fact, and the ranks that have it; `where` is empty if all have that could."""

    subject: str
    name: str
    status: Status
    fact: str
    remedy: str
    where: str
    ranks: tuple[int, ...]
    details: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "subject": self.subject,
            "name": self.name,
            "status": self.status,
            "fact": self.fact,
            "remedy": self.remedy,
            "where": self.where,
            "ranks": list(self.ranks),
            "details": list(self.details),
        }


def merge(examined: Sequence[Examined]) -> tuple[Line, ...]:
    """The lines of all ranks' findings, in the order in which the first rank that has them found them."""
    by_name: dict[tuple[str, str], list[tuple[Examined, Finding]]] = {}
    for one in examined:
        for finding in one.findings:
            by_name.setdefault((finding.subject, finding.name), []).append((one, finding))
    order = {subject: index for index, subject in enumerate(dict.fromkeys(subject for subject, _ in by_name))}
    lines = [line for found in by_name.values() for line in _lines(found, examined)]
    return tuple(sorted(lines, key=lambda line: order[line.subject]))


def _lines(found: list[tuple[Examined, Finding]], examined: Sequence[Examined]) -> list[Line]:
    """The lines of one name: the most common fact first."""
    groups: dict[tuple[str, str, str], list[tuple[Examined, Finding]]] = {}
    for one, finding in found:
        groups.setdefault((finding.fact, finding.status, finding.remedy), []).append((one, finding))
    first = found[0][1]
    expected = (
        {one.rank for one in examined}
        if first.each == "rank"
        else {rank for ranks in _hosts(examined).values() for rank in ranks[:1]}
    )
    everywhere = len(groups) == 1 and {one.rank for one, _ in found} == expected
    lines = []
    for members in sorted(groups.values(), key=len, reverse=True):
        finding = members[0][1]
        status = finding.status if len(groups) == 1 else worst([finding.status, finding.differing])
        lines.append(
            Line(
                subject=finding.subject,
                name=finding.name,
                status=status,
                fact=finding.fact,
                remedy="" if status == "ok" else finding.remedy or SAME,
                where="" if everywhere else _where([one for one, _ in members], finding.each, examined),
                ranks=tuple(one.rank for one, _ in members),
                details=tuple(entry.details for _, entry in members if entry.details),
            )
        )
    return lines


def _hosts(examined: Sequence[Examined]) -> dict[str, list[int]]:
    hosts: dict[str, list[int]] = {}
    for one in examined:
        hosts.setdefault(one.host, []).append(one.rank)
    return hosts


def _where(members: list[Examined], each: str, examined: Sequence[Examined]) -> str:
    """Hosts by name, or ranks by number; whole hosts where all their ranks say the same."""
    hosts, ranks = _hosts(examined), {one.rank for one in members}
    names = list(dict.fromkeys(one.host for one in members))
    if each == "rank" and not all(set(hosts[name]) <= ranks for name in names):
        return f"rank{'s' if len(ranks) > 1 else ''} {cpus.shown(ranks)}"
    if len(names) > MOST_NAMED:
        return f"{len(names)} of {len(hosts)} hosts, as {names[0]}"
    return f"host{'s' if len(names) > 1 else ''} {', '.join(names)}"


def verdict(lines: Sequence[Line]) -> Status:
    """The worst status."""
    return worst([line.status for line in lines])


def count(lines: Sequence[Line], status: Status) -> int:
    """Lines of a status."""
    return sum(line.status == status for line in lines) if status in STATUSES else 0

"""The doctor's report: for people, and as facts for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .. import __version__
from .choice import Choice
from .finding import Status
from .merge import Line, count, verdict

SCHEMA: Final = 1
STYLES: Final[dict[Status, str]] = {"ok": "green", "note": "yellow", "wrong": "bold red"}
MOST_ALIKE: Final = 4
"""Lines of one name that are shown where all are good; --json has all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All lines, the hosts, what ringsim would use, and how many ranks have the processors of rank 0.

    `ready`: every rank has a GPU, and the GPU backend can be tried.
    """

    hosts: tuple[str, ...]
    world_size: int
    lines: tuple[Line, ...]
    choice: Choice
    sharing: int
    ready: bool = False

    @property
    def status(self) -> Status:
        """The worst of all lines."""
        return verdict(self.lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `schema` counts changes of the form."""
        return {
            "schema": SCHEMA,
            "ringsim": __version__,
            "status": self.status,
            "hosts": list(self.hosts),
            "world_size": self.world_size,
            "findings": [line.to_dict() for line in self.lines],
            "use": self.choice.to_dict(),
        }


def head(report: Report) -> RenderableType:
    """Whom the report is about."""
    names = ", ".join(report.hosts[:MOST_ALIKE]) + (", ..." if len(report.hosts) > MOST_ALIKE else "")
    hosts, ranks = len(report.hosts), report.world_size
    return Text(f"ringsim {__version__} on {names}: {hosts} host{'s'[: hosts > 1]}, {ranks} rank{'s'[: ranks > 1]}\n")


def body(lines: Sequence[Line]) -> RenderableType:
    """Lines by subject and name."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for subject, of_subject in groupby(lines, key=lambda line: line.subject):
        for index, (_, of_name) in enumerate(groupby(of_subject, key=lambda line: line.name)):
            _add(table, subject if index == 0 else "", list(of_name))
    return table


def tail(report: Report) -> RenderableType:
    """What ringsim would use, and how it stands."""
    choice = report.choice
    use = f"\nringsim would use: backend {choice.backend}, transport {choice.transport}, threads {choice.threads}\n"
    why = "\n".join(f"  {reason}" for reason in choice.why)
    return Group(Text(use + why), Text("\n" + sentence(report), style=STYLES[report.status]))


def sentence(report: Report) -> str:
    """How it stands, in a line."""
    wrong, notes = (count(report.lines, status) for status in ("wrong", "note"))
    noted = f"{notes} thing{'s' if notes != 1 else ''} to note" if notes else "nothing to note"
    if not wrong:
        return f"nothing is wrong, {noted}"
    return f"{wrong} thing{'s are' if wrong > 1 else ' is'} wrong, {noted}"


def _add(table: Table, subject: str, lines: list[Line]) -> None:
    """The lines of one name; of many that are all good, the first and their number."""
    shown = lines if len(lines) <= MOST_ALIKE or any(line.status != "ok" for line in lines) else lines[:1]
    for index, line in enumerate(shown):
        where = f"{line.where}: " if line.where else ""
        more = f" (and {len(lines) - 1} others: --json FILE has all)" if len(shown) < len(lines) else ""
        status = Text(line.status, style=STYLES[line.status])
        table.add_row(
            Text(subject if index == 0 else ""), status, Text(line.name if index == 0 else ""), Text(f"{where}{line.fact}{more}")
        )
        alike = index + 1 < len(shown) and shown[index + 1].remedy == line.remedy
        if line.remedy and not alike:
            table.add_row("", "", "", Text(f"-> {line.remedy}", style="italic"))

"""All sections' records together: the JSON that is written after each of them, the table, and the exit code."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ringsim
from ringsim import backends, files

from .record import FAILED, INCOMPLETE, MISSED, PASSED, SKIPPED, Record

WORDS: Final = (PASSED, MISSED, FAILED, INCOMPLETE, SKIPPED)
WRONG, LEFT_OUT = 1, 3
"""Exit codes: something failed or missed its target; nothing did, and something was not run."""
MOST_SAID: Final = 300


class Report:
    """Records by the names of their sections, and the file that they are written to."""

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self._begin = time.monotonic()
        self._head = {
            "ringsim": ringsim.__version__,
            "sources": sources(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "asked": dict(asked),
        }

    def save(self) -> None:
        """Write the file as a whole, then put it in place."""
        made = {name: record.to_dict() for name, record in self.records.items()}
        summary = {word: [name for name, record in self.records.items() if record.status == word] for word in WORDS}
        ending = {"seconds": time.monotonic() - self._begin, "code": self.code(), "summary": summary, "sections": made}
        files.write_json(self.path, self._head | ending)

    def code(self) -> int:
        """The exit code."""
        found = {record.status for record in self.records.values()}
        if found & {FAILED, MISSED}:
            return WRONG
        return LEFT_OUT if found & {SKIPPED, INCOMPLETE} else 0

    def table(self) -> str:
        """Some lines a section."""
        return "\n".join(lines(record) for record in self.records.values())


def lines(record: Record) -> str:
    """Status and seconds, what the section has to say, and what is wrong, missed or left out."""
    made = [f"{record.name:<11} {record.status:<11} {record.seconds:6.1f} s"]
    made += [f"    {line}" for line in record.lines]
    for one in record.targets:
        if not one["met"]:
            made.append(f"    MISSED {one['name']}: {one['value']:.3g}, limit {one['limit']:g}")
    for group, found in record.groups.items():
        if found.failed:
            made.append(f"    WRONG {group}: {len(found.failed)} of {found.cases}: {found.failed[0][:MOST_SAID]}")
    if record.error is not None:
        made.append(f"    ERROR {record.error.strip().splitlines()[-1][:MOST_SAID]}")
    if record.skipped:
        made.append(f"    not run: {len(record.skipped)}, first {record.skipped[0][:MOST_SAID]}")
    return "\n".join(made)


def sources() -> str:
    """SHA-256 over the package's own files: which version of it this is, where no git says."""
    total = hashlib.sha256()
    for package in (ringsim, backends):
        folder = Path(str(package.__file__)).resolve().parent
        for path in sorted(one for one in folder.rglob("*") if one.suffix in (".py", ".cu", ".cuh")):
            total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()

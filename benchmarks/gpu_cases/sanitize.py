"""Sections `kernels`, `strategies` and `races`, reduced, under compute-sanitizer: memcheck on all, racecheck on our own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from .record import Record

FAULTY: Final = 99
"""The exit code by which the sanitizer says that it found something."""
SUMMARY: Final = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


class Check(NamedTuple):
    """A tool with its options, and the sections to run under it."""

    tool: str
    options: tuple[str, ...]
    sections: str
    own: bool


CHECKS: Final = (
    Check("memcheck", ("--leak-check", "no"), "kernels,strategies,races", own=False),
    Check("racecheck", (), "kernels", own=True),
    Check("initcheck", (), "kernels", own=True),
    Check("synccheck", (), "kernels", own=True),
)
Launch = Callable[[list[str], float], tuple[int, str]]


def launch(words: list[str], limit_s: float) -> tuple[int, str]:
    """Exit code and output; 124 where the limit came first."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        return 124, said.decode(errors="replace") if isinstance(said, bytes) else said
    return done.returncode, done.stdout + done.stderr


def run(record: Record, script: Path, folder: Path, seconds: float, start: Launch = launch) -> None:
    """Each tool within an equal share of what is left. A tool that did not come to its end is no proof."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        record.require("compute-sanitizer", "it is not on the PATH: install the CUDA toolkit", False)
        return
    end = time.monotonic() + seconds
    for number, (tool, options, sections, own) in enumerate(CHECKS):
        left = (end - time.monotonic()) / (len(CHECKS) - number)
        if left < 1:
            record.skipped.append(tool)
            continue
        out = folder / f"{tool}.json"
        asked = [
            "--reduced",
            "--only",
            sections,
            "--out",
            str(out),
            "--minutes",
            f"{left / 60 * 0.9:.3f}",
            *(["--own"] if own else []),
        ]
        words = [program, "--tool", tool, "--error-exitcode", str(FAULTY), *options, sys.executable, str(script), *asked]
        code, said = start(words, left)
        _note(record, tool, code, said)


def _note(record: Record, tool: str, code: int, said: str) -> None:
    found = [int(one or other) for one, other in SUMMARY.findall(said)]
    value: dict[str, Any] = {"exit_code": code, "errors": found, "end": said[-3000:]}
    record.values[tool] = value
    if code == 124:
        record.skipped.append(f"{tool}: not done in time, {sum(found)} errors so far")
        return
    record.require(f"{tool} clean", tool, bool(found) and not any(found), f"exit code {code}, summary {found or 'missing'}")
    record.require(f"{tool}: the sections themselves", tool, code in (0, 3), f"exit code {code}: {said[-800:]}")
    record.say(f"{tool}: {sum(found) if found else 'no summary:'} errors, exit code {code}")

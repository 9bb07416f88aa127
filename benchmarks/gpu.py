"""What ringsim does on one GPU: right, fast and as predicted? One command, under 8 minutes, no network.

    python benchmarks/gpu.py --out gpu.json                  every section, in the order of importance
    python benchmarks/gpu.py --only kernels,speed
    python benchmarks/gpu.py --sanitize --out sanitize.json  a reduced run under compute-sanitizer

Each section is timed and may fail by itself. The JSON is written anew after every section; what there was no time for is listed
as skipped, never as passed. Exit code 0: all that was asked for passed; 1: something failed or missed its target; 2: it cannot
run here; 3: nothing failed, and something was skipped. docs/gpu-checklist.md says which run showed what.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from gpu_cases import (
    built,
    facts,
    loss,
    million,
    prediction,
    quiet,
    races,
    sanitize,
    sharing,
    speed,
    strategies,
    tiles,
)
from gpu_cases.bench import Bench
from gpu_cases.card import FULL, REDUCED, Card, Sizes
from gpu_cases.record import Record
from gpu_cases.report import Report, lines

from ringsim import files
from ringsim.errors import RingsimError

MINUTES: Final = 8.0
CANNOT: Final = 2


class Section(NamedTuple):
    """Its name, what it shows, the seconds that it may take, and what runs it."""

    name: str
    shows: str
    limit_s: float
    run: Callable[[Bench, Record], None]


SECTIONS: Final = (
    Section("facts", "the device, its matrix and memory ceilings", 20, facts.run),
    Section("build", "every kernel compiles for this device", 60, built.run),
    Section("kernels", "every kernel against float64, the same bits again", 80, tiles.run),
    Section("strategies", "every strategy against float64, 2.5 x rule", 70, strategies.run),
    Section("races", "late kernels and messages change nothing; the mutant is caught", 30, races.run),
    Section("quiet", "no allocation and no wait in the loop", 15, quiet.run),
    Section("speed", "one rank beside one fused call, keys in 1, 4 and 8 blocks", 40, speed.run),
    Section("prediction", "calibrated, predicted, then run", 100, prediction.run),
    Section("million", "1,048,576 tokens, causal, 4 ranks", 40, million.run),
    Section("loss", "half-precision partial outputs against float32 ones", 15, loss.run),
    Section("sharing", "rings of 1, 2 and 4 ranks on the card", 150, sharing.run),
)
NAMES: Final = tuple(section.name for section in SECTIONS)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("gpu.json"), metavar="FILE", help="JSON, written anew after each section"
    )
    parser.add_argument("--only", default=",".join(NAMES), metavar="NAMES", help=f"sections, comma-separated: {', '.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it; what does not fit is skipped")
    parser.add_argument(
        "--mpiexec",
        action="append",
        metavar="COMMAND",
        help="a launcher with what must stand before it: 'env I_MPI_OFFLOAD=1 mpiexec'; repeatable; default: that on the PATH",
    )
    parser.add_argument("--no-mpi", action="store_true", help="no rings of processes")
    parser.add_argument("--sanitize", action="store_true", help="a reduced run under compute-sanitizer: memcheck, racecheck, ...")
    parser.add_argument("--reduced", action="store_true", help="small problems")
    parser.add_argument("--own", action="store_true", help="our own kernels alone, not cuDNN's")
    found = parser.parse_args(argv)
    found.sections = [name for name in found.only.split(",") if name]
    unknown = [name for name in found.sections if name not in NAMES]
    if unknown or not found.sections:
        parser.error(
            f"--only {found.only!r}: no section {', '.join(map(repr, unknown)) or 'is named'}; there are {', '.join(NAMES)}"
        )
    if not found.minutes > 0:
        parser.error(f"--minutes is {found.minutes:g}; it must be more than 0")
    return found


def launchers(asked: argparse.Namespace) -> dict[str, list[str]]:
    """By name: what was given, or the mpiexec on the PATH."""
    if asked.no_mpi or asked.reduced:
        return {}
    given = asked.mpiexec or [word for word in [shutil.which("mpiexec")] if word]
    words = [shlex.split(command) for command in given]
    return {f"mpi {number} ({Path(each[-1]).name})": each for number, each in enumerate(words, 1) if each}


def open_card(asked: argparse.Namespace) -> Card:
    """This machine's. Raises MissingDependency, DeviceError."""
    from gpu_cases.cupy_card import CupyCard

    made = CupyCard(exact_allocations=asked.reduced)
    if asked.own:
        made.kinds = {name: make for name, make in made.kinds.items() if name != "cudnn"}
    return made


def run(card: Card, asked: argparse.Namespace, sizes: Sizes, sections: Sequence[Section] = SECTIONS) -> int:
    """Run the sections that were asked for on a card; the exit code."""
    end = time.monotonic() + asked.minutes * 60
    report = Report(asked.out, {"sections": asked.sections, "minutes": asked.minutes, "sizes": repr(sizes)})
    report.records = {section.name: Record(section.name) for section in sections if section.name in asked.sections}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(card=card, sizes=sizes, folder=Path(folder), launchers=launchers(asked), save=report.save)
        report.save()
        for section in sections:
            record = report.records.get(section.name)
            if record is None:
                continue
            now = time.monotonic()
            if now >= end:
                record.skipped.append(f"the section: {asked.minutes:g} minutes were over")
                continue
            record.deadline_s = min(end, now + section.limit_s)
            print(f"== {section.name}: {section.shows}", flush=True)
            with record.timed():
                section.run(bench, record)
            report.save()
            print(lines(record), flush=True)
    report.save()
    print(f"\n{report.table()}\n\nwrote {asked.out}; exit code {report.code()}", flush=True)
    return report.code()


def run_sanitizer(asked: argparse.Namespace) -> int:
    """The reduced run under compute-sanitizer; the exit code."""
    report = Report(asked.out, {"sanitize": True, "minutes": asked.minutes})
    record = report.records["sanitize"] = Record("sanitize")
    with tempfile.TemporaryDirectory() as folder, record.timed():
        sanitize.run(record, Path(__file__).resolve(), Path(folder), asked.minutes * 60)
    report.save()
    print(f"{report.table()}\n\nwrote {asked.out}; exit code {report.code()}", flush=True)
    return report.code()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    asked = options(argv)
    try:
        files.check_writable(asked.out)
        if asked.sanitize:
            return run_sanitizer(asked)
        card = open_card(asked)
    except RingsimError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return CANNOT
    return run(card, asked, REDUCED if asked.reduced else FULL)


if __name__ == "__main__":
    sys.exit(main())

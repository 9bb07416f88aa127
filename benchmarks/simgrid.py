"""Is the flow engine right, and fast enough? The same flows in SimGrid, a peer, and in ringsim, timed side by side.

    python benchmarks/simgrid.py --json simgrid.json --markdown docs/simgrid-table.md

Needs SimGrid's development files and g++ (`apt-get install libsimgrid-dev g++`). What was set so that the models coincide:

* `network/model:CM02` with `network/solver:maxmin`: flows share links max-min fairly, as here.
* Latencies of 0. CM02 lets a flow pay its latency and then weighs its share by 1 / latency (plus `network/weight-S` /
  bandwidth per link, here 0); without latency every flow weighs 1, and TCP's window (`network/TCP-gamma` / 2 latency) binds
  nobody. ringsim has latencies too, but pays them before the flow starts and weighs all flows alike.
* `network/crosstraffic:0`: else 5 % of each flow runs backwards. `network/latency-factor:1`, `network/bandwidth-factor:1`.
* `maxmin/precision` and `surf/precision` of 1e-12 for the default 1e-5 and 1e-9: SimGrid takes what is nearer for equal.
* A cap is a link of its own: `set_rate` has no effect on host-to-host flows in 3.32. Sizes are whole bytes.

SimGrid keeps its fast defaults: lazy updates, one actor that starts all flows (one per flow where flows start again). The
time of both is that of the simulation alone: no process start, no platform, no reading or writing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

import simpy

from ringsim.simulation.flows import Flows

SOURCE = Path(__file__).parent / "simgrid" / "flows.cpp"
SEED = 20240607
LIMIT = 0.01
SETTINGS = (
    "network/model:CM02",
    "network/solver:maxmin",
    "network/crosstraffic:0",
    "network/latency-factor:1",
    "network/bandwidth-factor:1",
    "network/weight-S:0",
    "maxmin/precision:1e-12",
    "surf/precision:1e-12",
)
MISSING = "This needs SimGrid's development files and a C++ compiler: apt-get install libsimgrid-dev g++"


@dataclass(frozen=True)
class Job:
    """A flow to be: when it starts, its bytes and links."""

    start_s: float
    nbytes: int
    links: tuple[int, ...]


@dataclass(frozen=True)
class Set:
    """Flows on links of some bytes per second; each flow runs `rounds` times, one run after the other."""

    case: str
    bandwidths: list[float]
    jobs: list[Job]
    rounds: int = 1

    def text(self) -> str:
        """What flows.cpp reads."""
        head = f"{len(self.bandwidths)} {len(self.jobs)} {self.rounds}"
        jobs = (f"{job.start_s!r} {job.nbytes} {len(job.links)} {' '.join(map(str, job.links))}" for job in self.jobs)
        return "\n".join([head, *map(repr, self.bandwidths), *jobs]) + "\n"


@dataclass
class Row:
    """Both simulators on one set: seconds of each repeat, the difference of each end relative to the flow's duration, and how
    many flows took longer than alone.
    """

    chosen: Set
    ringsim_s: list[float] = field(default_factory=list)
    simgrid_s: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    shared: int = 0


def random_set(case: str, source: random.Random, links: int, flows: int) -> Set:
    """Sizes and bandwidths over decades; a third of the flows start with others, a quarter are capped by a link of their own."""
    bandwidths = [10 ** source.uniform(8, 10) for _ in range(links)]
    together = [0.0, *(source.uniform(0, 0.1) for _ in range(3))]
    jobs = []
    for _ in range(flows):
        path = source.sample(range(links), source.randint(1, min(5, links)))
        start_s = source.choice(together) if source.random() < 1 / 3 else source.uniform(0, 0.1)
        if source.random() < 1 / 4:
            path.append(len(bandwidths))
            bandwidths.append(10 ** source.uniform(7.5, 9.5))
        jobs.append(Job(start_s, int(10 ** source.uniform(3, 8)), tuple(path)))
    return Set(case, bandwidths, jobs)


def ring(case: str, ranks: int, sizes: Callable[[], int]) -> Set:
    """Every rank sends to the next `ranks` times, over its way out and the other's way in: 50 GB/s each, as in ringsim."""
    jobs = [Job(0.0, sizes(), (rank, ranks + (rank + 1) % ranks)) for rank in range(ranks)]
    return Set(case, [50e9] * (2 * ranks), jobs, ranks)


def sets(number: int) -> Iterator[Set]:
    """All that is compared."""
    source = random.Random(SEED)
    for _ in range(number):
        yield random_set(f"{number} random", source, source.randint(4, 40), source.randint(5, 200))
    source = random.Random(SEED + 1)
    yield random_set("large", source, 500, 2000)
    yield ring("ring", 256, lambda: 1 << 20)
    yield ring("uneven ring", 256, lambda: source.randint(1 << 19, 1 << 20))


def in_ringsim(chosen: Set) -> tuple[float, list[list[float]]]:
    """Seconds that the simulation took, and the ends of each flow."""
    env = simpy.Environment()
    flows = Flows(env, chosen.bandwidths)
    ends: list[list[float]] = [[] for _ in chosen.jobs]

    def launch(index: int) -> None:
        flows.start(chosen.jobs[index].nbytes, chosen.jobs[index].links, inf, lambda: end(index))

    def end(index: int) -> None:
        ends[index].append(env.now)
        if len(ends[index]) < chosen.rounds:
            launch(index)

    def starter() -> Iterator[simpy.Event]:
        for index in sorted(range(len(chosen.jobs)), key=lambda index: chosen.jobs[index].start_s):
            if env.now < chosen.jobs[index].start_s:
                yield env.timeout(chosen.jobs[index].start_s - env.now)
            launch(index)

    begin = perf_counter()
    env.process(starter())
    env.run()
    return perf_counter() - begin, ends


def in_simgrid(program: Path, chosen: Set) -> tuple[float, list[list[float]]]:
    """Seconds that the simulation took, and the ends of each flow."""
    given, found = program.with_name("set.txt"), program.with_name("ends.txt")
    given.write_text(chosen.text())
    command = [str(program), "--log=root.thres:error", *(f"--cfg={setting}" for setting in SETTINGS), str(given), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    head, *lines = found.read_text().splitlines()
    return float(head.split()[1]), [[float(end) for end in line.split()] for line in lines]


def compare(program: Path, chosen: Set, repeats: int) -> Row:
    """Run both in turn, `repeats` times."""
    row = Row(chosen)
    for _ in range(repeats):
        took, theirs = in_simgrid(program, chosen)
        row.simgrid_s.append(took)
        took, ours = in_ringsim(chosen)
        row.ringsim_s.append(took)
    for job, own, other in zip(chosen.jobs, ours, theirs, strict=True):
        begins = [job.start_s, *own[:-1]]
        pairs = zip(own, other, begins, strict=True)
        row.differences += [abs(end - end_there) / (end - begin) for end, end_there, begin in pairs]
        alone = job.nbytes / min(chosen.bandwidths[link] for link in job.links)
        row.shared += sum(end - begin > 1.001 * alone for begin, end in zip(begins, own, strict=True))
    return row


def build(folder: Path) -> Path:
    """Compile flows.cpp; without a compiler or SimGrid say what to install."""
    compiler = shutil.which("g++")
    if compiler is None:
        print(MISSING)
        sys.exit(2)
    probe = subprocess.run(
        [compiler, "-x", "c++", "-E", "-"], input="#include <simgrid/s4u.hpp>", text=True, capture_output=True, check=False
    )
    if probe.returncode:
        print(MISSING)
        sys.exit(2)
    program = folder / "flows"
    subprocess.run([compiler, "-std=c++17", "-O2", "-o", str(program), str(SOURCE), "-lsimgrid"], check=True)
    return program


def summary(rows: list[Row]) -> dict:
    """One line of the table, from the rows of one case."""
    differences = [difference for row in rows for difference in row.differences]
    flows = len(differences)
    ratios = [ours / theirs for row in rows for ours, theirs in zip(row.ringsim_s, row.simgrid_s, strict=True)]
    ours, theirs = (sum(median(getattr(row, name)) for row in rows) for name in ("ringsim_s", "simgrid_s"))
    low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "case": rows[0].chosen.case,
        "flows": flows,
        "shared": sum(row.shared for row in rows),
        "agree": sum(difference <= LIMIT for difference in differences),
        "largest_difference": max(differences),
        "median_difference": median(differences),
        "ringsim_s": ours,
        "simgrid_s": theirs,
        "ringsim_flows_per_s": flows / ours,
        "simgrid_flows_per_s": flows / theirs,
        "ratio": middle,
        "ratio_quartiles": [low, high],
    }


def table(found: list[dict], facts: str) -> str:
    """All cases in Markdown."""
    differences = ("flows", "not alone", "within 1 %", "largest difference", "median")
    names = ("case", *differences, "ringsim, flows/s", "SimGrid, flows/s", "time ratio (quartiles)")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case in found:
        low, high = case["ratio_quartiles"]
        lines.append(
            f"| {case['case']} | {case['flows']:,} | {case['shared']:,} | {case['agree']:,} | {case['largest_difference']:.1e} "
            f"| {case['median_difference']:.1e} | {case['ringsim_flows_per_s']:,.0f} | {case['simgrid_flows_per_s']:,.0f} "
            f"| {case['ratio']:.2g} ({low:.2g} .. {high:.2g}) |"
        )
    return "\n".join([*lines, "", facts]) + "\n"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, help="how many random sets")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    cases: dict[str, list[Row]] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        for chosen in sets(options.sets):
            cases.setdefault(chosen.case, []).append(compare(program, chosen, options.repeats))
        version = Path(folder, "ends.txt").read_text().split()[0]
    found = [summary(rows) for rows in cases.values()]
    facts = (
        f"SimGrid {version}, Python {sys.version.split()[0]}, {os.cpu_count()} cores, load average {load:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after. {options.repeats} runs of each in turn; time is ringsim's per SimGrid's; "
        "a difference is relative to the flow's duration."
    )
    print(table(found, facts))
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "cases": found}, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table(found, facts))
    if any(case["agree"] < case["flows"] for case in found):
        sys.exit(1)


if __name__ == "__main__":
    main()

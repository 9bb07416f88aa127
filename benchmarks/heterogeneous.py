"""Ranks of unequal speed: do shares by predicted speed make them end together? Predicted and measured, even and weighted.

    python benchmarks/heterogeneous.py --repeats 7 --json heterogeneous.json

Two ranks over MPI. Rank 0 computes every kernel three times (twice into scratch), so it is a third as fast and every result is
right. The machine is calibrated first; the topology to predict on is that with a device of speed 1/3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ringsim import Causal, Full, Schedule, Workload, inputs, load_topology, simulate
from ringsim.backends.numpy import NumpyBackend
from ringsim.execution import Rank
from ringsim.schedule import Compute, Region
from ringsim.shares import even_out
from ringsim.timeline import POSTS, WAITS, Timeline, gather

BIN = Path(sys.executable).parent
RANKS, TIMES = 2, 3
TIMEOUT_S = 120.0
WORKLOADS = {
    "full, contiguous": ("contiguous", {"mask": Full()}),
    "full, contiguous, GQA 4": ("contiguous", {"mask": Full(), "kv_heads": 2}),
    "causal, zigzag": ("zigzag", {"mask": Causal()}),
    "causal, contiguous": ("contiguous", {"mask": Causal()}),
}
SLOW = """\
ringsim: 2
name: one-slow
source: "defined: this machine, rank 0 made {times} times slower"
extends: here.yaml
devices:
  core: {{like: {device}, cores: 1, ranks: 1}}
  slow: {{like: core, speed: {speed!r}}}
machine: {{join: mesh, link: {link}, of: [slow, core]}}
"""


class Repeated(NumpyBackend):
    """Computes everything `times` times, all but the last time into copies."""

    def __init__(self, times: int) -> None:
        super().__init__(threads=1)
        self.times = times

    def compute(self, op: Compute, fetch: Any, *, scale: float, poll: Any) -> None:
        """As NumpyBackend's, with the same result."""
        copies = {region.buffer: fetch(region).copy() for region in op.writes} if self.times > 1 else {}

        def aside(region: Region) -> Any:
            return copies[region.buffer] if region.buffer in copies else fetch(region)

        for _ in range(self.times - 1):
            super().compute(op, aside, scale=scale, poll=poll)
        super().compute(op, fetch, scale=scale, poll=poll)


def topology_of(folder: Path) -> Path:
    """Calibrate this machine; returns the file of the same with one slow device."""
    ringsim = [str(BIN / "mpiexec"), "-n", str(RANKS), str(BIN / "ringsim"), "calibrate", "-o", str(folder / "here.yaml")]
    subprocess.run(ringsim, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    spec = load_topology(str(folder / "here.yaml")).spec
    (device, link), speed = (next(iter(spec.devices)), next(iter(spec.links))), 1 / TIMES
    path = folder / "slow.yaml"
    path.write_text(SLOW.format(times=TIMES, device=device, link=link, speed=speed))
    return path


def schedules(length: int, topology: Any) -> dict[str, list[Schedule]]:
    """Each workload cut evenly and by shares."""
    made = {}
    for name, (kind, options) in WORKLOADS.items():
        even = Schedule(workload=Workload(q_len=length, heads=8, head_dim=64, **options), world_size=RANKS, partition=kind)
        shares = even_out(even, topology)
        made[name] = [even, Schedule(workload=even.workload, world_size=RANKS, partition=shares.partition)]
    return made


def as_rank(path: Path, length: int, repeats: int) -> None:
    """What each rank does: run all schedules in turn; rank 0 prints a JSON row for each."""
    from mpi4py import MPI

    from ringsim.backends.mpi import MpiTransport

    topology = load_topology(str(path))
    transport = MpiTransport(MPI.COMM_WORLD, timeout_s=TIMEOUT_S)
    backend = Repeated(TIMES if transport.rank == 0 else 1)
    for name, cuts in schedules(length, topology).items():
        runs: list[list[Timeline]] = [[], []]
        plans = [(Rank(cut, transport, backend, timeout_s=TIMEOUT_S), arrays_of(cut, transport.rank)) for cut in cuts]
        # even and weighted by turns: what else the machine does then falls on both
        for _ in range(repeats + 1):
            for (rank, arrays), kept in zip(plans, runs, strict=True):
                transport.barrier()
                rank.run(*arrays)
                parts = transport.allgather(rank.timeline)
                kept.append(gather(parts))
        if transport.rank == 0:
            # the first run of each warms up
            even, weighted = (row(cut, topology, kept[1:]) for cut, kept in zip(cuts, runs, strict=True))
            print(json.dumps({"workload": name, "even": even, "weighted": weighted}), flush=True)
    transport.close()


def arrays_of(schedule: Schedule, rank: int) -> list[Any]:
    """q, k, v and out of a rank."""
    job, work = schedule.job, schedule.workload
    parts = {"q": job.q_partition, "k": job.kv_partition, "v": job.kv_partition}
    arrays = [inputs.rows(work, name, part.positions(rank), 0) for name, part in parts.items()]
    return [*arrays, np.empty((*arrays[0].shape[:3], work.v_head_dim), arrays[0].dtype)]


def row(schedule: Schedule, topology: Any, measured: list[Timeline]) -> dict[str, Any]:
    """Totals, and CPU seconds of each rank's kernels: these stand even where others use the cores too."""
    predicted = simulate(schedule, topology)
    totals = [timeline.total_s for timeline in measured]
    return {
        "partition": schedule.partition,
        "predicted_s": predicted.total_s,
        "measured_s": median(totals),
        "range_s": [min(totals), max(totals)],
        "cpu_predicted_s": [computed(predicted, rank) for rank in range(RANKS)],
        "cpu_measured_s": [median(computed(timeline, rank) for timeline in measured) for rank in range(RANKS)],
    }


def computed(timeline: Timeline, rank: int) -> float:
    """CPU seconds of a rank's kernels."""
    return sum(event.cpu_s for event in timeline.of_rank(rank) if event.kind not in (*POSTS, WAITS))


def lines(found: dict[str, Any]) -> str:
    """A workload's two rows, and what shares gain: of the total, and of the CPU time of the rank that has most."""
    text = []
    for one in (found["even"], found["weighted"]):
        low, high = (f"{second * 1e3:.0f}" for second in one["range_s"])
        cpu = [" ".join(f"{second * 1e3:.0f}" for second in one[f"cpu_{name}_s"]) for name in ("predicted", "measured")]
        off = [f"{1 - min(one[f'cpu_{name}_s']) / max(one[f'cpu_{name}_s']):.1%}" for name in ("predicted", "measured")]
        text.append(
            f"| {found['workload']} | `{one['partition']}` | {one['predicted_s'] * 1e3:.0f} | {one['measured_s'] * 1e3:.0f} "
            f"| {low} .. {high} | {cpu[0]} / {cpu[1]} | {off[0]} / {off[1]} |"
        )
    even, weighted = found["even"], found["weighted"]
    gains = [even[key] / weighted[key] for key in ("predicted_s", "measured_s")]
    cpu_gains = [max(even[key]) / max(weighted[key]) for key in ("cpu_predicted_s", "cpu_measured_s")]
    return "\n".join([*text, f"| | gain | {gains[0]:.2f} | {gains[1]:.2f} | | {cpu_gains[0]:.2f} / {cpu_gains[1]:.2f} | |"])


def main() -> None:
    """Calibrate, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seq", type=int, default=4096, help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_rank:
        as_rank(given.as_rank, given.seq, given.repeats)
        return
    print("| workload | partition | predicted ms | measured ms (median) | range | CPU ms of both ranks, p / m | spread p / m |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        slow = topology_of(Path(folder))
        own = [sys.executable, __file__, "--as-rank", str(slow), "--seq", str(given.seq), "--repeats", str(given.repeats)]
        done = subprocess.run(
            [str(BIN / "mpiexec"), "-n", str(RANKS), *own], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(done.stderr)
    rows = [json.loads(text) for text in done.stdout.splitlines()]
    print("\n".join(map(lines, rows)))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Ranks as processes: ringsim's own commands under an MPI launcher, with a limit of time, and their JSON read back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringsim.schedule import Schedule
from ringsim.timeline import Timeline

LIMIT_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A launcher's words (``mpiexec``, or with variables before it), how many ranks, and where files go."""

    launcher: Sequence[str]
    count: int
    folder: Path
    limit_s: float = LIMIT_S

    def ringsim(self, *arguments: str) -> str | None:
        """Run one ringsim command; None, or what it said where it failed."""
        words = [*self.launcher, "-n", str(self.count), sys.executable, "-m", "ringsim", *arguments]
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # not in the repository, whose folder `ringsim` is no whole package
            cwd=self.folder,
        )
        try:
            said, _ = process.communicate(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            return f"not done after {self.limit_s:g} s: {' '.join(words)}\n{said[-2000:]}"
        return None if process.returncode == 0 else f"exit code {process.returncode}: {' '.join(words)}\n{said[-2000:]}"


def options_of(schedule: Schedule) -> list[str]:
    """The command line's words for a schedule's workload, partition and strategy."""
    work = schedule.workload
    return [
        *("--seq", str(work.q_len), "--heads", str(work.heads), "--kv-heads", str(work.kv_heads)),
        *("--head-dim", str(work.head_dim), "--dtype", work.dtype, "--mask", work.mask.name, "--pass", work.pass_),
        *("--partition", schedule.partition, "--strategy", schedule.strategy),
    ]


def launched_ring(ranks: Ranks, schedule: Schedule, transport: str, *, repeats: int) -> dict[str, Any]:
    """A ring over `transport`, checked against float64: times, the check and the transport's sentence; or ``refused``."""
    path = ranks.folder / f"ring-{ranks.count}-{transport}.json"
    path.unlink(missing_ok=True)
    options = ["--backend", "cupy", "--transport", transport, "--repeats", str(repeats), "--check", "--json", str(path)]
    failure = ranks.ringsim("run", *options_of(schedule), *options)
    if not path.exists():
        return {"refused": failure or "no JSON was written"}
    values = json.loads(path.read_text())
    runs = [Timeline.from_dict(one) for one in values["measured"]]
    best = sorted(runs, key=lambda run: run.total_s)[len(runs) // 2]
    facts = runs[-1].facts
    return {
        "passed": failure is None and bool(values["check"]["passed"]),
        "check": values["check"],
        "total_s": best.total_s,
        "samples_s": [run.total_s for run in runs],
        "exposed_share": best.exposed_s() / best.total_s if best.total_s else 0.0,
        "steps": [step.latency_s for step in best.steps()],
        "said": f"{facts.get('library', '')}",
        "facts": facts,
        "failure": failure,
    }

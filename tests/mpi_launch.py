"""Starts MPI jobs for tests: in a session of their own, within a time limit, and without leaving a process behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
RINGSIM = ("-m", "ringsim")
STARTING_S = 60.0
"""What a start may take on a busy host; no fact about ringsim."""
DYING_S = 5.0
"""How long the last process of a job that has ended may still be seen."""
MARK = "RINGSIM_TEST_JOB"
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK")
# Open MPI refuses root and more ranks than cores unless told; other MPIs ignore these
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def mpiexec() -> str:
    """The launcher that came with this Python's MPI, else the one on the path; skips the test where there is none."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or found is None:
        pytest.skip("needs mpi4py and mpiexec: pip install 'ringsim[mpich]'")
    return found


def program(name: str, *arguments: str) -> tuple[str, ...]:
    """What Python is given to run ``tests/programs/NAME.py``."""
    return (str(PROGRAMS / f"{name}.py"), *arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A job that ended by itself."""

    rc: int
    stdout: str
    stderr: str
    wall_s: float
    at: float

    def since(self, path: Path) -> float:
        """Seconds from the last change of `path` to the end of the job."""
        return self.at - path.stat().st_mtime


@dataclass(slots=True)
class Job:
    """A job under way: mpiexec, its proxies and its ranks, all known by a mark in their environment."""

    process: subprocess.Popen[bytes]
    mark: str
    folder: Path
    started: float = field(default_factory=time.time)

    def pids(self) -> list[int]:
        """Every living process of the job."""
        return sorted(_marked(self.mark))

    def ranks(self) -> dict[int, int]:
        """The process of each rank that lives."""
        found = {}
        for pid, environment in _marked(self.mark).items():
            rank = next((environment[name] for name in RANK_VARIABLES if name in environment), "")
            if rank.isdigit() and "python" in _command(pid):
                found[int(rank)] = pid
        return found

    def await_(self, condition: Callable[[], bool], what: str) -> None:
        """Return when the condition holds; fails if the job ends first or it takes too long."""
        limit = time.monotonic() + STARTING_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > limit:
                pytest.fail(f"{what} did not come; rc {self.process.poll()}, output:\n{self.output()}")
            time.sleep(0.02)

    def signal(self, number: signal.Signals, rank: int | None = None) -> float:
        """Send a signal to a rank, or to mpiexec; returns the time. Skips the test where ranks cannot be found."""
        if rank is not None and not Path("/proc/self/environ").exists():
            pytest.skip("needs /proc to find the ranks")
        os.kill(self.process.pid if rank is None else self.ranks()[rank], number)
        return time.time()

    def wait(self, timeout_s: float) -> Ended:
        """Wait for the end; fails if it does not come in time or leaves a process behind."""
        try:
            rc = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job still runs after {timeout_s:g} s; its output:\n{self.output()}")
        at = time.time()
        self.check_no_orphans()
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        return Ended(rc=rc, stdout=stdout, stderr=stderr, wall_s=at - self.started, at=at)

    def check_no_orphans(self) -> None:
        """Fail if a process of the job outlives it."""
        limit = time.monotonic() + DYING_S
        while left := self.pids():
            if time.monotonic() > limit:
                pytest.fail(f"the job left processes behind: {[(pid, _command(pid)) for pid in left]}")
            time.sleep(0.02)

    def output(self) -> str:
        """What the job has printed so far."""
        return "".join((self.folder / name).read_text() for name in ("stdout", "stderr"))

    def kill(self) -> None:
        """End all that is left of the job."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@contextmanager
def started(cwd: Path, *parts: tuple[int, Sequence[str]], environment: dict[str, str] | None = None) -> Iterator[Job]:
    """Start ``n ranks of python ARGUMENTS`` for each part (n, arguments) as one job; kills what is left of it at the end."""
    command = [mpiexec()]
    for index, (ranks, arguments) in enumerate(parts):
        command += [*([":"] if index else []), "-n", str(ranks), sys.executable, *arguments]
    mark, folder = uuid.uuid4().hex, cwd / ".job"
    folder.mkdir(exist_ok=True)
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | OPEN_MPI | (environment or {}) | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    job = Job(process, mark, folder)
    try:
        yield job
    finally:
        job.kill()


def run(cwd: Path, *parts: tuple[int, Sequence[str]], timeout_s: float = STARTING_S) -> Ended:
    """Run a job to its end."""
    with started(cwd, *parts) as job:
        return job.wait(timeout_s)


def _marked(mark: str) -> dict[int, dict[str, str]]:
    """The environments of the processes that carry the mark; zombies have none."""
    wanted, found = f"{MARK}={mark}", {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if wanted in entries:
            found[int(folder.name)] = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

"""A contender's processes while they live: started, asked, ended."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contenders.cast import HERE, RANKS, Contender

START_S, ANSWER_S, END_S = 180.0, 300.0, 10.0


class Failed(Exception):
    """A contender did not start, or died."""


@dataclass(frozen=True)
class Shape:
    """Batch 1, float32, causal."""

    seq: int
    heads: int = 8
    head_dim: int = 64


class Company:
    """All ranks of one contender, each behind a socket."""

    def __init__(self, contender: Contender, shape: Shape, inputs: Path, venvs: Path) -> None:
        self.contender = contender
        self._folder = Path(tempfile.mkdtemp(prefix="peers-"))
        self._inputs = inputs
        self._errors = (self._folder / "errors").open("w+")
        self._links: list[Any] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self.hello = self._assemble(shape, venvs)
        except BaseException:
            self.close()
            raise

    def _assemble(self, shape: Shape, venvs: Path) -> list[dict[str, Any]]:
        """Start the processes; what each says when it is ready, by rank."""
        with socket.socket(socket.AF_UNIX) as door:
            door.bind(str(self._folder / "door"))
            door.listen(RANKS)
            door.settimeout(1.0)
            self._processes = self._start(shape, venvs)
            self._streams = self._admit(door)
        return sorted((json.loads(self._line(stream)) for stream in self._streams), key=lambda hello: hello["rank"])

    def _start(self, shape: Shape, venvs: Path) -> list[subprocess.Popen[bytes]]:
        contender = self.contender
        world_size = contender.processes
        task = {
            "world_size": world_size,
            "seq": shape.seq,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "folder": str(self._inputs),
            "socket": str(self._folder / "door"),
            "options": contender.options | {"store": str(self._folder / "store")},
        }
        command = [str(contender.python(venvs)), str(HERE / contender.script)]
        environment = {name: value for name, value in os.environ.items() if name not in contender.without}
        environment |= contender.environment
        if contender.is_ringsim:
            launcher = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(world_size)]
            return [self._spawn([*launcher, *command], environment | {"PEERS": json.dumps(task)})]
        tasks = [task | {"rank": rank} for rank in range(world_size)]
        return [self._spawn(command, environment | {"PEERS": json.dumps(one)}) for one in tasks]

    def _spawn(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=self._errors, stderr=subprocess.STDOUT)

    def _admit(self, door: socket.socket) -> list[Any]:
        """A stream to each rank. Raises Failed where one ends before it has come."""
        limit = time.monotonic() + START_S
        while len(self._links) < self.contender.processes:
            try:
                link, _ = door.accept()
            except TimeoutError:
                self._check(limit)
                continue
            link.settimeout(ANSWER_S)
            self._links.append(link)
        return [link.makefile("rw") for link in self._links]

    def _check(self, limit: float) -> None:
        if any(process.poll() is not None for process in self._processes):
            raise Failed(self._last_words())
        if time.monotonic() > limit:
            raise Failed(f"not ready after {START_S:g} s")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return lines[-1] if lines else "no message"

    def _line(self, stream: Any) -> str:
        try:
            line: str = stream.readline()
        except (TimeoutError, ConnectionError) as error:
            raise Failed(f"no answer: {error}") from error
        if not line:
            raise Failed(self._last_words())
        return line

    def ask(self, what: str, calls: int, keep: str = "") -> list[dict[str, Any]] | None:
        """Run a pass `calls` times; each rank's answer, in no order, or None where the contender lacks this pass."""
        request = json.dumps({"pass": what, "calls": calls, "keep": keep}) + "\n"
        for stream in self._streams:
            stream.write(request)
            stream.flush()
        answers = [json.loads(self._line(stream)) for stream in self._streams]
        return None if any("missing" in answer for answer in answers) else answers

    def cpu_s(self) -> float:
        """Processor seconds that its ranks have used since they started."""
        return sum(_used_s(hello["pid"]) for hello in self.hello)

    def close(self) -> None:
        """Let the ranks end; end those that do not."""
        for link in self._links:
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            link.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                # a launcher passes it on to its ranks
                process.terminate()
                process.wait()
        self._errors.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _used_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_s() -> float:
    """Processor seconds of the whole machine so far."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

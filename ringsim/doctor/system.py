"""The one place where the doctor touches the system: files, commands, the environment. Tests put recorded machines here."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final, Protocol

MOST_BYTES: Final = 2**20
"""Of a file or an output; what is longer is cut."""
GRACE_S: Final = 1.0
LAUNCHERS_OWN: Final = ("PMI_", "PMIX_", "HYDI_", "HYDRA_", "OMPI_COMM_WORLD_", "PALS_", "PRTE_", "PRTERUN_")
"""Variables by which a launcher speaks to its rank: a command started here is none."""
_ABANDONED: list[Any] = []
"""Processes that outlived SIGKILL, as one that hangs in a driver does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What a command said. `trouble` is why it did not run to an end, else empty."""

    command: tuple[str, ...]
    rc: int | None = None
    stdout: str = ""
    stderr: str = ""
    trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether it ran and succeeded."""
        return not self.trouble and self.rc == 0

    @property
    def said(self) -> str:
        """Why it failed, in its own words: the last of what it wrote, or how it ended."""
        lines = [text for text in (self.stderr.strip() or self.stdout.strip()).splitlines() if text.strip()]
        ended = f"ended by signal {-self.rc}" if self.rc is not None and self.rc < 0 else f"exit code {self.rc}"
        return self.trouble or " ".join([*lines[-2:], f"({ended})"])


class System(Protocol):
    """A machine as the doctor sees it, from one process. Methods that read files raise OSError, but not for what is absent."""

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables of this process."""

    def read(self, path: str) -> str | None:
        """The text of a file, stripped; None where there is none."""

    def names(self, folder: str) -> tuple[str, ...]:
        """What is in a folder, in order; nothing where there is none."""

    def target(self, path: str) -> str | None:
        """Where a path leads once all links are followed; None where there is nothing."""

    def which(self, name: str) -> str | None:
        """The first program of this name on the path."""

    def run(self, *command: str) -> Ran:
        """Run a command within the time limit."""

    def ask(self, module: str) -> Ran:
        """Run ``ringsim.doctor.MODULE`` in a Python of its own, which may crash or hang there."""

    def affinity(self) -> tuple[int, ...] | None:
        """The logical processors that this process may run on; None where the system does not say."""

    def shared_memory(self) -> int | None:
        """Bytes of the file system at /dev/shm; None where there is none."""

    def locked_memory(self) -> int | None:
        """Bytes that this process may lock; None for no limit."""

    def packages(self) -> Mapping[str, str]:
        """The versions of the Python distributions installed, by lower-case name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """This machine. `timeout_s` limits each command, which is run once however often it is asked for."""

    timeout_s: float = 20.0
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    _ran: dict[tuple[str, ...], Ran] = field(default_factory=dict, init=False, repr=False)

    def read(self, path: str) -> str | None:
        """As System has it."""
        try:
            with Path(path).open("rb") as file:
                return file.read(MOST_BYTES).decode(errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> tuple[str, ...]:
        """As System has it."""
        try:
            return tuple(sorted(path.name for path in Path(folder).iterdir()))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def target(self, path: str) -> str | None:
        """As System has it."""
        return str(Path(path).resolve()) if Path(path).exists() else None

    def which(self, name: str) -> str | None:
        """As System has it."""
        return shutil.which(name, path=self.environment.get("PATH", os.defpath))

    def run(self, *command: str) -> Ran:
        """As System has it. A process that does not even die when killed is left behind."""
        if command not in self._ran:
            self._ran[command] = self._start(command)
        return self._ran[command]

    def _start(self, command: tuple[str, ...]) -> Ran:
        clean = {name: text for name, text in self.environment.items() if not name.startswith(LAUNCHERS_OWN)}
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=clean, start_new_session=True
                )
            except OSError as error:
                return Ran(command=command, trouble=f"{command[0]} cannot be started: {error.strerror}")
            trouble = "" if _ended(process, self.timeout_s) else f"no answer within {self.timeout_s:g} s"
            if trouble:
                _kill(process)
            texts = [_text(file) for file in (out, err)]
        return Ran(command=command, rc=process.returncode, stdout=texts[0], stderr=texts[1], trouble=trouble)

    def ask(self, module: str) -> Ran:
        """As System has it."""
        return self.run(sys.executable, "-P", "-m", f"ringsim.doctor.{module}")

    def affinity(self) -> tuple[int, ...] | None:
        """As System has it."""
        return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else None

    def shared_memory(self) -> int | None:
        """As System has it."""
        return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None

    def locked_memory(self) -> int | None:
        """As System has it."""
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        return None if limit == resource.RLIM_INFINITY else limit

    def packages(self) -> Mapping[str, str]:
        """As System has it. A distribution whose metadata is broken has no name and is left out."""
        found = ((one.metadata["Name"], one.version) for one in distributions())
        return {name.lower(): version for name, version in found if name}


def _ended(process: subprocess.Popen[bytes], limit_s: float) -> bool:
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        time.sleep(0)
    if not _ended(process, GRACE_S):
        _ABANDONED.append(process)


def _text(file: Any) -> str:
    file.seek(0)
    return bytes(file.read(MOST_BYTES)).decode(errors="replace")

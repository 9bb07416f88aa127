"""A command's place in the job: its transport, who prints, and how the job ends when a rank fails."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.console import Console
from rich.progress import Progress

from .. import files
from ..errors import CollectiveTimeout, PeerFailed, PeerTimeout, RankMismatch, RingsimError
from ..timeline import Timeline
from ..trace import trace_events
from ..transport import Transport

Value = TypeVar("Value")
RANK_VARIABLES = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")
GATHER_S = 2.0
YIELD_WORD_S = 1.0
FORWARD_S = 0.25


def launched_rank() -> int | None:
    """This process's rank as its launcher announced it; None without a launcher."""
    found = (os.environ[name] for name in RANK_VARIABLES if os.environ.get(name, "").isdigit())
    return next((int(text) for text in found), None)


def open_transport(timeout_s: float) -> Transport:
    """MPI's world where a launcher started this process, else a world of this process alone."""
    if launched_rank() is None:
        from ringsim.backends.loopback import World

        _check_step()
        return World(1).endpoint(0)
    from ringsim.backends.mpi import MpiTransport, load

    return MpiTransport(load().COMM_WORLD, timeout_s=timeout_s)


def _check_step() -> None:
    """Raise RankMismatch where srun started several tasks and told none of them of the others."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and int(tasks) > 1:
        raise RankMismatch(
            f"srun started {tasks} tasks, but no MPI plugin joined them, so each is alone: srun --mpi=pmix (or pmi2, "
            "cray_shasta; `srun --mpi=list` says which there are)"
        )


def leader() -> bool:
    """Whether this process prints."""
    return launched_rank() in (None, 0)


def console(*, error: bool = False) -> Console:
    """Where rank 0 prints. Output that is no terminal is wide, plain and unwrapped."""
    stream = sys.stderr if error else sys.stdout
    return Console(
        file=stream, quiet=not leader(), width=None if stream.isatty() else 200, highlight=False, soft_wrap=not stream.isatty()
    )


def on_leader(transport: Transport, function: Callable[[], Value]) -> Value:
    """What `function` returns on rank 0, on every rank; or its error, on every rank."""
    value, error = None, None
    if transport.rank == 0:
        try:
            value = function()
        except RingsimError as problem:
            error = problem
    value, error = transport.allgather((value, error))[0]
    if error is not None:
        raise error
    return cast("Value", value)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on rank 0's terminal, nothing in a log; the function given advances it and names what comes next."""
    shown = leader() and sys.stderr.isatty()
    with Progress(console=console(error=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def write_outputs(json_path: Path | None, trace_path: Path | None, facts: dict[str, Any], timelines: dict[str, Timeline]) -> None:
    """Rank 0 writes what was asked for."""
    if not leader():
        return
    if json_path is not None:
        files.write_json(json_path, facts)
    if trace_path is not None:
        files.write_json(trace_path, trace_events(timelines))


def check_outputs(*paths: Path | None) -> None:
    """Raise FileError before the work if an output cannot be written."""
    for path in paths:
        if path is not None:
            files.check_writable(path)


def end(run: Callable[[], Any], *, communicates: bool = False) -> int:
    """Run a command; returns the exit code. Whatever ends one rank ends the job, with the rank and the cause named.

    `communicates` says whether the other ranks of the job may be waiting for this one inside MPI.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say(f"ringsim: rank {launched_rank() or 0}: interrupted", always=True)
        return _abort(130)
    except (PeerFailed, PeerTimeout) as error:
        if isinstance(error, CollectiveTimeout):
            # a rank that knows the peer and the op may be about to say so
            time.sleep(YIELD_WORD_S)
        _say(f"ringsim: {error}", always=True)
        return _abort(2)
    except (RingsimError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _end_together(f"ringsim: {text}", communicates=communicates)
    except BaseException as error:  # noqa: BLE001 - whatever it is, the other ranks must not wait for this one
        return _end_unforeseen(error)


def _end_unforeseen(error: BaseException) -> int:
    """Say it with its trace, unless nobody can be told: the reader of the output has gone, or its disk is full."""
    if isinstance(error, SystemExit) or getattr(error, "errno", None) == errno.EPIPE:
        # click and rich end the process when the reader goes, as `head` does
        _silence()
        return _abort(128 + signal.SIGPIPE)
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        _silence()
        _say(f"ringsim: standard output: {error.strerror}", always=True)
        return _abort(2)
    trace = "".join(traceback.format_exception(error))
    _say(f"ringsim: rank {launched_rank() or 0} failed: {error!r}\n{trace}", always=True)
    return _abort(1)


def _silence() -> None:
    """What is still to be flushed goes nowhere."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - until the process ends


def _end_together(message: str, *, communicates: bool) -> int:
    """An error that all ranks raised is said once and ends the job in order; one that only some raised aborts it."""
    if communicates and not _everyone_is_here():
        _say(message, always=True)
        return _abort(2)
    _say(message)
    if not leader():
        # some launchers end the job with the first rank that fails: let rank 0 speak
        time.sleep(YIELD_WORD_S)
    return 2


def _everyone_is_here() -> bool:
    """Whether all ranks come to the same end within a short time."""
    from ringsim.backends.mpi import load

    if launched_rank() is None:
        return True
    try:
        # those that went on are inside MPI_Init or past it: only from within MPI can they be told
        mpi = load()
    except RingsimError:
        return True
    limit = time.monotonic() + GATHER_S
    try:
        arrived = mpi.COMM_WORLD.Ibarrier()
        while not arrived.Test():
            if time.monotonic() > limit:
                return False
            time.sleep(1e-3)
    except mpi.Exception:
        # the barrier met another collective: somebody went on
        return False
    return True


def _initialised_mpi() -> Any:
    module = sys.modules.get("mpi4py.MPI")
    return module if module is not None and module.Is_initialized() and not module.Is_finalized() else None


def _say(message: str, *, always: bool = False) -> None:
    """One write a message: MPI interleaves what ranks print."""
    if always or leader():
        # what cannot be said must not change how the job ends
        with suppress(OSError):
            sys.stderr.write(message.rstrip("\n") + "\n")
            sys.stderr.flush()


def _abort(code: int) -> int:
    mpi = _initialised_mpi()
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        # a launcher that is told to abort may drop what it has not yet passed on
        time.sleep(FORWARD_S)
        mpi.COMM_WORLD.Abort(code)
    return code

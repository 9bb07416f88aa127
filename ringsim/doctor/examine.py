"""The whole examination: every rank looks, all hear of it, and what all have in common is said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ..errors import TransportError
from ..transport import Transport
from . import answers, aware, cuda, gpu, host, links, mpi, nics, place, python, together, trial, variables
from .choice import Choice, choose
from .finding import Finding, Probe, attempt
from .merge import Examined, merge
from .place import Place
from .report import Report
from .system import System
from .trial import Trial

PROBES: Final = (
    Probe("host", "host", host.look),
    Probe("python", "libraries", python.look),
    Probe("mpi", "MPI", mpi.look),
    Probe("gpu", "GPUs", gpu.look),
    Probe("gpu", "links", links.look),
    Probe("cuda", "CUDA", cuda.look),
    Probe("network", "adapters", nics.look),
)
"""What the ranks of a host have in common: its first rank looks."""


def examine(
    system: System, transport: Transport, *, launched: bool, trouble: str = "", progress: Callable[[str], None]
) -> Report:
    """Look at everything; collective, the same report on every rank.

    `launched` says whether a launcher started this process, `trouble` why its ranks could not be joined. Raises PeerTimeout.
    """
    mine = Place.of(transport.rank, transport.hosts, launched=launched)
    found: list[Finding] = []
    for probe in (*(PROBES if mine.local_rank == 0 else ()), *_own(transport, mine, trouble)):
        progress(probe.name)
        found += attempt(probe, system)
    gathered = transport.allgather(Examined(rank=transport.rank, host=transport.hosts[transport.rank], findings=tuple(found)))
    shared = together.shared(gathered)
    examined = [replace(one, findings=(*one.findings, *shared.get(one.rank, ()))) for one in gathered]
    return Report(
        hosts=tuple(dict.fromkeys(transport.hosts)),
        world_size=transport.world_size,
        lines=merge(examined),
        choice=_choice(system, transport, together.sharing(examined, 0)),
        sharing=together.sharing(examined, 0),
        ready=transport.world_size > 1 and all(transport.allgather(_ready(system, mine))),
    )


def _own(transport: Transport, mine: Place, trouble: str) -> tuple[Probe, ...]:
    """What each rank looks at for itself."""
    own = [Probe("mpi", "variables", variables.look), Probe("ranks", "place", lambda system: place.look(system, mine))]
    if mine.local_rank != 0:
        own.append(Probe("gpu", "GPUs", lambda system: [one for one in gpu.look(system) if one.each == "rank"]))
    else:
        own.append(Probe("mpi", "CUDA-aware", lambda system: aware.look(system, transport)))
        own.append(Probe("ranks", "launched", lambda system: together.launched(system, transport, trouble=trouble)))
    return tuple(own)


def _ready(system: System, mine: Place) -> bool:
    """Whether this rank has a GPU, and on its host CuPy sees one."""
    if place.own_gpu(system, mine) is None:
        return False
    return mine.local_rank != 0 or bool(answers.read(system.ask("cuda_library")).get("devices"))


def try_out(report: Report, system: System, transport: Transport, how: Callable[[Transport], Trial] = trial.make) -> Report:
    """The report with what came of making the GPU backend on all ranks; collective. Where ranks lose each other, with that."""
    tried = trial.attempt(transport, how)
    own = tuple(replace(finding, each="rank") for finding in tried.findings)
    mine = Examined(rank=transport.rank, host=transport.hosts[transport.rank], findings=own)
    try:
        lines = merge(transport.allgather(mine))
        choice = _choice(system, transport, report.sharing, tried.said)
    except TransportError as error:
        lost = Finding(subject="trial", name="ranks", fact=f"lost each other: {error}", status="wrong", remedy=trial.REMEDY)
        lines, choice = merge([replace(mine, findings=(*own, lost))]), report.choice
    return replace(report, lines=(*report.lines, *lines), choice=choice)


def _choice(system: System, transport: Transport, sharing: int, tried: str = "") -> Choice:
    """What rank 0 would use, on every rank."""
    mine = choose(system, transport, sharing=sharing, tried=tried) if transport.rank == 0 else None
    found: Choice = transport.allgather(mine)[0]
    return found

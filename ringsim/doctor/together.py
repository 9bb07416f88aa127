"""What only all ranks together show: how many found each other, and what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..transport import Transport
from . import answers, cpus, flavours
from .finding import Finding
from .merge import Examined
from .system import System


def stranger(system: System) -> str:
    """Why MPI had better not be initialised: the launcher of this process is of another kind than the library. Else empty.

    Seen: MPICH 5.0.2 under Open MPI's launcher aborts in MPI_Init, Open MPI 5.0.11 under Hydra makes worlds of one.
    """
    launcher = flavours.of_environment(system.environment)
    if launcher is None:
        return ""
    library = flavours.of_library(answers.text(answers.read(system.ask("mpi_library")), "library"))
    if library is None or flavours.fit(launcher, library.name) != "foreign":
        return ""
    kind = "Hydra (MPICH's)" if launcher == "MPICH" else f"{launcher}'s"
    return f"the launcher of this job is {kind}, the library that mpi4py loads is {library}: ringsim does not initialise it"


def launched(system: System, transport: Transport, *, trouble: str = "") -> list[Finding]:
    """Whether the ranks that a launcher started found each other. `trouble` is why MPI's world was not entered."""
    if trouble:
        remedy = (
            "start with the mpiexec of the library's own MPI, by its full path; or set MPI4PY_LIBMPI to the launcher's libmpi.so"
        )
        return [Finding(subject="ranks", name="launched", fact=trouble, status="wrong", remedy=remedy)]
    tasks = system.environment.get("SLURM_STEP_NUM_TASKS", "")
    alone = transport.world_size == 1
    if alone and tasks.isdecimal() and int(tasks) > 1:
        fact = f"srun started {tasks} tasks, but they were told of no MPI: each is a world of one"
        remedy = "srun --mpi=pmix or --mpi=pmi2, as the library was built for (`srun --mpi=list` shows what there is)"
        return [Finding(subject="ranks", name="launched", fact=fact, status="wrong", remedy=remedy)]
    if transport.name == "loopback" and alone:
        fact = "one process, without a launcher: `mpiexec -n P ringsim doctor` shows more"
        return [Finding(subject="ranks", name="launched", fact=fact)]
    hosts = Counter(transport.hosts)
    each = ", ".join(f"{number} on {count}" for count, number in Counter(hosts.values()).items())
    fact = f"{transport.world_size} ranks on {len(hosts)} host{'s' if len(hosts) > 1 else ''}"
    if len(set(hosts.values())) > 1:
        fact += f", not evenly ({each.replace(' on ', ' hosts with ')})"
    return [Finding(subject="ranks", name="launched", fact=fact)]


def shared(examined: Sequence[Examined]) -> dict[int, list[Finding]]:
    """What ranks of one host share, or are kept from; by the first rank of each host."""
    by_host: dict[str, list[Examined]] = {}
    for one in examined:
        by_host.setdefault(one.host, []).append(one)
    return {ranks[0].rank: [*_crowded(ranks), *_apart(ranks)] for ranks in by_host.values()}


def _crowded(ranks: list[Examined]) -> list[Finding]:
    """Ranks that may run on the same processors, more of them than there are."""
    sets = Counter(str(_detail(one, "processors", "processors")) for one in ranks)
    crowded = [(text, count) for text, count in sets.items() if 0 < len(cpus.parse(text)) < count]
    if not crowded:
        return []
    text, count = crowded[0]
    fact = f"{count} ranks of a host share the processors {text}: each computes a part of the time"
    remedy = "start fewer ranks, or bind them apart: srun --cpu-bind=cores -c N, mpirun --map-by core --bind-to core"
    return [Finding(subject="ranks", name="crowding", fact=fact, status="note", remedy=remedy)]


def _apart(ranks: list[Examined]) -> list[Finding]:
    """Ranks of one host to which nvidia-smi shows different GPUs are kept apart by the scheduler's control groups."""
    sets = set()
    for one in ranks:
        listed = _detail(one, "GPUs", "gpus")
        if isinstance(listed, list) and listed:
            sets.add(tuple(str(gpu.get("uuid")) for gpu in listed))
    if len(sets) < 2:
        return []
    fact = "ranks of a host see different GPUs: CUDA IPC between them fails as a rule, in MPI too"
    remedy = "srun --gpu-bind=none, or --gpus-per-node=N in place of --gpus-per-task: ringsim picks by local rank"
    return [Finding(subject="ranks", name="GPUs apart", fact=fact, status="note", remedy=remedy)]


def sharing(examined: Sequence[Examined], rank: int) -> int:
    """How many ranks of its host may run on the processors of a rank, itself included."""
    mine = examined[rank]
    same = _detail(mine, "processors", "processors")
    return sum(one.host == mine.host and _detail(one, "processors", "processors") == same for one in examined)


def _detail(one: Examined, name: str, key: str) -> object | None:
    for finding in one.findings:
        if finding.name == name and key in finding.details:
            found: object = finding.details[key]
            return found
    return None

"""Where one rank runs: its processors, its GPU, and whether they are near each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import cpus, gpu, host, nics
from .finding import Finding, Status
from .system import System


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank among those of its host; `launched` says whether a launcher started it."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    launched: bool

    @classmethod
    def of(cls, rank: int, hosts: Sequence[str], *, launched: bool) -> Place:
        """The place of a rank by each rank's host."""
        mine = hosts[rank]
        return cls(
            rank=rank,
            world_size=len(hosts),
            local_rank=hosts[:rank].count(mine),
            local_size=hosts.count(mine),
            launched=launched,
        )


def own_gpu(system: System, place: Place) -> gpu.Gpu | None:
    """The GPU that this rank takes: by its number on the host among those that it sees."""
    seen = gpu.visible(gpu.see(system).gpus, system.environment.get("CUDA_VISIBLE_DEVICES"))
    return seen[place.local_rank % len(seen)] if seen else None


def look(system: System, place: Place) -> list[Finding]:
    """Processors and GPU of this rank."""
    return [_processors(system, place), *_gpu(system, place)]


def _processors(system: System, place: Place) -> Finding:
    mine = system.affinity()
    if mine is None:
        fact = "the system does not say on which processors this process may run"
        return Finding(subject="ranks", name="processors", fact=fact, each="rank")
    numa = host.nodes(system)
    on = [number for number, members in numa.items() if members & set(mine)]
    details = {"processors": cpus.shown(mine), "numa": on}
    fact = f"{len(mine)} logical processors" + (f" on {len(on)} of {len(numa)} NUMA nodes" if len(numa) > 1 else "")
    if len(on) > 1 and place.launched and place.world_size > 1:
        remedy = "bind: srun --cpu-bind=cores -c N, mpirun --map-by numa --bind-to numa (Open MPI), mpiexec -bind-to numa (Hydra)"
        fact += ": the rank wanders between memories"
        return Finding(subject="ranks", name="processors", fact=fact, status="note", remedy=remedy, each="rank", details=details)
    return Finding(subject="ranks", name="processors", fact=fact, each="rank", details=details)


def _gpu(system: System, place: Place) -> list[Finding]:
    seen = gpu.see(system)
    if not seen.gpus:
        return []
    chosen = system.environment.get("CUDA_VISIBLE_DEVICES")
    mine = own_gpu(system, place)
    if mine is None:
        fact = f"CUDA_VISIBLE_DEVICES={chosen} leaves this rank none of the {len(seen.gpus)} GPUs"
        remedy = "unset it, or name GPUs by number or UUID as `nvidia-smi -L` has them"
        return [Finding(subject="ranks", name="GPU", fact=fact, status="wrong", remedy=remedy, each="rank")]
    return [*_shared(system, place, mine), _near(system, place, mine)]


def _shared(system: System, place: Place, mine: gpu.Gpu) -> list[Finding]:
    """Ranks of a host beyond the GPUs that they see share them."""
    count = len(gpu.visible(gpu.see(system).gpus, system.environment.get("CUDA_VISIBLE_DEVICES")))
    if count == 1 or place.local_size <= count:
        return []
    fact = f"{place.local_size} ranks of a host share {count} GPUs"
    if mine["compute_mode"] not in {"Default", "unknown"}:
        remedy = "start MPS (nvidia-cuda-mps-control -d), or sudo nvidia-smi -c DEFAULT, or as many ranks as GPUs"
        fact += f", whose compute mode {mine['compute_mode']} forbids it without MPS"
        return [Finding(subject="ranks", name="sharing", fact=fact, status="wrong", remedy=remedy, each="rank")]
    remedy = "start as many ranks as GPUs; or MPS (nvidia-cuda-mps-control -d), that kernels of several ranks run at once"
    return [Finding(subject="ranks", name="sharing", fact=fact, status="note", remedy=remedy, each="rank")]


def _near(system: System, place: Place, mine: gpu.Gpu) -> Finding:
    """Whether this rank may run on processors of its GPU's NUMA node alone."""
    folder = nics.of_gpu(mine.bus)
    local, where = cpus.parse(system.read(f"{folder}/local_cpulist") or ""), nics.node(system, folder)
    affinity = frozenset(system.affinity() or ())
    details = {"gpu": mine.index, "uuid": mine.uuid, "bus": mine.bus, "numa": where, "processors": cpus.shown(affinity)}
    if not local or not affinity:
        fact = "the system does not say which processors are near the GPU"
        return Finding(subject="ranks", name="GPU", fact=fact, each="rank", details=details)
    if affinity <= local:
        fact = "the rank runs on the NUMA node of its GPU"
        return Finding(subject="ranks", name="GPU", fact=fact, each="rank", details=details)
    remedy = f"bind the rank to processors {cpus.shown(local)}, as with: numactl --cpunodebind={where} --membind={where}"
    if affinity & local:
        fact = (
            f"the rank may run beside the NUMA node of its GPU, {len(affinity - local)} of its {len(affinity)} processors are far"
        )
        status: Status = "note" if place.launched else "ok"
        return Finding(subject="ranks", name="GPU", fact=fact, status=status, remedy=remedy, each="rank", details=details)
    fact = (
        f"the rank runs on processors {cpus.shown(affinity)}, its GPU {mine.index} is on NUMA node {where} ({cpus.shown(local)})"
    )
    return Finding(subject="ranks", name="GPU", fact=fact, status="wrong", remedy=remedy, each="rank", details=details)

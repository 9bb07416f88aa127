"""Which GPU a rank computes on, and with which fused kernels."""

from __future__ import annotations

from typing import Final

from ringsim.backends.cuda_tiles import Tiles
from ringsim.backends.cupy_calls import CupyCalls, load
from ringsim.errors import MissingDependency
from ringsim.transport import Transport

TENSOR_CORES: Final = (8, 0)
"""The compute capability whose `mma.sync` our own kernels use."""

SCORES: Final = 16
"""The part of a device's memory that cuDNN's backward pass may keep score gradients in, where it knows no other order."""


def device_of(control: Transport) -> int:
    """This rank's device among those that it sees: by its number on its host, round and round where there are more ranks.

    A launcher that shows each rank one GPU alone (Slurm's --gpus-per-task) leaves nothing to choose: it is number 0. But then no
    rank can open another's memory: CUDA IPC, and what MPI makes of it, does not work (docs/clusters.md).
    Raises MissingDependency, DeviceError.
    """
    count = int(load().cuda.runtime.getDeviceCount())
    local_rank = control.hosts[: control.rank].count(control.hosts[control.rank])
    return local_rank % count


def tiles_on(calls: CupyCalls) -> tuple[Tiles, ...]:
    """Fused kernels of cuDNN where they are installed, and our own for what they refuse."""
    from ringsim.backends.cuda_attend import OwnTiles

    own: Tiles = OwnTiles(calls, plain=calls.capability < TENSOR_CORES)
    most = int(calls.facts()["memory_nbytes"]) // SCORES
    try:
        from ringsim.backends.cudnn import CudnnTiles

        return CudnnTiles(calls, capability=calls.capability, most_scores_nbytes=most), own
    except MissingDependency:
        # what is used then stands in the facts of every measurement, and in what `ringsim doctor` says
        return (own,)

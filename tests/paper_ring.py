"""Rings of ranks on GPUs on paper, in one thread: the real backend, our real kernels, streams in adversarial order."""

from dataclasses import dataclass, field

import numpy as np
from emulator import Emulator
from paper_gpu import POISON, PaperGpu

from ringsim.backends.cuda_attend import OwnTiles
from ringsim.backends.cupy import CupyBackend
from ringsim.backends.device_link import DeviceLink
from ringsim.backends.loopback import World
from ringsim.execution import Rank, drive_all
from ringsim.execution.assembly import assemble, given_arrays, room_of, rows_of

PATIENCE_S = 30.0


@dataclass
class Ring:
    """Every rank of a schedule on one paper GPU; `run` gives the global results, `during` what was called while ranks walked."""

    schedule: object
    gpu: PaperGpu
    world: World
    ranks: list
    during: list = field(default_factory=list)

    @classmethod
    def of(cls, schedule, *, seed=0, tiles=lambda gpu: (OwnTiles(gpu),), backend=CupyBackend):
        gpu = PaperGpu(seed, run=Emulator().launch)
        world = World(schedule.world_size, link=DeviceLink(gpu))
        made = [Rank(schedule, world.endpoint(rank), backend(gpu, tiles(gpu))) for rank in range(schedule.world_size)]
        return cls(schedule, gpu, world, made)

    def beside(self, schedule):
        """The same ranks with another schedule, in the memory of this one."""
        made = [Rank(schedule, rank.transport, rank.backend, beside=rank.memory) for rank in self.ranks]
        return Ring(schedule, self.gpu, self.world, made)

    def run(self, *arrays, late=False, **others):
        """As ringsim.execute: global arrays in, a Result out. `late`: the caller's streams make the inputs after the call."""
        schedule, gpu = self.schedule, self.gpu
        given = given_arrays(schedule, dict(zip("qkv", arrays, strict=True)) | others)
        held, walkers, streams = [], [], []
        for number, rank in enumerate(self.ranks):
            self._poison(rank)
            streams.append(gpu.stream())
            mine = {name: self._input(rows_of(schedule, number, name, array), streams[-1], late) for name, array in given.items()}
            held.append(mine | room_of(rank))
        gpu.log.clear()
        for rank, mine, stream in zip(self.ranks, held, streams, strict=True):
            walkers.append(rank.walker(*mine.values(), stream=stream))
        drive_all(walkers, patience_s=PATIENCE_S)
        self.during = list(gpu.log)
        lses = [rank.finish(walker, stream) for rank, walker, stream in zip(self.ranks, walkers, streams, strict=True)]
        taken = [self._output(array, stream) for array, stream in zip(lses, streams, strict=True)]
        host = [
            {name: self._output(array, stream) for name, array in mine.items()}
            for mine, stream in zip(held, streams, strict=True)
        ]
        gpu.drain()
        return assemble(schedule, host, taken, None)

    def _poison(self, rank):
        """Whatever an earlier run left in a slot must not be what a right answer rests on."""
        for slot in rank.memory._slots.values():
            slot.view(np.ndarray).fill(POISON)

    def _input(self, array, stream, late):
        gpu = self.gpu
        if not late:
            return gpu.upload(array)
        made = gpu.empty(array.nbytes)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        gpu.copy(made, source, stream)
        return made.view(array.dtype).reshape(array.shape)

    def _output(self, array, stream):
        """Read as a caller does who queues the next thing on his stream."""
        made = np.empty(array.shape, array.dtype)
        self.gpu.defer(lambda: np.copyto(made, array.view(np.ndarray)), stream)
        return made

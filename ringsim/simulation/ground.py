"""What simulated ranks stand on: devices, paths and capacities; where many ranks are alike, those of one of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..topology import Path, Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """`ranks` ranks are simulated, and rank r stands for r + ranks, r + 2 ranks, ... of `world_size` as well.

    `placed` holds every rank's device. A device or a resource of which others do the same at the same time is known by the
    first of them: `devices` and `resources` name it and how many there are. Where `ranks` is `world_size` nobody stands for
    another, and both are empty.
    """

    topology: Topology
    placed: tuple[int, ...]
    ranks: int
    devices: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    resources: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    _links: dict[tuple[int, int], tuple[Path, tuple[int, int]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def world_size(self) -> int:
        """Ranks of the schedule."""
        return len(self.placed)

    @property
    def folds(self) -> int:
        """Ranks that each simulated one stands for."""
        return self.world_size // self.ranks

    def device(self, rank: int) -> int:
        """The device of a rank, or the one that stands for it."""
        return self.devices.get(self.placed[rank], (self.placed[rank], 1))[0]

    def cores(self, device: int) -> float:
        """Cores of a device for the ranks that are simulated on it."""
        return (self.topology.device(device).cores or 1) * self._share(self.devices, device)

    def capacities(self) -> list[float]:
        """Bytes per second of each resource for the messages that are simulated on it."""
        found = enumerate(self.topology.graph.resources)
        return [resource.capacity * self._share(self.resources, number) for number, resource in found]

    def link(self, source: int, target: int) -> tuple[Path, tuple[int, int]]:
        """The path between two ranks, one of which is simulated, over the resources that stand for its own; and where their
        messages meet: the simulated target, and how far they come.
        """
        key = (source, target)
        found = self._links.get(key)
        if found is None:
            path = self.topology.path(self.placed[source], self.placed[target])
            if self.resources:
                path = replace(path, resources=tuple(self.resources[number][0] for number in path.resources))
            found = self._links[key] = path, (target % self.ranks, (target - source) % self.world_size)
        return found

    def carried(self, nbytes: Mapping[int, int]) -> Counter[int]:
        """Bytes over each real resource, given those over the ones that stand for them."""
        if not self.resources:
            return Counter(nbytes)
        of_each = {
            number: nbytes.get(first, 0) * (self.folds // together) for number, (first, together) in self.resources.items()
        }
        return Counter({number: carried for number, carried in of_each.items() if carried})

    def _share(self, which: Mapping[int, tuple[int, int]], number: int) -> float:
        """What is left to one of several folds for each of those that it stands for: all of it where they have one each."""
        return which[number][1] / self.folds if number in which else 1.0


def whole(topology: Topology, placed: Sequence[int]) -> Ground:
    """The ground of a simulation of every rank."""
    return Ground(topology=topology, placed=tuple(placed), ranks=len(placed))

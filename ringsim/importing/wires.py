"""What every format says of a node: GPUs, NICs, PCIe switches, root complexes, and the cables between them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import combinations
from typing import Literal

from ..errors import TopologyError
from ..units import shown

Kind = Literal["gpu", "nic", "switch", "root", "fabric"]
MOST_PARTS = 1024
MOST_GPUS = 128
MOST_WIRES = 2**14
MOST_ROOTS = 64
LONGEST_NAME = 64
LONGEST_REMARK = 200
NO_NAMES = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "unknown"))
"""Words that mean something else to some reader of YAML, or here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """A kind of wire. `bandwidth` is as YAML has it, None where the file does not say; `source` says who does.

    Cables of one `kind` that differ get `label` for their link's name. `remark` goes into a comment.
    """

    kind: str
    label: str = ""
    bandwidth: str | None = None
    source: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """A GPU, NIC, PCIe switch, root complex, or the switch of a GPU fabric. `order` sorts those of a kind.

    Where the file says so: `model` (of a root complex: its socket), `memory` (YAML, with its source), `speeds` (of each port of a
    NIC, Mbit/s).
    """

    name: str
    kind: Kind
    order: tuple[int, ...] = ()
    remark: str = ""
    model: str = ""
    memory: str | None = None
    speeds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A cable between two spots, by name."""

    a: str
    b: str
    cable: Cable


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node. `own` is the NIC that each GPU uses; `notes` is what a reader has to know."""

    title: str
    what: str
    spots: tuple[Spot, ...]
    wires: tuple[Wire, ...]
    own: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, *kinds: Kind) -> tuple[Spot, ...]:
        """The spots of some kinds, in order."""
        return tuple(spot for spot in self.spots if spot.kind in kinds)

    @property
    def cables(self) -> tuple[Cable, ...]:
        """The kinds of wire, each once."""
        return tuple(dict.fromkeys(wire.cable for wire in self.wires))


def plain(text: str) -> str:
    """Text from a file as one printable line of bounded length."""
    clean = "".join(letter if letter.isprintable() else "?" for letter in text[: LONGEST_REMARK + 1])
    return clean if len(clean) <= LONGEST_REMARK else clean[:LONGEST_REMARK] + "..."


def named(text: str) -> str:
    """A name as YAML here takes it: letters, digits, `_` and `-`; anything else becomes `_`. Raises TopologyError if empty."""
    if not text or len(text) > LONGEST_NAME:
        raise TopologyError(f"{shown(text)} is no name: 1 to {LONGEST_NAME} characters")
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    return clean if re.match(r"[A-Za-z_]", clean) and clean.lower() not in NO_NAMES else f"_{clean}"


def quantity(value: Fraction, unit: str) -> str:
    """A figure as YAML has it, to six digits."""
    return f"{float(value):.6g} {unit}"


def pcie(bandwidth: Fraction | None, source: str, role: str) -> Cable:
    """A PCIe link of a known rate (GB/s), or of an unknown one, which is then its role's own."""
    if bandwidth is None:
        return Cable(kind="pcie", label=role or "gpu", remark="PCIe: the file does not say how fast")
    text = quantity(bandwidth, "GB/s")
    return Cable(kind="pcie", label=f"{float(bandwidth):.4g}".replace(".", "_"), bandwidth=text, source=source)


def broadcom(identity: tuple[str, ...], level: int) -> int:
    """The PCIe generation of a Broadcom switch (level 0) or its sub-switch (1), else 0: shown as two, full rate on all ports.

    identity: vendor, device, and the subsystem's; the rule is getBcmGen of NCCL's topo.cc.
    """
    model = identity[-1] if len(identity) == 4 else ""
    if identity[:3] == ("1000", "c010", "1000") and re.fullmatch("a[0-9a-f]{3}", model):
        return 4
    if identity[:3] == ("1000", "c030", "1000") and re.fullmatch(f"{level}[0-9a-f]{{3}}", model):
        return 5
    return 0


def merged(count: int) -> str:
    """The note on switches that are one."""
    return f"{count} Broadcom sub-switches are one with the switch above, as NCCL takes them: full rate on all ports"


SOCKET = Cable(kind="socket", remark="between root complexes: NUMA nodes or sockets")
NUMA = Cable(kind="numa", remark="between root complexes of one socket")


@dataclass(slots=True)
class Sketch:
    """A node while it is read. A name that is taken is refused."""

    title: str
    what: str
    spots: dict[str, Spot] = field(default_factory=dict)
    wires: list[Wire] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)
    reached: frozenset[str] = frozenset()
    without: str = ""
    """Why there may be no GPU."""

    def add(self, spot: Spot, said: str = "") -> str:
        """A new spot; returns its name. Raises TopologyError if there are too many, or if the name is taken."""
        if spot.name in self.spots:
            one, other = self.origin[spot.name], said or spot.name
            raise TopologyError(
                f"{shown(one)} and {shown(other)} are both named {spot.name!r}: rename one of them in the file"
                if one != other
                else f"two parts are named {shown(one)}"
            )
        if len(self.spots) >= MOST_PARTS:
            raise TopologyError(f"more than {MOST_PARTS} GPUs, NICs and PCIe switches")
        self.spots[spot.name] = spot
        self.origin[spot.name] = said or spot.name
        return spot.name

    def count(self, kind: Kind) -> int:
        """How many spots of a kind there are yet."""
        return sum(spot.kind == kind for spot in self.spots.values())

    def wire(self, a: str, b: str, cable: Cable) -> None:
        """Join two spots; in a PCIe tree `b` is above `a`. Raises TopologyError if there are too many wires."""
        if len(self.wires) >= MOST_WIRES:
            raise TopologyError(f"more than {MOST_WIRES} wires")
        self.wires.append(Wire(a=a, b=b, cable=cable))

    def switched(self, gpu: str, name: str, switches: frozenset[str], cable: Cable) -> None:
        """Wire a GPU to a fabric's switches, which are taken as one, as NCCL's topo.cc does."""
        if name not in self.spots:
            self.add(Spot(name=name, kind="fabric", remark="all NVSwitches as one, as NCCL takes them"))
            self.reached = switches
        elif self.reached != switches:
            note = "GPUs reach different NVSwitches: what joins those the file does not say; they are taken as one"
            self.notes += [note] if note not in self.notes else []
        self.wire(gpu, name, cable)

    def node(self, keep: frozenset[str] | None = None) -> Node:
        """What was read, without switches and root complexes that lead nowhere; sockets joined; NICs given to GPUs.

        keep: the NICs to keep. Raises TopologyError if there is no GPU, or no such NIC.
        """
        nics = [spot.name for spot in self.spots.values() if spot.kind == "nic"]
        missing = sorted((keep or frozenset()) - set(nics))
        if missing:
            raise TopologyError(f"no NIC {shown(missing[0])}; the file has {', '.join(nics[:40]) or 'none'}")
        start = [spot.name for spot in self.spots.values() if spot.kind == "gpu" or (spot.kind == "nic" and keep is None)]
        return self._joined(self._above([*start, *(keep or ())]))

    def _above(self, start: list[str]) -> frozenset[str]:
        """What lies above some spots, and they: wires go up from `a` to `b`."""
        up: dict[str, list[str]] = defaultdict(list)
        for wire in self.wires:
            up[wire.a].append(wire.b)
        found, queue = set(start), list(start)
        for name in queue:
            fresh = [other for other in up[name] if other not in found]
            found.update(fresh)
            queue += fresh
        return frozenset(found)

    def _joined(self, kept: frozenset[str]) -> Node:
        order = {"gpu": 0, "nic": 1, "switch": 2, "root": 3, "fabric": 4}
        spots = sorted((spot for name, spot in self.spots.items() if name in kept), key=lambda spot: order[spot.kind])
        gpus = _ranked([spot for spot in spots if spot.kind == "gpu"], self.without)
        wires = [wire for wire in self.wires if wire.a in kept and wire.b in kept]
        roots = [spot.name for spot in spots if spot.kind == "root"]
        if len(roots) > MOST_ROOTS:
            raise TopologyError(f"more than {MOST_ROOTS} root complexes")
        for one, other in combinations(roots, 2):
            beside = self.spots[one].model == self.spots[other].model != ""
            wires.append(Wire(a=one, b=other, cable=NUMA if beside else SOCKET))
        spots = [*gpus, *(spot for spot in spots if spot.kind != "gpu")]
        own, notes = _affinity(spots, wires)
        names = {spot.name: f"gpu-{index}" for index, spot in enumerate(gpus)}
        taken = next((spot.name for spot in spots if spot.kind != "gpu" and spot.name in names.values()), None)
        if taken is not None:
            raise TopologyError(f"{shown(self.origin[taken])} has the name of a GPU here, {taken}: rename it in the file")
        node = Node(
            title=plain(self.title),
            what=self.what,
            spots=tuple(spots),
            wires=_sorted(spots, wires),
            own=own,
            notes=(*self.notes, *notes),
        )
        return _renamed(node, names)


def _ranked(gpus: list[Spot], without: str) -> list[Spot]:
    """By number where all have one, else as the file has them. Raises TopologyError without any, or for a number twice."""
    if not gpus:
        remedy = "for a machine of CPUs, `mpiexec -n P ringsim calibrate -o here.yaml` measures one"
        raise TopologyError(f"no GPU in it{without and f' ({without})'}: {remedy}")
    if not all(spot.order for spot in gpus):
        return gpus
    twice = next((one for one, other in combinations(gpus, 2) if one.order == other.order), None)
    if twice is not None:
        raise TopologyError(f"two GPUs have the number {twice.order[0]}; one is {plain(twice.remark)}")
    return sorted(gpus, key=lambda spot: spot.order)


def _renamed(node: Node, names: dict[str, str]) -> Node:
    """The node under other names."""
    spots = tuple(replace(spot, name=names.get(spot.name, spot.name)) for spot in node.spots)
    wires = tuple(replace(wire, a=names.get(wire.a, wire.a), b=names.get(wire.b, wire.b)) for wire in node.wires)
    own = tuple((names.get(gpu, gpu), names.get(nic, nic)) for gpu, nic in node.own)
    return replace(node, spots=spots, wires=wires, own=own)


def _sorted(spots: Iterable[Spot], wires: Iterable[Wire]) -> tuple[Wire, ...]:
    """PCIe from the GPUs up, sockets, GPU fabrics, NICs last: the order in which a `pcie-tree` makes its wires.

    C2C and NVLink to a CPU come before: of two ways of equal width, routes take the one whose wire was first.
    """
    number = {spot.name: index for index, spot in enumerate(spots)}
    kind = {spot.name: spot.kind for spot in spots}

    def rank(wire: Wire) -> tuple[bool, int, int]:
        ends = kind[wire.a], kind[wire.b]
        inside = 1 if wire.cable.kind in ("pcie", "socket", "numa") else 0 if "root" in ends else 2
        return "nic" in ends, inside, number[wire.a]

    return tuple(sorted(wires, key=rank))


def _affinity(spots: list[Spot], wires: list[Wire]) -> tuple[tuple[tuple[str, str], ...], list[str]]:
    """The NIC of each GPU: of the nearest the fastest, which GPUs that have equal ones share in turn (as NCCL's topo.cc does)."""
    nics = [spot for spot in spots if spot.kind == "nic"]
    shares: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for gpu in (spot for spot in spots if spot.kind == "gpu"):
        away = _levels(gpu.name, spots, wires)
        reached = [spot for spot in nics if spot.name in away]
        least = min((away[spot.name] for spot in reached), default=(0, 0))
        nearest = [spot for spot in reached if away[spot.name] == least]
        best = max((max(spot.speeds, default=0) for spot in nearest), default=0)
        shares[tuple(spot.name for spot in nearest if max(spot.speeds, default=0) == best)].append(gpu.name)
    own = {
        gpu: nearest[index * len(nearest) // len(gpus)]
        for nearest, gpus in shares.items()
        if nearest
        for index, gpu in enumerate(gpus)
    }
    equal = {name for nearest in shares for name in nearest}
    idle = [spot.name for spot in nics if spot.name not in own.values() and spot.name not in equal]
    notes = [f"NICs that no GPU uses, as others are nearer or faster: {', '.join(idle[:40])}"] if idle else []
    notes += _spare([spot for spot in nics if spot.name in equal], frozenset(own.values()))
    return tuple((spot.name, own[spot.name]) for spot in spots if spot.name in own), notes


def _spare(nics: list[Spot], used: frozenset[str]) -> list[str]:
    """What of the NICs that GPUs could use is not modelled: a GPU has one, and a NIC one port."""
    spare = [spot.name for spot in nics if spot.name not in used]
    some = sum(max(spot.speeds, default=0) for spot in nics if spot.name in used)
    every = sum(sum(spot.speeds) for spot in nics)
    if not spare and some == every:
        return []
    names = f"; {len(spare)} at equal distance are not used ({', '.join(spare[:40])})" if spare else ""
    said = all(spot.speeds for spot in nics)
    rates = f": the node has {float(some) / 1000:.6g} of {float(every) / 1000:.6g} Gbit/s" if said else ""
    return [f"one port of one NIC per GPU is modelled{names}{rates}"]


def _levels(start: str, spots: Iterable[Spot], wires: Iterable[Wire]) -> dict[str, tuple[int, int]]:
    """Root complexes and PCIe switches (one, or more) between a GPU and all that it reaches: PIX, PXB, NODE, SYS.

    A root complex of another socket counts twice.
    """
    kind = {spot.name: spot.kind for spot in spots}
    near: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for wire in wires:
        near[wire.a].append((wire.b, wire.cable == SOCKET))
        near[wire.b].append((wire.a, wire.cable == SOCKET))
    away, queue = {start: (0, 0)}, [start]
    for name in queue:
        if name != start and kind[name] not in ("switch", "root"):
            continue
        roots, switches = away[name]
        roots, switches = roots + (kind[name] == "root"), min(2, switches + (kind[name] == "switch"))
        for other, beyond in near[name]:
            if other not in away:
                away[other] = (roots + beyond, switches)
                queue.append(other)
    # beyond a root complex the switches on the way decide nothing
    return {name: (roots, 0 if roots else switches) for name, (roots, switches) in away.items()}


def numbers(texts: Iterable[str]) -> Iterator[int]:
    """Words that are whole numbers below 2**63. Raises ValueError."""
    for text in texts:
        if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:
            raise ValueError(f"{shown(text)} is no whole number below 2**63")
        yield int(text)

"""NCCL's topology dump (`NCCL_TOPO_DUMP_FILE`), and RCCL's: XML as NVIDIA/nccl src/graph/xml.cc writes and topo.cc reads it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePath

from ..units import shown
from .safe_xml import Element
from .wires import MOST_GPUS, Cable, Sketch, Spot, broadcom, merged, named, pcie, plain, quantity

WHAT = "NCCL topology dump"
VERSIONS = ("1", "2")
SWITCH_CLASS, CPU_CLASS = "0x068000", "0x068001"
MOST_LANES, MOST_CABLES, MOST_MBIT, MOST_MBYTE, MOST_PORTS = 64, 1024, 10**8, 10**8, 64
FEW, DEEP = 4, 3
# what a line carries of what it signals: 8b/10b, 128b/130b, and from 64 GT/s on FLIT mode's 242 of 256 bytes
_CODES = ((Fraction(5), "8b/10b", Fraction(8, 10)), (Fraction(32), "128b/130b", Fraction(128, 130)))
_FLIT = ("FLIT, 242 of 256 bytes", Fraction(242, 256))
_SPEED = re.compile(r"([0-9]{1,4}(?:\.[0-9]{1,4})?) GT/s(?: PCIe)?")
_MOST = "the link's maximum (of NVIDIA's GPUs, in newer NCCL, its rate then)"
_IDENTITY = ("vendor", "device", "subsystem_vendor", "subsystem_device")
_BUS = re.compile(r"[0-9a-f]{1,8}:[0-9a-f]{2,4}:[0-9a-f]{2}(?:\.[0-9a-f])?")


def rate(element: Element, file: str) -> tuple[Fraction | None, str]:
    """GB/s of a PCIe link by its signalling rate and lanes, and the source; None where the dump has none (0 lanes, no speed).

    NCCL has the smaller `max_link_speed` and `max_link_width` of the link's ends; newer NCCL of NVIDIA's GPUs what NVML says.
    """
    speed, lanes = element.attributes.get("link_speed", ""), element.attributes.get("link_width", "")
    if speed in ("", "Unknown", "Unknown speed") or lanes in ("", "0"):
        return None, ""
    match = _SPEED.fullmatch(speed)
    if match is None or not Fraction(match[1]):
        raise element.fail(f"link_speed={shown(speed)} is no PCIe speed such as '16.0 GT/s PCIe'")
    width, signalled = element.whole("link_width", 1, MOST_LANES), Fraction(match[1])
    code, share = next(((name, part) for most, name, part in _CODES if signalled <= most), _FLIT)
    return signalled * width * share / 8, f"vendor: {WHAT} {file}, {_MOST}, {match[1]} GT/s x {width} lanes, {code}"


def _identity(element: Element) -> tuple[str, ...]:
    return tuple(element.attributes.get(key, "").lower().removeprefix("0x") for key in _IDENTITY)


@dataclass(slots=True)
class _Reading:
    """One dump while it is walked."""

    file: str
    sketch: Sketch
    buses: dict[str, Element] = field(default_factory=dict)
    cards: dict[tuple[str, str], str] = field(default_factory=dict)
    gpus: dict[str, tuple[str, Element | None]] = field(default_factory=dict)
    """By bus id: root complex, element."""
    links: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    """By bus id and kind: how many lead to which bus id."""
    absent: list[tuple[str, str]] = field(default_factory=list)
    itself: list[str] = field(default_factory=list)
    merged: int = 0
    deepest: int = 0

    def pci(self, element: Element, above: str, root: str, depth: int = 0, merging: int = 0) -> None:
        """A PCI device or switch and what lies in it. merging: the generation of the switch above that takes sub-switches in."""
        bus = element.get("busid").lower()
        if not _BUS.fullmatch(bus):
            raise element.fail(f"busid={shown(bus)} is no PCI address such as 0000:07:00.0")
        if bus in self.buses:
            raise element.fail(f"busid {bus} is there twice; first on line {self.buses[bus].line}")
        self.buses[bus] = element
        gpus, nics, kind = element.all("gpu"), element.all("nic"), element.attributes.get("class", "").lower()
        speed, source = rate(element, self.file)
        if gpus or (kind.startswith(("0x03", "0x12")) and not element.all("pci")):
            self.gpu(element, bus, above, root)
        elif nics or (kind.startswith("0x02") and not element.all("pci")):
            card = (above, bus.rpartition(".")[0] or bus)
            self.nic(element, nics, above, pcie(speed, source, "nic"), card)
        elif merging and broadcom(_identity(element), 1) == merging:
            self.merged += 1
            for child in element.all("pci"):
                self.pci(child, above, root, depth)
        elif element.all("pci"):
            switch = self.sketch.add(Spot(name=f"switch-{self.sketch.count('switch')}", kind="switch", remark=bus))
            self.sketch.wire(switch, above, pcie(speed, source, "uplink"))
            self.deepest = max(self.deepest, depth + 1)
            for child in element.all("pci"):
                self.pci(child, switch, root, depth + 1, broadcom(_identity(element), 0))

    def gpu(self, element: Element, bus: str, above: str, root: str) -> None:
        """A GPU; its fabric comes when all GPUs are known."""
        inside = element.all("gpu")
        if len(inside) > 1 or len(self.gpus) >= MOST_GPUS:
            many = f"more than {MOST_GPUS} GPUs" if len(inside) < 2 else "several GPUs in one PCI device (partitions, MLOPart)"
            raise element.fail(f"{many}: not supported")
        found = inside[0] if inside else None
        order = next(((found.whole(key, 0, 2**20),) for key in ("rank", "dev") if key in found.attributes), ()) if found else ()
        model = ":".join(element.attributes[key] for key in ("vendor", "device") if key in element.attributes)
        if found is not None and "sm" in found.attributes:
            model += f", sm {found.whole('sm', 0, 10**6)}"
        speed, source = rate(element, self.file)
        self.gpus[bus] = (root, found)
        for link in found.children if found else []:
            if link.name in ("nvlink", "xgmi"):
                counts = self.links.setdefault((bus, link.name), Counter())
                counts[link.get("target").lower()] += link.whole("count", 1, MOST_CABLES)
        name = self.sketch.add(Spot(name=f"bus {bus}", kind="gpu", order=order, remark=bus, model=plain(model)))
        self.sketch.wire(name, above, pcie(speed, source, ""))

    def nic(self, element: Element, nics: list[Element], above: str, cable: Cable, card: tuple[str, str] | None) -> None:
        """The ports of one card are one NIC."""
        # as NCCL: without `dev` a net is not in use, and net="0" is no network
        ports = [net for nic in nics for net in nic.all("net") if "dev" in net.attributes and net.attributes.get("net") != "0"]
        if nics and not ports:
            return
        said = [net.attributes.get("name", "") or f"net-{net.whole('dev', 0, 2**20)}" for net in ports] or [
            f"nic-{card and card[1]}"
        ]
        speeds = tuple(speed for net in ports if (speed := self._speed(net)) is not None)
        if card is not None and card in self.cards:
            old = self.sketch.spots[self.cards[card]]
            if len(old.speeds) + len(ports) > MOST_PORTS:
                raise element.fail(f"a card of more than {MOST_PORTS} ports")
            remark = plain(f"{old.remark}, {', '.join(said)}")
            self.sketch.spots[old.name] = Spot(name=old.name, kind="nic", remark=remark, speeds=old.speeds + speeds)
            return
        name = named(said[0])
        if card is None and name in self.sketch.spots and self.sketch.origin[name] == said[0]:
            self.sketch.wire(name, above, cable)  # a socket of no known PCI device stands under every CPU
            return
        remark = ", ".join(dict.fromkeys([*said, *([card[1]] if card else [])]))
        self.sketch.add(Spot(name=name, kind="nic", remark=plain(remark), speeds=speeds), said[0])
        self.sketch.wire(name, above, cable)
        if card is not None:
            self.cards[card] = name

    @staticmethod
    def _speed(net: Element) -> int | None:
        """Mbit/s; None where the driver says none (0, -1)."""
        text = net.attributes.get("speed", "0")
        return None if text in ("", "0", "-1") else net.whole("speed", 1, MOST_MBIT)

    def fabric(self, bus: str) -> None:
        """NVLink, XGMI and C2C of a GPU: to GPUs, to the NVSwitches taken as one, to its CPU."""
        root, element = self.gpus[bus]
        if element is None:
            return
        switched: dict[str, dict[str, int]] = {}
        for link in (child for child in element.children if child.name in ("nvlink", "xgmi")):
            count, target = link.whole("count", 1, MOST_CABLES), link.get("target").lower()
            kind = link.get("tclass").lower()
            if kind.startswith("0x03") or target in self.gpus:
                self.direct(link, bus, target, count)
            elif kind == CPU_CLASS:
                self.sketch.wire(f"bus {bus}", root, _lanes(link.name, count))
            else:
                targets = switched.setdefault(link.name, {})
                if target in targets:
                    raise link.fail(f"target {shown(target)} is there twice")
                targets[target] = count
        for name, targets in switched.items():
            self.sketch.switched(f"bus {bus}", f"{name}-switch", frozenset(targets), _lanes(name, sum(targets.values())))
        for link in element.all("c2c"):
            total = Fraction(link.whole("bw", 1, MOST_MBYTE) * link.whole("count", 1, MOST_CABLES), 1000)
            text, source = quantity(total, "GB/s"), f"measured: {WHAT} {self.file}, {link.get('count')} x {link.get('bw')} MB/s"
            label = f"{float(total):.4g}".replace(".", "_")
            self.sketch.wire(f"bus {bus}", root, Cable(kind="c2c", label=label, bandwidth=text, source=source))

    def direct(self, link: Element, bus: str, target: str, count: int) -> None:
        """Links to another GPU, which has as many back."""
        if target == bus:
            self.itself.append(bus)
            return
        if target not in self.gpus:
            self.absent.append((bus, target))
            return
        back = self.links.get((target, link.name), Counter())[bus]
        if back != count:
            raise link.fail(f"{bus} has {count} links to {target}, which has {back} back")
        if bus < target:
            self.sketch.wire(f"bus {bus}", f"bus {target}", _lanes(link.name, count))


def _lanes(kind: str, count: int) -> Cable:
    word = {"nvlink": "NVLink", "xgmi": "XGMI link"}[kind]
    many = (
        f"{count} {word}s together, per direction: {count} x the bandwidth of one" if count > 1 else f"one {word}, per direction"
    )
    return Cable(kind=kind, label=f"{count}", remark=many)


def read(system: Element, file: str) -> Sketch:
    """The node that a dump describes. Raises TopologyError with file and line."""
    if system.get("version") not in VERSIONS:
        raise system.fail(f"version {shown(system.get('version'))} of NCCL's format is not known: {' and '.join(VERSIONS)} are")
    cpus = system.all("cpu")
    hosts = {cpu.attributes.get("host_hash", "") for cpu in cpus}
    if len(hosts) > 1:
        raise system.fail(f"{len(hosts)} hosts (host_hash): import the dump of one, and join nodes in YAML")
    reading = _Reading(file=PurePath(file).name, sketch=Sketch(title=PurePath(file).stem, what=WHAT))
    seen: dict[str, Element] = {}
    for cpu in cpus:
        numa = cpu.get("numaid")
        if numa in seen:
            raise cpu.fail(f"numaid {shown(numa)} is there twice; first on line {seen[numa].line}")
        seen[numa] = cpu
        root = reading.sketch.add(Spot(name=f"root-{len(seen) - 1}", kind="root", remark=f"NUMA node {plain(numa)}"))
        for child in cpu.all("pci"):
            reading.pci(child, root, root)
        loose = Cable(kind="host-nic", remark="between a CPU and a NIC of which NCCL found no PCI device")
        for child in cpu.all("nic"):
            reading.nic(child, [child], root, loose, None)
    for bus in reading.gpus:
        reading.fabric(bus)
    _remarks(reading)
    return reading.sketch


def _remarks(reading: _Reading) -> None:
    """What a reader has to know of this dump."""
    found = [element for _, element in reading.gpus.values() if element is not None]
    notes = reading.sketch.notes
    if not any(element.all("nvlink") or element.all("xgmi") for element in found):
        notes.append("the file has no NVLink or XGMI: the GPUs have none, or NCCL was to find them by itself")
    if reading.absent:
        notes.append(
            f"left out: links to GPUs that are not in the file: {_few([f'{a} to {plain(b)}' for a, b in reading.absent])}"
        )
    if reading.itself:
        notes.append(f"left out: links of a GPU to itself: {_few(reading.itself)}")
    if reading.merged:
        notes.append(merged(reading.merged))
    if reading.deepest >= DEEP:
        note = (
            f"up to {reading.deepest} PCIe switches in a row: where some are one device, it may carry more than the wires between"
        )
        notes.append(note)
    linked = [bus for bus, element in reading.buses.items() if element.all("pcilink")]
    if linked:
        notes.append(f"left out: PCIe links between switches (pcilink), for which the file has no figure: {_few(linked)}")
    _slow(reading)


def _slow(reading: _Reading) -> None:
    """PCIe figures that say little."""
    speeds = {bus: element.attributes.get("link_speed", "") for bus, element in reading.buses.items()}
    for text, gpus, what in (
        ("2.5 GT/s", True, "2.5 GT/s, as NVML, which newer NCCL asks, has it of an idle GPU"),
        ("2.5 GT/s", False, "2.5 GT/s, as a virtual machine's bridges and devices have"),
        ("16.0 GT/s", True, "16.0 GT/s, as NCCL writes where NVML fails (the kernel's own is '16.0 GT/s PCIe')"),
    ):
        exact = {text, f"{text} PCIe"} if text == "2.5 GT/s" else {text}
        slow = [bus for bus, speed in speeds.items() if speed in exact and (bus in reading.gpus) == gpus]
        if slow:
            reading.sketch.notes.append(f"{what}: {_few(slow)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")

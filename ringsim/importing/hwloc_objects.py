"""The objects of hwloc's XML: root complexes, PCIe switches, GPUs and NICs, and matrices between them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from fractions import Fraction

from ..units import shown
from .safe_xml import Element
from .wires import MOST_GPUS, Cable, Sketch, Spot, broadcom, merged, named, numbers, pcie, plain

WHAT = "hwloc topology"
BACKENDS = {"nvml": "NVML", "cuda": "CUDA", "rsmi": "RSMI", "ze": "LevelZero"}
MEMORY = ("CUDAGlobalMemorySize", "RSMIVRAMSize")
MOST_OBJECTS, MOST_SHOWN = 1024, 32
NVSWITCH = "nvlink-switch"
# bits of osdev_type in version 3, numbers in version 2: OpenFabrics, network
_NICS = {"2": {"3": "OpenFabrics", "2": "network"}}
_OPENFABRICS, _NETWORK = 32, 16
_SPEED = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,9})?")
_BUS = re.compile(r"([0-9a-f]{1,8}):([0-9a-f]{2}):([0-9a-f]{2})\.([0-9a-f])")
# what lspci calls a 3D controller and a processing accelerator: GPUs whatever lstopo knows of them; 03 is any display
_GPUS, _DISPLAY = ("0302", "1200"), "03"


@dataclass(frozen=True, slots=True, kw_only=True)
class Above:
    """Where a PCI object hangs: a spot, through how fast a port (GB/s), and whether a bridge here is a switch's way up.

    merges: the generation of a switch that takes its sub-switches in.
    """

    spot: str
    port: Fraction | None = None
    up: bool = False
    merges: int = 0


@dataclass(slots=True)
class Objects:
    """One file while it is walked."""

    file: str
    version: str
    sketch: Sketch
    openfabrics: bool
    roots: dict[int, str] = field(default_factory=dict)
    """By id(): the root complex of an object that has PCI objects."""
    numbered: dict[str, str] = field(default_factory=dict)
    """By gp_index: the spot of an object."""
    buses: dict[str, Element] = field(default_factory=dict)
    cards: dict[tuple[str, str], str] = field(default_factory=dict)
    indices: dict[str, dict[str, int]] = field(default_factory=dict)
    """By GPU and by library: its number there."""
    left: list[str] = field(default_factory=list)
    """Displays that are taken for no GPU."""
    bridges: int = 0
    merged: int = 0

    def walk(self, element: Element, path: str) -> None:
        """An object that is no I/O, and all in it."""
        kind = element.get("type")
        here = f"{path}{' ' if path else ''}{kind} {element.attributes.get('os_index', '')}".strip()
        for child in element.all("object"):
            if child.get("type") in ("Bridge", "PCIDev"):
                if id(element) not in self.roots:
                    name = f"root-{len(self.roots)}"
                    package = re.search(r"Package [0-9]+", here)
                    spot = Spot(name=name, kind="root", remark=plain(here), model=package[0] if package else "")
                    self.roots[id(element)] = self.sketch.add(spot)
                    self._number(element, name)
                self.pci(child, Above(spot=self.roots[id(element)], up=False))
            elif child.get("type") not in ("OSDev", "Misc"):
                self.walk(child, here if kind != "Machine" else "")

    def pci(self, element: Element, above: Above) -> None:
        """A bridge or device. Below a root complex come root ports, below a port switches, below a switch its ports."""
        kind = element.get("type")
        self.bridges += kind == "Bridge"
        if kind == "Bridge" and element.get("bridge_type").startswith("0-"):
            for child in self._inside(element):
                self.pci(child, above)
            return
        bus = element.get("pci_busid").lower()
        if not _BUS.fullmatch(bus):
            raise element.fail(f"pci_busid={shown(bus)} is no PCI address such as 0000:07:00.0")
        if bus in self.buses:
            raise element.fail(f"pci_busid {shown(bus)} is there twice; first on line {self.buses[bus].line}")
        self.buses[bus] = element
        speed = self._slower(_speed(element), above.port)
        if kind != "Bridge":
            self.device(element, bus, above.spot, speed)
            return
        below = Above(spot=above.spot, port=_speed(element), up=True, merges=above.merges)
        identity = tuple(re.findall(r"(?<=[\[:])[0-9a-f]{4}", element.attributes.get("pci_type", "")))
        if above.up and above.merges and broadcom(identity, 1) == above.merges:
            self.merged += 1
            below = Above(spot=above.spot)
        elif above.up:
            switch = self.sketch.add(Spot(name=f"switch-{self.sketch.count('switch')}", kind="switch", remark=plain(bus)))
            self.sketch.wire(switch, above.spot, pcie(speed, self.said, "uplink"))
            below = Above(spot=switch, merges=broadcom(identity, 0))
        for child in self._inside(element):
            self.pci(child, below)

    @staticmethod
    def _inside(element: Element) -> list[Element]:
        return [child for child in element.all("object") if child.get("type") in ("Bridge", "PCIDev")]

    @staticmethod
    def _slower(one: Fraction | None, other: Fraction | None) -> Fraction | None:
        return min((speed for speed in (one, other) if speed is not None), default=None)

    @property
    def said(self) -> str:
        """The source of a PCIe link's figure."""
        return f"measured: {WHAT} {self.file}, pci_link_speed, of a link's two ends the slower"

    def _number(self, element: Element, spot: str) -> None:
        if "gp_index" in element.attributes:
            self.numbered[element.attributes["gp_index"]] = spot

    def device(self, element: Element, bus: str, above: str, speed: Fraction | None) -> None:
        """A GPU, a NIC, an NVSwitch, or something that does not matter here."""
        inside = [child for child in element.all("object") if child.get("type") == "OSDev"]
        code = element.attributes.get("pci_type", "")
        if code.startswith(_GPUS) or any(_backend(child) or _opencl(child) for child in inside):
            self.gpu(element, inside, bus, above, speed)
        elif code.startswith(_DISPLAY):
            self.left.append(plain(f"{bus} {code}")[:MOST_SHOWN])
        elif element.attributes.get("subtype") == "NVSwitch" or code.startswith("0680 [10de"):
            self._number(element, f"{NVSWITCH} {bus}")
        else:
            self.nic(inside, bus, above, pcie(speed, self.said, "nic"))

    def gpu(self, element: Element, inside: list[Element], bus: str, above: str, speed: Fraction | None) -> None:
        """A GPU; its number comes when all are known."""
        found: dict[str, list[Element]] = {}
        for child in inside:
            found.setdefault(_backend(child) or "", []).append(child)
        many = next((children for backend, children in found.items() if backend and len(children) > 1), None)
        if many or self.sketch.count("gpu") >= MOST_GPUS:
            what = "several GPUs in one PCI device (partitions)" if many else f"more than {MOST_GPUS} GPUs"
            raise element.fail(f"{what}: not supported")
        infos = {info.get("name"): info.get("value") for child in inside for info in child.all("info")}
        memory = next((_memory(element, infos[key], key, self.file) for key in MEMORY if key in infos), None)
        spot = Spot(
            name=f"bus {bus}",
            kind="gpu",
            remark=plain(bus),
            model=plain(infos.get("GPUModel", element.attributes.get("pci_type", ""))),
            memory=memory,
        )
        self.sketch.add(spot)
        self.indices[spot.name] = {key: _index(children[0]) for key, children in found.items() if key}
        self.sketch.wire(spot.name, above, pcie(speed, self.said, ""))
        for child in (element, *inside):
            self._number(child, spot.name)

    def number(self) -> None:
        """Number the GPUs as NVML does, else CUDA, RSMI, Level Zero; where none has all of them, by PCI address."""
        every = None
        for key in reversed(BACKENDS.values()):
            known = {found.get(key, -1) for found in self.indices.values()}
            every = key if len(known) == len(self.indices) and -1 not in known else every
        for name, found in self.indices.items():
            address = tuple(int(part, 16) for part in re.split("[:.]", name.removeprefix("bus ")))
            self.sketch.spots[name] = replace(self.sketch.spots[name], order=(found[every],) if every else address)
        if every is None and len(self.indices) > 1:
            self.sketch.notes.append("GPUs are in the order of their PCI addresses: no library has a number for all of them")

    def remark(self) -> None:
        """What a reader has to know of this file's objects."""
        if self.left:
            more = f" and {len(self.left) - 4} more" if len(self.left) > 4 else ""
            note = f"displays without NVML, CUDA, RSMI, Level Zero or OpenCL are no GPUs here: {', '.join(self.left[:4])}{more}"
            self.sketch.notes.append(note)
            self.sketch.without = f"{note}; lstopo had no NVML"
        if self.merged:
            self.sketch.notes.append(merged(self.merged))
        if not self.bridges and self.buses:
            self.sketch.notes.append("the file has no bridges (lstopo --no-bridges?): PCIe switches are not known")

    def nic(self, inside: list[Element], bus: str, above: str, cable: Cable) -> None:
        """The OpenFabrics devices; network interfaces only where the file has none of those."""
        wanted = "OpenFabrics" if self.openfabrics else "network"
        said = [child.get("name") for child in inside if wanted in network(child, self.version)]
        if not said:
            return
        card = (above, bus.rpartition(".")[0] or bus)
        if card in self.cards:
            old = self.sketch.spots[self.cards[card]]
            self.sketch.spots[old.name] = Spot(name=old.name, kind="nic", remark=plain(f"{old.remark}, {', '.join(said)}"))
            return
        name = self.sketch.add(Spot(name=named(said[0]), kind="nic", remark=plain(", ".join([*said, card[1]]))), said[0])
        self.sketch.wire(name, above, cable)
        self.cards[card] = name

    def matrix(self, element: Element) -> dict[tuple[str, str], int]:
        """Pairs of spots and their value, MB/s or hops; what is in no spot is left out."""
        size = element.whole("nbobjs", 1, MOST_OBJECTS)
        words = [word for child in element.all("indexes") for word in "".join(child.text).split()]
        try:
            values = list(numbers(word for child in element.all("u64values") for word in "".join(child.text).split()))
        except ValueError as problem:
            raise element.fail(str(problem)) from None
        if len(words) != size or len(values) != size * size:
            found_ = f"found {len(words)} and {len(values)}"
            raise element.fail(f"{size} objects need {size} indexes and {size * size} values, {found_}")
        if element.attributes.get("indexing", "gp") != "gp" and element.name == "distances2":
            raise element.fail(f"indexing={shown(element.attributes['indexing'])}: GPUs are numbered by gp_index")
        spots = [self.numbered.get(word.rpartition(":")[2], "") for word in words]
        found: dict[tuple[str, str], int] = {}
        for number, value in enumerate(values):
            a, b = spots[number // size], spots[number % size]
            if a != b and a and b:
                found[a, b] = found.get((a, b), 0) + value
        return found


def _speed(element: Element) -> Fraction | None:
    """GB/s of a PCI link; None for 0, which says nothing."""
    text = element.attributes.get("pci_link_speed", "0")
    if not _SPEED.fullmatch(text):
        raise element.fail(f"pci_link_speed={shown(text)} is no number of GB/s")
    return Fraction(text) or None


def _backend(device: Element) -> str | None:
    """The GPU library that a device comes from."""
    name = re.fullmatch(r"(nvml|cuda|rsmi|ze)[0-9]{1,6}", device.attributes.get("name", ""))
    return BACKENDS[name[1]] if name else None


def _index(device: Element) -> int:
    """The number at the end of a GPU library's name."""
    return int(device.get("name").lstrip("abcdefghijklmnopqrstuvwxyz"))


def _opencl(device: Element) -> bool:
    """Whether OpenCL says that a device is a GPU."""
    if not device.attributes.get("name", "").startswith("opencl"):
        return False
    return any((info.get("name"), info.get("value")) == ("OpenCLDeviceType", "GPU") for info in device.all("info"))


def network(device: Element, version: str) -> tuple[str, ...]:
    """Whether a device is of OpenFabrics, of the network, or both."""
    number = device.whole("osdev_type", 0, 2**32)
    if version == "2":
        return (_NICS["2"].get(f"{number}", ""),)
    return tuple(word for bit, word in ((_OPENFABRICS, "OpenFabrics"), (_NETWORK, "network")) if number & bit)


def _memory(element: Element, text: str, key: str, file: str) -> str:
    """KiB, with or without saying so."""
    match = re.fullmatch(r"([1-9][0-9]{0,14})(?: ?KiB)?", text)
    if match is None:
        raise element.fail(f"{key}={shown(text)} is no number of KiB")
    source = json.dumps(plain(f"measured: {WHAT} {file}, {key}"), ensure_ascii=False)
    return f"{{value: {match[1]} KiB, source: {source}}}"

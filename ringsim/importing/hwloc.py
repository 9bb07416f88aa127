"""hwloc's XML (`lstopo FILE.xml`), versions 2 and 3: PCIe from its objects, NVLink and XGMI from its bandwidth matrices."""

from __future__ import annotations

from fractions import Fraction
from pathlib import PurePath

from ..units import shown
from .hwloc_objects import NVSWITCH, WHAT, Objects, network
from .safe_xml import Element
from .wires import Cable, Sketch, plain, quantity

BANDWIDTHS = {"NVLinkBandwidth": "nvlink", "XGMIBandwidth": "xgmi"}
HOPS = "XGMIHops"
MOST_MBYTE = 10**8
RSMI_MBYTE = 100_000
"""What hwloc's RSMI backend has for an XGMI link of whatever generation (topology-rsmi.c): no figure of the machine."""


def read(topology: Element, file: str) -> Sketch:
    """The node that a file describes. Raises TopologyError with file and line."""
    version = topology.attributes.get("version", "1").partition(".")[0]
    if version not in ("2", "3"):
        found = shown(topology.attributes["version"]) if "version" in topology.attributes else "1"
        raise topology.fail(f"hwloc's format of version {found} is not read: write the file with lstopo of hwloc 2 or 3")
    machines = topology.all("object")
    if len(machines) != 1 or machines[0].get("type") != "Machine":
        raise topology.fail("a topology has one object of type Machine")
    name = PurePath(file).name
    infos = {info.get("name"): info.get("value") for element in (machines[0], topology) for info in element.all("info")}
    title = infos.get("HostName") or infos.get("DMIProductName") or PurePath(file).stem
    openfabrics = any("OpenFabrics" in network(device, version) for device in _devices(machines[0]))
    objects = Objects(file=name, version=version, sketch=Sketch(title=title, what=WHAT), openfabrics=openfabrics)
    objects.walk(machines[0], "")
    objects.number()
    objects.remark()
    matrices: dict[str, Element] = {}
    for element in (*topology.all("distances2"), *topology.all("distances2hetero")):
        label = element.attributes.get("name", "")
        if label in matrices and label in (*BANDWIDTHS, HOPS):
            raise element.fail(f"{label} is there twice; first on line {matrices[label].line}")
        matrices[label] = element
    for label, kind in BANDWIDTHS.items():
        if label in matrices:
            hops = objects.matrix(matrices[HOPS]) if kind == "xgmi" and HOPS in matrices else {}
            _fabric(objects, matrices[label], kind, hops)
    if not matrices.keys() & BANDWIDTHS.keys():
        note = "the file has no NVLinkBandwidth or XGMIBandwidth matrix: no such links, or lstopo had no NVML or RSMI"
        objects.sketch.notes.append(note)
    return objects.sketch


def _devices(machine: Element) -> list[Element]:
    """All OS devices, without recursion."""
    found, queue = [], [machine]
    for element in queue:
        queue += element.all("object")
        found += [child for child in element.all("object") if child.get("type") == "OSDev"]
    return found


def _fabric(objects: Objects, element: Element, kind: str, hops: dict[tuple[str, str], int]) -> None:
    """A cable for each pair that has one; NVSwitches are one, as NCCL takes them."""
    pairs, sketch = objects.matrix(element), objects.sketch
    far, switched = 0, dict[str, dict[str, int]]()
    for (a, b), value in pairs.items():
        back = pairs.get((b, a), 0)
        if value > MOST_MBYTE or value != back:
            ends = f"{a} to {b} is {value} MB/s, and back {back}"
            raise element.fail(f"{ends}: a link is at most {MOST_MBYTE}, and the same both ways")
        kinds = [sketch.spots[end].kind if end in sketch.spots else "fabric" for end in (a, b)]
        if not value or kinds[0] != "gpu" or (kinds[1] == "gpu" and a > b):
            continue
        if kinds[1] == "fabric":
            switched.setdefault(a, {})[b] = value
        elif hops.get((a, b), 1) > 1:
            far += 1
        else:
            sketch.wire(a, b, _cable(kind, value, objects.file))
    for gpu, values in switched.items():
        sketch.switched(gpu, NVSWITCH, frozenset(values), _cable(kind, sum(values.values()), objects.file))
    if far:
        note = f"{far} pairs of GPUs are more than one XGMI hop apart: no wire; GPUs here pass nothing on, so PCIe joins them"
        sketch.notes.append(note)


def _cable(kind: str, value: int, file: str) -> Cable:
    label = quantity(Fraction(value, 1000), "").strip().replace(".", "_").replace("+", "")
    if kind == "xgmi" and value == RSMI_MBYTE:
        remark = f"{file} has 100000 MB/s, which hwloc's RSMI backend has for any XGMI link: no figure of this machine"
        return Cable(kind=kind, label=label, remark=plain(remark))
    if kind == "xgmi":
        source = f"measured: {WHAT} {file}, XGMIBandwidth"
    else:
        source = f"vendor: {WHAT} {file}, NVLinkBandwidth: hwloc's nominal rate of the NVLinks' version, summed over a pair's"
    return Cable(kind=kind, label=label, bandwidth=quantity(Fraction(value, 1000), "GB/s"), source=plain(source))

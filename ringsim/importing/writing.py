"""A node as topology YAML: what the file says with its source, `unknown` for what it does not, comments for the reader."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ..units import format_rate
from .wires import Cable, Node, Spot, named, plain, quantity

FEW = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What a node's cables and GPUs are called in YAML."""

    links: Mapping[Cable, str]
    devices: Mapping[str, str]
    """By GPU."""


def words(node: Node) -> Words:
    """A name for each kind of cable (its kind's, with a label where a kind has several) and for each kind of GPU."""
    kinds: dict[str, list[Cable]] = defaultdict(list)
    for cable in node.cables:
        kinds[cable.kind].append(cable)
    links: dict[Cable, str] = {}
    for kind, cables in kinds.items():
        for cable in cables:
            name = kind if len(cables) == 1 else named(f"{kind}-{cable.label}")
            same = sum(found == name or found.startswith(f"{name}-is-") for found in links.values())
            links[cable] = name if not same else f"{name}-is-{same + 1}"
    models = list(dict.fromkeys((spot.model, spot.memory) for spot in node.of("gpu")))
    device = {model: "gpu" if len(models) == 1 else f"gpu_{index}" for index, model in enumerate(models)}
    return Words(links=links, devices={spot.name: device[spot.model, spot.memory] for spot in node.of("gpu")})


def text(node: Node, group: Iterable[str], name: str, file: str) -> str:
    """The whole file, with the lines of its group."""
    used = words(node)
    lines = [
        f"# {plain(file)} ({node.what}), by `ringsim topologies import`. Wires are as it has them; what it does not say is",
        "# `unknown`: write it here, with its source, or in a file that `extends` this one, or --set KEY=VALUE.",
        *(f"# {plain(note)}" for note in node.notes),
        "ringsim: 2",
        f"name: {_quoted(name)}",
        f"source: {_quoted(f'guessed: filled in by hand after the import of {plain(file)}')}",
        "devices:",
        *_devices(node, used),
        *_links(node, used, plain(file)),
        "groups:",
        "  node:",
        *(f"    {line}" for line in group),
        "machine: node",
        "transports:",
        "  mpi: {progress: unknown}   # the MPI or NCCL stack: offload, handshake, thread or polling",
        *_notes(node),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text_: str) -> str:
    """A YAML text on one line."""
    return json.dumps(plain(text_), ensure_ascii=False)


def _comment(text_: str) -> str:
    return f"   # {plain(text_)}" if text_ else ""


def _devices(node: Node, used: Words) -> list[str]:
    lines = []
    for kind in dict.fromkeys(used.devices.values()):
        spots = [spot for spot in node.of("gpu") if used.devices[spot.name] == kind]
        lines += [f"  {kind}:{_comment(spots[0].model)}", "    kind: gpu"]
        lines += [f"    memory: {spots[0].memory}"] if spots[0].memory else []
        lines += ["    memory_bandwidth: unknown"]
    return [*lines, "    # to simulate attention: launch, peak, attention (docs/topology.md)"]


def _links(node: Node, used: Words, file: str) -> list[str]:
    lines = ["links:"] if used.links or _speeds(node) else []
    for cable, name in used.links.items():
        lines += _link(name, cable.bandwidth, cable.source, cable.remark)
    for speed in (speeds := _speeds(node)):
        rate = quantity(Fraction(speed, 1000), "Gbit/s")
        name = "network" if len(speeds) == 1 else named(f"network-{rate.partition(' ')[0]}g")
        more = f" and {len(speeds[speed]) - FEW} more" if len(speeds[speed]) > FEW else ""
        source = f"measured: {node.what} {file}, speed of {', '.join(speeds[speed][:FEW])}{more}"
        lines += _link(name, rate, source, "of one port; for groups of nodes (join: rails, fat-tree)")
    return lines


def _speeds(node: Node) -> dict[int, list[str]]:
    """The NICs of each speed, Mbit/s."""
    found: dict[int, list[str]] = defaultdict(list)
    for spot in node.of("nic"):
        for speed in dict.fromkeys(spot.speeds):
            found[speed].append(spot.name)
    return dict(found)


def _link(name: str, bandwidth: str | None, source: str, remark: str) -> list[str]:
    value = "unknown" if bandwidth is None else f"{{value: {bandwidth}, source: {_quoted(source)}}}"
    return [f"  {name}:{_comment(remark)}", f"    bandwidth: {value}", "    latency: unknown"]


def _notes(node: Node) -> list[str]:
    """What each GPU and NIC is, for people."""
    parts = [spot for spot in node.of("gpu", "nic") if spot.remark or spot.speeds]
    return ["notes:", *(f"  {spot.name}: {_quoted(_described(spot))}" for spot in parts)] if parts else []


def _described(spot: Spot) -> str:
    speeds = [format_rate(speed * 1e6, "bit/s") for speed in spot.speeds]
    return ", ".join(filter(None, (spot.remark, " and ".join(speeds))))


def explicit(node: Node) -> list[str]:
    """The group as it is: every part and every wire."""
    used, remarks = words(node), {"root": "a root complex", "fabric": "", "switch": "a PCIe switch"}
    lines = ["join: explicit", "members:"]
    for spot in node.spots:
        kind = used.devices.get(spot.name, "nic" if spot.kind == "nic" else "switch")
        lines.append(f"  {spot.name}: {kind}{_comment(spot.remark or remarks.get(spot.kind, ''))}")
    lines += ["connect:"] if node.wires else []
    lines += [f"  - [{wire.a}, {wire.b}, {used.links[wire.cable]}]" for wire in node.wires]
    if node.own:
        lines.append("affinity: {" + ", ".join(f"{gpu}: {nic}" for gpu, nic in node.own) + "}")
        nics = [spot.name for spot in node.of("nic") if spot.name in dict(node.own).values()]
        lines.append("exits: [" + ", ".join(nics) + "]")
    return lines

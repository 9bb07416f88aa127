"""`unknown`: a figure that a file marks and does not know. Every one that is left is named at once, with where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from ..yaml_source import Document, Place
from .figures import OWN, UNKNOWN

SECTIONS: Final = ("counts", "devices", "links", "groups", "machine", "transports")
# what holds names, not figures, in a device, link, group or transport
NAMES: Final = (
    *("name", "source", "join", "kind", "like", "inside", "link", "uplink", "socket", "spine", "trunk", "of", "members"),
    *("connect", "exits", "avoid", "affinity"),
)
REMEDY: Final = """write each where it stands, in a file that `extends` this one, or with --set KEY=VALUE; what measures them:
  bandwidth between GPUs: p2pBandwidthLatencyTest, nccl-tests, rocm_bandwidth_test; latency and regimes: osu_latency, then
  `ringsim topologies fit`; memory_bandwidth, progress: docs/topology.md, `ringsim calibrate` on a machine of CPUs"""


def unknowns(value: Any) -> tuple[Place, ...]:
    """Where the figures stand that a document marks as `unknown`."""
    return tuple(place for section in SECTIONS if isinstance(value, dict) for place in _places(value.get(section), (section,)))


def _places(value: Any, place: Place) -> Iterator[Place]:
    if isinstance(value, dict) and set(value) == OWN:
        value = value["value"]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(item, (*place, key))
    elif value == UNKNOWN and not _named(place):
        yield place


def _named(place: Place) -> bool:
    """Whether a name is meant: `link: unknown`, `connect: [[a, b, unknown]]`, `members: {a: unknown}`."""
    # the second word is the name of a count, link and so on, whatever it is
    words = [part for part in place[1 if place[0] == "machine" else 2 :] if isinstance(part, str)]
    return bool(words) and (words[-1] in NAMES or words[-2:-1] in (["members"], ["affinity"], ["connect"]))


def check(document: Document) -> None:
    """Raise the document's error, which lists them all, if a figure is unknown."""
    found = unknowns(document.value)
    if not found:
        return
    lines = [f"  {'.'.join(map(str, place))}   ({document.position(place)})" for place in found]
    count = f"{len(found)} figures are" if len(found) > 1 else "1 figure is"
    first = document.position(found[0])
    raise document.error("\n".join([f"{first}: {count} unknown:", *lines, REMEDY]))

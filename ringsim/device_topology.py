"""What calibration found on GPUs, as a topology's plain values."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from math import isfinite
from statistics import median
from typing import Any, Final, NamedTuple

from .device_calibration import Figures, Findings, Seat
from .device_hops import Hops, Points, declared, fitted, mean_points
from .device_times import BLOCK_ROWS, Times
from .kernel_times import PASSES, Kernel
from .segments import Segment, to_regimes
from .topology import FORMAT
from .transport import Transport

WITHIN, BETWEEN = "within", "between"
"""Links of ranks that share a device, and of devices."""
PLATEAU_PAIRS: Final = 2**50
"""Up to here the largest tile's efficiency is taken to hold, as in the shipped topologies."""
AS_FAST: Final = 0.97
"""Of the rate of hops alone: those all at once that keep so much of it share nothing."""


def describe(
    found: Findings, transport: Transport, kernels: Sequence[Kernel], facts: dict[str, Any], said: str
) -> dict[str, Any]:
    """A topology's plain values, with what there is to know of the measurement in its notes.

    `said` is the sentence that names the transport and why it was taken. Raises CalibrationError where hops do not grow with
    their size.
    """
    host, day = transport.hosts[0], time.strftime("%Y-%m-%d")
    uuids = list(dict.fromkeys(seat.uuid for seat in found.seats))
    kinds = _kinds(found.seats)
    cards = ", ".join(dict.fromkeys(seat.device for seat in found.seats))
    source = f"measured: ringsim calibrate on {cards}, {day}, {transport.world_size} ranks on {len(uuids)} device(s) of {host}"
    shared = len(uuids) < len(found.seats)
    crossed = _crossed(found)
    links, paths, backplane = _links(crossed)
    values: dict[str, Any] = {
        "ringsim": FORMAT,
        "name": f"{host}-{transport.world_size}-ranks",
        "source": source,
        "devices": {
            name: _device(found, [uuid for uuid in uuids if kinds[uuid] == name], kernels, source)
            for name in dict.fromkeys(kinds.values())
        },
        "links": links,
        "transports": {transport.name: _transport(found, transport, source) | ({"paths": paths} if paths else {})},
        "machine": _machine([kinds[uuid] for uuid in uuids], backplane),
    }
    if shared:
        values["place"] = [uuids.index(seat.uuid) for seat in found.seats]
    return values | {"notes": _notes(found, crossed, facts | {"transport_chosen": said})}


def _notes(found: Findings, crossed: dict[str, Crossed], facts: dict[str, Any]) -> dict[str, Any]:
    """What the figures depend on, and what was measured of hops; plain values."""
    hops = {
        f"hops {link}": [
            f"{nbytes} B: {_time(alone_s)} alone, {_time(together_s)} all {one.number} at once"
            for (nbytes, alone_s), (_, together_s) in zip(one.alone, one.together, strict=True)
        ]
        for link, one in crossed.items()
    }
    taken = {} if found.overlap is None else {"taken_from_each_other": found.overlap._asdict()}
    # what an engine says may hold tuples and more
    plain: dict[str, Any] = json.loads(json.dumps(facts | hops | taken, default=str))
    return plain


def _kinds(seats: Sequence[Seat]) -> dict[str, str]:
    """A name for each device, by its uuid: that of its card; cards of one name but other sizes are told apart."""
    names: dict[tuple[str, int, int], str] = {}
    for seat in seats:
        slug = re.sub(r"[^a-z0-9]+", "-", seat.device.lower()).strip("-")
        slug = slug if slug[:1].isalpha() else f"gpu-{slug}"
        key = seat[1:]
        if key not in names:
            names[key] = slug if slug not in names.values() else f"{slug}-{len(names)}"
    return {seat.uuid: names[seat[1:]] for seat in seats}


def _device(found: Findings, uuids: Sequence[str], kernels: Sequence[Kernel], source: str) -> dict[str, Any]:
    """A device's entry, medians over those alike."""
    figures = [found.figures[uuid] for uuid in uuids]
    seat = next(seat for seat in found.seats if seat.uuid == uuids[0])
    told = "vendor: what CUDA says of the device"
    entry: dict[str, Any] = {
        "kind": "gpu",
        "units": {"value": seat.units, "source": told},
        "memory": {"value": f"{seat.memory_nbytes // 2**20} MiB", "source": told},
        "memory_bandwidth": _rate(median(one.memory_bytes_per_s for one in figures), "GB/s", 1e9),
        "launch": _time(median(one.launch_s for one in figures)),
    }
    if any(uuid in found.speeds for uuid in uuids):
        entry["inside"] = WITHIN
        entry["speed"] = float(f"{median(found.speeds.get(uuid, 1.0) for uuid in uuids):.4g}")
    known = [dtype for dtype in figures[0].matmul if all(dtype in one.matmul for one in figures)]
    if known:
        entry["matmul"] = {dtype: _rate(median(one.matmul[dtype] for one in figures), "TFLOP/s", 1e12) for dtype in known}
    said = f"{source}; the last points repeat the largest tile's"
    entry["attention"] = [_table(kernel, figures, index, said) for index, kernel in enumerate(kernels)]
    return entry


def _table(kernel: Kernel, figures: Sequence[Figures], index: int, source: str) -> dict[str, Any]:
    """The `attention` entry of a kernel, with its backward pass."""
    forward, backward = (_pass(kernel, name, [one.kernels[index][name] for one in figures]) for name in PASSES)
    return {"source": source, "dtype": kernel.dtype, "head_dim": kernel.head_dim} | forward | {"backward": backward}


def _pass(kernel: Kernel, name: str, times: Sequence[Times]) -> dict[str, Any]:
    """One of PASSES, medians over devices; the rate is that of the best tile, so that efficiencies end at 1."""
    keys = [key for key in times[0].per_pair_s if all(key in one.per_pair_s for one in times)]
    rates = {key: kernel.flops_per_pair(name) / median(one.per_pair_s[key] for one in times) for key in keys}
    best = max(rates.values())
    figures: dict[str, Any] = {
        "rate": _rate(best, "TFLOP/s", 1e12),
        "overhead": _time(median(one.overhead_s for one in times)),
        "micro_tile": {"q_rows": BLOCK_ROWS, "k_rows": BLOCK_ROWS, "edge_rows": BLOCK_ROWS, "exact": True},
    }
    passing = median(0.0 if one.pass_bytes_per_s is None else 1 / one.pass_bytes_per_s for one in times)
    if passing > 0:
        figures["pass_bandwidth"] = _rate(1 / passing, "GB/s", 1e9)
    for kind in ("full", "masked"):
        points = sorted([pairs, float(f"{rate / best:.4g}")] for (of, pairs), rate in rates.items() if of == kind)
        figures[kind] = [*points, [PLATEAU_PAIRS, points[-1][1]]]
    return figures


class Crossed(NamedTuple):
    """The hops of a ring over links of one kind: how many, and their mean seconds by size, alone and all at once."""

    number: int
    alone: Points
    together: Points


def _crossed(found: Findings) -> dict[str, Crossed]:
    """By link, those that a ring of these ranks crosses."""
    by_link: dict[str, list[Hops]] = {}
    for within, hops in found.hops:
        by_link.setdefault(WITHIN if within else BETWEEN, []).append(hops)
    return {
        link: Crossed(len(every), mean_points([one.alone for one in every]), mean_points([one.together for one in every]))
        for link, every in by_link.items()
    }


def _links(crossed: dict[str, Crossed]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """The links, what the transport does on them, and what all messages between devices share (None: nothing).

    Ranks on one device have a link per pair, of what each gets while all send. Between devices it is what one gets alone; all
    cross a switch that carries what they had together, if that is less.
    """
    links: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    backplane = None
    if WITHIN in crossed:
        segments = fitted(crossed[WITHIN].together)
        links[WITHIN] = {"bandwidth": _fastest(segments)} | _costs(segments, bandwidth=False)
    if BETWEEN in crossed:
        alone, together = (fitted(points) for points in crossed[BETWEEN][1:])
        # a route crosses two wires; its cost from end to end is the path's
        links[BETWEEN] = {"bandwidth": _fastest(alone), "latency": _time(alone[0].latency_s / 2)}
        paths[BETWEEN] = _costs(alone, bandwidth=True)
        rates = [segments[-1].bandwidth_bytes_per_s for segments in (alone, together)]
        if rates[1] < AS_FAST * rates[0]:
            backplane = _rate(crossed[BETWEEN].number * rates[1], "GB/s", 1e9)
    return links, paths, backplane


def _fastest(segments: Sequence[Segment]) -> str:
    return _rate(max(one.bandwidth_bytes_per_s for one in segments if isfinite(one.bandwidth_bytes_per_s)), "GB/s", 1e9)


def _costs(segments: Sequence[Segment], *, bandwidth: bool) -> dict[str, Any]:
    """Latency, and bandwidth if asked for, or both by ranges of sizes."""
    if len(segments) > 1:
        return {"regimes": to_regimes(segments)}
    own = {"latency": _time(segments[0].latency_s)}
    return own | ({"bandwidth": _rate(segments[0].bandwidth_bytes_per_s, "GB/s", 1e9)} if bandwidth else {})


def _machine(kinds: Sequence[str], backplane: str | None) -> Any:
    """One device, or all on a switch."""
    if len(kinds) == 1:
        return kinds[0]
    alike = {"count": len(kinds), "of": kinds[0]} if len(set(kinds)) == 1 else {"of": list(kinds)}
    return {"join": "switch", "link": BETWEEN} | alike | ({} if backplane is None else {"backplane": backplane})


def _transport(found: Findings, transport: Transport, source: str) -> dict[str, Any]:
    """How messages move: progress and who drives them as the transport declares, the rest as measured."""
    share = declared(transport, "device_share")
    entry: dict[str, Any] = {
        "source": f"{source}; progress and drives as transport {transport.name} declares them",
        "progress": declared(transport, "progress"),
        "drives": declared(transport, "drives"),
        "look": _time(found.look_s),
    }
    if found.overlap is not None:
        said = f"defined: transport {transport.name} declares it, for what moves its messages"
        entry["device_share"] = found.overlap.kernels if share is None else {"value": float(share), "source": said}
        entry["slowed_by_compute"] = found.overlap.messages
    return entry


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3f} us"


def _rate(value: float, unit: str, scale: float) -> str:
    return f"{value / scale:.4g} {unit}"

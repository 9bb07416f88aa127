"""Write the tables of docs/machines.md and docs/memory.md from the model: `python docs/tables.py`, about a minute.

A test holds the pages to what this writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ringsim
from ringsim import topology
from ringsim.breakeven import Breakeven, find_breakeven
from ringsim.dtypes import canonical
from ringsim.hops import ring_hops
from ringsim.ledger import account, tokens
from ringsim.units import format_size, format_time

DOCS = Path(__file__).parent
Settings = dict[str, Any]
Heads = tuple[int, int]
MULTI_HEAD: Heads = (32, 32)
GROUPED: Heads = (32, 8)
IDEAL = tuple(name for name in topology.names() if name.startswith("ideal"))
REAL = tuple(name for name in topology.names() if name not in IDEAL)
# rings that cross what the whole machine's crosses, and take a second to simulate
SMALLER: dict[str, Settings] = {
    "dgx-h100-cluster": {"nodes": 2},
    "dgx-h100-cluster-tcp": {"nodes": 2},
    "alps-gh200": {"nodes": 2},
    "perlmutter": {"nodes": 2},
    "frontier": {"nodes": 2},
    "tpu-v4": {"x": 2, "y": 2, "z": 2},
    "tpu-v5e": {"x": 4, "y": 4},
}
RANKS = {"gb200-nvl72": 8}
FLOAT32 = ("laptop",)


def machine(name: str, settings: Settings | None = None) -> tuple[topology.Topology, int]:
    """A machine as the tables take it, and the ranks of its ring."""
    on = topology.load(name, SMALLER.get(name, {}) | (settings or {}))
    return on, RANKS.get(name, len(on.slots))


def schedule(name: str, ranks: int, heads: Heads, seq: int = 1, *, causal: bool = False) -> ringsim.Schedule:
    """A ring of heads of 128; causal ones zigzag."""
    work = ringsim.Workload(
        q_len=seq,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        dtype=canonical("fp32" if name in FLOAT32 else "bf16"),
        mask=ringsim.Causal() if causal else ringsim.Full(),
    )
    return ringsim.Schedule(workload=work, world_size=ranks, partition="zigzag" if causal else "contiguous")


def block(name: str, heads: Heads, settings: Settings | None = None, multiple: int = 1) -> Breakeven:
    """The break-even block of a machine's ring."""
    if settings is None and multiple == 1:
        return _block(name, heads)
    on, ranks = machine(name, settings)
    return find_breakeven(schedule(name, ranks, heads), on, multiple=multiple)


@cache
def _block(name: str, heads: Heads) -> Breakeven:
    """That of the machine as it is, which several tables show."""
    on, ranks = machine(name)
    return find_breakeven(schedule(name, ranks, heads), on)


def markdown(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table; the first column is words, the others are numbers."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(map(str, row)) + " |" for row in [head]] + [rule]) + "".join(
        "\n| " + " | ".join(map(str, row)) + " |" for row in rows
    )


def shown(found: Breakeven) -> str:
    """The block, or that there is none."""
    if found.tokens is None:
        return "never"
    return f"{'≤ ' if found.tokens == found.looked_from > 1 else ''}{found.tokens:,}"


def rate(value: float) -> str:
    """GB/s."""
    return f"{value / 1e9:.4g}"


def shipped() -> str:
    """Each machine, and the hops of its ring."""
    rows = []
    for name in REAL:
        whole = len(topology.load(name).slots)
        on, ranks = machine(name)
        hops = ring_hops(on, ranks)
        worst = min(hops, key=lambda hop: (hop.together, hop.rank))
        device = on.device(on.place(ranks)[0])
        memory = "-" if device.memory is None else format_size(device.memory)
        best = max(hop.together for hop in hops)
        span = rate(worst.together) if worst.together == best else f"{rate(worst.together)} .. {rate(best)}"
        stacks = ", ".join(on.spec.transports)
        rows.append((f"[{name}](../topologies/{name}.yaml)", whole, memory, ranks, span, format_time(worst.latency_s), stacks))
    head = (
        "machine",
        "ranks",
        "memory of one",
        "ring below",
        "its hops, all at once, GB/s",
        "latency of the slowest",
        "transports",
    )
    return markdown(head, rows)


def table_2() -> str:
    """Ring Attention's table 2, by simulation, and the same on machines as they are."""
    printed = {
        # arXiv 2310.01889v4, table 2: minimal block and sequence in thousands; the shipped machine of that kind
        "ideal-a100-nvlink": (1.0, 6.2, "dgx-a100"),
        "ideal-a100-infiniband": (24.5, 149.5, "perlmutter"),
        "ideal-tpu-v3": (1.1, 6.6, None),
        "ideal-tpu-v4": (1.0, 6.2, "tpu-v4"),
        "ideal-tpu-v5e": (1.1, 6.3, "tpu-v5e"),
    }
    rows = []
    for name, (block_k, sequence_k, real) in printed.items():
        found = block(name, MULTI_HEAD)
        c = found.f_over_b or 0.0
        counted = found.tokens or 0
        other: tuple[object, ...] = ("-", "-", "-", "-")
        if real is not None:
            actual = block(real, MULTI_HEAD)
            attention = f"{actual.flops_per_s / 1e12:.0f}"
            other = (real, rate(actual.hop_bytes_per_s), attention, shown(actual))
        rows.append((name, f"{c:,.0f}", f"{counted:,}", f"{counted * 6 / 1e3:.1f}", f"{block_k}", f"{sequence_k}", *other))
    head = ("ideal machine", "c = F/B", "simulated", "6c, thousands", "printed c", "printed 6c")
    return markdown((*head, "real machine", "hop, GB/s", "attention, TFLOP/s", "simulated there"), rows)


def blocks() -> str:
    """The smallest block of every machine."""
    rows = []
    for name in REAL:
        found = [block(name, heads) for heads in (MULTI_HEAD, GROUPED)]
        ranks, by_paper = found[0].schedule.world_size, found[0].f_over_b
        cells = [cell for one in found for cell in (shown(one), "-" if one.tokens is None else f"{one.exposed:.1%}")]
        rows.append((name, ranks, rate(found[0].hop_bytes_per_s), "-" if by_paper is None else f"{by_paper:,.0f}", *cells))
    head = ("machine", "ranks", "slowest hop, GB/s", "F/B", "32/32 heads", "hops still cost", "32/8 heads", "hops still cost")
    return markdown(head, rows)


def flat(device: str, efficiency: float) -> Settings:
    """One efficiency for all tiles."""
    points = [[1, efficiency], [2.0**50, efficiency]]
    return {f"devices.{device}.attention.0.full": points, f"devices.{device}.launch": "0 s"}


def derived() -> str:
    """Closed forms, next to the simulation, and next to the simulation of what they take for granted."""
    h100 = {"devices.h100.launch": "0 s", "transports.nccl.paths.nvlink4.device_share": 0.0}
    far = h100 | {"transports.nccl.paths.ndr.device_share": 0.0, "transports.nccl.paths.ndr.bandwidth": "48 GB/s"}
    near = h100 | {"transports.nccl.paths.nvlink4.bandwidth": "370 GB/s", "transports.nccl.paths.nvlink4.latency": "16.2 us"}
    a100 = flat("a100", 225 / 312) | {"transports.nccl.paths.nvlink3.device_share": 0.0}
    switched = a100 | {"transports.nccl.paths.nvlink3.regimes": [{"from": "0 B", "latency": "13 us", "bandwidth": "240 GB/s"}]}
    slingshot = a100 | {"transports.nccl.paths.slingshot.device_share": 0.0}
    xgmi = flat("mi300x", 400 / 1307.4) | {"transports.rccl.paths.xgmi.device_share": 0.0, "links.xgmi.achieved": 0.75}
    cases = (
        # first c, in steps of 64, at which arithmetic has compute >= hop: forward, head_dim 128, bfloat16
        ("H100, NVSwitch at 370 GB/s", 2048, 960, "dgx-h100", near),
        ("H100, one NDR at 48 GB/s", 13568, 3648, "dgx-h100-cluster", far),
        ("A100, NVSwitch at 240 GB/s, 225 TFLOP/s", 1152, 576, "dgx-a100", switched),
        ("A100, one HDR-class NIC at 24 GB/s, 225 TFLOP/s", 9408, 2496, "perlmutter", slingshot),
        ("MI300X, one xGMI at 48 GB/s, 400 TFLOP/s", 8448, 2240, "mi300x", xgmi),
        ("GH200, Slingshot at 24 GB/s", 27072, 6848, "alps-gh200", {"devices.gh200.launch": "0 s"}),
    )
    rows: list[tuple[object, ...]] = []
    for what, multi_head, grouped, name, settings in cases:
        pairs = ((multi_head, MULTI_HEAD), (grouped, GROUPED))
        cells = [(closed, shown(block(name, heads)), shown(block(name, heads, settings, multiple=64))) for closed, heads in pairs]
        rows.append((what, name, *(cell if isinstance(cell, str) else f"{cell:,}" for part in cells for cell in part)))
    head = ("derived for", "machine", "32/32: derived", "simulated", "on its terms", "32/8: derived", "simulated", "on its terms")
    return markdown(head, rows)


def without_nvlink() -> str:
    """The same tokens per device on NVLink and without."""
    per_device, slower = 4096, {"links.nvlink4.bandwidth": "63 GB/s", "transports.nccl.paths.nvlink4.bandwidth": "50 GB/s"}
    cases: tuple[tuple[str, str, Settings], ...] = (
        ("DGX H100", "dgx-h100", {}),
        ("the same GPUs on PCIe 5 in place of NVLink, 50 GB/s", "dgx-h100", slower),
        ("DGX A100", "dgx-a100", {}),
        ("two A100 on PCIe 4", "a100-pcie-pair", {}),
        ("eight L20 on PCIe 4", "l20-pcie", {}),
        ("four RTX 4090 on PCIe 4, through host memory", "rtx4090-pcie", {}),
    )
    rows: list[tuple[object, ...]] = []
    for what, name, settings in cases:
        on, ranks = machine(name, settings)
        made = schedule(name, ranks, MULTI_HEAD, per_device * ranks, causal=True)
        total_s = ringsim.simulate(made, on).total_s
        free_s = ringsim.simulate(made, on, free_hops=True).total_s
        hop = min(hop.together for hop in ring_hops(on, ranks))
        rows.append((what, ranks, rate(hop), format_time(total_s), format_time(free_s), f"{1 - free_s / total_s:.0%}"))
    return markdown(("machine", "ranks", "slowest hop, GB/s", "ring", "with free hops", "exposed communication"), rows)


def contexts() -> str:
    """The longest context of every machine, as `ringsim memory` has it."""
    rows: list[tuple[object, ...]] = []
    for name in REAL:
        on = topology.load(name)
        ranks = len(on.slots)
        found = account(schedule(name, ranks, GROUPED, 1024 * ranks), on)
        lengths = [tokens(found.longest[method]) for method in ("ring", "blockwise", "dense")]
        what = f"{name} (float32)" if name in FLOAT32 else name
        rows.append((what, ranks, format_size(found.demand.memory_nbytes or 0), *lengths))
    return markdown(("machine", "ranks", "memory of a device", "ring", "one device, blockwise", "one device, dense"), rows)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "machines.md": {
        "shipped": shipped,
        "table 2": table_2,
        "blocks": blocks,
        "derived": derived,
        "without NVLink": without_nvlink,
    },
    "memory.md": {"contexts": contexts},
}


def renew(page: str, text: str) -> str:
    """The page's text with its tables written anew."""
    for name, write in TABLES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n)(?:.|\n)*?(\n<!-- end -->)")
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"docs/{page}: expected one '<!-- {name} -->' with its '<!-- end -->'")
        table = write()
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}{match[2]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    for page in TABLES:
        path = DOCS / page
        path.write_text(renew(page, path.read_text()))

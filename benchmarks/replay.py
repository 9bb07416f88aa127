"""Published rings replayed: given the single-GPU figure alone, does the model give what ring, zigzag and stripe do on 8 GPUs?

    python benchmarks/replay.py --markdown docs/replay-table.md

Two rates are set so that one local call takes as long as published (attention forward, and backward); all else is the shipped
machine. Each ring is predicted with ringsim's own small kernels and with those that its source runs after each block, as bytes
read and written: with the TorchScript function of the merge fused into one kernel, and with each of its operations a kernel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from ringsim import Causal, Schedule, Topology, Workload, load_topology, simulate
from ringsim.costs import Costs
from ringsim.schedule import Compute, Op, Region
from ringsim.tile import Span, Tile

DATA = Path(__file__).parent.parent / "tests" / "data" / "published" / "ring_flash_attention.yaml"
PARTITIONS = {"ring": "contiguous", "zigzag": "zigzag", "stripe": "striped"}
PASSES = {"forward": "forward", "both": "forward + backward"}
KERNELS = ("own", "fused", "op by op")
WIDE, NARROW = 4, 2
"""Bytes of float32 and bfloat16."""


class Case(NamedTuple):
    """One published row: figures in iterations per second."""

    machine: str
    topology: str
    settings: dict[str, str]
    api: str
    pass_: str
    workload: Workload
    ranks: int
    local: float
    local_forward: float
    rings: dict[str, float]


class Row(NamedTuple):
    """A ring of a case, in iterations per second; `predicted` by kind of small kernels."""

    case: Case
    ring: str
    published: float
    predicted: dict[str, float]

    def error(self, kernels: str) -> float:
        """Predicted over published, less one."""
        return self.predicted[kernels] / self.published - 1


def cases() -> Iterator[Case]:
    """All published rows."""
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    for row in data["rows"]:
        for machine, passes in row["figures"].items():
            for pass_, figures in passes.items():
                work = Workload(
                    q_len=data["ranks"] * data["seq_per_gpu"],
                    heads=row["heads"],
                    kv_heads=row["kv_heads"],
                    head_dim=data["head_dim"],
                    dtype=data["dtype"],
                    mask=Causal(),
                    pass_=pass_,
                )
                on = data["machines"][machine]
                local, rings = figures["local"], {name: figures[name] for name in PARTITIONS}
                forward = passes["forward"]["local"]
                yield Case(machine, on["topology"], on["set"], row["api"], pass_, work, data["ranks"], local, forward, rings)


def local_s(topology: Topology, case: Case, kernel: str) -> tuple[float, float]:
    """Seconds of one local call, and those of them that are its overhead."""
    device = topology.device(topology.devices[0])
    rows = Span(row=0, count=case.workload.q_len // case.ranks, start=0)
    tile = Tile(batch=(0, 1), heads=(0, case.workload.heads), q=rows, k=rows, lo=0)
    ops = (Compute(id=0, step=0, phase=kernel, kernel=kernel, reads=(), writes=(), tiles=tiles) for tiles in ((tile,), ()))
    costs = Costs(device, case.workload)
    taken_s, overhead_s = (costs.cost(op).seconds for op in ops)
    return taken_s, overhead_s


def calibrated(case: Case) -> Topology:
    """The shipped machine with the two rates at which one local call takes as long as published."""
    topology = load_topology(case.topology, case.settings)
    kind = topology.graph.vertices[topology.devices[0]].device
    device = topology.spec.devices[kind]
    (index,) = (number for number, entry in enumerate(device.attention) if entry.head_dim == case.workload.head_dim)
    entry, settings = device.attention[index], dict(case.settings)
    forward_s = 1 / case.local_forward
    for kernel, table, key, target_s in (
        ("attend", entry, "rate", forward_s),
        ("attend_backward", entry.of_backward(), "backward.rate", 1 / case.local - forward_s),
    ):
        if kernel == "attend" or case.pass_ == "both":
            taken_s, overhead_s = local_s(topology, case, kernel)
            rate = device.rate(table) * (taken_s - overhead_s) / (target_s - overhead_s)
            settings[f"devices.{kind}.attention.{index}.{key}"] = f"{rate / 1e12:.12g} TFLOP/s"
    return load_topology(case.topology, settings)


class Source(NamedTuple):
    """The small kernels of ring-flash-attention on one rank, each as bytes read and written; file and line of @8996282.

    n: elements of the queries of a block, m: its rows times heads, k: elements of its keys. `sliced`: the block has some of the
    rank's queries (zigzag), or all but the first (stripe). The sums out, dq, dk and dv are float32, blocks are bfloat16.
    """

    api: str
    fused: bool

    def packed(self, n: int, k: int) -> Iterator[int]:
        """`k.contiguous()`, `v.contiguous()` of a packed tensor: ring_flash_attn.py:177."""
        yield from (2 * NARROW * k, 2 * NARROW * k)

    def first(self, n: int) -> Iterator[int]:
        """`block_out.to(torch.float32)`: utils.py:63."""
        yield (NARROW + WIDE) * n

    def merge(self, n: int, m: int, *, sliced: bool) -> Iterator[int]:
        """`_update_out_and_lse`: utils.py:40 to 48; at 324eb8c, of which the qkvpacked figures are, utils.py:16 to 25."""
        if self.fused:
            yield (NARROW + 2 * WIDE) * n + 3 * WIDE * m
        elif self.api == "kvpacked":
            # to(float32); block_lse - lse; sigmoid; out - block_out; sigmoid * that; out - that;
            # lse - block_lse; logsigmoid; lse - that
            yield from ((NARROW + WIDE) * n, 3 * WIDE * m, 2 * WIDE * m, 3 * WIDE * n, 2 * WIDE * n + WIDE * m, 3 * WIDE * n)
            yield from (3 * WIDE * m, 2 * WIDE * m, 3 * WIDE * m)
        else:
            # to(float32); block_lse - lse; exp; 1 +; log; lse +; lse - new; exp; that * out;
            # block_lse - new; exp; that * block_out; the sum
            yield from ((NARROW + WIDE) * n, 3 * WIDE * m, 2 * WIDE * m, 2 * WIDE * m, 2 * WIDE * m, 3 * WIDE * m)
            yield from (3 * WIDE * m, 2 * WIDE * m, 2 * WIDE * n + WIDE * m)
            yield from (3 * WIDE * m, 2 * WIDE * m, 2 * WIDE * n + WIDE * m, 3 * WIDE * n)
        if sliced:
            # out[slice_], lse[slice_] = slice_out, slice_lse: utils.py:70
            yield from (2 * WIDE * n, 2 * WIDE * m)

    def finish(self, n: int) -> Iterator[int]:
        """`out.to(q.dtype)`: ring_flash_attn.py:65."""
        yield (WIDE + NARROW) * n

    def first_gradients(self, n: int, k: int) -> Iterator[int]:
        """`block_dq_buffer.to(torch.float32)`, and of dk and dv: ring_flash_attn.py:134 to 136."""
        yield from ((NARROW + WIDE) * size for size in (n, k, k))

    def add_gradients(self, n: int, k: int) -> tuple[list[int], list[int]]:
        """`dq += block_dq_buffer`; once dk and dv are there, `block_dk_buffer + next_dk`: ring_flash_attn.py:138 to 141."""
        return [(NARROW + 2 * WIDE) * n], [(NARROW + 2 * WIDE) * k] * 2

    def finish_gradients(self, n: int, k: int) -> Iterator[int]:
        """`dq.to(torch.bfloat16)`, `next_dk.to(q.dtype)`: ring_flash_attn.py:154; then what packs them.

        qkvpacked: `torch.stack([dq, dk, dv])`. kvpacked: autograd's zeros and copy for each of `kv[:, :, 0]` and `[:, :, 1]`,
        and their sum.
        """
        yield from ((WIDE + NARROW) * size for size in (n, k, k))
        if self.api == "qkvpacked":
            yield 2 * NARROW * (n + 2 * k)
        else:
            yield from (NARROW * 2 * k, 2 * NARROW * k, NARROW * 2 * k, 2 * NARROW * k, 3 * NARROW * 2 * k)


class Replayed:
    """A schedule with a source's small kernels in place of ringsim's; messages and tiles are the same."""

    def __init__(self, schedule: Schedule, source: Source) -> None:
        self._schedule = schedule
        self._source = source
        self._work = schedule.workload
        self._rows = self._work.q_len // schedule.world_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    def program(self, rank: int) -> Iterator[Op]:
        """The rank's ops."""
        source, last = self._source, 2**40
        k = self._rows * self._work.kv_heads * self._work.head_dim
        n = self._rows * self._work.heads * self._work.head_dim
        seen: set[str] = set()
        waiting: list[int] = []
        kept = 0
        for op in self._schedule.program(rank):
            if not isinstance(op, Compute):
                yield op
                continue
            small: list[int] = []
            if op.kernel in ("attend", "attend_backward"):
                yield op
                small, later = self._after(op, first=op.kernel not in seen)
                waiting += later
                seen.add(op.kernel)
            elif op.kernel == "reset":
                small = list(source.packed(n, k))
            elif op.kernel == "finish":
                small = list(source.finish(n))
            elif op.kernel == "accumulate":
                small, waiting = waiting[:2], waiting[2:]
            elif op.kernel == "cast" and "cast" not in seen:
                small = [*waiting, *source.finish_gradients(n, k)]
                seen.add("cast")
            for nbytes in small:
                kept += 1
                region = Region(buffer="small", slot=0, shape=(nbytes // NARROW,), dtype="bfloat16", value="small")
                yield Compute(id=last + kept, step=op.step, phase=op.phase, kernel="elementwise", reads=(region,), writes=())

    def _after(self, op: Compute, *, first: bool) -> tuple[list[int], list[int]]:
        """What follows a block: at once, and when the sums of its keys are there."""
        queries = {(tile.q.row, tile.q.count) for tile in op.tiles}
        keys = {(tile.k.row, tile.k.count) for tile in op.tiles}
        q_rows, k_rows = (sum(count for _, count in spans) for spans in (queries, keys))
        heads, kv_heads, width = self._work.heads, self._work.kv_heads, self._work.head_dim
        n, m, k = q_rows * heads * width, q_rows * heads, k_rows * kv_heads * width
        if op.kernel == "attend":
            small = self._source.first(n) if first else self._source.merge(n, m, sliced=q_rows < self._rows)
            return list(small), []
        if first:
            return list(self._source.first_gradients(n, k)), []
        return self._source.add_gradients(n, k)


def replay(case: Case) -> Iterator[Row]:
    """Each ring of a case."""
    topology = calibrated(case)
    for name, published in case.rings.items():
        schedule = Schedule(workload=case.workload, world_size=case.ranks, partition=PARTITIONS[name])
        predicted = {"own": 1 / simulate(schedule, topology).total_s}
        for kernels in KERNELS[1:]:
            replayed: Any = Replayed(schedule, Source(case.api, fused=kernels == "fused"))
            predicted[kernels] = 1 / simulate(replayed, topology).total_s
        yield Row(case, name, published, predicted)


def line(row: Row) -> str:
    """A row of the table."""
    case = row.case
    what = f"{case.machine}, {case.workload.heads}/{case.workload.kv_heads} heads, {PASSES[case.pass_]}"
    cells = [f"{row.predicted[kernels]:.4g} ({row.error(kernels):+.1%})" for kernels in KERNELS]
    return f"| {what} | {row.ring} | {row.published:g} | {' | '.join(cells)} |"


def table(rows: list[Row]) -> str:
    """All rows in Markdown, and the median and largest error of each kind."""
    names = (
        "8,192 tokens a GPU, causal",
        "layout",
        "published, it/s",
        "ringsim's kernels",
        "source's, merge fused",
        "source's, op by op",
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|", *map(line, rows)]
    for pass_, said in PASSES.items():
        for kernels, name in zip(KERNELS, names[3:], strict=True):
            errors = [abs(row.error(kernels)) for row in rows if row.case.pass_ == pass_]
            lines.append(
                f"\n{said}, {name}: median |error| {median(errors):.1%}, largest {max(errors):.1%}, over {len(errors)} rings."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    text = table([row for case in cases() for row in replay(case)])
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()

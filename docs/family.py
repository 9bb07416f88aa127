"""Write the tables of docs/strategies.md and docs/backward.md by simulation: `python docs/family.py`, some minutes on two cores.

A test holds the pages to those cells that take no time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import ringsim
from ringsim import topology
from ringsim.capacity import demands, tightest
from ringsim.units import format_size, format_time

HERE = Path(__file__).parent
LENGTHS = {"64K": 2**16, "1M": 2**20, "4M": 2**22}
ZIGZAG = ("ring", "bidirectional", "double-ring(8)", "q-ring", "token-ring", "pass-q")
NONE = "-"


class Case(NamedTuple):
    """One simulation; of `gpus` on the machine, or of one alone."""

    machine: str
    gpus: int
    strategy: str
    partition: str
    tokens: int
    kv_heads: int = 8
    pass_: str = "forward"


def on(machine: str, gpus: int) -> topology.Topology:
    """The machine with that many GPUs."""
    settings = {"nodes": -(-gpus // 8)} if machine == "dgx-h100-cluster" else {}
    return topology.load(machine, settings)


def schedule(case: Case) -> ringsim.Schedule:
    """Causal, 32 query and, but where a table says otherwise, 8 key/value heads of 128, bfloat16."""
    work = ringsim.Workload(
        q_len=case.tokens,
        heads=32,
        kv_heads=case.kv_heads,
        head_dim=128,
        dtype="bfloat16",
        mask=ringsim.Causal(),
        pass_=case.pass_,
    )
    return ringsim.Schedule(workload=work, world_size=case.gpus, partition=case.partition, strategy=case.strategy)


def cell(case: Case) -> str:
    """Time, exposed communication as a share of it, and the memory of the fullest GPU."""
    made, machine = schedule(case), on(case.machine, case.gpus)
    total_s = ringsim.simulate(made, machine).total_s
    exposed = 1 - ringsim.simulate(made, machine, free_hops=True).total_s / total_s
    need = tightest(demands(made, machine))
    return f"{format_time(total_s)} · {exposed:.1%} · {format_size(need.nbytes)}{'' if need.fits else ' (does not fit)'}"


def cluster(gpus: int) -> list[tuple[str, list[Case]]]:
    """The rows of a cluster's table."""
    name, rows = "dgx-h100-cluster", [("ring", "contiguous"), *((strategy, "zigzag") for strategy in ZIGZAG)]
    if gpus == 8:
        rows.append(("multi-ring(4)", "zigzag"))
    return [
        (f"`{strategy}`, {partition}", [Case(name, gpus, strategy, partition, tokens) for tokens in LENGTHS.values()])
        for strategy, partition in rows
    ]


def alone() -> list[tuple[str, list[Case]]]:
    """One device."""
    return [
        (f"`{strategy}`", [Case("dgx-h100-cluster", 1, strategy, "contiguous", tokens) for tokens in LENGTHS.values()])
        for strategy in ("dense", "local-window(4K)")
    ]


def meshes(machine: str, gpus: int, strategies: Iterable[str]) -> list[tuple[str, list[Case]]]:
    """Fabrics of direct links."""
    return [
        (f"`{strategy}`", [Case(machine, gpus, strategy, "zigzag", tokens) for tokens in LENGTHS.values()])
        for strategy in strategies
    ]


def back(kv_heads: int) -> list[tuple[str, list[Case]]]:
    """The rows of a table of backward passes on four nodes."""
    return [
        (
            f"`{strategy}`",
            [Case("dgx-h100-cluster", 32, strategy, "zigzag", tokens, kv_heads, "backward") for tokens in LENGTHS.values()],
        )
        for strategy in ("ring", "burst", "bidirectional", "double-ring(8)")
    ]


TABLES = {
    "8 GPUs": cluster(8),
    "64 GPUs": cluster(64),
    "512 GPUs": cluster(512),
    "one GPU": alone(),
    "mi300x": meshes("mi300x", 8, ("ring", "bidirectional", "multi-ring(2)", "multi-ring(4)", "token-ring")),
    "alps-gh200": meshes("alps-gh200", 4, ("ring", "bidirectional", "multi-ring(2)", "token-ring")),
}


BACKWARD = {"32/32 heads": back(32), "32/8 heads": back(8)}
PAGES = {"strategies.md": TABLES, "backward.md": BACKWARD}


def table(rows: list[tuple[str, list[Case]]], cells: dict[Case, str]) -> str:
    """A Markdown table."""
    lines = [f"| strategy | {' | '.join(LENGTHS)} |", "|---|" + "---:|" * len(LENGTHS)]
    return "\n".join(lines + [f"| {head} | {' | '.join(cells[case] for case in cases)} |" for head, cases in rows])


def slow_first(cases: Iterable[Case]) -> list[Case]:
    """The many ranks first, so that both cores end together."""
    return sorted(cases, key=lambda case: (-case.gpus, case))


def simulated(cases: list[Case]) -> dict[Case, str]:
    """Each cell, two at a time."""
    cells: dict[Case, str] = {}
    with Pool(2, maxtasksperchild=8) as pool:
        for case, found in zip(cases, pool.imap(cell, cases), strict=True):
            cells[case] = found
            sys.stderr.write(f"{len(cells)} of {len(cases)}: {' '.join(map(str, case))}: {found}\n")
    return cells


def write(page: Path, tables: dict[str, list[tuple[str, list[Case]]]], cells: dict[Case, str]) -> None:
    """Put the tables into their page."""
    text = page.read_text()
    for name, rows in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n)(?:.|\n)*?(\n<!-- end -->)")
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"{page.name}: expected one '<!-- {name} -->' with its '<!-- end -->'")
        made = table(rows, cells)
        text = pattern.sub(lambda match, made=made: f"{match[1]}{made}{match[2]}", text)  # type: ignore[misc]
    page.write_text(text)


if __name__ == "__main__":
    wanted = [name for name in PAGES if name in sys.argv[1:]] or list(PAGES)
    shown = [rows for name in wanted for rows in PAGES[name].values()]
    made = simulated(slow_first({case for rows in shown for _, of_row in rows for case in of_row}))
    for name in wanted:
        write(HERE / name, PAGES[name], made)

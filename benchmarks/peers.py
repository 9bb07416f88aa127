"""Causal attention over 4 ranks of this machine: ringsim and the peers that install on a CPU, side by side in one run.

    python benchmarks/peers.py --venvs DIR [--install] [--json FILE] [--markdown FILE]

Batch 1, 8 heads of 64, float32; forward, and forward + backward. All contenders' processes live at once and sleep; in every
round each is asked in turn, so that drift of the machine meets all, and a ratio is taken within a round. docs/peers.md says
what each contender is and how each number is made. A peer that is not installed is reported as such; `--install` makes the
virtual environments under DIR. With --patience a request that other processes disturbed is made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from contenders.cast import Contender, contenders, install
from contenders.company import Company, Failed, Shape, busy_s

import ringsim
from ringsim.backends.cpu import describe
from ringsim.reference import dense_attention, dense_backward

PASSES = {"forward": ("out",), "forward + backward": ("out", "dq", "dk", "dv")}
TOLERANCE = 1e-4
"""Largest error, over the largest value of the exact array, with which a peer counts as right."""
QUIET_CORES = 0.15
SETTLE_S = 0.05
"""Pause before each request: OpenMP's workers spin on after a parallel region."""
LONGEST_S = 1.5
"""Calls of a request stop being added where they would take longer than this together."""
Row = dict[str, Any]


def make_inputs(shape: Shape, folder: Path) -> dict[str, np.ndarray]:
    """q, k, v and dout as raw files for the ranks; the exact answers, computed densely in float64."""
    rng = np.random.default_rng(0)
    size = (1, shape.seq, shape.heads, shape.head_dim)
    arrays = {name: rng.standard_normal(size, np.float32) for name in ("q", "k", "v", "dout")}
    for name, array in arrays.items():
        array.tofile(folder / f"{name}.f32")
    q, k, v, dout = arrays.values()
    workload = ringsim.Workload(q_len=shape.seq, heads=shape.heads, head_dim=shape.head_dim, mask=ringsim.Causal())
    out, _ = dense_attention(workload, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *dense_backward(workload, dout, q, k, v)), strict=True))


def errors(company: Company, keep: str, names: Iterable[str], exact: dict[str, np.ndarray], folder: Path) -> dict[str, float]:
    """The largest absolute error of each array over the largest absolute value of the exact one."""
    found = {}
    for name in names:
        array = np.full(exact[name].shape, np.nan)
        for hello in company.hello:
            path = folder / f"{keep}-{name}-{hello['rank']}.f32"
            rows = np.fromfile(path, np.float32).reshape(1, -1, *array.shape[2:])
            path.unlink()
            for begin, end in hello["spans"]:
                array[:, begin:end], rows = rows[:, : end - begin], rows[:, end - begin :]
        found[name] = float(np.abs(array - exact[name]).max() / np.abs(exact[name]).max())
    return found


def enter(
    contender: Contender, shape: Shape, exact: dict[str, np.ndarray], folder: Path, venvs: Path
) -> tuple[Row, Company | None]:
    """Start a contender, run each pass once for memory and once for its error; its row, and its processes if it lives."""
    row: Row = {"name": contender.name, "seq": shape.seq, "ringsim": contender.is_ringsim, "for_scale": contender.for_scale}
    row["version"] = contender.installed(venvs)
    if not row["version"]:
        return row | {"state": "not installed"}, None
    company = None
    try:
        company = Company(contender, shape, folder, venvs)
        row |= {"state": "ran", "facts": company.hello[0]["facts"], "passes": {}}
        for what, names in PASSES.items():
            answers = company.ask(what, calls=1)
            if answers is not None:
                # the ranks of one process share its memory
                peak = max(answer["peak_nbytes"] for answer in answers) // contender.options.get("devices", 1)
                first_s = max(answer["seconds"][0] for answer in company.ask(what, calls=1, keep="check"))
                found = errors(company, "check", names, exact, folder)
                row["passes"][what] = {"peak_nbytes": peak, "errors": found, "first_s": first_s, "rounds": []}
    except Failed as error:
        if company:
            company.close()
        # what it did before counts for nothing
        row.pop("passes", None)
        return row | {"state": f"failed: {error}"}, None
    return row, company


def request(company: Company, what: str, row: Row, calls: int) -> Row:
    """One round of one contender: its slowest rank, call by call, and the cores that other processes used meanwhile."""
    calls = min(calls, max(1, int(LONGEST_S / row["passes"][what]["first_s"])))
    time.sleep(SETTLE_S)
    others_s, start_s = busy_s() - company.cpu_s(), time.perf_counter()
    answers = company.ask(what, calls)
    others_s, wall_s = busy_s() - company.cpu_s() - others_s, time.perf_counter() - start_s
    slowest = [max(times) for times in zip(*(answer["seconds"] for answer in answers), strict=True)]
    cpu_s = [sum(used) for used in zip(*(answer["cpu_s"] for answer in answers), strict=True)]
    return {"seconds": slowest, "cpu_s": cpu_s, "others_cores": max(0.0, others_s / wall_s)}


def measure(shape: Shape, options: argparse.Namespace) -> list[Row]:
    """All contenders at one shape."""
    rows, companies = [], {}
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        exact = make_inputs(shape, folder)
        try:
            for contender in contenders(variants=options.variants):
                if options.only and not any(text in contender.name for text in options.only):
                    continue
                row, company = enter(contender, shape, exact, folder, options.venvs)
                rows.append(row)
                print(f"seq {shape.seq}: {contender.name}: {row['state']}", flush=True)
                if company:
                    companies[contender.name] = company
            go_round(rows, companies, options)
        finally:
            for company in companies.values():
                company.close()
    return rows


def go_round(rows: list[Row], companies: dict[str, Company], options: argparse.Namespace) -> None:
    """Ask each contender in turn, round after round, each round beginning with another one."""
    give_up_s = time.perf_counter() + options.patience
    for number in range(options.rounds):
        for what in PASSES:
            runners = [row for row in rows if what in row.get("passes", {})]
            start = number % max(1, len(runners))
            for row in runners[start:] + runners[:start]:
                try:
                    found = undisturbed(companies[row["name"]], what, row, options.calls, give_up_s)
                    row["passes"][what]["rounds"].append(found)
                except Failed as error:
                    row["state"] = f"failed in round {number}: {error}"
                    row.pop("passes")
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)


def undisturbed(company: Company, what: str, row: Row, calls: int, give_up_s: float) -> Row:
    """A request, made again while others disturb it and there is patience left."""
    found = request(company, what, row, calls)
    while found["others_cores"] > QUIET_CORES and time.perf_counter() < give_up_s:
        time.sleep(1)
        found = request(company, what, row, calls)
    return found


def times(row: Row, what: str) -> list[float]:
    """Each round's median over its calls."""
    return [statistics.median(found["seconds"]) for found in row["passes"][what]["rounds"]]


def right(row: Row, what: str) -> bool:
    """Whether all that the pass returns is within TOLERANCE of the exact answer."""
    return all(error <= TOLERANCE for error in row["passes"][what]["errors"].values())


def ratios(row: Row, ours: Row, what: str) -> list[float]:
    """How many times ringsim's time this contender took, within each round."""
    return [theirs / mine for theirs, mine in zip(times(row, what), times(ours, what), strict=True)]


def spread(values: list[float], scale: float = 1.0, digits: int = 0) -> str:
    """Median (least .. greatest)."""
    middle, least, most = (f"{value * scale:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} .. {most})"


def line(row: Row, what: str, ours: list[Row]) -> str:
    """A row of a table."""
    width = 6 + len(PASSES[what]) + len(ours)
    if row["state"] != "ran" or what not in row["passes"]:
        state = row["state"] if row["state"] != "ran" else "has no such pass here"
        return f"| {row['name']} | {state} {'| ' * (width - 2)}|"
    found = row["passes"][what]
    rounds = found["rounds"]
    cells = [row["name"], spread(times(row, what), 1e3), f"{cpu_ms(row, what):.0f}"]
    cells += [spread(ratios(row, mine, what), digits=2) for mine in ours]
    cells += [f"{error:.1e}" for error in found["errors"].values()]
    others = max(one["others_cores"] for one in rounds)
    cells += ["yes" if right(row, what) else "**no**", f"{found['peak_nbytes'] / 1e6:.0f}", f"{others:.2f}"]
    return f"| {' | '.join(cells)} |"


def verdicts(rows: list[Row], ours: list[Row], what: str) -> list[str]:
    """The fastest right peer against each ringsim."""
    peers = [
        row for row in rows if what in row.get("passes", {}) and right(row, what) and not (row["ringsim"] or row["for_scale"])
    ]
    if not peers or not ours:
        return []
    fastest = min(peers, key=lambda row: statistics.median(times(row, what)))
    found = []
    for mine in ours:
        wall, used = spread(ratios(fastest, mine, what), digits=2), cpu_ms(fastest, what) / cpu_ms(mine, what)
        found.append(f"{mine['name']}: {fastest['name']} takes {wall} x its time, {used:.2f} x its CPU time")
    return found


def cpu_ms(row: Row, what: str) -> float:
    """Median over all calls: processor time of all ranks."""
    return statistics.median(used * 1e3 for one in row["passes"][what]["rounds"] for used in one["cpu_s"])


def tables(rows: list[Row]) -> str:
    """All in Markdown."""
    parts = []
    for seq in dict.fromkeys(row["seq"] for row in rows):
        for what, names in PASSES.items():
            some = [row for row in rows if row["seq"] == seq]
            ours = [row for row in some if row["ringsim"] and what in row.get("passes", {})]
            head = ["contender", "slowest rank, ms", "CPU ms, all ranks", *(f"time / {row['name']}" for row in ours)]
            head += [*(f"error {name}" for name in names), "right", "peak MB per rank", "others"]
            parts += [f"\n### seq {seq}, {what}\n", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            parts += [line(row, what, ours) for row in some]
            parts += [f"\nFastest right peer against {verdict}." for verdict in verdicts(some, ours, what)]
    return "\n".join(parts) + "\n"


def facts() -> Row:
    """What the numbers depend on, besides what each contender says of itself."""
    names = [text for text in Path("/proc/cpuinfo").read_text().splitlines() if text.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "ringsim": ringsim.__version__,
        "driver": describe(),
    }


def setting(found: Row) -> str:
    """Machine, versions and BLAS, as the contenders themselves say."""
    known = found["facts"]
    lines = [f"{known['cores']} x {known['cpu']}; {found['rounds']} rounds, up to {found['calls']} calls in each.\n"]
    for row in {row["name"]: row for row in found["rows"] if row["state"] == "ran"}.values():
        told = {name: value for name, value in row["facts"].items() if name not in ("threadpools", "environment")}
        text = ", ".join(f"{name} {value}" for name, value in told.items())
        for pool in row["facts"].get("threadpools", ()):
            text += f"; {pool['internal_api']} {pool['version']} for {pool['architecture']}"
        lines.append(f"- {row['name']}: {text}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", type=Path, required=True, metavar="DIR", help="where the peers' virtual environments are")
    parser.add_argument("--install", action="store_true", help="first make those that are missing")
    parser.add_argument("--seq", type=int, action="append", help="repeatable; default 4096 and 8192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="in a row of each contender in a round; their median counts")
    parser.add_argument("--only", action="append", metavar="TEXT", help="repeatable: contenders whose name contains this")
    parser.add_argument("--variants", action="store_true", help="also the settings of peers that were found no better")
    parser.add_argument("--patience", type=float, default=0.0, metavar="SECONDS", help="per shape, for a quiet machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    # so that a driver that is told to end still ends its processes
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    options.venvs = options.venvs.absolute()
    if options.install:
        install(options.venvs)
    found = {"facts": facts(), "rounds": options.rounds, "calls": options.calls, "rows": []}
    for seq in options.seq or (4096, 8192):
        found["rows"] += measure(Shape(seq), options)
    text = setting(found) + tables(found["rows"])
    sys.stdout.write(text)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()

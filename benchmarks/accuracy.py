"""Was the prediction right? Calibrate this machine, then predict and measure workloads that calibration did not see.

    python benchmarks/accuracy.py --ranks 4 --ranks 2 --json accuracy.json --markdown docs/accuracy-table.md

Calibration and runs follow each other at once, because timings on a shared machine drift.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median

BIN = Path(sys.executable).parent
PASSES = ("forward", "both")
WORKLOADS = (
    "--seq 4K --causal --partition zigzag",
    "--seq 4K",
    "--seq 4K --causal",
    "--seq 8K --kv-heads 2 --causal --partition zigzag",
    "--seq 2K --causal --partition striped",
    "--seq 4K --heads 4 --head-dim 128 --causal --partition zigzag",
    "--seq 3000 --heads 4 --kv-heads 1 --head-dim 128",
    "--seq 6000 --head-dim 96 --causal --partition striped",
    "--seq 1K --heads 16 --kv-heads 2 --head-dim 128 --causal --partition zigzag",
    "--seq 1K --batch 2 --sync step",
)


def ringsim(ranks: int, *arguments: str) -> None:
    """One ringsim command on `ranks` ranks."""
    command = [str(BIN / "mpiexec"), "-n", str(ranks), str(BIN / "ringsim"), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def measure(ranks: int, folder: Path, repeats: int) -> list[dict]:
    """Calibrate, then compare every workload, forward and with its backward pass."""
    here, facts = folder / f"here{ranks}.yaml", folder / "facts.json"
    ringsim(ranks, "calibrate", "-o", str(here))
    rows = []
    for pass_, workload in product(PASSES, WORKLOADS):
        asked = ["--pass", pass_, *workload.split()]
        ringsim(ranks, "compare", "--topology", str(here), "--json", str(facts), "--repeats", str(repeats), *asked)
        found = json.loads(facts.read_text())
        spread = found["measured"]["spread"]["total_s"]
        rows.append(
            {
                "ranks": ranks,
                "pass": pass_,
                "workload": workload,
                "predicted_s": found["predicted"]["total_s"],
                "measured_s": found["measured"]["total_s"],
                "low_s": spread[0],
                "high_s": spread[1],
                "error": found["error"]["total"],
                "exposed_predicted_s": found["predicted"]["exposed_s"],
                "exposed_measured_s": found["measured"]["exposed_s"],
                "environment": found["measured"]["facts"],
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    """A row of the table."""
    times = [f"{row[name] * 1e3:.1f}" for name in ("predicted_s", "measured_s", "low_s", "high_s")]
    exposed = [f"{row[name] * 1e3:.1f}" for name in ("exposed_predicted_s", "exposed_measured_s")]
    what = f"{row['ranks']} | {row['pass']} | `{row['workload']}`"
    return f"| {what} | {times[0]} | {times[1]} | {times[2]} .. {times[3]} | {row['error']:+.1%} | {exposed[0]} / {exposed[1]} |"


def table(rows: list[dict]) -> str:
    """The whole table in Markdown."""
    names = ("ranks", "pass", "workload", "predicted ms", "measured ms (median)", "range", "error", "exposed p / m, ms")
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    lines = [head, *map(line, rows)]
    for ranks, pass_ in dict.fromkeys((row["ranks"], row["pass"]) for row in rows):
        errors = [abs(row["error"]) for row in rows if (row["ranks"], row["pass"]) == (ranks, pass_)]
        summary = f"median |error| {median(errors):.1%}, largest {max(errors):.1%}, over {len(errors)} workloads"
        lines.append(f"\n{ranks} ranks, {pass_}: {summary}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, action="append", help="repeatable; default 4 and 2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks or (4, 2):
            rows += measure(ranks, Path(folder), options.repeats)
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(table(rows))


if __name__ == "__main__":
    main()

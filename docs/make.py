"""Write the figure and the table of docs/ from runs on this machine: `make docs`, some minutes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent
BIN = Path(sys.executable).parent
COLOURS = ("#3b6fb6", "#5b9bd5", "#8fbce6", "#bcd8f2")
WAITING, OTHER = "#d9534f", "#999999"
RUN = ("--seq", "8K", "--causal", "--partition", "zigzag")


def launch(folder: Path, *arguments: str) -> None:
    """A ringsim command on 4 ranks."""
    command = [str(BIN / "mpiexec"), "-n", "4", str(BIN / "ringsim"), *arguments]
    subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


def timeline_figure(target: Path) -> None:
    """Predicted above measured: each rank a row, each kernel a bar."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch(folder, "calibrate", "-o", "here.yaml", "--head-dim", "64")
        launch(folder, "compare", "--topology", "here.yaml", *RUN, "--trace", "trace.json")
        events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    figure, panels = plt.subplots(len(names), 1, sharex=True, figsize=(9, 3.8), constrained_layout=True)
    for panel, (pid, title) in zip(panels, names.items(), strict=True):
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        for event in spans:
            draw(panel, event)
        panel.set_title(title.split(" on ")[0], loc="left", fontsize=10)
        panel.set_yticks(range(4), [f"rank {rank}" for rank in range(4)])
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms")
    figure.legend(handles=legend(), loc="outside upper right", ncols=6, frameon=False, fontsize=8)
    figure.savefig(target, dpi=160)


def draw(panel: Any, event: dict[str, Any]) -> None:
    """One event as a bar; polls within a kernel as a red part at its end."""
    start, length = event["ts"] / 1e3, event["dur"] / 1e3
    kernel = event["name"] == "attend"
    colour = COLOURS[event["args"]["step"] % 4] if kernel else WAITING if event["name"] == "wait" else OTHER
    panel.barh(event["tid"], length, left=start, height=0.72, color=colour, edgecolor="white", linewidth=0.4)
    if kernel:
        driven = event["args"].get("poll_s", 0.0) * 1e3
        panel.barh(event["tid"], driven, left=start + length - driven, height=0.72, color=WAITING)


def legend() -> list[Any]:
    """What the colours mean."""
    patches = [mpl.patches.Patch(color=colour, label=f"attend, step {step}") for step, colour in enumerate(COLOURS)]
    return [
        *patches,
        mpl.patches.Patch(color=WAITING, label="communication, waits"),
        mpl.patches.Patch(color=OTHER, label="reset, finish"),
    ]


def accuracy_table(page: Path) -> None:
    """Put a fresh table of held-out workloads into the page."""
    with tempfile.TemporaryDirectory() as name:
        markdown = Path(name) / "table.md"
        script = DOCS.parent / "benchmarks" / "accuracy.py"
        subprocess.run([sys.executable, str(script), "--markdown", str(markdown)], check=True)
        table = markdown.read_text()
    text = page.read_text()
    page.write_text(re.sub(r"<!-- accuracy table -->(.|\n)*", f"<!-- accuracy table -->\n{table}", text))


def machine_figure(name: str, *options: str) -> None:
    """A shipped machine, as `ringsim topologies graph` draws it."""
    target = DOCS / "figures" / f"{name}.png"
    subprocess.run([str(BIN / "ringsim"), "topologies", "graph", name, "-o", str(target), *options], check=True)


if __name__ == "__main__":
    timeline_figure(DOCS / "figures" / "timeline.png")
    machine_figure("dgx-h100-cluster")
    machine_figure("frontier")
    accuracy_table(DOCS / "measurement.md")

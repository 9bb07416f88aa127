"""The house: light imports, imports that point downward, no machine's number in Python, nothing that prints."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ringsim

ROOT = Path(__file__).parent.parent
FOLDERS = {"ringsim": ROOT / "ringsim", "ringsim.backends": ROOT / "backends", "ringsim.topologies": ROOT / "topologies"}
# each room with those that it may import, besides those of its own line and below
FLOORS = [
    {"cli", "__main__"},
    {"ledger", "inventory", "doctor"},
    {"report", "bindings"},
    {"trace", "comparison", "checking", "attention", "engine", "sharding", "drawing", "breakeven", "hops"},
    {"agreement", "communicators", "calibration", "kernel_times", "simulation", "execution", "importing"}
    | {"device_bench", "device_times", "device_hops", "device_calibration", "device_topology"},
    {"capacity", "shares"},
    {"backends", "costs", "footprint", "scratch", "partials"},
    {"topology", "workload_file", "inputs", "reference", "transport", "arrays", "files"},
    {"schedule", "topologies", "yaml_source"},
    {"lowering", "timeline"},
    {"balance", "partition", "ring_sizes", "workload"},
    {"mask", "segments"},
    {"parts"},
    {"tile", "dtypes", "units", "calls"},
    {"errors"},
]
HEIGHT = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LATE = {("attention", "backends"), ("communicators", "backends"), ("execution", "backends")}


def modules():
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, (package, *(part for part in parts if part != "__init__"))


def imported(path, name):
    """(room imported, whether at the top of the module)."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name[:-1]
    package = tuple(".".join(package).split("."))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            targets = [full] if len(full) > 1 else [(*full, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        yield from ((target[1], node.col_offset == 0) for target in targets if target[0] == "ringsim" and len(target) > 1)


def room(name):
    return ".".join(name).split(".")[1] if "." in ".".join(name) else "ringsim"


@pytest.mark.parametrize(("path", "name"), list(modules()), ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
def test_imports_point_downward(path, name):
    mine = room(name)
    if mine == "ringsim":
        return
    for other, at_top in imported(path, name):
        if other not in HEIGHT:
            assert other == "__version__"
            continue
        allowed = HEIGHT[other] <= HEIGHT[mine] or (not at_top and (mine, other) in LATE)
        assert allowed, f"{mine} may not import {other}"


@pytest.mark.parametrize(
    "statement", ["import ringsim", "from ringsim import *", "import ringsim; ringsim.simulate, ringsim.ring_attention"]
)
def test_importing_ringsim_initialises_no_mpi_and_finds_no_gpu(statement):
    code = f"{statement}; import sys; print(*[m for m in ('mpi4py', 'cupy', 'numpy', 'simpy', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"mpi4py", "cupy", "torch"}
    if statement == "import ringsim":
        assert loaded == set()


def test_import_time():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import ringsim"],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    cumulative_us = next(int(line.split("|")[1]) for line in done.stderr.splitlines() if line.split("|")[-1].strip() == "ringsim")
    assert cumulative_us < 500_000


def test_public_names_resolve():
    assert {name for name in ringsim.__all__ if getattr(ringsim, name) is None} == set()
    assert set(ringsim.__all__) <= set(dir(ringsim))
    with pytest.raises(AttributeError, match="no attribute 'ring_atention'"):
        ringsim.ring_atention  # noqa: B018


@pytest.mark.parametrize(("path", "name"), list(modules()), ids=lambda value: ".".join(value) if isinstance(value, tuple) else "")
def test_no_hardware_number_in_python(path, name):
    text = path.read_text()
    code = re.sub(r'"""(?:.|\n)*?"""', "", text)
    found = re.findall(r"\b\d[\d.]* ?(?:GB/s|TB/s|Gbit/s|[GTP]FLOP/s)", code)
    # units.py names example quantities in its error messages
    assert not found or path.name == "units.py"


def test_files_and_functions_are_small():
    for path, _ in modules():
        lines = path.read_text().splitlines()
        assert len(lines) < 400, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno - body[0].lineno + 1) if body else 0
                assert length < 40, f"{path}: {node.name} has {length} lines"

"""The matrix of `nvidia-smi topo -m`: NVLinks between GPUs, and how near GPUs and NICs are in the PCIe tree."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import PurePath

from ..errors import TopologyError
from ..units import shown
from .wires import MOST_GPUS, Cable, Sketch, Spot, named, pcie, plain

WHAT = "nvidia-smi topo -m"
NEAR = {"PIX": 1, "PXB": 2, "PHB": 3, "NODE": 3, "SYS": 4, "SOC": 4}
"""One PCIe switch; several; one root complex or NUMA node (which NCCL takes as one too); beyond."""
SWITCH, SWITCHES, ROOT, SYSTEM = 1, 2, 3, 4
WORD = {1: "PIX", 2: "PXB", 3: "NODE", 4: "SYS"}
MOST_COLUMNS = 256
MOST_NVLINKS = 1024
_ANSI = re.compile(r"\x1b?\[[0-9;]{0,8}m")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.:-]{0,63}")
_LEGEND = re.compile(r"\s*(NIC[0-9]{1,4}): +(\S{1,64})\s*")
_AFFINITY = ("CPU", "NUMA", "GPU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Names, the cell of each pair, what the NICs are called; of each row the affinity columns as one text, and the NUMA node.

    `numa` has those rows alone whose NUMA affinity is one number: several, or none, say nothing of where a GPU is.
    """

    file: str
    names: tuple[str, ...]
    cells: dict[tuple[str, str], str]
    affinity: dict[str, str]
    numa: dict[str, str]
    legend: dict[str, str]

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs' names."""
        return tuple(name for name in self.names if re.fullmatch(r"GPU[0-9]{1,6}", name))

    def near(self, a: str, b: str) -> int | None:
        """How near two are; None where NVLink hides it."""
        return NEAR.get(self.cells[a, b])

    def nvlinks(self, a: str, b: str) -> int:
        """NVLinks between two."""
        cell = self.cells[a, b]
        return int(cell[2:]) if cell.startswith("NV") else 0


def matrix(text: str, file: str) -> Matrix:
    """The matrix of a text. Raises TopologyError with file and line."""
    lines = [_ANSI.sub("", line) for line in text.splitlines()]
    start = next((number for number, line in enumerate(lines) if line.split()[:1] == ["GPU0"] and _header(line)), None)
    if start is None:
        raise TopologyError(f"{file}:1: no matrix: a line that begins with GPU0 names the columns of `{WHAT}`")
    names = _header(lines[start])
    if len(set(names)) < len(names) or len(names) > MOST_COLUMNS:
        raise TopologyError(f"{file}:{start + 1}: the columns are 1 to {MOST_COLUMNS} different names")
    rows = _rows(lines, start, names, file)
    _alone(lines, max(rows.values(), default=start), file)
    cells: dict[tuple[str, str], str] = {}
    for name in names:
        cells |= {(name, other): cell for other, cell in zip(names, _cells(lines, rows[name], names, file), strict=True)}
    for one, other in combinations(names, 2):
        if cells[one, other] != cells[other, one]:
            where = f"{file}:{rows[other] + 1}"
            raise TopologyError(f"{where}: {other} to {one} is {cells[other, one]}, and {one} to {other} {cells[one, other]}")
    columns = {name: _columns(lines[rows[name]], len(names)) for name in names}
    affinity = {name: plain(" / ".join(filter(None, found))) for name, found in columns.items()}
    numa = {name: found[1] for name, found in columns.items() if re.fullmatch("[0-9]{1,4}", found[1])}
    legend = {match[1]: match[2] for line in lines[start:] if (match := _LEGEND.fullmatch(line))}
    return Matrix(file=file, names=names, cells=cells, affinity=affinity, numa=numa, legend=legend)


def _rows(lines: list[str], start: int, names: tuple[str, ...], file: str) -> dict[str, int]:
    """The line of each row. Raises TopologyError for one that is twice there, or not."""
    rows: dict[str, int] = {}
    for number in range(start + 1, len(lines)):
        words = lines[number].split()
        if not words and not rows:
            continue
        if not words or words[0] not in names:
            break
        if words[0] in rows:
            raise TopologyError(f"{file}:{number + 1}: row {words[0]} is there twice; first on line {rows[words[0]] + 1}")
        rows[words[0]] = number
    missing = next((name for name in names if name not in rows), None)
    if missing is not None:
        raise TopologyError(f"{file}:{start + 1}: no row for column {missing}: a file cut off, or columns run together?")
    return rows


def _alone(lines: list[str], end: int, file: str) -> None:
    """Raises TopologyError if another matrix follows."""
    for number in range(end + 1, len(lines)):
        words = lines[number].split()
        if words[:1] == ["GPU0"] and "X" not in words and _header(lines[number]):
            raise TopologyError(f"{file}:{number + 1}: a second matrix: import one at a time")


def _header(line: str) -> tuple[str, ...]:
    """The columns before the affinities."""
    words = line.split()
    count = next((number for number, word in enumerate(words) if word in _AFFINITY), len(words))
    return tuple(words[:count]) if all(_NAME.fullmatch(word) for word in words[:count]) else ()


def _cells(lines: list[str], number: int, names: tuple[str, ...], file: str) -> list[str]:
    """The cells of a row. Raises TopologyError for one that means nothing."""
    words = lines[number].split()
    cells = words[1 : len(names) + 1]
    if len(cells) < len(names):
        raise TopologyError(f"{file}:{number + 1}: row {words[0]} has {len(cells)} cells for {len(names)} columns")
    for name, cell in zip(names, cells, strict=True):
        links = re.fullmatch(r"NV([1-9][0-9]{0,3})", cell)
        known = cell in NEAR or (links and int(links[1]) <= MOST_NVLINKS and "GPU" in name and "GPU" in words[0])
        if (cell == "X") != (name == words[0]) or not (known or cell == "X"):
            allowed = "X on the diagonal, elsewhere PIX, PXB, PHB, NODE, SYS, between GPUs NV#"
            raise TopologyError(f"{file}:{number + 1}: {words[0]} to {name} is {shown(cell)}; allowed: {allowed}")
    return cells


def _columns(line: str, count: int) -> tuple[str, str]:
    """CPU and NUMA affinity; empty where there is none."""
    fields = [field.strip() for field in line.split("\t")] if "\t" in line.strip() else line.split()
    cpus, numa = (["" if field == "N/A" else field for field in fields[count + 1 : count + 3]] + ["", ""])[:2]
    return cpus, numa


class _Sets:
    """Disjoint sets of names."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._above = {name: name for name in names}

    def of(self, name: str) -> str:
        """The first of a name's set."""
        while self._above[name] != name:
            self._above[name] = self._above[self._above[name]]
            name = self._above[name]
        return name

    def join(self, one: str, other: str) -> None:
        """Make two sets one."""
        one, other = self.of(one), self.of(other)
        if one != other:
            self._above[other] = one


def _clusters(found: Matrix) -> dict[int, _Sets]:
    """For each level the sets of what is at least so near. Raises TopologyError where the cells are no tree.

    Two GPUs on NVLink are taken as near as the text allows no nearer: through a third, or by one NUMA node for both.
    """
    clusters = {}
    sets = _Sets(found.names)
    pairs = list(combinations(found.names, 2))
    for level in (SWITCH, SWITCHES, ROOT):
        for one, other in pairs:
            if found.near(one, other) == level:
                sets.join(one, other)
        clusters[level] = sets
        for one, other in pairs:
            said = found.near(one, other)
            if said is not None and said > level and sets.of(one) == sets.of(other):
                raise TopologyError(
                    f"{found.file}:1: {one} and {other} are {found.cells[one, other]} apart, and what is between them is "
                    f"{WORD[level]} or nearer to both: that is no tree"
                )
        fresh = _Sets(found.names)
        for name in found.names:
            fresh.join(sets.of(name), name)
        sets = fresh
    for node in dict.fromkeys(found.numa.values()):
        clusters[ROOT] = _nearer(found, clusters[ROOT], [name for name in found.gpus if found.numa.get(name) == node])
    return clusters


def _nearer(found: Matrix, sets: _Sets, alike: list[str]) -> _Sets:
    """The sets with GPUs of one NUMA node in one, unless the cells say that they are not."""
    fresh = _Sets(found.names)
    for name in found.names:
        fresh.join(sets.of(name), name)
    for name in alike:
        fresh.join(alike[0], name)
    apart = (pair for pair in combinations(found.names, 2) if found.near(*pair) == SYSTEM)
    return sets if any(fresh.of(one) == fresh.of(other) for one, other in apart) else fresh


def read(text: str, file: str, fabric: str | None) -> Sketch:
    """The node that a matrix describes; `fabric` says whether equal NVLinks are a `switch` or a `mesh`. Raises TopologyError."""
    found = matrix(text, file)
    if len(found.gpus) > MOST_GPUS:
        raise TopologyError(f"{file}:1: more than {MOST_GPUS} GPUs")
    sketch = Sketch(title=PurePath(file).stem, what=WHAT)
    names = {}
    for name in found.names:
        if name in found.gpus:
            names[name] = sketch.add(Spot(name=f"bus {name}", kind="gpu", order=(int(name[3:]),), remark=name))
        else:
            said = found.legend.get(name, name)
            names[name] = sketch.add(Spot(name=named(said), kind="nic", remark=name if said != name else ""), said)
    if len(found.gpus) > 1 and not any(found.nvlinks(*pair) for pair in combinations(found.gpus, 2)):
        sketch.notes.append(
            "no NVLink in the matrix: the GPUs have none, or it is of `nvidia-smi topo -mp`, which leaves them out"
        )
    hidden = [pair for pair in combinations(found.gpus, 2) if found.near(*pair) is None]
    pairs = len(found.gpus) * (len(found.gpus) - 1) // 2
    if len(hidden) == pairs and pairs and len(found.gpus) == len(found.names):
        sketch.notes.append("all GPUs are on NVLink, which hides PCIe in this matrix: PCIe is left out")
    else:
        if hidden:
            sketch.notes.append(
                f"NVLink hides how near {len(hidden)} of {pairs} pairs of GPUs are on PCIe: "
                "they are put no nearer to each other than NICs, other GPUs and NUMA affinities of one node show"
            )
        _tree(found, sketch, names)
    _nvlink(found, sketch, names, fabric)
    return sketch


def _tree(found: Matrix, sketch: Sketch, names: dict[str, str]) -> None:
    """A root complex per set of NODE, a switch per set of PXB with several parts, and one per set of PIX with several."""
    clusters = _clusters(found)
    sketch.notes += _doubts(found, clusters)
    groups: dict[str, dict[str, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name in found.names:
        root, switches, switch = (clusters[level].of(name) for level in (ROOT, SWITCHES, SWITCH))
        groups[root][switches][switch].append(name)
    uplink = pcie(None, "", "uplink")
    for number, (first, inside) in enumerate(groups.items()):
        root = sketch.add(Spot(name=f"root-{number}", kind="root", remark=found.affinity[first]))
        for parts in inside.values():
            above = root
            if len(parts) > 1:
                above = _switch(sketch, root, uplink)
            for members in parts.values():
                port = _switch(sketch, above, uplink) if len(members) > 1 or len(parts) > 1 else above
                for name in members:
                    sketch.wire(names[name], port, pcie(None, "", "" if name in found.gpus else "nic"))


def _doubts(found: Matrix, clusters: dict[int, _Sets]) -> list[str]:
    """What a reader has to know of the tree."""
    notes = []
    for node in dict.fromkeys(found.numa.values()):
        if len({clusters[ROOT].of(name) for name in found.gpus if found.numa.get(name) == node}) > 1:
            notes.append(f"NUMA affinity {node} of several GPUs is not used: the cells put them farther apart")
    beside: dict[str, list[str]] = defaultdict(list)
    for name in found.names:
        beside[clusters[SWITCH].of(name)].append(name)
    ports = [" and ".join(nics[:4]) for nics in beside.values() if len(nics) > 1 and not set(nics) & set(found.gpus)]
    if ports:
        what = "NICs on one PCIe switch are NICs of their own here; the text does not say whether they are ports of one card"
        notes.append(f"{what}: {'; '.join(ports[:8])}")
    return notes


def _switch(sketch: Sketch, above: str, uplink: Cable) -> str:
    switch = sketch.add(Spot(name=f"switch-{sketch.count('switch')}", kind="switch"))
    sketch.wire(switch, above, uplink)
    return switch


def _nvlink(found: Matrix, sketch: Sketch, names: dict[str, str], fabric: str | None) -> None:
    """A cable per pair, or one per GPU to a switch. Raises TopologyError where the text leaves both open."""
    links = {pair: found.nvlinks(*pair) for pair in combinations(found.gpus, 2)}
    alike = len(set(links.values())) == 1 and all(links.values())
    if alike and len(found.gpus) > 2 and fabric is None:
        every = f"NV{next(iter(links.values()))}"
        raise TopologyError(
            f"{found.file}:1: {every} between all pairs of {len(found.gpus)} GPUs is an NVSwitch (each GPU has that many NVLinks "
            "in all) or a mesh (each pair has), and the text cannot tell: say --nvlink switch or --nvlink mesh"
        )
    if fabric == "switch" and not alike:
        raise TopologyError(f"{found.file}:1: --nvlink switch: not all pairs of GPUs have equally many NVLinks: this is a mesh")
    if fabric == "switch":
        count = next(iter(links.values()))
        switch = sketch.add(Spot(name="nvlink-switch", kind="fabric", remark="all NVSwitches as one"))
        for name in found.gpus:
            sketch.wire(names[name], switch, _lanes(count, "a GPU's"))
        return
    for (one, other), count in links.items():
        if count:
            sketch.wire(names[one], names[other], _lanes(count, "a pair's"))


def _lanes(count: int, whose: str) -> Cable:
    every = f"{whose} {count} NVLinks together, per direction: {count} x the bandwidth of one"
    return Cable(kind="nvlink", label=f"{count}", remark=every if count > 1 else "one NVLink, per direction")

"""The GPUs, as nvidia-smi tells of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Final, NamedTuple

from .finding import Finding, Status
from .python import same
from .system import Ran, System

FIELDS: Final = (
    "index",
    "name",
    "uuid",
    "pci.bus_id",
    "driver_version",
    "memory.total",
    "compute_cap",
    "compute_mode",
    "mig.mode.current",
    "ecc.mode.current",
    "clocks.sm",
    "clocks.max.sm",
)
"""Columns asked for; those that an old nvidia-smi does not know are left out."""
NEEDED: Final = 4
MOST_GPUS: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU. `facts` has every column as text, by the name of the field."""

    index: int
    uuid: str
    bus: str
    facts: dict[str, str]

    def __getitem__(self, name: str) -> str:
        """A column; ``unknown`` where nvidia-smi does not have it."""
        text = self.facts.get(name, "")
        return "unknown" if text in {"", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]"} else text


class Fault(NamedTuple):
    """Words in the output of nvidia-smi, how bad it is, and what to do."""

    words: str
    status: Status
    remedy: str


FAULTS: Final = (
    Fault(
        "Driver/library version mismatch",
        "wrong",
        "the driver was updated beneath the loaded module (`cat /proc/driver/nvidia/version`): reboot, or reload the module",
    ),
    Fault(
        "couldn't communicate with the NVIDIA driver",
        "wrong",
        "the driver is not loaded: `sudo modprobe nvidia`, then `sudo dmesg | grep NVRM`; in a container start it with its GPUs",
    ),
    Fault(
        "No devices were found",
        "note",
        "ask the scheduler (srun --gpus-per-node=N) or start the container with GPUs; else `sudo dmesg | grep -e NVRM -e Xid`",
    ),
    Fault("GPU is lost", "wrong", "reboot the host; `sudo dmesg | grep Xid` names the GPU and the fault"),
    Fault(
        "Unable to determine the device handle", "wrong", "a GPU does not answer: `sudo dmesg | grep Xid`, then reboot the host"
    ),
    Fault(
        "Failed to initialize NVML: Unknown Error",
        "wrong",
        "the process may not open the devices, as in a container whose control group was rewritten: start the container anew",
    ),
    Fault("Insufficient Permissions", "wrong", "the process may not open /dev/nvidia*: `ls -l /dev/nvidia*`; ask for access"),
)


class Seen(NamedTuple):
    """The GPUs, or why none are known; neither where there is no nvidia-smi."""

    gpus: tuple[Gpu, ...] = ()
    fault: Finding | None = None


def see(system: System) -> Seen:
    """Ask nvidia-smi."""
    path = system.which("nvidia-smi")
    if path is None:
        return Seen()
    fields = list(FIELDS)
    while True:
        ran = system.run(path, f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        unknown = re.search(r'Field "([^"]+)" is not a valid field', ran.stdout + ran.stderr)
        if unknown is None or unknown[1] not in fields[NEEDED:]:
            break
        fields.remove(unknown[1])
    if not ran.good:
        return Seen(fault=_fault(path, ran))
    return _parse(ran.stdout, fields)


def _fault(path: str, ran: Ran) -> Finding:
    text = ran.stdout + ran.stderr
    for words, status, remedy in FAULTS:
        if words in text:
            said = next(row for row in text.splitlines() if words in row)
            return Finding(subject="gpu", name="GPUs", fact=f"nvidia-smi: {said}", status=status, remedy=remedy)
    remedy = f"run `{path}` by hand; if it hangs or fails there too, `sudo dmesg | grep -e NVRM -e Xid` says why"
    return Finding(subject="gpu", name="GPUs", fact=f"nvidia-smi: {ran.said}", status="wrong", remedy=remedy)


def _parse(text: str, fields: list[str]) -> Seen:
    found = []
    lines = [row for row in text.splitlines() if row.strip()]
    for row in lines[:MOST_GPUS]:
        cells = [cell.strip() for cell in row.split(",")]
        facts = dict(zip(fields, cells, strict=False))
        if len(cells) != len(fields) or not (cells[0].isascii() and cells[0].isdigit()) or len(cells[0]) > 4:
            remedy = "run `nvidia-smi --query-gpu=index,name --format=csv` by hand: the output is none that ringsim can read"
            fact = f"nvidia-smi wrote {row[:80]!r} where {len(fields)} columns were asked for"
            return Seen(fault=Finding(subject="gpu", name="GPUs", fact=fact, status="wrong", remedy=remedy))
        found.append(Gpu(index=int(cells[0]), uuid=facts["uuid"], bus=facts["pci.bus_id"], facts=facts))
    return Seen(gpus=tuple(found))


def look(system: System) -> list[Finding]:
    """How many of which, driver, and the settings that matter."""
    seen = see(system)
    if seen.fault is not None:
        return [seen.fault]
    if not seen.gpus:
        return [_none(system)]
    kinds = Counter(f"{gpu['name']}, {gpu['memory.total']}, compute capability {gpu['compute_cap']}" for gpu in seen.gpus)
    fact = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    details = {"gpus": [gpu.facts for gpu in seen.gpus]}
    drivers = dict.fromkeys(gpu["driver_version"] for gpu in seen.gpus)
    return [
        Finding(subject="gpu", name="GPUs", fact=fact, differing="note", each="rank", details=details, remedy=same("GPUs")),
        Finding(subject="gpu", name="driver", fact=", ".join(drivers), differing="note", remedy="have one driver on all hosts"),
        *_settings(seen.gpus),
    ]


def _none(system: System) -> Finding:
    loaded = system.read("/proc/driver/nvidia/version")
    if loaded is None:
        return Finding(
            subject="gpu", name="GPUs", fact="none: no nvidia-smi on the PATH, no NVIDIA driver loaded", differing="note"
        )
    fact = f"the NVIDIA driver is loaded ({loaded.splitlines()[0]}), but there is no nvidia-smi on the PATH"
    remedy = "put nvidia-smi on the PATH (in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility)"
    return Finding(subject="gpu", name="GPUs", fact=fact, status="note", remedy=remedy)


class Setting(NamedTuple):
    """A column, the value that is as it should be, and what another means."""

    field: str
    name: str
    usual: str
    effect: str
    remedy: str


SETTINGS: Final = (
    Setting(
        "compute_mode",
        "compute mode",
        "Default",
        "one process or none may use a GPU: ranks cannot share it",
        "to share GPUs: sudo nvidia-smi -c DEFAULT, or start MPS",
    ),
    Setting(
        "mig.mode.current",
        "MIG",
        "Disabled",
        "a process sees one slice of a GPU, and slices do not reach each other",
        "for whole GPUs: sudo nvidia-smi -mig 0",
    ),
    Setting(
        "ecc.mode.current",
        "ECC",
        "Enabled",
        "memory errors go unseen",
        "sudo nvidia-smi -e 1, then reboot",
    ),
)


def _settings(gpus: tuple[Gpu, ...]) -> list[Finding]:
    found = []
    for field, name, usual, effect, remedy in SETTINGS:
        values = Counter(gpu[field] for gpu in gpus)
        if set(values) <= {usual, "unknown"}:
            fact = usual if usual in values else "not reported by these GPUs"
            found.append(Finding(subject="gpu", name=name, fact=fact, differing="note", remedy=remedy))
            continue
        odd = [f"{value} on GPU {_indices(gpus, field, value)}" for value in values if value not in {usual, "unknown"}]
        found.append(Finding(subject="gpu", name=name, fact=f"{', '.join(odd)}: {effect}", status="note", remedy=remedy))
    clocks = Counter(gpu["clocks.max.sm"] for gpu in gpus)
    fact = ", ".join(f"{value} at most" for value in clocks)
    found.append(Finding(subject="gpu", name="SM clock", fact=fact, details={"now": [gpu["clocks.sm"] for gpu in gpus]}))
    return found


def _indices(gpus: tuple[Gpu, ...], field: str, value: str) -> str:
    return ", ".join(str(gpu.index) for gpu in gpus if gpu[field] == value)


def visible(gpus: tuple[Gpu, ...], chosen: str | None) -> tuple[Gpu, ...]:
    """The GPUs that a process sees, in its order: `chosen` has numbers or beginnings of UUIDs, and counts up to the first bad."""
    if chosen is None:
        return gpus
    found: list[Gpu] = []
    for word in chosen.split(","):
        name = word.strip()
        fits = [
            gpu for gpu in gpus if name and (str(gpu.index) == name or (name.startswith("GPU-") and gpu.uuid.startswith(name)))
        ]
        if len(fits) != 1 or fits[0] in found:
            break
        found.append(fits[0])
    return tuple(found)

"""CuPy and the CUDA libraries that ringsim uses through it."""

from __future__ import annotations

import re
from typing import Any, Final

from . import answers, gpu
from .finding import Finding, Status
from .system import System

CUDA_13_DRIVER: Final = 580
"""The first driver branch for CUDA 13 (CUDA Toolkit release notes, minor version compatibility)."""


def look(system: System) -> list[Finding]:
    """CuPy and what it finds; where there is no GPU, what is missing is no fault."""
    seen = gpu.see(system)
    packages = sorted(name for name in system.packages() if re.fullmatch(r"cupy(-(cuda|rocm).*)?", name))
    facts = answers.read(system.ask("cuda_library"))
    found = _packages(packages)
    if "error" in facts:
        return [*found, _absent(facts, packages, seen)]
    return [*found, _cupy(facts, packages), *_devices(facts, seen), *_libraries(facts, needed=bool(seen.gpus), seen=seen)]


def extra(seen: gpu.Seen) -> str:
    """The extra of ringsim that fits a host's driver."""
    versions = [re.match(r"\d+", one["driver_version"]) for one in seen.gpus]
    newest = all(version is not None and int(version[0]) >= CUDA_13_DRIVER for version in versions)
    return f"pip install 'ringsim[gpu-cuda{13 if newest else 12}]'"


def _packages(packages: list[str]) -> list[Finding]:
    if len(packages) < 2:
        return []
    fact = f"{', '.join(packages)} are installed together: which is imported is chance"
    remedy = f"pip uninstall {' '.join(packages)}, then install one anew"
    return [Finding(subject="cuda", name="CuPy packages", fact=fact, status="wrong", remedy=remedy)]


def _absent(facts: dict[str, Any], packages: list[str], seen: gpu.Seen) -> Finding:
    if facts["error"] in {"ModuleNotFoundError", "ImportError"} and not packages:
        status: Status = "note" if seen.gpus else "ok"
        remedy = f"for --backend cupy: {extra(seen)}" if seen.gpus else ""
        return Finding(subject="cuda", name="CuPy", fact="not installed", status=status, remedy=remedy, differing="note")
    if facts["error"] == answers.SILENT:
        needed: Status = "wrong" if seen.gpus or seen.fault else "note"
        fact = f"importing and asking it came to nothing: {answers.text(facts, 'text')}"
        return Finding(subject="cuda", name="CuPy", fact=fact, status=needed, remedy=answers.by_hand("cuda_library"))
    fact = f"{', '.join(packages)} does not load: {facts['error']}: {answers.text(facts, 'text')}"
    return Finding(subject="cuda", name="CuPy", fact=fact, status="wrong", remedy=f"install it anew: {extra(seen)}")


def _cupy(facts: dict[str, Any], packages: list[str]) -> Finding:
    fact = f"{answers.text(facts, 'cupy')} ({', '.join(packages)}), CUDA runtime {cuda(facts.get('runtime'))}"
    return Finding(subject="cuda", name="CuPy", fact=fact, differing="note", details=facts)


def _devices(facts: dict[str, Any], seen: gpu.Seen) -> list[Finding]:
    """Whether CUDA runs on the GPUs that nvidia-smi lists."""
    devices, driver, runtime = (facts.get(name) for name in ("devices", "driver", "runtime"))
    if isinstance(driver, int) and isinstance(runtime, int) and driver and driver // 1000 < runtime // 1000:
        fact = f"the driver supports CUDA {cuda(driver)}, CuPy was built for CUDA {cuda(runtime)}"
        remedy = f"pip uninstall the cupy package, then {extra(seen)}; or have a newer driver installed"
        return [Finding(subject="cuda", name="driver for CUDA", fact=fact, status="wrong", remedy=remedy)]
    if isinstance(devices, list) and devices:
        fact = f"CuPy sees {len(devices)} GPU{'s' if len(devices) > 1 else ''}, driver for CUDA {cuda(driver)}"
        return [Finding(subject="cuda", name="driver for CUDA", fact=fact, differing="note")]
    why = facts.get("failed", {}).get("devices", "CUDA counts none")
    if not seen.gpus:
        return [Finding(subject="cuda", name="driver for CUDA", fact="CuPy sees no GPU", differing="note")]
    fact = f"nvidia-smi lists {len(seen.gpus)} GPUs, but CuPy sees none: {why}"
    remedy = "look at CUDA_VISIBLE_DEVICES and, in a container, that libcuda.so.1 of the host's driver is mounted"
    return [Finding(subject="cuda", name="driver for CUDA", fact=fact, status="wrong", remedy=remedy)]


def _libraries(facts: dict[str, Any], *, needed: bool, seen: gpu.Seen) -> list[Finding]:
    fused = "fused attention falls back on ringsim's own kernels"
    wanted = (
        ("NVRTC", "nvrtc", "nothing compiles", "wrong", extra(seen)),
        ("CUDA headers", "headers", "nothing compiles", "wrong", f"{extra(seen)}, or set CUDA_PATH to a CUDA toolkit"),
        ("cuDNN frontend", "cudnn_frontend", fused, "note", f"{extra(seen)}"),
        ("cuDNN", "cudnn", fused, "note", f"{extra(seen)}"),
        ("NCCL", "nccl", "--transport nccl cannot be used", "note", "pip install nvidia-nccl-cu13 (or -cu12, as CuPy)"),
    )
    found = []
    for name, key, effect, status, remedy in wanted:
        value = facts.get(key)
        if value is not None:
            found.append(Finding(subject="cuda", name=name, fact=_version(key, value), differing="note"))
            continue
        why = facts.get("failed", {}).get(key, "not there")
        if not needed:
            found.append(Finding(subject="cuda", name=name, fact=f"not there, and not needed without a GPU ({why})"))
            continue
        bad: Status = "wrong" if status == "wrong" else "note"
        found.append(Finding(subject="cuda", name=name, fact=f"{why}: {effect}", status=bad, remedy=remedy))
    return found


def cuda(version: Any) -> str:
    """13010 as 13.1."""
    return f"{version // 1000}.{version % 1000 // 10}" if isinstance(version, int) and version > 0 else "unknown"


def _version(key: str, value: Any) -> str:
    """NCCL writes 2.29.7 as 22907; cuDNN 9.13.0 as 91300."""
    if isinstance(value, int) and key in {"nccl", "cudnn"} and value >= 10000:
        return f"{value // 10000}.{value // 100 % 100}.{value % 100}"
    return str(value)

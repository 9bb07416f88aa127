"""A GPU's clocks as nvidia-smi reports them: a measurement depends on them, and CUDA does not say."""

from __future__ import annotations

import subprocess
from typing import Any, Final

FIELDS: Final = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "most_sm_mhz": "clocks.max.sm"}
DRIVER: Final = "driver_version"
TIMEOUT_S: Final = 5.0


def clocks_of(bus: str) -> dict[str, Any]:
    """Clocks, in MHz, and driver of the GPU at a PCI address; ``{"unknown": why}`` where nvidia-smi does not say."""
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join((*FIELDS.values(), DRIVER))}",
        "--format=csv,noheader,nounits",
        f"--id={bus}",
    ]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unknown": f"{type(error).__name__}: {error}"}
    *words, driver = (word.strip() for word in said.stdout.strip().split(","))
    if said.returncode or len(words) != len(FIELDS) or not all(word.isdecimal() for word in words):
        return {"unknown": f"nvidia-smi (exit {said.returncode}): {(said.stdout or said.stderr).strip()!r}"}
    return {DRIVER: driver} | dict(zip(FIELDS, map(int, words), strict=True))

"""What a program of this package answered, as JSON on its last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

from .system import Ran

SILENT: Final = "no answer"
"""The error of a program that failed, died or hung before it could say what it found."""


def by_hand(module: str) -> str:
    """What to do about one."""
    return f"run `python -m ringsim.doctor.{module}` by hand, or give it longer: ringsim doctor --timeout 120"


def tell(describe: Callable[[], dict[str, Any]]) -> None:
    """Write the facts of a program, or the type and text of what stood in the way."""
    try:
        facts = describe()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what is asked for
        facts = {"error": type(error).__name__, "text": str(error)}
    sys.stdout.write(json.dumps(facts) + "\n")


def read(ran: Ran) -> dict[str, Any]:
    """The facts; ``error`` and ``text`` where the program failed, died, hung, or wrote something else."""
    lines = ran.stdout.strip().splitlines()
    if not ran.good:
        return {"error": SILENT, "text": ran.said}
    try:
        facts = json.loads(lines[-1])
    except (IndexError, ValueError):
        facts = None
    if not isinstance(facts, dict):
        return {"error": SILENT, "text": f"its last line is no JSON object: {ran.stdout[-80:]!r}"}
    return facts


def text(facts: dict[str, Any], name: str) -> str:
    """A fact as text; empty where it is missing."""
    value = facts.get(name)
    return "" if value is None else str(value)

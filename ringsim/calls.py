"""Names with arguments as text: ``double-ring(8, stride=2)``. Masks, partitions and strategies are written so."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from .errors import WorkloadError

_CALL: Final = re.compile(r"\s*([a-z][a-z0-9-]*)\s*(?:\(([^()]*)\))?\s*")
_NAMED: Final = re.compile(r"([a-z][a-z_]*)\s*=\s*(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A name, the arguments in order, and those given by name; all as text."""

    name: str
    args: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)


def parse_call(text: str, what: str) -> Call:
    """`text` as a call; `what` (``strategy``, ...) names it in the WorkloadError raised if it is none."""
    match = _CALL.fullmatch(text)
    if match is None:
        raise WorkloadError(f"{what} {text!r} is not a name with arguments such as name or name(1, key=2)")
    args: list[str] = []
    named: dict[str, str] = {}
    words = [word.strip() for word in match[2].split(",")] if match[2] and match[2].strip() else []
    for word in words:
        pair = _NAMED.fullmatch(word)
        if not word or (pair is None and named) or (pair is not None and pair[1] in named):
            raise WorkloadError(f"{what} {text!r}: give arguments in order first, then each by name once")
        if pair is None:
            args.append(word)
        else:
            named[pair[1]] = pair[2].strip()
    return Call(match[1], tuple(args), named)

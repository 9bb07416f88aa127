"""`ringsim ...` in which one rank meets its fate.

    python faulty.py FATE RANK ringsim-arguments...

At its second attend, and again before it renames a file that it has written, each rank leaves a file `rank-R.attend` or
`rank-R.rename` in the working folder. There the fate awaits RANK: `attend:raise`, `attend:sleep`, `rename:sleep` or `none`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringsim.backends.numpy import NumpyBackend
from ringsim.cli.main import main
from ringsim.cli.session import launched_rank

FATE, FATED = sys.argv[1], int(sys.argv[2])


def meet(place: str) -> None:
    """Leave the mark and, if this is the rank and the place, do what must be done."""
    Path(f"rank-{launched_rank()}.{place}").touch()
    where, _, what = FATE.partition(":")
    if where == place and launched_rank() == FATED:
        if what == "raise":
            raise ArithmeticError("it failed on purpose")
        time.sleep(3600)


def before(place: str, original: Callable[..., Any], counts: Callable[..., bool], nth: int) -> Callable[..., Any]:
    """`original`, which meets the fate at its nth call that counts."""
    calls = 0

    def replacement(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if counts(*arguments):
            calls += 1
            if calls == nth:
                meet(place)
        return original(*arguments, **options)

    return replacement


if __name__ == "__main__":
    NumpyBackend.compute = before("attend", NumpyBackend.compute, lambda _, op, *__: op.kernel == "attend", 2)  # type: ignore[method-assign]
    Path.replace = before("rename", Path.replace, lambda *_: True, 1)  # type: ignore[method-assign]
    main(sys.argv[3:])

"""`ringsim ...` in which one rank meets its fate in the middle of the ring.

    python faulty.py ACTION RANK ringsim-arguments...

At the second attend every rank leaves a file `rank-R` in the working folder; then RANK raises, sleeps for ever, or, with the
action `go`, carries on like the others.
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

ATTEND = 2


def doomed(action: str, fated: int) -> Callable[..., None]:
    """NumpyBackend.compute with the fate built in."""
    compute, attends = NumpyBackend.compute, 0

    def replacement(self: NumpyBackend, op: Any, *arguments: Any, **options: Any) -> None:
        nonlocal attends
        attends += op.kernel == "attend"
        if attends == ATTEND and op.kernel == "attend":
            Path(f"rank-{launched_rank()}").touch()
            if launched_rank() == fated and action == "raise":
                raise ArithmeticError("the second attend failed on purpose")
            if launched_rank() == fated and action == "sleep":
                time.sleep(3600)
        compute(self, op, *arguments, **options)

    return replacement


if __name__ == "__main__":
    NumpyBackend.compute = doomed(sys.argv[1], int(sys.argv[2]))  # type: ignore[method-assign]
    main(sys.argv[3:])

"""Calls that do not fit together on all ranks; rank 0 prints as JSON what each rank raised and how many hops it had posted.

mpiexec -n RANKS python mismatch.py ODD-RANK
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import RingAttention, Workload, ring_attention, unshard
from ringsim.backends.mpi import MpiTransport

WORLD = MPI.COMM_WORLD
ODD = WORLD.rank == int(sys.argv[1])
ROWS = 4
# short: a mismatch that is not found before the first hop shows as a PeerTimeout
TIMEOUT_S = 4.0


def arrays(
    *, rows: int = ROWS, heads: int = 4, kv_heads: int = 2, width: int = 8, batch: int = 1, dtype: str = "float32"
) -> list[Any]:
    return [np.ones((batch, rows, count, width), dtype) for count in (heads, kv_heads, kv_heads)]


def called(given: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: ring_attention(*(given or arrays()), comm=WORLD, **({"timeout_s": TIMEOUT_S} | options))


def planned(**options: Any) -> Callable[[], Any]:
    """Make a plan; `workload` overrides fields of the workload."""
    fields = {"q_len": ROWS * WORLD.size, "heads": 4, "kv_heads": 2, "head_dim": 8} | options.pop("workload", {})
    return lambda: RingAttention(Workload(**fields), comm=WORLD, **({"timeout_s": TIMEOUT_S} | options))


def given(*shards: Any, **options: Any) -> Callable[[], Any]:
    """Call a good plan with these shards."""
    return lambda: planned()()(*shards, **options)


def gathered(x: Any) -> Callable[[], Any]:
    return lambda: unshard(x, comm=WORLD)


def read_only() -> Any:
    out = np.empty((1, ROWS, 4, 8), "float32")
    out.flags.writeable = False
    return out


# name: (what the odd rank does, what the others do)
CALL, PLAN = called(), given(*arrays())
CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "call: heads": (called(arrays(heads=2)), CALL),
    "call: kv_heads": (called(arrays(kv_heads=4)), CALL),
    "call: head_dim": (called(arrays(width=16)), CALL),
    "call: batch": (called(arrays(batch=2)), CALL),
    "call: dtype": (called(arrays(dtype="float64")), CALL),
    "call: dtype of no attention": (called(arrays(dtype="int32")), CALL),
    "call: rows": (called(arrays(rows=ROWS + 3)), CALL),
    "call: dimensions": (called([x[0] for x in arrays()]), CALL),
    "call: no array": (called([None] * 3), CALL),
    "call: q unlike k": (called([arrays()[0], *arrays(dtype="float64")[1:]]), CALL),
    "call: causal": (called(causal=True), CALL),
    "call: partition": (called(partition="zigzag"), CALL),
    "call: unknown partition": (called(partition="spiral"), CALL),
    "call: scale": (called(softmax_scale=0.5), CALL),
    "call: sync": (called(sync="step"), CALL),
    "call: strategy": (called(strategy="unknown"), CALL),
    "call: return_lse": (called(return_lse=True), CALL),
    "call: shape of out": (called(out=np.empty((1, 1, 4, 8), "float32")), CALL),
    "call: read-only out": (called(out=read_only()), CALL),
    "call: threads": (called(threads=0), CALL),
    "plan: length": (planned(workload={"q_len": 64}), planned()),
    "plan: dtype": (planned(workload={"dtype": "float16"}), planned()),
    "plan: partition": (planned(partition="striped"), planned()),
    "plan: sync": (planned(sync="step"), planned()),
    "plan: strategy": (planned(strategy="unknown"), planned()),
    "plan: threads": (planned(threads=0), planned()),
    "plan: wire dtype": (planned(workload={"wire_dtype": "float16"}), planned()),
    "planned call: shape": (given(*arrays(rows=ROWS + 1)), PLAN),
    "planned call: dtype": (given(*arrays(dtype="float64")), PLAN),
    "planned call: no array": (given(None, None, None), PLAN),
    "planned call: out": (given(*arrays(), out=np.empty(3)), PLAN),
    "planned call: check": (lambda: planned(check=False)()(*arrays()), PLAN),
    "unshard: rows": (gathered(np.ones((1, 9, 2))), gathered(np.ones((1, 4, 2)))),
    "unshard: width": (gathered(np.ones((1, 4, 3))), gathered(np.ones((1, 4, 2)))),
    "unshard: dimensions": (gathered(np.ones((1, 4))), gathered(np.ones((1, 4, 2)))),
    "unshard: dtype": (gathered(np.ones((1, 4, 2), "float32")), gathered(np.ones((1, 4, 2)))),
}


def counting_hops() -> list[int]:
    """Makes MpiTransport count the messages that it posts."""
    posted = [0]
    for name in ("isend", "irecv"):

        def post(self: MpiTransport, *message: Any, original: Any = getattr(MpiTransport, name)) -> Any:  # noqa: B008 - binds this turn's
            posted[0] += 1
            return original(self, *message)

        setattr(MpiTransport, name, post)
    return posted


def raised(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - it is what the test asserts
        return type(error).__name__, str(error)
    return "nothing", ""


def main() -> None:
    posted, report = counting_hops(), {}
    for name, (odd, others) in CASES.items():
        posted[0] = 0
        said = WORLD.gather((*raised(odd if ODD else others), posted[0]))
        report[name] = [dict(zip(("error", "message", "posted"), entry, strict=True)) for entry in said or ()]
    if WORLD.rank == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

"""A sample of every strategy under every kind of partition, mask and dtype over MPI: dense float64 and the bits of loopback.

mpiexec -n RANKS python family.py; rank 0 prints what it tried and the faults as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import product
from random import Random
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import BlockSparse, Causal, Documents, First, Full, PrefixLM, RingAttention, Schedule, Window, Workload
from ringsim.backends.mpi import MpiTransport
from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import numpy_dtype
from ringsim.errors import WorkloadError
from ringsim.execution import Rank, execute
from ringsim.reference import dense_attention
from ringsim.schedule.registry import STRATEGIES

WORLD = MPI.COMM_WORLD
DTYPES = ("float64", "float32", "float16", "bfloat16")
PARTITIONS = ("contiguous", "striped", "zigzag", "weighted", "weighted zigzag", "runs", "balanced")
MASKS = ("full", "causal", "window", "documents", "prefix", "first", "blocks", "and", "or", "not")
LIMITS = {"float64": 1e-12, "float32": 2e-6}
LSE_LIMIT = {"float64": 1e-12}
EACH = 4
TIMEOUT_S = 30.0


def texts(name: str) -> list[str]:
    """Every way to write a strategy that this world allows."""
    parameters = STRATEGIES[name].parameters
    needed = sum(parameter.default is parameter.empty for parameter in parameters)
    found = []
    for count in range(needed, len(parameters) + 1):
        for arguments in product(range(1, 1 + max(2, WORLD.size)), repeat=count):
            text = f"{name}({', '.join(map(str, arguments))})" if arguments else name
            try:
                found.append(Schedule(workload=Workload(q_len=1, heads=4), world_size=WORLD.size, strategy=text).strategy)
            except WorkloadError:
                continue
    return list(dict.fromkeys(found))


def mask_of(kind: str, tokens: int, random: Random) -> Any:
    if kind in ("and", "or", "not"):
        one, other = (mask_of(random.choice(MASKS[:7]), tokens, random) for _ in range(2))
        return {"and": one & other, "or": one | other, "not": ~(one & other)}[kind]
    count = random.randint(0, tokens)
    ends = np.minimum(np.cumsum([0, *(random.randint(0, 20) for _ in range(8))]), tokens)
    blocks = np.random.default_rng(random.randint(0, 99)).random((-(-tokens // 6), -(-tokens // 9))) < 0.4
    return {
        "full": Full(),
        "causal": Causal(),
        "window": Window(random.randint(0, 20), random.choice((None, 0, 7))),
        "documents": Documents(np.diff(ends)),
        "prefix": PrefixLM(count),
        "first": First(count),
        "blocks": BlockSparse(blocks, 6, 9),
    }[kind]


def partition_of(kind: str, q_len: int, random: Random) -> str:
    if kind.startswith("weighted"):
        weights = [random.randint(0, 4) for _ in range(WORLD.size)]
        weights[random.randrange(WORLD.size)] = 5
        return f"{'zigzag' if 'zigzag' in kind else 'contiguous'}({','.join(map(str, weights))})"
    if kind == "runs":
        counts = np.diff([0, *sorted(random.randint(0, q_len) for _ in range(6)), q_len])
        return f"runs({','.join(f'{random.randrange(WORLD.size)}:{count}' for count in counts)})"
    return kind


def workload_of(mask: str, dtype: str, random: Random) -> Workload:
    q_len = random.choice((0, WORLD.size - 1, 23, 41, 61))
    kv_len, q_offset, kv_offset = random.choice(((q_len, 0, 0), (q_len, 3, 3), (37, 4, 0), (5, 0, 2), (0, 0, 0)))
    batch, kv_heads = random.choice((1, 2, 3)), random.choice((4, 5))
    longest = max(q_len, kv_len)
    return Workload(
        q_len=q_len,
        kv_len=kv_len,
        q_offset=q_offset,
        kv_offset=kv_offset,
        batch=batch,
        heads=kv_heads * random.choice((1, 2, 3)),
        kv_heads=kv_heads,
        head_dim=random.choice((3, 8)),
        v_head_dim=random.choice((5, 8)),
        dtype=dtype,
        mask=mask_of(mask, max(q_len + q_offset, kv_len + kv_offset), random),
        lengths=random.choice((None, tuple(random.randint(0, longest) for _ in range(batch)))),
    )


def cases(name: str, turn: int) -> Any:
    """(partition, mask, dtype, schedule): each kind of each comes in its turn, what else there is by the dice."""
    random, written = Random(f"{name} on {WORLD.size}"), texts(name)
    for index in range(EACH if written else 0):
        place = turn * EACH + index + WORLD.size
        partition, mask, dtype = (kinds[place % len(kinds)] for kinds in (PARTITIONS, MASKS, DTYPES))
        work = workload_of(mask, dtype, random)
        schedule = Schedule(
            workload=work,
            world_size=WORLD.size,
            partition=partition_of(partition, work.q_len, random),
            strategy=written[index % len(written)],
            sync=random.choice(("free", "free", "step")),
            max_message_nbytes=random.choice((2**31 - 1, 2**31 - 1, 100, 33)),
        )
        yield partition, mask, dtype, schedule


def arrays_of(work: Workload) -> list[Any]:
    rng = np.random.default_rng(7)
    sides = ((work.q_len, work.heads, work.head_dim), (work.kv_len, work.kv_heads, work.head_dim))
    shapes = [(work.batch, *side) for side in (*sides, (work.kv_len, work.kv_heads, work.v_head_dim))]
    return [rng.standard_normal(shape).astype(numpy_dtype(work.dtype)) for shape in shapes]


def over_mpi(schedule: Schedule, transport: MpiTransport, shards: list[Any]) -> list[tuple[Any, Any]]:
    """Out and lse of two runs: of a plan, or of the executor below it where messages are cut."""
    if schedule.max_message_nbytes == 2**31 - 1:
        options = {"partition": schedule.partition, "strategy": schedule.strategy, "sync": schedule.sync}
        plan = RingAttention(schedule.workload, comm=transport, **options, threads=1, timeout_s=TIMEOUT_S)
        return [plan.with_lse(*shards) for _ in range(2)]
    rank = Rank(schedule, transport, NumpyBackend(), timeout_s=TIMEOUT_S)
    runs = []
    for _ in range(2):
        out = np.full(rank.shapes()["out"], np.nan).astype(shards[0].dtype)
        runs.append((out, rank.run(*shards, out)))
    return runs


def answer_of(schedule: Schedule) -> tuple[Any, Any, Any, Any, float]:
    """Out and lse of loopback, out and lse of dense float64, and how far from the last the first may be."""
    work = schedule.workload
    arrays = arrays_of(work)
    single = execute(schedule, *arrays)
    exact, exact_lse = dense_attention(work, *arrays)
    once = dense_attention(work, *arrays, dtype="float32")[0].astype(arrays[0].dtype).astype(np.float64)
    rule = 2.5 * float(np.max(np.abs(once - exact), initial=0)) + 2e-3
    return single.out, single.lse, exact, exact_lse, LIMITS.get(work.dtype, rule)


def fault_of(schedule: Schedule, transport: MpiTransport, answer: tuple[Any, Any, Any, Any, float]) -> str | None:
    """What is wrong with this rank's rows, or None."""
    work, job, rank = schedule.workload, schedule.job, WORLD.rank
    q, k, v = arrays_of(work)
    rows, keys = job.q_partition.positions(rank), job.kv_partition.positions(rank)
    runs = over_mpi(schedule, transport, [q[:, rows], k[:, keys], v[:, keys]])
    (out, lse), again = runs
    if not all(one.tobytes() == other.tobytes() for one, other in zip(runs[0], again, strict=True)):
        return "the second run differs from the first"
    single_out, single_lse, exact, exact_lse, limit = answer
    if out.tobytes() != single_out[:, rows].tobytes() or lse.tobytes() != single_lse[:, :, rows].tobytes():
        return "other bits than those of loopback"
    error = float(np.max(np.abs(out.astype(np.float64) - exact[:, rows]), initial=0))
    if not error <= limit:
        return f"out is off by {error:.2e}, limit {limit:.2e}"
    if not np.allclose(lse, exact_lse[:, :, rows], rtol=0, atol=LSE_LIMIT.get(work.dtype, 1e-5)):
        return "lse is wrong"
    return None


def main() -> None:
    transport = MpiTransport(WORLD, timeout_s=TIMEOUT_S)
    chosen = [(name, *case) for turn, name in enumerate(sorted(STRATEGIES)) for case in cases(name, turn)]
    mine = {index: answer_of(case[-1]) for index, case in enumerate(chosen) if index % WORLD.size == WORLD.rank}
    answers = {index: answer for some in WORLD.allgather(mine) for index, answer in some.items()}
    faults, tried = [], Counter()
    for index, (name, partition, mask, dtype, schedule) in enumerate(chosen):
        tried.update((f"strategy {name}", f"partition {partition}", f"mask {mask}", f"dtype {dtype}"))
        if fault := fault_of(schedule, transport, answers[index]):
            what = f"{schedule.strategy}, {schedule.partition}, {schedule.sync}, {schedule.max_message_nbytes} B"
            faults.append(f"rank {WORLD.rank}: {what}, {schedule.workload}: {fault}")
    every = WORLD.gather((tried, faults))
    transport.close()
    if every is not None:
        print(json.dumps({"tried": [dict(tried) for tried, _ in every], "faults": [f for _, some in every for f in some]}))


if __name__ == "__main__":
    main()

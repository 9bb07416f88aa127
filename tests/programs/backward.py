"""Gradients over MPI: dense float64 ones, the bits of loopback, every way to call, and what is said where ranks differ.

mpiexec -n RANKS python backward.py; rank 0 prints what it tried and the faults as JSON.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from family import TIMEOUT_S, WORLD, arrays_of, cases
from mpi4py import MPI

from ringsim import Causal, RingAttention, Schedule, Workload, ring_attention, ring_attention_backward, shard
from ringsim.backends.mpi import MpiTransport
from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import numpy_dtype
from ringsim.execution import Rank, execute
from ringsim.reference import dense_backward
from ringsim.schedule.registry import STRATEGIES

EACH = 2
"""Cases of each strategy."""
ERROR = {"float64": 1e-10, "float32": 2e-5, "float16": 16 * 2.0**-11, "bfloat16": 16 * 2.0**-8}
"""Of the largest gradient: of half precisions 16 units, as out is rounded before it is used; the bits are loopback's anyhow."""
WHOLE, CHUNK = 2**31 - 1, 999
"""Messages are whole, or cut: of sums there are many bytes, and a chunk costs a rank without a core of its own a turn."""
MESSAGE_S = 4.0
"""Short: a mismatch that is not found before the first hop shows as a PeerTimeout."""
Fault = str | None


def dout_of(work: Workload) -> Any:
    shape = (work.batch, work.q_len, work.heads, work.v_head_dim)
    return np.random.default_rng(11).standard_normal(shape).astype(numpy_dtype(work.dtype))


def of_pass(schedule: Schedule, pass_: str) -> Schedule:
    return replace(schedule, workload=replace(schedule.workload, pass_=pass_))


def same_bits(one: Any, other: Any) -> bool:
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


# a sample of the family


def over_mpi(schedule: Schedule, transport: MpiTransport, shards: list[Any]) -> tuple[Any, Any]:
    """Gradients of two runs: of a plan, or of the executor below it where messages are cut."""
    if schedule.max_message_nbytes == WHOLE:
        options = {"partition": schedule.partition, "strategy": schedule.strategy, "sync": schedule.sync}
        plan = RingAttention(schedule.workload, comm=transport, **options, threads=1, timeout_s=TIMEOUT_S)
        plan(*shards[:3])
        return plan.backward(shards[3]), plan.both(*shards)[1:]
    ranks = {p: Rank(of_pass(schedule, p), transport, NumpyBackend(), timeout_s=TIMEOUT_S) for p in ("forward", "backward")}
    out = np.empty(ranks["forward"].shapes()["out"], numpy_dtype(schedule.workload.dtype))
    lse = ranks["forward"].run(*shards[:3], out)
    runs = []
    for _ in range(2):
        made = [np.full(x.shape, np.nan).astype(x.dtype) for x in shards[:3]]
        ranks["backward"].run(*shards[:3], out, lse, shards[3], *made)
        runs.append(tuple(made))
    return runs[0], runs[1]


def answer_of(schedule: Schedule) -> tuple[Any, Any]:
    """The gradients of loopback and of dense float64."""
    work, arrays = schedule.workload, arrays_of(schedule.workload)
    single = execute(of_pass(schedule, "both"), *arrays, dout=dout_of(work))
    return (single.dq, single.dk, single.dv), dense_backward(work, dout_of(work), *arrays)


def fault_of(schedule: Schedule, transport: MpiTransport, answer: tuple[Any, Any]) -> Fault:
    """What is wrong with this rank's rows, or None."""
    work, job = schedule.workload, schedule.job
    sides = [side.positions(WORLD.rank) for side in (job.q_partition, job.kv_partition, job.kv_partition, job.q_partition)]
    shards = [array[:, rows] for array, rows in zip((*arrays_of(work), dout_of(work)), sides, strict=True)]
    first, second = over_mpi(schedule, transport, shards)
    if not same_bits(first, second):
        return "the second run differs from the first"
    if not same_bits(first, [whole[:, rows] for whole, rows in zip(answer[0], sides, strict=False)]):
        return "other bits than those of loopback"
    for name, found, exact, rows in zip(("dq", "dk", "dv"), first, answer[1], sides, strict=False):
        error = float(np.max(np.abs(found.astype(np.float64) - exact[:, rows]), initial=0))
        limit = ERROR[work.dtype] * max(1.0, float(np.max(np.abs(exact), initial=0)))
        if not error <= limit:
            return f"{name} is off by {error:.2e}, limit {limit:.2e}"
    return None


def family(transport: MpiTransport, tried: Counter[str]) -> Iterator[Fault]:
    names = sorted(name for name, known in STRATEGIES.items() if known.backward is not None)
    chosen = [(name, *case) for turn, name in enumerate(names) for case in islice(cases(name, turn), EACH)]
    mine = {index: answer_of(case[-1]) for index, case in enumerate(chosen) if index % WORLD.size == WORLD.rank}
    answers = {index: answer for some in WORLD.allgather(mine) for index, answer in some.items()}
    for index, (name, partition, mask, dtype, schedule) in enumerate(chosen):
        tried.update((f"strategy {name}", f"partition {partition}", f"mask {mask}", f"dtype {dtype}"))
        what = f"{schedule.strategy}, {schedule.partition}, {schedule.sync}"
        some = replace(schedule, max_message_nbytes=WHOLE if schedule.max_message_nbytes == WHOLE else CHUNK)
        fault = fault_of(some, transport, answers[index])
        yield fault and f"{what}, {schedule.workload}: {fault}"


# every way to call


class Layer:
    """A workload with its inputs, this rank's shards of them, and its dense gradients."""

    def __init__(self, comm: Any, seed: int = 0, partition: str = "zigzag", **options: Any) -> None:
        self.work = Workload(**({"q_len": 37, "batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mask": Causal()} | options))
        rng, work = np.random.default_rng(seed), self.work
        tokens = (work.batch, work.q_len)
        shapes = [(*tokens, heads, work.head_dim) for heads in (work.heads, work.kv_heads, work.kv_heads, work.heads)]
        whole = [rng.standard_normal(shape).astype(work.dtype) for shape in shapes]
        self.shards = [shard(x, comm=comm, partition=partition) for x in whole]
        exact = dense_backward(work, whole[3], *whole[:3])
        self.exact = [shard(x, comm=comm, partition=partition) for x in exact]
        self.largest = max(float(np.abs(x).max()) for x in exact)

    def fault(self, found: Any, what: str) -> Fault:
        error = max(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(found, self.exact, strict=True))
        return None if error <= 2e-5 * self.largest else f"{what}: off by {error:.2e}"


def layers(comm: Any) -> Iterator[Fault]:
    """One plan serves two layers, back from the last to the first."""
    some = [Layer(comm, seed) for seed in range(2)]
    with RingAttention(some[0].work, comm=comm, partition="zigzag", threads=1, timeout_s=TIMEOUT_S) as plan:
        kept = []
        for layer in some:
            plan(*layer.shards[:3])
            kept.append(plan.saved)
        yield some[1].fault(plan.backward(some[1].shards[3]), "the last call")
        yield some[0].fault(plan.backward(some[0].shards[3], kept[0]), "the call before")
        yield some[0].fault(plan.both(*some[0].shards)[1:], "one program")
        kinds = {event.kind for event in plan.timeline().events}
        yield None if {"attend", "attend_backward"} <= kinds else "the timeline is not that of the last pass"


def called(comm: Any, **options: Any) -> Iterator[Fault]:
    """ring_attention_backward; a color's ring has a length of its own."""
    layer = Layer(comm, **options)
    q, k, v, dout = layer.shards
    common: dict[str, Any] = {"comm": comm, "partition": "zigzag", "causal": True, "timeout_s": TIMEOUT_S}
    out, lse = ring_attention(q, k, v, **common, return_lse=True)
    for strategy in ("ring", "burst"):
        found = ring_attention_backward(dout, q, k, v, out, lse, **common, strategy=strategy)
        yield layer.fault(found, f"ring_attention_backward, {strategy}")


def library(_: MpiTransport, tried: Counter[str]) -> Iterator[Fault]:
    for name, color, key in (("world", 0, 0), ("two rings at once", WORLD.rank % 2, WORLD.rank), ("in reverse", 0, -WORLD.rank)):
        comm = WORLD.Split(color, key)
        tried[f"library {name}"] += 1
        yield from (fault and f"{name}: {fault}" for fault in layers(comm))
        yield from (fault and f"{name}: {fault}" for fault in called(comm, q_len=17 + 6 * color))
        comm.Free()
    tried["library self"] += 1
    yield from called(MPI.COMM_SELF)


# ranks that differ


def wrong(plan: RingAttention, dout: Any) -> dict[str, Callable[[], Any]]:
    """What the last rank does, while all others go back."""
    saved = plan.saved
    if saved is None:
        return {}

    def forgotten() -> Any:
        plan.saved = None
        try:
            return plan.backward(dout)
        finally:
            plan.saved = saved

    return {
        "shape of dout": lambda: plan.backward(dout[:, :1]),
        "dtype of dout": lambda: plan.backward(dout.astype("float64")),
        "no dout": lambda: plan.backward(None),
        "no call": forgotten,
        "shape of lse": lambda: plan.backward(dout, saved._replace(lse=saved.lse[:, :1])),
        "dtype of lse": lambda: plan.backward(dout, saved._replace(lse=saved.lse.astype("float64"))),
        "dk over k": lambda: plan.backward(dout, dk=saved.k),
        "shape of dq": lambda: plan.backward(dout, dq=np.empty(3)),
        "another call": lambda: ring_attention_backward(
            dout.astype("float16"), *saved, comm=plan._transport, causal=True, timeout_s=MESSAGE_S
        ),
    }


def differing(transport: MpiTransport, tried: Counter[str]) -> Iterator[Fault]:
    """Each is told on all ranks before the first hop, and the plan goes on as if nothing had been."""
    layer, odd = Layer(transport, q_len=9 * WORLD.size, partition="contiguous"), WORLD.size - 1
    plan = RingAttention(layer.work, comm=transport, threads=1, timeout_s=MESSAGE_S)
    plan(*layer.shards[:3])
    dout, saved = layer.shards[3], plan.saved
    everyone = {"another call": lambda: ring_attention_backward(dout, *saved, comm=transport, causal=True, timeout_s=MESSAGE_S)}
    for name, mine in wrong(plan, dout).items():
        tried[f"differing {name}"] += 1
        call = mine if odd == WORLD.rank else everyone.get(name, lambda: plan.backward(dout))
        try:
            call()
            said = ("nothing", "")
        except Exception as error:  # noqa: BLE001 - it is what the test asserts
            said = (type(error).__name__, str(error))
        good = said[0] == "RankMismatch" and f"rank {odd}" in said[1]
        yield None if good else f"{name}: raised {said}"
        yield layer.fault(plan.backward(dout), f"after {name}")


def main() -> None:
    transport = MpiTransport(WORLD, timeout_s=TIMEOUT_S)
    tried: Counter[str] = Counter()
    faults = []
    for group in (family, library, differing):
        faults += [f"rank {WORLD.rank}: {fault}" for fault in group(transport, tried) if fault]
    every = WORLD.gather((tried, faults))
    transport.close()
    if every is not None:
        print(json.dumps({"tried": [dict(tried) for tried, _ in every], "faults": [f for _, some in every for f in some]}))


if __name__ == "__main__":
    main()

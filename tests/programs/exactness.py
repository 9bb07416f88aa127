"""Compares the ring over MPI with dense float64 attention in every way it can be called; rank 0 prints the faults as JSON.

mpiexec -n RANKS python exactness.py
"""

from __future__ import annotations

import array
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from ringsim import Causal, Full, RingAttention, Schedule, Workload, inputs, ring_attention, shard, unshard
from ringsim.backends.mpi import MpiTransport
from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import numpy_dtype
from ringsim.errors import RingsimError
from ringsim.execution import Rank
from ringsim.reference import dense_attention

WORLD = MPI.COMM_WORLD
PARTITIONS = ("contiguous", "striped", "zigzag")
MASKS = (Full(), Causal())
DTYPES = ("float64", "float32", "float16", "bfloat16")
LIMITS = {"float64": 1e-12, "float32": 2e-6}
# the least leaves ranks without a token, 7 leaves some with one more than others, 131 is prime
LENGTHS = (1, 7, 131) if WORLD.size < 4 else (3, 131)
TIMEOUT_S = 30.0
Fault = str | None
Case = tuple[str, Callable[[], Fault]]


class Problem:
    """A workload with its global inputs and the dense answer to them."""

    def __init__(self, **options: Any) -> None:
        self.workload = Workload(**options)
        everything = (self.workload.q_len, self.workload.kv_len, self.workload.kv_len)
        pairs = zip("qkv", everything, strict=True)
        self.q, self.k, self.v = (inputs.rows(self.workload, name, np.arange(length), 5) for name, length in pairs)
        self.out, self.lse = dense_attention(self.workload, self.q, self.k, self.v)

    def shards(self, partition: str, comm: Any = WORLD) -> list[Any]:
        return [shard(x, comm=comm, partition=partition) for x in (self.q, self.k, self.v)]

    def fault(self, out: Any, lse: Any, partition: str, comm: Any = WORLD) -> Fault:
        """What is wrong with this rank's rows, or None."""
        expected = shard(self.out, comm=comm, partition=partition)
        found = np.asarray(out)
        if found.shape != expected.shape or found.dtype != numpy_dtype(self.workload.dtype):
            return f"out is {found.dtype}{found.shape}, expected {self.workload.dtype}{expected.shape}"
        rounded = self.out.astype(found.dtype).astype(np.float64)
        rule = 2.5 * float(np.max(np.abs(rounded - self.out), initial=0)) + 2e-3
        limit = LIMITS.get(self.workload.dtype, rule)
        error = float(np.max(np.abs(found.astype(np.float64) - expected), initial=0))
        if not error <= limit:
            return f"out is off by {error:.2e}, limit {limit:.2e}"
        return None if lse is None else self._lse_fault(lse, partition, comm)

    def _lse_fault(self, lse: Any, partition: str, comm: Any) -> Fault:
        expected = shard(self.lse, comm=comm, partition=partition, axis=2)
        seen = expected != -np.inf
        error = float(np.max(np.abs(lse[seen] - expected[seen]), initial=0)) if lse.shape == expected.shape else np.nan
        # lse is that of the partials, float32 for the half precisions too, and grows with the length: relative to 8 here
        limit = 8 * (1e-12 if self.workload.dtype == "float64" else 1e-6)
        good = error <= limit and np.all(lse[~seen] == -np.inf)
        return None if good else f"lse{lse.shape} is off by {error:.2e}, limit {limit:.2e}, expected {expected.shape}"


def matrix(transport: MpiTransport) -> Iterator[Case]:
    """Every partition, mask, grouping, dtype, length and sync, by a plan that runs twice."""
    for mask, kv_heads, dtype, length in itertools.product(MASKS, (1, 4), DTYPES, LENGTHS):
        problem = Problem(q_len=length, batch=2, heads=4, kv_heads=kv_heads, head_dim=16, dtype=dtype, mask=mask)
        # a barrier between rounds does not depend on the dtype
        for partition, sync in itertools.product(PARTITIONS, ("free", "step") if dtype == "float32" else ("free",)):
            name = f"{mask.name} {partition} kv_heads {kv_heads} {dtype} length {length} sync {sync}"
            yield name, lambda p=problem, kind=partition, sync=sync: planned(p, transport, kind, sync)


def shapes(transport: MpiTransport) -> Iterator[Case]:
    """Fewer keys than queries, more, none; unequal widths; a decode step; no token at all; several micro-tiles."""
    common = {"heads": 2, "head_dim": 8, "dtype": "float64"}
    unusual = {
        "more keys than queries": {"q_len": 5, "kv_len": 23},
        "fewer keys than queries": {"q_len": 23, "kv_len": 5},
        "no key": {"q_len": 9, "kv_len": 0},
        "no query": {"q_len": 0, "kv_len": 9},
        "nothing": {"q_len": 0},
        "no sequence": {"q_len": 9, "batch": 0},
        "wide values": {"q_len": 11, "v_head_dim": 24},
        "narrow values": {"q_len": 11, "v_head_dim": 3},
        "decode step": {"q_len": 1, "kv_len": 33, "q_offset": 32, "mask": Causal()},
        "cached context": {"q_len": 10, "kv_len": 33, "q_offset": 23, "mask": Causal()},
        "softmax scale": {"q_len": 11, "softmax_scale": 3.0},
        "several micro-tiles": {"q_len": 1601, "mask": Causal(), "dtype": "float32"},
    }
    for name, options in unusual.items():
        problem = Problem(**(common | options))
        for partition in PARTITIONS:
            yield f"{name} {partition}", lambda p=problem, kind=partition: planned(p, transport, kind, "free")


def planned(problem: Problem, comm: Any, partition: str, sync: str) -> Fault:
    plan = RingAttention(problem.workload, comm=comm, partition=partition, sync=sync, threads=1, timeout_s=TIMEOUT_S)
    arrays = problem.shards(partition)
    out, lse = plan.with_lse(*arrays)
    again = plan.with_lse(*arrays)
    if not (same_bits(out, again[0]) and same_bits(lse, again[1])):
        return "the plan's second run differs from its first"
    return problem.fault(out, lse, partition)


def same_bits(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def chunks(transport: MpiTransport) -> Iterator[Case]:
    """Hops that are cut into messages of a few bytes, in the middle of a number too."""
    for dtype, most in itertools.product(DTYPES, (9, 40, 200)):
        problem = Problem(q_len=13, heads=2, kv_heads=1, head_dim=4, dtype=dtype, mask=Causal())
        for partition, sync in itertools.product(PARTITIONS, ("free", "step")):
            name = f"{dtype} {partition} sync {sync} at most {most} B"
            yield name, lambda p=problem, kind=partition, sync=sync, most=most: chunked(p, transport, kind, sync, most)


def chunked(problem: Problem, transport: MpiTransport, partition: str, sync: str, most: int) -> Fault:
    whole, cut = (
        Rank(
            Schedule(workload=problem.workload, world_size=transport.world_size, partition=partition, sync=sync, **options),
            transport,
            NumpyBackend(),
            timeout_s=TIMEOUT_S,
        )
        for options in ({}, {"max_message_nbytes": most})
    )
    arrays = problem.shards(partition)
    first, second = (np.empty(whole.shapes()["out"], problem.q.dtype) for _ in range(2))
    lse = cut.run(*arrays, first)
    whole.run(*arrays, second)
    if not same_bits(first, second):
        return "messages in chunks give other numbers than whole ones"
    return problem.fault(first, lse, partition)


def library(_: MpiTransport) -> Iterator[Case]:
    """ring_attention, plans and shard/unshard on COMM_WORLD and on communicators made from it."""
    problem = Problem(q_len=29, batch=2, heads=4, kv_heads=2, head_dim=8, mask=Causal())
    for partition in PARTITIONS:
        yield f"world {partition}", lambda kind=partition: called(problem, WORLD, kind)
        yield f"self {partition}", lambda kind=partition: called(problem, MPI.COMM_SELF, kind)
        yield f"two rings at once {partition}", lambda kind=partition: split(kind, WORLD.rank % 2, WORLD.rank)
        yield f"ranks in reverse {partition}", lambda kind=partition: split(kind, 0, -WORLD.rank)
        yield f"context {partition}", lambda kind=partition: in_context(problem, kind)
    yield "no communicator", lambda: called(problem, None, "contiguous")


def called(problem: Problem, comm: Any, partition: str) -> Fault:
    arrays = problem.shards(partition, comm)
    options = {"comm": comm, "partition": partition, "causal": problem.workload.causal, "timeout_s": TIMEOUT_S}
    out, lse = ring_attention(*arrays, **options, return_lse=True)
    if not same_bits(out, ring_attention(*arrays, **options)):
        return "without return_lse the output differs"
    whole = unshard(out, comm=comm, partition=partition)
    if not same_bits(shard(whole, comm=comm, partition=partition), out):
        return "shard does not reverse unshard"
    if not np.max(np.abs(whole - problem.out)) <= LIMITS["float32"]:
        return "unshard puts rows in the wrong places"
    return problem.fault(out, lse, partition, comm)


def split(partition: str, color: int, key: int) -> Fault:
    """Rings that share nothing but the moment: each has a length, a mask and a number of calls of its own."""
    comm = WORLD.Split(color, key)
    problem = Problem(q_len=17 + 6 * color, heads=2, head_dim=8, mask=MASKS[color])
    found = next(filter(None, (called(problem, comm, partition) for _ in range(1 + color))), None)
    comm.Free()
    return found


def in_context(problem: Problem, partition: str) -> Fault:
    arrays = problem.shards(partition)
    with RingAttention(problem.workload, comm=WORLD, partition=partition) as plan:
        out = plan(*arrays)
        timeline = plan.timeline()
    if {event.rank for event in timeline.events} != set(range(WORLD.size)):
        return "the timeline lacks a rank"
    return problem.fault(out, None, partition)


class Exporter:
    """An array that can only be had by DLPack."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __dlpack__(self, **options: Any) -> Any:
        return self._held.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._held.__dlpack_device__()


def locked(x: Any) -> Any:
    copy = x.copy()
    copy.flags.writeable = False
    return copy


def strided(x: Any) -> Any:
    """Every other token of an array in the layout (batch, heads, seq, head_dim), backwards."""
    spread = np.zeros((x.shape[0], x.shape[2], 2 * x.shape[1], x.shape[3]), x.dtype)
    view = spread.swapaxes(1, 2)[:, ::-2]
    view[...] = x
    return view


def buffered(x: Any) -> Any:
    flat = array.array(x.dtype.char, x.ravel().tolist())
    return memoryview(flat).cast("B").cast(x.dtype.char, x.shape) if x.size else x


KINDS: dict[str, Callable[[Any], Any]] = {
    "NumPy": lambda x: x,
    "Fortran order": np.asfortranarray,
    "strided view": strided,
    "read-only": locked,
    "array.array": buffered,
    "memoryview": memoryview,
    "DLPack": Exporter,
}


def kinds(_: MpiTransport) -> Iterator[Case]:
    """What an array may be, for the inputs and for out=."""
    # these cannot hold such numbers
    impossible = {("bfloat16", "array.array"), ("bfloat16", "memoryview"), ("bfloat16", "DLPack"), ("float16", "array.array")}
    for dtype, name in itertools.product(DTYPES, KINDS):
        if (dtype, name) not in impossible:
            problem = Problem(q_len=21, heads=2, head_dim=8, dtype=dtype, mask=Causal())
            yield f"{dtype} {name}", lambda p=problem, convert=KINDS[name]: converted(p, convert, "zigzag")
    for name in ("NumPy", "Fortran order", "strided view", "array.array", "memoryview", "DLPack"):
        yield f"out {name}", lambda convert=KINDS[name]: into(convert)
    yield "q, k and v one array", one_array
    yield "out is k and v", out_over_input


def converted(problem: Problem, convert: Callable[[Any], Any], partition: str) -> Fault:
    arrays = problem.shards(partition)
    before = [x.tobytes() for x in arrays]
    out, lse = ring_attention(*map(convert, arrays), comm=WORLD, partition=partition, causal=True, return_lse=True)
    if before != [x.tobytes() for x in arrays]:
        return "the inputs were changed"
    return problem.fault(out, lse, partition)


def into(convert: Callable[[Any], Any]) -> Fault:
    problem = Problem(q_len=21, heads=2, head_dim=8)
    arrays = problem.shards("striped")
    out = convert(np.full_like(arrays[0], np.nan))
    returned = ring_attention(*arrays, comm=WORLD, partition="striped", out=out)
    fault = problem.fault(np.from_dlpack(out) if isinstance(out, Exporter) else out, None, "striped")
    return fault or problem.fault(returned, None, "striped")


def one_array() -> Fault:
    work = Workload(q_len=21, heads=2, head_dim=8)
    whole = inputs.rows(work, "q", np.arange(21), 5)
    mine = shard(whole, comm=WORLD)
    found = ring_attention(mine, mine, mine, comm=WORLD)
    error = np.max(np.abs(found - shard(dense_attention(work, whole, whole, whole)[0], comm=WORLD)), initial=0)
    return None if error <= LIMITS["float32"] else f"off by {error:.2e}"


class Slow(NumpyBackend):
    """Starts each attend late, so that what was sent to it lies with the sender meanwhile."""

    def compute(self, op: Any, *arguments: Any, **options: Any) -> None:
        time.sleep(0.1 if op.kernel == "attend" and WORLD.rank == WORLD.size - 1 else 0)
        super().compute(op, *arguments, **options)


def out_over_input() -> Fault:
    """Right, or refused: peers must not receive the output in place of a block."""
    problem = Problem(q_len=3001, head_dim=64)
    problem.v = problem.k
    problem.out, _ = dense_attention(problem.workload, problem.q, problem.k, problem.v)
    arrays = [x.copy() for x in problem.shards("contiguous")]
    plan = RingAttention(problem.workload, comm=WORLD, threads=1, timeout_s=TIMEOUT_S)
    plan._rank.backend = Slow()
    try:
        out = plan(arrays[0], arrays[1], arrays[1], out=arrays[1])
    except RingsimError:
        return None
    return problem.fault(out, None, "contiguous")


GROUPS = (matrix, shapes, chunks, library, kinds)


def main() -> None:
    transport = MpiTransport(WORLD, timeout_s=TIMEOUT_S)
    report = {}
    for group in GROUPS:
        faults, count = [], 0
        for name, check in group(transport):
            count += 1
            if fault := check():
                faults.append(f"{name}: rank {WORLD.rank}: {fault}")
        said = WORLD.gather((count, faults))
        if said is not None:
            report[group.__name__] = {"cases": [n for n, _ in said], "faults": [fault for _, some in said for fault in some]}
    transport.close()
    if WORLD.rank == 0:
        print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Every strategy under every kind of partition, mask, dtype and shape: proven, exact, the same bits again, the same from text."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import numpy_dtype
from ringsim.errors import WorkloadError
from ringsim.execution import execute
from ringsim.lowering import Blocking
from ringsim.mask import BlockSparse, Causal, Documents, First, Full, PrefixLM, Window
from ringsim.reference import dense_attention
from ringsim.schedule import Schedule
from ringsim.schedule.registry import STRATEGIES
from ringsim.workload import Workload

WORLDS = range(1, 9)
KV_HEADS = (1, 2, 3, 5)
ARGUMENTS = range(1, 9)
EXAMPLES = 50
LEAST = 40
"""Examples of each strategy that must really have run."""
OUT_ERROR = {"float64": 1e-12, "float32": 2e-6}
LSE_ERROR = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-5, "bfloat16": 1e-5}
LENGTH = st.sampled_from((0, 9, 9)).flatmap(lambda least: st.integers(least, 33))
BLOCKINGS = (None, Blocking(q_rows=5, k_rows=3, edge_rows=2))
FAMILY = {"ring", "bidirectional", "q-ring", "pass-q", "token-ring", "multi-ring", "double-ring", "dense", "local-window"}


@cache
def written(name: str, world_size: int, kv_heads: int) -> tuple[str, ...]:
    """Every way to write the strategy that such a world allows, with arguments from 1 to 8."""
    parameters = STRATEGIES[name].parameters
    needed = sum(parameter.default is parameter.empty for parameter in parameters)
    work, found = Workload(q_len=3, heads=kv_heads, head_dim=1), []
    for count in range(needed, len(parameters) + 1):
        for arguments in product(ARGUMENTS, repeat=count):
            text = f"{name}({', '.join(map(str, arguments))})" if arguments else name
            try:
                found.append(Schedule(workload=work, world_size=world_size, strategy=text).strategy)
            except WorkloadError:
                continue
    return tuple(dict.fromkeys(found))


@st.composite
def masks(draw, tokens):
    """Any mask of a sequence of that many tokens, and what they compose to."""
    count = st.integers(0, tokens)
    side = st.none() | count
    start = st.integers(0, max(0, tokens - 1))

    def documents(lengths):
        ends = np.minimum(np.cumsum([0, *lengths]), tokens)
        return Documents(np.diff(ends))

    def blocks(q_block, k_block, density, seed):
        shape = [-(-tokens // size) for size in (q_block, k_block)]
        return BlockSparse(np.random.default_rng(seed).random(shape) < density, q_block, k_block)

    simple = st.one_of(
        st.just(Full()),
        st.just(Causal()),
        st.builds(Window, side, side),
        st.lists(st.integers(0, 12), max_size=8).map(documents),
        st.builds(First, count),
        st.lists(st.tuples(st.integers(0, 5), start), max_size=4).map(lambda r: First([c for c, _ in r], [s for _, s in r])),
        st.builds(PrefixLM, count),
        st.builds(blocks, st.integers(1, 7), st.integers(1, 7), st.sampled_from((0.1, 0.5, 0.9)), st.integers(0, 99)),
    )
    composed = st.recursive(
        simple,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), inner.map(lambda a: ~a)
        ),
        max_leaves=4,
    )
    return draw(st.one_of(st.just(Full()), st.just(Causal()), simple, simple, composed, composed))


@st.composite
def partitions(draw, q_len, world_size):
    """Any partition of so many queries."""
    kind = draw(st.sampled_from(("contiguous", "striped", "zigzag", "weighted", "weighted zigzag", "runs", "balanced", "chunks")))
    if kind.startswith("weighted"):
        weights = draw(st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size).filter(any))
        return f"{'zigzag' if 'zigzag' in kind else 'contiguous'}({','.join(map(str, weights))})"
    if kind == "runs":
        cuts = sorted(draw(st.lists(st.integers(0, q_len), max_size=9)))
        counts = np.diff([0, *cuts, q_len])
        owners = draw(st.lists(st.integers(0, world_size - 1), min_size=len(counts), max_size=len(counts)))
        return f"runs({','.join(f'{owner}:{count}' for owner, count in zip(owners, counts, strict=True))})"
    return f"balanced({draw(st.integers(1, 4))})" if kind == "chunks" else kind


@st.composite
def workloads(draw, kv_heads):
    """Odd lengths, none at all, keys and queries apart, GQA, unequal widths, several sequences."""
    q_len = draw(LENGTH)
    kv_len = q_len if draw(st.booleans()) else draw(LENGTH)
    q_offset = draw(st.just(0) | st.integers(0, 9))
    kv_offset = q_offset if draw(st.booleans()) else draw(st.integers(-4, 9))
    batch = draw(st.sampled_from((1, 1, 2, 3, 1, 2, 1, 2, 0)))
    longest = max(q_len, kv_len)
    lengths = draw(st.none() | st.lists(st.integers(0, longest), min_size=batch, max_size=batch).map(tuple))
    return Workload(
        q_len=q_len,
        kv_len=kv_len,
        batch=batch,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 5)),
        v_head_dim=draw(st.integers(1, 6)),
        dtype=draw(st.sampled_from(("float64", "float32", "float16", "bfloat16"))),
        mask=draw(masks(max(q_offset + q_len, kv_offset + kv_len))),
        q_offset=q_offset,
        kv_offset=kv_offset,
        lengths=lengths,
    )


@st.composite
def schedules(draw, name):
    world_size = draw(st.sampled_from([world for world in WORLDS if written(name, world, KV_HEADS[-1])]))
    kv_heads = draw(st.sampled_from([count for count in KV_HEADS if written(name, world_size, count)]))
    work = draw(workloads(kv_heads))
    return Schedule(
        workload=work,
        world_size=world_size,
        partition=draw(partitions(work.q_len, world_size)),
        strategy=draw(st.sampled_from(written(name, world_size, kv_heads))),
        sync=draw(st.sampled_from(("free", "step"))),
        max_message_nbytes=draw(st.sampled_from((2**31 - 1, 64, 17))),
    )


@dataclass(frozen=True)
class Problem:
    """Inputs, and the dense answer in float64 with the error of one call in the accumulator's dtype."""

    arrays: tuple
    out: np.ndarray
    lse: np.ndarray
    fused: float

    @classmethod
    def of(cls, work, seed):
        rng = np.random.default_rng(seed)
        shapes = (
            (work.batch, work.q_len, work.heads, work.head_dim),
            (work.batch, work.kv_len, work.kv_heads, work.head_dim),
            (work.batch, work.kv_len, work.kv_heads, work.v_head_dim),
        )
        return cls.of_arrays(work, tuple(rng.standard_normal(shape).astype(numpy_dtype(work.dtype)) for shape in shapes))

    @classmethod
    def of_arrays(cls, work, arrays):
        out, lse = dense_attention(work, *arrays)
        once = dense_attention(work, *arrays, dtype="float32")[0].astype(arrays[0].dtype)
        return cls(arrays, out, lse, largest(once.astype(np.float64) - out))


def largest(array):
    return float(np.max(np.abs(array), initial=0.0))


def check_agrees(work, problem, result):
    limit = OUT_ERROR.get(work.dtype, 2.5 * problem.fused + 2e-3)
    assert (result.out.shape, result.out.dtype) == (problem.out.shape, numpy_dtype(work.dtype))
    assert largest(result.out.astype(np.float64) - problem.out) <= limit
    np.testing.assert_allclose(result.lse, problem.lse, rtol=0, atol=LSE_ERROR[work.dtype])
    blind = np.isneginf(problem.lse)
    assert np.array_equal(np.isneginf(result.lse), blind)
    assert not result.out[blind.transpose(0, 2, 1)].any()


def check_same_from_text(schedule):
    text = schedule.to_text()
    again = Schedule.from_text(text)
    assert (again.digest, again.to_text()) == (schedule.digest, text)
    for rank in range(schedule.world_size):
        assert tuple(again.program(rank)) == tuple(schedule.program(rank))


def test_the_family_is_registered():
    assert set(STRATEGIES) >= FAMILY


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_family(name):
    ran = Counter()

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(schedules(name), st.sampled_from(BLOCKINGS), st.integers(0, 2**32))
    def check(schedule, blocking, seed):
        schedule.validate()
        problem = Problem.of(schedule.workload, seed)
        results = [execute(schedule, *problem.arrays, backend=NumpyBackend(blocking=blocking)) for _ in range(2)]
        check_agrees(schedule.workload, problem, results[0])
        assert results[0].out.tobytes() == results[1].out.tobytes()
        assert results[0].lse.tobytes() == results[1].lse.tobytes()
        check_same_from_text(schedule)
        ran[schedule.strategy.partition("(")[0]] += 1

    check()
    assert ran[name] >= LEAST


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_a_default_may_be_written(name):
    defaults = {p.name: p.default for p in STRATEGIES[name].parameters if p.default is not p.empty}
    world_size = next(world for world in WORLDS if written(name, world, KV_HEADS[-1]))
    needed = written(name, world_size, KV_HEADS[-1])[0].rstrip(")").split("(")[1:]
    words = ", ".join([*needed, *(f"{key}={value}" for key, value in defaults.items())])
    text = f"{name}({words})" if words else name
    made = Schedule(workload=Workload(q_len=3, heads=KV_HEADS[-1]), world_size=world_size, strategy=text)
    assert made.strategy == written(name, world_size, KV_HEADS[-1])[0]

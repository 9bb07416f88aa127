"""Every strategy's gradients, under any partition, mask, dtype and shape: proven, exact, the same bits again and from text."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.numpy import NumpyBackend
from ringsim.dtypes import numpy_dtype
from ringsim.execution import execute
from ringsim.lowering import Blocking
from ringsim.reference import dense_attention, dense_backward
from ringsim.schedule.registry import STRATEGIES

from .test_family import FAMILY, check_same_from_text, largest, schedules

NAMES = ("dq", "dk", "dv")
BACK = sorted(name for name, strategy in STRATEGIES.items() if strategy.backward is not None)
EXAMPLES = 30
LEAST = 24
"""Examples of each strategy that must really have run."""
ERROR = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-5, "bfloat16": 2e-5}
"""Of the sums, which are float32 for the half precisions too."""
HALF_UNIT = {"float64": 0.0, "float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""How far, relative to a number, the nearest one of the dtype may be; of those whose outputs are not of the sums' dtype."""
BLOCKINGS = (None, Blocking(q_rows=5, k_rows=3, edge_rows=2))


@dataclass(frozen=True)
class Problem:
    """Inputs, the dense gradients in float64, and how far from each a gradient may be."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    exact: tuple
    limits: tuple
    blind: np.ndarray
    unseen: np.ndarray

    @classmethod
    def of(cls, work, seed):
        rng = np.random.default_rng(seed)
        queries, keys = (work.batch, work.q_len), (work.batch, work.kv_len)
        shapes = (
            (*queries, work.heads, work.head_dim),
            (*keys, work.kv_heads, work.head_dim),
            (*keys, work.kv_heads, work.v_head_dim),
            (*queries, work.heads, work.v_head_dim),
        )
        q, k, v, dout = (rng.standard_normal(shape).astype(numpy_dtype(work.dtype)) for shape in shapes)
        exact = dense_backward(work, dout, q, k, v)
        out, lse = dense_attention(work, q, k, v)
        seen = np.zeros((work.batch, work.q_len, work.kv_len), bool)
        for (first, end), valid_q, valid_k in work.sequences():
            positions = work.q_offset + np.arange(valid_q), work.kv_offset + np.arange(valid_k)
            seen[first:end, :valid_q, :valid_k] = work.mask.visible(*positions)
        assert np.array_equal(np.isneginf(lse), ~np.broadcast_to(seen.any(axis=2)[:, None], lse.shape))
        limits = limits_of(work, (dout, q, k, v), exact, out)
        return cls(q, k, v, dout, exact, limits, ~seen.any(axis=2), ~seen.any(axis=1))


def limits_of(work, arrays, exact, out):
    """How far from the exact ones dq, dk and dv may be.

    Half precisions: 2.5 x the error of dense gradients in float32, rounded once; and what follows from an output that is rounded
    (half a unit moves delta, and that the gradients, by no more than `moved`), and half a unit of the result.
    """
    # unit-normal inputs: where the terms of a gradient cancel, as with one key, their rounding is that of numbers about 1
    plain = [ERROR[work.dtype] * max(1.0, largest(one)) for one in exact]
    if not HALF_UNIT[work.dtype]:
        return tuple(plain)
    unit = HALF_UNIT[work.dtype]
    dout, q, k, v = (np.asarray(array, np.float64) for array in arrays)
    once = (one.astype(numpy_dtype(work.dtype)) for one in dense_backward(work, *arrays, dtype="float32"))
    fused = [largest(one.astype(np.float64) - other) for one, other in zip(once, exact, strict=True)]
    delta = work.softmax_scale * unit * np.abs(dout * out).sum(axis=3, keepdims=True)
    as_wide = replace(work, v_head_dim=work.head_dim)
    moved = (
        delta * dense_attention(as_wide, q, k, np.abs(k))[0],
        dense_backward(as_wide, delta * np.abs(q), q, k, k)[2],
        np.zeros_like(v),
    )
    parts = zip(plain, fused, moved, exact, strict=True)
    return tuple(least + 2.5 * error + by + unit * np.abs(one) for least, error, by, one in parts)


def check_agrees(work, problem, result):
    for name, exact, limit in zip(NAMES, problem.exact, problem.limits, strict=True):
        found = getattr(result, name)
        assert (found.shape, found.dtype) == (exact.shape, numpy_dtype(work.dtype))
        assert (np.abs(found.astype(np.float64) - exact) <= limit).all(), name
    assert not result.dq[problem.blind].any()
    assert not result.dk[problem.unseen].any()
    assert not result.dv[problem.unseen].any()


def of_pass(schedule, pass_):
    return replace(schedule, workload=replace(schedule.workload, pass_=pass_))


def check_bits(one, other, *names):
    for name in names:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


def test_the_family_goes_back():
    assert set(BACK) >= FAMILY | {"burst", "halo"}


@pytest.mark.parametrize("name", BACK)
def test_family_backward(name):
    ran = Counter()

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(schedules(name), st.sampled_from(BLOCKINGS), st.integers(0, 2**32))
    def check(schedule, blocking, seed):
        forward, backward, both = (of_pass(schedule, pass_) for pass_ in ("forward", "backward", "both"))
        problem = Problem.of(forward.workload, seed)
        inputs, dout = (problem.q, problem.k, problem.v), problem.dout
        backend = NumpyBackend(blocking=blocking, backward_blocking=blocking)
        first = execute(forward, *inputs, backend=backend)
        backs = [execute(backward, *inputs, out=first.out, lse=first.lse, dout=dout, backend=backend) for _ in range(2)]
        whole = execute(both, *inputs, dout=dout, backend=backend)
        check_agrees(schedule.workload, problem, backs[0])
        check_bits(*backs, *NAMES)
        check_bits(first, whole, "out", "lse")
        check_bits(backs[0], whole, *NAMES)
        for one in (backward, both):
            one.validate()
            check_same_from_text(one)
        ran[schedule.strategy.partition("(")[0]] += 1

    check()
    assert ran[name] >= LEAST

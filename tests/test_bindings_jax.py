"""Ring attention in JAX has the gradients that JAX's own autodiff gives for dense attention, and its calls keep their order."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringsim
from ringsim.errors import ArrayError, TransportError

from .mpi_launch import program, run

jax = pytest.importorskip("jax", reason="needs JAX: pip install 'ringsim[jax]'")

import jax.numpy as jnp

from ringsim.bindings.jax import attention

from .programs import bindings_jax as ours

BOUND = {"float64": 1e-10, "float32": 2e-5}
HALF = ("bfloat16", "float16")
PAGE = Path(__file__).parents[1] / "docs" / "autograd.md"


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that ran, in their order, each with the first element of q."""
    made: list[str] = []
    forward, backward = ringsim.RingAttention.with_lse, ringsim.RingAttention.backward
    patched = {
        "with_lse": lambda self, *given: made.append(f"forward {given[0].flat[0]:g}") or forward(self, *given),
        "backward": lambda self, *given: made.append(f"backward {given[1].q.flat[0]:g}") or backward(self, *given),
    }
    for name, method in patched.items():
        monkeypatch.setattr(ringsim.RingAttention, name, method)
    return made


def plan_of(dtype: str = "float64", mask: str = "causal", **fields: Any) -> ringsim.RingAttention:
    sizes = {"q_len": 13, "heads": 4, "kv_heads": 2, "head_dim": 4} | fields
    return ringsim.RingAttention(ringsim.Workload(dtype=dtype, mask=ringsim.mask_named(mask), **sizes), threads=1)


def inputs_of(plan: ringsim.RingAttention) -> list[Any]:
    """q, k and v in the plan's dtype; q begins with 1."""
    workload = plan.schedule.workload
    q, k, v = ours.leaves(workload)[:3]
    q.flat[0] = 1
    return [jnp.asarray(x, workload.dtype) for x in (q, k, v)]


@pytest.mark.parametrize("mask", ours.MASKS)
@pytest.mark.parametrize("dtype", [*BOUND, *HALF])
def test_two_layers_on_one_plan_have_the_gradients_of_dense_attention(dtype: str, mask: str) -> None:
    plan = plan_of(dtype, mask, q_len=29, batch=2)
    workload = plan.schedule.workload
    given = [jnp.asarray(x, dtype) for x in ours.leaves(workload)]
    found = ours.gradients(lambda *x: attention(plan, *x), given, dtype)
    wanted = ours.gradients(lambda *x: ours.dense(workload, *x), given, "float64")
    # of half precision: what rounding does to JAX's own, and some
    own = ours.gradients(lambda *x: ours.dense(workload, *x), given, dtype) if dtype in HALF else wanted
    assert {x.dtype.name for x in found} == {dtype}
    assert ours.distance(found, wanted) < BOUND.get(dtype, 2.5 * ours.distance(own, wanted) + 2e-3)
    assert plan.saved is None


def test_with_and_without_jit_the_bits_are_the_same() -> None:
    plan = plan_of("float32")
    given = inputs_of(plan)

    def loss(*x: Any) -> Any:
        return (attention(plan, *x) * 3).sum()

    ways = (jax.grad(loss, (0, 1, 2)), jax.jit(jax.grad(loss, (0, 1, 2))), jax.grad(jax.jit(loss), (0, 1, 2)))
    made = [np.concatenate([np.asarray(x).ravel() for x in way(*given)]).tobytes() for way in ways]
    assert made[0] == made[1] == made[2]


def test_packed_tokens_are_one_sequence() -> None:
    plan = plan_of()
    given = inputs_of(plan)

    def loss(x: Any) -> Any:
        return jnp.sin(attention(plan, *x)).sum()

    whole, packed = jax.jit(jax.grad(loss))(given), jax.jit(jax.grad(loss))([x[0] for x in given])
    assert attention(plan, *(x[0] for x in given)).shape == (13, 4, 4)
    assert all(bool((a[0] == b).all()) for a, b in zip(whole, packed, strict=True))


def test_independent_calls_keep_the_order_of_the_trace(calls: list[str]) -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)

    @jax.jit
    @jax.grad
    def step(q: Any) -> Any:
        return sum(jnp.sin(attention(plan, q * factor, k, v)).sum() for factor in range(1, 9))

    for _ in range(5):
        calls.clear()
        jax.block_until_ready(step(q))
        assert calls == [f"forward {i}" for i in range(1, 9)] + [f"backward {i}" for i in range(8, 0, -1)]


def test_programs_dispatched_one_after_the_other_keep_their_order(calls: list[str]) -> None:
    plan = plan_of(q_len=200, heads=8, head_dim=32)
    q, k, v = inputs_of(plan)
    step = jax.jit(lambda q: attention(plan, q, k, v))
    results = [step(q * factor) for factor in range(1, 21)]
    jax.block_until_ready(results)
    assert calls == [f"forward {i}" for i in range(1, 21)]


def test_no_call_is_left_out_or_repeated(calls: list[str]) -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)

    @jax.jit
    def twice_and_unused(q: Any) -> Any:
        attention(plan, q * 5, k, v)
        return attention(plan, q, k, v) + attention(plan, q, k, v)

    jax.block_until_ready(twice_and_unused(q))
    jax.effects_barrier()
    assert calls == ["forward 5", "forward 1", "forward 1"]


def test_the_layers_of_a_scan(calls: list[str]) -> None:
    plan = plan_of()
    workload = plan.schedule.workload
    q, k, v = inputs_of(plan)

    def loss(attend: Any, q: Any) -> Any:
        return jnp.sin(jax.lax.scan(lambda x, scale: (attend(x * scale, k, v), None), q, jnp.arange(1.0, 4.0))[0]).sum()

    found = jax.jit(jax.grad(lambda q: loss(lambda *x: attention(plan, *x), q)))(q)
    wanted = jax.grad(lambda q: loss(lambda *x: ours.dense(workload, *x), q))(q)
    assert ours.distance([found], [wanted]) < BOUND["float64"]
    assert [call.split()[0] for call in calls] == ["forward"] * 3 + ["backward"] * 3


def test_the_branches_of_a_cond(calls: list[str]) -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)
    step = jax.jit(jax.grad(lambda q: jax.lax.cond(q[0, 0, 0, 0] > 1, lambda q: attention(plan, q * 7, k, v), jnp.sin, q).sum()))
    jax.block_until_ready([step(q), step(q * 2)])
    assert calls == ["forward 14", "backward 14"]


def test_a_plan_is_compiled_once_without_jit() -> None:
    plan, compiled = plan_of(), []
    given = inputs_of(plan)
    jax.monitoring.register_event_duration_secs_listener(lambda event, _, **__: compiled.append("backend_compile" in event))
    numbers = []
    for _ in range(3):
        attention(plan, *given)
        numbers.append(sum(compiled))
    jax.monitoring.clear_event_listeners()
    assert numbers[0] > 0
    assert numbers[0] == numbers[-1]


def test_what_does_not_fit() -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)
    with pytest.raises(ArrayError, match=r"k is float64\(1, 12, 2, 4\); the plan expects float64\(1, 13, 2, 4\)"):
        jax.jit(lambda q: attention(plan, q, k[:, 1:], v))(q)
    with pytest.raises(ArrayError, match=r"q is float32.*expects float64"):
        attention(plan, q.astype("float32"), k, v)
    jax.config.update("jax_enable_x64", False)
    with pytest.raises(ArrayError, match="jax_enable_x64"):
        attention(plan, *(jnp.asarray(np.asarray(x)) for x in (q, k, v)))


def test_what_jax_refuses() -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)

    def call(q: Any) -> Any:
        return attention(plan, q, k, v)

    with pytest.raises(ValueError, match="vmap"):
        jax.vmap(call)(q[None])
    with pytest.raises(NotImplementedError, match="checkpoint"):
        jax.grad(lambda q: jax.checkpoint(call)(q).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(call, (q,), (q,))
    with pytest.raises(ValueError, match="JVP"):
        jax.hessian(lambda q: call(q).sum())(q)


def test_an_error_of_the_plan_comes_out_of_jax() -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)
    plan._transport.failure = "rank 3 is gone"
    with pytest.raises(RuntimeError, match=r"RankMismatch: .*rank 3 is gone"):
        jax.block_until_ready(jax.jit(lambda q: attention(plan, q, k, v))(q))


def test_mpi_must_allow_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()

    class FakeMpi:
        THREAD_SERIALIZED = 2
        Query_thread = staticmethod(lambda: 1)

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", FakeMpi)
    attention(plan, *inputs_of(plan))
    of_two = ringsim.Schedule(workload=plan.schedule.workload, world_size=2)
    monkeypatch.setattr(plan, "schedule", of_two)
    with pytest.raises(TransportError, match="thread_level"):
        attention(plan, *inputs_of(plan))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3, 4], ids="{} ranks".format)
def test_each_rank_has_its_shard_of_the_gradients(ranks: int, tmp_path: Path) -> None:
    ended = run(tmp_path, (ranks, ("-W", "error", *program("bindings_jax"))), timeout_s=240)
    assert ended.rc == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert len(report) == len(ours.CASES)
    assert {case: error for case, error in report.items() if not error < BOUND[case.split()[0]]} == {}


@pytest.mark.mpi
def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    example = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "import jax" in text)
    (tmp_path / "train.py").write_text(example)
    said = [run(tmp_path, (ranks, ("-W", "error", "train.py")), timeout_s=120) for ranks in (1, 2)]
    assert [ended.rc for ended in said] == [0, 0], said
    losses = [[float(line.split()[-1]) for line in ended.stdout.splitlines()] for ended in said]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]

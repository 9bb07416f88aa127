"""Ring attention in torch's graph has the gradients that torch's own autograd gives for dense attention."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ringsim
from ringsim.bindings.threads import check_threads
from ringsim.errors import ArrayError, RankMismatch, TransportError, WorkloadError

from .mpi_launch import program, run

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'ringsim[torch]'")

from torch.utils.checkpoint import checkpoint

from ringsim.bindings.torch import attention

from .programs import bindings_torch as ours

BOUND = {"float64": 1e-10, "float32": 2e-5}
HALF = ("bfloat16", "float16")
PAGE = Path(__file__).parents[1] / "docs" / "autograd.md"


def plan_of(dtype: str = "float64", mask: str = "causal", **fields: Any) -> ringsim.RingAttention:
    sizes = {"q_len": 13, "heads": 4, "kv_heads": 2, "head_dim": 4} | fields
    return ringsim.RingAttention(ringsim.Workload(dtype=dtype, mask=ringsim.mask_named(mask), **sizes), threads=1)


def inputs_of(plan: ringsim.RingAttention, *, grad: bool = True) -> list[Any]:
    """q, k and v in the plan's dtype."""
    workload = plan.schedule.workload
    given = [x.to(getattr(torch, workload.dtype)) for x in ours.leaves(workload)[:3]]
    return [x.requires_grad_() if grad else x for x in given]


@pytest.mark.parametrize("mask", ours.MASKS)
@pytest.mark.parametrize("dtype", [*BOUND, *HALF])
def test_two_layers_on_one_plan_have_the_gradients_of_dense_attention(dtype: str, mask: str) -> None:
    plan = plan_of(dtype, mask, q_len=29, batch=2)
    workload = plan.schedule.workload
    given = [x.to(getattr(torch, dtype)) for x in ours.leaves(workload)]
    found = ours.gradients(lambda *x: attention(plan, *x), given)
    wanted = ours.gradients(lambda *x: ours.dense(workload, *x), [x.double() for x in given])
    assert {x.dtype for x in found} == {getattr(torch, dtype)}
    # of half precision: what rounding does to torch's own, and some
    own = ours.gradients(lambda *x: ours.dense(workload, *x), given) if dtype in HALF else wanted
    assert ours.distance(found, wanted) < BOUND.get(dtype, 2.5 * ours.distance(own, wanted) + 2e-3)
    assert plan.saved is None


def test_what_is_made_is_of_torchs_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only its allocator knows which streams still use a tensor."""
    plan, made = plan_of(), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *given, **named: made.append(empty(*given, **named)) or made[-1])
    given = inputs_of(plan)
    out = attention(plan, *given)
    found = out, *torch.autograd.grad(out.sin().sum(), given)
    assert [x.data_ptr() for x in made] == [x.data_ptr() for x in found]


def test_mpi_must_allow_the_threads_of_a_backward_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()

    class FakeMpi:
        THREAD_SERIALIZED = 2
        Query_thread = staticmethod(lambda: 1)

    monkeypatch.setitem(sys.modules, "mpi4py.MPI", FakeMpi)
    check_threads(plan, "torch")
    monkeypatch.setattr(plan, "schedule", ringsim.Schedule(workload=plan.schedule.workload, world_size=2))
    with pytest.raises(TransportError, match=r"torch calls back on threads of its own.*thread_level"):
        check_threads(plan, "torch")


@pytest.mark.parametrize("mask", ours.MASKS)
def test_finite_differences(mask: str) -> None:
    plan = plan_of(mask=mask, q_len=29, heads=2, kv_heads=1, head_dim=2)
    assert torch.autograd.gradcheck(lambda *x: attention(plan, *x), inputs_of(plan))


def test_packed_tokens_are_one_sequence() -> None:
    plan = plan_of()
    given = inputs_of(plan)
    packed = [x.detach()[0].requires_grad_() for x in given]
    out = attention(plan, *packed)
    attention(plan, *given).sin().sum().backward()
    out.sin().sum().backward()
    assert out.shape == (13, 4, 4)
    assert all(torch.equal(a.grad[0], b.grad) for a, b in zip(given, packed, strict=True))


def test_any_strides() -> None:
    plan = plan_of()
    dense = inputs_of(plan)
    transposed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in dense]
    assert not any(x.is_contiguous() for x in transposed)
    for given in (dense, transposed):
        # the gradient of a sum is one number, expanded
        attention(plan, *given).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(dense, transposed, strict=True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_some_inputs_need_gradients(wanted: tuple[int, ...]) -> None:
    plan = plan_of()
    whole, some = inputs_of(plan), inputs_of(plan, grad=False)
    for index in wanted:
        some[index].requires_grad_()
    for given in (whole, some):
        attention(plan, *given).cos().sum().backward()
    assert [index for index, x in enumerate(some) if x.grad is not None] == list(wanted)
    assert all(torch.equal(some[index].grad, whole[index].grad) for index in wanted)


def test_without_a_graph_nothing_is_kept() -> None:
    plan = plan_of()
    assert not attention(plan, *inputs_of(plan, grad=False)).requires_grad
    with torch.no_grad():
        assert not attention(plan, *inputs_of(plan)).requires_grad
    assert plan.saved is None


def test_one_leaf_as_all_three() -> None:
    plan = plan_of(kv_heads=4)
    workload = plan.schedule.workload
    ring, wanted = (ours.leaves(workload)[0].requires_grad_() for _ in range(2))
    attention(plan, ring, ring, ring).sin().sum().backward()
    ours.dense(workload, wanted, wanted, wanted).sin().sum().backward()
    assert ours.distance([ring.grad], [wanted.grad]) < BOUND["float64"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_computes_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = plan_of(), []
    called = ringsim.RingAttention.with_lse
    monkeypatch.setattr(ringsim.RingAttention, "with_lse", lambda *args, **options: calls.append(1) or called(*args, **options))
    once, twice = inputs_of(plan), inputs_of(plan)
    attention(plan, *once).sin().sum().backward()
    assert len(calls) == 1
    checkpoint(lambda *x: attention(plan, *x).sin(), *twice, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 3
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(once, twice, strict=True))


def test_the_same_bits_again() -> None:
    plan = plan_of("float32")
    grads = []
    for _ in range(3):
        given = inputs_of(plan)
        attention(plan, *given).sin().sum().backward()
        grads.append(torch.cat([x.grad.flatten() for x in given]))
    assert all(torch.equal(grads[0], x) for x in grads)


def test_arrays_cross_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, crossed = plan_of("bfloat16"), []
    called = ringsim.RingAttention.with_lse

    def spied(self: Any, *given: Any, **options: Any) -> Any:
        made = called(self, *given, **options)
        crossed.extend([[x.data_ptr() for x in given], made[0].__array_interface__["data"][0]])
        return made

    monkeypatch.setattr(ringsim.RingAttention, "with_lse", spied)
    given = inputs_of(plan)
    out = attention(plan, *given)
    assert crossed == [[x.data_ptr() for x in given], out.data_ptr()]


@pytest.mark.parametrize("changed", range(4), ids=["q", "k", "v", "out"])
def test_what_backward_needs_may_not_be_changed(changed: int) -> None:
    plan = plan_of()
    given = [x * 1 for x in inputs_of(plan)]
    out = attention(plan, *given)
    with torch.no_grad():
        [*given, out][changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_graph_is_gone_after_its_backward() -> None:
    plan = plan_of()
    loss = attention(plan, *inputs_of(plan)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_there_is_no_second_derivative() -> None:
    plan = plan_of()
    given = inputs_of(plan)
    first = torch.autograd.grad(attention(plan, *given).square().sum(), given, create_graph=True)
    with pytest.raises(WorkloadError, match="no second derivative"):
        torch.autograd.grad(first[0].sum(), given[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning:torch")
def test_function_transforms() -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan, grad=False)
    leaf = q.clone().requires_grad_()
    attention(plan, leaf, k, v).sum().backward()
    assert torch.equal(torch.func.grad(lambda x: attention(plan, x, k, v).sum())(q), leaf.grad)
    with pytest.raises(WorkloadError, match="vmap"):
        torch.func.vmap(lambda x: attention(plan, x, k, v))(q[None])
    with pytest.raises(WorkloadError, match="vmap"):
        torch.func.jacrev(lambda x: attention(plan, x, k, v))(q)
    with pytest.raises(WorkloadError, match="forward-mode"):
        torch.func.jvp(lambda x: attention(plan, x, k, v), (q,), (q,))


def test_what_does_not_fit() -> None:
    plan = plan_of()
    q, k, v = inputs_of(plan)
    with pytest.raises(RankMismatch, match="q lies on meta"):
        attention(plan, q.to("meta"), k, v)
    with pytest.raises(RankMismatch, match="q is float32"):
        attention(plan, q.float(), k, v)
    with pytest.raises(RankMismatch, match=r"k is float64\(1, 12, 2, 4\)"):
        attention(plan, q, k[:, 1:], v)
    with pytest.raises(ArrayError, match="v is ndarray; expected a dense torch tensor"):
        attention(plan, q, k, np.ones((1, 13, 2, 4)))
    with pytest.raises(ArrayError, match=r"q is torch.sparse_coo; expected a dense torch tensor"):
        attention(plan, q.detach().to_sparse(), k, v)


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3, 4], ids="{} ranks".format)
def test_each_rank_has_its_shard_of_the_gradients(ranks: int, tmp_path: Path) -> None:
    ended = run(tmp_path, (ranks, ("-W", "error", *program("bindings_torch"))), timeout_s=240)
    assert ended.rc == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert len(report) == len(ours.DTYPES) * len(ours.MASKS) * len(ours.WAYS)
    assert {case: error for case, error in report.items() if not error < BOUND[case.split()[0]]} == {}


@pytest.mark.mpi
def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    example = next(text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "import torch" in text)
    (tmp_path / "train.py").write_text(example)
    said = [run(tmp_path, (ranks, ("-W", "error", "train.py")), timeout_s=120) for ranks in (1, 2)]
    assert [ended.rc for ended in said] == [0, 0], said
    losses = [[float(line.split()[-1]) for line in ended.stdout.splitlines()] for ended in said]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]

"""What does not fit on the way back is said on every rank, before the first hop."""

from dataclasses import replace

import numpy as np
import pytest

import ringsim
from ringsim.backends.loopback import spawn
from ringsim.errors import ArrayError, RankMismatch, WorkloadError
from ringsim.schedule import Schedule, strategy
from ringsim.schedule.registry import STRATEGIES

from .test_api import read_only, workload
from .test_api_backward import four, local, same_bits


def changed(change):
    """What all ranks say when rank 1 of 3 goes back with something else than the others."""
    every = four(seq=9)

    def rank(comm):
        q, k, v, dout = local(comm, every)
        plan = ringsim.RingAttention(workload(*every[:3], False), comm=comm)
        plan(q, k, v)
        arguments, options = (dout, plan.saved), {}
        if comm.rank == 1:
            arguments, options = change(dout, plan.saved)
        with pytest.raises(RankMismatch) as caught:
            plan.backward(*arguments, **options)
        assert same_bits(plan.backward(dout), plan.backward(dout)), "goes on as if nothing had been"
        return str(caught.value)

    return spawn(3, rank, timeout_s=20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, s: ((d[:, :2], s), {}), r"rank 1: dout is float32\(2, 2, 4, 6\), expected float32\(2, 3, 4, 6\)"),
        (lambda d, s: ((d.astype("float64"), s), {}), r"rank 1: dout is float64\(2, 3, 4, 6\), expected float32"),
        (lambda d, s: ((d[0], s), {}), r"rank 1: dout has 3 dimensions \(3, 4, 6\); expected 4, as q has 4"),
        (lambda d, s: ((d.astype("int32"), s), {}), "rank 1: dout has dtype int32"),
        (lambda d, s: ((None, s), {}), "rank 1: dout is NoneType"),
        (lambda d, s: ((d, s._replace(lse=s.lse[:, :2])), {}), r"rank 1: lse is float32\(2, 2, 3\), expected float32\(2, 4, 3\)"),
        (lambda d, s: ((d, s._replace(lse=s.lse.astype("float64"))), {}), r"rank 1: lse is float64\(2, 4, 3\), expected float32"),
        (lambda d, s: ((d, s._replace(lse=s.lse[0])), {}), r"rank 1: lse has 2 dimensions \(4, 3\); expected 3, as q has 4"),
        (lambda d, s: ((d, s._replace(out=s.out[..., :3])), {}), r"rank 1: out is float32\(2, 3, 4, 3\), expected"),
        (lambda d, s: ((d, s._replace(q=s.q[:, :1])), {}), r"rank 1: q is float32\(2, 1, 4, 8\), expected"),
        (lambda d, s: ((d, s), {"dq": np.empty(3)}), r"rank 1: dq is float64\(3,\); expected float32\(2, 3, 4, 8\)"),
        (lambda d, s: ((d, s), {"dv": read_only(s.v)}), "rank 1: dv is read-only"),
        (
            lambda d, s: ((d, s), {"dk": s.k}),
            r"rank 1: dk shares memory with k, which may still be on its way when dk is written",
        ),
        (lambda d, s: ((d, s), {"dq": s.q}), "rank 1: dq shares memory with q"),
    ],
)
def test_what_does_not_fit_on_one_rank_is_said_on_all(change, said):
    messages = changed(change)
    assert len(set(messages)) == 1
    with pytest.raises(RankMismatch, match=said):
        raise RankMismatch(messages[0])


def test_no_call_on_one_rank_is_said_on_all():
    every = four(seq=9)

    def rank(comm):
        q, k, v, dout = local(comm, every)
        plan = ringsim.RingAttention(workload(*every[:3], False), comm=comm)
        plan(q, k, v)
        if comm.rank == 2:
            plan.saved = None
        with pytest.raises(RankMismatch, match="rank 2: there is nothing to go back from"):
            plan.backward(dout)
        return True

    assert spawn(3, rank, timeout_s=20) == [True] * 3


def test_shards_that_do_not_fit_end_the_call_on_every_rank():
    every = four(seq=9)

    def rank(comm):
        q, k, v, dout = local(comm, every)
        out, lse = ringsim.ring_attention(q, k, v, comm=comm, return_lse=True)
        with pytest.raises(RankMismatch, match=r"rank 1: partition is zigzag where rank 0 has contiguous"):
            ringsim.ring_attention_backward(
                dout, q, k, v, out, lse, comm=comm, partition="zigzag" if comm.rank == 1 else "contiguous"
            )
        with pytest.raises(RankMismatch, match=r"rank 1: dout is float32\(2, 1, 4, 6\)"):
            ringsim.ring_attention_backward(dout[:, : 3 - 2 * (comm.rank == 1)], q, k, v, out, lse, comm=comm)
        return True

    assert spawn(3, rank, timeout_s=20) == [True] * 3


def test_without_checks_the_rank_that_is_at_fault_says_so():
    q, k, v, dout = four(seq=6)
    plan = ringsim.RingAttention(workload(q, k, v, False), check=False)
    with pytest.raises(ArrayError, match="rank 0: there is nothing to go back from"):
        plan.backward(dout)
    plan(q, k, v)
    with pytest.raises(ArrayError, match=r"rank 0: dout is float32\(2, 5, 4, 6\), expected"):
        plan.backward(dout[:, :5])


def test_a_strategy_without_a_backward_pass_says_so():
    name = "forward-only"
    strategy(name, version=1)(STRATEGIES["ring"].build)
    try:
        q, k, v, dout = four(seq=6)
        plan = ringsim.RingAttention(workload(q, k, v, False), strategy=name)
        plan(q, k, v)
        with pytest.raises(WorkloadError, match="strategy 'forward-only' has no backward pass; use pass 'forward'"):
            plan.backward(dout)
        with pytest.raises(WorkloadError, match="has no backward pass"):
            Schedule(workload=replace(plan.schedule.workload, pass_="both"), world_size=2, strategy=name)
    finally:
        del STRATEGIES[name]


def test_an_output_over_q_leaves_nothing_to_go_back_from():
    q, k, v, dout = four(seq=6, kv_heads=4)
    work = replace(workload(q, k, v, False), v_head_dim=8)
    plan = ringsim.RingAttention(work)
    k, v, dout = q.copy(), q.copy(), q.copy()
    plan(q, k, v, out=q)
    with pytest.raises(RankMismatch, match="there is nothing to go back from"):
        plan.backward(dout)
    with pytest.raises(RankMismatch, match="rank 0: out shares memory with q"):
        plan.both(q, k, v, dout, out=q)


def test_gradients_may_not_share_memory():
    q, k, v, dout = four(seq=6, kv_heads=4)
    work = replace(workload(q, k, v, False), v_head_dim=8)
    plan = ringsim.RingAttention(work)
    k, v, dout, room = (q.copy() for _ in range(4))
    plan(q, k, v)
    with pytest.raises(RankMismatch, match="rank 0: dv shares memory with dk"):
        plan.backward(dout, dk=room, dv=room)


def test_gradients_may_be_slices_of_one_array():
    q, k, v, dout = four(seq=6, kv_heads=4)
    work = replace(workload(q, k, v, False), v_head_dim=8)
    plan = ringsim.RingAttention(work)
    k, v, dout = q.copy(), q.copy(), q.copy()
    plan(q, k, v)
    expected = plan.backward(dout)
    packed = np.zeros((*q.shape[:2], 3, *q.shape[2:]), q.dtype)
    plan.backward(dout, **{name: packed[:, :, index] for index, name in enumerate(("dq", "dk", "dv"))})
    for index, gradient in enumerate(expected):
        assert np.array_equal(packed[:, :, index], gradient)


def interchanged(change):
    """Two layers on two ranks: what each rank raises where the second does `change` to the order of its calls."""
    layers = [four(seed=seed) for seed in range(2)]

    def rank(comm):
        (q, k, v, dout), (q2, k2, v2, _) = [local(comm, layer) for layer in layers]
        plan = ringsim.RingAttention(workload(*layers[0][:3], True), comm=comm)
        plan(q, k, v)
        first = plan.saved
        plan(q2, k2, v2)
        calls = {
            "first": lambda: plan.backward(dout, first),
            "second": lambda: plan.backward(dout),
            "forward": lambda: plan(q, k, v),
            "by hand": lambda: plan.backward(dout, tuple(first)),
        }
        with pytest.raises(RankMismatch) as raised:
            calls[change[comm.rank]]()
        return str(raised.value)

    return spawn(2, rank)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("first", "second"), "rank 1: pass is backward of call 2 where rank 0 has backward of call 1"),
        (("forward", "second"), "rank 1: pass is backward of call 2 where rank 0 has forward"),
        (("first", "by hand"), "rank 1: pass is backward where rank 0 has backward of call 1"),
    ],
)
def test_ranks_that_make_different_calls_are_told(change, said):
    assert interchanged(change) == [said] * 2


def test_what_is_saved_may_be_any_five_arrays():
    q, k, v, dout = four(seq=6, kv_heads=4)
    plan = ringsim.RingAttention(workload(q, k, v, False))
    out, lse = plan.with_lse(q, k, v)
    expected = plan.backward(dout)
    for five in ((q, k, v, out, lse), [q, k, v, out, lse], ringsim.Saved(q, k, v, out, lse)):
        assert same_bits(plan.backward(dout, five), expected)
    for other in ((q, k, v), "qkv", 7):
        with pytest.raises(RankMismatch, match="there is nothing to go back from"):
            plan.backward(dout, other)


def test_a_closed_plan_says_so():
    q, k, v, dout = four(seq=6, kv_heads=4)
    plan = ringsim.RingAttention(workload(q, k, v, False))
    plan(q, k, v)
    plan.close()
    for call in (lambda: plan(q, k, v), lambda: plan.backward(dout), lambda: plan.both(q, k, v, dout)):
        with pytest.raises(WorkloadError, match="the plan is closed: make a new one"):
            call()

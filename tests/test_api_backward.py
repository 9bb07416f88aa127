"""Gradients by the library's calls in one process: loopback ranks on threads, the same code that MPI runs."""

from dataclasses import replace

import numpy as np
import pytest

import ringsim
from ringsim.attention import Saved
from ringsim.backends.loopback import spawn
from ringsim.dtypes import numpy_dtype
from ringsim.errors import RankMismatch
from ringsim.reference import dense_attention, dense_backward
from ringsim.schedule import Schedule

from .test_api import PARTITIONS, Foreign, arrays, as_buffer, as_reversed_view, read_only, workload

NAMES = ("dq", "dk", "dv")
STRATEGY_TEXTS = ("ring", "burst", "bidirectional", "q-ring", "pass-q", "token-ring", "halo", "multi-ring(1)", "double-ring(1)")


def four(**options):
    """q, k, v and dout, all ranks'."""
    q, k, v = arrays(**options)
    shape = (*q.shape[:3], v.shape[3])
    return [q, k, v, np.random.default_rng(9).standard_normal(shape).astype(q.dtype)]


def exact(q, k, v, dout, causal=True):
    return dense_backward(workload(q, k, v, causal), dout, q, k, v)


def local(comm, every, partition="contiguous"):
    return [ringsim.shard(x, comm=comm, partition=partition) for x in every]


def check(found, expected, limit=2e-5):
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert one.shape == other.shape, name
        assert np.abs(one - other).max() <= limit * np.abs(other).max(), name


def same_bits(one, other):
    return [a.tobytes() for a in one] == [b.tobytes() for b in other]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_one_call_and_its_gradients_from_shards_and_back(world_size, partition, causal):
    every = four()

    def rank(comm):
        q, k, v, dout = local(comm, every, partition)
        options = {"comm": comm, "causal": causal, "partition": partition}
        out, lse = ringsim.ring_attention(q, k, v, **options, return_lse=True)
        gradients = ringsim.ring_attention_backward(dout, q, k, v, out, lse, **options)
        return [ringsim.unshard(one, comm=comm, partition=partition) for one in gradients]

    expected = exact(*every, causal)
    for gradients in spawn(world_size, rank):
        check(gradients, expected)


@pytest.mark.parametrize("text", STRATEGY_TEXTS)
def test_call_plan_and_one_program_give_the_same_bits(text):
    every = four(kv_heads=4)

    def rank(comm):
        q, k, v, dout = local(comm, every, "zigzag")
        options = {"comm": comm, "partition": "zigzag", "strategy": text}
        out, lse = ringsim.ring_attention(q, k, v, **options, causal=True, return_lse=True)
        called = ringsim.ring_attention_backward(dout, q, k, v, out, lse, **options, causal=True)
        plan = ringsim.RingAttention(workload(*every[:3], True), **options)
        plan(q, k, v)
        planned = plan.backward(dout)
        again = plan.backward(dout)
        both = plan.both(q, k, v, dout)
        assert same_bits(called, planned)
        assert same_bits(planned, again)
        assert same_bits(both, (out, *planned))
        return [ringsim.unshard(one, comm=comm, partition="zigzag") for one in planned]

    for gradients in spawn(3, rank):
        check(gradients, exact(*every))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_gradients_are_of_the_dtype_of_the_call(dtype):
    every = [x.astype(numpy_dtype(dtype)) for x in four(seq=9)]
    plan = ringsim.RingAttention(workload(*every[:3], True))
    plan(*every[:3])
    assert [one.dtype for one in plan.backward(every[3])] == [numpy_dtype(dtype)] * 3
    assert plan.saved.lse.dtype == ("float64" if dtype == "float64" else "float32")


def test_options_of_the_call_are_those_of_its_gradients():
    every = [x[:1] for x in four(seq=24)]
    work = replace(workload(*every[:3], True), mask=ringsim.Causal() & ringsim.Documents([5, 12, 7]), softmax_scale=0.3)
    options = {"causal": True, "cu_seqlens": [0, 5, 17, 24], "softmax_scale": 0.3, "sync": "step", "threads": 1}

    def rank(comm):
        q, k, v, dout = local(comm, every)
        out, lse = ringsim.ring_attention(q, k, v, comm=comm, **options, return_lse=True)
        gradients = ringsim.ring_attention_backward(dout, q, k, v, out, lse, comm=comm, **options)
        return [ringsim.unshard(one, comm=comm) for one in gradients]

    for gradients in spawn(3, rank):
        check(gradients, dense_backward(work, every[3], *every[:3]))
    by_mask = {"mask": "window(3, 0)", "comm": None}
    out, lse = ringsim.ring_attention(*every[:3], **by_mask, return_lse=True)
    found = ringsim.ring_attention_backward(every[3], *every[:3], out, lse, **by_mask)
    check(found, dense_backward(replace(work, mask=ringsim.Window(3, 0), softmax_scale=8**-0.5), every[3], *every[:3]))


# what is saved


def test_a_plan_goes_back_from_its_last_call_or_from_one_whose_arrays_were_kept():
    layers = [four(seed=seed) for seed in range(3)]

    def rank(comm):
        shards = [local(comm, layer) for layer in layers]
        plan = ringsim.RingAttention(workload(*layers[0][:3], True), comm=comm)
        assert plan.saved is None
        kept = []
        for q, k, v, _ in shards:
            out, lse = plan.with_lse(q, k, v)
            kept.append(plan.saved)
            assert [one is other for one, other in zip(plan.saved, (q, k, v, out, lse), strict=True)] == [True] * 5
        found = [plan.backward(shards[2][3])]
        found += [plan.backward(shards[layer][3], kept[layer]) for layer in (1, 0)]
        assert plan.saved is kept[2], "going back changes nothing"
        assert same_bits(plan.backward(shards[2][3]), found[0])
        first = plan.both(*shards[0])[1:]
        assert plan.saved.q is shards[0][0], "both is a call as well"
        assert same_bits(plan.backward(shards[0][3]), first)
        return [[ringsim.unshard(one, comm=comm) for one in gradients] for gradients in found[::-1]]

    for found in spawn(2, rank):
        for gradients, layer in zip(found, layers, strict=True):
            check(gradients, exact(*layer))


def test_what_is_saved_may_be_forgotten():
    q, k, v, dout = four(seq=6)
    plan = ringsim.RingAttention(workload(q, k, v, True))
    with pytest.raises(RankMismatch, match=r"rank 0: there is nothing to go back from: call the plan first, .*, or give `saved`"):
        plan.backward(dout)
    plan(q, k, v)
    kept, plan.saved = plan.saved, None
    with pytest.raises(RankMismatch, match="there is nothing to go back from"):
        plan.backward(dout)
    check(plan.backward(dout, kept), exact(q, k, v, dout))


def test_a_call_that_fails_keeps_what_was_saved():
    q, k, v, dout = four(seq=6)
    plan = ringsim.RingAttention(workload(q, k, v, True))
    plan(q, k, v)
    kept = plan.saved
    with pytest.raises(RankMismatch):
        plan(q[:, :3], k, v)
    assert plan.saved is kept
    check(plan.backward(dout), exact(q, k, v, dout))


def test_what_a_forward_pass_elsewhere_made_can_be_given():
    """As an activation that was kept on disk, or recomputed: out and lse need not come from this plan."""
    q, k, v, dout = (x.astype("float64") for x in four(seq=7))
    work = workload(q, k, v, True)
    plan = ringsim.RingAttention(replace(work, pass_="backward"))
    out, lse = dense_attention(work, q, k, v)
    check(plan.backward(dout, Saved(q, k, v, out, lse)), exact(q, k, v, dout), 1e-13)


# passes and their memory


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
def test_a_plan_of_any_pass_runs_them_all(pass_):
    every = four()

    def rank(comm):
        q, k, v, dout = local(comm, every)
        plan = ringsim.RingAttention(replace(workload(*every[:3], True), pass_=pass_), comm=comm)
        plan(q, k, v)
        first = plan.backward(dout)
        assert same_bits(plan.both(q, k, v, dout)[1:], first)
        assert plan.schedule.workload.pass_ == pass_
        return plan.shapes, [ringsim.unshard(one, comm=comm) for one in first]

    names = {"forward": ("q", "k", "v", "out"), "backward": ("q", "k", "v", "out", "lse", "dout", *NAMES)}
    names["both"] = ("q", "k", "v", "dout", "out", *NAMES)
    for shapes, gradients in spawn(2, rank):
        check(gradients, exact(*every))
        assert tuple(shapes) == names[pass_]
        q = shapes["q"]
        assert shapes.get("dq", q) == q
        assert shapes.get("lse", (2, 4, q[1])) == (2, 4, q[1])
        assert shapes["out"] == shapes.get("dout", shapes["out"]) == (*q[:3], 6)


@pytest.mark.parametrize("text", ["ring", "q-ring", "token-ring", "double-ring(2)"])
def test_passes_of_a_plan_share_memory(text):
    every = four()

    def rank(comm):
        q, k, v, dout = local(comm, every)
        alone = {}
        for pass_ in ("forward", "backward", "both"):
            work = replace(workload(*every[:3], False), pass_=pass_)
            alone[pass_] = ringsim.RingAttention(work, comm=comm, strategy=text).nbytes
        plan = ringsim.RingAttention(workload(*every[:3], False), comm=comm, strategy=text)
        assert plan.nbytes == alone["forward"]
        plan(q, k, v)
        first = plan.backward(dout)
        twice = plan.nbytes
        assert max(alone["forward"], alone["backward"]) <= twice < alone["forward"] + alone["backward"]
        plan(q * 2, k * 2, v * 2)
        plan.backward(dout * 3)
        assert plan.nbytes == twice, "made once"
        plan(q, k, v)
        assert same_bits(plan.backward(dout), first), "nothing is left in a shared slot"
        return True

    assert spawn(4, rank) == [True] * 4


def test_the_timeline_is_that_of_the_last_pass():
    every = four()

    def rank(comm):
        q, k, v, dout = local(comm, every)
        plan = ringsim.RingAttention(workload(*every[:3], True), comm=comm)
        seen = []
        for call in (lambda: plan(q, k, v), lambda: plan.backward(dout), lambda: plan.both(q, k, v, dout), lambda: plan(q, k, v)):
            call()
            timeline = plan.timeline()
            assert {event.rank for event in timeline.events} == {0, 1}
            seen.append((timeline.digest, {event.kind for event in timeline.events} & {"attend", "attend_backward"}))
        return seen

    work = workload(*every[:3], True)
    digests = [Schedule(workload=replace(work, pass_=p), world_size=2).digest for p in ("forward", "backward", "both", "forward")]
    kinds = [{"attend"}, {"attend_backward"}, {"attend", "attend_backward"}, {"attend"}]
    assert spawn(2, rank) == [list(zip(digests, kinds, strict=True))] * 2


# arrays


def test_packed_arrays_have_packed_gradients():
    every = [x[0] for x in four(seq=24, batch=1)]
    options = {"causal": True, "cu_seqlens": [0, 5, 17, 24]}

    def rank(comm):
        q, k, v, dout = (ringsim.shard(x, comm=comm, axis=0) for x in every)
        out, lse = ringsim.ring_attention(q, k, v, comm=comm, **options, return_lse=True)
        assert (out.ndim, lse.ndim) == (3, 2)
        called = ringsim.ring_attention_backward(dout, q, k, v, out, lse, comm=comm, **options)
        work = workload(*(x[None] for x in every[:3]), True)
        plan = ringsim.RingAttention(replace(work, mask=ringsim.Causal() & ringsim.Documents([5, 12, 7])), comm=comm)
        plan(q, k, v)
        assert [one.ndim for one in plan.saved] == [3, 3, 3, 3, 2]
        dq = np.full_like(q, np.nan)
        planned = plan.backward(dout, dq=dq)
        assert planned[0] is dq
        assert same_bits(planned, called)
        return [ringsim.unshard(one, comm=comm, axis=0) for one in called]

    work = replace(workload(*(x[None] for x in every[:3]), True), mask=ringsim.Causal() & ringsim.Documents([5, 12, 7]))
    expected = [one[0] for one in dense_backward(work, every[3][None], *(x[None] for x in every[:3]))]
    for gradients in spawn(2, rank):
        check(gradients, expected)


def test_gradients_go_where_they_are_asked_to():
    every = four()
    expected = exact(*every)

    def strided(x):
        """Every other row of heads-first memory, backwards."""
        return np.full((x.shape[0], x.shape[2], 2 * x.shape[1], x.shape[3]), np.nan, x.dtype).swapaxes(1, 2)[:, ::-2]

    def rank(comm):
        q, k, v, dout = local(comm, every)
        plan = ringsim.RingAttention(workload(*every[:3], True), comm=comm)
        plan(q, k, v)
        plain = plan.backward(dout)
        for make in (np.empty_like, strided):
            targets = [make(x) for x in (q, k, v)]
            found = plan.backward(dout, dq=targets[0], dk=targets[1], dv=targets[2])
            assert [one is other for one, other in zip(found, targets, strict=True)] == [True] * 3
            assert same_bits([np.ascontiguousarray(x) for x in found], plain)
        some = plan.backward(dout, dv=targets[2])
        assert some[2] is targets[2]
        assert not any(np.may_share_memory(some[i], targets[i]) for i in range(2))
        return [ringsim.unshard(np.ascontiguousarray(one), comm=comm) for one in found]

    for gradients in spawn(2, rank):
        check(gradients, expected)


@pytest.mark.parametrize("kind", [Foreign, as_buffer, as_reversed_view, read_only])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("text", ["ring", "burst"])
def test_what_speaks_dlpack_or_buffers_is_taken_as_it_is(kind, world_size, text):
    every = four(seq=8)

    def rank(comm):
        q, k, v, dout = (kind(np.ascontiguousarray(x)) for x in local(comm, every))
        options = {"comm": comm, "causal": True, "strategy": text}
        out, lse = (kind(x) for x in ringsim.ring_attention(q, k, v, **options, return_lse=True))
        gradients = ringsim.ring_attention_backward(dout, q, k, v, out, lse, **options)
        plan = ringsim.RingAttention(workload(*every[:3], True), comm=comm, strategy=text)
        plan(q, k, v)
        assert same_bits(plan.backward(dout), gradients)
        return [ringsim.unshard(one, comm=comm) for one in gradients]

    for gradients in spawn(world_size, rank):
        check(gradients, exact(*every))


def test_inputs_are_left_as_they_were():
    every = four(seq=8)
    plan = ringsim.RingAttention(workload(*every[:3], True))
    plan(*every[:3])
    held = [*plan.saved, every[3]]
    before = [x.tobytes() for x in held]
    plan.backward(every[3])
    assert [x.tobytes() for x in held] == before


def test_one_array_for_q_k_and_v():
    x, dout = four(heads=4, kv_heads=4)[:2]
    work = replace(workload(x, x, x, True), v_head_dim=8)
    plan = ringsim.RingAttention(work)
    plan(x, x, x)
    check(plan.backward(dout), dense_backward(work, dout, x, x, x))

"""The memory model: against the papers' terms, and against what a run really allocates."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringsim
from ringsim import inputs
from ringsim.errors import WorkloadError
from ringsim.execution import Rank
from ringsim.footprint import FeedForward, Layers, weigh, weigh_blockwise, weigh_dense
from ringsim.lowering import Blocking
from ringsim.schedule import Recv, Send
from ringsim.schedule.job import GIVEN

BLOCK = Blocking(q_rows=256, k_rows=256, edge_rows=128)
BACKWARD_BLOCK = Blocking(q_rows=192, k_rows=320, edge_rows=64)
LAYER = ["--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--dtype", "bf16"]


def bf16(seq, *, heads=32, head_dim=128, batch=1, **more):
    return ringsim.Workload(q_len=seq, batch=batch, heads=heads, head_dim=head_dim, dtype="bfloat16", **more)


def test_the_classic_figures_of_keys_and_values():
    """Sequence 1024, width 4096, float32: 33.55 MB of keys and values, 16.78 MB on each of two ranks."""
    work = ringsim.Workload(q_len=1024, heads=32, head_dim=128, dtype="float32")
    assert weigh_dense(work).classes["k, v"] == 33_554_432
    for rank in range(2):
        found = weigh(ringsim.Schedule(workload=work, world_size=2), rank)
        assert found.classes["k, v"] == 16_777_216
        assert found.classes["in flight"] == 16_777_216


@pytest.mark.parametrize(("b", "n", "d", "s", "ranks"), [(1, 32, 128, 8192, 8), (2, 16, 64, 6000, 5)])
def test_table_1_of_ring_attention_term_by_term(b, n, d, s, ranks):
    """arXiv 2310.01889v4, table 1: bytes a layer in bfloat16; h = n d, feed-forward of 4h, c tokens a rank."""
    h, work = n * d, bf16(s, heads=n, head_dim=d, batch=b)
    feed_forward = FeedForward(dim=4 * h)
    vanilla = weigh_dense(work, feed_forward=feed_forward).classes
    assert vanilla["scores"] == 2 * b * n * s * s
    assert vanilla["activations"] == 8 * b * s * h
    one_block = weigh_blockwise(work, feed_forward=FeedForward(dim=4 * h, block=1)).classes
    assert one_block["output"] == 2 * b * s * h
    assert one_block["activations"] == 2 * b * s * h + 8 * b * h
    ring = weigh(ringsim.Schedule(workload=work, world_size=ranks), 0)
    c = -(-s // ranks)
    block_nbytes = 2 * b * c * h
    # the paper's six blocks: q, the two at hand, the two arriving, the output
    assert ring.classes["q"] == ring.classes["output"] == block_nbytes
    assert ring.classes["k, v"] == 2 * block_nbytes
    # ours: two slots each, since the caller's own k and v are left as they are; float32 partials
    assert ring.classes["in flight"] == 2 * 2 * block_nbytes
    assert ring.classes["partial output"] == 2 * block_nbytes
    assert ring.classes["statistics"] == 3 * 4 * b * n * c
    assert sum(ring.classes.values()) == ring.nbytes == (6 + 2 + 2) * block_nbytes + 12 * b * n * c


def test_the_feed_forward_by_hand():
    """Its peak holds its input; rows are queries; a block is no longer than the rows; one wider than it needs no more place."""
    work = bf16(1000, heads=2, head_dim=64, kv_len=5000, batch=3)
    width, element = 2 * 64, 2
    all_rows = weigh_dense(work, feed_forward=FeedForward(dim=10 * width, block=7))
    assert all_rows.classes["activations"] == 3 * 1000 * 10 * width * element
    alone = weigh_blockwise(work, feed_forward=FeedForward(dim=100 * width))
    assert alone.nbytes == 3 * 1000 * 100 * width * element + alone.classes["output"] > alone.attention_nbytes
    for block, units in ((7, 7), (4000, 1000)):
        by_blocks = weigh_blockwise(work, feed_forward=FeedForward(dim=10 * width, block=block))
        assert by_blocks.classes["activations"] == 3 * (1000 * width + units * 10 * width) * element
    narrow = weigh_blockwise(work, feed_forward=FeedForward(dim=1))
    assert narrow.classes["activations"] == 3 * 1000 * width * element


def test_scratch_by_hand():
    """Nothing for no tiles; the divisor and its mask while the output is finished."""
    none = weigh(ringsim.Schedule(workload=bf16(0), world_size=1), 0, blocking=BLOCK)
    assert "scratch" not in none.classes
    work = ringsim.Workload(q_len=70000, kv_len=64, heads=64, head_dim=8, dtype="float32")
    own = sum(size * (4 if not kind else {"bool": 1, "int32": 4}[kind]) for size, kind in BLOCK.scratch(8).values())
    found = weigh(ringsim.Schedule(workload=work, world_size=1), 0, blocking=BLOCK)
    assert found.classes["scratch"] == own + 70000 * 64 * 5


def test_long_messages_are_weighed_whole():
    """Chunks of 2 GiB would be many; they are the same bytes."""
    long, short = (ringsim.Schedule(workload=bf16(seq, kv_heads=8), world_size=4) for seq in (2**32, 2**12))
    programs = [tuple(schedule.program(1, whole=True)) for schedule in (long, short)]
    assert len(programs[0]) == len(programs[1])
    assert weigh(long, 1).nbytes == 2**20 * weigh(short, 1).nbytes
    cut = replace(short, max_message_nbytes=1000)
    assert weigh(cut, 1).classes == weigh(short, 1).classes


def test_two_ranks_need_one_slot_each():
    ring = weigh(ringsim.Schedule(workload=bf16(4096), world_size=2), 1)
    assert ring.classes["in flight"] == ring.classes["k, v"]
    alone = weigh(ringsim.Schedule(workload=bf16(4096), world_size=1), 0)
    assert "in flight" not in alone.classes


@given(
    seq=st.integers(1, 300),
    ranks=st.integers(1, 7),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 6)]),
    causal=st.booleans(),
    partition=st.sampled_from(["contiguous", "zigzag", "striped"]),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
)
@settings(max_examples=120, deadline=None)
def test_every_buffer_is_classed_once(seq, ranks, heads, causal, partition, dtype):
    work = ringsim.Workload(
        q_len=seq, heads=heads[0], kv_heads=heads[1], head_dim=8, dtype=dtype, mask=ringsim.Causal() if causal else ringsim.Full()
    )
    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition)
    for rank in range(ranks):
        found = weigh(schedule, rank)
        assert sum(found.classes.values()) == sum(found.buffers.values()) == sum(schedule.buffers(rank).values())
        filled = {(op.region.buffer, op.region.slot) for op in schedule.program(rank) if isinstance(op, Recv)}
        assert found.classes.get("in flight", 0) == sum(schedule.buffers(rank)[key] for key in filled)
        sent = [op.region for op in schedule.program(rank) if isinstance(op, Send)]
        assert all(region.nbytes <= schedule.buffers(rank)[region.buffer, region.slot] for region in sent)


def test_causal_contiguous_ranks_differ():
    schedule = ringsim.Schedule(workload=replace(bf16(8192), mask=ringsim.Causal()), world_size=4)
    in_flight = [weigh(schedule, rank).classes.get("in flight", 0) for rank in range(4)]
    assert in_flight[0] == 0
    assert in_flight[1] < in_flight[2] == in_flight[3]


# what a run really allocates


def run_traced(work, ranks, partition, strategy="ring"):
    """Peak bytes of a whole run of all ranks in this process, arrays included, and the model's."""
    from ringsim.backends.loopback import World
    from ringsim.backends.numpy import NumpyBackend
    from ringsim.execution import drive_all

    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition, strategy=strategy)
    cut = {"blocking": BLOCK, "backward_blocking": BACKWARD_BLOCK}
    predicted = sum(weigh(schedule, rank, **cut).nbytes for rank in range(ranks))
    # what is imported and cached on first use is no part of a run
    few = replace(work, q_len=8, kv_len=8, mask=ringsim.Causal())
    small = {name: inputs.rows(few, name, np.arange(8), 0) for name in GIVEN[work.pass_]}
    ringsim.execute(ringsim.Schedule(workload=few, world_size=ranks, partition=partition, strategy=strategy), **small)
    gc.collect()
    tracemalloc.start()
    try:
        world = World(ranks)
        walkers, kept = [], []
        for rank in range(ranks):
            one = Rank(schedule, world.endpoint(rank), NumpyBackend(**cut))
            arrays = {name: np.empty(shape, one.dtype(name)) for name, shape in one.shapes().items()}
            for name in GIVEN[work.pass_]:
                split = schedule.job.kv_partition if name in "kv" else schedule.job.q_partition
                arrays[name] = inputs.rows(work, name, split.positions(rank), 0)
            walkers.append(one.walker(*arrays.values()))
            kept.append(one)
        tracemalloc.reset_peak()
        drive_all(walkers)
        lses = [one.finish(walker) for one, walker in zip(kept, walkers, strict=True)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(np.isfinite(lse).all() for lse in lses)
    return peak, predicted


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("causal", "partition"), [(True, "zigzag"), (False, "contiguous"), (True, "striped")])
def test_a_real_run_allocates_what_the_model_says(dtype, causal, partition):
    """Within 2 % of the peak of tracemalloc, which sees every array and every Python object."""
    mask = ringsim.Causal() if causal else ringsim.Full()
    work = ringsim.Workload(q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype=dtype, mask=mask)
    peak, predicted = run_traced(work, 3, partition)
    assert peak == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("strategy", ["ring", "burst", "double-ring(3)", "halo"])
@pytest.mark.parametrize(("dtype", "mask"), [("float32", "causal"), ("bfloat16", "full")])
def test_a_run_with_its_backward_pass_allocates_what_the_model_says(strategy, dtype, mask):
    work = ringsim.Workload(
        q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype=dtype, mask=ringsim.mask_named(mask), pass_="both"
    )
    peak, predicted = run_traced(work, 3, "zigzag", strategy)
    assert peak == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("pass_", ["backward", "both"])
def test_gradients_by_class(pass_):
    """32/8 heads of 128 in bfloat16: the bytes of each class, counted by hand, of the middle one of 3 ranks."""
    rows, wide, narrow = 1000, 32 * 128, 8 * 128
    work = ringsim.Workload(q_len=3 * rows, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", pass_=pass_)
    found = weigh(ringsim.Schedule(workload=work, world_size=3), 1).classes
    assert found["gradients"] == 2 * rows * (2 * wide + 2 * narrow)
    # dq; dk and dv: its own, its part of another's, and two of others on their way, one of which is cleared here
    assert found["gradient sums"] == 4 * rows * (wide + 3 * 2 * narrow)
    assert found["in flight"] == 2 * rows * 2 * 2 * narrow + 4 * rows * 2 * 2 * narrow
    assert found["statistics"] == (2 if pass_ == "backward" else 4) * 4 * rows * 32


def test_layers_keep_what_they_need_or_their_input():
    rows, width, hidden = 1024, 32 * 128, 4 * 32 * 128
    work = ringsim.Workload(q_len=8 * rows, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", pass_="both")
    schedule = ringsim.Schedule(workload=work, world_size=8)

    def saved(feed_forward=None, **options):
        return weigh(schedule, 0, feed_forward=feed_forward, layers=Layers(**options)).classes.get("saved", 0)

    keys_and_values = 2 * 8 * 128
    one = 2 * rows * (width + 2 * width + keys_and_values) + 4 * rows * 32
    own = 2 * rows * width
    assert saved(count=1) == own
    assert saved(count=33) == own + 32 * one
    assert saved(count=33, recompute=True) == 33 * own
    assert saved(FeedForward(dim=hidden), count=2) == own + one + 2 * rows * (width + hidden)
    assert saved(FeedForward(dim=hidden, block=64), count=2) == own + one + 2 * rows * width
    whole = weigh(schedule, 0, layers=Layers(count=33))
    assert whole.nbytes == own + 32 * one + weigh(schedule, 0).nbytes


@pytest.mark.parametrize("block", [None, 64])
def test_a_feed_forward_that_goes_back_holds_gradients_and_leaves_attention_what_it_needs(block):
    rows, width, hidden = 1024, 32 * 128, 64 * 32 * 128
    work = ringsim.Workload(q_len=8 * rows, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", pass_="both")
    found = weigh(ringsim.Schedule(workload=work, world_size=8), 0, feed_forward=FeedForward(dim=hidden, block=block))
    at_once = block or rows
    assert found.classes["activations"] == 2 * (rows * width + at_once * (2 * hidden + width))
    if block is None:
        kept = sum(found.classes[name] for name in ("q", "k, v", "output", "statistics"))
        assert found.nbytes == kept + found.classes["activations"] > found.attention_nbytes
    else:
        assert found.nbytes == found.attention_nbytes
    with pytest.raises(WorkloadError, match="there are 0 layers"):
        Layers(count=0)


def test_dense_keeps_its_weights_and_their_gradients():
    work = ringsim.Workload(q_len=512, heads=4, head_dim=64, dtype="bfloat16", pass_="both")
    scores = 4 * 512 * 512 * 2
    kept = weigh_dense(work, layers=Layers(count=3)).classes
    assert kept["scores"] == 2 * scores
    recomputed = weigh_dense(work, layers=Layers(count=3, recompute=True)).classes
    own = 512 * 4 * 64 * 2
    assert recomputed["saved"] == 3 * own
    statistics = 2 * 512 * 4 * 4
    assert kept["saved"] == own + 2 * scores + 2 * 5 * own + statistics


@pytest.mark.parametrize(
    "strategy", ["bidirectional", "multi-ring(2)", "double-ring(2)", "halo", "q-ring", "token-ring", "pass-q", "ring"]
)
@pytest.mark.parametrize(("dtype", "mask"), [("float32", "full"), ("bfloat16", "causal & documents(2000, 3500, 500)")])
def test_a_run_of_each_strategy_allocates_what_the_model_says(strategy, dtype, mask):
    work = ringsim.Workload(q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype=dtype, mask=ringsim.mask_named(mask))
    peak, predicted = run_traced(work, 4, "zigzag", strategy)
    assert peak == pytest.approx(predicted, rel=0.02)


def test_a_model_without_a_class_would_be_seen_to_be_wrong():
    work = ringsim.Workload(q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype="float32")
    peak, _ = run_traced(work, 3, "contiguous")
    each = [weigh(ringsim.Schedule(workload=work, world_size=3), rank, blocking=BLOCK) for rank in range(3)]
    for name in ("q", "k, v", "in flight", "output", "partial output", "scratch"):
        less = sum(found.nbytes - found.classes[name] for found in each)
        assert abs(less / peak - 1) > 0.02, name


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_allocates_what_it_says(threads, dtype, heads, kv_heads):
    """Several threads, few heads. Which heads they are at when one goes on is chance: the model says the most."""
    work = ringsim.Workload(q_len=8192, heads=heads, kv_heads=kv_heads, head_dim=64, dtype=dtype, mask=ringsim.Causal())
    small = replace(work, q_len=8, kv_len=8)
    ringsim.RingAttention(small, threads=threads)(*(inputs.rows(small, name, np.arange(8), 0) for name in "qkv"))
    gc.collect()
    tracemalloc.start()
    try:
        plan = ringsim.RingAttention(work, threads=threads)
        out = plan(*(inputs.rows(work, name, np.arange(8192), 0) for name in "qkv"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(np.asarray(out, np.float32)).all()
    slack = 2 * 8192 * 64 * 4 * threads if threads > 1 and dtype == "bfloat16" and kv_heads > 1 else 0
    assert 0.98 * peak <= plan.footprint.nbytes <= 1.02 * peak + slack


def test_threads_that_are_at_heads_of_their_own():
    """Few rows of queries and long heads: three threads at three of them, and a fourth on its way."""
    work = ringsim.Workload(q_len=64, kv_len=8192, heads=8, kv_heads=8, head_dim=64, dtype="bfloat16")
    one, three = (
        weigh(ringsim.Schedule(workload=work, world_size=1), 0, blocking=BLOCK, threads=n).classes["scratch"] for n in (1, 3)
    )
    widened = 8192 * 64 * 2 * 4
    own = sum(size * (4 if not kind else {"bool": 1, "int32": 4}[kind]) for size, kind in BLOCK.scratch(64).values())
    assert three - one == 2 * own + 3 * widened


@pytest.mark.parametrize(
    ("seq", "ranks", "heads", "dtype", "causal", "partition"),
    [
        (20002, 4, 1, "bfloat16", False, "contiguous"),
        (6001, 3, 2, "float16", True, "zigzag"),
        (4001, 3, 8, "bfloat16", False, "striped"),
    ],
)
def test_uneven_shards_in_half_precision(seq, ranks, heads, dtype, causal, partition):
    mask = ringsim.Causal() if causal else ringsim.Full()
    work = ringsim.Workload(q_len=seq, heads=heads, head_dim=128, dtype=dtype, mask=mask)
    peak, predicted = run_traced(work, ranks, partition)
    assert peak == pytest.approx(predicted, rel=0.02)

"""Partitions with arguments: shares by weight, runs by hand, and those that balance the work of a mask."""

import math
import re
import tracemalloc
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.balance import GOOD, NEAR, _deal, _exchange, _swap, balanced, partitions, work_of
from ringsim.errors import WorkloadError
from ringsim.mask import Causal, Documents, Full, Window
from ringsim.partition import Partition, apportion, runs_text
from ringsim.schedule import Schedule
from ringsim.workload import Workload

from .counting import calls

REPEATABLE = settings(max_examples=150, deadline=None, derandomize=True)
WEIGHTS = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)


def check(partition):
    """Every token once, and spans that fill the rows of their rank in the order of the sequence."""
    held = [partition.positions(rank) for rank in range(partition.world_size)]
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(partition.length))
    for rank, positions in enumerate(held):
        spans = partition.spans(rank)
        assert [span.row for span in spans] == [sum(before.count for before in spans[:i]) for i in range(len(spans))]
        assert all(span.count > 0 for span in spans)
        assert all(after.start > before.last + 1 for before, after in pairwise(spans)), "neighbours are one span"
        assert partition.count(rank) == len(positions)
        assert (np.diff(positions) > 0).all()


def cut(kind, length, world_size):
    return Partition(kind=kind, length=length, world_size=world_size)


def called(name, values):
    return f"{name}({','.join(map(str, values))})"


@REPEATABLE
@given(st.sampled_from(["contiguous", "zigzag"]), WEIGHTS, st.integers(0, 60))
def test_a_weighted_partition_gives_each_rank_its_share(kind, weights, length):
    partition = cut(called(kind, weights), length, len(weights))
    if partition.kind != kind:
        check(partition)
    runs = 1 if kind == "contiguous" else 2
    for rank, weight in enumerate(weights):
        share = Fraction(weight * length, sum(weights))
        assert abs(partition.count(rank) - share) < runs
        assert weight or not partition.count(rank)


@REPEATABLE
@given(st.sampled_from(["contiguous", "zigzag"]), st.integers(1, 7), st.integers(1, 10**6), st.integers(0, 60))
def test_equal_weights_are_none(kind, world_size, weight, length):
    assert cut(called(kind, [weight] * world_size), length, world_size) == cut(kind, length, world_size)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("contiguous(3,1,1)", "contiguous(3,1,1)"),
        (" contiguous ( 3.0 , 1, 1.00 ) ", "contiguous(3,1,1)"),
        ("contiguous(0.75,0.25,0.25)", "contiguous(3,1,1)"),
        ("zigzag(600,200,200)", "zigzag(3,1,1)"),
        ("zigzag(0,0,7)", "zigzag(0,0,1)"),
        ("zigzag(7,7,7)", "zigzag"),
        ("striped()", "striped"),
        ("runs(0:3, 0:2, 1:0, 0:1, 2:4)", "runs(0:6,2:4)"),
        ("runs(02:010)", "runs(2:10)"),
    ],
)
def test_equal_partitions_have_equal_text(written, canonical):
    partition = cut(written, 10, 3)
    assert partition.kind == canonical
    assert partition == cut(canonical, 10, 3)
    assert hash(partition) == hash(cut(canonical, 10, 3))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("contiguous(3,1,1)", [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]),
        ("contiguous(0,1,1)", [[], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        ("zigzag(3,1,1)", [[0, 1, 2, 7, 8, 9], [3, 6], [4, 5]]),
        ("runs(2:1,0:3,1:2,2:3,0:1)", [[1, 2, 3, 9], [4, 5], [0, 6, 7, 8]]),
        ("runs(1:10)", [[], list(range(10)), []]),
    ],
)
def test_a_partition_with_arguments_deals_ten_tokens_to_three_ranks(kind, expected):
    partition = cut(kind, 10, 3)
    assert [partition.positions(rank).tolist() for rank in range(3)] == expected


@REPEATABLE
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=20), st.integers(6, 8))
def test_runs_hold_the_sequence_in_its_order(runs, world_size):
    length = sum(count for _, count in runs)
    partition = cut(runs_text(runs) if runs else "runs()", length, world_size)
    check(partition)
    owners = np.repeat([owner for owner, _ in runs], [count for _, count in runs])
    for rank in range(world_size):
        assert partition.positions(rank).tolist() == np.flatnonzero(owners == rank).tolist()
    assert cut(partition.kind, length, world_size) == partition


@REPEATABLE
@given(st.integers(0, 100), WEIGHTS)
def test_shares_are_rounded_up_where_most_was_cut_off(length, weights):
    shares = apportion(length, weights)
    assert sum(shares) == length
    lost = [Fraction(weight * length, sum(weights)) - share for weight, share in zip(weights, shares, strict=True)]
    rounded_up, rounded_down = [-x for x in lost if x < 0], [x for x in lost if x >= 0]
    assert all(1 - up >= down for up in rounded_up for down in rounded_down)
    assert all(-1 < x < 1 for x in lost)


@REPEATABLE
@given(WEIGHTS, st.integers(1, 20))
def test_weighted_zigzag_gives_causal_work_by_weight(weights, unit):
    length = 2 * unit * sum(weights)
    work = work_of(cut(called("zigzag", weights), length, len(weights)), Workload(q_len=length, mask=Causal()))
    assert work == tuple(weight * unit * (length + 1) for weight in weights)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("random", "unknown partition 'random'; known: contiguous, striped, zigzag, contiguous(weights)"),
        (None, "unknown partition None; known: contiguous"),
        ("zig zag", "partition 'zig zag' is not a name with arguments"),
        (
            "contiguous(3,1)",
            "partition 'contiguous(3,1)': give one weight for each of 3 ranks, numbers such as 3 or 0.25, not all 0",
        ),
        ("zigzag(1,-1,1)", "give one weight for each of 3 ranks"),
        ("zigzag(0,0,0)", "not all 0: zigzag(2,1,1)"),
        ("zigzag(1,nan,1)", "give one weight for each of 3 ranks"),
        ("zigzag(1,1/2,1)", "give one weight for each of 3 ranks"),
        ("zigzag(1,1e3,1)", "give one weight for each of 3 ranks"),
        ("striped(3,1,1)", "partition 'striped(3,1,1)': striped takes no such arguments"),
        ("contiguous(weights=3)", "contiguous takes no such arguments"),
        ("runs(3)", "partition 'runs(3)': give owner:tokens for each run in order, as in runs(0:512,1:1024,0:512)"),
        ("runs(0:4,1:-6)", "give owner:tokens for each run"),
        ("runs(0:4,3:6)", "owner 3 is outside a world of 3; allowed: 0 to 2"),
        ("runs(0:4,1:5)", "holds 9 tokens, the sequence 10: its counts must sum to that"),
        ("balanced", "depends on the mask: ask ringsim.balance.partitions('balanced', workload, 3) for it"),
    ],
)
def test_a_partition_that_cannot_exist_is_refused(kind, message):
    with pytest.raises(WorkloadError, match=re.escape(message)):
        cut(kind, 10, 3)


def test_a_long_text_is_not_repeated_whole():
    with pytest.raises(WorkloadError) as refused:
        cut(runs_text((index % 2, 1) for index in range(1000)), 1001, 2)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("rank", [-1, 3])
@pytest.mark.parametrize("kind", ["runs(0:10)", "zigzag(3,1,1)"])
def test_no_rank_outside_its_world(kind, rank):
    for ask in ("positions", "count", "spans"):
        with pytest.raises(WorkloadError, match=f"rank {rank} is outside a world of 3"):
            getattr(cut(kind, 10, 3), ask)(rank)


MASKS = st.sampled_from(
    [Full(), Causal(), Documents((7, 1, 30, 20, 11)), Causal() & Documents((60, 5, 5, 5)), Causal() & Window(9, 0)]
)


@REPEATABLE
@given(MASKS, st.integers(0, 90), st.integers(1, 6), st.integers(1, 9), st.data())
def test_balanced_deals_every_token_once_and_work_evenly(mask, length, world_size, chunks, data):
    kv_len = data.draw(st.integers(75, 90) if mask.extent else st.integers(0, 90))
    work = Workload(q_len=length, kv_len=kv_len, q_offset=data.draw(st.integers(0, 9)), mask=mask)
    partition = balanced(work, world_size, chunks)
    everything = np.sort(np.concatenate([partition.positions(rank) for rank in range(world_size)]))
    assert np.array_equal(everything, np.arange(length))
    counts = [partition.count(rank) for rank in range(world_size)]
    assert max(counts) - min(counts) <= chunks
    pieces = cut("contiguous", length, world_size * max(1, min(chunks, length // world_size)))
    found = work_of(partition, work)
    visible = mask.visible(np.arange(length) + work.q_offset, np.arange(kv_len))
    assert sum(found) == visible.sum()
    assert max(found) <= NEAR * (Fraction(sum(found), world_size) + max(work_of(pieces, work)))
    assert max(found) <= NEAR * min(max(work_of(cut(kind, length, world_size), work)) for kind in ("contiguous", "zigzag"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("length", [4096, 4099])
def test_balanced_is_zigzag_under_a_causal_mask_and_contiguous_under_none(length, world_size):
    for mask, kind in ((Causal(), "zigzag" if world_size > 1 else "contiguous"), (Full(), "contiguous")):
        work = Workload(q_len=length, mask=mask)
        queries, keys = partitions("balanced", work, world_size)
        assert queries is keys
        if length % (2 * world_size) == 0:
            assert queries.kind == kind
        # no way of whole tokens is much better
        assert max(work_of(queries, work)) <= (GOOD if length == 4096 else 1.05) * sum(work_of(queries, work)) / world_size


def test_balanced_counts_each_sequence_of_a_batch_by_its_length():
    work = Workload(q_len=512, batch=3, lengths=(512, 64, 64), mask=Causal())
    split = balanced(work, 4)
    assert sum(work_of(split, work)) == 512 * 513 // 2 + 2 * (64 * 65 // 2)
    assert max(work_of(split, work)) <= GOOD * sum(work_of(split, work)) / 4
    assert max(work_of(cut("zigzag", 512, 4), work)) > GOOD * sum(work_of(split, work)) / 4


def lengths_of(count, total, seed=0):
    """Documents of lengths that differ by orders of magnitude."""
    drawn = np.random.default_rng(seed).lognormal(7, 1.2, count)
    return tuple(np.maximum(1, drawn / drawn.sum() * total).astype(int).tolist())


def test_balanced_evens_out_documents_where_nothing_else_does():
    lengths = lengths_of(1000, 2**20)
    work = Workload(q_len=sum(lengths), mask=Causal() & Documents(lengths))
    (queries, _), made = calls(lambda: partitions("balanced", work, 64))
    # of some 2,000 chunks each asks its own mask about its own documents
    assert made < 1_000_000
    mean = sum(length * (length + 1) // 2 for length in lengths) / 64
    assert max(work_of(queries, work)) < GOOD * mean
    assert min(max(work_of(cut(kind, work.q_len, 64), work)) for kind in ("contiguous", "zigzag")) > 4 * mean
    counts = [queries.count(rank) for rank in range(64)]
    assert max(counts) - min(counts) <= 32


@pytest.mark.parametrize("mask", [Documents((512,) * 8), Causal() & Documents((512,) * 8)])
def test_documents_of_equal_length_stay_where_they_are(mask):
    assert partitions("balanced", Workload(q_len=4096, mask=mask), 8)[0].kind == "contiguous"


@pytest.mark.parametrize(
    ("text", "options", "keys"),
    [
        ("balanced(4)", {"kv_len": 96}, "contiguous"),
        ("balanced(4)", {"q_offset": 5, "mask": Causal()}, "contiguous"),
        ("runs(0:20,1:44)", {"kv_len": 96}, "contiguous"),
        ("runs(0:20,1:44)", {"q_offset": 5}, "runs(0:20,1:44)"),
        ("zigzag", {"kv_len": 96}, "zigzag"),
        ("zigzag(1,3)", {"kv_len": 96}, "zigzag(1,3)"),
        ("striped", {"q_offset": 5}, "striped"),
    ],
)
def test_keys_are_split_as_queries_where_that_can_be(text, options, keys):
    work = Workload(q_len=64, **options)
    queries, found = partitions(text, work, 2)
    assert (queries.length, found.length, found.kind) == (64, work.kv_len, keys)


@pytest.mark.parametrize(
    "text", ["balanced(0)", "balanced(x)", "balanced(1,2)", "balanced(m=3)", "balanced(5000)", "balanced(-1)"]
)
def test_balanced_with_other_arguments_is_refused(text):
    with pytest.raises(
        WorkloadError, match=re.escape(f"partition {text!r}: balanced takes at most the chunks per rank, 1 to 4096")
    ):
        partitions(text, Workload(q_len=64), 2)


@pytest.mark.parametrize("chunks", [0, -1, 5000, 2.5, "x", "8", True, [8]])
def test_chunks_that_the_text_refuses_the_function_refuses(chunks):
    with pytest.raises(
        WorkloadError, match=re.escape(f"chunks {chunks!r}: balanced takes at most the chunks per rank, 1 to 4096")
    ):
        balanced(Workload(q_len=64), 2, chunks)


def test_a_number_of_very_many_digits_is_refused_in_short():
    with pytest.raises(WorkloadError, match="balanced takes at most the chunks per rank") as refused:
        partitions(f"balanced({'9' * 5000})", Workload(q_len=64), 2)
    assert len(str(refused.value)) < 200


def best_swap(work, owners, loads):
    """The larger of two loads after the best swap of a chunk of the most laden rank, of all pairs; its load if none lowers it."""
    top = int(np.argmax(loads))
    mine, others = np.flatnonzero(owners == top), np.flatnonzero(owners != top)
    moved = work[mine][:, None] - work[others]
    return np.maximum(loads[top] - moved, loads[owners[others]] + moved).min(initial=loads[top])


@REPEATABLE
@given(st.data(), st.integers(1, 6), st.integers(1, 6))
def test_a_swap_is_the_best_of_all_pairs_of_chunks(data, world_size, chunks):
    work = np.array(data.draw(st.lists(st.integers(0, 99), min_size=world_size * chunks, max_size=world_size * chunks)))
    owners = np.repeat(np.arange(world_size), chunks)
    loads = np.bincount(owners, weights=work, minlength=world_size).astype(np.int64)
    top = int(np.argmax(loads))
    before = loads[top]
    best = best_swap(work, owners, loads)
    held = np.argsort(owners * 1000 + work, kind="stable").reshape(world_size, chunks)
    found = _exchange(work, held, loads, top, np.flatnonzero(np.arange(world_size) != top)) if world_size > 1 else None
    if found is None:
        assert best == before
    else:
        other, mine, theirs = found
        moved = work[held[top, mine]] - work[held[other, theirs]]
        assert max(before - moved, loads[other] + moved) == best < before
    _swap(work, owners, loads)
    assert loads.tolist() == np.bincount(owners, weights=work, minlength=world_size).astype(int).tolist()
    assert np.bincount(owners, minlength=world_size).tolist() == [chunks] * world_size
    assert best_swap(work, owners, loads) == loads.max()


def test_many_chunks_are_dealt_in_few_calls_and_little_memory():
    lengths = lengths_of(300, 2**18)
    work = Workload(q_len=sum(lengths), mask=Causal() & Documents(lengths))
    chunks = np.array(work_of(cut("contiguous", work.q_len, 16 * 1024), work))
    owners, made = calls(lambda: _deal(chunks, 16))
    # a few for each of 16,384 chunks
    assert made < 2 * len(chunks)
    tracemalloc.start()
    assert np.array_equal(_deal(chunks, 16), owners)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    loads = np.bincount(owners, weights=chunks)
    assert loads.max() < 1.00001 * loads.mean()


@pytest.mark.parametrize("text", ["unheard-of", None, 3])
def test_an_unknown_partition_of_a_workload_is_refused(text):
    with pytest.raises(WorkloadError, match="unknown partition"):
        partitions(text, Workload(q_len=64), 2)


@pytest.mark.parametrize("kind", ["contiguous(3,1,1)", "zigzag(3,1,1)", "zigzag(1,0,2)", "runs(2:10,0:9,1:4,0:14)"])
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_the_ring_covers_every_pair_under_any_partition(kind, mask):
    schedule = Schedule(workload=Workload(q_len=37, mask=mask), world_size=3, partition=kind)
    schedule.validate()
    assert math.isclose(
        sum(op.flops for rank in range(3) for op in schedule.program(rank) if getattr(op, "kernel", "") == "attend"),
        4 * 64 * sum(work_of(schedule.job.q_partition, schedule.workload)),
    )

"""Spans, tiles, partitions, masks and workloads: which token is where, and which query sees which key."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.errors import WorkloadError
from ringsim.mask import Causal, Full, mask_named
from ringsim.partition import KINDS, Partition
from ringsim.tile import Span, Tile, visible_keys
from ringsim.workload import Workload

REPEATABLE = settings(max_examples=300, deadline=None, derandomize=True)
BOUND = st.none() | st.integers(-30, 30)


@st.composite
def spans(draw, smallest=0):
    row, count, start, step = (draw(st.integers(*ends)) for ends in ((0, 9), (smallest, 15), (-25, 25), (1, 5)))
    return Span(row=row, count=count, start=start, step=step)


def dense_band(q, k, lo, hi):
    distance = q.positions()[:, None] - k.positions()[None, :]
    return (True if lo is None else distance >= lo) & (True if hi is None else distance <= hi) & np.ones_like(distance, bool)


def test_a_span_lists_its_positions():
    span = Span(row=4, count=3, start=-2, step=5)
    assert span.positions().tolist() == [-2, 3, 8]
    assert span.positions().dtype == np.int64
    assert span.last == 8


@REPEATABLE
@given(spans(), st.data())
def test_a_part_of_a_span_keeps_rows_and_positions_together(span, data):
    begin, end = sorted(data.draw(st.integers(0, span.count)) for _ in range(2))
    part = span.part(begin, end)
    assert part.row == span.row + begin
    assert part.positions().tolist() == span.positions()[begin:end].tolist()


@REPEATABLE
@given(spans(smallest=1), spans(), BOUND, BOUND)
def test_visible_keys_are_the_keys_inside_the_band(q, k, lo, hi):
    begin, end = visible_keys(q, k, lo, hi)
    columns = np.arange(k.count)
    seen = (begin[:, None] <= columns) & (columns < end[:, None])
    assert np.array_equal(seen, dense_band(q, k, lo, hi))
    assert ((begin >= 0) & (begin <= k.count) & (end >= 0) & (end <= k.count)).all()
    assert (np.diff(begin) >= 0).all()
    assert (np.diff(end) >= 0).all()


@REPEATABLE
@given(spans(smallest=1), spans(), BOUND, BOUND)
def test_pairs_counts_the_band_for_every_sequence_and_head(q, k, lo, hi):
    tile = Tile(batch=(1, 4), heads=(2, 4), q=q, k=k, lo=lo, hi=hi)
    assert tile.pairs() == 3 * 2 * dense_band(q, k, lo, hi).sum()
    assert tile.masked == (lo is not None or hi is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", range(1, 8))
def test_a_partition_holds_every_token_once_and_evenly(kind, world_size):
    for length in range(41):
        partition = Partition(kind=kind, length=length, world_size=world_size)
        held = [partition.positions(rank) for rank in range(world_size)]
        assert np.array_equal(np.sort(np.concatenate(held)), np.arange(length)), length
        assert [partition.count(rank) for rank in range(world_size)] == [len(positions) for positions in held]
        counts = sorted(len(positions) for positions in held)
        assert counts[-1] - counts[0] <= 1, length


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", range(1, 8))
def test_the_spans_of_a_rank_fill_its_rows_without_a_gap(kind, world_size):
    for length in range(41):
        partition = Partition(kind=kind, length=length, world_size=world_size)
        for rank in range(world_size):
            row = 0
            for span in partition.spans(rank):
                assert (span.row, span.count > 0) == (row, True), (length, rank)
                row += span.count
            assert row == partition.count(rank)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_without_a_token_has_no_span(kind):
    partition = Partition(kind=kind, length=2, world_size=5)
    empty = [rank for rank in range(5) if partition.count(rank) == 0]
    assert len(empty) == 3
    for rank in empty:
        assert partition.spans(rank) == ()
        assert (partition.positions(rank).shape, partition.positions(rank).dtype) == ((0,), np.int64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        ("striped", [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]),
        ("zigzag", [[0, 1, 9], [2, 3, 8], [4, 5, 6, 7]]),
    ],
)
def test_a_partition_deals_ten_tokens_to_three_ranks(kind, expected):
    partition = Partition(kind=kind, length=10, world_size=3)
    assert [partition.positions(rank).tolist() for rank in range(3)] == expected


@pytest.mark.parametrize("world_size", range(1, 8))
def test_zigzag_gives_every_rank_the_same_causal_work(world_size):
    partition = Partition(kind="zigzag", length=6 * world_size, world_size=world_size)
    assert len({int((partition.positions(rank) + 1).sum()) for rank in range(world_size)}) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "random"}, "unknown partition 'random'; known: contiguous, striped, zigzag"),
        ({"length": -1}, "length >= 0 and world_size >= 1, not -1 and 2"),
        ({"world_size": 0}, "length >= 0 and world_size >= 1, not 4 and 0"),
    ],
)
def test_a_partition_that_cannot_exist_is_refused(fields, message):
    with pytest.raises(WorkloadError, match=message):
        Partition(**({"kind": "striped", "length": 4, "world_size": 2} | fields))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [-1, 2])
def test_a_partition_knows_no_rank_outside_its_world(kind, rank):
    with pytest.raises(WorkloadError, match=f"rank {rank} is outside a world of 2"):
        Partition(kind=kind, length=4, world_size=2).positions(rank)


@REPEATABLE
@given(st.sampled_from(("causal", "full")), spans(), spans())
def test_the_pieces_of_a_mask_cover_each_visible_pair_once_and_are_trimmed(name, q, k):
    mask = mask_named(name)
    visible = mask.visible(q.positions(), k.positions())
    covered = np.zeros(visible.shape, int)
    for q_part, k_part, lo, hi in mask.pieces(q, k):
        rows, columns = (slice(p.row - s.row, p.row - s.row + p.count) for p, s in ((q_part, q), (k_part, k)))
        assert q_part.positions().tolist() == q.positions()[rows].tolist()
        assert k_part.positions().tolist() == k.positions()[columns].tolist()
        seen = dense_band(q_part, k_part, lo, hi)
        covered[rows, columns] += seen
        assert seen.any(axis=0).all(), "a key that no query sees was left in"
        assert seen.any(axis=1).all(), "a query that sees no key was left in"
        assert (lo is None and hi is None) == seen.all(), "a piece is masked exactly where the band hides a pair"
    assert np.array_equal(covered, visible)


def test_the_dense_masks_are_what_their_names_say():
    q, k = np.array([3, 0]), np.array([0, 3, 4])
    assert Causal().visible(q, k).tolist() == [[True, True, False], [True, False, False]]
    assert Full().visible(q, k).tolist() == [[True] * 3] * 2


def test_an_unknown_mask_is_refused_with_the_known_ones():
    with pytest.raises(WorkloadError, match="unknown mask 'casual'; known: full, causal"):
        mask_named("casual")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"q_len": -3}, "q_len is -3; it must be 0 or more"),
        ({"kv_len": -2}, "kv_len is -2; it must be 0 or more"),
        ({"batch": -1}, "batch is -1; it must be 0 or more"),
        ({"heads": 0}, "heads is 0; it must be 1 or more"),
        ({"kv_heads": 0}, "kv_heads is 0; it must be 1 or more"),
        ({"head_dim": 0}, "head_dim is 0; it must be 1 or more"),
        ({"v_head_dim": 0}, "v_head_dim is 0; it must be 1 or more"),
        ({"heads": 6, "kv_heads": 4}, r"heads \(6\) must be a multiple of kv_heads \(4\)"),
        ({"softmax_scale": 0.0}, "softmax_scale is 0.0; it must be positive, finite"),
        ({"softmax_scale": -2.0}, "softmax_scale is -2.0; it must be positive, finite"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan; it must be positive, finite"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf; it must be positive, finite"),
        ({"pass_": "forwards"}, "unknown pass 'forwards'; allowed: forward, backward, both"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; allowed: float64, float32, float16, bfloat16"),
        ({"wire_dtype": "int8"}, "unknown dtype 'int8'"),
        ({"batch": 2, "lengths": (3,)}, r"lengths \(3,\) must hold 2 counts between 0 and 8, one per sequence"),
        ({"lengths": (9,)}, r"lengths \(9,\) must hold 1 counts between 0 and 8"),
        ({"lengths": (-1,)}, r"lengths \(-1,\) must hold 1 counts between 0 and 8"),
    ],
)
def test_a_workload_that_cannot_exist_is_refused(fields, message):
    with pytest.raises(WorkloadError, match=message):
        Workload(**({"q_len": 8} | fields))


def test_a_workload_derives_what_is_not_given():
    work = Workload(q_len=6, heads=4, head_dim=16, dtype="bf16")
    assert (work.kv_len, work.kv_heads, work.v_head_dim, work.softmax_scale) == (6, 4, 16, 0.25)
    assert (work.dtype, work.wire_dtype, work.causal) == ("bfloat16", "bfloat16", False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (((0, 3), 5, 9),)),
        ({"batch": 0}, ()),
        ({"lengths": (9, 9, 9)}, (((0, 3), 5, 9),)),
        ({"lengths": (4, 4, 0)}, (((0, 2), 4, 4), ((2, 3), 0, 0))),
        ({"q_len": 12, "lengths": (11, 9, 4)}, (((0, 1), 11, 9), ((1, 2), 9, 9), ((2, 3), 4, 4))),
        ({"lengths": (9, 7, 9)}, (((0, 1), 5, 9), ((1, 2), 5, 7), ((2, 3), 5, 9))),
    ],
)
def test_lengths_give_the_valid_queries_and_keys_of_each_run_of_sequences(fields, expected):
    assert Workload(**({"q_len": 5, "kv_len": 9, "batch": 3} | fields)).sequences() == expected


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mask": Causal(), "batch": 2, "lengths": (8, 3), "dtype": "fp16"},
        {"kv_len": 20, "q_offset": 19, "kv_offset": -4, "v_head_dim": 24, "heads": 6, "kv_heads": 2, "softmax_scale": 0.3},
        {"wire_dtype": "bf16", "pass_": "both", "batch": 0, "lengths": ()},
    ],
)
def test_a_workload_survives_the_way_through_json(fields):
    work = Workload(q_len=8, **fields)
    again = Workload.from_dict(json.loads(json.dumps(work.to_dict())))
    assert again == work
    assert hash(again) == hash(work)


@settings(max_examples=400, deadline=None)
@given(spans(), spans(), st.one_of(st.none(), st.integers(-60, 60)), st.one_of(st.none(), st.integers(-60, 60)), st.booleans())
def test_pairs_are_those_of_the_rows_counted(q, k, lo, hi, alike):
    if alike:
        k = replace(k, step=q.step)
    tile = Tile(batch=(0, 2), heads=(0, 3), q=q, k=k, lo=lo, hi=hi)
    distance = q.positions()[:, None] - k.positions()[None, :]
    seen = (distance >= (-(10**9) if lo is None else lo)) & (distance <= (10**9 if hi is None else hi))
    assert tile.pairs() == 6 * int(seen.sum())


def test_pairs_of_a_tile_of_any_size_take_no_memory():
    q, k = Span(row=0, count=2**40, start=0), Span(row=0, count=2**40, start=0)
    assert Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=0).pairs() == 2**40 * (2**40 + 1) // 2

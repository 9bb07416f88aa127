"""Bytes of the backward pass: the formulas of the docstrings under a full mask, and under any other nothing in vain."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings

from ringsim.mask import Causal, Documents, Window
from ringsim.schedule import Compute, Schedule
from ringsim.schedule.loops import components
from ringsim.schedule.registry import find

from .test_family import schedules
from .test_family_backward import BACK, of_pass
from .test_traffic import TOKENS, check_arrivals, check_input, check_received, everywhere, routes, sends_of, sent, work_of

MOVE_KEYS = ("ring", "bidirectional", "multi-ring(3)", "double-ring(2)", "double-ring(3, 2)", "halo")
MOVE_QUERIES = ("burst", "q-ring", "pass-q", "token-ring")
SIZES = (("bfloat16", 2, 4), ("float64", 8, 8))
"""A dtype, its bytes and those of the sums."""
SHAPES = ({}, {"heads": 6}, {"heads": 24, "v_head_dim": 9})
"""Two queries a key head, one, four."""


def made(strategy, world_size, **options):
    partition, pass_ = options.pop("partition", "contiguous"), options.pop("pass_", "backward")
    work = work_of(world_size, pass_=pass_, **options)
    return Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition)


def keys_nbytes(work, itemsize, rows=TOKENS):
    """K and V of a rank's rows, or the sums of their gradients."""
    return work.batch * rows * work.kv_heads * (work.head_dim + work.v_head_dim) * itemsize


def queries_nbytes(work, itemsize, sum_itemsize):
    """Q, dout, lse and delta of a rank."""
    return work.batch * TOKENS * work.heads * ((work.head_dim + work.v_head_dim) * itemsize + 2 * sum_itemsize)


def dq_nbytes(work, sum_itemsize):
    return work.batch * TOKENS * work.heads * work.head_dim * sum_itemsize


def is_sum(op):
    return "_sum[" in op.region.value


@pytest.mark.parametrize(("dtype", "itemsize", "sum_itemsize"), SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("strategy", ["ring", "bidirectional", "halo"])
def test_keys_and_values_go_round_with_their_gradients(strategy, world_size, shape, dtype, itemsize, sum_itemsize):
    schedule = made(strategy, world_size, dtype=dtype, **shape)
    found = sent(schedule, lambda rank, op: (is_sum(op), rank))
    for sums, size in ((False, itemsize), (True, sum_itemsize)):
        expected = (world_size - 1) * keys_nbytes(schedule.workload, size)
        assert {rank: n for (of_sums, rank), n in found.items() if of_sums == sums} == everywhere(world_size, expected)


@pytest.mark.parametrize(("dtype", "itemsize", "sum_itemsize"), SIZES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("strategy", MOVE_QUERIES)
def test_queries_go_round_with_their_gradients(strategy, world_size, shape, dtype, itemsize, sum_itemsize):
    schedule = made(strategy, world_size, dtype=dtype, **shape)
    found, work = sent(schedule, lambda rank, op: (is_sum(op), rank)), schedule.workload
    for sums, once in ((False, queries_nbytes(work, itemsize, sum_itemsize)), (True, dq_nbytes(work, sum_itemsize))):
        expected = everywhere(world_size, (world_size - 1) * once)
        assert {rank: n for (of_sums, rank), n in found.items() if of_sums == sums} == expected


@pytest.mark.parametrize(("head_dim", "ratio"), [(8, 9 / 12), (128, 129 / 192)])
def test_burst_sends_less_than_ring_only_where_each_query_head_has_keys_of_its_own(head_dim, ratio):
    def sums(strategy, **shape):
        return sum(sent(made(strategy, 5, head_dim=head_dim, v_head_dim=head_dim, **shape)).values())

    # 8 d + 8 bytes of a query head (lse and delta are 4 bytes each), 12 d of a key head
    assert sums("burst", heads=6) / sums("ring", heads=6) == pytest.approx(ratio, rel=1e-12)
    assert sums("burst", heads=24) / sums("ring", heads=24) == pytest.approx(4 * ratio, rel=1e-12)
    assert sums("burst", heads=12) > sums("ring", heads=12)


@pytest.mark.parametrize("world_size", [2, 3, 6, 7])
def test_bidirectional_sends_half_each_way(world_size):
    schedule = made("bidirectional", world_size)
    half = (world_size - 1) * sum(keys_nbytes(schedule.workload, size, TOKENS // 2) for size in (2, 4))
    expected = Counter()
    for rank in range(world_size):
        expected[rank, (rank + 1) % world_size] += half
        expected[rank, (rank - 1) % world_size] += half
    assert sent(schedule, lambda rank, op: (rank, op.peer)) == expected


@pytest.mark.parametrize(("world_size", "rings"), [(1, 1), (2, 1), (4, 2), (6, 3), (7, 1), (7, 2), (7, 6), (8, 6)])
def test_multi_ring_divides_the_bytes_over_its_links(world_size, rings):
    schedule = made(f"multi-ring({rings})", world_size)
    whole = (world_size - 1) * sum(keys_nbytes(schedule.workload, size) for size in (2, 4))
    assert sent(schedule) == everywhere(world_size, whole)
    links = sent(schedule, lambda rank, op: (rank, op.peer))
    assert set(links.values()) <= {whole // rings}
    assert len(links) == (rings * world_size if world_size > 1 else 0), "each ring has links of its own"


@pytest.mark.parametrize(("dtype", "itemsize", "sum_itemsize"), SIZES)
@pytest.mark.parametrize(
    ("inner", "stride", "outer"), [(1, 1, 4), (2, 1, 1), (2, 1, 3), (4, 1, 2), (3, 2, 2), (2, 4, 4), (2, 2, 4), (8, 1, 1)]
)
def test_double_ring_sends_within_and_across(inner, stride, outer, dtype, itemsize, sum_itemsize):
    world_size = inner * outer
    schedule = made(f"double-ring({inner}, {stride})", world_size, dtype=dtype)
    found = sent(schedule, lambda rank, op: (is_sum(op), op.group, rank))
    for sums, size in ((False, itemsize), (True, sum_itemsize)):
        block = keys_nbytes(schedule.workload, size)
        for group, blocks in (("ring", outer * (inner - 1)), ("across", outer - 1)):
            mine = {rank: n for (of_sums, where, rank), n in found.items() if (of_sums, where) == (sums, group)}
            assert mine == everywhere(world_size, blocks * block)
    for rank, op in sends_of(schedule):
        same = rank // (inner * stride) == op.peer // (inner * stride) and rank % stride == op.peer % stride
        assert same == (op.group == "ring"), "within an inner ring, or between two"


@pytest.mark.parametrize("strategy", MOVE_KEYS + MOVE_QUERIES)
def test_both_passes_send_what_each_of_them_sends(strategy):
    schedules = {pass_: made(strategy, 6, mask=Causal(), pass_=pass_) for pass_ in ("forward", "backward", "both")}
    one, other, both = (sent(found, lambda rank, op: (rank, op.peer, op.region.value)) for found in schedules.values())
    assert both == one + other


@pytest.mark.parametrize("name", ["dense", "local-window(5)"])
def test_one_device_sends_nothing(name):
    assert not list(sends_of(made(name, 1)))


# masks with closed forms


def hops(schedule, name):
    """How many messages carry what begins with this name, by the rank whose it is."""
    found = Counter()
    for _, op in sends_of(schedule):
        if op.region.value.startswith(f"{name}["):
            found[schedule.job.block(op.region.value.partition("@")[0]).rank] += 1
    return found


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_under_a_causal_mask_gradients_go_as_far_as_their_block(world_size):
    schedule = made("ring", world_size, mask=Causal())
    expected = {rank: world_size - 1 - rank for rank in range(world_size - 1)}
    assert [hops(schedule, name) for name in ("k", "v", "dk_sum", "dv_sum")] == [expected] * 4
    block = sum(keys_nbytes(schedule.workload, size) for size in (2, 4))
    assert sum(sent(schedule).values()) == world_size * (world_size - 1) // 2 * block
    # in zigzag each rank holds keys of the first half, which the last runs of all ranks see
    assert sum(sent(replace(schedule, partition="zigzag")).values()) == world_size * (world_size - 1) * block


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_under_a_causal_mask_gradients_of_queries_begin_where_a_key_is_seen(world_size):
    schedule = made("burst", world_size, mask=Causal())
    # the queries of rank r see keys of ranks 0 to r - 1, the last of which is the one before it, once round the ring
    assert hops(schedule, "q") == dict.fromkeys(range(1, world_size), world_size - 1)
    assert hops(schedule, "dq_sum") == {rank: rank for rank in range(1, world_size)}


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("left", [1, 7, TOKENS])
def test_under_a_window_within_a_shard_gradients_come_home_from_the_next_rank(world_size, left):
    schedule = made("ring", world_size, mask=Window(left, 0))
    moves = {(rank, op.peer, is_sum(op)) for rank, op in sends_of(schedule)}
    pairs = [(rank, rank + 1) for rank in range(world_size - 1)]
    assert moves == {(a, b, False) for a, b in pairs} | {(b, a, True) for a, b in pairs}
    halo = made("halo", world_size, mask=Window(left, 0))
    assert {(rank, op.peer, is_sum(op)) for rank, op in sends_of(halo)} == moves
    for found, rows in ((schedule, TOKENS), (halo, left)):
        by_kind = sent(found, lambda rank, op: (is_sum(op), rank))
        expected = {(False, rank): keys_nbytes(found.workload, 2, rows) for rank in range(world_size - 1)}
        expected |= {(True, rank + 1): keys_nbytes(found.workload, 4, rows) for rank in range(world_size - 1)}
        assert by_kind == expected
    assert not sent(made("ring", world_size, mask=Window(0, 0)))


@pytest.mark.parametrize("strategy", MOVE_KEYS + MOVE_QUERIES)
def test_a_document_each_sends_nothing(strategy):
    assert not list(sends_of(made(strategy, 6, mask=Documents([TOKENS] * 6))))


@pytest.mark.parametrize("strategy", ["ring", "bidirectional", *MOVE_QUERIES])
def test_documents_on_ranks_of_their_own_are_rings_of_their_own(strategy):
    schedule = made(strategy, 6, mask=Documents([TOKENS, 3 * TOKENS, 2 * TOKENS]))
    assert components(schedule.job) == ((0,), (1, 2, 3), (4, 5))
    pairs = {(rank, op.peer) for rank, op in sends_of(schedule)}
    assert pairs
    assert all({rank, peer} <= {1, 2, 3} or {rank, peer} <= {4, 5} for rank, peer in pairs)


def test_documents_within_nodes_stay_there():
    schedule = made("double-ring(3)", 6, mask=Documents([3 * TOKENS, TOKENS, 2 * TOKENS]))
    assert {op.group for _, op in sends_of(schedule)} == {"ring"}


# any mask


def contents(schedule):
    """By value and version of each sum: the ranks whose part is in it, each as often as it was added."""
    made_of, own = defaultdict(list), Counter()
    for rank in range(schedule.world_size):
        for op in schedule.program(rank):
            if not isinstance(op, Compute) or op.kernel not in {"clear", "attend_backward", "accumulate"}:
                continue
            for region in op.writes:
                same = [r for r in op.reads if "_sum[" in r.value and r.buffer == region.buffer]
                made_of[region.value, region.version] = [(r.value, r.version) for r in same]
                if op.kernel == "attend_backward":
                    own[region.value, region.version] = rank + 1

    def content(key):
        found = Counter([own[key] - 1] if own[key] else [])
        for part in made_of[key]:
            found += content(part)
        return found

    return content


def near(schedule, rank, group):
    """The ranks for which one sends: those of its node where it sends across, itself otherwise."""
    if group != "across":
        return {rank}
    choice = find(schedule.strategy)
    inner, stride = choice.arguments
    first = rank // (inner * stride) * inner * stride + rank % stride
    return {first + stride * place for place in range(inner)}


def check_sums(schedule):
    """Nothing empty travels; the last on the road has added something; each part of another rank comes home once."""
    content, home, seen = contents(schedule), defaultdict(Counter), set()
    for rank, op in sends_of(schedule):
        value, version = op.region.value, op.region.version
        if not is_sum(op) or (value, version, rank) in seen:
            continue
        seen.add((value, version, rank))
        parts = content((value, version))
        assert parts, "an empty sum"
        assert max(parts.values()) == 1
        block = schedule.job.block(value.partition("@")[0])
        if op.phase == "home":
            assert set(parts) & near(schedule, rank, op.group), "a last hop in vain"
        if op.peer == block.rank:
            home[value.partition("_")[0], block.rank] += Counter(
                {(one, head, row): n for one, n in parts.items() for head in range(*block.heads) for row in range(*block.rows)}
            )
    assert all(max(parts.values()) == 1 for parts in home.values()), "comes home twice"
    check_home(schedule, home)


def check_home(schedule, home):
    """Rows that another rank adds to are among those that come from it, and it has added to one of each that does."""
    for rank in range(schedule.world_size):
        for op in schedule.program(rank):
            if not isinstance(op, Compute) or op.kernel != "attend_backward":
                continue
            for region in op.writes:
                block = schedule.job.block(region.value.partition("@")[0])
                came = home[region.buffer.partition("_")[0], block.rank]
                grid = {(rank, head, row) for head in range(*block.heads) for row in range(*block.rows)}
                assert block.rank == rank or grid <= set(came), "never comes home"


@pytest.mark.parametrize("name", sorted(set(BACK) - {"dense", "local-window"}))
def test_under_any_mask_nothing_moves_in_vain(name):
    moved = Counter()

    @settings(max_examples=40, deadline=None)
    @given(schedules(name))
    def check(schedule):
        backward = of_pass(schedule, "backward")
        found, job = routes(backward), backward.job
        assert all(rank != op.peer for rank, op in sends_of(backward)), "to oneself"
        assert all(op.region.nbytes for _, op in sends_of(backward)), "an empty message"
        for kind, moves in found.items():
            if kind.startswith(("k[", "q[")):
                block = job.block(kind)
                others = ("v",) if kind[0] == "k" else ("dout", "lse", "delta")
                check_input(backward, kind, moves)
                for other in others:
                    # widths are never 0
                    assert found[job.value(other, block)] == moves
                moved["inputs"] += 1
        ins = Counter(kind.partition("[")[0] for kind in found if "_sum[" not in kind)
        assert ins["k"] == ins["v"]
        assert ins["q"] == ins["dout"] == ins["lse"] == ins["delta"]
        check_arrivals(backward, {kind: moves for kind, moves in found.items() if kind.startswith(("k[", "q["))})
        check_sums(backward)
        check_received(backward)
        moved["sums"] += sum("_sum[" in kind for kind in found)

    check()
    assert min(moved["inputs"], moved["sums"]) > 30

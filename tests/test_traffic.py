"""Bytes: the formulas of the docstrings under a full mask, and under any other mask nothing that nobody needs."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.mask import Causal, Documents, Window
from ringsim.schedule import Recv, Schedule, Send
from ringsim.schedule.loops import components, disjoint_loops
from ringsim.schedule.registry import STRATEGIES
from ringsim.workload import Workload

from .test_family import FAMILY, KV_HEADS, schedules

TOKENS = 12
"""Of a rank, where all have as many."""
KV_GRID = (max(KV_HEADS),)
MOVE_KEYS = ("ring", "bidirectional", "multi-ring(3)", "double-ring(2)", "double-ring(3, 2)")
MOVE_QUERIES = ("q-ring", "pass-q", "token-ring")
IN_COMPONENTS = ("ring", "bidirectional", *MOVE_QUERIES)


def work_of(world_size, **options):
    shape = {"batch": 2, "heads": 12, "kv_heads": 6, "head_dim": 8, "v_head_dim": 5, "dtype": "bfloat16"}
    return Workload(**({"q_len": TOKENS * world_size} | shape | options))


def sends_of(schedule):
    """(rank, send) of each message of data."""
    for rank in range(schedule.world_size):
        for op in schedule.program(rank):
            if isinstance(op, Send) and op.phase != "barrier":
                yield rank, op


def sent(schedule, key=lambda rank, op: rank):
    """Bytes by what `key` makes of each message."""
    found = Counter()
    for rank, op in sends_of(schedule):
        found[key(rank, op)] += op.region.nbytes
    return found


def made(strategy, world_size, **options):
    return Schedule(workload=work_of(world_size, **options), world_size=world_size, strategy=strategy)


def kv_block(work, rows=TOKENS):
    return work.batch * rows * work.kv_heads * (work.head_dim + work.v_head_dim) * 2


def q_block(work):
    return work.batch * TOKENS * work.heads * work.head_dim * 2


def state_block(work, itemsize=4):
    return work.batch * TOKENS * work.heads * (work.v_head_dim + 2) * itemsize


def everywhere(world_size, nbytes):
    return dict.fromkeys(range(world_size), nbytes) if nbytes else {}


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("strategy", ["ring", "bidirectional"])
def test_keys_and_values_go_round_once(strategy, world_size):
    schedule = made(strategy, world_size)
    assert sent(schedule) == everywhere(world_size, (world_size - 1) * kv_block(schedule.workload))


@pytest.mark.parametrize("world_size", [2, 3, 6, 7])
def test_bidirectional_sends_half_each_way(world_size):
    schedule = made("bidirectional", world_size)
    half = (world_size - 1) * kv_block(schedule.workload, TOKENS // 2)
    expected = Counter()
    for rank in range(world_size):
        expected[rank, (rank + 1) % world_size] += half
        expected[rank, (rank - 1) % world_size] += half
    assert sent(schedule, lambda rank, op: (rank, op.peer)) == expected


@pytest.mark.parametrize(
    ("world_size", "rings"), [(1, 1), (2, 1), (4, 1), (4, 2), (6, 3), (7, 1), (7, 2), (7, 3), (7, 6), (8, 6)]
)
def test_multi_ring_divides_the_bytes_over_its_links(world_size, rings):
    schedule = made(f"multi-ring({rings})", world_size)
    whole = (world_size - 1) * kv_block(schedule.workload)
    assert sent(schedule) == everywhere(world_size, whole)
    links = sent(schedule, lambda rank, op: (rank, op.peer))
    assert set(links.values()) <= {whole // rings}
    assert len(links) == (rings * world_size if world_size > 1 else 0), "each ring has links of its own"


@pytest.mark.parametrize("rings", [4, 5])
def test_multi_ring_shares_heads_that_do_not_divide_to_within_one(rings):
    schedule = made(f"multi-ring({rings})", 7)
    links = sent(schedule, lambda rank, op: (rank, op.peer))
    one_head = 6 * kv_block(schedule.workload) // 6
    shares = sorted(links.values())
    assert len(shares) == 7 * rings
    assert sum(shares) == 7 * 6 * one_head
    assert {share // one_head for share in shares} == {6 // rings, -(-6 // rings)}
    assert not any(share % one_head for share in shares)


@pytest.mark.parametrize(
    ("inner", "stride", "outer"), [(1, 1, 4), (2, 1, 1), (2, 1, 3), (4, 1, 2), (3, 2, 2), (2, 4, 4), (2, 2, 4), (8, 1, 1)]
)
def test_double_ring_sends_within_and_across(inner, stride, outer):
    schedule = made(f"double-ring({inner}, {stride})", inner * outer)
    block = kv_block(schedule.workload)
    by_group = sent(schedule, lambda rank, op: (rank, op.group))
    within, across = ({r: by_group[r, group] for r in range(inner * outer)} for group in ("ring", "across"))
    assert within == dict.fromkeys(range(inner * outer), outer * (inner - 1) * block)
    assert across == dict.fromkeys(range(inner * outer), (outer - 1) * block)
    assert outer * (inner - 1) + outer - 1 == inner * outer - 1
    for rank, op in sends_of(schedule):
        same = rank // (inner * stride) == op.peer // (inner * stride) and rank % stride == op.peer % stride
        assert same == (op.group == "ring"), "within an inner ring, or between two"


@pytest.mark.parametrize("world_size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 4), ("float64", 8)])
def test_queries_travel_with_their_state_or_it_comes_home(world_size, dtype, itemsize):
    others = world_size - 1
    for strategy, hops in (("q-ring", world_size if others else 0), ("pass-q", others), ("token-ring", others)):
        schedule = made(strategy, world_size, dtype=dtype)
        work = schedule.workload
        queries = others * q_block(work) * (4 if dtype == "float64" else 1)
        assert sent(schedule) == everywhere(world_size, queries + hops * state_block(work, itemsize)), strategy


def test_token_ring_sends_what_pass_q_sends_and_each_partial_straight_home():
    found = []
    for strategy in ("pass-q", "token-ring"):
        schedule = made(strategy, 5)
        found.append(sent(schedule, lambda rank, op: (rank, op.peer, op.region.value)))
        home = [(rank, op) for rank, op in sends_of(schedule) if op.phase == "home"]
        assert {op.region.value for _, op in home} == {f"state[{a}]@{b}" for a in range(5) for b in range(5) if a != b}
        assert all(op.region.value == f"state[{op.peer}]@{rank}" for rank, op in home)
        assert {(op.peer - rank) % 5 for rank, op in sends_of(schedule) if op.phase == "hop"} == {1}
    assert found[0] == found[1]


@pytest.mark.parametrize("strategy", MOVE_KEYS + MOVE_QUERIES)
def test_fewer_key_heads_make_fewer_bytes_of_keys_and_no_fewer_of_queries(strategy):
    many, few = (sum(sent(made(strategy, 6, kv_heads=count)).values()) for count in (12, 3))
    assert many == (4 if strategy in MOVE_KEYS else 1) * few


@pytest.mark.parametrize("name", ["dense", "local-window(5)"])
def test_one_device_sends_nothing(name):
    assert not list(sends_of(made(name, 1)))


def hops(schedule):
    """How many messages carry each value of k."""
    return Counter(op.region.value for _, op in sends_of(schedule) if op.region.value.startswith("k"))


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
def test_under_a_causal_mask_a_block_goes_as_far_as_the_last_rank(world_size):
    schedule = made("ring", world_size, mask=Causal())
    assert hops(schedule) == {f"k[{rank}]": world_size - 1 - rank for rank in range(world_size - 1)}
    block = kv_block(schedule.workload)
    assert sum(sent(schedule).values()) == world_size * (world_size - 1) // 2 * block
    # in zigzag each rank holds keys of the first half, which the last runs of all ranks see
    assert sum(sent(replace(schedule, partition="zigzag")).values()) == world_size * (world_size - 1) * block


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("left", [1, 7, TOKENS])
def test_under_a_window_within_a_shard_a_block_goes_one_hop(world_size, left):
    schedule = made("ring", world_size, mask=Window(left, 0))
    assert hops(schedule) == {f"k[{rank}]": 1 for rank in range(world_size - 1)}
    assert sent(schedule) == everywhere(world_size - 1, kv_block(schedule.workload))
    assert not sent(made("ring", world_size, mask=Window(0, 0)))


@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_under_a_window_just_over_a_shard_a_block_goes_two_hops(world_size):
    schedule = made("ring", world_size, mask=Window(TOKENS + 1, 0))
    assert hops(schedule) == {f"k[{rank}]": min(2, world_size - 1 - rank) for rank in range(world_size - 1)}


@pytest.mark.parametrize("strategy", MOVE_KEYS + MOVE_QUERIES)
def test_a_document_each_sends_nothing(strategy):
    assert not list(sends_of(made(strategy, 6, mask=Documents([TOKENS] * 6))))


@pytest.mark.parametrize("strategy", IN_COMPONENTS)
@pytest.mark.parametrize(
    "mask", [Documents([TOKENS, 3 * TOKENS, 2 * TOKENS]), Causal() & Documents([TOKENS, 3 * TOKENS, 2 * TOKENS])]
)
def test_documents_on_ranks_of_their_own_are_rings_of_their_own(strategy, mask):
    schedule = made(strategy, 6, mask=mask)
    assert components(schedule.job) == ((0,), (1, 2, 3), (4, 5))
    pairs = {(rank, op.peer) for rank, op in sends_of(schedule)}
    assert pairs
    assert all({rank, peer} <= {1, 2, 3} or {rank, peer} <= {4, 5} for rank, peer in pairs)


def test_documents_within_nodes_stay_there():
    schedule = made("double-ring(3)", 6, mask=Documents([3 * TOKENS, TOKENS, 2 * TOKENS]))
    assert {op.group for _, op in sends_of(schedule)} == {"ring"}


def seen_by(schedule, q, kv):
    """Which queries of one (rank, rows) see which keys of the other in some sequence: by the dense mask."""
    job, work = schedule.job, schedule.workload
    queries, keys = (side.positions(rank)[slice(*rows)] for side, (rank, rows) in ((job.q_partition, q), (job.kv_partition, kv)))
    seen = work.mask.visible(queries + work.q_offset, keys + work.kv_offset)
    valid = np.zeros(seen.shape, bool)
    for _, q_valid, k_valid in work.sequences():
        valid |= (queries < q_valid)[:, None] & (keys < k_valid)[None, :]
    return seen & valid


def sees(schedule, q, kv):
    return bool(seen_by(schedule, q, kv).any())


def needing(schedule, name, block):
    """The ranks that have something to do with a block, besides the one at home."""
    job = schedule.job
    whole = [((0, side.count(rank))) for side in (job.kv_partition, job.q_partition) for rank in range(schedule.world_size)]
    world = range(schedule.world_size)
    mine = block.rank, block.rows
    if name == "q":
        return {rank for rank in world if rank != block.rank and sees(schedule, mine, (rank, whole[rank]))}
    return {rank for rank in world if rank != block.rank and sees(schedule, (rank, whole[len(world) + rank]), mine)}


def routes(schedule):
    """By value that travels: (from, to) of each of its messages, those in chunks once."""
    found = defaultdict(list)
    for rank, op in sends_of(schedule):
        name = op.region.value
        kind = name if op.phase != "home" else f"home {name}"
        if (rank, op.peer) not in found[kind]:
            found[kind].append((rank, op.peer))
    return found


def check_input(schedule, value, moves):
    """One way from home, each rank at most once, and no end where nothing needs it."""
    block = schedule.job.block(value)
    needs = needing(schedule, value[0], block)
    came = [peer for _, peer in moves]
    assert len(set(came)) == len(came), "comes twice"
    assert {rank for rank, _ in moves} <= {block.rank, *came}, "goes on from where it is not"
    assert block.rank not in came, "comes back"
    ends = set(came) - {rank for rank, _ in moves}
    assert ends <= needs, "a last hop in vain"


def check_arrivals(schedule, found):
    """For every pair of ranks the keys that are seen come to the queries, or the queries that see to the keys; nothing twice."""
    job, world = schedule.job, range(schedule.world_size)
    came = {}
    for kind, moves in found.items():
        if kind[0] in "qk":
            block = job.block(kind)
            side = job.q_partition if kind[0] == "q" else job.kv_partition
            for _, rank in moves:
                grid = came.setdefault((kind[0], block.rank, rank), np.zeros((side.count(block.rank), *KV_GRID), int))
                grid[slice(*block.rows), slice(*block.heads)] += 1
    assert all(grid.max() == 1 for grid in came.values()), "comes twice"
    heads = slice(0, schedule.workload.kv_heads)
    for a in world:
        for b in set(world) - {a}:
            seen = seen_by(
                schedule, *((rank, (0, side.count(rank))) for rank, side in ((a, job.q_partition), (b, job.kv_partition)))
            )
            ways = ((came.get(("k", b, a)), seen.any(axis=0)), (came.get(("q", a, b)), seen.any(axis=1)))
            there = (grid is not None and bool(grid[rows][:, heads].all()) for grid, rows in ways)
            assert not seen.any() or any(there), "never comes where it is needed"


def check_states(schedule, found):
    """Partials come from where they are made; a travelling state goes where its queries go, and home from the last."""
    job = schedule.job
    for kind, moves in found.items():
        value, home = kind.removeprefix("home "), kind.startswith("home ")
        if not value.startswith("state"):
            continue
        block, _, at = value.partition("@")
        own = job.block(block)
        queries = job.value("q", own)
        if at:
            assert moves == [(int(at), own.rank)]
            assert int(at) in needing(schedule, "q", own)
        elif home:
            assert [peer for _, peer in moves] == [own.rank]
            assert moves[0][0] == found[queries][-1][1] or moves[0][0] in {peer for _, peer in found[queries]}
        else:
            assert sorted(moves) == sorted(found[queries])
    partial = {(int(kind.partition("@")[2]), job.block(kind[5:].partition("@")[0]).rank) for kind in found if "@" in kind}
    if partial:
        expected = {(at, rank) for rank in range(schedule.world_size) for at in needing(schedule, "q", job.q_block(rank))}
        assert partial == expected


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"dense", "local-window"}))
def test_under_any_mask_nothing_moves_in_vain(name):
    moved = Counter()

    @settings(max_examples=90, deadline=None)
    @given(schedules(name))
    def check(schedule):
        found = routes(schedule)
        for kind, moves in found.items():
            if kind[0] in "qkv":
                check_input(schedule, kind, moves)
                moved["inputs"] += 1
        check_arrivals(schedule, found)
        kinds = Counter(kind[0] for kind in found)
        assert kinds["k"] == kinds["v"]
        check_states(schedule, found)
        assert all(op.region.nbytes for _, op in sends_of(schedule)), "an empty message"
        check_received(schedule)

    check()
    assert moved["inputs"] > 60 or name not in FAMILY


def check_received(schedule):
    """What is received is what is sent, message by message."""
    came = Counter()
    for rank in range(schedule.world_size):
        for op in schedule.program(rank):
            if isinstance(op, Recv) and op.phase != "barrier":
                came[op.peer, rank, op.tag, op.region.value, op.region.nbytes] += 1
    assert came == Counter((rank, op.peer, op.tag, op.region.value, op.region.nbytes) for rank, op in sends_of(schedule))


@pytest.mark.parametrize("world_size", range(2, 34))
def test_disjoint_loops_use_each_directed_link_once(world_size):
    given_order = tuple(np.random.default_rng(world_size).permutation(world_size).tolist())
    for order in (tuple(range(world_size)), given_order):
        loops = disjoint_loops(order)
        assert loops[0] == order
        assert len(loops) == (1 if world_size == 2 else world_size - 1 if world_size % 2 else world_size - 2)
        links = set()
        for loop in loops:
            assert sorted(loop) == sorted(order)
            mine = {*pairwise(loop), (loop[-1], loop[0])}
            assert len(mine) == world_size
            assert not mine & links
            links |= mine
    assert disjoint_loops((7,)) == ((7,),)


@settings(max_examples=150, deadline=None)
@given(schedules("ring"), st.data())
def test_components_are_those_of_who_sees_whom(schedule, data):
    world = range(schedule.world_size)
    job = schedule.job
    near = {
        (a, b)
        for a in world
        for b in world
        if sees(schedule, (a, (0, job.q_partition.count(a))), (b, (0, job.kv_partition.count(b))))
    }
    left, found = set(world), []
    while left:
        group, grown = set(), {min(left)}
        while grown != group:
            group = grown
            grown = group | {b for a, b in near if a in group} | {a for a, b in near if b in group}
        found.append(tuple(sorted(group)))
        left -= group
    assert components(job) == tuple(found)

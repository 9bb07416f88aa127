"""The schedule's invariants: exactly once, paired, free of deadlock, lazy, the same after a round trip through text."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.errors import ScheduleError, WorkloadError
from ringsim.mask import Causal, Full, mask_named
from ringsim.schedule import Compute, Recv, Schedule, Send, Wait
from ringsim.schedule.grid import grid
from ringsim.workload import Workload

PARTITIONS = ("contiguous", "striped", "zigzag")


def ops_of(schedule, rank, kind):
    return [op for op in schedule.program(rank) if isinstance(op, kind)]


def hop_nbytes(schedule, rank):
    return sum(op.region.nbytes for op in ops_of(schedule, rank, Send) if op.phase == "hop")


@settings(max_examples=150, deadline=None)
@given(
    world_size=st.integers(1, 8),
    partition=st.sampled_from(PARTITIONS),
    mask=st.sampled_from(("full", "causal")),
    q_len=st.integers(0, 29),
    extra_keys=st.integers(-7, 7),
    q_offset=st.integers(0, 9),
    batch=st.integers(0, 3),
    lengths=st.booleans(),
    sync=st.sampled_from(("free", "step")),
    limit=st.sampled_from((64, 2**31 - 1)),
)
def test_valid_and_the_same_from_text(world_size, partition, mask, q_len, extra_keys, q_offset, batch, lengths, sync, limit):
    kv_len = max(0, q_len + extra_keys)
    workload = Workload(
        q_len=q_len,
        kv_len=kv_len,
        batch=batch,
        heads=4,
        kv_heads=2,
        head_dim=3,
        mask=mask_named(mask),
        q_offset=q_offset,
        lengths=tuple(i * max(q_len, kv_len) // max(batch, 1) for i in range(batch)) if lengths else None,
    )
    schedule = Schedule(workload=workload, world_size=world_size, partition=partition, sync=sync, max_message_nbytes=limit)
    schedule.validate()
    text = schedule.to_text()
    again = Schedule.from_text(text)
    assert [list(again.program(r)) for r in range(world_size)] == [list(schedule.program(r)) for r in range(world_size)]
    assert (again.to_text(), again.digest) == (text, schedule.digest)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_large_worlds_are_sampled(partition, mask):
    Schedule(workload=Workload(q_len=5003, mask=mask), world_size=130, partition=partition).validate()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_full_ring_sends_the_formula_of_its_docstring(world_size):
    work = Workload(q_len=world_size * 7, batch=2, heads=6, kv_heads=3, head_dim=8, v_head_dim=5, dtype="float16")
    schedule = Schedule(workload=work, world_size=world_size)
    per_rank = (world_size - 1) * 7 * 2 * 3 * (8 + 5) * 2
    assert [hop_nbytes(schedule, rank) for rank in range(world_size)] == [per_rank] * world_size


def test_causal_contiguous_sends_only_what_is_needed_further_on():
    world_size, block = 4, 5
    schedule = Schedule(workload=Workload(q_len=20, head_dim=8, mask=Causal()), world_size=world_size)
    one_hop = 2 * block * 8 * 4
    # block b is needed by ranks b+1 .. P-1 alone: rank r passes on blocks 0 .. r, and the last rank none
    assert [hop_nbytes(schedule, rank) for rank in range(world_size)] == [one_hop * (rank + 1) for rank in range(3)] + [0]


def test_blocks_that_the_mask_empties_are_not_computed():
    schedule = Schedule(workload=Workload(q_len=16, mask=Causal()), world_size=4)
    attends = [[op.step for op in ops_of(schedule, rank, Compute) if op.kernel == "attend"] for rank in range(4)]
    assert attends == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]


def test_zigzag_gives_every_rank_equal_causal_work():
    schedule = Schedule(workload=Workload(q_len=64, mask=Causal()), world_size=4, partition="zigzag")
    flops = [sum(op.flops for op in ops_of(schedule, rank, Compute)) for rank in range(4)]
    assert len(set(flops)) == 1
    assert sum(flops) == 64 * 65 // 2 * 2 * (64 + 64)


def test_a_rank_without_a_token_has_no_part_in_the_ring():
    schedule = Schedule(workload=Workload(q_len=2), world_size=4)
    assert schedule.job.q_partition.count(3) == 0
    assert [op.kernel for op in schedule.program(3)] == ["reset", "finish"]
    assert {op.region.value for op in ops_of(schedule, 1, Send)} == {"k[1]", "v[1]"}
    assert {op.peer for op in ops_of(schedule, 1, Send)} == {0}
    assert all(op.region.nbytes for rank in range(4) for op in ops_of(schedule, rank, Send))


def test_messages_beyond_the_limit_travel_in_chunks_that_add_up():
    work = Workload(q_len=2 * (2**22 + 1), head_dim=128, dtype="float32", heads=2)
    schedule = Schedule(workload=work, world_size=2)
    sends = [op.region for op in ops_of(schedule, 0, Send) if op.region.value == "k[0]"]
    assert [region.offset for region in sends] == [0, 2**31 - 1, 2 * (2**31 - 1)]
    assert sum(region.nbytes for region in sends) == (2**22 + 1) * 2 * 128 * 4
    assert max(region.nbytes for region in sends) < 2**31


def test_programs_are_made_on_demand():
    huge = Schedule(workload=Workload(q_len=2**30, head_dim=128), world_size=2**20)
    first = list(itertools.islice(huge.program(77), 6))
    assert [type(op) for op in first] == [Compute, Recv, Send, Recv, Send, Compute]


def test_a_barrier_separates_rounds_and_leaves_nothing_outstanding():
    schedule = Schedule(workload=Workload(q_len=12), world_size=3, sync="step")
    for rank in range(3):
        outstanding, seen = set(), 0
        for op in schedule.program(rank):
            if isinstance(op, Send | Recv):
                if op.phase == "barrier" and op.region.slot in (2, 3):
                    assert not {o for o in outstanding if o[1] == "hop"}
                    seen += 1
                outstanding.add((op.id, op.phase))
            elif isinstance(op, Wait):
                outstanding = {o for o in outstanding if o[0] not in op.posts}
        assert seen == 2 * 2


def test_digest_depends_on_every_input():
    base = {"workload": Workload(q_len=24, mask=Causal()), "world_size": 3, "partition": "zigzag"}
    changes = (
        {"workload": Workload(q_len=24)},
        {"workload": Workload(q_len=25, mask=Causal())},
        {"workload": Workload(q_len=24, mask=Causal(), softmax_scale=0.5)},
        {"world_size": 4},
        {"partition": "striped"},
        {"sync": "step"},
        {"max_message_nbytes": 100},
    )
    digests = {Schedule(**(base | change)).digest for change in ({}, *changes)}
    assert len(digests) == len(changes) + 1
    assert Schedule(**base).digest == Schedule(**base).digest


BROKEN = {
    "a missing wait": (r"^  7 wait .*\n", "", "has id 8; its place is 7"),
    "a wait for what was never posted": (r"(?m)^(  7 wait .*posts=)1$", r"\g<1>99", "not outstanding"),
    "a wait too few": (r"(?m)^(  7 wait .*posts=)1$", r"\g<1>2", "without waiting"),
    "a stale version": (r"(max|acc|sum)\[1\]\.1;", r"\g<1>[1].7;", "in place of"),
    "another block than the one sent": (r"(?m)^(  1 recv .*)=k\[0\]\.0$", r"\g<1>=k[2].0", "the matching send carries"),
    "a tag that nobody sends": (r"(?m)^(  9 recv .*)tag=1", r"\g<1>tag=5", "deadlock"),
    "tiles twice": (r"(?m)^(  5 compute .*tiles=)(\S+)$", r"\g<1>\g<2>;\g<2>", "covered 2 times"),
    "no tiles": (r"(?m)^(  5 compute .*tiles=)(\S+)$", r"\g<1>-", "covered 0 times"),
    "rows that hold other tokens": (r"(?m)^(  5 compute .*tiles=b0:1h0:1q0\+\d+@)\d+", r"\g<1>9", "do not hold positions"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_validation_finds(name):
    pattern, replacement, message = BROKEN[name]
    text = Schedule(workload=Workload(q_len=12), world_size=3).to_text()
    head, rank_1, rest = re.split(r"(?m)^(?=rank [12]$)", text)
    broken, count = re.subn(pattern, replacement, rank_1, count=1, flags=re.MULTILINE)
    assert count == 1
    with pytest.raises(ScheduleError) as caught:
        Schedule.from_text(re.sub(r"(?m)^digest .*\n", "", head) + broken + rest).validate()
    assert message in str(caught.value)
    assert re.search(r"(?m)^step +rank 0 +rank 1 +rank 2$", str(caught.value)), "shows the grid"


def without_later_chunks(program):
    """The ops of a rank less the chunks that do not start their block, with ids counted anew."""
    kept, ids = [], {}
    for op in program:
        if isinstance(op, Send | Recv) and op.region.offset:
            continue
        ids[op.id] = len(kept)
        posts = {"posts": tuple(ids[post] for post in op.posts if post in ids)} if isinstance(op, Wait) else {}
        kept.append(replace(op, id=ids[op.id], **posts))
    return tuple(kept)


def test_validation_finds_a_block_of_which_a_part_never_came():
    whole = Schedule(workload=Workload(q_len=8, head_dim=4), world_size=2, max_message_nbytes=40)
    whole.validate()
    lost = replace(whole, given=tuple(without_later_chunks(whole.program(rank)) for rank in range(2)))
    with pytest.raises(ScheduleError, match="which holds nothing from byte 40"):
        lost.validate()


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("ringsim schedule 2", "ringsim schedule 1", "line 1"),
        ("digest", "digest 00", "delete the digest line"),
        ("  0 compute", "  0 compote", "line 5"),
        ("rank 1", "rank 2", "expected rank 1"),
        ('"strategy_version": 2', '"strategy_version": 9', "version 9"),
        ('"world_size": 2', '"world_size": 3', "3 ranks"),
        ("inputs", "rank 9\ninputs", "line 2"),
    ],
)
def test_text_that_cannot_be_read_is_named_by_line(line, replacement, message):
    text = Schedule(workload=Workload(q_len=4), world_size=2).to_text()
    assert line in text
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_text(text.replace(line, replacement, 1))


def test_grid():
    schedule = Schedule(workload=Workload(q_len=6, mask=Causal()), world_size=3)
    assert grid(schedule).splitlines() == [
        "step  rank 0       rank 1       rank 2",
        "0     k>1 v>1 a0~  k>2 v>2 a1~  a2~",
        "1     .            k>2 v>2 a0   a1",
        "2     .            .            a0",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "rong"}, "unknown strategy 'rong'; known: .*ring"),
        ({"sync": "lock"}, "allowed: free, step"),
        ({"partition": "zigzog"}, "contiguous, striped, zigzag"),
        ({"world_size": 0}, "world_size >= 1"),
        ({"max_message_nbytes": 0}, "max_message_nbytes"),
        ({"workload": Workload(q_len=4, wire_dtype="float16")}, "wire_dtype"),
    ],
)
def test_bad_inputs(change, message):
    with pytest.raises(WorkloadError, match=message):
        Schedule(**({"workload": Workload(q_len=4), "world_size": 2} | change))

"""What validation proves of worlds too large to look at every rank, and of messages in very many chunks."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringsim.errors import ScheduleError
from ringsim.mask import mask_named
from ringsim.schedule import Recv, Region, Schedule, Send
from ringsim.schedule.emitter import BARRIER_TAG, Emitter
from ringsim.schedule.outstanding import Outstanding
from ringsim.schedule.place import Place
from ringsim.schedule.validation import _ranks
from ringsim.workload import Workload

from .tampering import edited, kernel, post, versions, with_ranks


def made(strategy, world_size, **options):
    return Schedule(world_size=world_size, strategy=strategy, **options)


def finished_later(schedule, rank, by):
    """The last version that `finish` of the first state reads is another one."""
    return edited(schedule, rank, lambda op: [replace(op, reads=versions(op.reads, by))], kernel("finish"))


def sampled(strategy, world_size=65):
    return made(strategy, world_size, workload=Workload(q_len=2 * world_size, heads=2, head_dim=4))


def sends_taken_out():
    """Rank 1 expects 64 blocks of v of rank 0, which sends none: no run can end."""
    schedule = sampled("ring")
    return with_ranks(schedule, rank_0=[op for op in schedule.program(0) if not (isinstance(op, Send) and op.tag == 1)])


def receives_taken_out():
    schedule = sampled("ring")
    return with_ranks(schedule, rank_1=[op for op in schedule.program(1) if not (isinstance(op, Recv) and op.tag == 1)])


def finished_before_the_last_merge():
    return finished_later(sampled("token-ring"), 0, -1)


def merge_skipped(strategy, which):
    """The later versions are counted anew, so that each read finds what it names."""
    schedule = sampled(strategy)
    ops = list(schedule.program(0))
    merges = [index for index, op in enumerate(ops) if kernel("merge")(op)]
    skipped = merges[which]
    for index in range(skipped + 1, len(ops)):
        op = ops[index]
        if kernel("merge")(op):
            ops[index] = replace(op, reads=(*versions(op.reads[:3], -1), *op.reads[3:]), writes=versions(op.writes, -1))
        elif kernel("finish")(op):
            ops[index] = replace(op, reads=versions(op.reads, -1))
    return with_ranks(schedule, rank_0=ops[:skipped] + ops[skipped + 1 :])


def partial_never_sent(rank=0):
    """Nobody that is looked at expects it."""
    schedule = sampled("pass-q")
    looked_at = set(_ranks(schedule))

    def far(op):
        return post(Send, "home")(op) and op.peer not in looked_at

    return edited(schedule, rank, lambda op: [], far)


def hop_of_an_old_state():
    schedule = sampled("q-ring")
    looked_at = set(_ranks(schedule))
    rank = next(rank for rank in looked_at if rank + 1 not in looked_at and rank + 1 < 65)
    return edited(schedule, rank, lambda op: [replace(op, region=versions([op.region], -1)[0])], post(Send, "home"))


SAMPLED_FAULTS = {
    "no send on a channel": (sends_taken_out, "rank 0: sends 0 messages to rank 1 with tag 1, which expects 64"),
    "no receive on a channel": (receives_taken_out, "rank 0: sends 64 messages to rank 1 with tag 1, which expects 0|rank 1, op"),
    "an output from before the last merge": (
        finished_before_the_last_merge,
        r"rank 0, op .*reads state\[0\] version 64 .*which holds state\[0\] version 65",
    ),
    "the last merge skipped": (
        lambda: merge_skipped("token-ring", -1),
        r"rank 0: the output of q\[0\] lacks what op \d+ of rank 0 receives, and 0 more",
    ),
    "a merge skipped": (lambda: merge_skipped("pass-q", 5), r"rank 0: the output of q\[0\] lacks what op \d+ of rank 0 receives"),
    "a partial never sent": (partial_never_sent, r"rank 0: never sends what op \d+ attends for q\[\d+\], and 0 more"),
    "an old state sent home": (hop_of_an_old_state, r"rank \d+, op \d+ \(send.*which holds state"),
    "a peer that is none": (
        lambda: edited(sampled("ring"), 0, lambda op: [replace(op, peer=65)], post(Send)),
        "names rank 65 as its peer; there are 65",
    ),
}


@pytest.mark.parametrize("name", SAMPLED_FAULTS)
def test_validation_of_sampled_ranks_finds(name):
    broken, message = SAMPLED_FAULTS[name]
    with pytest.raises(ScheduleError, match=message):
        broken().validate()


@pytest.mark.parametrize("strategy", ["q-ring", "pass-q", "token-ring", "double-ring(13)"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_sampled_programs_that_nothing_was_done_to_are_valid(strategy, mask):
    made(strategy, 65, workload=Workload(q_len=131, heads=2, head_dim=4, mask=mask_named(mask))).validate()


@pytest.mark.timeout(100)
def test_many_chunks_are_validated():
    """If each cost in proportion to their number this would take longer than a test may."""
    schedule = made("token-ring", 3, workload=Workload(q_len=39, heads=6), max_message_nbytes=7)
    assert sum(isinstance(op, Send) for op in schedule.program(0)) > 10_000
    schedule.validate()


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(0, 2)), max_size=30),
    st.integers(0, 30),
    st.integers(0, 9),
)
def test_a_slot_holds_what_was_written_last(written, begin, size):
    place, slot = Place(()), [None] * 50

    def at(begin, size, version):
        return Region(buffer="k", slot=1, shape=(size,), dtype="uint8", value="k[0]", version=version, offset=begin)

    for start, count, version in written:
        place.write(at(start, count, version))
        slot[start : start + count] = [version] * count
    for version in range(3):
        clean = all(found == version for found in slot[begin : begin + size])
        assert (place.stale(at(begin, size, version)) is None) == clean
    parts = place.held.get(("k", 1), [])
    assert all(low < high for low, high, _ in parts)
    assert all(a[1] < b[0] or (a[1] == b[0] and a[2] != b[2]) for a, b in pairwise(parts)), "in order, and no more than needed"


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.integers(0, 30), st.integers(0, 9)), max_size=20),
    st.sets(st.integers(0, 19)),
    st.integers(0, 30),
    st.integers(0, 9),
)
def test_the_posts_that_an_op_must_wait_for_are_those_that_overlap(posts, waited, begin, size):
    outstanding, left = Outstanding(), {}

    def at(slot, begin, size):
        return Region(buffer="k", slot=slot, shape=(size,), dtype="uint8", value="k[0]", offset=begin)

    for index, (sends, slot, start, count) in enumerate(posts):
        left[index] = (Send if sends else Recv)(id=index, step=0, phase="hop", region=at(slot, start, count), peer=0, tag=0)
        outstanding.add(left[index])
    for index in waited & set(left):
        outstanding.remove(index)
        del left[index]
    mine = at(1, begin, size)
    near = [(index, post) for index, post in left.items() if mine.overlaps(post.region)]
    assert outstanding.hazards((), (mine,)) == tuple(index for index, _ in near)
    assert outstanding.hazards((mine,), ()) == tuple(index for index, post in near if isinstance(post, Recv))
    assert (list(outstanding), len(outstanding)) == (list(left), len(left))


def test_a_strategy_keeps_off_the_tags_of_barriers():
    region = Region(buffer="k", slot=0, shape=(1,), dtype="uint8", value="k[0]")
    for tag in (-1, BARRIER_TAG):
        with pytest.raises(ScheduleError, match=rf"k\[0\] goes with tag {tag}; a strategy's tags are 0 to {BARRIER_TAG - 1}"):
            next(Emitter(0).send(region, peer=1, tag=tag))

"""Rings of different sizes: every document on one, none of them overfull, long ones on many ranks and short ones on few."""

import itertools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.balance import work_of
from ringsim.errors import RankMismatch, WorkloadError
from ringsim.mask import Causal, Documents
from ringsim.partition import Partition
from ringsim.ring_sizes import SLACK, Ring, RingSizes, size_rings
from ringsim.workload import Workload

from .counting import calls
from .mpi_launch import program, run

REPEATABLE = settings(max_examples=200, deadline=None, derandomize=True)
LENGTHS = st.lists(st.integers(0, 60) | st.integers(0, 3), max_size=12)


def one_ring(lengths, world_size, causal):
    ring = Ring(first=0, size=world_size, documents=tuple(range(len(lengths))))
    return RingSizes(lengths=tuple(lengths), world_size=world_size, causal=causal, rings=(ring,))


def places(plan):
    """Documents by the ranks that share them: (first, size)."""
    found = {(ring.first, ring.size): ring.documents for ring in plan.rings}
    alone = {(ring.first + place, 1): held for ring in plan.rings for place, held in enumerate(ring.alone)}
    return found | alone


@REPEATABLE
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_rings_share_no_rank_and_hold_every_document_once(lengths, world_size, causal):
    plan = size_rings(lengths, world_size, causal=causal)
    ranks = [rank for ring in plan.rings for rank in range(ring.first, ring.first + ring.size)]
    assert sorted(ranks) == list(range(world_size))
    assert sorted(document for held in places(plan).values() for document in held) == list(range(len(lengths)))
    assert all(len(ring.alone) in (0, ring.size) for ring in plan.rings)
    # one ring of all ranks divides all work, to within a token of each run: nothing may be much worse, nor move more
    whole = one_ring(lengths, world_size, causal)
    assert max(plan.work) <= (1 + SLACK) * max(whole.work)
    assert plan.moved_tokens <= whole.moved_tokens


@REPEATABLE
@given(LENGTHS, st.integers(1, 9), st.booleans())
def test_the_packed_partition_gives_each_rank_its_part_of_the_documents_of_its_ring(lengths, world_size, causal):
    plan = size_rings(lengths, world_size, causal=causal)
    split = Partition(kind=plan.partition, length=sum(lengths), world_size=world_size)
    assert tuple(split.count(rank) for rank in range(world_size)) == plan.tokens
    starts = np.cumsum([0, *lengths])
    expected = {rank: [] for rank in range(world_size)}
    for (first, size), documents in places(plan).items():
        for index, place in itertools.product(documents, range(size)):
            part = Partition(kind=plan.kind, length=lengths[index], world_size=size).positions(place) + starts[index]
            expected[first + place] += part.tolist()
    assert [split.positions(rank).tolist() for rank in range(world_size)] == [sorted(held) for held in expected.values()]
    mask = Documents(tuple(lengths))
    packed = Workload(q_len=sum(lengths), mask=Causal() & mask if causal else mask)
    assert work_of(split, packed) == plan.work


@REPEATABLE
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 9), st.booleans(), st.integers(0, 20))
def test_no_rank_holds_more_tokens_than_allowed(lengths, world_size, causal, spare):
    most = -(-sum(lengths) // world_size) + spare
    try:
        plan = size_rings(lengths, world_size, causal=causal, most_tokens=most)
    except WorkloadError:
        # one ring of all ranks holds at most a token more per run of each document
        assert spare < 2 * len(lengths)
    else:
        assert max(plan.tokens) <= most


def test_long_documents_get_many_ranks_and_short_ones_few():
    plan = size_rings((900, 500, 300, 100, 100, 50), 8)
    assert [(ring.size, ring.documents) for ring in plan.rings] == [(6, (0, 2)), (2, (1,))]
    assert sum(map(len, plan.rings[1].alone)) == 3
    assert max(plan.work) < 1.03 * sum(plan.work) / 8
    assert plan.moved_tokens == 5 * (900 + 300) + 500 < one_ring(plan.lengths, 8, True).moved_tokens / 2


def test_many_short_documents_need_no_ring_at_all():
    plan = size_rings([100 + index % 7 for index in range(200)], 8)
    assert {ring.size for ring in plan.rings} == {1}
    assert plan.moved_tokens == 0
    assert max(plan.work) < (1 + SLACK) * sum(plan.work) / 8


def test_memory_takes_ranks_that_work_would_not():
    # a long document and as much work in short ones: these hold more tokens
    lengths = (400, *[40] * 100)
    loose, tight = (size_rings(lengths, 2, most_tokens=most) for most in (None, 2500))
    assert (loose.moved_tokens, max(loose.tokens) > 2500) == (0, True)
    assert (tight.moved_tokens > 0, max(tight.tokens) <= 2500) == (True, True)


@pytest.mark.parametrize(
    ("lengths", "world_size", "options", "message"),
    [
        ((8, -1), 2, {}, "lengths[1] is -1; it must be a whole number from 0 to"),
        ((8, True), 2, {}, "lengths[1] is True; it must be a whole number from 0 to"),
        ((5.5,), 2, {}, "lengths[0] is 5.5; it must be a whole number"),
        (("a",), 2, {}, "lengths[0] is 'a'; it must be a whole number"),
        (5, 2, {}, "lengths are 5; they must be a sequence of whole numbers"),
        (None, 2, {}, "lengths are None; they must be a sequence of whole numbers"),
        ((8,), 0, {}, "world_size is 0; it must be a whole number from 1 to"),
        ((8,), 2.0, {}, "world_size is 2.0; it must be a whole number"),
        ((8,), 2, {"most_tokens": 5.5}, "most_tokens is 5.5; it must be a whole number"),
        ((8,), 2, {"most_tokens": -1}, "most_tokens is -1; it must be a whole number from 0 to"),
        ((8,), 2, {"slack": -1}, "slack is -1; it must be a number >= 0, such as 0.05"),
        ((8,), 2, {"slack": float("nan")}, "slack is nan; it must be a number >= 0"),
        ((8,), 2, {"slack": float("inf")}, "slack is inf; it must be a number >= 0"),
        ((8,), 2, {"slack": "5 %"}, "slack is '5 %'; it must be a number >= 0"),
        ((8,), 2, {"slack": True}, "slack is True; it must be a number >= 0"),
        (
            (900, 100),
            4,
            {"most_tokens": 200},
            "documents of 1000 tokens do not fit on 4 ranks of at most 200: take 5 ranks or raise most_tokens to 250",
        ),
        ((3, 3), 2, {"most_tokens": 3, "causal": True}, None),
        ((5, 5, 5, 5, 5, 5), 4, {"most_tokens": 8}, "in any way that was tried: raise most_tokens, take more ranks"),
    ],
)
def test_documents_that_do_not_fit_are_refused(lengths, world_size, options, message):
    if message is None:
        assert size_rings(lengths, world_size, **options).tokens == (3, 3)
        return
    with pytest.raises(WorkloadError, match=re.escape(message)):
        size_rings(lengths, world_size, **options)


def test_documents_may_be_an_array_and_of_any_whole_length():
    plan = size_rings(np.array([900, 500, 300]), np.int64(4))
    assert plan == size_rings((900, 500, 300), 4)
    assert {type(length) for length in plan.lengths} == {int}
    # more pairs than 64 bits count, and than a float holds exactly
    lengths = (2**40, 2**39 + 1, 2**33 + 7)
    for causal in (True, False):
        plan = size_rings(lengths, 3, causal=causal, slack=0)
        assert sum(plan.work) == sum(length * (length + 1) // 2 if causal else length**2 for length in lengths)
        assert sum(plan.tokens) == sum(lengths)


def test_thousands_of_documents_on_hundreds_of_ranks_take_some_calls_each():
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(7, 1.2, 8000)).astype(int)
    for most_tokens in (None, int(1.2 * lengths.sum() / 512)):
        plan, made = calls(lambda most=most_tokens: size_rings(lengths, 512, most_tokens=most))
        # for each document, in each of nine drafts, some; not some for each of the ranks
        assert made < 9 * 30 * len(lengths)
        assert max(plan.work) < 1.06 * sum(plan.work) / 512
        assert plan.moved_tokens < lengths.sum()


class World:
    """As much of a communicator as `split` asks for."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size

    def Get_rank(self):  # noqa: N802
        return self.rank

    def Get_size(self):  # noqa: N802
        return self.size

    def Split(self, color, key):  # noqa: N802
        return color, key


def test_each_rank_joins_the_ring_that_it_is_in():
    plan = size_rings((900, 500, 300, 100, 100, 50), 8)
    seats = [plan.split(World(rank, 8)) for rank in range(8)]
    assert [seat.comm for seat in seats] == [(0, rank) for rank in range(6)] + [(6, rank) for rank in (6, 7)]
    assert [seat.ring for seat in seats] == [plan.rings[0]] * 6 + [plan.rings[1]] * 2
    with pytest.raises(RankMismatch, match="the rings are for 8 ranks, the communicator has 4"):
        plan.split(World(0, 4))


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [4, 5])
def test_rings_of_different_sizes_agree_with_dense_attention(ranks, tmp_path):
    ended = run(tmp_path, (ranks, ("-W", "error", *program("ring_sizes"))), timeout_s=120)
    assert (ended.rc, ended.stderr) == (0, "")
    report = json.loads(ended.stdout)
    assert report["faults"] == []
    assert any(len(set(case["sizes"])) > 1 for case in report["cases"])
    assert all(len(case["worked"]) == ranks for case in report["cases"])

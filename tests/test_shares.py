"""Ranks of unequal speed end together when tokens are shared by what the devices do."""

import math
import re

import numpy as np
import pytest

from ringsim import inputs
from ringsim.errors import TopologyError, WorkloadError
from ringsim.execution import execute
from ringsim.mask import Causal, Full
from ringsim.reference import dense_attention
from ringsim.schedule import Schedule
from ringsim.shares import Shares, compute_s, even_out
from ringsim.simulation import simulate
from ringsim.topology import load, parse
from ringsim.workload import Workload

THIRD = """
ringsim: 2
name: one-slow
source: "defined: the first device at a third of its speed"
extends: {base}
devices:
  slow: {{like: {device}, speed: 0.3333333333333333}}
replace: {{{device}-0: slow}}
"""
IDEAL = parse(THIRD.format(base="ideal", device="ideal"))
HOPPER = parse(THIRD.format(base="dgx-h100", device="h100"))


def schedule(world_size, partition, mask, *, length=8192, kv_heads=8, heads=8):
    work = Workload(q_len=length * world_size, heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bfloat16", mask=mask)
    return Schedule(workload=work, world_size=world_size, partition=partition)


def with_shares(before, shares):
    return Schedule(workload=before.workload, world_size=before.world_size, partition=shares.partition)


def spread(times):
    return 1 - min(times) / max(times)


def ends(timeline, *kinds):
    """When each rank ended its last op of these kinds."""
    return [
        max(event.end_s for event in timeline.events if event.rank == rank and (not kinds or event.kind in kinds))
        for rank in range(timeline.world_size)
    ]


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize(("kind", "mask"), [("contiguous", Full()), ("zigzag", Causal()), ("zigzag", Full())])
def test_work_by_weight_runs_as_fast_as_the_devices_together(kind, mask, world_size, kv_heads):
    even = schedule(world_size, kind, mask, kv_heads=kv_heads)
    shares = even_out(even, IDEAL)
    assert shares.weights == (1, *[3] * (world_size - 1))
    before, after = simulate(even, IDEAL), simulate(with_shares(even, shares), IDEAL)
    assert spread(ends(before, "attend")) > 0.5
    assert max(spread(ends(after)), spread(ends(after, "attend"))) < 0.005
    # the slow one takes three times as long as planned, against world_size - 2/3 devices' worth of speed
    assert math.isclose(before.total_s / after.total_s, 3 * (world_size - 2 / 3) / world_size, rel_tol=2e-3)


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("topology", [IDEAL, load("ideal")], ids=["one slow", "alike"])
def test_contiguous_shares_even_out_a_causal_mask_too(world_size, topology):
    even = schedule(world_size, "contiguous", Causal(), kv_heads=2)
    shares = even_out(even, topology)
    assert shares.spread < 0.005
    after = simulate(with_shares(even, shares), topology)
    assert max(spread(ends(after)), spread(ends(after, "attend"))) < 0.05
    speeds = world_size - (2 / 3 if topology is IDEAL else 0)
    whole = simulate(schedule(1, "contiguous", Causal(), length=8192 * world_size), load("ideal")).total_s
    assert math.isclose(after.total_s, whole / speeds, rel_tol=0.03)


@pytest.mark.parametrize("kv_heads", [32, 4])
@pytest.mark.parametrize(("kind", "mask"), [("contiguous", Full()), ("zigzag", Causal()), ("contiguous", Causal())])
def test_eight_gpus_of_which_one_is_slow_end_together(kind, mask, kv_heads):
    even = schedule(8, kind, mask, length=32768, heads=32, kv_heads=kv_heads)
    shares = even_out(even, HOPPER)
    assert shares.spread < 0.005
    before, after = simulate(even, HOPPER), simulate(with_shares(even, shares), HOPPER)
    assert spread(ends(after)) < 0.05
    if mask == Full() or kind == "zigzag":
        assert 0.95 * 2.75 < before.total_s / after.total_s <= 2.75


def test_shares_say_what_they_predict():
    even = schedule(4, "zigzag", Causal())
    shares = even_out(even, IDEAL)
    assert shares.partition == "zigzag(1,3,3,3)"
    assert shares.compute_s == compute_s(with_shares(even, shares), IDEAL)
    assert shares.spread == spread(shares.compute_s)
    assert even_out(with_shares(even, shares), IDEAL) == shares, "whatever weights the schedule had before"


@pytest.mark.parametrize(("kind", "mask"), [("contiguous", Full()), ("zigzag", Causal())])
def test_what_is_executed_is_shared_so_too_and_right(kind, mask):
    even = schedule(4, kind, mask, length=60)
    work = Workload(q_len=240, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask)
    cut = Schedule(workload=work, world_size=4, partition=even_out(even, IDEAL, tolerance=0.1).partition)
    pairs = [sum(tile.pairs() for op in cut.program(rank) for tile in getattr(op, "tiles", ())) for rank in range(4)]
    assert [3 * pairs[0]] * 3 == pytest.approx(pairs[1:], rel=0.02)
    arrays = [inputs.rows(work, name, np.arange(240), 1) for name in "qkv"]
    expected, _ = dense_attention(work, *arrays)
    assert np.abs(execute(cut, *arrays).out - expected).max() < 1e-12


def test_devices_alike_get_equal_shares_at_once():
    shares = even_out(schedule(4, "contiguous", Full()), load("ideal"))
    assert (shares.weights, shares.rounds) == ((1, 1, 1, 1), 1)


def test_a_few_tokens_cannot_be_shared_finely_and_the_spread_says_so():
    shares = even_out(schedule(4, "contiguous", Full(), length=1), IDEAL, rounds=8)
    assert isinstance(shares, Shares)
    assert shares.spread == spread(shares.compute_s) > 0.05
    assert shares.rounds <= 8


@pytest.mark.parametrize("partition", ["striped", "runs(0:8192,1:8192)"])
def test_shares_of_other_partitions_are_refused(partition):
    message = re.escape(f"shares are for partitions contiguous and zigzag of a schedule that is built, not for {partition!r}")
    with pytest.raises(WorkloadError, match=message):
        even_out(schedule(2, partition, Full()), IDEAL)


def test_no_round_no_shares():
    with pytest.raises(WorkloadError, match="rounds is 0; give 1 or more"):
        even_out(schedule(2, "zigzag", Full()), IDEAL, rounds=0)


def test_a_device_without_figures_is_named():
    even = Schedule(workload=Workload(q_len=64, head_dim=64, dtype="float32"), world_size=2)
    with pytest.raises(TopologyError, match=r"one-slow, slow: no attention figures for float32 head_dim 64"):
        even_out(even, IDEAL)

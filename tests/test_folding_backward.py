"""One rank of each kind stands for all in the backward pass as well: the folded timeline is the full one."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringsim import topology
from ringsim.costs import Costs
from ringsim.mask import mask_named
from ringsim.schedule import Schedule
from ringsim.simulation import simulate
from ringsim.simulation.programs import Programs, Told, turning
from ringsim.workload import Workload

from .test_folding import ANY, WAYS, agree, even

RANKS = 32


def made(strategy, *, mask="full", partition="contiguous", pass_="both", world_size=RANKS):
    shape = {"heads": 8, "kv_heads": 4, "head_dim": 128, "dtype": "bfloat16"}
    work = Workload(q_len=512 * world_size, mask=mask_named(mask), pass_=pass_, **shape)
    return Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition)


@pytest.mark.parametrize(
    ("strategy", "mask", "partition", "alike"),
    [
        ("ring", "causal", "zigzag", 1),
        ("burst", "causal", "zigzag", 1),
        ("double-ring(8)", "full", "contiguous", 8),
        ("halo", "full", "contiguous", 1),
    ],
)
def test_one_of_each_kind_stands_for_all_in_both_passes(strategy, mask, partition, alike):
    schedule = made(strategy, mask=mask, partition=partition)
    assert turning(schedule) is not None
    assert agree(schedule, topology.load("ideal", {"gpus": RANKS})) == alike


def test_a_large_world_is_folded_by_itself():
    timeline = simulate(made("ring", pass_="backward"), topology.load("ideal", {"gpus": RANKS}))
    assert timeline.facts["alike"] == 1


@settings(max_examples=40, deadline=None)
@given(
    strategy=st.sampled_from((*WAYS, "burst", "halo")),
    world_size=st.sampled_from((4, 8)),
    tokens=st.sampled_from((0, 1, 12)),
    more=st.sampled_from((0, 0, 3)),
    mask=st.sampled_from(("full", "causal", "window(7)", "window(30, 5)", "~causal")),
    partition=ANY,
    kv_heads=st.sampled_from((1, 4)),
    sync=st.sampled_from(("free", "step")),
    pass_=st.sampled_from(("backward", "both")),
)
def test_ranks_that_are_told_the_same_go_back_the_same_way(
    strategy, world_size, tokens, more, mask, partition, kv_heads, sync, pass_
):
    length = 48 if partition.startswith("runs") else tokens * world_size + more
    world_size = 4 if partition.startswith("runs") else world_size
    shape = {"heads": 4, "kv_heads": kv_heads, "head_dim": 128, "dtype": "bfloat16"}
    work = Workload(q_len=length, mask=mask_named(mask), pass_=pass_, **shape)
    schedule = Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition, sync=sync)
    by = turning(schedule)
    assume(by is not None)
    told = list(map(Told(schedule).key, range(world_size)))
    on = topology.load("ideal")
    programs = Programs(schedule, [Costs(on.device(on.devices[0]), work)] * world_size)
    keys = [programs.key(rank) for rank in range(world_size)]
    for ranks in (count for count in range(by, world_size, by) if world_size % count == 0):
        assert not even(told, ranks) or even(keys, ranks)

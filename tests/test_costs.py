"""Prices of tiles on a device with a fused kernel: what its blocks compute, and how much of the device they fill."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ringsim
from ringsim.costs import Costs, _as_a_square
from ringsim.errors import BeyondFigures, TopologyError
from ringsim.schedule import Compute, Region
from ringsim.tile import Span, Tile

WORK = ringsim.Workload(q_len=2**20, heads=32, head_dim=128, dtype="bfloat16")


def tile(rows, keys, *, at=0, lo=None, hi=None, heads=1, row=0):
    q, k = Span(row=row, count=rows, start=at), Span(row=0, count=keys, start=0)
    return Tile(batch=(0, 1), heads=(0, heads), q=q, k=k, lo=lo, hi=hi)


def seconds(*tiles, **settings):
    """Of one launch on an H100, which itself takes no time."""
    on = ringsim.load_topology("dgx-h100", {"devices.h100.launch": "0 s", **settings})
    op = Compute(id=0, step=0, phase="attend", kernel="attend", reads=(), writes=(), tiles=tiles)
    return Costs(on.spec.devices["h100"], WORK).cost(op).seconds


@pytest.mark.parametrize("side", [1, 2, 7, 128, 4096])
def test_a_causal_square_is_looked_up_as_it_is(side):
    assert _as_a_square(tile(side, side, lo=0)) == side * (side + 1) / 2


def test_a_narrow_window_is_as_inefficient_as_a_short_square():
    """A kernel's blocks are cut at every row of the band, whatever its length."""
    window = tile(2**16, 2**16, lo=0, hi=255)
    assert _as_a_square(window) == pytest.approx(256 * 257 / 2, rel=0.01)
    short = [tile(256, 256, lo=0, row=256 * n) for n in range(256)]
    rate = window.pairs() / seconds(window, **{"devices.h100.units": None})
    assert rate == pytest.approx(sum(one.pairs() for one in short) / seconds(*short, **{"devices.h100.units": None}), rel=0.01)
    assert rate < 0.5 * tile(2**16, 2**16, lo=0).pairs() / seconds(tile(2**16, 2**16, lo=0))


def test_long_rows_before_the_diagonal_are_more_efficient():
    assert _as_a_square(tile(1024, 8192, at=7168, lo=0)) > tile(1024, 8192, at=7168, lo=0).pairs()


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(-50, 50), st.one_of(st.none(), st.integers(-9, 9)), st.integers(0, 12))
def test_cut_rows_are_those_at_which_the_band_ends(rows, keys, at, lo, width):
    one = tile(rows, keys, at=at, lo=lo, hi=None if lo is None else lo + width)
    distance = one.q.positions() - one.k.start
    cut = 0
    if one.lo is not None:
        cut += int(np.sum((distance - one.lo + 1 > 0) & (distance - one.lo + 1 <= keys)))
    if one.hi is not None:
        cut += int(np.sum((distance - one.hi >= 0) & (distance - one.hi < keys)))
    assert one.cut_rows() == cut


def test_tiles_of_one_launch_fill_the_device_together():
    """Four documents of 512 tokens and 8 heads: 32 blocks each of the 132 units, 128 together."""
    one, four = tile(512, 512, lo=0, heads=8), [tile(512, 512, lo=0, heads=8, row=512 * n) for n in range(4)]
    assert seconds(*four) == pytest.approx(seconds(one), rel=1e-12)
    eight = [tile(512, 512, lo=0, heads=8, row=512 * n) for n in range(8)]
    assert seconds(*eight) == pytest.approx(8 * 32 / 132 * seconds(one), rel=1e-12)


def test_a_small_tile_in_a_larger_launch_lasts_as_long_as_the_smallest_figure():
    on = ringsim.load_topology("mi300x", {"devices.mi300x.launch": "0 s"})
    strict, prices = (Costs(on.spec.devices["mi300x"], WORK, bound=bound) for bound in (False, True))

    def cost(*tiles, by=prices):
        return by.cost(Compute(id=0, step=0, phase="attend", kernel="attend", reads=(), writes=(), tiles=tiles))

    large, least = tile(4096, 4096, lo=0, heads=32), tile(512, 512, lo=0, heads=32)
    assert cost(large).bounded_s == 0
    for rows in (1, 7, 100, 511):
        small = tile(rows, rows, lo=0, heads=32, row=5000)
        assert cost(large, small).bounded_s == pytest.approx(cost(large, small).seconds - cost(large).seconds, rel=1e-6)
        assert cost(large, small).bounded_s == pytest.approx(cost(large, least).seconds - cost(large).seconds, rel=1e-6)
        with pytest.raises(BeyondFigures):
            cost(small, by=strict)


def test_a_prediction_says_how_much_of_it_is_such_a_bound():
    machine = ringsim.load_topology("mi300x")
    for text, some in (("causal & documents(100, 65436)", True), ("causal & (first(4) | window(1020))", True), ("causal", False)):
        work = ringsim.Workload(q_len=2**16, heads=32, head_dim=128, dtype="bfloat16", mask=ringsim.mask_named(text))
        timeline = ringsim.simulate(ringsim.Schedule(workload=work, world_size=8, partition="zigzag"), machine)
        assert (timeline.facts["bounded"] > 0) is some


def product(flops, elements, **settings):
    """Seconds of a matrix product on an H100, beyond its launch."""
    on = ringsim.load_topology("dgx-h100", {"devices.h100.launch": "0 s", **settings})
    region = Region(buffer="x", slot=0, shape=(elements,), dtype="bfloat16", value="x")
    op = Compute(id=0, step=0, phase="feed_forward", kernel="feed_forward", reads=(region,), writes=(), flops=flops)
    return Costs(on.spec.devices["h100"], WORK, "dgx-h100, h100").cost(op).seconds


def test_flops_outside_attention_take_the_longer_of_the_matmul_rate_and_memory():
    on = {"devices.h100.matmul.bfloat16": "500 TFLOP/s", "devices.h100.memory_bandwidth": "2 TB/s"}
    assert product(10**12, 10**6, **on) == pytest.approx(1e12 / 500e12, rel=1e-12)
    assert product(10**9, 10**9, **on) == pytest.approx(2e9 / 2e12, rel=1e-12)
    assert product(0, 10**9, **on) == pytest.approx(2e9 / 2e12, rel=1e-12)
    assert product(10**12, 10**6, **on, **{"devices.h100.speed": 0.5}) == pytest.approx(2e12 / 500e12, rel=1e-12)


def test_flops_without_a_figure_say_which_is_missing_and_how_to_give_it():
    with pytest.raises(TopologyError, match=r"dgx-h100, h100 has no `matmul` figure for bfloat16.*--set devices\.h100\.matmul"):
        product(1, 1, **{"devices.h100.matmul": {}})

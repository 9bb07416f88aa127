"""Lowering: the panels that a tile is cut into cover its visible pairs, and what is priced is what is computed."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.errors import WorkloadError
from ringsim.kernel_times import micro_shapes
from ringsim.lowering import Blocking, MicroTiles
from ringsim.mask import Causal
from ringsim.schedule import Schedule
from ringsim.tile import Span, Tile
from ringsim.workload import Workload

REPEATABLE = settings(max_examples=400, deadline=None, derandomize=True)
SIZES = st.integers(1, 12)
BLOCKINGS = st.builds(Blocking, q_rows=SIZES, k_rows=SIZES, edge_rows=st.integers(1, 15))
SPANS = st.builds(Span, row=st.integers(0, 5), count=st.integers(1, 40), start=st.integers(-50, 50), step=st.integers(1, 4))
BOUND = st.none() | st.integers(-60, 60)
TILES = st.builds(Tile, batch=st.just((1, 3)), heads=st.just((0, 4)), q=SPANS, k=SPANS, lo=BOUND, hi=BOUND)


def dense(tile):
    distance = tile.q.positions()[:, None] - tile.k.positions()[None, :]
    seen = np.ones(distance.shape, bool)
    if tile.lo is not None:
        seen &= distance >= tile.lo
    if tile.hi is not None:
        seen &= distance <= tile.hi
    return seen


def all_panels(blocking, tile):
    return [panel for _, _, panels in blocking.blocks(tile) for panel in panels]


def cut(blocking, tile):
    """The micro-tiles that a kernel runs: each panel in steps of k_rows."""
    counts = Counter()
    for panel in all_panels(blocking, tile):
        for begin in range(panel.k_begin, panel.k_end, blocking.k_rows):
            columns = min(blocking.k_rows, panel.k_end - begin)
            counts[panel.q_end - panel.q_begin, columns, panel.masked] += 1
    return counts


def counted(micro_tiles):
    return {(micro.q_rows, micro.k_rows, micro.masked): micro.count for micro in micro_tiles}


@REPEATABLE
@given(BLOCKINGS, TILES)
def test_panels_cover_every_visible_pair_exactly_once(blocking, tile):
    visible = dense(tile)
    covered = np.zeros(visible.shape, int)
    for panel in all_panels(blocking, tile):
        seen = visible[panel.q_begin : panel.q_end, panel.k_begin : panel.k_end]
        assert seen.all() or panel.masked, "the kernel computes an unmasked panel whole"
        assert not panel.masked or seen.all(axis=0).sum() < blocking.edge_rows, "what a whole strip sees is not masked"
        covered[panel.q_begin : panel.q_end, panel.k_begin : panel.k_end] += seen
    assert np.array_equal(covered, visible)


@REPEATABLE
@given(BLOCKINGS, TILES)
def test_blocks_follow_one_another_and_hold_their_panels(blocking, tile):
    before = 0
    for begin, end, panels in blocking.blocks(tile):
        assert before <= begin < end <= min(begin + blocking.q_rows, tile.q.count)
        assert panels
        for panel in panels:
            assert begin <= panel.q_begin < panel.q_end <= end
            assert 0 <= panel.k_begin < panel.k_end <= tile.k.count
            rows, keys = panel.q_end - panel.q_begin, panel.k_end - panel.k_begin
            if panel.masked and rows > blocking.edge_rows:
                assert keys <= min(blocking.edge_rows, blocking.k_rows), "one micro-tile"
                assert rows <= blocking.k_rows, "no more pairs than a strip of queries"
                hidden = ~dense(tile)[panel.q_begin : panel.q_end, panel.k_begin : panel.k_end]
                assert not hidden[blocking.edge_rows :].any(), "the rows below see all keys of a column"
        before = end


@REPEATABLE
@given(BLOCKINGS, TILES)
def test_micro_tiles_are_what_the_blocks_are_cut_into(blocking, tile):
    micro_tiles = blocking.micro_tiles(tile)
    assert counted(micro_tiles) == cut(blocking, tile)
    assert len(counted(micro_tiles)) == len(micro_tiles), "alike pieces come together"
    copies = 2 * 4
    computed = copies * sum(micro.pairs for micro in micro_tiles)
    assert computed == tile.pairs() if not tile.masked else computed >= tile.pairs()


@REPEATABLE
@given(BLOCKINGS, TILES)
def test_an_exact_lowering_prices_the_visible_pairs_alone(blocking, tile):
    micro_tiles = replace(blocking, exact=True).micro_tiles(tile)
    assert 2 * 4 * sum(micro.pairs for micro in micro_tiles) == tile.pairs()
    assert all(micro.masked == tile.masked for micro in micro_tiles)


@REPEATABLE
@given(BLOCKINGS, TILES, st.integers(-1000, 1000), st.integers(0, 9))
def test_a_lowering_does_not_depend_on_where_the_tile_lies(blocking, tile, shift, rows):
    q, k = (replace(span, start=span.start + shift, row=span.row + rows) for span in (tile.q, tile.k))
    moved = replace(tile, q=q, k=k, batch=(0, 1), heads=(3, 4))
    assert all_panels(blocking, moved) == all_panels(blocking, tile)
    assert blocking.micro_tiles(moved) == blocking.micro_tiles(tile)
    exact = replace(blocking, exact=True)
    assert exact.micro_tiles(moved) == exact.micro_tiles(tile)


@REPEATABLE
@given(BLOCKINGS, TILES, st.integers(1, 40))
def test_a_lowering_does_depend_on_the_distance_between_queries_and_keys(blocking, tile, shift):
    """The cache of micro-tiles must not take two tiles for one."""
    apart = replace(tile, q=replace(tile.q, start=tile.q.start + shift))
    assert counted(blocking.micro_tiles(tile)) == cut(blocking, tile)
    assert counted(blocking.micro_tiles(apart)) == cut(blocking, apart)


def test_a_causal_tile_is_cut_into_a_common_part_and_strips_along_the_diagonal():
    q, k = Span(row=0, count=8, start=1), Span(row=0, count=9, start=0)
    tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=0)
    blocking = Blocking(q_rows=4, k_rows=4, edge_rows=2)
    assert [(begin, end) for begin, end, _ in blocking.blocks(tile)] == [(0, 4), (4, 8)]
    assert [tuple(panel) for panel in all_panels(blocking, tile)] == [
        (0, 4, 0, 2, False),
        (1, 4, 2, 4, True),
        (3, 4, 4, 5, False),
        (4, 8, 0, 6, False),
        (5, 8, 6, 8, True),
        (7, 8, 8, 9, False),
    ]
    assert set(blocking.micro_tiles(tile)) == {
        MicroTiles(2, 3, 2, True),
        MicroTiles(2, 1, 1, False),
        MicroTiles(2, 4, 2, False),
        MicroTiles(1, 4, 4, False),
    }


def test_rows_below_a_column_as_tall_as_a_strip_of_queries_is_long_see_its_keys_in_one_panel():
    q, k = Span(row=0, count=8, start=0), Span(row=0, count=4, start=0)
    tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=0)
    assert [tuple(panel) for panel in all_panels(Blocking(q_rows=8, k_rows=4, edge_rows=2), tile)] == [
        (0, 4, 0, 2, True),
        (2, 4, 2, 4, True),
        (4, 8, 0, 4, False),
    ]


@pytest.mark.parametrize(("step", "lo", "hi"), [(2, 0, None), (1, 0, 5), (1, None, 3)])
def test_strips_of_queries_follow_every_other_edge(step, lo, hi):
    """Steps that differ, a band as narrow as a block, and keys that are cut off before the first one seen."""
    q, k = Span(row=0, count=16, start=0, step=step), Span(row=0, count=16, start=0)
    tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=lo, hi=hi)
    panels = all_panels(Blocking(q_rows=16, k_rows=16, edge_rows=4), tile)
    masked = [panel for panel in panels if panel.masked]
    assert masked
    assert all(panel.q_end - panel.q_begin <= 4 for panel in masked)


@REPEATABLE
@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 9))
def test_a_causal_square_computes_few_hidden_pairs(rows, before, edge):
    """Half a strip's width more than is seen for each row: never more than edge_rows of them."""
    q, k = Span(row=0, count=rows, start=before), Span(row=0, count=rows + before, start=0)
    tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=0)
    computed = sum(micro.pairs for micro in Blocking(q_rows=4 * edge, k_rows=4 * edge, edge_rows=edge).micro_tiles(tile))
    assert computed <= tile.pairs() + rows * (edge - 1) / 2 + edge**2 / 2


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (4, 4, -2)])
def test_a_blocking_needs_rows(sizes):
    q_rows, k_rows, edge_rows = sizes
    with pytest.raises(WorkloadError, match=f"at least one row: {q_rows} x {k_rows}, edge {edge_rows}"):
        Blocking(q_rows=q_rows, k_rows=k_rows, edge_rows=edge_rows)


@settings(max_examples=300, deadline=None)
@given(
    q_len=st.integers(1, 1500),
    kv_len=st.integers(1, 1500),
    world_size=st.integers(1, 5),
    partition=st.sampled_from(("contiguous", "striped", "zigzag")),
    blocking=st.sampled_from(
        (
            Blocking(q_rows=512, k_rows=512, edge_rows=128),
            Blocking(q_rows=512, k_rows=256, edge_rows=128),
            Blocking(q_rows=64, k_rows=32, edge_rows=16),
        )
    ),
)
def test_calibration_covers_every_micro_tile_of_a_schedule(q_len, kv_len, world_size, partition, blocking):
    schedule = Schedule(workload=Workload(q_len=q_len, kv_len=kv_len, mask=Causal()), world_size=world_size, partition=partition)
    shapes = {kind: [rows * columns for rows, columns in found] for kind, found in micro_shapes(blocking).items()}
    for rank in range(world_size):
        for held in range(world_size):
            for tile in schedule.job.tiles(schedule.job.q_block(rank), schedule.job.kv_block(held)):
                for micro in blocking.micro_tiles(tile):
                    pairs = shapes["masked" if micro.masked else "full"]
                    assert min(pairs) <= micro.q_rows * micro.k_rows <= max(pairs)

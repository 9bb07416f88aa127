"""Tiles by cuDNN, on paper: bands, strides, plans, streams and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim.backends.cuda_tiles import Band, part_of, parts_of
from ringsim.backends.cudnn import Room
from ringsim.backends.cudnn_limits import bounds_of
from ringsim.backends.cudnn_plans import SCORES_LIMIT, layout_of
from ringsim.errors import DeviceError
from ringsim.mask import mask_named
from ringsim.schedule import Compute, Schedule
from ringsim.tile import Span, Tile
from ringsim.workload import Workload

from .cudnn_bench import Bench, check_backward, check_forward, seen_pairs
from .emulator import Emulator, needs_compiler
from .paper_cudnn import Graph, diagonal_alignment
from .paper_gpu import PaperGpu

# bands


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_part_begins_with_a_pair_that_is_seen_and_has_cudnns_bounds(data):
    step = data.draw(st.integers(1, 4))
    start = st.integers(0, 40)
    q, k = (Span(row=data.draw(start), count=data.draw(st.integers(1, 24)), start=data.draw(start), step=step) for _ in range(2))
    lo, hi = (data.draw(st.none() | st.integers(-60, 60)) for _ in range(2))
    tile = Tile(batch=(0, 1), heads=(0, 1), q=q, k=k, lo=lo, hi=hi)
    part = part_of(tile)
    if part is None:
        assert tile.pairs() == 0
        return
    rows, keys = part.q_rows[1] - part.q_rows[0], part.k_rows[1] - part.k_rows[0]
    seen = seen_pairs(part.band, rows, keys)
    assert seen[0, 0] and seen[-1, -1] and seen.sum() == tile.pairs()
    left, right = bounds_of(part.band)
    assert (left is None or left >= 1) and (right is None or right >= 0)
    i, j = np.arange(rows)[:, None], np.arange(keys)[None, :]
    kept = (j + (left or rows) > i) if left is not None else np.ones_like(seen)
    kept = kept & (j <= i + right) if right is not None else kept
    assert (kept == seen).all()


SCHEDULES = [
    (mask, partition, strategy, length)
    for mask in ("causal", "causal & window(12)", "window(20, 9)", "full")
    for partition, strategy in (("contiguous", "ring"), ("zigzag", "ring"), ("striped", "ring"), ("striped", "q-ring"))
    for length in (96, 101)
]


def tiles_of(mask, partition, strategy, length):
    work = Workload(q_len=length, heads=4, kv_heads=2, head_dim=16, dtype="bfloat16", mask=mask_named(mask))
    schedule = Schedule(workload=work, world_size=4, partition=partition, strategy=strategy)
    for rank in range(4):
        for op in schedule.program(rank):
            if isinstance(op, Compute) and op.kernel == "attend":
                yield from parts_of(op.tiles)


@pytest.mark.parametrize(("mask", "partition", "strategy", "length"), SCHEDULES)
def test_every_tile_of_a_schedule_is_right_or_left_to_other_kernels(monkeypatch, mask, partition, strategy, length):
    bench = Bench(monkeypatch)
    parts = {
        (rows[1] - rows[0], keys[1] - keys[0], band) for _, (rows, keys, band) in tiles_of(mask, partition, strategy, length)
    }
    assert parts
    for rows, keys, band in sorted(parts, key=repr):
        assert bench.tiles.refuses("bfloat16", (16, 24), band, backward=True) is None
        operands = bench.forward((1, rows, 4, 16), (1, keys, 2, 16), 24, "bfloat16")
        reason = bench.tiles.unfit(operands[:3], band)
        if reason is None:
            check_forward(bench, operands, band)
            if rows * keys > 1:
                check_backward(bench, operands, band)
        else:
            # unequal blocks under a window: the only tiles of a schedule that cuDNN leaves
            assert "no more queries than keys" in reason and length % 4 and mask != "causal"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("widths"), [(16, 16), (24, 8), (8, 40)])
def test_grouped_heads_unequal_widths_and_batches(monkeypatch, dtype, heads, kv_heads, widths):
    bench = Bench(monkeypatch)
    operands = bench.forward((2, 19, heads, widths[0]), (2, 27, kv_heads, widths[0]), widths[1], dtype)
    band = Band(distance=5, q_step=1, k_step=1, lo=0, hi=14)
    assert band.diagonals() == (-5, 9)
    check_forward(bench, operands, band)
    check_backward(bench, operands, band)
    assert bench.tiles.partial(dtype) == dtype


@pytest.mark.parametrize("version", [92800, 92500])
def test_lse_of_rows_that_begin_anywhere_goes_through_scratch(monkeypatch, version):
    bench = Bench(monkeypatch, version=version)
    band = Band(distance=0, q_step=1, k_step=1, lo=0, hi=None)
    aligned = bench.forward((2, 24, 4, 16), (2, 24, 2, 16), 16, "bfloat16")
    check_forward(bench, aligned, band)
    assert not any(entry[:2] == ("launch", "copy") for entry in bench.gpu.log)
    check_forward(bench, aligned._replace(lse=bench.made((2, 4, 25), "float32")[..., 1:]), band)
    assert sum(entry[:2] == ("launch", "copy") for entry in bench.gpu.log) == 1
    check_backward(bench, aligned, band)
    # lse has strides here; before 9.26 cuDNN does not read them
    assert sum(entry[:2] == ("launch", "copy") for entry in bench.gpu.log) == (1 if version == 92800 else 2)
    check_backward(bench, aligned, band, offset=1)
    assert sum(entry[:2] == ("launch", "copy") for entry in bench.gpu.log) == (2 if version == 92800 else 3)
    assert bench.tiles.refuses("bfloat16", (16, 16), band, backward=True) is None


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_with_the_kernels_that_a_gpu_runs(monkeypatch, dtype):
    bench = Bench(monkeypatch, run=Emulator(seed=1).launch)
    band = Band(distance=2, q_step=1, k_step=1, lo=0, hi=9)
    operands = bench.forward((2, 19, 4, 24), (2, 21, 2, 24), 40, dtype)
    check_forward(bench, operands._replace(lse=bench.made((2, 4, 20), "float32")[..., 1:]), band)
    check_backward(bench, operands, band, offset=1)


# plans, workspace, streams


def test_a_shape_is_planned_once_and_its_workspace_allocated_once(monkeypatch):
    bench = Bench(monkeypatch)
    band = Band(distance=0, q_step=1, k_step=1, lo=0, hi=None)
    small, large = (bench.forward((1, rows, 2, 16), (1, rows, 2, 16), 16, "float16") for rows in (24, 96))
    for operands in (small, large):
        check_forward(bench, operands, band)
        check_backward(bench, operands, band)
    assert len(bench.cudnn.graphs) == 4
    held, allocated = bench.tiles.nbytes, len(bench.gpu.allocated)
    run = bench.backward(small, np.zeros((1, 2, 24)), np.zeros((1, 2, 24)))
    made = len(bench.gpu.allocated)
    for _ in range(3):
        bench.tiles.attend(small, band, 0.3, bench.stream)
        bench.tiles.attend_backward(run, band, 0.3, bench.stream)
        bench.gpu.drain()
    assert len(bench.gpu.allocated) == made > allocated
    assert len(bench.cudnn.graphs) == 4
    largest = max(graph.get_workspace_size_plan_at_index(graph.plan) for graph in bench.cudnn.graphs)
    assert bench.tiles.nbytes <= held
    assert bench.tiles._workspace.of(1, bench.stream).nbytes == largest
    bench.tiles.attend(small, band, 0.4, bench.stream)
    bench.tiles.attend(small, None, 0.4, bench.stream)
    assert len(bench.cudnn.graphs) == 6
    bench.gpu.drain()


def test_an_outgrown_piece_is_held_until_the_device_is_done_with_it():
    gpu = PaperGpu(3)
    room, stream = Room(gpu), gpu.stream()
    piece = room.of(100, stream)
    seen = []
    gpu.defer(lambda: seen.append(piece.nbytes), stream)
    assert room.of(50, stream) is piece
    room.of(200, stream)
    assert room.nbytes in (200, 300)
    gpu.drain()
    room.of(400, stream)
    # of the pieces that waited only what is not yet done is still held
    assert 400 <= room.nbytes <= 600 and seen == [100]


@pytest.mark.parametrize("seed", range(8))
def test_each_stream_is_bound_and_takes_the_workspace_over_by_an_event(monkeypatch, seed):
    bench = Bench(monkeypatch, seed=seed)
    other = bench.gpu.stream()
    operands = [bench.forward((1, 24, 2, 16), (1, 24, 2, 16), 16, "float16") for _ in range(4)]
    for stream, one in zip((bench.stream, other, other, bench.stream), operands, strict=True):
        bench.tiles.attend(one, None, 0.3, stream)
    assert [entry[1] for entry in bench.cudnn.log if entry[0] == "set_stream"] == [bench.stream, other, bench.stream]
    launched = [stream for kind, *_, stream in bench.cudnn.log if kind == "execute"]
    assert launched == [bench.stream, other, other, bench.stream]
    assert bench.gpu.log.count(("wait", other.number)) == 1
    bench.gpu.drain()


def test_the_handle_goes_with_the_tiles_and_waits_for_what_their_plans_still_do(monkeypatch):
    """A one-shot call makes a handle each time, and its plans would be unloaded while the device runs them."""
    bench = Bench(monkeypatch)
    (made,) = bench.cudnn.log
    assert made[0] == "create_handle"
    del bench.tiles
    assert bench.cudnn.log == [made, ("destroy_handle", made[1])]


def test_streams_with_an_address_are_given_by_it(monkeypatch):
    bench = Bench(monkeypatch)
    bench.cudnn.defer = lambda function, stream: function()
    bench.stream.ptr = 0x1234
    bench.tiles.attend(bench.forward((1, 8, 1, 8), (1, 8, 1, 8), 8, "float16"), None, 0.3, bench.stream)
    assert ("set_stream", 0x1234) in bench.cudnn.log


def test_graphs_are_aligned_top_left_and_deterministic(monkeypatch):
    bench = Bench(monkeypatch)
    operands = bench.forward((1, 24, 2, 16), (1, 40, 2, 16), 16, "bfloat16")
    band = Band(distance=3, q_step=2, k_step=2, lo=-5, hi=11)
    check_forward(bench, operands, band, scale=0.125)
    check_backward(bench, operands, band, scale=0.125)
    forward, backward = bench.cudnn.graphs
    assert forward.alignment is backward.alignment is diagonal_alignment.TOP_LEFT
    assert (forward.left, forward.right) == (backward.left, backward.right) == (5, 4)
    assert forward.scale == backward.scale == 0.125
    assert backward.deterministic is True


def test_engines_of_the_frontend_are_passed_over_and_those_that_fail_too(monkeypatch):
    bench = Bench(monkeypatch, broken=("eng9",))
    operands = bench.forward((1, 24, 2, 16), (1, 24, 2, 16), 16, "float16")
    check_forward(bench, operands, None)
    facts = bench.tiles.facts()
    assert (facts["cudnn"], facts["cudnn_frontend"]) == ("9.28.0", "1.32.0")
    (plan,) = facts["cudnn_plans"]
    assert "eng8, workspace 256 bytes" in plan and "forward float16, q (1, 2, 24, 16)" in plan


def test_a_shape_without_a_plan_is_an_error_that_says_all(monkeypatch):
    bench = Bench(monkeypatch, broken=("eng8", "eng9"))
    operands = bench.forward((1, 24, 2, 16), (1, 24, 2, 16), 16, "float16")
    with pytest.raises(DeviceError) as error:
        bench.tiles.attend(operands, Band(0, 1, 1, 0, None), 0.3, bench.stream)
    for part in (
        "cudnn 9.28.0",
        "cudnn_frontend 1.32.0",
        "float16",
        "(1, 2, 24, 16)",
        "right bound 0",
        "eng8: cudnnFinalize",
        "sm90",
    ):
        assert part in str(error.value)


def test_equal_layouts_are_equal_whatever_the_strides_of_axes_of_one():
    base = np.zeros((2, 5, 3, 8), np.float16)
    assert layout_of(base[:1]) == layout_of(np.zeros((1, 5, 3, 8), np.float16))
    assert layout_of(base).strides == (120, 8, 24, 1)
    assert layout_of(np.zeros((1, 1, 1, 8), np.float16)).strides == (8, 8, 8, 1)
    assert layout_of(np.zeros((2, 9, 5), np.float32)[:1, :3, 2:3]) == ((1, 3, 1, 1), (15, 5, 1, 1))
    assert layout_of(np.zeros((2, 3, 10), np.float32)[:, :, 3:7]) == ((2, 3, 4, 1), (30, 10, 1, 1))


# what it stores


def test_a_limit_on_score_gradients_is_set_while_a_backward_graph_is_built_and_no_longer(monkeypatch):
    import os

    seen = []
    monkeypatch.delenv(SCORES_LIMIT, raising=False)
    monkeypatch.setattr(Graph, "create_execution_plans", lambda graph, modes: seen.append(os.environ.get(SCORES_LIMIT)))
    monkeypatch.setattr(Graph, "get_execution_plan_count", lambda graph: 0)
    for capability, user in (((9, 0), None), ((8, 0), None), ((10, 0), None), ((9, 0), "77")):
        if user:
            monkeypatch.setenv(SCORES_LIMIT, user)
        bench = Bench(monkeypatch, capability=capability, most_scores_nbytes=12345 << 10)
        operands = bench.forward((1, 24, 2, 16), (1, 24, 2, 16), 16, "float16")
        with pytest.raises(DeviceError, match="no engine"):
            bench.tiles.attend(operands, None, 0.3, bench.stream)
        with pytest.raises(DeviceError, match="no engine"):
            bench.tiles.attend_backward(
                bench.backward(operands, np.zeros((1, 2, 24)), np.zeros((1, 2, 24))), None, 0.3, bench.stream
            )
    assert seen == [None, str(12345 << 10), None, None, None, None, "77", "77"]
    assert os.environ[SCORES_LIMIT] == "77"

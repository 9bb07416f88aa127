"""The memory model: against the papers' terms, against what a run really allocates, and what fits a machine."""

import gc
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import ringsim
from ringsim import capacity, inputs, ledger
from ringsim.backends.cpu import available_memory
from ringsim.capacity import demands, longest, longest_ring, tightest
from ringsim.cli.main import cli, main
from ringsim.errors import RingsimError, TopologyError, WorkloadError
from ringsim.execution import Rank
from ringsim.footprint import FeedForward, weigh, weigh_blockwise, weigh_dense
from ringsim.lowering import Blocking
from ringsim.schedule import Recv, Send
from ringsim.units import parse

BLOCK = Blocking(q_rows=256, k_rows=256, edge_rows=128)
LAYER = ["--heads", "32", "--kv-heads", "8", "--head-dim", "128", "--dtype", "bf16"]


def bf16(seq, *, heads=32, head_dim=128, batch=1, **more):
    return ringsim.Workload(q_len=seq, batch=batch, heads=heads, head_dim=head_dim, dtype="bfloat16", **more)


def test_the_classic_figures_of_keys_and_values():
    """Sequence 1024, width 4096, float32: 33.55 MB of keys and values, 16.78 MB on each of two ranks."""
    work = ringsim.Workload(q_len=1024, heads=32, head_dim=128, dtype="float32")
    assert weigh_dense(work).classes["k, v"] == 33_554_432
    for rank in range(2):
        found = weigh(ringsim.Schedule(workload=work, world_size=2), rank)
        assert found.classes["k, v"] == 16_777_216
        assert found.classes["in flight"] == 16_777_216


@pytest.mark.parametrize(("b", "n", "d", "s", "ranks"), [(1, 32, 128, 8192, 8), (2, 16, 64, 6000, 5)])
def test_table_1_of_ring_attention_term_by_term(b, n, d, s, ranks):
    """arXiv 2310.01889v4, table 1: bytes a layer in bfloat16; h = n d, feed-forward of 4h, c tokens a rank."""
    h, work = n * d, bf16(s, heads=n, head_dim=d, batch=b)
    feed_forward = FeedForward(dim=4 * h)
    vanilla = weigh_dense(work, feed_forward=feed_forward).classes
    assert vanilla["scores"] == 2 * b * n * s * s
    assert vanilla["activations"] == 8 * b * s * h
    one_block = weigh_blockwise(work, feed_forward=FeedForward(dim=4 * h, block=1)).classes
    assert one_block["output"] == 2 * b * s * h
    assert one_block["activations"] == 2 * b * s * h + 8 * b * h
    ring = weigh(ringsim.Schedule(workload=work, world_size=ranks), 0)
    c = -(-s // ranks)
    block_nbytes = 2 * b * c * h
    # the paper's six blocks: q, the two at hand, the two arriving, the output
    assert ring.classes["q"] == ring.classes["output"] == block_nbytes
    assert ring.classes["k, v"] == 2 * block_nbytes
    # ours: two slots each, since the caller's own k and v are left as they are; float32 partials
    assert ring.classes["in flight"] == 2 * 2 * block_nbytes
    assert ring.classes["partial output"] == 2 * block_nbytes
    assert ring.classes["statistics"] == 3 * 4 * b * n * c
    assert sum(ring.classes.values()) == ring.nbytes == (6 + 2 + 2) * block_nbytes + 12 * b * n * c


def test_the_feed_forward_by_hand():
    """Its peak holds its input; rows are queries; a block is no longer than the rows; one wider than it needs no more place."""
    work = bf16(1000, heads=2, head_dim=64, kv_len=5000, batch=3)
    width, element = 2 * 64, 2
    all_rows = weigh_dense(work, feed_forward=FeedForward(dim=10 * width, block=7))
    assert all_rows.classes["activations"] == 3 * 1000 * 10 * width * element
    alone = weigh_blockwise(work, feed_forward=FeedForward(dim=100 * width))
    assert alone.nbytes == 3 * 1000 * 100 * width * element + alone.classes["output"] > alone.attention_nbytes
    for block, units in ((7, 7), (4000, 1000)):
        by_blocks = weigh_blockwise(work, feed_forward=FeedForward(dim=10 * width, block=block))
        assert by_blocks.classes["activations"] == 3 * (1000 * width + units * 10 * width) * element
    narrow = weigh_blockwise(work, feed_forward=FeedForward(dim=1))
    assert narrow.classes["activations"] == 3 * 1000 * width * element


def test_scratch_by_hand():
    """Nothing for no tiles; the divisor and its mask while the output is finished."""
    none = weigh(ringsim.Schedule(workload=bf16(0), world_size=1), 0, blocking=BLOCK)
    assert "scratch" not in none.classes
    work = ringsim.Workload(q_len=70000, kv_len=64, heads=64, head_dim=8, dtype="float32")
    own = sum(size * (4 if not kind else {"bool": 1, "int32": 4}[kind]) for size, kind in BLOCK.scratch(8).values())
    found = weigh(ringsim.Schedule(workload=work, world_size=1), 0, blocking=BLOCK)
    assert found.classes["scratch"] == own + 70000 * 64 * 5


def test_long_messages_are_weighed_whole():
    """Chunks of 2 GiB would be many; they are the same bytes."""
    long, short = (ringsim.Schedule(workload=bf16(seq, kv_heads=8), world_size=4) for seq in (2**32, 2**12))
    programs = [tuple(schedule.program(1, whole=True)) for schedule in (long, short)]
    assert len(programs[0]) == len(programs[1])
    assert weigh(long, 1).nbytes == 2**20 * weigh(short, 1).nbytes
    cut = replace(short, max_message_nbytes=1000)
    assert weigh(cut, 1).classes == weigh(short, 1).classes


def test_two_ranks_need_one_slot_each():
    ring = weigh(ringsim.Schedule(workload=bf16(4096), world_size=2), 1)
    assert ring.classes["in flight"] == ring.classes["k, v"]
    alone = weigh(ringsim.Schedule(workload=bf16(4096), world_size=1), 0)
    assert "in flight" not in alone.classes


@given(
    seq=st.integers(1, 300),
    ranks=st.integers(1, 7),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 6)]),
    causal=st.booleans(),
    partition=st.sampled_from(["contiguous", "zigzag", "striped"]),
    dtype=st.sampled_from(["float64", "float32", "bfloat16"]),
)
@settings(max_examples=120, deadline=None)
def test_every_buffer_is_classed_once(seq, ranks, heads, causal, partition, dtype):
    work = ringsim.Workload(
        q_len=seq, heads=heads[0], kv_heads=heads[1], head_dim=8, dtype=dtype, mask=ringsim.Causal() if causal else ringsim.Full()
    )
    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition)
    for rank in range(ranks):
        found = weigh(schedule, rank)
        assert sum(found.classes.values()) == sum(found.buffers.values()) == sum(schedule.buffers(rank).values())
        filled = {(op.region.buffer, op.region.slot) for op in schedule.program(rank) if isinstance(op, Recv)}
        assert found.classes.get("in flight", 0) == sum(schedule.buffers(rank)[key] for key in filled)
        sent = [op.region for op in schedule.program(rank) if isinstance(op, Send)]
        assert all(region.nbytes <= schedule.buffers(rank)[region.buffer, region.slot] for region in sent)


def test_causal_contiguous_ranks_differ():
    schedule = ringsim.Schedule(workload=replace(bf16(8192), mask=ringsim.Causal()), world_size=4)
    in_flight = [weigh(schedule, rank).classes.get("in flight", 0) for rank in range(4)]
    assert in_flight[0] == 0
    assert in_flight[1] < in_flight[2] == in_flight[3]


# what a run really allocates


def run_traced(work, ranks, partition):
    """Peak bytes of a whole run of all ranks in this process, arrays included, and the model's."""
    from ringsim.backends.loopback import World
    from ringsim.backends.numpy import NumpyBackend
    from ringsim.execution import drive_all

    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition)
    made = {"q": schedule.job.q_partition, "k": schedule.job.kv_partition, "v": schedule.job.kv_partition}
    predicted = sum(weigh(schedule, rank, blocking=BLOCK).nbytes for rank in range(ranks))
    # what is imported and cached on first use is no part of a run
    small = [inputs.rows(replace(work, q_len=8, kv_len=8), name, np.arange(8), 0) for name in "qkv"]
    ringsim.execute(ringsim.Schedule(workload=replace(work, q_len=8, kv_len=8), world_size=ranks, partition=partition), *small)
    gc.collect()
    tracemalloc.start()
    try:
        world = World(ranks)
        walkers, kept = [], []
        for rank in range(ranks):
            one = Rank(schedule, world.endpoint(rank), NumpyBackend(blocking=BLOCK))
            q, k, v = (inputs.rows(work, name, part.positions(rank), 0) for name, part in made.items())
            out = np.empty(one.shapes()["out"], q.dtype)
            walkers.append(one.walker(q, k, v, out))
            kept.append(one)
        tracemalloc.reset_peak()
        drive_all(walkers)
        lses = [one.finish(walker) for one, walker in zip(kept, walkers, strict=True)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(np.isfinite(lse).all() for lse in lses)
    return peak, predicted


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("causal", "partition"), [(True, "zigzag"), (False, "contiguous"), (True, "striped")])
def test_a_real_run_allocates_what_the_model_says(dtype, causal, partition):
    """Within 2 % of the peak of tracemalloc, which sees every array and every Python object."""
    mask = ringsim.Causal() if causal else ringsim.Full()
    work = ringsim.Workload(q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype=dtype, mask=mask)
    peak, predicted = run_traced(work, 3, partition)
    assert peak == pytest.approx(predicted, rel=0.02)


def test_a_model_without_a_class_would_be_seen_to_be_wrong():
    work = ringsim.Workload(q_len=6000, heads=8, kv_heads=4, head_dim=64, dtype="float32")
    peak, _ = run_traced(work, 3, "contiguous")
    each = [weigh(ringsim.Schedule(workload=work, world_size=3), rank, blocking=BLOCK) for rank in range(3)]
    for name in ("q", "k, v", "in flight", "output", "partial output", "scratch"):
        less = sum(found.nbytes - found.classes[name] for found in each)
        assert abs(less / peak - 1) > 0.02, name


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 1), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_plan_allocates_what_it_says(threads, dtype, heads, kv_heads):
    """Several threads, few heads. Which heads they are at when one goes on is chance: the model says the most."""
    work = ringsim.Workload(q_len=8192, heads=heads, kv_heads=kv_heads, head_dim=64, dtype=dtype, mask=ringsim.Causal())
    small = replace(work, q_len=8, kv_len=8)
    ringsim.RingAttention(small, threads=threads)(*(inputs.rows(small, name, np.arange(8), 0) for name in "qkv"))
    gc.collect()
    tracemalloc.start()
    try:
        plan = ringsim.RingAttention(work, threads=threads)
        out = plan(*(inputs.rows(work, name, np.arange(8192), 0) for name in "qkv"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(np.asarray(out, np.float32)).all()
    slack = 2 * 8192 * 64 * 4 * threads if threads > 1 and dtype == "bfloat16" and kv_heads > 1 else 0
    assert 0.98 * peak <= plan.footprint.nbytes <= 1.02 * peak + slack


def test_threads_that_are_at_heads_of_their_own():
    """Few rows of queries and long heads: three threads at three of them, and a fourth on its way."""
    work = ringsim.Workload(q_len=64, kv_len=8192, heads=8, kv_heads=8, head_dim=64, dtype="bfloat16")
    one, three = (
        weigh(ringsim.Schedule(workload=work, world_size=1), 0, blocking=BLOCK, threads=n).classes["scratch"] for n in (1, 3)
    )
    widened = 8192 * 64 * 2 * 4
    own = sum(size * (4 if not kind else {"bool": 1, "int32": 4}[kind]) for size, kind in BLOCK.scratch(64).values())
    assert three - one == 2 * own + 3 * widened


@pytest.mark.parametrize(
    ("seq", "ranks", "heads", "dtype", "causal", "partition"),
    [
        (20002, 4, 1, "bfloat16", False, "contiguous"),
        (6001, 3, 2, "float16", True, "zigzag"),
        (4001, 3, 8, "bfloat16", False, "striped"),
    ],
)
def test_uneven_shards_in_half_precision(seq, ranks, heads, dtype, causal, partition):
    mask = ringsim.Causal() if causal else ringsim.Full()
    work = ringsim.Workload(q_len=seq, heads=heads, head_dim=128, dtype=dtype, mask=mask)
    peak, predicted = run_traced(work, ranks, partition)
    assert peak == pytest.approx(predicted, rel=0.02)


# what fits


def ideal(memory, **settings):
    return ringsim.load_topology("ideal", {"devices.ideal.memory": memory} | settings)


def test_the_longest_context_fits_and_the_next_does_not():
    schedule = ringsim.Schedule(workload=bf16(8192, kv_heads=8), world_size=8)
    on = ideal("80 GB")
    most = longest_ring(schedule, on)
    assert most % 1024 == 0
    for tokens, fits in ((most, True), (most + 1024, False)):
        longer = replace(schedule, workload=capacity.of_length(schedule.workload, tokens))
        assert all(demand.fits for demand in demands(longer, on)) is fits


LENGTHS = st.sampled_from([1, 3, 5, 64, 4096])


@given(
    seq=LENGTHS,
    ranks=st.integers(1, 6),
    causal=st.booleans(),
    partition=st.sampled_from(["contiguous", "zigzag", "striped"]),
    memory=st.integers(1, 400),
    decode=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_longest_context_is_that_of_brute_force(seq, ranks, causal, partition, memory, decode):
    """Whatever the length that it is asked at, and for a few queries at the end of a cache too."""
    mask = ringsim.Causal() if causal else ringsim.Full()
    more = {"kv_len": seq + 64, "q_offset": 64} if decode else {}
    work = ringsim.Workload(q_len=seq, heads=2, kv_heads=1, head_dim=64, dtype="bfloat16", mask=mask, **more)
    schedule = ringsim.Schedule(workload=work, world_size=ranks, partition=partition)
    on = ideal(f"{memory} MB")

    def fits(tokens):
        longer = replace(schedule, workload=capacity.of_length(work, tokens))
        return all(demand.fits for demand in demands(longer, on))

    most = longest_ring(schedule, on)
    assert most == 0 or fits(most)
    assert not fits(most + 1024)


def test_a_query_over_a_cache_stays_at_its_end():
    work = ringsim.Workload(q_len=1024, kv_len=65536, q_offset=64512, mask=ringsim.Causal())
    longer = capacity.of_length(work, 2**20)
    assert (longer.q_len, longer.kv_len, longer.q_offset) == (1024, 2**20, 2**20 - 1024)
    assert capacity.of_length(replace(work, q_offset=0, kv_len=1024), 2048).q_len == 2048


@given(slope=st.integers(1, 10**6), offset=st.integers(0, 10**9), step=st.integers(0, 10**6), capacity_=st.integers(0, 10**12))
@settings(max_examples=200, deadline=None)
def test_longest_is_the_last_that_fits(slope, offset, step, capacity_):
    looked = []

    def nbytes(tokens):
        looked.append(tokens)
        return offset + slope * tokens + step * (tokens // 4096)

    most = longest(nbytes, capacity_)
    assert most % 1024 == 0
    assert most == 0 or nbytes(most) <= capacity_
    assert most == 2**40 or nbytes(most + 1024) > capacity_
    # to weigh a context far beyond what fits would take for ever
    assert max(looked) <= max(2**20, 1.1 * most + 2048)
    assert len(looked) < 60


def test_reserved_memory_and_the_feed_forward_leave_less():
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=8)
    on = ideal("80 GB")
    whole = longest_ring(schedule, on)
    assert longest_ring(schedule, on, reserve_nbytes=parse("40 GB", "size")) == pytest.approx(whole / 2, rel=0.01)
    assert longest_ring(schedule, on, reserve_nbytes=parse("80 GB", "size")) == 0
    with pytest.raises(TopologyError, match="90 GB are reserved of ideal-0, which has 80 GB"):
        longest_ring(schedule, on, reserve_nbytes=parse("90 GB", "size"))
    wide = longest_ring(schedule, on, feed_forward=FeedForward(dim=16 * 4096))
    by_blocks = longest_ring(schedule, on, feed_forward=FeedForward(dim=16 * 4096, block=1024))
    assert wide < by_blocks == whole


def test_ranks_that_share_a_device_share_its_memory():
    settings = {"devices.ideal.inside": "wire"}
    on = ringsim.load_topology("ideal", settings | {"devices.ideal.memory": "1 GB"}, place=[0, 0, 0, 1])
    found = demands(ringsim.Schedule(workload=bf16(8192), world_size=4), on)
    assert [len(demand.ranks) for demand in found] == [3, 1]
    assert found[0].nbytes == 3 * found[1].nbytes
    assert tightest(found) is found[0]


def test_heterogeneous_devices_are_each_asked():
    text = """
ringsim: 2
name: two-kinds
source: "defined: a test"
devices:
  big: {kind: gpu, memory: 80 GB, memory_bandwidth: 1 TB/s}
  small: {like: big, memory: 8 GB}
links: {wire: {bandwidth: 1 GB/s, latency: 1 us}}
transports: {direct: {progress: offload}}
machine: {join: switch, link: wire, of: [big, small]}
"""
    on = ringsim.topology.parse(text)
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=2)
    assert tightest(demands(schedule, on)).kind == "small"
    alike = ringsim.topology.parse(text.replace("8 GB}", "80 GB}"))
    assert longest_ring(schedule, alike) > 9 * longest_ring(schedule, on)
    silent = ringsim.topology.parse(text.replace("memory: 80 GB", "memory: 1 MB").replace("memory: 8 GB", "memory: null"))
    assert silent.spec.devices["small"].memory is None
    assert [demand.fits for demand in demands(schedule, silent)] == [False, None]
    assert tightest(demands(schedule, silent)).fits is False
    assert longest_ring(schedule, silent) == 0


def test_beyond_64_ranks_a_sample_stands_for_all():
    on = ideal("80 GB", gpus=96)
    for mask, partition in ((ringsim.Full(), "contiguous"), (ringsim.Causal(), "contiguous"), (ringsim.Causal(), "zigzag")):
        schedule = ringsim.Schedule(workload=replace(bf16(96 * 64 + 5), mask=mask), world_size=96, partition=partition)
        most = max(weigh(schedule, rank).nbytes for rank in range(96))
        (found,) = {demand.nbytes for demand in demands(schedule, on)}
        assert most <= found <= most * (1 + 2 / 64)


def test_a_device_without_memory_is_said_to_be_unknown():
    schedule = ringsim.Schedule(workload=bf16(8192), world_size=8)
    on = ringsim.load_topology("ideal")
    assert longest_ring(schedule, on) is None
    assert tightest(demands(schedule, on)).fits is None


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"dim": 8, "block": 0}])
def test_a_feed_forward_needs_units(wrong):
    with pytest.raises(WorkloadError, match="1 or more"):
        FeedForward(**wrong)


def test_a_window_needs_keys():
    with pytest.raises(RingsimError, match="window is 0"):
        weigh_blockwise(bf16(64), window=0)


def test_a_control_group_limits_what_a_host_has(tmp_path):
    whole = available_memory(())
    limit = tmp_path / "memory.max"
    for text, found in (("max\n", whole), ("1000000\n", 1000000), (f"{2**62}\n", whole)):
        limit.write_text(text)
        assert available_memory((str(limit), str(tmp_path / "none"))) == found


# the commands


def ringsim_command(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_memory_prints_every_class_and_the_longest_context(tmp_path):
    where = tmp_path / "memory.json"
    done = ringsim_command("memory", "dgx-h100", "--seq", "1M", *LAYER, "--window", "4K", "--ffn-dim", 16384, "--json", where)
    assert done.exit_code == 0, done.output
    for word in ("q", "k, v", "in flight", "output", "partial output", "statistics", "scores", "activations", "peak", "longest"):
        assert f"\n{word}" in done.output
    (facts,) = json.loads(where.read_text())["accounts"]
    methods = {found["method"]: found for found in facts["footprints"]}
    assert list(methods) == ["ring", "blockwise", "window", "dense"]
    assert methods["ring"]["classes"]["q"] * 8 == methods["blockwise"]["classes"]["q"] == 2**20 * 32 * 128 * 2
    assert methods["window"]["classes"]["k, v"] == 4096 * 8 * 128 * 2 * 2
    assert facts["longest_context_tokens"]["dense"] < facts["longest_context_tokens"]["blockwise"]
    assert facts["longest_context_tokens"]["blockwise"] < facts["longest_context_tokens"]["ring"]


def test_memory_compares_machines():
    done = ringsim_command("memory", "dgx-h100", "ideal", "--seq", "1M", *LAYER)
    assert done.exit_code == 0
    rows = {line.split()[0]: line for line in done.output.splitlines() if line}
    assert set(rows) >= {"machine", "dgx-h100", "ideal"}
    assert "unknown" in rows["ideal"]
    assert "no weights" in done.output


@pytest.mark.parametrize("ranks", [3, 96])
def test_the_table_is_of_the_rank_that_needs_the_most(ranks):
    on = ideal("80 GB", gpus=ranks)
    schedule = ringsim.Schedule(workload=replace(bf16(ranks * 64), mask=ringsim.Causal()), world_size=ranks)
    found = ledger.account(schedule, on)
    assert found.footprints[0].nbytes == found.demand.nbytes
    assert found.footprints[0].classes["in flight"] > 0
    assert found.footprints[0].rank > 1


def test_no_limit_is_no_number():
    work = ringsim.Workload(q_len=1, kv_len=4096, q_offset=4095, heads=8, head_dim=64, dtype="bfloat16")
    found = ledger.account(ringsim.Schedule(workload=work, world_size=2), ideal("1 GB", gpus=2), window=512)
    assert ledger.tokens(found.longest["window"]) == "no limit"
    assert ledger.tokens(found.longest["ring"]).endswith("K")
    assert (ledger.tokens(0), ledger.tokens(1024), ledger.tokens(None)) == ("none", "1K", "unknown")


def test_what_is_reserved_is_said(tmp_path):
    where = tmp_path / "facts.json"
    done = ringsim_command("memory", "dgx-h100", "--seq", "1M", *LAYER, "--reserve", "40GB", "--json", where)
    assert "85.52 GB, 40 GB reserved" in done.output
    facts = json.loads(where.read_text())["accounts"][0]["tightest"]
    assert (facts["memory_nbytes"], facts["reserve_nbytes"]) == (81559 * 2**20, 40e9)


def test_unknown_scratch_is_said():
    done = ringsim_command("memory", "laptop", "--seq", "8K", "--heads", 8, "--head-dim", 64, "--dtype", "bf16")
    assert "scratch is unknown: laptop has no attention figures for this dtype and head_dim" in done.output
    assert "4 ranks on it" in done.output
    known = ringsim_command("memory", "laptop", "--seq", "8K", "--heads", 8, "--head-dim", 64)
    assert "unknown" not in known.output


def test_simulate_says_when_a_workload_does_not_fit(tmp_path):
    where = tmp_path / "facts.json"
    arguments = ("simulate", "dgx-h100", "--seq", "64K", *LAYER, "--json", where)
    assert "memory: its rank needs" in ringsim_command(*arguments).output
    assert json.loads(where.read_text())["memory"]["fits"] is True
    done = ringsim_command(*arguments, "--set", "devices.h100.memory=200 MB")
    assert "DOES NOT FIT" in done.output
    assert "the longest context that fits: 34K" in done.output
    facts = json.loads(where.read_text())["memory"]
    assert facts["fits"] is False
    assert facts["longest_context_tokens"] == 34 * 1024
    unknown = ringsim_command("simulate", "ideal", "--seq", "64K", *LAYER)
    assert "the machine has no `memory` for ideal" in unknown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--reserve", "20"), "'20' has no unit"),
        (("--reserve", "20 GB/s"), "no unit of size"),
        (("--ffn-block", "1K"), "--ffn-block needs --ffn-dim"),
        (("--window", "0"), "window is 0"),
        (("--ranks", "9"), "has room for 8 ranks, not 9"),
        (("--reserve", "100 GB"), "100 GB are reserved of h100-0, which has 85.52 GB"),
        (("--batch", "0"), "there is nothing to weigh"),
        (("--seq", "0"), "there is nothing to weigh"),
    ],
)
def test_bad_input_is_one_message(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        main(["memory", "dgx-h100", "--seq", "64K", *LAYER, *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.err.startswith("ringsim: ")
    assert said in captured.err
    assert "Traceback" not in captured.err

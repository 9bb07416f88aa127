"""The smallest block whose hop hides: against the Ring Attention paper's table, and against arithmetic."""

import json
from dataclasses import replace
from itertools import pairwise
from math import ceil, sqrt

import pytest
from click.testing import CliRunner

import ringsim
from ringsim.breakeven import _turns, find_breakeven
from ringsim.cli.main import cli
from ringsim.errors import TopologyError, WorkloadError
from ringsim.schedule.schedule import Schedule

SHAPE = ["--heads", "32", "--head-dim", "128", "--dtype", "bf16"]
TABLE_2 = {
    # arXiv 2310.01889v4, table 2: peak FLOP/s, bytes/s one way, minimal sequence in thousands as printed
    "ideal-a100-nvlink": (312e12, 300e9, 6.2),
    "ideal-a100-infiniband": (312e12, 12.5e9, 149.5),
    "ideal-tpu-v3": (123e12, 112e9, 6.6),
    "ideal-tpu-v4": (275e12, 268e9, 6.2),
    "ideal-tpu-v5e": (196e12, 186e9, 6.3),
}


def schedule(world_size, *, heads=32, kv_heads=None, head_dim=128, mask=None, partition="contiguous", **more):
    work = ringsim.Workload(
        q_len=1, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16", mask=mask or ringsim.Full(), **more
    )
    return Schedule(workload=work, world_size=world_size, partition=partition)


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_of_ring_attention_by_simulation(name):
    """The smallest block is c = F/B within 2 %, and the minimal sequence 6c is the one printed (which is rounded)."""
    rate, bandwidth, printed = TABLE_2[name]
    found = find_breakeven(schedule(6), ringsim.load_topology(name))
    c = rate / bandwidth
    assert found.tokens == pytest.approx(c, rel=0.02)
    assert found.f_over_b == pytest.approx(c, rel=1e-12)
    assert 6 * found.tokens / 1000 == pytest.approx(printed, rel=0.02)
    assert found.exposed == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 8), (4, 1)])
def test_the_block_is_exact_without_overheads(world_size, heads, kv_heads):
    """Without latency: c = F/B kv_heads / heads, rounded up, whatever the number of ranks."""
    on = ringsim.load_topology("ideal", {"links.wire.bandwidth": "300 GB/s"})
    found = find_breakeven(schedule(world_size, heads=heads, kv_heads=kv_heads), on)
    assert found.tokens == -(-4000 * kv_heads // (3 * heads))
    assert found.f_over_b == pytest.approx(4000 / 3 * kv_heads / heads)
    assert (found.looked_from, found.looked_to) == (1, 2**22)


@pytest.mark.parametrize(("strategy", "bytes_per_pair"), [("ring", 12), ("burst", 8 + 8 / 128)])
def test_the_block_of_a_backward_pass_carries_its_gradients(strategy, bytes_per_pair):
    """10 c^2 n d / F = 12 c m d / B of K, V and the float32 sums of their gradients; of queries 8 c n d, and lse and delta."""
    on = ringsim.load_topology("ideal", {"links.wire.bandwidth": "300 GB/s"})
    found = find_breakeven(replace(schedule(8, pass_="backward"), strategy=strategy), on)
    c = bytes_per_pair / 10 * 4000 / 3
    assert found.f_over_b == pytest.approx(c)
    assert found.tokens == pytest.approx(c, abs=1.5), "kernels that only pass over memory hide a token's worth"
    # what remains is the last hop of sums, home
    home = 8 if strategy == "ring" else 4
    assert found.exposed == pytest.approx(home / (8 * bytes_per_pair + home), rel=0.002)


def test_latency_is_part_of_the_hop():
    """4 c^2 n d / F = latency + 4 c n d / B: the positive root of a quadratic."""
    latency, rate, bandwidth, width = 50e-6, 400e12, 400e9, 32 * 128
    on = ringsim.load_topology("ideal", {"links.wire.latency": "25 us"})  # of two wires, with a switch between
    half = rate / bandwidth / 2
    c = half + sqrt(half**2 + latency * rate / (4 * width))
    assert find_breakeven(schedule(8), on).tokens == ceil(c)


def test_a_causal_zigzag_block_is_twice_as_long():
    on = ringsim.load_topology("ideal")
    full = find_breakeven(schedule(4), on)
    causal = find_breakeven(schedule(4, mask=ringsim.Causal(), partition="zigzag"), on)
    assert causal.tokens == pytest.approx(2 * full.tokens, rel=0.01)
    assert causal.f_over_b == pytest.approx(2 * full.f_over_b, rel=0.01)


def test_a_turn_between_two_powers_of_two_is_seen():
    """From 2,442 tokens a message has 20 MB and a quarter of the rate: hidden before, then not until 4,000."""
    regimes = [{"from": "0 B", "latency": "0 s"}, {"from": "20 MB", "latency": "0 s", "bandwidth": "100 GB/s"}]
    on = ringsim.load_topology(
        "ideal", {"links.wire": {"bandwidth": "400 GB/s", "regimes": regimes, "source": "defined: a test"}}
    )
    assert find_breakeven(schedule(4), on).tokens == 4000


@pytest.mark.parametrize(("rates", "slowest"), [((100, 50), 50), ((100, 400), 100)])
def test_the_slowest_device_decides(rates, slowest):
    """The fast wait for the slow whatever hops cost; the run is as short as with free hops once a hop hides behind the slow."""
    text = """
ringsim: 2
name: two-kinds
source: "defined: a test"
devices:
  one: {kind: gpu, memory_bandwidth: 1000 TB/s, launch: 0 s, peak: {bfloat16: ONE TFLOP/s}, attention: [TABLE]}
  other: {like: one, peak: {bfloat16: OTHER TFLOP/s}}
links: {wire: {bandwidth: 100 GB/s, latency: 0 s}}
transports: {direct: {progress: offload}}
machine: {join: switch, link: wire, of: [one, other, one, other]}
"""
    points = "[[1, 1.0], [1.0e+24, 1.0]]"
    tile = "micro_tile: {q_rows: 1, k_rows: 1, edge_rows: 1, exact: true}"
    table = f"{{dtype: bfloat16, head_dim: 128, {tile}, full: {points}, masked: {points}}}"
    for word, value in (("ONE", rates[0]), ("OTHER", rates[1]), ("TABLE", table)):
        text = text.replace(word, str(value))
    found = find_breakeven(schedule(4), ringsim.topology.parse(text))
    assert found.f_over_b == pytest.approx(slowest * 10)
    assert found.tokens == pytest.approx(found.f_over_b, rel=0.02)


@pytest.mark.parametrize("speed", [0.9, 0.8, 0.5])
def test_a_straggler_with_kernels_slowed_by_hops(speed):
    """Ranks with less work wait for the slow one; it hides its hops sooner, though they cost it a share of the device."""
    even = find_breakeven(schedule(8), ringsim.load_topology("dgx-h100"))
    slow = {"devices.slow": {"like": "h100", "speed": speed}, "replace": {"h100-3": "slow"}}
    found = find_breakeven(schedule(8), ringsim.load_topology("dgx-h100", slow))
    assert found.tokens < even.tokens
    assert found.exposed > 0.01


def test_an_eager_threshold_is_a_turn():
    """Up to 20 MB a message leaves at once; beyond, the receiver's host must look: seen although no power of two shows it."""
    settings = {"transports.direct": {"progress": "offload", "eager": "20 MB", "source": "defined: a test"}}
    on = ringsim.load_topology("ideal", settings)
    starts = set(_turns(made(4, 1024), on, 1024))
    assert {2442} <= starts
    assert 2442 not in set(_turns(made(4, 1024), ringsim.load_topology("ideal"), 1024))


def test_the_points_of_a_table_are_turns():
    on = ringsim.load_topology("dgx-h100")
    assert {512, 1024, 2048, 4096, 16384} <= set(_turns(made(8, 1024), on, 1024))
    few = made(8, 1024, heads=3)
    assert -(-132 * 128 // 3) in set(_turns(few, on, 1024))


def made(world_size, tokens, **more):
    """A schedule of this block."""
    start = schedule(world_size, **more)
    return replace(start, workload=replace(start.workload, q_len=tokens * world_size, kv_len=tokens * world_size))


def test_of_unlike_steps_the_one_with_the_least_arithmetic_counts():
    """Contiguous and causal: rank 0 hides its only hop behind half a tile."""
    on = ringsim.load_topology("ideal")
    found = find_breakeven(schedule(4, mask=ringsim.Causal()), on)
    assert found.f_over_b == pytest.approx(2000, rel=0.01)


def test_hops_that_share_are_counted_as_they_share():
    found = find_breakeven(schedule(4), ringsim.load_topology("rtx4090-pcie"))
    assert found.hop_bytes_per_s == pytest.approx(14.09e9, rel=1e-3)
    assert found.tokens == pytest.approx(found.f_over_b, rel=0.05)


@pytest.mark.parametrize(("wrong", "said"), [({"multiple": 0}, "multiple is 0"), ({"multiple": -64}, "multiple is -64")])
def test_a_multiple_is_a_count(wrong, said):
    with pytest.raises(WorkloadError, match=said):
        find_breakeven(schedule(2), ringsim.load_topology("ideal"), **wrong)


def test_a_block_needs_a_sequence():
    with pytest.raises(WorkloadError, match="batch is 0"):
        find_breakeven(schedule(2, batch=0), ringsim.load_topology("ideal"))


def test_multiples():
    on = ringsim.load_topology("ideal", {"links.wire.bandwidth": "300 GB/s"})
    assert find_breakeven(schedule(4), on, multiple=64).tokens == 1344
    assert find_breakeven(schedule(4), on, multiple=1000).tokens == 2000


def test_no_smaller_block_than_the_figures_price():
    found = find_breakeven(schedule(8, kv_heads=8), ringsim.load_topology("dgx-h100"))
    assert found.tokens == found.looked_from == 64
    causal = find_breakeven(schedule(8, kv_heads=8, mask=ringsim.Causal(), partition="zigzag"), ringsim.load_topology("dgx-h100"))
    assert causal.looked_from == 128


def test_a_node_boundary_decides():
    alone = find_breakeven(schedule(8), ringsim.load_topology("dgx-h100"))
    across = find_breakeven(schedule(16), ringsim.load_topology("dgx-h100-cluster", {"nodes": 2}))
    assert across.hop_bytes_per_s == 36.1e9
    assert across.tokens > 10 * alone.tokens


def test_just_below_the_block_ranks_wait():
    on = ringsim.load_topology("dgx-h100")
    found = find_breakeven(schedule(8), on)
    for tokens, hides in ((found.tokens, True), (found.tokens - 1, False), (2 * found.tokens, True)):
        work = ringsim.Workload(q_len=8 * tokens, heads=32, head_dim=128, dtype="bfloat16")
        timeline = ringsim.simulate(Schedule(workload=work, world_size=8), on)
        assert (timeline.exposed_s() <= 1e-9 * timeline.total_s) is hides


def test_kernels_slowed_by_hops_are_said():
    """Where hops take a share of the device, nobody waits and yet they cost something."""
    fast = find_breakeven(schedule(8), ringsim.load_topology("dgx-h100"))
    free = find_breakeven(schedule(8), ringsim.load_topology("dgx-h100", {"transports.nccl.paths.nvlink4.device_share": 0.0}))
    assert 0.05 < fast.exposed < 0.15
    assert free.exposed == pytest.approx(0.0, abs=1e-12)
    assert free.tokens > fast.tokens


def test_a_core_that_copies_never_hides():
    settings = {"transports.direct.progress": "polling", "devices.ideal": cpu(), "links.wire.latency": "1 us"}
    found = find_breakeven(schedule(2), ringsim.load_topology("ideal", settings))
    assert found.tokens is None
    assert found.looked_to == 2**22


def cpu():
    table = {"dtype": "bfloat16", "head_dim": 128, "rate": "100 GFLOP/s", "overhead": "0 s"}
    table |= {"micro_tile": {"q_rows": 1, "k_rows": 1, "edge_rows": 1, "exact": True}}
    table |= {"full": [[1, 1.0], [1.0e24, 1.0]], "masked": [[1, 1.0], [1.0e24, 1.0]]}
    return {"kind": "cpu", "cores": 1, "memory_bandwidth": "100 GB/s", "attention": [table], "source": "defined: a test"}


def test_one_rank_has_no_hop():
    with pytest.raises(TopologyError, match="one rank has no hop"):
        find_breakeven(schedule(1), ringsim.load_topology("ideal"))


def test_missing_figures_are_named():
    with pytest.raises(TopologyError, match="no attention figures for bfloat16 head_dim 256"):
        find_breakeven(schedule(2, head_dim=256), ringsim.load_topology("ideal"))


def ringsim_command(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_prints_a_line_a_machine(tmp_path):
    where = tmp_path / "facts.json"
    done = ringsim_command("breakeven", "ideal", "dgx-h100", *SHAPE, "--kv-heads", 8, "--json", where)
    assert done.exit_code == 0, done.output
    assert "250" in next(line for line in done.output.splitlines() if line.startswith("ideal"))
    assert "<= 64" in next(line for line in done.output.splitlines() if line.startswith("dgx-h100"))
    facts = json.loads(where.read_text())["breakeven"]
    assert [(one["machine"], one["tokens"]) for one in facts] == [("ideal", 250), ("dgx-h100", 64)]


def test_what_if_of_a_break_even():
    done = ringsim_command("breakeven", "ideal", *SHAPE, "--set", "links.wire.bandwidth=200GB/s", "--set", "gpus=2")
    assert "2,000" in done.output
    assert "4,000" in done.output


def test_help_keeps_its_lines():
    lines = [line.strip() for line in ringsim_command("--help").output.splitlines()]
    assert any(line.startswith("ringsim simulate dgx-h100") for line in lines)
    assert any(line.startswith("ringsim breakeven") for line in lines)
    assert "\\b" not in " ".join(lines)


@pytest.mark.parametrize(
    ("name", "settings", "least", "most"),
    [
        ("dgx-h100", {}, 0.0, 0.15),
        ("dgx-h100", {"transports.nccl.paths.nvlink4.bandwidth": "50 GB/s"}, 0.6, 1.0),
        ("a100-pcie-pair", {}, 0.5, 1.0),
        ("l20-pcie", {}, 0.5, 1.0),
        ("rtx4090-pcie", {}, 0.5, 1.0),
    ],
)
def test_without_nvlink_communication_dominates(name, settings, least, most):
    """4,096 tokens of 32 heads on each device, causal, zigzag: exposed communication, of the run."""
    on = ringsim.load_topology(name, settings)
    ranks = len(on.slots)
    work = ringsim.Workload(q_len=4096 * ranks, heads=32, head_dim=128, dtype="bfloat16", mask=ringsim.Causal())
    made = Schedule(workload=work, world_size=ranks, partition="zigzag")
    assert least <= ringsim.exposed_communication_s(made, on) / ringsim.simulate(made, on).total_s < most


def seconds_of(machine, queries):
    """The attend of one head's queries over enough keys that a tile's efficiency is its plateau's, launch left out."""
    work = ringsim.Workload(q_len=queries, kv_len=2**28, heads=1, head_dim=128, dtype="bfloat16")
    timeline = ringsim.simulate(Schedule(workload=work, world_size=1), machine)
    return sum(event.end_s - event.start_s for event in timeline.events if event.kind == "attend")


def test_few_heads_leave_units_idle():
    """23 blocks of 128 queries keep at most 23 of 132 SMs busy; 32 heads of them all."""
    on = ringsim.load_topology("dgx-h100", {"devices.h100.launch": "0 s"})
    more = ringsim.load_topology("dgx-h100", {"devices.h100.launch": "0 s", "devices.h100.units": None})

    def attends(machine, heads):
        work = ringsim.Workload(q_len=23 * 128, heads=heads, head_dim=128, dtype="bfloat16")
        timeline = ringsim.simulate(Schedule(workload=work, world_size=1), machine)
        return sum(event.end_s - event.start_s for event in timeline.events if event.kind == "attend")

    assert attends(on, 32) == attends(more, 32)
    assert attends(on, 1) / attends(more, 1) == pytest.approx(132 / 23)
    assert attends(on, 4) / attends(more, 4) == pytest.approx(132 / 92)
    assert seconds_of(on, 1) == seconds_of(on, 128) < seconds_of(more, 128) * 133
    queries = (1, 64, 128, 129, 256, 257, 512, 513, 132 * 128, 132 * 128 + 1, 2 * 132 * 128)
    times = [seconds_of(on, count) for count in queries]
    assert all(later >= sooner * (1 - 1e-12) for sooner, later in pairwise(times))
    assert times[0] == pytest.approx(times[8], rel=1e-12)
    assert times[10] == pytest.approx(2 * times[8], rel=1e-12)
    flops = 4 * (23 * 128) ** 2 * 128
    assert flops / attends(on, 1) <= 989e12 * 23 / 132


def test_a_cpu_has_cores_and_no_units():
    with pytest.raises(TopologyError, match="kind 'cpu' takes no `units`"):
        ringsim.load_topology("laptop", {"devices.laptop.units": 4})

"""The family in the simulator: closed forms of what each strategy gains, and what must hold whatever the numbers."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim import topology
from ringsim.costs import Costs
from ringsim.mask import Causal, mask_named
from ringsim.schedule import Compute, Schedule
from ringsim.schedule.registry import STRATEGIES
from ringsim.simulation import exposed_communication_s, simulate
from ringsim.timeline import POSTS
from ringsim.workload import Workload

from .test_family import FAMILY, schedules
from .test_folding import agree

MACHINE = """
ringsim: 2
name: paper
source: "defined: round numbers"
devices:
  paper:
    kind: gpu
    memory_bandwidth: 1000000 TB/s
    attention: [{tables}]
links:
  wire: {{latency: {latency}, bandwidth: 1 GB/s}}
  slow: {{latency: 0 s, bandwidth: 100 MB/s}}
transports:
  paper: {{progress: {progress}}}
groups:
  node: {{join: switch, link: wire, count: 4, of: paper, nics: {{count: 4, link: wire}}}}
machine: {machine}
"""
TABLE = """{{dtype: {dtype}, head_dim: {head_dim}, rate: {rate}, overhead: 0 s,
  micro_tile: {{q_rows: 1, k_rows: 1, edge_rows: 1, exact: true}},
  full: [[1, 1.0], [1.0e+24, 1.0]], masked: [[1, 1.0], [1.0e+24, 1.0]]}}"""
COMPUTE_BOUND, COMMUNICATION_BOUND = "1 MFLOP/s", "1000000 TFLOP/s"
GB_S, SLOW_B_S = 1e9, 1e8
MIXED = (
    ("ring", 8),
    ("bidirectional", 8),
    ("q-ring", 8),
    ("pass-q", 8),
    ("token-ring", 8),
    ("multi-ring(1)", 8),
    ("multi-ring(6)", 8),
    ("double-ring(4)", 8),
    ("double-ring(2, 4)", 8),
    ("dense", 1),
    ("local-window(300)", 1),
)


@cache
def machine(join="mesh", count=8, rate="1 TFLOP/s", latency="0 s", progress="offload", dtypes=("float32",), head_dims=(64,)):
    """Devices all of which are joined alike, or nodes of four."""
    tables = [TABLE.format(dtype=dtype, head_dim=head_dim, rate=rate) for dtype in dtypes for head_dim in head_dims]
    nodes = f"{{join: switch, link: slow, count: {count // 4}, of: node}}"
    machine = nodes if join == "nodes" else f"{{join: {join}, link: wire, count: {count}, of: paper}}"
    return topology.parse(MACHINE.format(tables=", ".join(tables), latency=latency, progress=progress, machine=machine))


def made(strategy, world_size, tokens=64, **options):
    partition = options.pop("partition", "contiguous")
    work = Workload(**({"q_len": tokens * world_size, "heads": 6, "kv_heads": 6} | options))
    return Schedule(workload=work, world_size=world_size, partition=partition, strategy=strategy)


def close(value, rel=1e-6):
    return pytest.approx(value, rel=rel)


def kv_nbytes(schedule):
    work = schedule.workload
    return work.batch * work.kv_len // schedule.world_size * work.kv_heads * (work.head_dim + work.v_head_dim) * 4


def compute_bound(schedule, on):
    """The seconds of the rank with most to compute."""
    costs = Costs(on.device(on.devices[0]), schedule.workload)
    ranks = range(schedule.world_size)
    return max(sum(costs.cost(op).seconds for op in schedule.program(rank) if isinstance(op, Compute)) for rank in ranks)


def test_every_strategy_is_simulated_here():
    assert {name.partition("(")[0] for name, _ in MIXED} >= FAMILY


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize(("strategy", "world_size"), MIXED)
@pytest.mark.parametrize("on", ["mesh", "ring", "nodes", "dgx-h100"])
def test_no_run_is_shorter_than_its_computation(on, strategy, world_size, mask):
    shape = {"tokens": 2048, "dtype": "bfloat16", "head_dim": 128, "heads": 16, "kv_heads": 8, "mask": mask_named(mask)}
    if on == "dgx-h100":
        place = topology.load("dgx-h100")
    else:
        place, shape = machine(on), {"tokens": 64, "mask": mask_named(mask)}
    for partition in ("contiguous", "zigzag"):
        schedule = made(strategy, world_size, partition=partition, **shape)
        timeline = simulate(schedule, place)
        assert timeline.total_s >= compute_bound(schedule, place) * (1 - 1e-12)
        assert exposed_communication_s(schedule, place) >= -1e-12 * timeline.total_s
        assert {event.rank for event in timeline.events} == set(range(world_size))


@pytest.mark.parametrize(("strategy", "world_size"), MIXED)
@pytest.mark.parametrize("rate", [COMPUTE_BOUND, "1 TFLOP/s", COMMUNICATION_BOUND])
def test_ranks_that_are_alike_have_timelines_that_are(strategy, world_size, rate):
    timeline = simulate(made(strategy, world_size), machine(rate=rate, latency="3 us"))
    ranks = [[e for e in timeline.of_rank(rank) if e.kind not in POSTS] for rank in range(world_size)]
    for events in ranks:
        assert [(e.kind, e.step, e.phase) for e in events] == [(e.kind, e.step, e.phase) for e in ranks[0]]
        assert [(e.start_s, e.end_s) for e in events] == [close((e.start_s, e.end_s), 1e-9) for e in ranks[0]]


@pytest.mark.parametrize(("strategy", "world_size"), MIXED)
@pytest.mark.parametrize("join", ["mesh", "nodes"])
def test_one_of_each_kind_of_rank_stands_for_all(strategy, world_size, join):
    assert agree(made(strategy, world_size, tokens=16), machine(join, rate="1 GFLOP/s")) <= world_size


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("tokens", [2, 32, 1000])
def test_zigzag_gains_what_the_last_rank_has_too_much(world_size, tokens):
    on = machine(count=8, rate=COMPUTE_BOUND)
    contiguous, zigzag = (
        simulate(made("ring", world_size, tokens, mask=Causal(), partition=kind, heads=1, kv_heads=1), on, free_hops=True).total_s
        for kind in ("contiguous", "zigzag")
    )
    # the last rank has (P-1) c^2 + c (c+1)/2 pairs of c tokens each, every rank of zigzag N (N+1)/2 / P with N = P c (c even)
    exact = ((2 * world_size - 1) * tokens + 1) / (world_size * tokens + 1)
    assert contiguous / zigzag == close(exact, 1e-9)
    # which is 2 - 1/P less (1 - 1/P) / (N + 1)
    assert 2 - 1 / world_size - exact == pytest.approx((1 - 1 / world_size) / (world_size * tokens + 1), rel=1e-9)


@pytest.mark.parametrize("world_size", [3, 4, 8])
def test_both_directions_of_a_ring_halve_its_hops(world_size):
    on = machine("ring", world_size, COMMUNICATION_BOUND)
    one, two = (simulate(made(strategy, world_size), on).total_s for strategy in ("ring", "bidirectional"))
    assert one == close((world_size - 1) * kv_nbytes(made("ring", world_size)) / GB_S)
    assert one / two == close(2)


@pytest.mark.parametrize(("world_size", "rings"), [(3, 2), (4, 2), (5, 2), (5, 3), (7, 6), (8, 3), (8, 6)])
def test_several_rings_divide_the_hops_of_one_on_a_mesh(world_size, rings):
    on = machine("mesh", world_size, COMMUNICATION_BOUND)
    one, many = (simulate(made(strategy, world_size), on).total_s for strategy in ("ring", f"multi-ring({rings})"))
    assert one / many == close(rings)


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_double_ring_crosses_the_slow_link_once_a_lap(nodes):
    world_size = 4 * nodes
    on = machine("nodes", world_size, COMMUNICATION_BOUND)
    flat, double = (simulate(made(strategy, world_size), on).total_s for strategy in ("ring", "double-ring(4)"))
    block = kv_nbytes(made("ring", world_size))
    # every step of the flat ring waits for the one hop that leaves a node
    assert flat == close((world_size - 1) * block / SLOW_B_S)
    # all four ranks of a node cross at once, each on its own NIC; only the last node's turns come after the last crossing
    crossing = (nodes - 1) * block / SLOW_B_S
    assert crossing < double <= (crossing + 3 * block / GB_S) * (1 + 1e-6)
    # consecutive inner rings are those within nodes; the other axis of the mesh crosses at every turn
    other = simulate(made(f"double-ring({nodes}, 4)", world_size), on).total_s
    assert double < other


def test_queries_travel_where_keys_and_values_are_much_more():
    world_size = 4
    on = machine("mesh", world_size, COMMUNICATION_BOUND)
    shape = {"q_len": 8 * world_size, "kv_len": 512 * world_size}
    times = {s: simulate(made(s, world_size, **shape), on).total_s for s in ("ring", "q-ring", "pass-q", "token-ring")}
    queries, state = 8 * 6 * 64 * 4, 8 * 6 * 66 * 4
    assert times["ring"] == close(3 * kv_nbytes(made("ring", world_size, **shape)) / GB_S)
    # of all its messages none could wait for longer than for all others of a rank
    for strategy in ("q-ring", "pass-q", "token-ring"):
        assert 3 * queries / GB_S < times[strategy] <= (3 * queries + 4 * state) / GB_S * (1 + 1e-6)
        assert times[strategy] < times["ring"] / 10
    # where there are as many of each, q and a state in float32 are more than k and v, and the state has one hop more
    assert simulate(made("ring", world_size), on).total_s < simulate(made("q-ring", world_size), on).total_s


def test_token_ring_hides_the_partials_behind_the_queries_on_the_other_direction():
    on = machine("ring", 3, COMMUNICATION_BOUND)
    late, at_once = (simulate(made(strategy, 3), on).total_s for strategy in ("pass-q", "token-ring"))
    assert at_once < late


ANY = {"dtypes": ("float64", "float32", "float16", "bfloat16"), "head_dims": (1, 8)}


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_what_holds_of_any_schedule(name):
    @settings(max_examples=25, deadline=None)
    @given(
        schedules(name),
        st.sampled_from(("mesh", "ring", "nodes")),
        st.sampled_from((COMPUTE_BOUND, "1 GFLOP/s", COMMUNICATION_BOUND)),
        st.sampled_from(("offload", "handshake", "thread", "polling")),
    )
    def check(schedule, join, rate, progress):
        on = machine(join, rate=rate, latency="1 us", progress=progress, **ANY)
        timeline = simulate(schedule, on, fold=False)
        assert timeline == simulate(schedule, on, fold=False), "deterministic to the bit"
        assert timeline.total_s >= compute_bound(schedule, on) * (1 - 1e-9)
        assert simulate(schedule, on, free_hops=True).total_s <= timeline.total_s * (1 + 1e-9)
        walked = {(rank, op.id) for rank in range(schedule.world_size) for op in schedule.program(rank)}
        assert {(event.rank, event.op) for event in timeline.events} == walked
        agree(schedule, on)

    check()

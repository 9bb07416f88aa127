"""The hops of gradients have a step to hide behind: a fact of the schedule, and what it leaves exposed in the simulator."""

import pytest

from ringsim import topology
from ringsim.mask import mask_named
from ringsim.schedule import Compute, Recv, Schedule, Send, Wait
from ringsim.simulation import exposed_communication_s, simulate
from ringsim.workload import Workload

from .tampering import kernel

TOKENS, HEADS, WIDTH = 2048, 8, 128
WIRE_B_S, SLOW_B_S = 400e9, 200e9
ATTEND = kernel("attend_backward")
STRATEGIES = ("ring", "burst", "pass-q", "token-ring", "bidirectional", "q-ring", "multi-ring(2)", "halo")
MOVE_QUERIES = ("burst", "pass-q", "token-ring", "q-ring")
LANES = {"bidirectional": 2, "q-ring": 2, "multi-ring(2)": 2}
LEAST = {"multi-ring(2)": 3}
"""Ranks without which there are not as many rings."""
KINDS = (("full", "contiguous"), ("causal", "zigzag"))
# memory so fast that only hops and attention take time; the links of one node are those of the `ideal` machine
NODES = """
ringsim: 2
name: nodes
source: "defined: round numbers, no machine"
devices:
  ideal:
    kind: gpu
    memory_bandwidth: 1000000 TB/s
    attention:
      - dtype: bfloat16
        head_dim: 128
        rate: {rate}
        overhead: 0 s
        micro_tile: {{q_rows: 1, k_rows: 1, edge_rows: 1, exact: true}}
        full: [[1, 1.0], [1.0e+24, 1.0]]
        masked: [[1, 1.0], [1.0e+24, 1.0]]
        backward: {{full: [[1, 1.0], [1.0e+24, 1.0]], masked: [[1, 1.0], [1.0e+24, 1.0]]}}
links:
  wire: {{bandwidth: 400 GB/s, latency: 0 s}}
  slow: {{bandwidth: 200 GB/s, latency: 0 s}}
transports:
  direct: {{progress: offload}}
groups:
  node: {{join: switch, link: wire, count: {inner}, of: ideal, nics: {{count: {inner}, link: wire}}}}
machine: {{join: switch, link: slow, count: {outer}, of: node}}
"""


def made(strategy, world_size, *, mask="full", partition="contiguous", **options):
    shape = {"heads": HEADS, "kv_heads": HEADS, "head_dim": WIDTH, "dtype": "bfloat16", "mask": mask_named(mask)}
    work = Workload(**({"q_len": TOKENS * world_size, "pass_": "backward"} | shape | options))
    return Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition)


def is_sum(op):
    return isinstance(op, Send | Recv) and "_sum[" in op.region.value


def hidden_behind(ops, index):
    """How many attend_backward stand between a post and the first wait for it."""
    later = ops[index + 1 :]
    end = next(at for at, op in enumerate(later) if isinstance(op, Wait) and ops[index].id in op.posts)
    return sum(map(ATTEND, later[:end]))


def left_after(ops, index):
    return sum(map(ATTEND, ops[index + 1 :]))


@pytest.mark.parametrize(("mask", "partition"), KINDS)
@pytest.mark.parametrize(("strategy", "world_size"), [(s, w) for s in STRATEGIES for w in (2, 3, 7, 8) if w >= LEAST.get(s, 2)])
def test_a_hop_of_sums_has_a_whole_step_to_hide_behind(strategy, world_size, mask, partition):
    schedule, hops = made(strategy, world_size, mask=mask, partition=partition), 0
    lanes = LANES.get(strategy, 1)
    # of the half of a block that goes one way a rank may see nothing
    a_step = 1 if (strategy, mask) == ("bidirectional", "causal") else lanes
    for rank in range(world_size):
        ops = list(schedule.program(rank))
        for index, op in enumerate(ops):
            if is_sum(op) and op.step + 1 < world_size:
                assert hidden_behind(ops, index) >= a_step, op
                hops += 1
            elif is_sum(op):
                assert (op.phase, left_after(ops, index) < lanes) == ("home", True), "only the way home comes after the last"
    assert (hops > 0) == (world_size > 2)


@pytest.mark.parametrize(("mask", "partition"), KINDS)
@pytest.mark.parametrize("strategy", ["ring", "burst", "bidirectional", "q-ring"])
def test_a_sum_is_expected_one_step_before_it_is_added_to(strategy, mask, partition):
    schedule = made(strategy, 5, mask=mask, partition=partition)
    for rank in range(5):
        ops = list(schedule.program(rank))
        came = {(op.region.value, op.region.version): op.step for op in ops if isinstance(op, Recv) and op.phase == "sums"}
        added = {}
        for op in ops:
            for region in op.reads if isinstance(op, Compute) and op.kernel == "accumulate" else ():
                added.setdefault((region.value, region.version), op.step)
        assert came
        assert all(added[key] == step + 1 for key, step in came.items())


@pytest.mark.parametrize(("mask", "partition"), KINDS)
@pytest.mark.parametrize(("inner", "stride", "outer"), [(2, 1, 2), (4, 1, 2), (2, 1, 4), (2, 4, 4), (3, 1, 3), (1, 1, 3)])
def test_a_hop_across_nodes_has_a_whole_lap(inner, stride, outer, mask, partition):
    schedule = made(f"double-ring({inner}, {stride})", inner * outer, mask=mask, partition=partition)
    crossed = 0
    for rank in range(inner * outer):
        ops = list(schedule.program(rank))
        for index, op in enumerate(ops):
            if is_sum(op) and op.phase == "cross":
                # it sets out when the first block of a lap has been attended; the last lap has no other after it
                assert hidden_behind(ops, index) >= min(inner, left_after(ops, index))
                assert left_after(ops, index) >= inner - 1
                crossed += 1
            elif is_sum(op) and left_after(ops, index):
                assert hidden_behind(ops, index) >= 1, op
    assert (crossed > 0) == (outer > 2)


def home_s(schedule, bandwidth=WIRE_B_S):
    """The sums of one rank's block, once over a link."""
    work = schedule.workload
    names = (work.head_dim,) if schedule.strategy in MOVE_QUERIES else (work.head_dim, work.v_head_dim)
    return TOKENS * work.heads * sum(names) * 4 / bandwidth


def fast_memory():
    return topology.load("ideal", {"devices.ideal.memory_bandwidth": "1000000 TB/s"})


@pytest.mark.parametrize(("strategy", "world_size"), [(s, w) for s in STRATEGIES for w in (2, 3, 4, 8) if w >= LEAST.get(s, 2)])
def test_where_a_tile_takes_longer_than_its_hops_only_the_last_way_home_is_exposed(strategy, world_size):
    schedule, on = made(strategy, world_size), fast_memory()
    attend = next(op for op in schedule.program(0) if ATTEND(op))
    hop = max(sum(op.region.nbytes for op in schedule.program(0) if isinstance(op, Send) and op.step == s) for s in (0, 1))
    assert hop / WIRE_B_S < attend.flops / 400e12 * LANES.get(strategy, 1)
    # of two lanes the first goes home while the second is computed on
    expected = home_s(schedule) / LANES.get(strategy, 1)
    assert exposed_communication_s(schedule, on) == pytest.approx(expected, rel=1e-5)
    assert simulate(schedule, on).late_s() == 0


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_where_hops_take_longer_than_tiles_they_are_not_hidden(world_size):
    schedule = made("ring", world_size, heads=1, kv_heads=1)
    on = topology.parse(NODES.format(rate="1000000000 TFLOP/s", inner=world_size, outer=1))
    # each block's K and V in two bytes a number, P - 1 hops; the sums, of four, begin a hop later
    hop = home_s(schedule) / 2
    exposed = exposed_communication_s(schedule, on)
    assert (world_size - 1) * hop < exposed <= (world_size - 1) * 3 * hop * (1 + 1e-6)


@pytest.mark.parametrize(("inner", "outer"), [(4, 1), (4, 2), (2, 2), (2, 4), (1, 2), (1, 4)])
def test_of_a_double_ring_the_last_return_within_a_node_and_the_way_home_are_exposed(inner, outer):
    schedule = made(f"double-ring({inner})", inner * outer)
    on = topology.parse(NODES.format(rate="400 TFLOP/s", inner=inner, outer=outer))
    within = home_s(schedule) if inner > 1 else 0.0
    # with inner rings of one rank the last hop across has no turn left behind which to hide
    across = home_s(schedule, SLOW_B_S) * ((outer > 1) + (inner == 1 and outer > 2))
    assert exposed_communication_s(schedule, on) == pytest.approx(within + across, rel=1e-5)

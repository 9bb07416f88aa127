"""The simulator against pen and paper, to 1e-12 relative, and what must hold whatever the numbers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim import topology
from ringsim.costs import Costs
from ringsim.errors import TopologyError
from ringsim.mask import Causal, mask_named
from ringsim.schedule import Compute, Schedule
from ringsim.simulation import exposed_communication_s, simulate
from ringsim.timeline import POSTS
from ringsim.workload import Workload

MACHINE = """
ringsim: 2
name: paper
source: "defined: round numbers"
devices:
  paper:
    kind: {kind}
    {cores}
    inside: wire
    memory_bandwidth: 1 GB/s
    attention:
      - dtype: float32
        head_dim: 64
        rate: {rate}
        overhead: 3 us
        micro_tile: {{q_rows: {rows}, k_rows: {rows}, edge_rows: {rows}, exact: {exact}}}
        full: [[1, 1.0], [1000000, 1.0]]
        masked: [[1, 1.0], [1000000, 1.0]]
links:
  wire: {{latency: {latency}, bandwidth: {bandwidth}}}
transports:
  paper: {{progress: {progress}{look}}}
machine: {machine}
"""


def machine(
    *, cores=None, rate="1 TFLOP/s", latency="5 us", bandwidth="1 GB/s", progress="offload", rows=1, exact=True, look=None
):
    """One host of cores, or eight devices with a link per pair."""
    text = MACHINE.format(
        kind="cpu" if cores else "gpu",
        cores=f"cores: {cores}" if cores else "",
        rate=rate,
        latency=latency,
        bandwidth=bandwidth,
        progress=progress,
        rows=rows,
        exact=str(exact).lower(),
        look=f", look: {look}" if look else "",
        machine="paper" if cores else "{join: mesh, link: wire, count: 8, of: paper}",
    )
    return topology.parse(text)


def device(on):
    return on.device(on.devices[0])


def ring(world_size=4, seq=256, **options):
    partition, sync = options.pop("partition", "contiguous"), options.pop("sync", "free")
    return Schedule(workload=Workload(q_len=seq, heads=2, **options), world_size=world_size, partition=partition, sync=sync)


class Paper:
    """Compute, hop, reset and finish times of a symmetric full ring, by hand."""

    def __init__(self, schedule, *, rate=1e12, latency=5e-6, bandwidth=1e9, messages=1):
        rows = schedule.workload.q_len // schedule.world_size
        state = (2 * rows * 64 + 2 * 2 * rows) * 4
        out = (2 * rows * 64 + 2 * rows) * 4
        self.compute = 3e-6 + 4 * 64 * 2 * rows * rows / rate
        self.hop = messages * latency + 2 * rows * 2 * 64 * 4 / bandwidth
        self.ends = (3e-6 + state / 1e9) + (3e-6 + (state + out) / 1e9)


def close(value):
    return pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_computation_hides_hops_that_hardware_moves(world_size):
    schedule, on = ring(world_size, 32 * world_size), machine(rate="1 GFLOP/s")
    by_hand = Paper(schedule, rate=1e9)
    assert by_hand.compute > by_hand.hop
    assert simulate(schedule, on).total_s == close(by_hand.ends + world_size * by_hand.compute)
    assert exposed_communication_s(schedule, on) == 0


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_hops_longer_than_their_computation_set_the_pace(world_size):
    schedule, on = ring(world_size, 32 * world_size), machine(rate="1000 TFLOP/s")
    by_hand = Paper(schedule, rate=1e15)
    moving = by_hand.hop - 5e-6
    assert by_hand.compute < moving / 2
    # K goes on as soon as it is there, so that only the first hop shows its latency
    last_arrival = 5e-6 + (world_size - 1) * moving
    assert simulate(schedule, on).total_s == close(by_hand.ends + last_arrival + by_hand.compute)
    exposed = last_arrival - (world_size - 1) * by_hand.compute
    assert exposed_communication_s(schedule, on) == pytest.approx(exposed, rel=1e-10)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_polling_adds_every_hop_to_the_rank_that_receives_it(world_size):
    schedule = ring(world_size, 32 * world_size)
    by_hand = Paper(schedule, messages=2)
    predicted = simulate(schedule, machine(cores=world_size, progress="polling"))
    assert predicted.total_s == close(by_hand.ends + world_size * by_hand.compute + (world_size - 1) * by_hand.hop)
    assert exposed_communication_s(schedule, machine(cores=world_size, progress="polling")) == close(
        (world_size - 1) * by_hand.hop
    )


@pytest.mark.parametrize(("world_size", "cores"), [(4, 2), (4, 1), (6, 4), (5, 2)])
def test_ranks_that_share_cores_take_turns(world_size, cores):
    schedule = ring(world_size, 32 * world_size)
    by_hand = Paper(schedule, messages=2)
    alone = by_hand.ends + world_size * by_hand.compute + (world_size - 1) * by_hand.hop
    predicted = simulate(schedule, machine(cores=cores, progress="polling"))
    assert predicted.total_s == close(alone * world_size / cores)


def test_a_core_for_each_rank_is_no_constraint():
    schedule = ring(4)
    times = {cores: simulate(schedule, machine(cores=cores, progress="polling")).total_s for cores in (4, 5, 64)}
    assert len(set(times.values())) == 1


def test_handshake_starts_the_hop_where_the_host_next_looks():
    schedule = ring(4)
    by_hand = Paper(schedule)
    two = ring(2, 128)
    predicted = simulate(two, machine(cores=2, progress="handshake"))
    # of its two pieces (one a head) the first ends at half the kernel's time; the hop then outlasts the second
    assert predicted.total_s == close(by_hand.ends + by_hand.compute * 1.5 + by_hand.hop)
    # cut in pieces of 8 x 8 it looks after the first of 2 heads x 64
    fine = machine(cores=4, progress="handshake", rows=8, exact=False, rate="1 GFLOP/s")
    by_hand = Paper(schedule, rate=1e9)
    assert by_hand.compute / 128 + by_hand.hop < by_hand.compute
    assert simulate(schedule, fine).total_s == close(by_hand.ends + 4 * by_hand.compute)


@pytest.mark.parametrize("progress", ["handshake", "polling", "thread", "offload"])
def test_the_host_of_a_gpu_looks_and_copies_while_the_kernel_runs(progress):
    schedule, on = ring(4), machine(progress=progress, rate="1 GFLOP/s")
    by_hand = Paper(schedule, rate=1e9, messages=2)
    assert by_hand.compute > by_hand.hop
    assert simulate(schedule, on).total_s == close(by_hand.ends + 4 * by_hand.compute)


def test_a_progress_thread_hides_hops_on_idle_cores_only():
    schedule = ring(2, 128, dtype="float32")
    by_hand = Paper(schedule, rate=1e10, messages=2)
    idle = simulate(schedule, machine(cores=8, progress="thread", rate="10 GFLOP/s"))
    busy = simulate(schedule, machine(cores=2, progress="thread", rate="10 GFLOP/s"))
    # a rank has one thread: it copies K, then V, on a core that is idle or shared with the kernel
    assert by_hand.compute > by_hand.hop
    assert idle.total_s == close(by_hand.ends + 2 * by_hand.compute)
    assert busy.total_s == close(by_hand.ends + 2 * by_hand.compute + by_hand.hop)


def test_causal_contiguous_waits_for_its_last_rank_and_zigzag_does_not():
    world_size, seq = 8, 8 * 64
    fast = {"latency": "0 s", "bandwidth": "1000 TB/s", "rate": "1 MFLOP/s"}
    slow = simulate(ring(world_size, seq, mask=Causal()), machine(**fast)).total_s
    even = simulate(ring(world_size, seq, mask=Causal(), partition="zigzag"), machine(**fast)).total_s
    rows = seq // world_size
    pairs = 2 * ((world_size - 1) * rows * rows + rows * (rows + 1) / 2)
    assert slow == pytest.approx(pairs * 256 / 1e6, rel=1e-4)
    assert slow / even == pytest.approx(2 - 1 / world_size, rel=1e-2)


def test_a_barrier_each_step_costs_its_tokens():
    free, step = ring(4), ring(4, sync="step")
    by_hand = Paper(free, rate=1e9)
    compute_bound = machine(rate="1 GFLOP/s", latency="1 us")
    assert by_hand.compute > by_hand.hop
    token = 1e-6 + 1 / 1e9
    barriers = 3 * 2 * token
    assert simulate(step, compute_bound).total_s == close(simulate(free, compute_bound).total_s + barriers)


def test_a_completion_counts_when_it_is_observed():
    schedule = ring(2, 128)
    by_hand = Paper(schedule, rate=1e15, messages=2)
    predicted = simulate(schedule, machine(cores=2, progress="polling", rate="1000 TFLOP/s", look="100 us"))
    # both kernels are shorter than the hop: it is driven at the end of the kernel, not in a wait, so nobody sleeps
    assert predicted.total_s == close(by_hand.ends + 2 * by_hand.compute + by_hand.hop)
    late = simulate(ring(2, 128, mask=Causal()), machine(cores=2, progress="polling", look="100 us"))
    early = simulate(ring(2, 128, mask=Causal()), machine(cores=2, progress="polling"))
    assert late.total_s >= early.total_s


RINGS = st.builds(
    ring,
    world_size=st.integers(1, 6),
    seq=st.integers(0, 70),
    mask=st.sampled_from(("full", "causal")).map(mask_named),
    partition=st.sampled_from(("contiguous", "striped", "zigzag")),
    sync=st.sampled_from(("free", "step")),
)
MACHINES = st.builds(
    machine,
    cores=st.sampled_from((None, 1, 2, 5)),
    rate=st.sampled_from(("1 GFLOP/s", "100 GFLOP/s")),
    bandwidth=st.sampled_from(("100 MB/s", "100 GB/s")),
    progress=st.sampled_from(("offload", "handshake", "thread", "polling")),
    rows=st.sampled_from((1, 16)),
    exact=st.booleans(),
    look=st.sampled_from((None, "50 us")),
)


@settings(max_examples=80, deadline=None)
@given(schedule=RINGS, on=MACHINES)
def test_what_holds_on_every_machine(schedule, on):
    timeline = simulate(schedule, on)
    assert timeline == simulate(schedule, on), "deterministic to the bit"
    assert timeline.digest == schedule.digest
    walked = {(rank, op.id) for rank in range(schedule.world_size) for op in schedule.program(rank)}
    assert {(event.rank, event.op) for event in timeline.events} == walked
    for event in timeline.events:
        assert 0 <= event.start_s <= event.end_s
        if event.kind == "wait":
            assert event.late_s + event.transfer_s + event.progress_s == pytest.approx(event.duration_s, abs=1e-15)
    for rank in range(schedule.world_size):
        ends = [event.end_s for event in timeline.of_rank(rank) if event.kind not in POSTS]
        assert ends == sorted(ends)
    steps = sum(step.latency_s for step in timeline.steps())
    finish = [
        max((e.end_s for e in timeline.of_rank(rank) if e.kind not in POSTS), default=0) for rank in range(schedule.world_size)
    ]
    assert steps == pytest.approx(sum(finish) / len(finish), rel=1e-9, abs=1e-15)
    if (on.device(on.devices[0]).cores or 8) >= schedule.world_size:
        # where ranks share cores a delay may even help the order in which they take turns (Graham, 1969)
        assert simulate(schedule, on, free_hops=True).total_s <= timeline.total_s * (1 + 1e-12)


def test_masked_tiles_cost_what_the_backend_computes():
    schedule = ring(1, 64, mask=Causal())
    op = next(op for op in schedule.program(0) if isinstance(op, Compute) and op.kernel == "attend")
    whole = Costs(device(machine(rows=64, exact=False)), schedule.workload).cost(op)
    strips = Costs(device(machine(rows=8, exact=False)), schedule.workload).cost(op)
    exact = Costs(device(machine()), schedule.workload).cost(op)
    per_pair = 2 * 256 / 1e12
    assert whole.seconds == close(3e-6 + 64 * 64 * per_pair)
    assert strips.seconds == close(3e-6 + (8 * 9 // 2) * 64 * per_pair)
    assert exact.seconds == close(3e-6 + (64 * 65 // 2) * per_pair)
    assert (whole.pieces, strips.pieces) == (2, 2 * 36)


def test_figures_are_interpolated_and_never_extrapolated():
    text = MACHINE.format(
        kind="gpu",
        cores="",
        rate="1 TFLOP/s",
        rows=4,
        exact="false",
        latency="0 s",
        bandwidth="1 GB/s",
        progress="offload",
        look="",
        machine="paper",
    )
    table = topology.parse(text.replace("full: [[1, 1.0], [1000000, 1.0]]", "full: [[4, 0.2], [16, 0.6]]"))
    schedule = ring(1, 8)
    op = next(op for op in schedule.program(0) if isinstance(op, Compute) and op.kernel == "attend")
    assert Costs(device(table), schedule.workload).cost(op).seconds == close(3e-6 + 2 * 64 * 256 / 0.6e12)
    narrow = ring(1, 2)
    op = next(op for op in narrow.program(0) if isinstance(op, Compute) and op.kernel == "attend")
    assert Costs(device(table), narrow.workload).cost(op).seconds == close(3e-6 + 2 * 4 * 256 / 0.2e12)
    with pytest.raises(TopologyError, match="1 pairs per micro-tile lie outside the measured 4 to 16"):
        simulate(ring(1, 1), table)
    with pytest.raises(TopologyError, match="no attention figures for float32 head_dim 96"):
        simulate(ring(1, 8, head_dim=96), machine())
    with pytest.raises(TopologyError, match="float64"):
        simulate(ring(1, 8, dtype="float64"), machine())

"""Messages that share wires, and computation that shares its device with them, against pen and paper."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim import topology
from ringsim.hops import ring_hops
from ringsim.schedule import Schedule
from ringsim.simulation import exposed_communication_s, simulate
from ringsim.workload import Workload

MACHINE = """
ringsim: 2
name: paper
source: "defined: round numbers"
devices:
  gpu:
    kind: gpu
    memory_bandwidth: 1000 TB/s
    attention:
      - dtype: float32
        head_dim: 64
        rate: {rate}
        overhead: 0 s
        micro_tile: {{q_rows: 64, k_rows: 64, edge_rows: 64, exact: true}}
        full: [[1, 1.0], [1.0e+12, 1.0]]
        masked: [[1, 1.0], [1.0e+12, 1.0]]
  slow: {{like: gpu, speed: 0.25}}
links:
  fast: {{latency: 0 s, bandwidth: 100 GB/s}}
  wire: {{latency: {latency}, bandwidth: {bandwidth}{link}}}
transports:
  paper: {{progress: {progress}{transport}}}
machine: {machine}
"""
ROWS = 64
BLOCK_NBYTES = ROWS * 64 * 4
CPU = {"devices.gpu.kind": "cpu", "devices.gpu.cores": 1}


def machine(
    text,
    given=(),
    *,
    rate="1000 PFLOP/s",
    latency="5 us",
    bandwidth="1 GB/s",
    link="",
    progress="offload",
    transport="",
    **choices,
):
    return topology.parse(
        MACHINE.format(
            machine=text, rate=rate, latency=latency, bandwidth=bandwidth, link=link, progress=progress, transport=transport
        ),
        "paper.yaml",
        given,
        **choices,
    )


def nodes(count, gpus, nics, join="switch", more=""):
    inner = f"{{join: switch, link: fast, count: {gpus}, of: gpu, nics: {nics}, name: node}}"
    return f"{{join: {join}, link: wire, count: {count}, of: {inner}{more}}}"


def ring(world_size, **options):
    return Schedule(workload=Workload(q_len=ROWS * world_size, heads=1, **options), world_size=world_size)


def first_hop_s(on, world_size):
    """How long K and V of the first step take, by receiving rank."""
    events = simulate(ring(world_size), on).events
    found = {}
    for event in events:
        if event.kind == "recv" and event.step == 0:
            found[event.rank] = max(found.get(event.rank, 0.0), event.duration_s)
    return [found[rank] for rank in range(world_size)]


def close(value):
    return pytest.approx(value, rel=1e-9)


ALONE_S = 5e-6 + 2 * BLOCK_NBYTES / 1e9


def test_two_messages_on_one_nic_halve():
    on = machine(nodes(2, 2, 1), place="round-robin")
    assert first_hop_s(on, 4) == [close(5e-6 * 2 + 4 * BLOCK_NBYTES / 1e9)] * 4
    apart = machine(nodes(2, 2, 2), place="round-robin")
    assert first_hop_s(apart, 4) == [close(5e-6 * 2 + 2 * BLOCK_NBYTES / 1e9)] * 4


@pytest.mark.parametrize(("nics", "slower"), [(1, 4), (2, 2), (4, 1)])
def test_a_nic_per_node_is_four_times_slower_than_a_nic_per_gpu_when_every_hop_leaves_the_node(nics, slower):
    on = machine(nodes(2, 4, nics), latency="0 s", place="round-robin")
    assert first_hop_s(on, 8) == [close(slower * 2 * BLOCK_NBYTES / 1e9)] * 8
    block = machine(nodes(2, 4, nics), latency="0 s")
    outside, inside = 2 * BLOCK_NBYTES / 1e9, 2 * BLOCK_NBYTES / 100e9
    assert first_hop_s(block, 8) == [close(outside if rank in (0, 4) else inside) for rank in range(8)]


@pytest.mark.parametrize("oversubscription", [1, 2, 3.5])
def test_an_oversubscribed_spine_slows_what_crosses_it(oversubscription):
    text = nodes(8, 1, 1, "fat-tree", f", leaf: 4, oversubscription: {oversubscription}")
    across = machine(text, latency="0 s", place=[0, 4, 1, 5, 2, 6, 3, 7])
    assert first_hop_s(across, 8) == [close(oversubscription * 2 * BLOCK_NBYTES / 1e9)] * 8
    along = machine(text, latency="0 s")
    assert max(first_hop_s(along, 8)) == close(max(oversubscription / 4, 1) * 2 * BLOCK_NBYTES / 1e9)


@pytest.mark.parametrize(("duplex", "slower"), [(2, 1), (1.5, 2 / 1.5), (1, 2)])
def test_both_directions_of_a_wire_share_what_its_duplex_allows(duplex, slower):
    on = machine("{join: mesh, link: wire, count: 2, of: gpu}", latency="0 s", link=f", duplex: {duplex}")
    assert first_hop_s(on, 2) == [close(slower * 2 * BLOCK_NBYTES / 1e9)] * 2
    around = machine("{join: mesh, link: wire, count: 3, of: gpu}", latency="0 s", link=f", duplex: {duplex}")
    assert first_hop_s(around, 3) == [close(2 * BLOCK_NBYTES / 1e9)] * 3


def test_a_straggler_sets_the_pace_of_all():
    schedule, text = ring(4), "{join: mesh, link: wire, count: 4, of: gpu}"
    even = simulate(schedule, machine(text, rate="1 GFLOP/s"))
    late = simulate(schedule, machine(text, {"replace": {"gpu-2": "slow"}}, rate="1 GFLOP/s"))
    kernel = ROWS * ROWS * 256 / 1e9
    assert even.total_s == pytest.approx(4 * kernel, rel=1e-6)
    assert late.total_s == pytest.approx(16 * kernel, rel=1e-6)
    # its neighbours wait for it, and that is no communication
    assert exposed_communication_s(schedule, machine(text, {"replace": {"gpu-2": "slow"}}, rate="1 GFLOP/s")) == 0
    assert late.late_s() > kernel


def test_the_slower_direction_of_an_asymmetric_link_binds():
    on = machine("{join: mesh, link: wire, count: 2, of: gpu}", latency="0 s", link=", reverse: 250 MB/s")
    assert first_hop_s(on, 2) == [close(2 * BLOCK_NBYTES / 250e6), close(2 * BLOCK_NBYTES / 1e9)]


def test_achieved_scales_what_the_wire_carries():
    on = machine("{join: switch, link: wire, count: 3, of: gpu}", latency="0 s", link=", achieved: 0.8")
    assert first_hop_s(on, 3) == [close(2 * BLOCK_NBYTES / 0.8e9)] * 3


def test_a_device_is_left_and_entered_by_no_more_than_its_egress_and_ingress():
    settings_ = {"devices.gpu.egress": "400 MB/s", "devices.gpu.ingress": "2 GB/s"}
    on = machine("{join: mesh, link: wire, count: 3, of: gpu}", settings_, latency="0 s")
    assert first_hop_s(on, 3) == [close(2 * BLOCK_NBYTES / 400e6)] * 3


def test_a_flat_ring_over_four_nodes_of_eight_is_bound_by_one_nic_at_each_boundary():
    on = machine(nodes(4, 8, 8), latency="1 us")
    hops = ring_hops(on, 32)
    crossing = [hop for hop in hops if "wire" in hop.links]
    assert [hop.rank for hop in crossing] == [7, 15, 23, 31]
    assert {(hop.together, hop.bottleneck.split("/")[1]) for hop in crossing} == {(1e9, "nic-7 > switch")}
    assert {hop.together for hop in hops if hop not in crossing} == {100e9}
    schedule = ring(32)
    kernel, slow = ROWS * ROWS * 256 / 1e11, 2 * BLOCK_NBYTES / 1e9
    exposed = exposed_communication_s(schedule, machine(nodes(4, 8, 8), latency="0 s", rate="100 GFLOP/s"))
    assert slow > kernel > 2 * BLOCK_NBYTES / 100e9
    # a block crosses a boundary in every step: all 31 hops go at the pace of one NIC, though 28 of 32 wires are fast
    assert exposed == pytest.approx(31 * (slow - kernel), rel=0.05)
    ample = exposed_communication_s(schedule, machine(nodes(4, 8, 8), latency="0 s", rate="100 GFLOP/s", bandwidth="8 GB/s"))
    assert ample < 0.05 * exposed


def test_polling_pays_for_every_hop_that_offload_hides():
    text = "{join: mesh, link: wire, count: 4, of: gpu}"
    kernel = ROWS * ROWS * 256 / 1e9
    assert kernel > ALONE_S
    hidden = machine(text, CPU, rate="1 GFLOP/s")
    polled = machine(text, CPU, rate="1 GFLOP/s", progress="polling")
    assert exposed_communication_s(ring(4), hidden) == 0
    assert exposed_communication_s(ring(4), polled) == pytest.approx(3 * (2 * 5e-6 + 2 * BLOCK_NBYTES / 1e9), rel=1e-6)


def test_kernels_lose_the_share_of_the_device_that_a_message_takes():
    text, kernel = "{join: mesh, link: wire, count: 2, of: gpu}", ROWS * ROWS * 256 / 1e9
    moving = 2 * BLOCK_NBYTES / 1e9
    on = machine(text, rate="1 GFLOP/s", latency="0 s", transport=", device_share: 0.2")
    # of the first kernel's work 0.8 x moving is done while bytes move, the rest at full speed
    assert simulate(ring(2), on).total_s == pytest.approx(2 * kernel + 0.2 * moving, rel=1e-6)


def test_messages_lose_what_the_transport_says_while_a_kernel_runs():
    text, moving = "{join: mesh, link: wire, count: 2, of: gpu}", 2 * BLOCK_NBYTES / 1e9
    fast = machine(text, rate="1 GFLOP/s", latency="0 s", transport=", slowed_by_compute: 0.5")
    assert 2 * moving < ROWS * ROWS * 256 / 1e9
    assert first_hop_s(fast, 2) == [close(2 * moving)] * 2
    # a kernel of a quarter of the time: slowed while it runs, then at full rate
    kernel = moving / 4
    short = machine(text, rate=f"{ROWS * ROWS * 256 / kernel:.6f} FLOP/s", latency="0 s", transport=", slowed_by_compute: 0.5")
    assert first_hop_s(short, 2) == [pytest.approx(kernel + (moving - kernel / 2), rel=1e-6)] * 2


def test_regimes_price_a_message_by_its_size():
    regimes = "[{from: 0 B, latency: 1 us}, {from: 16 KiB, latency: 9 us, bandwidth: 500 MB/s}]"
    on = machine("{join: mesh, link: wire, count: 2, of: gpu}", transport=f", paths: {{wire: {{regimes: {regimes}}}}}")
    path = on.path(*on.devices)
    assert [(path.latency_s(n), path.rate(n)) for n in (1, 16383, 16384)] == [(1e-6, 1e9), (1e-6, 1e9), (9e-6, 5e8)]
    assert BLOCK_NBYTES == 16384
    assert first_hop_s(on, 2) == [close(9e-6 + 2 * BLOCK_NBYTES / 5e8)] * 2


@pytest.mark.parametrize(("drives", "waits"), [("receiver", (0, 1)), ("sender", (1, 0)), ("both", (1, 1))])
def test_who_drives_a_handshake_is_who_must_look(drives, waits):
    # rank 1 is slow: what it must look at begins only when its kernel ends
    text = "{join: mesh, link: wire, count: 2, of: gpu}"
    late = CPU | {"replace": {"gpu-1": "slow"}}
    on = machine(text, late, rate="1 GFLOP/s", progress="handshake", transport=f", drives: {drives}")
    kernel = ROWS * ROWS * 256 / 1e9
    events = [event for event in simulate(ring(2), on).events if event.kind == "recv"]
    ends = {rank: max(event.end_s for event in events if event.rank == rank) for rank in (0, 1)}
    assert tuple(int(ends[rank] >= 4 * kernel) for rank in (0, 1)) == waits


def test_an_eager_message_leaves_before_its_receiver_is_there():
    text = "{join: mesh, link: wire, count: 3, of: gpu}"
    late = {"replace": {"gpu-1": "slow"}}
    eager = machine(text, late, rate="1 GFLOP/s", transport=", eager: 1 MiB")
    rendezvous = machine(text, late, rate="1 GFLOP/s")
    for on, earlier in ((eager, True), (rendezvous, False)):
        events = simulate(ring(3), on).events
        posted = min(event.start_s for event in events if event.kind == "recv" and event.rank == 1 and event.step == 1)
        sent = min(event.end_s for event in events if event.kind == "send" and event.rank == 0 and event.step == 1)
        assert (sent < posted) == earlier


def test_several_ranks_on_a_device_share_it():
    text = "{join: mesh, link: wire, count: 2, of: gpu}"
    shared = machine(text, {"devices.gpu.inside": "fast"}, rate="1 GFLOP/s", place=[0, 0, 1, 1])
    alone = machine("{join: mesh, link: wire, count: 4, of: gpu}", rate="1 GFLOP/s")
    assert simulate(ring(4), shared).total_s == pytest.approx(2 * simulate(ring(4), alone).total_s, rel=1e-6)


@pytest.mark.parametrize("progress", ["offload", "handshake", "thread", "polling"])
def test_eager_ranks_that_are_alike_stay_alike(progress):
    text = "{join: mesh, link: wire, count: 4, of: gpu}"
    timeline = simulate(ring(4), machine(text, CPU, rate="1 GFLOP/s", progress=progress, transport=", eager: 1 MiB"))
    ends = {max(event.end_s for event in timeline.of_rank(rank) if event.kind == "finish") for rank in range(4)}
    assert len(ends) == 1


@pytest.mark.parametrize("progress", ["offload", "handshake", "thread", "polling"])
@pytest.mark.parametrize("eager", ["0 B", "1 MiB"])
def test_a_hop_that_costs_nothing_is_never_slower(progress, eager):
    text = "{join: mesh, link: wire, count: 4, of: gpu}"
    late = CPU | {"replace": {"gpu-1": "slow"}}
    on = machine(text, late, rate="1 GFLOP/s", progress=progress, transport=f", eager: {eager}")
    assert exposed_communication_s(ring(4), on) >= 0


@pytest.mark.parametrize("progress", ["handshake", "polling", "thread"])
@pytest.mark.parametrize("drives", ["receiver", "sender"])
@pytest.mark.parametrize("device", [{}, CPU], ids=["gpu", "cpu"])
def test_who_comes_first_within_an_instant_makes_no_difference(progress, drives, device):
    text = "{join: mesh, link: wire, count: 4, of: gpu}"
    on = machine(text, device, rate="1 TFLOP/s", progress=progress, transport=f", look: 3 us, drives: {drives}")
    timeline = simulate(ring(4), on)
    ends = [max(event.end_s for event in timeline.of_rank(rank)) for rank in range(4)]
    assert ends == [close(ends[0])] * 4


def waits(on, rank):
    return [event for event in simulate(ring(2), on).of_rank(rank) if event.kind == "wait" and event.duration_s > 0]


def test_a_wait_that_copies_k_and_v_is_all_transfer():
    text, copy = "{join: mesh, link: wire, count: 2, of: gpu}", 5e-6 + BLOCK_NBYTES / 1e9
    on = machine(text, CPU, progress="polling")
    events = simulate(ring(2), on).of_rank(0)
    moved = sum(event.transfer_s + event.poll_s for event in events if event.kind not in ("send", "recv"))
    assert moved == pytest.approx(2 * copy, rel=1e-6)
    assert sum(event.progress_s + event.late_s for event in events) == pytest.approx(0, abs=1e-12)


def test_a_wait_for_one_who_is_late_is_late_until_it_posts():
    text, kernel = "{join: mesh, link: wire, count: 2, of: gpu}", ROWS * ROWS * 256 / 1e9
    on = machine(text, {"replace": {"gpu-1": "slow"}}, rate="1 GFLOP/s", transport=", eager: 0 B")
    # rank 0 has what it needs for its second kernel, and then must keep its K until nobody reads it: no wait at all
    assert [wait.late_s for wait in waits(on, 0)] == []
    three = machine("{join: mesh, link: wire, count: 3, of: gpu}", {"replace": {"gpu-1": "slow"}}, rate="1 GFLOP/s")
    of_two = [event for event in simulate(ring(3), three).of_rank(2) if event.kind == "wait" and event.duration_s > 0]
    # rank 2 waits for the second block, which rank 1 passes on when its first kernel of 4 is done
    assert of_two[0].late_s == pytest.approx(2 * kernel, rel=1e-6)
    assert sum(wait.transfer_s for wait in of_two[:2]) == pytest.approx(ALONE_S, rel=1e-6)


def test_a_copy_does_not_slow_itself():
    text, kernel = "{join: mesh, link: wire, count: 2, of: gpu}", ROWS * ROWS * 256 / 1e9
    plain = machine(text, CPU, rate="1 GFLOP/s", progress="polling")
    slowed = machine(text, CPU, rate="1 GFLOP/s", progress="polling", transport=", slowed_by_compute: 0.5, device_share: 0.5")
    assert kernel > ALONE_S
    assert simulate(ring(2), slowed).total_s == close(simulate(ring(2), plain).total_s)
    uneven = CPU | {"replace": {"gpu-1": "slow"}}
    times = {
        simulate(ring(2), machine(text, uneven, rate="1 GFLOP/s", progress="thread", transport=extra)).total_s
        for extra in ("", ", slowed_by_compute: 0.5", ", device_share: 0.5")
    }
    assert len(times) == 1


def test_a_message_that_is_passed_on_leaves_and_enters_the_device_that_does():
    on = machine(
        "{join: ring, link: wire, count: 5, of: gpu}", {"devices.gpu.egress": "500 MB/s", "devices.gpu.ingress": "2 GB/s"}
    )
    path = on.path(on.devices[0], on.devices[2])
    names = [on.graph.resources[number].name for number in path.resources]
    assert names == [
        "gpu-0 egress",
        "gpu-0 > gpu-1",
        "gpu-1 ingress",
        "gpu-1 egress",
        "gpu-1 > gpu-2",
        "gpu-2 ingress",
    ]


SHAPES = st.sampled_from(
    [
        "{join: switch, link: wire, count: 8, of: gpu}",
        "{join: mesh, link: wire, count: 8, of: gpu}",
        "{join: ring, link: wire, count: 8, of: gpu}",
        nodes(2, 4, 1),
        nodes(4, 2, 2, "fat-tree", ", leaf: 2, oversubscription: 2"),
        nodes(2, 4, 4, "rails"),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    place=st.permutations(range(8)),
    progress=st.sampled_from(("offload", "handshake", "thread", "polling")),
    drives=st.sampled_from(("receiver", "sender", "both")),
    eager=st.sampled_from(("0 B", "8 KiB", "1 MiB")),
    share=st.sampled_from((0, 0.3)),
    slowed=st.sampled_from((0, 0.3)),
    duplex=st.sampled_from((1, 1.5, 2)),
    world_size=st.integers(1, 8),
    rate=st.sampled_from(("1 GFLOP/s", "30 GFLOP/s")),
)
def test_what_holds_for_every_transport(shape, place, progress, drives, eager, share, slowed, duplex, world_size, rate):
    transport = f", drives: {drives}, eager: {eager}, device_share: {share}, slowed_by_compute: {slowed}"
    on = machine(shape, place=list(place), rate=rate, link=f", duplex: {duplex}", progress=progress, transport=transport)
    schedule = ring(world_size)
    timeline = simulate(schedule, on)
    assert timeline == simulate(schedule, on)
    walked = {(rank, op.id) for rank in range(world_size) for op in schedule.program(rank)}
    assert {(event.rank, event.op) for event in timeline.events} == walked
    assert all(0 <= event.start_s <= event.end_s < float("inf") for event in timeline.events)
    assert simulate(schedule, on, free_hops=True).total_s <= timeline.total_s * (1 + 1e-12)


@pytest.mark.parametrize("shape", ["switch", "mesh", "ring"])
@pytest.mark.parametrize("progress", ["offload", "handshake", "polling"])
def test_alike_ranks_have_alike_timelines(shape, progress):
    on = machine(f"{{join: {shape}, link: wire, count: 9, of: gpu}}", link=", duplex: 1.2", progress=progress)
    timeline = simulate(ring(9), on)
    spans = [[(event.kind, event.start_s, event.end_s) for event in timeline.of_rank(rank)] for rank in range(9)]
    assert all(span == spans[0] for span in spans)

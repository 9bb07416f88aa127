"""Ranks that are alike: one of each kind simulated gives what all simulated give, or nobody stands for another."""

import pickle

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ringsim import topology
from ringsim.costs import Costs
from ringsim.mask import mask_named
from ringsim.schedule import Schedule
from ringsim.simulation import simulate
from ringsim.simulation.programs import Programs, Told, turning
from ringsim.timeline import Timeline
from ringsim.workload import Workload

TIMES = ("start_s", "end_s", "cpu_s", "poll_s", "late_s", "transfer_s", "progress_s")
NAMES = ("rank", "op", "kind", "step", "phase", "nbytes", "peer", "tag")


def agree(schedule, on, **options):
    """The number of ranks simulated, where both ways give the same but for rounding."""
    every = simulate(schedule, on, fold=False, **options)
    folded = simulate(schedule, on, fold=True, **options)
    assert "alike" not in every.facts
    least = 1e-12 * every.total_s
    assert len(folded.events) == len(every.events)
    for one, other in zip(every.events, folded.events, strict=True):
        assert [getattr(one, name) for name in NAMES] == [getattr(other, name) for name in NAMES]
        for name in TIMES:
            assert abs(getattr(one, name) - getattr(other, name)) <= least, (one, other)
    assert folded.total_s == pytest.approx(every.total_s, rel=1e-12)
    for quantity in (Timeline.exposed_s, Timeline.late_s, Timeline.compute_s):
        assert quantity(folded) == pytest.approx(quantity(every), rel=1e-11, abs=least)
    for one, other in zip(every.steps(), folded.steps(), strict=True):
        assert one.latency_s == pytest.approx(other.latency_s, rel=1e-11, abs=least)
        assert one.slowest_s == pytest.approx(other.slowest_s, rel=1e-11, abs=least)
    assert folded.facts["busiest"] == pytest.approx(every.facts["busiest"], rel=1e-11)
    return folded.facts.get("alike", schedule.world_size)


def made(world_size, tokens=2048, **options):
    ways = {name: options.pop(name) for name in ("partition", "sync", "strategy") if name in options}
    mask = mask_named(options.pop("mask", "full"))
    work = Workload(q_len=tokens * world_size, mask=mask, **({"head_dim": 128, "dtype": "bfloat16"} | options))
    return Schedule(workload=work, world_size=world_size, **ways)


KINDS = (("full", "contiguous"), ("causal", "contiguous"), ("causal", "zigzag"), ("causal", "striped"))
PER_NODE = {"alps-gh200": 4, "dgx-a100": 2, "dgx-h100-cluster": 8, "dgx-h100-cluster-tcp": 8, "frontier": 8, "l20-pcie": 4}
PER_NODE |= {"perlmutter": 4, "rtx4090-pcie": 2, "laptop": 4}


@pytest.mark.parametrize("name", topology.names())
@pytest.mark.parametrize(("mask", "partition"), KINDS)
def test_every_shipped_machine(name, mask, partition):
    on = topology.load(name)
    table = on.device(on.devices[0]).attention[0]
    world_size = min(len(on.slots), 16)
    shape = {"head_dim": table.head_dim, "dtype": table.dtype, "heads": 8, "kv_heads": 8}
    even = mask == "full" or partition == "zigzag"
    expected = PER_NODE.get(name, 1) if even else world_size
    assert agree(made(world_size, mask=mask, partition=partition, **shape), on) == expected


MACHINE = """
ringsim: 2
name: paper
source: "defined: round numbers"
devices:
  gpu:
    kind: {kind}
    inside: fast
    memory_bandwidth: 100 GB/s
    attention:
      - dtype: float32
        head_dim: 64
        rate: {rate}
        overhead: 1 us
        micro_tile: {{q_rows: 16, k_rows: 16, edge_rows: 4, exact: {exact}}}
        full: [[1, 0.5], [1.0e+12, 1.0]]
        masked: [[1, 0.2], [1.0e+12, 0.9]]
  slow: {{like: gpu, speed: 0.25}}
links:
  fast: {{latency: 300 ns, bandwidth: 10 GB/s}}
  wire: {{latency: 5 us, bandwidth: 1 GB/s, duplex: {duplex}}}
transports:
  paper:
    progress: {progress}
    drives: {drives}
    eager: {eager}
    look: {look}
    device_share: {share}
    slowed_by_compute: {slowed}
machine: {machine}
"""
DEFAULTS = {"kind": "gpu", "rate": "20 GFLOP/s", "exact": "true", "duplex": 2, "progress": "offload", "drives": "receiver"}
DEFAULTS |= {"eager": "0 B", "look": "0 s", "share": 0, "slowed": 0, "machine": "{join: mesh, link: wire, count: 8, of: gpu}"}


def paper(*, given=(), place=None, **choices):
    return topology.parse(MACHINE.format(**(DEFAULTS | choices)), "paper.yaml", given, place=place)


PAPER = paper()


def nodes(count, gpus, nics, join="switch", more=""):
    inner = f"{{join: switch, link: fast, count: {gpus}, of: gpu, nics: {nics}, name: node}}"
    return f"{{join: {join}, link: wire, count: {count}, of: {inner}{more}}}"


def small(world_size, tokens=24, **options):
    return made(world_size, tokens, **({"heads": 2, "head_dim": 64, "dtype": "float32"} | options))


def test_ranks_that_differ_stand_for_nobody():
    schedule = small(8)
    assert agree(schedule, paper()) == 1
    assert agree(schedule, paper(given={"replace": {"gpu-3": "slow"}})) == 8
    assert agree(schedule, paper(given={"replace": {"gpu-3": "slow", "gpu-7": "slow"}})) == 4
    assert agree(small(8, mask="causal"), paper()) == 8
    assert agree(made(8, 24, head_dim=64, dtype="float32", heads=2, batch=0), paper()) == 1
    odd = Schedule(workload=Workload(q_len=197, heads=2), world_size=8)
    assert agree(odd, paper()) == 8
    pairs = Schedule(workload=Workload(q_len=196, heads=2), world_size=8, partition="striped")
    assert agree(pairs, paper()) == 8


def test_wires_that_differ_make_ranks_differ():
    assert agree(small(8), paper(machine=nodes(4, 2, 1))) == 2
    assert agree(small(8), paper(machine=nodes(4, 2, 1, "fat-tree", ", leaf: 2, oversubscription: 2"))) == 4
    assert agree(small(8), paper(machine=nodes(2, 4, 4, "rails"))) == 4
    assert agree(small(8), paper(machine="{join: ring, link: wire, count: 8, of: gpu}")) == 1
    assert agree(small(6), paper(machine="{join: ring, link: wire, count: 8, of: gpu}")) == 6
    assert agree(small(8), paper(machine=nodes(2, 4, 1), place=[0, 3, 1, 2, 4, 7, 5, 6])) == 4
    assert agree(small(8), paper(machine=nodes(2, 4, 1), place=[0, 1, 2, 4, 3, 5, 6, 7])) == 8


def test_ranks_that_share_devices():
    on = {"machine": "{join: mesh, link: wire, count: 4, of: gpu}"}
    assert agree(small(8), paper(**on, place=[0, 0, 1, 1, 2, 2, 3, 3])) == 2
    assert agree(small(8), paper(**on, place=[0, 1, 1, 2, 2, 3, 3, 0])) == 2
    assert agree(small(8), paper(**on, place=[0, 1, 2, 3, 0, 1, 2, 3])) == 1
    assert agree(small(8), paper(**on, place=[0, 1, 0, 1, 0, 1, 0, 1])) == 1
    assert agree(small(8), paper(**on, place=[0, 0, 0, 0, 1, 1, 1, 1])) == 4
    assert agree(small(8), paper(**on, place=[0] * 8)) == 1


SHAPES = st.sampled_from(
    [
        "{join: switch, link: wire, count: 12, of: gpu}",
        "{join: mesh, link: wire, count: 12, of: gpu}",
        "{join: ring, link: wire, count: 12, of: gpu}",
        "{join: torus2d, link: wire, shape: [3, 4], of: gpu}",
        nodes(3, 4, 1),
        nodes(3, 4, 2),
        nodes(6, 2, 2, "fat-tree", ", leaf: 2, oversubscription: 2"),
        nodes(3, 4, 4, "rails"),
    ]
)
PLACES = st.one_of(
    st.none(),
    st.none(),
    st.permutations(range(12)),
    st.sampled_from(
        [
            [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
            [0, 1] * 6,
            [0, 4, 8] * 4,
            [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8],
            [0, 0, 4, 4, 8, 8] * 2,
        ]
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    place=PLACES,
    world_size=st.sampled_from((12, 12, 12, 9, 8, 6, 4)),
    cores=st.sampled_from((None, None, 1, 2, 5)),
    choices=st.fixed_dictionaries(
        {
            "rate": st.sampled_from(("1 GFLOP/s", "20 GFLOP/s", "1 TFLOP/s")),
            "exact": st.sampled_from(("true", "false")),
            "duplex": st.sampled_from((1, 1.5, 2)),
            "progress": st.sampled_from(("offload", "handshake", "thread", "polling")),
            "drives": st.sampled_from(("receiver", "sender", "both")),
            "eager": st.sampled_from(("0 B", "8 KiB", "1 MiB")),
            "look": st.sampled_from(("0 s", "3 us")),
            "share": st.sampled_from((0, 0.3)),
            "slowed": st.sampled_from((0, 0.3)),
        }
    ),
    slow=st.sampled_from(((), (), (1,), (0, 6), (2, 5, 8, 11))),
    kind=st.sampled_from(
        (("full", "contiguous"), ("full", "striped"), ("causal", "zigzag"), ("causal", "zigzag"), ("causal", "striped"))
    ),
    sync=st.sampled_from(("free", "free", "step")),
    strategy=st.sampled_from(
        ("ring", "ring", "bidirectional", "q-ring", "pass-q", "token-ring", "double-ring(2)", "multi-ring(2)")
    ),
    free_hops=st.booleans(),
)
def test_any_machine(shape, place, world_size, cores, choices, slow, kind, sync, strategy, free_hops):
    given = {} if cores is None else {"devices.gpu.kind": "cpu", "devices.gpu.cores": cores}
    names = [vertex.name for vertex in paper(machine=shape).graph.vertices if vertex.kind == "device"]
    given |= {"replace": {names[number]: "slow" for number in slow}} if slow else {}
    on = paper(given=given, place=place, machine=shape, **choices)
    assume(strategy != "double-ring(2)" or world_size % 2 == 0)
    agree(small(world_size, mask=kind[0], partition=kind[1], sync=sync, strategy=strategy), on, free_hops=free_hops)


WAYS = ("ring", "pass-q", "token-ring", "q-ring", "bidirectional", "double-ring(2)", "double-ring(2, 2)", "double-ring(4, 1)")
ANY = st.sampled_from(("contiguous", "striped", "zigzag", "zigzag", "runs(0:3,1:9,2:3,3:9,0:9,1:3,2:9,3:3)"))


def even(keys, by):
    return all(keys[rank] == keys[(rank + by) % len(keys)] for rank in range(len(keys)))


@settings(max_examples=100, deadline=None)
@given(
    strategy=st.sampled_from(WAYS),
    world_size=st.sampled_from((4, 8, 12)),
    tokens=st.sampled_from((0, 1, 2, 12, 20)),
    more=st.sampled_from((0, 0, 0, 1, 3)),
    mask=st.sampled_from(("full", "full", "causal", "causal", "window(7)", "window(30, 5)", "documents(24,24,24,24)", "~causal")),
    partition=ANY,
    heads=st.sampled_from((1, 4)),
    sync=st.sampled_from(("free", "step")),
    lengths=st.sampled_from((None, None, None, (20, 48))),
    kv_tokens=st.sampled_from((None, 8)),
)
def test_ranks_that_are_told_the_same_do_the_same(
    strategy, world_size, tokens, more, mask, partition, heads, sync, lengths, kv_tokens
):
    length = 48 if partition.startswith("runs") else tokens * world_size + more
    world_size = 4 if partition.startswith("runs") else world_size
    batch, kv_len = 2 if lengths else 1, length if kv_tokens is None or partition.startswith("runs") else kv_tokens * world_size
    assume(not lengths or max(lengths) <= max(length, kv_len))
    assume(mask_named(mask).extent in (None, length))
    work = Workload(q_len=length, kv_len=kv_len, batch=batch, heads=heads, mask=mask_named(mask), lengths=lengths)
    schedule = Schedule(workload=work, world_size=world_size, strategy=strategy, partition=partition, sync=sync)
    by = turning(schedule)
    assume(by is not None)
    told = list(map(Told(schedule).key, range(world_size)))
    programs = Programs(schedule, [Costs(PAPER.device(PAPER.devices[0]), work)] * world_size)
    keys = [programs.key(rank) for rank in range(world_size)]
    for ranks in (count for count in range(by, world_size, by) if world_size % count == 0):
        assert not even(told, ranks) or even(keys, ranks)


@pytest.mark.parametrize(("mask", "partition"), [("full", "contiguous"), ("causal", "zigzag")])
@pytest.mark.parametrize("strategy", ["ring", "double-ring(8)", "token-ring"])
def test_large_worlds_fold_by_what_they_are_told(mask, partition, strategy):
    schedule = made(40, mask=mask, partition=partition, strategy=strategy, heads=8)
    assert turning(schedule) is not None
    assert agree(schedule, topology.load("dgx-h100-cluster", {"nodes": 5})) == 8


def test_what_cuts_rows_turns_only_where_all_are_seen():
    assert turning(made(8, strategy="q-ring")) == turning(made(8, strategy="bidirectional")) == 1
    assert turning(made(8, strategy="q-ring", mask="causal")) is None
    assert turning(made(8, strategy="multi-ring(2)", heads=2)) is None
    assert turning(Schedule.from_text(made(4).to_text())) is None


def test_a_folded_timeline_is_as_any_other():
    on, schedule = paper(), small(8)
    every, folded = simulate(schedule, on, fold=False), simulate(schedule, on, fold=True)
    assert len(folded.events) == 8 * len(folded.events.own)
    assert folded.events == tuple(folded.events)
    assert tuple(folded.events) == folded.events
    assert folded.events != every.events[:-1]
    assert folded.events[-1] == list(folded.events)[-1]
    assert folded.events[3:70:9] == tuple(folded.events)[3:70:9]
    with pytest.raises(IndexError):
        folded.events[len(folded.events)]
    for rank in range(8):
        assert folded.of_rank(rank) == tuple(event for event in folded.events if event.rank == rank)
    assert pickle.loads(pickle.dumps(folded)) == folded == simulate(schedule, on, fold=True)
    values = folded.to_dict()
    assert (values["alike"], len(values["events"])) == (1, len(folded.events.own))
    assert Timeline.from_dict(values) == folded


def test_folding_is_for_many_ranks():
    on = paper(machine="{join: switch, link: wire, count: 32, of: gpu}")
    assert simulate(small(32), on).facts["alike"] == 1
    assert "alike" not in simulate(small(16), on).facts

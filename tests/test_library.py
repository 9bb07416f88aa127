"""The machines that ringsim ships: short, sourced, loadable with every transport, simulated, and open to every what-if."""

import re
from importlib import resources
from math import isfinite, prod

import pytest
import yaml

import ringsim
from ringsim import topology
from ringsim.hops import ring_hops
from ringsim.mask import Causal, Full
from ringsim.schedule import Schedule
from ringsim.simulation import exposed_communication_s, simulate
from ringsim.topology.figures import KINDS, TABLES
from ringsim.workload import Workload

NAMES = topology.names()
PROMISED = """a100-pcie-pair alps-gh200 dgx-a100 dgx-b200 dgx-h100 dgx-h100-cluster dgx-h100-cluster-tcp dgx-h200 frontier
    gb200-nvl72 ideal ideal-a100-infiniband ideal-a100-nvlink ideal-tpu-v3 ideal-tpu-v4 ideal-tpu-v5e l20-pcie laptop mi300x
    perlmutter rtx4090-pcie tpu-v4 tpu-v5e workstations-10gbe"""
SMALL = {"nodes": 2, "x": 4, "y": 2, "z": 2}
TOGETHER = {"gpus": ("gpus", "nics")}
LARGE = 2**30
every_machine = pytest.mark.parametrize("name", NAMES)


def text_of(name):
    return (resources.files("ringsim.topologies") / f"{name}.yaml").read_text(encoding="utf-8")


def load(name, settings=(), **choices):
    """A shipped machine, with few nodes or a small torus."""
    counts = topology.load(name).spec.counts
    small = {key: min(SMALL[key], counts[key]) for key in SMALL if key in counts}
    return topology.load(name, small | dict(settings), **choices)


def transports(name):
    return topology.load(name).spec.transports


def test_the_machines_that_were_promised_are_shipped():
    assert sorted(set(PROMISED.split()) - set(NAMES)) == []


@every_machine
def test_a_file_is_short_begins_with_what_it_is_and_has_its_name(name):
    text = text_of(name)
    assert len(text.splitlines()) < 40
    assert re.match(r"# [A-Z].*\n", text)
    assert yaml.safe_load(text)["name"] == topology.load(name).name == name
    assert "shared/" not in text


@every_machine
def test_every_figure_says_where_it_is_from(name):
    figures = topology.load(name).figures
    assert {figure.kind for figure in figures} <= set(KINDS)
    for figure in figures:
        if figure.kind in ("measured", "vendor"):
            assert re.search(r"[/0-9]|\w \w", figure.source), f"{figure.position}: {figure.source}"
    assert all(figure.kind == "defined" for figure in figures) == name.startswith("ideal")


@every_machine
def test_no_hop_is_faster_than_its_links(name):
    for transport in transports(name):
        machine = load(name, transport=transport)
        places = machine.slots[:16]
        for hop in ring_hops(machine, len(places)):
            links = [machine.spec.links[edge.link] for edge in machine.edges(places[hop.rank], places[hop.target]) if edge.link]
            assert 0 < hop.together <= hop.alone * (1 + 1e-12)
            assert hop.alone <= min(max(link.bandwidth, link.reverse or 0.0) for link in links)
            assert 0 <= hop.latency_s < 1


@every_machine
@pytest.mark.parametrize(("mask", "partition"), [(Causal(), "zigzag"), (Full(), "contiguous")], ids=["causal", "full"])
def test_a_small_ring_is_simulated_over_each_transport(name, mask, partition):
    for transport in transports(name):
        machine = load(name, transport=transport)
        ranks = min(8, len(machine.slots))
        table = machine.device(machine.devices[0]).attention[0]
        workload = Workload(q_len=2048 * ranks, heads=2, head_dim=table.head_dim, dtype=table.dtype, mask=mask)
        schedule = Schedule(workload=workload, world_size=ranks, partition=partition)
        timeline = simulate(schedule, machine)
        assert isfinite(timeline.total_s) and timeline.total_s > 0
        assert all(isfinite(event.end_s) and event.end_s >= event.start_s >= 0 for event in timeline.events)
        assert 0 <= exposed_communication_s(schedule, machine) < timeline.total_s
        assert len(timeline.steps()) == ranks


def changed(figure, machine):
    """Another value for a figure, as --set takes it, and whether it is another."""
    if figure.key.rpartition(".")[2] in TABLES:
        return "[[1, 0.25], [1.0e+24, 0.25]]"
    if figure.key.endswith("duplex"):
        return "1.5"
    number, _, unit = figure.text.partition(" ")
    if number in machine.spec.counts or float(number) == 0:
        return figure.text
    return f"{float(number) / 2:.12g} {unit}".strip() if "." in number or unit else f"{-(-int(number) // 2)}"


def of_the_same_kind(machine, one, other):
    """Whether two figures are one, or that of a device and of one `like` it."""
    mine, theirs = one.split("."), other.split(".")
    like = machine.spec.devices[mine[1]].like if mine[0] == "devices" else None
    return one == other or [mine[0], like, *mine[2:]] == theirs


@every_machine
def test_every_figure_can_be_set(name):
    machine = load(name)
    assert machine.figures
    for figure in machine.figures:
        said = f"{figure.key}={changed(figure, machine)}"
        counts = [f"{key}={value}" for key, value in machine.spec.counts.items()]
        after = {one.key: one for one in topology.load(name, [*counts, said]).figures}
        assert after.keys() == {one.key for one in machine.figures}, said
        assert (after[figure.key].kind, after[figure.key].source) == ("guessed", f"what if, --set {said}")
        for one in machine.figures:
            if not of_the_same_kind(machine, one.key, figure.key):
                assert (after[one.key].text, after[one.key].source) == (one.text, one.source), said


@every_machine
def test_its_size_can_be_set(name):
    machine = load(name)
    sizes = [key for key in machine.spec.counts if key in ("nodes", "gpus", "ranks", *"xyz")]
    assert sizes
    for key in sizes:
        more = {other: 2 * machine.spec.counts[other] for other in TOGETHER.get(key, (key,)) if other in machine.spec.counts}
        assert len(load(name, more).slots) == 2 * len(machine.slots)


def rate(name, pair=(0, 1), **choices):
    machine = load(name, **choices)
    return machine.path(machine.slots[pair[0]], machine.slots[pair[1]]).rate(LARGE)


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_pair_of_mi300x_has_one_link_of_seven_however_many_there_are(gpus):
    machine = load("mi300x", {"gpus": gpus})
    assert {hop.together for hop in ring_hops(machine, gpus)} == {64e9 * 0.745}
    assert all(len(machine.edges(machine.slots[0], other)) == 1 for other in machine.slots[1:])


def test_a_table_of_mi300x_has_a_source_of_its_own():
    sources = {figure.key: figure.source for figure in load("mi300x").figures if figure.key.endswith(TABLES)}
    full, masked = sources.values()
    assert "moonmath-ai/amd-kernels" in full and "midiareshadi/attn-dsl-bench" in masked
    table = load("mi300x").spec.devices["mi300x"].attention[0]
    assert dict(table.masked)[134225920] * 1307.4 == pytest.approx(494.4, abs=0.1)
    assert dict(table.full)[17179869184] * 1307.4 == pytest.approx(4 * 16 * 131072**2 * 128 / 258.092e-3 / 1e12, abs=0.1)


def test_the_same_two_gpus_of_alps_get_130_or_24_gb_s_by_their_mpi():
    assert rate("alps-gh200", transport="cray-mpich") == 130.5e9
    assert rate("alps-gh200", transport="openmpi-cxi") == 25e9 * 0.959
    assert (
        rate("alps-gh200", (0, 4), transport="openmpi-cxi") == rate("alps-gh200", (3, 4), transport="cray-mpich") == 25e9 * 0.959
    )
    machine = load("alps-gh200", transport="openmpi-cxi")
    assert machine.path(*machine.slots[:2]).links == ("slingshot",)


@pytest.mark.parametrize(
    ("transport", "pair", "nbytes", "published_us", "within"),
    [
        ("cray-mpich", (0, 1), 2**22, 4194304 / 115214.94, 0.005),
        ("cray-mpich", (0, 1), 2**20, 1048576 / 84937.73, 0.015),
        ("cray-mpich", (0, 4), 2**22, 180.44, 0.015),
        ("cray-mpich", (0, 4), 2**18, 18.07, 0.015),
        ("cray-mpich", (0, 4), 2**13, 7.59, 0.005),
        ("openmpi-cxi", (0, 4), 2**22, 179.65, 0.015),
        ("openmpi-cxi", (0, 1), 2**22, 4194304 / 23989.44, 0.04),
        ("openmpi-cxi", (0, 4), 8, 2.32, 0.01),
    ],
)
def test_alps_agrees_with_the_osu_benchmarks(transport, pair, nbytes, published_us, within):
    machine = load("alps-gh200", transport=transport)
    path = machine.path(*(machine.slots[rank] for rank in pair))
    assert path.seconds(nbytes) == pytest.approx(published_us * 1e-6, rel=within)


WIRED = {(0, 1): 148, (2, 3): 148, (4, 5): 148, (6, 7): 148, (0, 6): 76, (2, 4): 76} | dict.fromkeys(
    [(0, 2), (1, 3), (1, 5), (3, 7), (4, 6), (5, 7)], 38
)


def test_gcds_of_frontier_are_wired_as_the_guide_draws_them():
    machine = load("frontier")
    for one in range(8):
        for other in range(one + 1, 8):
            wires = machine.edges(machine.slots[one], machine.slots[other])
            assert (len(wires) == 3) == ((one, other) in WIRED)
            least = min(wire.rate for wire in wires)
            assert least == pytest.approx(
                WIRED.get((one, other), 76 if (one, other) in ((0, 7), (1, 6), (2, 5), (3, 4)) else 38) * 1e9
            )


def test_each_package_of_frontier_has_its_nic():
    machine = load("frontier")
    for rank in range(8):
        wires = machine.edges(machine.slots[rank], machine.slots[8])
        nic = next(wire.target for wire in wires if machine.graph.vertices[wire.target].kind == "nic")
        assert machine.graph.vertices[nic].name == f"node-0/hsn{rank // 2}"
        assert machine.path(machine.slots[rank], machine.slots[8]).rate(LARGE) == 25e9 * 0.959
    assert len(machine.edges(machine.slots[1], machine.slots[2])) == 4
    ring = load("frontier", {"nodes": 1}, place=[0, 1, 3, 2, 4, 5, 7, 6])
    assert [len(hop.links) for hop in ring_hops(ring, 8)] == [2] * 8


def test_perlmutter_has_the_a100_of_the_dgx_on_a_third_of_its_links():
    assert load("perlmutter").spec.devices["a100"].attention == load("dgx-a100").spec.devices["a100"].attention
    assert rate("perlmutter") == 100e9 * 0.91
    assert rate("perlmutter", (3, 4)) == 25e9 * 0.959


@pytest.mark.parametrize(
    ("name", "tflops", "gbytes_per_s", "memory_gb"),
    [
        ("ideal-a100-nvlink", 312, 300, 80),
        ("ideal-a100-infiniband", 312, 12.5, 80),
        ("ideal-tpu-v3", 123, 112, 16),
        ("ideal-tpu-v4", 275, 268, 32),
        ("ideal-tpu-v5e", 196, 186, 16),
    ],
)
def test_a_hop_of_an_ideal_machine_hides_from_the_papers_block_size(name, tflops, gbytes_per_s, memory_gb):
    machine = load(name)
    device = machine.spec.devices["ideal"]
    assert (device.attention[0].rate, device.memory, rate(name)) == (tflops * 1e12, memory_gb * 1e9, gbytes_per_s * 1e9)
    block = tflops * 1e12 / (gbytes_per_s * 1e9)
    exposed = [exposed_communication_s(ring_of(machine, int(block * factor)), machine) for factor in (0.98, 1.02)]
    assert exposed[0] > 0 == exposed[1]


def ring_of(machine, block):
    workload = Workload(q_len=4 * block, heads=2, head_dim=128, dtype="bfloat16")
    return Schedule(workload=workload, world_size=4, partition="contiguous")


@pytest.mark.parametrize(("name", "links"), [("tpu-v4", 6), ("tpu-v5e", 4)])
def test_a_ring_of_tpus_has_one_link_where_the_paper_reckons_with_all(name, links):
    chips = prod(load(name).spec.counts.values())
    assert {hop.alone for hop in ring_hops(load(name), chips)} == {45e9}
    assert rate(f"ideal-{name}") == pytest.approx(links * 45e9, rel=0.04)


def test_memory_is_what_the_devices_report():
    found = {name: max(d.memory or 0 for d in ringsim.load_topology(name).spec.devices.values()) for name in NAMES}
    assert found["mi300x"] == 206141652992
    assert found["frontier"] == 68702699520
    assert found["alps-gh200"] == 97871 * 2**20
    assert found["perlmutter"] == 40960 * 2**20
    assert found["tpu-v5e"] == 15.75 * 2**30

"""Machines as graphs: the wires of each template, the way of each message, what it shares and gets, and where ranks are."""

from dataclasses import replace
from itertools import pairwise, permutations

import pytest

from ringsim.errors import TopologyError
from ringsim.topology import parse

HEAD = """\
ringsim: 2
name: drawn
source: "defined: for this test"
devices:
  g: {kind: gpu, memory_bandwidth: 1 TB/s}
  nic: {like: g, speed: 0.5}
  b: {like: g, egress: 30 GB/s, ingress: 20 GB/s, inside: fast}
  c: {kind: cpu, cores: 8, ranks: 2, memory_bandwidth: 90 GB/s, inside: fast}
  big: {kind: cpu, cores: 1, ranks: 1024, memory_bandwidth: 1 GB/s}
links:
  fast: {bandwidth: 100 GB/s, latency: 1 us}
  pcie: {bandwidth: 60 GB/s, latency: 2 us, achieved: 0.5}
  net: {bandwidth: 24 GB/s, latency: 5 us}
  tied: {bandwidth: 100 GB/s, latency: 1 us, duplex: 1.5, achieved: 0.8}
  skew: {bandwidth: 80 GB/s, reverse: 20 GB/s, latency: 1 us}
  step: {bandwidth: 50 GB/s, regimes: [{from: 0 B, latency: 2 us, bandwidth: 1 GB/s}, {from: 64 KiB, latency: 9 us}]}
groups:
  n: {join: switch, link: fast, count: 4, of: g, nics: {count: 2, link: pcie}}
  m: {join: switch, link: fast, count: 4, of: g, nics: 2}
  x: {join: mesh, link: fast, count: 2, of: g, nics: 1}
  u: {join: switch, link: fast, count: 2, of: g, uplinks: 3}
"""
OFFLOAD = "transports: {t: {progress: offload}}"


def drawn(machine, transports=OFFLOAD, more="", **choices):
    machine = f"{{{machine}}}" if machine.startswith("join: ") else machine
    return parse(f"{HEAD}machine: {machine}\n{transports}\n{more}\n", "machine.yaml", **choices)


def word(topology, vertex):
    return topology.graph.vertices[vertex].name


def path(topology, source, target):
    return topology.path(*(topology.graph.numbers[name] for name in (source, target)))


def route(topology, source, target):
    edges = topology.edges(*(topology.graph.numbers[name] for name in (source, target)))
    return " > ".join([source, *(word(topology, edge.target) for edge in edges)])


def wires(topology):
    return ", ".join(f"{word(topology, edge.source)} {word(topology, edge.target)}" for edge in topology.graph.edges[::2])


def refusal(*args, **options):
    with pytest.raises(TopologyError) as caught:
        drawn(*args, **options)
    return str(caught.value)


TREE = "join: pcie-tree, link: pcie, of: g, uplink: fast"
CUBE = "g-0 g-4, g-1 g-5, g-2 g-6, g-3 g-7, g-0 g-2, g-1 g-3, g-4 g-6, g-5 g-7, g-0 g-1, g-2 g-3, g-4 g-5, g-6 g-7"
PLATE = "g-0 g-3, g-1 g-4, g-2 g-5, g-0 g-1, g-1 g-2, g-2 g-0, g-3 g-4, g-4 g-5, g-5 g-3"
BOX = "x-{0}/g-0 x-{0}/g-1, x-{0}/g-0 x-{0}/nic-0, x-{0}/g-1 x-{0}/nic-0"
BOXES = ", ".join(map(BOX.format, range(2)))
BOARDED = "u-0/g-0 u-0/switch, u-0/g-1 u-0/switch, u-1/g-0 u-1/switch, u-1/g-1 u-1/switch"
WIRES = [
    ("g", ""),
    ("join: switch, link: fast, count: 3, of: g", "g-0 switch, g-1 switch, g-2 switch"),
    ("join: mesh, link: fast, count: 1, of: g", ""),
    ("join: mesh, link: fast, count: 3, of: g", "g-0 g-1, g-0 g-2, g-1 g-2"),
    ("join: ring, link: fast, count: 1, of: g", ""),
    ("join: ring, link: fast, count: 2, of: g", "g-0 g-1"),
    ("join: ring, link: fast, count: 3, of: g", "g-0 g-1, g-1 g-2, g-2 g-0"),
    ("join: ring, link: fast, count: 5, of: g", "g-0 g-1, g-1 g-2, g-2 g-3, g-3 g-4, g-4 g-0"),
    ("join: torus2d, link: fast, shape: [1, 1], of: g", ""),
    ("join: torus2d, link: fast, shape: [1, 3], of: g", "g-0 g-1, g-1 g-2, g-2 g-0"),
    ("join: torus2d, link: fast, shape: [3, 1], of: g", "g-0 g-1, g-1 g-2, g-2 g-0"),
    ("join: torus2d, link: fast, shape: [2, 2], of: g", "g-0 g-2, g-1 g-3, g-0 g-1, g-2 g-3"),
    ("join: torus2d, link: fast, shape: [2, 3], of: g", PLATE),
    ("join: torus2d, link: fast, shape: [2, 3], of: [g, {count: 5, of: g}]", PLATE),
    ("join: torus3d, link: fast, shape: [2, 2, 2], of: g", CUBE),
    (f"{TREE}, count: 3, per_switch: 2", "g-0 switch-0, g-1 switch-0, switch-0 root-0, g-2 switch-1, switch-1 root-0"),
    (
        f"{TREE}, count: 4, per_switch: 2, roots: 2, socket: net",
        "g-0 switch-0, g-1 switch-0, switch-0 root-0, g-2 switch-1, g-3 switch-1, switch-1 root-1, root-0 root-1",
    ),
    (
        f"{TREE}, count: 2, per_switch: 1, nics: {{count: 1, link: net}}",
        "g-0 switch-0, switch-0 root-0, g-1 switch-1, switch-1 root-0, switch-0 nic-0, switch-1 nic-0",
    ),
    ("join: rails, link: net, count: 2, of: x", f"{BOXES}, x-0/nic-0 rail-0, x-1/nic-0 rail-0"),
    ("join: rails, link: net, spine: net, count: 2, of: g", "g-0 rail-0, g-1 rail-0, rail-0 spine"),
    ("join: fat-tree, link: net, leaf: 2, count: 2, of: g", "g-0 leaf-0, g-1 leaf-0"),
    ("join: fat-tree, link: net, leaf: 2, count: 3, of: g", "g-0 leaf-0, g-1 leaf-0, g-2 leaf-1, leaf-0 spine, leaf-1 spine"),
    ("join: mesh, link: net, count: 2, of: x", f"{BOXES}, x-0/nic-0 x-1/nic-0"),
    ("join: switch, link: net, count: 2, of: u", f"{BOARDED}, u-0/switch switch, u-1/switch switch"),
    ("join: ring, link: net, count: 2, of: u", f"{BOARDED}, u-0/switch u-1/switch"),
    ("join: explicit, members: {a: g, hub: switch, d: g}, connect: [[a, hub, net], [hub, d, net]]", "a hub, hub d"),
    (
        "join: explicit, members: {k: x, d: g}, connect: [[k/nic-0, d, net], {from: d, to: k/g-1, link: net}]",
        "k/g-0 k/g-1, k/g-0 k/nic-0, k/g-1 k/nic-0, k/nic-0 d, d k/g-1",
    ),
    (
        "join: switch, link: net, of: [{name: e, join: explicit, members: {x: g, y: g}, exits: [x, y]}, g]",
        "e-0/x switch, e-0/y switch, g-1 switch",
    ),
    ("join: mesh, link: fast, count: 2, of: g, connect: [[g-1, g-0, net]]", "g-0 g-1, g-1 g-0"),
    (
        "join: switch, link: net, of: [nic, {name: r, join: ring, link: fast, count: 1, of: g, nics: 1}, {count: 2, of: g}]",
        "r-1/g-0 r-1/nic-0, nic-0 switch, r-1/nic-0 switch, g-2 switch, g-3 switch",
    ),
]


@pytest.mark.parametrize(("machine", "expected"), WIRES)
def test_a_template_wires_its_members(machine, expected):
    assert wires(drawn(machine)) == expected


NODE = "join: rails, link: net, count: 2, of: n"
SPINE = "join: rails, link: net, spine: net, count: 2, of: n"
LONG = "join: torus3d, link: fast, shape: [4, 2, 3], of: g"
SOCKETS = f"{TREE}, count: 4, per_switch: 2, roots: 2, socket: net, nics: {{count: 1, link: net}}"
DETOUR = (
    "join: explicit, members: {a: g, d: g, e: g, hub: switch},"
    " connect: [[a, d, fast], [d, e, fast], [a, hub, fast], [hub, e, fast], [d, hub, fast]]"
)
ROUTES = [
    ("join: switch, link: fast, count: 3, of: g", "g-0 > switch > g-2"),
    ("join: mesh, link: fast, count: 3, of: g", "g-2 > g-0"),
    ("join: ring, link: fast, count: 5, of: g", "g-0 > g-1 > g-2", "g-0 > g-4 > g-3", "g-4 > g-0", "g-3 > g-4 > g-0"),
    ("join: ring, link: fast, count: 4, of: g", "g-0 > g-1 > g-2", "g-2 > g-1 > g-0", "g-1 > g-0 > g-3", "g-3 > g-2 > g-1"),
    ("join: torus2d, link: fast, shape: [2, 3], of: g", "g-0 > g-3 > g-4", "g-4 > g-1 > g-0", "g-0 > g-2", "g-0 > g-3 > g-5"),
    (LONG, "g-0 > g-6 > g-9 > g-10", "g-23 > g-5 > g-2 > g-0", "g-0 > g-18", "g-0 > g-6 > g-12", "g-18 > g-0 > g-2"),
    (f"{TREE}, count: 4, per_switch: 2", "g-0 > switch-0 > g-1", "g-0 > switch-0 > root-0 > switch-1 > g-3"),
    (SOCKETS, "g-0 > switch-0 > root-0 > root-1 > switch-1 > g-2"),
    (NODE, "n-0/g-0 > n-0/switch > n-0/g-3"),
    (NODE, "n-0/g-1 > n-0/nic-0 > rail-0 > n-1/nic-0 > n-1/g-0"),
    (NODE, "n-0/g-0 > n-0/switch > n-0/g-2 > n-0/nic-1 > rail-1 > n-1/nic-1 > n-1/g-3"),
    (SPINE, "n-0/g-0 > n-0/nic-0 > rail-0 > spine > rail-1 > n-1/nic-1 > n-1/g-3"),
    (SPINE, "n-0/g-0 > n-0/nic-0 > rail-0 > n-1/nic-0 > n-1/g-1"),
    ("join: ring, link: fast, count: 6, of: g, nics: 1", "g-0 > g-1 > g-2 > g-3"),
    ("join: explicit, members: {a: g, d: g}, nics: {count: 1, link: net}", "a > nic-0 > d"),
    ("join: fat-tree, link: net, leaf: 2, count: 4, of: g", "g-0 > leaf-0 > g-1", "g-1 > leaf-0 > spine > leaf-1 > g-2"),
    ("join: switch, link: net, count: 2, of: u", "u-0/g-0 > u-0/switch > switch > u-1/switch > u-1/g-1"),
    (DETOUR, "a > hub > e", "a > d", "e > hub > a"),
]


@pytest.mark.parametrize(("machine", "route_"), [(machine, each) for machine, *routes in ROUTES for each in routes])
def test_a_message_takes_the_fewest_wires_dimension_by_dimension_and_through_nothing_that_does_not_pass_on(machine, route_):
    stops = route_.split(" > ")
    assert route(drawn(machine), stops[0], stops[-1]) == route_


STRIPED = "join: switch, link: net, count: 2, of: {{name: q, join: mesh, link: fast, count: 4, of: g, nics: {}}}"
WIDE = STRIPED.format("{count: 1, stripe: 4, link: pcie}")
FAT = "join: fat-tree, link: net, leaf: 3, count: 6, of: g, oversubscription: 1.5, trunk: fast"
SLIM = "join: rails, link: net, spine: fast, oversubscription: 4, count: 2, of: m"
TRIPLE = "join: explicit, members: {x: g, y: g}, connect: [{from: x, to: y, link: tied, cables: 3}]"
PAIR = "join: mesh, link: {}, count: 2, of: {}"
CENTRE = "join: switch, link: fast, count: 2, of: g, backplane: 90 GB/s"
ACROSS = "u-0/g-0 > u-0/switch 100, u-0/switch > switch 72, switch > u-1/switch 72, u-1/switch > u-1/g-1 100"
LONGEST = (
    "n-0/g-0 > n-0/nic-0 30, n-0/nic-0 > rail-0 24, rail-0 > spine 48, "
    "spine > rail-1 48, rail-1 > n-1/nic-1 24, n-1/nic-1 > n-1/g-3 30"
)
SHARED = [
    (PAIR.format("fast", "g"), "g-0 g-1", "g-0 > g-1 100", 100),
    (PAIR.format("pcie", "g"), "g-0 g-1", "g-0 > g-1 30", 30),
    (PAIR.format("tied", "g"), "g-0 g-1", "g-0 > g-1 80, g-0 <> g-1 120", 80),
    (PAIR.format("tied", "g"), "g-1 g-0", "g-1 > g-0 80, g-0 <> g-1 120", 80),
    (PAIR.format("skew", "g"), "g-0 g-1", "g-0 > g-1 80", 80),
    (PAIR.format("skew", "g"), "g-1 g-0", "g-1 > g-0 20", 20),
    (PAIR.format("fast", "b"), "b-0 b-1", "b-0 egress 30, b-0 > b-1 100, b-1 ingress 20", 20),
    ("join: mesh, link: fast, of: [b, g]", "b-0 g-1", "b-0 egress 30, b-0 > g-1 100", 30),
    ("join: mesh, link: fast, of: [b, g]", "g-1 b-0", "g-1 > b-0 100, b-0 ingress 20", 20),
    (TRIPLE, "x y", "x > y 240, x <> y 360", 80),
    ("join: switch, link: skew, count: 2, of: g", "g-0 g-1", "g-0 > switch 80, switch > g-1 20", 20),
    (CENTRE, "g-1 g-0", "g-1 > switch 100, switch backplane 90, switch > g-0 100", 90),
    ("join: switch, link: net, count: 2, of: u", "u-0/g-0 u-1/g-1", ACROSS, 24),
    (WIDE, "q-0/g-0 q-1/g-1", "q-0/g-0 > q-0/nic-0 30, q-0/nic-0 > switch 96, switch > q-1/nic-0 96, q-1/nic-0 > q-1/g-1 30", 30),
    (WIDE.replace(", link: pcie", ""), "q-0/g-0 q-1/g-3", "q-0/nic-0 > switch 96, switch > q-1/nic-0 96", 96),
    (SPINE, "n-0/g-0 n-1/g-3", LONGEST, 24),
    (SLIM, "m-0/g-0 m-1/g-3", "m-0/nic-0 > rail-0 24, rail-0 > spine 12, spine > rail-1 12, rail-1 > m-1/nic-1 24", 12),
    (FAT, "g-0 g-5", "g-0 > leaf-0 24, leaf-0 > spine 48, spine > leaf-1 48, leaf-1 > g-5 24", 24),
    (FAT.replace("1.5", "6"), "g-0 g-5", "g-0 > leaf-0 24, leaf-0 > spine 12, spine > leaf-1 12, leaf-1 > g-5 24", 12),
]


@pytest.mark.parametrize(("machine", "ends", "expected", "rate"), SHARED)
def test_a_message_shares_what_it_crosses_and_gets_one_cable_of_it_or_all_that_are_striped(machine, ends, expected, rate):
    topology = drawn(machine)
    found = [topology.graph.resources[number] for number in path(topology, *ends.split()).resources]
    assert ", ".join(f"{resource.name} {resource.capacity / 1e9:g}" for resource in found) == expected
    assert path(topology, *ends.split()).rate(1) == pytest.approx(rate * 1e9, rel=1e-12)


AFFINITY = "{{count: 2, affinity: {}}}"


@pytest.mark.parametrize(
    ("nics", "used"),
    [
        *[("2", [0, 0, 1, 1]), ("4", [0, 1, 2, 3]), ("3", [0, 0, 1, 2]), ("1", [0, 0, 0, 0])],
        *[(AFFINITY.format(used), used) for used in ([0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1])],
    ],
)
def test_devices_share_nics_in_equal_blocks_or_as_affinity_says(nics, used):
    topology = drawn(STRIPED.format(nics))
    leaving = [route(topology, f"q-0/g-{index}", "q-1/g-0").split(" > ")[1] for index in range(4)]
    assert leaving == [f"q-0/nic-{nic}" for nic in used]


def test_parts_of_a_node_know_their_host():
    topology = drawn("join: switch, link: net, of: [n, c, {join: mesh, link: fast, count: 2, of: c, nics: 1}]")
    hosts = {vertex.name: vertex.host for vertex in topology.graph.vertices}
    assert {hosts[name] for name in hosts if name.startswith("n-0/") and "switch" not in name} == {"n-0"}
    assert (hosts["c-1"], hosts["mesh-2/c-0"], hosts["mesh-2/c-1"], hosts["switch"]) == ("c-1", "mesh-2", "mesh-2", "")


def test_replace_puts_one_device_in_the_place_of_another():
    topology = drawn(NODE, more="replace: {n-1/g-2: nic, n-0/g-0: b}")
    kinds = {word(topology, number): topology.graph.vertices[number].device for number in topology.devices}
    assert kinds.pop("n-1/g-2") == "nic"
    assert kinds.pop("n-0/g-0") == "b"
    assert set(kinds.values()) == {"g"}
    assert topology.device(topology.graph.numbers["n-1/g-2"]).speed == 0.5
    assert path(topology, "n-0/g-0", "n-0/g-1").rate(1) == 30e9, "its egress"


TWO = "join: explicit, members: {x: g, m: switch, y: g}, connect: [[x, m, step], [m, y, net]]"
OWN = "[{from: 0 B, latency: 1 us}, {from: 1 MB, latency: 8 us, bandwidth: 5 GB/s}]"
PIECES = [
    ("t: {progress: offload}", {0: (7e-6, 1e9), 65535: (7e-6, 1e9), 65536: (14e-6, 24e9), 2**40: (14e-6, 24e9)}),
    ("t: {progress: offload, paths: {step: {latency: 3 us}}}", {0: (3e-6, 1e9), 65535: (3e-6, 1e9), 65536: (3e-6, 24e9)}),
    ("t: {progress: offload, paths: {net: {bandwidth: 2 GB/s}}}", {65535: (7e-6, 1e9), 65536: (14e-6, 2e9)}),
    ("t: {progress: offload, paths: {net: {latency: 3 us}, step: {latency: 4 us}}}", {0: (4e-6, 1e9)}),
    ("t: {progress: offload, paths: {step: {latency: 4 us}, net: {latency: 3 us}}}", {0: (3e-6, 1e9)}),
    ("t: {progress: offload, paths: {step: {latency: 4 us}, net: {look: 3 us}, fast: {latency: 9 us}}}", {0: (7e-6, 1e9)}),
    (
        f"t: {{progress: offload, paths: {{net: {{regimes: {OWN}}}}}}}",
        {0: (1e-6, 1e9), 65535: (1e-6, 1e9), 65536: (1e-6, 24e9), 999_999: (1e-6, 24e9), 1_000_000: (8e-6, 5e9)},
    ),
]


@pytest.mark.parametrize(("transport", "expected"), PIECES)
def test_latency_and_rate_change_where_a_regime_begins_and_the_last_path_that_is_crossed_decides(transport, expected):
    found = path(drawn(TWO, f"transports: {{{transport}}}"), "x", "y")
    assert {nbytes: (found.latency_s(nbytes), found.rate(nbytes)) for nbytes in expected} == {
        nbytes: pytest.approx(piece, rel=1e-12) for nbytes, piece in expected.items()
    }
    for nbytes, (latency_s, rate) in expected.items():
        assert found.seconds(nbytes) == pytest.approx(latency_s + nbytes / rate, rel=1e-12)
    assert found.links == ("step", "net")


def test_a_path_does_as_its_transport_except_where_its_link_says_otherwise():
    text = "progress: thread, drives: both, look: 3 us, eager: 8 kB, device_share: 0.1, slowed_by_compute: 0.2"
    other = "progress: offload, drives: sender, look: 0 s, eager: 0 B, device_share: 0, slowed_by_compute: 0"
    topology = drawn(NODE, f"transports: {{t: {{{text}, paths: {{net: {{{other}}}}}}}}}")
    inside, across = path(topology, "n-0/g-0", "n-0/g-1"), path(topology, "n-0/g-0", "n-1/g-0")
    said = [[p.progress, p.drives, p.look_s, p.eager_nbytes, p.device_share, p.slowed_by_compute] for p in (inside, across)]
    assert said == [["thread", "both", 3e-6, 8e3, 0.1, 0.2], ["offload", "sender", 0, 0, 0, 0]]
    assert (inside.copied, across.copied) == (True, False)


def test_a_transport_avoids_links_and_goes_around():
    both = "transports: {t: {progress: offload}, around: {progress: offload, avoid: [fast]}}"
    machine = "join: mesh, link: fast, count: 2, of: g, nics: {count: 1, link: net}"
    assert route(drawn(machine, both, transport="t"), "g-0", "g-1") == "g-0 > g-1"
    assert route(drawn(machine, both, transport="around"), "g-0", "g-1") == "g-0 > nic-0 > g-1"


def test_two_ranks_on_a_device_need_a_link_inside_it():
    topology = drawn("join: mesh, link: fast, of: [b, g]", place=[0, 0, 1])
    b, g = topology.devices
    assert (topology.path(b, b).links, topology.path(b, b).resources, topology.path(b, b).rate(1)) == (("fast",), (), 100e9)
    with pytest.raises(TopologyError, match=r"two ranks share g-1, which names no link between them: set devices\.g\.inside"):
        topology.path(g, g)


def test_a_topology_that_is_given_another_transport_says_where_that_one_has_no_route():
    topology = drawn("join: switch, link: fast, count: 2, of: g")
    avoiding = topology.transport.model_copy(update={"avoid": ("fast",)})
    changed = replace(topology, spec=topology.spec.model_copy(update={"transports": {"t": avoiding}}), _paths={})
    with pytest.raises(TopologyError, match="drawn: no route from g-0 to g-1 over links that transport 't' uses: join them"):
        changed.path(*changed.devices)


CPUS = "join: mesh, link: fast, count: 3, of: c"
PLACES = [
    (CPUS, "block", 6, "c-0 c-0 c-1 c-1 c-2 c-2"),
    (CPUS, "block", 4, "c-0 c-0 c-1 c-1"),
    (CPUS, "block", 9, "c-0 c-0 c-0 c-1 c-1 c-1 c-2 c-2 c-2"),
    (CPUS, "block", 7, "c-0 c-0 c-0 c-1 c-1 c-2 c-2"),
    (CPUS, "round-robin", 5, "c-0 c-1 c-2 c-0 c-1"),
    (CPUS, "round-robin", 8, "c-0 c-1 c-2 c-0 c-1 c-2 c-0 c-1"),
    (CPUS, [2, "c-0", 2], 3, "c-2 c-0 c-2"),
    (BOXED := "join: mesh, link: net, count: 2, of: x", "block", 3, "x-0/g-0 x-0/g-1 x-1/g-0"),
    (BOXED, "round-robin", 4, "x-0/g-0 x-1/g-0 x-0/g-1 x-1/g-1"),
    (BOXED, ["x-1/g-1", 0], 2, "x-1/g-1 x-0/g-0"),
    ("join: switch, link: net, of: [x, g, g, x]", "round-robin", 6, "x-0/g-0 g-1 x-3/g-0 x-0/g-1 g-2 x-3/g-1"),
]


@pytest.mark.parametrize(("machine", "place", "world_size", "expected"), PLACES)
def test_ranks_are_placed_in_blocks_in_turn_over_hosts_or_as_listed(machine, place, world_size, expected):
    topology = drawn(machine, place=place)
    assert [word(topology, number) for number in topology.place(world_size)] == expected.split()


@pytest.mark.parametrize(("machine", "place", "room"), [(BOXED, "block", 4), (BOXED, "round-robin", 4), (CPUS, [0, 1], 2)])
def test_more_ranks_than_there_is_room_for_are_refused_where_they_cannot_share(machine, place, room):
    topology = drawn(machine, place=place)
    with pytest.raises(TopologyError, match=rf"drawn has room for {room} ranks, not {room + 1}: enlarge it with --set \(count\)"):
        topology.place(room + 1)


EVEN = ["join: ring, link: fast, count: 6, of: g", LONG, NODE, SPINE, FAT, WIDE, SOCKETS, BOXED]


@pytest.mark.parametrize("machine", EVEN)
def test_a_machine_that_is_alike_everywhere_has_paths_alike_both_ways(machine):
    topology = drawn(machine)
    for source, target in permutations(topology.devices, 2):
        there, back = topology.edges(source, target), topology.edges(target, source)
        assert sorted(edge.link or "" for edge in there) == sorted(edge.link or "" for edge in back)
        assert all(one.target == other.source for one, other in pairwise(there))
        go, come = topology.path(source, target), topology.path(target, source)
        assert go.latencies_s + go.rates == pytest.approx(come.latencies_s + come.rates, rel=1e-12)


LINKS = "fast, pcie, net, tied, skew, step"
NUMA, IN = "join: pcie-tree, link: net, count: 8, of: g, uplink: net, per_switch: 2", "join: switch, link: net, count: 2, of"
TEMPLATES = "switch, mesh, ring, torus2d, torus3d, pcie-tree, rails, fat-tree, explicit"
ONLY_LISTED = "`count` and `of` alone stand only in a list of members: this needs a `join`"
SOCKET = ": `socket` names the link between root complexes: needed with `roots` above 1, and only then"
MACHINES = [
    ("[g, g]", ": a list of members needs a `join` that says how they are joined"),
    ("{count: 2, of: g}", f": {ONLY_LISTED}"),
    ("join: ring, link: net, of: [g, {count: 2, of: {count: 2, of: g}}]", f".of.1.of: {ONLY_LISTED}"),
    ("join: explicit, members: {a: switch}", ": the machine has no device"),
    ("nic-0", ": no device or group 'nic-0'; did you mean 'nic'? allowed: g, c, big, nic, b, n, m, x, u"),
    ("5", ": found 5, expected a name or keys and values"),
    ("{link: net}", ": key 'join' is missing"),
    ("join: bus", f".join: 'bus' is unknown; allowed: {TEMPLATES}"),
    ("join: [repeat]", f".join: ['repeat'] is unknown; allowed: {TEMPLATES}"),
    (f"{IN}: g, connect: [[g-0, g-1]]", ".connect.0: a connection in short form is [from, to, link], found 2 items"),
    (f"{IN}: g, connect: [[g-0, g-9, net]]", ".connect.0: no part 'g-9' here; did you mean 'g-1'? allowed: g-0, g-1, switch"),
    (f"{IN}: g, connect: [[g-0, g-0, net]]", ".connect.0: 'g-0' is connected to itself"),
    (f"{IN}: g, connect: [[g-0, g-1, v]]", f".connect.0: no link 'v'; allowed: {LINKS}"),
    (f"{IN}: g, connect: [5]", ".connect.0: Input should be keys and values (found 5)"),
    (f"{IN}: g, nics: 1, uplinks: 1", ": a group is left by `exits`, by `nics` or by `uplinks`: give one of them"),
    (f"{IN}: {{{IN}: g}}", ".of: a group within another says how it is left: `nics`, the `exits`"),
    (f"{IN}: {{join: explicit, members: {{a: g}}}}", ".of: a group within another says how it is left: `nics`, the `exits`"),
    ("join: mesh, link: net, count: 2, of: g, uplinks: 1", ": `uplinks` leave from a group's one switch, and this has none"),
    (f"{NUMA}, roots: 2, socket: net, uplinks: 1", ": `uplinks` leave from a group's one switch, and this has 2: give `nics`"),
    ("join: explicit, members: {a: g}, exits: [a, b]", ".exits.1: no part 'b' here; allowed: a"),
    ("join: torus2d, link: net, of: g, shape: [2]", ".shape: item 1 is missing"),
    ("join: torus2d, link: net, of: g, shape: [2, 2], count: 4", ": `shape` says how many members there are: leave `count` out"),
    ("join: torus2d, link: net, of: [g, g, g], shape: [2, 2]", ".shape: 2 x 2 is 4 members, and there are 3"),
    (
        "join: mesh, link: net, of: [g, {join: mesh, link: net, of: [g, g], nics: 2}]",
        ".of: members joined one to one have equally m",
    ),
    (f"{NUMA}, roots: 2", SOCKET),
    (f"{NUMA}, socket: net", SOCKET),
    (f"{NUMA}, roots: 3, socket: net", ".roots: 4 switches do not divide among 3 root complexes"),
    (f"{NUMA}, roots: 2, socket: v", f".socket: no link 'v'; allowed: {LINKS}"),
    (
        "join: rails, link: net, count: 2, of: g, oversubscription: 2",
        ": `oversubscription` is that of the `spine`, and there is none",
    ),
    ("join: rails, link: net, count: 2, of: g, spine: v", f".spine: no link 'v'; allowed: {LINKS}"),
    ("join: fat-tree, link: net, count: 2, of: g, leaf: 1, trunk: v", f".trunk: no link 'v'; allowed: {LINKS}"),
    ("join: switch, link: net, count: 2, of: nic, nics: 1", ".nics: two parts have the name 'nic-0': give a group a `name`"),
    ("join: ring, link: net, count: 1048576, of: g", ".of: the machine has more than 131072 devices, NICs and switches"),
    ("join: mesh, link: net, count: 1025, of: g", ".link: the machine has more than 524288 wires"),
    ("join: ring, link: net, count: 1025, of: big", ".of: the machine has room for more than 1048576 ranks"),
    (
        "join: explicit, members: {x: g, y: g}",
        ": x and y cannot reach each other: no link joins them, and no switch or NIC is in reach",
    ),
    ("join: explicit, members: {x: g, y: g, z: g}, connect: [[x, y, net], [y, z, net]]", ": x and z cannot reach each other"),
    ("join: explicit, members: {x: g, m: switch, y: g}, connect: [[x, m, net]]", ": x and y cannot reach each other"),
    ("join: mesh, link: net, count: 2, of: m", ": m-0/g-0 and m-1/g-2 cannot reach each other: "),
]


@pytest.mark.parametrize(("machine", "message"), MACHINES)
def test_a_machine_that_cannot_be_built_is_refused_at_the_group_at_fault(machine, message):
    assert refusal(machine).startswith(f"machine.yaml:22: machine{message}")

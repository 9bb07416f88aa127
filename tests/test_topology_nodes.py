"""Nodes as they are built: several fabrics, NICs of their own, groups within groups; and settings that go wrong."""

import numpy as np
import pytest

from ringsim.errors import TopologyError
from ringsim.topology import load, parse

TEXT = """\
ringsim: 2
name: nodes
source: "defined: round numbers"
devices:
  gpu: {kind: gpu, memory_bandwidth: 1 TB/s}
  host: {kind: cpu, cores: 4, ranks: 2, inside: pcie, memory_bandwidth: 100 GB/s}
links:
  nvlink: {bandwidth: 300 GB/s, latency: 1 us}
  pcie: {bandwidth: 32 GB/s, latency: 1 us}
  upi: {bandwidth: 20 GB/s, latency: 1 us}
  net: {bandwidth: 25 GB/s, latency: 1 us}
transports:
  direct: {progress: offload}
"""
TREE = "join: pcie-tree, link: pcie, per_switch: 2, uplink: pcie, roots: 2, socket: upi, count: 8, of: gpu, name: node"


def machine(text, settings=(), **choices):
    return parse(TEXT + f"machine: {{{text}}}\n", "nodes.yaml", settings, **choices)


def refusal(text, settings=(), **choices):
    with pytest.raises(TopologyError) as caught:
        machine(text, settings, **choices)
    return str(caught.value)


def route(on, one, other):
    numbers = on.graph.numbers
    return [on.graph.vertices[edge.target].name for edge in on.edges(numbers[one], numbers[other])][:-1]


def rate(on, one, other):
    return on.path(on.graph.numbers[one], on.graph.numbers[other]).rate(2**30)


@pytest.mark.parametrize("affinity", [None, [7, 6, 5, 4, 3, 2, 1, 0]])
@pytest.mark.parametrize("join", ["switch", "rails"])
def test_each_gpu_of_a_pcie_tree_leaves_by_its_own_nic(affinity, join):
    nics = f"{{count: 8, link: pcie, affinity: {affinity}}}" if affinity else "{count: 8, link: pcie}"
    on = machine(f"join: {join}, link: net, count: 2, of: {{{TREE}, nics: {nics}}}")
    for gpu in range(8):
        nic = affinity[gpu] if affinity else gpu
        centre = f"rail-{nic}" if join == "rails" else "switch"
        way = route(on, f"node-0/gpu-{gpu}", f"node-1/gpu-{gpu}")
        assert way == [
            f"node-0/switch-{gpu // 2}",
            f"node-0/nic-{nic}",
            centre,
            f"node-1/nic-{nic}",
            f"node-1/switch-{gpu // 2}",
        ]


def test_of_two_fabrics_between_the_same_gpus_the_wider_is_taken():
    on = machine(f"join: switch, link: net, count: 2, of: {{{TREE}, nics: 8, also: [{{join: switch, link: nvlink}}]}}")
    assert {rate(on, "node-0/gpu-0", f"node-0/gpu-{other}") for other in range(1, 8)} == {300e9}
    assert route(on, "node-0/gpu-0", "node-0/gpu-1") == ["node-0/nvlink"]
    bridged = machine(f"{TREE}, also: [{{join: mesh, link: upi}}]")
    assert route(bridged, "gpu-0", "gpu-7") == []
    pcie = machine(TREE, {"transports.direct.avoid": ["nvlink"]})
    assert route(pcie, "gpu-0", "gpu-7") == ["switch-0", "root-0", "root-1", "switch-3"]


def test_a_trunk_carries_what_the_members_of_its_own_leaf_bring():
    small = "{join: switch, link: nvlink, count: 2, of: gpu, nics: 1, name: small}"
    large = "{join: switch, link: nvlink, count: 4, of: gpu, nics: 4, name: large}"
    on = machine(f"join: fat-tree, link: net, leaf: 1, of: [{small}, {large}]")
    trunks = {found.name: found.capacity for found in on.graph.resources if "spine" in found.name}
    assert trunks["leaf-0 > spine"] == 25e9
    assert trunks["leaf-1 > spine"] == 100e9
    half = machine("join: fat-tree, link: net, leaf: 2, count: 3, of: gpu")
    trunks = {found.name: found.capacity for found in half.graph.resources if "spine" in found.name}
    assert (trunks["leaf-0 > spine"], trunks["leaf-1 > spine"]) == (50e9, 25e9)


@pytest.mark.parametrize("join", ["switch", "fat-tree, leaf: 1", "rails, spine: net"])
def test_a_striped_nic_keeps_its_cables_across_trunks(join):
    node = "{join: switch, link: nvlink, count: 2, of: gpu, nics: {count: 1, stripe: 4}, name: node}"
    on = machine(f"join: {join}, link: net, count: 2, of: {node}")
    assert rate(on, "node-0/gpu-0", "node-1/gpu-1") == 100e9


def test_a_message_has_its_stripe_over_uplinks_too():
    node = "{join: switch, link: nvlink, count: 2, of: gpu, nics: {count: 1, stripe: 4}, name: node}"
    for uplinks, expected in ((1, 25e9), (4, 100e9), (8, 100e9)):
        pod = f"{{join: switch, link: net, count: 2, of: {node}, uplinks: {uplinks}, name: pod}}"
        on = machine(f"join: switch, link: net, count: 2, of: {pod}")
        assert rate(on, "pod-0/node-0/gpu-0", "pod-1/node-1/gpu-1") == expected


@pytest.mark.parametrize("way", ["exits: [switch]", "uplinks: 2"])
def test_boards_within_a_node_meet_inside_it(way):
    board = f"{{join: switch, link: nvlink, count: 2, of: gpu, {way}, name: board}}"
    join = "mesh" if "exits" in way else "switch"
    node = f"{{join: {join}, link: upi, count: 2, of: {board}, nics: {{count: 1, link: pcie}}, name: node}}"
    on = machine(f"join: switch, link: net, count: 2, of: {node}", place="round-robin")
    between = route(on, "node-0/board-0/gpu-0", "node-0/board-1/gpu-0")
    assert not any("nic" in name for name in between)
    names = [on.graph.vertices[number].name for number in on.place(4)]
    assert [name.split("/")[0] for name in names] == ["node-0", "node-1", "node-0", "node-1"]


def test_a_plain_nic_is_no_way_round_within_its_node():
    on = machine(
        "join: explicit, members: {a: gpu, b: gpu, r: switch, s: switch, n: nic}, "
        "connect: [[a, r, pcie], [b, s, pcie], [r, s, upi], [a, n, pcie], [b, n, pcie]]"
    )
    assert route(on, "a", "b") == ["r", "s"]


def test_the_nics_of_a_pcie_tree_of_groups_hang_on_its_switches():
    pair = "{join: switch, link: nvlink, count: 2, of: gpu, uplinks: 1, name: pair}"
    node = f"{{join: pcie-tree, link: pcie, per_switch: 1, uplink: pcie, count: 4, of: {pair}, nics: 4, name: node}}"
    on = machine(f"join: switch, link: net, count: 2, of: {node}")
    way = route(on, "node-0/pair-2/gpu-1", "node-1/pair-2/gpu-1")
    assert way[:3] == ["node-0/pair-2/switch", "node-0/switch-2", "node-0/nic-2"]


def test_a_second_mesh_joins_members_nic_to_nic():
    node = "{join: switch, link: nvlink, count: 2, of: gpu, nics: 2, name: node}"
    on = machine(f"join: rails, link: net, count: 3, of: {node}, also: [{{join: mesh, link: upi}}]")
    wires = {found.name for found in on.graph.resources if "nic" in found.name and ">" in found.name and "rail" not in found.name}
    assert "node-0/nic-0 > node-1/nic-0" in wires
    assert not any("nic-0 >" in name and name.endswith("nic-1") for name in wires)


def test_a_mesh_of_leaf_switches_is_left_by_the_exits_that_it_names():
    leaf = "{join: switch, link: net, count: 2, of: gpu, uplinks: 2, name: leaf}"
    group = f"{{join: mesh, link: net, count: 3, of: {leaf}, exits: [leaf-0/switch, leaf-1/switch, leaf-2/switch], name: group}}"
    on = machine(f"join: mesh, link: net, count: 2, of: {group}")
    assert route(on, "group-0/leaf-0/gpu-0", "group-0/leaf-2/gpu-1") == ["group-0/leaf-0/switch", "group-0/leaf-2/switch"]
    across = route(on, "group-0/leaf-0/gpu-0", "group-1/leaf-2/gpu-1")
    assert across[0] == "group-0/leaf-0/switch"
    assert across[-1] == "group-1/leaf-2/switch"
    assert len(across) == 3


def test_explicit_members_need_no_exit_and_may_be_plain_switches_and_nics():
    inner = "{join: switch, link: nvlink, count: 2, of: gpu}"
    on = machine(
        f"join: explicit, members: {{a: {inner}, b: gpu, n: nic, s: switch}}, "
        "connect: [[a/gpu-0, n, pcie], [n, s, net], [b, s, net], [a/gpu-1, s, net]]"
    )
    assert route(on, "a/gpu-0", "b") == ["n", "s"]
    assert on.graph.vertices[on.graph.numbers["n"]].kind == "nic"
    assert "did you mean 'switch'? allowed: gpu, host, switch, nic" in refusal("join: explicit, members: {a: gpu, b: swtich}")


def test_round_robin_needs_hosts_to_go_round():
    message = refusal("join: switch, link: net, count: 4, of: gpu", place="round-robin")
    assert message.startswith("--place round-robin: place: round-robin goes over hosts")
    hosts = machine("join: switch, link: net, count: 2, of: host", place="round-robin")
    assert [hosts.graph.vertices[number].name for number in hosts.place(4)] == ["host-0", "host-1", "host-0", "host-1"]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{join: switch, link: nett, count: 2, of: gpu}", "groups.unused.link: no link 'nett'; did you mean 'net'?"),
        ("{join: switch, link: net, count: 2, of: gpuu}", "groups.unused.of: no device or group 'gpuu'; did you mean 'gpu'?"),
        ("{join: switch, link: net, of: [gpu, gpo]}", "groups.unused.of.1: no device or group 'gpo'"),
        ("{join: switch, link: net, count: 2, of: gpu, nics: {count: 1, link: p}}", "groups.unused.nics.link: no link 'p'"),
        ("{join: switch, link: net, count: 2, of: gpu, also: [{join: mesh, link: p}]}", "groups.unused.also.0.link: no link 'p'"),
        ("{join: switch, link: net, count: 2, of: gpu, connect: [[a, b, p]]}", "groups.unused.connect.0.link: no link 'p'"),
        ("{join: explicit, members: {a: x}}", "groups.unused.members.a: no device or group 'x'"),
    ],
)
def test_what_a_group_names_must_be_there_though_nothing_uses_the_group(group, message):
    with pytest.raises(TopologyError) as caught:
        parse(TEXT + f"groups:\n  unused: {group}\nmachine: gpu\n", "nodes.yaml")
    assert f": {message}" in str(caught.value)
    assert str(caught.value).startswith("nodes.yaml:15: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["links.nett.latency=1us"], "--set links.nett.latency=1us: no link 'nett'; did you mean 'net'?"),
        (["groups.a.count=4"], "--set groups.a.count=4: no group 'a'; allowed: none"),
        (["devices.gpo.speed=2"], "--set devices.gpo.speed=2: no device 'gpo'; did you mean 'gpu'?"),
        (["links.net.duplex=null"], "--set links.net.duplex=null: nothing to remove: there is no links.net.duplex"),
        (["links.net.bandwidth=10 Gbps"], "'Gbps' is no unit of bandwidth; did you mean 'Gbit/s'? allowed: B/s"),
        (["links.net.bandwidth=10 Gb/s"], "did you mean 'Gbit/s'?"),
        (["links.net.bandwidth=10 GBps"], "did you mean 'GB/s'?"),
        (["links.net.bandwidth=0.5 B/s"], "Input should be greater than or equal to 1"),
        ({3: 1}, "settings: 3 is no key such as 'nodes'"),
    ],
)
def test_a_setting_that_goes_wrong_says_what_there_is(settings, message):
    assert message in refusal("join: switch, link: net, count: 4, of: gpu", settings)


def test_settings_may_remove_and_may_be_python_values():
    text = "join: switch, link: net, count: 4, of: gpu"
    on = machine(text, ["links.net.achieved=0.5", "links.net.achieved=null"])
    assert on.spec.links["net"].achieved == 1
    assert len(machine(text, {"machine.count": np.int64(3)}).devices) == 3
    assert machine(text, {"place": (2, 1)}).place(2) == machine(text, place=(2, 1)).place(2)


def test_an_item_of_a_list_that_was_set_has_the_source_of_the_setting():
    text = "join: switch, link: net, count: 4, of: gpu"
    table = "{dtype: float32, head_dim: 64, rate: 1 TFLOP/s, overhead: 1 us, micro_tile: {q_rows: 1, k_rows: 1, edge_rows: 1}"
    table += ", full: [[1, 1.0]], masked: [[1, 1.0]]}"
    first = machine(text, [f"devices.gpu.attention=[{table}]"])
    again = machine(text, [f"devices.gpu.attention=[{table}]", f"devices.gpu.attention.0={table.replace('1 us', '2 us')}"])
    for on, said in ((first, "devices.gpu.attention=["), (again, "devices.gpu.attention.0={")):
        found = [figure for figure in on.figures if ".attention.0." in figure.key]
        assert len(found) == 4
        assert all(said in figure.source and figure.kind == "guessed" for figure in found)


BASE = "ringsim: 2\nname: base\n{source}devices:\n  gpu: {{kind: gpu, memory_bandwidth: 1 TB/s{own}}}\n"
BASE += "transports: {{direct: {{progress: offload}}}}\nmachine: gpu\n"
TOP = "ringsim: 2\nname: top\nsource: 'vendor: its datasheet'\nextends: base.yaml\ndevices: {gpu: {source: 'measured: me'}}\n"


@pytest.mark.parametrize(
    ("source", "own", "line", "found"),
    [
        ("", "", 4, "found ''"),
        ("source: somebody said\n", "", 5, "found 'somebody said'"),
        ("source: 'vendor: x'\n", ", source: 'heard: y'", 5, "found 'heard: y'"),
    ],
)
def test_a_source_further_up_does_not_speak_for_the_figures_of_a_file_below(source, own, line, found, tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.format(source=source, own=own))
    (tmp_path / "top.yaml").write_text(TOP)
    with pytest.raises(TopologyError) as caught:
        load(tmp_path / "top.yaml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/base.yaml:{line}: devices.gpu.memory_bandwidth: a source says what kind it is")
    assert message.endswith(found)


def test_a_figure_that_a_file_below_has_sourced_keeps_that_source(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.format(source="source: 'guessed: base'\n", own=""))
    (tmp_path / "top.yaml").write_text(TOP)
    (figure,) = load(tmp_path / "top.yaml").figures
    assert (figure.kind, figure.source, figure.position) == ("guessed", "base", f"{tmp_path}/base.yaml:5")

"""What a machine says about itself, as YAML: wires, figures with their source, and exactly what stays unknown."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from ringsim import importing, topology, yaml_source
from ringsim.errors import TopologyError
from ringsim.importing import compact, reading
from ringsim.topology.schema import schema
from ringsim.topology.unknowns import unknowns

DATA = Path(__file__).parent / "data" / "import"
NVLINK = {"smi-nvswitch.txt": "switch", "smi-mesh.txt": "mesh"}
ALL = sorted(path.name for path in DATA.iterdir())
VALUES = {"bandwidth": "40 GB/s", "latency": "1 us", "memory_bandwidth": "2 TB/s", "progress": "offload"}
GPU, MPI = "devices.gpu.memory_bandwidth", "transports.mpi.progress"


def imported(name, **options):
    return importing.read(DATA / name, nvlink=NVLINK.get(name), **options)


def finished(name, settings=(), **options):
    """The machine, with 40 GB/s and 1 us wherever the file says nothing."""
    made = imported(name, **options)
    values = {key: VALUES[key.rpartition(".")[2]] for key in made.unknown}
    return topology.parse(made.text, name, values | dict(settings))


def route(machine, a, b):
    """The links between two devices, by index, and what lies between."""
    ends = machine.devices[a], machine.devices[b]
    path = machine.path(*ends)
    return [edge.link for edge in machine.edges(*ends)], [machine.graph.vertices[number].name for number in path.vertices]


def keys(*links):
    return {GPU, MPI, *(f"links.{link}" for link in links)}


UNKNOWN = {
    "smi-mesh.txt": keys("nvlink.bandwidth", "nvlink.latency"),
    "smi-pcie.txt": keys(
        *(f"{link}.{what}" for link in ("pcie-gpu", "pcie-nic", "pcie-uplink", "socket") for what in ("bandwidth", "latency"))
    ),
    "nccl-nvswitch.xml": keys(
        "pcie.latency", "socket.bandwidth", "socket.latency", "nvlink.bandwidth", "nvlink.latency", "network.latency"
    ),
    "nccl-mesh.xml": keys(
        *(f"pcie-{speed}.latency" for speed in ("15_75", "7_877", "8")),
        *(f"{link}.{what}" for link in ("socket", "nvlink-1", "nvlink-2", "host-nic") for what in ("bandwidth", "latency")),
        "network.latency",
    ),
    "hwloc-v2-nvswitch.xml": keys(
        "pcie-63_02.latency", "pcie-31_51.latency", "socket.bandwidth", "socket.latency", "nvlink.latency"
    ),
    "hwloc-v3-xgmi.xml": keys("pcie.latency", "numa.bandwidth", "numa.latency", "xgmi-200.latency", "xgmi-50.latency"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_exactly_what_the_file_does_not_say_is_unknown(name):
    made = imported(name)
    assert set(made.unknown) == UNKNOWN[name]
    with pytest.raises(TopologyError) as caught:
        topology.parse(made.text, "imported.yaml")
    lines = str(caught.value).splitlines()
    assert re.fullmatch(rf"imported\.yaml:\d+: {len(made.unknown)} figures are unknown:", lines[0])
    listed = dict(re.fullmatch(r"  (\S+)   \(imported\.yaml:(\d+)\)", line).groups() for line in lines[1 : len(made.unknown) + 1])
    assert set(listed) == UNKNOWN[name]
    text = made.text.splitlines()
    assert all("unknown" in text[int(line) - 1] for line in listed.values())
    assert "--set KEY=VALUE" in lines[-3]


@pytest.mark.parametrize("name", ALL)
def test_every_figure_that_is_known_has_the_file_as_its_source(name):
    for figure in finished(name).figures:
        assert figure.kind in ("measured", "vendor", "guessed")
        if figure.kind == "guessed":
            assert figure.source.startswith("what if, --set")
        else:
            assert name in figure.source


@pytest.mark.parametrize(
    ("name", "join"),
    [
        ("smi-mesh.txt", "mesh"),
        ("smi-pcie.txt", "pcie-tree"),
        ("smi-hybrid.txt", "explicit"),
        ("smi-nvswitch.txt", "explicit"),
        ("nccl-nvswitch.xml", "pcie-tree"),
        ("nccl-mesh.xml", "explicit"),
        ("hwloc-v2-nvswitch.xml", "pcie-tree"),
        ("hwloc-v3-xgmi.xml", "explicit"),
    ],
)
def test_a_short_join_is_written_where_it_is_proven_equal(name, join):
    assert re.search(r"^  node:\n    join: (\S+)$", imported(name).text, re.MULTILINE)[1] == join


@pytest.mark.parametrize("name", ALL)
def test_editors_take_an_imported_file(name):
    validator = jsonschema.Draft202012Validator(schema())
    plain = yaml.safe_load(imported(name).text)
    assert [(fault.json_path, fault.message) for fault in validator.iter_errors(plain)] == []
    plain["links"] |= {"wire": {"bandwidth": "unknwon", "latency": "unknown"}}
    assert not validator.is_valid(plain)


def test_nodes_of_nccl_on_nvswitch_go_over_it_and_leave_by_their_own_nic():
    machine = finished("nccl-nvswitch.xml", {"links.nvlink.bandwidth": "300 GB/s"})
    assert route(machine, 0, 1) == (["nvlink", "nvlink"], ["nvlink"])
    assert route(machine, 0, 7)[0] == ["nvlink", "nvlink"]
    assert machine.spec.links["pcie"].bandwidth == pytest.approx(16e9 * 16 * 128 / 130 / 8, rel=1e-5)
    assert machine.spec.links["network"].bandwidth == 25e9
    own = [machine.graph.vertices[min(machine.graph.own[device])].name for device in machine.devices]
    assert own == [f"nic-{index}" for index in range(8)]


def test_without_nvlink_pairs_share_a_switch_a_root_or_the_sockets():
    machine = topology.parse(
        imported("nccl-nvswitch.xml").text.replace("progress: unknown", "progress: offload, avoid: [nvlink]"),
        "imported",
        {GPU: "1 TB/s", **{f"links.{link}.latency": "1 us" for link in ("pcie", "socket", "nvlink", "network")}}
        | {f"links.{link}.bandwidth": "10 GB/s" for link in ("socket", "nvlink")},
    )
    assert route(machine, 0, 1) == (["pcie"] * 2, ["switch-0"])
    assert route(machine, 0, 2) == (["pcie"] * 4, ["switch-0", "root-0", "switch-1"])
    assert route(machine, 1, 6)[0] == ["pcie", "pcie", "socket", "pcie", "pcie"]
    shared = [set(machine.path(machine.devices[a], machine.devices[b]).resources) for a, b in ((0, 4), (1, 5), (2, 6))]
    names = lambda found: {machine.graph.resources[number].name for number in found}  # noqa: E731
    assert names(shared[0] & shared[1]) == {"switch-0 > root-0", "root-0 > root-1", "root-1 > switch-2"}
    assert names(shared[0] & shared[2]) == {"root-0 > root-1"}


def test_two_nodes_of_an_imported_one_meet_on_rails(tmp_path):
    (tmp_path / "node.yaml").write_text(imported("nccl-nvswitch.xml").text)
    (tmp_path / "cluster.yaml").write_text(
        "ringsim: 2\nname: two\nsource: 'guessed: by hand'\nextends: node.yaml\n"
        "devices: {gpu: {memory_bandwidth: 1.5 TB/s}}\n"
        "links:\n  pcie: {latency: 500 ns}\n  socket: {bandwidth: 20 GB/s, latency: 1 us}\n"
        "  nvlink: {bandwidth: 300 GB/s, latency: 1 us}\n  network: {latency: 2 us}\n"
        "transports: {mpi: {progress: offload}}\n"
        "machine: {join: rails, link: network, spine: network, count: 2, of: node}\n"
    )
    machine = topology.load(tmp_path / "cluster.yaml")
    assert route(machine, 3, 11) == (
        ["pcie", "pcie", "network", "network", "pcie", "pcie"],
        ["node-0/switch-1", "node-0/nic-3", "rail-3", "node-1/nic-3", "node-1/switch-1"],
    )
    sources = {figure.key: figure.kind for figure in machine.figures}
    assert (sources["links.pcie.bandwidth"], sources["links.pcie.latency"]) == ("vendor", "guessed")


def test_a_direct_mesh_of_nccl_is_in_rank_order_with_its_speeds_and_counts():
    machine = finished("nccl-mesh.xml", {"links.nvlink-1.bandwidth": "25 GB/s", "links.nvlink-2.bandwidth": "50 GB/s"})
    assert [route(machine, *pair)[0] for pair in ((0, 1), (2, 3), (0, 3), (1, 2))] == [["nvlink-2"]] * 2 + [["nvlink-1"]] * 2
    assert machine.spec.links["pcie-8"].bandwidth == 8e9
    assert machine.spec.notes["gpu-0"] == "0000:3e:00.0"


def test_the_hybrid_mesh_takes_nvlink_where_there_is_one_and_else_pcie():
    machine = finished("smi-hybrid.txt")
    assert route(machine, 0, 3) == (["nvlink-2"], [])
    assert route(machine, 0, 1) == (["nvlink-1"], [])
    links, between = route(machine, 0, 7)
    assert links == ["pcie-gpu", "pcie-uplink", "socket", "pcie-uplink", "pcie-gpu"]
    assert between == ["switch-0", "root-0", "root-1", "switch-3"]
    assert machine.spec.groups["node"].affinity["gpu-5"] == "mlx5_2"


def test_nics_under_the_switch_of_a_gpu_are_its_own_and_others_nobodys():
    made = imported("smi-nvswitch.txt")
    assert "affinity: {gpu-0: mlx5_0, gpu-1: mlx5_1," in made.text
    assert next(note for note in made.notes if "no GPU uses" in note).endswith("nearer or faster: mlx5_8, mlx5_9")
    machine = finished("smi-nvswitch.txt")
    number = machine.graph.numbers["mlx5_3"]
    assert machine.graph.own[machine.devices[3]] == {number}
    kept = imported("smi-nvswitch.txt", nics=["mlx5_0", "mlx5_4"])
    assert "gpu-3: mlx5_0, gpu-4: mlx5_4" in kept.text
    assert "mlx5_8" not in kept.text


def test_hwloc_gives_memory_model_host_and_nominal_nvlink():
    machine = finished("hwloc-v2-nvswitch.xml")
    assert machine.name == "node-17.example.org"
    assert machine.spec.devices["gpu"].memory == 83230720 * 1024
    assert "# NVIDIA H100 80GB HBM3" in imported("hwloc-v2-nvswitch.xml").text
    # two NVSwitches of nine NVLinks each
    assert machine.spec.links["nvlink"].bandwidth == 450e9
    assert {figure.kind for figure in machine.figures if figure.key == "links.nvlink.bandwidth"} == {"vendor"}
    assert "eno0" not in imported("hwloc-v2-nvswitch.xml").text


def test_xgmi_has_wires_of_one_hop_and_a_matrix_of_hwlocs_constant_is_no_figure():
    machine = finished("hwloc-v3-xgmi.xml")
    assert route(machine, 0, 1) == (["xgmi-200"], [])
    assert route(machine, 0, 3)[0] == ["pcie", "numa", "pcie"]
    assert machine.spec.groups["node"].affinity["gpu-3"] == "cxi_1"
    text = re.sub(r"\b(200000|50000)\b", "100000", (DATA / "hwloc-v3-xgmi.xml").read_text())
    assert {"links.xgmi.bandwidth", "links.xgmi.latency"} <= set(importing.parse(text, "const.xml").unknown)


def test_equal_nvlinks_of_three_and_more_gpus_need_a_word():
    with pytest.raises(TopologyError, match="say --nvlink switch or --nvlink mesh"):
        importing.read(DATA / "smi-mesh.txt")
    assert "join: switch" in importing.read(DATA / "smi-mesh.txt", nvlink="switch").text
    with pytest.raises(TopologyError, match="equally many NVLinks: this is a mesh"):
        importing.read(DATA / "smi-hybrid.txt", nvlink="switch")
    with pytest.raises(TopologyError, match="--nvlink is for a matrix of nvidia-smi"):
        importing.read(DATA / "nccl-mesh.xml", nvlink="mesh")
    two = "\tGPU0\tGPU1\nGPU0\t X \tNV12\nGPU1\tNV12\t X \n"
    assert "join: mesh" in importing.parse(two, "two.txt").text


def test_names_that_are_none_here_are_made_so_and_may_not_collide():
    text = (DATA / "smi-pcie.txt").read_text().replace("mlx5_0", "mlx5.0").replace("mlx5_1", "mlx5:0")
    with pytest.raises(TopologyError, match=r"'mlx5\.0' and 'mlx5:0' are both named 'mlx5_0'"):
        importing.parse(text, "names.txt")
    text = (DATA / "smi-nvswitch.txt").read_text().replace(": mlx5_3", ": 3com/é")
    assert "_3com__: nic   # NIC3" in importing.parse(text, "names.txt", nvlink="switch").text
    text = (DATA / "smi-nvswitch.txt").read_text().replace(": mlx5_3", ": gpu-2")
    with pytest.raises(TopologyError, match="has the name of a GPU here"):
        importing.parse(text, "names.txt", nvlink="switch")


@pytest.mark.parametrize("name", ["nccl-nvswitch.xml", "smi-pcie.txt", "hwloc-v2-nvswitch.xml"])
def test_the_proof_of_equality_sees_a_wire_more_a_link_or_a_nic_that_differs(name):
    made = imported(name)
    whole = reading.filled(made.text)
    assert compact.same(whole, reading.filled(made.text))
    for old, new in (
        ("    socket: socket\n", "    socket: socket\n    connect: [[gpu-0, root-1, socket]]\n"),
        ("per_switch: 2", "per_switch: 1"),
        ("affinity: [0, ", "affinity: [1, "),
        ("    uplink: pcie", "    uplink: socket # "),
    ):
        assert old in made.text
        text = made.text.replace(old, new, 1)
        if "affinity: [1, 1, 2" in text:
            text = text.replace("affinity: [1, 1, ", "affinity: [1, 0, ")
        assert not compact.same(whole, reading.filled(text)), new


def test_a_figure_that_is_unknown_may_stand_anywhere_and_a_name_may_be_that_word():
    text = (
        "ringsim: 2\nname: unknown\nsource: 'guessed: x'\ncounts: {n: 2}\n"
        "devices: {unknown: {kind: gpu, memory_bandwidth: {value: unknown, source: 'guessed: x'}}}\n"
        "links: {unknown: {bandwidth: 1 GB/s, latency: unknown}}\n"
        "machine: {join: switch, link: unknown, count: n, of: unknown, backplane: unknown}\n"
        "transports: {mpi: {progress: offload, avoid: [], device_share: unknown}}\nnotes: {x: unknown}\n"
    )
    places = unknowns(yaml_source.parse(text, "x", TopologyError).value)
    found = ["devices.unknown.memory_bandwidth", "links.unknown.latency", "machine.backplane", "transports.mpi.device_share"]
    assert [".".join(map(str, place)) for place in places] == found
    values = dict(zip(found, ("1 GB/s", "1 us", "9 GB/s", 0.1), strict=True))
    assert len(topology.parse(text, "x", values).devices) == 2
    with pytest.raises(TopologyError, match=r"^x:6: 1 figure is unknown:\n  links\.unknown\.latency   \(x:6\)\n"):
        topology.parse(text, "x", {key: value for key, value in values.items() if key != "links.unknown.latency"})
    with pytest.raises(TopologyError, match=r"^--set n=unknown: 1 figure is unknown:\n  counts\.n"):
        topology.parse(text, "x", values | {"n": "unknown"})


def test_what_holds_names_depends_on_where_it_stands():
    text = (
        "ringsim: 2\nname: x\nsource: 'guessed: x'\ncounts: {name: unknown, link: unknown}\nlinks:\n"
        "  a: {bandwidth: 1 GB/s, regimes: [{from: unknown, latency: 1 us}]}\n  socket: unknown\n  to: {latency: unknown}\n"
        "machine:\n  join: explicit\n  members: {unknown: gpu, b: unknown}\n  connect: [{from: unknown, to: b, link: unknown}]\n"
    )
    places = unknowns(yaml_source.parse(text, "x", TopologyError).value)
    found = [".".join(map(str, place)) for place in places]
    assert found == ["counts.name", "counts.link", "links.a.regimes.0.from", "links.socket", "links.to.latency"]


def test_affinity_names_a_device_and_a_plain_nic_of_its_group():
    made = imported("smi-hybrid.txt").text
    for old, new in (
        ("gpu-0: mlx5_0,", "gpu-9: mlx5_0,"),
        ("gpu-0: mlx5_0,", "gpu-0: switch-0,"),
        ("gpu-0: mlx5_0,", "root-0: mlx5_0,"),
    ):
        with pytest.raises(
            TopologyError, match=r"imported:\d+: groups\.node\.affinity\.(gpu-|root-)\d: (no part|a device and a plain NIC)"
        ):
            reading.filled(made.replace(old, new))

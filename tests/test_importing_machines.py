"""Facts of real machines in small: GPUs without libraries, switches that are one device, affinities of containers, spare NICs."""

import itertools
import re
import time

import pytest

from ringsim import importing, topology
from ringsim.errors import TopologyError

from .test_importing import DATA, VALUES, route

HWLOC = (DATA / "hwloc-v2-nvswitch.xml").read_text()
NCCL = (DATA / "nccl-mesh.xml").read_text()
SMI = (DATA / "smi-nvswitch.txt").read_text()
number = itertools.count(2)


def finished(made, **settings):
    values = {key: VALUES[key.rpartition(".")[2]] for key in made.unknown}
    return topology.parse(made.text, "x", values | settings)


def buses(made):
    return re.findall(r"^ +gpu-\d+: gpu\S*   # (\S+)", made.text, re.MULTILINE) or re.findall(
        r'^  gpu-\d+: "(\S+)"', made.text, re.M
    )


def device(bus, *os, code="0302 [10de:2901]"):
    """A PCI device of hwloc with OS devices: a name, its type, its infos."""
    inside = ""
    for name, kind, *infos in os:
        said = "".join(f'<info name="{key}" value="{value}"/>' for key, value in infos)
        inside += f'<object type="OSDev" gp_index="{next(number)}" name="{name}" osdev_type="{kind}">{said}</object>'
    head = f'<object type="PCIDev" gp_index="{next(number)}" pci_busid="{bus}" pci_type="{code}" pci_link_speed="63.015385">'
    return f"{head}{inside}</object>"


def under(kind, *inside, index=0):
    key = {"Bridge": 'bridge_type="0-1"'}.get(kind, f'os_index="{index}"')
    return f'<object type="{kind}" {key} gp_index="{next(number)}">{"".join(inside)}</object>'


def hwloc(*inside):
    return f'<topology version="2.0"><object type="Machine" gp_index="1">{"".join(inside)}</object></topology>'


def on_host(*devices):
    return hwloc(under("Package", under("Bridge", *devices)))


def test_a_3d_controller_is_a_gpu_whatever_libraries_lstopo_had():
    opencl = ("opencl0d0", 5, ("Backend", "OpenCL"), ("OpenCLDeviceType", "GPU"), ("GPUModel", "NVIDIA B200"))
    made = importing.parse(on_host(device("0000:51:00.0", ("renderD128", 1), ("card1", 1), opencl)), "p6.xml")
    assert made.found[0] == ("GPUs", "1", "NVIDIA B200")
    seven = [device(f"0000:{bus}1:00.0", (f"renderD12{bus}", 1)) for bus in range(2, 9)]
    first, last = device("0000:01:00.0", ("nvml0", 5), ("cuda0", 5)), device("0000:91:00.0", ("cuda0", 5), ("renderD129", 1))
    made = importing.parse(on_host(last, *seven, first), "mixed.xml")
    assert made.found[0][1] == "9"
    assert buses(made) == [f"0000:{bus}1:00.0" for bus in (0, *range(2, 10))]
    assert "GPUs are in the order of their PCI addresses: no library has a number for all of them" in made.notes
    with pytest.raises(TopologyError, match=r"pci_busid '0000:01:00\.0' is there twice; first on line 1"):
        importing.parse(on_host(first, first), "twice.xml")


def test_gpus_have_the_numbers_of_the_first_library_that_has_all():
    both = [device(f"0000:0{index}:00.0", (f"cuda{2 - index}", 5), *([("nvml0", 5)] * (index == 1))) for index in range(3)]
    made = importing.parse(on_host(*both), "cuda.xml")
    assert buses(made) == ["0000:02:00.0", "0000:01:00.0", "0000:00:00.0"]
    twice = [device(f"0000:0{index}:00.0", ("cuda0", 5)) for index in (2, 1)]
    assert buses(importing.parse(on_host(*twice), "twice.xml")) == ["0000:01:00.0", "0000:02:00.0"]


def test_a_display_is_a_gpu_if_a_library_says_so_and_is_named_if_not():
    card, vga = ("card0", 1), "0300 [10de:2684]"
    for known in ("nvml0", "cuda0", "rsmi0"):
        assert importing.parse(on_host(device("0000:01:00.0", card, (known, 5), code=vga)), "4090.xml").found[0][1] == "1"
    opencl = ("opencl0d0", 5, ("OpenCLDeviceType", "GPU"))
    made = importing.parse(
        on_host(device("0000:01:00.0", card, opencl, code=vga), device("0000:02:00.0", card, code=vga)), "x.xml"
    )
    assert made.found[0] == ("GPUs", "1", vga)
    left = "displays without NVML, CUDA, RSMI, Level Zero or OpenCL are no GPUs here: 0000:02:00.0 0300 [10de:2684]"
    assert left in made.notes
    with pytest.raises(TopologyError, match=r"no GPU in it \(displays without .* 0000:01:00\.0 0300 .*; lstopo had no NVML\)"):
        importing.parse(on_host(device("0000:01:00.0", card, code=vga)), "x.xml")


def test_a_file_without_bridges_says_that_switches_are_not_known():
    note = "the file has no bridges (lstopo --no-bridges?): PCIe switches are not known"
    gpu = device("0000:01:00.0", ("nvml0", 5))
    assert note in importing.parse(hwloc(under("Package", gpu)), "x.xml").notes
    assert note not in importing.parse(on_host(gpu), "x.xml").notes


def test_a_gpu_takes_its_own_sockets_nic_before_another_sockets():
    nics = [device(f"0000:{bus}1:00.0", (f"mlx5_{bus}", 3), code="0207 [15b3:1021]") for bus in (0, 8)]
    gpus = [device(f"0000:2{index}:00.0", (f"nvml{index}", 5)) for index in range(4)]
    near = under("Package", under("Group", under("Bridge", nics[0])), under("Group", under("Bridge", *gpus), index=1))
    made = importing.parse(hwloc(near, under("Package", under("Bridge", nics[1]), index=1)), "nps4.xml")
    assert "affinity: {gpu-0: mlx5_0, gpu-1: mlx5_0, gpu-2: mlx5_0, gpu-3: mlx5_0}" in made.text
    assert "NICs that no GPU uses, as others are nearer or faster: mlx5_8" in made.notes


@pytest.mark.parametrize(
    "name", ['a"b.xml', 'x", source: "measured: evil.xml', "a\nb.xml", "#.xml", "{a}.xml", "a\\b.xml", "'.xml"]
)
def test_any_file_name_may_be_a_source(tmp_path, name):
    path = tmp_path / name
    path.write_text(HWLOC)
    made = importing.read(path)
    figures = {figure.key: figure for figure in finished(made).figures}
    shown = name.replace("\n", "?")
    assert figures["devices.gpu.memory"].source == f"hwloc topology {shown}, CUDAGlobalMemorySize"
    assert shown in figures["links.nvlink.bandwidth"].source


def bridge(bus, *inside, device="0xc010", maker="0x1000", model="0xa096", more=""):
    ids = f'vendor="0x1000" device="{device}" subsystem_vendor="{maker}" subsystem_device="{model}"'
    return f'<pci busid="0000:{bus}:00.0" class="0x060400" {ids} {SPEED}>{"".join(inside)}{more}</pci>'


SPEED = 'link_speed="16.0 GT/s PCIe" link_width="16"'


def gpu(bus, rank, inside="", speed=SPEED):
    return f'<pci busid="0000:{bus}:00.0" class="0x030200" {speed}><gpu dev="{rank}" sm="80" rank="{rank}">{inside}</gpu></pci>'


def nic(bus, rank, speed=200000):
    net = f'<net name="mlx5_{rank}" dev="{rank}" speed="{speed}"/>'
    return f'<pci busid="0000:{bus}:00.0" class="0x020700" {SPEED}><nic>{net}</nic></pci>'


def dump(*cpus):
    every = "".join(f'<cpu numaid="{index}">{inside}</cpu>' for index, inside in enumerate(cpus))
    return f'<system version="1">{every}</system>'


def switches(made):
    return dict(re.findall(r"^ +(switch-\d+): switch   # 0000:(..):00\.0$", made.text, re.MULTILINE))


def test_broadcom_sub_switches_are_one_with_the_switch_above():
    # a PEX88096 as Linux shows it, and a vendor's own switch on one of its ports
    own = bridge("0d", gpu("0f", 1), maker="0x10de", model="0x13b8")
    tree = bridge("01", bridge("03", gpu("07", 0)), bridge("0a", nic("0c", 0), own), bridge("11", nic("12", 1)))
    made = importing.parse(dump(tree), "a100.xml")
    assert "3 Broadcom sub-switches are one with the switch above, as NCCL takes them: full rate on all ports" in made.notes
    assert list(switches(made).values()) == ["01", "0d"]
    assert route(finished(made), 0, 1)[1] == ["switch-0", "switch-1"]
    # the next generation says by its subsystem which is the sub-switch; one level is merged, as topo.cc does
    gen5 = [{"device": "0xc030", "model": model} for model in ("0x0001", "0x1001")]
    for top, below, left in ((0, 1, ["01"]), (1, 0, ["01", "03"]), (0, 0, ["01", "03"])):
        made = importing.parse(dump(bridge("01", bridge("03", gpu("07", 0), nic("0c", 0), **gen5[below]), **gen5[top])), "x.xml")
        assert list(switches(made).values()) == left
    made = importing.parse(dump(bridge("01", bridge("03", bridge("05", bridge("07", gpu("0a", 0)))))), "x.xml")
    assert list(switches(made).values()) == ["01", "05"]


def test_broadcom_sub_switches_of_hwloc_are_one_too():
    def port(bus, *inside, ids="[1000:c010] [1000:a096]"):
        head = (
            f'<object type="Bridge" bridge_type="1-1" pci_busid="0000:{bus}" pci_type="0604 {ids} b0" pci_link_speed="31.507692"'
        )
        return f'{head} gp_index="{next(number)}">{"".join(inside)}</object>'

    gpus = [device(f"0000:{bus}:00.0", (f"nvml{index}", 5)) for index, bus in enumerate(("05", "09"))]
    subs = [port(f"0{bus}:00.0", port(f"0{bus + 1}:00.0", gpus[index])) for index, bus in enumerate((3, 7))]
    tree = port("00:01.0", port("01:00.0", port("02:00.0", subs[0]), port("02:04.0", subs[1])), ids="[1022:1483] [0000:0000]")
    made = importing.parse(on_host(tree), "a100.xml")
    assert ("PCIe switches", "1", "") in made.found
    assert route(finished(made), 0, 1)[1] == ["switch-0"]
    assert any(note.startswith("2 Broadcom sub-switches are one with the switch above") for note in made.notes)
    assert ("PCIe switches", "3", "") in importing.parse(on_host(tree.replace("1000:a096", "0000:0000")), "a100.xml").found


def test_switches_in_a_row_and_links_between_switches_are_told():
    other = {"device": "0x1979", "maker": "0x15b3"}
    link = '<pcilink target="0000:20:00.0"/>'
    tree = bridge("01", bridge("03", bridge("05", gpu("07", 0), **other), nic("09", 0), **other), more=link, **other)
    notes = importing.parse(dump(tree), "mi300x.xml").notes
    assert any(note.startswith("up to 3 PCIe switches in a row: where some are one device") for note in notes)
    assert "left out: PCIe links between switches (pcilink), for which the file has no figure: 0000:01:00.0" in notes


def test_pcie_figures_of_nccl_are_what_links_can_do():
    tree = gpu("01", 0, speed='link_speed="16.0 GT/s" link_width="16"') + gpu(
        "02", 1, speed='link_speed="2.5 GT/s PCIe" link_width="16"'
    )
    made = importing.parse(dump(tree), "x.xml")
    sources = {figure.key: (figure.kind, figure.source) for figure in finished(made).figures}
    maximum = "the link's maximum (of NVIDIA's GPUs, in newer NCCL, its rate then)"
    said = f"NCCL topology dump x.xml, {maximum}, 16.0 GT/s x 16 lanes, 128b/130b"
    assert sources["links.pcie-31_51.bandwidth"] == ("vendor", said)
    assert "2.5 GT/s, as NVML, which newer NCCL asks, has it of an idle GPU: 0000:02:00.0" in made.notes
    assert "16.0 GT/s, as NCCL writes where NVML fails (the kernel's own is '16.0 GT/s PCIe'): 0000:01:00.0" in made.notes


def test_links_to_itself_and_to_absent_gpus_are_left_out_in_one_note_each():
    own = '<nvlink target="0000:01:00.0" count="12" tclass="0x030200"/>'
    assert "left out: links of a GPU to itself: 0000:01:00.0" in importing.parse(dump(gpu("01", 0, own)), "ncv4.xml").notes
    many = "".join(f'<nvlink target="0000:99:{i % 256:02x}.{i % 7}" count="1" tclass="0x030200"/>' for i in range(150_000))
    began = time.perf_counter()
    made = importing.parse(dump(gpu("01", 0, many)), "many.xml")
    assert time.perf_counter() - began < 10
    assert len(made.text) < 2000
    assert next(note for note in made.notes if "not in the file" in note).endswith("99:03.3 and 149996 more")


@pytest.mark.parametrize("socket", ["20 GB/s", "60 GB/s", "600 GB/s"])
def test_a_superchip_leaves_and_enters_by_c2c(socket):
    c2c = '<c2c bw="44712" count="10"/>'
    made = importing.parse(dump(gpu("01", 0, c2c), gpu("02", 1, c2c)), "gh200.xml")
    assert route(finished(made, **{"links.socket.bandwidth": socket}), 0, 1)[0] == ["c2c", "socket", "c2c"]
    link = '<nvlink target="0004:00:01.0" count="3" tclass="0x068001"/>'
    made = importing.parse(dump(gpu("01", 0, link), gpu("02", 1, link)), "ac922.xml")
    settings = {"links.socket.bandwidth": socket, "links.nvlink.bandwidth": "75 GB/s"}
    assert route(finished(made, **settings), 0, 1)[0] == ["nvlink", "socket", "nvlink"]


def test_nics_that_are_not_modelled_are_counted_in_the_file():
    tree = "".join(
        bridge(
            f"{8 + index}0", gpu(f"{8 + index}1", index), *(nic(f"{8 + index}{2 + n}", 4 * index + n, 100000) for n in range(4))
        )
        for index in range(2)
    )
    made = importing.parse(dump(tree), "p5.xml")
    note = (
        "one port of one NIC per GPU is modelled; 6 at equal distance are not used "
        "(mlx5_1, mlx5_2, mlx5_3, mlx5_5, mlx5_6, mlx5_7): the node has 200 of 800 Gbit/s"
    )
    assert note in made.notes
    assert f"# {note}\n" in made.text
    two = nic("0c", 0).replace("</nic>", '<net name="mlx5_1" dev="1" speed="200000"/></nic>')
    notes = importing.parse(dump(bridge("01", gpu("07", 0), two)), "ports.xml").notes
    assert "one port of one NIC per GPU is modelled: the node has 200 of 400 Gbit/s" in notes


def matrix(names, cell, affinity):
    rows = ["\t" + "\t".join([*names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])]
    for one in names:
        cells = [" X " if one == other else cell(one, other) for other in names]
        rows.append("\t".join([one, *cells, *(affinity(one) if one.startswith("GPU") else ())]))
    return "\n".join(rows) + "\n"


def half(name):
    return int(name[3:]) >= 4 if name.startswith("GPU") else name == "NIC1"


def cell(one, other):
    if one[:3] == other[:3] == "GPU":
        return "NV18"
    return "NODE" if half(one) == half(other) else "SYS"


GPUS = [f"GPU{index}" for index in range(8)]


@pytest.mark.parametrize("affinity", [("0-15", "0-1"), ("0-255", "N/A"), ("0-15", "0"), ("", ""), ("0-15", "0,1")])
def test_affinities_of_a_container_do_not_override_the_matrix(affinity):
    text = matrix([*GPUS, "NIC0", "NIC1"], cell, lambda name: (*affinity, "", "N/A"))
    made = importing.parse(text, "container.txt", nvlink="switch")
    assert ("root complexes", "2", "") in made.found
    assert "gpu-3: NIC0, gpu-4: NIC1" in made.text
    dropped = "NUMA affinity 0 of several GPUs is not used: the cells put them farther apart"
    assert (dropped in made.notes) == (affinity[1] == "0")


def test_a_numa_affinity_of_one_node_joins_what_nvlink_hides():
    far = lambda one, other: "NV18" if one[:3] == other[:3] else "NODE" if one == "GPU0" or other == "GPU0" else "SYS"  # noqa: E731
    for affinity, roots in ((("0-15", "0-1"), "4"), (("0-255", "N/A"), "4")):
        made = importing.parse(
            matrix([*GPUS[:4], "NIC0"], far, lambda _, found=affinity: (*found, "", "N/A")), "x", nvlink="switch"
        )
        assert ("root complexes", roots, "") in made.found
    near = lambda one, other: "NV18" if one[:3] == other[:3] else "NODE" if half(one if one < other else other) == 0 else "SYS"  # noqa: E731
    made = importing.parse(
        matrix([*GPUS, "NIC0"], near, lambda name: ("0-15", str(int(half(name))), "", "N/A")), "x", nvlink="switch"
    )
    assert ("root complexes", "2", "") in made.found


def test_a_text_says_when_it_may_hide_nvlink_and_has_one_matrix():
    text = matrix(
        ["GPU0", "GPU1", "NIC0", "NIC1"], lambda a, b: "PIX" if a[:3] == b[:3] == "NIC" else "NODE", lambda _: ("0-31", "0")
    )
    made = importing.parse(text, "mp.txt")
    assert made.notes[0].startswith("no NVLink in the matrix: the GPUs have none, or it is of `nvidia-smi topo -mp`")
    assert made.notes[1].endswith("the text does not say whether they are ports of one card: NIC0 and NIC1")
    with pytest.raises(TopologyError, match=r"^two\.txt:10: a second matrix: import one at a time$"):
        importing.parse(f"{text}\nhost2:\n\n\n{SMI}", "two.txt")


@pytest.mark.parametrize("word", ["null", "true", "False", "yes", "No", "on", "OFF", "y", "n", "~", "unknown"])
def test_words_that_yaml_reads_otherwise_become_names(word):
    made = importing.parse(SMI.replace(": mlx5_3", f": {word}"), "x.txt", nvlink="switch")
    name = "_" if word == "~" else f"_{word}"
    assert f" {name}: nic   # NIC3" in made.text
    assert f"gpu-3: {name}," in made.text
    finished(made)

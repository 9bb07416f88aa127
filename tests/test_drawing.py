"""Drawings of machines: PNG and SVG of every kind, legible from one device to thousands, the same bytes each time."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from ringsim import drawing
from ringsim.errors import MissingDependency, RingsimError
from ringsim.topology import load, names, parse
from ringsim.units import format_rate, format_time

HEAD = """\
ringsim: 2
name: sample
source: "defined: for this test"
devices:
  gpu: {kind: gpu, memory_bandwidth: 2 TB/s}
  slow: {like: gpu, speed: 0.8, egress: 40 GB/s}
  host: {kind: cpu, cores: 32, ranks: 4, memory_bandwidth: 200 GB/s, inside: shm}
links:
  wide: {bandwidth: 300 GB/s, achieved: 0.8, latency: 1 us}
  pcie: {bandwidth: 32 GB/s, latency: 0.5 us}
  net: {bandwidth: 25 GB/s, reverse: 20 GB/s, duplex: 1.5, latency: 2 us}
  shm: {bandwidth: 12 GB/s, regimes: [{from: 0 B, latency: 0.5 us}, {from: 8 kB, latency: 3 us, bandwidth: 9 GB/s}]}
transports:
  mpi: {progress: offload, paths: {net: {latency: 7 us, bandwidth: 19 GB/s}}}
groups:
  node: {join: switch, link: wide, count: 8, of: gpu, nics: {count: 4, link: pcie}}
  quad: {join: mesh, link: wide, count: 4, of: gpu, nics: 1}
  tree: {join: pcie-tree, link: pcie, uplink: wide, socket: shm, per_switch: 2, roots: 2, count: 8, of: gpu, nics: 4}
  rack: {join: switch, link: pcie, count: 4, of: node, uplinks: 8}
  slice: {join: torus2d, link: wide, shape: [4, 4], of: gpu, nics: {count: 4, link: pcie}}
"""
MACHINES = {
    "switch": "{join: switch, link: wide, count: 8, of: gpu, backplane: 1 TB/s}",
    "fat tree of meshes": "{join: fat-tree, link: net, leaf: 4, oversubscription: 2.0, count: 16, of: quad}",
    "rails": "{join: rails, link: net, spine: net, count: 32, of: node}",
    "rails without spine": "{join: rails, link: net, count: 2, of: node}",
    "torus2d": "{join: torus2d, link: wide, shape: [4, 4], of: gpu}",
    "torus2d, large": "{join: torus2d, link: wide, shape: [64, 64], of: gpu}",
    "torus2d of groups": "{join: torus2d, link: net, shape: [3, 2], of: quad}",
    "torus3d": "{join: torus3d, link: wide, shape: [4, 4, 4], of: gpu}",
    "torus3d, large": "{join: torus3d, link: wide, shape: [16, 16, 16], of: gpu}",
    "torus in a node": "{join: switch, link: net, count: 4, of: slice}",
    "ring": "{join: ring, link: net, count: 8, of: gpu}",
    "ring, large": "{join: ring, link: net, count: 4096, of: gpu}",
    "ring of one": "{join: ring, link: net, count: 1, of: gpu}",
    "mesh of two": "{join: mesh, link: net, count: 2, of: gpu}",
    "mesh, large": "{join: mesh, link: net, count: 128, of: gpu}",
    "pcie tree": "tree",
    "pcie trees": "{join: switch, link: net, count: 6, of: tree}",
    "mixed": "{join: switch, link: net, of: [{count: 4, of: quad}, {count: 8, of: node}, host]}",
    "unlike throughout": "{join: switch, link: net, of: [" + ", ".join(["gpu", "slow"] * 40) + "]}",
    "explicit": """
  join: explicit
  members: {left: gpu, mid: gpu, right: gpu, cpu: host, plx: switch, tor: switch}
  connect: [[left, plx, pcie], [mid, plx, pcie], [right, plx, pcie], [left, right, wide], [left, right, pcie],
    [cpu, tor, net], {from: plx, to: tor, link: net, cables: 2}]""",
    "explicit without switches": """
  join: explicit
  members: {a: gpu, b: gpu, c: gpu}
  connect: [[a, b, wide], [b, c, pcie], [c, a, net]]""",
    "host": "host",
    "hosts": "{join: switch, link: net, count: 2, of: host}",
    "pods": "{join: fat-tree, link: net, leaf: 4, count: 16, of: rack}",
    "flat": "{join: switch, link: net, count: 4096, of: gpu}",
}


def machine(text, settings=()):
    return parse(f"{HEAD}machine: {text}\n", settings=settings)


def svg(topology, folder):
    path = folder / "drawing.svg"
    drawing.draw(topology, path)
    return path.read_text(encoding="utf-8")


def words(text):
    """The texts of a drawing, in its order."""
    return [element.text for element in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]


def count_of(text):
    return len(re.findall(r"<(?:path|use|text|g) ", text))


@pytest.mark.parametrize("name", names())
def test_a_shipped_machine_draws_with_every_link_named(name, tmp_path):
    topology = load(name)
    drawing.draw(topology, tmp_path / "machine.png")
    assert (tmp_path / "machine.png").read_bytes().startswith(b"\x89PNG")
    shown = words(svg(topology, tmp_path))
    assert topology.name in shown
    assert any(f"{len(topology.slots)} ranks" in text and f"transport {topology.transport_name}" in text for text in shown)
    for link, figures in topology.spec.links.items():
        assert link in shown
        assert format_rate(figures.bandwidth * figures.achieved, "B/s") in shown


@pytest.mark.parametrize("kind", MACHINES)
def test_every_kind_of_machine_draws_with_its_wires_labelled(kind, tmp_path):
    topology = machine(MACHINES[kind])
    drawing.draw(topology, tmp_path / "machine.PNG")
    text = svg(topology, tmp_path)
    shown = words(text)
    assert count_of(text) < 2500
    for link in {edge.link for edge in topology.graph.edges} - {None}:
        figures = topology.spec.links[link]
        rate = format_rate(figures.bandwidth * figures.achieved, "B/s")
        # the legend names the link; so does a wire, a bundle of wires, a NIC or a device
        assert sum(bool(re.search(rf"\b{link}\b", line)) for line in shown) > 1, link
        assert any(line.startswith(rate) for line in shown)


def test_a_label_says_cables_both_bandwidths_duplex_and_latency(tmp_path):
    text = HEAD.replace("nics: 1}", "nics: {count: 1, stripe: 4}}")
    topology = parse(text + "machine: {join: switch, link: net, count: 2, of: quad}\n")
    shown = " ".join(words(svg(topology, tmp_path)))
    for part in ("4 × net striped", "25 GB/s each", "back 20 GB/s", "2 us", "duplex 1.5", "240 GB/s", "2 wires of 4 cables"):
        assert part in shown


def test_the_legend_says_what_the_wires_do_not(tmp_path):
    shown = words(svg(machine("{join: switch, link: net, of: [host, slow]}"), tmp_path))
    for line in (
        "both ways together 37.5 GB/s; by mpi end to end 7 us, at most 19 GB/s",
        "from 0 B: 500 ns; from 8 kB: 3 us, at most 9 GB/s",
        "0.8 of 300 GB/s",
        "on no wire",
        "inside devices",
        "cpu, 32 cores",
        "speed 0.8; egress 40 GB/s",
    ):
        assert line in shown
    assert {"host-0", "4 ranks", "inside: shm", f"12 GB/s · {format_time(0.5e-6)} to 3 us"} <= set(shown)


def test_what_repeats_is_drawn_a_few_times(tmp_path):
    shown = words(svg(machine(MACHINES["rails"]), tmp_path))
    assert {"node-0", "node-31", "× 32", "rail-0", "spine", "32 × net"} <= set(shown)
    assert "node-7" not in shown


def test_a_part_unlike_its_neighbours_is_shown(tmp_path):
    topology = machine("{join: switch, link: net, count: 64, of: gpu}", {"replace.gpu-40": "slow"})
    shown = words(svg(topology, tmp_path))
    assert {"gpu-0", "gpu-40", "slow", "gpu-63", "× 40", "× 23"} <= set(shown)


def test_an_avoided_link_is_dashed_and_said(tmp_path):
    topology = machine("{join: rails, link: net, spine: net, count: 2, of: node}", {"transports.mpi.avoid": ["wide"]})
    text = svg(topology, tmp_path)
    assert "mpi avoids it" in " ".join(words(text))
    assert "stroke-dasharray" in text


def test_four_thousand_devices_draw_little_more_than_eight(tmp_path):
    few, many = (count_of(svg(machine("{join: switch, link: net, of: gpu}", {"machine.count": n}), tmp_path)) for n in (8, 4096))
    assert many <= few


def test_names_are_shown_as_they_stand(tmp_path):
    topology = machine("{join: mesh, link: net, count: 3, of: gpu}", {"name": "$x^2$ <&> \n 计"})
    assert words(svg(topology, tmp_path)).count("$x^2$ <&> 计") == 1
    drawing.draw(topology, tmp_path / "machine.png")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_drawing_is_the_same_in_every_process(suffix, tmp_path):
    code = (
        "import sys; from pathlib import Path; from ringsim.drawing import draw; from ringsim.topology import load; "
        "draw(load('dgx-h100-cluster'), Path(sys.argv[1]))"
    )
    paths = [tmp_path / f"{seed}.{suffix}" for seed in (1, 2)]
    for seed, path in zip("12", paths, strict=True):
        subprocess.run(
            [sys.executable, "-c", code, str(path)],
            check=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONHASHSEED": seed},
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_drawing_leaves_the_settings_of_matplotlib_alone(tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0, "svg.fonttype": "path", "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        mine = svg(load("ideal"), tmp_path)
        assert dict(mpl.rcParams) == before
    assert svg(load("ideal"), tmp_path) == mine


@pytest.mark.parametrize("name", ["machine.pdf", "machine", ".png"])
def test_any_other_suffix_is_refused(name, tmp_path):
    with pytest.raises(RingsimError, match=r"\.png or a \.svg"):
        drawing.draw(load("ideal"), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "machine.svg"
    path.mkdir()
    with pytest.raises(RingsimError, match="cannot be written"):
        drawing.draw(load("ideal"), path)
    assert list(tmp_path.rglob("*")) == [path]


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ringsim\[plots\]'"):
        drawing.draw(load("ideal"), tmp_path / "machine.png")


def test_a_second_fabric_is_named_in_the_boxes_that_it_joins(tmp_path):
    tree = "join: pcie-tree, link: pcie5, per_switch: 2, uplink: pcie5, count: 4, of: h100"
    for join, words in (("switch", "nvlink4 to a switch"), ("mesh", "nvlink4 to each")):
        machine = load("dgx-h100", [f"machine={{{tree}, also: [{{join: {join}, link: nvlink4}}]}}"])
        drawing.draw(machine, tmp_path / "machine.svg")
        assert (tmp_path / "machine.svg").read_text().count(words) == 4


def test_plain_switches_and_nics_of_an_explicit_group_are_drawn_once(tmp_path):
    explicit = "join: explicit, members: {a: h100, b: h100, hub: switch, out: nic}, "
    machine = load("dgx-h100", [f"machine={{{explicit}connect: [[a, hub, nvlink4], [b, hub, nvlink4], [a, out, pcie5]]}}"])
    drawing.draw(machine, tmp_path / "machine.svg")
    text = (tmp_path / "machine.svg").read_text()
    assert [text.count(f"<!-- {name} -->") + text.count(f">{name}<") for name in ("a", "b", "hub", "out")] == [1, 1, 1, 1]
    assert all(link in text for link in ("nvlink4", "pcie5"))

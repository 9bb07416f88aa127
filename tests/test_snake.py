"""Ranks to and fro over a torus: each the neighbour of the next, each hop on a wire of its own."""

from itertools import pairwise
from math import prod

import pytest

import ringsim
from ringsim.errors import TopologyError
from ringsim.inventory import to_dict
from ringsim.topology import parse
from ringsim.topology.topology import snake

from .test_cli import invoke

MACHINE = """
ringsim: 2
name: torus
source: "defined: a test"
devices:
  chip: {{kind: {kind}, memory_bandwidth: 1 TB/s}}
links:
  ici: {{bandwidth: 45 GB/s, latency: 1 us}}
transports:
  dma: {{progress: offload}}
machine: {machine}
place: snake
"""
EVEN = [(2, 2), (4, 4), (16, 16), (2, 5), (6, 3), (5, 4), (1, 4), (2, 1), (2, 2, 2), (4, 4, 4), (2, 3, 5), (3, 4, 5), (3, 5, 2)]
ODD = [(3, 3), (3, 5), (1, 1), (1, 3), (5, 1), (3, 3, 3), (1, 1, 5), (3, 1, 5)]


def torus(shape, kind="gpu", of="chip", **choices):
    join = f"{{join: torus{len(shape)}d, link: ici, shape: {list(shape)}, of: {of}}}"
    return parse(MACHINE.format(kind=kind, machine=join), **choices)


def wires_of(machine, ranks):
    """The wires of each hop of a flat ring, one direction of a wire by its number."""
    places = machine.place(ranks)
    return [
        [edge.number for edge in machine.edges(one, other)] for one, other in zip(places, places[1:] + places[:1], strict=True)
    ]


@pytest.mark.parametrize("shape", EVEN)
def test_each_hop_of_the_ring_has_one_wire_to_itself(shape):
    hops = wires_of(torus(shape), prod(shape))
    assert [len(wires) for wires in hops] == [1] * prod(shape)
    assert len({wire for wires in hops for wire in wires}) == prod(shape)


@pytest.mark.parametrize("shape", [shape for shape in ODD if prod(shape) > 1])
def test_with_odd_sides_alone_only_the_last_hop_is_longer(shape):
    hops = wires_of(torus(shape), prod(shape))
    assert [len(wires) for wires in hops[:-1]] == [1] * (prod(shape) - 1)
    used = [wire for wires in hops[:-1] for wire in wires]
    assert len(set(used)) == len(used)


@pytest.mark.parametrize("shape", EVEN + ODD)
def test_every_device_has_one_rank(shape):
    assert sorted(snake(shape)) == list(range(prod(shape)))


def test_the_order_of_a_small_torus():
    assert snake((2, 3)) == (0, 1, 2, 5, 4, 3)
    assert snake((4, 2)) == (0, 1, 3, 2, 4, 5, 7, 6)
    assert snake((3, 2)) == (0, 2, 4, 5, 3, 1)  # the even side goes slowest, so that the ring closes
    assert snake((2, 2, 2)) == (0, 1, 3, 2, 6, 7, 5, 4)


@pytest.mark.parametrize(
    ("name", "settings"), [("tpu-v4", {}), ("tpu-v4", {"x": 8}), ("tpu-v5e", {}), ("tpu-v5e", {"x": 4, "y": 8})]
)
def test_the_flat_ring_of_a_tpu_has_the_rate_of_one_link(name, settings):
    machine = ringsim.load_topology(name, settings)
    hops = to_dict(machine, len(machine.slots))["ring"]
    assert {(hop["alone_bytes_per_s"], hop["together_bytes_per_s"], hop["latency_s"]) for hop in hops} == {(45e9, 45e9, 1e-6)}


def test_in_block_order_a_ring_hops_over_wires_that_others_use():
    block = wires_of(torus((4, 4, 4), place="block"), 64)
    assert max(map(len, block)) == 3
    assert sum(map(len, block)) == 64 + 12 + 2 * 4


def test_a_part_of_the_torus_is_a_line_but_for_its_last_hop():
    hops = wires_of(torus((16, 16)), 8)
    assert [len(wires) for wires in hops] == [1] * 7 + [7]
    assert [len(wires) for wires in wires_of(torus((16, 16)), 16)] == [1] * 16  # a row is a ring


def test_ranks_of_a_cpu_stay_together():
    machine = torus((2, 2), kind="cpu, cores: 4, ranks: 2, inside: ici")
    assert machine.place(8) == (0, 0, 1, 1, 3, 3, 2, 2)
    assert machine.place(16) == (0,) * 4 + (1,) * 4 + (3,) * 4 + (2,) * 4


def test_a_torus_may_be_a_group_by_name():
    text = MACHINE.format(kind="gpu", machine="pod")
    text += "groups: {pod: slice, slice: {join: torus2d, link: ici, shape: [2, 2], of: chip}}\n"
    assert parse(text).slots == (0, 1, 3, 2)


@pytest.mark.parametrize(
    "machine",
    [
        "chip",
        "{join: ring, link: ici, count: 4, of: chip}",
        "{join: switch, link: ici, count: 4, of: chip}",
        "{join: torus2d, link: ici, shape: [2, 2], of: {join: switch, link: ici, count: 2, of: chip, uplinks: 1}}",
    ],
)
def test_a_machine_that_is_no_torus_of_devices_is_refused_with_its_line(machine):
    with pytest.raises(
        TopologyError, match=r"<text>:12: .*snake goes over a torus of devices .*: use block, round-robin or a list"
    ):
        parse(MACHINE.format(kind="gpu", machine=machine))


def test_the_command_line_takes_it(capsys):
    code, text, _ = invoke(capsys, "topologies", "show", "tpu-v4", "--place", "snake", "--set", "x=2")
    assert code == 0
    assert "32 ranks (snake)" in text
    code, _, err = invoke(capsys, "topologies", "show", "dgx-h100", "--place", "snake")
    assert code == 2
    assert "--place snake" in err and "snake goes over a torus" in err


def test_neighbours_differ_in_one_coordinate():
    points = [divmod(point, 5) for point in snake((4, 5))]
    steps = [(abs(a - c) % 4, abs(b - d) % 5) for (a, b), (c, d) in pairwise(points)]
    assert all(sorted(step) == [0, 1] for step in steps)

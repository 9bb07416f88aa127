"""Topologies at random: damaged ones load or are refused with the place of the fault, drawn ones have a way for every pair."""

import json
import random
import re
from copy import deepcopy
from itertools import pairwise, permutations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ringsim import yaml_source
from ringsim.errors import TopologyError
from ringsim.topology import Spec, Topology, build, checks, layers, parse

from .test_topology import SHIPPED, TEXT, refusal, replaced

HEAD = """\
ringsim: 2
name: rich
source: "defined: for this test"
"""
TREE = """\
counts: {racks: 2}
devices:
  a: {kind: gpu, memory_bandwidth: 2 TB/s, inside: pcie}
  b: {like: a, speed: 0.5, egress: 10 GB/s, ingress: 9 GB/s}
links:
  pcie: {bandwidth: 63 GB/s, latency: 500 ns}
  eth: {bandwidth: 25 GB/s, reverse: 9 GB/s, latency: 2 us, achieved: {value: 0.9, source: "guessed: like others"}}
groups:
  box:
    join: pcie-tree
    link: pcie
    per_switch: 2
    uplink: pcie
    roots: 2
    socket: pcie
    of: [a, {count: 2, of: b}, a]
    nics: {count: 2, link: pcie, affinity: [0, 0, 1, 1], stripe: 2}
  rack: {join: switch, link: eth, count: 3, of: box, uplinks: 4, backplane: 90 GB/s}
machine:
  join: fat-tree
  link: eth
  leaf: 1
  oversubscription: 1.5
  trunk: pcie
  count: racks
  of: rack
  connect: [[rack-0/switch, rack-1/switch, eth], {from: leaf-0, to: leaf-1, link: eth, cables: 2}]
transports: {tcp: {progress: thread, slowed_by_compute: 0.2, paths: {eth: {regimes: [{from: 0 B, latency: 7 us}]}}}}
place: [0, 0, rack-1/box-2/a-3]
"""
RINGS = """\
counts: {n: 2}
devices:
  tpu: {kind: gpu, memory_bandwidth: 1 TB/s}
  host: {kind: cpu, cores: 8, ranks: 2, memory_bandwidth: 90 GB/s, inside: shm}
links:
  ici: {bandwidth: 100 GB/s, latency: 1 us, duplex: 1}
  shm: {bandwidth: 20 GB/s, latency: 600 ns}
machine:
  join: explicit
  members:
    cube: {join: torus3d, link: ici, shape: [n, 2, 3], of: tpu, nics: 1}
    plate: {join: torus2d, link: ici, shape: [n, n], of: tpu, nics: {count: n, stripe: n}}
    loop: {join: ring, link: ici, count: 3, of: {join: mesh, link: shm, count: 2, of: host, nics: 2}, nics: 1}
    pair: {join: explicit, members: {left: host, right: host}, connect: [[left, right, shm]], exits: [left]}
    hub: switch
  connect:
    - [cube/nic-0, hub, ici]
    - [plate/nic-0, hub, ici]
    - [plate/nic-1, hub, ici]
    - [loop/nic-0, hub, shm]
    - [pair/left, hub, shm]
    - [pair/right, hub, shm]
transports: {mpi: {progress: handshake, drives: sender}}
"""
SOURCES = [*SHIPPED.values(), *[TEXT, HEAD + TREE, HEAD + RINGS] * 2]
TREES = [yaml.safe_load(text) for text in SOURCES]
VALUE = re.compile(r"[^\n,}]*")
JUNK = [
    *"{}[]&*!|>%@`'\"#,:?-~=\t\0\a\r\x85\u2028é\ufeff",
    *["- ", ": ", "? ", "<<: ", "---\n", "...\n", "\n\n", "!!int ", "!x ", "&a ", "*a ", "%YAML 1.2\n", "\\x", '"\\UFFFFFFFF"'],
    *["null", "true", ".inf", "1e999", "1e999999999", "9" * 400, "0x1F", "1:30", "-0", "1_0", "5 GB/s", "8 us", "[1, 1]"],
    *["99999", "2", "0", "switch", "{join: ring, link: pcie, count: 99999, of: a}", "{count: 3, of: gpu}", "[gpu, gpu]", "{}"],
]
HUGE = [99999, 1048576, 1048577, 2**64, 10**400, 1024, 1000]
ODD = [*HUGE, *range(-1, 8), 1.5, float("inf"), True, None, [], {}, *["", "switch", "gpu", "a", "5 GB/s", "0 B/s", "1 us"]]
PLACES = ["block", "round-robin", "ring", "", [0, 1, 0], [0, 10**6], ["a"], ["rack-0/box-0/a-0"], [[]], 5, [], [-1], [True]]
REFUSAL = re.compile(r"(machine\.yaml|topologies/[a-z0-9-]+\.yaml):[1-9]\d*: .|--(set|place|transport) .*: .", re.DOTALL)
FEWER = {"MOST_VERTICES": 2**11, "MOST_WIRES": 2**12, "MOST_RANKS": 2**12}


@pytest.fixture(autouse=True)
def _small_machines(monkeypatch):
    """A lower limit bounds the work of each of them, as the true one bounds that of any."""
    for name, most in FEWER.items():
        monkeypatch.setattr(build, name, most)


@pytest.mark.parametrize(
    ("text", "found"), [("", "NoneType"), ("- a", "list"), ("5", "int"), ("name", "str"), ("null", "NoneType")]
)
def test_a_file_that_is_no_mapping_is_refused(text, found):
    assert refusal(text) == f"machine.yaml:1: expected keys and values, found {found}"


@pytest.mark.parametrize("tagged", ["name: !!str bench", "name: !here bench", "!!str name: bench"])
def test_a_tag_is_refused(tagged):
    assert re.match(r"machine\.yaml:2: .*\btags?\b", refusal(replaced("name: bench", tagged)[0]))


NUMBERS = ['"65536"', "65_536", "1e400", "inf", ".inf", "0x7f", "true", "null"]
TRUTHS = ["off", '"true"', "1", "True"]


@pytest.mark.parametrize(
    ("old", "new"), [*[("65536", n) for n in NUMBERS], *[("rows: 128", f"rows: 128, exact: {t}") for t in TRUTHS]]
)
def test_only_a_plain_finite_number_is_a_number_and_only_true_and_false_are_truth_values(old, new):
    text, line = replaced(old, new)
    assert re.match(
        rf"machine\.yaml:{line}: devices\.gpu\.attention\.0\.\S+: Input should be a (valid|finite) (number|boolean)",
        refusal(text),
    )


@pytest.mark.parametrize("depth", [40, 10_000])
@pytest.mark.parametrize("nested", ["[{}]", "{{a: {}}}"], ids=["lists", "mappings"])
def test_deep_nesting_is_refused(nested, depth):
    opening, closing = nested.format("\n").split("\n")
    # many short lines: PyYAML takes quadratic time over one long line, and is no part of this test
    text, line = replaced("{made: by hand}", "\n  ".join(["", *[opening] * depth, *[closing] * depth]))
    message = refusal(text)
    assert re.match(r"machine\.yaml:(\d+): .*nested too deeply; at most 32 levels", message)
    assert line <= int(message.split(":")[1]) <= line + depth


def scratched(text, rng):
    """A text with one to three scratches."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        begin = rng.randrange(len(text) + 1)
        value = text.find(": ", begin) + 2
        end, to = min(begin + rng.randint(1, 6), len(text)), rng.randrange(len(text) + 1)
        lines = text.split("\n")
        row, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        part = text[begin:end]
        text = rng.choice(
            [
                text[:begin] + text[end:],
                text[:to] + part + text[to:],
                text[:begin] + rng.choice(JUNK) + text[begin:],
                text[:begin] + rng.choice(JUNK) + text[end:],
                text[:begin] + chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) + text[begin:],
                text[:value] + rng.choice(JUNK) + text[value:],
                text[:value] + rng.choice(JUNK) + text[value + len(VALUE.match(text, value)[0]) :],
                "\n".join(lines[:row] + lines[row + 1 :]),
                "\n".join([*lines[:row], lines[other], *lines[row:]]),
                "\n".join([*lines[:row], rng.choice(["", " ", "    "]) + lines[row], *lines[row + 1 :]]),
            ]
        )
    return text


def places(tree, above=()):
    """Every (container, key, key in full) of a tree."""
    for key, item in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key, (*above, key)
        if isinstance(item, dict | list):
            yield from places(item, (*above, key))


def regrown(tree, rng):
    """A tree with a branch or two swapped, taken away, grafted from any tree, renamed, made odd or made huge."""
    tree = deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2])):
        known = list(places(tree))
        if not known:
            return tree
        (here, key, _), (there, other, _) = rng.choice(known), rng.choice(known)
        soil, grown, _ = rng.choice(list(places(rng.choice(TREES))))
        graft = deepcopy(soil[grown])
        numbers = [place for place in known if isinstance(place[0][place[1]], int)] or known
        words = [place for place in known if isinstance(place[0][place[1]], str)] or known
        change = rng.randrange(10)
        if change == 0:
            here[key], there[other] = deepcopy(there[other]), deepcopy(here[key])
        elif change == 1:
            del here[key]
        elif change == 2:
            here[key] = graft
        elif change == 3 and isinstance(here, dict):
            here[rng.choice([str(other), str(grown), f"{key}s", "", "a b"])] = here.pop(key)
        elif change == 4 and isinstance(here, dict):
            here[str(grown)] = graft
        elif change == 5:
            here[key] = rng.choice(ODD)
        elif change < 8:
            where, which, _ = rng.choice(numbers)
            where[which] = rng.choice([1, 2, 3, rng.choice(HUGE)])
        else:
            (where, which, _), (origin, word, _) = rng.choice(words), rng.choice(words)
            where[which] = deepcopy(origin[word])
    return tree


def setting(tree, rng):
    """A what-if on something in a tree, perhaps scratched."""
    known = list(places(tree))
    (*_, full), (origin, other, _) = rng.choice(known), rng.choice(known)
    here = tree
    for key in full:
        here = here[key]
    value = rng.choice([here, here, origin[other], rng.choice(ODD)])
    text = f"{'.'.join(map(str, full))}={json.dumps(value)}"
    return scratched(text, rng) if rng.random() < 0.2 else text


def damaged(rng):
    """What `parse` is given: a text, settings, and choices."""
    number = rng.randrange(len(SOURCES))
    text, tree, given, choices = SOURCES[number], TREES[number], [], {}
    how = rng.randrange(10)
    if how < 3:
        text = scratched(text, rng)
    elif how < 8:
        text = json.dumps(regrown(tree, rng), indent=1, ensure_ascii=rng.random() < 0.5)
    else:
        given = [setting(tree, rng) for _ in range(rng.randint(0, 2))]
        if rng.random() < 0.3:
            choices = rng.choice([{"place": rng.choice(PLACES)}, {"transport": rng.choice(["mpi", "nccl", "x", ""])}])
    return text, given, choices


def used(topology):
    """What a simulation asks of a topology. A refusal here names the machine."""
    for world_size in (1, 2, len(topology.slots), len(topology.slots) + 1):
        try:
            ranks = topology.place(world_size)
            for source, target in zip(ranks[:3], ranks[-3:], strict=False):
                path = topology.path(source, target)
                assert path.latency_s(0) >= 0
                assert path.rate(2**20) > 0
        except TopologyError as error:
            assert str(error).startswith(f"{topology.name}")


@pytest.mark.parametrize("seed", range(10))
def test_five_hundred_damaged_topologies_load_or_are_refused_with_the_place_of_the_fault(seed):
    rng = random.Random(seed)
    valid = 0
    for _ in range(500):
        text, given, choices = damaged(rng)
        try:
            topology = parse(text, "machine.yaml", given, **choices)
        except TopologyError as error:
            assert REFUSAL.match(str(error)), (str(error), text, given)
            continue
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{error!r} from {text!r} with {given} {choices}")
        assert isinstance(topology, Topology)
        assert len(topology.graph.vertices) <= FEWER["MOST_VERTICES"]
        assert len(topology.graph.edges) <= 2 * FEWER["MOST_WIRES"] + 2 * FEWER["MOST_VERTICES"]
        used(topology)
        valid += 1
    assert 50 < valid < 200, "the damage is neither too slight nor too great"


LINKS = ["near", "far", "thin"]
PLAIN = """
devices:
  g: {kind: gpu, memory_bandwidth: 1 TB/s}
  c: {kind: cpu, cores: 4, memory_bandwidth: 1 TB/s}
transports: {t: {progress: offload}}
"""
PLAIN += "links: {" + ", ".join(f"{link}: {{bandwidth: 1 GB/s, latency: 1 us}}" for link in LINKS) + "}\n"
LINK, FEW, DEVICE = st.sampled_from(LINKS), st.integers(1, 3), st.sampled_from(["g", "c"])


def templates(inner):
    """Any template of any members, left by a NIC or by its switch."""
    member = {"link": LINK, "of": inner, "count": FEW}
    listed = member | {"of": st.lists(inner, min_size=1, max_size=3)}
    del listed["count"]
    more = {
        "switch": {},
        "mesh": {},
        "ring": {},
        "pcie-tree": {"per_switch": FEW, "uplink": LINK},
        "rails": {"spine": LINK},
        "fat-tree": {"leaf": FEW, "oversubscription": st.just(2.0)},
    }
    made = [
        st.fixed_dictionaries({"join": st.just(join), **one, **also}) for join, also in more.items() for one in (member, listed)
    ]
    made.append(st.fixed_dictionaries({"join": st.just("torus2d"), "link": LINK, "of": inner, "shape": st.tuples(FEW, FEW)}))
    left = [{"nics": 1}, {"nics": {"count": 1, "link": "near", "stripe": 2}}]
    return st.tuples(st.one_of(made), st.sampled_from(left)).map(lambda both: both[0] | both[1])


NESTED = st.recursive(DEVICE, templates, max_leaves=4)
FLAT = st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(["g", "c", "switch", "switch"]), min_size=2).map(
    lambda members: {"join": "explicit", "members": members}
)


def built(machine):
    """The graph of a machine, whether or not all reach each other, and its document."""
    document = yaml_source.parse(f"{HEAD}{PLAIN}machine: {json.dumps(machine)}", "machine.yaml", TopologyError)
    whole = layers.compose(document)
    return build.Builder(yaml_source.load(whole, Spec), whole).machine(), whole


def steps(graph, source, target, avoid, *, closed):
    """The fewest wires from one to the other, by flooding; None where there is no way."""
    seen, edge, count = {source}, {source}, 0
    while edge and target not in edge:
        wired = {
            graph.edges[number].target for here in edge for number in graph.out[here] if graph.edges[number].link not in avoid
        }
        through = {v for v in wired if v == target or (graph.vertices[v].passes_on and v not in closed)}
        edge, count = through - seen, count + 1
        seen |= edge
    return count if edge else None


def closed_nics(graph, source, target):
    """The NICs of groups that hold both ends, each group's only one: no way for them, unless there is no other."""
    nics = {number: vertex.name.removesuffix("nic-0") for number, vertex in enumerate(graph.vertices) if vertex.kind == "nic"}
    ends = [graph.vertices[end].name for end in (source, target)]
    yield {nic for nic, group in nics.items() if all(name.startswith(group) for name in ends)}
    yield set()


def check_routes(graph, document, avoid):
    """Every pair has the shortest route, and `checks.routes` refuses exactly the machines with a pair that has none."""
    unreachable = False
    for source, target in permutations(graph.devices, 2):
        route = graph.route(source, target, avoid)
        ways = (steps(graph, source, target, avoid, closed=closed) for closed in closed_nics(graph, source, target))
        fewest = next((way for way in ways if way is not None), None)
        unreachable |= fewest is None
        assert (route and len(route)) == fewest
        if route:
            assert (route[0].source, route[-1].target) == (source, target)
            assert all(one.target == other.source and graph.vertices[one.target].passes_on for one, other in pairwise(route))
            assert not avoid & {edge.link for edge in route}
    try:
        checks.routes(graph, avoid, document)
    except TopologyError as error:
        assert unreachable, error
        assert re.match(r"machine\.yaml:\d+: machine: \S+ and \S+ cannot reach each other", str(error))
    else:
        assert not unreachable


@given(machine=NESTED | FLAT, data=st.data())
@settings(deadline=None, max_examples=500)
def test_every_pair_has_the_route_of_fewest_wires_or_the_machine_is_refused(machine, data):
    try:
        graph, document = built(machine)
    except TopologyError as error:
        assert re.search("joined one to one|no device|has more than", str(error)), error
        return
    named = [vertex.name for vertex in graph.vertices if not vertex.name.startswith("nic-")]
    if isinstance(machine, dict) and len(named) > 1:
        ends = st.lists(st.sampled_from(named), min_size=2, max_size=2, unique=True)
        cables = data.draw(st.lists(st.tuples(ends, LINK), max_size=12))
        graph, document = built(machine | {"connect": [[*both, link] for both, link in cables]})
    check_routes(graph, document, data.draw(st.frozensets(LINK, max_size=2)))

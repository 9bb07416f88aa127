"""Topologies: the shipped ones load, and every fault is one kind of error with file, line and the value found."""

import random
import re
from importlib import resources

import pytest

from ringsim.errors import TopologyError
from ringsim.topology import Topology, load, names, parse

TEXT = """\
ringsim: 1
name: bench
source: "made for this test"
ranks: 4
devices:
  kind: cpu
  cores: 2
  memory_bandwidth: 10 GB/s
  attention:
    - dtype: float32
      head_dim: 64
      rate: 50 GFLOP/s
      overhead: 8 us
      block_overhead: 1 us
      pass_bandwidth: 5 GB/s
      micro_tile: {q_rows: 256, k_rows: 256, edge_rows: 128}
      full: [[1, 0.125], [65536, 0.75]]
      masked: [[1, 0.0625], [32768, 0.5]]
path:
  latency: 2 us
  bandwidth: 400 Gbit/s
  progress: polling
  look: 1 us
notes: {made: by hand}
"""
SHIPPED = {name: (resources.files("ringsim.topologies") / f"{name}.yaml").read_text(encoding="utf-8") for name in names()}


def replaced(old, new):
    """TEXT with its one `old` replaced, and the number of its line."""
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new), TEXT[: TEXT.index(old)].count("\n") + 1


def refusal(text):
    with pytest.raises(TopologyError) as caught:
        parse(text, "machine.yaml")
    return str(caught.value)


@pytest.mark.parametrize("name", names())
def test_a_shipped_topology_loads_by_name_and_by_path(name, tmp_path):
    file = tmp_path / "copy.yaml"
    file.write_text(SHIPPED[name], encoding="utf-8")
    topology = load(name)
    assert topology.name == name
    assert topology == load(file) == load(str(file)) == parse(SHIPPED[name])


def test_there_are_shipped_topologies():
    assert "ideal" in names()


def test_quantities_are_read_in_si_units():
    topology = parse(TEXT)
    attention = topology.devices.attention[0]
    assert (topology.ranks, topology.devices.cores, topology.devices.memory_bandwidth) == (4, 2, 10e9)
    assert (attention.rate, attention.overhead, attention.block_overhead, attention.pass_bandwidth) == (50e9, 8e-6, 1e-6, 5e9)
    assert (attention.full, attention.masked) == (((1, 0.125), (65536, 0.75)), ((1, 0.0625), (32768, 0.5)))
    assert (topology.path.latency, topology.path.bandwidth, topology.path.look) == (2e-6, 50e9, 1e-6)
    assert topology.notes == {"made": "by hand"}


def test_a_topology_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse(TEXT).name = "other"


@pytest.mark.parametrize("given", ["idael", "no/such/file", "", "x" * 5000], ids=["typo", "path", "empty", "long"])
def test_an_unknown_name_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TopologyError, match=r"cannot be read|no topology .*give a \.yaml file or one of .*ideal"):
        load(given)


@pytest.mark.parametrize("content", [None, b"\xff\xfename: x"], ids=["no file", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "machine.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TopologyError, match=f"{re.escape(str(file))}: cannot be read"):
        load(file)


UNKNOWN_KEYS = [
    ("ranks: 4", "rank: 4", "rank: unknown key 'rank'; did you mean 'ranks'? allowed: ringsim, name, source"),
    ("cores: 2", "core: 2", "devices.core: unknown key 'core'; did you mean 'cores'? allowed: kind, cores"),
    ("rate: 50", "rates: 50", "devices.attention.0.rates: unknown key 'rates'; did you mean 'rate'? allowed: dtype, head_dim"),
    ("{q_rows", "{qrows", "devices.attention.0.micro_tile.qrows: unknown key 'qrows'; did you mean 'q_rows'? allowed: q_rows"),
    ("latency", "latncy", "path.latncy: unknown key 'latncy'; did you mean 'latency'? allowed: latency, bandwidth, progress"),
    ("look: 1", "42: 1", "path.42: unknown key '42'; allowed: latency, bandwidth, progress, look"),
]
FAULTS = [
    ("name: bench", "name: bench\nname: other", "duplicate key 'name'; first on line 2", 1),
    ("q_rows: 256", "q_rows: 1, q_rows: 2", "duplicate key 'q_rows'; first on line 16"),
    ("8 us", "8", "devices.attention.0.overhead: 8 is a bare number: write a time with its unit, e.g. 8 us"),
    ("2 us", "2.5e-6", "path.latency: 2.5e-06 is a bare number"),
    ("5 GB/s", '"5"', "devices.attention.0.pass_bandwidth: '5' has no unit: write a bandwidth such as"),
    ("10 GB/s", "10 GB", "devices.memory_bandwidth: '10 GB': 'GB' is no unit of bandwidth; allowed: B/s, kB/s"),
    ("50 GFLOP/s", "50 GB/s", "devices.attention.0.rate: '50 GB/s': 'GB/s' is no unit of rate; allowed: FLOP/s"),
    ("2 us", "2 min", "path.latency: '2 min': 'min' is no unit of time; allowed: s, ms, us"),
    ("2 us", "-2 us", "path.latency: '-2 us' is out of range: a time is finite and not negative"),
    ("2 us", "1e999999999 us", "path.latency: '1e999999999 us' is out of range"),
    ("400 Gbit/s", "0 Gbit/s", "path.bandwidth: Input should be greater than 0 (found '0 Gbit/s')"),
    ("latency: 2 us", "", "path: key 'latency' is missing", -1),
    ("      head_dim: 64\n", "", "devices.attention.0: key 'head_dim' is missing", -1),
    ("name: bench", "name: &here bench", "anchors and aliases are not allowed"),
    ("name: bench", "name: *here", "anchors and aliases are not allowed"),
    ("name: bench", "name: [bench", "not YAML: expected ',' or ']'", 1),
    ("name: bench", "name: a: b", "not YAML: mapping values are not allowed here"),
    ("name: bench", '"name: bench', "not YAML: could not find expected ':'", 1),
    ("name: bench", 'name: "\\UFFFFFFFF"', "not YAML: "),
    ("name: bench", "name: bench\x07", "not YAML: unacceptable character #x0007"),
    ("ringsim: 1", "%YAML " + "1" * 5000 + ".1\n---\nringsim: 1", "not YAML: "),
    ("  cores: 2", "\tcores: 2", "not YAML: "),
    ("notes:", "---\nnotes:", "not YAML: but found another document"),
    ("notes:", "? [a, b]\n: 1\nnotes:", "a key must be a plain word"),
    ("ringsim: 1", "ringsim: 2", "ringsim: this ringsim reads version 1 of the format, found 2"),
    ("name: bench", "name: 7", "name: Input should be a valid string (found 7)"),
    ("name: bench", 'name: ""', "name: String should have at least 1 character (found '')"),
    ("ranks: 4", "ranks: four", "ranks: Input should be a valid integer (found 'four')"),
    ("ranks: 4", "ranks: 4.0", "ranks: Input should be a valid integer (found 4.0)"),
    ("ranks: 4", 'ranks: "4"', "ranks: Input should be a valid integer (found '4')"),
    ("ranks: 4", "ranks: true", "ranks: Input should be a valid integer (found True)"),
    ("ranks: 4", "ranks: 0", "ranks: Input should be greater than or equal to 1 (found 0)"),
    ("ranks: 4", "ranks: " + "9" * 5000, "ranks: "),
    ("kind: cpu", "kind: tpu", "devices.kind: Input should be 'cpu' or 'gpu' (found 'tpu')"),
    ("kind: cpu", "kind: gpu", "devices: kind 'gpu' takes no `cores`", -1),
    ("cores: 2", "", "devices: kind 'cpu' needs `cores`", -2),
    ("polling", "poling", "path.progress: Input should be 'offload', 'handshake', 'thread' or 'polling' (found 'poling')"),
    ("dtype: float32", "dtype: fp32", "devices.attention.0.dtype: Input should be 'float64', 'float32'"),
    ("{made: by hand}", "[by, hand]", "notes: Input should be a valid dictionary (found ['by', 'hand'])"),
    ("{q_rows: 256, k_rows: 256, edge_rows: 128}", "256", "devices.attention.0.micro_tile: Input should be"),
    ("[[1, 0.125], [65536, 0.75]]", "[]", "devices.attention.0.full: Tuple should have at least 1 item"),
    ("[65536, 0.75]", "[65536]", "devices.attention.0.full.1"),
    ("65536", "0.5", "devices.attention.0.full.1.0: Input should be greater than or equal to 1 (found 0.5)"),
    ("0.75", "1.5", "devices.attention.0.full.1.1: Input should be less than or equal to 1 (found 1.5)"),
    ("0.75", "0", "devices.attention.0.full.1.1: Input should be greater than 0 (found 0)"),
    ("65536", "1", "devices.attention.0.full: the pairs per micro-tile must increase from point to point, found [1.0, 1.0]"),
    ("32768", "0x7f", "devices.attention.0.masked.1.0: Input should be a valid number"),
    ("[[1, 0.0625], [32768, 0.5]]", "[[9, 0.5], [4, 0.5]]", "devices.attention.0.masked: the pairs per micro-tile must increase"),
]


@pytest.mark.parametrize("fault", UNKNOWN_KEYS + FAULTS, ids=lambda fault: repr(fault[1])[:30])
def test_a_fault_is_reported_with_its_line_and_what_was_found(fault):
    old, new, message, *off = fault
    text, line = replaced(old, new)
    assert refusal(text).startswith(f"machine.yaml:{line + sum(off)}: {message}")


def test_no_key_is_proposed_where_none_is_near():
    text, _ = replaced("look: 1", "42: 1")
    assert "did you mean" not in refusal(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "NoneType"), ("# nothing\n", "NoneType"), ("- a", "list"), ("5", "int"), ("name", "str"), ("null", "NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused(text, found):
    assert refusal(text) == f"machine.yaml:1: expected keys and values, found {found}"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("path:", "pth:", "19: pth: unknown key 'pth'; did you mean 'path'?"),
        ("notes:", "path:\n  latency: 1 us\nnotes:", "24: duplicate key 'path'; first on line 19"),
    ],
)
def test_the_line_of_a_key_is_its_own_also_where_its_value_begins_below(old, new, message):
    assert refusal(replaced(old, new)[0]).startswith(f"machine.yaml:{message}")


@pytest.mark.parametrize("tagged", ["name: !!str bench", "name: !here bench", "!!str name: bench"])
def test_a_tag_is_refused(tagged):
    assert re.match(r"machine\.yaml:2: .*\btags?\b", refusal(replaced("name: bench", tagged)[0]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("65536", '"65536"'),
        ("65536", "65_536"),
        ("65536", "1e400"),
        ("65536", "inf"),
        ("0.75", "true"),
        ("edge_rows: 128", "edge_rows: 128, exact: off"),
        ("edge_rows: 128", 'edge_rows: 128, exact: "true"'),
        ("edge_rows: 128", "edge_rows: 128, exact: 1"),
        ("ringsim: 1", "ringsim: true"),
    ],
)
def test_only_a_plain_finite_number_is_a_number_and_only_true_and_false_are_truth_values(old, new):
    text, line = replaced(old, new)
    assert refusal(text).startswith(f"machine.yaml:{line}: ")


@pytest.mark.parametrize("depth", [40, 300, 10_000])
@pytest.mark.parametrize("nested", ["[{}]", "{{a: {}}}"], ids=["lists", "mappings"])
def test_deep_nesting_is_refused(nested, depth):
    opening, closing = nested.format("\n").split("\n")
    # many short lines: PyYAML takes quadratic time over one long line, and is no part of this test
    text, line = replaced("{made: by hand}", "\n  ".join(["", *[opening] * depth, *[closing] * depth]))
    message = refusal(text)
    assert re.match(r"machine\.yaml:(\d+): .*nested too deeply; at most 32 levels", message)
    assert line <= int(message.split(":")[1]) <= line + depth


def test_ten_thousand_brackets_on_one_line_are_refused():
    text, line = replaced("{made: by hand}", "[" * 10_000)
    assert refusal(text).startswith(f"machine.yaml:{line}: ")


VALUE = re.compile(r"[^\n,}]*")
JUNK = [
    *"{}[]&*!|>%@`'\"#,:?-~=\t\0\a\r\x85\u2028é\ufeff",
    *["- ", ": ", "? ", "<<: ", "---\n", "...\n", "\n\n", "!!int ", "!x ", "&a ", "*a ", "%YAML 1.2\n", "\\x", '"\\UFFFFFFFF"'],
    *["null", "true", ".inf", "1e999", "1e999999999", "9" * 400, "0x1F", "1:30", "-0", "1_0", "5 GB/s", "8 us", "[1, 1]"],
]


def mutated(text, rng):
    for _ in range(rng.randint(1, 3)):
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


def test_a_thousand_damaged_files_load_or_are_refused_with_file_and_line():
    rng = random.Random(0)
    sources = [*SHIPPED.values(), TEXT]
    refused = 0
    for _ in range(1000):
        text = mutated(rng.choice(sources), rng)
        try:
            assert isinstance(parse(text, "machine.yaml"), Topology)
        except TopologyError as error:
            refused += 1
            assert re.match(r"machine\.yaml:\d+: .", str(error)), text
        except Exception as error:  # noqa: BLE001
            pytest.fail(f"{error!r} from {text!r}")
    assert 100 < refused < 1000, "the damage is neither too slight nor too great"

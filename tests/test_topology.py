"""Topologies in YAML: the shipped ones load, and every fault is one error with file, line, what was found and what is allowed."""

import re
from importlib import resources

import pytest

from ringsim.errors import TopologyError
from ringsim.topology import load, names, parse
from ringsim.topology.parts import Attention, Device

TEXT = """\
ringsim: 2
name: bench
source: "defined: for this test"
counts: {nodes: 2, gpus: 4}
devices:
  gpu:
    source: "vendor: a datasheet"
    kind: gpu
    memory: 80 GB
    memory_bandwidth: {value: 3 TB/s, source: "measured: a copy"}
    launch: 5 us
    peak: {bfloat16: 989 TFLOP/s}
    attention:
      - {dtype: bfloat16, head_dim: 128, block_overhead: 1 us, pass_bandwidth: 2 TB/s,
         micro_tile: {q_rows: 256, k_rows: 256, edge_rows: 128},
         full: [[1, 0.125], [65536, 0.75]], masked: [[1, 0.0625], [32768, 0.5]]}
  slow: {like: gpu, speed: 0.5}
  host: {kind: cpu, cores: 16, ranks: 3, memory_bandwidth: 90 GB/s, inside: shm}
links:
  shm: {bandwidth: 20 GB/s, latency: 600 ns}
  nvlink: {bandwidth: 450 GB/s, latency: 1 us, achieved: 0.8, duplex: 1.5}
  ndr:
    source: "guessed: by eye"
    bandwidth: 400 Gbit/s
    regimes: [{from: 0 B, latency: 2 us}, {from: 64 KiB, latency: 9 us, bandwidth: 20 GB/s}]
groups:
  node: {join: switch, link: nvlink, count: gpus, of: gpu, nics: {count: 2, link: shm}}
machine: {join: rails, link: ndr, count: nodes, of: node}
replace: {node-1/gpu-3: slow}
transports:
  nccl: {progress: offload, device_share: 0.1, paths: {ndr: {eager: 8 KiB, latency: 7 us}}}
  mpi: {progress: polling, avoid: [nvlink]}
transport: nccl
place: block
notes: {made: by hand}
"""
TOP = 'ringsim: 2\nname: top\nsource: "guessed: on top"\n'
SHIPPED = {name: (resources.files("ringsim.topologies") / f"{name}.yaml").read_text(encoding="utf-8") for name in names()}


def replaced(old, new):
    """TEXT with its one `old` replaced, and the number of its line."""
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new), TEXT[: TEXT.index(old)].count("\n") + 1


def refusal(text, *args, **options):
    with pytest.raises(TopologyError) as caught:
        parse(text, "machine.yaml", *args, **options)
    return str(caught.value)


def figures(topology):
    """What each figure says: text, kind, source, and the file and line that it comes from."""
    return {f.key: (f.text, f.kind, f.source, f.position.rpartition("/")[2]) for f in topology.figures}


@pytest.fixture
def layered(tmp_path):
    """Writes TEXT to base.yaml, other files beside it, and loads the last."""

    def loaded(*files, **options):
        for name, text in (("base.yaml", TEXT), *files):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return load(tmp_path / files[-1][0], **options)

    def refused(*files, **options):
        with pytest.raises(TopologyError) as caught:
            loaded(*files, **options)
        return re.sub(r"/\S*/", "", str(caught.value))

    loaded.refusal = refused
    return loaded


@pytest.mark.parametrize("name", names())
def test_a_shipped_topology_loads_by_name_and_by_path_and_says_where_each_figure_is_from(name, tmp_path):
    file = tmp_path / "copy.yaml"
    file.write_text(SHIPPED[name], encoding="utf-8")
    topology = load(name)
    assert topology.name == name
    assert topology == load(file) == load(str(file)) == parse(SHIPPED[name])
    assert all(figure.kind in {"measured", "vendor", "guessed", "defined"} and figure.source for figure in topology.figures)
    assert all(re.fullmatch(r"topologies/[\w-]+\.yaml:\d+", figure.position) for figure in topology.figures)


def test_quantities_are_read_in_si_units():
    spec = parse(TEXT).spec
    gpu, table, ndr = spec.devices["gpu"], spec.devices["gpu"].attention[0], spec.links["ndr"]
    assert (gpu.memory, gpu.memory_bandwidth, gpu.launch, gpu.peak) == (80e9, 3e12, 5e-6, {"bfloat16": 989e12})
    assert (table.block_overhead, table.pass_bandwidth, table.full[1], table.masked[1]) == (
        1e-6,
        2e12,
        (65536, 0.75),
        (32768, 0.5),
    )
    assert (ndr.bandwidth, ndr.regimes[1].from_, ndr.regimes[1].latency, ndr.regimes[1].bandwidth) == (50e9, 65536, 9e-6, 20e9)
    assert (spec.transports["nccl"].paths["ndr"].eager, spec.notes) == (8192, {"made": "by hand"})


def test_a_device_computes_at_its_speed():
    gpu, slow = (parse(TEXT).spec.devices[name] for name in ("gpu", "slow"))
    assert (gpu.rate(gpu.attention[0]), slow.rate(slow.attention[0])) == (989e12, 494.5e12)
    assert (gpu.overhead_s(gpu.attention[0]), slow.overhead_s(slow.attention[0])) == (5e-6, 10e-6)
    with pytest.raises(TopologyError, match="attention for float32 has no `overhead`, and the device no `launch`"):
        Device.model_construct(launch=None).overhead_s(Attention.model_construct(dtype="float32", overhead=None))


def test_a_topology_cannot_be_changed():
    with pytest.raises(AttributeError):
        parse(TEXT).spec = None
    with pytest.raises(ValueError, match="frozen"):
        parse(TEXT).spec.name = "other"


@pytest.mark.parametrize(
    "given", ["idael", "no/such/file", "", "x" * 5000, "a\0b"], ids=["typo", "path", "empty", "long", "null"]
)
def test_an_unknown_name_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TopologyError, match=r"no topology .*: give a \.yaml file or a shipped name; .*ideal"):
        load(given)


@pytest.mark.parametrize("content", [None, b"\xff\xfename: x"], ids=["no file", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_named(content, tmp_path):
    file = tmp_path / "machine.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(TopologyError, match=f"{re.escape(str(file))}: cannot be read"):
        load(file)
    with pytest.raises(TopologyError, match=r"'a\\x00b\.yaml': cannot be read"):
        load("a\0b.yaml")


GPU, TABLE, COPY = "devices.gpu", "devices.gpu.attention.0", '{value: 3 TB/s, source: "measured: a copy"}'
KIND = "a source says what kind it is and where from: 'measured: ...', 'vendor: ...', 'guessed: ...', 'defined: ...'; found"
OWN = "memory_bandwidth: a figure with its own source is {value: ..., source: 'measured: ...'}, found keys"
PLACE = "place: 'block', 'round-robin', 'snake', or a list of each rank's device by index or name; found"
VERSION = "ringsim: this ringsim reads version 2 of the format, found"
INTEGER = "counts.nodes: Input should be a valid integer (found"
INCREASE = "the pairs per micro-tile must increase from point to point, found"
FAULTS = [
    ("notes: {", "note: {", "note: unknown key 'note'; did you mean 'notes'? allowed: ringsim, name, source, extends"),
    ("cores: 16", "core: 16", "devices.host.core: unknown key 'core'; did you mean 'cores'? allowed: like, source, kind"),
    ("q_rows", "qrows", f"{TABLE}.micro_tile.qrows: unknown key 'qrows'; did you mean 'q_rows'? allowed: q_rows, k_rows"),
    ("duplex", "duplx", "links.nvlink.duplx: unknown key 'duplx'; did you mean 'duplex'? allowed: source, bandwidth"),
    ("{from: 64", "{form: 64", "links.ndr.regimes.1.form: unknown key 'form'; did you mean 'from'? allowed: from, latency"),
    ("{count: 2", "{cout: 2", "groups.node.nics.cout: unknown key 'cout'; did you mean 'count'? allowed: count, link, affinity"),
    ("join: rails", "join: rails, lnk: 1", "machine.lnk: unknown key 'lnk'; did you mean 'link'? allowed: name, source, nics"),
    ("avoid", "avod", "transports.mpi.avod: unknown key 'avod'; did you mean 'avoid'? allowed: source, progress, drives"),
    ("eager: 8", "eagr: 8", "transports.nccl.paths.ndr.eagr: unknown key 'eagr'; did you mean 'eager'? allowed: source, latency"),
    ("    launch:", "    42:", "devices.gpu.42: unknown key '42'; allowed: like, source, kind, cores, ranks"),
    ("name: bench", "name: bench\nname: other", "duplicate key 'name'; first on line 2", 1),
    ("q_rows: 256", "q_rows: 1, q_rows: 2", "duplicate key 'q_rows'; first on line 15"),
    ("launch: 5 us", "launch: 8", f"{GPU}.launch: 8 is a bare number: write a time with its unit, e.g. 8 us"),
    ("launch: 5 us", "launch: true", f"{GPU}.launch: True is no quantity: write a time with its unit, e.g. 8 us"),
    ("launch: 5 us", "launch: -5 us", f"{GPU}.launch: '-5 us' is out of range: a time is finite and not negative"),
    ("launch: 5 us", "launch: 1e999999999 us", f"{GPU}.launch: '1e999999999 us' is out of range"),
    ("launch: 5 us", "launch: 5 min", f"{GPU}.launch: '5 min': 'min' is no unit of time; allowed: s, ms, us"),
    ("memory: 80 GB", "memory: 80 GB/s", f"{GPU}.memory: '80 GB/s': 'GB/s' is no unit of size; allowed: B, kB, KB"),
    ("90 GB/s", "90 GB", "devices.host.memory_bandwidth: '90 GB': 'GB' is no unit of bandwidth; allowed: B/s, kB/s"),
    ("989 TFLOP/s", "989 TB/s", f"{GPU}.peak.bfloat16: '989 TB/s': 'TB/s' is no unit of rate; allowed: FLOP/s"),
    ("400 Gbit/s", '"400"', "links.ndr.bandwidth: '400' has no unit: write a bandwidth such as 450 GB/s or 400 Gbit/s"),
    ("400 Gbit/s", "0 Gbit/s", "links.ndr.bandwidth: Input should be greater than or equal to 1 (found '0 Gbit/s')"),
    ("{from: 64 KiB", "{from: 65536", "links.ndr.regimes.1.from: 65536 is a bare number: write a size with its unit"),
    (COPY, "{value: 3 TB/s}", f"{GPU}.{OWN} value"),
    ("{value: 3 TB/s", "{value: 3", f"{GPU}.memory_bandwidth: 3 is a bare number"),
    ('"measured: a copy"', "copied", f"{GPU}.memory_bandwidth: {KIND} 'copied'"),
    ('"vendor: a datasheet"', '"vendor:"', f"{GPU}.source: {KIND} 'vendor:'"),
    ('"vendor: a datasheet"', "vendor: it", "not YAML: mapping values are not allowed here; quote a text that has ': ' in it"),
    ('"defined: for this test"', "5", "source: Input should be a valid string (found 5)"),
    ('source: "defined: for this test"\n', "", "key 'source' is missing", -2),
    ("ringsim: 2\n", "", "key 'ringsim' is missing"),
    ("    kind: gpu\n", "", f"{GPU}: key 'kind' is missing", -2),
    ("head_dim: 128, ", "", f"{TABLE}: key 'head_dim' is missing"),
    ("transport: nccl\n", "", "key 'transport' is missing: which of nccl, mpi is in use?", -32),
    *[("name: bench", f"name: {new}", "anchors and aliases are not allowed") for new in ("&here bench", "*here")],
    ("name: bench", "name: [bench", "not YAML: expected ',' or ']'", 1),
    ("name: bench", '"name: bench', "not YAML: could not find expected ':'", 1),
    ("name: bench", 'name: "\\UFFFFFFFF"', "not YAML: "),
    ("name: bench", "name: bench\x07", "not YAML: unacceptable character #x0007"),
    ("ringsim: 2", "%YAML " + "1" * 5000 + ".1\n---\nringsim: 2", "not YAML: "),
    ("  nvlink: {", "\tnvlink: {", "not YAML: "),
    ("notes:", "---\nnotes:", "not YAML: but found another document"),
    ("notes:", "? [a, b]\n: 1\nnotes:", "a key must be a plain word"),
    ("ringsim: 2", "ringsim: 1", f"{VERSION} 1: version 1 comes from an older `ringsim calibrate`; calibrate again"),
    ("ringsim: 2", "ringsim: '2'", f"{VERSION} '2'"),
    ("name: bench", 'name: ""', "name: String should have at least 1 character (found '')"),
    *[
        ("nodes: 2", f"nodes: {new}", f"{INTEGER} {found})")
        for new, found in (("two", "'two'"), ("2.0", "2.0"), ("true", "True"))
    ],
    ("nodes: 2", "nodes: 0", "counts.nodes: Input should be greater than or equal to 1 (found 0)"),
    ("nodes: 2", "nodes: 1048577", "counts.nodes: Input should be less than or equal to 1048576 (found 1048577)"),
    ("nodes: 2", "nodes: " + "9" * 5000, f"counts.nodes: '{'9' * 63}...: a number of too many digits"),
    ("nodes: 2", "2nodes: 2", "counts.2nodes: String should match pattern '^[A-Za-z_][A-Za-z0-9_-]*$' (found '2nodes')"),
    ("{nodes: 2, gpus: 4}", "5", "counts: Input should be keys and values (found 5)"),
    ("count: gpus", "count: gpu", "groups.node.count: 'gpu' is no whole number and no name in `counts`; did you mean 'gpus'?"),
    ("count: gpus, ", "", "groups.node: `count` goes with one kind of member; a list of members counts itself"),
    ("kind: gpu", "kind: {a: 1}", f"{GPU}.kind: Input should be 'cpu' or 'gpu' (found {{'a': 1}})"),
    ("kind: gpu", "kind: gpu\n    ranks: 2", f"{GPU}: kind 'gpu' takes no `ranks`: it has one, unless `place` puts", -2),
    ("kind: gpu", "kind: gpu\n    cores: 2", f"{GPU}: kind 'gpu' takes no `cores`", -2),
    ("cores: 16, ", "", "devices.host: kind 'cpu' needs `cores`"),
    ("inside: shm", "inside: shn", "devices.host.inside: no link 'shn'; did you mean 'shm'? allowed: shm, nvlink, ndr"),
    ("{bfloat16", "{float16", f"{GPU}: attention for bfloat16 has no `rate`, and `peak` has none for it", -6),
    ("    launch: 5 us\n", "", f"{GPU}: attention for bfloat16 has no `overhead`, and the device no `launch`", -5),
    ("{bfloat16", "{bf16", f"{GPU}.peak.bf16: Input should be 'float64', 'float32', 'float16' or 'bfloat16' (found 'bf16')"),
    ("{q_rows: 256, k_rows: 256, edge_rows: 128}", "256", f"{TABLE}.micro_tile: Input should be keys and values (found 256)"),
    ("[[1, 0.125], [65536, 0.75]]", "[]", f"{TABLE}.full: There should be at least one item (found [])"),
    ("[65536, 0.75]", "[65536]", f"{TABLE}.full.1: item 1 is missing"),
    ("65536, 0.75", "0.5, 0.75", f"{TABLE}.full.1.0: Input should be greater than or equal to 1 (found 0.5)"),
    ("0.75", "1.5", f"{TABLE}.full.1.1: Input should be less than or equal to 1 (found 1.5)"),
    ("65536, 0.75", "1, 0.75", f"{TABLE}.full: {INCREASE} [1.0, 1.0]"),
    ("duplex: 1.5", "duplex: 2.5", "links.nvlink.duplex: Input should be less than or equal to 2 (found 2.5)"),
    ("share: 0.1", "share: 1", "transports.nccl.device_share: Input should be less than 1 (found 1)"),
    ("450 GB/s, latency: 1 us", "450 GB/s", "links.nvlink: a link has either `latency` or `regimes`"),
    ("    regimes", "    latency: 1 us\n    regimes", "links.ndr: a link has either `latency` or `regimes`", -3),
    ("{from: 0 B, latency: 2 us}, ", "", "links.ndr.regimes: regimes begin at 0 B and increase"),
    ("{from: 64 KiB", "{from: 0 B", "links.ndr.regimes: regimes begin at 0 B and increase"),
    ("7 us", "7 us, regimes: [{from: 0 B, latency: 1 s}]", "transports.nccl.paths.ndr: `regimes` say latency and bandwidth"),
    ("paths: {ndr", "paths: {ndx", "transports.nccl.paths.ndx: no link 'ndx'; did you mean 'ndr'? allowed: shm, nvlink, ndr"),
    ("[nvlink]", "[nvlnk]", "transports.mpi.avoid.0: no link 'nvlnk'; did you mean 'nvlink'? allowed: shm, nvlink, ndr"),
    ("[nvlink]", "nvlink", "transports.mpi.avoid: Input should be a list (found 'nvlink')"),
    ("offload", "ofload", "transports.nccl.progress: Input should be 'offload', 'handshake', 'thread' or 'polling' (found 'of"),
    ("transport: nccl", "transport: ncl", "transport: no transport 'ncl'; did you mean 'nccl'? allowed: nccl, mpi"),
    (
        "transport: nccl",
        "transport: mpi",
        "machine: node-0/gpu-0 and node-0/gpu-2 cannot reach each other without nvlink, wh",
        -5,
    ),
    *[("place: block", f"place: {new}", f"{PLACE} {new}") for new in ("5", "[0, -1]", "[0, 1.5]", "[]", "[[0]]")],
    ("place: block", "place: [0, 8]", "place: device 8 of 8; they count from 0"),
    (
        "place: block",
        "place: [node-0/gpu-9]",
        "place: no device 'node-0/gpu-9'; did you mean 'node-0/gpu-3'? allowed: node-0/gpu-0",
    ),
    ("place: block", "place: [node-0/nic-0]", "place: no device 'node-0/nic-0'; did you mean 'node-0/gpu-0'?"),
    ("gpu-3: slow", "gpu-4: slow", "replace.node-1/gpu-4: no such device; did you mean 'node-1/gpu-3'? allowed: node-0/gpu-0"),
    ("gpu-3: slow", "gpu-3: slwo", "replace.node-1/gpu-3: no device 'slwo'; did you mean 'slow'? allowed: gpu, host, slow"),
    ("like: gpu", "like: gpx", "devices.slow.like: no device 'gpx'; did you mean 'gpu'? allowed: gpu, host"),
    ("like: gpu", "like: slow", "devices.slow.like: slow is like itself, through slow"),
    ("like: gpu", "like: gpu, cores: 3", "devices.slow: kind 'gpu' takes no `cores`"),
    ("like: gpu", "like: gpu, egress: null", "devices.slow.egress: nothing to remove: what it extends has no such key"),
    ("of: gpu,", "of: node,", "groups.node.of: groups lie within each other more than 16 deep: does one contain itself?"),
    ("{count: 2, link: shm}", "{count: 2, link: sm}", "groups.node.nics.link: no link 'sm'; did you mean 'shm'? allowed: shm"),
    ("{count: 2, link: shm}", "5", "groups.node.nics: 5 NICs for 4 devices, used: [0, 1, 2, 3]; every NIC needs a device"),
    ("link: shm}", "affinity: [0, 1]}", "groups.node.nics.affinity: names a NIC for each device: 4 devices, 2 given"),
    ("link: shm}", "affinity: [0, 0, 0, 2]}", "groups.node.nics.affinity: 2 NICs for 4 devices, used: [0, 2]; every NIC needs"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: repr(fault[1])[:30])
def test_a_fault_is_reported_with_its_line_what_was_found_and_what_is_allowed(fault):
    old, new, message, *off = fault
    text, line = replaced(old, new)
    assert refusal(text).startswith(f"machine.yaml:{line + sum(off)}: {message}")


def test_a_figure_has_the_source_of_its_own_or_else_the_nearest_around_it():
    found = figures(parse(TEXT, "machine.yaml"))
    assert found["devices.gpu.memory_bandwidth"] == ("3 TB/s", "measured", "a copy", "machine.yaml:10")
    assert found["devices.gpu.attention.0.full"][1:] == ("vendor", "a datasheet", "machine.yaml:16")
    assert found["devices.slow.peak.bfloat16"] == ("989 TFLOP/s", "vendor", "a datasheet", "machine.yaml:12")
    assert found["devices.slow.speed"] == ("0.5", "defined", "for this test", "machine.yaml:17")
    assert found["links.ndr.regimes.1.from"] == ("64 KiB", "guessed", "by eye", "machine.yaml:25")
    assert found["links.nvlink.achieved"] == ("0.8", "defined", "for this test", "machine.yaml:21")


def test_a_setting_is_a_guess_of_the_one_who_gives_it():
    for given in (["links.nvlink.achieved=0.5", "nodes=3"], {"links.nvlink.achieved": 0.5, "counts.nodes": 3}):
        topology = parse(TEXT, "machine.yaml", given)
        said = "--set links.nvlink.achieved=0.5"
        assert figures(topology)["links.nvlink.achieved"] == ("0.5", "guessed", f"what if, {said}", said)
        assert (topology.spec.links["nvlink"].achieved, len(topology.devices)) == (0.5, 12)
    topology = parse(TEXT, settings=["devices.gpu.memory_bandwidth=1 TB/s", "links.ndr.regimes.1.latency=3us", "replace={}"])
    assert (topology.spec.devices["slow"].memory_bandwidth, topology.spec.replace) == (1e12, {})
    found = figures(topology)
    assert {found[key][1] for key in ("links.ndr.regimes.1.latency", "devices.slow.memory_bandwidth")} == {"guessed"}
    new = ["links.new={latency: {value: 1 us, source: 'measured: me'}}", "links.new.bandwidth=1 GB/s"]
    found = figures(parse(TEXT, settings=new))
    assert [found[f"links.new.{key}"][1] for key in ("bandwidth", "latency")] == ["guessed", "measured"]


ONE = "is one figure with its source: set"
SETTINGS = [
    ("node=3", "'node' cannot be set; did you mean 'nodes'? allowed: nodes, gpus, ringsim, name"),
    ("counts.node=3", "'node' cannot be set; did you mean 'nodes'? allowed: nodes, gpus, ringsim"),
    ("extends=ideal", "'extends' cannot be set; "),
    ("nodes=0", "counts.nodes: Input should be greater than or equal to 1 (found 0)"),
    ("links.ndr.bandwidth=800", "links.ndr.bandwidth: 800 is a bare number"),
    ("links.ndr.bandwith=1", "links.ndr.bandwith: unknown key 'bandwith'; did you mean 'bandwidth'?"),
    ("links.ndr.regimes.2.latency=1us", "links.ndr.regimes is a list of 2; there is no item 2"),
    ("name.x=3", "name is 'bench', which has no keys"),
    (f"{GPU}.memory_bandwidth.value=1 B/s", f"{GPU}.memory_bandwidth {ONE} {GPU}.memory_bandwidth itself"),
    (f"{TABLE}.full.0.1=0.2", f"{TABLE}.full {ONE} {TABLE}.full itself"),
    ("notes." * 40 + "x=1", "nested too deeply; at most 32 levels"),
    ("machine.of=nod", "machine.of: no device or group 'nod'; did you mean 'node'?"),
]


@pytest.mark.parametrize(("given", "message"), SETTINGS, ids=lambda text: text[:30])
def test_a_fault_in_a_setting_is_reported_as_the_setting(given, message):
    assert refusal(TEXT, [given]).startswith(f"--set {given}: {message}")
    assert refusal(TEXT, ["links.ndr=[a"]).startswith("--set links.ndr=[a:1: not YAML: expected ',' or ']'")
    for no_setting in ("nodes", " =5", ""):
        assert refusal(TEXT, [no_setting]).startswith(f"--set {no_setting!r}: write KEY=VALUE, e.g. nodes=4")


def test_place_and_transport_may_be_chosen_and_a_fault_in_the_choice_is_named():
    assert [len(parse(TEXT, place=place).slots) for place in ("round-robin", [0, 0, 7], ("node-0/gpu-1",))] == [8, 3, 1]
    assert refusal(TEXT, place=[0, 8]) == "--place [0, 8]: place: device 8 of 8; they count from 0"
    assert refusal(TEXT, transport="x") == "--transport x: transport: no transport 'x'; allowed: nccl, mpi"


def test_a_file_changes_adds_to_and_removes_from_the_file_that_it_extends_and_each_figure_keeps_its_own(layered):
    mid = "counts: {nodes: 3}\nlinks: {shm: {latency: {value: 1 us, source: 'vendor: they'}}}\n"
    top = "machine: {spine: ndr}\nlinks: {ndr: {regimes: null, latency: 3 us}}\n"
    files = [("sub/mid.yaml", f"{TOP}extends: ../base.yaml\n{mid}"), ("top.yaml", f"{TOP}extends: sub/mid.yaml\n{top}")]
    topology = layered(*files)
    base = parse(TEXT).spec
    assert (topology.name, topology.spec.counts) == ("top", {"nodes": 3, "gpus": 4})
    assert (topology.spec.machine.join, topology.spec.machine.spine, topology.spec.machine.link) == ("rails", "ndr", "ndr")
    assert (topology.spec.devices, topology.spec.links["nvlink"]) == (base.devices, base.links["nvlink"])
    found = figures(topology)
    assert found["links.ndr.latency"] == ("3 us", "guessed", "on top", "top.yaml:6")
    assert found["links.ndr.bandwidth"] == ("400 Gbit/s", "guessed", "by eye", "base.yaml:24")
    assert found["links.shm.latency"] == ("1 us", "vendor", "they", "mid.yaml:6")
    assert found["links.shm.bandwidth"] == ("20 GB/s", "defined", "for this test", "base.yaml:20")
    assert not any(key.startswith("links.ndr.regimes") for key in found)


def test_a_group_that_says_its_join_and_a_figure_that_has_a_source_replace_what_was_there_whole(layered):
    text = f"{TOP}extends: base.yaml\nreplace: null\nmachine: {{join: mesh, link: shm, count: 3, of: host}}\n"
    topology = layered(("top.yaml", text + "devices: {gpu: {memory_bandwidth: 1 TB/s}, slow: {like: host}}\n"))
    assert (topology.spec.machine.join, len(topology.devices), topology.spec.replace) == ("mesh", 3, {})
    assert figures(topology)["devices.gpu.memory_bandwidth"] == ("1 TB/s", "guessed", "on top", "top.yaml:7")
    assert (topology.spec.devices["slow"].kind, topology.spec.devices["slow"].cores) == ("cpu", 16)


def test_a_device_is_like_one_that_is_like_another():
    devices = parse(TEXT.replace("  host:", "  last: {like: slow, attention: null, egress: 1 GB/s}\n  host:")).spec.devices
    assert devices["last"] == devices["slow"].model_copy(update={"like": "slow", "attention": (), "egress": 1e9})
    around = TEXT.replace("slow: {like: gpu", "slow: {like: last").replace("  host:", "  last: {like: slow}\n  host:")
    assert "devices.last.like: last is like itself, through slow and last" in refusal(around)


BASE, V1 = "extends: base.yaml\n", "ringsim: 1\nname: old\nsource: calibrated\nranks: 4\npath: {}\n"
LAYERS = [
    (f"{TOP}{BASE}links: {{nope: null}}\n", "top.yaml:5: links.nope: nothing to remove: what it extends has no such key"),
    (f"{TOP}{BASE}links:\n  ndr:\n    latency: 1 us\n", "top.yaml:6: links.ndr: a link has either `latency` or `regimes`"),
    (f"{TOP}{BASE}links: {{ndr: null}}\n", "base.yaml:31: transports.nccl.paths.ndr: no link 'ndr'; allowed: shm, nvlink"),
    (f"{TOP}{BASE}links: {{shm: {{bandwidth: null}}}}\n", "top.yaml:5: links.shm: key 'bandwidth' is missing"),
    (f"{TOP}{BASE}machine: {{spine: nope}}\n", "top.yaml:5: machine.spine: no link 'nope'; allowed: shm, nvlink, ndr"),
    (f"{TOP}{BASE}transport: null\n", "top.yaml:1: key 'transport' is missing: which of nccl, mpi is in use?"),
    (f"{TOP}{BASE}devices: {{gpu: {{memory_bandwidth: {{value: 1 B/s}}}}}}\n", f"top.yaml:5: {GPU}.{OWN} value"),
    (f"{TOP}extends: wrong.yaml\n", "wrong.yaml:11: devices.gpu.launch: '5 min': 'min' is no unit of time"),
    (f"{TOP}extends: v1.yaml\n", f"v1.yaml:1: {VERSION} 1: version 1 comes from an older `ringsim calibrate`; calibrate again"),
    (f"{TOP}extends: list.yaml\n", "list.yaml:1: expected keys and values, found list"),
    (f"{TOP}extends: bad.yaml\n", "top.yaml:4: extends: bad.yaml:1: not YAML: "),
    (f"{TOP}extends: none.yaml\n", "top.yaml:4: extends: none.yaml: cannot be read: No such file"),
    (
        f"{TOP}extends: idael\n",
        "top.yaml:4: extends: no topology 'idael': give a .yaml file or a shipped name; did you mean 'ideal'?",
    ),
    (f"{TOP}extends: [a]\n", "top.yaml:4: extends: found ['a'], expected a file or a shipped name"),
    (f"{TOP}extends: top.yaml\n", "top.yaml:4: extends: 'top.yaml' extends itself, or goes deeper than 8 files"),
    (f"{TOP}extends: loop.yaml\n", "top.yaml:4: extends: 'loop.yaml' extends itself"),
    ("name: top\nextends: ideal\n", "top.yaml:1: key 'source' is missing: what a file changes has its own source"),
    ('source: "guessed: x"\nextends: ideal\n', "top.yaml:1: key 'name' is missing"),
    (V1, f"top.yaml:1: {VERSION} 1: version 1 comes from an older `ringsim calibrate`; calibrate again"),
]


@pytest.mark.parametrize(("text", "message"), LAYERS, ids=lambda text: text[-40:])
def test_a_fault_has_the_file_and_line_that_the_value_came_from(layered, text, message):
    files = {"wrong": TEXT.replace("5 us", "5 min"), "v1": V1, "list": "- a", "bad": "[", "loop": f"{TOP}extends: top.yaml\n"}
    assert layered.refusal(*((f"{name}.yaml", file) for name, file in files.items()), ("top.yaml", text)).startswith(message)


def test_files_extend_each_other_eight_deep_and_no_deeper(layered):
    files = [("0.yaml", TEXT), *((f"{level}.yaml", f"{TOP}extends: {level - 1}.yaml\n") for level in range(1, 10))]
    assert layered(*files[:9]).name == "top"
    assert layered.refusal(*files).startswith("1.yaml:4: extends: '0.yaml' extends itself, or goes deeper than 8 files")

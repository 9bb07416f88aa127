"""The commands about machines, and what-if questions: what they print, write and refuse."""

import json
import re

import pytest

from ringsim import topology

from .test_cli import invoke

CLUSTER = ("dgx-h100-cluster", "--set", "nodes=4")
SHAPES = ("--seq", "128K", "--heads", "32", "--head-dim", "128", "--dtype", "bf16")
OSU = """# OSU MPI-CUDA Latency Test v7.5
# Size          Latency (us)
1 2.0
2 2.0
1024 2.0
2048 6.0
4096 8.0
8192 12.0
"""


def rows(text, head):
    """The lines of the table that begins with `head`."""
    lines = text.splitlines()
    begin = next(index for index, line in enumerate(lines) if line.strip().startswith(head))
    end = next((index for index in range(begin, len(lines)) if not lines[index].strip()), len(lines))
    return [re.split(r"  +", line.strip()) for line in lines[begin + 1 : end]]


def test_list_names_every_shipped_machine(capsys):
    code, text, err = invoke(capsys, "topologies", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in text.splitlines()] == list(topology.names())


def test_show_tells_that_four_hops_of_a_flat_ring_go_at_the_pace_of_a_nic(capsys, tmp_path):
    facts_path = tmp_path / "facts.json"
    avoid = ("--set", "transports.plain.progress=offload", "--transport", "plain")
    code, text, err = invoke(capsys, "topologies", "show", *CLUSTER, *avoid, "--json", facts_path)
    assert (code, err) == (0, "")
    inside, across = rows(text, "ring hops")
    assert inside[:6] == ["28", "nvlink4", "2 us", "373.5 GB/s", "373.5 GB/s", "dgx-*/h100-* > dgx-*/switch"]
    assert across[:6] == ["4", "pcie5, ndr", "5 us", "48 GB/s", "48 GB/s", "dgx-*/nic-* > rail-*"]
    facts = json.loads(facts_path.read_text())
    slow = [hop for hop in facts["ring"] if hop["together_bytes_per_s"] == 48e9]
    assert [(hop["rank"], hop["to"], hop["bottleneck"]) for hop in slow] == [
        (7, 8, "dgx-0/nic-7 > rail-7"),
        (15, 16, "dgx-1/nic-7 > rail-7"),
        (23, 24, "dgx-2/nic-7 > rail-7"),
        (31, 0, "dgx-3/nic-7 > rail-7"),
    ]
    assert len(facts["resources"]) == 32 * 6 + 8 * 2
    assert len(facts["place"]) == len(facts["devices"]) == 32


def test_show_prints_the_route_and_the_bottleneck_between_two_ranks(capsys):
    code, text, _ = invoke(capsys, "topologies", "show", *CLUSTER, "--route", "7:8")
    assert code == 0
    assert "rank 7 (dgx-0/h100-7) to rank 8 (dgx-1/h100-0)" in text
    wires = rows(text, "from ")
    assert [wire[0] for wire in wires] == ["dgx-0/h100-7", "dgx-0/nic-7", "rail-7", "spine", "rail-0", "dgx-1/nic-0"]
    assert [wire[2] for wire in wires] == ["pcie5", "ndr", "ndr", "ndr", "ndr", "pcie5"]
    assert "a large message alone is bound by transport nccl on ndr" in text


def test_show_lists_each_resource_and_each_source_if_asked(capsys):
    _, text, _ = invoke(capsys, "topologies", "show", "ideal", "--each", "--sources")
    assert len(rows(text, "shared resource")) == 16
    figures = rows(text, "figure ")
    assert ["links.wire.bandwidth", "400 GB/s", "defined", "round numbers, no machine"] in [row[:4] for row in figures]


def test_what_if_the_network_were_twice_as_fast_shows_that_pcie_then_binds(capsys):
    _, before, _ = invoke(capsys, "simulate", *CLUSTER, *SHAPES, "--transport", "plain", *PLAIN)
    _, after, _ = invoke(
        capsys, "simulate", *CLUSTER, *SHAPES, "--transport", "plain", *PLAIN, "--set", "links.ndr.bandwidth=800Gbit/s"
    )
    totals = [float(re.search(r"total ([\d.]+) ms", text)[1]) for text in (before, after)]
    assert totals[0] / totals[1] == pytest.approx(63 / 48, rel=0.01)


PLAIN = ("--set", "transports.plain.progress=offload")


def test_what_if_the_ring_goes_round_the_nodes(capsys):
    one_nic = ("--set", "nics=1", *PLAIN, "--transport", "plain")
    _, block, _ = invoke(capsys, "topologies", "show", *CLUSTER, *one_nic)
    _, robin, _ = invoke(capsys, "topologies", "show", *CLUSTER, *one_nic, "--place", "round-robin")
    assert [row[4] for row in rows(block, "ring hops")] == ["373.5 GB/s", "48 GB/s"]
    assert [row[:1] + row[3:6] for row in rows(robin, "ring hops")] == [["32", "48 GB/s", "6 GB/s", "dgx-*/nic-* > rail-*"]]


def test_check_says_of_each_file_what_is_wrong(capsys, tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    text = "ringsim: 2\nname: mine\nsource: 'guessed: by hand'\nextends: ideal\nlinks:\n  wire: {bandwidth: 1 GB/s}\n"
    good.write_text(text)
    bad.write_text(text.replace("1 GB/s", "1 GB"))
    assert invoke(capsys, "topologies", "check", good)[:2] == (0, f"{good}: valid: mine, 8 devices, 8 ranks\n")
    code, out, err = invoke(capsys, "topologies", "check", bad, good, "ideel")
    assert code == 2
    assert out.count("valid") == 1
    assert err.splitlines()[0].startswith(f"{bad}:6: links.wire.bandwidth: '1 GB': 'GB' is no unit of bandwidth")
    assert "did you mean 'ideal'?" in err.splitlines()[1]


def test_diff_shows_figures_parts_and_hops_that_changed(capsys):
    code, text, _ = invoke(capsys, "topologies", "diff", "dgx-h100-cluster", *CLUSTER[1:], "--set", "links.ndr.achieved=0.5")
    assert code == 0
    changed = {row[0]: row[1:] for row in rows(text, "what")}
    assert changed["links.ndr.achieved"] == ["0.96", "0.5"]
    assert changed["h100, how many"] == ["256", "32"]
    assert changed["dgx-*/nic-* > rail-*"] == ["256 x 48 GB/s", "32 x 25 GB/s"]
    _, text, _ = invoke(capsys, "topologies", "diff", "ideal", "ideal")
    assert text == "ideal and ideal: no difference\n"
    _, text, _ = invoke(capsys, "topologies", "diff", "ideal", "dgx-h100")
    assert {row[0]: row[1:] for row in rows(text, "what")}["links.wire.bandwidth"] == ["400 GB/s", "-"]


def test_graph_draws_a_file(capsys, tmp_path):
    target = tmp_path / "machine.svg"
    assert invoke(capsys, "topologies", "graph", "dgx-h100", "-o", target)[:2] == (0, f"wrote {target}\n")
    assert "nvlink4" in target.read_text()


def test_schema_goes_to_the_terminal_or_to_a_file(capsys, tmp_path):
    target = tmp_path / "schema.json"
    _, text, _ = invoke(capsys, "topologies", "schema")
    assert invoke(capsys, "topologies", "schema", "-o", target)[0] == 0
    assert json.loads(text) == json.loads(target.read_text())


def test_fit_turns_an_osu_table_into_regimes_that_a_topology_reads(capsys, tmp_path):
    table, facts_path = tmp_path / "osu.txt", tmp_path / "facts.json"
    table.write_text(OSU)
    code, text, err = invoke(capsys, "topologies", "fit", table, "--segments", "2", "--json", facts_path)
    assert (code, err) == (0, "")
    assert json.loads(facts_path.read_text())["mean_error"] < 1e-9
    fitted = "".join(f"    {line}\n" for line in text.splitlines())
    machine = tmp_path / "machine.yaml"
    machine.write_text(
        f"ringsim: 2\nname: fitted\nsource: 'measured: osu_latency'\nextends: ideal\nlinks:\n  wire:\n    latency: null\n{fitted}"
    )
    path = topology.load(machine).path(0, 1)
    # two wires, through the switch
    assert path.latency_s(8) == pytest.approx(2 * 2e-6)
    assert path.seconds(4096) == pytest.approx(2 * 4e-6 + 4096 / 1.024e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "ideel"], "no topology 'ideel'"),
        (["show", "ideal", "--route", "1-2"], "'1-2' is no pair of ranks such as 7:8"),
        (["show", "ideal", "--route", "0:8"], "rank 8 is outside a world of 8"),
        (["show", "ideal", "--ranks", "9"], "ideal has room for 8 ranks, not 9: enlarge it with --set (gpus)"),
        (["show", "ideal", "--set", "gpus"], "--set 'gpus': write KEY=VALUE"),
        (["show", "ideal", "--set", "gpus=four"], "--set gpus=four: counts.gpus: Input should be a valid integer"),
        (["show", "ideal", "--set", "links.wire.bandwith=1 GB/s"], "did you mean 'bandwidth'?"),
        (["show", "ideal", "--set", "links.wire.bandwidth=[1"], "--set links.wire.bandwidth=[1:1: not YAML"),
        (["show", "ideal", "--place", "0,9"], "device 9 of 8; they count from 0"),
        (["show", "ideal", "--place", "blok"], "no device 'blok'"),
        (["show", "ideal", "--transport", "mpi"], "no transport 'mpi'; allowed: direct"),
        (["show", "ideal", "--json", "no/such/facts.json"], "folder no/such does not exist"),
        (["graph", "ideal"], "Missing option"),
        (["graph", "ideal", "-o", "no/such/machine.png"], "folder no/such does not exist"),
        (["fit", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["shw"], "No such command 'shw'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(capsys, arguments, message):
    code, _, err = invoke(capsys, "topologies", *arguments)
    assert code == 2
    assert err.startswith("ringsim: ")
    assert message in err
    assert "Traceback" not in err

"""The command line under a launcher: calibrate, compare and run over MPI; a hop beyond 2 GiB."""

import json

import pytest

from ringsim import topology
from ringsim.backends.cpu import available_memory

from .mpi_launch import RINGSIM, program, run

pytestmark = pytest.mark.mpi


def test_calibrate_compare_and_run_on_ranks_that_share_cores(tmp_path):
    calibrated = run(tmp_path, (4, (*RINGSIM, "calibrate", "-o", "here.yaml", "--head-dim", "32")), timeout_s=120)
    assert (calibrated.rc, calibrated.stderr) == (0, "")
    assert calibrated.stdout.count("wrote here.yaml") == 1
    machine = topology.load(tmp_path / "here.yaml")
    assert (len(machine.slots), machine.transport.progress) == (4, "polling")
    assert machine.spec.notes["library"] != "none"
    (table,) = machine.spec.devices["host"].attention
    assert table.backward.rate != table.rate and max(rate for _, rate in table.backward.full + table.backward.masked) == 1
    has = available_memory()
    assert machine.spec.devices["host"].memory == (None if has is None else has // 2**20 * 2**20)
    workload = ("--seq", "1K", "--head-dim", "32", "--causal", "--partition", "zigzag", "--repeats", "3", "--check")
    options = ("--topology", "here.yaml", "--json", "facts.json", "--trace", "trace.json")
    compared = run(tmp_path, (4, (*RINGSIM, "compare", *workload, *options)), timeout_s=120)
    assert (compared.rc, compared.stderr) == (0, "")
    assert compared.stdout.count("check: right") == 1
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["world_size"] == 4
    assert facts["predicted"]["total_s"] > 0
    assert facts["measured"]["total_s"] > 0
    assert len(facts["measured"]["samples_total_s"]) == 3
    assert [step["step"] for step in facts["steps"]] == [0, 1, 2, 3]
    assert facts["check"]["passed"]
    spans = [event for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {(event["pid"], event["tid"]) for event in spans} == {(pid, rank) for pid in (1, 2) for rank in range(4)}
    # both halves walked the same ops
    walked = [{(event["tid"], event["args"]["op"]) for event in spans if event["pid"] == pid} for pid in (1, 2)]
    assert walked[0] == walked[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_run_writes_what_it_measured(tmp_path, ranks):
    ended = run(
        tmp_path,
        (ranks, (*RINGSIM, "run", "--seq", "100", "--sync", "step", "--repeats", "2", "--json", "run.json")),
        timeout_s=60,
    )
    assert (ended.rc, ended.stderr) == (0, "")
    facts = json.loads((tmp_path / "run.json").read_text())
    assert [timeline["world_size"] for timeline in facts["measured"]] == [ranks, ranks]
    assert facts["measured"][0]["facts"]["world_size"] == ranks
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".json") == ["run.json"]


@pytest.mark.slow
def test_a_hop_beyond_2_gib_arrives_whole(tmp_path):
    ended = run(tmp_path, (2, program("large_hop")), timeout_s=240)
    assert ended.rc == 0, ended.stderr + ended.stdout
    assert sorted(ended.stdout.splitlines()) == ["rank 0: right", "rank 1: right"]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_mpi_gives_the_bits_of_loopback(tmp_path, ranks):
    ended = run(tmp_path, (ranks, program("same_bits")), timeout_s=120)
    assert ended.rc == 0, ended.stdout + ended.stderr
    assert ended.stdout == f"192 {[[]] * ranks}\n"

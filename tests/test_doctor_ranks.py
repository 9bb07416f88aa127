"""What the doctor says of many ranks and hosts: what is common once, who differs, and what only all together show."""

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from ringsim.backends.loopback import spawn
from ringsim.cli.main import cli
from ringsim.doctor import Machine, examine, stranger, try_out
from ringsim.doctor.finding import Finding
from ringsim.doctor.trial import Trial
from ringsim.errors import TransportError

from .mpi_launch import RINGSIM, run
from .recorded import LAPTOP, MPICH_LIBRARY, OPEN_MPI_LIBRARY, dgx, example, library, rows
from .test_doctor import of, printed, the

NOTHING = {"type": "object"}
TEXT, NUMBERS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}}
STATUS = {"enum": ["ok", "note", "wrong"]}


def closed(**properties):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def many(items):
    return {"type": "array", "items": items}


SCHEMA = closed(
    schema={"const": 1},
    ringsim=TEXT,
    status=STATUS,
    hosts=many(TEXT),
    world_size={"type": "integer", "minimum": 1},
    findings=many(
        closed(subject=TEXT, name=TEXT, status=STATUS, fact=TEXT, remedy=TEXT, where=TEXT, ranks=NUMBERS, details=many(NOTHING))
    ),
    use=closed(backend=TEXT, transport=TEXT, threads={"type": "integer"}, why=many(TEXT)),
)


def together(systems, hosts, *, launched=True):
    """The report of many ranks, which is the same on all."""

    def rank(endpoint):
        endpoint.hosts = list(hosts)
        return examine(systems[endpoint.rank], endpoint, launched=launched, progress=str)

    reports = spawn(len(hosts), rank)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def bound(local_rank, **options):
    """A rank of a DGX-like host on 14 processors of the NUMA node of its GPU."""
    first = local_rank * 14
    return dgx(cores=tuple(range(first, first + 14)), **options)


def test_a_node_with_bound_ranks_is_said_once():
    report = together([bound(rank) for rank in range(8)], ["nid1"] * 8)
    assert [line for line in report.lines if line.status != "ok"] == []
    assert {line.where for line in report.lines} == {""}
    assert (the(report, "launched").fact, report.ready) == ("8 ranks on 1 host", True)
    assert "NUMA node of its GPU" in the(report, "GPU").fact
    assert len(the(report, "GPU").details) == 8


def test_ranks_bound_round_robin_are_told_by_number():
    report = together([bound(rank // 2 + 4 * (rank % 2)) for rank in range(8)], ["nid1"] * 8)
    wrong = [line for line in of(report, "GPU") if line.status == "wrong"]
    assert sorted(rank for line in wrong for rank in line.ranks) == [1, 3, 4, 6]
    assert all(line.where == f"rank {line.ranks[0]}" and "numactl" in line.remedy for line in wrong)


def test_two_hosts_that_differ_in_the_driver_differ_in_one_line():
    hosts = ["nid1", "nid1", "nid2", "nid2"]
    systems = [bound(0, host=1), bound(1, host=1), bound(0, host=2, driver="550.54.15"), bound(1, host=2, driver="550.54.15")]
    report = together(systems, hosts)
    differing = [line for line in report.lines if line.where]
    assert {line.name for line in differing} == {"driver"}
    assert {line.where: line.fact for line in differing} == {"host nid1": "580.126.20", "host nid2": "550.54.15"}
    assert {line.status for line in differing} == {"note"}
    assert "host nid2: 550.54.15" in printed(report)


def test_ranks_with_another_mpi_library_are_wrong():
    other = replace(dgx(), answers=dgx().answers | {"mpi_library": library(OPEN_MPI_LIBRARY)}, commands={})
    report = together([replace(dgx(), commands={}), other], ["nid1", "nid2"])
    assert [line.status for line in of(report, "library")] == ["wrong", "wrong"]


def test_a_host_without_gpus_among_others():
    report = together([dgx(), LAPTOP], ["nid1", "nid2"])
    assert not report.ready
    found = {line.where: line.fact for line in of(report, "GPUs")}
    assert found["host nid2"].startswith("none") and found["host nid1"].startswith("8 x")
    assert the(report, "links").where == "host nid1"


def test_ranks_that_share_processors_or_gpus_are_noted():
    report = together([dgx(cores=(0, 1))] * 3, ["nid1"] * 3)
    assert "3 ranks of a host share the processors 0-1" in the(report, "crowding").fact
    nine = together([bound(rank % 8) for rank in range(9)], ["nid1"] * 9)
    assert (the(nine, "sharing").status, "MPS" in the(nine, "sharing").remedy) == ("note", True)
    exclusive = together([bound(rank % 8, mode="Exclusive_Process") for rank in range(9)], ["nid1"] * 9)
    assert the(exclusive, "sharing").status == "wrong"
    assert "Exclusive_Process on GPU 0, 1" in the(exclusive, "compute mode").fact


def test_ranks_whose_scheduler_hides_each_others_gpus_are_told():
    lines = rows().splitlines(keepends=True)
    systems = [replace(dgx(), commands=dgx().commands | {"nvidia-smi --query-gpu": lines[rank]}) for rank in range(2)]
    assert "--gpu-bind=none" in the(together(systems, ["nid1"] * 2), "GPUs apart").remedy


def test_hundreds_of_hosts_are_counted_and_the_odd_one_named():
    hosts = [f"nid{number}" for number in range(40)]
    systems = [dgx()] * 39 + [dgx(driver="535.1")]
    lines = of(together(systems, hosts), "driver")
    assert [line.where for line in lines] == ["39 of 40 hosts, as nid0", "host nid39"]


def test_facts_that_differ_and_are_good_are_not_all_printed():
    systems = [replace(LAPTOP, cores=tuple(range(rank + 1))) for rank in range(6)]
    text = printed(together(systems, [f"n{rank}" for rank in range(6)]))
    assert "1 logical processors (and 5 others: --json FILE has all)" in text


def test_the_trial_says_which_transport_and_why_or_what_stands_against_it():
    def rank(endpoint, how):
        report = examine(dgx(), endpoint, launched=True, progress=str)
        assert report.ready
        return try_out(report, dgx(), endpoint, how)

    def good(transport):
        return Trial((Finding(subject="trial", name="transport", fact="transport ipc: ranks share a GPU"),), "transport ipc: ...")

    def bad(transport):
        raise TransportError("MPICH claims CUDA support, but does not move device memory as it should")

    def lost(transport):
        transport.allgather = bad
        raise ZeroDivisionError("division by zero")

    def worse(transport):
        raise ZeroDivisionError("division by zero")

    first = spawn(2, lambda endpoint: rank(endpoint, good))[0]
    assert the(first, "transport").where == "" and "with --backend cupy: transport ipc" in " ".join(first.choice.why)
    third = spawn(2, lambda endpoint: rank(endpoint, lost))[0]
    assert {line.name for line in third.lines if line.subject == "trial"} == {"--backend cupy", "ranks"}
    second = spawn(2, lambda endpoint: rank(endpoint, bad))[0]
    assert second.status == "wrong" and "clusters.md" in the(second, "--backend cupy").remedy
    assert "ZeroDivisionError" in the(spawn(2, lambda endpoint: rank(endpoint, worse))[0], "--backend cupy").fact


@pytest.mark.parametrize(
    ("variables", "text", "strange"),
    [
        ({"HYDI_CONTROL_FD": "7", "PMI_SIZE": "2"}, MPICH_LIBRARY, False),
        ({"HYDI_CONTROL_FD": "7", "PMI_SIZE": "2"}, OPEN_MPI_LIBRARY, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, MPICH_LIBRARY, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, OPEN_MPI_LIBRARY, False),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, OPEN_MPI_LIBRARY, False),
        ({}, MPICH_LIBRARY, False),
    ],
)
def test_an_mpi_that_another_s_launcher_started_is_not_initialised(variables, text, strange):
    system = replace(LAPTOP, environment=variables, answers={"mpi_library": library(text)})
    assert bool(stranger(system)) == strange


def test_srun_that_tells_its_tasks_of_no_mpi_is_wrong():
    system = replace(LAPTOP, environment={"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"})
    found = the(together([system], ["nid1"], launched=False), "launched")
    assert found.status == "wrong" and "srun --mpi=pmix" in found.remedy


def test_a_command_that_hangs_is_left_and_one_that_is_not_there_is_said(tmp_path):
    machine = Machine(timeout_s=0.2)
    assert machine.run("sleep", "60").trouble == "no answer within 0.2 s"
    assert "cannot be started" in machine.run(str(tmp_path / "none")).trouble
    assert machine.run("sh", "-c", "kill -11 $$").said == "(ended by signal 11)"
    assert (machine.read("/nowhere/at/all"), machine.names("/nowhere"), machine.target("/nowhere")) == (None, (), None)
    assert machine.read("/proc/meminfo").startswith("MemTotal:")


def test_the_command_on_this_machine(tmp_path):
    out = tmp_path / "doctor.json"
    done = CliRunner().invoke(cli, ["doctor", "--json", str(out)], standalone_mode=False)
    assert done.exception is None
    facts = json.loads(out.read_text())
    jsonschema.validate(facts, SCHEMA)
    assert done.return_value == (1 if facts["status"] == "wrong" else 0)
    assert {"Python", "NumPy", "ringsim", "BLAS", "mpi4py", "GPUs", "launched"} <= {line["name"] for line in facts["findings"]}
    assert "ringsim would use: backend numpy" in done.output
    assert [line["fact"] for line in facts["findings"] if "the probe failed" in line["fact"]] == []


def test_exit_codes(monkeypatch, tmp_path):
    monkeypatch.setenv("MPICH_ASYNC_PROGRESS", "1")
    done = CliRunner().invoke(cli, ["doctor"], standalone_mode=False)
    assert (done.return_value, "MPICH_ASYNC_PROGRESS=1" in done.output) == (1, True)
    assert "1 thing is wrong" in done.output
    assert CliRunner().invoke(cli, ["doctor", "--json", str(tmp_path / "none" / "x")]).exit_code == 1


@pytest.mark.mpi
def test_the_command_under_mpiexec(tmp_path):
    done = run(tmp_path, (2, (*RINGSIM, "doctor", "--json", "doctor.json")))
    facts = json.loads((tmp_path / "doctor.json").read_text())
    jsonschema.validate(facts, SCHEMA)
    assert (done.rc, done.stderr) == (1 if facts["status"] == "wrong" else 0, "")
    assert (facts["world_size"], len(facts["hosts"]), facts["use"]["transport"]) == (2, 1, "mpi")
    assert done.stdout.count("ringsim would use") == 1
    (launched,) = (line for line in facts["findings"] if line["name"] == "launched")
    assert launched["fact"] == "2 ranks on 1 host"
    (said,) = (line for line in facts["findings"] if line["name"] == "CUDA-aware")
    assert "MPIX_Query_cuda_support" in said["fact"]


def test_what_the_page_shows_is_what_the_command_prints():
    page = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text()
    shown = page.split("<!-- doctor -->")[1].split("<!-- end -->")[0].strip().strip("`").strip("\n")
    report = together(*example())
    # of this machine, and of a job that MPI does not join
    own = [line for line in report.lines if line.subject in {"host", "python"} or line.name == "CUDA-aware"]
    text = printed(replace(report, lines=tuple(line for line in report.lines if line not in own)))
    text = text.split("\nringsim would use")[0]
    assert shown == "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")

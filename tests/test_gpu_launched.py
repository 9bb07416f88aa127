"""benchmarks/gpu.py with ranks as processes: the commands that it gives, what it reads back, what it says of those that fail."""

import json
from dataclasses import dataclass

from gpu_cases import prediction, sharing
from gpu_cases.launched import Ranks, launched_ring
from gpu_cases.record import Record
from paper_card import PaperCard, bench_of

from ringsim.mask import mask_named
from ringsim.schedule import Schedule
from ringsim.workload import Workload

WORK = Workload(
    q_len=64, heads=2, kv_heads=1, head_dim=16, dtype="bfloat16", mask=mask_named("causal & window(20)"), pass_="both"
)


def launcher(folder, body):
    """A launcher that takes ``-n COUNT``, and then does as `body` says."""
    path = folder / "launch"
    path.write_text(f"#!/bin/sh\nshift 2\n{body}\n")
    path.chmod(0o755)
    return [str(path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHost(Ranks):
    """Ranks whose commands are given to the NumPy backend."""

    def ringsim(self, *arguments):
        words = ["numpy" if word == "cupy" else word for word in arguments]
        words[words.index("--transport") + 1] = "auto"
        return Ranks.ringsim(self, *words)


def test_a_schedule_in_words_is_that_schedule(tmp_path):
    ranks = OnHost(launcher=launcher(tmp_path, 'exec "$@"'), count=1, folder=tmp_path)
    schedule = Schedule(workload=WORK, world_size=1, partition="zigzag")
    found = launched_ring(ranks, schedule, "mpi-staged", repeats=3)
    assert found["passed"] and found["failure"] is None and len(found["samples_s"]) == 3
    assert found["check"]["gradients"]["passed"] and 0 <= found["exposed_share"] <= 1
    written = json.loads((tmp_path / "ring-1-mpi-staged.json").read_text())
    assert written["measured"][0]["digest"] == schedule.digest


def test_what_cannot_run_is_refused_with_its_words(tmp_path):
    ranks = Ranks(launcher=launcher(tmp_path, "echo no such transport; exit 2"), count=2, folder=tmp_path)
    found = launched_ring(ranks, Schedule(workload=WORK, world_size=2), "ipc", repeats=1)
    assert found["refused"].startswith("exit code 2") and "no such transport" in found["refused"]


def test_what_hangs_is_ended_with_its_children(tmp_path):
    ranks = Ranks(launcher=launcher(tmp_path, "echo begun; sleep 600 & wait"), count=2, folder=tmp_path, limit_s=1.0)
    said = ranks.ringsim("run")
    assert said is not None and said.startswith("not done after 1 s") and "begun" in said


def test_rings_of_processes_are_judged(tmp_path, monkeypatch):
    given = {"passed": True, "check": {}, "total_s": 1.0, "samples_s": [1.0], "exposed_share": 0.5, "said": "a library"}
    monkeypatch.setattr(sharing, "launched_ring", lambda ranks, schedule, transport, repeats: dict(given, steps=[], facts={}))
    record = Record("sharing", began=True)
    sharing.run(bench_of(PaperCard(own=False), tmp_path, launchers={"mpi": ["mpiexec"]}), record)
    over = [one for one in record.targets if one["name"].startswith("mpi, ipc, 2 ranks")]
    assert [one["met"] for one in over] == [False, False] and not record.skipped
    assert record.groups["mpi, mpi-staged: right against float64"].cases == 2


def test_a_refused_transport_is_named_and_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "launched_ring", lambda ranks, schedule, transport, repeats: {"refused": f"no {transport}"})
    record = Record("sharing", began=True)
    sharing.run(bench_of(PaperCard(own=False), tmp_path, launchers={"mpi": ["mpiexec"]}), record)
    assert any("mpi, ipc, 4 ranks: refused: no ipc" in line for line in record.lines)
    assert not any(group.failed for group in record.groups.values())


def test_predictions_of_processes_are_written_before_they_run(tmp_path, monkeypatch):
    from test_gpu_benchmark import TOPOLOGY

    order = []

    def ringsim(self, command, *words):
        order.append(command)
        if command == "calibrate":
            path = words[words.index("-o") + 1]
            (tmp_path / path).write_text(TOPOLOGY)
        else:
            values = {"steps": [{"error": 0.5}], "measured": {"total_s": 1.0}}
            (tmp_path / words[words.index("--json") + 1]).write_text(json.dumps(values))

    monkeypatch.setattr(Ranks, "ringsim", ringsim)
    record = Record("prediction", began=True)
    bench = bench_of(PaperCard(own=False), tmp_path, launchers={"mpi": ["mpiexec"]}, save=lambda: order.append("save"))
    prediction._launched(bench, record, "mpi", prediction.held_out(bench))
    assert order[:3] == ["calibrate", "save", "compare"] and order.count("compare") == len(prediction.held_out(bench))
    assert len(record.values["mpi: predicted before running"]) == len(record.targets)


def test_a_calibration_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "ringsim", lambda self, *words: "exit code 2: no GPU")
    record = Record("prediction", began=True)
    bench = bench_of(PaperCard(own=False), tmp_path, launchers={"mpi": ["mpiexec"]}, found={"topology": "ringsim: 2"})
    prediction.run(bench, record)
    assert record.groups["mpi: calibration"].failed == ["ringsim calibrate: exit code 2: no GPU"]
    assert record.groups["calibration and runs in one process"].failed and record.status == "failed"

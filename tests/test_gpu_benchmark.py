"""benchmarks/gpu.py on a GPU on paper: what it finds right, what it must catch, and what it writes when something fails."""

import json
import subprocess
import sys

import numpy as np
import pytest
from emulator import needs_compiler
from gpu_cases import built, facts, loss, million, prediction, quiet, races, sharing, speed, strategies, tiles
from gpu_cases.record import Record
from paper_card import BENCHMARKS, ROOT, TINY, PaperCard, asked, bench_of, gpu, section

pytestmark = needs_compiler


def good(record):
    assert record.error is None
    wrong = {name: group.failed[:3] for name, group in record.groups.items() if group.failed}
    assert not wrong and not record.skipped
    assert record.lines
    return record


def test_facts(tmp_path):
    found = good(section(facts.run, PaperCard(), tmp_path))
    assert found.values["device"]["device"] == "paper" and found.values["matmul"]["rows"] == 8


def test_every_variant_is_built(tmp_path):
    from ringsim.backends.cuda_sources import kernels

    card = PaperCard()
    good(section(built.run, card, tmp_path))
    assert {(kernel.source, kernel.types) for kernel in kernels()} <= {(kernel.source, kernel.types) for kernel in card.built}


def test_kernels(tmp_path):
    found = good(section(tiles.run, PaperCard(), tmp_path))
    state = found.values["state_kernels"]
    assert state["launched"] == state["variants"] > 40
    assert {"own forward float64", "own plain backward bfloat16", "cudnn forward bfloat16"} <= set(found.groups)


def test_strategies(tmp_path):
    from ringsim.schedule.registry import STRATEGIES

    found = good(section(strategies.run, PaperCard(own=False), tmp_path))
    assert set(found.values["strategies"]) == set(STRATEGIES)


def test_races_and_their_mutant(tmp_path):
    found = good(section(races.run, PaperCard(own=False), tmp_path))
    caught = found.values["caught"]
    assert all(caught[name] > 0 for name in caught if name != "of")


def test_a_mutant_that_nobody_catches_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(races, "Hasty", races.Delaying)
    found = section(races.run, PaperCard(own=False), tmp_path)
    assert found.status == "failed"
    assert found.groups["the mutant without the event wait is caught"].failed


def test_speed(tmp_path):
    found = section(speed.run, PaperCard(own=False), tmp_path)
    assert not any(group.failed for group in found.groups.values())
    assert {target["name"].split(",")[0] for target in found.targets} == {"full forward", "causal forward"}
    assert set(found.values["causal backward"]) >= {"one call", "one call, any order of sums", "keys in 4", "folding"}


def test_keys_in_blocks_are_the_same_attention(tmp_path):
    from gpu_cases import rings

    from ringsim.schedule import Schedule

    card = PaperCard(own=False)
    work = rings.workload(TINY.speed, "causal", "float32", "both")
    whole = Schedule(workload=work, world_size=1)
    blocks = rings.keys_in_blocks(whole, 4)
    assert rings.flops_of(whole) == rings.flops_of(blocks)
    arrays = rings.given(work, 1)
    wanted = rings.answer(card, work, arrays)
    group = rings.together(bench_of(card, tmp_path), blocks)
    held = group.shards(**arrays)
    rings.poison(group)
    result = group.result(held, group.run(held))
    for name in ("out", "dq", "dk", "dv"):
        assert np.abs(getattr(result, name) - wanted[name]).max() < 2e-5


def test_sharing(tmp_path):
    found = section(sharing.run, PaperCard(own=False), tmp_path)
    assert not any(group.failed for group in found.groups.values())
    assert found.skipped == ["rings of processes: no MPI launcher was found (give --mpiexec)"]
    assert found.status in ("missed", "incomplete")
    assert set(found.values) == {f"in one process, {ranks} ranks, {pass_}" for ranks in (1, 2) for pass_ in ("forward", "both")}


TOPOLOGY = """
ringsim: 2
name: paper
source: "guessed: for a test"
devices:
  card:
    kind: gpu
    memory: 1 GiB
    memory_bandwidth: 1 GB/s
    launch: 1 us
    inside: within
    attention:
      - {dtype: bfloat16, head_dim: 16, rate: 1 GFLOP/s, overhead: 1 us,
         micro_tile: {q_rows: 128, k_rows: 128, edge_rows: 128, exact: true},
         full: [[1, 1.0], [1000000, 1.0]], masked: [[1, 1.0], [1000000, 1.0]],
         backward: {rate: 1 GFLOP/s, overhead: 1 us, micro_tile: {q_rows: 128, k_rows: 128, edge_rows: 128, exact: true},
                    full: [[1, 1.0], [1000000, 1.0]], masked: [[1, 1.0], [1000000, 1.0]]}}
links: {within: {latency: 1 us, bandwidth: 10 GB/s}}
transports: {device-link: {progress: offload}}
machine: card
place: [0, 0, 0, 0]
"""


def test_predictions_are_written_before_anything_runs(tmp_path):
    card, seen = PaperCard(own=False), []
    record = Record("prediction", began=True)

    def save():
        seen.append((dict(record.values), list(card.calls.log)))

    bench = bench_of(card, tmp_path, found={"topology": TOPOLOGY}, save=save)
    prediction.run(bench, record)
    (values, log), *_ = seen
    assert len(values["predicted before running"]) == 4 and not log
    runs = [name for name in record.values if name.startswith("in one process")]
    assert len(runs) == 4 and len(record.targets) == 4
    million.run(bench, record)
    good_rows = record.groups["sampled rows against float64"]
    assert good_rows.cases == 8 and not good_rows.failed
    assert record.values["memory"]["held_nbytes"] > 0 and record.values["predicted_s"] > 0


def test_nothing_is_allocated_or_waited_for_in_the_loop(tmp_path):
    good(section(quiet.run, PaperCard(own=False), tmp_path))


def test_an_allocation_in_the_loop_is_found(tmp_path, monkeypatch):
    from ringsim.backends.cupy import CupyBackend

    def leaky(self, op, fetch, scale):
        self.calls.empty(16)
        return attend(self, op, fetch, scale)

    attend = CupyBackend._attend
    monkeypatch.setattr(CupyBackend, "_attend", leaky)
    found = section(quiet.run, PaperCard(own=False), tmp_path)
    assert found.groups["no allocation in the loop"].failed and found.groups["no device memory taken by the loop"].failed


def test_the_loss_of_half_precision_partials(tmp_path):
    found = good(section(loss.run, PaperCard(), tmp_path))
    half, full = (found.values[f"{kind}, keys in 8"] for kind in ("cudnn", "own"))
    assert (half["partials"], full["partials"]) == ("bfloat16", "float32")


def broken(bench, record):
    record.values["before"] = 1
    raise ZeroDivisionError("half-way")


def quick(name, run):
    return gpu.Section(name, "a test", 10, run)


def test_a_section_that_fails_loses_nothing_of_others(tmp_path, capsys):
    options = asked(tmp_path, "--only", "facts,kernels,loss")
    sections = [
        quick("facts", lambda bench, record: record.say("fine")),
        quick("kernels", broken),
        quick("loss", lambda bench, record: record.target("a share", 0.9, 0.95, at_least=True)),
    ]
    assert gpu.run(PaperCard(own=False), options, TINY, sections) == 1
    found = json.loads(options.out.read_text())
    status = {name: one["status"] for name, one in found["sections"].items()}
    assert status == {"facts": "passed", "kernels": "failed", "loss": "missed"}
    assert found["sections"]["kernels"]["values"] == {"before": 1} and "half-way" in found["sections"]["kernels"]["error"]
    assert found["summary"]["failed"] == ["kernels"] and found["code"] == 1
    said = capsys.readouterr().out
    assert "ZeroDivisionError: half-way" in said and "MISSED a share: 0.9, limit 0.95" in said


def test_what_there_is_no_time_for_is_skipped_and_never_passed(tmp_path):
    options = asked(tmp_path, "--only", "facts,kernels", "--minutes", "1e-9")
    assert gpu.run(PaperCard(own=False), options, TINY) == 3
    found = json.loads(options.out.read_text())
    assert found["summary"]["skipped"] == ["facts", "kernels"] and not found["summary"]["passed"]


def test_a_section_out_of_time_says_what_it_left(tmp_path):
    record = Record("strategies", deadline_s=0.0, began=True)
    strategies.run(bench_of(PaperCard(own=False), tmp_path), record)
    assert record.status == "incomplete" and len(record.skipped) == record.values["schedules"]


def test_numbers_that_are_none_are_valid_json(tmp_path):
    options = asked(tmp_path, "--only", "facts")

    def odd(bench, record):
        record.check("odd", "NaN", float("nan"), 1.0)
        record.values["inf"] = float("inf")

    assert gpu.run(PaperCard(own=False), options, TINY, [quick("facts", odd)]) == 1
    found = json.loads(options.out.read_text(), parse_constant=pytest.fail)
    assert found["sections"]["facts"]["values"] == {"inf": None}


def command(*words, env=None):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        cwd=ROOT,
        env=env,
    )


def test_a_name_that_is_no_section_is_one_message(tmp_path):
    done = command("--only", "kernels,sped", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "no section 'sped'" in last and "speed" in last
    assert not (tmp_path / "x.json").exists()


def test_without_a_gpu_it_says_what_is_missing(tmp_path):
    import os

    done = command("--out", str(tmp_path / "x.json"), env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("benchmarks/gpu.py: backend 'cupy' needs")


def test_sanitizer_reports(tmp_path):
    from gpu_cases import sanitize

    said = {"memcheck": (0, "ERROR SUMMARY: 0 errors"), "racecheck": (99, "RACECHECK SUMMARY: 2 hazards displayed")}

    def start(words, limit_s):
        return said.get(words[2], (124, ""))

    record = Record("sanitize", began=True)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        sanitize.run(record, BENCHMARKS / "gpu.py", tmp_path, 100.0, start)
    assert not record.groups["memcheck clean"].failed and record.groups["racecheck clean"].failed
    assert [one.split(":")[0] for one in record.skipped] == ["initcheck", "synccheck"]


def test_without_the_sanitizer_nothing_passes(tmp_path, monkeypatch):
    from gpu_cases import sanitize

    monkeypatch.setenv("PATH", str(tmp_path))
    record = Record("sanitize", began=True)
    sanitize.run(record, BENCHMARKS / "gpu.py", tmp_path, 1.0)
    assert record.status == "failed"

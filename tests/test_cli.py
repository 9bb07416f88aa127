"""The command line: what a newcomer, a script and a typo get."""

import json

import click
import pytest
from click.testing import CliRunner

from ringsim.cli import session
from ringsim.cli.main import cli, main
from ringsim.errors import TopologyError
from ringsim.schedule import STRATEGIES, Schedule

IDEAL = ["simulate", "ideal", "--head-dim", "128", "--dtype", "bf16"]


def invoke(capsys, *arguments):
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err


COMMANDS = [(), *((name,) for name in cli.commands), *(("topologies", name) for name in cli.commands["topologies"].commands)]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_fits_a_page_and_explains_each_option(command):
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    for line in result.output.splitlines():
        assert len(line) <= 120
    found = cli
    for name in command:
        found = found.commands[name]
    options = [p for p in found.params if isinstance(p, click.Option)] if command else []
    undocumented = [option.name for option in options if not option.help]
    assert undocumented == []


def test_simulate_prints_and_writes_the_same_facts(capsys, tmp_path):
    out, trace = tmp_path / "out.json", tmp_path / "trace.json"
    code, text, err = invoke(
        capsys, *IDEAL, "--ranks", 4, "--seq", "64K", "--causal", "--partition", "zigzag", "--json", out, "--trace", trace
    )
    assert (code, err) == (0, "")
    facts = json.loads(out.read_text())
    assert facts["schedule"]["workload"]["q_len"] == 65536
    # 8 heads of 65536 x 65537 / 2 pairs, 512 FLOPs each, at 4 x 400 TFLOP/s; one hop-free machine moves state at 1000 TB/s
    total_s = facts["predicted"]["total_s"]
    assert total_s == pytest.approx(8 * 65536 * 65537 / 2 * 512 / 4 / 400e12, rel=1e-3)
    assert f"{total_s * 1e3:.4g} ms" in text
    assert facts["predicted"]["exposed_wall_s"] == 0
    assert "zigzag" in text
    assert {"traceEvents", "otherData"} <= set(json.loads(trace.read_text()))


def test_schedule_shows_a_grid_and_text_that_reads_back(capsys, tmp_path):
    code, text, _ = invoke(capsys, "schedule", "--ranks", 3, "--seq", 6, "--causal", "--json", tmp_path / "s.json")
    assert code == 0
    assert "0     k>1 v>1 a0~  k>2 v>2 a1~  a2~" in text
    assert "valid" in text
    facts = json.loads((tmp_path / "s.json").read_text())
    assert facts["buffers"][1]["k[1]"] == 2 * 8 * 64 * 4
    code, text, _ = invoke(capsys, "schedule", "--ranks", 3, "--seq", 6, "--text")
    assert code == 0
    assert Schedule.from_text(text).world_size == 3


def test_workload_files_and_options_over_them(capsys, tmp_path):
    path = tmp_path / "work.yaml"
    path.write_text("seq: 1K\nheads: 4\nkv_heads: 2\ncausal: true\npartition: striped\n")
    code, text, _ = invoke(capsys, "schedule", "--ranks", 2, "--workload", path)
    assert code == 0
    assert "ring, striped, sync free, 2 ranks: batch 1, seq 1024, 4/2 heads, head_dim 64, float32, causal" in text
    code, text, _ = invoke(capsys, "schedule", "--ranks", 2, "--workload", path, "--heads", 6, "--full", "--seq", 5)
    assert "striped, sync free, 2 ranks: batch 1, seq 5, 6/2 heads, head_dim 64, float32, full" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seq: 1K\nhaeds: 4\n", "work.yaml:2: haeds: unknown key 'haeds'; did you mean 'heads'?"),
        ("seq: 1K\nseq: 2K\n", "work.yaml:2: duplicate key 'seq'; first on line 1"),
        ("seq: 1X\n", "work.yaml:1: seq: '1X' is no count of tokens"),
        ("seq: 1K\nheads: four\n", "work.yaml:2: heads:"),
        ("seq: 1K\npartition: zigzog\n", "work.yaml: unknown partition 'zigzog'; known: contiguous"),
        ("seq: 1K\nstrategy: double-ring\n", "work.yaml: strategy 'double-ring': missing a required argument: 'inner'; write "),
        ("seq: 1K\ndtype: fp8\n", "unknown dtype 'fp8'"),
        ("seq: [1\n", "not YAML"),
    ],
)
def test_a_fault_in_a_workload_file_is_one_message(capsys, tmp_path, text, message):
    path = tmp_path / "work.yaml"
    path.write_text(text)
    code, out, err = invoke(capsys, "schedule", "--ranks", 2, "--workload", path)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "ideel", "--seq", "8"], "no topology 'ideel': give a .yaml file or a shipped name; did you mean 'ideal'?"),
        (["simulate", "nowhere.yaml", "--seq", "8"], "nowhere.yaml: cannot be read"),
        (["calibrate", "-o", "here.yaml"], "a hop needs two ranks: start with mpiexec -n P"),
        ([*IDEAL, "--seq", "8", "--batch", "9" * 20], "at most 1099511627776 is allowed"),
        ([*IDEAL, "--ranks", "2"], "how long is the sequence"),
        ([*IDEAL, "--ranks", "0", "--seq", "8"], "0 is not in the range x>=1"),
        ([*IDEAL, "--ranks", "2", "--seq", "8k"], "'8k' is no count of tokens: write e.g. 6, 8K (= 8192)"),
        (
            [*IDEAL, "--ranks", "2", "--seq", "8", "--heads", "8", "--kv-heads", "3"],
            "heads (8) must be a multiple of kv_heads (3)",
        ),
        (["simulate", "ideal", "--ranks", "2", "--seq", "8"], "no attention figures for float32 head_dim 64"),
        ([*IDEAL, "--ranks", "2", "--seq", "8", "--json", "no/such/folder.json"], "folder no/such does not exist"),
        ([*IDEAL, "--ranks", "2", "--sec", "8"], "No such option"),
        (["simulat"], "No such command"),
        (["schedule", "--ranks", "300", "--seq", "8", "--text"], "at most 256 ranks"),
        (["schedule", "--ranks", "2", "--seq", "-5"], "'-5' is no count of tokens"),
        (["compare", "--seq", "8", "--topology", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["calibrate", "-o", "no/such/here.yaml"], "folder no/such does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(capsys, arguments, message):
    code, out, err = invoke(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("options", [("--seq", 1), ("--seq", 40, "--kv-seq", 1), ("--seq", 16, "--mask", "window(0,0)")])
def test_gradients_that_cancel_are_right(capsys, options, dtype):
    """With one key dq and dk are 0: what is left of both, and of the dense ones, is rounding."""
    code, text, _ = invoke(capsys, "run", *options, "--dtype", dtype, "--pass", "both", "--check", "--repeats", 1)
    assert (code, text.count("check: right")) == (0, 2)


def test_the_gradients_of_a_run_are_checked(capsys, monkeypatch, tmp_path):
    path = tmp_path / "run.json"
    options = ("--seq", 100, "--kv-heads", 2, "--causal", "--check", "--repeats", 1, "--json", path)
    for pass_, checks in (("both", 2), ("backward", 1)):
        code, text, _ = invoke(capsys, "run", *options, "--pass", pass_)
        assert (code, text.count("check: right"), text.count("\nbackward")) == (0, checks, checks - 1)
    facts = json.loads(path.read_text())
    assert facts["check"]["what"] == "dq, dk, dv"
    assert facts["schedule"]["workload"]["pass_"] == "backward"
    from ringsim import checking

    monkeypatch.setitem(checking.GRADIENT_LIMITS, "float32", 1e-12)
    code, text, _ = invoke(capsys, "run", *options, "--pass", "both")
    assert (code, text.count("check: right"), text.count("check: WRONG")) == (1, 1, 1)


def test_run_checks_itself_on_one_rank(capsys, tmp_path):
    path = tmp_path / "run.json"
    code, text, err = invoke(capsys, "run", "--seq", 100, "--kv-heads", 2, "--causal", "--check", "--repeats", 2, "--json", path)
    assert (code, err) == (0, "")
    facts = json.loads(path.read_text())
    assert facts["check"]["passed"]
    assert facts["check"]["rows"] == 100
    assert len(facts["measured"]) == 2
    assert facts["measured"][0]["facts"]["blas"]
    assert "check: right" in text


def test_a_wrong_result_ends_with_code_1(capsys, monkeypatch):
    from ringsim.backends.numpy import NumpyBackend

    def wrong(self, op, fetch, *, scale, poll):
        for region in op.writes:
            fetch(region).fill(1)

    monkeypatch.setattr(NumpyBackend, "compute", wrong)
    code, text, _ = invoke(capsys, "run", "--seq", 10, "--check", "--repeats", 1)
    assert code == 1
    assert "check: WRONG" in text


MINE = """
ringsim: 2
name: mine
source: "guessed: by hand"
devices:
  host:
    kind: cpu
    cores: 1
    inside: memory
    memory_bandwidth: 5 GB/s
    attention:
      - dtype: float32
        head_dim: 16
        rate: 20 GFLOP/s
        overhead: 5 us
        micro_tile: {q_rows: 256, k_rows: 256, edge_rows: 256}
        full: [[1, 0.01], [65536, 1.0]]
        masked: [[1, 0.01], [65536, 1.0]]
links:
  memory: {latency: 1 us, bandwidth: 5 GB/s}
transports:
  mpi: {progress: polling}
machine: host
"""


def test_compare_on_one_rank(capsys, tmp_path):
    here, facts_path = tmp_path / "here.yaml", tmp_path / "facts.json"
    here.write_text(MINE)
    options = ("--seq", 300, "--head-dim", 16, "--causal", "--repeats", 3, "--check", "--json", facts_path)
    code, text, err = invoke(capsys, "compare", "--topology", here, *options)
    assert (code, err) == (0, "")
    facts = json.loads(facts_path.read_text())
    assert facts["predicted"]["total_s"] > 0
    assert facts["measured"]["total_s"] > 0
    assert facts["error"]["total"] == pytest.approx(facts["predicted"]["total_s"] / facts["measured"]["total_s"] - 1)
    assert "error" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_ranks_are_as_many_as_a_host_says_or_as_the_command_does(capsys, tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text(MINE)
    assert ", 1 ranks:" in invoke(capsys, "simulate", path, "--seq", 8, "--head-dim", 16)[1]
    assert ", 3 ranks:" in invoke(capsys, "simulate", path, "--set", "devices.host.ranks=3", "--seq", 8, "--head-dim", 16)[1]
    for empty in (("--seq", 0), ("--seq", 100, "--batch", 0), ("--seq", 2)):
        assert invoke(capsys, "simulate", path, "--ranks", 3, "--head-dim", 16, *empty)[0] == 0


def test_an_internal_fault_names_the_rank_and_is_no_silent_success(capsys, monkeypatch):
    def broken():
        raise ZeroDivisionError("oops")

    assert session.end(broken) == 1
    assert "rank 0 failed: ZeroDivisionError('oops')" in capsys.readouterr().err

    def interrupted():
        raise KeyboardInterrupt

    assert session.end(interrupted) == 130
    assert session.end(lambda: (_ for _ in ()).throw(TopologyError("x.yaml:3: bad"))) == 2


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    code, out, err = invoke(capsys, "schedule", "--ranks", 2, "--seq", "x")
    assert (code, out, err) == (2, "", "")


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from pathlib import Path

    from ringsim import files

    target = tmp_path / "facts.json"
    files.write_json(target, {"x": [float("nan"), float("inf"), 1.5]})
    assert json.loads(target.read_text()) == {"x": [None, None, 1.5]}

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(files.FileError, match="No space left"):
        files.write_json(target, {"x": 2})
    assert json.loads(target.read_text()) == {"x": [None, None, 1.5]}
    assert [path.name for path in tmp_path.iterdir()] == ["facts.json"]
    for bad in (tmp_path, tmp_path / "no" / "x.json"):
        with pytest.raises(files.FileError):
            files.check_writable(bad)


def test_strategies_are_listed_as_they_are_written(capsys, tmp_path):
    out = tmp_path / "out.json"
    code, text, err = invoke(capsys, "strategies", "--json", out)
    assert (code, err) == (0, "")
    listed = json.loads(out.read_text())["strategies"]
    assert [one["name"] for one in listed] == sorted(STRATEGIES)
    for one in listed:
        assert one["usage"] in text and one["summary"].endswith((".", "done"))
    assert "double-ring(inner, stride=1)" in text


ONE_SLOW = """
ringsim: 2
name: one-slow
source: "defined: the first device at a third of its speed"
extends: ideal
devices:
  slow: {like: ideal, speed: 0.3333333333333333}
replace: {ideal-0: slow}
"""


def test_a_partition_by_machine_is_written_out_as_weights(capsys, tmp_path):
    machine, out = tmp_path / "one-slow.yaml", tmp_path / "out.json"
    machine.write_text(ONE_SLOW)
    asked = ("--seq", "64K", "--head-dim", 128, "--dtype", "bf16", "--causal", "--partition", "zigzag(machine)", "--ranks", 4)
    code, _, err = invoke(capsys, "simulate", machine, *asked, "--json", out)
    assert (code, err) == (0, "")
    assert json.loads(out.read_text())["schedule"]["partition"] == "zigzag(1,3,3,3)"
    code, said, err = invoke(capsys, "schedule", *asked)
    assert (code, said) == (2, "")
    assert "this command knows no machine; give the weights as numbers" in err

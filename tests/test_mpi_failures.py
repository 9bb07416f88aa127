"""Whatever goes wrong on one rank ends the whole job soon, with the rank and the cause named and nothing left behind."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from .mpi_launch import PROGRAMS, RINGSIM, Ended, Job, program, run, started

pytestmark = pytest.mark.mpi

LIMIT_S = 10.0
RANKS = 4
ABSENT_DONE = 7
# hops of 4 MB, and far more of them than the test waits for
LONG = ("run", "--seq", "8K", "--repeats", "100000", "--json", "out.json")
SHORT = ("run", "--seq", "1K", "--repeats", "1", "--warmup", "0")


def arrive(job: Job, folder: Path, place: str, ranks: Sequence[int]) -> None:
    job.await_(lambda: all((folder / f"rank-{rank}.{place}").exists() for rank in ranks), f"{place} on ranks {ranks}")


def said_once(ended: Ended, message: str) -> None:
    assert ended.stderr.count(message) == 1, ended.stderr
    assert "Traceback" not in ended.stderr


def no_file(folder: Path) -> None:
    """Neither the output nor a half of it, under whatever name."""
    assert not [path.name for path in folder.iterdir() if "out.json" in path.name]


# a rank raises


def test_a_rank_that_raises_ends_the_command(tmp_path: Path) -> None:
    ended = run(tmp_path, (RANKS, program("faulty", "attend:raise", "1", *LONG)))
    assert ended.since(tmp_path / "rank-1.attend") < LIMIT_S
    assert ended.rc == 1
    assert "ringsim: rank 1 failed: ArithmeticError('it failed on purpose')" in ended.stderr
    assert ended.stderr.count("Traceback") == 1
    no_file(tmp_path)


def test_a_rank_that_raises_ends_a_program_under_mpi4py(tmp_path: Path) -> None:
    ended = run(tmp_path, (RANKS, ("-m", "mpi4py", *program("faulty_library"))))
    assert ended.since(tmp_path / "rank-1.attend") < LIMIT_S
    assert ended.rc != 0
    assert "ArithmeticError: it failed on purpose" in ended.stderr
    assert "rank 1" in ended.stderr


# signals


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGKILL, 2),
        (signal.SIGINT, None),
        (signal.SIGINT, 0),
        (signal.SIGINT, 3),
        (signal.SIGTERM, None),
        (signal.SIGTERM, 3),
    ],
    ids=lambda value: getattr(value, "name", "mpiexec" if value is None else f"rank {value}"),
)
def test_a_signal_ends_the_job(tmp_path: Path, number: signal.Signals, rank: int | None) -> None:
    with started(tmp_path, (RANKS, program("faulty", "none", "0", *LONG))) as job:
        arrive(job, tmp_path, "attend", range(RANKS))
        at = job.signal(number, rank)
        ended = job.wait(LIMIT_S)
    assert ended.at - at < LIMIT_S
    assert ended.rc != 0
    assert "Traceback" not in ended.stderr
    no_file(tmp_path)
    if number == signal.SIGINT and rank is not None:
        assert ended.rc == 130
        said_once(ended, f"ringsim: rank {rank}: interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_writing_leaves_no_output(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path, (RANKS, program("faulty", "rename:sleep", "0", *SHORT, "--json", "out.json"))) as job:
        arrive(job, tmp_path, "rename", [0])
        job.signal(number, 0)
        ended = job.wait(LIMIT_S)
    assert ended.rc != 0
    assert not (tmp_path / "out.json").exists()
    if number == signal.SIGINT:
        no_file(tmp_path)


# a peer that does not come


def test_a_rank_that_waits_in_vain_ends_the_command(tmp_path: Path) -> None:
    ended = run(tmp_path, (RANKS, program("faulty", "attend:sleep", "1", *LONG, "--timeout", "3")))
    assert ended.since(tmp_path / "rank-1.attend") < LIMIT_S
    assert ended.rc == 2
    named = r"ringsim: rank \d: op \d+ \(wait, step \d\) for (send|recv) [kv]\[\d\] (to|from) rank \d .*not complete after 3 s"
    assert re.search(named, ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    no_file(tmp_path)


@pytest.mark.parametrize("call", ["RingAttention", "plan", "plan unchecked"])
def test_the_library_names_who_waited_in_vain(tmp_path: Path, call: str) -> None:
    ended = run(tmp_path, (3, program("absent", call)), timeout_s=LIMIT_S)
    assert ended.rc == ABSENT_DONE, ended.stderr
    for rank in (0, 2):
        error, message = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert error in ("PeerTimeout", "CollectiveTimeout")
        assert message.startswith(f"rank {rank}: ")
        assert message.endswith(" not complete after 2 s")
    if call == "plan unchecked":
        # rank 2 waits for rank 1, rank 0 for what rank 2 should have passed on
        assert re.search(r"op \d+ \(wait, step 1\) for recv k\[1\] from rank 1 \(op \d+, tag 0, 256 B\)", message)


@pytest.fixture(scope="module")
def retried(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    ended = run(tmp_path_factory.mktemp("retry"), (RANKS, program("retry")))
    assert ended.rc == 0, ended.stderr
    calls: list[list[dict[str, Any]]] = json.loads(ended.stdout)
    return calls


def test_a_late_peer_is_named(retried: list[list[dict[str, Any]]]) -> None:
    for rank, answer in enumerate(retried[0]):
        assert answer["raised"] == "PeerTimeout"
        named = (
            rf"rank {rank}: op \d+ \(wait, step \d\) for .*(from|to) rank \d \(op \d+, tag \d, 384000 B\) not complete after 1 s"
        )
        assert re.fullmatch(named, answer["message"]), answer
    assert "from rank 1" in retried[0][2]["message"]


def test_a_plan_that_timed_out_gives_no_wrong_answer(retried: list[list[dict[str, Any]]]) -> None:
    for answer in retried[1]:
        assert answer["raised"] in ("RankMismatch", "TransportError", "PeerTimeout") or answer["error"] < 2e-6, retried[1]


# ranks that differ


def cases() -> list[str]:
    """The names in programs/mismatch.py, which cannot be imported without MPI."""
    return re.findall(
        r'^    "((?:call|plan|planned call|unshard): [^"]+)":', (PROGRAMS / "mismatch.py").read_text(), re.MULTILINE
    )


@pytest.fixture(scope="module", params=(1, 0), ids="odd rank {}".format)
def differing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = run(tmp_path_factory.mktemp("mismatch"), (3, program("mismatch", str(request.param))), timeout_s=120)
    assert ended.rc == 0, ended.stderr
    return {"odd": request.param, "cases": json.loads(ended.stdout)}


def test_every_case_was_tried(differing: dict[str, Any]) -> None:
    assert list(differing["cases"]) == cases()


@pytest.mark.parametrize("name", cases())
def test_ranks_that_differ_are_told_before_the_first_hop(differing: dict[str, Any], name: str) -> None:
    answers, odd = differing["cases"][name], differing["odd"]
    assert [answer["posted"] for answer in answers] == [0] * 3
    # where its own argument is at fault, that rank may say so in its own terms
    assert answers.pop(odd)["error"] in ("RankMismatch", "WorkloadError", "ArrayError")
    assert [answer["error"] for answer in answers] == ["RankMismatch"] * 2, answers
    assert all(f"rank {odd}" in answer["message"] for answer in answers), answers


@pytest.mark.parametrize("option", ["--seq 2K", "--partition zigzag", "--seed 4", "--repeats 3", "--check"])
def test_options_that_differ_between_ranks_end_the_job(tmp_path: Path, option: str) -> None:
    usual = (*RINGSIM, *SHORT, "--timeout", "5")
    ended = run(tmp_path, (2, usual), (1, (*usual, *option.split())))
    assert ended.rc == 2
    said_once(ended, "rank 2")
    assert "not complete after" not in ended.stderr


@pytest.mark.parametrize(
    ("option", "message", "first"),
    [
        # only rank 0 writes, so only its outputs count
        ("--json nowhere/out.json", "folder nowhere does not exist", "bad"),
        ("--workload nowhere.yaml", "nowhere.yaml", "good"),
        ("--nonsense", "--nonsense", "good"),
        ("--nonsense", "--nonsense", "bad"),
    ],
)
def test_a_bad_option_of_some_ranks_ends_the_job(tmp_path: Path, option: str, message: str, first: str) -> None:
    parts = {"good": (1, (*RINGSIM, *SHORT)), "bad": (1, (*RINGSIM, *SHORT, *option.split()))}
    ended = run(tmp_path, parts.pop(first), *parts.values(), timeout_s=LIMIT_S)
    assert ended.rc == 2
    said_once(ended, message)


# errors of all ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --seq 1K --json nowhere/out.json", "ringsim: nowhere/out.json: folder nowhere does not exist"),
        ("run --seq 1K --trace .", "ringsim: .: cannot be written: a folder"),
        ("run --seq 1K --workload nowhere.yaml", "ringsim: nowhere.yaml: cannot be read"),
        ("run --seq 1K --heads 4 --kv-heads 3", "ringsim: heads (4) must be a multiple of kv_heads (3)"),
        ("run --seq 1K --nonsense", "No such option '--nonsense'"),
        ("run", "how long is the sequence? Give --seq"),
        ("compare --topology nowhere --seq 1K", "ringsim: no topology 'nowhere'"),
        ("calibrate -o nowhere/here.yaml", "ringsim: nowhere/here.yaml: folder nowhere does not exist"),
        ("simulate nowhere --seq 1K --ranks 4", "ringsim: no topology 'nowhere'"),
    ],
)
def test_an_error_of_all_ranks_is_said_once(tmp_path: Path, arguments: str, message: str) -> None:
    ended = run(tmp_path, (RANKS, (*RINGSIM, *arguments.split())), timeout_s=LIMIT_S)
    assert ended.rc == 2
    assert ended.stdout == ""
    said_once(ended, message)


def test_an_output_that_vanishes_meanwhile_ends_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    arguments = ("run", "--seq", "2K", "--repeats", "10", "--json", "results/out.json")
    with started(tmp_path, (RANKS, program("faulty", "none", "0", *arguments))) as job:
        arrive(job, tmp_path, "attend", range(RANKS))
        folder.rmdir()
        ended = job.wait(LIMIT_S + 20)
    assert ended.rc == 2
    said_once(ended, "ringsim: results/out.json: cannot be written")

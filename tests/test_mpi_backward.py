"""Over real MPI gradients are those of dense attention in float64, with the bits of loopback, and a failure ends all ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ringsim.schedule.registry import STRATEGIES

from .mpi_launch import program, run

pytestmark = pytest.mark.mpi

ALONE = {"dense", "local-window"}
LIMIT_S = 10.0
DONE = 7
KINDS = {
    "strategy": sum(known.backward is not None for known in STRATEGIES.values()) - len(ALONE),
    "partition": 7,
    "mask": 10,
    "dtype": 2,
    "library": 4,
    "differing": 9,
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_over_mpi(tmp_path: Path, ranks: int) -> None:
    ended = run(tmp_path, (ranks, ("-W", "error", *program("backward"))), timeout_s=240)
    assert ended.rc == 0, ended.stderr
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert report["faults"] == []
    tried = report["tried"]
    assert tried == [tried[0]] * ranks
    for kind, count in KINDS.items():
        assert len([name for name in tried[0] if name.startswith(kind)]) == count


def test_a_rank_that_raises_on_the_way_back_ends_all(tmp_path: Path) -> None:
    ended = run(tmp_path, (4, ("-m", "mpi4py", *program("backward_failure", "raise"))))
    assert ended.since(tmp_path / "rank-1.attend") < LIMIT_S
    assert ended.rc != 0
    assert "ArithmeticError: it failed on purpose" in ended.stderr


def reports(tmp_path: Path, fate: str) -> list[Any]:
    ended = run(tmp_path, (3, program("backward_failure", fate)))
    assert ended.rc == DONE, ended.stderr
    return [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 2)]


@pytest.mark.parametrize("fate", ["checked", "unchecked"])
def test_ranks_that_wait_on_the_way_back_in_vain_say_so(tmp_path: Path, fate: str) -> None:
    said = reports(tmp_path, fate)
    for rank, (error, message) in zip((0, 2), said, strict=True):
        assert error in ("PeerTimeout", "CollectiveTimeout")
        assert message.startswith(f"rank {rank}: ")
        assert message.endswith(" not complete after 2 s")
    if fate == "unchecked":
        assert re.search(r"op \d+ \(wait, step 1\) for recv k\[1\] from rank 1 \(op \d+, tag 0, 262144 B\)", said[1][1])

"""Over real MPI every strategy gives what dense attention in float64 gives, with the bits of loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ringsim.schedule.registry import STRATEGIES

from .mpi_launch import program, run

pytestmark = pytest.mark.mpi

ALONE = {"dense", "local-window"}
KINDS = {"strategy": len(STRATEGIES) - len(ALONE), "partition": 7, "mask": 10, "dtype": 4}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_a_sample_of_the_family(tmp_path: Path, ranks: int) -> None:
    ended = run(tmp_path, (ranks, ("-W", "error", *program("family"))), timeout_s=240)
    assert ended.rc == 0, ended.stderr
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert report["faults"] == []
    tried = report["tried"]
    assert tried == [tried[0]] * ranks
    for kind, count in KINDS.items():
        some = {name: times for name, times in tried[0].items() if name.startswith(kind)}
        assert len(some) == count
        assert min(some.values()) >= 1
    assert not {f"strategy {name}" for name in ALONE} & set(tried[0])

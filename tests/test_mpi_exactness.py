"""Over real MPI the ring gives what dense attention in float64 gives, and the same bits each time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .mpi_launch import program, run

pytestmark = pytest.mark.mpi

# how many comparisons each group of programs/exactness.py must at least have made
GROUPS = {"matrix": 120, "shapes": 30, "chunks": 60, "library": 10, "kinds": 25}


@pytest.fixture(scope="module", params=(1, 2, 3, 4, 5), ids="{} ranks".format)
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = run(tmp_path_factory.mktemp("exactness"), (request.param, ("-W", "error", *program("exactness"))), timeout_s=240)
    assert ended.rc == 0, ended.stderr
    assert ended.stderr == ""
    return {"ranks": request.param} | json.loads(ended.stdout)


@pytest.mark.parametrize("group", GROUPS)
def test_agrees_with_dense_attention(report: dict[str, Any], group: str) -> None:
    assert report[group]["faults"] == []
    assert len(report[group]["cases"]) == report["ranks"]
    assert min(report[group]["cases"]) >= GROUPS[group]

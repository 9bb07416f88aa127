"""A transformer trained over four ranks follows the loss of one rank: attention's gradients among all others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from .mpi_launch import program, run

pytestmark = pytest.mark.mpi

STEPS, FEW = 50, 3
WHOLE = f"float64:ring:{STEPS}"
SINGLE = f"float32:ring:{STEPS}"
OTHERS = tuple(f"float64:{strategy}:{FEW}" for strategy in ("burst", "bidirectional", "q-ring", "double-ring(2)"))
WITHOUT_ATTENTION = np.log(16)
"""The least mean loss of what cannot see the tokens before: the next is one of 16 letters."""


def losses(cwd: Path, ranks: int, *arguments: str) -> dict[str, np.ndarray]:
    ended = run(cwd, (ranks, ("-W", "error", *program("training", *arguments))))
    assert (ended.rc, ended.stderr) == (0, "")
    return {name: np.array(values) for name, values in json.loads(ended.stdout).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return losses(tmp_path_factory.mktemp("alone"), 1, WHOLE, SINGLE)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return losses(tmp_path_factory.mktemp("together"), 4, WHOLE, SINGLE, *OTHERS)


def test_the_loss_falls_below_what_is_possible_without_attention(alone: dict[str, np.ndarray]) -> None:
    assert alone[WHOLE][0] > 2 * WITHOUT_ATTENTION
    assert alone[WHOLE][-10:].mean() < WITHOUT_ATTENTION


def test_four_ranks_follow_the_loss_of_one(alone: dict[str, np.ndarray], together: dict[str, np.ndarray]) -> None:
    assert len(together[WHOLE]) == STEPS
    np.testing.assert_allclose(together[WHOLE], alone[WHOLE], rtol=1e-9, atol=0)


def test_in_float32_they_do_to_its_precision(alone: dict[str, np.ndarray], together: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(together[SINGLE], alone[SINGLE], rtol=1e-4, atol=0)
    np.testing.assert_allclose(together[SINGLE], alone[WHOLE], rtol=1e-4, atol=0)


@pytest.mark.parametrize("other", OTHERS)
def test_so_do_other_ways_round(alone: dict[str, np.ndarray], together: dict[str, np.ndarray], other: str) -> None:
    few = together[other]
    assert len(few) == FEW
    np.testing.assert_allclose(few, alone[WHOLE][:FEW], rtol=1e-9, atol=0)

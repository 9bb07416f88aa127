"""docs/adding-a-strategy.md does what it says: its file, put into the folder, is a strategy everywhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-strategy.md").read_text()
PROGRAM = """
import numpy as np
import ringsim
from ringsim.reference import dense_attention

rng = np.random.default_rng(0)
for world_size in (1, 2, 5):
    for partition in ("contiguous", "striped", "zigzag", "balanced"):
        for mask in ("full", "causal", "causal & documents(7, 20, 10)", "window(5, 2)"):
            work = ringsim.Workload(q_len=37, heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=ringsim.mask_named(mask))
            schedule = ringsim.Schedule(workload=work, world_size=world_size, partition=partition, strategy="direct")
            schedule.validate()
            q, k, v = (rng.standard_normal((1, 37, heads, 8)) for heads in (4, 2, 2))
            result = ringsim.execute(schedule, q, k, v)
            out, lse = dense_attention(work, q, k, v)
            np.testing.assert_allclose(result.out, out, rtol=0, atol=1e-12)
            np.testing.assert_allclose(result.lse, lse, rtol=0, atol=1e-12)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package as it is installed, with the page's file put into the folder that the page names."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "ringsim", site / "ringsim", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("backends", "topologies"):
        shutil.copytree(ROOT / folder, site / "ringsim" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (path,) = re.findall(r"`(ringsim/schedule/strategies/\w+\.py)`", PAGE)
    (site / path).write_text(code)
    return site


def python(tree, *arguments):
    environment = os.environ | {"PYTHONPATH": str(tree)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_page_s_strategy_is_exact_under_every_mask_and_partition(tree):
    done = python(tree, "-W", "error", "-c", PROGRAM)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_s_commands_know_it(tree):
    commands = re.findall(r"^    ringsim (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        done = python(tree, "-m", "ringsim", *command.split())
        assert (done.returncode, done.stderr) == (0, ""), command
        assert "direct" in done.stdout


def test_it_sends_what_its_docstring_says(tree):
    program = """
import ringsim
from ringsim.schedule import Send
work = ringsim.Workload(q_len=4 * 24, heads=4, kv_heads=2, head_dim=8, v_head_dim=6)
schedule = ringsim.Schedule(workload=work, world_size=4, strategy="direct")
print({sum(op.region.nbytes for op in schedule.program(rank) if isinstance(op, Send)) for rank in range(4)})
"""
    done = python(tree, "-c", program)
    assert done.stdout.strip() == str({3 * 24 * 2 * (8 + 6) * 4})

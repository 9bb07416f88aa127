"""Ranks of one process made once and run many times, on the host: the answer of `execute`, bit for bit."""

import numpy as np
import pytest

from ringsim.backends.numpy import NumpyBackend
from ringsim.errors import ArrayError, RankMismatch
from ringsim.execution import Together, execute
from ringsim.mask import Causal
from ringsim.schedule import Schedule
from ringsim.workload import Workload

WORK = Workload(q_len=37, heads=4, kv_heads=2, head_dim=8, mask=Causal(), pass_="both")
SCHEDULE = Schedule(workload=WORK, world_size=3, partition="zigzag", strategy="burst")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": 4, "k": 2, "v": 2, "dout": 4}
    return {name: rng.standard_normal((1, 37, heads, 8)).astype(np.float32) for name, heads in shapes.items()}


def test_it_gives_what_execute_gives_again_and_again():
    group = Together(SCHEDULE, [NumpyBackend()] * 3)
    for seed in (1, 2, 1):
        given = arrays(seed)
        wanted = execute(SCHEDULE, **given)
        held = group.shards(**given)
        found = group.result(held, group.run(held))
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert getattr(found, name).tobytes() == getattr(wanted, name).tobytes()
        assert found.timeline.digest == SCHEDULE.digest and found.timeline.total_s > 0


def test_slots_beside_are_used_again():
    group = Together(SCHEDULE, [NumpyBackend()] * 3)
    again = Together(SCHEDULE, [rank.backend for rank in group.ranks], beside=group)
    assert [rank.memory.nbytes for rank in again.ranks] == [0, 0, 0]


def test_what_does_not_fit_is_refused():
    with pytest.raises(RankMismatch, match="for 3 ranks; 2 backends"):
        Together(SCHEDULE, [NumpyBackend()] * 2)
    group = Together(SCHEDULE, [NumpyBackend()] * 3)
    with pytest.raises(ArrayError, match="takes q, k, v, dout"):
        group.shards(q=arrays()["q"])

"""Faults of the backward pass in worlds too large to look at every rank."""

import pytest

from ringsim.errors import ScheduleError
from ringsim.mask import Causal
from ringsim.schedule import Send
from ringsim.schedule.validation import _ranks
from ringsim.workload import Workload

from .tampering import again, edited, left_out, post
from .test_validation_backward import ATTEND, at_home, casts, made, nothing, on_the_road


@pytest.fixture(autouse=True)
def _fewer_ranks(monkeypatch):
    """Worlds of 30 are looked at as those beyond 64 are; tests/test_validation_large.py has such worlds."""
    monkeypatch.setattr("ringsim.schedule.validation.EXHAUSTIVE_WORLD", 29)


def sampled(strategy, world_size=30, **options):
    return made(strategy, world_size, workload=Workload(q_len=world_size, head_dim=4, **options))


def never_sent_home():
    schedule = sampled("halo")
    looked_at = set(_ranks(schedule))
    return edited(schedule, 0, nothing, lambda op: post(Send, "home")(op) and op.peer not in looked_at)


SAMPLED_FAULTS = {
    "a sum dropped at home": (
        lambda: left_out(sampled("ring"), 0, at_home),
        r"rank 0: dk\[0\] lacks what op \d+ of rank 0 receives",
    ),
    "a part never added on the road": (
        lambda: left_out(sampled("burst"), 0, on_the_road, 5),
        r"rank 0: never sends what op \d+ attends for dq\[\d+\], and 0 more",
    ),
    "a sum added twice": (lambda: again(sampled("ring"), 1, on_the_road, 3), r"rank 1, op \d+ .*merges dk_sum\[\d+\]@1, part of"),
    "an attend_backward left out": (lambda: left_out(sampled("ring"), 1, ATTEND, 9), r"covered 0 times and required 1 times"),
    "a sum never sent home": (never_sent_home, r"rank 0: never sends what op \d+ attends for dk\[\d+\], and 0 more"),
    "a gradient never cast": (
        lambda: edited(sampled("ring"), 0, nothing, casts("dk")),
        r"rank 0: dk\[0\] lacks what op \d+ of rank 0 attends",
    ),
}


@pytest.mark.parametrize("name", SAMPLED_FAULTS)
def test_validation_of_sampled_ranks_finds(name):
    broken, message = SAMPLED_FAULTS[name]
    with pytest.raises(ScheduleError, match=message):
        broken().validate()


@pytest.mark.parametrize("strategy", ["ring", "burst", "double-ring(5)", "halo"])
def test_sampled_programs_that_nothing_was_done_to_are_valid(strategy):
    sampled(strategy, mask=Causal()).validate()


def test_a_world_of_more_than_64_is_valid():
    sampled("ring", 65).validate()

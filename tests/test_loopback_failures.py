"""In one process, too, whatever fails on one rank is told to all, and a wait that cannot end is found out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ringsim.backends.loopback import Endpoint, PacedLink, World, spawn
from ringsim.backends.numpy import NumpyBackend
from ringsim.errors import PeerFailed, PeerTimeout, ScheduleError, TransportError
from ringsim.execution import Rank, execute
from ringsim.schedule import Schedule
from ringsim.workload import Workload

WORK = Workload(q_len=24, heads=2, head_dim=4)
FAILURE = ArithmeticError("it failed on purpose")


class Doomed(NumpyBackend):
    """Raises at its second attend."""

    attends = 0

    def compute(self, op: Any, *arguments: Any, **options: Any) -> None:
        self.attends += op.kernel == "attend"
        if self.attends == 2:
            raise FAILURE
        super().compute(op, *arguments, **options)


def arrays(rank: Rank) -> list[Any]:
    return [np.ones(shape, "float32") for shape in rank.shapes().values()]


def told(world_size: int, function: Callable[[Endpoint], Any], **options: Any) -> list[BaseException | None]:
    """What each rank raised."""
    raised: list[BaseException | None] = [None] * world_size

    def run(endpoint: Endpoint) -> None:
        try:
            function(endpoint)
        except BaseException as error:
            raised[endpoint.rank] = error
            raise

    with pytest.raises(BaseException) as first:
        spawn(world_size, run, **options)
    assert first.value in raised
    return raised


# a rank raises


@pytest.mark.parametrize("sync", ["free", "step"])
@pytest.mark.parametrize("paced", [False, True])
def test_a_rank_that_raises_in_the_ring_stops_all(paced: bool, sync: str) -> None:
    schedule = Schedule(workload=WORK, world_size=4, sync=sync)

    def run(endpoint: Endpoint) -> None:
        rank = Rank(schedule, endpoint, Doomed() if endpoint.rank == 1 else NumpyBackend())
        rank.run(*arrays(rank))
        endpoint.barrier()

    check_told(told(4, run, link=PacedLink(1e9) if paced else None))


def test_a_rank_that_raises_frees_those_that_gather() -> None:
    def run(endpoint: Endpoint) -> None:
        if endpoint.rank == 1:
            raise FAILURE
        endpoint.allgather(endpoint.rank)

    check_told(told(4, run))


def check_told(raised: list[BaseException | None]) -> None:
    assert raised[1] is FAILURE
    for rank in (0, 2, 3):
        error = raised[rank]
        assert isinstance(error, PeerFailed)
        assert str(error) == f"rank {rank}: rank 1 raised {FAILURE!r}"
        assert error.__cause__ is FAILURE


def test_a_rank_that_is_told_learns_it_at_its_next_poll() -> None:
    world = World(2)
    here = world.endpoint(0)
    here.poll()
    world.fail(1, FAILURE)
    with pytest.raises(PeerFailed, match="rank 1 raised"):
        here.poll()


def test_no_thread_outlives_a_failure() -> None:
    before = set(threading.enumerate())
    link = PacedLink(1e9)

    def run(endpoint: Endpoint) -> None:
        endpoint.isend(np.zeros(8, np.uint8), 1 - endpoint.rank, 0)
        endpoint.irecv(np.zeros(8, np.uint8), 1 - endpoint.rank, 0)
        endpoint.barrier()
        raise FAILURE

    told(2, run, link=link)
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


# messages that do not match


@pytest.mark.parametrize("first", ["send", "recv"])
def test_halves_of_unequal_size_are_refused(first: str) -> None:
    world = World(2)
    post = {
        "send": lambda: world.endpoint(0).isend(np.zeros(8, np.uint8), 1, 5),
        "recv": lambda: world.endpoint(1).irecv(np.zeros(9, np.uint8), 0, 5),
    }
    post.pop(first)()
    with pytest.raises(TransportError, match=r"message 0 -> 1 tag 5: 8 B sent, 9 B expected"):
        post.popitem()[1]()


def test_the_other_rank_learns_of_unequal_halves() -> None:
    def run(endpoint: Endpoint) -> None:
        if endpoint.rank == 0:
            endpoint.isend(np.zeros(8, np.uint8), 1, 0)
        else:
            endpoint.irecv(np.zeros(9, np.uint8), 0, 0)
        endpoint.barrier()

    kinds = sorted(type(error).__name__ for error in told(2, run))
    assert kinds == ["PeerFailed", "TransportError"]


# waits that cannot end


def without_a_send(world_size: int) -> Schedule:
    """A schedule in which rank 0 keeps its first block of k to itself; ids stay as they are."""
    lines = Schedule(workload=WORK, world_size=world_size).to_text().splitlines()
    lost = next(line for line in lines if " send " in line)
    number = lost.split()[0]
    end = lines.index("rank 1")
    kept = [line for line in lines[:end] if line != lost and not line.startswith("digest")]
    rank_0 = [re.sub(rf"(?<=[=,]){number},|,{number}(?=,|$)", "", line) if " wait " in line else line for line in kept]
    rank_0 = [line for line in rank_0 if not line.endswith(f"posts={number}")]
    return Schedule.from_text("\n".join([*rank_0, *lines[end:]]) + "\n")


def test_a_schedule_without_a_send_is_not_valid() -> None:
    with pytest.raises(ScheduleError):
        without_a_send(3).validate()


def test_one_thread_finds_a_deadlock() -> None:
    q, k, v = (np.ones((1, 24, 2, 4), "float32") for _ in range(3))
    with pytest.raises(
        PeerTimeout, match=r"deadlock: no rank can go on: .*rank 1: op \d+ \(wait, step \d\) for recv k\[\d\] from rank 0 "
    ):
        execute(without_a_send(3), q, k, v)


def test_a_thread_that_waits_in_vain_names_its_rank_op_and_peer() -> None:
    schedule = without_a_send(2)

    def run(endpoint: Endpoint) -> None:
        rank = Rank(schedule, endpoint, NumpyBackend(), timeout_s=0.2)
        rank.run(*arrays(rank))
        endpoint.barrier()

    raised = told(2, run)
    late = [error for error in raised if isinstance(error, PeerTimeout)]
    assert late
    named = r"rank 1: op \d+ \(wait, step 1\) for recv k\[0\] from rank 0 \(op \d+, tag 0, 384 B\).* not complete after 0\.2 s"
    assert any(re.fullmatch(named, str(error)) for error in late), late


@pytest.mark.parametrize("call", [lambda here: here.allgather(1), lambda here: here.barrier()], ids=["allgather", "barrier"])
def test_a_gathering_names_the_ranks_that_did_not_come(call: Callable[[Endpoint], Any]) -> None:
    with pytest.raises(PeerTimeout, match=r"rank 1: allgather waited 0\.05 s for rank\(s\) \[0, 2\]"):
        call(World(3, timeout_s=0.05).endpoint(1))

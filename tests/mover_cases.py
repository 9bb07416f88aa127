"""Traffic for whatever moves device memory between ranks: programs of posts and waits that cannot deadlock by themselves, walked
in one thread, where each array is looked at the moment that it may be, and overwritten the moment that it may be."""

import random
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st
from paper_gpu import POISON, PaperGpu

from ringsim.backends.loopback import spawn

ENOUGH = 20_000
"""Polls of all ranks in which nothing more was done: nothing ever will be."""


class Stuck(AssertionError):
    """No rank can go on."""


class WrongBytes(AssertionError):
    """A receive was said to be done, and the bytes are not those that were sent."""


class LateLink:
    """Moves messages of host memory at some later poll, one before the other as it likes."""

    def __init__(self, seed=0):
        self._rng = random.Random(seed)
        self._matched = []

    def move(self, source, target, send, recv):
        self._matched.append((send, recv))

    def poll(self):
        self._rng.shuffle(self._matched)
        for _ in range(min(len(self._matched), self._rng.choice((0, 0, 1, 2)))):
            send, recv = self._matched.pop()
            np.copyto(recv.data, send.data)
            send.handle.done_s = recv.handle.done_s = 1.0

    def close(self):
        pass


@dataclass(frozen=True)
class Message:
    """Numbered in the order in which messages are waited for; `early` says how much before they are posted, on either side."""

    number: int
    source: int
    target: int
    tag: int
    nbytes: int
    early: tuple[float, float]

    @property
    def lane(self):
        return self.source, self.target, self.tag

    @property
    def content(self):
        return np.random.default_rng(self.number).integers(0, 255, self.nbytes, np.uint8)


def program(messages, rank):
    """What a rank does: (post or wait, message, whether it sends it); posts of a lane come in the order of their numbers."""
    mine = [message for message in messages if rank in (message.source, message.target)]
    places = {}
    for lane in {message.lane for message in mine}:
        least = len(mine)
        for position in reversed([at for at, message in enumerate(mine) if message.lane == lane]):
            early = mine[position].early[rank == mine[position].target]
            least = min(least, round(position * (1 - early)))
            places[mine[position].number] = least
    steps = []
    for position, message in enumerate(mine):
        posts = [other for other in mine if places[other.number] == position]
        steps += [("post", other, other.source == rank) for other in posts]
        steps.append(("wait", message, message.source == rank))
    return steps


def traffic(world_size, *, most_nbytes=40, most=14):
    """A strategy of lists of messages among ranks."""
    share = st.floats(0, 1)
    one = st.tuples(
        st.integers(0, world_size - 1),
        st.integers(1, world_size - 1),
        st.integers(0, 2),
        st.integers(0, most_nbytes),
        st.tuples(share, share),
    )

    def numbered(drawn):
        return [
            Message(number, source, (source + hop) % world_size, tag, nbytes, early)
            for number, (source, hop, tag, nbytes, early) in enumerate(drawn)
        ]

    return st.lists(one, max_size=most).map(numbered)


@dataclass
class Walk:
    """One rank's walk through its program."""

    rank: int
    gpu: PaperGpu
    mover: object
    steps: list
    posted: dict = field(default_factory=dict)

    def go(self):
        """Do all that can be done without waiting; whether that was anything."""
        before = len(self.steps)
        while self.steps and (self.steps[0][0] == "post" or self.posted[self.steps[0][1].number][0].done):
            kind, message, sends = self.steps.pop(0)
            (self._post if kind == "post" else self._look)(message, sends)
        return len(self.steps) < before

    def _post(self, message, sends):
        if sends:
            array = self.gpu.upload(message.content)
            handle = self.mover.isend(array, message.target, message.tag)
        else:
            array = self.gpu.empty(message.nbytes)
            handle = self.mover.irecv(array, message.source, message.tag)
        assert message.number not in self.posted
        self.posted[message.number] = handle, array

    def _look(self, message, sends):
        memory = self.posted.pop(message.number)[1].view(np.ndarray)
        if sends:
            memory.fill(POISON)
        elif not np.array_equal(memory, message.content):
            raise WrongBytes(f"rank {self.rank}: {message}")


def walk(messages, gpus, movers, seed=0):
    """Walk all ranks' programs by turns in an order that `seed` gives. Raises Stuck, WrongBytes."""
    rng = random.Random(seed)
    walks = [Walk(rank, gpus[rank], movers[rank], program(messages, rank)) for rank in range(len(movers))]
    idle = 0
    while any(one.steps for one in walks):
        one = rng.choice(walks)
        one.mover.poll()
        idle = 0 if one.go() else idle + 1
        if idle > ENOUGH:
            left = [f"rank {one.rank}: {one.steps[0]}" for one in walks if one.steps]
            raise Stuck("; ".join(left))


def made(world_size, make, *, link=None):
    """``make(endpoint)`` of every rank; what is collective in it finds the others. Endpoints may then be used in one thread."""
    return spawn(world_size, make, link=link)


def hasty(track):
    """A mutant: the track says that copies are complete without asking for their events."""

    def finished():
        while track._running:
            event, what = track._running.popleft()
            track._spare.append(event)
            yield what

    track.finished = finished

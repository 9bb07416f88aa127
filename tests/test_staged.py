"""Device memory through page-locked chunks: right whatever the order of copies, without a deadlock with one chunk each way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_cases import LateLink, Message, Stuck, WrongBytes, hasty, made, traffic, walk
from paper_gpu import PaperGpu

from ringsim.backends.loopback import World
from ringsim.backends.mover import DeviceTransport
from ringsim.backends.staged import Staged
from ringsim.errors import RankMismatch, TransportError
from ringsim.transport import Handle

SEEDS = range(40)


def staged(world_size, seed=0, *, change=lambda mover: None, **options):
    """A paper GPU and a mover for each rank."""
    gpus = [PaperGpu(seed * 100 + rank) for rank in range(world_size)]
    movers = made(world_size, lambda host: Staged(host, gpus[host.rank], **options), link=LateLink(seed))
    for mover in movers:
        change(mover)
    return gpus, movers


def ring(count, nbytes, world_size=3):
    """Rounds of a ring, all posted early."""
    return [
        Message(number, number % world_size, (number + 1) % world_size, 0, nbytes, (0.5, 1.0))
        for number in range(count * world_size)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
@given(data=st.data(), seed=st.integers(0, 10**6), depth=st.integers(1, 4), chunk_nbytes=st.integers(1, 16))
@settings(deadline=None, max_examples=60)
def test_every_byte_arrives_before_it_is_said_to(world_size, data, seed, depth, chunk_nbytes):
    messages = data.draw(traffic(world_size))
    gpus, movers = staged(world_size, seed, depth=depth, chunk_nbytes=chunk_nbytes)
    walk(messages, gpus, movers, seed)
    for mover in movers:
        check_idle(mover, depth)


def check_idle(mover, depth):
    """All chunks are back, and nothing is kept of messages that are done."""
    for way in (mover._outgoing, mover._incoming):
        assert len(way._pool.free) == depth
        assert len({id(buffer) for buffer in way._pool.free}) == depth
        assert not way._waiting
        assert not way._open
    assert not mover._outgoing._grants


def test_chunks_are_made_once_and_nothing_else_is():
    gpus, movers = staged(2, depth=3, chunk_nbytes=8)
    before = [[entry for entry in gpu.log if entry[0] == "pinned"] for gpu in gpus]
    assert before == [[("pinned", 8)] * 6] * 2
    assert movers[0].pinned_nbytes == 48
    streams = [len(gpu.streams) for gpu in gpus]
    walk(ring(4, 50, world_size=2), gpus, movers)
    for gpu, pinned in zip(gpus, before, strict=True):
        assert [entry for entry in gpu.log if entry[0] == "pinned"] == pinned
        assert ("synchronize",) not in gpu.log
    assert [len(gpu.streams) for gpu in gpus] == streams


def test_several_chunks_are_on_their_way_at_once():
    seen = []

    def count(mover):
        pool, take = mover._outgoing._pool, mover._outgoing._pool.take

        def counted(message):
            chunk = take(message)
            seen.append(len(pool.free))
            return chunk

        pool.take = counted

    gpus, movers = staged(2, change=count, depth=3, chunk_nbytes=4)
    walk([Message(0, 0, 1, 0, 40, (0, 0))], gpus, movers)
    assert len(seen) == 10
    assert min(seen) == 0


# a message that only one side has posted holds nothing


LATE, EARLY = 0.0, 1.0
FIRST = 1
"""A tag of its own for a message that others are posted beside."""


def sent_too_early():
    """Rank 0 posts message 3 at once; rank 1 posts it when it has message 2 from rank 2, which waits for message 1 from 0."""
    return [
        Message(0, 2, 0, FIRST, 8, (LATE, LATE)),
        Message(1, 0, 2, 0, 40, (LATE, LATE)),
        Message(2, 2, 1, 0, 40, (LATE, LATE)),
        Message(3, 0, 1, 0, 40, (EARLY, LATE)),
    ]


def expected_too_early():
    """Rank 1 posts message 3 at once; rank 0 posts it when it has message 2 from rank 1, which waits for message 1 from 2."""
    return [
        Message(0, 0, 1, FIRST, 8, (LATE, LATE)),
        Message(1, 2, 1, 0, 40, (LATE, LATE)),
        Message(2, 1, 0, 0, 40, (LATE, LATE)),
        Message(3, 0, 1, 0, 40, (LATE, EARLY)),
    ]


def unasked(mover):
    """A mutant: the sender takes chunks for messages that nobody has granted."""
    post = mover._outgoing.post

    def posted(data, peer, tag):
        handle = post(data, peer, tag)
        mover._outgoing._grants[peer, tag].unused += -(-data.size // mover._outgoing._pool.chunk_nbytes)
        return handle

    mover._outgoing.post = posted


def test_a_message_that_its_receiver_has_not_posted_holds_no_chunk():
    walk(sent_too_early(), *staged(3, depth=1, chunk_nbytes=8))
    gpus, movers = staged(3, change=unasked, depth=1, chunk_nbytes=8)
    with pytest.raises(Stuck):
        walk(sent_too_early(), gpus, movers)


def test_a_message_that_its_sender_has_not_posted_holds_no_chunk():
    walk(expected_too_early(), *staged(3, depth=1, chunk_nbytes=8))

    def unoffered(mover):
        mover._incoming._grant = lambda message: granted(mover._incoming, message)

    def granted(way, message):
        """A mutant: the receiver grants as soon as it has posted."""
        message.offer.words[0] = message.data.size
        message.offer.handle.done_s = 0.0
        return type(way)._grant(way, message)

    gpus, movers = staged(3, change=unoffered, depth=1, chunk_nbytes=8)
    with pytest.raises(Stuck):
        walk(expected_too_early(), gpus, movers)


# what would be wrong without a check is wrong here


def caught(change):
    """Whether some order of events shows that the bytes are wrong."""
    for seed in SEEDS:
        gpus, movers = staged(3, seed, change=change, depth=2, chunk_nbytes=8)
        try:
            walk(ring(4, 30), gpus, movers, seed)
        except WrongBytes:
            return True
    return False


def liar(name):
    """The host's transport says that `name` is done when it is posted."""

    def change(mover):
        for way in (mover._outgoing, mover._incoming):
            way._host = Lying(way._host, name)

    return change


class Lying:
    def __init__(self, host, name):
        self._host = host
        self._name = name
        self.rank = host.rank

    def _post(self, name, data, peer, tag):
        handle = getattr(self._host, name)(data, peer, tag)
        # notes are as they were: only chunks are lied about
        return Handle(posted_s=0.0, done_s=0.0) if name == self._name and tag % 3 == 2 else handle

    def isend(self, *message):
        return self._post("isend", *message)

    def irecv(self, *message):
        return self._post("irecv", *message)


MUTANTS = {
    "a chunk is sent before it is copied out": lambda mover: hasty(mover._outgoing._track),
    "a receive is done before it is copied in": lambda mover: hasty(mover._incoming._track),
    "a chunk is used again before it is sent": liar("isend"),
    "a chunk is copied in before it is received": liar("irecv"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant):
    assert caught(MUTANTS[mutant])


def test_nothing_is_wrong_without_a_mutant():
    assert not caught(lambda mover: None)


# errors


def test_sizes_that_differ_are_refused():
    gpus, movers = staged(2)
    movers[0].isend(gpus[0].empty(8), 1, 5)
    movers[1].irecv(gpus[1].empty(9), 0, 5)
    with pytest.raises(TransportError, match=r"message 0 -> 1 tag 5: 8 B sent, 9 B expected"):
        for _ in range(1000):
            for mover in movers:
                mover.poll()


def test_chunks_that_differ_between_ranks_are_refused():
    with pytest.raises(RankMismatch, match=r"different sizes on the ranks: \[1, 2\] B"):
        made(2, lambda host: Staged(host, PaperGpu(), chunk_nbytes=1 + host.rank))


@pytest.mark.parametrize("options", [{"depth": 0}, {"chunk_nbytes": 0}])
def test_no_chunk_is_refused(options):
    with pytest.raises(TransportError, match="a chunk of a byte or more each way"):
        Staged(World(1).endpoint(0), PaperGpu(), **options)


def test_as_a_transport_it_leaves_all_else_to_the_host():
    host = World(1).endpoint(0)
    transport = DeviceTransport(host, Staged(host, PaperGpu(), depth=1, chunk_nbytes=8))
    assert (transport.name, transport.rank, transport.world_size) == ("mpi-staged", 0, 1)
    assert (transport.progress, transport.drives, transport.device_share) == ("polling", "both", 0.0)
    assert transport.allgather("x") == ["x"]
    transport.failure = "it failed"
    assert host.failure == "it failed"
    assert transport.failure == "it failed"
    transport.close()

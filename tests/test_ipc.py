"""CUDA IPC between ranks, on paper: right whatever the order of copies, opened once, closed before the owner lets go."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_cases import LateLink, Message, WrongBytes, hasty, made, traffic, walk
from paper_gpu import PaperGpu
from paper_ipc import Host, PaperSharing

from ringsim.backends.ipc import Ipc, refuses
from ringsim.backends.loopback import World, spawn
from ringsim.backends.mover import DeviceTransport
from ringsim.errors import TransportError


def ipc(world_size, seed=0, **options):
    """A paper GPU, what shares its memory, and a mover for each rank."""
    gpus, host = [PaperGpu(seed * 100 + rank) for rank in range(world_size)], Host()
    sharings = [PaperSharing(host, **options) for _ in range(world_size)]

    def make(endpoint):
        return Ipc(endpoint, gpus[endpoint.rank], sharings[endpoint.rank], same_device=False)

    return gpus, sharings, made(world_size, make, link=LateLink(seed))


@pytest.mark.parametrize("world_size", [2, 3])
@given(data=st.data(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_every_byte_arrives_before_it_is_said_to(world_size, data, seed):
    messages = data.draw(traffic(world_size))
    gpus, _, movers = ipc(world_size, seed)
    walk(messages, gpus, movers, seed)
    for mover in movers:
        assert not (mover._sends or mover._receives or mover._told)
        assert not any(len(track) for track in mover._tracks.values())


def exchange(gpus, movers, arrays):
    """Send each of rank 0's arrays into rank 1's."""
    for source, target in arrays:
        handles = movers[0].isend(source, 1, 0), movers[1].irecv(target, 0, 0)
        while not all(handle.done for handle in handles):
            for mover in movers:
                mover.poll()


def test_an_allocation_is_opened_once_and_closed_at_the_end():
    gpus, sharings, movers = ipc(2)
    slots = gpus[1].empty(64), gpus[1].empty(64)
    sent = np.arange(7, dtype=np.uint8)
    exchange(gpus, movers, [(gpus[0].upload(sent), slot[9 * n : 9 * n + 7]) for n in range(3) for slot in slots])
    assert [what for what, _ in sharings[0].log] == ["open", "open"]
    assert sharings[1].log == []
    for slot in slots:
        assert all(np.array_equal(slot.view(np.ndarray)[9 * n : 9 * n + 7], sent) for n in range(3))
    closed = spawn(2, lambda endpoint: DeviceTransport(endpoint, moved_to(endpoint, movers)).close())
    assert closed == [None, None]
    assert [what for what, _ in sharings[0].log] == ["open", "open", "close", "close"]
    assert not movers[1]._kept


def moved_to(endpoint, movers):
    movers[endpoint.rank]._host = endpoint
    return movers[endpoint.rank]


def test_memory_that_another_opened_is_held_until_all_have_closed_it():
    gpus, sharings, movers = ipc(2)
    slot = gpus[1].empty(8)
    exchange(gpus, movers, [(gpus[0].upload(np.zeros(8, np.uint8)), slot)])
    assert list(movers[1]._kept) == [sharings[1].export(slot).base]
    order = []

    class Watched:
        def barrier(self):
            order.append(("barrier", len(sharings[0].opened), len(movers[1]._kept)))

    movers[0]._host = movers[1]._host = Watched()
    movers[0].close(failed=False)
    movers[1].close(failed=False)
    # what rank 0 had open is closed before any rank passes the barrier, and rank 1 lets go after it
    assert order == [("barrier", 0, 1), ("barrier", 0, 1)]
    assert not movers[1]._kept


def test_another_allocation_at_the_same_address_is_opened_anew():
    gpus, sharings, movers = ipc(2)
    sent = np.arange(8, dtype=np.uint8)
    first, second = gpus[1].empty(8), gpus[1].empty(8)
    export = sharings[1].export
    sharings[1].export = lambda array: export(array)._replace(base=4096)
    exchange(gpus, movers, [(gpus[0].upload(sent), first), (gpus[0].upload(sent), second)])
    assert [what for what, _ in sharings[0].log] == ["open", "close", "open"]
    assert np.array_equal(second.view(np.ndarray), sent)


def test_the_host_does_not_wait_for_the_device():
    gpus, _, movers = ipc(2)
    walk([Message(n, n % 2, 1 - n % 2, 0, 20, (0.5, 0.5)) for n in range(8)], gpus, movers)
    assert all(("synchronize",) not in gpu.log for gpu in gpus)


def test_the_mutant_that_does_not_ask_for_events_is_caught():
    def caught(change):
        for seed in range(40):
            gpus, _, movers = ipc(3, seed)
            messages = [Message(n, n % 3, (n + 1) % 3, 0, 30, (0.5, 1.0)) for n in range(12)]
            for mover in movers:
                change(mover)
            try:
                walk(messages, gpus, movers, seed)
            except WrongBytes:
                return True
        return False

    def mutate(mover):
        start = mover._start

        def started(message):
            begun = start(message)
            for track in mover._tracks.values():
                hasty(track)
            return begun

        mover._start = started

    assert caught(mutate)
    assert not caught(lambda mover: None)


# refusals


def test_ranks_that_can_open_one_anothers_memory_are_not_refused():
    host, sharings = Host(), {}

    def ask(endpoint):
        sharings[endpoint.rank] = PaperSharing(host)
        return refuses(endpoint, PaperGpu(), lambda: sharings[endpoint.rank])

    assert spawn(3, ask) == [None] * 3
    assert all([what for what, _ in sharing.log] == ["open", "close"] * 2 for sharing in sharings.values())


@pytest.mark.parametrize(("fault", "said"), [("unshareable", "cannot be shared"), ("unseen", "cannot be opened")])
def test_one_rank_that_cannot_is_told_to_all(fault, said):
    host = Host()

    def ask(endpoint):
        sharing = PaperSharing(host, **({fault: True} if endpoint.rank == 1 else {}))
        return refuses(endpoint, PaperGpu(), lambda: sharing)

    found = spawn(3, ask)
    assert len(set(found)) == 1
    assert found[0].startswith("rank 1: ")
    assert said in found[0]


def test_ranks_on_several_hosts_are_refused():
    endpoint = World(1).endpoint(0)
    endpoint.hosts = ["a", "b"]
    assert "stays within a host, and the ranks are on 2" in refuses(endpoint, PaperGpu(), lambda: None)


def test_memory_that_cannot_be_shared_is_an_error_with_a_remedy():
    gpus, _, movers = ipc(2, unshareable=True)
    with pytest.raises(TransportError, match="mpi-staged"):
        movers[1].irecv(gpus[1].empty(8), 0, 0)


def test_sizes_that_differ_are_refused():
    gpus, _, movers = ipc(2)
    movers[0].isend(gpus[0].empty(8), 1, 5)
    movers[1].irecv(gpus[1].empty(9), 0, 5)
    with pytest.raises(TransportError, match=r"message 0 -> 1 tag 5: 8 B sent, 9 B expected"):
        for _ in range(1000):
            for mover in movers:
                mover.poll()


@pytest.mark.parametrize(("same_device", "share"), [(False, 0.0), (True, None)])
def test_what_it_says_of_itself(same_device, share):
    mover = Ipc(World(1).endpoint(0), PaperGpu(), PaperSharing(Host()), same_device=same_device)
    assert (mover.progress, mover.drives, mover.device_share) == ("handshake", "sender", share)

"""NCCL between ranks, on paper: kernels that wait for one another's never wait in a circle."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_cases import LateLink, Message, Stuck, WrongBytes, hasty, made, traffic, walk
from paper_nccl import Fabric, NcclGpu, PaperNccl

from ringsim.backends.loopback import spawn
from ringsim.backends.mover import DeviceTransport
from ringsim.backends.nccl import Nccl, all_pairs, load, refuses
from ringsim.errors import MissingDependency, TransportError


def nccl(world_size, seed=0, pairs=None):
    """The fabric, a paper GPU, the module and a mover for each rank."""
    fabric = Fabric()
    gpus = [NcclGpu(seed * 100 + rank) for rank in range(world_size)]
    modules = [PaperNccl(fabric, gpu) for gpu in gpus]

    def make(endpoint):
        return Nccl(endpoint, gpus[endpoint.rank], modules[endpoint.rank], pairs)

    return fabric, gpus, modules, made(world_size, make, link=LateLink(seed))


@pytest.mark.parametrize("world_size", [2, 3])
@given(data=st.data(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_every_byte_arrives_before_it_is_said_to(world_size, data, seed):
    messages = [message for message in data.draw(traffic(world_size)) if message.nbytes]
    fabric, gpus, _, movers = nccl(world_size, seed)
    walk(messages, gpus, movers, seed)
    assert fabric.most_waiting <= 2
    for mover in movers:
        assert not (mover._open or mover._offered or mover._expected or mover._granted or mover._grants)


def ring(world_size, rounds=4):
    numbers = range(rounds * world_size)
    return [Message(n, n % world_size, (n + 1) % world_size, 0, 30, (0.5, 1.0)) for n in numbers]


def test_tags_posted_in_another_order_on_each_side_meet():
    # each side posts all at once, rank 0 from the first tag on and rank 1 from the last
    _, gpus, _, movers = nccl(2)
    sends = [movers[0].isend(gpus[0].empty(8 + tag), 1, tag) for tag in range(4)]
    receives = [movers[1].irecv(gpus[1].empty(8 + tag), 0, tag) for tag in reversed(range(4))]
    for _ in range(2000):
        for mover in movers:
            mover.poll()
    assert all(handle.done for handle in (*sends, *receives))


def kernels_that_wait(change):
    """How many kernels wait on the devices when each side has posted what the other has not."""
    fabric, gpus, _, movers = nccl(2)
    for mover in movers:
        change(mover)
    movers[0].isend(gpus[0].empty(8), 1, 0)
    movers[0].irecv(gpus[0].empty(8), 1, 1)
    for _ in range(500):
        for mover in movers:
            mover.poll()
    return sum(map(len, fabric.waiting.values())) + sum(len(wire.track) for mover in movers for wire in mover._wires.values())


def unoffered(mover):
    """A mutant: a receiver launches its kernel as soon as it has posted."""

    def granted(message):
        message.offer.words[0] = message.data.size
        message.offer.handle.done_s = 0.0
        return type(mover)._grant(mover, message)

    mover._grant = granted


def test_no_kernel_waits_for_a_rank_that_has_not_posted():
    assert kernels_that_wait(lambda mover: None) == 0
    assert kernels_that_wait(unoffered) > 0


def test_the_mutant_that_does_not_ask_for_events_is_caught():
    def caught(change):
        for seed in range(40):
            _, gpus, _, movers = nccl(3, seed)
            for mover in movers:
                change(mover)
            try:
                walk(ring(3), gpus, movers, seed)
            except WrongBytes:
                return True
        return False

    assert caught(lambda mover: [hasty(wire.track) for wire in mover._wires.values()])
    assert not caught(lambda mover: None)


def test_the_host_does_not_wait_once_it_is_made():
    _, gpus, _, movers = nccl(3)
    before = [gpu.log.count(("synchronize",)) for gpu in gpus]
    walk(ring(3), gpus, movers)
    assert [gpu.log.count(("synchronize",)) for gpu in gpus] == before


# communicators


def test_pairs_come_in_an_order_that_all_ranks_share():
    assert all_pairs(3) == ((0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1))
    assert all_pairs(1) == ()


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_makes_communicators_of_its_own_pairs_alone(world_size):
    pairs = [(rank, (rank + 1) % world_size) for rank in range(world_size)]
    _, gpus, modules, movers = nccl(world_size, pairs=pairs)
    assert all(len(module.made) == 2 for module in modules)
    walk(ring(world_size), gpus, movers)
    other = (1, 0) if world_size > 2 else (0, 0)
    with pytest.raises(TransportError, match=f"no NCCL communicator for rank {other[0]} -> {other[1]}"):
        movers[other[0]].isend(gpus[other[0]].empty(8), other[1], 0)


def test_ranks_that_name_other_pairs_are_told():
    fabric = Fabric()
    with pytest.raises(TransportError, match="different pairs"):
        made(2, lambda end: Nccl(end, gpu := NcclGpu(), PaperNccl(fabric, gpu), [(0, 1), (1, 0)][:: 1 - 2 * end.rank]))


@pytest.mark.parametrize(("failure", "ended"), [(None, "destroyed"), ("it failed", "aborted")])
def test_communicators_are_given_back(failure, ended):
    _, _, modules, movers = nccl(2)
    transport = DeviceTransport(movers[0]._host, movers[0])
    transport.failure = failure
    transport.close()
    assert {comm.ended for comm in modules[0].made} == {ended}


def test_a_kernel_that_failed_is_said():
    _, gpus, modules, movers = nccl(2)
    movers[1].irecv(gpus[1].empty(8), 0, 0)
    movers[0].isend(gpus[0].empty(8), 1, 0)
    for module in modules:
        for comm in module.made:
            comm.broken = "NCCL_ERROR_SYSTEM_ERROR: the link is down"
    with pytest.raises(TransportError, match=r"NCCL, 0 -> 1: a transfer failed: .*the link is down"):
        for _ in range(1000):
            for mover in movers:
                mover.poll()


def test_sizes_that_differ_are_refused():
    _, gpus, _, movers = nccl(2)
    movers[0].isend(gpus[0].empty(8), 1, 5)
    movers[1].irecv(gpus[1].empty(9), 0, 5)
    with pytest.raises(TransportError, match=r"message 0 -> 1 tag 5: 8 B sent, 9 B expected"):
        for _ in range(1000):
            for mover in movers:
                mover.poll()


# refusals


def test_two_ranks_on_one_gpu_are_refused():
    assert spawn(3, lambda end: refuses(end, f"uuid {end.rank}")) == [None] * 3
    said = spawn(3, lambda end: refuses(end, f"uuid {end.rank // 2}"))
    assert len(set(said)) == 1
    assert said[0].startswith("NCCL wants a GPU for each rank, and ranks 0 and 1 share one on ")


def test_a_missing_library_is_named():
    pytest.importorskip("cupy")
    try:
        module = load()
    except MissingDependency as error:
        assert "pip install nvidia-nccl-cu13" in str(error)
    else:
        assert module.get_version() > 0


def test_what_it_says_of_itself():
    _, _, _, movers = nccl(2)
    assert (movers[0].progress, movers[0].drives, movers[0].device_share) == ("handshake", "both", None)
    assert movers[0].library == "NCCL 2.27.3"


def test_a_ring_of_five_does_not_get_stuck():
    for seed in range(5):
        _, gpus, _, movers = nccl(5, seed)
        try:
            walk(ring(5), gpus, movers, seed)
        except Stuck as error:
            pytest.fail(str(error))

"""Which transport moves device memory: the same on all ranks, with its reason, and what was refused before it and why."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mover_cases import LateLink, Message, WrongBytes, hasty, traffic, walk
from paper_gpu import PaperGpu
from paper_ipc import Host, PaperSharing
from paper_nccl import Fabric, NcclGpu, PaperNccl

from ringsim.backends.cuda_aware import Claims
from ringsim.backends.device_link import DeviceLink
from ringsim.backends.device_transports import KINDS, Means, choose
from ringsim.backends.loopback import Half, PacedLink, World, spawn
from ringsim.errors import MissingDependency, RankMismatch, TransportError
from ringsim.transport import Handle

from .mpi_launch import program, run

CLAIM = Claims(library="MPICH", path=None, cuda_query=True, gpu_query=None, memory_kinds=None)
NO_CLAIM = replace(CLAIM, cuda_query=False)


class Ranks:
    """What the ranks of a test have: all of it, unless told otherwise. `choose` gives what each rank chose or raised."""

    def __init__(self, world_size=2, *, claim=CLAIM, hosts=1, gpus=1, sharing=None, nccl=True):
        self.world_size, self._claim, self._hosts, self._gpus = world_size, claim, hosts, gpus
        self._sharing, self._nccl = sharing or {}, nccl
        self._host, self._fabric = Host(), Fabric()
        self.calls = [NcclGpu(rank) for rank in range(world_size)]

    def _means(self, rank):
        def module():
            if not self._nccl:
                raise MissingDependency("no NCCL here")
            return PaperNccl(self._fabric, self.calls[rank])

        sharing = PaperSharing(self._host, **self._sharing)
        return Means(claims=lambda library: self._claim, sharing=lambda: sharing, nccl=module)

    def choose(self, kind="auto", timeout_s=20.0, **options):
        def one(endpoint):
            rank = endpoint.rank
            endpoint.name = "mpi"
            endpoint.library = "MPICH"
            endpoint.hosts = [f"host {other % self._hosts}" for other in range(self.world_size)]
            if self._claim is not None:
                # loopback moves host memory alone: messages of device memory are looked at as such, as a CUDA-aware MPI does
                endpoint.isend, endpoint.irecv = map(seeing_through, (endpoint.isend, endpoint.irecv))
            asked = kind[rank] if isinstance(kind, list) else kind
            facts = {"uuid": f"gpu {rank % self._gpus}"}
            try:
                return choose(asked, endpoint, self.calls[rank], facts, means=self._means(rank), timeout_s=timeout_s, **options)
            except TransportError as error:
                return error

        return spawn(self.world_size, one)


def seeing_through(post):
    return lambda data, peer, tag: post(data.view(np.ndarray), peer, tag)


def agreed(found):
    """What all ranks chose."""
    assert not any(isinstance(one, Exception) for one in found), found
    assert len({(one.transport.name, one.reason, one.tried) for one in found}) == 1
    return found[0]


def refused(found):
    """What all ranks were told."""
    assert all(isinstance(one, TransportError) for one in found), found
    assert len({str(one) for one in found}) == 1
    return str(found[0])


def test_an_mpi_that_claims_and_proves_it_comes_first():
    chosen = agreed(Ranks(3).choose())
    assert chosen.transport.name == "mpi"
    assert chosen.reason == (
        "transport mpi: MPICH claims CUDA support and moved patterns between the devices of neighbouring ranks"
    )
    assert chosen.tried == ()


def test_then_memory_that_ranks_of_a_host_share():
    chosen = agreed(Ranks(2, claim=NO_CLAIM).choose())
    assert chosen.transport.name == "ipc"
    assert chosen.reason == "transport ipc: ranks share a GPU and may open one another's device memory"
    assert [one.name for one in chosen.tried] == ["mpi"]
    assert "MPIX_Query_cuda_support says no" in chosen.tried[0].why
    assert "use an MPI built with CUDA" in chosen.tried[0].why
    assert chosen.transport.device_share is None


def test_gpus_of_one_host_take_nothing_from_each_other():
    chosen = agreed(Ranks(2, claim=NO_CLAIM, gpus=2).choose())
    assert chosen.reason == "transport ipc: ranks are on one host and may open one another's device memory"
    assert chosen.transport.device_share == 0.0


def test_then_nccl_where_each_rank_has_a_gpu():
    chosen = agreed(Ranks(3, claim=NO_CLAIM, hosts=2, gpus=3).choose())
    assert chosen.transport.name == "nccl"
    assert chosen.reason == "transport nccl: every rank has a GPU of its own, and NCCL 2.27.3 joins them"
    assert [one.name for one in chosen.tried] == ["mpi", "ipc"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gpus": 1, "hosts": 1, "sharing": {"unshareable": True}}, "ranks 0 and 1 share one on host 0"),
        ({"gpus": 3, "hosts": 2, "nccl": False}, "rank 0: no NCCL here"),
    ],
)
def test_then_page_locked_memory(options, why):
    chosen = agreed(Ranks(3, claim=NO_CLAIM, **options).choose())
    assert chosen.transport.name == "mpi-staged"
    assert chosen.reason == (
        "transport mpi-staged: messages go through 32 MiB of page-locked host memory per rank, which any MPI can send"
    )
    assert [one.name for one in chosen.tried] == ["mpi", "ipc", "nccl"]
    assert why in chosen.tried[2].why


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_asked_for_is_taken(kind):
    chosen = agreed(Ranks(2, gpus=2).choose(kind))
    assert chosen.transport.name == kind
    assert chosen.tried == ()


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("ipc", {"hosts": 2}, "the ranks are on 2"),
        ("ipc", {"sharing": {"unseen": True}}, "rank 0: that memory cannot be opened"),
        ("nccl", {"gpus": 1}, "NCCL wants a GPU for each rank"),
        ("nccl", {"gpus": 2, "nccl": False}, "no NCCL here"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_is_an_error(kind, options, why):
    message = refused(Ranks(2, **options).choose(kind))
    assert message.startswith(f"transport {kind} cannot be had: ")
    assert why in message


def test_mpi_may_be_insisted_on():
    chosen = agreed(Ranks(2, claim=NO_CLAIM).choose("mpi"))
    assert chosen.transport.name == "mpi"
    assert "was insisted on, though it does not claim CUDA support on every rank" in chosen.reason


@pytest.mark.parametrize("kind", ["auto", "mpi"])
def test_a_claim_that_fails_its_proof_is_an_error_and_nothing_else_is_tried(kind, monkeypatch):
    ranks = Ranks(2)
    # what MPI moves never reaches the devices
    monkeypatch.setitem(globals(), "seeing_through", lambda post: lambda data, peer, tag: post(astray(data), peer, tag))
    message = refused(ranks.choose(kind, timeout_s=2.0))
    assert "MPICH claims CUDA support (MPIX_Query_cuda_support says yes), but does not move device memory as it should" in message
    assert "were never written" in message
    assert "mpi-staged" in message


def astray(data):
    return data if type(data) is np.ndarray else np.zeros(data.size, np.uint8)


@pytest.mark.parametrize("kind", ["ipc", "nccl", "mpi-staged"])
def test_a_transport_that_fails_its_proof_is_an_error(kind, monkeypatch):
    monkeypatch.setattr("ringsim.backends.track.Track.finished", hurried)
    # what nobody waits for does not happen
    monkeypatch.setattr(NcclGpu, "lazy", True)
    message = refused(Ranks(2, gpus=2).choose(kind, timeout_s=2.0))
    assert f"transport {kind} does not move device memory as it should" in message


def hurried(track):
    hasty(track)
    return track.finished()


def test_ranks_that_ask_for_different_ones_are_told():
    found = Ranks(2).choose(["mpi", "ipc"])
    assert all(isinstance(one, RankMismatch) for one in found)
    assert "['mpi', 'ipc']" in refused(found)


def test_an_unknown_one_is_refused():
    assert "there are auto, mpi, ipc, nccl, mpi-staged" in refused(Ranks(2).choose("tcp"))


def test_ranks_that_no_mpi_joins_have_page_locked_memory():
    def one(endpoint):
        means = Means(sharing=lambda: PaperSharing(Host(), unshareable=True))
        return choose("auto", endpoint, PaperGpu(endpoint.rank), {"uuid": "a"}, means=means)

    chosen = agreed(spawn(2, one))
    assert chosen.transport.name == "mpi-staged"
    assert chosen.tried[0].why == "the ranks are joined by loopback, not by MPI"


# the link of ranks in one process


@given(data=st.data(), seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_a_link_within_a_gpu_brings_every_byte_before_it_says_so(data, seed):
    messages = data.draw(traffic(3))
    gpu = PaperGpu(seed)
    world = World(3, link=DeviceLink(gpu))
    walk(messages, [gpu] * 3, [world.endpoint(rank) for rank in range(3)], seed)


def test_the_link_that_does_not_ask_for_events_is_caught():
    def caught(change):
        for seed in range(40):
            gpu = PaperGpu(seed)
            link = DeviceLink(gpu)
            change(link)
            world = World(2, link=link)
            messages = [Message(n, n % 2, 1 - n % 2, 0, 30, (0.5, 0.5)) for n in range(8)]
            try:
                walk(messages, [gpu] * 2, [world.endpoint(rank) for rank in range(2)], seed)
            except WrongBytes:
                return True
        return False

    assert caught(lambda link: hasty(link._track))
    assert not caught(lambda link: None)


def test_the_link_serves_ranks_on_threads():
    gpu = PaperGpu(3)
    lock = threading.Lock()

    def run(endpoint):
        with lock:
            mine, theirs = gpu.upload(np.full(9, endpoint.rank, np.uint8)), gpu.empty(9)
        handles = endpoint.isend(mine, 1 - endpoint.rank, 0), endpoint.irecv(theirs, 1 - endpoint.rank, 0)
        while not all(handle.done for handle in handles):
            endpoint.poll()
        return theirs.view(np.ndarray).tolist()

    assert spawn(2, run, link=DeviceLink(gpu)) == [[1] * 9, [0] * 9]


@pytest.mark.parametrize("link", [PacedLink(1e9), LateLink(), DeviceLink(PaperGpu())], ids=["paced", "late", "device"])
def test_links_have_what_a_world_asks_of_them(link):
    source, target = (PaperGpu().empty(4) if isinstance(link, DeviceLink) else np.zeros(4, np.uint8) for _ in range(2))
    send, recv = (Half(data, Handle(posted_s=0.0)) for data in (source, target))
    link.move(0, 1, send, recv)
    while not recv.handle.done:
        link.poll()
    assert send.handle.done
    link.close()


# over MPI


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_over_mpi(ranks, tmp_path):
    ended = run(tmp_path, (ranks, ("-W", "error", *program("device_memory"))), timeout_s=120)
    assert ended.rc == 0, ended.stderr
    assert ended.stderr == ""
    report = json.loads(ended.stdout)
    assert report["faults"] == []
    assert report["cases"] == ["claims", "addresses", "staged", "ipc", "choice"]

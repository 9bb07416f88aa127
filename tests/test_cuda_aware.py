"""What an MPI claims of CUDA, what speaks against it, and the proof that goes through its messages byte by byte."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mover_cases import hasty
from paper_gpu import PaperGpu

from ringsim.backends.cuda_aware import Claims, hints_for, loaded_libraries, prove_claims, queries
from ringsim.backends.loopback import World, spawn
from ringsim.backends.mover import DeviceTransport
from ringsim.backends.proof import POISON, TRIALS, Proof, pattern, prove
from ringsim.backends.staged import Staged
from ringsim.errors import TransportError

MAPS = """\
7f0a1000-7f0a2000 r--p 00000000 08:01 12 /usr/lib/x86_64-linux-gnu/libc.so.6
7f0a3000-7f0a4000 r--p 00000000 08:01 13 /opt/my mpi/lib/python3.11/site-packages/mpi4py/MPI.mpich.cpython-311.so
7f0a5000-7f0a6000 r--p 00000000 08:01 14 /opt/cray/pe/lib64/libmpi_gtl_cuda.so.0
7f0a7000-7f0a8000 r--p 00000000 08:01 15 /opt/cray/pe/lib64/libmpi_gnu_123.so.12.0.0
7f0a9000-7f0aa000 r-xp 00000000 08:01 15 /opt/cray/pe/lib64/libmpi_gnu_123.so.12.0.0
7f0ab000-7f0ac000 rw-s 00000000 00:19 16 /dev/shm/mpich_shm_6028_0
"""


def said(**options):
    given = {"library": "MPICH Version:      5.0.2", "path": None, "cuda_query": None, "gpu_query": None, "memory_kinds": None}
    return Claims(**(given | options))


# what a library says


def test_libraries_are_found_among_the_mappings():
    assert loaded_libraries(MAPS) == (
        "/opt/cray/pe/lib64/libmpi_gtl_cuda.so.0",
        "/opt/cray/pe/lib64/libmpi_gnu_123.so.12.0.0",
    )
    assert loaded_libraries("") == ()


def gpu_query(answer, supported):
    def query(kind, found):
        assert kind == 0
        found._obj.value = supported
        return answer

    return query


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ({}, (None, None)),
        ({"MPIX_Query_cuda_support": lambda: 1}, (True, None)),
        ({"MPIX_Query_cuda_support": lambda: 0}, (False, None)),
        ({"MPIX_GPU_query_support": gpu_query(0, 1)}, (None, True)),
        ({"MPIX_GPU_query_support": gpu_query(0, 0)}, (None, False)),
        ({"MPIX_GPU_query_support": gpu_query(15, 1)}, (None, False)),
    ],
)
def test_queries(functions, expected):
    assert queries(SimpleNamespace(**functions)) == expected
    assert queries(None) == (None, None)


@pytest.mark.parametrize(
    ("witnesses", "claimed"),
    [
        ({}, False),
        ({"cuda_query": False, "gpu_query": False, "memory_kinds": ("mpi", "system")}, False),
        ({"cuda_query": True}, True),
        ({"cuda_query": False, "gpu_query": True}, True),
        ({"memory_kinds": ("mpi", "system", "cuda:device")}, True),
        ({"memory_kinds": ("rocm",)}, False),
    ],
)
def test_any_witness_is_a_claim(witnesses, claimed):
    assert said(**witnesses).claimed is claimed


def test_the_evidence_is_told():
    assert said().evidence == "it says nothing of CUDA"
    found = said(cuda_query=True, gpu_query=False, memory_kinds=("mpi", "cuda")).evidence
    assert found == "MPIX_Query_cuda_support says yes; MPIX_GPU_query_support says no; mpi_memory_alloc_kinds is mpi,cuda"


CRAY = "MPI VERSION    : CRAY MPICH version 8.1.29.32 (ANL base 3.4a2)"
INTEL = "Intel(R) MPI Library 2021.18 for Linux* OS"
OPEN = "Open MPI v5.0.11, package: Open MPI"
MPICH = "MPICH Version:      5.0.2"


@pytest.mark.parametrize(
    ("library", "environment", "variables"),
    [
        (CRAY, {}, ["MPICH_GPU_SUPPORT_ENABLED"]),
        (CRAY, {"MPICH_GPU_SUPPORT_ENABLED": "1"}, []),
        (INTEL, {}, ["I_MPI_OFFLOAD"]),
        (INTEL, {"I_MPI_OFFLOAD": "1", "I_MPI_OFFLOAD_MODE": "cuda"}, []),
        (INTEL, {"I_MPI_OFFLOAD": "1", "I_MPI_OFFLOAD_MODE": "l0"}, ["I_MPI_OFFLOAD_MODE"]),
        (OPEN, {}, []),
        (OPEN, {"OMPI_MCA_opal_cuda_support": "0", "OMPI_MCA_accelerator": "null"}, ["OMPI_MCA_opal_cuda", "OMPI_MCA_acc"]),
        (MPICH, {}, []),
        (MPICH, {"MPIR_CVAR_ENABLE_GPU": "0"}, ["MPIR_CVAR_ENABLE_GPU"]),
        (MPICH, {"MPICH_GPU_SUPPORT_ENABLED": "0"}, []),
        (OPEN, {"UCX_TLS": "rc,sm,self"}, ["UCX_TLS"]),
        (OPEN, {"UCX_TLS": "^cuda_ipc"}, ["UCX_TLS"]),
        (OPEN, {"UCX_TLS": "^tcp"}, []),
        (OPEN, {"UCX_TLS": "all"}, []),
        (OPEN, {"UCX_TLS": "rc,cuda_copy,cuda_ipc"}, []),
    ],
)
def test_what_speaks_against_it_is_named_with_a_remedy(library, environment, variables):
    found = hints_for(library, environment)
    assert len(found) == len(variables)
    assert all(hint.startswith(variable) and "set " in hint for hint, variable in zip(found, variables, strict=True))


def test_no_flavour_is_imported_with_the_module(tmp_path):
    code = "import ringsim.backends.cuda_aware, sys; print(*[m for m in ('mpi4py', 'cupy') if m in sys.modules])"
    # in a folder that holds no second copy of the package
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    assert done.stdout.split() == []


# the proof


def proofs(world_size, change=lambda transport: None, *, eager=False, timeout_s=20.0):
    """What each rank's proof says of the staged transport."""

    def run(host):
        gpu = PaperGpu(host.rank, eager=eager)
        transport = DeviceTransport(host, Staged(host, gpu, chunk_nbytes=2**20))
        change(transport)
        found = prove(transport, gpu, timeout_s=timeout_s)
        assert transport.failure == (None if isinstance(found, Proof) else found)
        return found

    return spawn(world_size, run)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_right_transport_is_proven(world_size):
    assert proofs(world_size) == [Proof(tuple(nbytes for nbytes, _ in TRIALS), world_size)] * world_size


def test_patterns_differ_between_ranks_and_hold_more_than_poison():
    for nbytes, _ in TRIALS:
        assert not np.array_equal(pattern(0, nbytes), pattern(1, nbytes))
    assert np.count_nonzero(pattern(0, 65536) == POISON) < 65536 / 64


def breaks(kind, nbytes):
    """The transport of rank 1 does wrong with the messages of one size."""

    def change(transport):
        if transport.rank == 1:
            transport.irecv = lambda data, *where: broken(transport, data, *where)

    def broken(transport, data, peer, tag):
        if data.size != nbytes:
            return type(transport).irecv(transport, data, peer, tag)
        if kind == "raises":
            raise TransportError("it is not for devices")
        # it receives elsewhere: what should be written never is
        return type(transport).irecv(transport, np.empty(nbytes, np.uint8), peer, tag)

    return change


@pytest.mark.parametrize("trial", range(len(TRIALS)))
def test_bytes_that_were_not_written_are_found_and_told_to_all(trial):
    nbytes = TRIALS[trial][0]
    found = proofs(3, breaks("elsewhere", nbytes))
    assert len(set(found)) == 1
    assert f"of {nbytes} B" in found[0]
    assert "were never written" in found[0]


def test_a_rank_that_raises_is_told_to_all():
    found = proofs(2, breaks("raises", 8), timeout_s=0.2)
    assert found == ["rank 1: TransportError: it is not for devices"] * 2


def test_a_transport_that_does_not_ask_for_events_fails_the_proof():
    def change(transport):
        hasty(transport.mover._incoming._track)

    assert any(not isinstance(found, Proof) for found in proofs(2, change))


@pytest.mark.parametrize(("witness", "claim"), [(True, "claims CUDA support"), (False, "does not claim CUDA support")])
def test_a_claim_that_fails_its_proof_is_an_error_with_a_remedy(witness, claim):
    claims = said(cuda_query=witness, hints=("UCX_TLS is 'sm': unset UCX_TLS",))
    errors = []

    def run(host):
        gpu = PaperGpu(host.rank)
        transport = DeviceTransport(host, Staged(host, gpu, chunk_nbytes=2**20))
        breaks("elsewhere", 8)(transport)
        try:
            prove_claims(transport, gpu, claims)
        except TransportError as error:
            errors.append(str(error))

    spawn(2, run)
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"MPICH Version:      5.0.2 {claim} (MPIX_Query_cuda_support says {'yes' if witness else 'no'})")
    assert errors[0].endswith("unset UCX_TLS; use an MPI built with CUDA or use --transport mpi-staged")


def test_nothing_is_asked_of_a_world_of_one_that_it_has_not():
    assert isinstance(prove_claims(alone(), PaperGpu(), said(cuda_query=True)), Proof)


def alone():
    host = World(1).endpoint(0)
    return DeviceTransport(host, Staged(host, PaperGpu(), chunk_nbytes=2**20))

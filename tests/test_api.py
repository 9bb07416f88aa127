"""The library API in one process: loopback ranks on threads, the same code that MPI runs."""

import array

import numpy as np
import pytest

import ringsim
from ringsim.backends.loopback import spawn
from ringsim.errors import ArrayError, RankMismatch, WorkloadError
from ringsim.reference import dense_attention

PARTITIONS = ("contiguous", "striped", "zigzag")


def arrays(seq=23, heads=4, kv_heads=2, dtype="float32", batch=2, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, seq, heads, 8), (batch, seq, kv_heads, 8), (batch, seq, kv_heads, 6))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def workload(q, k, v, causal):
    return ringsim.Workload(
        q_len=q.shape[1],
        batch=q.shape[0],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_dim=8,
        v_head_dim=6,
        dtype=q.dtype.name,
        mask=ringsim.Causal() if causal else ringsim.Full(),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_one_call_from_shards_and_back(world_size, partition, causal):
    q, k, v = arrays()

    def rank(comm):
        local = [ringsim.shard(x, comm=comm, partition=partition) for x in (q, k, v)]
        out, lse = ringsim.ring_attention(*local, comm=comm, causal=causal, partition=partition, return_lse=True)
        return ringsim.unshard(out, comm=comm, partition=partition), ringsim.unshard(lse, comm=comm, partition=partition, axis=2)

    out, lse = dense_attention(workload(q, k, v, causal), q, k, v)
    for global_out, global_lse in spawn(world_size, rank):
        assert np.abs(global_out - out).max() < 2e-6
        assert np.abs(global_lse - lse).max() < 2e-6


def test_without_a_communicator_it_is_one_rank():
    q, k, v = arrays()
    out = ringsim.ring_attention(q, k, v, causal=True)
    assert np.abs(out - dense_attention(workload(q, k, v, True), q, k, v)[0]).max() < 2e-6
    assert ringsim.shard(q) is not None
    assert ringsim.unshard(q) is q


def test_a_plan_is_made_once_and_gives_the_same_bits_each_time():
    q, k, v = arrays()

    def rank(comm):
        with ringsim.RingAttention(workload(q, k, v, True), comm=comm, partition="zigzag") as plan:
            local = [ringsim.shard(x, comm=comm, partition="zigzag") for x in (q, k, v)]
            before = plan.nbytes
            first = plan(*local)
            out = np.empty(plan.shapes["out"], np.float32)
            assert plan(*local, out=out) is out
            assert plan.nbytes == before
            other = plan(*[x * 2 for x in local])
            timeline = plan.timeline()
            assert timeline.digest == plan.schedule.digest
            assert {event.rank for event in timeline.events} == set(range(3))
            return first.tobytes() == out.tobytes(), not np.array_equal(first, other)

    assert spawn(3, rank) == [(True, True)] * 3


class Foreign:
    """An array of another library: DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def as_buffer(x):
    return memoryview(x)


def as_reversed_view(x):
    return np.ascontiguousarray(x[:, ::-1])[:, ::-1]


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("kind", [Foreign, as_buffer, as_reversed_view, read_only])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_speaks_dlpack_or_buffers_is_taken_as_it_is(kind, world_size):
    q, k, v = arrays(seq=8)
    expected = dense_attention(workload(q, k, v, False), q, k, v)[0]

    def rank(comm):
        local = [kind(np.ascontiguousarray(ringsim.shard(x, comm=comm))) for x in (q, k, v)]
        return ringsim.unshard(ringsim.ring_attention(*local, comm=comm), comm=comm)

    for out in spawn(world_size, rank):
        assert np.abs(out - expected).max() < 2e-6


def test_as_array_shares_memory():
    from ringsim.arrays import as_array, host_view

    x = np.zeros((1, 2, 3, 4), np.float32)
    for other in (x, Foreign(x), memoryview(x)):
        assert np.shares_memory(as_array("x", other, host_view), x)
    assert host_view("x", array.array("d", [1.0, 2.0])).tolist() == [1.0, 2.0]


def test_torch_tensors():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in arrays(seq=8))
    out = torch.empty(2, 8, 4, 6)
    ringsim.ring_attention(q, k, v, out=out)
    expected = dense_attention(workload(*[x.numpy() for x in (q, k, v)], False), q.numpy(), k.numpy(), v.numpy())[0]
    assert np.abs(out.numpy() - expected).max() < 2e-6
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    assert ringsim.ring_attention(*half).dtype.name == "bfloat16"
    with pytest.raises(RankMismatch, match="detach"):
        ringsim.ring_attention(q.requires_grad_(), k, v)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shard_and_positions_agree_on_any_axis(partition, axis):
    x = np.moveaxis(np.arange(2 * 11 * 3).reshape(11, 2, 3), 0, axis)

    class Place:
        def __init__(self, rank):
            self.rank, self.world_size = rank, 4

    for rank in range(4):
        positions = ringsim.Partition(kind=partition, length=11, world_size=4).positions(rank)
        assert np.array_equal(ringsim.shard(x, comm=Place(rank), partition=partition, axis=axis), np.take(x, positions, axis))


def differing(change):
    """Rank 1 of 3 calls with something else than the others."""
    q, k, v = arrays(seq=9)

    def rank(comm):
        local = [ringsim.shard(x, comm=comm) for x in (q, k, v)]
        options = {"causal": False}
        if comm.rank == 1:
            local, options = change(local, options)
        try:
            ringsim.ring_attention(*local, comm=comm, **options)
        except RankMismatch as error:
            return str(error)
        return "no error"

    return spawn(3, rank, timeout_s=20)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, o: ([x.astype("float64") for x in a], o), "rank 1: q is float64"),
        (
            lambda a, o: ([a[0][:, :, :2], *a[1:]], o),
            r"rank 1: q is float32\(2, ..., 2, 8\) where rank 0 has float32\(2, ..., 4, 8\)",
        ),
        (lambda a, o: (a, {"causal": True}), "rank 1: mask is causal where rank 0 has full"),
        (lambda a, o: ([a[0][:, :2], *a[1:]], o), r"rows of q are no contiguous partition of 8 tokens"),
        (lambda a, o: ([a[0][0], *a[1:]], o), r"rank 1: q has 3 dimensions"),
        (lambda a, o: ([a[0].astype("int32"), *a[1:]], o), "rank 1: q has dtype int32"),
        (lambda a, o: ([object(), *a[1:]], o), "rank 1: q is object"),
        (lambda a, o: (a, {"partition": "zigzag"}), "rank 1: partition is zigzag where rank 0 has contiguous"),
    ],
)
def test_what_differs_between_ranks_is_named_on_every_rank_before_the_first_hop(change, said):
    messages = differing(change)
    assert len(set(messages)) == 1
    with pytest.raises(RankMismatch, match=said):
        raise RankMismatch(messages[0])


def test_plans_check_shards_and_outputs():
    q, k, v = arrays(seq=6, batch=1)
    plan = ringsim.RingAttention(workload(q, k, v, False))
    with pytest.raises(RankMismatch, match=r"rank 0: k is float32\(1, 5, 2, 8\), expected float32\(1, 6, 2, 8\)"):
        plan(q, k[:, :5], v)
    with pytest.raises(RankMismatch, match="out is float64"):
        plan(q, k, v, out=np.empty((1, 6, 4, 6)))
    with pytest.raises(RankMismatch, match="out is read-only"):
        plan(q, k, v, out=read_only(np.empty((1, 6, 4, 6), np.float32)))
    with pytest.raises(WorkloadError, match="no timeline before"):
        plan.timeline()
    unchecked = ringsim.RingAttention(workload(q, k, v, False), check=False)
    with pytest.raises(ArrayError, match="rank 0: k is"):
        unchecked(q, k[:, :5], v)


def test_plans_of_different_workloads_do_not_meet():
    q, k, v = arrays(seq=6)

    def rank(comm):
        with pytest.raises(RankMismatch, match=r"workload mask is (full|causal) where rank 0 has"):
            ringsim.RingAttention(workload(q, k, v, comm.rank == 1), comm=comm)
        return True

    assert spawn(2, rank, timeout_s=20) == [True, True]


def test_unshard_refuses_rows_of_no_partition():
    def rank(comm):
        with pytest.raises(
            RankMismatch, match=r"rows of x are no contiguous partition of 4 tokens: rank 0 has 1, not 2; rank 1 has 3, not 2"
        ):
            ringsim.unshard(np.zeros((1, 1 + 2 * comm.rank)), comm=comm)
        return True

    assert spawn(2, rank, timeout_s=20) == [True, True]

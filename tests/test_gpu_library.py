"""The library on device arrays: ranks on threads, each with a GPU on paper, joined by the staged transport."""

import threading

import numpy as np
import pytest
from emulator import Emulator
from paper_gpu import DeviceArray, PaperGpu
from paper_tiles import PaperTiles

import ringsim
from ringsim.backends import cuda_devices, cupy_calls
from ringsim.backends.cupy import CupyBackend
from ringsim.backends.loopback import World, spawn
from ringsim.backends.mover import DeviceTransport
from ringsim.backends.staged import Staged
from ringsim.cli import running
from ringsim.cli.options import Plan
from ringsim.engine import Engine, engine_of
from ringsim.errors import DeviceError, MissingDependency, RankMismatch, TransportError
from ringsim.reference import dense_attention, dense_backward

RUN = Emulator().launch
LOCK = threading.Lock()
WORK = ringsim.Workload(q_len=37, heads=4, kv_heads=2, head_dim=8, mask=ringsim.Causal())


def one_at_a_time(*launch):
    with LOCK:
        RUN(*launch)


class Card(PaperGpu):
    """A paper GPU with what the engine asks of a real one."""

    capability = (9, 0)

    def facts(self):
        return {"device": "paper", "uuid": self.uuid}


def engine(endpoint, *, seed=0):
    gpu = Card(seed + endpoint.rank, run=one_at_a_time)
    moving = endpoint if endpoint.world_size == 1 else DeviceTransport(endpoint, Staged(endpoint, gpu, chunk_nbytes=64, depth=2))
    backend = CupyBackend(gpu, (PaperTiles(gpu),))
    return Engine(backend=backend, transport=moving, control=endpoint, said="on paper", facts={"device": "paper"})


def arrays(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, 37, heads, 8)).astype(dtype) for heads in (4, 2, 2, 4)]


def largest(one, other):
    return np.abs(one - other).max()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("strategy", ["ring", "q-ring"])
def test_a_plan_forward_and_backward(world_size, strategy):
    q, k, v, dout = arrays()
    out, lse = dense_attention(WORK, q, k, v)
    gradients = dense_backward(WORK, dout, q, k, v)

    def rank(endpoint):
        on = engine(endpoint)
        plan = ringsim.RingAttention(WORK, engine=on, partition="zigzag", strategy=strategy)
        rows = plan.positions["q"], plan.positions["kv"]
        mine = [on.backend.put(x[:, rows[i]]) for x, i in ((q, 0), (k, 1), (v, 1), (dout, 0))]
        for _ in range(2):
            made, made_lse = plan.with_lse(*mine[:3])
            assert type(made) is DeviceArray
            back = plan.backward(mine[3])
        whole = plan.both(*mine)
        found = [on.backend.get(x) for x in (made, made_lse, *back)]
        assert largest(found[0], out[:, rows[0]]) < 2e-6
        assert largest(found[1], lse[:, :, rows[0]]) < 1e-5
        for x, exact, i in zip(found[2:], gradients, (0, 1, 1), strict=True):
            assert largest(x, exact[:, rows[i]]) < 2e-5
        for x, again in zip((found[0], *found[2:]), whole, strict=True):
            assert x.tobytes() == on.backend.get(again).tobytes()
        timeline = plan.timeline()
        assert timeline.total_s > 0
        assert plan.scratch_nbytes == on.backend.nbytes > 0
        return {event.kind for event in timeline.events if event.rank == endpoint.rank}

    for kinds in spawn(world_size, rank):
        assert {"attend", "attend_backward", "finish"} <= kinds


def alone(work=WORK, **options):
    on = engine(World(1).endpoint(0))
    return on.backend, ringsim.RingAttention(work, engine=on, **options)


def test_outputs_of_the_caller_are_filled_and_may_not_lie_over_inputs():
    backend, plan = alone()
    q, k, v, _ = (backend.put(x) for x in arrays())
    out = backend.new(q.shape, q.dtype)
    assert plan(q, k, v, out=out) is out
    assert largest(backend.get(out), dense_attention(WORK, *arrays()[:3])[0]) < 2e-6
    within = backend.new((1, 37, 8, 8), q.dtype)
    with pytest.raises(RankMismatch, match="out shares memory with k"):
        plan(q, within[:, :, 4:6], v, out=within[:, :, 2:6])
    # slices of one packed array have no byte in common
    packed = backend.put(np.concatenate(arrays()[:3], axis=2))
    parts = packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:]
    assert largest(backend.get(plan(*parts)), dense_attention(WORK, *arrays()[:3])[0]) < 2e-6


def bytes_of(array):
    return array.reshape(-1).view(np.uint8)


def queue_on(gpu, stream, *arrays):
    """Work on arrays that the caller lets go of at once: its memory is free, and still to be written."""
    for array in arrays:
        gpu.fill(bytes_of(array), 7, stream)


@pytest.mark.parametrize("seed", range(6))
def test_memory_of_the_callers_pool_follows_the_stream_that_it_is_for(seed):
    on = engine(World(1).endpoint(0), seed=seed)
    backend, gpu, plan = on.backend, on.backend.calls, ringsim.RingAttention(WORK, engine=on)
    q, k, v, _ = arrays()
    exact, lse = dense_attention(WORK, q, k, v)
    given = [backend.put(x) for x in (q, k, v)]
    side = gpu.stream()
    queue_on(gpu, gpu.current, backend.new(q.shape, q.dtype), backend.new(lse.shape, np.dtype(np.float32)))
    made, made_lse = plan.with_lse(*given, stream=side)
    assert largest(backend.get(made), exact) < 2e-6
    assert largest(backend.get(made_lse), lse) < 1e-5
    # on the stream that it was for the memory may be taken again, and what follows there is in order
    queue_on(gpu, side, made)
    del made
    assert largest(backend.get(plan(*given, stream=side)), exact) < 2e-6


@pytest.mark.parametrize("seed", range(6))
def test_what_is_put_and_got_follows_the_current_stream(seed):
    backend = engine(World(1).endpoint(0), seed=seed).backend
    gpu, x = backend.calls, arrays()[0]
    queue_on(gpu, gpu.current, backend.new(x.shape, x.dtype))
    made = backend.put(x)
    assert backend.get(made).tobytes() == x.tobytes()
    queue_on(gpu, gpu.current, made)
    assert set(backend.get(made).tobytes()) == set(backend.get(made.transpose(0, 2, 1, 3)).tobytes()) == {7}


@pytest.mark.parametrize("seed", range(6))
def test_after_a_run_that_failed_the_callers_stream_still_follows_it(seed):
    """What was queued before runs on, into the caller's arrays, which he may use for something else at once."""
    on = engine(World(1).endpoint(0), seed=seed)
    backend, gpu = on.backend, on.backend.calls

    def fail(op, fetch, scale):
        raise DeviceError("out of order")

    backend._delta = fail
    plan = ringsim.RingAttention(WORK, engine=on)
    given = [backend.put(x) for x in arrays()]
    out = backend.new(given[0].shape, given[0].dtype)
    with pytest.raises(DeviceError, match=r"rank 0: at op \d+ \(delta, step \d\): out of order"):
        plan.both(*given, out=out)
    queue_on(gpu, gpu.current, out)
    gpu.drain()
    assert set(backend.get(out).tobytes()) == {7}


def test_a_device_that_fails_after_the_last_op_is_named_with_its_rank():
    backend, plan = alone()
    given = [backend.put(x) for x in arrays()[:3]]
    plan(*given)

    def fail():
        raise ArithmeticError("an illegal address")

    backend.calls.defer(fail, backend.stream)
    with pytest.raises(DeviceError, match=r"rank 0: reading the times of a run: the device failed: .*an illegal address"):
        plan.timeline()
    with pytest.raises(DeviceError, match=r"rank 0: (beginning a run|at op \d+ .*): the device failed"):
        plan(*given)


def test_host_arrays_are_told_where_to_go():
    _, plan = alone()
    with pytest.raises(RankMismatch, match="q is ndarray, not memory of the paper GPU"):
        plan(*arrays()[:3])


def test_what_leaves_must_be_dense():
    """No hidden copy in device memory: the caller is told what to pass."""

    def rank(endpoint):
        on = engine(endpoint)
        plan = ringsim.RingAttention(WORK, engine=on)
        rows = plan.positions["q"]
        q, k, v, _ = (x[:, rows] for x in arrays())
        packed = on.backend.put(np.concatenate((k, v), axis=2))
        with pytest.raises(
            RankMismatch, match=r"rank 0: k leaves from where it lies and is not dense .*: pass cupy.ascontiguousarray\(k\)"
        ):
            plan(on.backend.put(q), packed[:, :, :2], packed[:, :, 2:])

    spawn(2, rank)


def paper_machine(monkeypatch, uuids):
    """A machine whose GPUs are paper; each rank finds the one whose number its name bears."""

    made = [[] for _ in uuids]

    class Found(Card):
        def __init__(self, device):
            super().__init__(device, run=one_at_a_time)
            self.uuid = uuids[device]
            made[device].append(self)

    monkeypatch.setattr(cupy_calls, "CupyCalls", Found)
    monkeypatch.setattr(cuda_devices, "device_of", lambda control: control.rank)
    monkeypatch.setattr(cuda_devices, "tiles_on", lambda calls: (PaperTiles(calls),))
    return made


def test_an_engine_says_what_moves_messages_and_who_shares_a_gpu(monkeypatch):
    paper_machine(monkeypatch, ["a", "b", "b"])

    def rank(endpoint):
        made = engine_of(endpoint, backend="cupy", transport="mpi-staged")
        assert made.transport.name == "mpi-staged"
        assert made.said.startswith("transport mpi-staged: ")
        assert made.said.endswith("up to 2 ranks share a GPU, and its time")
        made.close()
        return made.facts["ranks_on_device"]

    assert spawn(3, rank) == [1, 2, 2]


def test_one_shot_calls_on_device_arrays(monkeypatch):
    """Where the arrays lie decides the backend; `auto` over loopback can only be staged."""
    monkeypatch.setattr(ringsim.attention, "on_device", lambda value: isinstance(value, DeviceArray))
    q, k, v, dout = arrays()
    expected, gradients = dense_attention(WORK, q, k, v)[0], dense_backward(WORK, dout, q, k, v)

    def rank(endpoint):
        gpu = PaperGpu()
        local = [gpu.upload(ringsim.shard(x, comm=endpoint)) for x in (q, k, v, dout)]
        options = {"comm": endpoint, "causal": True, "transport": "mpi-staged"}
        out, lse = ringsim.ring_attention(*local[:3], **options, return_lse=True)
        # each call finds a paper GPU of its own, with a current stream of its own
        cards[endpoint.rank][0].drain()
        back = ringsim.ring_attention_backward(local[3], *local[:3], out, lse, **options)
        cards[endpoint.rank][1].drain()
        return [np.array(x.view(np.ndarray)) for x in (out, *back)]

    cards = paper_machine(monkeypatch, ["a", "b"])
    parts = spawn(2, rank)
    for index, (exact, limit) in enumerate(zip((expected, *gradients), (2e-6, 2e-5, 2e-5, 2e-5), strict=True)):
        assert largest(np.concatenate([part[index] for part in parts], axis=1), exact) < limit


def test_ranks_whose_arrays_lie_in_different_memories_are_told():
    def rank(endpoint):
        with pytest.raises(RankMismatch, match="rank 1: backend is cupy where rank 0 has numpy"):
            engine_of(endpoint, backend="cupy" if endpoint.rank else "numpy")

    spawn(2, rank)


def test_unknown_backends_and_transports():
    endpoint = World(1).endpoint(0)
    with pytest.raises(DeviceError, match="backend is 'cuda'; there are numpy, cupy"):
        engine_of(endpoint, backend="cuda")
    with pytest.raises(TransportError, match="transport is 'ucx'; there are auto, mpi, mpi-staged, ipc, nccl"):
        engine_of(endpoint, backend="cupy", transport="ucx")
    with pytest.raises(TransportError, match="transport 'ipc' moves device memory; backend 'numpy' has none: use auto or mpi"):
        engine_of(endpoint, transport="ipc")


def test_threads_are_of_the_host():
    def rank(endpoint):
        expected = (DeviceError, "threads is 2; backend 'cupy'") if endpoint.rank else (RankMismatch, "rank 1: threads is 2")
        with pytest.raises(expected[0], match=expected[1]):
            engine_of(endpoint, backend="cupy", threads=2 if endpoint.rank else None)

    spawn(2, rank)


def test_a_rank_without_a_gpu_is_told_and_the_others_of_it(monkeypatch):
    paper_machine(monkeypatch, ["a", "b"])
    found = cupy_calls.CupyCalls

    def missing(device):
        if device == 1:
            raise MissingDependency("backend 'cupy' needs CuPy: pip install 'ringsim[gpu-cuda13]'")
        return found(device)

    monkeypatch.setattr(cupy_calls, "CupyCalls", missing)

    def rank(endpoint):
        expected = (MissingDependency, "needs CuPy") if endpoint.rank else (RankMismatch, "rank 1: backend 'cupy' needs CuPy")
        with pytest.raises(expected[0], match=expected[1]):
            engine_of(endpoint, backend="cupy", transport="mpi-staged")

    spawn(2, rank)


def test_run_and_compare_measure_an_engine_of_gpus():
    job = Plan(workload=WORK, partition="zigzag", strategy="ring", sync="free")

    def rank(endpoint):
        return running.measure(engine(endpoint), job, repeats=2, warmup=1, seed=0, timeout=60.0, check=True)

    for done in spawn(2, rank):
        assert done.passed and len(done.runs) == 2
        assert done.runs[0].facts["backend"] == "cupy"
        assert done.runs[0].facts["transport"] == "mpi-staged"
        assert done.memory.allocated_nbytes == done.memory.predicted_nbytes

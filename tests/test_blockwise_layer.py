"""The blockwise layer of examples/: its gradients, alone and over ranks, its bytes, and its schedule."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import ringsim
from ringsim.backends.loopback import spawn
from ringsim.footprint import Layers
from ringsim.schedule import STRATEGIES, Compute, Recv, Send

ROOT = Path(__file__).parents[1]
EXAMPLES = str(ROOT / "examples")
STRATEGY = "blockwise-layer"


def imported(name):
    """A module of examples/, found there and nowhere else."""
    sys.path.insert(0, EXAMPLES)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(EXAMPLES)


@pytest.fixture(scope="module")
def layer():
    return imported("blockwise_layer")


@pytest.fixture(scope="module")
def schedule():
    """With its strategy registered; it has no kernels to be executed with, so other tests must not find it."""
    yield imported("blockwise_schedule")
    del STRATEGIES[STRATEGY], sys.modules["blockwise_schedule"]


def workload(seq_len=10, heads=2, kv_heads=1, head_dim=4, **more):
    return ringsim.Workload(
        q_len=seq_len, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype="float64", mask=ringsim.Causal(), **more
    )


class Case:
    """A layer's x, dy and weights; `step` goes through it over ranks in this process."""

    def __init__(self, layer, work, width, hidden, block=3):
        rng = np.random.default_rng(1)
        self.layer, self.work, self.block = layer, work, block
        self.x, self.dy = rng.standard_normal((2, work.q_len, width))
        self.w = layer.Weights(*(rng.standard_normal(shape) / 2 for shape in layer.shapes(work, width, hidden)))

    def step(self, ranks=1, keep=True, **options):
        """y, the gradient of x and those of the weights, summed over ranks."""

        def of_rank(comm):
            with ringsim.RingAttention(self.work, comm=comm, threads=1, **options) as plan:
                one, mine = self.layer.Layer(plan, self.block), plan.positions["q"]
                grads = self.layer.Weights(*map(np.zeros_like, self.w))
                y, saved = one.forward(self.x[mine], self.w, keep)
                return mine, y, one.backward(self.dy[mine], saved, self.w, grads), grads

        found = spawn(ranks, of_rank)
        y, dx = np.full_like(self.x, np.nan), np.full_like(self.x, np.nan)
        for mine, *rows, _ in found:
            y[mine], dx[mine] = rows
        return y, dx, *map(sum, zip(*(grads for *_, grads in found), strict=True))

    def value(self):
        """sum(y * dy), whose gradients these are."""
        with ringsim.RingAttention(self.work, threads=1, check=False) as plan:
            return np.sum(self.layer.Layer(plan, self.block).forward(self.x, self.w)[0] * self.dy)


def test_every_gradient_is_that_of_finite_differences(layer):
    case = Case(layer, workload(seq_len=5), width=6, hidden=7, block=2)
    _, *gradients = case.step()
    step = 1e-5
    for array, gradient in zip((case.x, *case.w), gradients, strict=True):
        for index in np.ndindex(array.shape):
            at = array[index]
            array[index] = at + step
            ahead = case.value()
            array[index] = at - step
            behind = case.value()
            array[index] = at
            assert gradient[index] == pytest.approx((ahead - behind) / (2 * step), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"partition": "contiguous"}),
        (3, {"partition": "striped"}),
        (4, {"partition": "zigzag"}),
        (4, {"partition": "zigzag", "strategy": "burst"}),
        (4, {"partition": "zigzag", "strategy": "double-ring(2)", "sync": "step"}),
    ],
)
def test_over_ranks_it_is_what_it_is_on_one(layer, ranks, options, keep):
    case = Case(layer, workload(seq_len=22, heads=4, kv_heads=2, head_dim=6), width=12, hidden=20)
    for found, expected in zip(case.step(ranks, keep, **options), case.step(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def test_layers_share_a_plan_and_each_keeps_its_own(layer):
    """Two layers, one plan: gradients of both, as from plans of their own."""
    work = workload(seq_len=12)
    cases = [Case(layer, work, width=6, hidden=8) for _ in range(2)]
    cases[1].w = layer.Weights(*(2 * matrix for matrix in cases[1].w))
    grads = [layer.Weights(*map(np.zeros_like, case.w)) for case in cases]
    with ringsim.RingAttention(work, threads=1) as plan:
        one = layer.Layer(plan, 4)
        kept, x = [], cases[0].x
        for case in cases:
            x, saved = one.forward(x, case.w)
            kept.append(saved)
        back = one.backward(cases[1].dy, kept[1], cases[1].w, grads[1])
        one.backward(back, kept[0], cases[0].w, grads[0])
    cases[1].x = cases[0].step()[0]
    _, dx, *last = cases[1].step()
    cases[0].dy = dx
    _, _, *first = cases[0].step()
    for found, expected in zip((*grads[0], *grads[1]), (*first, *last), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("block", [1, 7, 16, 64, 100])
def test_blocks_change_nothing_but_rounding(layer, block):
    case, whole = (Case(layer, workload(seq_len=64, heads=2, head_dim=4), width=8, hidden=32, block=b) for b in (block, 64))
    for found, expected in zip(case.step(), whole.step(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


SMALL_OBJECTS = 4096
"""Bytes of views, loop variables and a number per row of a block."""


@pytest.mark.parametrize("rows", [256, 1024])
@pytest.mark.parametrize("times", [1, 4, 16])
def test_the_feed_forward_holds_its_result_and_the_hidden_units_of_a_block(layer, times, rows):
    width, block = 48, 16
    held = layer.held_nbytes(rows, width, times * width, block)
    # what other threads of the test's process allocate meanwhile can only add to a peak
    runs = [layer.peaks(rows, width, times * width, block, np.random.default_rng(0)) for _ in range(3)]
    for measured, nbytes in zip(map(min, zip(*runs, strict=True)), held, strict=True):
        assert 0 <= measured - nbytes < SMALL_OBJECTS
    hidden = rows * times * width * 8
    assert held[0] == rows * width * 8 + block * (times * width + 2 * width) * 8
    if times == 16:
        assert max(held) < hidden / 2


def test_more_tokens_take_more_bytes_of_the_result_alone(layer):
    rng, width, hidden, block = np.random.default_rng(0), 32, 512, 16
    few, many = (layer.peaks(rows, width, hidden, block, rng) for rows in (128, 1152))
    for one, other in zip(few, many, strict=True):
        assert abs((other - one) - 1024 * width * 8) < 1024


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "computed again"])
def test_what_a_layer_keeps_is_what_the_memory_model_says(layer, keep):
    case = Case(layer, workload(seq_len=24, heads=4, kv_heads=2, head_dim=6), width=24, hidden=20)
    with ringsim.RingAttention(case.work, threads=1) as plan:
        _, (x, kept) = layer.Layer(plan, 8).forward(case.x, case.w, keep)
    one, two = (Layers(count=count, recompute=not keep).nbytes(case.work, (24, 24), None) for count in (1, 2))
    assert x.nbytes == one
    assert sum(array.nbytes for array in (x, *(kept or ()))) == two - one


def test_the_page_shows_what_the_examples_print():
    page = (ROOT / "docs" / "training.md").read_text()
    for name in ("blockwise_schedule", "blockwise_layer"):
        last = (ROOT / "examples" / f"{name}.out").read_text().split("\n\n")[-1]
        assert f"```\n{last}```" in page


class Counted(np.ndarray):
    """Counts the FLOPs of products of matrices."""

    flops = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **more):
        plain = [np.asarray(one) for one in inputs]
        if ufunc is np.matmul:
            Counted.flops += 2 * plain[0].size * plain[1].shape[1]
        if out is not None:
            more["out"] = tuple(np.asarray(one) for one in out)
        made = getattr(ufunc, method)(*plain, **more)
        return made.view(Counted) if isinstance(made, np.ndarray) else made


def counted(function, *arguments):
    Counted.flops = 0
    function(*arguments)
    return Counted.flops


def test_the_schedule_s_flops_are_those_of_the_layer(layer, schedule):
    case = Case(layer, workload(seq_len=30, heads=4, head_dim=3), width=12, hidden=20, block=7)
    work, rows, width, hidden = case.work, 30, 12, 20
    x, dy = case.x.view(Counted), case.dy.view(Counted)
    grads = layer.Weights(*map(np.zeros_like, case.w))
    forward = counted(layer.feed_forward, x, case.w, 7)
    backward = counted(layer.feed_forward_back, dy, x, case.w, grads, 7)
    assert (forward, backward) == (4 * rows * width * hidden, 10 * rows * width * hidden)

    work = ringsim.Workload(q_len=2 * rows, heads=4, kv_heads=2, head_dim=3, pass_="both")
    planned = ringsim.Schedule(workload=work, world_size=2, strategy=f"{STRATEGY}({hidden}, 7)")
    for rank in range(2):
        ops = [op for op in planned.program(rank) if isinstance(op, Compute)]
        for kernel, flops in (("feed_forward", forward), ("feed_forward_back", backward)):
            parts = [op for op in ops if op.kernel == kernel]
            assert [op.writes[0].sizes[1] for op in parts] == [7, 7, 7, 7, 2]
            assert sum(op.flops for op in parts) == flops
        # the projection, again for the gradients, which are two products
        assert sum(op.flops for op in ops if op.kernel.startswith("project")) == 4 * 2 * rows * width * width


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
@pytest.mark.parametrize("partition", ["contiguous", "zigzag"])
def test_the_schedule_is_proven(schedule, partition, pass_):
    for ranks in (1, 2, 5):
        for early in (0, 1):
            work = ringsim.Workload(q_len=47, batch=2, heads=4, kv_heads=2, head_dim=3, mask=ringsim.Causal(), pass_=pass_)
            text = f"{STRATEGY}(20, 3, {early})"
            ringsim.Schedule(workload=work, world_size=ranks, partition=partition, strategy=text).validate()


@pytest.mark.parametrize("early", [0, 1])
def test_the_first_hop_is_posted_before_the_feed_forward_and_nothing_waits_for_it_there(schedule, early):
    work = ringsim.Workload(q_len=64, heads=4, head_dim=4, pass_="backward")
    program = list(ringsim.Schedule(workload=work, world_size=4, strategy=f"{STRATEGY}(32, 4, {early})").program(1))
    kernels = [op.kernel if isinstance(op, Compute) else type(op).__name__ for op in program]
    last = len(kernels) - 1 - kernels[::-1].index("feed_forward_back")
    posted = [op.region.buffer for op in program[:last] if isinstance(op, Send | Recv)]
    assert sorted(posted) == (["k", "k", "v", "v"] if early else [])
    assert "Wait" not in kernels[:last]


def predicted(machine, ranks, tokens, kv_heads, early):
    mask = ringsim.Causal()
    work = ringsim.Workload(
        q_len=tokens * ranks, heads=32, kv_heads=kv_heads, head_dim=128, dtype="bfloat16", mask=mask, pass_="backward"
    )
    planned = ringsim.Schedule(workload=work, world_size=ranks, partition="zigzag", strategy=f"{STRATEGY}(16384, 512, {early})")
    return ringsim.simulate(planned, machine)


def hop_of(timeline):
    """Seconds from the post of rank 0's first messages to the last one's end."""
    events = [e for e in timeline.events if e.rank == 0 and (e.kind, e.phase, e.step) == ("recv", "hop", 0)]
    return max(e.end_s for e in events) - min(e.start_s for e in events)


def spent_waiting(timeline):
    """Seconds that rank 0 waits for them."""
    waits = [e for e in timeline.events if e.rank == 0 and (e.kind, e.phase, e.step) == ("wait", "hop", 1)]
    return waits[0].end_s - waits[0].start_s


def test_an_early_hop_is_waited_for_no_more_where_attention_at_home_is_shorter(schedule):
    """All of that wait is saved, but for what a message in flight takes from the kernels that it now hides behind."""
    machine = ringsim.load_topology("a100-pcie-pair")
    late, early = (predicted(machine, 2, 2048, 32, early) for early in (0, 1))
    wait_s, hop_s, share = spent_waiting(late), hop_of(early), machine.spec.transports["nccl"].paths["pcie4"].device_share
    assert wait_s > 0 and spent_waiting(early) == 0
    assert wait_s - share * hop_s / (1 - share) <= late.total_s - early.total_s <= wait_s


def test_an_early_hop_saves_nothing_where_attention_at_home_is_longer(schedule):
    machine = ringsim.load_topology("a100-pcie-pair", {"transports.nccl.paths.pcie4.device_share": 0.0})
    late, early = (predicted(machine, 2, 2048, 8, early) for early in (0, 1))
    assert spent_waiting(late) == 0
    assert early.total_s == pytest.approx(late.total_s, rel=1e-12)

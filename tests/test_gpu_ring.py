"""Rings on GPUs on paper: every strategy right whatever the order of streams, and wrong without the events that order them."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_ring import Ring
from paper_tiles import PaperTiles

from ringsim.backends.cuda_attend import OwnTiles
from ringsim.backends.cupy import CupyBackend
from ringsim.errors import DeviceError
from ringsim.mask import Causal, Window
from ringsim.schedule import Compute, Schedule
from ringsim.schedule.registry import STRATEGIES
from ringsim.workload import Workload

from .test_family import Problem, check_agrees, schedules
from .test_family_backward import BACK, check_bits, of_pass
from .test_family_backward import Problem as BackwardProblem
from .test_family_backward import check_agrees as check_gradients

EXAMPLES = 12
LEAST = 9
SEEDS = range(12)
RUNS = [
    ("ring", "zigzag"),
    ("q-ring", "striped"),
    ("bidirectional", "contiguous"),
    ("double-ring(2)", "zigzag"),
    ("burst", "zigzag"),
]


def paper(gpu):
    return (PaperTiles(gpu),)


def own(gpu):
    return (OwnTiles(gpu),)


def small(strategy="ring", partition="zigzag", world_size=4, **options):
    work = Workload(**{"q_len": 33, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32", "mask": Causal()} | options)
    return Schedule(workload=work, world_size=world_size, partition=partition, strategy=strategy)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_family(name):
    ran = Counter()

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(schedules(name), st.integers(0, 2**32))
    def check(schedule, seed):
        problem = Problem.of(schedule.workload, seed)
        results = [Ring.of(schedule, seed=order, tiles=paper).run(*problem.arrays) for order in (seed, seed + 1)]
        check_agrees(schedule.workload, problem, results[0])
        check_bits(*results, "out", "lse")
        ran[name] += 1

    check()
    assert ran[name] >= LEAST


@pytest.mark.parametrize("name", BACK)
def test_family_backward(name):
    ran = Counter()

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(schedules(name), st.integers(0, 2**32))
    def check(schedule, seed):
        both, backward = (of_pass(schedule, pass_) for pass_ in ("both", "backward"))
        problem = BackwardProblem.of(of_pass(schedule, "forward").workload, seed)
        inputs, dout = (problem.q, problem.k, problem.v), problem.dout
        first, again = (Ring.of(both, seed=order, tiles=paper).run(*inputs, dout=dout) for order in (seed, seed + 1))
        check_gradients(schedule.workload, problem, first)
        check_bits(first, again, "out", "lse", "dq", "dk", "dv")
        alone = Ring.of(backward, seed=seed, tiles=paper).run(*inputs, out=first.out, lse=first.lse, dout=dout)
        check_bits(first, alone, "dq", "dk", "dv")
        ran[name] += 1

    check()
    assert ran[name] >= LEAST


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("strategy", "partition"), RUNS)
def test_own_kernels_in_a_ring(strategy, partition, dtype):
    schedule = of_pass(small(strategy, partition, dtype=dtype, head_dim=16), "both")
    problem = BackwardProblem.of(of_pass(schedule, "forward").workload, 3)
    arrays = problem.q, problem.k, problem.v
    found = Ring.of(schedule, tiles=own).run(*arrays, dout=problem.dout)
    check_agrees(schedule.workload, Problem.of_arrays(schedule.workload, arrays), found)
    check_gradients(schedule.workload, problem, found)


class Hasty(CupyBackend):
    """The mutant that hands buffers over without waiting for the event of the kernels that make or still read them."""

    def gate(self, post):
        super().gate(post)


class Deaf(CupyBackend):
    """The mutant that begins before the caller's stream has come so far."""

    def begin(self, stream):
        wait, self.calls.wait = self.calls.wait, lambda *_: None
        super().begin(stream)
        self.calls.wait = wait


def wrong(schedule, backend, arrays, **options):
    """In how many of the orders the mutant's answer is not the one that every order of the real backend gives."""
    right = Ring.of(schedule, tiles=paper).run(*arrays, **options)
    found = [Ring.of(schedule, seed=seed, tiles=paper, backend=backend).run(*arrays, **options) for seed in SEEDS]
    return sum(one.out.tobytes() != right.out.tobytes() for one in found)


@pytest.mark.parametrize(("strategy", "partition"), RUNS)
def test_without_the_event_wait_the_answer_is_wrong(strategy, partition):
    schedule = small(strategy, partition)
    arrays = Problem.of(schedule.workload, 1).arrays
    assert wrong(schedule, CupyBackend, arrays) == 0
    # in a ring of keys receives into a slot still read are the race, in one of queries sends of a state still computed
    assert wrong(schedule, Hasty, arrays) > 0


def test_kernels_and_posts_follow_the_callers_stream_and_he_follows_them():
    """Inputs that the caller's stream makes late, and outputs that it reads at once."""
    schedule, counts = small(), Counter()
    problem = Problem.of(schedule.workload, 2)
    for backend in (CupyBackend, Deaf):
        for seed in SEEDS:
            ring = Ring.of(schedule, seed=seed, tiles=paper, backend=backend)
            found = ring.run(*problem.arrays, late=True)
            counts[backend] += np.abs(found.out - problem.out).max() < 2e-6
    assert counts[CupyBackend] == len(SEEDS)
    assert counts[Deaf] < len(SEEDS)


@pytest.mark.parametrize("pass_", ["forward", "both"])
def test_a_second_run_allocates_nothing_and_no_run_waits_for_the_device(pass_):
    schedule = of_pass(small(world_size=6), pass_)
    problem = BackwardProblem.of(of_pass(schedule, "forward").workload, 4)
    others = {"dout": problem.dout} if pass_ == "both" else {}
    ring = Ring.of(schedule, tiles=paper)
    for turn in range(3):
        ring.run(*(problem.q, problem.k, problem.v), **others)
        assert ("synchronize",) not in ring.during, turn
        empties = [entry for entry in ring.during if entry[0] == "empty"]
        assert turn == 0 or empties == []


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
@pytest.mark.parametrize(("strategy", "partition"), RUNS)
def test_scratch_is_what_the_memory_model_says(strategy, partition, pass_):
    schedule = of_pass(small(strategy, partition, world_size=6, q_len=61), pass_)
    problem = BackwardProblem.of(of_pass(schedule, "forward").workload, 4)
    arrays = (problem.q, problem.k, problem.v)
    before = Ring.of(of_pass(schedule, "forward"), tiles=paper).run(*arrays)
    others = {"forward": {}, "both": {"dout": problem.dout}}.get(
        pass_, {"out": before.out, "lse": before.lse, "dout": problem.dout}
    )
    ring = Ring.of(schedule, tiles=paper)
    ring.run(*arrays, **others)
    for number, rank in enumerate(ring.ranks):
        predicted = rank.backend.footprint(schedule, number)
        assert rank.backend.nbytes == predicted.classes.get("scratch", 0) > 0


def test_a_kernel_that_fails_is_named_with_its_rank():
    schedule = small()

    class Broken(PaperTiles):
        def _attend(self, operands, band, scale):
            raise ArithmeticError("an illegal address")

    with pytest.raises(DeviceError, match=r"rank \d: at op \d+ \(\w+, step \d\): the device failed: .*an illegal address"):
        Ring.of(schedule, tiles=lambda gpu: (Broken(gpu),)).run(*Problem.of(schedule.workload, 1).arrays)


def test_half_precision_partials_keep_to_the_rule():
    """As cuDNN makes them: each tile's output is rounded once, then merged in float32."""
    for dtype in ("float16", "bfloat16"):
        schedule = small(dtype=dtype, world_size=8, q_len=128, head_dim=16)
        problem = Problem.of(schedule.workload, 6)
        found = Ring.of(schedule, tiles=lambda gpu: (PaperTiles(gpu, half=True),)).run(*problem.arrays)
        check_agrees(schedule.workload, problem, found)


class Picky(PaperTiles):
    """Half-precision partials, as cuDNN's, of the tiles that it takes: those with as many queries as keys."""

    def unfit(self, arrays, band):
        return "it wants as many queries as keys" if arrays[0].shape[1] != arrays[1].shape[1] else None


@pytest.mark.parametrize(("strategy", "partition"), RUNS)
def test_fused_kernels_with_partials_of_different_dtypes_share_a_state(strategy, partition):
    """What one kernel refuses another computes, and gives in float32 what the first gives in half precision."""
    schedule = of_pass(small(strategy, partition, dtype="bfloat16", q_len=64, head_dim=16, mask=Causal() & Window(20)), "both")
    problem = BackwardProblem.of(of_pass(schedule, "forward").workload, 5)
    arrays = problem.q, problem.k, problem.v
    ring = Ring.of(schedule, tiles=lambda gpu: (Picky(gpu, half=True), PaperTiles(gpu)))
    found = ring.run(*arrays, dout=problem.dout)
    check_agrees(schedule.workload, Problem.of_arrays(schedule.workload, arrays), found)


def test_the_memory_model_takes_the_partials_of_the_kernel_that_is_used():
    schedule = small(dtype="bfloat16", q_len=64, world_size=6)
    ring = Ring.of(schedule, tiles=lambda gpu: (PaperTiles(gpu, half=True), PaperTiles(gpu)))
    ring.run(*Problem.of(schedule.workload, 1).arrays)
    for number, rank in enumerate(ring.ranks):
        assert rank.backend.nbytes == rank.backend.footprint(schedule, number).classes["scratch"] > 0


def test_a_kernel_that_is_none_is_named():
    backend = Ring.of(small()).ranks[0].backend
    for kernel in ("gradients", "quantise"):
        op = Compute(id=7, step=0, phase="x", kernel=kernel, reads=(), writes=())
        with pytest.raises(DeviceError, match=f"backend 'cupy' has no kernel '{kernel}' \\(op 7\\)"):
            backend.compute(op, None, scale=1.0, poll=lambda: None)


def test_no_fused_kernel_for_a_tile_says_why_each_refuses():
    class Refusing(PaperTiles):
        def refuses(self, dtype, widths, band, *, backward):
            return f"{dtype} is beyond it"

    with pytest.raises(DeviceError, match="no fused kernel for float32 head_dim 8, v_head_dim 8: paper: float32 is beyond it"):
        Ring.of(small(), tiles=lambda gpu: (Refusing(gpu),)).run(*Problem.of(small().workload, 1).arrays)


def test_measured_on_the_devices_axis():
    schedule = small()
    ring = Ring.of(schedule, tiles=paper)
    ring.run(*Problem.of(schedule.workload, 1).arrays)
    for rank in ring.ranks:
        events = [event for event in rank.timeline.events if event.kind not in ("send", "recv")]
        ends = [event.end_s for event in events]
        assert ends == sorted(ends)
        assert all(event.start_s >= before.end_s for before, event in pairwise(events))
        # what launches nothing takes nothing
        assert all(event.duration_s == 0 for event in events if event.kind == "reset")
        assert all(event.duration_s > 0 for event in events if event.kind == "attend" and event.rank >= 0)


def test_times_are_kept_until_the_next_run_but_one():
    schedule = small(world_size=2)
    ring, arrays = Ring.of(schedule, tiles=paper), Problem.of(schedule.workload, 1).arrays
    ring.run(*arrays)
    walked = [rank._walked for rank in ring.ranks]
    ring.run(*arrays)
    assert walked[0].measured()
    ring.run(*arrays)
    with pytest.raises(DeviceError, match="kept until the next run but one"):
        walked[0].measured()


def test_slots_of_an_earlier_pass_serve_the_next():
    """A plan's programs share memory and backend: run forward, then backward of other inputs, then forward again."""
    schedule = small()
    problem = BackwardProblem.of(schedule.workload, 7)
    arrays = (problem.q, problem.k, problem.v)
    forward = Ring.of(schedule, tiles=paper)
    first = forward.run(*arrays)
    backward = forward.beside(replace(schedule, workload=replace(schedule.workload, pass_="backward")))
    found = backward.run(*arrays, out=first.out, lse=first.lse, dout=problem.dout)
    check_gradients(schedule.workload, problem, found)
    check_bits(first, forward.run(*arrays), "out", "lse")

"""A backward program with any one thing changed is refused, or gives the same gradients: nothing that does harm passes."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from ringsim.errors import ScheduleError
from ringsim.execution import execute
from ringsim.mask import mask_named
from ringsim.reference import dense_attention, dense_backward
from ringsim.schedule import Compute, Recv, Schedule, Send, Wait
from ringsim.workload import Workload

from .tampering import with_ranks

WORLDS = {"ring": 3, "burst": 3, "double-ring(2)": 4, "halo": 3, "q-ring": 3, "bidirectional": 2, "multi-ring(2)": 3}
KINDS = (("full", "contiguous"), ("causal", "zigzag"), ("window(3, 1)", "contiguous"), ("causal", "striped"))
MUTANTS = 60
"""Of each strategy."""


@cache
def problem(strategy, mask, partition):
    """A schedule, what it takes, and the exact gradients."""
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 3, "v_head_dim": 2, "dtype": "float64"}
    work = Workload(q_len=12, mask=mask_named(mask), pass_="backward", **shape)
    schedule = Schedule(workload=work, world_size=WORLDS[strategy], strategy=strategy, partition=partition)
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 12, heads, width)) for heads, width in ((4, 3), (2, 3), (2, 2), (4, 2)))
    out, lse = dense_attention(work, q, k, v)
    given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout}
    return schedule, given, dense_backward(work, dout, q, k, v)


def at(ops, kinds, dice):
    """The place of any op of these kinds."""
    return dice.choice([index for index, op in enumerate(ops) if isinstance(op, kinds)])


def changed_regions(op, which, change):
    regions = list(getattr(op, which))
    return replace(op, **{which: tuple(map(change, regions))})


def other_region(ops, dice):
    """A compute reads or writes something else of the same buffer."""
    index, which = at(ops, Compute, dice), dice.choice(("reads", "writes"))
    if regions := getattr(ops[index], which):
        old = dice.choice(regions)
        every = [r for op in ops if isinstance(op, Compute) for r in op.reads + op.writes if r.buffer == old.buffer]
        new = dice.choice(every)
        ops[index] = changed_regions(ops[index], which, lambda r: new if r is old else r)


def other_version(ops, dice):
    index, by = at(ops, Compute, dice), dice.choice((-1, 1))
    for which in dice.choice((("reads",), ("writes",), ("reads", "writes"))):
        ops[index] = changed_regions(ops[index], which, lambda r: replace(r, version=max(0, r.version + by)))


def other_tiles(ops, dice):
    index, other = at(ops, Compute, dice), at(ops, Compute, dice)
    ops[index] = replace(ops[index], tiles=ops[other].tiles)


def other_value(ops, dice):
    """What one compute writes is called what another writes, all over the program."""
    old, new = (dice.choice([r.value for op in ops if isinstance(op, Compute) for r in op.writes]) for _ in range(2))

    def renamed(region):
        return replace(region, value=new) if region.value == old else region

    for index, op in enumerate(ops):
        if isinstance(op, Compute):
            ops[index] = changed_regions(changed_regions(op, "reads", renamed), "writes", renamed)
        elif not isinstance(op, Wait):
            ops[index] = replace(op, region=renamed(op.region))


def other_message(ops, dice):
    index, other = at(ops, Send | Recv, dice), at(ops, Send | Recv, dice)
    name = dice.choice(("peer", "tag", "region"))
    ops[index] = replace(ops[index], **{name: getattr(ops[other], name)})


def left_out(ops, dice):
    del ops[dice.randrange(len(ops))]


def twice(ops, dice):
    index = dice.randrange(len(ops))
    ops.insert(index, ops[index])


def elsewhere(ops, dice):
    ops.insert(dice.randrange(len(ops)), ops.pop(dice.randrange(len(ops))))


def exchanged(ops, dice):
    index = dice.randrange(len(ops) - 1)
    ops[index], ops[index + 1] = ops[index + 1], ops[index]


def not_waited_for(ops, dice):
    """A post is waited for at the end alone."""
    index, last = at(ops, Wait, dice), max(i for i, op in enumerate(ops) if isinstance(op, Wait))
    if index < last:
        posts = list(ops[index].posts)
        late = posts.pop(dice.randrange(len(posts)))
        ops[last] = replace(ops[last], posts=(*ops[last].posts, late))
        ops[index : index + 1] = [replace(ops[index], posts=tuple(posts))] if posts else []


CHANGES = (other_region, other_region, other_version, other_tiles, other_value, other_message)
CHANGES += (left_out, twice, elsewhere, exchanged, not_waited_for)


@pytest.mark.parametrize("strategy", WORLDS)
def test_what_does_harm_is_found(strategy):
    found = Counter()
    for seed in range(MUTANTS):
        dice = random.Random(f"{strategy} {seed}")
        schedule, given, exact = problem(strategy, *dice.choice(KINDS))
        rank, change = dice.randrange(schedule.world_size), CHANGES[seed % len(CHANGES)]
        ops = list(schedule.program(rank))
        change(ops, dice)
        mutant = with_ranks(schedule, **{f"rank_{rank}": ops})
        try:
            mutant.validate()
        except ScheduleError:
            found["refused"] += 1
            continue
        result = execute(mutant, **given)
        for one, other in zip((result.dq, result.dk, result.dv), exact, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10, err_msg=f"{change.__name__}, seed {seed}")
        found["harmless"] += 1
    assert found["refused"] > MUTANTS // 3
